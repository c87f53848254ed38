"""iNaturalist 2018 (Van Horn et al., CVPR 2018), split into 5,690 training and 2,452 test species by two lists.

Layouts (the lists are those of Brown et al., "Smooth-AP", ECCV 2020, and may lie in a folder of their own beside the
images, such as `Inat_dataset_splits/`; so may the images):

    Inaturalist_train_set1.txt, Inaturalist_test_set1.txt, train_val2018/Aves/2761/*.jpg, ...
    Inaturalist_train_set1.txt, Inaturalist_test_set1.txt, train_val2018.tar.gz       the official archive itself
"""

from typing import NamedTuple

from ..archives import list_members
from ..builder import BenchmarkConfig, ImageDatasetBuilder
from ..class_folders import visible_folders
from ..data_errors import DataError
from ..listing import SplitCounts, SplitListing
from ..sources import (
    Entry,
    archive_images,
    find_file,
    find_list,
    folder_images,
    list_benchmark,
    list_path,
    locate,
    parse_list,
    refuse_repeats,
)


__all__ = ["INATURALIST_COUNTS", "INaturalist2018"]

INATURALIST_COUNTS = {"train": SplitCounts(325846, 5690), "test": SplitCounts(136093, 2452)}
LISTS = {"train": "Inaturalist_train_set1.txt", "test": "Inaturalist_test_set1.txt"}
_SPLITS = "Inat_dataset_splits"
_TOP = "train_val2018"
_ARCHIVES = (f"{_TOP}.tar.gz", f"{_TOP}.tgz", f"{_TOP}.tar", f"{_TOP}.zip")


class _Place(NamedTuple):
    images: object
    lists: dict


class INaturalist2018(ImageDatasetBuilder):
    """iNaturalist 2018.

    `data_dir` is the folder that holds the two lists and `train_val2018/` or its archive (either may lie in a folder
    of its own there), or the archive. A class is
    the last two folders above the file (`Aves/2761`); labels follow the number in it, the official category id.

    Raises:
        DataError: lists or images not found (the message says which folder was meant), a line that can't be read, an
            image named twice, a class in both lists, or, unless `verify_counts=False`, missing images or counts that
            are not the published ones.
    """

    BUILDER_CONFIG_CLASS = BenchmarkConfig
    DESCRIPTION = "iNaturalist 2018: 461,939 images of 8,142 species; 5,690 train, 2,452 test."

    @classmethod
    def _list(cls, config: BenchmarkConfig) -> SplitListing:
        place = locate(
            config.data_dir, _find, _beside, f"{' and '.join(LISTS.values())}, and {_TOP}/ or {_TOP}.tar.gz"
        )
        entries = {split: list(_parse(file.read_bytes(), str(file))) for split, file in place.lists.items()}
        refuse_repeats(entries)
        if place.images.is_dir():
            source = folder_images(place.images)
        else:
            source = archive_images(place.images, list_members(place.images, config.index_dir), _TOP)
        return list_benchmark(
            entries,
            [source],
            dataset="inaturalist",
            title="iNaturalist 2018",
            counts=INATURALIST_COUNTS if config.verify_counts else None,
            version=str(cls.VERSION),
        )


def _find_lists(root) -> dict | None:
    lists = {split: find_list(root, [name], [_SPLITS]) for split, name in LISTS.items()}
    if not any(lists.values()):
        return None
    for split, file in lists.items():
        if file is None:
            raise DataError(f"{root} holds only one of the lists; {LISTS[split]} is missing")
    return lists


def _images(folder):
    return folder / _TOP if (folder / _TOP).is_dir() else find_file([folder], _ARCHIVES)


def _find(root):
    """The images lie in `root`, or in a folder there beside that of the lists (with them, that is the data set)."""
    lists = _find_lists(root)
    if lists is None:
        return None
    beside = [folder for folder in visible_folders(root).values() if folder not in {x.parent for x in lists.values()}]
    found = [images for folder in (root, *beside) if (images := _images(folder)) is not None]
    if not found:
        raise DataError(
            f"{root} holds the lists, but no images: expected {_TOP}/ or {_TOP}.tar.gz there or in a folder there"
        )
    return _Place(found[0], lists)


def _beside(archive):
    lists = _find_lists(archive.parent)
    if lists is None:
        raise DataError(
            f"the lists are missing: expected {' and '.join(LISTS.values())} beside {archive}, or in a folder there"
        )
    return _Place(archive, lists)


def _parse(content: bytes, where: str):
    """Lines of one path each; what stands before its last three parts doesn't matter."""
    for line_where, line in parse_list(content, where):
        parts = list_path(line.lstrip("/"), line_where).split("/")
        if len(parts) < 3 or not parts[-2].isdecimal():
            raise DataError(
                f"{line_where}: expected a path like train_val2018/Aves/2761/<image>.jpg, whose last folder is the "
                f"number of a category; got {line!r}"
            )
        yield Entry((int(parts[-2]), parts[-3]), "/".join(parts[-3:-1]), "/".join(parts[-3:]), line_where)
