"""Commands whose output goes into a pipe that nobody reads any more, as in `vptsp check cub | head`."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager


STATUS = 141  # that shells give to a process that SIGPIPE has ended


class _Stream:
    """A standard stream that ends the process where its pipe is closed."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        with self._ending():
            return self._stream.write(text)

    def flush(self):
        with self._ending():
            self._stream.flush()

    @contextmanager
    def _ending(self):
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # for what Python flushes at its end
            raise SystemExit(STATUS) from None


@contextmanager
def ended_by_closed_pipes():
    """End the process where what is printed in this context goes into a closed pipe.

    Quietly, by a `SystemExit` with the status that shells give. Other broken pipes, as of a service's connections, are
    errors as ever.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and _Stream(stream) for stream in before)
    try:
        yield
    finally:
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        finally:
            sys.stdout, sys.stderr = before


__all__ = ["STATUS", "ended_by_closed_pipes"]
