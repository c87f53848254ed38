"""Load a pretrained backbone, whichever library wrote it: configuration, weights, image size, fingerprint.

Checkpoints of transformers, also of an image and a text tower, and of timm (without timm), from the Hub or a local
folder, in safetensors alone.

Part of what a shared retriever needs, like `modeling_vptsp.py`.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from .backbones_vptsp import family_of


logger = logging.get_logger(__name__)


# ---- Checkpoints of timm
#
# timm's checkpoints of vision transformers as transformers' models: by tensor name, without timm.
#
# A timm repository has a `config.json` with `architecture` and `pretrained_cfg`, but no `model_type`, and (for our
# purposes) a `model.safetensors`. What is known here are the architectures whose forward pass is that of a model of
# transformers; others may have the same tensor names and compute something else, so they are refused by name.


# Width, layers, heads, width of the MLP.
_SIZES = {
    "tiny": (192, 12, 3, 768),
    "xsmall": (256, 10, 4, 1024),
    "small": (384, 12, 6, 1536),
    "medium": (512, 12, 8, 2048),
    "betwixt": (640, 12, 10, 2560),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "so400m": (1152, 27, 16, 4304),
    "giant": (1408, 40, 16, 6144),
    "giantopt": (1536, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
}
_DINOV2_SIZES = {name: _SIZES[name] for name in ("small", "base", "large")} | {"giant": (1536, 40, 24, 6144)}
_DINOV3_SIZES = {name: _SIZES[name] for name in ("tiny", "small", "base", "large")}
_DINOV3_SIZES |= {"small_plus": _SIZES["small"], "huge_plus": (1280, 32, 20, 5120), "7b": (4096, 40, 32, 8192)}


class _TimmKind(NamedTuple):
    """Architectures of timm that one model of transformers computes.

    Attributes:
        pattern: Of their names, with groups `size` and `patch`, and such as `fields` wants.
        model_type: Of the model of transformers.
        sizes: Name of a size -> width, layers, heads, width of the MLP.
        fields: From the match, what else the model's configuration says.
        example: A name, with `{}` for the size.
    """

    pattern: str
    model_type: str
    sizes: dict
    fields: Callable[[re.Match], dict]
    example: str


_PLAIN_SIZES = {name: _SIZES[name] for name in ("tiny", "small", "base", "large", "huge")}
_SIGLIP_WITH_TANH = r"vit_(base_patch32|large_patch16_siglip_(gap_)?512|so400m_patch16|giantopt)"
_TIMM_KINDS = (
    _TimmKind(
        r"(?:vit|deit)_(?P<size>[a-z]+)_patch(?P<patch>\d+)_\d+",
        "vit",
        _PLAIN_SIZES,
        lambda match: {"layer_norm_eps": 1e-6},
        "vit_{}_patch16_224",
    ),
    _TimmKind(
        r"(?:vit|deit)_(?P<size>[a-z]+)_distilled_patch(?P<patch>\d+)_\d+",
        "deit",
        _PLAIN_SIZES,
        lambda match: {"layer_norm_eps": 1e-6},
        "deit_{}_distilled_patch16_224",
    ),
    _TimmKind(
        r"vit_(?P<size>[a-z]+)_patch(?P<patch>\d+)_dinov2",
        "dinov2",
        _DINOV2_SIZES,
        lambda match: {"layer_norm_eps": 1e-6, "use_swiglu_ffn": match["size"] == "giant"},
        "vit_{}_patch14_dinov2",
    ),
    _TimmKind(
        r"vit_(?P<size>[a-z]+)_patch(?P<patch>\d+)_reg(?P<registers>\d+)_dinov2",
        "dinov2_with_registers",
        _DINOV2_SIZES,
        lambda match: {
            "layer_norm_eps": 1e-6,
            "use_swiglu_ffn": match["size"] == "giant",
            "num_register_tokens": int(match["registers"]),
        },
        "vit_{}_patch14_reg4_dinov2",
    ),
    _TimmKind(
        r"vit_(?P<size>[a-z]+(?:_plus)?|7b)_patch(?P<patch>\d+)_dinov3(?P<bias>_qkvb)?",
        "dinov3_vit",
        _DINOV3_SIZES,
        lambda match: {
            "layer_norm_eps": 1e-5,
            "num_register_tokens": 4,
            "query_bias": match["bias"] is not None,
            "value_bias": match["bias"] is not None,
            **({"use_gated_mlp": True, "hidden_act": "silu"} if re.search("plus|7b", match["size"]) else {}),
        },
        "vit_{}_patch16_dinov3",
    ),
    _TimmKind(
        r"vit_(?P<size>[a-z]+)_patch(?P<patch>\d+)(?P<plus>(?<=base_patch16)_plus)?_clip_(?P<quick>quickgelu_)?\d+",
        "clip_vision_model",
        {name: size for name, size in _SIZES.items() if name not in ("tiny", "small", "so400m", "giantopt")},
        lambda match: {
            "layer_norm_eps": 1e-5,
            "hidden_act": "quick_gelu" if match["quick"] else "gelu",
            **({"hidden_size": 896, "num_attention_heads": 14, "intermediate_size": 3584} if match["plus"] else {}),
        },
        "vit_{}_patch16_clip_224",
    ),
    _TimmKind(
        r"vit_(?P<size>[a-z]+|so400m)_patch(?P<patch>\d+)_siglip_(?P<gap>gap_)?\d+",
        "siglip_vision_model",
        {name: _SIZES[name] for name in ("base", "large", "so400m", "giantopt")},
        lambda match: {
            "layer_norm_eps": 1e-6,
            "vision_use_head": match["gap"] is None,
            "hidden_act": "gelu_pytorch_tanh" if re.match(_SIGLIP_WITH_TANH, match[0]) else "gelu",
        },
        "vit_{}_patch16_siglip_256",
    ),
)

# Pattern of an architecture's name -> why no model of transformers computes it.
_TIMM_REASONS = {
    r"eva02_.*": "its MLP with a norm inside and its rotary positions in pairs are in no model of transformers",
    r"naflexvit_.*": "it takes patches of any number, under names of its own",
    r"vit_.*_reg\d+_(gap|map)_\d+": "it has registers but no class token, as no model of transformers has",
    r"deit3_.*": "transformers' DeiT has no layer scale",
    r"vit_.*_rope_.*": "its rotary positions are in no model of transformers",
}

# Arguments of timm's model that change neither tensors nor what is computed of them, but what comes after or which
# other sizes of images it would take.
_HARMLESS_ARGUMENTS = {"img_size", "num_classes", "dynamic_img_size"}

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


def timm_backbone_config(values: dict, source) -> PreTrainedConfig:
    """Configuration of the transformers model that a timm checkpoint's weights belong in.

    Args:
        values: Content of `config.json`.
        source: Its repository or folder, for messages.

    Raises:
        ValueError: the architecture is none of those that are known to be the same, or was changed by `model_args`.
    """
    kind, match = _timm_kind(str(values.get("architecture")), source)
    if changed := set(values.get("model_args") or {}) - _HARMLESS_ARGUMENTS:
        raise ValueError(
            f"model_args of the timm checkpoint {str(source)!r} change its architecture: {', '.join(sorted(changed))}"
        )
    width, layers, heads, mlp_width = kind.sizes[match["size"]]
    by_ratio = kind.model_type.startswith("dinov2")
    fields = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **({"mlp_ratio": mlp_width // width} if by_ratio else {"intermediate_size": mlp_width}),
        "image_size": timm_preprocessing(values, source).image_size,
        "patch_size": int(match["patch"]),
        **kind.fields(match),
    }
    return CONFIG_MAPPING[kind.model_type](**fields)


def _timm_kind(architecture, source):
    """What an architecture's name says: its [`_TimmKind`] and the match of its pattern."""
    for kind in _TIMM_KINDS:
        match = re.fullmatch(kind.pattern, architecture)
        if match and match["size"] in kind.sizes:
            return kind, match
    reasons = (reason for pattern, reason in _TIMM_REASONS.items() if re.fullmatch(pattern, architecture))
    reason = next(reasons, "that a model of transformers computes the same is not known")
    known = [kind.example.format(size) for kind in _TIMM_KINDS for size in kind.sizes]
    raise ValueError(
        f"architecture of the timm checkpoint {str(source)!r} must be one like "
        f"{', '.join(kind.example.format('<size>') for kind in _TIMM_KINDS)}, got {architecture!r}: {reason}. "
        f"The nearest name is {get_close_matches(architecture, known, 1, cutoff=0)[0]}"
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
    shapes = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    groups = _names_in_backbone(backbone.config, shapes)
    expected = {name: shape for group in groups for name, shape in _shapes_of_timm(backbone.config, *group, shapes)}
    problems = []
    if missing := expected.keys() - tensors.keys():
        problems.append(f"lacks {', '.join(sorted(missing))}")
    if unknown := tensors.keys() - expected.keys() - _DROPPED:
        problems.append(f"has unknown {', '.join(sorted(unknown))}")
    for name in sorted(expected.keys() & tensors.keys()):
        if tensors[name].shape != expected[name]:
            problems.append(f"has {name} {tuple(tensors[name].shape)} instead of {expected[name]}")
    if problems:
        raise ValueError(f"the timm checkpoint {str(source)!r} {' and '.join(problems)}")
    # what pretraining alone used is not in timm's checkpoints
    unused = [name for name in shapes if name == "embeddings.mask_token"]
    weights = {name: torch.zeros(shapes[name], dtype=widest_dtype(tensors)) for name in unused}
    for theirs, ours in groups:
        joined = torch.cat([tensors[name] for name in theirs])
        if _lacks_class_position(backbone.config, theirs):
            joined = nn.functional.pad(joined, (0, 0, 1, 0))
        for name, part in zip(ours, joined.chunk(len(ours)), strict=True):
            weights[name] = part.reshape(shapes[name]).clone()  # so that no two tensors share memory
    return weights


def _lacks_class_position(config, theirs) -> bool:
    """Whether a tensor holds positions of patches alone: timm adds that of the class token to the token itself."""
    return config.model_type == "dinov2_with_registers" and theirs == ("pos_embed",)


def _shapes_of_timm(config, theirs, ours, shapes):
    """Names of timm's tensors that hold others of the transformers model, each with the shape that it must have."""
    rows, *others = shapes[ours[0]]
    if len(theirs) == 2:  # queries, and keys with values
        return (theirs[0], (rows // 3, *others)), (theirs[1], (rows // 3 * 2, *others))
    if theirs[0] not in ("cls_token", "pos_embed"):
        return ((theirs[0], (rows * len(ours), *others)),)
    *_, tokens, width = 1, 1, *shapes[ours[0]]  # of timm's, the first axis is always that of images
    return ((theirs[0], (1, tokens - _lacks_class_position(config, theirs), width)),)


# timm's modules and tensors in a layer, and those that they hold, one below the other.
_ATTENTION_OF_TIMM = (
    ("attn.qkv", "attention.q_proj attention.k_proj attention.v_proj"),
    ("attn.proj", "attention.o_proj"),
)
_MLP_OF_TIMM = (("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))
_VIT_OF_TIMM = (("norm1", "layernorm_before"), ("norm2", "layernorm_after"), *_ATTENTION_OF_TIMM, *_MLP_OF_TIMM)
_DINOV2_OF_TIMM = (
    *(("norm1", "norm1"), ("norm2", "norm2"), *_ATTENTION_OF_TIMM, *_MLP_OF_TIMM),
    *(("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1")),
    *(("mlp.fc1", "mlp.gate_proj mlp.up_proj"), ("mlp.fc2", "mlp.down_proj")),
)
_DINOV3_OF_TIMM = (
    *(("norm1", "norm1"), ("norm2", "norm2"), *_ATTENTION_OF_TIMM),
    *(("attn.q_bias", "attention.q_proj.bias"), ("attn.v_bias", "attention.v_proj.bias")),
    *(("gamma_1", "layer_scale1.lambda1"), ("gamma_2", "layer_scale2.lambda1"), ("mlp.fc2", "mlp.down_proj")),
)
_CLIP_OF_TIMM = (
    *(("norm1", "layer_norm1"), ("norm2", "layer_norm2"), *_MLP_OF_TIMM),
    ("attn.qkv", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
    ("attn.proj", "self_attn.out_proj"),
)
_LAYERS_OF_TIMM = {
    "vit": ("layers", _VIT_OF_TIMM),
    "deit": ("layers", _VIT_OF_TIMM),
    "dinov2": ("encoder.layer", _DINOV2_OF_TIMM),
    "dinov2_with_registers": ("encoder.layer", _DINOV2_OF_TIMM),
    "dinov3_vit": ("model.layer", _DINOV3_OF_TIMM),
    "clip_vision_model": ("encoder.layers", _CLIP_OF_TIMM),
    "siglip_vision_model": ("encoder.layers", _CLIP_OF_TIMM),
}
# The same outside of the layers; no model has two places for one.
_OUTSIDE_OF_TIMM = (
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("patch_embed.proj", "embeddings.patch_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("cls_token", "embeddings.cls_token"),
    ("cls_token", "embeddings.class_embedding"),
    ("dist_token", "embeddings.distillation_token"),
    ("reg_token", "embeddings.register_tokens"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("pos_embed", "embeddings.position_embedding.weight"),
    ("norm_pre", "pre_layrnorm"),
    *(("norm", "layernorm"), ("norm", "norm"), ("norm", "post_layernorm")),
    ("attn_pool.latent", "head.probe"),
    ("attn_pool.q.weight attn_pool.kv.weight", "head.attention.in_proj_weight"),
    ("attn_pool.q.bias attn_pool.kv.bias", "head.attention.in_proj_bias"),
    ("attn_pool.proj", "head.attention.out_proj"),
    ("attn_pool.norm", "head.layernorm"),
    *(("attn_pool.mlp.fc1", "head.mlp.fc1"), ("attn_pool.mlp.fc2", "head.mlp.fc2")),
)


def _names_in_backbone(config, shapes) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """timm's tensors, and those of the transformers model that they hold, one below the other: names of both.

    Args:
        config: The model's.
        shapes: Name -> shape of the model's tensors.
    """
    layers, inside = _LAYERS_OF_TIMM[config.model_type]
    if config.model_type == "dinov3_vit":
        gated = (("mlp.fc1_g", "mlp.gate_proj"), ("mlp.fc1_x", "mlp.up_proj"))
        inside = (*inside, *(gated if config.use_gated_mlp else (("mlp.fc1", "mlp.up_proj"),)))
    pairs = [("", "", *pair) for pair in _OUTSIDE_OF_TIMM]
    pairs += [(f"blocks.{n}.", f"{layers}.{n}.", *pair) for n in range(config.num_hidden_layers) for pair in inside]
    groups = []
    for before_theirs, before_ours, theirs, ours in pairs:
        for part in ("", ".weight", ".bias"):
            names = tuple(f"{before_ours}{name}{part}" for name in ours.split())
            if all(name in shapes for name in names):
                groups.append((tuple(f"{before_theirs}{name}{part}" for name in theirs.split()), names))
    return groups


# ---- Opening


# Arguments of `from_pretrained` that say where files are, and so go to every look-up on the Hub.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "subfolder")


def check_hub_arguments(given):
    """Raise a `TypeError` for keywords that are none of `HUB_ARGUMENTS`: what looks files up passes over them."""
    if unknown := [name for name in given if name not in HUB_ARGUMENTS]:
        near = "".join(
            f"; did you mean {name!r}?" for name in difflib.get_close_matches(unknown[0], HUB_ARGUMENTS, n=1)
        )
        raise TypeError(f"there is no argument {', '.join(unknown)} of a look-up on the Hub{near}")


# In front of a fingerprint that says nothing about names; those without it are of the first kind.
FINGERPRINT_PREFIX = "v2:"

# Names of tensors before transformers 5.9 (ViT, DeiT) and 5.18 (DINOv2), and the names that they have since.
_ATTENTION_NAMES = (
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
)
_VIT_NAMES = (
    ("encoder.layer.", "layers."),
    *_ATTENTION_NAMES,
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)
_RENAMED = {"vit": _VIT_NAMES, "deit": _VIT_NAMES, "dinov2": _ATTENTION_NAMES}

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_STORED_DTYPES = ("F64", "F32", "F16", "BF16")  # what safetensors calls them

# Parts of checkpoints inside the backbone that retrieval has no use for.
_UNUSED_PARTS = ("mask_token", "position_ids")

# Model types with a tower for images and one for texts, of which only the first is read. (MLCD has none for texts, but
# its authors nest the configuration too.)
_TWO_TOWERS = ("clip", "siglip", "siglip2", "mlcd")
_IMAGE_TOWER = "vision_model."


# Of a saved retriever's tensors, in the metadata of their file, so that it goes where they go. Tools that write them
# anew leave it out, or must.
WEIGHTS_DIGEST = "vptsp_sha256"


def read_weights(path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, compared with their digest where it has one (see `write_digest`).

    Raises:
        ValueError: the file is cut short or damaged; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get(WEIGHTS_DIGEST)
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or not in safetensors' format ({error})") from error
    if expected is not None and (found := _weights_digest(weights)) != expected:
        raise ValueError(
            f"{path} is damaged: the SHA-256 of its tensors is {found[:12]}..., {expected[:12]}... was written. If "
            f"another tool has changed them on purpose, let it leave {WEIGHTS_DIGEST} out of the file's metadata"
        )
    return weights


def write_digest(path):
    """Write a safetensors file anew, with the digest of its tensors, which `read_weights` compares, in its metadata.

    Args:
        path: The file; it is replaced in one step.
    """
    temporary = Path(f"{path}.tmp")
    save_with_digest(load_file(path), temporary)
    temporary.replace(path)


def save_with_digest(weights, path):
    """Write tensors to a safetensors file, with their digest in its metadata.

    Args:
        weights: Name -> tensor.
        path: The file.
    """
    metadata = {"format": "pt", WEIGHTS_DIGEST: _weights_digest(weights)}
    save_file(weights, path, metadata=metadata)
    with Path(path).open("rb+") as file:  # safetensors shuffles metadata: the same weights shall be the same bytes
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = json.dumps({**header, "__metadata__": metadata}, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(ordered.ljust(length))


def _weights_digest(weights) -> str:
    """SHA-256 of names, dtypes, shapes and all bytes, whatever their order in the file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class FoundBackbone(NamedTuple):
    """A pretrained backbone that is there: where, in which version, and its configuration.

    Attributes:
        source: Hub name or local folder.
        revision: Commit on the Hub.
        config: Of the transformers model that its weights belong in.
        is_timm: Whether the checkpoint is timm's.
        tower: What the names of its tensors begin with in a checkpoint that holds other models too; empty otherwise.
    """

    source: str
    revision: str | None
    config: PreTrainedConfig
    is_timm: bool
    tower: str = ""

    def config_at(self, image_size=None) -> PreTrainedConfig:
        """A copy of its configuration, for images of a size in pixels; None for what it was trained with.

        Raises:
            ValueError: the backbone is not for images of this size.
        """
        family = family_of(self.config)
        if image_size in (None, family.image_size):
            return copy.deepcopy(self.config)
        config = resized_config(self.config, image_size)
        logger.warning_once(  # a run may open its backbone more than once
            f"{self.source} was trained with images of {family.image_size} pixels and is used with {image_size}: its "
            f"positions are {'interpolated' if family.interpolates_positions else 'computed'} for that size"
        )
        return config


def find_backbone(source, revision=None, **hub_kwargs) -> FoundBackbone:
    """Look a pretrained backbone up, and read its configuration, once.

    Args:
        source: Hub name or local folder of a checkpoint, of transformers or of timm.
        revision: Commit, tag or branch on the Hub; None for the default branch.
        **hub_kwargs: `cache_dir`, `token`, `local_files_only` and the like.

    Raises:
        OSError: the checkpoint is not to be had.
        ValueError: the backbone is not supported, or its configuration is damaged.
    """
    path, values = read_config(source, revision, **hub_kwargs)
    if path is None:
        raise OSError(f"the folder {source} holds no {CONFIG_NAME}")
    if not Path(source).is_dir():
        _, _, in_snapshot = Path(path).as_posix().rpartition("/snapshots/")  # the layout of the Hub's cache
        commit = in_snapshot.partition("/")[0]
        revision = commit if re.fullmatch(r"[0-9a-f]{40}", commit) else revision
    is_timm, has_towers = is_timm_config(values), _has_towers(values, path)
    try:
        config = _backbone_config(values, source, path)
    except (AttributeError, LookupError, TypeError, StrictDataclassError) as error:  # of transformers, on other kinds
        raise ValueError(
            f"{path} has a field that is not of the kind that it must be: {' '.join(str(error).split())}"
        ) from error
    family_of(config)
    return FoundBackbone(str(source), revision, config, is_timm, _IMAGE_TOWER if has_towers else "")


def _backbone_config(values, source, path) -> PreTrainedConfig:
    if is_timm_config(values):
        return timm_backbone_config(values, source)
    if _has_towers(values, path):
        return _image_tower_config(values, path)
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{path} must hold a model_type that transformers knows, got {model_type!r}; custom code is not run"
        )
    return CONFIG_MAPPING[model_type].from_dict(values)


def _has_towers(values, path) -> bool:
    """Whether a `config.json` is that of a model with an image tower beside others."""
    if values.get("model_type") not in _TWO_TOWERS:
        return False
    nested = isinstance(values.get("vision_config"), dict)
    if not nested and values["model_type"] != "mlcd":  # transformers would take defaults
        raise ValueError(
            f"{path} must say in vision_config what the image tower is, got {values.get('vision_config')}"
        )
    return nested


def _image_tower_config(values, path) -> PreTrainedConfig:
    """Configuration of the image tower, by transformers' own reading of the whole."""
    whole = CONFIG_MAPPING[values["model_type"]]
    if "vision_config" not in whole.sub_configs:
        return whole.from_dict(values["vision_config"])
    config = whole.from_dict(values).vision_config
    expected = type(config).model_type
    if config.model_type != expected:  # transformers takes over what is written
        raise ValueError(f"vision_config in {path} must be of model_type {expected!r}, got {config.model_type!r}")
    return config


def read_timm_config(source, revision=None, **hub_kwargs) -> dict | None:
    """Content of `config.json` where it is timm's, else None.

    Args:
        source: Hub name or local folder.
        revision: Commit, tag or branch on the Hub.
        **hub_kwargs: `cache_dir`, `token`, `local_files_only` and the like.

    Raises:
        OSError: there is no such repository, or it is not to be had.
        ValueError: the file is not JSON.
    """
    _, values = read_config(source, revision, **hub_kwargs)
    return values if is_timm_config(values) else None


def read_config(source, revision=None, **hub_kwargs) -> tuple[str | None, dict]:
    """Path and content of a model's `config.json`; None and nothing for a folder without one.

    Args:
        source: Hub name or local folder.
        revision: Commit, tag or branch on the Hub.
        **hub_kwargs: `cache_dir`, `token`, `local_files_only` and the like.

    Raises:
        OSError: there is no such repository, or it is not to be had.
        ValueError: the file is not JSON, or no mapping with a text as `model_type` (or none).
    """
    check_hub_arguments(hub_kwargs)
    try:
        path = cached_file(source, CONFIG_NAME, revision=revision or "main", **hub_kwargs)
    except OSError as error:
        raise OSError(f"{' '.join(str(error).split())} ({CONFIG_NAME} of {str(source)!r} is not to be had)") from error
    if path is None:
        return None, {}
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read: it is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold the mapping of a model's configuration, got a {type(values).__name__}")
    if not isinstance(values.get("model_type"), (str, NoneType)):
        raise ValueError(f"{path} must have a text as model_type, got {values['model_type']!r}")
    return path, values


def open_backbone(found, **hub_kwargs) -> nn.Module:
    """A pretrained backbone with its weights, in the dtype of its checkpoint.

    Args:
        found: [`FoundBackbone`].
        **hub_kwargs: `cache_dir`, `token`, `local_files_only` and the like.

    Raises:
        OSError: the weights are not to be had.
        ValueError: tensors are missing (of timm's: or unknown, or misshapen), or damaged.
    """
    check_hub_arguments(hub_kwargs)
    source, revision, config, is_timm, tower = found
    if is_timm:
        return _open_timm_backbone(source, revision, config, **hub_kwargs)
    if tower:
        return _open_tower(source, revision, config, tower, **hub_kwargs)
    _empty(config)  # says so now if there is no such model
    stored = _stored_dtypes(source, revision, **hub_kwargs)
    with _quiet():  # the weights of a pooler or a classifier are not missed; others are named below
        backbone, info = AutoModel.from_pretrained(
            source,
            config=config,
            revision=revision or "main",
            use_safetensors=True,  # never a pickle
            trust_remote_code=False,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **family_of(config).model_options,
            **hub_kwargs,
        )
    parts = {name for name, _ in backbone.named_children()}
    unknown = {name for name in info["unexpected_keys"] if _part_of(name, backbone) in parts}
    _refuse_differences(info["missing_keys"], unknown, info["mismatched_keys"], source)
    for name, dtype in stored.items():  # transformers casts whatever there is
        if dtype not in _STORED_DTYPES and _part_of(name, backbone) in parts and not name.endswith(_UNUSED_PARTS):
            raise ValueError(
                f"the backbone {str(source)!r} has {name} in {dtype}, expected one of {', '.join(_STORED_DTYPES)}"
            )
    return backbone


@contextmanager
def _quiet():
    """transformers says nothing but errors."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _stored_dtypes(source, revision, **hub_kwargs) -> dict[str, str]:
    """Name -> dtype, as safetensors calls it, of a checkpoint's tensors; of one in another format nothing is known."""
    whole = _file_of(source, SAFE_WEIGHTS_NAME, revision, **hub_kwargs)
    index = None if whole else _file_of(source, SAFE_WEIGHTS_INDEX_NAME, revision, **hub_kwargs)
    files = [whole] if whole else _shards_in(index, "", source, revision, **hub_kwargs) if index else []
    dtypes = {}
    for file in files:
        with _safetensors_of(source, file) as opened:
            dtypes |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return dtypes


@contextmanager
def _safetensors_of(source, file):
    """An opened file of a backbone's weights; a ValueError names it where it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights of the backbone {str(source)!r} are damaged: {file} ({error})") from error


def listed(names, at_most=8) -> str:
    """Names for a message: the first few in their order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


def _refuse_differences(missing, unknown, mismatched, source):
    unknown = {name for name in unknown if not name.endswith(_UNUSED_PARTS)}
    mismatched = {f"{name} {tuple(found)} instead of {tuple(expected)}" for name, found, expected in mismatched}
    for problem, names in (
        ("lacks", missing),
        ("has unknown", unknown),
        ("has tensors of another shape:", mismatched),
    ):
        if names:
            raise ValueError(f"the backbone {str(source)!r} {problem} {listed(names, 24)}")


def refuse_unusable(weights, source):
    """Raise a `ValueError` if tensors have values that are not finite, or are floats that nothing computes with.

    Args:
        weights: Name -> tensor.
        source: Their file or folder, for the message.
    """
    floats = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    if others := [name for name, tensor in floats.items() if tensor.dtype not in _FLOATS]:
        raise ValueError(
            f"{source} has {listed(others)} in {floats[others[0]].dtype}, expected one of "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _FLOATS)}"
        )
    if broken := [name for name, tensor in floats.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{source} has values that are not finite (NaN or infinite) in {listed(broken)}")


def _part_of(name, backbone):
    """Module of a backbone that a tensor of its checkpoint lies in; a classifier's has the backbone's own in front."""
    return name.removeprefix(f"{backbone.base_model_prefix}.").split(".")[0]


def _open_timm_backbone(source, revision, config, **hub_kwargs):
    weights = _file_of(source, SAFE_WEIGHTS_NAME, revision, **hub_kwargs)
    if weights is None:
        raise ValueError(f"the timm checkpoint {str(source)!r} must hold {SAFE_WEIGHTS_NAME}; no other format is read")
    weights = timm_backbone_weights(read_weights(weights), _empty(config), source)
    return _with_weights(config, weights, source)


def _open_tower(source, revision, config, tower, **hub_kwargs):
    expected = set(_empty(config).state_dict())
    weights = {
        name.removeprefix(tower): tensor
        for name, tensor in _read_tower(source, revision, tower, **hub_kwargs).items()
        if not name.endswith(_UNUSED_PARTS)
    }
    named = [{f"{tower}{name}" for name in names} for names in (expected - set(weights), set(weights) - expected)]
    _refuse_differences(*named, (), source)
    return _with_weights(config, weights, source)


def _read_tower(source, revision, tower, **hub_kwargs) -> dict[str, torch.Tensor]:
    """Tensors whose names begin with `tower`; of others nothing is read, and no file without any is fetched."""
    whole = _file_of(source, SAFE_WEIGHTS_NAME, revision, **hub_kwargs)
    files = [whole] if whole else _shards_of_tower(source, revision, tower, **hub_kwargs)
    tensors = {}
    for file in files:
        with _safetensors_of(source, file) as opened:
            names = opened.keys()
            tensors |= {name: opened.get_tensor(name) for name in names if name.startswith(tower)}
    return tensors


def _shards_of_tower(source, revision, tower, **hub_kwargs) -> list[str]:
    index = _file_of(source, SAFE_WEIGHTS_INDEX_NAME, revision, **hub_kwargs)
    if index is None:
        raise OSError(f"{str(source)!r} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    return _shards_in(index, tower, source, revision, **hub_kwargs)


def _shards_in(index, tower, source, revision, **hub_kwargs) -> list[str]:
    """Local paths of the files that an index of shards names for the tensors of a tower."""
    try:
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({file for name, file in places.items() if name.startswith(tower)})
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{index} must hold a weight_map from tensors to files ({error!r})") from error
    for file in shards:
        if Path(file).name != file:
            raise ValueError(f"{index} must name files beside it, got {file!r}")
    return [cached_file(source, file, revision=revision or "main", **hub_kwargs) for file in shards]


def _file_of(source, name, revision, **hub_kwargs) -> str | None:
    """Local path of a checkpoint's file, None where it has none."""
    return cached_file(
        source, name, revision=revision or "main", _raise_exceptions_for_missing_entries=False, **hub_kwargs
    )


def _empty(config) -> nn.Module:
    """The transformers model of a configuration without weights, for its class, names and shapes.

    Raises:
        ValueError: there is no such model.
    """
    try:
        with torch.device("meta"):
            return family_of(config).build(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"the backbone's configuration describes no {config.model_type} model: {error}") from error


def _with_weights(config, weights, source) -> nn.Module:
    """The transformers model of a configuration with weights under its own names, in the widest dtype among them."""
    with _quiet():
        backbone, info = type(_empty(config)).from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=widest_dtype(weights),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **family_of(config).model_options,
        )
    _refuse_differences(info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"], source)
    return backbone.eval()


def widest_dtype(state_dict):
    """The floating-point dtype that holds all values of a checkpoint, None where it has none."""
    dtypes = {tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes) if dtypes else None


def load_backbone(config, folder=None, found=None, **hub_kwargs):
    """Weights of the backbone named in `config.backbone`, in the dtype of their checkpoint, which must be safetensors,
    for the image size of `config.backbone_config`.

    Args:
        config: A `VPTSPConfig` with `backbone` set; it gets the place where a local backbone was found, or the commit
            of one on the Hub, and the fingerprint of the weights (as they are in the checkpoint).
        folder: Local folder of the retriever that names the backbone. A local backbone is looked for relative to it,
            then relative to the working directory.
        found: The backbone, where it was looked up already.
        **hub_kwargs: `cache_dir`, `token`, `local_files_only` and the like.

    Returns:
        Dict of name -> tensor.

    Raises:
        OSError: there is no such folder here and no such repository on the Hub.
        ValueError: a weight is missing, or the weights are not those that `config.backbone_fingerprint` was taken of.
    """
    source = config.backbone
    if source is None:
        raise ValueError("the configuration names no backbone: give its place with backbone=...")
    if folder is not None and (beside := Path(folder) / source).is_dir():
        plain = Path(os.path.normpath(beside))  # without "..", which may lead elsewhere where there are links
        source = str(plain if plain.is_dir() and plain.samefile(beside) else beside)
    try:
        found = found or find_backbone(source, config.backbone_revision, **hub_kwargs)
        backbone = open_backbone(found, **hub_kwargs)
    except OSError as error:
        raise OSError(
            f"the backbone {config.backbone!r} could not be loaded: it is neither a folder here nor to be had from "
            f"the Hub, or holds no {SAFE_WEIGHTS_NAME}. Give its place with backbone=... ({error})"
        ) from error
    config.backbone, config.backbone_revision = source, found.revision
    weights, expected = backbone.state_dict(), config.backbone_fingerprint
    used = {name: tensor for name, tensor in weights.items() if not name.endswith(_UNUSED_PARTS)}
    refuse_unusable(used, f"the backbone {str(source)!r}")
    if expected is None:
        config.backbone_fingerprint = backbone_fingerprint(weights)
    elif not has_fingerprint(weights, expected, backbone.config.model_type):
        raise ValueError(
            f"the weights of the backbone {source!r} are not those that the prompts were tuned with "
            f"(backbone_fingerprint {expected[:12]} expected, got {backbone_fingerprint(weights)[:12]})"
        )
    return resized_weights(backbone, config.backbone_config.image_size)


def relative_to(backbone, folder):
    """A local backbone's path as seen from `folder`, so that both can be moved together; other names as they are."""
    if backbone is None or not Path(backbone).is_dir():
        return backbone
    try:
        return Path(os.path.relpath(backbone, folder)).as_posix()
    except ValueError:  # another drive
        return str(Path(backbone).resolve())


def refuse_local_backbone(backbone, retriever):
    """Raise if a retriever from the Hub names a backbone that is not to be had from the Hub.

    A downloaded configuration must not choose which folders of this machine are read.
    """
    name = str(backbone)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name or name.startswith(".") or Path(name).exists():
        raise ValueError(
            f"backbone must be a Hub name in a retriever from the Hub, got {name!r} in {str(retriever)!r}, which is a "
            "path or shadowed by one on this machine. If that is what you want, give it yourself with backbone=..."
        )


def backbone_fingerprint(state_dict) -> str:
    """Digest of a backbone's weights: of every value, in the order that each tensor holds them, layer by layer.

    Neither what tensors are called nor their order counts, since libraries change both; only the number of the layer
    is taken from a name. Nor does the dtype count, as long as it holds the same values. That two tensors of one shape
    changed places within a layer is not seen.

    Args:
        state_dict: Name -> tensor, as loaded from the checkpoint.

    Returns:
        `v2:` and 64 hexadecimal digits.
    """
    digests = sorted((layer_number(name), tensor_digest(tensor)) for name, tensor in state_dict.items())
    joined = b"".join(f"{layer} ".encode() + digest for layer, digest in digests)
    return FINGERPRINT_PREFIX + hashlib.sha256(joined).hexdigest()


def layer_number(name) -> int:
    """N of a tensor or module in layer N; -1 outside of the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def tensor_digest(tensor) -> bytes:
    """SHA-256 of a tensor's values in their order, the same in every dtype that holds them."""
    tensor = tensor.detach().cpu()
    values = tensor.float()
    if tensor.dtype == torch.float64 and not torch.equal(values.double(), tensor):
        values = tensor  # float32 would not tell it from its neighbours
    return hashlib.sha256(values.contiguous().flatten().view(torch.uint8).numpy()).digest()


def has_fingerprint(state_dict, expected, model_type) -> bool:
    """Whether a backbone's weights are those that a fingerprint was taken of, today's kind or the first.

    The first kind digests names, shapes and up to 64 evenly spaced values of each tensor. So it tells another
    checkpoint, but not every change within one: values between those 64 may differ. It was taken under the names that
    transformers had then, so it is compared under today's and under earlier ones.

    Args:
        state_dict: Name -> tensor, as loaded from the checkpoint.
        expected: The fingerprint, as saved.
        model_type: Of the backbone's configuration.
    """
    if expected.startswith(FINGERPRINT_PREFIX):
        return backbone_fingerprint(state_dict) == expected
    namings = ([naming(name, model_type) for name in state_dict] for naming in (_as_is, name_today, name_before))
    return any(_first_fingerprint(dict(zip(names, state_dict.values(), strict=True))) == expected for names in namings)


def backbone_has(config, fingerprint, **hub_kwargs) -> bool:
    """Whether the backbone that a configuration names has a fingerprint of the first kind; it is opened once more.

    False for any other fingerprint: these can be compared as they are.

    Args:
        config: A `VPTSPConfig`.
        fingerprint: As saved, or None.
        **hub_kwargs: `cache_dir`, `token`, `local_files_only` and the like.
    """
    if fingerprint is None or fingerprint.startswith(FINGERPRINT_PREFIX) or config.backbone is None:
        return False
    backbone = open_backbone(find_backbone(config.backbone, config.backbone_revision, **hub_kwargs), **hub_kwargs)
    return has_fingerprint(backbone.state_dict(), fingerprint, backbone.config.model_type)


def _first_fingerprint(state_dict) -> str:
    """What saved retrievers without `FINGERPRINT_PREFIX` hold; never to be changed."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().flatten()
        sample = tensor[:: max(tensor.numel() // 64, 1)][:64].to(device="cpu", dtype=torch.float32)
        digest.update(f"{name} {tuple(state_dict[name].shape)} ".encode())
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _as_is(name, model_type):
    return name


def name_today(name, model_type) -> str:
    """Name of a backbone's tensor in today's transformers, of one that it may have had before."""
    for before, today in _RENAMED.get(model_type, ()):
        name = name.replace(before, today)
    return name


def name_before(name, model_type) -> str:
    """Name of a backbone's tensor in earlier versions of transformers, of today's."""
    for before, today in _RENAMED.get(model_type, ()):
        name = name.replace(today, before)
    return name


def resized_config(config, image_size) -> PreTrainedConfig:
    """A copy of a backbone's configuration for square images of another size.

    Raises:
        ValueError: the size is not a multiple of the patch size, or the backbone does not take squares.
    """
    own = family_of(config).image_size
    config = copy.deepcopy(config)
    if image_size == own:  # also where patches leave a margin out, as SigLIP's of 14 pixels do of 384
        return config
    if not (isinstance(own, int) and isinstance(config.patch_size, int)):
        raise ValueError(
            "image_size can only be changed for backbones of square images and patches, got "
            f"{own} and {config.patch_size}"
        )
    if image_size < config.patch_size or image_size % config.patch_size:
        raise ValueError(
            f"image_size must be a multiple of the backbone's patch size {config.patch_size}, got {image_size}"
        )
    config.image_size = image_size
    return config


@torch.no_grad()
def resized_weights(backbone, image_size) -> dict[str, torch.Tensor]:
    """A backbone's weights with its position embeddings interpolated for square images of another size.

    By transformers' own `interpolate_pos_encoding` (bicubic, without the class tokens), so the same as giving it to
    every forward pass, but done once. Without such embeddings (rotary positions, NaFlex) the weights are as they were.

    Args:
        backbone: In the size that it was trained with.
        image_size: Side in pixels, a multiple of the patch size.

    Raises:
        ValueError: the backbone has no `position_table` of its family, or no way to interpolate it.
    """
    weights, config = backbone.state_dict(), backbone.config
    family = family_of(config)
    table = family.position_table
    if table is None or image_size == family.image_size:
        return weights
    if table not in weights or not hasattr(backbone.embeddings, "interpolate_pos_encoding"):
        raise ValueError(
            f"image_size must be {family.image_size}, got {image_size}: {type(backbone).__name__} has no "
            f"interpolate_pos_encoding for {table}, the position_table of {type(family).__name__}"
        )
    *axes, rows, width = weights[table].shape
    rows += (image_size // config.patch_size) ** 2 - (family.image_size // config.patch_size) ** 2
    tokens = torch.empty(1, rows, width, device="meta")  # only its shape is looked at
    positions = backbone.embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
    return {**weights, table: positions.reshape(*axes, rows, width).contiguous()}


__all__ = [
    "HUB_ARGUMENTS",
    "FoundBackbone",
    "TimmPreprocessing",
    "backbone_fingerprint",
    "backbone_has",
    "check_hub_arguments",
    "find_backbone",
    "has_fingerprint",
    "is_timm_config",
    "layer_number",
    "listed",
    "load_backbone",
    "name_before",
    "name_today",
    "open_backbone",
    "read_config",
    "read_timm_config",
    "read_weights",
    "refuse_local_backbone",
    "refuse_unusable",
    "relative_to",
    "resized_config",
    "resized_weights",
    "save_with_digest",
    "tensor_digest",
    "timm_backbone_config",
    "timm_backbone_weights",
    "timm_preprocessing",
    "widest_dtype",
    "write_digest",
]
