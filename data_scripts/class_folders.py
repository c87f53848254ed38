"""Reading folders of class folders: what lies where, and what is wrong when it does not.

Nothing here imports torch or `datasets`.
"""

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from tqdm import tqdm

from ..files.marks import written_as
from .data_errors import DataError, some
from .image_files import SLOW_SECONDS, ImageFile, LeftOut, is_hidden, is_image_name, list_images, refuse_own_folder
from .labels import UNLABELLED
from .paths import usable_path


__all__ = [
    "LAYOUTS",
    "LAYOUT_SPLITS",
    "class_of_path",
    "detect_layout",
    "everything_trains",
    "existing_folder",
    "has_split_folders",
    "say_loose",
    "scan_class_folders",
    "scan_split_folders",
    "split_folders",
    "splits_in_classes",
    "visible_folders",
]

logger = logging.getLogger(__name__)

LAYOUT_SPLITS = {"train_test": ("train", "test"), "query_gallery": ("train", "query", "gallery")}
"""The splits, or their folders, of the layouts that have any."""
LAYOUTS = ("auto", "classes", *LAYOUT_SPLITS)
_SPLIT_NAMES = frozenset(
    {"train", "test", "query", "gallery", "val", "valid", "validation", "dev", "training", "testing"}
)
_WORD = re.compile(r"[^\W\d_]+")


def existing_folder(data_dir: str | Path | None) -> Path:
    """The folder as an absolute path.

    Args:
        data_dir: Folder; `~` stands for the home directory.

    Raises:
        DataError: it was not given, does not exist (the nearest folder that does is named), or is a file.
    """
    if data_dir is None or not str(data_dir):
        raise DataError("data_dir is missing: give the folder that holds the images")
    folder = Path(os.path.realpath(usable_path(data_dir)))
    if not folder.exists():
        if folder.is_symlink():
            raise DataError(f"data_dir {folder} is a link that leads back to itself")
        above = next(parent for parent in folder.parents if parent.exists())
        raise DataError(f"data_dir {folder} does not exist (the nearest folder that does is {above})")
    if not folder.is_dir():
        raise DataError(f"data_dir must be a folder, but {folder} is a file")
    return folder


def visible_folders(folder: Path) -> dict[str, Path]:
    """The sub-folders that are not hidden or litter, nor written by this package, by name, sorted."""
    return {name: path for name, path in _all_folders(folder).items() if not written_as(path)}


def _all_folders(folder: Path) -> dict[str, Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"can't list the folder {folder}: {error.strerror or error}") from error
    return {entry.name: folder / entry.name for entry in entries if not is_hidden(entry.name) and entry.is_dir()}


