"""All that hooks into private parts of `transformers.Trainer`, each under a name that subclasses may rely on.

Private parts can change with any version of transformers. That they are there is checked when this is imported; that
they do what is needed here is what the tests of checkpoints are for.
"""

from __future__ import annotations

import inspect

import transformers
from transformers import Trainer


# What is read or set without a method of its own being overridden.
PRIVATE_ATTRIBUTES = (
    "_created_lr_scheduler",
    "_globalstep_last_logged",
    "_n_gpu",  # of the arguments
    "_total_loss_scalar",
    "_tr_loss",
)


class HookedTrainer(Trainer):
    """`transformers.Trainer` that leaves to its subclass what goes into checkpoints and comes out of them.

    A subclass has these methods:

        save_checkpoint()                         at every save
        load_checkpoint(folder)                   the model, before training goes on
        load_optimizer(folder)                    optimiser, schedule and scaler
        load_random_state(folder)                 at the batch that training goes on with
        load_best()                               the best model, at the end
        resumed_position(folder, max_steps, num_epochs, position)
                                                  `(epochs, batches)` done, from what the Trainer thinks
        clip_gradients(model, max_norm)           the norm before
        measure_gradients(model)                  the norm, where a log will show it

    Attributes:
        earlier_seconds: How long the run has trained before it was interrupted; `train_runtime` counts it.
        steps_per_epoch: Of the optimiser; 0 before training.
    """

    earlier_seconds = 0.0
    steps_per_epoch = 0

    def __init__(self, model=None, args=None, **kwargs):
        if args is not None:
            args._n_gpu = min(args.n_gpu, 1)  # DataParallel would split classes; several devices need a process each
        super().__init__(model=model, args=args, **kwargs)

    def _save_checkpoint(self, model, trial):
        self.save_checkpoint()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.load_checkpoint(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        self.load_optimizer(checkpoint)

    def _load_rng_state(self, checkpoint):
        self.load_random_state(checkpoint)

    def _load_best_model(self):
        self.load_best()

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        self.steps_per_epoch = num_update_steps_per_epoch
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return position
        return self.resumed_position(resume_from_checkpoint, max_steps, num_train_epochs, position)

    def _finalize_training(self, trial, num_train_samples, start_time):
        # Not asked for below: versions without it take the whole run in any case.
        self._initial_global_step = 0  # mean loss and speed are those of the whole run, whenever it was interrupted
        return super()._finalize_training(trial, num_train_samples, start_time - self.earlier_seconds)

    def _clip_grad_norm(self, model):
        return self.clip_gradients(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None and self.will_log(self.state.global_step + 1):
            return self.measure_gradients(model)
        return grad_norm  # None: the Trainer leaves it out

    def will_log(self, step) -> bool:
        """Whether the loss will be logged after a step, by the arguments or by a callback with a method `will_log`."""
        args, state = self.args, self.state
        at_epoch_end = self.steps_per_epoch and step % self.steps_per_epoch == 0
        return bool(
            (step == 1 and args.logging_first_step)
            or (args.logging_strategy == "steps" and step % state.logging_steps == 0)
            or (args.logging_strategy == "epoch" and (at_epoch_end or step == state.max_steps))
            or any(
                callback.will_log(args, state, step, at_epoch_end)
                for callback in self.callback_handler.callbacks
                if hasattr(callback, "will_log")
            )
        )

    @property
    def running_sums(self) -> dict:
        """Where the log is: the loss since it was last written, and before, and the step at which that was."""
        return {
            "running_loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
        }

    @running_sums.setter
    def running_sums(self, sums):
        self._tr_loss.fill_(sums["running_loss"])
        self._total_loss_scalar = sums["total_loss"]
        self._globalstep_last_logged = sums["last_logged_step"]

    def set_scheduler(self, scheduler):
        """Take a schedule that `create_scheduler` has made; the next training gets a new one."""
        self.lr_scheduler = scheduler
        self._created_lr_scheduler = True


def check_private_parts(trainer_class=Trainer):
    """Raise an `ImportError` unless a Trainer has the private methods and attributes that are used here.

    Args:
        trainer_class: The class; a method must have as many parameters as the one that overrides it.
    """
    missing = []
    for name, method in vars(HookedTrainer).items():
        if name.startswith("_") and not name.startswith("__"):
            ours, theirs = inspect.signature(method), getattr(trainer_class, name, None)
            if theirs is None or len(inspect.signature(theirs).parameters) != len(ours.parameters):
                missing.append(f"{name}{ours}")
    functions = [function for function in vars(trainer_class).values() if inspect.isfunction(function)]
    used = {name for function in functions for name in function.__code__.co_names}
    missing += [name for name in PRIVATE_ATTRIBUTES if name not in used]
    if missing:
        raise ImportError(
            f"Trainer of transformers {transformers.__version__} lacks {', '.join(missing)}, which VPTSPTrainer hooks "
            "into: install a version of transformers that setup.cfg names"
        )


check_private_parts()

__all__ = ["HookedTrainer", "check_private_parts"]
