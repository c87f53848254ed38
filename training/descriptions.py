"""What an object is made of, as JSON: so that a run that goes on can tell whether it was given the same."""

from __future__ import annotations

import functools
import hashlib
import re
import types

import numpy as np
import torch


_PLAIN = (str, bool, int, float, type(None))
_DEPTH = 6


def describe(value, depth=_DEPTH):
    """What tells an object from others of its kind: its class, its settings, and of functions made on the spot, their
    code and what they close over.

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
        return {"method": value.__name__, "of": deeper(value.__self__)}
    if isinstance(value, types.FunctionType):
        return _function(value, deeper)
    settings = {name: deeper(item) for name, item in getattr(value, "__dict__", {}).items() if name[:2] != "__"}
    if not settings:
        return {"class": _name(type(value)), "shown": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))}
    return {"class": _name(type(value)), "settings": settings}


def _function(function, deeper):
    parts = {"function": _name(function), "defaults": deeper(function.__defaults__)}
    if "<" in function.__qualname__:  # a lambda, or one made inside of another
        cells = function.__closure__ or ()
        parts["code"] = _code_digest(function.__code__)
        parts["closure"] = [deeper(cell.cell_contents) for cell in cells]
    return parts


def _code_digest(code):
    """Of what a function does, its names and constants included; those of functions inside of it too."""
    constants = [_code_digest(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode()).hexdigest()[:16]


def _name(value):
    return f"{value.__module__}.{value.__qualname__}"


__all__ = ["describe"]
