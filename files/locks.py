"""Locks between processes, for folders that only one may write to at a time."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
"""What the lock is called in a folder that is locked as a whole."""


class InUseError(RuntimeError):
    """Another process holds the lock."""


@contextmanager
def locked(path, what, timeout=0.0):
    """Hold the lock file `path` while the block runs; if another process has it, say so and wait.

    The system gives a lock back when its process ends, however it ends; the file itself may stay.

    Args:
        path: The lock file; its folder is made.
        what: What is locked, for the error, such as `output_dir runs/photos`.
        timeout: Seconds to wait for another process; 0 does not wait.

    Raises:
        InUseError: another process (or another lock of this one) holds it for longer than `timeout`.
        ValueError: timeout is negative.
    """
    if not timeout >= 0:  # filelock would wait for ever
        raise ValueError(f"timeout must be >= 0 seconds, got {timeout}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if timeout:
                logger.warning("%s is in use by another process: waiting for up to %g seconds", what, timeout)
            lock.acquire(timeout=timeout)
    except Timeout:
        waited = f", also after {timeout:g} seconds" if timeout else ""
        raise InUseError(f"{what} is in use by another process{waited} (lock file {path})") from None
    try:
        yield
    finally:
        lock.release()


__all__ = ["LOCK_FILE", "InUseError", "locked"]
