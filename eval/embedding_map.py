"""A map of the embedding space: embeddings in two dimensions, coloured by class."""

from __future__ import annotations

import numpy as np

from .checks import check_embeddings
from .pictures import COLOURS, choose_queries, font, new_figure, plain_axes, save_figure, wrap


_MARKERS = "o^"
MOST_CLASSES = len(_MARKERS) * len(COLOURS)  # that a legend tells apart


def map_embeddings(embeddings, method="tsne", seed=0, perplexity=30):
    """Embeddings in two dimensions, by scikit-learn.

    t-SNE (van der Maaten and Hinton, JMLR 2008) keeps neighbours together; distances between groups, and their sizes,
    mean little. PCA is linear: it keeps large distances, and shows how little of them two dimensions hold. For unit
    vectors, the Euclidean distance that both start from orders pairs as cosine similarity does.

    Args:
        embeddings: `(N, E)` float, L2-normalised.
        method: `"tsne"` or `"pca"`.
        seed: Of t-SNE.
        perplexity: Of t-SNE, about how many neighbours count; no more than (N - 1) / 3 are used.

    Returns:
        `(N, 2)` float64 array.

    Raises:
        TypeError: embeddings aren't a floating-point tensor.
        ValueError: embeddings are not finite or not L2-normalised, there are fewer than 5 of them, or method is
            neither of the two.
    """
    values = check_embeddings(embeddings, "embeddings").detach().cpu().double().numpy()
    if method not in ("tsne", "pca"):
        raise ValueError(f"method must be 'tsne' or 'pca', got {method!r}")
    if len(values) < 5:
        raise ValueError(f"a map needs at least 5 embeddings, got {len(values)}")
    if method == "pca":
        from sklearn.decomposition import PCA

        width = min(2, values.shape[1])
        with np.errstate(invalid="ignore"):  # shares of the variance, of equal embeddings
            points = PCA(width, svd_solver="full").fit_transform(values)
        return np.pad(points, ((0, 0), (0, 2 - width)))
    from sklearn.manifold import TSNE

    start = map_embeddings(embeddings, "pca")  # scikit-learn's start, also for one dimension and for equal embeddings
    start *= 1e-4 / max(start[:, 0].std(), 1e-12)
    perplexity = min(perplexity, (len(values) - 1) / 3)
    return TSNE(perplexity=perplexity, init=start, learning_rate="auto", random_state=seed).fit_transform(values)


def choose_mapped(labels, max_items=2000, max_classes=MOST_CLASSES, seed=0):
    """Which items to map, and which of their classes to colour.

    Args:
        labels: `(N,)` integer.
        max_items: How many items at most; t-SNE takes seconds for each thousand.
        max_classes: How many classes at most are coloured: those with most items, and at random among equals.
        seed: Of the choice.

    Returns:
        rows: Sorted list of items: all, or half of them of the coloured classes and the rest spread over all.
        classes: List of labels.
    """
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    order = np.lexsort((generator.random(len(classes)), -counts))
    coloured = sorted(classes[order[:max_classes]].tolist())
    if len(labels) <= max_items:
        return list(range(len(labels))), coloured
    inside = np.flatnonzero(np.isin(labels, coloured))
    chosen = set(inside[choose_queries(labels[inside], min(len(inside), max_items // 2), seed)].tolist())
    for row in choose_queries(labels, len(labels), seed):
        if len(chosen) == max_items:
            break
        chosen.add(row)
    return sorted(chosen), coloured


def save_embedding_map(path, points, labels, class_names, classes, title=None, dpi=150, method="tsne"):
    """Draw mapped embeddings: some classes in colours and shapes of their own, the others grey.

    Args:
        path: File to write; its suffix says how.
        points: `(N, 2)`, of [`map_embeddings`].
        labels: `(N,)` integer.
        class_names: Name of each label: a sequence or dict.
        classes: Labels to colour, at most 14.
        title: Line above.
        dpi: Pixels per inch.
        method: What the points are: `"tsne"` or `"pca"`; the axes are named after it.

    Returns:
        The path, as `pathlib.Path`.

    Raises:
        ValueError: points and labels don't fit together, or there are too many classes.
    """
    points, labels = np.asarray(points), np.asarray(labels)
    if points.shape != (len(labels), 2):
        raise ValueError(f"points must have shape ({len(labels)}, 2) for {len(labels)} labels, got {points.shape}")
    if len(classes) > MOST_CLASSES:
        raise ValueError(f"at most {MOST_CLASSES} classes can be told apart, got {len(classes)}")
    names = legend_names(labels, class_names, classes)
    height = max(4.6, legend_height(names) + 0.4)
    figure = new_figure(6.8, height, dpi)
    axes = figure.add_axes((0.05, 0.32 / height, 0.685, (height - 0.64) / height))
    draw_map(axes, points, labels, classes, method, title)
    add_legend(axes, names)
    return save_figure(figure, path)


def legend_names(labels, class_names, classes):
    """What a map's legend says, in lines: the other classes, if there are any, then those that are coloured."""
    ruler = new_figure(1, 1)
    other = np.unique(np.asarray(labels)[~np.isin(labels, classes)])
    names = [f"{len(other)} other class{'es' if len(other) > 1 else ''}"] if len(other) else []
    return ["\n".join(wrap(name, 1.5, ruler, font(7))) for name in [*names, *(class_names[c] for c in classes)]]


def legend_height(names):
    """Inches that a legend takes."""
    return sum(0.06 + 0.137 * (name.count("\n") + 1) for name in names)


def draw_map(axes, points, labels, classes, method="tsne", title=None):
    """Mapped embeddings in axes of a figure; as for [`save_embedding_map`]."""
    name = {"tsne": "t-SNE", "pca": "PCA"}[method]
    plain_axes(axes, title, f"{name} dimension 1", f"{name} dimension 2")
    size = np.clip(18000 / max(len(points), 1), 10, 30)
    other = ~np.isin(labels, classes)
    if other.any():
        axes.scatter(*points[other].T, s=0.5 * size, color="#cfcfcf", linewidths=0, label="other")
    for number, label in enumerate(classes):
        colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number // len(COLOURS)]
        style = {"s": size, "color": colour, "marker": marker, "linewidths": 0.3, "edgecolors": "white"}
        axes.scatter(*points[labels == label].T, label="class", **style)
    if method == "tsne":  # its units mean nothing
        axes.set(xticks=[], yticks=[])
    axes.margins(0.03)


def add_legend(axes, names):
    """Name the classes beside a map."""
    legend = axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), prop=font(7), frameon=False, handletextpad=0.2, markerscale=1.6
    )
    for entry, text in zip(legend.get_texts(), names, strict=True):
        entry.set(text=text, parse_math=False)  # as a label, a name with $ is a formula, and one with _ is left out


__all__ = ["MOST_CLASSES", "choose_mapped", "map_embeddings", "save_embedding_map"]
