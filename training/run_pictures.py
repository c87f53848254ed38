"""Every picture of a training run."""

from __future__ import annotations

from pathlib import Path

import torch

from ..data_scripts.preprocessing import normalisation_for
from ..eval.attention import cls_attention, save_attention
from ..eval.curves import save_training_curves
from ..eval.evaluated_images import (
    draw_before_after,
    draw_confusion,
    draw_failures,
    draw_map,
    draw_neighbours,
)
from ..eval.pictures import choose_queries
from ..eval.proxy_curves import save_proxy_movement


def draw_attention(path, retriever, evaluated, processor=None, count=6, seed=0):
    """Where CLS looks, without and with prompts.

    Args:
        path: File to write.
        retriever: A `VPTSPModel`, in evaluation mode.
        evaluated: [`EvaluatedImages`].
        processor: The image processor, for what it does to pixels; None for the backbone's.
        count: Images at most.
        seed: Of their choice.
    """
    chosen = choose_queries(evaluated.query_labels, min(count, len(evaluated.query_labels)), seed)
    pixels = torch.stack([evaluated.queries.transform(image, None) for image in evaluated.query_images(chosen)])
    normalise = normalisation_for(processor, retriever.config)
    device = next(retriever.parameters()).device
    pixel_values = normalise(pixels).to(device)
    without = cls_attention(retriever, pixel_values, with_prompts=False)
    tuned = cls_attention(retriever, pixel_values)
    title = "Attention of CLS to the patches in the last layer, mean over heads"
    return save_attention(
        path, list(pixels.permute(0, 2, 3, 1).numpy()), evaluated.query_names(chosen), without, tuned, title
    )


def draw_curves(path, log_history):
    """Loss, scores and learning rate."""
    return save_training_curves(path, log_history)


def draw_proxies(path, records):
    """How far the proxies moved."""
    return save_proxy_movement(path, records, title="Movement of proxies: median and 10–90 % of the classes")


def draw_run(folder, evaluated, retriever, processor, log_history, proxy_records=None, count=8, seed=0, frozen=None):
    """Every picture of a training run, each in a PNG file of its own.

    A picture that can't be drawn (no failure to show, too few images for a map) doesn't keep the others from it.

    Args:
        folder: Where to write.
        evaluated: [`EvaluatedImages`] of the last evaluation.
        retriever: The tuned `VPTSPModel`, in evaluation mode.
        processor: Its image processor.
        log_history: `trainer.state.log_history`.
        proxy_records: Of the callback `ProxyMovement`; None: no picture of proxies.
        count: Queries in the grids.
        seed: Of choices.
        frozen: [`EvaluatedImages`] of the same data by the backbone alone; None: no picture of before and after.

    Returns:
        written: List of paths.
        problems: Dict of name to what kept the picture from being drawn.
    """
    pictures = {
        "neighbours": lambda path: draw_neighbours(path, evaluated, count, seed),
        "failures": lambda path: draw_failures(path, evaluated, count),
        "confusion": lambda path: draw_confusion(path, evaluated),
        "map": lambda path: draw_map(path, evaluated, seed=seed),
        "attention": lambda path: draw_attention(path, retriever, evaluated, processor, seed=seed),
        "curves": lambda path: draw_curves(path, log_history),
    }
    if frozen is not None:
        pictures["before_after"] = lambda path: draw_before_after(
            path, frozen, evaluated, max(count // 2, 1), seed, f"What tuning brought, on {evaluated.subject}"
        )
    if proxy_records is not None:
        pictures["proxies"] = lambda path: draw_proxies(path, proxy_records)
    written, problems = [], {}
    for name, draw in pictures.items():
        try:
            written.append(draw(Path(folder) / f"{name}.png"))
        except Exception as error:  # a picture must not end a run
            problems[name] = f"{type(error).__name__}: {error}"
    return written, problems


__all__ = ["draw_attention", "draw_curves", "draw_proxies", "draw_run"]
