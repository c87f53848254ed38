"""Reading tables of images: what kind a place is, and the rows of CSV, TSV and JSONL files, each with its line.

CSV goes by Python's own reader, as what reads whole tables at once guesses types (and loses leading zeros), fills
short lines up and does not know their numbers. Nothing here imports torch or `datasets`.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.json_files import without_duplicates
from .class_folders import existing_folder, visible_folders
from .data_errors import DataError, some
from .paths import usable_path


__all__ = [
    "TABLE_ENDINGS",
    "TextTable",
    "is_saved_folder",
    "is_table_file",
    "is_table_folder",
    "listed_paths",
    "metadata_files",
    "missing_text",
    "read_text_table",
    "refuse_table",
    "shortened",
    "table_kind",
]

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow")
LIST_ENDING = ".txt"
"""Of a table that has a path per line and nothing else."""
_SAVED_FILES = ("dataset_dict.json", "state.json")
"""What `save_to_disk` of `datasets` writes."""
_METADATA = tuple(f"metadata{ending}" for ending in (".csv", ".jsonl", ".parquet"))


@dataclass
class TextTable:
    """A table that was read.

    Attributes:
        name: Of the file, for errors.
        root: Folder that paths in it are relative to.
        columns: Per column its values; texts of CSV are stripped.
        lines: Per row the line on which it ends.
    """

    name: str
    root: Path
    columns: dict[str, list[Any]]
    lines: list[int] = field(default_factory=list)

    def place(self, row: int) -> str:
        """File and line of a row."""
        return f"{self.name}:{self.lines[row]}"


def is_table_file(place: str | Path) -> bool:
    """Whether this is the name of a table."""
    return Path(place).suffix.lower() in TABLE_ENDINGS


def metadata_files(folder: Path) -> dict[str, Path]:
    """The tables of an imagefolder: its `metadata.csv` (or .jsonl, .parquet) under "", or those of its folders.

    Raises:
        DataError: a folder has two, or only some of the folders have one.
    """
    found = {}
    for name, place in {"": folder, **visible_folders(folder)}.items():
        there = [place / file for file in _METADATA if (place / file).is_file()]
        if len(there) > 1:
            raise DataError(f"{place} has {some([path.name for path in there])}: expected one of them")
        if there:
            found[name] = there[0]
        if "" in found:
            return found
    without = [name for name in visible_folders(folder) if name not in found]
    if found and without:
        raise DataError(
            f"{folder}: {some(found)} have a metadata file, {some(without)} have none; expected one in each"
        )
    return found


def table_kind(place: str | Path | None) -> str:
    """What kind of table a place holds, from names alone.

    Args:
        place: A file, or a folder.

    Returns:
        `file`, `saved` (by `save_to_disk`), `metadata` (an imagefolder) or `parquet` (a folder of Parquet files).

    Raises:
        DataError: there is nothing, or nothing of these kinds.
    """
    if place is None or not str(place):
        raise DataError(f"data_dir is missing: give a table ({', '.join(TABLE_ENDINGS)}) or a folder with one")
    path = usable_path(place)
    if path.is_file():
        if not is_table_file(path) and path.suffix.lower() != LIST_ENDING:
            raise DataError(f"{path} is no table: expected a file ending in {', '.join(TABLE_ENDINGS)}")
        return "file"
    folder = existing_folder(place)
    if is_saved_folder(folder):
        return "saved"
    if metadata_files(folder):
        return "metadata"
    if any(folder.glob("*.parquet")) or any(folder.glob("*/*.parquet")):
        return "parquet"
    raise DataError(
        f"{folder} holds no table: expected metadata.csv (or .jsonl, .parquet) beside the images, Parquet files, or "
        "what save_to_disk of datasets wrote; class folders are dataset_name 'folder'"
    )


def is_table_folder(folder: str | Path) -> bool:
    """Whether a folder is what `save_to_disk` wrote, or has metadata beside its images."""
    return is_saved_folder(folder) or any((Path(folder) / name).is_file() for name in _METADATA)


def is_saved_folder(folder: str | Path) -> bool:
    """Whether a folder is what `save_to_disk` wrote."""
    return any((Path(folder) / name).is_file() for name in _SAVED_FILES)


def refuse_table(place: str | Path | None) -> None:
    """Say which data set reads a place that is no folder of class folders.

    Raises:
        DataError: it is a table, or what `save_to_disk` wrote.
    """
    if place is None or not str(place):  # which others refuse
        return
    path = usable_path(place)
    if path.is_file() and is_table_file(path):
        raise DataError(f"data_dir must be a folder, but {path} is a table: give --dataset_name table")
    if is_saved_folder(path):
        raise DataError(f"{path} is what save_to_disk of datasets wrote: give --dataset_name saved")
    metadata = next((path / name for name in _METADATA if place and (path / name).is_file()), None)
    if metadata is not None:
        raise DataError(
            f"{path} is an imagefolder with {metadata.name}: give --dataset_name imagefolder, or move that file away "
            "to take its folders as classes"
        )


def read_text_table(path: Path) -> TextTable:
    """Read a CSV, TSV or JSONL file, or a list with a path per line: its column is `image`.

    Raises:
        DataError: it can't be read, is not UTF-8, has no rows, or a line has another number of values or is no JSON
            object; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: the line is not valid UTF-8: save the table as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error
    readers = {".jsonl": _read_json_lines, ".ndjson": _read_json_lines, LIST_ENDING: _read_list}
    read = readers.get(path.suffix.lower(), _read_csv)
    columns, lines = read(text, path)
    if not lines:
        raise DataError(f"{path} has no rows")
    return TextTable(str(path), path.parent, columns, lines)


