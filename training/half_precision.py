"""Frozen weights in the precision of the computation, for as long as a mixed-precision run takes."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen_weights_in(dtype, model):
    """Hold a model's frozen matrices in `dtype`; afterwards they are the original ones again, to the last bit.

    Autocast would cast a float32 matrix anew in every forward pass and keep the copy for the backward pass. What is
    not tuned needs no float32 master, so it can be cast once; the products are the same. The originals wait in host
    memory.

    Args:
        dtype: torch.bfloat16 or torch.float16; None changes nothing.
        model: Any module; only frozen float32 weights of linear and convolution layers are touched.
    """
    weights = []
    if dtype is not None:
        layers = (module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
        weights = [layer.weight for layer in layers if not layer.weight.requires_grad]
        weights = [weight for weight in weights if weight.dtype == torch.float32]
    # of what somebody has changed before, the rounded weights aren't the backbone's either
    unchanged = model.unchanged_names() if weights and hasattr(model, "unchanged_names") else set()
    originals = [weight.data.cpu() for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.to(dtype)
        if unchanged:  # checkpoints are saved meanwhile
            model.note_frozen_weights(unchanged)
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data = original.to(weight.device)


__all__ = ["frozen_weights_in"]
