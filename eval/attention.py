"""Attention of CLS to the patches of an image, with and without prompts, and the share of it that prompts get.

Shapes: B images, H x W patches, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..backbones_vptsp import prompted_forward
from .pictures import COLOURS, font, new_figure, plain_axes, save_figure, wrap


_SIDE, _GAP = 1.2, 0.08  # inches: an image's side, the space between two
_LEFT, _RIGHT, _HEAD, _FOOT = 0.95, 0.8, 0.55, 2.05  # around the images: labels, colour bar, names, chart


@dataclass(frozen=True)
class ClsAttention:
    """Attention of the CLS token, averaged over heads.

    Attributes:
        to_patches: `(B, L, H, W)` float32: attention to each patch in each layer.
        to_prompts: `(B, L)` float32: attention to all prompts of a layer together; 0 where there are none.
        num_prompts: L counts of prompts.
        num_tokens: Tokens besides them: CLS and patches.
    """

    to_patches: torch.Tensor
    to_prompts: torch.Tensor
    num_prompts: list[int]
    num_tokens: int


class _Recorder:
    """A family of backbones that notes where CLS looks, and otherwise does what the family does."""

    def __init__(self, family):
        self.family = family
        self.weights = []

    def __getattr__(self, name):
        return getattr(self.family, name)

    def attend(self, layer, query, key, value):
        cls_token = query[:, :, :1].float()
        logits = cls_token @ key.float().transpose(-2, -1) * query.shape[-1] ** -0.5
        self.weights.append(logits.softmax(-1).mean(1)[:, 0])
        return self.family.attend(layer, query, key, value)


@torch.no_grad()
def cls_attention(retriever, pixel_values, with_prompts=True):
    """Where CLS looks, in every layer.

    Without prompts it is the backbone with the biases that it has now: the tuned ones, after BitFit.

    Args:
        retriever: A `VPTSPModel`, in evaluation mode.
        pixel_values: `(B, 3, height, width)` float, normalised as the backbone expects.
        with_prompts: Whether the retriever's prompts take part.

    Returns:
        [`ClsAttention`], on the CPU. In each layer, the attention to patches, to prompts and to CLS itself (and to
        other tokens in front of the patches) sums to 1.

    Raises:
        ValueError: as for the retriever, or the backbone has no CLS token.
    """
    if not retriever.family.num_class_tokens:
        raise ValueError(f"{retriever.config.backbone_config.model_type} has no CLS token whose attention to show")
    recorder = _Recorder(retriever.family)
    tokens = retriever.embed_patches(pixel_values)
    prompts = retriever.prompts() if with_prompts else ()
    prompted_forward(recorder, retriever.backbone, tokens, prompts)
    if (layers := retriever.config.backbone_config.num_hidden_layers) != len(recorder.weights):
        raise ValueError(
            f"attention was seen in {len(recorder.weights)} of {layers} layers: the others have hooks, or a forward "
            "of their own, and are called as a whole. Remove these first"
        )
    num_tokens, num_prefix = tokens.hidden.shape[1], retriever.family.num_prefix_tokens
    rows = _patch_rows(num_tokens - num_prefix, *pixel_values.shape[2:])
    num_prompts = [weights.shape[1] - num_tokens for weights in recorder.weights]
    to_patches, to_prompts = [], []
    for weights, prompts in zip(recorder.weights, num_prompts, strict=True):  # keys: prompts, CLS, patches
        to_patches.append(weights[:, prompts + num_prefix :].unflatten(1, (rows, -1)).cpu())
        to_prompts.append(weights[:, :prompts].sum(1).cpu())
    return ClsAttention(torch.stack(to_patches, 1), torch.stack(to_prompts, 1), num_prompts, num_tokens)


def _patch_rows(num_patches, height, width):
    """Rows of patches of an image, from its shape."""
    return round((num_patches * height / width) ** 0.5)


def save_attention(path, images, names, without, tuned, title=None, dpi=150):
    """Draw where CLS looks in the last layer, without and with prompts, and how much prompts get in each layer.

    The colour is the attention that a patch gets, in multiples of what it would get if CLS looked at all patches
    alike; it is the same for all images. Below, the mean over the images drawn, and what prompts would get if CLS
    looked at all tokens alike.

    Args:
        path: File to write; its suffix says how.
        images: B images as the model sees them, PIL or `(S, S, 3)` uint8 arrays.
        names: Their class names.
        without: [`ClsAttention`] of them without prompts.
        tuned: [`ClsAttention`] with prompts.
        title: Line above.
        dpi: Pixels per inch.

    Returns:
        The path, as `pathlib.Path`.

    Raises:
        ValueError: there is no image, or images, names and attention differ in number.
    """
    lengths = [len(images), len(names), len(without.to_patches), len(tuned.to_patches)]
    if len(set(lengths)) > 1 or not images:
        raise ValueError(f"images, names and both attentions must be as many, at least one, got {lengths}")
    names = [wrap(name, _SIDE, new_figure(1, 1, dpi), font(7.5)) for name in names]
    head = _HEAD + 0.13 * (max(map(len, names)) - 1)
    width, height = _LEFT + len(images) * (_SIDE + _GAP) + _RIGHT, head + 3 * (_SIDE + _GAP) + _FOOT
    figure = new_figure(width, height, dpi)
    figure.text(0.1 / width, 1 - 0.1 / height, title, fontproperties=font(9, "bold"), va="top")

    def add_axes(left, top, wide, tall, **options):
        return figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height), **options)

    shown = _draw_maps(add_axes, head, images, names, without, tuned)
    bar = add_axes(width - _RIGHT + 0.13, head + _SIDE + _GAP, 0.1, 2 * _SIDE + _GAP)
    figure.colorbar(shown, cax=bar, extend="both")
    bar.tick_params(labelsize=7)
    bar.set_ylabel("× uniform attention", fontproperties=font(7.5))
    _draw_shares(add_axes(_LEFT, height - _FOOT + 0.5, width - _LEFT - _RIGHT, _FOOT - 0.95), tuned)
    return save_figure(figure, path)


def _draw_maps(add_axes, head, images, names, without, tuned):
    """Three rows of squares: the images, attention without and with prompts."""
    from matplotlib.colors import Normalize

    last = [part.to_patches[:, -1] for part in (without, tuned)]
    maps = [(weights / weights.mean((1, 2), keepdim=True)).numpy() for weights in last]
    scale = Normalize(*np.quantile(np.stack(maps), (0.005, 0.995)))
    for column, image in enumerate(images):
        for row, label in enumerate(("image", "without\nprompts", "with\nprompts")):
            place = _LEFT + column * (_SIDE + _GAP), head + row * (_SIDE + _GAP)
            axes = add_axes(*place, _SIDE, _SIDE, xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.imshow(np.asarray(image))
                axes.set_title("\n".join(names[column]), fontproperties=font(7.5), pad=3, parse_math=False)
            else:
                shown = axes.imshow(maps[row - 1][column], cmap="cividis", norm=scale, interpolation="nearest")
            if column == 0:
                axes.set_ylabel(label, fontproperties=font(8), rotation=0, ha="right", va="center")
    return shown


def _draw_shares(axes, tuned):
    """Bars of the attention to prompts, layer by layer."""
    layers = np.arange(1, len(tuned.num_prompts) + 1)
    plain_axes(axes, "Share of CLS attention that goes to prompts", "layer", "%")
    axes.bar(layers, 100 * tuned.to_prompts.mean(0).numpy(), width=0.6, color=COLOURS[0], label="measured")
    uniform = [100 * count / (count + tuned.num_tokens) for count in tuned.num_prompts]
    style = {"marker": "_", "s": 150, "color": COLOURS[3], "linewidths": 1.5, "zorder": 3}
    axes.scatter(layers, uniform, label="if CLS looked everywhere alike", **style)
    axes.set_xticks(layers)
    axes.set_ylim(bottom=0)
    axes.legend(prop=font(7), frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderaxespad=0)


__all__ = ["ClsAttention", "cls_attention", "save_attention"]
