"""The command line of a run, as far as it can be looked at before PyTorch and transformers' models are loaded."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..data_scripts.command_options import truth
from ..data_scripts.data_arguments import (
    DATA_BOUNDS,
    DataArguments,
    check_data_arguments,
    check_output_apart,
    data_hints,
)
from ..data_scripts.data_errors import DataError
from ..data_scripts.paths import check_folder_to_write, usable_path
from ..files.yaml_files import YamlError, read_yaml
from ..names.environment import environment_error
from ..names.field_values import NOT_NEGATIVE, check_fields, check_value, from_text
from ..names.registry import nearest
from .run_errors import ConfigError


EVAL_METRICS = ("retrieval", "all")
BOUNDS = {**DATA_BOUNDS, "picture_queries": NOT_NEGATIVE}
CHOICES = {"final_metrics": EVAL_METRICS}
SHORT_NAMES = {"batch_size": "per_device_train_batch_size", "num_workers": "dataloader_num_workers"}
"""What other commands call an option -> the field that it is here."""


@dataclass
class RunArguments:
    """What is left: where results may go.

    Raises:
        ValueError: a value is of another type or out of range.
    """

    overwrite_output: bool = field(
        default=False, metadata={"help": "Write into an output_dir that holds an earlier run's results."}
    )
    picture_queries: int = field(
        default=8, metadata={"help": "Queries in the pictures of neighbours; 0 for no pictures at all."}
    )
    picture_proxies: bool = field(
        default=False, metadata={"help": "Draw the movement of the proxies too (proxies.png)."}
    )
    final_metrics: str = field(
        default="all", metadata={"help": "What the last evaluation computes; as eval_metrics of those before."}
    )

    def __post_init__(self):
        check_fields(vars(self), get_type_hints(RunArguments), BOUNDS, CHOICES)


def split_command_line(argv):
    """The configuration that a command line begins with.

    Returns:
        path: As it was given; None where there is none.
        values: Its fields, as the file holds them; nothing where there is none.
        words: The rest, with `SHORT_NAMES` spelt out.

    Raises:
        ConfigError: it can't be read, or an option is given under both of its names.
    """
    if not argv or argv[0].startswith("-"):
        return None, {}, _spelt_out(argv)
    return argv[0], read_config(argv[0]), _spelt_out(argv[1:])


def _spelt_out(words):
    names = [word.partition("=")[0][2:].replace("-", "_") if word.startswith("--") else None for word in words]
    for short, name in SHORT_NAMES.items():
        if short in names and name in names:
            raise ConfigError(f"--{short} is --{name}: give one of them")
    return [
        word if name not in SHORT_NAMES else "".join((f"--{SHORT_NAMES[name]}", *word.partition("=")[1:]))
        for word, name in zip(words, names, strict=True)
    ]


def read_config(path) -> dict:
    """Fields of a YAML file, or of one of the package's own `configs` by its name (`cub_vits16`, `table1/vpt`).

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        usable_path(path)
    except DataError as error:
        raise ConfigError(f"the configuration: {error}") from error
    folder = Path(__file__).parent.parent / "configs"
    preset = folder / f"{path}.yaml"
    file = preset if preset.is_file() and not Path(path).is_file() else Path(path)
    try:
        values = read_yaml(file)
    except FileNotFoundError as error:
        if str(path).endswith((".yaml", ".yml")):
            raise ConfigError(f"there is no configuration {path}") from error
        presets = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
        hint = nearest(str(path), presets, most=1) or f"; the presets are {', '.join(presets)}"
        raise ConfigError(f"there is no configuration {path}, neither a file nor a preset{hint}") from error
    except OSError as error:
        raise ConfigError(f"the configuration {path} can't be read: {error.strerror}") from error
    except YamlError as error:
        raise ConfigError(f"the configuration {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the configuration {path} must hold 'field: value' lines, got {type(values).__name__}")
    return values


