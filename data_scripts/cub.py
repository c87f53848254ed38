"""CUB-200-2011 (Wah et al., 2011): 200 kinds of birds, of which the first 100 train and the last 100 test.

Layout: `images/001.Black_footed_Albatross/*.jpg`, as the official archive unpacks to.
"""

import re
from dataclasses import dataclass

from .builder import ImageDatasetBuilder, ImageDatasetConfig
from .class_folders import existing_folder, scan_class_folders, visible_folders
from .errors import DataError
from .listing import SplitCounts, SplitListing, make_listing, verify_split_counts


__all__ = ["CUB200", "CUB_COUNTS", "CUB200Config"]

CUB_COUNTS = {"train": SplitCounts(5864, 100), "test": SplitCounts(5924, 100)}
LAST_TRAIN_CLASS = 100
_CLASS_FOLDER = re.compile(r"(\d{3})\..+")


@dataclass
class CUB200Config(ImageDatasetConfig):
    """Options of `CUB200`.

    Attributes:
        verify_counts: Whether the images and classes of each split must be those of the published split.
    """

    verify_counts: bool = True


class CUB200(ImageDatasetBuilder):
    """CUB-200-2011, unpacked.

    `data_dir` is the folder that holds `images/` (named `CUB_200_2011` in the archive), or the one above. The number
    in a folder's name is the official class id; labels follow it. Ids up to 100 train, the others test.

    Raises:
        DataError: no `images` folder (the message says which was meant), a folder in it that is not named like a
            class, two folders with one id, or, unless `verify_counts=False`, counts that are not the published ones.
    """

    BUILDER_CONFIG_CLASS = CUB200Config
    DESCRIPTION = "CUB-200-2011: 200 kinds of birds; the first 100 train, the last 100 test."

    @classmethod
    def _list(cls, config: CUB200Config) -> SplitListing:
        images = _find_images_folder(config.data_dir)
        classes = scan_class_folders(images)
        by_id: dict[int, str] = {}
        for name in classes:
            match = _CLASS_FOLDER.fullmatch(name)
            if match is None:
                raise DataError(
                    f"{images} holds the folder {name!r}; expected only class folders named like "
                    "'001.Black_footed_Albatross'"
                )
            class_id = int(match[1])
            if class_id in by_id:
                raise DataError(f"{images} holds two folders of class {class_id}: {by_id[class_id]!r} and {name!r}")
            by_id[class_id] = name
        class_names = {
            "train": [by_id[i] for i in sorted(by_id) if i <= LAST_TRAIN_CLASS],
            "test": [by_id[i] for i in sorted(by_id) if i > LAST_TRAIN_CLASS],
        }
        listing = make_listing(
            dict.fromkeys(("train", "test"), (str(images), classes)),
            class_names,
            {"dataset": "cub", "version": str(cls.VERSION)},
        )
        if config.verify_counts:
            verify_split_counts(listing, CUB_COUNTS, "CUB-200-2011", str(images))
        for group, names in class_names.items():
            if not names:
                raise DataError(
                    f"{images} holds no {group} class; ids 1 to {LAST_TRAIN_CLASS} train, higher ones test, found "
                    f"{min(by_id)} to {max(by_id)}"
                )
        return listing


def _find_images_folder(data_dir: str | None):
    root = existing_folder(data_dir)
    for folder in (root / "images", root / "CUB_200_2011" / "images"):
        if folder.is_dir():
            return folder
    below = visible_folders(root)
    if any(_CLASS_FOLDER.fullmatch(name) for name in below):
        raise DataError(f"{root} holds the class folders themselves, one level too low: did you mean {root.parent}?")
    for folder in below.values():
        if (folder / "CUB_200_2011" / "images").is_dir() or (folder / "images").is_dir():
            raise DataError(f"{root} is too high: did you mean {folder}?")
    raise DataError(f"expected images/ or CUB_200_2011/images/ in {root}; found {', '.join(below) or 'no folders'}")
