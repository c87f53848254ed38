"""Training curves: loss, scores and learning rate, from the Trainer's log."""

from __future__ import annotations

import re

from .pictures import COLOURS, GREY, font, new_figure, plain_axes, save_figure


SHOWN_SCORES = {"recall_at_1": "R@1", "map_at_r": "MAP@R"}


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
    entries = {entry["step"]: entry for entry in log_history if name in entry}
    return [entry.get("epoch", 0.0) for entry in entries.values()], [entry[name] for entry in entries.values()]


def save_training_curves(path, log_history, title=None, dpi=150):
    """Draw loss, Recall@1 and MAP@R, and learning rate over the epochs.

    Scores are those of evaluations during training (`eval_...`) and of the last one (`final_...`), with the frozen
    backbone's (`frozen_...`) as dashed lines where the log has them.

    Args:
        path: File to write; its suffix says how.
        log_history: `trainer.state.log_history`.
        title: Line above.
        dpi: Pixels per inch.

    Returns:
        The path, as `pathlib.Path`.

    Raises:
        ValueError: the log has no loss.
    """
    epochs, losses = series_of(log_history, "loss")
    if not losses:
        raise ValueError("the log has no loss: nothing was trained, or logging_strategy is 'no'")
    figure = new_figure(7.2, 2.5, dpi)
    figure.text(0.01, 0.98, title, fontproperties=font(9, "bold"), va="top")
    loss_axes, score_axes, rate_axes = (figure.add_axes((x, 0.19, 0.255, 0.6)) for x in (0.062, 0.396, 0.735))
    marker = "." if len(losses) < 30 else None

    plain_axes(loss_axes, "Training loss", "epoch")
    loss_axes.plot(epochs, losses, color=COLOURS[0], linewidth=1.2, marker=marker)
    loss_axes.set_ylim(bottom=min(0, *losses))

    plain_axes(score_axes, "Scores of unseen classes", "epoch", "%")
    for number, (name, label) in enumerate(SHOWN_SCORES.items()):
        colour = COLOURS[(0, 3)[number]]
        _, frozen = series_of(log_history, f"frozen_{name}")
        at, scores = series_of([_as_eval(entry) for entry in log_history], f"eval_{name}")
        if frozen:
            score_axes.axhline(100 * frozen[-1], color=colour, linewidth=1, linestyle=(0, (4, 3)))
        if scores:
            percent = [100 * score for score in scores]
            score_axes.plot(at, percent, color=colour, linewidth=1.4, marker="os"[number], markersize=3, label=label)
    score_axes.plot([], [], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="frozen backbone")
    score_axes.legend(prop=font(6.5), frameon=False, loc="lower right", bbox_to_anchor=(1.03, 1.1), ncols=3, **_TIGHT)

    plain_axes(rate_axes, "Learning rate", "epoch")
    rate_axes.plot(*series_of(log_history, "learning_rate"), color=COLOURS[2], linewidth=1.2, marker=marker)
    rate_axes.set_ylim(bottom=0)
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rate_axes.yaxis.get_offset_text().set_fontproperties(font(7))
    for axes in (loss_axes, score_axes, rate_axes):
        axes.set_xlim(left=0)
    return save_figure(figure, path)


_TIGHT = {"borderaxespad": 0, "handlelength": 1.4, "columnspacing": 0.8, "handletextpad": 0.4}


def _as_eval(entry):
    """The entry of the last evaluation under the names of the others."""
    return {re.sub("^final_", "eval_", name): value for name, value in entry.items()}


__all__ = ["save_training_curves", "series_of"]
