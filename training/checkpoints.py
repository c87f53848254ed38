"""Checkpoint folders: written whole or not at all, in safetensors and JSON only, and checked before they are read.

A checkpoint is put together in `output_dir/.checkpoint-N.partial` and renamed to `checkpoint-N` once all of it is on
the disk. So whatever ends a run at whatever moment, a folder of that name is whole; and if it is not after all (a disk
that broke, a deletion that was cut short), the sizes and digests in its `run.json` say so.
"""

from __future__ import annotations

import logging
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer_callback import TrainerState

from ..files import json_files
from ..files.atomic import sync_path, write_json
from ..files.digests import DamagedFileError, check_file, folder_record
from .run_errors import CheckpointError, CheckpointWriteError


RUN_NAME = "run.json"
STATE_NAME = "trainer_state.json"
OPTIMIZER_NAME = "optimizer"
PROGRESS_NAME = "progress"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 has the sizes of files, but no digests

WRITE_ERRORS = (OSError, SafetensorError)
"""What a full disk, a missing permission or a file in the way raises."""

logger = logging.getLogger(__name__)


# ---- Trees of tensors and numbers, in two files


def save_tree(folder, name, tree):
    """Write nested dicts, lists and tuples of tensors and plain values to `name.safetensors` and `name.json`.

    Args:
        folder: Existing folder.
        name: Of both files, without an ending.
        tree: Its leaves are tensors, numpy arrays, numbers, strings, booleans and None.

    Raises:
        TypeError: a leaf is something else; the message says where.
        OSError or SafetensorError: it can't be written.
    """
    tensors = {}
    packed = _packed(tree, name, tensors)
    save_file(tensors, Path(folder) / f"{name}.safetensors")
    write_json(Path(folder) / f"{name}.json", packed, indent=None)


def load_tree(folder, name):
    """What `save_tree` wrote; tensors are on the CPU.

    Raises:
        CheckpointError: the files don't belong together.
    """
    folder = Path(folder)
    packed = read_json(folder / f"{name}.json")
    try:
        return _unpacked(packed, load_file(folder / f"{name}.safetensors"))
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder / name}.json and .safetensors don't belong together ({error!r})") from error


