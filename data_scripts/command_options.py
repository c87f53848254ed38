"""Options of commands that name data, made of the fields of `DataArguments`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import fields

from ..names.registry import nearest
from .data_arguments import DataArguments
from .dataset_registry import DATASETS


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with exit status 2."""

    def parse_known_args(self, args=None, namespace=None):
        """As `parse_args`: a word that no option takes is an error of the command that it was given to."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            options = (word for action in self._actions for word in action.option_strings)
            known = [word.removeprefix("--") for word in options if word.startswith("--")]
            near = nearest(left[0].partition("=")[0].removeprefix("--"), known, most=1) if left[0][:2] == "--" else ""
            self.error(f"unrecognized arguments: {' '.join(left)}{near}")
        return found, left

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the options)\n")


def add_data_options(parser, names: Iterable[str]):
    """Options that are fields of `DataArguments`; those that are not given are no attributes of what is parsed.

    Args:
        parser: An `ArgumentParser` or a group of one.
        names: Of the fields.
    """
    types = {item.name: item for item in fields(DataArguments)}
    for name in names:
        item = types[name]
        kind = {"int": int, "float": float, "bool": truth}.get(getattr(item.type, "__name__", str(item.type)), str)
        extra = {"nargs": "+"} if "list" in str(item.type) else {}
        text = f"data set: {', '.join(DATASETS)}" if name == "dataset_name" else item.metadata["help"]
        parser.add_argument(
            f"--{name}", type=kind, default=argparse.SUPPRESS, help=text, metavar=name.upper(), **extra
        )


def truth(word: str) -> bool:
    """`true` or `false`, or other words for them."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if word.lower() not in known:
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return known[word.lower()]


__all__ = ["CommandParser", "add_data_options", "truth"]
