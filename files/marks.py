"""What we have written a folder as: so that nobody takes it for data, and nothing else is written into it."""

from __future__ import annotations

from pathlib import Path

from .json_files import JsonError, read_json_object


RESULTS_NAME = "all_results.json"
STORE_FILE, INDEX_FILE, SPACE_FILE = "store.json", "index.json", "vptsp_space.json"
RUN = "the output_dir of a training run"
# File -> what a folder is that holds it, and the fields by which it is ours; none where the name says enough.
_MARKS = {
    RESULTS_NAME: (RUN, ()),
    STORE_FILE: ("a store of embeddings", ("format_version", "image_root")),
    INDEX_FILE: ("an index of embeddings", ("format_version", "image_root")),
    SPACE_FILE: ("a search page with copies of images", ()),
}


def written_as(folder) -> str | None:
    """What a folder is that this package wrote, in words; None for any other."""
    for name, (what, needed) in _MARKS.items():
        path = Path(folder) / name
        if path.is_file() and (not needed or set(needed) <= _fields(path)):
            return f"{what} (it holds {name})"
    return None


def _fields(path) -> set:
    try:
        return set(read_json_object(path))
    except (OSError, JsonError):
        return set()


__all__ = ["INDEX_FILE", "RESULTS_NAME", "RUN", "SPACE_FILE", "STORE_FILE", "written_as"]
