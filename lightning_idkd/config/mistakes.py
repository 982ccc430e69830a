"""Sentences about mistakes in a config: each names the key, the value, what is allowed, and the nearest right name.

The texts of jsonargparse, of versions 4 and 5, are read in :func:`explain` alone: they say which key and class are
meant, the value, and sometimes the reason. What is allowed comes from the annotations. A text that is not known is
passed on, shortened."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib import import_module
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser

from lightning_idkd.config import groups, yaml_file
from lightning_idkd.config.kinds import (
    OURS,
    annotations,
    arguments_below,
    base_in,
    base_of,
    choices,
    class_keys,
    find_classes,
    group_in,
    items,
    members,
    parameters,
    places,
)
from lightning_idkd.data.torchvision import SETS
from lightning_idkd.errors import UserError, did_you_mean, nearest

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
VALUE = re.compile(
    r"(?:Got value|import path string|path format): (.*)|Import path (\S+) does not|a path but (\S+)|Given value: (.*)"
)
"""How jsonargparse quotes the value that it refuses; version 4 ends with the values of the keys around it."""


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are :class:`UserError`."""

    outermost = False  # jsonargparse makes a parser of this type for every class, whose error becomes part of ours

    def error(self, message: str, ex: Exception | None = None) -> None:
        if not self.outermost:
            return super().error(message, ex)
        types = {action.dest: getattr(action, "_typehint", None) or action.type for action in self._actions}
        raise UserError(explain(message, types)) from ex


def explain(message: str, types: Mapping[str, Any]) -> str:
    """An error text of jsonargparse as a sentence; ``types`` are the annotations of the parser's dotted keys."""
    if m := re.match(r"unrecognized arguments: ([^\s=]+)", message):
        stray = f"'{m[1]}' is no --key; a value needs its key before it"
        return unknown_key(m[1].lstrip("-"), types) if m[1].startswith("-") else stray
    if m := re.match(r"Group '([^']+)' does not accept option '([^']+)'", message):
        return unknown_key(f"{m[1]}.{m[2]}", types)
    if m := re.match(r"""Parser key "([^"]+)":\s+Unable to load config ['"](.*)['"]""", message):
        return refuse(m[1], show(m[2]), describe(annotations(groups.Config).get(m[1]), groups.Config, m[1]))
    steps = re.findall(r"""Parser key "([^"]+)"|given class_path '(.*)':""", message)
    key, path = ".".join(name for name, _ in steps if name), next((path for _, path in reversed(steps) if path), "")
    annotation, owner = find_argument(key, steps, types)
    base, value = base_in(annotation, owner), quoted_value(message)
    if m := re.search(r"Option '([^']+)' is not accepted", message):
        return unknown_key(f"{key}.{m[1]}".lstrip("."), types, path.rpartition(".")[2])
    if m := re.search(r"""following arguments are required: (.*)|Key "?([\w.]+)"? is required""", message):
        return f"{m[2] or f'{key}.{m[1]}'.lstrip('.')} is required"
    if m := re.search(r"Parameter '(\w+)' from '(.*)\.__init__'", message):
        return f"{key}: argument '{m[1]}' of {m[2]} has no default, so it needs a type, as in {m[1]}: float"
    if m := re.match(r"NestedArg\(key='(.*?)'", value):
        inside, allowed = f"{key}.{m[1]}", describe(annotation, owner, key)
        below = base or group_in(annotation, owner)
        return unknown_key(inside, types) if below else f"{inside}: there is no such key; {key} takes {allowed}"
    if base and (m := re.search(r"instantiatable class, but (\S+ )?is abstract", message)):
        return abstract_class(key, (m[1] or value).strip(), base)
    if base and (m := re.search(r"No module named '(.*)'", message)):
        return unknown_class(key, path, base, f"'{{}}' cannot be imported (no module '{m[1]}')")
    if base and (m := re.search(r"module '(.*)' has no attribute '(.*)'", message)):
        return unknown_class(key, path, base, f"module '{m[1]}' has no class '{m[2]}'")
    if annotation is not None and VALUE.search(message):
        return wrong_value(key, value, annotation, owner, item=bool(re.search("subclass|import path", message)))
    if annotation is not None:
        reason = re.split(r'Parser key "[^"]+":?\s*', message)[-1].partition("\n")[0]
        return f"{key}: {reason}; allowed: {describe(annotation, owner, key)}"
    return " ".join(line.strip() for line in message.splitlines()[:2])


