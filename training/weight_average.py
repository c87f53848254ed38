"""Exponential moving average of a retriever's tuned weights: what is evaluated and shared in their place."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

from .checkpoints import load_tree, save_tree
from .run_errors import CheckpointError


RAW_WEIGHTS_NAME = "raw_weights"


class AveragedWeights(TrainerCallback):
    """Average of the weights after each optimiser step, `average <- decay * average + (1 - decay) * weights`, which
    begins with those after the first (as `torch.optim.swa_utils`, whose rule it is).

    Of what is tuned of the retriever; what only training needs (proxies, class prompts, their head) has none. Every
    process has the same weights after a step, and so the same average.

    Args:
        trainer: Whose steps it follows.
        decay: In [0, 1).
    """

    def __init__(self, trainer, decay):
        self._trainer = trainer
        self._update = get_ema_multi_avg_fn(decay)
        self._averages = None  # before the first step
        self._in_place = False

    def _weights(self):
        named = self._trainer.model.retriever.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._trainer.accelerator.optimizer_step_was_skipped:  # gradients overflowed in half precision
            return
        weights = [parameter.data for parameter in self._weights().values()]
        if self._averages is None:
            self._averages = [weight.clone() for weight in weights]
        else:
            self._update(self._averages, weights, None)

    def begin(self):
        """Forget what an earlier training has averaged."""
        self._averages = None

    @contextmanager
    def in_place(self):
        """The averages in the model while the block runs; the weights, before there are any."""
        if self._averages is None or self._in_place:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self):
        self._in_place = not self._in_place
        weights = self._weights().values()
        averages, self._averages = self._averages, [parameter.data for parameter in weights]
        for parameter, average in zip(weights, averages, strict=True):
            parameter.data = average

    def settle(self):
        """Leave the averages in the model, for good: training is over."""
        if self._averages is not None:
            self._exchange()
            self._in_place, self._averages = False, None

    def adopt(self):
        """Take the model's weights, which have been loaded, for the averages."""
        self._averages = [parameter.detach().clone() for parameter in self._weights().values()]

    def save_raw(self, folder):
        """Write the weights that training goes on with, beside the averages, which a checkpoint has for weights."""
        weights = {name: parameter.data for name, parameter in self._weights().items()}
        save_tree(folder, RAW_WEIGHTS_NAME, None if self._averages is None else weights)

    @torch.no_grad()
    def load_raw(self, folder):
        """Take the averages from the model, into which a checkpoint has been loaded, and put the weights back.

        Raises:
            CheckpointError: the checkpoint has no such weights, or others.
        """
        if not (folder / f"{RAW_WEIGHTS_NAME}.json").is_file():
            raise CheckpointError(f"{folder} holds no {RAW_WEIGHTS_NAME}.json: its run had no ema_decay")
        raw, weights = load_tree(folder, RAW_WEIGHTS_NAME), self._weights()
        if raw is None:
            return
        if raw.keys() != weights.keys():
            raise CheckpointError(f"{folder / RAW_WEIGHTS_NAME}.json holds other weights than the model tunes")
        self.adopt()
        for name, parameter in weights.items():
            parameter.copy_(raw[name])


__all__ = ["RAW_WEIGHTS_NAME", "AveragedWeights"]
