"""VPTSP: semantic proxies from visual prompts, for image retrieval with Hugging Face vision transformers.

Names are imported on first use, so that `import vptsp` costs nothing and the modelling files are each loaded once.
"""

import importlib

from ._version import __version__


_EXPORTS = {
    "VPTSPConfig": "configuration_vptsp",
    "VPTSPModel": "modeling_vptsp",
    "VPTSPForMetricLearning": "modeling_metric_learning",
    "VPTSPTrainer": "trainer_vptsp",
    "VPTSPTrainingArguments": "training_args_vptsp",
}


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_EXPORTS])


__all__ = ["__version__", *_EXPORTS]
