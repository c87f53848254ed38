"""Reading YAML so that a value is what it looks like, or is refused."""

from __future__ import annotations

import re
from pathlib import Path

import yaml


class YamlError(ValueError):
    """A file that is not YAML, or holds what would not be read as it is written."""


# How YAML 1.1 reads what most people take for text, or for another number.
_SURPRISES = {
    "int": (re.compile(r"[-+]?(0|[1-9][0-9]*)"), "010 is 8, 1:30 is 90 and 1_0 is 10"),
    "float": (re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"), "1:30.5 is 90.5 and .inf no number"),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), "no is false; write true or false where that is meant"),
    "timestamp": (re.compile(r"(?!)"), "2024-01-02 is a date"),
}


class _StrictLoader(yaml.SafeLoader):
    """`SafeLoader` without duplicate keys and without values that aren't what they look like."""

    def construct_scalar(self, node):
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind in _SURPRISES and isinstance(node, yaml.ScalarNode) and node.style is None:
            plain, example = _SURPRISES[kind]
            if not plain.fullmatch(node.value):
                raise yaml.constructor.ConstructorError(
                    None, None, f"quote it: '{node.value}' (YAML reads it otherwise: {example})", node.start_mark
                )
        return super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is there twice", node.value[position][0].start_mark
                )
        return super().construct_mapping(node, deep=deep)


def read_yaml(path):
    """What a YAML file holds.

    Decimal numbers, `true`, `false`, `null` and text are read. What YAML has further names for (octal and sexagesimal
    numbers, `yes`, `no`, `on`, `off`, dates) is refused without quotes, and so is a key that is there twice.

    Raises:
        OSError: the file can't be read.
        YamlError: it is not YAML, or holds one of these; the message says where and what to do.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise YamlError(" ".join(str(error).split())) from error


__all__ = ["YamlError", "read_yaml"]
