"""Configuration of VPTSP models: what the model is, not how a run goes."""

import difflib
import json
import math
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import ClassVar, Literal, Union, get_args, get_origin

import torch
import transformers


# Before anything of transformers is used: what is missing in older versions has many names, none of which says why.
LOWEST_TRANSFORMERS = "5.18"
if [int(part) for part in transformers.__version__.split(".")[:2]] < [int(p) for p in LOWEST_TRANSFORMERS.split(".")]:
    raise ImportError(
        f"a VPTSP retriever needs transformers {LOWEST_TRANSFORMERS} or newer, but {transformers.__version__} is "
        "installed"
    )

from huggingface_hub.errors import StrictDataclassError  # noqa: E402
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402
from transformers.utils import CONFIG_NAME, logging  # noqa: E402

from .backbones_vptsp import family_of  # noqa: E402


logger = logging.get_logger(__name__)

# Version of what `save_pretrained` writes. A configuration without one is of version 1.
FORMAT_VERSION = 1

# Class prompts up to this size (in float32) are dense where `class_prompt_store` is `auto`. With gradient and the
# states of AdamW, the device holds four times as much.
DENSE_CLASS_PROMPT_BYTES = 512 * 2**20


def _prompt_lengths(num_prompts: int, depth: int, step: int) -> tuple[int, ...]:
    """Number of prompt tokens `P_i = max(num_prompts - i * step, 0)` of each layer `i < depth`."""
    return tuple(max(num_prompts - layer * step, 0) for layer in range(depth))


