"""What every config key takes, read off annotations: from :class:`~lightning_idkd.config.Config` down through the
arguments of the classes that its keys name, those of a user's own classes included."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from types import SimpleNamespace, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from lightning_idkd import callback
from lightning_idkd.config import groups

OURS = ("lightning_idkd",)
"""The top-level packages of this project."""


def package_of(cls: type) -> str:
    """The top-level package that defines a class."""
    return cls.__module__.split(".")[0]


def is_group(cls: type) -> bool:
    """Whether a class is a dataclass whose keys stand below its own, rather than the base of classes to choose from."""
    return is_dataclass(cls) and not inspect.isabstract(cls)


class Argument(NamedTuple):
    """An argument of a class."""

    annotation: Any
    """Its type, which allows None where that is the default; Any where that is not known."""
    default: Any = inspect.Parameter.empty
    base: type | None = None
    """The base of the classes that a ``class_path`` may name there, or the dataclass whose keys stand below."""


@functools.cache
def summarise(thing: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def parameters(cls: type) -> dict[str, Argument]:
    """The arguments of a class by their names in a config, with those that it passes on to its bases as ``**kwargs``,
    as jsonargparse has them."""
    arguments: dict[str, Argument] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            _self, *own = inspect.signature(base.__init__).parameters.values()
            named = [p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            arguments = {p.name.rstrip("_"): read_argument(p, base) for p in named} | arguments
            if not any(p.kind is p.VAR_KEYWORD for p in own):
                break
    return arguments


def read_argument(parameter: inspect.Parameter, owner: type) -> Argument:
    """The argument of the class ``owner`` that a parameter of its ``__init__`` stands for.

    A name that the class's module imports for type checking only is looked up among the bases of this project, since to
    execute such an import may take seconds."""
    names = {**vars(groups), **vars(callback), **vars(sys.modules[owner.__module__])}
    written = {} if parameter.annotation is parameter.empty else {"it": parameter.annotation}
    try:
        annotation = get_type_hints(SimpleNamespace(__annotations__=written), names).get("it", Any)
    except (NameError, TypeError, AttributeError, SyntaxError):
        annotation = Any
    if parameter.default is None:
        annotation = annotation | None
    classes = [t for t in members(annotation) + items(annotation) if isinstance(t, type)]
    base = next((cls for cls in classes if package_of(cls) in (*OURS, package_of(owner))), None)
    return Argument(annotation, parameter.default, base)


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


def subclasses(base: type) -> list[type]:
    """A class and all classes below it that are imported."""
    classes = [base]
    for cls in base.__subclasses__():
        classes += subclasses(cls)
    return classes


def choices(base: type) -> dict[str, type]:
    """The classes that a key for ``base`` takes, by short name: a dataclass alone; else without abstract classes, the
    bases that this project gives to researchers, and those that have a key of their own, such as gossip rules among the
    callbacks."""
    if is_group(base):
        return {base.__name__: base}
    bases = [argument.base for argument in parameters(groups.Config).values()]
    with_own_key = tuple(cls for cls in bases if cls and cls is not base and issubclass(cls, base))
    allowed: dict[str, type] = {}
    for cls in subclasses(base):
        given_base = f"{cls.__module__}.".startswith(f"{callback.__name__}.")
        shadows = cls.__name__ in allowed and package_of(cls) not in OURS  # a user's class of the same short name
        if not (inspect.isabstract(cls) or given_base or issubclass(cls, with_own_key) or shadows):
            allowed[cls.__name__] = cls
    return allowed


def places(key: str) -> list[Argument]:
    """Every argument that may stand at a dotted key."""
    above, _, name = key.removesuffix(".init_args").rpartition(".")
    owners = classes_at(above).values() if above else [groups.Config]
    return [parameters(owner)[name] for owner in owners if name in parameters(owner)]


def classes_at(key: str) -> dict[str, type]:
    """The classes that may stand at a dotted key, by short name; where keys stand below it, their dataclass."""
    classes: dict[str, type] = {}
    for argument in places(key):
        if argument.base:
            classes |= choices(argument.base)
    return classes


def base_of(key: str) -> type | None:
    """The base of the classes that a dotted key takes; None where it takes none."""
    return next((a.base for a in places(key) if a.base and not is_group(a.base)), None)


def class_keys(
    owner: type = groups.Config, prefix: str = "", above: tuple[type, ...] = (), ours: bool = False
) -> Iterator[tuple[str, type]]:
    """Every dotted key that takes a class, with the base of these classes, and every key that has keys below it, with
    their dataclass; ``ours``: without arguments of a user's classes.

    Classes that take their own kind, such as a rule around a rule, are followed once. A key may come twice.
    """
    for name, argument in parameters(owner).items():
        if cls := argument.base:
            yield f"{prefix}{name}", cls
            for option in () if cls in above else choices(cls).values():
                if not ours or package_of(option) in OURS:
                    yield from class_keys(option, f"{prefix}{name}.", (*above, cls), ours)


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
