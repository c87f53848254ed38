"""Reading folders of class folders: what lies where, and what is wrong when it does not.

Nothing here imports torch or `datasets`.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from .errors import DataError, some
from .images import ImageFile, is_hidden, is_image_name, list_images


__all__ = [
    "LAYOUTS",
    "detect_layout",
    "existing_folder",
    "image_names",
    "scan_class_folders",
    "scan_split_folders",
    "visible_folders",
]

logger = logging.getLogger(__name__)

LAYOUTS = ("auto", "classes", "train_test", "query_gallery")
_LAYOUT_FOLDERS = {"train_test": ("train", "test"), "query_gallery": ("train", "query", "gallery")}
_SPLIT_NAMES = frozenset({"train", "test", "query", "gallery", "val", "valid", "validation", "dev"})
_SLOW_SECONDS = 2.0
"""A progress bar shows up only where listing takes longer than this."""


def existing_folder(data_dir: str | Path | None, option: str = "data_dir") -> Path:
    """The folder as an absolute path.

    Args:
        data_dir: Folder; `~` stands for the home directory.
        option: Name of the option, for errors.

    Raises:
        DataError: it was not given, does not exist (the nearest folder that does is named), or is a file.
    """
    if data_dir is None or not str(data_dir):
        raise DataError(f"{option} is missing: give the folder that holds the images")
    folder = Path(data_dir).expanduser().resolve()
    if not folder.exists():
        above = next(parent for parent in folder.parents if parent.exists())
        raise DataError(f"{option} {folder} does not exist (the nearest folder that does is {above})")
    if not folder.is_dir():
        raise DataError(f"{option} must be a folder, but {folder} is a file")
    return folder


def visible_folders(folder: Path) -> dict[str, Path]:
    """The sub-folders that are not hidden or litter, by name, sorted."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"can't list the folder {folder}: {error.strerror or error}") from error
    return {entry.name: folder / entry.name for entry in entries if not is_hidden(entry.name) and entry.is_dir()}


def image_names(folder: Path) -> list[str]:
    """The names of the images that lie directly in a folder, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if is_image_name(entry.name) and entry.is_file())


def detect_layout(root: Path, layout: str = "auto") -> str:
    """Which layout a folder has, from the names in it alone (so it is quick however large the data set).

    `query_gallery` has folders train, query and gallery; `train_test` has train and test; in `classes` every folder
    is a class. Upper and lower case are the same. A layout that is asked for is only checked.

    Args:
        root: Folder.
        layout: `auto`, or the layout that it is to have.

    Returns:
        `classes`, `train_test` or `query_gallery`.

    Raises:
        DataError: the folder is empty, holds images but no folders, or has only some of a layout's folders.
    """
    if layout not in LAYOUTS:
        raise DataError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    folders = visible_folders(root)
    if not folders:
        loose = image_names(root)
        if loose:
            raise DataError(
                f"{root} holds {len(loose)} images ({loose[0]}, ...) but no class folders; expected one folder per "
                f"class with its images inside. If {root.name!r} is itself a class, give the folder above it, "
                f"{root.parent}"
            )
        raise DataError(f"{root} is empty; expected one folder per class with its images inside")
    names = {name.lower() for name in folders}
    if layout != "auto":
        missing = [name for name in _LAYOUT_FOLDERS.get(layout, ()) if name not in names]
        if missing:
            raise DataError(
                f"layout {layout!r} needs the folders {', '.join(_LAYOUT_FOLDERS[layout])} in {root}; "
                f"missing {', '.join(missing)}, found {some(folders)}"
            )
        return layout
    if names >= {"train", "test", "query", "gallery"}:
        raise DataError(
            f"{root} has the folders train, test, query and gallery: say layout='train_test' or layout='query_gallery'"
        )
    for candidate, needed in _LAYOUT_FOLDERS.items():
        if names.issuperset(needed):
            return candidate
    if names <= _SPLIT_NAMES:
        raise DataError(
            f"{root} has only {some(folders)}; expected train and test, or train, query and gallery. "
            "If these are the names of classes, say layout='classes'"
        )
    return "classes"


def scan_split_folders(root: Path, layout: str) -> dict[str, tuple[Path, dict[str, list[ImageFile]]]]:
    """Scan the split folders of the layouts `train_test` and `query_gallery`.

    Args:
        root: Folder that `detect_layout` gave `layout` for.
        layout: `train_test` or `query_gallery`.

    Returns:
        Per split, its folder and `scan_class_folders` of it.

    Raises:
        DataError: as `scan_class_folders`, or two folders differ in upper and lower case only.
    """
    needed = _LAYOUT_FOLDERS[layout]
    found: dict[str, Path] = {}
    for name, folder in visible_folders(root).items():
        split = name.lower()
        if split not in needed:
            logger.warning("%s: the folder %r is not part of the layout %r, ignored", root, name, layout)
        elif split in found:
            raise DataError(f"{root} holds both {found[split].name!r} and {name!r}; expected one {split} folder")
        else:
            found[split] = folder
    return {split: (found[split], scan_class_folders(found[split])) for split in needed}


def scan_class_folders(root: Path) -> dict[str, list[ImageFile]]:
    """List the images of every class folder.

    A class is a visible folder directly in `root`; its images may lie in folders of their own inside it. Class
    folders without an image are left out, with a warning that names them; so are images beside the class folders.

    Args:
        root: Folder above the class folders.

    Returns:
        Per class (sorted by name, code points) its files, relative to the class folder, never empty.

    Raises:
        DataError: there are no class folders, no images at all, or the class folders are one level further down.
    """
    folders = visible_folders(root)
    loose = image_names(root)
    if not folders:
        detect_layout(root)  # empty, or images without class folders: it says which
    progress = tqdm(folders.items(), desc=f"Listing {root.name}", unit="class", delay=_SLOW_SECONDS, leave=False)
    classes = {name: list_images(folder) for name, folder in progress}
    empty = [name for name, files in classes.items() if not files]
    classes = {name: files for name, files in classes.items() if files}
    if not classes:
        raise DataError(
            f"no images in any of the {len(folders)} folders of {root} ({some(folders)}); expected files ending in "
            ".jpg, .png or another known image extension"
        )
    if len(classes) == 1:
        _refuse_one_level_too_high(root, classes)
    if empty:
        logger.warning("%s: %d class folders hold no images and are left out: %s", root, len(empty), some(empty, 20))
    if loose:
        logger.warning("%s: %d images lie beside the class folders and are left out", root, len(loose))
    return classes


def _refuse_one_level_too_high(root: Path, classes: Mapping[str, list[ImageFile]]) -> None:
    """Raise if the only folder with images holds the class folders: descend as long as there is one way to go."""
    ((name, files),) = classes.items()
    meant, parts = root / name, [file.path.split("/") for file in files]
    while True:
        if any(len(part) == 1 for part in parts):
            return
        below = sorted({part[0] for part in parts})
        if len(below) > 1:
            raise DataError(
                f"{root} seems to be too high: its only folder with images is {name!r}, and the class folders "
                f"({some(below)}) are further down. Did you mean {meant}?"
            )
        meant, parts = meant / below[0], [part[1:] for part in parts]
