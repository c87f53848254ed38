"""Proxy movement over training, from what the callback `ProxyMovement` recorded."""

from __future__ import annotations

import numpy as np

from .pictures import COLOURS, font, new_figure, plain_axes, save_figure


_PANELS = (
    ("Proxies Q", {"proxy_start": "with the start", "proxy_before": "with the logging step before"}),
    ("State S", {"state_before": "with the logging step before", "state_original": "with the original proxies O"}),
)


def save_proxy_movement(path, records, title=None, dpi=150):
    """Draw how far the proxies and their state have moved, over the epochs: median and 10-90 % of the classes.

    Args:
        path: File to write; its suffix says how.
        records: Of [`read_proxy_movement`]: dicts with `epoch` and, for each cosine, mean and quantiles.
        title: Line above.
        dpi: Pixels per inch.

    Returns:
        The path, as `pathlib.Path`.

    Raises:
        ValueError: there is no record.
    """
    if not records:
        raise ValueError("there is no record of proxy movement: no logging step was reached")
    panels = [(head, lines) for head, lines in _PANELS if any(name in records[-1] for name in lines)]
    width = 0.35 + 3.4 * len(panels)
    figure = new_figure(width, 2.75, dpi)
    figure.text(0.1 / width, 0.98, title, fontproperties=font(9, "bold"), va="top")
    for number, (head, lines) in enumerate(panels):
        axes = figure.add_axes(((0.62 + 3.45 * number) / width, 0.26, 2.75 / width, 0.58))
        plain_axes(axes, head, "epoch", "cosine")
        for index, (name, label) in enumerate(lines.items()):
            epochs = [record["epoch"] for record in records]
            _, low, median, high = np.array([record[name] for record in records]).T
            if name == "proxy_start":  # where all are 1
                epochs = [0.0, *epochs]
                low, median, high = (np.insert(values, 0, 1.0) for values in (low, median, high))
            colour, dashes = COLOURS[(0, 3)[index]], ("-", (0, (5, 2)))[index]
            marker = "os"[index] if len(epochs) < 20 else None
            axes.plot(
                epochs, median, color=colour, linestyle=dashes, linewidth=1.4, marker=marker, markersize=3, label=label
            )
            axes.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set_xlim(left=0)
        axes.legend(prop=font(7), frameon=False, loc="upper center", bbox_to_anchor=(0.46, -0.24), ncols=2)
    return save_figure(figure, path)


__all__ = ["save_proxy_movement"]
