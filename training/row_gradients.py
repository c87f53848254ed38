"""Gradients of rows that are on the device for one batch only, kept and summed by class until the optimiser's step.

Shapes: M classes in a batch, R classes of all batches, P prompts of all layers together, D backbone width.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from .host_table import empty_pinned


class RowGradients:
    """The gradients of all backward passes since they were last taken."""

    def __init__(self):
        self._passes = []  # (classes, gradient) of every backward pass that was not reduced
        self._reduced = None

    def watch(self, classes, rows):
        """Keep the gradients that rows `(M, P, D)` of classes `(M,)`, on the host, will get."""
        rows.requires_grad_()
        rows.register_post_accumulate_grad_hook(functools.partial(self._keep, classes))

    def _keep(self, classes, rows):
        self._passes.append((classes, rows.grad))
        rows.grad = None

    def reduce(self, gather=False, scale=1.0):
        """Sum the gradients for each class, on the host.

        Args:
            gather: Average over all processes, as DDP does. Each must have had as many backward passes over as many
                classes, the same or others. All get the same sums, so their tables stay the same bit for bit.
            scale: Of the loss, to be divided by (mixed precision).

        Returns:
            Classes `(R,)` int64 and gradients `(R, P, D)`; or None where there was no backward pass.
        """
        if self._passes:
            classes, gradients = (_joined(parts) for parts in zip(*self._passes, strict=True))
            self._passes.clear()
            if gather:
                classes, gradients = _gather(classes.to(gradients.device)), _gather(gradients)
                scale = scale * dist.get_world_size()
            classes, gradients = classes.cpu(), _to_host(gradients)
            if scale != 1:
                gradients.div_(scale)
            if self._reduced is not None:
                classes, gradients = map(_joined, zip(self._reduced, (classes, gradients), strict=True))
            self._reduced = _sum_by_class(classes, gradients)
        return self._reduced

    def take(self):
        """What `reduce` returns; it is forgotten here."""
        reduced = self.reduce()
        self.discard()
        return reduced

    def discard(self):
        """Forget the gradients."""
        self._passes.clear()
        self._reduced = None


def _joined(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gather(tensor):
    """Tensors of all processes, one below the other, in order of rank."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _to_host(tensor):
    return empty_pinned(tensor.shape).copy_(tensor) if tensor.device.type == "cuda" else tensor.cpu()


def _sum_by_class(classes, gradients):
    """Different classes and the sum of each one's gradients."""
    different, places = classes.unique(return_inverse=True)
    if len(different) == len(classes):
        return classes, gradients
    return different, gradients.new_zeros(len(different), *gradients.shape[1:]).index_add_(0, places, gradients)


__all__ = ["RowGradients"]
