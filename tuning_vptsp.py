"""Tuning methods beside prompts, biases and the head, by name. Part of what a shared retriever needs."""

from __future__ import annotations

from collections.abc import Callable


TUNINGS: dict[str, Callable] = {}


def register_tuning(name):
    """Decorator: make a function known as `tuning: name`.

    The function gets a [`VPTSPModel`] that is about to be finished, and the configuration's `tuning_kwargs`. It adds
    modules to the model (not to the frozen `backbone` in it: what lies there is neither tuned nor saved) and
    connects them with the backbone's layers, as a rule by forward hooks. A module is initialised by its method
    `init_weights`, in which `transformers.initialization` must be used. It should start as if it were not there.

    A saved retriever loads only where its method has been registered before.
    """

    def register(function):
        known = TUNINGS.get(name)
        # a module that is run again may register its function again
        if known is not None and known.__qualname__ != function.__qualname__:
            raise ValueError(f"there is a tuning {name!r} already")
        TUNINGS[name] = function
        return function

    return register


def add_tuning(model):
    """Add what the configuration's `tuning` names to a model.

    Args:
        model: A [`VPTSPModel`] with everything but this.

    Raises:
        ValueError: there is no such method, or it does not take its keywords.
    """
    config = model.config
    if config.tuning is None:
        return
    if config.tuning not in TUNINGS:
        raise ValueError(
            f"tuning must be None or one of {', '.join(TUNINGS) or 'none'}, got {config.tuning!r}: import the file "
            "that registers it first"
        )
    try:
        TUNINGS[config.tuning](model, **(config.tuning_kwargs or {}))
    except TypeError as error:
        raise ValueError(f"tuning {config.tuning!r}: {error}") from error


__all__ = ["TUNINGS", "add_tuning", "register_tuning"]
