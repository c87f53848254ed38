"""Arrow tables that were prepared before: read, and prepared again where they can't be."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
from filelock import FileLock

from .data_errors import DataError
from .paths import usable_path


__all__ = ["prepared_tables"]

logger = logging.getLogger(__name__)


def prepared_tables(
    make: Callable[[], datasets.DatasetBuilder], cache_dir: str | None, config_id: str
) -> datasets.DatasetDict:
    """The tables of a builder. What a full disk or a crash has left of an earlier preparation is made anew.

    Args:
        make: Makes an [`ImageDatasetBuilder`]; it reads what is there already, and so may fail as well.
        cache_dir: Where tables are kept; None for where `datasets` does.
        config_id: What the folder of these tables is called.

    Returns:
        Per split its table.

    Raises:
        DataError: the data can't be read, or the tables can't be written; the message names the folder.
    """
    root = usable_path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    folders = [folder for folder in root.glob(f"*/{config_id}") if any(folder.rglob("dataset_info.json"))]
    if not folders:
        return _new_tables(make, root)
    try:
        return _tables(make)
    except DataError:
        raise
    except Exception:  # of `datasets`, pyarrow and json, on whatever lies there
        with FileLock(root / f".{config_id}.lock"):
            try:  # another process may have made them anew meanwhile
                return _tables(make)
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                logger.warning("the prepared tables in %s can't be read and are made anew (%s)", folders[0], reason)
            for folder in folders:
                shutil.rmtree(folder)
            return _new_tables(make, root)


def _new_tables(make: Callable[[], datasets.DatasetBuilder], root: Path) -> datasets.DatasetDict:
    try:
        return _tables(make)
    except OSError as error:
        raise DataError(
            f"the prepared tables can't be written to {root}: {error.strerror or error}; name another folder "
            "(data_cache_dir)"
        ) from error


def _tables(make: Callable[[], datasets.DatasetBuilder]) -> datasets.DatasetDict:
    try:
        builder = make()
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise
    tables = builder.as_dataset()
    for split, table in tables.items():  # rows of a tar file are in its own order
        found = table.with_format("arrow", columns=["label"])[:].column("label").to_pylist()
        if sorted(found) != sorted(builder.listing.splits[split].labels):
            raise ValueError(f"{split} has other rows than its files")
    return tables
