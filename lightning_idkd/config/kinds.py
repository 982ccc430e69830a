"""What every config key takes, read off annotations: from :class:`~lightning_idkd.config.Config` down through the
arguments of the classes that its keys name, those of a user's own classes included."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from types import SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lightning_idkd import callback
from lightning_idkd.config import groups

OURS = ("lightning_idkd",)
"""The top-level packages of this project."""


def package_of(cls: type) -> str:
    """The top-level package that defines a class."""
    return cls.__module__.split(".")[0]


def constructors(cls: type) -> list[type]:
    """A class and its bases, those alone that define ``__init__``."""
    return [base for base in cls.__mro__ if "__init__" in vars(base)]


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class by name, with those that it passes on to its bases as ``**kwargs``, as jsonargparse has
    them."""
    taken: dict[str, inspect.Parameter] = {}
    for base in constructors(cls):
        _self, *own = inspect.signature(base.__init__).parameters.values()
        taken = {p.name: p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} | taken
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return taken


@functools.cache
def annotations(cls: type) -> dict[str, Any]:
    """The annotation of every argument of a class, by the argument's name in a config.

    A name that the class's module imports for type checking only is looked up among the bases of this project, since to
    execute such an import may take seconds. An annotation that cannot be resolved is left out."""
    resolved: dict[str, Any] = {}
    for base in reversed(constructors(cls)):
        names = {**vars(groups), **vars(callback), **vars(sys.modules[base.__module__])}
        for name, annotation in getattr(base.__init__, "__annotations__", {}).items():
            try:
                hints = get_type_hints(SimpleNamespace(__annotations__={name: annotation}), names)
            except (NameError, TypeError, AttributeError, SyntaxError):
                continue
            resolved[name.rstrip("_")] = hints[name]
    resolved.pop("return", None)
    return resolved


def members(annotation: Any) -> list[Any]:
    """The types in a union; the annotation alone where it is not one."""
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]


def items(annotation: Any) -> list[Any]:
    """The types of which an item of a list may be one, where an annotation allows a list."""
    types: list[Any] = []
    for part in members(annotation):
        for item in get_args(part) if get_origin(part) in (list, tuple, Sequence) else ():
            types += members(item)
    return types


def classes_in(annotation: Any, owner: type) -> list[type]:
    """The classes of this project, or of the package of the ``owner`` of the argument, that an annotation names."""
    packages = (*OURS, package_of(owner))
    return [t for t in members(annotation) + items(annotation) if isinstance(t, type) and package_of(t) in packages]


def base_in(annotation: Any, owner: type) -> type | None:
    """The base of the classes that an argument takes by ``class_path``; None where it takes none."""
    return next((t for t in classes_in(annotation, owner) if not is_dataclass(t)), None)


def group_in(annotation: Any, owner: type) -> type | None:
    """The dataclass whose keys stand below an argument; None where there are no such keys."""
    return next((t for t in classes_in(annotation, owner) if is_dataclass(t)), None)


def subclasses(base: type) -> list[type]:
    """All classes below ``base`` that are imported."""
    below: list[type] = []
    for cls in base.__subclasses__():
        below += [cls, *subclasses(cls)]
    return below


def choices(base: type) -> dict[str, type]:
    """The classes that a key for ``base`` takes, by short name: without abstract ones, the bases that this project
    gives to researchers, and those that have a key of their own, such as gossip rules among the callbacks."""
    bases = [base_in(annotation, groups.Config) for annotation in annotations(groups.Config).values()]
    with_own_key = tuple(cls for cls in bases if cls and cls is not base and issubclass(cls, base))
    allowed: dict[str, type] = {}
    for cls in subclasses(base):
        given_base = f"{cls.__module__}.".startswith(f"{callback.__name__}.")
        if not (inspect.isabstract(cls) or given_base or issubclass(cls, with_own_key)):
            allowed[cls.__name__] = cls
    return allowed


def owners_below(cls: type) -> list[type]:
    """The classes whose arguments may stand below a key that takes ``cls``."""
    return [cls] if is_dataclass(cls) else [cls, *choices(cls).values()]


def places(key: str) -> list[tuple[Any, type]]:
    """Every annotation that a dotted key may have, with the class whose argument it is."""
    owners: list[type] = [groups.Config]
    arguments: list[tuple[Any, type]] = []
    for name in key.replace(".init_args", "").split("."):
        arguments = [(annotations(owner)[name], owner) for owner in owners if name in annotations(owner)]
        owners = []
        for annotation, owner in arguments:
            for cls in classes_in(annotation, owner):
                owners += [option for option in owners_below(cls) if option not in owners]
    return arguments


def base_of(key: str) -> type | None:
    """The base of the classes that a dotted key takes; None where it takes none."""
    return next((base for annotation, owner in places(key) if (base := base_in(annotation, owner))), None)


def arguments_below(key: str) -> dict[str, dict[str, inspect.Parameter]]:
    """The arguments of every class that may stand at a dotted key, by the class's name."""
    taken: dict[str, dict[str, inspect.Parameter]] = {}
    for annotation, owner in places(key):
        for cls in classes_in(annotation, owner):
            for option in [cls] if is_dataclass(cls) else choices(cls).values():
                taken[option.__name__] = {name.rstrip("_"): p for name, p in parameters(option).items()}
    return taken


def class_keys(
    owner: type = groups.Config, prefix: str = "", above: tuple[type, ...] = (), ours: bool = False
) -> Iterator[tuple[str, type]]:
    """Every dotted key that takes a class, with the base of these classes, and every key that has keys below it, with
    their dataclass; ``ours``: without arguments of a user's classes.

    Classes that take their own kind, such as a rule around a rule, are followed once. A key may come twice.
    """
    for name, annotation in annotations(owner).items():
        key = f"{prefix}{name}"
        for cls in classes_in(annotation, owner):
            yield key, cls
            for option in () if cls in above else owners_below(cls):
                if not ours or package_of(option) in OURS:
                    yield from class_keys(option, f"{key}.", (*above, cls), ours)


def find_classes(value: Any, key: str) -> Iterator[tuple[str, dict]]:
    """Every class that ``value`` names, as a mapping with class_path, and the dotted key it stands at."""
    if isinstance(value, list):
        for item in value:
            yield from find_classes(item, key)
    elif isinstance(value, str):
        key = key.removesuffix(".class_path")
        if base_of(key) or key == "node.module":
            yield key, {"class_path": value}
    elif isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield key, value
            value = value.get("init_args")
        for name, below in value.items() if isinstance(value, dict) else ():
            yield from find_classes(below, f"{key}.{name}".lstrip("."))
