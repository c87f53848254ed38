"""VPTSP retriever: a frozen vision transformer with tuned prompts (or what else is tuned) and an embedding head.

This file and the three that it imports are all that a shared retriever needs. What training adds is in `training/` and
`losses/`.

Shapes: B images, N tokens (CLS + patches), P prompts, D backbone width, E embedding width.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, ModelOutput, cached_file, logging

from .backbones_vptsp import (
    ImageTokens,
    append_prompts,
    can_take_apart,
    family_of,
    project_prompts,
    project_tokens,
    prompted_forward,
)
from .configuration_vptsp import VPTSPConfig, check_dtype, check_field, nearest
from .loading_vptsp import (
    HUB_ARGUMENTS,
    backbone_fingerprint,
    find_backbone,
    layer_number,
    listed,
    load_backbone,
    name_before,
    name_today,
    read_config,
    read_weights,
    refuse_local_backbone,
    refuse_unusable,
    relative_to,
    tensor_digest,
    widest_dtype,
    write_digest,
)


# What sentence-transformers (6.2) reads beside a model: `forward` gives the embeddings, cosine compares them.
SENTENCE_TRANSFORMERS_FILES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {"image": {"method": "forward", "method_output_name": "embeddings"}},
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
}
logger = logging.get_logger(__name__)


# ---- Prompts and heads


@dataclass
class VPTSPModelOutput(ModelOutput):
    """Output of [`VPTSPModel`].

    Attributes:
        embeddings: `(B, E)` float32 (float64 for a float64 model), L2-normalised.
        pooler_output: The same tensor, under the name that `AutoModel` users look for.
        features: `(B, E)`, the head's output before it is normalised; where `keep` asks for them.
        tokens: [`ImageTokens`] that another pass over the same images may start from; likewise.
        first_layer: What such a pass computes of them in the first layer, for `encode`; None where that is nothing.
    """

    embeddings: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    tokens: ImageTokens | None = None
    first_layer: tuple | None = None


class Prompts(nn.Module):
    """Learnable prompt tokens of consecutive layers, Xavier normal (paper section 3.1).

    Layer i has `lengths[i]` of them. All lie in one parameter `tokens` of shape `(sum(lengths), D)`. Each layer's
    tokens are drawn as the first rows of a table of `num_prompts` rows would be. None where there are no prompts.
    """

    def __init__(self, lengths, num_prompts, width):
        super().__init__()
        self.lengths = tuple(lengths)
        self.std = math.sqrt(2.0 / (num_prompts + width))
        self.tokens = nn.Parameter(torch.empty(sum(self.lengths), width)) if sum(self.lengths) else None

    def init_weights(self):
        if self.tokens is not None:
            init.normal_(self.tokens, std=self.std)

    def forward(self):
        """Tokens of each layer, `(P_i, D)`."""
        return () if self.tokens is None else self.tokens.split(self.lengths)


class EmbeddingHead(nn.Module):
    """LayerNorm and a linear layer (Xavier uniform, zero bias) to the embedding width, then L2 normalisation."""

    def __init__(self, pooled_dim, embedding_dim):
        super().__init__()
        self.norm = nn.LayerNorm(pooled_dim)
        self.projection = nn.Linear(pooled_dim, embedding_dim)

    def project(self, pooled):
        """`(B, pooled_dim)` -> `(B, E)`, not yet normalised, in float32 or wider."""
        return at_least_float32(self.projection(self.norm(pooled)))

    def forward(self, pooled, normalize=True):
        """`(B, pooled_dim)` -> `(B, E)`, L2-normalised unless told otherwise, in float32 or wider."""
        features = self.project(pooled)
        return F.normalize(features, dim=-1) if normalize else features


class DistilledEmbeddingHead(EmbeddingHead):
    """Head on a CLS and a distillation token: a LayerNorm and a linear layer for each, and the mean of both outputs,
    as distilled DeiT averages its two classifiers; then L2 normalisation, once."""

    def __init__(self, pooled_dim, embedding_dim):
        super().__init__(pooled_dim, embedding_dim)
        self.distillation_norm = nn.LayerNorm(pooled_dim)
        self.distillation_projection = nn.Linear(pooled_dim, embedding_dim)

    def project(self, pooled):
        """`(B, 2, pooled_dim)` -> `(B, E)`, not yet normalised, in float32 or wider."""
        from_cls = self.projection(self.norm(pooled[:, 0]))
        from_distillation = self.distillation_projection(self.distillation_norm(pooled[:, 1]))
        return (at_least_float32(from_cls) + at_least_float32(from_distillation)) / 2


def embedding_head(config) -> EmbeddingHead:
    """The head that fits what `config.pooling` takes from the backbone."""
    distilled = config.pooling == "cls" and family_of(config.backbone_config).num_class_tokens == 2
    return (DistilledEmbeddingHead if distilled else EmbeddingHead)(config.pooled_dim, config.embedding_dim)


def at_least_float32(tensor):
    """Half-precision tensors as float32, others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


# ---- Adapters


class DownProjection(nn.Linear):
    """Linear layer into the bottleneck: Kaiming uniform, zero bias."""

    def init_weights(self):
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        init.zeros_(self.bias)


class UpProjection(nn.Linear):
    """Linear layer out of the bottleneck: all 0."""

    def init_weights(self):
        init.zeros_(self.weight)
        init.zeros_(self.bias)


class Adapter(nn.Module):
    """Bottleneck MLP on one layer's MLP (Houlsby et al., ICML 2019; parallel: Chen et al., AdaptFormer, NeurIPS 2022).

        a(x) = norm_post(scale * (W_up relu(W_down norm_pre(x) + b_down) + b_up))

        parallel:    mlp_output + a(tokens in front of the MLP and its norm)
        sequential:  mlp_output + a(mlp_output)

    `W_up` starts as 0, so that the layer starts as it was pretrained. With a norm behind, that ends with the first
    step: a LayerNorm gives outputs of unit variance, however small what it gets.

    Args:
        width: Backbone width (D).
        dim: Width of the bottleneck.
        mode: `parallel` or `sequential`.
        norm: `pre`, `post` or `none`.
        scale: Factor on the output.
    """

    def __init__(self, width, dim, mode="parallel", norm="post", scale=1.0):
        super().__init__()
        self.sequential = mode == "sequential"
        self.scale = scale
        self.norm_before = nn.LayerNorm(width) if norm == "pre" else nn.Identity()
        self.down = DownProjection(width, dim)
        self.up = UpProjection(dim, width)
        self.norm_after = nn.LayerNorm(width) if norm == "post" else nn.Identity()

    def forward(self, hidden, mlp_output):
        """`(B, N, D)` tokens in front of the MLP and `(B, N, D)` what it gives -> `(B, N, D)` in its place."""
        bottleneck = torch.relu(self.down(self.norm_before(mlp_output if self.sequential else hidden)))
        return mlp_output + self.norm_after(self.scale * self.up(bottleneck))


def build_adapters(config) -> nn.ModuleList:
    """Adapters of the last `config.adapter_layers` layers, first to last."""
    return nn.ModuleList(
        Adapter(
            config.backbone_config.hidden_size,
            config.adapter_dim,
            config.adapter_mode,
            config.adapter_norm,
            config.adapter_scale,
        )
        for _ in range(config.adapter_layers)
    )


