"""Load a pretrained backbone, whichever library wrote it: configuration, weights, image size, fingerprint.

Checkpoints of transformers and of timm (without timm), from the Hub or a local folder, in safetensors alone.

Part of what a shared retriever needs, like `modeling_vptsp.py`.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, DeiTConfig, PreTrainedConfig, ViTConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from .backbones_vptsp import family_of


logger = logging.get_logger(__name__)


# ---- Checkpoints of timm
#
# timm's checkpoints of plain vision transformers as transformers' models: by tensor name, without timm.
#
# A timm repository has a `config.json` with `architecture` and `pretrained_cfg`, but no `model_type`, and (for our
# purposes) a `model.safetensors`. What is known here are the architectures whose forward pass is that of `ViTModel` or
# `DeiTModel`; others may have the same tensor names and compute something else, so they are refused by name.


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

# Parts of checkpoints inside the backbone that retrieval has no use for.
_UNUSED_PARTS = ("mask_token", "position_ids")


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
    weights = load_file(path)
    metadata = {"format": "pt", WEIGHTS_DIGEST: _weights_digest(weights)}
    temporary = Path(f"{path}.tmp")
    save_file(weights, temporary, metadata=metadata)
    with temporary.open("rb+") as file:  # safetensors shuffles metadata: the same weights shall be the same bytes
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = json.dumps({**header, "__metadata__": metadata}, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(ordered.ljust(length))
    temporary.replace(path)


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
    """

    source: str
    revision: str | None
    config: PreTrainedConfig
    is_timm: bool

    def config_at(self, image_size=None) -> PreTrainedConfig:
        """A copy of its configuration, for images of a size in pixels; None for what it was trained with.

        Raises:
            ValueError: the backbone is not for images of this size.
        """
        if image_size in (None, self.config.image_size):
            return copy.deepcopy(self.config)
        logger.warning(
            f"{self.source} was trained with images of {self.config.image_size} pixels and is used with {image_size}: "
            "its position embeddings are interpolated"
        )
        return resized_config(self.config, image_size)


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
    path, values = _read_config(source, revision, **hub_kwargs)
    if path is None:
        raise OSError(f"the folder {source} holds no {CONFIG_NAME}")
    if not Path(source).is_dir():
        _, _, in_snapshot = Path(path).as_posix().rpartition("/snapshots/")  # the layout of the Hub's cache
        commit = in_snapshot.partition("/")[0]
        revision = commit if re.fullmatch(r"[0-9a-f]{40}", commit) else revision
    if is_timm_config(values):
        config = timm_backbone_config(values, source)
    elif (model_type := values.get("model_type")) in CONFIG_MAPPING:
        config = CONFIG_MAPPING[model_type].from_dict(values)
    else:
        raise ValueError(
            f"{path} must hold a model_type that transformers knows, got {model_type!r}; custom code is not run"
        )
    family_of(config)
    return FoundBackbone(str(source), revision, config, is_timm_config(values))


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
    _, values = _read_config(source, revision, **hub_kwargs)
    return values if is_timm_config(values) else None


def _read_config(source, revision, **hub_kwargs):
    """Path and content of `config.json`; None and nothing for a folder without one."""
    check_hub_arguments(hub_kwargs)
    path = cached_file(source, CONFIG_NAME, revision=revision or "main", **hub_kwargs)
    if path is None:
        return None, {}
    try:
        return path, json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} can't be read: it is not JSON ({error})") from error


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
    source, revision, config, is_timm = found
    if is_timm:
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
            dtype="auto",
            output_loading_info=True,
            **family_of(config).model_options,
            **hub_kwargs,
        )
    except SafetensorError as error:
        raise ValueError(f"weights of the backbone {str(source)!r} are damaged ({error})") from error
    finally:
        logging.set_verbosity(verbosity)
    parts = {name for name, _ in backbone.named_children()}
    unknown = {name for name in info["unexpected_keys"] if _part_of(name, backbone) in parts}
    unknown = {name for name in unknown if not name.endswith(_UNUSED_PARTS)}
    for problem, names in (("lacks", info["missing_keys"]), ("has unknown", unknown)):
        if names:
            raise ValueError(f"the backbone {str(source)!r} {problem} {', '.join(sorted(names))}")
    return backbone


def _part_of(name, backbone):
    """Module of a backbone that a tensor of its checkpoint lies in; a classifier's has the backbone's own in front."""
    return name.removeprefix(f"{backbone.base_model_prefix}.").split(".")[0]


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
    backbone.load_state_dict(timm_backbone_weights(read_weights(weights), backbone, source), strict=True, assign=True)
    return backbone.eval()


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
    if folder is not None and (Path(folder) / source).is_dir():
        source = str(Path(folder) / source)
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
    digests = sorted((layer_number(name), _tensor_digest(tensor)) for name, tensor in state_dict.items())
    joined = b"".join(f"{layer} ".encode() + digest for layer, digest in digests)
    return FINGERPRINT_PREFIX + hashlib.sha256(joined).hexdigest()


def layer_number(name) -> int:
    """N of a tensor or module in layer N; -1 outside of the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _tensor_digest(tensor) -> bytes:
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
    "load_backbone",
    "name_before",
    "name_today",
    "open_backbone",
    "read_timm_config",
    "read_weights",
    "refuse_local_backbone",
    "relative_to",
    "resized_config",
    "resized_weights",
    "timm_backbone_config",
    "timm_backbone_weights",
    "timm_preprocessing",
    "write_digest",
]
