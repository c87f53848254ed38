"""Cars-196 (Krause et al., 2013): 196 models of cars, of which the first 98 train and the last 98 test.

Layouts:

    images/<class name>/*.jpg                                      class folders, "/" in a name written "-"
    car_ims/*.jpg, cars_annos.mat                                  what car_ims.tgz unpacks to, or car_ims.tgz itself
    cars_train/*.jpg, cars_test/*.jpg, devkit/*.mat                the other official form, or its archives
                                                                   cars_train.tgz, cars_test.tgz, car_devkit.tgz

The kit's own `cars_test_annos.mat` has no classes: the third form needs `cars_test_annos_withlabels.mat`, a download
of its own. The official split into training and test images is another one (it has all classes on both sides).
"""

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

CARS_COUNTS = {"train": SplitCounts(8054, 98), "test": SplitCounts(8131, 98)}
NUM_TRAIN_CLASSES = 98
LABELS = "cars_annos.mat"
DEVKIT_LABELS = ("cars_train_annos.mat", "cars_test_annos_withlabels.mat")
_DEVKITS = ("car_devkit.tgz", "cars_devkit.tgz")
_EXPECTED = (
    "images/<class name>/, or car_ims/ (or car_ims.tgz) and cars_annos.mat, or cars_train/, cars_test/ (or their "
    ".tgz) and devkit/ (or car_devkit.tgz)"
)


class _Place(NamedTuple):
    form: str
    """`classes`, `car_ims` or `devkit`."""
    root: object
    images: tuple
    """Folders or archives."""


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
        sources = [_open_source(images, config.index_dir) for images in place.images]
        if place.form == "classes":
            rows = _class_folder_rows(sources[0])
        elif place.form == "car_ims":
            file = place.root / LABELS
            rows = read_annotations(file.read_bytes(), str(file))
        else:
            rows = _devkit_rows(place.root, config.index_dir)
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


def _folder_or_archive(root, name: str):
    return root / name if (root / name).is_dir() else find_file([root], tar_names(name))


def _find(root):
    for images in (root / "images", root / "cars196" / "images"):
        if images.is_dir() and any(car_number(name) is not None for name in visible_folders(images)):
            return _Place("classes", root, (images,))
    images = _folder_or_archive(root, "car_ims")
    if images is not None:
        if not (root / LABELS).is_file():
            raise DataError(f"{root} holds {images.name}, but not {LABELS}, which has its classes")
        return _Place("car_ims", root, (images,))
    parts = {name: _folder_or_archive(root, name) for name in ("cars_train", "cars_test")}
    if not any(parts.values()):
        return None
    missing = [name for name, images in parts.items() if images is None]
    if missing:
        raise DataError(f"{root} holds only one half of the images; {missing[0]}/ or {missing[0]}.tgz is missing")
    return _Place("devkit", root, tuple(parts.values()))


def _of_archive(archive):
    if archive.name in (*tar_names("cars_train"), *tar_names("cars_test")):
        raise DataError(f"{archive} is one part of the images: give the folder that holds all, {archive.parent}")
    if not (archive.parent / LABELS).is_file():
        raise DataError(f"{LABELS}, which has the classes of {archive}, is missing: expected it beside the archive")
    return _Place("car_ims", archive.parent, (archive,))


def _open_source(images, index_dir: str) -> ImageSource:
    """Images by the path that the annotations give: `car_ims/000001.jpg`; class folders by their own."""
    if images.name == "images":
        return folder_images(images, follow_links=False)
    anchor = images.name if images.is_dir() else images.name.partition(".")[0]
    anchor = anchor if anchor in ("cars_train", "cars_test") else "car_ims"
    source = (
        folder_images(images) if images.is_dir() else archive_images(images, list_members(images, index_dir), anchor)
    )
    files = {f"{anchor}/{path}": file for path, file in source.files.items()}
    return ImageSource(source.where, files, source.archive)


def _class_folder_rows(source: ImageSource):
    rows = []
    for path in sorted(source.files):
        name, _, file = path.partition("/")
        number = car_number(name) if file else None
        if number is None:
            raise DataError(
                f"{source.where} holds {name!r}, which is none of the 196 official classes, such as {CAR_NAMES[0]!r}"
            )
        rows.append((number, path, source.where))
    return rows


def _devkit_rows(root, index_dir: str):
    """Annotations of the kit, from its folder, its archive or the files beside it."""
    files = {name: find_file([root, root / "devkit"], [name]) for name in DEVKIT_LABELS}
    contents = {str(file): file.read_bytes() for file in files.values() if file is not None}
    kit = find_file([root], _DEVKITS)
    absent = [name for name, file in files.items() if file is None]
    if absent and kit is not None:
        names = [file.path for file in list_members(kit, index_dir)]
        inside = {name: member for name in absent for member in names if member.rpartition("/")[2] == name}
        contents |= {f"{kit}/{name}": content for name, content in read_members(kit, list(inside.values()))}
        absent = [name for name in absent if name not in inside]
    if absent:
        why = " (the kit's cars_test_annos.mat has no classes)" if "test" in absent[0] else ""
        raise DataError(
            f"the labels {absent[0]} are missing{why}: expected them in {root}, in {root / 'devkit'} or in "
            f"{_DEVKITS[0]}"
        )
    rows = []
    for where, content in contents.items():
        half = "cars_train" if "cars_train" in where.rpartition("/")[2] else "cars_test"
        for number, path, row_where in read_annotations(content, where):
            rows.append((number, f"{half}/{path.rpartition('/')[2]}", row_where))
    return rows
