"""A table in host memory, or in memory-mapped files, of which a device sees some rows, with its optimiser states.

Shapes: C classes, M classes in a batch, P prompts of all layers together, D backbone width.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import nn

from ..files.atomic import atomic_path
from ..loading_vptsp import read_weights, save_with_digest
from .local_processes import processes_here
from .row_prefetch import RowPrefetch


# Of the memory that is available, what table and states may take before they go to memory-mapped files.
MEMORY_SHARE = 0.8
# Optimiser states by torch's names: of AdamW, of SGD with momentum and without.
STATE_NAMES = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}, set())


class HostTable(nn.Module):
    """Tokens of all classes and their optimiser states: float32 on the CPU, neither parameters nor buffers.

    Attributes:
        shape: `(C, P, D)`.
        states: Optimiser states by torch's name, `(C, P, D)` float32; `step` is `(C,)`.
        folder: Where the memory-mapped files are; None in memory.
        sharers: The processes that share the files; None where this one has its own.
    """

    def __init__(self, shape, std):
        super().__init__()
        self.shape = shape
        self.std = std
        self.states = {}
        self.folder = None
        self.sharers = None
        self._tokens = None
        self._prefetched = RowPrefetch()
        # Moves with the model, and lets transformers see that there is something to initialise.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def init_weights(self):
        """Draw the table as the dense store does; one that does not fit in memory is drawn when it has a place."""
        if self._tokens is not None or self.fits_in_memory(num_states=0):
            self._draw()

    def _draw(self):
        if self._tokens is None:
            self._tokens = self._allocate_tokens()
        with self.writing() as may_write:
            if may_write:
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

    def read(self, classes, device):
        """Rows of classes `(M,)`, on the CPU, brought to a device: `(M, P, D)`."""
        if device.type != "cuda":
            return self.tokens.index_select(0, classes).to(device)
        pinned = empty_pinned((len(classes), *self.shape[1:]))
        torch.index_select(self.tokens, 0, classes, out=pinned)
        return pinned.to(device, non_blocking=True)

    def writing(self):
        """A block in which table and states are written, by the processes that share them together.

        Returns:
            Context manager that gives whether this process is to write.
        """
        return nullcontext(True) if self.sharers is None else self.sharers.writing()

    def new_states(self, names):
        """Zeros for optimiser states of these names, where the table is."""
        return {name: self._allocate(self.shape[:1] if name == "step" else self.shape) for name in names}

    # ---- Reading ahead

    def take(self, classes):
        """Classes `(M,)` on the host, and their rows `(M, P, D)` on the classes' device: prefetched, or read now."""
        return self._prefetched.take(self, classes)

    @property
    def prefetches(self):
        """Whether to read ahead is a gain: from files, or for a GPU. From memory to the CPU nothing waits."""
        return self.folder is not None or self.anchor.device.type == "cuda"

    def prefetch(self, classes):
        """Start to bring rows that a coming `take` will ask for, while this thread goes on.

        The calls of `take` must ask in the same order. On the CPU, one that asks for something else is served all the
        same; on a GPU, where looking at its classes would stall the device, it fails with a device-side assertion.

        Args:
            classes: `(M,)` int64, on the CPU.
        """
        if self.prefetches and self.shape[1]:
            self._prefetched.start(self, classes)

    def note_update(self, classes):
        """Rows of these classes, `(M,)` on the CPU, have changed: those that were prefetched are read again."""
        self._prefetched.note_update(classes)

    def discard_prefetched(self):
        """Forget what was prefetched and not asked for, as before all rows are replaced or move."""
        self._prefetched.discard()

    # ---- Several processes

    def broadcast(self, device):
        """Give all processes the table of the first, by way of `device`, as DDP does with parameters."""
        self.discard_prefetched()
        with self.writing() as may_write:
            for part in self.tokens.view(-1).split(1 << 24):
                on_device = part.to(device)
                dist.broadcast(on_device, src=0)
                if may_write:
                    part.copy_(on_device)

    # ---- Memory and memory-mapped files

    def num_bytes(self, num_states):
        """Bytes of the table and of as many optimiser states."""
        return 4 * math.prod(self.shape) * (1 + num_states)

    def fits_in_memory(self, num_states):
        """Whether table and states, of all processes here, take at most `MEMORY_SHARE` of the available memory."""
        processes = processes_here()
        held = 0 if self._tokens is None or self.folder is not None else self.num_bytes(0)
        available = psutil.virtual_memory().available + held * processes
        return processes * self.num_bytes(num_states) <= MEMORY_SHARE * available

    def place(self, folder, num_states=2, local=None):
        """Keep table and states in memory-mapped files from now on, not in memory.

        The files are scratch space: on POSIX systems they have no name once they are mapped, and vanish with the
        process. Processes of one machine share one table, which the first of them writes; it alone has the states.
        Where they don't see each other's files, each has its own.

        Args:
            folder: Folder on a fast local disk; made where it does not exist.
            num_states: Optimiser states that will join the table.
            local: [`LocalProcesses`] of a run, all of which call this together; None for a process by itself.

        Raises:
            OSError: the disk has not enough room.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shares = local is not None and local.count > 1 and self._see_the_same(folder, local)
        processes = 1 if shares else processes_here()
        needed, free = processes * self.num_bytes(num_states), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"class_prompt_folder {folder} has {free / 2**30:.1f} GiB left, class prompts and their optimiser "
                f"states need {needed / 2**30:.1f} GiB ({processes} processes)"
            )
        self.discard_prefetched()
        self.folder, self.sharers = folder, local if shares else None
        if self._tokens is not None:
            earlier, self._tokens = self._tokens, self._allocate_tokens()
            with self.writing() as may_write:
                if may_write:
                    self._tokens.copy_(earlier)
        held = self.states if self.sharers is None or self.sharers.is_owner else {}
        self.states = {name: self._allocate(state.shape).copy_(state) for name, state in held.items()}

    @staticmethod
    def _see_the_same(folder, local):
        """Whether a file that the owner makes is there for all processes of the machine."""
        with tempfile.TemporaryDirectory(dir=folder) as own:
            return local.all_of(Path(local.from_owner(own)).is_dir())

    def _allocate_tokens(self):
        """Room for the table, which those that share it map from one file."""
        if self.sharers is None or not math.prod(self.shape):
            return self._allocate(self.shape)
        name = mapped = error = None
        if self.sharers.is_owner:
            try:
                name, mapped = self._map_new(self.shape)
            except OSError as failure:
                error = failure
        name = self.sharers.from_owner(name)
        if error is not None:
            raise error
        if name is None:
            raise OSError(f"class_prompt_folder {self.folder} has no room for class prompts (first process)")
        if mapped is None:
            mapped = _map(name, self.shape)
        self.sharers.all_of(True)  # before it loses its name
        if self.sharers.is_owner:
            _drop_name(name)
        return mapped

    def _allocate(self, shape):
        if self.folder is None or not math.prod(shape):
            return torch.zeros(shape, dtype=torch.float32, device="cpu")
        name, mapped = self._map_new(shape)
        _drop_name(name)
        return mapped

    def _map_new(self, shape):
        """A new file of zeros, in `folder`: its name, and the tensor that it is."""
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="class_prompts-", delete=False) as file:
            name = file.name
            try:
                _reserve(file.fileno(), 4 * math.prod(shape))
                return name, _map(name, shape)
            except OSError as error:
                Path(name).unlink()
                raise OSError(
                    error.errno, f"class_prompt_folder {self.folder} has no room for class prompts: {error.strerror}"
                ) from error

    # ---- Saved files

    def save(self, path):
        """Write the table to a safetensors file, with its digest, which `load` compares."""
        _save({"tokens": self.tokens}, path)

    def load(self, path):
        """Read the table of a file that `save` wrote; ValueError for damage, other contents, shape or dtype."""
        self._load({"tokens": self.tokens}, read_weights(path), path, self.writing())

    def save_states(self, path):
        """Write the optimiser states to a safetensors file."""
        _save(self.states, path)

    def load_states(self, path):
        """Read, in place of the states there are, those that `save_states` wrote.

        Raises:
            ValueError: they are of no optimiser that has a rule for rows, of another shape or dtype, or damaged.
        """
        saved = read_weights(path)
        names = set(saved)
        if names not in STATE_NAMES:
            known = " or ".join(", ".join(sorted(known)) or "nothing" for known in STATE_NAMES)
            raise ValueError(f"{path} must hold {known}, got {', '.join(sorted(names))}")
        if self.sharers is None or self.sharers.is_owner:
            states = self.new_states(names)
            self._load(states, saved, path, nullcontext(True))
            self.states = states

    def _load(self, tensors, saved, path, writing):
        self.discard_prefetched()
        if set(saved) != set(tensors):
            expected, found = (", ".join(sorted(names)) for names in (tensors, saved))
            raise ValueError(f"{path} must hold {expected}, got {found}")
        for name, tensor in tensors.items():
            expected, found = tuple(tensor.shape), tuple(saved[name].shape)
            if found != expected:
                raise ValueError(f"{name} in {path} must have shape {expected}, got {found}")
            if saved[name].dtype != tensor.dtype:
                raise ValueError(f"{name} in {path} must be {tensor.dtype}, got {saved[name].dtype}")
        with writing as may_write:
            if may_write:
                for name, tensor in tensors.items():
                    tensor.copy_(saved[name])


def _map(name, shape):
    """A file as a float32 tensor."""
    return torch.from_file(name, shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)


def _drop_name(name):
    if os.name == "posix":
        Path(name).unlink()


def _reserve(descriptor, num_bytes):
    """Give a file all its blocks now: one that gets them as it fills ends the process by SIGBUS on a full disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:  # macOS, Windows: by writing
        zeros = bytes(1 << 20)
        for start in range(0, num_bytes, len(zeros)):
            os.write(descriptor, zeros[: num_bytes - start])


def empty_pinned(shape):
    """Page-locked float32 memory, out of torch's cache of it; copies from and to a GPU run at full speed."""
    return torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=True)


def _save(tensors, path):
    with atomic_path(path) as temporary:
        save_with_digest(tensors, temporary)


__all__ = ["HostTable", "empty_pinned"]
