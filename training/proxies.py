"""Semantic proxies: how a batch's semantic vectors update the proxy state, and the proxies themselves.

Shapes: B images, M classes in a batch, K images of the largest of them, C classes, E embedding width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init


class ClassGroups(NamedTuple):
    """Which images of a batch belong to which class.

    Attributes:
        classes: `(M,)` int64, the classes present.
        rows: `(B,)` int64, the position in `classes` of each image's class.
        steps: `(B,)` int64, how many images of its class come before each image.
        images_per_class: K, of the largest class.
        counts: `(M,)` int64, images of each class; None where all have K.
    """

    classes: torch.Tensor
    rows: torch.Tensor
    steps: torch.Tensor
    images_per_class: int
    counts: torch.Tensor | None


def group_by_class(labels, images_per_class=None) -> ClassGroups:
    """Group a batch by class.

    Args:
        labels: `(B,)` int64.
        images_per_class: K, where the batch is known to be class-major with K images of every class. Spares an
            accelerator a synchronisation. None counts them.

    Raises:
        ValueError: B is not divisible by K, or (where `labels` are on the CPU) the batch is not class-major.
    """
    if images_per_class is None:
        classes, rows, counts = labels.unique(return_inverse=True, return_counts=True)
        same_before = (rows[:, None] == rows[None, :]).tril(-1)
        return ClassGroups(classes, rows, same_before.sum(1), int(counts.max()), counts)
    if len(labels) % images_per_class:
        raise ValueError(f"batch size {len(labels)} is not divisible by images_per_class {images_per_class}")
    table = labels.view(-1, images_per_class)
    looks = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and not ((table == table[:, :1]).all() and table[:, 0].unique().numel() == len(table)):
        raise ValueError(f"labels must be class-major with {images_per_class} images of each class, got {labels}")
    positions = torch.arange(len(labels), device=labels.device)
    rows = positions // images_per_class
    return ClassGroups(table[:, 0], rows, positions % images_per_class, images_per_class, None)


class GRUUpdate(nn.Module):
    """Gated update of a proxy by one semantic vector (paper equations 6 to 9; METHOD: `gru_relu` and `gru`).

        z = sigmoid(W_z p + U_z S + b_z)
        r = sigmoid(W_r p + U_r S + b_r)
        n = act(W_h p + r * (U_h S) + b_h)
        S <- (1 - z) * S + z * n

    `input_weight` holds W_z, W_r, W_h one below the other, `(3E, E)`; `state_weight` the U; `bias` the b, `(3E,)`.
    """

    def __init__(self, width, activation):
        super().__init__()
        self.activation = {"gru_relu": torch.relu, "gru": torch.tanh}[activation]
        self.input_weight = nn.Parameter(torch.empty(3 * width, width))
        self.state_weight = nn.Parameter(torch.empty(3 * width, width))
        self.bias = nn.Parameter(torch.empty(3 * width))

    def init_weights(self):
        for weight in (self.input_weight, self.state_weight):
            gates = weight.detach().chunk(3)
            init.copy_(weight, torch.cat([nn.init.xavier_uniform_(torch.empty_like(gate)) for gate in gates]))
        init.zeros_(self.bias)

    def forward(self, vectors, state):
        """`(M, E)` semantic vectors and `(M, E)` state -> `(M, E)` new state, not yet normalised."""
        z_in, r_in, n_in = F.linear(vectors, self.input_weight, self.bias).chunk(3, dim=-1)
        z_state, r_state, n_state = F.linear(state, self.state_weight).chunk(3, dim=-1)
        z = torch.sigmoid(z_in + z_state)
        r = torch.sigmoid(r_in + r_state)
        candidate = self.activation(n_in + r * n_state)
        return torch.lerp(state, candidate, z)


class SemanticProxies(nn.Module):
    """Original proxies O, the proxy state S and its update, and the proxies Q that the loss sees (paper section 3.2).

    `original_proxies` (C, E) is a parameter; `state` (C, E) a buffer that only `commit` changes. Losses compare with
    the first `num_active` of them, all unless somebody says less.
    """

    def __init__(self, config):
        super().__init__()
        self.update = config.proxy_update
        self.normalization = config.proxy_normalization
        self.keep = config.proxy_keep
        self.bias_ratio = config.proxy_bias_ratio
        shape = (config.num_classes, config.embedding_dim)
        self.num_active = config.num_classes  # the first of them; more may be kept ready for clusters to come
        self.original_proxies = nn.Parameter(torch.empty(shape))
        if self.update != "none":
            self.register_buffer("state", torch.empty(shape))
            self._num_batches, self._is_due = 0, False
            self.dropout = nn.Dropout(config.rnn_dropout)
        if self.update in ("gru", "gru_relu"):
            self.gru = GRUUpdate(config.embedding_dim, self.update)

    def init_weights(self):
        uniform = nn.init.xavier_uniform_(torch.empty_like(self.original_proxies))
        init.copy_(self.original_proxies, uniform / 8)
        if self.update != "none":
            uniform = nn.init.xavier_uniform_(torch.empty_like(self.state))
            init.copy_(self.state, F.normalize(uniform, dim=-1))

    def new_rows(self, vectors, groups):
        """Rows of S after a batch, with the graph of the batch's semantic vectors; S itself is not changed.

        Args:
            vectors: `(B, E)` semantic vectors, L2-normalised.
            groups: The batch's classes.

        Returns:
            `(M, E)`, L2-normalised.
        """
        state = self.state.index_select(0, groups.classes).detach()
        shape = (len(state), groups.images_per_class)
        table = vectors.new_zeros(*shape, vectors.shape[-1]).index_put((groups.rows, groups.steps), vectors)
        if self.update == "mean":  # one step a batch, after which every normalisation falls
            counts = groups.images_per_class if groups.counts is None else groups.counts[:, None]
            mean = self.keep * state + (1 - self.keep) * (table.sum(dim=1) / counts)
            return F.normalize(self.dropout(mean), dim=-1)
        for step in range(groups.images_per_class):
            new_state = self.gru(table[:, step], state)
            if self.normalization == "per_step":
                new_state = F.normalize(self.dropout(new_state), dim=-1)
            if groups.counts is not None:
                new_state = torch.where((step < groups.counts)[:, None], new_state, state)
            state = new_state
        if self.normalization == "per_batch":
            state = F.normalize(self.dropout(state), dim=-1)
        return state

    def expect_commit(self, loss):
        """Remember a training batch: once it went backward, its new rows must be committed before the next.

        A loop that never commits (that of `transformers.Trainer`) would train against a state that stays as it was
        drawn. Batches without gradients, as those of an evaluation, are nothing to commit.

        Args:
            loss: Scalar, of the batch.

        Raises:
            RuntimeError: the rows of an earlier batch are due.
        """
        if not loss.requires_grad:
            return
        if self._is_due:
            raise RuntimeError(
                "the proxy state's new rows of the batch before were never committed, so the proxies would not follow "
                "the images: train with VPTSPTrainer (transformers.Trainer does not commit), or call "
                "model.commit_proxies(output) after every backward pass"
            )
        self._num_batches += 1
        loss.register_hook(functools.partial(self._note_gradient, self._num_batches))

    def _note_gradient(self, batch, gradient):
        self._is_due |= batch == self._num_batches

    def proxies(self, classes=None, rows=None, proxy_range="all"):
        """Proxies Q that the loss compares with, L2-normalised.

        Args:
            classes: `(M,)` int64, classes of the batch.
            rows: `(M, E)`, their new rows of S; None without semantic proxies.
            proxy_range: `all` classes or those of the `batch`.

        Returns:
            `(C, E)` or `(M, E)`.
        """
        if proxy_range == "batch":
            return self.combine(self.original_proxies.index_select(0, classes), rows)
        original, state = self.active()
        return self.combine(original, None if rows is None else state.index_copy(0, classes, rows))

    def combine(self, original, state):
        """Proxies Q of rows of O and of S (None without semantic proxies), L2-normalised; all of one shape."""
        return F.normalize(original if state is None else torch.lerp(state, original, self.bias_ratio), dim=-1)

    def active(self):
        """Original proxies and state (None without semantic proxies) of the classes that take part, `(A, E)` each."""
        state = self.state if self.update != "none" else None
        if self.num_active == len(self.original_proxies):
            return self.original_proxies, state
        return self.original_proxies[: self.num_active], None if state is None else state[: self.num_active]

    @torch.no_grad()
    def commit(self, classes, rows):
        """Write a batch's rows `(M, E)` into S. Rows that are not finite are left out, so that S stays usable."""
        self._num_batches, self._is_due = self._num_batches + 1, False
        old = self.state.index_select(0, classes)
        finite = rows.isfinite().all(dim=-1, keepdim=True)
        self.state.index_copy_(0, classes, torch.where(finite, rows.to(old.dtype), old))


__all__ = ["ClassGroups", "GRUUpdate", "SemanticProxies", "group_by_class"]
