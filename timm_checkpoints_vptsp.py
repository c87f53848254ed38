"""timm's checkpoints of plain vision transformers as transformers' models: by tensor name, without timm.

A timm repository has a `config.json` with `architecture` and `pretrained_cfg`, but no `model_type`, and (for our
purposes) a `model.safetensors`. What is known here are the architectures whose forward pass is that of `ViTModel` or
`DeiTModel`; others may have the same tensor names and compute something else, so they are refused by name.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from transformers import DeiTConfig, ViTConfig


# Width, layers, heads.
_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_ARCHITECTURE = re.compile(rf"(vit|deit)_({'|'.join(_SIZES)})_(distilled_)?patch(\d+)_\d+")

# Arguments of timm's model that change neither tensors nor what is computed of them, but what comes after.
_HARMLESS_ARGUMENTS = {"img_size", "num_classes"}

# Classifiers: retrieval has heads of its own.
_DROPPED = {f"{layer}.{part}" for layer in ("head", "head_dist", "pre_logits.fc") for part in ("weight", "bias")}


class TimmPreprocessing(NamedTuple):
    """What a checkpoint's `pretrained_cfg` says of its images.

    Attributes:
        mean: Of red, green and blue.
        std: The same.
        image_size: Side of what the model sees, in pixels.
        crop_share: Share of the resized image's short side that the central crop keeps, timm's `crop_pct`.
        interpolation: `bicubic` or `bilinear`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    crop_share: float
    interpolation: str


def is_timm_config(values: dict) -> bool:
    """Whether the content of a `config.json` is timm's."""
    return "pretrained_cfg" in values and "model_type" not in values


def timm_preprocessing(values: dict, source) -> TimmPreprocessing:
    """Preprocessing of a checkpoint, from its `config.json`.

    Args:
        values: Content of `config.json`.
        source: Its repository or folder, for messages.

    Raises:
        ValueError: a field is missing, images are not square, or the interpolation is another.
    """
    pretrained = values["pretrained_cfg"]
    if missing := {"mean", "std", "input_size", "crop_pct", "interpolation"} - set(pretrained):
        raise ValueError(f"pretrained_cfg of the timm checkpoint {str(source)!r} lacks {', '.join(sorted(missing))}")
    _, height, width = pretrained["input_size"]
    if height != width:
        raise ValueError(f"the timm checkpoint {str(source)!r} must take square images, got {height} x {width}")
    if pretrained["interpolation"] not in ("bicubic", "bilinear"):
        raise ValueError(
            f"interpolation of the timm checkpoint {str(source)!r} must be bicubic or bilinear, "
            f"got {pretrained['interpolation']!r}"
        )
    return TimmPreprocessing(
        mean=tuple(pretrained["mean"]),
        std=tuple(pretrained["std"]),
        image_size=height,
        crop_share=pretrained["crop_pct"],
        interpolation=pretrained["interpolation"],
    )


def timm_backbone_config(values: dict, source) -> ViTConfig | DeiTConfig:
    """Configuration of the transformers model that a timm checkpoint's weights belong in.

    Args:
        values: Content of `config.json`.
        source: Its repository or folder, for messages.

    Raises:
        ValueError: the architecture is none of those that are known to be the same, or was changed by `model_args`.
    """
    architecture = values.get("architecture")
    match = _ARCHITECTURE.fullmatch(str(architecture))
    if match is None:
        raise ValueError(
            f"architecture of the timm checkpoint {str(source)!r} must be (vit|deit)_({'|'.join(_SIZES)})"
            f"[_distilled]_patch<P>_<S>, got {architecture!r}"
        )
    if changed := set(values.get("model_args") or {}) - _HARMLESS_ARGUMENTS:
        raise ValueError(
            f"model_args of the timm checkpoint {str(source)!r} change its architecture: {', '.join(sorted(changed))}"
        )
    _, size, distilled, patch_size = match.groups()
    width, layers, heads = _SIZES[size]
    return (DeiTConfig if distilled else ViTConfig)(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        layer_norm_eps=1e-6,
        image_size=timm_preprocessing(values, source).image_size,
        patch_size=int(patch_size),
    )


def timm_backbone_weights(tensors, backbone, source) -> dict[str, torch.Tensor]:
    """A timm checkpoint's tensors under the names that they have in `backbone`.

    Args:
        tensors: timm's name -> tensor.
        backbone: Model of `timm_backbone_config`; for its names and shapes, so it may be on the meta device.
        source: The checkpoint's repository or folder, for messages.

    Raises:
        ValueError: tensors are missing, unknown or of another shape; all are named.
    """
    shapes = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    names = _names_in_backbone(backbone.config)
    problems = []
    if missing := names.keys() - tensors.keys():
        problems.append(f"lacks {', '.join(sorted(missing))}")
    if unknown := tensors.keys() - names.keys() - _DROPPED:
        problems.append(f"has unknown {', '.join(sorted(unknown))}")
    for name in sorted(names.keys() & tensors.keys()):
        first, *others = shapes[names[name][0]]
        expected = (first * len(names[name]), *others)
        if tensors[name].shape != expected:
            problems.append(f"has {name} {tuple(tensors[name].shape)} instead of {expected}")
    if problems:
        raise ValueError(f"the timm checkpoint {str(source)!r} {' and '.join(problems)}")
    return {
        target: part.clone()  # so that no two tensors share memory
        for name, targets in names.items()
        for target, part in zip(targets, tensors[name].chunk(len(targets)), strict=True)
    }


def _names_in_backbone(config) -> dict[str, tuple[str, ...]]:
    """timm's name -> names of the tensors in the transformers model that lie in it one below the other."""
    modules = {"patch_embed.proj": ("embeddings.patch_embeddings.projection",), "norm": ("layernorm",)}
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"blocks.{layer}", f"layers.{layer}"
        modules |= {
            f"{theirs}.norm1": (f"{ours}.layernorm_before",),
            f"{theirs}.attn.qkv": tuple(f"{ours}.attention.{letter}_proj" for letter in "qkv"),
            f"{theirs}.attn.proj": (f"{ours}.attention.o_proj",),
            f"{theirs}.norm2": (f"{ours}.layernorm_after",),
            f"{theirs}.mlp.fc1": (f"{ours}.mlp.fc1",),
            f"{theirs}.mlp.fc2": (f"{ours}.mlp.fc2",),
        }
    names = {
        f"{module}.{part}": tuple(f"{target}.{part}" for target in targets)
        for module, targets in modules.items()
        for part in ("weight", "bias")
    }
    names |= {"cls_token": ("embeddings.cls_token",), "pos_embed": ("embeddings.position_embeddings",)}
    if config.model_type == "deit":
        names["dist_token"] = ("embeddings.distillation_token",)
    return names


__all__ = [
    "TimmPreprocessing",
    "is_timm_config",
    "timm_backbone_config",
    "timm_backbone_weights",
    "timm_preprocessing",
]
