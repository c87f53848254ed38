"""What the classes that are not in a batch add to a proxy loss, without any table of (images, classes).

An image is compared with the proxies of all C classes, but only the few classes of the batch have anything to do with
its label or with the semantic vectors. All others act as negatives of every image, and their terms can be taken a
block of classes at a time: proxies, similarities and gradients of a block stay in a processor's cache, so that large
memory is only read, and written, as often as by a plain product. Where a class's term is its own (Proxy-Anchor), one
pass gives terms and gradients; where a term is a sum over classes (Proxy-NCA), its gradient takes a second pass.

Shapes: B images, E embedding width, M classes of the batch, C classes, c classes of a block.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


# Classes at a time: as many as an accelerator, or a compiled graph, wants at least; on a CPU, as its cache holds.
BLOCK = 8192
CACHE_BYTES = 2**20


def others_per_class(embeddings, original, state, bias_ratio, classes, alpha, delta):
    """Sum over the other classes of `log(1 + sum_b exp(alpha * (s[b, c] + delta)))`: Proxy-Anchor's negative term.

    Its gradient is computed in the forward pass, and held (as large as `original`) for the backward pass, which uses
    it up: a second one through the same graph is an error of autograd.

    Args:
        embeddings: `(B, E)` float, L2-normalised.
        original: `(C, E)`, the original proxies O.
        state: `(C, E)`, the proxy state S, which gets no gradient; None: O alone makes the proxies.
        bias_ratio: a, of `Q = normalise((1 - a) * S + a * O)`.
        classes: `(M,)` int64, the classes of the batch, which are left out.
        alpha: Scale.
        delta: Margin.

    Returns:
        The sum, a scalar; and `original` at the classes of the batch, `(M, E)`. (Were these rows taken elsewhere,
        their gradient would be another `(C, E)`, of zeros but for M rows, to be added to this one.)
    """
    with_gradients = torch.is_grad_enabled() and (embeddings.requires_grad or original.requires_grad)
    return _PerClass.apply(embeddings, original, state, bias_ratio, classes, alpha, delta, with_gradients)


def others_per_image(embeddings, original, state, bias_ratio, classes, alpha, delta):
    """`log(sum over the other classes of exp(alpha * (s[b, c] + delta)))` of each image: Proxy-NCA's negative term.

    Args: as for [`others_per_class`]; M < C.

    Returns:
        The logs, `(B,)`; and `original` at the classes of the batch, `(M, E)`.
    """
    return _PerImage.apply(embeddings, original, state, bias_ratio, classes, alpha, delta)


class _PerClass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, original, state, bias_ratio, classes, alpha, delta, with_gradients):
        result = embeddings.new_zeros(())
        gradients = _Gradients(embeddings, original, state, bias_ratio) if with_gradients else None
        for block in _blocks(embeddings, original, state, bias_ratio, classes):
            exponents = block.exponents(alpha, delta)
            largest = exponents.amax(dim=0).clamp_(min=0)
            scaled = exponents.sub_(largest).exp_()
            total = scaled.sum(dim=0).add_(torch.exp(-largest))  # 1 + sum exp, in units of exp(largest)
            if with_gradients:
                gradients.add(block, scaled.mul_(alpha / total))
            result += (total.log_() + largest).sum()
        if with_gradients:
            ctx.save_for_backward(gradients.to_embeddings, gradients.to_original, classes)
        return result, original.index_select(0, classes)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, to_rows):
        to_embeddings, to_original, classes = ctx.saved_tensors
        to_embeddings.mul_(gradient)  # in place, since new memory is slow
        to_original.mul_(gradient).index_add_(0, classes, to_rows)
        return to_embeddings, to_original, *[None] * 6


class _PerImage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, original, state, bias_ratio, classes, alpha, delta):
        ctx.bias_ratio, ctx.alpha, ctx.delta = bias_ratio, alpha, delta
        log_sums = embeddings.new_full((len(embeddings),), -torch.inf)
        for block in _blocks(embeddings, original, state, bias_ratio, classes):
            log_sums = torch.logaddexp(log_sums, block.exponents(alpha, delta).logsumexp(dim=1))
        ctx.save_for_backward(embeddings, original, state, classes, log_sums)
        return log_sums, original.index_select(0, classes)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, to_rows):
        embeddings, original, state, classes, log_sums = ctx.saved_tensors
        gradients = _Gradients(embeddings, original, state, ctx.bias_ratio)
        weights = (ctx.alpha * gradient)[:, None]
        for block in _blocks(embeddings, original, state, ctx.bias_ratio, classes):
            shares = block.exponents(ctx.alpha, ctx.delta).sub_(log_sums[:, None]).exp_()
            gradients.add(block, shares.mul_(weights))
        return gradients.to_embeddings, gradients.to_original.index_add_(0, classes, to_rows), *[None] * 5


class _Block:
    """Some consecutive classes.

    Attributes:
        rows: Which, a slice.
        raw: `(c, E)`, their proxies before they are normalised; [`_Gradients.add`] writes over it.
        norms: `(c,)`, of `raw`.
        similarity: `(B, c)`.
        mask: `(c,)`, -inf for classes of the batch, else 0.
    """

    def __init__(self, rows, raw, similarity, mask):
        self.rows, self.raw, self.mask = rows, raw, mask
        self.norms = torch.linalg.vector_norm(raw, dim=1).clamp_(min=1e-12)
        self.similarity = similarity.div_(self.norms)

    def exponents(self, alpha, delta):
        """`alpha * (s + delta)`, `(B, c)`; -inf for classes of the batch, which so count for nothing."""
        return (self.similarity + delta).mul_(alpha).add_(self.mask)


def _blocks(embeddings, original, state, bias_ratio, classes):
    """All classes as [`_Block`]s, each of which is gone when the next one is asked for."""
    dtype, (num_classes, width) = embeddings.dtype, original.shape
    size = BLOCK
    if embeddings.device.type == "cpu" and not torch.compiler.is_compiling():  # a graph has nodes of every block
        size = min(BLOCK, max(CACHE_BYTES // (width * embeddings.element_size()), 1))
    mask = embeddings.new_zeros(num_classes).index_fill_(0, classes, -torch.inf)
    buffer = embeddings.new_empty(min(size, num_classes), width)  # new memory is slow: each page is a fault
    for start in range(0, num_classes, size):
        rows = slice(start, min(start + size, num_classes))
        raw = buffer[: rows.stop - start]
        if state is None:
            raw.copy_(original[rows])
        else:
            torch.lerp(state[rows].to(dtype), original[rows].to(dtype), bias_ratio, out=raw)
        products = torch.mm(embeddings, raw.T, out=embeddings.new_empty(len(embeddings), len(raw)))  # no autocast
        yield _Block(rows, raw, products, mask[rows])


class _Gradients:
    """What the similarities' gradients are to embeddings `(B, E)` and original proxies `(C, E)`, block by block."""

    def __init__(self, embeddings, original, state, bias_ratio):
        self._embeddings, self._ratio = embeddings, 1.0 if state is None else bias_ratio
        self.to_embeddings, self.to_original = torch.zeros_like(embeddings), torch.empty_like(original)

    def add(self, block, to_similarity):
        """Take the gradients `(B, c)` of a block's similarities; the block's `raw` is used up, and so are they.

        A proxy moves only at right angles to itself: its own part of the gradient is the sum over images of gradient
        times similarity, for which no rows of width E are needed.
        """
        to_products = to_similarity.div_(block.norms)
        self.to_embeddings.addmm_(to_products, block.raw)
        along = (to_products * block.similarity).sum(dim=0).div_(block.norms)
        gradient = block.raw.mul_(along.mul_(-self._ratio)[:, None])
        self.to_original[block.rows] = gradient.addmm_(to_products.T, self._embeddings, alpha=self._ratio)


__all__ = ["others_per_class", "others_per_image"]
