"""Reads class paths of the form ``callbacks.X``.

They mean ``lightning_idkd.callbacks.X``, unless the user's own package ``callbacks`` has X.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning_idkd.checkout import CALLBACKS
from lightning_idkd.config.groups import Config
from lightning_idkd.config.kinds import OURS, class_keys, is_group, parameters

CLASSLESS = set(parameters(Config)) - {key.split(".")[0] for key, cls in class_keys() if not is_group(cls)}
"""Groups of a config in which no value names a class, such as ``run`` and ``logger``."""

REMOVED = {("tuning", "logit_adjustment"): (0, "node.loss: {class_path: BalancedSoftmax, init_args: {tau: ...}}")}
"""Keys of older configs by group and name, with the value that changed nothing, and what replaced the key."""


def lookup(path: str) -> Any:
    """The object at an import path; None where there is none. Errors of the module itself pass."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except ModuleNotFoundError as e:
        if f"{module}.".startswith(f"{e.name}."):
            return None
        raise


def name_class(path: str) -> str:
    """The name under which a class is shown: its own for a class of this project, and the import path for a user's,
    which may have the same name."""
    return path.rpartition(".")[2] if path.split(".")[0] in OURS else path


def full_path(path: str) -> str:
    """``callbacks.X`` in full if the project has a class X and the user's own package has none; else ``path``.

    Where the user's own package fails, the path is unchanged too, so that the failure is reported.
    """
    full = f"lightning_idkd.{path}"
    if not path.startswith("callbacks.") or not isinstance(ours := lookup(full), type):
        return path
    try:
        return full if lookup(path) in (None, ours) else path
    except (Exception, SystemExit):
        return path


def full_paths(value: Any) -> Any:
    """A config, or a part of one, with its class paths in full."""
    if isinstance(value, str):
        return full_path(value)
    if isinstance(value, list):
        return [full_paths(v) for v in value]
    if isinstance(value, dict):
        return {k: v if k in CLASSLESS else full_paths(v) for k, v in value.items()}
    return value


def drop_removed(value: Any, group: str = "") -> Any:
    """A config, or the part of one at the key ``group``, without the keys that this version no longer has, where they
    had no effect."""
    if isinstance(value, list):
        return [drop_removed(v) for v in value]
    if not isinstance(value, dict):
        return value
    kept = {k: v for k, v in value.items() if (group, k) not in REMOVED or v != REMOVED[group, k][0]}
    return {k: drop_removed(v, k) for k, v in kept.items()}


def of_option(option: str, text: str) -> str:
    """The ``text`` of a command line's option, in full where it is a class path."""
    return text if option.lstrip("-").split(".")[0] in CLASSLESS else full_path(text)


def of_run(text: str) -> str:
    """The text of a run's ``config.yaml`` with its class paths in full.

    If no class path in it is in full, the run was made before this project's ``callbacks`` lay in its package, and
    ``callbacks.X`` was the project's."""
    return text if f"{CALLBACKS}." in text else text.replace("class_path: callbacks.", f"class_path: {CALLBACKS}.")
