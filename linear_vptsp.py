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


def runs_as_written(module: nn.Module) -> bool:
    """Whether calling a module is its class's `forward` and nothing else.

    False with hooks of any kind (accelerate's offloading, pruning, norms of weights, somebody's probe) and with a
    `forward` of the instance's own (accelerate again): then it has to be called, since what its parameters hold by
    themselves need not be what it computes with. Also false where this release of PyTorch keeps hooks elsewhere.
    """
    state = vars(module)
    return "forward" not in state and not any(state.get(hooks, True) for hooks in _HOOKS)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def fast_linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`, whatever `layer` is; where it is a plain linear layer, by oneDNN if that is at hand.

    Args:
        layer: `nn.Linear` with weight `(out, in)`; any other module, and one that is hooked or whose weight is no
            ordinary parameter (quantised, offloaded, recomputed), is simply called.
        x: `(..., in)`.

    Returns:
        `(..., out)`.
    """
    if (
        _ONEDNN_LINEAR is None
        or type(layer) is not nn.Linear
        or type(layer.weight) is not nn.Parameter
        or type(x) is not torch.Tensor
        or not x.device.type == layer.weight.device.type == "cpu"
        or not x.dtype == layer.weight.dtype == torch.float32
        or x.numel() == 0
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or not runs_as_written(layer)
        or _global_hooks()
    ):
        return layer(x)
    return _OneDNNLinear.apply(x, layer.weight, layer.bias)


def _global_hooks() -> bool:
    """Whether hooks are registered for all modules at once."""
    return any(getattr(nn.modules.module, f"_global{hooks}", True) for hooks in _HOOKS)


__all__ = ["fast_linear", "runs_as_written"]