class VPTSPConfig(PreTrainedConfig):
    """Configuration of [`VPTSPModel`] and [`VPTSPForMetricLearning`].

    Symbols in parentheses are those of Ren et al., "Learning Semantic Proxies from Visual Prompts for
    Parameter-Efficient Fine-Tuning in Deep Metric Learning", ICLR 2024 (arXiv 2402.02340).

    Args:
        backbone_config: Configuration (or its dict, with `model_type`) of the frozen vision transformer.
            Supported model types: those of `FAMILIES` in `backbones_vptsp.py`. Its image size is that of the model:
            position embeddings of a checkpoint for another size are interpolated when they are loaded.
        backbone: Hub name or local folder of the backbone's weights. None: they are random or saved with the model.
        backbone_revision: Commit, tag or branch of `backbone` on the Hub. None: the default branch.
        backbone_fingerprint: Digest of the backbone's weights, checked when they are loaded again.
            Set by `from_backbone`; None checks nothing.
        save_backbone: Save the frozen weights too, so that loading needs no second repository.
            Always done where `backbone` is None, since they could not be had again.
        num_prompts: Shared prompt tokens of the first layer.
        prompt_mode: `deep`, every layer has prompts of its own, whose outputs are thrown away (VPT-deep), or
            `shallow`, prompts enter once, in front of the first layer, and go through all layers (VPT-shallow). It
            holds for class prompts too.
        prompt_depth: Number of layers that get prompts; None means all of them (`shallow`: the first), 0 none.
        prompt_step: By how many prompts each layer has fewer than the one before.
        pooling: `cls`, `mean` (over the patch tokens), `cls+mean` (concatenated) or `head` (the backbone's own
            attention pooling over the patch tokens: SigLIP). None: what the backbone's authors take, `head` of SigLIP,
            `mean` of I-JEPA, `cls` of the others. Of a distilled DeiT, `cls` takes the distillation token too: each
            of the two has a LayerNorm and a linear layer of its own, whose outputs are averaged and then
            L2-normalised; `cls+mean` takes the CLS token alone.
        embedding_dim: Width of the embeddings (E).
        embedding_dropout: Dropout on the normalised embeddings while training.
        bitfit: Tune every bias of the backbone that takes part.
        tune_backbone: Tune all of the backbone that takes part (full fine-tuning). It is then saved whole.
        adapter_layers: Number of last layers whose MLP has an adapter, a tuned bottleneck MLP beside it; 0 for none.
        adapter_dim: Width of the adapters' bottleneck.
        adapter_mode: What an adapter gets: the tokens in front of the MLP and its norm (`parallel`), or what the MLP
            gives (`sequential`). Either way its output is added to the MLP's.
        adapter_norm: LayerNorm in front of an adapter (`pre`), behind it (`post`) or `none`.
        adapter_scale: Factor on what an adapter's linear layers give.
        lora_rank: Rank of LoRA matrices beside linear layers of the backbone (needs the package peft), at most the
            backbone's width; 0 for none.
        lora_alpha: Their product is scaled by `lora_alpha / lora_rank`.
        lora_targets: Names of the linear layers with LoRA; None for `q_proj` and `v_proj` (queries and values).
        use_dora: LoRA as DoRA: the norm of each row of the weights, LoRA's product added, is tuned by itself.
        tuning: A further tuning method: `peft`, or one that `register_tuning` made known. None: none.
        tuning_kwargs: Keywords of one that was registered, as a mapping (on the command line: JSON).
        peft_config: With `tuning` `peft`, PEFT's own configuration of what it tunes: a mapping with a `peft_type` (on
            the command line: JSON), or the path of a file that holds one, such as `adapter_config.json`.
        num_classes: Number of training classes (C); only training needs it.
        num_class_prompts: Prompt tokens that each class has of its own in the first layer, for the semantic pass.
        class_prompt_depth: Number of layers with class prompts; None means all of them (`shallow`: the first).
        class_prompt_step: By how many class prompts each layer has fewer than the one before.
        class_prompt_store: Where class prompts are: `dense` is a parameter on the device, `offloaded` a table in host
            memory, of which the batch's rows are brought in and updated; `auto` is dense up to 512 MiB in float32.
        proxy_head: `own` weights for the head of the semantic pass, or those of the embedding head (`shared`).
        proxy_update: How semantic vectors are folded into the proxy state (S): `gru_relu` and `gru` (VPTSP-G with
            relu or tanh candidate), `mean` (VPTSP-M, running mean), or `none` (no semantic proxies: the loss sees the
            original proxies alone, as in plain Proxy-Anchor).
        proxy_normalization: L2-normalise S after every image of a class (`per_step`, the paper) or once after the
            last (`per_batch`, the released runs). The running mean takes a class's images in one step, so that both
            are the same for it: `S <- normalise(keep * S + (1 - keep) * mean(p))`.
        proxy_keep: Share of the old S that the running mean keeps.
        rnn_dropout: Dropout on S before it is normalised.
        proxy_bias_ratio: Share (a) of the original proxies (O) in the proxies, `Q = normalise((1 - a) * S + a * O)`.
        proxy_range: Compare embeddings with the proxies of `all` classes, or of the `batch`'s classes.
        loss: `proxy_anchor` or `proxy_nca`; `recall_at_k` or `hyperbolic`, which compare images with each other and
            need `proxy_update` `none`, since they have no proxies; `pml.<Name>`, a loss of pytorch-metric-learning,
            likewise; or one that `register_loss` made known.
        loss_alpha: Scale (alpha) of `proxy_anchor` and `proxy_nca`.
        loss_delta: Margin (delta) of the same.
        loss_kwargs: Keywords of any other loss, as a mapping (on the command line: JSON).
        miner: `pml.<Name>`, a miner of pytorch-metric-learning for a loss of it. None: all pairs.
        miner_kwargs: Keywords of the miner.
        proxy_anchor_reduction: Average the positive term over `all_classes` compared with (the released runs), or
            over the classes that are present (`batch_positives`, the Proxy-Anchor paper).
        format_version: Version of the saved format; older ones are read, newer ones refused.

    Raises:
        ValueError: a field is unknown or out of its range, the backbone is not supported or can't be built, or the
            format is newer than this code.
    """

    model_type = "vptsp"
    sub_configs: ClassVar = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    backbone: str | None = None
    backbone_revision: str | None = None
    backbone_fingerprint: str | None = None
    save_backbone: bool = False

    num_prompts: int = 10
    prompt_mode: Literal["deep", "shallow"] = "deep"
    prompt_depth: int | None = None
    prompt_step: int = 0
    pooling: Literal["cls", "mean", "cls+mean", "head"] | None = None
    embedding_dim: int = 384
    embedding_dropout: float = 0.0
    bitfit: bool = True
    tune_backbone: bool = False
    adapter_layers: int = 0
    adapter_dim: int = 256
    adapter_mode: Literal["parallel", "sequential"] = "parallel"
    adapter_norm: Literal["pre", "post", "none"] = "post"
    adapter_scale: float = 1.0
    lora_rank: int = 0
    lora_alpha: float = 8.0
    lora_targets: list[str] | None = None
    use_dora: bool = False
    tuning: str | None = None
    tuning_kwargs: dict | None = None
    peft_config: dict | None = None

    num_classes: int | None = None
    num_class_prompts: int = 3
    class_prompt_depth: int | None = None
    class_prompt_step: int = 0
    class_prompt_store: Literal["auto", "dense", "offloaded"] = "auto"
    proxy_head: Literal["own", "shared"] = "own"
    proxy_update: Literal["gru_relu", "gru", "mean", "none"] = "gru_relu"
    proxy_normalization: Literal["per_step", "per_batch"] = "per_step"
    proxy_keep: float = 0.8
    rnn_dropout: float = 0.0
    proxy_bias_ratio: float = 0.5
    proxy_range: Literal["all", "batch"] = "all"

    loss: str = "proxy_anchor"
    loss_alpha: float = 32.0
    loss_delta: float = 0.1
    loss_kwargs: dict | None = None
    miner: str | None = None
    miner_kwargs: dict | None = None
    proxy_anchor_reduction: Literal["all_classes", "batch_positives"] = "all_classes"

    format_version: int = 1

    def __post_init__(self, **kwargs):
        from_file = self.transformers_version is not None  # or from `to_dict`, which is the same
        if from_file:  # first, since a newer format may hold what is unknown here
            self._refuse_newer_format()
        _refuse_unknown(type(self), kwargs, "VPTSPConfig", "; was it saved by a newer vptsp?" if from_file else "")
        for name, value in (("dtype", self.dtype), ("torch_dtype", kwargs.get("torch_dtype"))):
            check_dtype(name, value)
        if not from_file:  # where it is a mapping already
            self.peft_config = _peft_mapping(self.peft_config)
        if isinstance(self.backbone_config, dict):
            self.backbone_config = _backbone_config_from_dict(self.backbone_config, from_file)
        check_field("backbone_config", self.backbone_config, PreTrainedConfig | None)
        if self.backbone_config is not None:
            _check_backbone(self.backbone_config)
            self.backbone_config._name_or_path = ""  # a path of this machine; `backbone` says what others need to know
            family = family_of(self.backbone_config)
            self.backbone_config.image_size = family.image_size  # not every model names it
            self.pooling = family.default_pooling if self.pooling is None else self.pooling
            layers = 1 if self.prompt_mode == "shallow" else self.backbone_config.num_hidden_layers
            self.prompt_depth = layers if self.prompt_depth is None else self.prompt_depth
            self.class_prompt_depth = layers if self.class_prompt_depth is None else self.class_prompt_depth
        if self.tune_backbone is True and self.save_backbone is False:
            self.save_backbone = True
        self.validate_fields()
        super().__post_init__(**kwargs)

    def validate_fields(self):
        """Check the type and range of every field, and what fields demand of each other.

        Raises:
            ValueError: a field is not what it must be; the message names it.
        """
        self._refuse_newer_format()
        layers = None if self.backbone_config is None else self.backbone_config.num_hidden_layers
        for name, kind in VPTSPConfig.__annotations__.items():
            most = layers if name in ("prompt_depth", "class_prompt_depth") else None
            check_field(name, getattr(self, name), kind, RANGES.get(name), most)
        if layers is not None:
            _require(self, "pooling", self.pooling is not None, "set with a backbone_config")
            family_of(self.backbone_config).check_pooling(self.pooling)
            _require(self, "adapter_layers", self.adapter_layers <= layers, f"<= the backbone's {layers} layers")
            width = self.backbone_config.hidden_size  # a product of matrices has no rank above it
            _require(self, "lora_rank", self.lora_rank <= width, f"<= the backbone's width {width}")
        _require(self, "use_dora", self.lora_rank > 0 or not self.use_dora, "false without lora_rank")
        self._check_peft()
        if self.prompt_mode == "shallow":
            for name in ("prompt_depth", "class_prompt_depth"):
                _require(self, name, getattr(self, name) in (None, 0, 1), "None, 0 or 1 with prompt_mode shallow")
        _require(self, "miner", self.miner is None or self.miner.startswith("pml."), "None or pml.<Name>")
        if self.tune_backbone:
            _require(self, "save_backbone", self.save_backbone, "true with tune_backbone")
            _require(self, "lora_rank", self.lora_rank == 0, "0 with tune_backbone")

    def _check_peft(self):
        if self.tuning != "peft":
            _require(self, "peft_config", self.peft_config is None, "None without tuning peft")
            return
        _require(self, "peft_config", self.peft_config is not None, "a mapping or the path of a file with tuning peft")
        _require(self, "tuning_kwargs", self.tuning_kwargs is None, "None with tuning peft, which has peft_config")
        _require(self, "lora_rank", self.lora_rank == 0, "0 with tuning peft")
        _require(self, "tune_backbone", not self.tune_backbone, "false with tuning peft")
        if not isinstance(self.peft_config.get("peft_type"), str):
            raise ValueError(f"peft_config must have a peft_type such as LORA, got {self.peft_config!r}")
        for name, (accepted, instead) in _PEFT_FIELDS.items():
            if (value := self.peft_config.get(name)) not in accepted:
                raise ValueError(f"peft_config: {name} must be left out, got {value!r}: {instead}")

    def _refuse_newer_format(self):
        check_field("format_version", self.format_version, int, RANGES["format_version"])
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"saved by a newer version of vptsp: format_version is {self.format_version}, this code reads up to "
                f"{FORMAT_VERSION}. Upgrade vptsp"
            )

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As of `PreTrainedConfig`, which passes over keywords that it does not know.

        Raises:
            ValueError: a keyword is no field, unless `return_unused_kwargs` hands it on; or a field is not what it
                must be.
        """
        try:
            config, unused = super().from_dict(config_dict, **{**kwargs, "return_unused_kwargs": True})
        except (
            AttributeError,
            KeyError,
            TypeError,
            StrictDataclassError,
        ) as error:  # of fields that are transformers'
            raise ValueError(f"a field is not of the kind that it must be: {' '.join(str(error).split())}") from error
        config.validate_fields()
        if kwargs.get("return_unused_kwargs", False):
            return config, unused
        _refuse_unknown(cls, unused, "VPTSPConfig")
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As of `PreTrainedConfig`; errors of `from_dict` name the file."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except ValueError as error:
            if CONFIG_NAME in str(error):
                raise
            raise ValueError(f"{CONFIG_NAME} of {str(pretrained_model_name_or_path)!r}: {error}") from error

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As of `PreTrainedConfig`, which takes a file that is not there for one that says nothing.

        Raises:
            OSError: there is no such file, or it is not to be had.
            ValueError: it is no JSON object, or another model's configuration.
        """
        name = f"{CONFIG_NAME} of {str(pretrained_model_name_or_path)!r}"
        try:
            values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, RecursionError, TypeError) as error:  # of transformers, on what is no object
            raise ValueError(f"{name} must hold a JSON object ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{name} must hold a JSON object, got a {type(values).__name__}")
        if not values:
            raise OSError(f"{name} is not there, or says nothing")
        if values.get("model_type") != cls.model_type:
            raise ValueError(
                f"{name} must have model_type {cls.model_type!r}, got {values.get('model_type')!r}: it is another "
                "model's"
            )
        return values, unused

    @property
    def changes_backbone(self) -> bool:
        """Whether tuning changes what the backbone alone computes."""
        return self.tune_backbone or self.bitfit or self.lora_rank > 0 or self.tuning is not None

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Shared prompt tokens P_i of each prompted layer."""
        return _prompt_lengths(self.num_prompts, self.prompt_depth, self.prompt_step)

    @property
    def class_prompt_lengths(self) -> tuple[int, ...]:
        """Prompt tokens that each class has in each layer of the semantic pass."""
        return _prompt_lengths(self.num_class_prompts, self.class_prompt_depth, self.class_prompt_step)

    @property
    def class_prompt_bytes(self) -> int:
        """Size of all class prompts in float32."""
        return 4 * self.num_classes * sum(self.class_prompt_lengths) * self.backbone_config.hidden_size

    @property
    def resolved_class_prompt_store(self) -> str:
        """`dense` or `offloaded`: what `class_prompt_store` comes to."""
        if self.class_prompt_store != "auto":
            return self.class_prompt_store
        return "dense" if self.class_prompt_bytes <= DENSE_CLASS_PROMPT_BYTES else "offloaded"

    @property
    def projection_dim(self) -> int:
        """Width E of the embeddings, under the name by which other libraries ask for it."""
        return self.embedding_dim

    @property
    def hidden_size(self) -> int:
        """Width D of the backbone."""
        return self.backbone_config.hidden_size

    @property
    def image_size(self):
        """Side in pixels, or `(height, width)`, of the images that the backbone is made for."""
        return self.backbone_config.image_size

    @property
    def patch_size(self):
        """Side in pixels of the backbone's patches."""
        return self.backbone_config.patch_size

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled features that the heads get."""
        return self.backbone_config.hidden_size * (2 if self.pooling == "cls+mean" else 1)


# Fields of PEFT's configurations that only these values will do of, and what to do instead.
_PEFT_FIELDS = {
    "modules_to_save": ((None, []), "the embedding head is tuned in any case, and bitfit tunes biases"),
    "bias": ((None, "none"), "bitfit tunes biases"),
    "init_lora_weights": ((None, True, False, "gaussian", "orthogonal"), "others change the backbone, or read data"),
    "trainable_token_indices": ((None, []), "images have no tokens of a vocabulary"),
    "layer_replication": ((None, []), "the layers are those of the backbone"),
    "target_parameters": ((None, []), "name layers by target_modules"),
}
# What such a configuration says of a place, a task or a library, and not of what is tuned.
_NOT_OF_TUNING = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    "runtime_config",
)

# Bounds of numbers: `(low, high)`, both included, unless `_OPEN` says otherwise.
RANGES = {
    **dict.fromkeys(("num_prompts", "prompt_step", "num_class_prompts", "class_prompt_step"), (0, math.inf)),
    **dict.fromkeys(("prompt_depth", "class_prompt_depth", "adapter_layers", "lora_rank"), (0, math.inf)),
    **dict.fromkeys(("embedding_dim", "adapter_dim", "format_version"), (1, math.inf)),
    "num_classes": (2, math.inf),
    **dict.fromkeys(("embedding_dropout", "rnn_dropout", "proxy_keep", "proxy_bias_ratio"), (0, 1)),
    **dict.fromkeys(("loss_alpha", "adapter_scale", "lora_alpha"), (0, math.inf)),
}
_WORDS = {"loss": "the name of a loss", "lora_targets": "a list of names of linear layers"}
_OPEN = {"embedding_dropout": ")", "rnn_dropout": ")", "loss_alpha": "(", "adapter_scale": "(", "lora_alpha": "("}


def check_field(name, value, kind, bounds=None, layers=None):
    """Compare a value with its field's type and range.

    Args:
        name: Of the field.
        value: What it holds.
        kind: Its type: bool, int, float, str, dict, `list[str]`, a `Literal` of strings, or one of these or None.
            Others are not looked at.
        bounds: Least and largest number; `_OPEN` says which of them is out itself.
        layers: Layers of the backbone, where that is the most.

    Raises:
        ValueError: it is not what it must be.
    """
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    optional, members = NoneType in members, [member for member in members if member is not NoneType]
    if len(members) > 1 or (optional and value is None):
        return
    expected, accepted = _expectation(value, members[0])
    expected = _WORDS.get(name, expected)
    if bounds is not None:
        (low, high), edge = bounds, _OPEN.get(name, "")
        expected = f"{expected} {_words(low, high, edge)}".removeprefix("a number ")
        accepted = accepted and (low < value if edge == "(" else low <= value)
        accepted = accepted and (value < high if edge == ")" or high == math.inf else value <= high)
    if layers is not None:
        expected, accepted = f"{expected} and <= the backbone's {layers} layers", accepted and value <= layers
    if not accepted:
        raise ValueError(f"{name} must be {'None or ' if optional else ''}{expected}, got {value!r}")


def nearest(name, known) -> str:
    """`; did you mean 'x'?` of the known name that is most like another, in any case; nothing where none is."""
    names = {item.casefold(): item for item in known}
    found = difflib.get_close_matches(str(name).casefold(), names, n=1)
    return "".join(f"; did you mean {names[item]!r}?" for item in found)


def check_dtype(name, value, *words):
    """Raise a `ValueError` unless a value is None, a dtype of PyTorch, its name, or one of `words`.

    Args:
        name: Of the field.
        value: What it holds.
        *words: What else it may be, such as `auto`.
    """
    known = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if value is not None and value not in words and not isinstance(known, torch.dtype):
        raise ValueError(f"{name} must be None or a dtype of PyTorch such as float32, got {value!r}")


def _peft_mapping(value):
    """A configuration of PEFT (an object, a mapping, the path of a file, or None) as a mapping of JSON values."""
    if isinstance(value, (str, Path)):
        value = _read_peft_config(Path(value))
    elif hasattr(value, "peft_type") and hasattr(value, "to_dict"):
        value = value.to_dict()
    if not isinstance(value, dict):
        return value  # which the check of fields refuses
    kept = {name: item for name, item in value.items() if name not in _NOT_OF_TUNING}
    plain = {name: sorted(item) if isinstance(item, (set, frozenset)) else item for name, item in kept.items()}
    try:
        return json.loads(json.dumps(plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft_config must hold what JSON can: {error}") from error


def _read_peft_config(path):
    if path.is_dir():
        raise ValueError(
            f"peft_config must be a file, got the folder {path}: give the adapter_config.json in it. What adapters "
            "hold that somebody has trained is not read"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"peft_config must be a mapping or a file of JSON, got {str(path)!r}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"peft_config: {path} must hold a mapping, got {value!r}")
    return value


def _expectation(value, kind):
    """What a type asks for, in words, and whether a value is that."""
    if kind is bool:
        return "true or false", isinstance(value, bool)
    if kind is int:
        return "an integer", isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return "a number", isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is str:
        return "a string", isinstance(value, str)
    if kind is dict:
        return "a mapping", isinstance(value, dict)
    if kind is PreTrainedConfig:
        return "a configuration of transformers, or a mapping with a model_type", isinstance(value, kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}", isinstance(value, str) and value in get_args(kind)
    if kind == list[str]:
        named = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(item, str) for item in value)
        return "a list of strings", named
    return "", True


def _words(low, high, edge):
    if high == math.inf:
        return f"> {low}" if edge == "(" else f">= {low}"
    return f"in [{low}, {high}{edge or ']'}"


def _require(config, name, accepted, expected):
    if not accepted:
        raise ValueError(f"{name} must be {expected}, got {getattr(config, name)!r}")


# What configurations hold beside their fields, as transformers reads and writes them, and so is no slip of anybody's.
_OF_TRANSFORMERS = {
    *("model_type", "name_or_path", "dtype", "torch_dtype", "auto_map", "custom_pipelines", "num_labels"),
    *("attn_implementation", "experts_implementation", "output_attentions", "quantization_config"),
    *("trust_remote_code", "adapter_kwargs", "stage_names", "out_features", "out_indices", "use_cache", "loss_type"),
    *("tie_word_embeddings", "torchscript", "is_decoder", "add_cross_attention", "pruned_heads", "tokenizer_class"),
    *("keys_to_ignore_at_inference", "task_specific_params", "finetuning_task", "pad_token_id"),
}


def _refuse_unknown(cls, given, what, why=""):
    """Raise a `ValueError` if keywords are no fields of a configuration's class; `PreTrainedConfig` keeps them all."""
    if unknown := _unknown(cls, given):
        known = [item.name for item in fields(cls)]
        raise ValueError(f"{what} has no field {', '.join(map(repr, unknown))}{why or nearest(unknown[0], known)}")