def find_argument(key: str, steps: list[tuple[str, str]], types: Mapping[str, Any]) -> tuple[Any, type]:
    """The annotation of the argument that an error is about, None where it is not known, and the class that has the
    argument."""
    if steps[-1:] and not steps[-1][0]:
        steps = steps[:-1]  # the class at the key itself
    if len(steps) > 1 and steps[-2][1]:
        module, _, leaf = steps[-2][1].rpartition(".")
        owner = getattr(import_module(module), leaf)
        if steps[-1][0] in annotations(owner):
            return annotations(owner)[steps[-1][0]], owner
    return (types[key], groups.Config) if types.get(key) else next(iter(places(key)), (None, groups.Config))


def quoted_value(message: str) -> str:
    """The value that an error is about: the innermost one."""
    values = [(next(filter(None, m.groups()), ""), m[0].startswith("Given")) for m in VALUE.finditer(message)]
    direct = [value for value, given in values if not given][-1:] or [value for value, _ in values][:1] or [""]
    return re.sub(r".*class_path='([^']*)'.*", r"\1", direct[0])


def show(text: str) -> str:
    """A value as an error text quotes it, in the spelling of YAML."""
    try:
        value = yaml_file.read_value(text)
    except (yaml.YAMLError, ValueError):
        value = text
    if isinstance(value, str) or not text:
        return "null" if text == "None" else f"'{text}'"
    return text.lower() if isinstance(value, bool) else text


def refuse(key: str, value: str, allowed: str, hint: str = "") -> str:
    """Sentence for a value that a key does not take."""
    return f"{key}: {value} given.{hint} Allowed: {allowed}" if hint else f"{key}: {value} given; allowed: {allowed}"


def wrong_value(key: str, text: str, annotation: Any, owner: type, item: bool) -> str:
    """Sentence for a value of the wrong type; ``item``: the value is an item of the list that the key takes."""
    value, base = show(text), base_in(annotation, owner)
    allowed = describe_class(base) if base and item and items(annotation) else describe(annotation, owner, key)
    if base and value.startswith("'") and (item or not items(annotation)):
        return unknown_class(key, text, base)
    names = [str(name) for t in members(annotation) if get_origin(t) is Literal for name in get_args(t)]
    return refuse(key, value, allowed, did_you_mean(text, names))


def describe(annotation: Any, owner: type, key: str) -> str:
    """What a value with this annotation, of an argument of the class ``owner``, may be, in words."""
    base, words = base_in(annotation, owner), []
    for t in members(annotation):
        if get_origin(t) is Literal:
            words.append(", ".join(map(str, get_args(t))))
        elif base and items(t):
            words.append(f"a list, such as '[{{class_path: {next(iter(choices(base)), 'my_module.MyCallback')}}}]'")
        elif items(t) or t in (list, tuple):
            of = dict.fromkeys(WORDS[item] for item in items(t) if item in WORDS)
            words.append("a list" + (f", each item {' or '.join(of)}" if of else ""))
        elif t is base:
            words.append(describe_class(base))
        elif t is group_in(annotation, owner):
            words.append(f"single keys {key}.KEY; --help lists them")
        else:
            words.append(WORDS.get(t, "a value"))
    if "null" in words and len(words) > 1:
        words = ["null", *(word for word in words if word != "null")] if base or "KEY" in words[0] else words
    return (", or " if base else " or ").join(words)


def describe_class(base: type) -> str:
    """The classes that a key for ``base`` takes, in words."""
    return ", ".join([*choices(base), "or the import path of a subclass of your own"]).removeprefix("or ")


