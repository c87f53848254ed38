"""Training curves: loss, scores and learning rate, from the Trainer's log."""

from __future__ import annotations

import math

from .metric_definitions import definition_of
from .pictures import COLOURS, GREY, font, new_figure, plain_axes, save_figure


SHOWN_SCORES = {name: definition_of(name).title for name in ("recall_at_1", "map_at_r")}
_DASHES = (0, (4, 3))


def series_of(log_history, name):
    """Epochs and values of one quantity in a Trainer's log.

    Args:
        log_history: `trainer.state.log_history`, a list of dicts.
        name: Such as `loss` or `eval_recall_at_1`.

    Returns:
        Two lists of equal length. Of entries of the same step, the last counts.

    Example:
        >>> series_of([{"step": 2, "epoch": 0.5, "loss": 3.0}, {"step": 4, "epoch": 1.0, "loss": 2.0}], "loss")
        ([0.5, 1.0], [3.0, 2.0])
    """
    entries = {entry["step"]: entry for entry in log_history if entry.get(name) is not None}
    return [entry.get("epoch", 0.0) for entry in entries.values()], [entry[name] for entry in entries.values()]


def save_training_curves(path, log_history, title=None, dpi=150):
    """Draw loss, Recall@1 and MAP@R, and learning rate over the epochs.

    Scores are those of evaluations during training (`eval_...`), and where there were none, of the last one
    (`final_...`), which may be of an earlier step's weights. They start, where the log has it, at the frozen
    backbone's (`frozen_...`), which goes on as a dashed line. Of a run too short for a
    loss to be logged, the mean over all of it is drawn (`train_loss`).

    Args:
        path: File to write; its suffix says how.
        log_history: `trainer.state.log_history`.
        title: Line above.
        dpi: Pixels per inch.

    Returns:
        The path, as `pathlib.Path`.

    Raises:
        ValueError: the log has no loss at all.
    """
    epochs, losses = series_of(log_history, "loss")
    what = "Training loss"
    if not losses:
        epochs, losses = series_of(log_history, "train_loss")
        epochs, losses, what = [0.0, *epochs[-1:]], losses[-1:] * 2, "Training loss, mean of the run"
    if not losses:
        raise ValueError("the log has no loss: nothing was trained")
    head = 0.25 if title else 0.0
    height = 2.15 + head
    figure = new_figure(7.2, height, dpi)
    figure.text(0.01, 1 - 0.06 / height, title, fontproperties=font(9, "bold"), va="top")
    bottom, tall = 0.4 / height, 1.45 / height
    loss_axes, score_axes, rate_axes = (figure.add_axes((x, bottom, 0.255, tall)) for x in (0.062, 0.396, 0.735))
    marker = "." if len(losses) < 30 else None

    plain_axes(loss_axes, what, "epoch")
    loss_axes.plot(epochs, losses, color=COLOURS[0], linewidth=1.2, marker=marker)
    loss_axes.set_ylim(bottom=min(0, *losses))

    plain_axes(score_axes, "Scores of unseen classes", "epoch", "%")
    _draw_scores(score_axes, log_history)

    at, rates = series_of(log_history, "learning_rate")
    exponent = math.floor(math.log10(max(rates, default=1) or 1))
    plain_axes(rate_axes, f"Learning rate × {10.0**-exponent:,.0f}" if exponent else "Learning rate", "epoch")
    if not rates:
        rate_axes.set(xticks=[], yticks=[])
        rate_axes.text(0.5, 0.5, "not logged", transform=rate_axes.transAxes, ha="center", fontproperties=font(8))
    rate_axes.plot(at, [rate / 10.0**exponent for rate in rates], color=COLOURS[2], linewidth=1.2, marker=marker)
    for axes in (loss_axes, score_axes, rate_axes):
        axes.set_xlim(left=0)
    for axes in (score_axes, rate_axes):
        axes.set_ylim(bottom=0)
    return save_figure(figure, path)


def _draw_scores(axes, log_history):
    handles = []
    for colour, marker, (name, label) in zip((COLOURS[0], COLOURS[3]), "os", SHOWN_SCORES.items(), strict=True):
        at, scores = series_of(log_history, f"eval_{name}")
        if not scores:
            at, scores = series_of(log_history, f"final_{name}")
        frozen = series_of(log_history, f"frozen_{name}")[1][-1:]
        at, percent = [0.0] * len(frozen) + at, [100 * score for score in frozen + scores]
        handles += axes.plot(at, percent, color=colour, linewidth=1.4, marker=marker, markersize=3, label=label)
        for score in frozen:
            axes.axhline(100 * score, color=colour, linewidth=1, linestyle=_DASHES)
    handles += axes.plot([], [], color=GREY, linewidth=1, linestyle=_DASHES, label="frozen backbone")
    axes.legend(handles=handles, prop=font(7), frameon=False, loc="best")


__all__ = ["save_training_curves", "series_of"]
