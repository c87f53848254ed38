"""Class prompts, the prompt tokens that each class has of its own, in two stores with one interface.

`ClassPrompts` (dense) is a parameter on the device. `OffloadedClassPrompts` is a table in host memory, or in
memory-mapped files, of which the device only ever sees the rows of a batch's classes.

Shapes: C classes, M classes in a batch, P prompts of all layers together, D backbone width.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import initialization as init

from .host_table import HostTable
from .row_gradients import RowGradients
from .row_optimizers import check_optimizer, update_rows


CLASS_PROMPTS_NAME = "class_prompts.safetensors"
CLASS_PROMPT_STATES_NAME = "class_prompts_optimizer.safetensors"


def build_class_prompts(config):
    """The store that `config.class_prompt_store` asks for."""
    store = {"dense": ClassPrompts, "offloaded": OffloadedClassPrompts}[config.resolved_class_prompt_store]
    return store(
        config.num_classes, config.class_prompt_lengths, config.num_class_prompts, config.backbone_config.hidden_size
    )


class ClassPrompts(nn.Module):
    """Prompt tokens that each class has of its own, for the semantic pass (paper section 3.2).

    All lie in one parameter `tokens` of shape `(C, sum(lengths), D)`; drawn like the shared prompts.
    """

    def __init__(self, num_classes, lengths, num_prompts, width):
        super().__init__()
        self.lengths = tuple(lengths)
        self.std = math.sqrt(2.0 / (num_prompts + width))
        shape = (num_classes, sum(self.lengths), width)
        self.tokens = nn.Parameter(torch.empty(shape)) if sum(self.lengths) else None

    def init_weights(self):
        if self.tokens is not None:
            init.normal_(self.tokens, std=self.std)

    def forward(self, classes):
        """Tokens of each layer for the given classes `(M,)`: `(M, P_i, D)` each."""
        return () if self.tokens is None else self.tokens.index_select(0, classes).split(self.lengths, dim=1)


class OffloadedClassPrompts(HostTable):
    """[`ClassPrompts`] in host memory, for tables that would not fit on the device: released runs, SOP and larger.

    `forward` brings the rows of a batch's classes to the device. Their gradients are kept until `step`, which updates
    these rows and their optimiser states in place, in host memory, and no others: a class that is not in the batch
    does not move, and neither do its states (see `training/row_optimizers.py`). Table and states are float32 whatever
    the model is, and saved in files of their own.

        output.loss.backward()
        optimizer.step()
        model.class_prompts.step(optimizer)

    A step costs the same whatever C is; memory is `4 * C * P * D * (1 + states)` bytes of the host, with one state for
    SGD with momentum and two for AdamW, and none of the device.
    """

    def __init__(self, num_classes, lengths, num_prompts, width):
        super().__init__((num_classes, sum(lengths), width), std=math.sqrt(2.0 / (num_prompts + width)))
        self.lengths = tuple(lengths)
        self._gradients = RowGradients()

    def forward(self, classes):
        """Tokens of each layer for the given classes `(M,)`, no class twice: `(M, P_i, D)` each."""
        if not sum(self.lengths):
            return ()
        host_classes, rows = self.take(classes)
        if torch.is_grad_enabled():
            self._gradients.watch(host_classes, rows)
        return rows.split(self.lengths, dim=1)

    def reduce_gradients(self, gather=False, scale=1.0):
        """Sum the gradients since the last step for each class, on the host: see [`RowGradients.reduce`].

        `step` does it where it was not done before; clipping and several processes need it earlier.
        """
        return self._gradients.reduce(gather, scale)

    def discard_gradients(self):
        """Forget the gradients since the last step."""
        self._gradients.discard()

    @torch.no_grad()
    def step(self, optimizer):
        """Update the rows that got gradients since the last step; call it after `optimizer.step()`.

        Rows whose gradient is not finite are left as they are.

        Args:
            optimizer: A `torch.optim.SGD` or `AdamW`; its kind, and the hyperparameters of its first group (the
                learning rate as it is now), are those of the rows.

        Raises:
            ValueError: another optimiser, or not the one that the states are of.
        """
        check_optimizer(optimizer)
        reduced = self._gradients.take()
        if reduced is not None:
            with self.writing() as may_write:
                if may_write:
                    update_rows(optimizer, self, *reduced)
            self.note_update(reduced[0])


__all__ = [
    "CLASS_PROMPTS_NAME",
    "CLASS_PROMPT_STATES_NAME",
    "ClassPrompts",
    "OffloadedClassPrompts",
    "build_class_prompts",
]