def _unknown(cls, given):
    known = {item.name for item in fields(cls)} | _OF_TRANSFORMERS
    return [name for name in given if name not in known and not name.startswith("_")]


def _backbone_config_from_dict(values: dict, from_file: bool) -> PreTrainedConfig:
    """The configuration of a backbone; what transformers wrote may have more than fields, as its checkpoint had."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"backbone_config must hold a model_type that transformers knows, got {model_type!r}")
    cls = CONFIG_MAPPING[model_type]
    if not from_file and "transformers_version" not in values:
        _refuse_unknown(cls, values, f"backbone_config ({cls.__name__})")
    elif unknown := _unknown(cls, values):
        logger.warning_once(
            f"backbone_config ({cls.__name__}) of a saved model holds what is no field of it and changes nothing: "
            f"{', '.join(map(repr, unknown))}"
        )
    for name in ("dtype", "torch_dtype"):
        check_dtype(f"backbone_config.{name}", values.get(name))
    try:
        return cls(**{key: value for key, value in values.items() if key != "model_type"})
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"backbone_config: {' '.join(str(error).split())}") from error


# Beyond any backbone; a damaged file shall not have a model built that fills the memory.
_MOST = {"num_hidden_layers": 1000, "hidden_size": 1 << 16, "num_attention_heads": 1 << 12, "patch_size": 1 << 15}
_MOST_IF_THERE = {"intermediate_size": 1 << 18, "mlp_ratio": 64, "num_register_tokens": 1 << 10}


def _check_backbone(config):
    """Raise a `ValueError` for a backbone of which nothing can be built: no layers, no width, no pixels."""
    family_of(config)  # is it supported at all?
    check_dtype("backbone_config.dtype", config.dtype)
    for name in ("patch_size", "image_size"):
        if isinstance(sides := getattr(config, name, None), (list, tuple)) and len(sides) != 2:
            raise ValueError(f"backbone_config.{name} must be a number or two, of height and width, got {sides!r}")
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "patch_size"):
        for number in _numbers(getattr(config, name)):
            check_field(f"backbone_config.{name}", number, int, (1, math.inf))
            if number > _MOST[name]:
                raise ValueError(f"backbone_config.{name} must be at most {_MOST[name]}, got {number}")
    for name, most in _MOST_IF_THERE.items():
        if (number := getattr(config, name, None)) is not None and not 0 <= number <= most:
            raise ValueError(f"backbone_config.{name} must be in [0, {most}], got {number!r}")
    if (channels := getattr(config, "num_channels", 3)) != 3:
        raise ValueError(f"backbone_config.num_channels must be 3, for red, green and blue, got {channels!r}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"backbone_config.hidden_size must be divisible by num_attention_heads, got {config.hidden_size} and "
            f"{config.num_attention_heads}"
        )
    activation = getattr(config, "hidden_act", None)
    if isinstance(activation, str) and activation not in ACT2FN:
        raise ValueError(f"backbone_config.hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {activation!r}")
    patch = max(_numbers(config.patch_size))
    for number in _numbers(family_of(config).image_size):
        check_field("backbone_config.image_size", number, int, (patch, math.inf))
        if number > _MOST["patch_size"]:
            raise ValueError(f"backbone_config.image_size must be at most {_MOST['patch_size']}, got {number}")


def _numbers(value):
    return value if isinstance(value, (list, tuple)) and value else (value,)


VPTSPConfig.register_for_auto_class()

__all__ = ["VPTSPConfig"]
