"""What a data set holds, before a row is written: splits, files, labels, class names and a fingerprint.

Every builder makes one `SplitListing`. Nothing here imports torch or `datasets`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import DataError
from .images import ImageFile


__all__ = ["GROUP_SPLITS", "SplitCounts", "SplitListing", "SplitRows", "make_listing", "verify_split_counts"]

GROUP_SPLITS = {"train": ("train",), "test": ("test", "query", "gallery")}
"""Splits that share one set of classes, and so one numbering of labels."""


class SplitRows(NamedTuple):
    """The rows of one split.

    Attributes:
        files: n paths; absolute for files on disk.
        labels: n ints in 0..C-1, C the number of classes of the split's group.
    """

    files: list[str]
    labels: list[int]


class SplitCounts(NamedTuple):
    """How many images and classes a split has."""

    images: int
    classes: int


@dataclass(frozen=True)
class SplitListing:
    """All splits of a data set.

    Attributes:
        class_names: Per group (`train`, `test`) the class names, position = label.
        splits: Per split (`train`, and `test` or `query` and `gallery`) its rows.
        fingerprint: Hex digest of the rows, of each file's size and time of change, and of the options. Prepared
            data is found by it, so it can't be stale.
    """

    class_names: Mapping[str, list[str]]
    splits: Mapping[str, SplitRows]
    fingerprint: str

    def group_splits(self, group: str) -> dict[str, SplitRows]:
        """The splits of one group that this data set has."""
        return {name: self.splits[name] for name in GROUP_SPLITS[group] if name in self.splits}

    def counts(self, split: str) -> SplitCounts:
        """Images, and classes that have an image, of a split."""
        rows = self.splits[split]
        return SplitCounts(len(rows.labels), len(set(rows.labels)))


def make_listing(
    folders: Mapping[str, tuple[str, Mapping[str, Sequence[ImageFile]]]],
    class_names: Mapping[str, Sequence[str]],
    options: Mapping[str, Any],
) -> SplitListing:
    """Build a `SplitListing` from files on disk.

    Args:
        folders: Per split, the absolute path of the folder above its class folders, and per class folder (named as
            the class) its files.
        class_names: Per group, the classes in label order. Classes of a split that are not in here are left out.
        options: What else the prepared data depends on (JSON values).

    Returns:
        The listing; rows in class order, then as the files are given.
    """
    digest = hashlib.sha256(json.dumps({"options": dict(options)}, sort_keys=True, default=str).encode())
    splits = {}
    for group, split_names in GROUP_SPLITS.items():
        for split in split_names:
            if split not in folders:
                continue
            root, classes = folders[split]
            rows = SplitRows([], [])
            digest.update(f"\0split {split} {root}\0".encode())
            for label, class_name in enumerate(class_names[group]):
                digest.update(f"\0class {class_name}\0".encode())
                for file in classes.get(class_name, ()):
                    rows.files.append(f"{root}/{class_name}/{file.path}")
                    rows.labels.append(label)
                    digest.update(f"{file.path}\0{file.size}\0{file.mtime_ns}\0".encode())
            splits[split] = rows
    names = {group: list(names) for group, names in class_names.items()}
    return SplitListing(names, splits, digest.hexdigest()[:32])


def verify_split_counts(listing: SplitListing, expected: Mapping[str, SplitCounts], dataset: str, where: str) -> None:
    """Check the size of every split against the published one.

    Args:
        listing: What was found.
        expected: Published counts per split.
        dataset: Name, for the error.
        where: Folder, for the error.

    Raises:
        DataError: a count differs; the message gives found and expected per split, and the way round.
    """
    wrong = []
    for split, want in expected.items():
        found = listing.counts(split) if split in listing.splits else SplitCounts(0, 0)
        if found != want:
            wrong.append(
                f"{split}: found {found.images:,} images of {found.classes:,} classes, "
                f"expected {want.images:,} of {want.classes:,}"
            )
    if wrong:
        raise DataError(
            f"{dataset} in {where} is not complete, or holds files that are not part of it: {'; '.join(wrong)}. "
            "Unpack the official archive again, or give verify_counts=False to use a subset"
        )
