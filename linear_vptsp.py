"""Linear layers of the backbone, by the fastest exact product that PyTorch has for them on this processor.

On CPUs `torch.nn.functional.linear` multiplies float32 matrices with the BLAS library that PyTorch was built with.
That of the usual builds (MKL) leaves AVX-512 unused on processors of other makers, where oneDNN, which is part of the
same builds, is about twice as fast (`benchmarks/step.py` prints both). Same arithmetic, another order of sums.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def _onednn_linear():
    """oneDNN's product of dense matrices, `op(x, weight, bias, "none", [], "")`; None where PyTorch lacks it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_ONEDNN_LINEAR = _onednn_linear()


class _OneDNNLinear(torch.autograd.Function):
    """`x @ weight.T + bias` of float32 tensors on the CPU, with gradients of what needs them."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        weight_is_tuned = ctx.needs_input_grad[1]  # else its input need not be kept
        ctx.save_for_backward(x if weight_is_tuned else None, weight)
        return _ONEDNN_LINEAR(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        rows = gradient.flatten(0, -2)
        to_x = _ONEDNN_LINEAR(gradient, weight.t(), None, "none", [], "") if needs_x else None
        to_weight = rows.t() @ x.flatten(0, -2) if needs_weight else None
        to_bias = rows.sum(0) if needs_bias else None
        return to_x, to_weight, to_bias


def fast_linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)` for a linear layer (or what stands in its place, such as one with a low-rank update).

    Args:
        layer: `nn.Linear` with weight `(out, in)`; any other module is simply called.
        x: `(..., in)`.

    Returns:
        `(..., out)`.
    """
    if (
        _ONEDNN_LINEAR is None
        or type(layer) is not nn.Linear
        or x.device.type != "cpu"
        or not x.dtype == layer.weight.dtype == torch.float32
        or x.numel() == 0
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return layer(x)
    return _OneDNNLinear.apply(x, layer.weight, layer.bias)


__all__ = ["fast_linear"]
