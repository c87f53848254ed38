"""What a run prints while it goes on: a bar of its steps, and aligned lines of losses and scores in percent."""

from __future__ import annotations

import math
import re
import time

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback


LEAST_LOGS = 10  # of the loss, in a run of any length
_RECALL = re.compile(r"(?:(.*)_)?recall_at_\d+$")
_LABEL, _COLUMN = 16, 8


class ScoreTable:
    """Lines of one form: a label, steps, loss, scores in percent, time.

    Args:
        recall_at: The K of the columns of Recall@K; MAP@R follows.
        write: Called with each line.
    """

    def __init__(self, recall_at, write=tqdm.write):
        self._scores = {**{f"recall_at_{k}": f"R@{k}" for k in recall_at}, "map_at_r": "MAP@R"}
        self._write = write

    def header(self, after_others=False):
        if after_others:
            self._write("")
        self._line("", "step", "loss", self._scores.values(), "time")

    def say(self, text):
        self._write(text)

    def row(self, label, step=None, loss=None, scores=None, seconds=None):
        """One line.

        Args:
            label: What it is of.
            step: Steps so far.
            loss: Mean over the steps since the last one that was given.
            scores: Metric, without a prefix -> value in 0..1; others than the columns are left out.
            seconds: Since training began.
        """
        given = scores or {}
        shown = [f"{100 * given[name]:.1f}" if name in given else "" for name in self._scores]
        clock = "" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02}"
        self._line(label, "" if step is None else f"{step:,}", "" if loss is None else f"{loss:.3f}", shown, clock)

    def rows(self, label, metrics, step=None):
        """The line of an evaluation, and below it those of the bounds of its confidence intervals, if it has them."""
        self.row(label, step, scores=metrics)
        for bound, title in (("low", "  95 % from"), ("high", "  to")):
            ends = {name: metrics[f"{name}_{bound}"] for name in self._scores if f"{name}_{bound}" in metrics}
            if ends:
                self.row(title, scores=ends)

    def _line(self, label, step, loss, scores, clock):
        cells = [step, loss, *scores, clock]
        self._write((f"{label:{_LABEL}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)).rstrip())


class RunProgress(TrainerCallback):
    """Prints losses and evaluations as lines of a table, and shows a bar of the steps.

    It takes the place of the Trainer's own callbacks for that. The loss is logged at every evaluation, and
    [`LEAST_LOGS`] times in a run at least, whatever `logging_steps` says.
    """

    def __init__(self, table: ScoreTable):
        self._table = table
        self._bar = None
        self._loss = None  # logged, and not yet on a line: an evaluation of the same step may follow
        self._begun = None
        self._log_every = 1

    @classmethod
    def of(cls, trainer, table):
        """Put one into a Trainer."""
        for other in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(other)
        trainer.add_callback(cls(table))

    def on_train_begin(self, args, state, control, **kwargs):
        self._log_every = max(math.ceil(state.max_steps / LEAST_LOGS), 1)
        if not state.is_world_process_zero:
            return
        self._begun = time.perf_counter()
        if state.global_step:
            tqdm.write(f"going on from step {state.global_step:,} of {state.max_steps:,}")
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="Training",
            unit="step",
            disable=args.disable_tqdm,
            leave=False,
        )

    def on_step_begin(self, args, state, control, **kwargs):
        self._show_loss(state)

    def on_step_end(self, args, state, control, **kwargs):
        due = control.should_evaluate or state.global_step % self._log_every == 0
        control.should_log |= due and args.logging_strategy != "no"
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n if not self._bar.disable else 0)
        return control

    def will_log(self, args, state, step, at_epoch_end):
        """Whether this asks for a log after a step, said before it is taken."""
        by_steps = args.eval_strategy == "steps" and (step % state.eval_steps == 0 or step == state.max_steps)
        evaluates = by_steps or (args.eval_strategy == "epoch" and (at_epoch_end or step == state.max_steps))
        return args.logging_strategy != "no" and (evaluates or step % self._log_every == 0)

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_evaluate and args.logging_strategy != "no"
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._bar is None or logs is None:
            return
        if "loss" in logs:
            self._loss = logs["loss"], self._seconds()
        for prefix in dict.fromkeys(match[1] for name in logs if (match := _RECALL.fullmatch(name))):
            scores = {name.removeprefix(f"{prefix}_"): value for name, value in logs.items()}
            label = f"epoch {state.epoch:g}" + (prefix or "").removeprefix("eval").replace("_", " ", 1)
            loss, _ = self._loss or (None, None)
            self._loss = None
            self._table.row(label, state.global_step, loss, scores, self._seconds())

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._show_loss(state)
            self._bar.close()
            self._bar = None

    def _show_loss(self, state):
        if self._loss is not None:
            loss, seconds = self._loss
            self._loss = None
            self._table.row("", state.global_step, loss, seconds=seconds)

    def _seconds(self):
        return time.perf_counter() - self._begun


__all__ = ["LEAST_LOGS", "RunProgress", "ScoreTable"]
