"""Ctrl-C and SIGTERM during training: finish the step, save a checkpoint, leave."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from .run_errors import TrainingInterrupted


SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECOND_SIGNAL_AFTER = 1.0
"""Seconds. Before, a second signal is taken for the first one's echo: torchrun passes on what a terminal also sent."""


class InterruptionCallback(TrainerCallback):
    """Ends training on Ctrl-C or SIGTERM, after the step in progress and a checkpoint.

    With several processes one signal to one of them is enough: all stop after the same step. They agree by an
    all-reduce of one number between CPUs, started after each step and read after the next; so nobody waits for it, an
    accelerator least of all.
    """

    def __init__(self):
        self._received = self._received_at = None
        self._previous = {}
        self._group = self._question = None
        self._stopping = None

    @contextlib.contextmanager
    def watching(self):
        """Handle the signals inside of this context. Not outside of the main thread, where Python can't, and not where
        a signal is ignored (as in a shell's background jobs)."""
        self._received = self._question = self._stopping = None
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            heeded = [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
            self._previous = {signum: signal.signal(signum, self._note) for signum in heeded}
        try:
            yield
        finally:
            for signum in self._previous:
                self._give_back(signum)
        if self._received is not None:  # it came when no step was left to end after it
            signal.raise_signal(self._received)

    def _give_back(self, signum):
        previous = self._previous[signum]
        signal.signal(signum, signal.SIG_DFL if previous is None else previous)  # None: set by other than Python

    def _note(self, signum, frame):
        if self._received is None:
            self._received, self._received_at = signum, time.monotonic()
            if os.environ.get("RANK", "0") == "0":  # not print: a handler may have interrupted one
                name = signal.Signals(signum).name
                os.write(2, f"\n{name}: stopping with a checkpoint after this step; again to stop at once\n".encode())
        elif time.monotonic() - self._received_at >= SECOND_SIGNAL_AFTER:
            self._give_back(signum)
            signal.raise_signal(signum)

    @property
    def is_stopping(self) -> bool:
        """Whether the next checkpoint is the last."""
        return self._stopping is not None

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs):
        self._stopping = self._received if args.world_size == 1 else self._agreed()
        if self.is_stopping:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if not self.is_stopping:
            return
        self._settle()
        interrupted = TrainingInterrupted(self._stopping, state.global_step)
        if state.is_world_process_zero:
            print(
                f"{interrupted}: saved checkpoint-{state.global_step} in {args.output_dir}. "
                "Go on with --resume_from_checkpoint true",
                file=sys.stderr,
                flush=True,
            )
        raise interrupted

    def on_train_end(self, args, state, control, **kwargs):
        self._received = self._settle() or self._received  # too late, for all processes

    def _agreed(self):
        """The signal that some process had received by the end of the step before; the same on all, None for none."""
        found = self._settle()
        answer = torch.tensor([self._received or 0])
        self._question = (dist.all_reduce(answer, dist.ReduceOp.MAX, group=self._group, async_op=True), answer)
        return found

    def _settle(self):
        if self._question is None:
            return None
        work, answer = self._question
        self._question = None
        work.wait()
        return int(answer) or None


def leave_signals_to_main_process(worker_id):
    """For a `DataLoader`'s `worker_init_fn`: Ctrl-C reaches workers too, which the step in progress still needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which loaders end workers; forked ones have inherited `_note`


__all__ = ["InterruptionCallback"]
