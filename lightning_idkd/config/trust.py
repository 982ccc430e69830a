"""Checks, before anything is imported, that the config of a run names no code from outside this project.

A run folder may come from a stranger, and to import a class is to run its module."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from lightning_idkd.config import class_paths, yaml_file
from lightning_idkd.config.arguments import read_options, read_value
from lightning_idkd.config.kinds import OURS, choices, classes_at, package_of, places
from lightning_idkd.config.parse import PLUGINS
from lightning_idkd.config.resolved import GROUPS
from lightning_idkd.errors import UserError


def read_trusted(file: Path) -> dict:
    """The keys of a run's ``config.yaml``, which are safe to parse: every class in it comes with this project.

    Class paths are in full, so that ``callbacks.X`` of an older run is not looked up in the working folder.

    Raises:
        UserError: the file is damaged, or names anything from outside this project.
    """
    try:
        config = yaml_file.read(class_paths.of_run(file.read_text(encoding="utf-8")))
        foreign = next(find_foreign(config), None)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as e:
        raise UserError(f"'{file}' is damaged, or not the config of a run") from e
    if foreign:
        key, path = foreign
        asks = f"'{file}': {key} asks for {path!r}, which is not part of this project"
        raise UserError(f"{asks}; to run its code, trust the run: --trust, or trust=True in Python")
    if not isinstance(config, dict) or any(str(key).split(".")[0] not in GROUPS for key in config):
        raise UserError(f"'{file}' is not the config of a run; allowed at its top: {', '.join(GROUPS)}")
    return config


def find_foreign(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Every text in a config that would bring code from outside this project, with its dotted key.

    Args:
        value: a config as plain values, or the part of one at ``place``, its keys from the top.
    """
    if isinstance(value, dict):
        for name, below in value.items():
            yield from find_foreign(below, (*place, str(name)))
    elif isinstance(value, (list, tuple, set)):  # YAML has sets and pairs, and a key for a list takes them
        for item in value:
            yield from find_foreign(item, place)
    elif isinstance(value, str):
        parts = [part.rstrip("+") for part in ".".join(place).split(".")]  # `key+` appends to a list
        key = ".".join(part for part in parts if part not in ("init_args", "dict_kwargs"))
        # the parser looks for `callbacks.X` in the user's own folder first, at every key below groups with classes
        looked_up = value.startswith("callbacks.") and not (place and place[0] in class_paths.CLASSLESS)
        if looked_up or is_foreign(value, key):
            yield key.removesuffix(".class_path"), value
        if (inner := read_again(value)) != value:
            yield from find_foreign(inner, place)


def names_own_code(arguments: list[str]) -> bool:
    """Whether options on the command line may name code of the user's own, or in a file that they name."""
    options = [(option, read_value(text, option)) for _, option, text in read_options(arguments)]
    return any(key == "--config" or any(find_foreign(value, (key.lstrip("-"),))) for key, value in options)


def read_again(text: str) -> Any:
    """What the parser reads a text as, wherever its key takes more than text."""
    try:
        return yaml_file.read(text)
    except (ValueError, yaml.YAMLError):
        return text


def is_foreign(text: str, key: str) -> bool:
    """Whether the parser, or the class that has the argument ``key``, would import ``text`` from outside this
    project."""
    for plugin in PLUGINS:
        import_module(plugin)
    above, _, name = key.rpartition(".")
    for owner in classes_at(above):
        if judge := IMPORTED.get((owner, name)):
            return not judge(text)
    bases = [argument.base for argument in places(key.removesuffix(".class_path")) if argument.base]
    if not bases and name != "class_path":
        return False
    if text.isidentifier():  # a short name means an imported class, which may be one of the user's own
        return any(package_of(cls) not in OURS for base in bases for cls in [choices(base).get(text)] if cls)
    return not is_own_class(text)


def is_own_class(path: str) -> bool:
    """Whether an import path leads to a class of this project, or to nothing in it, which the parser reports."""
    if path.split(".")[0] not in OURS:
        return False
    cls = find_object(path)
    return cls is None or (isinstance(cls, type) and package_of(cls) in OURS)


def is_own_builder(path: str) -> bool:
    """Whether an import path leads to a network of this project, or to one that torchvision builds."""
    from torch import nn

    from lightning_idkd.models.torchvision import is_model_builder

    if path.startswith("torchvision.models."):
        return is_model_builder(find_object(path))
    return is_own_class(path) and issubclass(find_object(path) or nn.Module, nn.Module)


def is_optimizer(path: str) -> bool:
    """Whether an import path leads to an optimiser of torch."""
    from torch import optim

    cls = find_object(path) if path.startswith("torch.optim.") else None
    return isinstance(cls, type) and issubclass(cls, optim.Optimizer) and cls.__module__.startswith("torch.optim.")


IMPORTED = {
    ("NodeConfig", "module"): is_own_class,
    ("TorchModule", "path"): is_own_builder,
    ("LocalOptimizer", "optimizer"): is_optimizer,
}
"""Arguments, by class and name, that are import paths, and what says whether a path is safe."""


def find_object(path: str) -> Any:
    """The object at an import path, also inside another object of a module; None where there is none."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(parts[:end]))
        except (ImportError, ValueError):
            continue
        for name in parts[end:]:
            found = getattr(found, name, None)
        return found
    return None
