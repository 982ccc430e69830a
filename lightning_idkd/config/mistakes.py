"""Sentences about mistakes in a config: each names the key, the value, what is allowed, and the nearest right name.

The texts of jsonargparse, of versions 4 and 5, are read in :func:`explain` alone: they say which key and class are
meant, the value, and sometimes the reason. What is allowed comes from the annotations. A text that is not known is
passed on, shortened."""

from __future__ import annotations

import re
from argparse import SUPPRESS
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from lightning_idkd.config import groups, kinds
from lightning_idkd.config.arguments import CLASS_KEYS, read_value
from lightning_idkd.config.class_paths import REMOVED, lookup
from lightning_idkd.config.kinds import Argument
from lightning_idkd.data.torchvision import SETS
from lightning_idkd.errors import UserError, did_you_mean, nearest

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
VALUE = re.compile(
    r"(?:Got value|Given value|path string|path format): (.*)"
    r"|(?:Import path|class, but) (\S+) (?:does|is)"
)
"""How jsonargparse quotes the value that it refuses."""


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are :class:`UserError`."""

    outermost = False  # jsonargparse makes a parser of this type for every class, whose error becomes part of ours

    def error(self, message: str, ex: Exception | None = None) -> None:
        if not self.outermost:
            return super().error(message, ex)
        options = [option for option in self._actions if option.default != SUPPRESS]  # without --help
        types = {option.dest: getattr(option, "_typehint", None) or option.type for option in options}
        raise UserError(explain(message, types)) from ex


def explain(message: str, types: Mapping[str, Any]) -> str:
    """An error text of jsonargparse as a sentence; ``types`` are the annotations of the parser's dotted keys."""
    if m := re.match(r"unrecognized arguments: (-*)([^\s=]*)", message):
        stray = f"'{m[2]}' is not a --key; a value needs its key before it"
        return unknown_key(m[2], types) if m[1] else stray
    if m := re.match(r"""Parser key "([^"]+)":\s+Unable to load config ['"](.*)['"]""", message):
        return wrong_value(m[1], m[2], find_argument(m[1], types))
    _, *steps = re.split(r'Parser key "([^"]+)":?\s*', message)  # a key, what follows it, a key below it, ...
    key, reason = ".".join(steps[::2]), steps[-1] if steps else message
    owners = re.findall(r"given class_path '(\S+)':\s+Parser key", message)
    argument = find_argument(key, types, owners[-1] if owners else "")
    base, items = argument.base, kinds.items(argument.annotation)
    path = m[1] if (m := re.search(r"given class_path '(.*)':", reason)) else ""
    value = m[m.lastindex] if (m := VALUE.search(reason)) else None
    if m := re.search(r"(?:Group '(.*)' does not accept option|Option) '([^']+)'", reason):
        return unknown_key(".".join(filter(None, (key, m[1], m[2]))), types, path.rpartition(".")[2])
    if m := re.match(r"NestedArg\(key='(.*?)', val=(.*)\)$", value or ""):
        if not key.endswith(f".{m[1]}"):
            return unknown_key(f"{key}.{m[1]}", types)
        value = m[2].strip("'")
    if m := re.search(r"""arguments are required: (.*)|Key "?([\w.]+)"? is required""", reason):
        return f"{key}.{m[m.lastindex]} is required".lstrip(".")
    if m := re.search(r"Parameter '(\w+)' from '(.*)\.__init__'", reason):
        return f"{key}: argument '{m[1]}' of {m[2]} has no default, so it needs a type, as in {m[1]}: float"
    if base and "is abstract" in reason:
        return abstract_class(key, value, base)
    if base and (m := re.search(r"No module named '(.*)'", reason)):
        return unknown_class(key, path, base, f"'{{}}' cannot be imported (no module '{m[1]}')")
    if base and (m := re.search(r"module '(.*)' has no attribute '(.*)'", reason)):
        return unknown_class(key, path, base, f"module '{m[1]}' has no class '{m[2]}'")
    if argument.annotation is Any:
        return " ".join(line.strip() for line in message.splitlines()[:2])
    if value is None:
        return f"{key}: {reason.splitlines()[0]}; allowed: {describe(argument, key)}"
    if items and re.search("subclass|import path", reason):  # an item of the list that the key takes
        argument = argument._replace(annotation=Union[tuple(items)])  # noqa: UP007 (their number is not known)
    return wrong_value(key, value, argument)


def find_argument(key: str, types: Mapping[str, Any], path: str = "") -> Argument:
    """The argument at a dotted key: that of the class at ``path`` if it has one of this name."""
    name = key.rpartition(".")[2]
    if path and isinstance(cls := lookup(path), type) and name in kinds.parameters(cls):
        return kinds.parameters(cls)[name]
    return next(iter(kinds.places(key)), Argument(types.get(key) or Any))


def wrong_value(key: str, text: str, argument: Argument) -> str:
    """Sentence for a value, as an error text quotes it, that a key does not take."""
    text = {"None": "null", "True": "true", "False": "false"}.get(text, text)
    is_text = isinstance(read_value(text, key), str) or not text
    types = kinds.members(argument.annotation)
    if is_text and argument.base in types and not kinds.is_group(argument.base):
        return unknown_class(key, text, argument.base)
    allowed, given = describe(argument, key), f"'{text}'" if is_text else text
    hint = did_you_mean(text, [str(name) for t in types if get_origin(t) is Literal for name in get_args(t)])
    return f"{key}: {given} given.{hint} Allowed: {allowed}" if hint else f"{key}: {given} given; allowed: {allowed}"


