"""Tuning methods and backbone families by name: registries of what the shipped code looks up in plain dicts."""

from __future__ import annotations

from collections.abc import Callable

from .. import backbones_vptsp, modeling_vptsp
from ..names.registry import Registry


TUNINGS: Registry[Callable] = Registry("tuning", modeling_vptsp.TUNINGS)
FAMILIES: Registry[type[backbones_vptsp.ViTFamily]] = Registry("backbone family", backbones_vptsp.FAMILIES)


def register_tuning(name: str):
    """Decorator: make a function known as `tuning: name`.

    The function gets a [`VPTSPModel`] that is about to be finished, and the configuration's `tuning_kwargs`. It adds
    modules to the model (not to the frozen `backbone` in it: what lies there is neither tuned nor saved) and
    connects them with the backbone's layers, as a rule by forward hooks. A module is initialised by its method
    `init_weights`, in which `transformers.initialization` must be used. It should start as if it were not there.

    A saved retriever loads only where its method has been registered before.

    Raises:
        ValueError: the name is another method's.
    """
    return TUNINGS.register(name)


def register_family(model_type: str):
    """Decorator: make a class the family of all backbones of a model type.

    The class is one like [`ViTFamily`], which lists what a family tells; it is made for a backbone's configuration.

    Args:
        model_type: As in the `config.json` of the backbones.

    Raises:
        ValueError: backbones of this type have another family.
    """
    return FAMILIES.register(model_type)


__all__ = ["FAMILIES", "TUNINGS", "register_family", "register_tuning"]
