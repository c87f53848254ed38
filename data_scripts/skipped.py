"""A list of names that grows in worker processes and is read in the main one."""

import json
import logging
import os
import tempfile
import weakref
from pathlib import Path


__all__ = ["SkippedImages"]

logger = logging.getLogger(__name__)


class SkippedImages:
    """Names of images that could not be read, each once.

    They are kept in a temporary file, to which every process appends; it goes when the object that made it does. So
    the list is complete whichever worker met an image, and whether workers were forked or spawned. Each rank has its
    own.
    """

    def __init__(self):
        descriptor, self._path = tempfile.mkstemp(prefix="vptsp-skipped-", suffix=".jsonl")
        os.close(descriptor)
        self._known = set()
        weakref.finalize(self, _remove, self._path, os.getpid())

    def add(self, name: str) -> None:
        """Note an image; says so in the log the first time that this process meets it."""
        if name in self._known:
            return
        self._known.add(name)
        logger.warning("%s can't be read and is skipped", name)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, (json.dumps(name) + "\n").encode())  # one short write, so lines don't mix
        finally:
            os.close(descriptor)

    def names(self) -> list[str]:
        """All names so far, sorted."""
        with Path(self._path).open(encoding="utf-8") as lines:
            return sorted({json.loads(line) for line in lines if line.endswith("\n")})


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker's copy must not take the file away
        Path(path).unlink(missing_ok=True)
