"""The losses by name, what each takes, and how the training model holds one.

`proxy_anchor` and `proxy_nca` are the training model's own (`losses/proxy_losses.py`); the others are modules with a
`forward` of two arguments. To add one, register its class; see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from ..names.registry import Registry
from .constructors import construct
from .pair_losses import HyperbolicLoss, RecallAtKLoss
from .pml_losses import PmlLoss, check_pml_loss, find_class


TAKES = ("embeddings", "features", "proxies")


class LossEntry(NamedTuple):
    """One loss.

    Attributes:
        build: Class of the loss; None for those that the training model computes itself.
        takes: What its `forward` gets. `embeddings`: L2-normalised `(B, E)` and labels `(B,)`; `features`: the head's
            output before it is normalised, and labels; `proxies`: cosine similarity of embeddings and proxies `(B, M)`
            and, for each image, the column of its class `(B,)`.
        min_images_per_class: Images of each class that a batch must have for the loss to mean anything.
    """

    build: Callable[..., nn.Module] | None
    takes: str
    min_images_per_class: int = 1


LOSSES: Registry[LossEntry] = Registry(
    "loss",
    {
        "proxy_anchor": LossEntry(None, "proxies"),
        "proxy_nca": LossEntry(None, "proxies"),
        "recall_at_k": LossEntry(RecallAtKLoss, "embeddings", min_images_per_class=2),
        "hyperbolic": LossEntry(HyperbolicLoss, "features", min_images_per_class=2),
    },
    also="or pml.<Name>",
)


def register_loss(name, takes="embeddings", min_images_per_class=1):
    """Decorator: make a class of loss known as `loss: name`.

    Keywords of its constructor come from `loss_kwargs`; `num_classes` and `embedding_dim` are filled in from the
    configuration where the constructor needs them. Parameters are trained with the proxies' learning rate.

    Args:
        name: Of the loss in configurations.
        takes, min_images_per_class: As in [`LossEntry`].

    Raises:
        ValueError: the name is another loss's, or `takes` is unknown.
    """
    if takes not in TAKES:
        raise ValueError(f"takes must be one of {', '.join(TAKES)}, got {takes!r}")

    def register(build):
        if name.startswith("pml."):
            raise ValueError(f"there is a loss {name!r} already")
        LOSSES.register(name, LossEntry(build, takes, min_images_per_class))
        return build

    return register


def find_loss(name: str) -> LossEntry:
    """Look a loss up.

    Raises:
        ValueError: there is none of this name; the message gives near ones.
        ImportError: it is one of pytorch-metric-learning, which is not installed.
    """
    if name.startswith("pml."):
        find_class(name, "losses")
        return LossEntry(PmlLoss, "embeddings")
    return LOSSES.find(name)


def check_loss(config):
    """Check a configuration's loss and its keywords, before anything is built.

    Args:
        config: A `VPTSPConfig`.

    Raises:
        ValueError: unknown loss, miner or keyword, or fields that do not go together.
        ImportError: the loss is one of pytorch-metric-learning, which is not installed.
    """
    entry = find_loss(config.loss)
    if entry.takes != "proxies" and config.proxy_update != "none":
        raise ValueError(
            f"the loss {config.loss!r} has no proxies: proxy_update must be none with it, got {config.proxy_update!r}"
        )
    if entry.build is None and config.loss_kwargs:
        raise ValueError(f"the loss {config.loss!r} is set by loss_alpha and loss_delta and has no loss_kwargs")
    if config.miner is not None and not config.loss.startswith("pml."):
        raise ValueError(f"miner needs a loss pml.<Name>, got the loss {config.loss!r}")
    if config.miner is None and config.miner_kwargs:
        raise ValueError("miner_kwargs needs a miner, got None")
    if config.loss.startswith("pml."):
        check_pml_loss(config)
    elif entry.build is not None:
        _build(config)


def _build(config) -> nn.Module:
    entry = find_loss(config.loss)
    available = {"num_classes": config.num_classes or 2, "embedding_dim": config.embedding_dim}  # 2: not known yet
    if config.loss.startswith("pml."):
        return entry.build(config.loss, config.loss_kwargs, config.miner, config.miner_kwargs, **available)
    return construct(config.loss, entry.build, config.loss_kwargs or {}, available)


class Criterion(nn.Module):
    """The loss of a configuration as a part of the training model.

    Its parameters are trained, and all its tensors saved and loaded with the model's: those too that the loss keeps as
    plain attributes, which become buffers.

    Args:
        config: A `VPTSPConfig` whose loss is not one of the training model's own.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.takes = find_loss(config.loss).takes
        self.function = self._build()
        # `from_pretrained` passes over modules without a tensor of their own, but `init_weights` must be called
        self.register_buffer("_unsaved", torch.empty(0), persistent=False)

    def _build(self):
        with torch.device("cpu"):  # `from_pretrained` works on a device without values
            function = _build(self.config)
        for module in function.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, torch.Tensor):
                    delattr(module, name)
                    module.register_buffer(name, value)
        return function

    def init_weights(self):
        """The values that the loss was made with, into tensors that no checkpoint had."""
        fresh = self._build().state_dict()
        for name, tensor in self.function.state_dict(keep_vars=True).items():
            init.copy_(tensor, fresh[name])

    def forward(self, inputs, targets):
        """What `takes` says, and labels (for proxies: columns); a scalar."""
        return self.function(inputs, targets)


def build_criterion(config) -> Criterion | None:
    """The criterion of a configuration; None for a loss that the training model computes itself."""
    return None if find_loss(config.loss).build is None else Criterion(config)


__all__ = ["LOSSES", "Criterion", "LossEntry", "build_criterion", "check_loss", "find_loss", "register_loss"]
