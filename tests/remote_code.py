"""Retrievers as somebody loads them who has not imported this package: by the code that lies beside them."""

import contextlib

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel


@contextlib.contextmanager
def without_registered_classes():
    """A block in which transformers doesn't know this package's classes, as in a process that never imported it."""
    registered = CONFIG_MAPPING._extra_content.pop("vptsp")
    try:
        yield
    finally:
        CONFIG_MAPPING._extra_content["vptsp"] = registered


def _load(auto_class, folder, options):
    with without_registered_classes():
        loaded = auto_class.from_pretrained(folder, trust_remote_code=True, **options)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    return loaded


def remote_model(folder, **options):
    """What `AutoModel` loads by the code in a folder, which is what ran."""
    return _load(AutoModel, folder, options)


def remote_config(folder, **options):
    """What `AutoConfig` loads by the code in a folder, which is what ran."""
    return _load(AutoConfig, folder, options)
