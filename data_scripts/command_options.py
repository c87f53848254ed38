"""Options of commands that name data, made of the fields of `DataArguments`."""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from collections.abc import Iterable
from dataclasses import fields
from itertools import pairwise

from ..names.registry import nearest
from .data_arguments import DataArguments
from .dataset_registry import DATASETS
from .paths import place


# Options that `--help` leaves to `--help-all`: of data sets of one kind, of their splits, and what is seldom changed.
FURTHER = frozenset(
    (
        *("data_cache_dir", "train_classes", "test_classes", "test_share", "class_split", "split_seed"),
        *("digit_size", "verify_counts", "layout", "image_column", "split_column", "image_root"),
        *("train_split", "test_split", "query_split", "gallery_split"),
        *("dataset_repo", "dataset_config", "dataset_revision", "test_repo", "query_repo", "gallery_repo"),
        *("embeddings_cache", "shard_size", "embedding_dtype", "lock_timeout", "resize_size", "dtype"),
        *("max_image_pixels", "revision", "resample", "target_recall", "memory_gb", "mmap", "no_verify"),
        *(
            "gpu",
            "views",
            "projection",
            "dim",
            "quantise",
            "rerank",
            "expand",
            "no_clustering",
            "no_geometry",
            "max_classes",
            "max_upload_mb",
            "share",
        ),
    )
)


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with exit status 2, and whose `--help` is a screen; `--help-all` has all."""

    def __init__(self, *args, formatter_class=None, **kwargs):
        super().__init__(*args, formatter_class=_wide(formatter_class), add_help=False, **kwargs)
        self.register("action", "store_true", _Truth)  # for the parser and its groups
        self.add_argument("-h", "--help", action=_Help, help="this text")
        self.add_argument("--help-all", action=_Help, help="all options")

    def format_help(self):
        """All options, with a line of usage that doesn't repeat them."""
        usage, self.usage = self.usage, self.usage or self._short_usage()
        try:
            return super().format_help()
        finally:
            self.usage = usage

    def _short_usage(self):
        words = [action.metavar or action.dest for action in self._actions if not action.option_strings]
        return " ".join([self.prog, *words, "[--OPTION VALUE ...]"])

    def format_short_help(self):
        """As `format_help`, without the options that are `FURTHER`."""
        hidden = {action: action.help for action in self._actions if action.dest in FURTHER}
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            return self.format_help()
        finally:
            for action, text in hidden.items():
                action.help = text

    def parse_known_args(self, args=None, namespace=None):
        """As `parse_args`: a word that no option takes is an error of the command that it was given to."""
        words = self._spelt_out(sys.argv[1:] if args is None else args)
        found, left = super().parse_known_args(words, namespace)
        if left:
            flag, _, given = words[max(words.index(left[0]) - 1, 0)].partition("=")
            if not left[0].startswith("-") and given and isinstance(self._option_string_actions.get(flag), _Truth):
                self.error(f"argument {flag}: expected true or false, got {left[0]!r}")
            options = (word for action in self._actions for word in action.option_strings)
            known = [word.removeprefix("--") for word in options if word.startswith("--")]
            near = nearest(left[0].partition("=")[0].removeprefix("--"), known, most=1) if left[0][:2] == "--" else ""
            self.error(f"unrecognized arguments: {' '.join(left)}{near}")
        return found, left

    def _spelt_out(self, words):
        """Words as this parser knows them: `--skip-corrupt` is `--skip_corrupt`, and alone `--skip_corrupt=true`."""
        spelt = []
        for word, following in pairwise([*words, ""]):
            name, given, value = word.partition("=")
            if name.startswith("--") and name not in self._option_string_actions:
                name = "--" + name[2:].replace("-", "_")
            action = self._option_string_actions.get(name)
            if action is None:
                spelt.append(word)
            elif isinstance(action, _Truth) and not given and following.lower() not in _TRUTHS:
                spelt.append(f"{name}=true")
            else:
                spelt.append(name + given + value)
        return spelt

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help-all lists the options)\n")


class _Truth(argparse.Action):
    """An option that is true or false: `--quiet`, `--quiet true`, `--quiet=false`, as training has them too.

    It takes the place of argparse's `store_true`.
    """

    def __init__(self, option_strings, dest, default=False, **kwargs):
        super().__init__(option_strings, dest, default=default, type=truth, metavar="[true]", **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)


class _Help(argparse.Action):
    def __init__(self, option_strings, dest, default=None, help=None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help() if option_string == "--help-all" else parser.format_short_help(), end="")
        parser.exit()


def _wide(formatter_class):
    """A formatter in whose lines the names of options and their texts have room beside each other."""
    width = min(shutil.get_terminal_size().columns, 120)
    return functools.partial(formatter_class or argparse.HelpFormatter, max_help_position=34, width=width)


def add_data_options(parser, names: Iterable[str]):
    """Options that are fields of `DataArguments`; those that are not given are no attributes of what is parsed.

    Args:
        parser: An `ArgumentParser` or a group of one.
        names: Of the fields.
    """
    types = {item.name: item for item in fields(DataArguments)}
    for name in names:
        item = types[name]
        how = {
            bool: {"action": "store_true"},
            int: {"type": int, "metavar": "N"},
            float: {"type": float, "metavar": "X"},
        }
        if name in ("data_dir", "data_cache_dir", "image_root"):
            how[item.type] = {"type": place, "metavar": "VALUE"}
        extra = {"nargs": "+"} if "list" in str(item.type) else {}
        text = f"data set: {', '.join(DATASETS)}" if name == "dataset_name" else item.metadata["help"]
        parser.add_argument(
            f"--{name}", default=argparse.SUPPRESS, help=text, **how.get(item.type, {"metavar": "VALUE", **extra})
        )
        if item.default is True:  # as in training
            parser.add_argument(
                f"--no_{name}", dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )


_TRUTHS = {
    **dict.fromkeys(("true", "t", "yes", "y", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0"), False),
}


def truth(word: str) -> bool:
    """`true` or `false`, or other words for them."""
    if word.lower() not in _TRUTHS:
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return _TRUTHS[word.lower()]


__all__ = ["FURTHER", "CommandParser", "add_data_options", "truth"]