def _loose_files(folder: Path) -> list[str]:
    """The names of the files that lie directly in a folder, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_file())


def _loose_images(folder: Path) -> list[str]:
    return [name for name in _loose_files(folder) if is_image_name(name)]


def say_loose(root: str | Path, names: Collection[str], what: str) -> None:
    """Log that images lie beside the folders that would say their class; where there are none, nothing.

    Args:
        root: The folder.
        names: Of the images.
        what: Which folders, and what becomes of the images.
    """
    if names:
        logger.warning("%s: %d images lie beside %s: %s", root, len(names), what, some(names))


def split_folders(folders: Collection[str]) -> set[str]:
    """Which folders of a data set are splits (`train`, `test`, `val`, ...) and not classes.

    A single name of a split among those of classes is a class, as there are classes called `train`. Names that differ
    in the word for a split alone, such as `cars_train` and `cars_test`, are splits; `bullet train` and `blood test`
    are not.

    Args:
        folders: Names of all its folders.

    Returns:
        The names of two or more splits, or of one if it is the only folder; else none.
    """
    alike: dict[tuple[str, str], set[str]] = {("", ""): set()}
    for name in folders:
        for word in _WORD.finditer(name.lower()):
            if word.group() in _SPLIT_NAMES:
                alike.setdefault((name[: word.start()].lower(), name[word.end() :].lower()), set()).add(name)
    if len(alike["", ""]) == len(folders):
        return alike["", ""]
    return set().union(*(names for names in alike.values() if len(names) > 1))


def splits_in_classes(paths_of: Mapping[str, Iterable[str]]) -> str | None:
    """What there is to say of classes in which `train`, `test` and the like are folders, as of whole data sets.

    Args:
        paths_of: Per class, the paths of its images, relative to its folder.
    """
    for name, paths in paths_of.items():
        folders: dict[str, set[str]] = {}
        for path in {path.rpartition("/")[0] for path in paths} - {""}:
            parts = [name, *path.split("/")]
            for depth in range(1, len(parts)):
                folders.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
        for folder, below in folders.items():
            if len(splits := split_folders(below)) > 1:
                return (
                    f"the folder {folder!r} holds {some(sorted(splits))}, and the class {name!r} would join them: "
                    "give that folder alone if it is the data set; if it is of a class, give the folders in it other "
                    "names"
                )
    return None


def class_of_path(path: str, splits: Collection[str] = ()) -> str | None:
    """The class of an image by its place: the first folder, however deep the image lies in it.

    Args:
        path: Relative to the folder of class folders, or to that of split folders.
        splits: The result of `split_folders`; if there are any, the class is the first folder below one.

    Returns:
        Its name, or None for an image in no class folder.
    """
    *folders, _ = path.split("/")
    if splits:
        folders = folders[1:] if folders and folders[0] in splits else []
    return folders[0] if folders else None


def everything_trains(root: Path, options) -> bool:
    """Whether all images below a folder train without labels, whatever its folders.

    Args:
        root: The folder.
        options: What has `labels`, `layout` and `test_labels`.
    """
    return options.labels == "none" and not options.test_labels and not has_split_folders(root, options.layout)


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
        DataError: the folder was written by this package, is empty, holds images but no folders, has only some of a
            layout's folders, or folders of splits would become classes.
    """
    if layout not in LAYOUTS:
        raise DataError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    refuse_own_folder(root)
    folders = visible_folders(root)
    if not folders:
        loose = _loose_images(root)
        if loose:
            is_class = f". If {root.name!r} is itself a class, give the folder above it, {root.parent}"
            raise DataError(
                f"{root} holds {len(loose)} images ({loose[0]}, ...) but no class folders; expected one folder per "
                f"class with its images inside{'' if root.name.lower() in _SPLIT_NAMES else is_class}"
            )
        raise DataError(f"{root} is empty; expected one folder per class with its images inside")
    names = {name.lower() for name in folders}
    if layout in LAYOUT_SPLITS:
        missing = [name for name in LAYOUT_SPLITS[layout] if name not in names]
        if missing:
            raise DataError(
                f"layout {layout!r} needs the folders {', '.join(LAYOUT_SPLITS[layout])} in {root}; "
                f"missing {', '.join(missing)}, found {some(folders)}"
            )
        return layout
    fitting = [candidate for candidate, needed in LAYOUT_SPLITS.items() if names.issuperset(needed)]
    if layout == "auto" and len(fitting) > 1:
        raise DataError(
            f"{root} has the folders train, test, query and gallery: say layout='train_test' or layout='query_gallery'"
        )
    if layout == "auto" and fitting:
        return fitting[0]
    _refuse_splits_as_classes(root, folders, fitting)
    return "classes"


def has_split_folders(root: Path, layout: str = "auto") -> bool:
    """Whether a folder has those of a layout with splits, or is said to have them."""
    if layout != "auto":
        return layout in LAYOUT_SPLITS
    names = {name.lower() for name in visible_folders(root)}
    return any(names.issuperset(needed) for needed in LAYOUT_SPLITS.values())


def _refuse_splits_as_classes(root: Path, folders: Collection[str], fitting: list[str]) -> None:
    splits = sorted(split_folders(folders))
    if splits:
        has = f"has only {some(splits)}" if len(splits) == len(folders) else f"has {some(splits)} among its folders"
        layouts = f"layout={' or layout='.join(map(repr, fitting))}"
        raise DataError(
            f"{root} {has}; expected {layouts if fitting else 'train and test, or train, query and gallery'}. "
            "If these are the names of classes and not of splits, give them others"
        )


