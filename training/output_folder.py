"""The folder that a run writes to: whose it is, who uses it now, and how its files are replaced all together.

Light to import, so that a run can refuse a folder before it loads anything.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from ..files.atomic import sync_path, write_text
from ..files.json_files import JsonError, read_json_object
from ..files.locks import LOCK_FILE, InUseError, locked
from ..files.marks import RESULTS_NAME, RUN, written_as
from .run_errors import CheckpointWriteError


CONFIG_NAME = "config.json"
PICTURES = tuple(
    f"pictures/{name}.png"
    for name in ("attention", "before_after", "confusion", "curves", "failures", "map", "neighbours", "proxies")
)
PARTIAL_NAME = ".retriever.partial"
READY_NAME = ".retriever.ready"
_RUN_MARK = ".run"
# A folder without the first is no model, and without the second no finished run: gone first, back last.
_MARKS = (CONFIG_NAME, RESULTS_NAME)
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "tf_model.h5", "flax_model.msgpack", "*.ckpt")


class OutputFolderError(ValueError):
    """A folder that can't be written to without loss. The message names it and what to do."""


_held = set()  # folders that this process holds


@contextmanager
def output_held(args):
    """Keep other runs out of `output_dir` while the block runs; inside of another such block it changes nothing.

    One process holds the lock for all ranks. The system gives it back however that process ends. Files of an earlier
    run whose replacement was cut short are put in place.

    Args:
        args: A `VPTSPTrainingArguments`.

    Raises:
        CheckpointWriteError: the folder can't be written to.
        InUseError: another run holds it. Either is raised on every process.
    """
    from accelerate.utils import gather_object

    folder = Path(args.output_dir).absolute()
    if folder in _held:
        yield
        return
    with ExitStack() as stack:
        problem = None
        if args.process_index == 0:
            try:
                stack.enter_context(_lock(folder, args.output_dir))
                finish_replacing(folder)
            except InUseError as error:
                problem = error
            except OSError as error:
                message = f"output_dir {args.output_dir} can't take checkpoints: {error.strerror or error}"
                problem = CheckpointWriteError(*([message] if error.errno is None else [error.errno, message]))
        if problem := next(filter(None, gather_object([problem])), None):
            raise problem
        _held.add(folder)
        try:
            yield
        finally:
            _held.discard(folder)


def last_run(folder) -> str | None:
    """Which run has trained in a folder last; None where none has, or only one of an older version."""
    path = Path(folder) / _RUN_MARK
    return path.read_text(encoding="utf-8") if path.is_file() else None


def mark_run(folder, run):
    """Note that a run trains in a folder, which it holds (`output_held`)."""
    write_text(Path(folder) / _RUN_MARK, run)


@contextmanager
def output_of(run, folder):
    """Hold a folder on this process while the block writes what a run has, if no other has trained there since.

    Args:
        run: `last_run` of when the run began to be, or what it has been marked by.
        folder: The run's `output_dir`.

    Raises:
        InUseError: another run holds it.
        OutputFolderError: another run has trained there; the message says what to do.
    """
    absolute = Path(folder).absolute()
    with nullcontext() if absolute in _held else _lock(absolute, folder):
        if last_run(folder) != run:
            raise OutputFolderError(
                f"another run has trained in output_dir {folder} since: give another folder, or its checkpoints would "
                "lie beside this run's results"
            )
        yield


def _lock(folder, shown):
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    return locked(folder / LOCK_FILE, f"output_dir {shown}")


# ---- Whose it is


def check_output_folder(folder, backbone=None, resume=None, overwrite=False):
    """Refuse a folder that a new run would spoil.

    Args:
        folder: `output_dir`; it need not exist.
        backbone: Name or folder of the run's backbone.
        resume: `resume_from_checkpoint` of the run.
        overwrite: Whether an earlier run's results may be replaced.

    Raises:
        OutputFolderError: it can't be written to, holds another model or a checkpoint's files, or (unless they are to
            be gone on with or replaced) an earlier run's results.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputFolderError(f"output_dir must be a folder, {folder} is a file")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputFolderError(f"output_dir {folder} can't be written: no permission in {parent}")
    refuse_other_model(folder, backbone)
    names = (RESULTS_NAME, CONFIG_NAME, READY_NAME)
    earlier = [folder / name for name in names] + list(folder.glob("checkpoint-*"))
    if any(path.exists() for path in earlier) and not (overwrite or _goes_on(folder, resume)):
        raise OutputFolderError(
            f"output_dir {folder} holds an earlier run. Give another output_dir, --resume_from_checkpoint true to "
            "go on with it, or --overwrite_output to replace it"
        )


def _goes_on(folder, resume):
    """Whether the checkpoint to resume from is one of this folder's."""
    if resume is True or not resume:
        return bool(resume)
    return Path(resume).absolute().parent.resolve() == folder.resolve()


