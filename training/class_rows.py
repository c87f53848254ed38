"""Rows of classes that move: original proxies, proxy state, class prompts and their optimiser states."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


@torch.no_grad()
def move_class_rows(model, optimizer, source, seed):
    """Give every class the rows of the one that it goes on, and new classes fresh ones.

    Args:
        model: A `VPTSPForMetricLearning`.
        optimizer: Of its parameters; None where there is none yet. States of a new class's rows are zero.
        source: `(A,)` int64 array, for each of the first A classes the one whose rows it gets, -1 for fresh ones. All
            other classes get fresh rows.
        seed: Of what is fresh: the same on every process.
    """
    taken = torch.full((model.config.num_classes,), -1, dtype=torch.int64)
    taken[: len(source)] = torch.as_tensor(source)
    generator = torch.Generator().manual_seed(seed)
    states = {} if optimizer is None else optimizer.state
    if hasattr(model, "proxies"):
        proxies = model.proxies
        bound = math.sqrt(6 / sum(proxies.original_proxies.shape))  # of Xavier's uniform, as `init_weights` draws

        def drawn(shape):
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        _move_parameter(proxies.original_proxies, states, taken, lambda shape: drawn(shape) / 8)
        if proxies.update != "none":
            _move(proxies.state, taken, lambda shape: F.normalize(drawn(shape), dim=-1))
    store = getattr(model, "class_prompts", None)
    if store is None or not sum(store.lengths):
        return

    def normal(shape):
        return torch.empty(shape).normal_(std=store.std, generator=generator)

    if model.offloaded_class_prompts is None:
        _move_parameter(store.tokens, states, taken, normal)
        return
    store.discard_prefetched()
    with store.writing() as may_write:
        if may_write:
            _move(store.tokens, taken, normal)
            for state in store.states.values():
                _move(state, taken, torch.zeros)


def _move_parameter(parameter, states, taken, fresh):
    _move(parameter, taken, fresh)
    for state in states.get(parameter, {}).values():
        if torch.is_tensor(state) and state.shape == parameter.shape:
            _move(state, taken, torch.zeros)


def _move(table, taken, fresh):
    """Rows of one table, in place. `fresh` makes those of a shape."""
    new = (taken < 0).nonzero().flatten()
    moved = ((taken >= 0) & (taken != torch.arange(len(taken)))).nonzero().flatten()
    rows = table[taken[moved].to(table.device)]  # a copy, before anything is written
    table[moved.to(table.device)] = rows
    if len(new):
        table[new.to(table.device)] = fresh((len(new), *table.shape[1:])).to(table)


__all__ = ["move_class_rows"]
