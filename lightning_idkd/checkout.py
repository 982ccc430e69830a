"""Finds ``callbacks/`` and ``configs/``: they lie in the installed package, and beside it in a checkout.

The callbacks are imported as ``lightning_idkd.callbacks`` in both cases. In a checkout, ``import callbacks`` gives the
same modules.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module, metadata
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


def add_working_folder() -> None:
    """Let Python find the user's own classes, which configs name by their import path from the working folder."""
    if os.getcwd() not in sys.path:
        # before the checkout, whose callbacks/ would hide the user's
        place = sys.path.index(str(ROOT)) if str(ROOT) in sys.path else len(sys.path)
        sys.path.insert(place, os.getcwd())


def find_commit() -> str | None:
    """The commit of the checkout from which the code runs, with ``-dirty`` if tracked files differ from it; else the
    installed version; None if neither is known."""
    commit = read_commit(PACKAGE.parent) if (PACKAGE.parent / ".git").exists() else None
    if commit is None:
        try:
            commit = f"lightning-idkd {metadata.version('lightning-idkd')}"
        except metadata.PackageNotFoundError:
            return None
    return commit


def read_commit(top: Path) -> str | None:
    """The commit of the git checkout whose top is this folder; None if the checkout does not track the package."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # other processes may work in the checkout
    commands = (
        ["ls-files", "--error-unmatch", "lightning_idkd/__init__.py"],
        ["status", "--porcelain=v2", "--branch", "--untracked-files=no"],
    )
    try:
        for command in commands:
            done = subprocess.run(
                ["git", *command], cwd=top, env=environment, capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):  # there is no git, or it does not trust the checkout's owner
        return None
    head, *lines = done.stdout.splitlines()
    changed = any(not line.startswith("#") for line in lines)
    return head.removeprefix("# branch.oid ") + ("-dirty" if changed else "")
