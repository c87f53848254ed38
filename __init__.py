"""VPTSP: semantic proxies from visual prompts, for image retrieval with Hugging Face vision transformers.

Names are imported on first use, so that `import vptsp` costs nothing and the modelling files are each loaded once.
They are listed in `__init__.pyi`, where type checkers and editors look for them.
"""

import ast
import importlib
from pathlib import Path

from ._version import __version__
from .names.auto_classes import register_auto_classes


_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_LISTED = [
    (alias.name, node.module) for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names
]
_EXPORTS = {name: module for name, module in _LISTED if module != "_version"}


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_EXPORTS])


__all__ = ["__version__", *_EXPORTS]

if __name__ == "vptsp":  # pytest loads the folder of a checkout under its own name
    register_auto_classes(__name__)
