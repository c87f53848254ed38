"""Class prompts, the prompt tokens that each class has of its own, in two stores with one interface.

`ClassPrompts` (dense) is a parameter on the device. `OffloadedClassPrompts` is a table in host memory, or in
memory-mapped files, of which the device only ever sees the rows of a batch's classes.

Shapes: C classes, M classes in a batch, P prompts of all layers together, D backbone width.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import tempfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import initialization as init

from .row_optimizers_vptsp import check_optimizer, state_names, update_rows


CLASS_PROMPTS_NAME = "class_prompts.safetensors"
CLASS_PROMPT_STATES_NAME = "class_prompts_optimizer.safetensors"
# Of the memory that is available, what table and states may take before they go to memory-mapped files.
MEMORY_SHARE = 0.8

# One thread for all stores: reads must not overtake each other.
_reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="class_prompts")


def build_class_prompts(config):
    """The store that `config.class_prompt_store` asks for."""
    store = {"dense": ClassPrompts, "offloaded": OffloadedClassPrompts}[config.resolved_class_prompt_store]
    return store(
        config.num_classes, config.class_prompt_lengths, config.num_class_prompts, config.backbone_config.hidden_size
    )


class ClassPrompts(nn.Module):
    """Prompt tokens that each class has of its own, for the semantic pass (paper section 3.2).

    All lie in one parameter `tokens` of shape `(C, sum(lengths), D)`; drawn like the shared prompts.
    """

    def __init__(self, num_classes, lengths, num_prompts, width):
        super().__init__()
        self.lengths = tuple(lengths)
        self.std = math.sqrt(2.0 / (num_prompts + width))
        shape = (num_classes, sum(self.lengths), width)
        self.tokens = nn.Parameter(torch.empty(shape)) if sum(self.lengths) else None

    def init_weights(self):
        if self.tokens is not None:
            init.normal_(self.tokens, std=self.std)

    def forward(self, classes):
        """Tokens of each layer for the given classes `(M,)`: `(M, P_i, D)` each."""
        return () if self.tokens is None else self.tokens.index_select(0, classes).split(self.lengths, dim=1)


class OffloadedClassPrompts(nn.Module):
    """[`ClassPrompts`] in host memory, for tables that would not fit on the device: released runs, SOP and larger.

    `forward` brings the rows of a batch's classes to the device. Their gradients are kept until `step`, which updates
    these rows and their optimiser states in place, in host memory, and no others: a class that is not in the batch
    does not move, and neither do its states (see `row_optimizers_vptsp`). Neither table nor states are parameters or
    buffers; they are float32 whatever the model is, and saved in files of their own.

        output.loss.backward()
        optimizer.step()
        model.class_prompts.step(optimizer)

    A step costs the same whatever C is; memory is `4 * C * P * D * (1 + states)` bytes of the host, with one state for
    SGD with momentum and two for AdamW, and none of the device.

    Attributes:
        states: Optimiser states by torch's name, `(C, P, D)` float32; `step` is `(C,)`.
        folder: Where the memory-mapped files are; None in memory.
    """

    def __init__(self, num_classes, lengths, num_prompts, width):
        super().__init__()
        self.lengths = tuple(lengths)
        self.std = math.sqrt(2.0 / (num_prompts + width))
        self.shape = (num_classes, sum(self.lengths), width)
        self.states = {}
        self.folder = None
        self._tokens = None
        self._gradients = []  # (classes, gradient) of every backward pass since the last step
        self._reduced = None
        self._coming = deque()
        # Moves with the model, and lets transformers see that there is something to initialise.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def init_weights(self):
        """Draw the table as the dense store does; one that does not fit in memory is drawn when it has a place."""
        if self._tokens is not None or self.fits_in_memory(num_states=0):
            self._draw()

    def _draw(self):
        if self._tokens is None:
            self._tokens = self._allocate(self.shape)
        self._tokens.normal_(std=self.std)

    @property
    def tokens(self):
        """The table, `(C, P, D)` float32."""
        if self._tokens is None:
            if self.folder is None and not self.fits_in_memory(num_states=0):
                raise MemoryError(
                    f"class prompts of {self.num_bytes(0) / 2**30:.1f} GiB do not fit in memory: "
                    "call place(folder), or train with class_prompt_folder"
                )
            self._draw()
        return self._tokens

    def num_bytes(self, num_states):
        """Bytes of the table and of as many optimiser states."""
        return 4 * math.prod(self.shape) * (1 + num_states)

    def fits_in_memory(self, num_states):
        """Whether table and states, of all processes here, take at most `MEMORY_SHARE` of the available memory."""
        processes = _processes_here()
        held = 0 if self._tokens is None or self.folder is not None else self.num_bytes(0)
        available = psutil.virtual_memory().available + held * processes
        return processes * self.num_bytes(num_states) <= MEMORY_SHARE * available

    def place(self, folder, num_states=2):
        """Keep table and states in memory-mapped files from now on, not in memory.

        The files are scratch space: on POSIX systems they have no name once they are mapped, and vanish with the
        process.

        Args:
            folder: Folder on a fast local disk; made where it does not exist.
            num_states: Optimiser states that will join the table.

        Raises:
            OSError: the disk has not enough room.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        processes = _processes_here()  # each makes files of its own, which take their room as they fill
        needed, free = processes * self.num_bytes(num_states), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"class_prompt_folder {folder} has {free / 2**30:.1f} GiB left, class prompts and their optimiser "
                f"states need {needed / 2**30:.1f} GiB ({processes} processes)"
            )
        self.discard_prefetched()
        self.folder = folder
        if self._tokens is not None:
            self._tokens = self._allocate(self.shape).copy_(self._tokens)
        self.states = {name: self._allocate(state.shape).copy_(state) for name, state in self.states.items()}

    def _allocate(self, shape):
        if self.folder is None or not math.prod(shape):
            return torch.zeros(shape, dtype=torch.float32, device="cpu")
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="class_prompts-", delete=False) as file:
            name = file.name
        mapped = torch.from_file(name, shared=True, size=math.prod(shape), dtype=torch.float32)
        if os.name == "posix":
            Path(name).unlink()
        return mapped.view(shape)

    # ---- Rows to the device

    def forward(self, classes):
        """Tokens of each layer for the given classes `(M,)`, no class twice: `(M, P_i, D)` each."""
        if not sum(self.lengths):
            return ()
        host_classes, rows = self._rows(classes)
        if torch.is_grad_enabled():
            rows.requires_grad_()
            rows.register_post_accumulate_grad_hook(functools.partial(self._keep_gradient, host_classes))
        return rows.split(self.lengths, dim=1)

    def _keep_gradient(self, classes, rows):
        self._gradients.append((classes, rows.grad))
        rows.grad = None

    def _rows(self, classes):
        """The classes on the host, and their rows on the classes' device: prefetched, or read now."""
        if self._coming and self._is_next(classes):
            return self._take_prefetched()
        host_classes = classes.cpu()
        return host_classes, self._read(host_classes, classes.device)

    def _read(self, classes, device):
        if device.type != "cuda":
            return self.tokens.index_select(0, classes).to(device)
        pinned = _empty_pinned((len(classes), *self.shape[1:]))
        torch.index_select(self.tokens, 0, classes, out=pinned)
        return pinned.to(device, non_blocking=True)

    # ---- Prefetching

    @property
    def prefetches(self):
        """Whether rows can be had in advance at a gain: from files, or for a GPU.

        From memory to the CPU there is nothing to wait for.
        """
        return self.folder is not None or self.anchor.device.type == "cuda"

    def prefetch(self, classes):
        """Start to bring rows that a coming `forward` will ask for, while this thread goes on.

        The calls of `forward` must ask in the same order. On the CPU, one that asks for something else is served all
        the same; on a GPU, where looking at its classes would stall the device, it fails with a device-side assertion.

        Args:
            classes: `(M,)` int64, on the CPU.
        """
        if self.prefetches and sum(self.lengths):
            _ = self.tokens  # drawn here, not in the other thread
            future = _reader.submit(self._read_ahead, classes, self.anchor.device)
            self._coming.append(_Prefetched(classes, future, []))

    def _read_ahead(self, classes, device):
        if self.folder is not None:  # one value of every page, so that the step will not wait for the disk
            for state in self.states.values():
                state.view(len(state), -1)[classes, ::1024].sum()
        if device.type != "cuda":
            return self._read(classes, device)
        stream = _copy_stream(device)
        with torch.cuda.stream(stream):
            rows = self._read(classes, device)
        stream.synchronize()
        return rows

    def _is_next(self, classes):
        expected = self._coming[0].classes
        if classes.device.type != "cuda":
            return torch.equal(expected, classes.cpu())
        if expected.shape != classes.shape:
            return False
        torch._assert_async((expected.to(classes.device, non_blocking=True) == classes).all())
        return True

    def _take_prefetched(self):
        classes, future, updated = self._coming.popleft()
        rows = future.result()
        if rows.device.type == "cuda":  # was allocated on another stream
            rows.record_stream(torch.cuda.current_stream(rows.device))
        if updated:
            stale = torch.isin(classes, torch.cat(updated)).nonzero().flatten()
            if len(stale):
                rows.index_copy_(0, stale.to(rows.device), self._read(classes[stale], rows.device))
        return classes, rows

    def discard_prefetched(self):
        """Forget what was prefetched and not asked for."""
        for coming in self._coming:
            coming.future.result()
        self._coming.clear()

    # ---- Gradients and their step

    def reduce_gradients(self, gather=False, scale=1.0):
        """Sum the gradients since the last step for each class, on the host.

        `step` does it where it was not done before; clipping and several processes need it earlier.

        Args:
            gather: Average over all processes, as DDP does. Each must have had as many backward passes over as many
                classes, the same or others. All get the same sums, so their tables stay the same bit for bit.
            scale: Of the loss, to be divided by (mixed precision).

        Returns:
            Classes `(R,)` int64 and gradients `(R, P, D)`; or None where there was no backward pass.
        """
        if self._gradients:
            classes, gradients = (_joined(parts) for parts in zip(*self._gradients, strict=True))
            self._gradients.clear()
            if gather:
                classes, gradients = _gather(classes.to(gradients.device)), _gather(gradients)
                scale = scale * dist.get_world_size()
            classes, gradients = classes.cpu(), _to_host(gradients)
            if scale != 1:
                gradients.div_(scale)
            if self._reduced is not None:
                classes, gradients = map(_joined, zip(self._reduced, (classes, gradients), strict=True))
            self._reduced = _sum_by_class(classes, gradients)
        return self._reduced

    def discard_gradients(self):
        """Forget the gradients since the last step."""
        self._gradients.clear()
        self._reduced = None

    @torch.no_grad()
    def step(self, optimizer):
        """Update the rows that got gradients since the last step; call it after `optimizer.step()`.

        Rows whose gradient is not finite are left as they are.

        Args:
            optimizer: A `torch.optim.SGD` or `AdamW`; its kind, and the hyperparameters of its first group (the
                learning rate as it is now), are those of the rows.

        Raises:
            ValueError: another optimiser, or not the one that the states are of.
        """
        check_optimizer(optimizer)
        reduced = self.reduce_gradients()
        self._reduced = None
        if reduced is None:
            return
        names = state_names(optimizer)
        if not self.states:
            self.states = {name: self._allocate(self.shape[:1] if name == "step" else self.shape) for name in names}
        if set(self.states) != set(names):
            raise ValueError(
                f"the class prompts have the optimiser states {', '.join(sorted(self.states))}, "
                f"but {type(optimizer).__name__} needs {', '.join(sorted(names)) or 'none'}"
            )
        classes, gradients = reduced
        finite = torch.linalg.vector_norm(gradients.flatten(1), ord=math.inf, dim=1).isfinite().tolist()
        chosen = [i for i, is_finite in enumerate(finite) if is_finite]
        rows = classes[chosen].tolist()
        update_rows(
            optimizer,
            [self.tokens[row] for row in rows],
            [gradients[i] for i in chosen],
            {name: [state[row] for row in rows] for name, state in self.states.items()},
        )
        for coming in self._coming:
            coming.updated.append(classes)

    def broadcast(self, device):
        """Give all processes the table of the first, by way of `device`, as DDP does with parameters."""
        self.discard_prefetched()
        for part in self.tokens.view(-1).split(1 << 24):
            on_device = part.to(device)
            dist.broadcast(on_device, src=0)
            part.copy_(on_device)

    # ---- Files

    def save(self, path):
        """Write the table to a safetensors file."""
        save_file({"tokens": self.tokens}, path, metadata={"format": "pt"})

    def load(self, path):
        """Read the table of a file that `save` wrote.

        Raises:
            ValueError: it holds something else, or a table of another shape.
        """
        self._load(path, {"tokens": (self.tokens, self.shape)})

    def save_states(self, path):
        """Write the optimiser states to a safetensors file."""
        save_file(self.states, path, metadata={"format": "pt"})

    def load_states(self, path):
        """Read the optimiser states of a file that `save_states` wrote, in place of those that there are.

        Raises:
            ValueError: they are of another shape, or of no optimiser that is supported.
        """
        with safe_open(path, framework="pt") as file:
            names = file.keys()
        shapes = {name: self.shape[:1] if name == "step" else self.shape for name in names}
        states = {name: self._allocate(shape) for name, shape in shapes.items()}
        self._load(path, {name: (state, shapes[name]) for name, state in states.items()})
        self.states = states

    def _load(self, path, expected):
        self.discard_prefetched()
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(expected):
                raise ValueError(
                    f"{path} must hold {', '.join(sorted(expected))}, got {', '.join(sorted(file.keys()))}"
                )
            for name, (tensor, shape) in expected.items():
                found = tuple(file.get_slice(name).get_shape())
                if found != tuple(shape):
                    raise ValueError(f"{name} in {path} must have shape {tuple(shape)}, got {found}")
                saved = file.get_tensor(name)
                if saved.dtype != tensor.dtype:
                    raise ValueError(f"{name} in {path} must be {tensor.dtype}, got {saved.dtype}")
                tensor.copy_(saved)


class _Prefetched(NamedTuple):
    """Rows on their way: classes `(M,)`, who brings them, and the classes that were updated meanwhile."""

    classes: torch.Tensor
    future: Future
    updated: list


def _processes_here():
    """Processes of the run on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@functools.cache
def _copy_stream(device):
    return torch.cuda.Stream(device)


def _empty_pinned(shape):
    """Page-locked float32 memory, out of torch's cache of it; copies from and to a GPU run at full speed."""
    return torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=True)


def _to_host(tensor):
    return _empty_pinned(tensor.shape).copy_(tensor) if tensor.device.type == "cuda" else tensor.cpu()


def _joined(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gather(tensor):
    """Tensors of all processes, one below the other, in order of rank."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _sum_by_class(classes, gradients):
    """Different classes and the sum of each one's gradients."""
    different, places = classes.unique(return_inverse=True)
    if len(different) == len(classes):
        return classes, gradients
    return different, gradients.new_zeros(len(different), *gradients.shape[1:]).index_add_(0, places, gradients)


__all__ = [
    "CLASS_PROMPTS_NAME",
    "CLASS_PROMPT_STATES_NAME",
    "ClassPrompts",
    "OffloadedClassPrompts",
    "build_class_prompts",
]
