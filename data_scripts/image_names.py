"""Names by which the images of a table are known: their paths in a folder, or what the table calls them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .paths import usable_path


if TYPE_CHECKING:
    import datasets


__all__ = ["ImageNames", "common_root", "image_names"]


class ImageNames(NamedTuple):
    """Names of the images of a table.

    Attributes:
        names: n different texts.
        root: Folder that they are paths in; None where the table holds the images.
        are_own: Whether the images have them wherever they stand; otherwise they say nothing but the row.
    """

    names: list[str]
    root: Path | None
    are_own: bool


def image_names(table: "datasets.Dataset", data_dir: str | Path | None = None) -> ImageNames:
    """Paths relative to `data_dir` (to the folder common to all files, where they lie elsewhere); for images that are
    stored in the table, their names, or `row 0`, `row 1`, ... where not all have different names.

    Args:
        table: Map-style data set of `datasets` with a column `image`, not decoded.
        data_dir: Folder of the data set, or its table.
    """
    images = table.with_format("arrow", columns=["image"])[:].column("image").chunks
    paths = [path for chunk in images for path in chunk.field("path").to_pylist()]
    on_disk = all(chunk.field("bytes").null_count == len(chunk) for chunk in images)
    if on_disk and paths and None not in paths:
        root = common_root(paths, data_dir)
        return ImageNames([Path(path).relative_to(root).as_posix() for path in paths], root, True)
    if None not in paths and len(set(paths)) == len(paths):
        return ImageNames(paths, None, True)
    return ImageNames([f"row {row}" for row in range(len(paths))], None, False)


def common_root(files: list[str], preferred: str | Path | None = None) -> Path | None:
    """`preferred` (of a file, its folder) if all files lie in it, else the deepest folder that they share."""
    preferred = None if preferred is None else usable_path(preferred).absolute()
    if preferred is not None and preferred.is_file():
        preferred = preferred.parent
    if preferred is not None and all(preferred in Path(file).parents for file in files):
        return preferred
    return Path(os.path.commonpath([os.path.dirname(file) for file in files])) if files else preferred  # noqa: PTH120