def scan_split_folders(
    root: Path, layout: str, labels: str = "given"
) -> dict[str, tuple[Path, dict[str, list[ImageFile]]]]:
    """Scan the split folders of the layouts `train_test` and `query_gallery`.

    Args:
        root: Folder that `detect_layout` gave `layout` for.
        layout: `train_test` or `query_gallery`.
        labels: What the folder train says: `given`, class folders; `none`, nothing: its images lie anywhere in it, and
            are of the class `UNLABELLED`; `partial`, class folders, and images beside them of that class.

    Returns:
        Per split, its folder and `scan_class_folders` of it.

    Raises:
        DataError: as `scan_class_folders`, two folders differ in upper and lower case only, or are the same by a link.
    """
    refuse_own_folder(root)
    needed = LAYOUT_SPLITS[layout]
    found: dict[str, Path] = {}
    for name, folder in visible_folders(root).items():
        split = name.lower()
        if split not in needed:
            logger.warning("%s: the folder %r is not part of the layout %r, ignored", root, name, layout)
        elif split in found:
            raise DataError(f"{root} holds both {found[split].name!r} and {name!r}; expected one {split} folder")
        else:
            found[split] = folder
    real = {split: folder.resolve() for split, folder in found.items()}
    for split, folder in real.items():
        for other, place in real.items():
            if split != other and place in (folder, *folder.parents):
                raise DataError(f"{found[split]} is a link into {found[other]}: their images would be in both splits")
    say_loose(root, _loose_images(root), "the folders of the splits and are left out")
    left_out = LeftOut()
    for folder in _all_folders(root).values():
        left_out.takes(folder)
    scanned = {
        split: (found[split], scan_class_folders(found[split], left_out, labels == "partial" and split == "train"))
        for split in needed
        if labels != "none" or split != "train"
    }
    if labels == "none":
        files = list_images(found["train"], left_out)
        if not files:
            raise DataError(f"no images in {found['train']}, which is to train")
        scanned = {"train": (found["train"], {UNLABELLED: files}), **scanned}
    left_out.say(root)
    return scanned


def scan_class_folders(
    root: Path, left_out: LeftOut | None = None, partial: bool = False
) -> dict[str, list[ImageFile]]:
    """List the images of every class folder.

    A class is a visible folder directly in `root`; its images may lie in folders of their own inside it. Class
    folders without an image are left out, with a warning that names them; so are images beside the class folders, and
    files that are no images, which are counted.

    Args:
        root: Folder above the class folders.
        left_out: Gets the files that are no images; None: they are logged.
        partial: Images beside the class folders are of the class `UNLABELLED`, and are not left out.

    Returns:
        Per class (sorted by name, code points) its files, relative to the class folder (those of `UNLABELLED`: to
        `root`), never empty.

    Raises:
        DataError: there are no class folders, no images at all, the class folders are one level further down, a class
            folder is a link or holds the folders of splits, or this folder was written by a training run; with
            `partial`, no image lies beside the class folders, or one of these is called `UNLABELLED`.
    """
    refuse_own_folder(root)
    folders = visible_folders(root)
    found = LeftOut() if left_out is None else left_out
    files_beside = _loose_files(root)
    found.add(files_beside)
    for folder in _all_folders(root).values():
        found.takes(folder)
    if not folders:
        detect_layout(root)  # empty, or images without class folders: it says which
    _refuse_links(folders)
    progress = tqdm(folders.items(), desc=f"Listing {root.name}", unit="class", delay=SLOW_SECONDS, leave=False)
    classes = {name: list_images(folder, found) for name, folder in progress}
    empty = [name for name, files in classes.items() if not files]
    classes = {name: files for name, files in classes.items() if files}
    if left_out is None:
        found.say(root)
    if not classes:
        raise DataError(
            f"no images in any of the {len(folders)} folders of {root} ({some(folders)}); expected files ending in "
            ".jpg, .png or another known image extension"
        )
    if len(classes) == 1:
        _refuse_one_level_too_high(root, classes)
    if joined := splits_in_classes({name: (file.path for file in files) for name, files in classes.items()}):
        raise DataError(f"{root}: {joined}")
    if empty:
        logger.warning("%s: %d class folders hold no images and are left out: %s", root, len(empty), some(empty, 20))
    if not partial:
        say_loose(root, _loose_images(root), "the class folders and are left out")
        return classes
    if UNLABELLED in folders:
        raise DataError(f"{folders[UNLABELLED]} has a name that stands for no class: give the class another")
    loose = [file for file in list_images(root, LeftOut()) if "/" not in file.path]
    if not loose:
        raise DataError(
            f"labels partial: no image lies in {root} beside the class folders, where images without a class belong; "
            "labels given is for images that all have one"
        )
    return {**classes, UNLABELLED: loose}


def _refuse_links(folders: Mapping[str, Path]) -> None:
    links = [folder for folder in folders.values() if folder.is_symlink()]
    if links:
        raise DataError(
            f"{links[0]} is a link to the folder {links[0].resolve()}, and would be a class of images that lie "
            f"elsewhere, perhaps in another class or split ({len(links)} such links); expected class folders with "
            "the images, or with links to the images"
        )


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
