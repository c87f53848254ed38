"""A Trainer whose runs can be interrupted at any moment and end as if they had not been."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from dataclasses import asdict
from pathlib import Path

from accelerate.utils import gather_object
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from ..backbones_vptsp import linear_products
from ..files.atomic import write_json
from ..loading_vptsp import backbone_has
from .checkpoints import (
    OPTIMIZER_NAME,
    PROGRESS_NAME,
    RUN_NAME,
    STATE_NAME,
    WRITE_ERRORS,
    check_checkpoint,
    check_files,
    checkpoint_name,
    checkpoint_step,
    checkpoints_in,
    delete_checkpoints,
    discard_partial,
    last_checkpoint,
    load_tree,
    partial_checkpoint,
    prepare_root,
    publish,
    random_state,
    read_json,
    rotate,
    save_tree,
    set_random_state,
    write_failure,
)
from .descriptions import describe
from .interruption import InterruptionCallback
from .output_folder import last_run, mark_run, output_held
from .run_errors import CheckpointError, CheckpointWriteError, TrainingError
from .run_record import given_optimizer, given_scheduler, record_run, run_differences
from .trainer_hooks import HookedTrainer
from .unsupported_arguments import refuse_given


logger = logging.getLogger(__name__)

# States of PyTorch's optimisers, which they take in any shape and fail on at the first step.
_SHAPED_AS_PARAMETERS = {"exp_avg", "exp_avg_sq", "momentum_buffer"}


class ResumableTrainer(HookedTrainer):
    """`transformers.Trainer` with checkpoints that are whole, safe to read, and enough to go on bit for bit.

    What differs from its own: folders are put together aside and renamed (`training/checkpoints.py`); optimiser,
    schedule and random generators are stored as safetensors and JSON, and so are the running sums of the loss, so that
    the log goes on too; a checkpoint of another run is refused; Ctrl-C and SIGTERM save before they stop
    (`training/interruption.py`).

    What is in a checkpoint of the model, a subclass writes (`save_weights(folder)`) and reads (`load_checkpoint`,
    `load_best`).

    Args:
        *args: As for `Trainer`.
        data_settings: Dict of JSON values that say which data the run has, beyond what the data sets can tell; a run
            that goes on must have the same. None compares the data sets alone.
        **kwargs: As for `Trainer`.
    """

    def __init__(self, *args, data_settings=None, **kwargs):
        super().__init__(*args, **kwargs)
        self._data_settings = data_settings
        self._resumed_from = None
        self._record = None
        self._earlier_checkpoints = []
        self._given_optimizer = given_optimizer(self.optimizer, self.model)
        self._given_scheduler = given_scheduler(self.lr_scheduler)
        self._run = self._next_run = self._first_run = last_run(self.args.output_dir)
        self._started = time.time()
        self._interruption = InterruptionCallback()
        for callback in (_CarryOn(self), self._interruption, _EpochEndFirst()):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """Train, as `Trainer.train`.

        Meanwhile no other run can use `output_dir` (`output_held`).

        Args:
            resume_from_checkpoint: True to go on from the last whole checkpoint in `output_dir`, or the folder of one;
                None for what the argument of that name says.
            trial: Must be None.
            ignore_keys_for_eval: Must be None.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, or its run was another one.
            CheckpointWriteError: a checkpoint can't be written; earlier ones are intact.
            InUseError: another run uses `output_dir`.
            TrainingError: there was nothing to train on.
            TrainingInterrupted: after Ctrl-C or SIGTERM, once a checkpoint is saved.
            ValueError: `trial` or `ignore_keys_for_eval` is given, which can't be honoured.
        """
        refuse_given(trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
        self._record = None
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        with output_held(self.args):
            self._resumed_from = self.checkpoint_to_resume(resume_from_checkpoint)
            if self._resumed_from is None and self.args.save_strategy != "no":
                self._together(prepare_root, self.args.output_dir, writer_only=True)
            self._next_run = gather_object([uuid.uuid4().hex])[0]
            self._first_run = _run_of(self._resumed_from) if self._resumed_from else self._next_run
            self._run_record()  # before training changes anything that it describes
            with self._interruption.watching():
                outcome = super().train(self._resumed_from)
            self._together(self._mark_output, writer_only=True)
        if outcome.global_step == 0:
            raise TrainingError(f"training ended without a single step: there is no batch in {self.train_dataset!r}")
        return outcome

    # ---- Writing

    def save_checkpoint(self):
        """Write a checkpoint aside, rename it, then delete those that are too many."""
        self.store_flos()
        root, step = Path(self.args.output_dir), self.state.global_step
        final, partial = root / checkpoint_name(step), partial_checkpoint(root, step)
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(final)
        progress = gather_object([self._progress()])
        try:
            self._together(self._write_checkpoint, partial, progress, writer_only=True)
        except CheckpointWriteError as error:
            if self.args.should_save:
                discard_partial(partial)
            raise write_failure(final, error) from error
        self._earlier_checkpoints = [folder for folder in self._earlier_checkpoints if folder.name != final.name]
        self.delete_replaced()
        keep = [final, self.state.best_model_checkpoint]
        self._together(rotate, root, self.args.save_total_limit, keep, writer_only=True)

    def _write_checkpoint(self, partial, progress):
        self.save_weights(partial)
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
        write_json(partial / STATE_NAME, asdict(self.state))
        self._mark_output()
        publish(partial, {**self._run_record(), "run": self._first_run})

    def _mark_output(self):
        """Note in `output_dir` that this run is the last there, before it leaves anything that others could take."""
        mark_run(self.args.output_dir, self._next_run)
        self._run = self._next_run

    def replace_checkpoints(self):
        """Let the run that begins now take the place of an earlier one in `output_dir`.

        The earlier run's checkpoints stay until the new one has written its first, or `delete_replaced` is called.
        """
        self._earlier_checkpoints = checkpoints_in(self.args.output_dir)

    def delete_replaced(self):
        """Delete what `replace_checkpoints` has found: this run has what takes its place."""
        self._together(delete_checkpoints, self._earlier_checkpoints, writer_only=True)
        self._earlier_checkpoints = []

    def _progress(self):
        """Where this process is, beyond what model, optimiser and `TrainerState` say."""
        return {
            "random": random_state(self.args.device),
            "linear_products": linear_products.saved(),
            **self.running_sums,
            "seconds": self.earlier_seconds + time.time() - self._started,
        }

    def _run_record(self):
        if self._record is None:
            self._record = record_run(
                self.args,
                self.model,
                self.train_dataset,
                self.eval_dataset,
                **({} if self._data_settings is None else {"data": self._data_settings}),
                image_processor=self._image_processor_record(),
                optimizer=self._optimizer_record(),
                lr_scheduler=self._given_scheduler,
                data_collator=describe(self.data_collator),
            )
        return self._record

    def _image_processor_record(self):
        """How images are normalised; None without an image processor."""
        names = ("do_normalize", "image_mean", "image_std", "do_rescale", "rescale_factor")
        found = {name: getattr(self.processing_class, name, None) for name in names}
        found = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in found.items()}
        return None if self.processing_class is None else found

    def _optimizer_record(self):
        """The optimiser that the constructor was given; None where the arguments say which."""
        if self.optimizer_cls_and_kwargs is not None:
            optimizer_cls, options = self.optimizer_cls_and_kwargs
            return {"class": optimizer_cls.__name__, "options": {name: repr(value) for name, value in options.items()}}
        return self._given_optimizer

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
        fingerprint = saved.get("model", {}).get("backbone_fingerprint")
        if backbone_has(self.model.config, fingerprint, token=self.args.hub_token):
            saved["model"]["backbone_fingerprint"] = now["model"]["backbone_fingerprint"]
        different = run_differences(saved, now)
        if different:
            lines = "\n".join(f"  {line}" for line in different)
            raise CheckpointError(
                f"{folder} is of another run:\n{lines}\nGive what it had, or begin a run in another output_dir"
            )
        if not hasattr(self.train_dataset, "fingerprint"):
            logger.warning(
                "%s has no fingerprint(): whether it holds the images that the run began with can't be told",
                type(self.train_dataset).__name__,
            )
        best = self._best_checkpoint(folder)
        if best is not None and self.args.load_best_model_at_end:
            check_files(best)
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
        found = next((place for place in places if place.is_dir() and _run_of(place) == _run_of(folder)), None)
        if found is None and self.args.load_best_model_at_end:
            raise CheckpointError(
                f"the best checkpoint so far, {Path(best).name}, is gone from {places[-1].parent}: put it back, or go "
                "on with load_best_model_at_end false"
            )
        return None if found is None else str(found)

    def resumed_position(self, folder, max_steps, num_epochs, position):
        """Set the state to that of a run that goes on here and now; epochs, and batches of the next, that are done."""
        epochs_done, batches_done = position
        self.state.best_model_checkpoint = self._best_checkpoint(folder)
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

    def load_optimizer(self, folder):
        with _belongs(folder, OPTIMIZER_NAME):
            saved = load_tree(folder, OPTIMIZER_NAME)
            self.optimizer.load_state_dict(saved["optimizer"])
            for parameter, state in self.optimizer.state.items():
                for name in _SHAPED_AS_PARAMETERS & state.keys():
                    if state[name].shape != parameter.shape:
                        shapes = f"{tuple(state[name].shape)} instead of {tuple(parameter.shape)}"
                        raise ValueError(f"it has {name} {shapes}")
            self.lr_scheduler.load_state_dict(saved["scheduler"])
            if saved["scaler"] is not None and getattr(self.accelerator, "scaler", None) is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])

    def _load_progress(self, folder):
        """This process's `_progress`; where there were fewer processes then, that of one of them."""
        with _belongs(folder, PROGRESS_NAME):
            saved = load_tree(folder, PROGRESS_NAME)
            progress = saved[self.args.process_index % len(saved)]
            if lacks := {*self.running_sums, "random", "seconds"} - set(progress):
                raise ValueError(f"it lacks {', '.join(sorted(lacks))}")
            return progress

    def load_random_state(self, folder):
        with _belongs(folder, PROGRESS_NAME):
            set_random_state(self._load_progress(folder)["random"], self.args.device)

    def carry_on(self):
        """At the beginning of training: put back the running sums of the loss, and the time that has been spent."""
        self._started, self.earlier_seconds = time.time(), 0.0
        if self._resumed_from is not None:
            progress = self._load_progress(self._resumed_from)
            self.running_sums = progress
            self.earlier_seconds = progress["seconds"]
            if "linear_products" in progress:  # last bits depend on them
                linear_products.restore(progress["linear_products"])


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
        self._put_off = (False, False)

    def on_step_end(self, args, state, control, **kwargs):
        if state.epoch == int(state.epoch) or state.global_step >= state.max_steps:
            self._put_off = control.should_evaluate, control.should_save
            control.should_evaluate = control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        evaluate, save = self._put_off
        control.should_evaluate |= evaluate
        control.should_save |= save
        self._put_off = (False, False)


@contextlib.contextmanager
def _belongs(folder, name):
    """A block that reads what `save_tree` wrote; a CheckpointError where that is whole, but of something else."""
    try:
        yield
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{Path(folder) / name}.json and .safetensors are not of this run ({type(error).__name__}: {reason})"
        ) from error


def _run_of(checkpoint) -> str | None:
    """Which run has begun what a checkpoint goes on with; None in those of older versions."""
    return read_json(Path(checkpoint) / RUN_NAME).get("run")


def _has_stopped(callback):
    """Whether the checkpoint that it was restored from is one at which training had stopped early."""
    return (
        isinstance(callback, EarlyStoppingCallback)
        and callback.early_stopping_patience_counter >= callback.early_stopping_patience
    )


__all__ = ["ResumableTrainer"]
