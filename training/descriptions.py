"""What an object is made of, as JSON: so that a run that goes on can tell whether it was given the same."""

from __future__ import annotations

import enum
import functools
import hashlib
import re
import types

import numpy as np
import torch


_PLAIN = (str, bool, int, float, type(None))
_DEPTH = 6


def describe(value, depth=_DEPTH):
    """What tells an object from others of its kind: its class, its settings (wherever they are kept: in the object,
    its slots, its class, or the defaults of what is called), and of functions made on the spot, their code and what
    they close over.

    Named functions and classes are told by their names, not by their code: that changes with versions.

    Args:
        value: Anything: a collator, a schedule's factor, a transform.
        depth: How far to look into objects within objects; beyond, the class is all.

    Returns:
        What JSON knows, without addresses in memory.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.ascontiguousarray(torch.as_tensor(value).detach().cpu().double().numpy())
        return {"shape": list(array.shape), "digest": hashlib.sha256(array.tobytes()).hexdigest()}
    if isinstance(value, type):
        return _name(value)
    if depth == 0:
        return _name(type(value))
    deeper = functools.partial(describe, depth=depth - 1)
    if isinstance(value, dict):
        return {str(key): deeper(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [deeper(item) for item in value]
        return sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items
    if isinstance(value, functools.partial):
        return {"function": deeper(value.func), "arguments": deeper(value.args), "keywords": deeper(value.keywords)}
    if isinstance(value, types.MethodType):
        return {"method": value.__name__, "of": deeper(value.__self__), **_keyword_defaults(value.__func__, deeper)}
    if isinstance(value, types.FunctionType):
        return _function(value, deeper)
    settings = {name: deeper(item) for name, item in _settings(value).items()}
    if not settings:
        return {"class": _name(type(value)), "shown": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))}
    return {"class": _name(type(value)), "settings": settings}


def _settings(value):
    """Values of an object by name: its own, those in slots, and what its class holds beside methods and properties."""
    own = {name: item for name, item in getattr(value, "__dict__", {}).items() if name[:2] != "__"}
    if isinstance(value, (enum.Enum, types.ModuleType)):  # the class of an enumeration holds all of its members
        return own
    found = {}
    for cls in reversed(type(value).__mro__):
        for name, item in vars(cls).items():
            if isinstance(item, types.MemberDescriptorType) and "__slots__" in vars(cls) and hasattr(value, name):
                found[name] = getattr(value, name)
            elif name == "__call__" or name[:2] != "__":
                found[name] = item
    return {name: item for name, item in found.items() if not _says_nothing(name, item)} | own


def _says_nothing(name, item):
    """Whether what a class holds is no setting: a method, a property, a cache. The defaults of its call are settings,
    and so is a function made on the spot."""
    function = getattr(item, "__func__", item)
    if isinstance(function, types.FunctionType):
        has_defaults = function.__defaults__ is not None or function.__kwdefaults__ is not None
        return function.__name__ != "<lambda>" and not (name == "__call__" and has_defaults)
    return name in ("__call__", "_abc_impl") or hasattr(type(item), "__get__")


def _function(function, deeper):
    parts = {"function": _name(function), "defaults": deeper(function.__defaults__)}
    parts |= _keyword_defaults(function, deeper)
    if vars(function):
        parts["attributes"] = deeper(vars(function))
    if "<" in function.__qualname__:  # a lambda, or one made inside of another
        cells = function.__closure__ or ()
        parts["code"] = _code_digest(function.__code__)
        parts["closure"] = [deeper(cell.cell_contents) for cell in cells]
    return parts


def _keyword_defaults(function, deeper):
    values = getattr(function, "__kwdefaults__", None)
    return {} if values is None else {"keyword_defaults": deeper(values)}


def _code_digest(code):
    """Of what a function does, its names and constants included; those of functions inside of it too."""
    constants = [_code_digest(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode()).hexdigest()[:16]


def _name(value):
    return f"{value.__module__}.{value.__qualname__}"


__all__ = ["describe"]
