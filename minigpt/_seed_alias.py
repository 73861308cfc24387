"""`from model.model_minigpt import MiniGPT`, run from within `minigpt/`, gives `minigpt.model.model_minigpt.MiniGPT`.

Without this Python would load each file a second time under the short name, and classes would exist twice:
`isinstance` would fail between them. The four packages of the guide call `alias` when they find themselves imported
under their short name.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType


class _Alias(MetaPathFinder, Loader):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname.startswith(self.package + ".") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module("minigpt." + spec.name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # the import system wrote the short-named spec over it


def alias(package: str) -> None:
    """Make `package` and every submodule of it the same module objects as `minigpt.<package>`."""
    sys.meta_path.insert(0, _Alias(package))
    sys.modules[package] = importlib.import_module("minigpt." + package)
