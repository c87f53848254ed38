"""Runs in folders of one output: done once, gone on with after a stop, shared by processes that work side by side.

A run's folder has `arguments.json` (what it was started with), `log.txt`, and either `all_results.json` or
`failure.txt` (why there are none). Who does a run holds `.run.lock` in its folder.
"""

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import time
import traceback

from vptsp.files.atomic import write_json, write_text
from vptsp.files.locks import InUseError, locked


RESULTS, FAILURE, ARGUMENTS = "all_results.json", "failure.txt", "arguments.json"
EMBEDDINGS = "embeddings"
FIXED = ("--eval_strategy", "no", "--picture_queries", "0")


def run_command(config, seed, folder, overrides):
    """Arguments of `train.py` for one run; later options win over earlier ones."""
    return [str(config), *FIXED, *overrides, "--seed", str(seed), "--output_dir", str(folder)]


def check_earlier_run(folder, arguments):
    """Refuse a folder that holds a run with other options.

    Raises:
        ValueError: naming the folder and its options.
    """
    path = folder / ARGUMENTS
    if path.is_file() and (earlier := json.loads(path.read_text(encoding="utf-8"))) != arguments:
        raise ValueError(
            f"{folder} holds a run with other options; give another --output or remove it. "
            f"They were: {shlex.join(earlier)}"
        )


def finish(folder, arguments, launch):
    """Do one run, unless it is done already.

    Args:
        folder: Of the run.
        arguments: Of `train.py`.
        launch: Gets arguments and a log file, and returns the exit status.

    Returns:
        The run's results, or `{"failure": last line of its log}`.

    Raises:
        InUseError: another process is at it.
    """
    with locked(folder / ".run.lock", f"the run {folder}"):
        if not (folder / RESULTS).is_file():
            (folder / FAILURE).unlink(missing_ok=True)
            shutil.rmtree(folder / EMBEDDINGS, ignore_errors=True)  # of another retriever, if there are any
            write_json(folder / ARGUMENTS, arguments)
            checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
            resume = ["--resume_from_checkpoint", str(checkpoints[-1])] if checkpoints else []
            status = launch([*arguments, *resume], folder / "log.txt")
            if status != 0 or not (folder / RESULTS).is_file():
                lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                write_text(folder / FAILURE, lines[-1] if lines else f"exit status {status}")
        return outcome(folder)


def outcome(folder):
    """What a run's folder says: its results, `{"failure": text}`, or None where it is not done.

    Raises:
        ValueError: the results can't be read.
    """
    if (folder / RESULTS).is_file():
        try:
            return json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / RESULTS} is not JSON: {error}") from error
    if (folder / FAILURE).is_file():
        return {"failure": (folder / FAILURE).read_text(encoding="utf-8")}
    return None


def outcomes(output, pattern, overrides):
    """Of all runs that are done in a folder, whoever did them.

    Args:
        output: Folder with a folder per row, with a folder per run.
        pattern: Of the names of the runs' folders.
        overrides: Options that all rows have.

    Returns:
        Row name -> {name of the run's folder: its `outcome`}, both sorted.

    Raises:
        ValueError: a run had other options for all rows.
    """
    found = {}
    start = [*FIXED, *overrides]
    for path in sorted(output.glob(f"*/{pattern}/{ARGUMENTS}")):
        folder = path.parent
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier[1 : 1 + len(start)] != start:
            raise ValueError(
                f"{folder} holds a run with other options; give another --output or remove it. "
                f"They were: {shlex.join(earlier)}"
            )
        if (result := outcome(folder)) is not None:
            found.setdefault(folder.parent.name, {})[folder.name] = result
    return found


def share(tasks, do, pause=10.0):
    """Do tasks in turn; what another process is at is passed over and picked up at the end.

    Args:
        tasks: Of any kind.
        do: Gets a task, and raises `InUseError` where another process is at it.
        pause: Seconds between looks at tasks that others are still at.
    """
    left = list(tasks)
    while left:
        busy = []
        for task in left:
            try:
                do(task)
            except InUseError as error:
                print(f"passed over for now: {error}", flush=True)
                busy.append(task)
        if len(busy) == len(left):
            time.sleep(pause)
        left = busy


def write_once(path, text):
    """Write a file that runs depend on; it may be there already, with the same text.

    Raises:
        ValueError: it has another.
    """
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} was written for other data or options; give another --output or remove it")
    write_text(path, text)


def class_list_options(folder, **classes):
    """Write lists of classes, in place of whatever else says which classes train and which test.

    Args:
        folder: Existing folder for the lists.
        **classes: `train` and `test`, names of classes each.

    Returns:
        Options of `train.py`, to come after all others: with the lists, and without another way to split.
    """
    from vptsp.data_scripts.dataset_options import ClassSplitOptions

    options = []
    for name in ("class_split", "test_share", "split_seed"):
        options += [f"--{name}", str(getattr(ClassSplitOptions, name))]
    for side, names in classes.items():
        path = folder / f"{side}_classes.txt"
        write_once(path, "".join(f"{name}\n" for name in names))
        options += [f"--{side}_classes", str(path)]
    return options


@contextlib.contextmanager
def writing(output):
    """Hold the lock of what is made of all runs of a folder, so that the last to write has read the most."""
    with locked(output / ".tables.lock", f"the tables of {output}", timeout=600):
        yield


def launch_process(arguments, log):
    """`train.py` in a process of its own, so that peak memory is the run's; everything it prints goes to `log`."""
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "vptsp.train", *arguments]
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def launch_here(arguments, log):
    """`train.py` in this process, which spares a start; everything it prints goes to `log`."""
    from vptsp import train

    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            train.main(arguments)
        except SystemExit as error:
            if error.code not in (1, 2):  # interrupted
                raise
            return error.code
        except FloatingPointError:  # a rate that is too high is a result, too
            traceback.print_exc()
            return 1
    return 0