def _read_csv(text: str, path: Path) -> tuple[dict[str, list[str]], list[int]]:
    header = text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)  # spreadsheets write ; too
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, lines = [], []
    try:
        names = [name.strip() for name in next(reader, [])]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or "" in names:
            raise DataError(
                f"{path}:1: each column must have a name of its own, got {some(twice or ['an empty one'])}"
            )
        for row in reader:
            if not any(map(str.strip, row)):
                continue
            if len(row) != len(names):
                raise DataError(
                    f"{path}:{reader.line_num}: {len(row)} values for the {len(names)} columns {', '.join(names)}"
                )
            rows.append([value.strip() for value in row])
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from error
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}, lines


def listed_paths(text: str) -> tuple[list[str], list[int]]:
    """The paths of a list, one on each line, and their lines; empty lines and those that begin with `#` name none."""
    numbered = [(line.strip(), number) for number, line in enumerate(text.splitlines(), 1)]
    numbered = [(path, number) for path, number in numbered if path and not path.startswith("#")]
    return [path for path, _ in numbered], [number for _, number in numbered]


def _read_list(text: str, path: Path) -> tuple[dict[str, list[str]], list[int]]:
    paths, lines = listed_paths(text)
    return {"image": paths}, lines


def _read_json_lines(text: str, path: Path) -> tuple[dict[str, list[Any]], list[int]]:
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold what `splitlines` takes for the end of a line
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=without_duplicates)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected a JSON object per line, got {line.strip()[:60]}")
        rows.append(row)
        lines.append(number)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}, lines


def shortened(text: str) -> str:
    """A text for a message, quoted."""
    return repr(text if len(text) <= 200 else f"{text[:100]}...{text[-50:]}")


def missing_text(names: Sequence[str], places: Sequence[str], total: int, where: str) -> str:
    """What is said of images that a table names and that are not there."""
    shown = ", ".join(f"{shortened(name)} ({place})" for name, place in zip(names[:5], places, strict=False))
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{len(names):,} of the {total:,} images that {where} names are not there: {shown}{more}"