# ---- LoRA, and what else the package peft tunes


DEFAULT_TARGETS = ("q_proj", "v_proj")
ADAPTER_NAME = "default"
PEFT_INSTEAD = (
    "for LoRA set lora_rank in the configuration (from_backbone(..., lora_rank=8)), for what else PEFT tunes "
    "tuning='peft' with peft_config"
)
# Kinds of PEFT that are tested here: they come out of a checkpoint as they went into it.
PEFT_TYPES = ("LORA", "IA3", "LOHA", "LOKR", "HRA", "LN_TUNING", "MISS", "FOURIERFT")


class PeftParts(NamedTuple):
    """What PEFT has put into a backbone.

    Attributes:
        names: Of its tensors, in the backbone's `state_dict()`.
        layers: By the name of each layer that it has wrapped, the factor on what it adds; None of kinds without.
    """

    names: frozenset[str]
    layers: dict[str, float | None]


NO_PEFT = PeftParts(frozenset(), {})


# What PEFT raises on values that it does not check itself.
_PEFT_ERRORS = (ValueError, TypeError, NotImplementedError, AttributeError, LookupError, ArithmeticError, re.error)
# Annotations of fields of PEFT's configurations that values are compared with; int, since it takes fractions too.
_PEFT_TYPES_OF_FIELDS = {"int": float, "float": float, "bool": bool}


def uses_peft(config) -> bool:
    """Whether PEFT tunes the backbone, as a configuration says."""
    return config.lora_rank > 0 or config.tuning == "peft"


def add_peft(backbone, config) -> PeftParts:
    """Put what PEFT tunes into a backbone, in place: LoRA and DoRA of `lora_rank`, or what `peft_config` says.

    LoRA (Hu et al., ICLR 2022) adds matrices to linear layers, `W x + (alpha / rank) * B A x`. A is drawn Kaiming
    uniform and B is 0, so that the backbone starts as it was pretrained. DoRA (Liu et al., ICML 2024) gives each row
    of `V = W + (alpha / rank) * B A` a norm m of its own: `m V x / |V|`; see `start_peft`.

    All lies in the transformer's layers: what embeds patches or pools tokens may read weights without calling the
    layer that holds them, as PyTorch's own attention does, so that an adapter there would never run.

    Args:
        backbone: The vision transformer.
        config: The `VPTSPConfig`.

    Raises:
        ImportError: peft is not installed.
        ValueError: PEFT does not take the configuration for this backbone, or a target is none of its layers.
    """
    before, modules = set(backbone.state_dict()), {name for name, _ in backbone.named_modules()}
    values = _lora_values(backbone, config) if config.lora_rank else config.peft_config
    _check_targets(backbone, values)
    peft, own = _peft_config(config, values)
    try:
        with torch.device("cpu"):  # in loading all else is on meta, but what PEFT keeps beside weights must be there
            # in something, since PEFT looks for layers_to_transform in what has a name before `layers`
            peft.inject_adapter_in_model(own, nn.ModuleDict({"backbone": backbone}), adapter_name=ADAPTER_NAME)
    except _PEFT_ERRORS as error:
        raise ValueError(f"peft_config: {' '.join(str(error).split())}") from error
    except ImportError as error:
        raise ImportError(f"peft_config asks for what is not installed: {error}") from error
    layers = peft_layers(backbone)
    if outside := [name for name in layers if layer_number(name) < 0]:
        raise ValueError(f"peft_config must target parts of the backbone's layers, got {listed(outside)}")
    for name, module in backbone.named_modules():
        if name.replace(".base_layer", "") not in modules:
            module._is_hf_initialized = True  # or the backbone would draw its weights as it draws its own
    names = frozenset(name for name in backbone.state_dict() if _without_peft(name) not in before)
    return PeftParts(names, {name: _scaling(layer) for name, layer in layers.items()})


def _lora_values(backbone, config):
    """PEFT's values for `lora_rank` and the fields beside it."""
    linear = {name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    linear = {name for name in linear if layer_number(name) >= 0}
    targets = {}
    for target in config.lora_targets or DEFAULT_TARGETS:
        targets[target] = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not targets[target]:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"lora_targets must name linear layers of the backbone ({', '.join(ends)}), got {target!r}"
                f"{nearest(target, ends)}"
            )
    names = sorted({name for found in targets.values() for name in found})
    own = {"r": config.lora_rank, "lora_alpha": config.lora_alpha, "use_dora": config.use_dora}
    return {"peft_type": "LORA", "target_modules": names, **own}


def _peft_config(config, values):
    """The package peft, and its configuration object of some values."""
    try:  # not an import statement: transformers would ask for peft wherever this file is loaded as remote code
        peft = importlib.import_module("peft")
    except ImportError as error:
        asked = f"lora_rank is {config.lora_rank}" if config.lora_rank else "tuning is peft"
        raise ImportError(f"{asked}, which needs the package peft: pip install peft") from error
    known = [name for name in PEFT_TYPES if name in peft.PEFT_TYPE_TO_CONFIG_MAPPING]
    if (kind := values["peft_type"]) not in known:
        raise ValueError(
            f"peft_config: peft_type must be one of {', '.join(known)}, got {kind!r}{nearest(kind, known)}"
        )
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    types = {item.name: getattr(item.type, "__name__", item.type) for item in fields(config_class)}
    if unknown := sorted(set(values) - set(types)):  # of which PEFT would only warn
        near = nearest(unknown[0], types)
        raise ValueError(
            f"peft_config: {config_class.__name__} of peft {peft.__version__} has no {listed(unknown)}{near}"
        )
    for name, value in values.items():  # PEFT's errors on another type don't name the field
        if (type_of := _PEFT_TYPES_OF_FIELDS.get(types[name])) is not None:
            check_field(f"peft_config: {name}", value, type_of)
    try:
        return peft, config_class(**values)
    except _PEFT_ERRORS as error:
        raise ValueError(f"peft_config: {' '.join(str(error).split())}") from error


def _check_targets(backbone, values):
    """Refuse names of layers that there are not: PEFT passes over them beside others, and says none that there are."""
    modules = dict(backbone.named_modules())
    tuned = [name for name in modules if layer_number(name) >= 0 and [*modules[name].parameters(recurse=False)]]
    ends = sorted({name.rpartition(".")[2] for name in tuned})
    for field in ("target_modules", "exclude_modules"):
        targets = values.get(field)
        if targets is None or isinstance(targets, str):  # a pattern, which PEFT reads
            continue
        for target in targets if isinstance(targets, list) else [targets]:
            named = isinstance(target, str) and any(f".{name}".endswith(f".{target}") for name in modules)
            if not named:
                raise ValueError(
                    f"peft_config: {field} must name parts of the backbone's layers ({', '.join(ends)}), got "
                    f"{target!r}{nearest(target, ends)}"
                )


