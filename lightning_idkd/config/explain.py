"""jsonargparse's errors in one or two lines that name the key, what was given, what is allowed, and the nearest right name.

It reads the texts of jsonargparse 4, which pyproject.toml therefore pins; what it does not know it passes on, shortened.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentParser

from lightning_idkd import callback
from lightning_idkd.config import groups
from lightning_idkd.data.torchvision import SETS
from lightning_idkd.errors import UserError, did_you_mean, nearest
from lightning_idkd.models import Architecture

OURS = ("lightning_idkd",)
BASES: dict[str, type] = {
    "gossip": callback.Gossip,
    "gossip.compression": callback.Compression,
    "gossip.rule": callback.Gossip,
    "calibration": callback.Calibration,
    "calibration.score": callback.OodScore,
    "calibration.score.score": callback.OodScore,
    "calibration.score.scores": callback.OodScore,
    "distillation": callback.Distillation,
    "distillation.aggregation": callback.Aggregation,
    "distillation.teacher": callback.Teacher,
    "distillation.encoding": callback.Encoding,
    "distillation.tuning": callback.FineTuning,
    "callbacks": callback.Callback,
    "graph.topology": groups.Topology,
    "graph.topology.base": groups.Topology,
    "data.private": groups.Source,
    "data.private.parts": groups.Source,
    "data.public": groups.Source,
    "data.public.parts": groups.Source,
    "data.partition": groups.Partition,
    "node.network": Architecture,
    "train.schedule": groups.Schedule,
}
"""The keys that take a class, or a list of them, and of what kind."""


def kind(key: str) -> type | None:
    """Of what kind the class at ``key`` is, however deep classes of a kind lie in one another; None where there is no class."""
    outer = re.sub(r"\.(rule|base|parts)(?=\.|$)", "", key)
    return BASES.get(re.sub(r"(\.scores?)+$", ".score", outer))


def classes(key: str, base: type | None = None) -> dict[str, type]:
    """The classes that ``key`` takes, by short name: those of its kind, or below ``base``; none where it takes no class."""

    def below(base: type) -> list[type]:
        return [c for sub in base.__subclasses__() for c in (sub, *below(sub))]

    base = kind(key) or base
    found = [c for c in below(base) if not inspect.isabstract(c)] if base else []
    if key == "callbacks":  # those with a key of their own are no extras
        found = [c for c in found if not issubclass(c, (callback.Gossip, callback.Calibration, callback.Distillation))]
    return {c.__name__: c for c in found if not f"{c.__module__}.".startswith(f"{callback.__name__}.")}


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class by name, with those that it passes on to its bases as ``**kwargs``, as jsonargparse has them."""
    found: dict[str, inspect.Parameter] = {}
    for base in (c for c in cls.__mro__ if "__init__" in vars(c)):
        _self, *here = inspect.signature(base.__init__).parameters.values()
        found = {p.name: p for p in here if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} | found
        if not any(p.kind is p.VAR_KEYWORD for p in here):
            break
    return found


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are :class:`UserError`."""

    outermost = False  # jsonargparse makes a parser of this type for every class, whose error becomes part of ours

    def error(self, message: str, ex: Exception | None = None) -> None:
        if not self.outermost:
            return super().error(message, ex)
        raise UserError(explain(message, [a.dest for a in self._actions])) from ex


def takers(key: str) -> dict[str, dict[str, inspect.Parameter]]:
    """The arguments of every class that ``key`` takes, by its name."""
    base = kind(key)
    found = {name: parameters(c) for name, c in classes(key).items()}
    return found | ({base.__name__: parameters(base)} if base and is_dataclass(base) else {})


def types(cls: type) -> dict[str, Any]:
    """The types of a class's arguments, of those that can be resolved without executing TYPE_CHECKING blocks."""
    found: dict[str, Any] = {}
    for base in reversed([c for c in cls.__mro__ if "__init__" in vars(c)]):
        try:
            found |= get_type_hints(base.__init__)
        except (NameError, TypeError):
            continue
    return found


