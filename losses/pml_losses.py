"""Losses and miners of pytorch-metric-learning (`pip install vptsp[losses]`), by name: `pml.MultiSimilarityLoss`.

A keyword's value may itself be an object of that library: `pml.LpDistance`, or with keywords
`{pml.LpDistance: {p: 1}}`.
"""

from __future__ import annotations

import importlib
import inspect

import torch
from torch import nn

from ..names.registry import nearest
from .constructors import construct


KINDS = ("losses", "miners", "distances", "reducers", "regularizers")


def find_class(name: str, kind: str | None = None) -> type:
    """A class of pytorch-metric-learning.

    Args:
        name: `pml.<Name>`.
        kind: Module to look in, one of `KINDS`; None for all of them.

    Raises:
        ValueError: there is no such class; the message gives near ones.
        ImportError: pytorch-metric-learning is not installed.
    """
    try:
        modules = [
            importlib.import_module(f"pytorch_metric_learning.{part}") for part in KINDS if kind in (None, part)
        ]
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs pytorch-metric-learning: pip install 'vptsp[losses]' ({error})") from error
    classes = {key: value for module in modules for key, value in vars(module).items() if inspect.isclass(value)}
    short = name.removeprefix("pml.")
    if not name.startswith("pml.") or short not in classes:
        raise ValueError(
            f"pytorch-metric-learning has no {short!r} in its {kind or 'modules'}{nearest(short, classes)}"
        )
    return classes[short]


def build(name: str, kwargs, available, kind=None):
    """An object of pytorch-metric-learning; its keywords may name others."""
    found = find_class(name, kind)
    return construct(name, found, {key: _value(value, available) for key, value in (kwargs or {}).items()}, available)


def _value(value, available):
    if isinstance(value, str) and value.startswith("pml."):
        return build(value, None, available)
    if isinstance(value, dict):
        if len(value) == 1 and (name := next(iter(value))).startswith("pml."):
            return build(name, value[name], available)
        return {key: _value(item, available) for key, item in value.items()}
    return [_value(item, available) for item in value] if isinstance(value, list) else value


class PmlLoss(nn.Module):
    """A loss of pytorch-metric-learning, and optionally a miner that chooses its pairs or triplets.

    `num_classes` and the width of the embeddings are filled in where the loss needs them.

    Args:
        loss: `pml.<Name>` of the loss.
        loss_kwargs: Its keywords.
        miner: `pml.<Name>` of the miner; None for all pairs.
        miner_kwargs: Its keywords.
        num_classes: C.
        embedding_dim: E.

    Raises:
        ValueError: unknown name or keyword, or a value that the library refuses.
        ImportError: pytorch-metric-learning is not installed.
    """

    def __init__(self, loss, loss_kwargs=None, miner=None, miner_kwargs=None, *, num_classes, embedding_dim):
        super().__init__()
        available = {"num_classes": num_classes, "embedding_size": embedding_dim, "descriptors_dim": embedding_dim}
        self.loss = build(loss, loss_kwargs, available, "losses")
        self.miner = None if miner is None else build(miner, miner_kwargs, available, "miners")
        # the place in a memory of earlier batches is two plain numbers, which a state dict would not hold
        self._memories = [module for module in self.modules() if hasattr(module, "queue_idx")]
        if self._memories:
            self.register_buffer("queues", torch.zeros(len(self._memories), 2, dtype=torch.int64))

    def forward(self, embeddings, labels):
        """Loss of a batch: `(B, E)` L2-normalised and `(B,)` int64 -> scalar."""
        for i, memory in enumerate(self._memories):
            memory.queue_idx, memory.has_been_filled = int(self.queues[i, 0]), bool(self.queues[i, 1])
        pairs = None if self.miner is None else self.miner(embeddings, labels)
        loss = self.loss(embeddings, labels, pairs)
        for i, memory in enumerate(self._memories):
            self.queues[i] = torch.tensor([memory.queue_idx, memory.has_been_filled])
        for module in self.modules():  # some losses keep statistics together with the graph they came from
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.requires_grad:
                    setattr(module, name, buffer.detach())
        # where a batch has no pairs, parameters must get a gradient all the same: DDP waits for each of them
        return loss + sum(parameter.sum() * 0 for parameter in self.parameters())


def check_pml_loss(config):
    """Build a configuration's loss and miner and try them on a few embeddings of two classes.

    Raises:
        ValueError: unknown name or keyword, or a loss that needs more than embeddings and labels.
        ImportError: pytorch-metric-learning is not installed.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        loss = PmlLoss(
            config.loss,
            config.loss_kwargs,
            config.miner,
            config.miner_kwargs,
            num_classes=config.num_classes or 2,
            embedding_dim=config.embedding_dim,
        )
        embeddings = nn.functional.normalize(torch.randn(6, config.embedding_dim), dim=-1).requires_grad_()
        try:
            loss(embeddings, torch.tensor([0, 0, 0, 1, 1, 1])).backward()
        except Exception as error:  # whatever the library does where something is missing
            chosen = config.loss if config.miner is None else f"{config.loss} with {config.miner}"
            raise ValueError(
                f"{chosen} can't be computed from embeddings and labels ({type(error).__name__}: {error})"
            ) from error


__all__ = ["PmlLoss", "check_pml_loss", "find_class"]
