"""Locks between processes, for folders that only one may write to at a time."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class InUseError(RuntimeError):
    """Another process holds the lock."""


@contextmanager
def locked(path, what, timeout=0.0):
    """Hold the lock file `path` while the block runs.

    The system gives a lock back when its process ends, however it ends; the file itself may stay.

    Args:
        path: The lock file; its folder is made.
        what: What is locked, for the error, such as `output_dir runs/photos`.
        timeout: Seconds to wait for another process; 0 does not wait.

    Raises:
        InUseError: another process (or another lock of this one) holds it for longer than `timeout`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        waited = f", also after {timeout:g} seconds" if timeout else ""
        raise InUseError(f"{what} is in use by another process{waited} (lock file {path})") from None
    try:
        yield
    finally:
        lock.release()


__all__ = ["InUseError", "locked"]
