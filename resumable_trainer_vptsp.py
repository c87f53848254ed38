"""A Trainer whose runs can be interrupted at any moment and end as if they had not been."""

from __future__ import annotations

import time
from pathlib import Path

from accelerate.utils import gather_object
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from .checkpoints_vptsp import (
    OPTIMIZER_NAME,
    PROGRESS_NAME,
    STATE_NAME,
    WRITE_ERRORS,
    check_checkpoint,
    checkpoint_name,
    checkpoint_step,
    delete_checkpoints,
    discard_partial,
    last_checkpoint,
    load_tree,
    partial_checkpoint,
    prepare_root,
    publish,
    random_state,
    rotate,
    save_tree,
    set_random_state,
    write_failure,
)
from .interruption_vptsp import InterruptionCallback
from .open_backbone_vptsp import backbone_has
from .run_errors_vptsp import CheckpointError, CheckpointWriteError
from .run_record_vptsp import record_run, run_differences


class ResumableTrainer(Trainer):
    """`transformers.Trainer` with checkpoints that are whole, safe to read, and enough to go on bit for bit.

    What differs from its own: folders are put together aside and renamed (`checkpoints_vptsp.py`); optimiser,
    schedule and random generators are stored as safetensors and JSON, and so are the running sums of the loss, so that
    the log goes on too; a checkpoint of another run is refused; Ctrl-C and SIGTERM save before they stop
    (`interruption_vptsp.py`).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._resumed_from = None
        self._record = None
        self._started, self._earlier_seconds = time.time(), 0.0
        self._interruption = InterruptionCallback()
        for callback in (_CarryOn(self), self._interruption, _EpochEndFirst()):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """Train, as `Trainer.train`.

        Args:
            resume_from_checkpoint: True to go on from the last whole checkpoint in `output_dir`, or the folder of one.
            trial: As for `Trainer`.
            ignore_keys_for_eval: As for `Trainer`.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, or its run was another one.
            CheckpointWriteError: a checkpoint can't be written; earlier ones are intact.
            TrainingInterrupted: after Ctrl-C or SIGTERM, once a checkpoint is saved.
        """
        self._record = None
        self._resumed_from = self.checkpoint_to_resume(resume_from_checkpoint)
        if self._resumed_from is None and self.args.save_strategy != "no":
            self._together(prepare_root, self.args.output_dir, writer_only=True)
        with self._interruption.watching():
            return super().train(self._resumed_from, trial, ignore_keys_for_eval)

    # ---- Writing

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint aside, rename it, then delete those that are too many."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        root, step = Path(self._get_output_dir(trial)), self.state.global_step
        final, partial = root / checkpoint_name(step), partial_checkpoint(root, step)
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(final)
        progress = gather_object([self._progress()])
        try:
            self._together(self.save_model, str(partial), _internal_call=True)
            self._together(self._write_checkpoint, partial, progress, writer_only=True)
        except CheckpointWriteError as error:
            if self.args.should_save:
                discard_partial(partial)
            raise write_failure(final, error) from error
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        keep = [final, self.state.best_model_checkpoint]
        self._together(rotate, root, self.args.save_total_limit, keep, writer_only=True)

    def _write_checkpoint(self, partial, progress):
        if not self.args.save_only_model or self._interruption.is_stopping:
            scaler = getattr(self.accelerator, "scaler", None)
            optimizer = {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            save_tree(partial, OPTIMIZER_NAME, optimizer)
            save_tree(partial, PROGRESS_NAME, progress)
        callbacks = [*self.callback_handler.callbacks, self.control]
        callbacks = [callback for callback in callbacks if isinstance(callback, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=callbacks).stateful_callbacks
        self.state.save_to_json(str(partial / STATE_NAME))
        publish(partial, self._run_record())

    def delete_checkpoints(self):
        """Delete all checkpoints in `output_dir`, before a new run that is to take the place of an earlier one."""
        self._together(delete_checkpoints, self.args.output_dir, writer_only=True)

    def _progress(self):
        """Where this process is, beyond what model, optimiser and `TrainerState` say."""
        return {
            "random": random_state(self.args.device),
            "running_loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
            "seconds": self._earlier_seconds + time.time() - self._started,
        }

    def _run_record(self):
        if self._record is None:
            self._record = record_run(self.args, self.model, self.train_dataset, self.eval_dataset)
        return self._record

    def _together(self, action, *args, writer_only=False, **kwargs):
        """Do what may fail on one process's disk; if it does, every process raises, and none waits for another.

        Args:
            action: Called with `args` and `kwargs`.
            writer_only: Call it only on processes that write checkpoints.

        Raises:
            CheckpointWriteError: with what some process met.
        """
        own_problem = None
        if self.args.should_save or not writer_only:
            try:
                action(*args, **kwargs)
            except WRITE_ERRORS as error:
                own_problem = error.args if isinstance(error, OSError) else (str(error),)
        for problem in gather_object([own_problem]):
            if problem is not None:
                raise CheckpointWriteError(*problem)

    # ---- Going on

    def checkpoint_to_resume(self, resume_from_checkpoint) -> str | None:
        """The checkpoint that `train(resume_from_checkpoint)` goes on from, once it has been checked.

        Args:
            resume_from_checkpoint: As for `train`.

        Returns:
            Its folder, or None to begin anew.

        Raises:
            CheckpointError: there is none, it is damaged, or its run had other data, another model or other settings;
                the message lists every difference.
        """
        if resume_from_checkpoint in (None, False):
            return None
        self._together(prepare_root, self.args.output_dir, writer_only=True)
        folder = resume_from_checkpoint
        folder = last_checkpoint(self.args.output_dir) if folder is True else Path(folder)
        saved, now = check_checkpoint(folder), self._run_record()
        if backbone_has(self.model.config, saved.get("model", {}).get("backbone_fingerprint")):
            saved["model"]["backbone_fingerprint"] = now["model"]["backbone_fingerprint"]
        different = run_differences(saved, now)
        if different:
            lines = "\n".join(f"  {line}" for line in different)
            raise CheckpointError(
                f"{folder} is of another run:\n{lines}\nGive what it had, or begin a run in another output_dir"
            )
        self._best_checkpoint(folder)
        return str(folder)

    def _best_checkpoint(self, folder) -> str | None:
        """The best checkpoint so far of the run that `folder` belongs to, by its name alone: the two may have moved.

        Raises:
            CheckpointError: it is gone, but is to be loaded at the end.
        """
        best = TrainerState.load_from_json(str(Path(folder) / STATE_NAME)).best_model_checkpoint
        if best is None:
            return None
        if checkpoint_step(best) is None:
            raise CheckpointError(f"{Path(folder) / STATE_NAME}: best_model_checkpoint is no checkpoint, got {best!r}")
        places = [Path(self.args.output_dir) / Path(best).name, Path(folder).parent / Path(best).name]
        found = next((place for place in places if place.is_dir()), None)
        if found is None and self.args.load_best_model_at_end:
            raise CheckpointError(
                f"the best checkpoint so far, {Path(best).name}, is gone from {places[-1].parent}: put it back, or go "
                "on with load_best_model_at_end false"
            )
        return None if found is None else str(found)

    def _init_training_state(self, max_steps, steps_per_epoch, num_epochs, resume_from_checkpoint, trial):
        epochs_done, batches_done = super()._init_training_state(
            max_steps, steps_per_epoch, num_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return epochs_done, batches_done
        self.state.best_model_checkpoint = self._best_checkpoint(resume_from_checkpoint)
        self.state.compute_steps(self.args, max_steps)  # when to log, evaluate and save may have changed
        if any(_has_stopped(callback) for callback in self.callback_handler.callbacks):
            return num_epochs, 0
        try:
            len(self.train_dataset)
        except TypeError:  # a stream of unknown length: how much of which pass was read is in `epoch` alone
            epochs_done = int(self.state.epoch)
            part = self.state.epoch - epochs_done
            batches_done = round(part * max_steps * self.args.gradient_accumulation_steps)
        return epochs_done, batches_done

    def _load_optimizer_and_scheduler(self, checkpoint):
        saved = load_tree(checkpoint, OPTIMIZER_NAME)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.lr_scheduler.load_state_dict(saved["scheduler"])
        if saved["scaler"] is not None and getattr(self.accelerator, "scaler", None) is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])

    def _load_progress(self, checkpoint):
        """This process's `_progress`; where there were fewer processes then, that of one of them."""
        saved = load_tree(checkpoint, PROGRESS_NAME)
        return saved[self.args.process_index % len(saved)]

    def _load_rng_state(self, checkpoint):
        set_random_state(self._load_progress(checkpoint)["random"], self.args.device)

    def carry_on(self):
        """At the beginning of training: put back the running sums of the loss, and the time that has been spent."""
        self._started, self._earlier_seconds = time.time(), 0.0
        if self._resumed_from is not None:
            progress = self._load_progress(self._resumed_from)
            self._tr_loss.fill_(progress["running_loss"])
            self._total_loss_scalar = progress["total_loss"]
            self._globalstep_last_logged = progress["last_logged_step"]
            self._earlier_seconds = progress["seconds"]

    def _finalize_training(self, trial, num_train_samples, start_time):
        self._initial_global_step = 0  # mean loss and speed are those of the whole run, whenever it was interrupted
        return super()._finalize_training(trial, num_train_samples, start_time - self._earlier_seconds)


class _CarryOn(TrainerCallback):
    """Calls the trainer once its own counters are set to zero, and before the first step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.carry_on()


class _EpochEndFirst(TrainerCallback):
    """At an epoch's last step, puts off evaluation and saving to the end of the epoch, which follows at once.

    So a checkpoint has all that belongs to its epoch: a run that was killed right after it misses no evaluation.
    """

    def __init__(self):
        self._evaluate = self._save = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.epoch == int(state.epoch) or state.global_step >= state.max_steps:
            self._evaluate, self._save = control.should_evaluate, control.should_save
            control.should_evaluate = control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate |= self._evaluate
        control.should_save |= self._save
        self._evaluate = self._save = False


def _has_stopped(callback):
    """Whether the checkpoint that it was restored from is one at which training had stopped early."""
    return (
        isinstance(callback, EarlyStoppingCallback)
        and callback.early_stopping_patience_counter >= callback.early_stopping_patience
    )


__all__ = ["ResumableTrainer"]