def peft_layers(model) -> dict[str, nn.Module]:
    """Layers of a model that PEFT has wrapped, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}


def _without_peft(name):
    """Name that a backbone's tensor or module has where PEFT has not wrapped it."""
    return name.replace(".base_layer", "")


@torch.no_grad()
def start_peft(backbone, config, parts):
    """Let what PEFT tunes start from the weights that a new backbone has now: DoRA's norms are those of their rows.

    To be called whenever these have come anew.

    Args:
        backbone: The vision transformer.
        config: The `VPTSPConfig`.
        parts: What `add_peft` gave for it.

    Raises:
        ValueError: PEFT would change the backbone's own weights, which are saved nowhere.
    """
    if config.lora_rank:
        for layer in peft_layers(backbone).values():
            for norm in getattr(layer, "lora_magnitude_vector", {}).values():
                norm.weight.copy_(layer.base_layer.weight.norm(dim=1))
    if config.lora_rank or not parts.names or not all(map(_is_in_memory, backbone.state_dict().values())):
        return
    weights = {name: tensor for name, tensor in backbone.state_dict().items() if name not in parts.names}
    with torch.random.fork_rng(devices=[]):  # PEFT has each kind start in a way of its own, once, when it is put in
        started = family_of(config.backbone_config).build(config.backbone_config)
        started.load_state_dict({_without_peft(name): tensor for name, tensor in weights.items()})
        add_peft(started, config)
    started = started.state_dict()
    if changed := [name for name, tensor in weights.items() if not torch.equal(started[name], tensor)]:
        raise ValueError(
            f"peft_config must leave the backbone's own weights as they are, but {listed(changed)} change"
        )
    backbone.load_state_dict(started)


def refuse_other_adapters(model):
    """Raise if PEFT has wrapped a model or put something into it that its configuration does not know.

    Such a model is saved without what PEFT tunes, or under names that nobody can load.

    Args:
        model: A [`VPTSPPreTrainedModel`], or what PEFT made of one.

    Raises:
        ValueError: the message says what to do instead.
    """
    peft = sys.modules.get("peft")
    if peft is None:  # then there is nothing of it
        return
    if isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        raise ValueError(f"got a {type(model).__name__} of PEFT, expected the model itself: {PEFT_INSTEAD}")
    prefix, own = f"{model.retriever_prefix}backbone.", model.retriever.peft
    known = {f"{prefix}{name}" for name in own.names}
    for name, layer in peft_layers(model).items():
        if name.removeprefix(prefix) in own.layers and name.startswith(prefix):
            tensors = {f"{name}.{part}" for part in layer.state_dict() if not part.startswith("base_layer.")}
        else:
            tensors = {name}
        if others := tensors - known:
            raise ValueError(
                f"PEFT has put an adapter into the model ({listed(others)}), which is not saved: {PEFT_INSTEAD}"
            )


def refuse_merged_peft(model):
    """Raise if PEFT has merged what it tunes into weights that are saved beside it: loaded, it would count twice.

    Raises:
        ValueError: there are such weights.
    """
    if merged := [name for name, layer in peft_layers(model).items() if layer.merged]:
        what = "LoRA" if model.config.lora_rank else "what it tunes"
        raise ValueError(
            f"PEFT has merged {what} into {listed(merged)}, where it would count twice: unmerge() it first"
        )


def refuse_other_scaling(model):
    """Raise if PEFT has scaled a model's own adapters or switched them off: loaded, they would count as configured.

    Raises:
        ValueError: it has.
    """
    config, layers = model.config, peft_layers(model.retriever.backbone)
    for name, configured in model.retriever.peft.layers.items():
        if (layer := layers.get(name)) is None:  # taken out, which whoever compares weights finds
            continue
        is_off = layer.disable_adapters or ADAPTER_NAME not in layer.active_adapters
        scale = _scaling(layer)
        if not is_off and (scale is None or math.isclose(scale, configured)):
            continue
        found = "switched off" if is_off else f"scaled by {scale:g}"
        what, expected = f"what PEFT tunes of backbone.{name}", f"a factor of {configured}"
        if config.lora_rank:
            what = f"LoRA of backbone.{name}"
            expected = f"lora_alpha / lora_rank = {config.lora_alpha:g} / {config.lora_rank}"
        raise ValueError(
            f"{what} must count as configured, {expected}, got it {found} by PEFT, which is not saved: undo that first"
        )


def _scaling(layer):
    scalings = getattr(layer, "scaling", None)
    return scalings.get(ADAPTER_NAME) if isinstance(scalings, dict) else None


def names_beside_peft(weights, config):
    """A pretrained backbone's tensors under the names that they have beside PEFT's: it wraps what it tunes.

    Args:
        weights: `state_dict()` of the pretrained backbone.
        config: The `VPTSPConfig`.
    """
    if not uses_peft(config):
        return weights
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            backbone = family_of(config.backbone_config).build(config.backbone_config)
        own = add_peft(backbone, config).names
    names = {_without_peft(name): name for name in backbone.state_dict() if name not in own}
    return {names[name]: tensor for name, tensor in weights.items()}


# ---- Tuning methods beside these, by name


def _with_backbone(model):
    """`tuning: peft`, which comes into a backbone as soon as there is one: see `add_peft`."""


# The package registers further ones by `register_tuning` (training/model_registry.py).
TUNINGS: dict[str, Callable] = {"peft": _with_backbone}


def add_tuning(model):
    """Add what the configuration's `tuning` names to a model.

    Args:
        model: A [`VPTSPModel`] with everything but this.

    Raises:
        ValueError: there is no such method, or it does not take its keywords.
    """
    config = model.config
    if config.tuning is None:
        return
    if config.tuning not in TUNINGS:
        raise ValueError(
            f"tuning must be None or one of {', '.join(TUNINGS) or 'none'}, got {config.tuning!r}"
            f"{nearest(config.tuning, TUNINGS)}: import the file that registers it first"
        )
    try:
        TUNINGS[config.tuning](model, **(config.tuning_kwargs or {}))
    except TypeError as error:
        raise ValueError(f"tuning {config.tuning!r}: {error}") from error


# ---- Saving and loading


@contextmanager
def _written_aside(folder):
    """A folder to write files to, each of which then replaces that of its name in `folder` in one step.

    If the block raises, nothing is replaced. The configuration, which makes a folder a model, comes last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
        try:
            yield Path(aside)
        except SafetensorError as error:  # a full disk
            raise OSError(f"{folder} can't be written to: {error}") from error
        for path in sorted(Path(aside).iterdir(), key=lambda path: path.name == CONFIG_NAME):
            with path.open("rb+") as stream:  # what is renamed must be on the disk before its name is
                os.fsync(stream.fileno())
            path.replace(folder / path.name)


def _safetensors_file(name, revision, **hub_kwargs):
    file = cached_file(
        name, SAFE_WEIGHTS_NAME, revision=revision, _raise_exceptions_for_missing_entries=False, **hub_kwargs
    )
    if file is None:
        raise OSError(
            f"{str(name)!r} holds no {SAFE_WEIGHTS_NAME}: retrievers are read from safetensors alone, never from "
            "pickled files such as pytorch_model.bin"
        )
    return file


# Arguments of `PreTrainedModel.from_pretrained` that are refused.
_NOT_FOR_LOADING = (
    *("variant", "ignore_mismatched_sizes", "key_mapping"),
    *("from_tf", "from_flax", "gguf_file", "state_dict"),
)

# Arguments of `PreTrainedModel.save_pretrained` that mean something here, or are refused by a word of their own.
_SAVING_ARGUMENTS = {"is_main_process", "max_shard_size", "push_to_hub", "save_original_format", "token", "variant"}


def _non_reentrant(options):
    options = {"use_reentrant": False, **(options or {})}
    if options["use_reentrant"]:
        raise ValueError("gradient checkpointing of prompts needs use_reentrant=False, got True")
    return options


def _refuse_other_model(folder):
    """Raise if a folder holds a model that is none of this project's: the backbone, say, which would be lost."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        return
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (AttributeError, RecursionError, ValueError):
        kind = None
    if kind != VPTSPConfig.model_type:
        raise ValueError(f"{folder} holds another model (model_type {kind!r} in {CONFIG_NAME}), which would be lost")


