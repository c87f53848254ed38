"""What the classes that are not in a batch add to a proxy loss, without any table of (images, classes).

An image is compared with the proxies of all C classes, but only the few classes of the batch have anything to do with
its label or with the semantic vectors. All others act as negatives of every image, and their terms can be taken a
block of classes at a time, in the forward pass and again in the backward pass.

Shapes: B images, E embedding width, M classes of the batch, C classes.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


# Classes at a time: large enough for an accelerator, small enough for a processor's cache.
BLOCK = 8192


def others_per_class(embeddings, original, state, bias_ratio, classes, alpha, delta):
    """Sum over the other classes of `log(1 + sum_b exp(alpha * (s[b, c] + delta)))`: Proxy-Anchor's negative term.

    Args:
        embeddings: `(B, E)` float, L2-normalised.
        original: `(C, E)`, the original proxies O.
        state: `(C, E)`, the proxy state S, which gets no gradient; None: O alone makes the proxies.
        bias_ratio: a, of `Q = normalise((1 - a) * S + a * O)`.
        classes: `(M,)` int64, the classes of the batch, which are left out.
        alpha: Scale.
        delta: Margin.

    Returns:
        Scalar.
    """
    return _OtherClasses.apply(embeddings, original, state, bias_ratio, classes, alpha, delta, True)


def others_per_image(embeddings, original, state, bias_ratio, classes, alpha, delta):
    """`log(sum over the other classes of exp(alpha * (s[b, c] + delta)))` of each image: Proxy-NCA's negative term.

    Args: as for [`others_per_class`]; M < C.

    Returns:
        `(B,)`.
    """
    return _OtherClasses.apply(embeddings, original, state, bias_ratio, classes, alpha, delta, False)


class _OtherClasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, original, state, bias_ratio, classes, alpha, delta, per_class):
        ctx.bias_ratio, ctx.alpha, ctx.delta, ctx.per_class = bias_ratio, alpha, delta, per_class
        result = embeddings.new_zeros(()) if per_class else embeddings.new_full((len(embeddings),), -torch.inf)
        for block in _blocks(embeddings, original, state, classes, ctx):
            if per_class:
                _, total, largest = _sum_exp_over_images(block.exponents)
                result += (total.log_() + largest).sum()
            else:
                result = torch.logaddexp(result, block.exponents.logsumexp(dim=1))
        ctx.save_for_backward(embeddings, original, state, classes, None if per_class else result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        embeddings, original, state, classes, log_sums = ctx.saved_tensors
        to_embeddings, to_original = torch.zeros_like(embeddings), torch.empty_like(original)
        for block in _blocks(embeddings, original, state, classes, ctx):
            if ctx.per_class:
                shares, total, _ = _sum_exp_over_images(block.exponents)
                shares.mul_(ctx.alpha * gradient / total)
            else:
                shares = block.exponents.sub_(log_sums[:, None]).exp_().mul_(ctx.alpha * gradient[:, None])
            to_embeddings.addmm_(shares, block.proxies)
            to_proxies = shares.T @ embeddings
            # through the normalisation: only what is at right angles to the proxy moves it
            along = (to_proxies * block.proxies).sum(dim=1, keepdim=True)
            to_proxies.addcmul_(block.proxies, along, value=-1).div_(block.norms)
            to_original[block.rows] = to_proxies if state is None else to_proxies.mul_(ctx.bias_ratio)
        return to_embeddings, to_original, *[None] * 6


class _Block:
    """Some consecutive classes: `rows` (a slice), `proxies` (c, E), their `norms` (c, 1), `exponents` (B, c)."""

    def __init__(self, rows, embeddings, original, state, mask, ctx):
        self.rows = rows
        raw = original[rows] if state is None else torch.lerp(state[rows], original[rows], ctx.bias_ratio)
        raw = raw.to(embeddings.dtype)
        self.norms = torch.linalg.vector_norm(raw, dim=1, keepdim=True).clamp_(min=1e-12)
        self.proxies = raw / self.norms
        # -inf for classes of the batch, which so count for nothing
        self.exponents = (embeddings @ self.proxies.T).add_(ctx.delta).mul_(ctx.alpha).add_(mask[rows])


def _blocks(embeddings, original, state, classes, ctx):
    mask = embeddings.new_zeros(len(original)).index_fill_(0, classes, -torch.inf)
    for start in range(0, len(original), BLOCK):
        yield _Block(slice(start, start + BLOCK), embeddings, original, state, mask, ctx)


def _sum_exp_over_images(exponents):
    """`exp(x - m)` in place of x `(B, c)`, `1 + sum exp(x)` of each class in units of `exp(m)`, and m, each `(c,)`."""
    largest = exponents.amax(dim=0).clamp_(min=0)
    scaled = exponents.sub_(largest).exp_()
    return scaled, scaled.sum(dim=0).add_(torch.exp(-largest)), largest


__all__ = ["others_per_class", "others_per_image"]
