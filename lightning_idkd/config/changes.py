"""Lists the values of a resolved config that are not the defaults."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from typing import Any, NamedTuple

from lightning_idkd.config import groups
from lightning_idkd.config.class_paths import name_class
from lightning_idkd.config.kinds import Argument, is_group, parameters
from lightning_idkd.config.parse import PLUGINS, SCORE
from lightning_idkd.config.resolved import GROUPS
from lightning_idkd.config.trust import find_object, is_own_class

CHOSEN = ("run.engine", "run.threads", "run.name", "run.dir", "run.resume")
"""Keys that say how and where a run is executed, which a list of changes leaves out."""


class Change(NamedTuple):
    """A value that is not the default."""

    key: str
    value: str
    default: str
    """Empty where there is none, or where it is not known, as for the arguments of a user's own class."""


def list_changes(config: dict) -> list[Change]:
    """List the values of a resolved config that differ from the defaults of ``idkd fit``, in the order of the groups.

    A class is listed by its name, a user's by its import path, and its arguments are compared to its own defaults. This
    imports no class from outside the project.
    """
    for plugin in PLUGINS:
        import_module(plugin)
    changes: list[Change] = []
    for name, entry in GROUPS.items():
        field = groups.Config.__dataclass_fields__[name]
        argument = parameters(groups.Config)[name]
        default = entry.start if entry.start is not MISSING else read_default(field)
        changes += compare(name, config.get(name), argument._replace(default=default))
    return [change for change in changes if change.key not in CHOSEN]


def read_default(field: Any) -> Any:
    """The default of a dataclass field; MISSING where it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def compare(key: str, value: Any, argument: Argument) -> list[Change]:
    """Compare the value at ``key`` to its default, which may be a class, an object of it, or its name."""
    default = argument.default
    if isinstance(value, dict) and "class_path" in value:
        return compare_class(key, value, default)
    if isinstance(value, dict) and is_group_class(argument.base):
        return compare_keys(key, value, read_arguments(argument.base))
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        changes = []
        for item in value:
            changes += compare(key, item, argument._replace(default=MISSING))
        return changes
    if normalise(value) == normalise(default):
        return []
    return [Change(key, format_value(value), format_value(default))]


def compare_class(key: str, value: dict, default: Any) -> list[Change]:
    """Compare a class and its arguments."""
    path, arguments = str(value["class_path"]), value.get("init_args") or {}
    name, default_name = name_class(path), format_value(default)
    if key == "calibration.score" and default is None:
        default_name = SCORE.rpartition(".")[2]
    changes = [] if name == default_name else [Change(key, name, default_name)]
    cls = find_object(path) if is_own_class(path) else None
    known = {} if cls is None else read_arguments(cls)
    if type(default) is cls:  # an object, whose arguments are the defaults here
        known = {k: argument._replace(default=getattr(default, k, argument.default)) for k, argument in known.items()}
    return changes + compare_keys(key, arguments, known)


def compare_keys(key: str, values: dict, arguments: dict[str, Argument]) -> list[Change]:
    """Compare the values below ``key``, each to its default."""
    changes = []
    for name, value in values.items():
        changes += compare(f"{key}.{name}", value, arguments.get(name, Argument(Any, MISSING)))
    return changes


def read_arguments(cls: type) -> dict[str, Argument]:
    """The arguments of a class, or the keys of a dataclass, with their defaults."""
    arguments = dict(parameters(cls))
    if is_dataclass(cls):
        for field in fields(cls):
            if field.default_factory is not MISSING:
                name = field.name.rstrip("_")
                arguments[name] = arguments[name]._replace(default=field.default_factory())
    return arguments


def is_group_class(cls: Any) -> bool:
    """Whether ``cls`` is a dataclass whose keys stand below its own."""
    return isinstance(cls, type) and is_group(cls)


def normalise(value: Any) -> Any:
    """A value in a form in which a config and a signature that say the same are equal."""
    return list(value) if isinstance(value, tuple) else value


def format_value(value: Any) -> str:
    """Format a value or a default; a class by its name."""
    if value is MISSING or value is inspect.Parameter.empty:
        return ""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, dict) and "class_path" in value:
        return name_class(str(value["class_path"]))
    if isinstance(value, (int, float, str, list, tuple, dict)):
        return str(list(value) if isinstance(value, tuple) else value)
    return type(value).__name__
