"""Which images and classes of a run were on which side: written beside its retriever, read when it is evaluated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.json_files import read_json_object
from .data_arguments import BUILDER_OPTIONS, DataArguments
from .data_errors import DataError
from .hub_places import TEST_REPOS, is_folder
from .image_names import image_names
from .paths import usable_path


__all__ = ["PLACES", "SPLITS_NAME", "has_seen_classes", "read_split_record", "record_splits"]

SPLITS_NAME = "splits.json"
"""Name of the file, in the folder of the run."""
PLACES = ("dataset_name", "data_dir", "data_cache_dir")
"""Options that say where the data of a run lies; with others the data are split anew."""


def has_seen_classes(args: DataArguments, splits: Mapping[str, Any]) -> bool:
    """Whether a run asks for classes that it trains on, by other images of them."""
    return args.class_split == "seen" and "query" in splits


def record_splits(args: DataArguments, splits: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to know of a run's data.

    Args:
        args: What it was loaded by.
        splits: Per split an `ImageDataset` or a `StreamedImages`.

    Returns:
        `data`: the arguments by which it can be loaded again; `seen_classes`; and per split its `classes`, each with
        the names of its images (null for a stream, which is not read for it), and the split's `fingerprint`.
    """
    options = {name: getattr(args, name) for name in (*PLACES, *BUILDER_OPTIONS, "validation_share")}
    folders = [name for name in TEST_REPOS.values() if is_folder(options[name])]
    for name in ["data_dir", *folders]:
        if options[name] is not None:
            options[name] = str(usable_path(options[name]).absolute())
    parts = {}
    for name, part in splits.items():
        part = getattr(part, "as_given", part)  # clusters change
        table = getattr(part, "hf_dataset", None)
        classes: dict[str, list[str] | None] = dict.fromkeys(part.class_names)
        if table is not None:
            classes = {class_name: [] for class_name in part.class_names}
            for image, label in zip(image_names(table, args.data_dir).names, part.labels.tolist(), strict=True):
                classes[part.class_names[label]].append(image)
        parts[name] = {"fingerprint": part.fingerprint(), "classes": classes}
    return {"data": options, "seen_classes": has_seen_classes(args, splits), "splits": parts}


def read_split_record(folder: str | Path) -> dict[str, Any] | None:
    """What `record_splits` gave, from the folder of a run; None where there is none.

    Raises:
        DataError: it can't be read.
    """
    path = Path(folder) / SPLITS_NAME
    if not path.is_file():
        return None
    try:
        record = read_json_object(path)
        record["data"]["dataset_name"], record["splits"]["train"]["classes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} can't be read: expected what a run writes there ({type(error).__name__}: {error})"
        ) from error
    return record
