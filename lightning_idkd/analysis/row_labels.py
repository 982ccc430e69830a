"""Labels of the rows of a comparison, built from the config keys that vary between the runs."""

from __future__ import annotations

import re

from lightning_idkd.config import NodeConfig
from lightning_idkd.config.class_paths import name_class
from lightning_idkd.config.resolved import METHOD, RESULT, SETTING, look_up

ALIKE = tuple(key for key in RESULT if key != "seed")
"""Keys that are the same in all runs of a row."""
PLAIN = (("callbacks", []), ("node.module", NodeConfig.module), ("node.module", None))
"""Keys with default values, which a label leaves out."""
NUMBER = re.compile(r"((?:(?<!\w)-)?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")


def flatten(value: object, key: str = "") -> dict[str, object]:
    """Flatten a config to dotted keys. A class is the value of its key, and its arguments have keys below; a list of
    classes is their names, joined by +."""
    if isinstance(value, dict):
        if "class_path" in value:
            return {key: name_class(str(value["class_path"]))} | flatten(value.get("init_args") or {}, key)
        flat: dict[str, object] = {}
        for name, below in value.items():
            flat |= flatten(below, f"{key}.{name}".lstrip("."))
        return flat
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        names = [flatten(item, "x").get("x") for item in value]
        flat = {key: "+".join(str(item if name is None else name) for item, name in zip(value, names, strict=True))}
        for item, name in zip(value, names, strict=True):
            below = f"{key}.{'' if name is None else name}"
            flat |= {k: v for k, v in flatten(item, below).items() if k != below}
        return flat
    return {key: value}


def shorten(key: str, keys: set[str]) -> str:
    """Shorten ``key`` to the shortest of its ends that no other of ``keys`` has."""
    parts = key.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next((end for end in ends if not any(k != key and f".{k}".endswith(f".{end}") for k in keys)), key)


def build_label(config: dict, groups: tuple[str, ...], varied: set[str]) -> str:
    """Build the label of a run from the values of its keys in ``groups`` that are ``varied`` between the runs.

    The classes of a method stand without their key, further callbacks as +Name.
    """
    parts = []
    for group in groups:
        values = flatten(look_up(config, group), group)
        differing = {k: v for k, v in values.items() if k in varied and (k, v) not in PLAIN}
        if group in METHOD and group in values and any(f"{k}.".startswith(f"{group}.") for k in varied):
            differing.pop(group, None)
            if group != "callbacks":
                parts.append(format_value(values[group]))
            elif values[group]:
                parts.append(f"+{values[group]}")
        parts += [f"{shorten(k, varied)}={format_value(v, k)}" for k, v in differing.items()]
    return " ".join(parts) or "-"


def format_value(value: object, key: str = "") -> str:
    """Format a config's value for a label; a node module is named like other classes."""
    if value is None or value == []:
        return "none"
    return name_class(str(value)) if key == "node.module" else str(value)


def build_sort_key(text: str) -> list[str | float]:
    """Build a sort key that orders texts by the values of the numbers in them, so that 2 comes before 10."""
    return [float(part) if i % 2 else part for i, part in enumerate(NUMBER.split(text))]


def list_leaves(value: object, key: str = "") -> dict[str, object]:
    """List all values that are neither a dict nor a list of dicts, by dotted keys. A class has its name at its key, its
    arguments below, and its import path at ``class_path``."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {key: value}
    if "class_path" in value:
        path = str(value["class_path"])
        arguments = list_leaves(value.get("init_args") or {}, key)
        return {key: name_class(path), f"{key}.class_path": path} | arguments
    leaves: dict[str, object] = {}
    for name, below in value.items():
        leaves |= list_leaves(below, f"{key}.{name}".lstrip("."))
    return leaves


def find_varied_keys(configs: list[dict]) -> set[str]:
    """Find the keys of settings and methods whose values differ between the runs.

    Arguments of a class that only some runs have say nothing beyond the class's name, so a key counts only if it
    differs between runs that have it, or is itself a group of the method.
    """
    flats = []
    for config in configs:
        flat: dict[str, object] = {}
        for key in SETTING + METHOD:
            flat |= flatten(look_up(config, key), key)
        flats.append(flat)
    varied = set()
    for key in set().union(*flats):
        present = {repr(flat[key]) for flat in flats if key in flat}
        if len(present) > 1 or (key in METHOD and len({repr(flat.get(key)) for flat in flats}) > 1):
            varied.add(key)
    return varied