def _card_writer():
    """What writes model cards; None in code that came along with a shared retriever, which has only four files."""
    try:
        return importlib.import_module(".training.model_card", __package__).retriever_card
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.training":
            raise
        return None


def _is_in_memory(tensor):
    return type(tensor) is torch.Tensor and not tensor.is_meta


@torch.no_grad()
def _is_of_backbone(tensor, original, lora=None):
    """Whether a frozen tensor is the backbone's in its dtype; or, up to rounding, what PEFT makes of it when it merges
    LoRA into it, or leaves of it when it takes that out again.

    Args:
        tensor: As the model has it.
        original: As the backbone has it.
        lora: PEFT's layer whose weight it is, None where it isn't one.
    """
    tensor, original = tensor.cpu(), original.to(tensor.dtype).cpu()
    if lora is None or not lora.merged:
        if torch.equal(tensor, original):
            return True
        if lora is None:
            return False
    down, up = (part[ADAPTER_NAME].weight.detach().cpu().double().abs() for part in (lora.lora_A, lora.lora_B))
    expected = original.double()
    size = torch.maximum(expected.abs().max(), lora.scaling[ADAPTER_NAME] * (up @ down).max())
    if lora.merged:
        expected = expected + lora.get_delta_weight(ADAPTER_NAME).cpu().double()
        for norm in getattr(lora, "lora_magnitude_vector", {}).values():
            factors = norm.weight.cpu().double() / expected.norm(dim=1)
            expected, size = expected * factors[:, None], size * factors[:, None].abs()
    near = 4 * torch.finfo(tensor.dtype).eps * size
    return bool(((tensor.double() - expected).abs() <= near).all())


def _refuse_differences(missing, unknown, source, others=()):
    """Raise if a checkpoint holds other tensors than the model."""
    problems = (("lacks", missing), ("has unknown", unknown), ("has", others))
    found = [f"{verb} {listed(names)}" for verb, names in problems if names]
    if found:
        raise ValueError(f"the checkpoint {str(source)!r} {' and '.join(found)}")


def _others(saved, own, may_round):
    """Tensors of a checkpoint that are not what the model has under their names, described.

    Args:
        saved: Name -> tensor of the checkpoint.
        own: Name -> tensor of the model.
        may_round: Whether values may lose digits, since somebody asked for the model's dtype.
    """
    found = []
    for name in sorted(set(saved) & set(own)):
        tensor, expected = saved[name], own[name]
        if tensor.shape != expected.shape:
            found.append(f"{name} {tuple(tensor.shape)} instead of {tuple(expected.shape)}")
        elif tensor.is_floating_point() != expected.is_floating_point() or not (
            may_round or torch.promote_types(tensor.dtype, expected.dtype) == expected.dtype
        ):
            found.append(f"{name} in {tensor.dtype} instead of {expected.dtype}")
    return found


def _named_as_in(frozen, saved, model_type):
    """Saved tensors under the names that the backbone's have in this version of transformers.

    A second one for the same name keeps its own, and so is unknown.
    """
    renamed = {name: tensor for name, tensor in saved.items() if name in frozen}
    for name in saved.keys() - renamed.keys():
        names = (name_today(name, model_type), name_before(name, model_type))
        renamed[next((n for n in names if n in frozen and n not in renamed), name)] = saved[name]
    return renamed


