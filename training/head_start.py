"""How a new model's embedding head starts: as drawn, as the identity, or as the principal axes of what it gets."""

from __future__ import annotations

import copy

import torch
from accelerate.utils import gather_object

from ..data_scripts.preprocessing import geometry_of
from ..data_scripts.transforms import EvalTransform, TrainTransform
from .run_errors import ConfigError


_ROWS = 4096


def check_head_init(how, config, num_images=None):
    """Refuse a start that the widths, or the number of images, don't allow.

    Args:
        how: `xavier`, `identity` or `pca`.
        config: The `VPTSPConfig`.
        num_images: Of training; None where they are not counted yet.

    Raises:
        ConfigError: `identity` with another embedding width than the pooled features have, or `pca` with a larger one
            or with no more images than axes.
    """
    found, width = config.embedding_dim, config.pooled_dim
    if (how == "identity" and found != width) or (how == "pca" and found > width):
        expected = f"{'==' if how == 'identity' else '<='} {width}, the width of the pooled features"
        least = "" if how == "identity" else " or less"
        raise ConfigError(
            f"embedding_dim must be {expected}, with head_init {how}, got {found}: set --embedding_dim "
            f"{width}{least}, or --head_init xavier"
        )
    if how == "pca" and num_images is not None and num_images <= found:
        raise _too_few(num_images - 1, found, num_images)


def _too_few(rank, dim, num_images):
    return ConfigError(
        f"embedding_dim must be <= {rank} with head_init pca, got {dim}: the {num_images} training images span "
        "no more directions"
    )


def start_head(model, how, features):
    """Set the projection of a new model's embedding head. The head of the semantic pass stays as it is.

    Args:
        model: A [`VPTSPModel`].
        how: `xavier`, as it is drawn; `identity`; or `pca`, of which every process takes what the first has computed.
        features: Function that gives `head_inputs` of the training images, `(n, D)` float32 on the CPU.

    Raises:
        ConfigError: the training images span fewer directions than the embeddings have.
    """
    if how == "xavier":
        return
    if how == "identity":
        weight, bias = torch.eye(model.config.pooled_dim), torch.zeros(model.config.pooled_dim)
    else:
        weight, bias = gather_object([principal_axes(features(), model.config.embedding_dim)])[0]
    with torch.no_grad():
        for name in ("projection", "distillation_projection"):
            if (projection := getattr(model.head, name, None)) is not None:
                projection.weight.copy_(weight)
                projection.bias.copy_(bias)


def head_inputs(model, pixel_values):
    """What the head's projection gets of images `(B, 3, S, S)`: pooled, prompts taking part, and its norm; `(B, D)`.

    Of a distilled DeiT's two tokens, the mean.
    """
    pooled, head = model.encode(model.embed_patches(pixel_values), model.prompts()), model.head
    if pooled.dim() == 2:
        return head.norm(pooled)
    return (head.norm(pooled[:, 0]) + head.distillation_norm(pooled[:, 1])) / 2


def principal_axes(features, dim):
    """Projection on the first principal axes.

    Args:
        features: `(n, D)` float32.
        dim: E, number of axes.

    Returns:
        Weight `(E, D)`, rows orthonormal, by falling variance, the largest component of each positive; and bias
        `(E,)`, by which the mean goes to 0. Both float32.

    Raises:
        ConfigError: the features have no variance in E directions.
    """
    parts = features.split(_ROWS)  # float64 only in parts
    mean = sum(part.double().sum(0) for part in parts) / len(features)
    centred = (part.double() - mean for part in parts)
    variances, axes = torch.linalg.eigh(sum(part.T @ part for part in centred) / len(features))
    variances, axes = variances.flip(0), axes.T.flip(0)
    rank = int((variances > variances[0].clamp(min=0) * 1e-10).sum())
    if rank < dim:
        raise _too_few(rank, dim, len(features))
    axes = axes[:dim]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * largest.sign()
    return axes.float(), -(axes @ mean).float()


def as_evaluated(dataset, processor):
    """A training set whose images are cut as for evaluation; one with a transform of its own, as it is."""
    transform = getattr(dataset, "transform", None)
    if not isinstance(transform, TrainTransform):
        return dataset
    dataset = copy.copy(dataset)
    size, resize = geometry_of(processor, transform.size)
    dataset.transform = EvalTransform(resize, size)
    return dataset


__all__ = ["as_evaluated", "check_head_init", "head_inputs", "principal_axes", "start_head"]
