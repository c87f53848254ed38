"""Views of an image whose embeddings are averaged: its mirror image, and squares cut from elsewhere than the centre.

Test-time augmentation of retrieval. Ten crops are those of Krizhevsky et al., "ImageNet Classification with Deep
Convolutional Neural Networks" (NeurIPS 2012): the centre, the four corners, and all of them mirrored.
"""

from __future__ import annotations

import torch

from ..names.registry import nearest


# Name -> squares that are cut from an image, and whether each is mirrored too.
VIEWS = {"one": (1, False), "flip": (1, True), "five_crops": (5, False), "ten_crops": (5, True)}


def check_views(views, processor):
    """The name itself, if there are such views and the image processor leaves room for them; else a ValueError.

    Args:
        views: Of `VIEWS`.
        processor: Image processor of transformers.
    """
    if views not in VIEWS:
        raise ValueError(f"views must be one of {', '.join(VIEWS)}, got {views!r}{nearest(views, VIEWS)}")
    if VIEWS[views][0] == 1:
        return views
    short = dict(processor.size).get("shortest_edge") if processor.do_resize and processor.do_center_crop else None
    if short is None or len(set(dict(processor.crop_size).values())) != 1 or processor.crop_size["height"] > short:
        raise ValueError(
            f"views={views!r} needs an image processor that resizes the short side and then crops a square from that, "
            f"got one with do_resize={processor.do_resize}, size={dict(processor.size)}, "
            f"do_center_crop={processor.do_center_crop}"
        )
    return views


def views_of(model):
    """The views by which a model (dict of who made embeddings, or None) embedded; older versions knew `one` alone."""
    return (model or {}).get("views", "one")


def corner_crops(image, resized, size, elongated):
    """The four corners of an image once it is resized.

    Args:
        image: PIL image.
        resized: PIL image -> `(3, H, W)` tensor, neither side below `size`.
        size: Side S of the crops.
        elongated: Whether the image is too long to be resized as a whole: then its two ends are, each for itself.

    Returns:
        List of four `(3, S, S)`: top left, top right, bottom left, bottom right.
    """
    wide, reach = image.width >= image.height, 2 * min(image.size)
    if elongated:
        first = image.crop((0, 0, min(reach, image.width), min(reach, image.height)))
        last = image.crop((max(image.width - reach, 0), max(image.height - reach, 0), *image.size))
        first, last = resized(first), resized(last)
    else:
        first = last = resized(image)
    top_right, bottom_left = (last, first) if wide else (first, last)
    return [
        first[:, :size, :size],
        top_right[:, :size, -size:],
        bottom_left[:, -size:, :size],
        last[:, -size:, -size:],
    ]


def average_views(embed, pixel_values, views):
    """Mean of the embeddings of an image's views, normalised anew.

    Args:
        embed: `(B, 3, S, S)` -> `(B, E)`, L2-normalised.
        pixel_values: `(B, 3, S, S)`, or of several crops `(B, crops, 3, S, S)`.
        views: Of `VIEWS`.

    Returns:
        `(B, E)` float32, L2-normalised.

    Raises:
        ValueError: the crops are not those of the views.
    """
    crops, mirrored = VIEWS[views]
    if pixel_values.dim() != (4 if crops == 1 else 5) or (crops > 1 and pixel_values.shape[1] != crops):
        expected = "(images, 3, S, S)" if crops == 1 else f"(images, {crops}, 3, S, S)"
        raise ValueError(f"pixel_values of views={views!r} must be {expected}, got {tuple(pixel_values.shape)}")
    squares = pixel_values.unbind(1) if crops > 1 else [pixel_values]
    if not mirrored and crops == 1:
        return embed(pixel_values)
    total = sum(embed(square) + embed(square.flip(-1)) if mirrored else embed(square) for square in squares)
    return torch.nn.functional.normalize(total, dim=1)


__all__ = ["VIEWS", "average_views", "check_views", "corner_crops", "views_of"]
