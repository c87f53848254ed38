"""Open a pretrained backbone, whichever library wrote its checkpoint: configuration, weights, image size."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from .backbones_vptsp import family_of
from .timm_checkpoints_vptsp import is_timm_config, timm_backbone_config, timm_backbone_weights


logger = logging.get_logger(__name__)


def read_timm_config(source, revision=None, **hub_kwargs) -> dict | None:
    """Content of `config.json` where it is timm's, else None.

    Args:
        source: Hub name or local folder.
        revision: Commit, tag or branch on the Hub.
        **hub_kwargs: `cache_dir`, `token`, `local_files_only` and the like.

    Raises:
        OSError: there is no such repository, or it is not to be had.
    """
    path = cached_file(source, CONFIG_NAME, revision=revision or "main", **hub_kwargs)
    if path is None:  # a folder without one
        return None
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    return values if is_timm_config(values) else None


def open_config(source, revision=None, image_size=None, **hub_kwargs) -> PreTrainedConfig:
    """Configuration of a pretrained backbone.

    Args:
        source: Hub name or local folder of a checkpoint, of transformers or of timm.
        revision: Commit, tag or branch on the Hub.
        image_size: Side of the images, in pixels; None for what the backbone was trained with.
        **hub_kwargs: `cache_dir`, `token`, `local_files_only` and the like.

    Raises:
        OSError: the checkpoint is not to be had.
        ValueError: the backbone is not supported, or not for images of this size.
    """
    timm_config = read_timm_config(source, revision, **hub_kwargs)
    if timm_config is not None:
        config = timm_backbone_config(timm_config, source)
    else:
        config = AutoConfig.from_pretrained(source, revision=revision or "main", **hub_kwargs)
    family_of(config)
    if image_size in (None, config.image_size):
        return config
    logger.warning(
        f"{source} was trained with images of {config.image_size} pixels and is used with {image_size}: its position "
        "embeddings are interpolated"
    )
    return resized_config(config, image_size)


def open_backbone(source, revision=None, **hub_kwargs) -> nn.Module:
    """A pretrained backbone with its weights, in the dtype of its checkpoint.

    Args:
        source: Hub name or local folder of a checkpoint, of transformers or of timm.
        revision: Commit, tag or branch on the Hub.
        **hub_kwargs: `cache_dir`, `token`, `local_files_only` and the like.

    Raises:
        OSError: the checkpoint is not to be had.
        ValueError: the backbone is not supported, or tensors are missing (of timm's: or unknown, or misshapen).
    """
    config = open_config(source, revision, **hub_kwargs)
    if read_timm_config(source, revision, **hub_kwargs) is not None:
        return _open_timm_backbone(source, revision, config, **hub_kwargs)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the weights of a pooler or a classifier are not missed; others are named below
    try:
        backbone, info = AutoModel.from_pretrained(
            source,
            config=config,
            revision=revision or "main",
            use_safetensors=True,  # never a pickle
            trust_remote_code=False,
            output_loading_info=True,
            **family_of(config).model_options,
            **hub_kwargs,
        )
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise ValueError(f"the backbone {str(source)!r} lacks {', '.join(sorted(info['missing_keys']))}")
    return backbone


def _open_timm_backbone(source, revision, config, **hub_kwargs):
    weights = cached_file(
        source,
        SAFE_WEIGHTS_NAME,
        revision=revision or "main",
        _raise_exceptions_for_missing_entries=False,
        **hub_kwargs,
    )
    if weights is None:
        raise ValueError(f"the timm checkpoint {str(source)!r} must hold {SAFE_WEIGHTS_NAME}; no other format is read")
    with torch.device("meta"):
        backbone = family_of(config).build(config)
    backbone.load_state_dict(timm_backbone_weights(load_file(weights), backbone, source), strict=True, assign=True)
    return backbone.eval()


def resized_config(config, image_size) -> PreTrainedConfig:
    """A copy of a backbone's configuration for square images of another size.

    Raises:
        ValueError: the size is not a multiple of the patch size, or the backbone does not take squares.
    """
    if not (isinstance(config.image_size, int) and isinstance(config.patch_size, int)):
        raise ValueError(
            "image_size can only be changed for backbones of square images and patches, got "
            f"{config.image_size} and {config.patch_size}"
        )
    if image_size < config.patch_size or image_size % config.patch_size:
        raise ValueError(
            f"image_size must be a multiple of the backbone's patch size {config.patch_size}, got {image_size}"
        )
    config = copy.deepcopy(config)
    config.image_size = image_size
    return config


@torch.no_grad()
def resized_weights(backbone, image_size) -> dict[str, torch.Tensor]:
    """A backbone's weights with its position embeddings interpolated for square images of another size.

    By transformers' own `interpolate_pos_encoding` (bicubic, without the class tokens), so the same as giving it to
    every forward pass, but done once.

    Args:
        backbone: In the size that it was trained with.
        image_size: Side in pixels, a multiple of the patch size.
    """
    weights, config = backbone.state_dict(), backbone.config
    if image_size == config.image_size:
        return weights
    num_tokens = family_of(config).num_prefix_tokens + (image_size // config.patch_size) ** 2
    tokens = torch.empty(1, num_tokens, config.hidden_size, device="meta")  # only its shape is looked at
    positions = backbone.embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
    return {**weights, "embeddings.position_embeddings": positions.contiguous()}


__all__ = ["open_backbone", "open_config", "read_timm_config", "resized_config", "resized_weights"]