def unknown_key(key: str, types: Mapping[str, Any], given: str = "") -> str:
    """Sentence for a key that does not exist; ``given`` is the class whose argument it would be, where one is known."""
    parent, _, leaf = key.rpartition(".")
    known = [k for k in types if not k.endswith(".help")]
    prefix = f"{parent}." if parent else ""
    below = {k.removeprefix(prefix).split(".")[0] for k in known if k.startswith(prefix)}
    below -= {"help", "print_config", "print_shtab"}
    options = {} if below else arguments_below(parent)
    if takers := [name for name, takes in options.items() if leaf in takes]:
        inner = [k for k in (f"{parent}.{argument}" for argument in options.get(given, ())) if base_of(k)]
        meant = [f"{k}.{leaf}" for k in inner if any(leaf in takes for takes in arguments_below(k).values())]
        hint = f" Did you mean '{meant[0]}'? Else it" if meant else " It"
        refused = f"{key}: {given or 'the class'} has no such argument."
        return f"{refused}{hint} needs {parent} to be {' or '.join(takers)}"
    others = {argument for takes in options.values() for argument in takes}
    below |= set(options.get(given, others))
    hint = did_you_mean(leaf, {*below, "class_path", "init_args"} if options else below) or did_you_mean(leaf, others)
    if not hint and parent and (within := nearest_within(parent, leaf)):
        return f"{key}: there is no such key. {within}"
    if not hint:  # the right leaf elsewhere, or a misspelt group
        same = [k for k in known if k.split(".")[-1] == leaf]
        hint = did_you_mean(key, same or [k for k in known if not key.startswith(f"{k}.")])
    allowed = f" Allowed: {', '.join(sorted(below))}." if below and len(below) < 16 else ""
    return f"{key}: there is no such key.{hint}{allowed}"


def nearest_within(parent: str, leaf: str) -> str:
    """A hint at the nearest argument of a class that stands somewhere below ``parent``; empty where there is none."""
    for within, cls in class_keys():
        if within.startswith(f"{parent}."):
            options = arguments_below(within)
            meant = nearest(leaf, {argument for takes in options.values() for argument in takes})
            names = " or ".join(name for name, takes in options.items() if meant in takes)
            needs = "" if is_dataclass(cls) else f" It needs {within} to be {names}"
            if meant:
                return f"Did you mean '{within}.{meant}'?{needs}"
    return ""


def unknown_class(key: str, name: str, base: type, why: str = "there is no class '{}' of this kind") -> str:
    """Sentence for a class that a key for ``base`` does not take."""
    sets = {word.lower(): known for known, (cls, *_) in SETS.items() for word in (known, cls)}
    hint = did_you_mean(name.split(".")[-1], choices(base))
    if base is groups.Source and name.lower() in sets:
        hint = f" Did you mean Torchvision, with name '{sets[name.lower()]}'?"
    return f"{key}: {why.format(name)}.{hint} Allowed: {describe_class(base)}"


def abstract_class(key: str, path: str, base: type) -> str:
    """Sentence for a class that lacks what others of its kind have."""
    module, _, name = path.rpartition(".")
    if module.split(".")[0] in OURS:
        return f"{key}: '{name}' is only the base class. Allowed: {describe_class(base)}"
    missing = ", ".join(sorted(getattr(import_module(module), name).__abstractmethods__))
    return f"{key}: '{path}' does not define {missing}, which its base class leaves to it"


def refuse_nulls(value: Any, annotation: Any = groups.Config, owner: type = groups.Config, key: str = "") -> None:
    """Refuse null where a value is needed, in a resolved config and in the arguments of the classes that it names.

    jsonargparse reads null as "not given" wherever it stands.
    """
    if value is None and annotation not in (None, Any) and NoneType not in members(annotation):
        raise UserError(refuse(key, "null", describe(annotation, owner, key)))
    for item in value if isinstance(value, list) else ():
        refuse_nulls(item, None, owner, key)
    if not isinstance(value, dict):
        return
    cls, arguments = group_in(annotation, owner), value
    if isinstance(value.get("class_path"), str):
        module, _, name = value["class_path"].rpartition(".")
        cls, arguments = getattr(import_module(module), name), value.get("init_args") or {}
    for name, parameter in parameters(cls).items() if cls else ():
        name = name.rstrip("_")
        if name in arguments and (arguments[name] is not None or parameter.default is not None):
            refuse_nulls(arguments[name], annotations(cls).get(name), cls, f"{key}.{name}".lstrip("."))


def name_argument(e: UserError, config: dict) -> str:
    """The sentence of a class that refused an argument, with the key that the argument has in the resolved ``config``;
    the class names the key that it would have in the outermost class of its kind."""
    key, _, sentence = str(e).partition(": ")
    outer, _, name = key.rpartition(".")
    made = {type(frame.f_locals.get("self")).__name__ for frame, _ in traceback.walk_tb(e.__traceback__)}
    keys = []
    for place, spec in find_classes(config, ""):
        if spec["class_path"].rpartition(".")[2] in made and name in (spec.get("init_args") or {}):
            keys.append(place)
    return str(e) if not keys or outer in keys else f"{keys[-1]}.{name}: {sentence}"