def refuse_other_model(folder, backbone=None):
    """Refuse to put a retriever into a folder that holds something else than one.

    Args:
        folder: Where it is to go.
        backbone: Name or folder of its backbone.

    Raises:
        OutputFolderError: the folder is the backbone's, a checkpoint, a store or an index of embeddings, or has the
            configuration or weights of a model that is no retriever.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    if backbone is not None and Path(backbone).is_dir() and folder.samefile(backbone):
        raise OutputFolderError(f"output_dir {folder} is the folder of the backbone, which would be overwritten")
    if (folder / READY_NAME).is_dir():  # of a retriever whose files are being replaced
        return
    if (what := written_as(folder)) and not what.startswith(RUN):
        raise OutputFolderError(f"output_dir {folder} is {what}. Give another one")
    if (folder / "run.json").is_file():
        raise OutputFolderError(f"output_dir {folder} is a checkpoint of another run, which would be spoiled")
    if (found := model_in(folder)) and _model_type(folder / CONFIG_NAME) != "vptsp":
        kind = "without config.json" if found != CONFIG_NAME else f"of type {_model_type(folder / CONFIG_NAME)!r}"
        raise OutputFolderError(
            f"output_dir {folder} holds another model ({found}, {kind}), which would be overwritten. Give another one"
        )


def model_in(folder) -> str | None:
    """The name of a file by which a folder holds a model: its configuration, or its weights; None if it holds none."""
    folder = Path(folder)
    weights = sorted(path.name for pattern in _WEIGHTS for path in folder.glob(pattern))
    return CONFIG_NAME if (folder / CONFIG_NAME).exists() else next(iter(weights), None)


def _model_type(path):
    try:
        return read_json_object(path).get("model_type")
    except (OSError, JsonError):
        return None


# ---- Replacing its files


@contextmanager
def replaced_together(folder):
    """A folder beside the files of `folder`, to write new ones to; they take their places once all are there.

    Ended at whatever moment, `folder` has all the old files, or all the new ones; or, between the first and the last
    renaming, neither `config.json` nor `all_results.json`, if there are new ones, while what is not yet in its place
    is in `.retriever.ready`, for `finish_replacing`. Other files of `folder` stay, but for the pictures of the
    results that are replaced.

    Args:
        folder: It is made if it is not there.

    Yields:
        `Path` of an empty folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finish_replacing(folder)
    partial = folder / PARTIAL_NAME
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync_path(path)
        partial.rename(folder / READY_NAME)
        sync_path(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    finish_replacing(folder)


def finish_replacing(folder):
    """Do what is left to do of `replaced_together`, where a run was ended in its middle; otherwise nothing."""
    folder = Path(folder)
    ready = folder / READY_NAME
    if not ready.is_dir():
        return
    files = [path.relative_to(ready) for path in sorted(ready.rglob("*")) if path.is_file()]
    marks = [Path(name) for name in _MARKS if Path(name) in files]
    for name in reversed(marks):
        (folder / name).unlink(missing_ok=True)
    if Path(RESULTS_NAME) in marks and "picture" not in read_json_object(ready / RESULTS_NAME):
        for name in PICTURES:  # of other results; those of these are drawn once these are there
            (folder / name).unlink(missing_ok=True)
    sync_path(folder)
    for name in [*(name for name in files if name not in marks), *marks]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (ready / name).replace(folder / name)
        if name in marks:
            sync_path(folder)
    shutil.rmtree(ready)


__all__ = [
    "OutputFolderError",
    "check_output_folder",
    "finish_replacing",
    "last_run",
    "mark_run",
    "model_in",
    "output_held",
    "output_of",
    "refuse_other_model",
    "replaced_together",
]
