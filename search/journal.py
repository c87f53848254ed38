"""Changes to an index that are on the disk long before the index is saved as a whole.

Saving an index writes all of it. A service that takes single changes appends each to `journal.jsonl` beside the index
instead, waits until the disk has it, and only then says that it is done. Opening the index reads the journal after its
files; saving the index makes the journal superfluous and deletes it.

The first line names the save that the changes come after; each further line is one change, and begins with a digest.
A last line without an end was never acknowledged, and doesn't count. Who appends holds the index's lock.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np

from ..data_scripts.data_errors import DataError
from ..files.atomic import sync_path


JOURNAL_FILE = "journal.jsonl"

logger = logging.getLogger(__name__)


class Journal:
    """The journal of an index's folder, to append to; see [`Journal.open`].

    Args:
        path: Its file.
        state: Of the index's last save, as JSON holds it.
        count: Changes that it holds.
    """

    def __init__(self, path, state, count):
        self.path = path
        self.state = state
        self.count = count
        self._before = None  # size without the last change

    @classmethod
    def open(cls, folder, state):
        """Go on with the journal of a folder, or begin one with the first change. The caller holds the index's lock.

        Args:
            folder: Of the index.
            state: `IndexInfo.state` of its last save.

        Raises:
            DataError: as for [`read_journal`].
        """
        path = Path(folder) / JOURNAL_FILE
        changes, size = read_journal(folder, state)
        if path.exists() and path.stat().st_size > size:
            logger.warning("%s ends in a change that was never acknowledged: it is dropped", path)
            os.truncate(path, size)
        return cls(path, _as_json_holds_it(state), len(changes))

    @property
    def size(self):
        """Bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, change):
        """Write a change, and wait until it is on the disk.

        Args:
            change: List of steps; see [`apply_change`]. All of them will be there, or none.

        Raises:
            OSError: it could not be written; then the journal is as it was.
        """
        before = self.size
        lines = b"" if before else _line({"after": self.state})
        try:
            with self.path.open("ab") as file:
                file.write(lines + _line(change))
                file.flush()
                os.fsync(file.fileno())
            if not before:
                sync_path(self.path.parent)
        except OSError:
            if self.path.exists():
                os.truncate(self.path, before)
            raise
        self.count += 1
        self._before = before

    def undo(self):
        """Take the change that was appended last out again."""
        os.truncate(self.path, self._before)
        sync_path(self.path)
        self.count -= 1


def read_journal(folder, state):
    """Changes since the last save.

    Args:
        folder: Of the index.
        state: `IndexInfo.state` of that save. A journal of another save is one that a later save has taken in.

    Returns:
        changes: List, in order.
        size: Bytes of the file that they take, with its first line; what lies behind was never acknowledged.

    Raises:
        DataError: it is damaged.
    """
    path = Path(folder) / JOURNAL_FILE
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    if not lines:
        return [], 0
    records = [_parse(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]
    if not isinstance(records[0], dict) or set(records[0]) != {"after"}:
        raise DataError(f"{path} doesn't say which save of the index it comes after: it is damaged")
    if records[0]["after"] != _as_json_holds_it(state):
        return [], 0
    return records[1:], sum(len(line) + 1 for line in lines)


def apply_change(index, change):
    """Do a change of the journal.

    Args:
        index: [`RetrievalIndex`].
        change: List of steps: dicts of `step`, the name of a method (`add_source`, `add`, `update`, `remove`), and its
            arguments; embeddings are encoded by [`encode_embeddings`].

    Raises:
        ValueError: the index can't take it.
    """
    for step in change:
        arguments = {key: value for key, value in step.items() if key != "step"}
        if "embeddings" in arguments:
            arguments["embeddings"] = _decode_embeddings(arguments["embeddings"], index.embedding_dim)
        {"add_source": index.add_source, "add": index.add, "update": index.update, "remove": index.remove}[
            step["step"]
        ](**arguments)


def encode_embeddings(embeddings):
    """`(n, E)` float32 tensor on the CPU as text, to the bit."""
    return base64.b64encode(embeddings.numpy().astype("<f4").tobytes()).decode()


def _decode_embeddings(text, embedding_dim):
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(-1, embedding_dim).copy()


def _as_json_holds_it(state):
    return json.loads(json.dumps(state))


def _line(record):
    text = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    return hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n"


def _parse(line, where):
    digest, _, text = line.partition(b" ")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise DataError(f"{where} is damaged: it is not what its checksum says")
    return json.loads(text)


__all__ = ["JOURNAL_FILE", "Journal", "apply_change", "encode_embeddings", "read_journal"]
