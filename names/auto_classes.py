"""The auto classes of transformers know this package's classes wherever it is imported, which loads neither.

`import vptsp` must not wait for torch, and registering needs classes that do. So it happens once transformers has
loaded its auto classes, or at once where it has; never while files of this package are half loaded, since these ask
for the auto classes themselves.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys


_AUTO_CLASSES = "transformers.models.auto.modeling_auto"
_OWN = ("configuration_vptsp", "backbones_vptsp", "loading_vptsp", "modeling_vptsp")


def register_auto_classes(package: str) -> None:
    """Have `AutoConfig` and `AutoModel` use this package's classes for retrievers, once there are auto classes.

    Then they need no `trust_remote_code`, and don't run the code beside a retriever even where they are given it.

    Args:
        package: Name of the package.
    """
    watch = _Watch(package)
    sys.meta_path.insert(0, watch)
    watch.register_if_due()


class _Watch(importlib.abc.MetaPathFinder):
    """Finds nothing by itself, but sees when the auto classes and the files that register have been loaded."""

    def __init__(self, package):
        self.package = package
        self.watched = {_AUTO_CLASSES, *(f"{package}.{name}" for name in _OWN)}
        self.asking = set()
        self.running = 0

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.watched or fullname in self.asking:
            return None
        self.asking.add(fullname)  # so that what really finds it is asked
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._seen(spec.loader.exec_module)
        return spec

    def _seen(self, execute):
        def execute_and_register(module):
            self.running += 1
            try:
                execute(module)
            finally:
                self.running -= 1
            self.register_if_due()

        return execute_and_register

    def register_if_due(self):
        if self.running or self not in sys.meta_path or not hasattr(sys.modules.get(_AUTO_CLASSES), "AutoModel"):
            return
        sys.meta_path.remove(self)
        auto = sys.modules[_AUTO_CLASSES]
        own = importlib.import_module(f"{self.package}.modeling_vptsp")
        config_class = own.VPTSPModel.config_class
        importlib.import_module("transformers").AutoConfig.register(
            config_class.model_type, config_class, exist_ok=True
        )
        auto.AutoModel.register(config_class, own.VPTSPModel, exist_ok=True)


__all__ = ["register_auto_classes"]
