"""Configuration of VPTSP models: what the model is, not how a run goes."""

from __future__ import annotations

from typing import ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


POOLING = ("cls", "mean", "cls+mean")
PROXY_HEADS = ("own", "shared")
PROXY_UPDATES = ("gru_relu", "gru", "mean", "none")
PROXY_NORMALIZATIONS = ("per_step", "per_batch")
PROXY_RANGES = ("all", "batch")
PROXY_ANCHOR_REDUCTIONS = ("all_classes", "batch_positives")


def _prompt_lengths(num_prompts: int, depth: int, step: int) -> tuple[int, ...]:
    """Number of prompt tokens `P_i = max(num_prompts - i * step, 0)` of each layer `i < depth`."""
    return tuple(max(num_prompts - layer * step, 0) for layer in range(depth))


class VPTSPConfig(PreTrainedConfig):
    """Configuration of [`VPTSPModel`] and [`VPTSPForMetricLearning`].

    Symbols in parentheses are those of Ren et al., "Learning Semantic Proxies from Visual Prompts for
    Parameter-Efficient Fine-Tuning in Deep Metric Learning", ICLR 2024 (arXiv 2402.02340).

    Args:
        backbone_config: Configuration (or its dict, with `model_type`) of the frozen vision transformer.
            Supported model types: `vit`.
        backbone: Hub name or local folder of the backbone's weights. None: they are random or saved with the model.
        backbone_revision: Commit, tag or branch of `backbone` on the Hub. None: the default branch.
        backbone_fingerprint: Digest of the backbone's weights, checked when they are loaded again.
            Set by `from_backbone`; None checks nothing.
        save_backbone: Save the frozen weights too, so that loading needs no second repository.
            Always done where `backbone` is None, since they could not be had again.
        num_prompts: Shared prompt tokens of the first layer.
        prompt_depth: Number of layers that get prompts; None means all of them, 0 none.
        prompt_step: By how many prompts each layer has fewer than the one before.
        pooling: `cls`, `mean` (over the patch tokens) or `cls+mean` (concatenated).
        embedding_dim: Width of the embeddings (E).
        embedding_dropout: Dropout on the normalised embeddings while training.
        bitfit: Tune every bias of the backbone.
        tuning: A further tuning method, one that `register_tuning` made known. None: none.
        tuning_kwargs: Its keywords, as a mapping (on the command line: JSON).
        num_classes: Number of training classes (C); only training needs it.
        num_class_prompts: Prompt tokens that each class has of its own in the first layer, for the semantic pass.
        class_prompt_depth: Number of layers with class prompts; None means all of them.
        class_prompt_step: By how many class prompts each layer has fewer than the one before.
        proxy_head: `own` weights for the head of the semantic pass, or those of the embedding head (`shared`).
        proxy_update: How semantic vectors are folded into the proxy state (S): `gru_relu` and `gru` (VPTSP-G with
            relu or tanh candidate), `mean` (VPTSP-M, running mean), or `none` (no semantic proxies: the loss sees the
            original proxies alone, as in plain Proxy-Anchor).
        proxy_normalization: L2-normalise S after every image of a class (`per_step`, the paper) or once after the
            last (`per_batch`, the released runs).
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

    Raises:
        ValueError: a field is out of its range, or the backbone is not supported.
    """

    model_type = "vptsp"
    sub_configs: ClassVar = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    backbone: str | None = None
    backbone_revision: str | None = None
    backbone_fingerprint: str | None = None
    save_backbone: bool = False

    num_prompts: int = 10
    prompt_depth: int | None = None
    prompt_step: int = 0
    pooling: str = "cls"
    embedding_dim: int = 384
    embedding_dropout: float = 0.0
    bitfit: bool = True
    tuning: str | None = None
    tuning_kwargs: dict | None = None

    num_classes: int | None = None
    num_class_prompts: int = 3
    class_prompt_depth: int | None = None
    class_prompt_step: int = 0
    proxy_head: str = "own"
    proxy_update: str = "gru_relu"
    proxy_normalization: str = "per_step"
    proxy_keep: float = 0.8
    rnn_dropout: float = 0.0
    proxy_bias_ratio: float = 0.5
    proxy_range: str = "all"

    loss: str = "proxy_anchor"
    loss_alpha: float = 32.0
    loss_delta: float = 0.1
    loss_kwargs: dict | None = None
    miner: str | None = None
    miner_kwargs: dict | None = None
    proxy_anchor_reduction: str = "all_classes"

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict):
            self.backbone_config = _backbone_config_from_dict(self.backbone_config)
        if self.backbone_config is not None:
            layers = self.backbone_config.num_hidden_layers
            self.prompt_depth = layers if self.prompt_depth is None else self.prompt_depth
            self.class_prompt_depth = layers if self.class_prompt_depth is None else self.class_prompt_depth
        self.validate_fields()
        super().__post_init__(**kwargs)

    def validate_fields(self):
        """Check every field.

        Raises:
            ValueError: a field is out of its range; the message names it.
        """
        for field in ("num_prompts", "prompt_step", "num_class_prompts", "class_prompt_step"):
            _require(self, field, lambda value: _is_int(value) and value >= 0, "an integer >= 0")
        _require(self, "embedding_dim", lambda value: _is_int(value) and value >= 1, "an integer >= 1")
        _require(self, "num_classes", lambda v: v is None or (_is_int(v) and v >= 2), "None or an integer >= 2")
        for field in ("embedding_dropout", "rnn_dropout"):
            _require(self, field, lambda value: 0 <= value < 1, "in [0, 1)")
        for field in ("proxy_keep", "proxy_bias_ratio"):
            _require(self, field, lambda value: 0 <= value <= 1, "in [0, 1]")
        _require(self, "loss_alpha", lambda value: value > 0, "> 0")
        # which losses there are is for the training model to know: a retriever loads where its loss is not installed
        _require(self, "loss", lambda value: isinstance(value, str), "the name of a loss")
        _require(self, "miner", lambda v: v is None or v.startswith("pml."), "None or pml.<Name>")
        for field in ("loss_kwargs", "miner_kwargs", "tuning_kwargs"):
            _require(self, field, lambda v: v is None or isinstance(v, dict), "None or a mapping")
        for field, choices in _CHOICES.items():
            _require(self, field, lambda value, choices=choices: value in choices, "one of " + ", ".join(choices))
        for field in ("prompt_depth", "class_prompt_depth"):
            layers = None if self.backbone_config is None else self.backbone_config.num_hidden_layers
            limit = "" if layers is None else f" and <= the backbone's {layers} layers"
            _require(
                self,
                field,
                lambda v, layers=layers: v is None or (_is_int(v) and v >= 0 and (layers is None or v <= layers)),
                "None or an integer >= 0" + limit,
            )

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Shared prompt tokens P_i of each prompted layer."""
        return _prompt_lengths(self.num_prompts, self.prompt_depth, self.prompt_step)

    @property
    def class_prompt_lengths(self) -> tuple[int, ...]:
        """Prompt tokens that each class has in each layer of the semantic pass."""
        return _prompt_lengths(self.num_class_prompts, self.class_prompt_depth, self.class_prompt_step)

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled features that the heads get."""
        return self.backbone_config.hidden_size * (2 if self.pooling == "cls+mean" else 1)


_CHOICES = {
    "pooling": POOLING,
    "proxy_head": PROXY_HEADS,
    "proxy_update": PROXY_UPDATES,
    "proxy_normalization": PROXY_NORMALIZATIONS,
    "proxy_range": PROXY_RANGES,
    "proxy_anchor_reduction": PROXY_ANCHOR_REDUCTIONS,
}


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(config, field, accepts, expected):
    value = getattr(config, field)
    try:
        accepted = accepts(value)
    except (AttributeError, TypeError):
        accepted = False
    if not accepted:
        raise ValueError(f"{field} must be {expected}, got {value!r}")


def _backbone_config_from_dict(values: dict) -> PreTrainedConfig:
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"backbone_config must hold a model_type that transformers knows, got {model_type!r}")
    return CONFIG_MAPPING[model_type](**{key: value for key, value in values.items() if key != "model_type"})


VPTSPConfig.register_for_auto_class()

__all__ = ["VPTSPConfig"]
