"""Cars-196 (Krause et al., 2013): 196 models of cars, of which the first 98 train and the last 98 test.

Layouts:

    images/<class name>/*.jpg                                      class folders, "/" in a name written "-"
    train/<class name>/*.jpg, test/<class name>/*.jpg              the same in two halves; perhaps in car_data/ or
                                                                   car_data/car_data/
    car_ims/*.jpg, cars_annos.mat                                  what car_ims.tgz unpacks to, or car_ims.tgz itself
    cars_train/*.jpg, cars_test/*.jpg, devkit/*.mat                the other official form, or its archives
                                                                   cars_train.tgz, cars_test.tgz, car_devkit.tgz;
                                                                   perhaps cars_train/cars_train/, car_devkit/devkit/

The kit's own `cars_test_annos.mat` has no classes: the last form needs `cars_test_annos_withlabels.mat`, a download
of its own. The official split into training and test images is another one (it has all classes on both sides): the
halves are joined, and split by classes. One half alone is a subset, for `verify_counts=False`.
"""

import logging
from typing import NamedTuple

from ..archives import list_members, read_members
from ..builder import BenchmarkConfig, ImageDatasetBuilder
from ..class_folders import visible_folders
from ..data_errors import DataError
from ..listing import SplitCounts, SplitListing
from ..sources import (
    Entry,
    ImageSource,
    archive_images,
    find_file,
    folder_images,
    list_benchmark,
    list_path,
    locate,
    refuse_repeats,
    tar_names,
)
from .cars_labels import read_annotations
from .cars_names import CAR_NAMES, car_number


__all__ = ["CARS_COUNTS", "Cars196"]

logger = logging.getLogger(__name__)

CARS_COUNTS = {"train": SplitCounts(8054, 98), "test": SplitCounts(8131, 98)}
NUM_TRAIN_CLASSES = 98
LABELS = "cars_annos.mat"
DEVKIT_LABELS = {"cars_train": "cars_train_annos.mat", "cars_test": "cars_test_annos_withlabels.mat"}
"""Per half of the official form, its annotations."""
_DEVKITS = ("car_devkit.tgz", "cars_devkit.tgz")
_DEVKIT_FOLDERS = ("devkit", "car_devkit", "car_devkit/devkit", "cars_devkit", "cars_devkit/devkit")
_HALVES = ("train", "test")
_EXPECTED = (
    "images/<class name>/, or train/<class name>/ and test/<class name>/ (there or in car_data/), or car_ims/ (or "
    "car_ims.tgz) and cars_annos.mat, or cars_train/, cars_test/ (or their .tgz) and devkit/ (or car_devkit.tgz)"
)


class _Place(NamedTuple):
    form: str
    """`classes`, `car_ims` or `devkit`."""
    root: object
    images: dict
    """Folders or archives, by the folder that their images' paths begin with; of `classes` also an empty one."""
    absent: str | None = None
    """The half that is not there."""


class Cars196(ImageDatasetBuilder):
    """Cars-196.

    `data_dir` is the folder that holds one of the layouts (see the module), or `car_ims.tgz`. Labels follow the
    official class order, whatever the layout.

    Raises:
        DataError: nothing found (the message says which folder was meant), labels missing or not readable, a class
            folder that is no official class, or, unless `verify_counts=False`, missing images or counts that are not
            the published ones.
    """

    BUILDER_CONFIG_CLASS = BenchmarkConfig
    DESCRIPTION = "Cars-196: 16,185 images of 196 models; the first 98 train, the last 98 test."

    @classmethod
    def _list(cls, config: BenchmarkConfig) -> SplitListing:
        place = locate(config.data_dir, _find, _of_archive, _EXPECTED)
        if place.absent is not None:
            _take_half(f"{place.root} holds only one half of the images; {place.absent} is missing", config)
        if place.form == "devkit":
            labels = _devkit_labels(place, config)
            place = place._replace(images={half: place.images[half] for half in labels})
        sources = [
            _open_source(images, start, place.form == "classes", config.index_dir)
            for start, images in place.images.items()
        ]
        if place.form == "classes":
            rows = [row for source in sources for row in _class_folder_rows(source)]
        elif place.form == "car_ims":
            file = place.root / LABELS
            rows = read_annotations(file.read_bytes(), str(file))
        else:
            rows = [row for half, (where, content) in labels.items() for row in _devkit_rows(half, content, where)]
        entries: dict[str, list[Entry]] = {"train": [], "test": []}
        for number, path, where in rows:
            split = "train" if number < NUM_TRAIN_CLASSES else "test"
            entries[split].append(Entry(number, CAR_NAMES[number], list_path(path, where), where))
        refuse_repeats(entries)
        return list_benchmark(
            entries,
            sources,
            dataset="cars",
            title="Cars-196",
            counts=CARS_COUNTS if config.verify_counts else None,
            version=str(cls.VERSION),
        )


