"""CUB-200-2011 (Wah et al., 2011): 200 kinds of birds, of which the first 100 train and the last 100 test.

Layouts:

    images/001.Black_footed_Albatross/*.jpg      under CUB_200_2011/, as the official archive unpacks to
    CUB_200_2011.tgz                             the official archive itself, also as .tar.gz, .tar or .zip, or
                                                 called cub200.tar
"""

import logging
import re

from ..archives import list_members
from ..builder import BenchmarkConfig, ImageDatasetBuilder
from ..class_folders import visible_folders
from ..data_errors import DataError
from ..listing import SplitCounts, SplitListing
from ..sources import Entry, archive_images, find_file, folder_images, list_benchmark, locate, tar_names


__all__ = ["CUB200", "CUB_COUNTS"]

logger = logging.getLogger(__name__)

CUB_COUNTS = {"train": SplitCounts(5864, 100), "test": SplitCounts(5924, 100)}
LAST_TRAIN_CLASS = 100
_CLASS_FOLDER = re.compile(r"(\d{3})\..+")
_ARCHIVES = tuple(name for title in ("CUB_200_2011", "cub200") for name in (*tar_names(title), f"{title}.zip"))


class CUB200(ImageDatasetBuilder):
    """CUB-200-2011.

    `data_dir` is the folder that holds `images/` (named `CUB_200_2011` in the archive), the one above, the one with
    the archive, or the archive. The number in a folder's name is the official class id; labels follow it. Ids up to
    100 train, the others test.

    Raises:
        DataError: no class folders (the message says which folder was meant), a folder among them that is not named
            like a class, two folders with one id, or, unless `verify_counts=False`, counts that are not the
            published ones.
    """

    BUILDER_CONFIG_CLASS = BenchmarkConfig
    DESCRIPTION = "CUB-200-2011: 200 kinds of birds; the first 100 train, the last 100 test."

    @classmethod
    def _list(cls, config: BenchmarkConfig) -> SplitListing:
        place = locate(
            config.data_dir,
            _find,
            lambda archive: archive,
            "images/, CUB_200_2011/images/ (with folders like '001.Black_footed_Albatross'), cub200.tar or "
            "CUB_200_2011.tgz",
        )
        source = (
            folder_images(place, follow_links=False)
            if place.is_dir()
            else archive_images(place, list_members(place, config.index_dir), "images")
        )
        folders: dict[int, str] = {}
        entries: dict[str, list[Entry]] = {"train": [], "test": []}
        for path in source.files:
            name, _, file = path.partition("/")
            if not file:
                logger.warning("%s: the image %r lies beside the class folders and is left out", source.where, name)
                continue
            match = _CLASS_FOLDER.fullmatch(name)
            if match is None:
                raise DataError(
                    f"{source.where} holds the folder {name!r}; expected only class folders named like "
                    "'001.Black_footed_Albatross'"
                )
            class_id = int(match[1])
            if folders.setdefault(class_id, name) != name:
                raise DataError(
                    f"{source.where} holds two folders of class {class_id}: {folders[class_id]!r} and {name!r}"
                )
            split = "train" if class_id <= LAST_TRAIN_CLASS else "test"
            entries[split].append(Entry(class_id, name, path, source.where))
        for rows in entries.values():
            rows.sort(key=lambda entry: entry.path)
        return list_benchmark(
            entries,
            [source],
            dataset="cub",
            title="CUB-200-2011",
            counts=CUB_COUNTS if config.verify_counts else None,
            version=str(cls.VERSION),
        )


def _find(root):
    for folder in (root / "images", root / "CUB_200_2011" / "images"):
        if folder.is_dir() and any(_CLASS_FOLDER.fullmatch(name) for name in visible_folders(folder)):
            return folder
    return find_file([root], _ARCHIVES)
