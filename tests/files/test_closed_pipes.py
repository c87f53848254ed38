"""Output into a pipe that nobody reads: the end of a command, without a word."""

import os
import subprocess
import sys
import types
from contextlib import contextmanager

import pytest

from vptsp import cli
from vptsp.files.closed_pipes import ended_by_closed_pipes


@contextmanager
def closed_pipe():
    """The end to write to of a pipe whose other end is closed."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        yield stream


@pytest.mark.parametrize("words", [["--help"], ["search", "--help"], ["train", "--help"], ["check", "digits"]])
def test_commands_end_quietly(words, tmp_path):
    command = [sys.executable, "-m", "vptsp.cli", *words]
    with closed_pipe() as stdout:
        found = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (141, "")


def test_errors_end_quietly(tmp_path):
    command = [sys.executable, "-m", "vptsp.cli", "serch"]
    with closed_pipe() as stderr:
        found = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=tmp_path)
    assert (found.returncode, found.stdout) == (141, "")


def test_what_commands_make_of_errors_of_files_is_passed_over(monkeypatch):
    """They all catch `OSError`, which a closed pipe is too."""

    def run(words):
        try:
            print("a line", flush=True)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    for name in cli.COMMANDS:
        monkeypatch.setitem(cli.COMMANDS, name, ("printing", ""))
    monkeypatch.setitem(sys.modules, "printing", types.SimpleNamespace(main=lambda words, prog=None: run(words)))
    for name in cli.COMMANDS:
        with closed_pipe() as stdout, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            with pytest.raises(SystemExit) as ended:
                cli.main([name])
            assert ended.value.code == 141
            assert sys.stdout is stdout


def test_other_broken_pipes_are_errors_and_open_pipes_are_written_to(capsys):
    with pytest.raises(BrokenPipeError), ended_by_closed_pipes(), closed_pipe() as other:
        print("said")
        print("lost", file=other, flush=True)
    assert capsys.readouterr().out == "said\n"
