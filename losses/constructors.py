"""Making an object of a class whose name and keywords a configuration gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..names.registry import nearest


def construct(name: str, build: Callable[..., Any], given: Mapping[str, Any], available: Mapping[str, Any]):
    """`build(**given)`, with those of `available` that it needs beside.

    Args:
        name: Of what is built, for errors.
        build: A class.
        given: Keywords as the user gave them.
        available: Keywords for parameters without a default that are not given.

    Raises:
        ValueError: `given` holds a keyword that the class does not take, one is missing, or a value is refused.
    """
    known = constructor_parameters(build)
    for keyword in given:
        if keyword not in known:
            raise ValueError(
                f"{name} has no keyword {keyword!r}{nearest(keyword, known)}; "
                f"its keywords are {', '.join(known) or 'none'}"
            )
    needed = [keyword for keyword, default in known.items() if default is inspect.Parameter.empty]
    filled = {keyword: available[keyword] for keyword in needed if keyword in available}
    try:
        return build(**{**filled, **given})
    except Exception as error:  # a library's classes raise all kinds
        raise ValueError(f"{name}: {error or type(error).__name__}") from error


def constructor_parameters(build) -> dict[str, Any]:
    """Name -> default of what a class's constructor takes, and of those that its `**kwargs` are passed on to."""
    parameters = {}
    for cls in build.__mro__:
        if cls in (nn.Module, object):
            break
        own = inspect.signature(cls.__init__).parameters.values() if "__init__" in vars(cls) else ()
        for parameter in own:
            if parameter.name != "self" and parameter.kind in (
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                inspect.Parameter.KEYWORD_ONLY,
            ):
                parameters.setdefault(parameter.name, parameter.default)
        if own and not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own):
            break
    return parameters


__all__ = ["construct", "constructor_parameters"]
