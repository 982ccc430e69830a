"""Finds ``callbacks/`` and ``configs/``: they lie in the installed package, and beside it in a checkout.

The callbacks are imported as ``lightning_idkd.callbacks`` in both cases. In a checkout, ``import callbacks`` gives the
same modules.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_file_location, spec_from_loader
from pathlib import Path
from types import ModuleType

CALLBACKS = "lightning_idkd.callbacks"
"""The import name of ``callbacks/``. The core imports it only when it reads a config, and only by this name."""
PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE if (PACKAGE / "callbacks" / "__init__.py").exists() else PACKAGE.parent
"""The folder that holds ``callbacks/`` and ``configs/``."""
CONFIGS = ROOT / "configs"


class SameModule(Loader):
    """Loads ``callbacks.X`` by importing ``lightning_idkd.callbacks.X``, so that no class exists twice."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(f"lightning_idkd.{module.__name__}")


class CheckoutFinder(MetaPathFinder):
    """Finds ``lightning_idkd.callbacks``, and its modules as ``callbacks.X`` too if ``callbacks`` is that package."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == CALLBACKS:
            return spec_from_file_location(name, ROOT / "callbacks" / "__init__.py")
        parent = name.rpartition(".")[0]
        if not name.startswith("callbacks.") or sys.modules[parent] is not sys.modules.get(f"lightning_idkd.{parent}"):
            return None
        if find_spec(f"lightning_idkd.{name}"):
            return spec_from_loader(name, SameModule())
        folders = parent.split(".")  # the user's own folder callbacks/ may hold it, without an __init__.py
        return PathFinder.find_spec(name, [os.path.join(entry, *folders) for entry in sys.path])


def install() -> None:
    """Let Python find ``lightning_idkd.callbacks``."""
    sys.meta_path.insert(0, CheckoutFinder())
