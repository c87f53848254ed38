"""Commands as README, docs and docstrings give them, and the parsers that they would meet."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from functools import cache
from typing import NamedTuple
from unittest import mock

from project_files import ROOT

from vptsp import cli


class Command(NamedTuple):
    """A command of the project in a text.

    Attributes:
        place: File that has it.
        program: `vptsp embed`, `benchmarks/step.py`, ...
        words: What comes after.
    """

    place: str
    program: str
    words: list[str]

    def __str__(self):
        return f"{self.place}: {self.program} {shlex.join(self.words)}"


def commands_in(place, text):
    """Commands of the project among lines of shell, as a list of [`Command`]."""
    variables, found = {}, []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = line.strip().removeprefix("$ ")
        if assigned := re.fullmatch(r'([A-Z]+)="(.*)"', line):
            variables[assigned[1]] = assigned[2]
            continue
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        try:
            words = shlex.split(re.sub(r"(^|\s)#.*", "", line))  # a "#" within a word begins no comment
        except ValueError:  # prose with an apostrophe
            continue
        found += [Command(place, program, rest) for program, rest in _programs(words)]
    return found


def _programs(words):
    """What a line runs of the project: pairs of program and words; `vptsp a|b` are two."""
    for i, word in enumerate(words):
        before, rest = words[:i], words[i + 1 :]
        if word.rpartition("/")[2] == "vptsp" and not before:
            if rest and not rest[0].startswith("-"):
                return [(f"vptsp {name}", rest[1:]) for name in rest[0].split("|") if name != "COMMAND"]
            return []
        if word == "-m" and rest and rest[0].startswith("vptsp"):
            if rest[0] == "vptsp.cli":
                return _programs(["vptsp", *rest[1:]])
            return [(rest[0], rest[1:])]
        if word in ("train.py", "my_run.py") and (not before or before[0] in ("accelerate", "torchrun", "python")):
            return [("vptsp train", rest)]
        if word.endswith(".py") and before == ["python"]:
            return [(word, rest)]
    return []


class _Caught(Exception):
    pass


@cache
def parser_of(program):
    """The argument parser that a program makes, caught when it begins to parse.

    Raises:
        ValueError: there is no such program.
    """
    run = _entry_of(program)

    def catch(parser, *_, **__):
        raise _Caught(parser)

    early = mock.patch("vptsp.training.command_line.check_early")  # has a parser for a part of the options
    with early, mock.patch.object(argparse.ArgumentParser, "parse_known_args", catch):
        try:
            run()
        except _Caught as caught:
            parser = caught.args[0]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parser = action.choices[program.removeprefix("vptsp ")]
    parser.allow_abbrev = False
    return parser


def _entry_of(program):
    if program.startswith("vptsp "):
        name = program.removeprefix("vptsp ")
        if name not in cli.COMMANDS:
            raise ValueError(f"there is no command {name!r}")
        return lambda: cli.main([name])
    if program.endswith(".py"):
        if not (ROOT / program).is_file():
            raise ValueError(f"there is no file {program}")
        return _main_of_file(program)
    try:
        module = importlib.import_module(program)
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    return lambda: module.main([])


def _main_of_file(program):
    with mock.patch("sys.path", [str((ROOT / program).parent), *importlib.sys.path]):
        spec = importlib.util.spec_from_file_location(f"documented_{program.replace('/', '_')[:-3]}", ROOT / program)
        module = importlib.util.module_from_spec(spec)
        importlib.sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return module.main


def options_of(program) -> set[str]:
    """All `--options` that a program takes; those that pass others on to training, the latter too."""
    known = {option for action in parser_of(program)._actions for option in action.option_strings}
    return known | (options_of("vptsp train") if program in PASSED_ON else set())


PASSED_ON = tuple(
    f"benchmarks/{name}.py" for name in ("compare_methods", "choose_rates", "peers", "dependence", "no_labels")
)
"""What these don't know goes to `train.py`."""


def parse(command):
    """Parse a command's words by the program's own parser; a configuration must exist.

    Raises:
        ValueError: they can't be parsed, with the parser's message.
    """
    words = list(command.words)
    if command.program == "vptsp train" and words and not words[0].startswith("-"):
        _require_config(words.pop(0))
    parser = parser_of(command.program)
    rest = _parsed(parser, words)
    if command.program in PASSED_ON:
        rest = _parsed(parser_of("vptsp train"), rest)
    if rest:
        raise ValueError(f"unknown: {shlex.join(rest)}")


def _parsed(parser, words):
    def refuse(message):
        raise ValueError(message)

    with mock.patch.object(parser, "error", refuse):
        return parser.parse_known_args(words)[1]


def _require_config(name):
    if name == "my_run.yaml":  # the reader's, in docs/extending.md
        return
    if not (ROOT / name).is_file() and not (ROOT / "configs" / f"{name}.yaml").is_file():
        raise ValueError(f"there is no configuration {name}")