def argument_base(path: str, name: str) -> type | None:
    """The class of which argument ``name`` of the class at ``path`` takes subclasses; None where it takes something else."""
    module, _, leaf = path.rpartition(".")
    hint = types(getattr(import_module(module), leaf)).get(name)
    found = [t for t in (hint, *get_args(hint)) if isinstance(t, type) and t.__module__.split(".")[0] in OURS]
    return found[0] if found else None


def unknown(key: str, known: list[str], given: str = "") -> str:
    """Sentence for a key that does not exist; ``given`` is the class whose argument it would be, where one is known."""
    parent, _, leaf = key.rpartition(".")
    there = {k[len(parent) + 1 if parent else 0 :].split(".")[0] for k in known if k.startswith(f"{parent}." if parent else "")}
    options = takers(parent)
    if owners := [name for name, takes in options.items() if leaf in takes]:
        inner = [k for k in (f"{parent}.{argument}" for argument in options.get(given, ())) if kind(k)]
        meant = [f"{k}.{leaf}" for k in inner if any(leaf in takes for takes in takers(k).values())]
        hint = f" Did you mean '{meant[0]}'? Else it" if meant else " It"
        return f"{key}: {given or 'the class there'} has no such argument.{hint} needs {parent} to be {' or '.join(owners)}"
    others = {p for takes in options.values() for p in takes}
    there |= set(options.get(given, others))
    there -= {"help", "print_config", "print_shtab"}
    known = [k for k in known if not k.endswith(".help")]
    allowed = f" Allowed: {', '.join(sorted(there))}." if there and len(there) < 16 else ""
    hint = did_you_mean(leaf, {*there, "class_path", "init_args"} if options else there) or did_you_mean(leaf, others)
    if not hint and parent:  # an argument of a class within
        for within in (k for k in BASES if k.startswith(f"{parent}.")):
            inner = takers(within)
            meant = nearest(leaf, {argument for takes in inner.values() for argument in takes})
            names = " or ".join(name for name, takes in inner.items() if meant in takes)
            if meant:
                return f"{key}: there is no such key. Did you mean '{within}.{meant}'? It needs {within} to be {names}"
    if not hint:  # the right leaf elsewhere, or a misspelt group
        same = [k for k in known if k.split(".")[-1] == leaf]
        hint = did_you_mean(key, same or [k for k in known if k != parent])
    return f"{key}: there is no such key.{hint}{allowed}"


def no_class(key: str, name: str, why: str = "there is no class '{}' of this kind", base: type | None = None) -> str:
    """Sentence for a class that ``key``, which takes subclasses of ``base``, does not take."""
    if kind(key) is None and base is None:
        return f"{key}: '{name}' is not allowed. Allowed: null, or single keys {key}.KEY; --help lists them"
    there = classes(key, base)
    sets = {word.lower(): known for known, (cls, *_) in SETS.items() for word in (known, cls)}
    if kind(key) is groups.Source and name.lower() in sets:
        hint = f" Did you mean Torchvision, with name '{sets[name.lower()]}'?"
    else:
        hint = did_you_mean(name.split(".")[-1], there)
    return f"{key}: {why.format(name)}.{hint} Allowed: {allowed(key, base)}"


def allowed(key: str, base: type | None = None) -> str:
    """The classes that ``key`` takes, in words."""
    own = "the import path of a subclass of your own"
    return f"{', '.join(there)}, or {own}" if (there := classes(key, base)) else own


def abstract(key: str, path: str) -> str:
    """Sentence for a class that lacks what others of its kind have."""
    module, _, name = path.rpartition(".")
    if module.split(".")[0] in OURS:
        return f"{key}: '{name}' is only the base class. Allowed: {allowed(key)}"
    missing = ", ".join(sorted(getattr(import_module(module), name).__abstractmethods__))
    return f"{key}: '{path}' does not define {missing}, which its base class leaves to it"