def _take_half(what: str, config: BenchmarkConfig) -> None:
    """Say that a half is left out, where that is allowed."""
    if config.verify_counts:
        raise DataError(f"{what}. verify_counts=False takes the other half alone, as a subset")
    logger.warning("%s: the other half is taken alone, as a subset", what)


def _folder_or_archive(root, name: str):
    """A folder, the folder of its own name in it (which some archives unpack to), or its archive."""
    for folder in (root / name / name, root / name):
        if folder.is_dir():
            return folder
    return find_file([root], tar_names(name))


def _holds_classes(folder) -> bool:
    return folder.is_dir() and any(car_number(name) is not None for name in visible_folders(folder))


def _find(root):
    for images in (root / "images", root / "cars196" / "images"):
        if _holds_classes(images):
            return _Place("classes", root, {"": images})
    for folder in (root, root / "car_data", root / "car_data" / "car_data"):
        halves = {half: folder / half for half in _HALVES if _holds_classes(folder / half)}
        if halves:
            absent = next((f"{half}/ with class folders" for half in _HALVES if half not in halves), None)
            return _Place("classes", folder, halves, absent)
    images = _folder_or_archive(root, "car_ims")
    if images is not None:
        if not (root / LABELS).is_file():
            raise DataError(f"{root} holds {images.name}, but not {LABELS}, which has its classes")
        return _Place("car_ims", root, {"car_ims": images})
    halves = {half: images for half in DEVKIT_LABELS if (images := _folder_or_archive(root, half)) is not None}
    if not halves:
        return None
    absent = next((f"{half}/ or {half}.tgz" for half in DEVKIT_LABELS if half not in halves), None)
    return _Place("devkit", root, halves, absent)


def _of_archive(archive):
    if archive.name in (*tar_names("cars_train"), *tar_names("cars_test")):
        raise DataError(f"{archive} is one part of the images: give the folder that holds all, {archive.parent}")
    if not (archive.parent / LABELS).is_file():
        raise DataError(f"{LABELS}, which has the classes of {archive}, is missing: expected it beside the archive")
    return _Place("car_ims", archive.parent, {"car_ims": archive})


def _open_source(images, start: str, by_class: bool, index_dir: str) -> ImageSource:
    """Images by the path that the annotations give: `car_ims/000001.jpg`; those of class folders by their own.

    Those of halves begin with the half, as both may have a file of one name.
    """
    if images.is_dir():
        source = folder_images(images, follow_links=not by_class)
    else:
        source = archive_images(images, list_members(images, index_dir), start)
    files = {f"{start}/{path}": file for path, file in source.files.items()} if start else source.files
    return ImageSource(source.where, files, source.archive)


def _class_folder_rows(source: ImageSource):
    rows = []
    for path, image in sorted(source.files.items()):
        name, _, file = image.path.partition("/")
        number = car_number(name) if file else None
        if number is None:
            raise DataError(
                f"{source.where} holds {name!r}, which is none of the 196 official classes, such as {CAR_NAMES[0]!r}"
            )
        rows.append((number, path, source.where))
    return rows


def _devkit_labels(place: _Place, config: BenchmarkConfig) -> dict[str, tuple[str, bytes]]:
    """Per half that has images and labels, the file of its annotations: from the kit's folder, its archive or beside.

    Raises:
        DataError: there are none, or those of one half are missing and `verify_counts` asks for both.
    """
    root = place.root
    found, names = {}, {half: DEVKIT_LABELS[half] for half in place.images}
    for half, name in names.items():
        file = find_file([root, *(root / folder for folder in _DEVKIT_FOLDERS)], [name])
        if file is not None:
            found[half] = (str(file), file.read_bytes())
    kit = find_file([root], _DEVKITS)
    if kit is not None and len(found) < len(names):
        members = [file.path for file in list_members(kit, config.index_dir)]
        inside = {path: half for path in members for half in names.keys() - found if path.endswith(f"/{names[half]}")}
        for path, content in read_members(kit, list(inside)):
            found[inside[path]] = (f"{kit}/{path}", content)
    missing = [names[half] for half in names if half not in found]
    if missing:
        why = " (the kit's cars_test_annos.mat has no classes)" if "test" in missing[0] else ""
        what = (
            f"the labels {missing[0]} are missing{why}: expected them in {root}, in {root / 'devkit'} or in "
            f"{_DEVKITS[0]}"
        )
        if not found:
            raise DataError(what)
        _take_half(what, config)
    return {half: found[half] for half in names if half in found}


def _devkit_rows(half: str, content: bytes, where: str):
    return [
        (number, f"{half}/{path.rpartition('/')[2]}", row_where)
        for number, path, row_where in read_annotations(content, where)
    ]
