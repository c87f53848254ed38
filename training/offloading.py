"""What the Trainer does for class prompts in host memory: where they go, their step, rows of the next batch ahead."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path

import torch
from transformers import TrainerCallback

from ..configuration_vptsp import DENSE_CLASS_PROMPT_BYTES
from .local_processes import LocalProcesses
from .output_folder import output_held
from .row_optimizers import SUPPORTED_OPTIM, check_optimizer


logger = logging.getLogger(__name__)


def prepare_class_prompts(trainer):
    """Get the class prompts of a Trainer's model ready for training, and log where they are.

    Raises:
        ValueError: they are offloaded, and the optimiser has no rule for rows.
        OSError: they do not fit where they are to go.
    """
    model, args = trainer.model, trainer.args
    level = logging.INFO
    if model.offloaded_class_prompts is not None:
        if trainer.optimizer is not None:
            check_optimizer(trainer.optimizer)
        elif trainer.optimizer_cls_and_kwargs is not None:
            optimizer_cls, options = trainer.optimizer_cls_and_kwargs
            check_optimizer(optimizer_cls([torch.zeros(1)], **options))
        elif args.optim not in SUPPORTED_OPTIM:
            raise ValueError(
                f"optim must be one of {', '.join(SUPPORTED_OPTIM)} with offloaded class prompts, got "
                f"{str(args.optim.value)!r}; class_prompt_store dense takes any"
            )
        with output_held(args):  # files of a run that is going on must not be written over
            _place(model.offloaded_class_prompts, args, trainer.optimizer)
        trainer.add_callback(ClassPromptCallback(trainer))
        if model.config.class_prompt_store == "auto":
            level = logging.WARNING  # the rule by which they move is another
    elif args.class_prompt_folder is not None:
        logger.warning("class_prompt_folder %s is not used: no class prompts are offloaded", args.class_prompt_folder)
    logger.log(level, "class prompts: %s", describe_class_prompts(model))


def _place(store, args, optimizer):
    """Put table and states into `class_prompt_folder`, or into one in `output_dir` where they don't fit in memory."""
    is_sgd = args.optim == "sgd" if optimizer is None else isinstance(optimizer, torch.optim.SGD)
    num_states = 1 if is_sgd else 2
    folder, local = args.class_prompt_folder, LocalProcesses()
    if folder is None and not local.all_of(store.fits_in_memory(num_states)):
        folder = Path(args.output_dir) / "class_prompts"
        logger.warning(
            "class prompts and their optimiser states (%.1f GiB) do not fit in memory: they are memory-mapped in %s",
            store.num_bytes(num_states) / 2**30,
            folder,
        )
    if folder is not None:
        store.place(folder, num_states, local)


def describe_class_prompts(model) -> str:
    """One line on where the class prompts of a training model are, and why."""
    config, store = model.config, model.offloaded_class_prompts
    if config.proxy_update == "none":
        return "none"
    size = f"{config.resolved_class_prompt_store}, {config.class_prompt_bytes / 2**20:,.1f} MiB"
    if store is None:
        place = "on the device"
    else:
        place = "in host memory" if store.folder is None else f"memory-mapped in {store.folder}"
    reason = "class_prompt_store"
    if config.class_prompt_store == "auto":
        reason = f"auto: dense up to {DENSE_CLASS_PROMPT_BYTES // 2**20} MiB"
    return f"{size} {place} ({reason})"


class ClassPromptCallback(TrainerCallback):
    """Updates the rows of offloaded class prompts right after every optimiser step that was not skipped."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.store = trainer.model.offloaded_class_prompts

    def on_train_begin(self, args, state, control, **kwargs):
        self.store.discard_gradients()
        if args.world_size > 1:
            self.store.broadcast(args.device)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.store.discard_prefetched()

    on_train_end = on_epoch_begin

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        if self.trainer.accelerator.optimizer_step_was_skipped:  # gradients overflowed in half precision
            self.store.discard_gradients()
        else:
            self.store.step(getattr(optimizer, "optimizer", optimizer))  # out of accelerate's wrapper


class BatchesAhead:
    """Iterator over batches that is one ahead, and starts to prefetch the rows of the next batch before its turn.

    Args:
        batches: Iterator over class-major batches with `labels`.
        store: The `OffloadedClassPrompts`.
        images_per_class: Images of each class in a batch.
    """

    def __init__(self, batches, store, images_per_class):
        self.source = batches
        self._store = store
        self._images_per_class = images_per_class
        self._unasked = deque()  # labels of batches that were given, or will be next
        self._following = self._fetch()
        self.begin_batch()

    def __iter__(self):
        return self

    def __next__(self):
        if self._following is None:
            raise StopIteration
        batch, self._following = self._following, self._fetch()
        return batch

    def _fetch(self):
        batch = next(self.source, None)
        if batch is not None:
            self._unasked.append(batch["labels"])
        return batch

    def begin_batch(self):
        """Ask for the rows of the batch after the one that is about to be computed."""
        if self._unasked:
            self._store.prefetch(torch.as_tensor(self._unasked.popleft())[:: self._images_per_class])


__all__ = ["BatchesAhead", "ClassPromptCallback", "describe_class_prompts", "prepare_class_prompts"]