def checked_values(path, values, known, hints, bounds=BOUNDS, choices=CHOICES) -> dict:
    """The fields of a file, each of the type and in the range that it needs.

    Args:
        path: Of the file, for errors.
        values: What it holds.
        known: Names of all fields.
        hints: Name -> annotation, of those whose type is looked at.
        bounds: Name -> range.
        choices: Name -> words.

    Raises:
        ConfigError: a field does not exist, or is of another type or out of its range.
    """
    for name in values:
        if name not in known:
            raise ConfigError(f"{path}: there is no field {name!r}{nearest(name, known, most=1)}")
    values = {name: from_text(value, hints.get(name, str)) for name, value in values.items()}
    for name, value in values.items():
        try:
            check_value(name, value, hints.get(name, object), bounds.get(name), choices.get(name))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
    return values


def _field(word) -> str:
    """Name of the field that an option sets."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")


def refuse_unread(words, known):
    """Refuse words of a command line that no option has taken. What may be somebody's token is not repeated.

    Args:
        words: As the parser left them.
        known: Names of all fields.

    Raises:
        ConfigError: there are any.
    """
    options = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
    if options:
        near = nearest(_field(options[0]), known, most=1).replace("'", "--", 1).replace("'", "")
        raise ConfigError(f"there is no option {options[0]}{near} (--help-all lists them)")
    if words:
        raise ConfigError(
            f"{len(words)} words of the command line belong to no option; the configuration comes first, and a value "
            "with spaces in it is put in quotes"
        )


# Where the fields are that take long to import: module, class.
_LATE = (
    ("transformers.training_args", "TrainingArguments"),
    ("vptsp.training.arguments", "VPTSPTrainingArguments"),
    ("vptsp.configuration_vptsp", "VPTSPConfig"),
)


def all_names() -> set[str]:
    """Names of all fields, those of `_LATE` as they are written, and a few more that are nobody's to set."""
    names = {item.name for cls in (DataArguments, RunArguments) for item in fields(cls)}
    for module, name in _LATE:
        tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))
        (written,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        names |= {node.target.id for node in written.body if isinstance(node, ast.AnnAssign)}
    return names


class OptionParser(HfArgumentParser):
    """Options as they are called in full, and errors that are raised."""

    def __init__(self, classes, **options):
        super().__init__(classes, allow_abbrev=False, **options)
        for action in self._actions:
            if action.type is string_to_bool:  # the same words, and one error for all commands
                action.type = truth

    def error(self, message):
        raise ConfigError(message)


def check_early(argv):
    """Find unknown fields, and what is wrong with the configuration file and the data, in the time of a look at them.

    What else is wrong, `parse_arguments` and `check_run` find.

    Raises:
        ConfigError or DataError: with the file, field or folder, and what was expected.
    """
    if error := environment_error():
        raise ConfigError(error)
    path, values, words = split_command_line(argv)
    classes, known = (DataArguments, RunArguments), all_names()
    hints = {**data_hints(), **get_type_hints(RunArguments), "output_dir": str | None}
    values = checked_values(path, values, known, hints)
    options = [word for word in words if word.startswith("--") and word != "--"]
    refuse_unread([word for word in options if _field(word) not in known], known)
    parser = OptionParser(classes, add_help=False)
    parser.add_argument("--output_dir", "--output-dir", default=None)
    parser.set_defaults(**{name: value for name, value in values.items() if name in hints})
    try:
        data_args, _, others, _ = parser.parse_args_into_dataclasses(
            words, look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_data_arguments(data_args)
    if others.output_dir is not None:
        check_folder_to_write(others.output_dir, "output_dir")
        check_output_apart(data_args, others.output_dir)


__all__ = [
    "BOUNDS",
    "CHOICES",
    "EVAL_METRICS",
    "OptionParser",
    "RunArguments",
    "all_names",
    "check_early",
    "checked_values",
    "read_config",
    "refuse_unread",
    "split_command_line",
]