class VPTSPPreTrainedModel(PreTrainedModel):
    """What retriever and training model share: building on a backbone, freezing, saving only what is tuned."""

    config_class = VPTSPConfig
    base_model_prefix = "vptsp"
    # Where the retriever's tensors lie in `state_dict()`; empty for the retriever itself.
    retriever_prefix = "vptsp."
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = tuple(
        f"{family}{part}" for family in ("ViT", "DeiT", "Dinov2") for part in ("Embeddings", "Layer")
    )
    _supports_sdpa = True
    _supports_attention_backend = True
    # The loss is a mean over the batch: the Trainer has to scale it for gradient accumulation.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module):
        if hasattr(module, "init_weights") and not isinstance(module, PreTrainedModel):
            module.init_weights()
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def freeze_backbone(self):
        """Let gradients reach only what the configuration says is tuned."""
        tuned = self.tuned_names()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in tuned)

    def tuned_names(self) -> set[str]:
        """Names in `state_dict()` of everything but the frozen part of the backbone and what no pass touches of it."""
        prefix = f"{self.retriever_prefix}backbone."
        return {
            name
            for name in self.state_dict()
            if not name.startswith(prefix) or self._is_tuned_in_backbone(name.removeprefix(prefix))
        }

    def _is_tuned_in_backbone(self, name) -> bool:
        config = self.config
        if not self.retriever.family.is_used(name, config.pooling):
            return False
        is_bias = name.endswith((".bias", "_bias"))  # the latter in PyTorch's own attention
        return config.tune_backbone or (config.bitfit and is_bias) or name in self.retriever.peft.names

    def train(self, mode: bool = True):
        """Set the training mode; a backbone that is not tuned as a whole always computes as in evaluation, but for
        what PEFT has put into it, which may have a dropout of its own."""
        super().train(mode)
        self.retriever.backbone.train(mode and self.config.tune_backbone)
        for layer in peft_layers(self.retriever.backbone).values():
            layer.train(mode)
            layer.base_layer.train(mode and self.config.tune_backbone)
        return self

    # Under the name that this release of transformers has for it; the older one leads here in newer releases.
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):

        def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs):
            """Recompute layers in the backward pass; non-reentrant, since a frozen backbone's input needs no gradient.

            Raises:
                ValueError: `use_reentrant=True` was asked for; no gradient would reach the prompts.
            """
            super().activation_checkpointing_enable(_non_reentrant(activation_checkpointing_kwargs), **kwargs)

    else:

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
            """As `activation_checkpointing_enable` of newer releases."""
            super().gradient_checkpointing_enable(_non_reentrant(gradient_checkpointing_kwargs), **kwargs)

    @classmethod
    def from_backbone(cls, backbone, revision=None, dtype=None, image_size=None, **kwargs):
        """A new model on a pretrained backbone, with untrained prompts and heads.

        Args:
            backbone: Hub name or local folder of a vision transformer, in transformers' or timm's format.
            revision: Commit, tag or branch on the Hub; the configuration gets the commit.
            dtype: Of the weights; None for float32.
            image_size: Side of the images in pixels, a multiple of the patch size. Where the backbone was trained with
                another, its position embeddings are interpolated, once. None: the backbone's.
            **kwargs: Fields of `VPTSPConfig`, and `cache_dir`, `token`, `local_files_only` and the like for the Hub.

        Raises:
            ValueError: an argument is no field of `VPTSPConfig`, or the backbone is not supported or not for images
                of this size.
        """
        check_dtype("dtype", dtype)
        dtype = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        known = {field.name for field in fields(VPTSPConfig)}
        if unknown := set(kwargs) - known:
            raise ValueError(f"VPTSPConfig has no field {listed(unknown)}")
        found = find_backbone(backbone, revision, **hub_kwargs)
        config = VPTSPConfig(
            backbone_config=found.config_at(image_size),
            backbone=found.source,
            backbone_revision=found.revision,
            **kwargs,
        )
        weights = load_backbone(config, found=found, **hub_kwargs)
        model = cls(config)
        backbone = model.retriever.backbone
        new = {name: backbone.state_dict()[name] for name in model.retriever.peft.names}
        backbone.load_state_dict(names_beside_peft(weights, config) | new, strict=True)
        start_peft(backbone, config, model.retriever.peft)
        model.note_frozen_weights()
        model.to(dtype or torch.float32)
        if dtype not in (None, torch.float32):  # rounded too, so that nobody has to open the backbone to compare
            model.note_frozen_weights()
        return model

    def note_frozen_weights(self, names=None):
        """Take the frozen weights as they are now for those that belong to the backbone; `refuse_changed_backbone`
        compares. Whoever rounds them on purpose, for as long as a run takes, says so by this.

        Args:
            names: Only those of these names, see `unchanged_names`; None for all.
        """
        for name, tensor in self._used_frozen_weights().items():
            if names is None or name in names:
                digests = self.retriever.frozen_digests.setdefault(name, set())
                digests.update([tensor_digest(tensor)] if _is_in_memory(tensor) else [])

    def unchanged_names(self) -> set[str]:
        """Names in the backbone's `state_dict()` of frozen weights that are as they were noted."""
        known = self.retriever.frozen_digests
        return {
            name
            for name, tensor in self._used_frozen_weights().items()
            if name in known and (not _is_in_memory(tensor) or tensor_digest(tensor) in known[name])
        }

    def _is_used_frozen(self, name) -> bool:
        return self.retriever.family.is_used(name, self.config.pooling) and not self._is_tuned_in_backbone(name)

    def _used_frozen_weights(self):
        """Name -> tensor of what is frozen and used of the backbone."""
        weights = self.retriever.backbone.state_dict()
        return {name: tensor for name, tensor in weights.items() if self._is_used_frozen(name)}

    def _has_fingerprint(self) -> bool:
        """Whether the backbone's weights are, to the last bit, those of `config.backbone_fingerprint`."""
        weights = self.retriever.backbone.state_dict()
        weights = {name: tensor for name, tensor in weights.items() if name not in self.retriever.peft.names}
        expected = self.config.backbone_fingerprint
        return all(map(_is_in_memory, weights.values())) and backbone_fingerprint(weights) == expected

    def refuse_changed_backbone(self):
        """Raise if frozen weights are no longer those of the backbone, which alone is named where they aren't saved.

        Tools that write into weights (PEFT's `merge_and_unload`, or `modules_to_save` with `unload`) do that.

        Raises:
            OSError: weights have been rounded or merged, and the backbone to compare them with is not to be had.
            ValueError: they are others, or some are new or lost, and the message names some; or nobody knows.
        """
        frozen = self._used_frozen_weights()
        known = {name for name in self.retriever.frozen_digests if self._is_used_frozen(name)}
        if frozen and not known:
            raise ValueError(
                f"frozen weights of the model are not known to be those of the backbone {self.config.backbone!r}: "
                "either they were never loaded, as from_backbone and from_pretrained do, or the backbone was saved "
                "along and may have been changed; save them too, with save_backbone=True"
            )
        layers = dict(self.retriever.backbone.named_modules())
        loras = {f"{name}.base_layer.weight": layer for name, layer in layers.items() if hasattr(layer, "lora_A")}
        merged = {name for name, layer in loras.items() if layer.merged}  # of what they were, and are to be again
        lost_or_new = frozen.keys() ^ known
        changed = lost_or_new or frozen.keys() - (self.unchanged_names() - merged)
        halves = (torch.float16, torch.bfloat16)
        if not lost_or_new and any(frozen[n].dtype in halves or n in loras for n in changed):
            own = names_beside_peft(load_backbone(copy.deepcopy(self.config)), self.config)
            changed = {name for name in changed if not _is_of_backbone(frozen[name], own[name], loras.get(name))}
        if changed:
            raise ValueError(
                f"frozen weights of the model are not those of the backbone {self.config.backbone!r} any more "
                f"({listed(changed)}): somebody has changed them, as PEFT does when it merges. Without them, what is "
                "saved would be another model: save them too, with save_backbone=True"
            )

    def get_input_embeddings(self):
        """The backbone's module that makes tokens of patches, for tools that ask for it."""
        return self.retriever.backbone.get_input_embeddings()

    def add_adapter(self, *args, **kwargs):
        """Refused: adapters of PEFT are not saved with a retriever. LoRA is `lora_rank` of [`VPTSPConfig`].

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{type(self).__name__} takes no adapters of PEFT, which would not be saved: {PEFT_INSTEAD}")

    load_adapter = add_adapter

    @property
    def retriever(self):
        """The [`VPTSPModel`]: the part that embeds images and is shared."""
        return self.vptsp if self.retriever_prefix else self

    def save_pretrained(self, save_directory, state_dict=None, save_backbone=None, place=None, **kwargs):
        """Save what is tuned; the frozen backbone is only named, unless `save_backbone`.

        Files are written aside and then renamed, so that none is ever half of what it was or is to be.

        Args:
            save_directory: Folder to write to.
            state_dict: Weights to save instead of the model's own.
            save_backbone: Save the backbone too; None for what the configuration says. A backbone that has no name is
                saved in any case.
            place: Folder that the caller will move the files to, as seen from which a local backbone is named; None
                for `save_directory`.
            **kwargs: As for `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: the folder holds another model; `push_to_hub` was asked for, use the method of that name;
                `max_shard_size` or `variant`, since it is all one file; `save_backbone=False`, but all of the backbone
                is tuned; PEFT has changed the model, scaled LoRA, or merged it into weights that are to be saved; or
                frozen weights were changed, or may have been, which would not be saved.
            TypeError: a keyword is none that is read.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("save_pretrained does not push: use model.push_to_hub(repo_id)")
        for name in ("max_shard_size", "variant"):
            if kwargs.get(name) is not None:
                raise ValueError(f"save_pretrained writes one {SAFE_WEIGHTS_NAME}: leave {name} out")
        if unknown := set(kwargs) - _SAVING_ARGUMENTS:  # which transformers passes over
            raise TypeError(f"save_pretrained takes no {listed(unknown)}")
        refuse_other_adapters(self)
        refuse_other_scaling(self)
        _refuse_other_model(Path(save_directory))
        if save_backbone is False and self.config.tune_backbone:
            raise ValueError("save_backbone must be true with tune_backbone, got False: all of the backbone is tuned")
        save_backbone = self.config.save_backbone if save_backbone is None else save_backbone
        save_backbone = save_backbone or self.config.backbone is None
        if save_backbone:
            refuse_merged_peft(self)
        else:
            self.refuse_changed_backbone()
        self.config.save_backbone = save_backbone
        state_dict = self.state_dict() if state_dict is None else state_dict
        if not self.config.save_backbone:
            tuned = self.tuned_names()
            state_dict = {name: tensor for name, tensor in state_dict.items() if name in tuned}
        kwargs["save_original_format"] = False
        backbone = self.config.backbone
        try:
            self.config.backbone = relative_to(backbone, save_directory if place is None else place)
            if self.config.save_backbone and backbone is not None and Path(backbone).is_dir():
                self.config.backbone = None  # saved along: where it came from says nothing elsewhere
            writes = kwargs.get("is_main_process", True)
            with _written_aside(Path(save_directory)) if writes else nullcontext(save_directory) as aside:
                super().save_pretrained(aside, state_dict=state_dict, **kwargs)
                if writes:
                    write_digest(aside / SAFE_WEIGHTS_NAME)
                    files = {} if self.retriever_prefix else SENTENCE_TRANSFORMERS_FILES
                    for name, content in files.items():
                        (aside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        finally:
            self.config.backbone = backbone
        on_disk = not self.config.save_backbone and Path(backbone).is_dir()  # without a name it is always saved
        if writes and on_disk and not self.retriever_prefix:  # of checkpoints, nobody takes the retriever elsewhere
            logger.warning(
                f"The retriever in {save_directory if place is None else place} names its backbone in the folder "
                f"{backbone}, without which it can't be moved to another machine. Save it with save_backbone=True "
                "(--save_backbone true in training) to have both in one place, or say where the backbone is when "
                "loading it: backbone=... (--backbone)"
            )

    def push_to_hub(
        self,
        repo_id,
        *,
        commit_message="Upload retriever",
        commit_description=None,
        private=None,
        token=None,
        revision=None,
        create_pr=False,
        save_backbone=None,
    ):
        """Upload what `save_pretrained` saves, with a model card if the repository has none yet.

        `VPTSPTrainer.push_to_hub` uploads more: the image processor, scores, the picture.

        Args:
            repo_id: Repository on the Hub, `owner/name`; made if there is none.
            commit_message: Of the commit.
            commit_description: Of the commit.
            private: Whether a new repository is private; None for the owner's default.
            token: Token of the Hub; None for the one that `hf auth login` keeps.
            revision: Branch; made if there is none.
            create_pr: Open a pull request instead.
            save_backbone: As for `save_pretrained`.

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            ValueError: the backbone is a folder of this machine, which nobody else has.
        """
        self.require_shareable(save_backbone)
        api = HfApi()
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.retriever.save_pretrained(folder, save_backbone=save_backbone)
            card = _card_writer()
            if card is not None and not api.file_exists(repo_id, "README.md", revision=revision, token=token):
                card(self, repo_id, token=token).save(Path(folder) / "README.md")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def require_shareable(self, save_backbone=None):
        """Raise a `ValueError` if others could not load the retriever, since its backbone is a folder of this machine
        or since PEFT has changed it.

        Args:
            save_backbone: As for `save_pretrained`.
        """
        refuse_other_adapters(self)
        refuse_other_scaling(self)
        backbone = self.config.backbone
        saved_along = self.config.save_backbone if save_backbone is None else save_backbone
        if backbone is not None and not saved_along:
            self.refuse_changed_backbone()
        if backbone is not None and not saved_along and Path(backbone).is_dir():
            raise ValueError(
                f"the backbone is the local folder {backbone!r}, which others don't have: push with "
                "save_backbone=True, or name the same weights on the Hub with model.config.backbone = 'owner/name'"
            )

    def load_saved(self, folder):
        """Load what `save_pretrained` wrote for this very configuration, in place and strictly.

        Args:
            folder: Local folder with `model.safetensors`.

        Raises:
            ValueError: tensors are missing, unknown, of another shape or a wider dtype, or the file is damaged.
        """
        saved = read_weights(Path(folder) / SAFE_WEIGHTS_NAME)
        own = self.state_dict()
        expected = set(own) if self.config.save_backbone else self.tuned_names()
        others = _others(saved, own, may_round=False)
        _refuse_differences(expected - set(saved), set(saved) - expected, folder, others)
        self.load_state_dict(saved, strict=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, backbone=None, **kwargs):
        """Load tuned weights and put them on the backbone that they name.

        Without `dtype`, weights are loaded in the one that they were saved in (the widest, of several).

        Args:
            pretrained_model_name_or_path: Hub name or local folder of a saved model.
            config: Configuration to use instead of the saved one.
            backbone: Hub name or folder of the backbone's weights, where they are not where the configuration says.
            **kwargs: As for `PreTrainedModel.from_pretrained`, but for what would choose other files or change what is
                in them (`variant`, `ignore_mismatched_sizes`, `key_mapping`, `use_safetensors=False` and the like).

        Raises:
            OSError: a file is not to be had, or the weights are not in safetensors.
            ValueError: the checkpoint has missing or unknown tensors, or some of another shape or kind of numbers; the
                backbone is another than that tuned with; a file is damaged; a retriever from the Hub names a backbone
                that is not on the Hub; or an argument is refused.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        for name in _NOT_FOR_LOADING:
            if kwargs.pop(name, None):
                raise ValueError(f"{name} is not for {cls.__name__}: there is one {SAFE_WEIGHTS_NAME}, read as it is")
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError(f"use_safetensors must be true, got False: retrievers are read from {SAFE_WEIGHTS_NAME}")
        for name in ("dtype", "torch_dtype"):
            check_dtype(name, kwargs.get(name), "auto")
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        revision = kwargs.pop("revision", None) or "main"
        return_info = kwargs.pop("output_loading_info", False)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("trust_remote_code", "adapter_kwargs")}
        dtype_given = any(kwargs.get(name) not in (None, "auto") for name in ("dtype", "torch_dtype"))
        if config is None:
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, revision=revision, **hub_kwargs)
        else:  # `AutoModel` has put backbone=... and dtype=... into the configuration
            _, saved = read_config(pretrained_model_name_or_path, revision, **hub_kwargs)
            if backbone is None and config.backbone != saved.get("backbone"):
                backbone = config.backbone
            given, stored = (str(dtype).removeprefix("torch.") for dtype in (config.dtype, saved.get("dtype")))
            dtype_given = dtype_given or given not in ("None", stored)
        known = {field.name for field in fields(config)}
        for key in [key for key in kwargs if key in known and key != "dtype"]:
            setattr(config, key, kwargs.pop(key))
        config.validate_fields()
        if config.backbone_config is None:
            raise ValueError(
                f"backbone_config in {CONFIG_NAME} of {str(pretrained_model_name_or_path)!r} must be a mapping with a "
                "model_type, got None"
            )
        file = _safetensors_file(pretrained_model_name_or_path, revision, **hub_kwargs)
        saved = read_weights(file)
        refuse_unusable(saved, file)
        from_retriever = not any(name.startswith("vptsp.") for name in saved)
        saved = cls._named_as_here(saved, from_retriever)
        if not dtype_given:
            kwargs["dtype"] = widest_dtype(saved) or config.dtype
        frozen = {}
        if not config.save_backbone:
            frozen = cls._frozen_weights(config, pretrained_model_name_or_path, backbone, hub_kwargs)
            saved = _named_as_in(frozen, saved, config.backbone_config.model_type)
        cls._refuse_other_tensors(config, frozen | saved, from_retriever, pretrained_model_name_or_path)
        # Tensors read from a file lie at odd addresses, from which some kernels round otherwise; copies are aligned.
        state_dict = {name: tensor.clone() for name, tensor in (frozen | saved).items()}
        model, info = super().from_pretrained(
            None,
            *model_args,
            config=config,
            state_dict=state_dict,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **kwargs,
        )
        model._refuse_incomplete(saved, info, from_retriever, pretrained_model_name_or_path)
        model.retriever.is_new = False
        model.freeze_backbone()
        if not config.save_backbone or model._has_fingerprint():  # saved along, they may be others than the backbone's
            model.note_frozen_weights()
        if not from_retriever:
            model.load_beside(
                lambda name: cached_file(pretrained_model_name_or_path, name, revision=revision, **hub_kwargs)
            )
        return (model, info) if return_info else model

    @classmethod
    def _frozen_weights(cls, config, source, backbone, hub_kwargs):
        """The backbone's own weights under the names that they have in this class.

        Args:
            config: The configuration; it gets the place of the backbone, as from `load_backbone`.
            source: Hub name or local folder of the retriever.
            backbone: Where the weights are, None for what the configuration says.
            hub_kwargs: `HUB_ARGUMENTS` with which the retriever is loaded.
        """
        if backbone is not None:
            config.backbone, config.backbone_revision = str(backbone), None
        folder = None
        if Path(source).is_dir():
            folder = Path(source, hub_kwargs.get("subfolder") or "")
        elif backbone is None:
            refuse_local_backbone(config.backbone, source)
        hub_kwargs = {key: value for key, value in hub_kwargs.items() if key != "subfolder"}
        weights = names_beside_peft(load_backbone(config, folder=folder, **hub_kwargs), config)
        return {f"{cls.retriever_prefix}backbone.{name}": tensor for name, tensor in weights.items()}

    @classmethod
    def _refuse_other_tensors(cls, config, weights, from_retriever, source):
        """Raise a `ValueError` if tensors are not those that the configuration says, before a model is built.

        A damaged configuration may ask for more memory than there is. In a training model, what is not the retriever's
        starts anew of a retriever.
        """
        with torch.device("meta"):
            own = cls(copy.deepcopy(config)).state_dict()
        others = [
            f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
            for name, tensor in weights.items()
            if name in own and own[name].shape != tensor.shape
        ]
        prefix = cls.retriever_prefix if from_retriever else ""
        missing = [name for name in own if name not in weights and name.startswith(prefix)]
        _refuse_differences(missing, [name for name in weights if name not in own], source, others)

    def _refuse_incomplete(self, saved, info, from_retriever, source):
        """Raise a `ValueError` unless all that this model should have come from its checkpoint did.

        What the backbone would fill in as well counts too: a tuned bias must not become the pretrained one.

        Args:
            saved: Name -> tensor of the checkpoint.
            info: What transformers reports of the loading.
            from_retriever: Whether the checkpoint is a retriever's; in a training model, the rest starts anew.
            source: The checkpoint's name.
        """
        missing, unknown = set(info["missing_keys"]), set(info["unexpected_keys"])
        if not self.config.save_backbone:
            tuned = self.tuned_names()
            missing, unknown = missing | (tuned - set(saved)), unknown | (set(saved) - tuned)
        if from_retriever:
            missing = {name for name in missing if name.startswith(self.retriever_prefix)}
        _refuse_differences(missing, unknown, source, _others(saved, self.state_dict(), may_round=True))

    def load_beside(self, find):
        """Load what a subclass saves in files of its own.

        Args:
            find: Gives the local path of a file of the checkpoint, by its name.
        """

    @classmethod
    def _named_as_here(cls, state_dict, from_retriever):
        """Tensors of a retriever or of a training model, under the names that they have in this class."""
        if not cls.retriever_prefix and not from_retriever:
            return {name[6:]: tensor for name, tensor in state_dict.items() if name.startswith("vptsp.")}
        if cls.retriever_prefix and from_retriever:
            return {f"vptsp.{name}": tensor for name, tensor in state_dict.items()}
        return state_dict


# ---- The retriever


class VPTSPModel(VPTSPPreTrainedModel):
    """Retriever: images to L2-normalised embeddings, by a frozen vision transformer with tuned prompts.

    Method of Ren et al., ICLR 2024, section 3.1; the prompts run as in VPT-deep (Jia et al., ECCV 2022).
    """

    retriever_prefix = ""

    def __init__(self, config: VPTSPConfig):
        super().__init__(config)
        if config.backbone_config is None:
            raise ValueError("backbone_config must be set to build a model, got None; see from_backbone")
        self.family = family_of(config.backbone_config)
        self.backbone = self.family.build(config.backbone_config)
        self.peft = add_peft(self.backbone, config) if uses_peft(config) else NO_PEFT
        self.adapters = build_adapters(config)
        self.is_new = True  # nothing has been tuned since it came from a backbone or a configuration
        self.frozen_digests = {}  # name -> what the frozen weights may be; see `note_frozen_weights`
        self.prompts = Prompts(config.prompt_lengths, config.num_prompts, config.backbone_config.hidden_size)
        self.head = embedding_head(config)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        add_tuning(self)
        self.post_init()
        start_peft(self.backbone, config, self.peft)
        self.freeze_backbone()
        self.backbone.train(config.tune_backbone)  # before anyone calls `train` or `eval`: DINOv3 draws positions anew

    def forward(
        self,
        pixel_values,
        interpolate_pos_encoding=False,
        prompt_key_values=None,
        return_dict=None,
        output_attentions=None,
        output_hidden_states=None,
        keep=(),
    ):
        """Embed images.

        Args:
            pixel_values: `(B, 3, height, width)` float, normalised as the backbone expects.
            interpolate_pos_encoding: Take images of another size than the model's, as transformers' own model does:
                with its position embeddings interpolated in this very pass, or (rotary positions) as they are. For
                one size throughout, see `image_size` of `from_backbone`.
            prompt_key_values: What `project_prompts` gave, where the weights have not changed since; None computes it.
            return_dict: False gives a tuple; None is what the configuration says.
            output_attentions: Not to be had; see `vptsp.eval.attention` for where the CLS token looks.
            output_hidden_states: Not to be had; register a forward hook on a layer of `backbone`.
            keep: What training needs beside the embeddings: any of `features` and `tokens` (with `first_layer`).

        Returns:
            [`VPTSPModelOutput`].

        Raises:
            ValueError: `pixel_values` is missing, of a wrong shape or not floating point; attentions or hidden states
                are asked for; or `keep` names something else.
        """
        self.refuse_intermediate_outputs(output_attentions, output_hidden_states)
        if not {*keep} <= {"features", "tokens"}:
            raise ValueError(f"keep must name any of features and tokens, got {keep!r}")
        tokens = self.embed_patches(pixel_values, interpolate_pos_encoding)
        first_layer = self.project_first_layer(tokens) if "tokens" in keep else None
        prompts = self.prompts() if prompt_key_values is None else prompt_key_values
        pooled = self.encode(tokens, prompts, first_layer=first_layer)
        features = self.head(pooled, normalize=False)  # in any case, so that hooks on the head always see the same
        embeddings = self.embedding_dropout(F.normalize(features, dim=-1))
        output = VPTSPModelOutput(
            embeddings=embeddings,
            pooler_output=embeddings,
            features=features if "features" in keep else None,
            tokens=tokens if "tokens" in keep else None,
            first_layer=first_layer,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def refuse_intermediate_outputs(self, output_attentions=None, output_hidden_states=None):
        """Raise a `ValueError` if the caller or the configuration asks for what the prompted pass does not keep."""
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        for name, value in asked.items():
            if getattr(self.config, name) if value is None else value:
                raise ValueError(f"{name} must be false, got true: the prompted pass gives embeddings alone")

    def embed_patches(self, pixel_values, interpolate_pos_encoding=False) -> ImageTokens:
        """`(B, 3, height, width)` -> tokens that every pass starts from, with what the layers need of positions."""
        if pixel_values is None or pixel_values.dim() != 4:
            shape = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must have shape (B, 3, height, width), got {shape}")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be normalised floats, got {pixel_values.dtype}")
        patch_size = self.config.backbone_config.patch_size
        if interpolate_pos_encoding and any(side % patch_size for side in pixel_values.shape[2:]):
            raise ValueError(
                f"height and width must be multiples of the patch size {patch_size}, got "
                f"{tuple(pixel_values.shape[2:])}"
            )
        hidden = self.family.embed(self.backbone, pixel_values, interpolate_pos_encoding)
        return ImageTokens(hidden, self.family.rotation(self.backbone, pixel_values, hidden))

    def project_prompts(self):
        """The shared prompts as all that the layers make of them, to be given to `forward` again and again.

        Nothing is kept in the model: what is returned is right for the weights, the dtype and the autocast of this
        moment. Spares each batch 2 of the 12 products that a prompt would cost a plain layer: worth it for single
        images and many prompts, hardly for batches.

        Returns:
            List of a [`PromptKeyValue`] for each prompted layer.
        """
        tokens = self.prompts()
        if self.config.prompt_mode == "shallow":
            return tokens
        layers = self.family.layers(self.backbone)[: len(tokens)]
        return [project_prompts(self.family, layer, part) for layer, part in zip(layers, tokens, strict=True)]

    def project_first_layer(self, tokens):
        """What every pass over the same tokens computes in the first layer, to be given to `encode`.

        None where it is not worth keeping: with gradient checkpointing, only one layer, or prompts among the tokens;
        and where the layer has to be called as a whole.
        """
        first, *others = self.family.layers(self.backbone)
        checkpointing = getattr(first, "gradient_checkpointing", False)
        if (
            not others
            or checkpointing
            or self.config.prompt_mode == "shallow"
            or not can_take_apart(self.family, first)
        ):
            return None
        return project_tokens(self.family, first, tokens)

    def encode(self, tokens, prompts=(), prompt_rows=None, first_layer=None, adapted=True):
        """[`ImageTokens`] through the prompted layers, pooled. See `prompted_forward`.

        `adapted=False` leaves the adapters out.

        Returns:
            `(B, pooled_dim)`; `(B, 2, D)` with `cls` pooling of a backbone with two class tokens.
        """
        pooling, num_tokens = self.config.pooling, tokens.hidden.shape[1]
        prefix_only = pooling == "cls"
        if self.config.prompt_mode == "shallow" and prompts:
            tokens, prompts = append_prompts(tokens, prompts[0], prompt_rows), ()
        hidden = prompted_forward(
            self.family,
            self.backbone,
            tokens,
            prompts,
            prompt_rows,
            prefix_only,
            first_layer,
            adapters=self.adapters if adapted else (),
        )
        if prefix_only:
            return hidden[:, 0] if self.family.num_class_tokens == 1 else hidden
        patches = hidden[:, self.family.num_prefix_tokens : num_tokens]
        if pooling == "head":
            return self.family.head(self.backbone, patches)
        mean = patches.mean(dim=1)
        return mean if pooling == "mean" else torch.cat([hidden[:, 0], mean], dim=-1)

    def merged(self):
        """A copy that needs no PEFT: what it tunes of the backbone is added to the backbone's own weights.

        These are then nobody else's, and saved with it.

        Returns:
            [`VPTSPModel`], which embeds as this one does, up to rounding.

        Raises:
            ValueError: PEFT tunes nothing here, it has changed the model, or weights of this backbone can't hold it.
        """
        if not uses_peft(self.config):
            raise ValueError("merged() is for what PEFT tunes (lora_rank, or tuning peft), but there is none of it")
        refuse_other_adapters(self)
        refuse_other_scaling(self)
        copied = copy.deepcopy(self)
        for name, layer in peft_layers(copied.backbone).items():
            if not layer.merged:
                layer.merge(safe_merge=True)
            copied.backbone.set_submodule(name, layer.get_base_layer())
        values = {"lora_rank": 0, "lora_targets": None, "use_dora": False, "peft_config": None}
        values |= {"tuning": None if self.config.tuning == "peft" else self.config.tuning, "save_backbone": True}
        values |= {"backbone": None, "backbone_revision": None, "backbone_fingerprint": None}
        for name, value in values.items():
            setattr(copied.config, name, value)
        copied.config.validate_fields()
        copied.peft, copied.frozen_digests = NO_PEFT, {}
        copied.freeze_backbone()
        return copied

    def embed_with_backbone(self, pixel_values, interpolate_pos_encoding=False):
        """Embeddings of the backbone alone, without prompts, adapters or head: the line to beat. `(B, pooled_dim)`.

        Of two class tokens, the mean. Where tuning changes the backbone itself (BitFit, LoRA, full fine-tuning), this
        is the pretrained backbone only before training.
        """
        pooled = self.encode(self.embed_patches(pixel_values, interpolate_pos_encoding), adapted=False)
        pooled = pooled.mean(dim=1) if pooled.dim() == 3 else pooled
        return F.normalize(at_least_float32(pooled), dim=-1)


VPTSPModel.register_for_auto_class("AutoModel")

__all__ = ["VPTSPModel", "VPTSPModelOutput", "VPTSPPreTrainedModel", "backbone_fingerprint", "load_backbone"]