def describe(argument: Argument, key: str) -> str:
    """What the value of an argument, which stands at a dotted key, may be, in words."""
    base, words = argument.base, []
    for t in kinds.members(argument.annotation):
        items = kinds.items(t)
        if get_origin(t) is Literal:
            words.append(", ".join(map(str, get_args(t))))
        elif t is base:
            words.append(f"single keys {key}.KEY; --help lists them" if kinds.is_group(t) else describe_class(t))
        elif base in items:
            example = next(iter(kinds.choices(base)), "my_module.MyCallback")
            words.append(f"a list, such as '[{{class_path: {example}}}]'")
        elif get_origin(t) is dict:
            words.append(f"a mapping from {' to '.join(WORDS.get(of, 'a value') for of in get_args(t))}")
        elif items or t in (list, tuple):
            of = dict.fromkeys(WORDS[item] for item in items if item in WORDS)
            words.append("a list" + (f", each item {' or '.join(of)}" if of else ""))
        else:
            words.append(WORDS.get(t, "a value"))
    if base:
        words.sort(key=lambda word: word != "null")  # before a long list
    return (" or " if base is None or kinds.is_group(base) else ", or ").join(words)


def describe_class(base: type) -> str:
    """The classes that a key for ``base`` takes, in words."""
    return ", or ".join(filter(None, [", ".join(kinds.choices(base)), "the import path of a subclass of your own"]))


def unknown_key(key: str, types: Mapping[str, Any], given: str = "") -> str:
    """Sentence for a key that does not exist; ``given`` is the class whose argument it would be, where one is known."""
    parent, _, leaf = key.rpartition(".")
    classes = kinds.classes_at(parent)
    owners = [classes[given]] if given in classes else classes.values()
    allowed = set().union(*map(kinds.parameters, owners)) if parent else {k.split(".")[0] for k in types}
    others = set().union(*map(kinds.parameters, classes.values()))
    below = find_below(f"{parent}.", leaf, owners)
    if removed := REMOVED.get((parent.rpartition(".")[2], leaf)):
        return f"{key}: this key was removed; use {removed[1]} instead"
    if needed := name_needed(key):
        hint = f" Did you mean '{below}'? Else it" if below else " It"
        return f"{key}: {given or 'the class'} has no such argument.{hint} needs {needed}"
    if parent and not classes and (known := find_argument(parent, types)).annotation is not Any:
        return f"{key}: there is no such key; {parent} takes {describe(known, parent)}"
    hint = did_you_mean(leaf, {*allowed, *CLASS_KEYS} if classes else allowed) or did_you_mean(leaf, others)
    if not hint and below:
        needed = name_needed(below)
        return f"{key}: there is no such key. Did you mean '{below}'?" + (f" It needs {needed}" if needed else "")
    if not hint:  # the right leaf elsewhere, or a misspelt group
        same = [k for k in types if k.split(".")[-1] == leaf]
        hint = did_you_mean(key, same or [k for k in types if not key.startswith(f"{k}.")])
    names = f" Allowed: {', '.join(sorted(allowed))}." if allowed and len(allowed) < 16 else ""
    return f"{key}: there is no such key.{hint}{names}"


def name_needed(key: str) -> str:
    """Which classes have the argument at a dotted key, as in ``gossip to be DSGD or D2``; empty if none has it."""
    parent, _, leaf = key.rpartition(".")
    classes = kinds.classes_at(parent) if kinds.base_of(parent) else {}
    names = [name for name, cls in classes.items() if leaf in kinds.parameters(cls)]
    return f"{parent} to be {' or '.join(names)}" if names else ""


def find_below(prefix: str, leaf: str, owners: Iterable[type]) -> str:
    """The first dotted key like ``leaf`` below an argument of one of the ``owners``; empty if there is none."""
    for owner in owners:
        for key, cls in kinds.class_keys(owner, prefix):
            arguments = set().union(*map(kinds.parameters, kinds.choices(cls).values()))
            if meant := nearest(leaf, arguments):
                return f"{key}.{meant}"
    return ""


def unknown_class(key: str, name: str, base: type, why: str = "there is no class '{}' of this kind") -> str:
    """Sentence for a class that a key for ``base`` does not take."""
    hint = did_you_mean(name.split(".")[-1], kinds.choices(base))
    for known, (cls, *_) in SETS.items() if base is groups.Source else ():
        if name.lower() in (known, cls.lower()):
            hint = f" Did you mean Torchvision, with name '{known}'?"
    return f"{key}: {why.format(name)}.{hint} Allowed: {describe_class(base)}"


def abstract_class(key: str, path: str, base: type) -> str:
    """Sentence for a class that lacks what others of its kind have."""
    short = {cls.__name__: cls for cls in kinds.subclasses(base)}
    cls = lookup(path) if "." in path else short[path]
    if kinds.package_of(cls) in kinds.OURS:
        return f"{key}: '{path.rpartition('.')[2]}' is only the base class. Allowed: {describe_class(base)}"
    missing = ", ".join(sorted(cls.__abstractmethods__))
    return f"{key}: '{path}' does not define {missing}, which its base class leaves to it"


def refuse_nulls(value: Any, key: str = "", path: str = "") -> None:
    """Refuse null where a value is needed, in a resolved config and in the arguments of the classes that it names.

    jsonargparse reads null as "not given" wherever it stands. ``path`` is the class that has the argument ``key``."""
    if value is None:
        argument = find_argument(key, {}, path)
        if not {Any, NoneType}.intersection(kinds.members(argument.annotation)):
            raise UserError(wrong_value(key, "null", argument))
    elif isinstance(value, list):
        for item in filter(None, value):  # jsonargparse itself refuses items that are null
            refuse_nulls(item, key, path)
    elif isinstance(value, dict):
        path = value["class_path"] if isinstance(value.get("class_path"), str) else ""
        for name, below in ((value.get("init_args") or {}) if path else value).items():
            refuse_nulls(below, f"{key}.{name}".lstrip("."), path)
