"""`train.py --help` without waiting for PyTorch: options are read from the source of the classes that define them.

The options of a run are fields of dataclasses, two of which come with `transformers` and so with several seconds of
imports. Their names, types, defaults and descriptions stand in the source, though, as plain assignments.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import shutil
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parent.parent


class Option(NamedTuple):
    """An option as the help shows it."""

    name: str
    kind: str
    default: str
    text: str


def options_in_source(path, class_name):
    """Fields of a dataclass, read from its source: annotated assignments, described in metadata or docstring.

    Args:
        path: Python file.
        class_name: Class in it.

    Returns:
        List of [`Option`], without class variables and fields that `__init__` does not take.
    """
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    cls = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == class_name)
    documented = documented_fields(ast.get_docstring(cls, clean=False) or "")
    options = []
    for node in cls.body:
        if not isinstance(node, ast.AnnAssign) or ast.unparse(node.annotation).startswith("ClassVar"):
            continue
        name, given = node.target.id, _field_arguments(node.value)
        if ast.unparse(given.get("init", ast.Constant(True))) == "False":
            continue
        default = given.get("default", given.get("default_factory"))
        text = _help_in(given.get("metadata")) or documented.get(name, "")
        kind = ast.unparse(node.annotation).strip("'")
        options.append(Option(name, kind, "" if default is None else _shown(default), text))
    return options


def documented_fields(docstring) -> dict[str, str]:
    """Field -> text, from the `Args` section of a class's docstring."""
    texts, name = {}, None
    for line in docstring.partition("Args:")[2].partition("Raises:")[0].splitlines():
        if line.startswith(" " * 8) and not line.startswith(" " * 9):
            name, _, text = line.strip().partition(": ")
            texts[name] = text
        elif name is not None and line.strip():
            texts[name] += " " + line.strip()
    return texts


def _field_arguments(value):
    """Keyword arguments of `field(...)`, or a plain default as one."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        return {keyword.arg: keyword.value for keyword in value.keywords}
    return {} if value is None else {"default": value}


def _help_in(metadata):
    if not isinstance(metadata, ast.Dict):
        return ""
    values = dict(zip((ast.unparse(key) for key in metadata.keys), metadata.values, strict=True))
    text = values.get("'help'")
    try:
        return " ".join(str(ast.literal_eval(text)).split())
    except (TypeError, ValueError):  # no text, or one that is put together at run time
        return ""


def _shown(default):
    return ast.unparse(default.body if isinstance(default, ast.Lambda) else default)


def _options_of(dataclass):
    """Fields of a dataclass that is cheap to import."""
    for item in fields(dataclass):
        default = item.default if item.default is not MISSING else getattr(item, "default_factory", MISSING)()
        yield Option(item.name, str(item.type), repr(default), item.metadata.get("help", ""))


def option_groups(derived, run_arguments):
    """Title -> options, of all classes that a run is configured by.

    Args:
        derived: Names of model fields that can't be set.
        run_arguments: The dataclass of what belongs to no other group.
    """
    from ..data_scripts.data_arguments import DataArguments

    source = Path(importlib.util.find_spec("transformers").origin).parent / "training_args.py"
    model = options_in_source(ROOT / "configuration_vptsp.py", "VPTSPConfig")
    own = options_in_source(ROOT / "training" / "arguments.py", "VPTSPTrainingArguments")
    own_names = {option.name for option in own}
    inherited = options_in_source(source, "TrainingArguments")
    return {
        "the model": [option for option in model if option.name not in derived],
        "the data": list(_options_of(DataArguments)),
        "the run": [*own, *_options_of(run_arguments)],
        "the run, from transformers.TrainingArguments": [o for o in inherited if o.name not in own_names],
    }


def help_text(prog, usage, description, groups) -> str:
    """The page that `--help` prints."""

    def formatter(prog):
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=8, width=_width())

    parser = argparse.ArgumentParser(prog=prog, usage=usage, description=description, formatter_class=formatter)
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for option in options:
            text = f"{option.text} ({option.kind}; default: {option.default})".strip()
            group.add_argument(f"--{option.name}", metavar="", help=text.replace("%", "%%"))
    return parser.format_help()


def _width():
    return min(shutil.get_terminal_size().columns, 110)


__all__ = ["Option", "documented_fields", "help_text", "option_groups", "options_in_source"]