def _packed(value, place, tensors):
    """The JSON form of a tree: containers say what they are, tensors go to `tensors` and leave their name."""
    if isinstance(value, np.ndarray):
        return {"array": _packed(torch.from_numpy(value), place, tensors), "dtype": str(value.dtype)}
    if isinstance(value, torch.Tensor):
        tensors[place] = value.detach().contiguous()
        return {"tensor": place}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(item, f"{place}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_packed(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no such numbers
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{place} can't be saved in a checkpoint: {type(value).__name__} is no tensor, number or string")


def _unpacked(value, tensors):
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "float" in value:
        return float(value["float"])
    if "array" in value:
        return _unpacked(value["array"], tensors).numpy().astype(value["dtype"], copy=False)
    if "tuple" in value:
        return tuple(_unpacked(item, tensors) for item in value["tuple"])
    return {key: _unpacked(item, tensors) for key, item in value["dict"]}


# ---- Random numbers


def random_state(device):
    """State of every random generator that training may draw from: Python's, NumPy's, the CPU's and the device's."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state, device):
    """Put back what `random_state` gave; a device of another type than then keeps its own."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])


# ---- Folders


def checkpoint_name(step):
    """`checkpoint-N`, the name that transformers gives and looks for."""
    return f"checkpoint-{step}"


def checkpoint_step(folder) -> int | None:
    """N, if the folder is called `checkpoint-N`."""
    match = re.fullmatch(r"checkpoint-(\d+)", Path(folder).name)
    return int(match[1]) if match else None


def checkpoints_in(root) -> list[Path]:
    """All folders `checkpoint-N` in `root`, by N."""
    found = [path for path in Path(root).glob("checkpoint-*") if checkpoint_step(path) is not None and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def partial_checkpoint(root, step) -> Path:
    """The folder in which a checkpoint is put together: beside its final place, so that relative paths stay true."""
    return Path(root) / f".{checkpoint_name(step)}.partial"


def prepare_root(root):
    """Make sure that checkpoints can be written to `root`, and clear away what an interrupted run left half done.

    Raises:
        CheckpointWriteError: `root` can't be written to; the message names it.
    """
    root = Path(root)
    try:
        partial_checkpoint(root, 0).mkdir(parents=True, exist_ok=True)  # a trial, which the loop takes away again
        for path in root.glob(".checkpoint-*"):
            final = root / path.stem[1:]
            if _hidden_kind(path) == "replaced" and not final.exists():  # between the two renames of `publish`
                path.rename(final)
            elif _hidden_kind(path):
                _remove(path)
    except OSError as error:
        raise _write_error(error, f"output_dir {root} can't take checkpoints") from error


def publish(partial, record):
    """Turn a folder that holds all of a checkpoint into the checkpoint, in one step.

    Args:
        partial: As from `partial_checkpoint`.
        record: What goes into `run.json`, along with the sizes and digests of all files.
    """
    partial = Path(partial)
    files = folder_record(partial, exclude=(RUN_NAME,))
    write_json(partial / RUN_NAME, {"format_version": FORMAT_VERSION, **record, "files": files}, indent=1)
    for path in [*partial.rglob("*"), partial]:
        sync_path(path)
    final, replaced = partial.with_name(partial.stem[1:]), partial.with_suffix(".replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_path(final.parent)
    if replaced.exists():
        _remove(replaced)


def discard_partial(partial):
    """Remove a checkpoint that could not be finished, as far as that is possible."""
    shutil.rmtree(partial, ignore_errors=True)


def rotate(root, limit, keep):
    """Delete the oldest checkpoints until `limit` are left.

    Args:
        root: Folder of the checkpoints.
        limit: How many to leave; None or 0 for all.
        keep: Folders that stay in any case: the one just written, and the best.
    """
    if not limit:
        return
    checkpoints = checkpoints_in(root)
    keep = {Path(folder).name for folder in keep if folder is not None}
    deletable = [folder for folder in checkpoints if folder.name not in keep]
    for folder in deletable[: max(len(checkpoints) - max(limit, len(keep)), 0)]:
        _delete(folder)


def delete_checkpoints(folders):
    """Delete checkpoints, those of them that are still there."""
    for folder in folders:
        if folder.is_dir():
            _delete(folder)


def _delete(folder):
    """Delete a checkpoint; if that is cut short, no half of it is left under its name. A retriever stays."""
    if (folder / "config.json").is_file() and not (folder / RUN_NAME).is_file():
        logger.warning("%s is not deleted: it holds a model, but is no checkpoint", folder)
        return
    doomed = folder.with_name(f".{folder.name}.deleted")
    folder.rename(doomed)
    _remove(doomed)


def _hidden_kind(folder) -> str | None:
    """`partial`, `replaced` or `deleted`: what a folder `.checkpoint-N.*` is."""
    match = re.fullmatch(r"\.checkpoint-\d+\.(partial|replaced|deleted)", Path(folder).name)
    return match[1] if match else None


def write_failure(folder, error) -> CheckpointWriteError:
    """An error that says which checkpoint could not be written, why, and that the earlier ones are intact."""
    folder = Path(folder)
    earlier = checkpoints_in(folder.parent)
    intact = f"earlier checkpoints are intact, the last is {earlier[-1].name}" if earlier else "there was none before"
    return _write_error(error, f"{folder} could not be written ({intact})")


def _write_error(error, message):
    """Of the same number as `error`, an `OSError`; tells the reason after `message`."""
    message = f"{message}: {error.strerror or error}"
    return CheckpointWriteError(message) if error.errno is None else CheckpointWriteError(error.errno, message)


def _remove(path):
    """A folder with all that is in it, or a link, but not what a link leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


# ---- Reading


def check_files(folder) -> dict:
    """Check that every file of a checkpoint is there and is the one that was written.

    Returns:
        Its `run.json`.

    Raises:
        CheckpointError: it is no checkpoint, or a file of it is missing, cut off or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    if not (folder / RUN_NAME).is_file():
        raise CheckpointError(f"{folder} is no checkpoint of VPTSPTrainer: it has no {RUN_NAME}")
    record = read_json(folder / RUN_NAME, json_files.read_json_object)
    version = record.get("format_version")
    if version not in READABLE_VERSIONS:
        expected = " or ".join(map(str, READABLE_VERSIONS))
        raise CheckpointError(f"{folder / RUN_NAME} has format_version {version!r}, expected {expected}")
    if not isinstance(record.get("files"), dict):
        raise CheckpointError(f"{folder / RUN_NAME} lists no files")
    for name, expected in record["files"].items():
        _check_file(folder, name, {"bytes": expected} if isinstance(expected, int) else expected)
    return record


def check_listed_file(path):
    """Check that a file of a checkpoint is the one that was written; of another folder, nothing is known.

    Raises:
        CheckpointError: it is damaged, or the checkpoint's `run.json` can't be read.
    """
    path = Path(path)
    record = path.parent / RUN_NAME
    record = read_json(record, json_files.read_json_object) if record.is_file() else {}
    expected = record["files"].get(path.name) if isinstance(record.get("files"), dict) else None
    if isinstance(expected, dict):  # older versions listed the size alone, which safetensors compares as well
        _check_file(path.parent, path.name, expected)


def check_checkpoint(folder) -> dict:
    """Check that a checkpoint is whole, and that a run can go on from it.

    Returns:
        Its `run.json`.

    Raises:
        CheckpointError: as of `check_files`, or it lacks what going on takes.
    """
    folder = Path(folder)
    record = check_files(folder)
    for name in (STATE_NAME, f"{OPTIMIZER_NAME}.json", f"{PROGRESS_NAME}.json"):
        if name not in record["files"]:
            raise CheckpointError(f"{folder} was saved without {name} (save_only_model), so no run can go on from it")
    for part in ("settings", "model"):
        if not isinstance(found := record.get(part), dict):
            raise CheckpointError(f"{folder / RUN_NAME} must have a mapping as {part}, got a {type(found).__name__}")
    try:
        state = TrainerState.load_from_json(str(folder / STATE_NAME))
    except TypeError as error:
        raise CheckpointError(f"{folder / STATE_NAME} does not hold the state of a trainer ({error})") from error
    step = checkpoint_step(folder)
    if not isinstance(state.global_step, int) or state.global_step < 1 or step not in (None, state.global_step):
        expected = "an integer >= 1" if step is None else step
        raise CheckpointError(f"{folder / STATE_NAME}: global_step must be {expected}, got {state.global_step!r}")
    return record


def last_checkpoint(root) -> Path:
    """The last whole checkpoint in `root`; those that are not are passed over, with a warning.

    Raises:
        CheckpointError: there is none.
    """
    problems = []
    for folder in reversed(checkpoints_in(root)):
        try:
            check_checkpoint(folder)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            for problem in problems:
                logger.warning("%s; going on from %s", problem, folder.name)
            return folder
    reason = f" that is whole: {problems[0]}" if problems else ""
    raise CheckpointError(f"resume_from_checkpoint: output_dir {root} holds no checkpoint{reason}")


def _check_file(folder, name, expected):
    try:
        check_file(folder, name, expected)
    except DamagedFileError as error:
        raise CheckpointError(str(error)) from error
    path = Path(folder) / name
    if "sha256" in expected:
        return
    if path.suffix == ".json":
        read_json(path)
    elif path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


def read_json(path, read=json_files.read_json):
    """What a JSON file of a checkpoint holds.

    Args:
        path: The file.
        read: How it is read: `read_json_object`, where it must be an object.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return read(path)
    except json_files.JsonError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


__all__ = [
    "check_checkpoint",
    "check_files",
    "check_listed_file",
    "checkpoints_in",
    "delete_checkpoints",
    "last_checkpoint",
]
