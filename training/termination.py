"""SIGTERM outside of training steps, which `training/interruption.py` looks after: like Ctrl-C, and said.

Light to import, since what takes longest at the start of a run is imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextlib.contextmanager
def ended_by_signals(prog, output_dir):
    """End the process with the status of Ctrl-C (130) or SIGTERM (143) and a line that says what was saved, if one of
    them comes in this context.

    Args:
        prog: What was typed, for the line.
        output_dir: Called without arguments: the run's folder, or None as long as it is not known.
    """
    previous = signal.getsignal(signal.SIGTERM)
    # not where it is ignored, or where Python can't
    heeded = previous is not signal.SIG_IGN and threading.current_thread() is threading.main_thread()
    if heeded:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error, SystemExit):  # has said all
            raise
        name, status = ("SIGTERM", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        if os.environ.get("RANK", "0") == "0":
            print(f"{prog}: {name}: {what_was_saved(output_dir())}", file=sys.stderr, flush=True)
        raise SystemExit(status) from None
    finally:
        if heeded:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _terminate(signum, frame):
    raise Terminated


def what_was_saved(output_dir) -> str:
    """What a run that ends between its steps leaves behind."""
    if output_dir is None:
        return "nothing was saved"
    steps = [path.name.removeprefix("checkpoint-") for path in Path(output_dir).glob("checkpoint-*")]
    last = max((int(step) for step in steps if step.isdecimal()), default=None)
    if last is None:
        return f"nothing was saved, {output_dir} holds no checkpoint"
    return f"what was saved before stays, up to checkpoint-{last} in {output_dir}"


__all__ = ["ended_by_signals", "what_was_saved"]