def explain(message: str, known: list[str]) -> str:
    """``message`` as a sentence; ``known`` are all dotted keys."""
    if m := re.match(r"unrecognized arguments: (\S+)", message):
        given = m[1].split("=")[0]
        return (
            unknown(given.lstrip("-"), known)
            if given.startswith("-")
            else f"'{given}' is no --key; a value needs its key before it"
        )
    if m := re.match(r"Group '([^']+)' does not accept option '([^']+)'", message):
        return unknown(f"{m[1]}.{m[2]}", known)
    path: list[str] = []
    wanted, base = "", None  # the class named last, and what its argument takes
    given = re.search(r"Given value: (.*)", message)
    path_given = re.sub(r".*class_path='([^']*)'.*", r"\1", given[1]) if given else ""
    for text in message.splitlines():
        text = text.strip(" -")
        if m := re.match(r'Parser key "([^"]+)":(.*)', text):
            path.append(m[1])
            text = m[2].strip()
            base = argument_base(wanted, m[1]) if wanted else None
        key = ".".join(path)
        if m := re.match(r"Problem with given class_path '(.*)':", text):
            wanted = m[1]
        if m := re.match(r"Option '([^']+)' is not accepted", text):
            return unknown(f"{key}.{m[1]}".lstrip("."), known, wanted.rpartition(".")[2])
        if m := re.match(r"Not a valid subclass of \w+\. Got value: (.*)", text):
            return f"{key}: {m[1].replace('None', 'null')} given; allowed: {allowed(key)}"
        if m := re.match(r"With fail_untyped=True.* Parameter '(\w+)' from '(.*)\.__init__'", text):
            return f"{key}: argument '{m[1]}' of {m[2]} has no default, so it needs a type, as in {m[1]}: float"
        if m := re.match(r"Unable to load config '(.*)'", text):
            return f"{key}: {m[1]} given; allowed: single keys {key}.KEY; --help lists them"
        if m := re.match(r"Expected a dot import path string: (\S+)|Expected a path but (\S+)", text):
            return no_class(key, m[1] or m[2], base=base)
        if m := re.match(r"Import path (?:(\S+) )?does not correspond", text):
            return no_class(key, m[1] or path_given, base=base)
        if m := re.match(r"Expected an instantiatable class, but (?:(\S+) )?is abstract", text):
            return abstract(key, m[1] or path_given)
        if m := re.match(r"No module named '(.*)'", text):
            return no_class(key, wanted, f"'{{}}' cannot be imported (no module '{m[1]}')")
        if m := re.match(r"module '(.*)' has no attribute '(.*)'", text):
            return no_class(key, wanted, f"module '{m[1]}' has no class '{m[2]}'")
        if m := re.match(r"Expected a typing\.Literal\[(.*)\]\. Got value: (.*)", text):
            there = [v.strip("' ") for v in m[1].split(",")]
            return f"{key}: '{m[2]}' is not allowed.{did_you_mean(m[2], there)} Allowed: {', '.join(there)}"
        if m := re.match(r"Expected a <class '(\w+)'>\. Got value:\s*(.*)", text):
            some = next(iter(classes(key)), "my_module.MyCallback")
            example = f"; allowed: a list, such as '[{{class_path: {some}}}]'" if kind(key) and m[1] == "list" else ""
            return f"{key}: {'null' if m[2] == 'None' else repr(m[2])} is no {m[1]}{example}"
        if re.match(r"Expected (?:a )?<class '\w+'>$", text) and given:
            choices = [c.strip("' ") for found in re.findall(r"typing\.Literal\[(.*?)\]", message) for c in found.split(",")]
            kinds = [*choices, *(k.replace("NoneType", "null") for k in re.findall(r"Expected (?:a )?<class '(\w+)'>", message))]
            value = re.sub(r".*val='?([^')]*)'?\).*", r"\1", given[1])
            return f"{key}: '{value}' is none of {', '.join(dict.fromkeys(kinds))}"
        if m := re.match(r"the following arguments are required: (.*)", text):
            return f"{key + '.' if key else ''}{m[1]} is required"
        if m := re.match(r"Key \"?([\w.]+)\"? is required", text):
            return f"{m[1]} is required"
    return " ".join(line.strip() for line in message.splitlines()[:2])
