"""Any folder of class folders.

Layouts (`layout="auto"` tells them by the names of the folders):

    classes          root/<class>/**/*.jpg                       classes are split by options
    train_test       root/train/<class>/..., root/test/<class>/...
    query_gallery    root/train/..., root/query/..., root/gallery/...

With `labels="none"` the folders of training images say nothing: they may lie anywhere below `root/train`, or without
splits anywhere below `root`, and then all train unless `test_labels` asks for a test of class folders. With
`labels="partial"` images that lie directly in `root/train`, or without splits in `root`, have no class.

A class may have a single image. In training it fills its places in a batch by repeating; in a test split it is a query
that nothing can answer, which the metrics leave out and count. Class names sort by code point: `10` comes before `2`.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .builder import ClassSplitConfig, ImageDatasetBuilder
from .class_folders import (
    detect_layout,
    everything_trains,
    existing_folder,
    scan_class_folders,
    scan_split_folders,
)
from .data_errors import DataError, some
from .dataset_options import LabelOptions, LayoutOptions
from .image_files import ImageFile, list_images, say_shared_files
from .labels import UNLABELLED
from .listing import FileRow, SplitListing, make_listing, make_row_listing
from .table_files import refuse_table


__all__ = ["ImageFolders", "ImageFoldersConfig"]

logger = logging.getLogger(__name__)


@dataclass
class ImageFoldersConfig(LayoutOptions, LabelOptions, ClassSplitConfig):
    """What `ImageFolders` is configured by."""


class ImageFolders(ImageDatasetBuilder):
    """Images in class folders; see the module for the layouts, `ImageDatasetBuilder` for the arguments.

    Class folders without images are left out with a warning that names them (and do not count as a position in a
    class split). So are images beside class folders, and folders that are no part of the layout.

    Raises:
        DataError: `data_dir` is missing, empty, one level too high or too low, or holds one class only; there is no
            training or no test class; a class named in an option is unknown; classes are in training and test; query
            and gallery share no class; class-split options are given where the folders already say the split.
    """

    BUILDER_CONFIG_CLASS = ImageFoldersConfig
    DESCRIPTION = "Images in class folders, split so that training and test classes are disjoint."

    @classmethod
    def _list(cls, config: ImageFoldersConfig) -> SplitListing:
        listing = cls._list_layout(config)
        sides = {name: rows.files for name, rows in listing.splits.items() if name != "gallery" or not config.seen}
        say_shared_files(str(config.data_dir), sides.pop("train"), itertools.chain(*sides.values()))
        return listing

    @classmethod
    def _list_layout(cls, config: ImageFoldersConfig) -> SplitListing:
        refuse_table(config.data_dir)
        root = existing_folder(config.data_dir)
        if everything_trains(root, config):
            return _everything_trains(root, config, str(cls.VERSION))
        layout = detect_layout(root, config.layout)
        options = {"dataset": "folder", "layout": layout, "labels": config.labels, "version": str(cls.VERSION)}
        if layout == "classes" and config.labels == "partial":
            return _partly_labelled(root, config, options)
        if layout == "classes":
            classes = scan_class_folders(root)
            if len(classes) == 1:
                raise DataError(
                    f"{root} holds one class only ({next(iter(classes))!r}); expected at least two, one to "
                    "train on and one to test on"
                )
            splits, class_names = config.split_files(classes)
            _warn_of_few_classes(class_names["test"], str(root))
            options |= {"train_classes": class_names["train"], "test_classes": class_names["test"]}
            return make_listing({name: (str(root), part) for name, part in splits.items()}, class_names, options)
        config.refuse_split(
            f"the classes of the layout 'classes', but {root} has the layout {layout!r}, whose folders already say "
            "which classes train and which test"
        )
        if config.labels != "given" and (config.seen or config.test_labels):
            option = "class_split 'seen'" if config.seen else "test_labels"
            raise DataError(
                f"{option} splits labelled images, but with labels {config.labels} {root} has a test of its own"
            )
        found = scan_split_folders(root, layout, config.labels)
        if config.seen and layout == "train_test":
            found = {"train": found["train"], "query": found["test"], "gallery": found["train"]}
        class_names = {
            "train": sorted(found["train"][1]),
            "test": sorted({name for split in found if split != "train" for name in found[split][1]}),
        }
        shared = sorted(set(class_names["train"]) & set(class_names["test"]))
        if shared and not config.seen:
            raise DataError(
                f"{len(shared)} classes of {root} are in both training and test ({some(shared)}); they must be "
                "disjoint: retrieval is tested on classes that were never trained on. class_split 'seen' tests known "
                "classes, by other images of them"
            )
        if "query" in found:
            _check_queries(found["query"][1], found["gallery"][1], str(root))
        else:
            _warn_of_few_classes(class_names["test"], str(root))
        if config.labels != "given":
            rows = {split: _rows(folder, classes) for split, (folder, classes) in found.items()}
            return make_row_listing(rows, class_names, options)
        return make_listing(
            {split: (str(folder), classes) for split, (folder, classes) in found.items()}, class_names, options
        )


def _rows(folder: Path, classes: Mapping[str, Sequence[ImageFile]]) -> Iterator[FileRow]:
    """The images of a split folder; those of no class lie directly in it, or anywhere."""
    for class_name, files in classes.items():
        place = folder if class_name == UNLABELLED else folder / class_name
        for file in files:
            yield FileRow(class_name, f"{place}/{file.path}", file.size, file.mtime_ns)


def _partly_labelled(root: Path, config: ImageFoldersConfig, options: dict) -> SplitListing:
    """Class folders and images beside them, of no class: all train, as nothing says which of them test."""
    if config.seen:
        raise DataError(
            f"class_split 'seen' splits labelled images, but with labels partial all images of {root} train"
        )
    config.refuse_split(f"classes, but with labels partial all images of {root} train; put those that test into test/")
    classes = scan_class_folders(root, partial=True)
    return make_row_listing({"train": _rows(root, classes)}, {"train": sorted(classes), "test": []}, options)


def _everything_trains(root: Path, config: ImageFoldersConfig, version: str) -> SplitListing:
    """All images below a folder, of no class, to train on; there is no test."""
    config.refuse_split(f"classes, but with labels none all images of {root} train; test_labels true splits them off")
    files = list_images(root)
    if not files:
        raise DataError(f"no images in {root}; expected files ending in .jpg, .png or another known image extension")
    class_names = {"train": [UNLABELLED], "test": []}
    options = {"dataset": "folder", "layout": "classes", "labels": config.labels, "version": version}
    return make_row_listing({"train": _rows(root, {UNLABELLED: files})}, class_names, options)


def _check_queries(query: Mapping[str, Sequence], gallery: Mapping[str, Sequence], root: str) -> None:
    lone = sorted(set(query) - set(gallery))
    if len(lone) == len(query):
        raise DataError(
            f"query and gallery of {root} share no class name: {some(sorted(query))} against {some(sorted(gallery))}"
        )
    if lone:
        logger.warning(
            "%s: %d query classes have no image in the gallery, their queries can't be answered: %s",
            root,
            len(lone),
            some(lone),
        )


def _warn_of_few_classes(test_classes: Sequence[str], root: str) -> None:
    if len(test_classes) == 1:
        logger.warning("%s: there is one test class, so every neighbour is right and scores mean nothing", root)
