"""Resolved configs as plain values: look up keys, compare two configs, and say which keys matter for what.

The lists of keys below are read from the table of groups, the fields of :class:`~lightning_idkd.config.Config`.
"""

from __future__ import annotations

import functools
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from lightning_idkd.config.groups import Config, Entry

GROUPS: dict[str, Entry] = {f.name: f.metadata["entry"] for f in fields(Config) if "entry" in f.metadata}
"""The config groups by name."""


def single_keys() -> dict[str, dict[str, Entry]]:
    """Per group of keys, its dotted keys with their entries, which are empty for most."""
    types: dict[str, Any] = {f.name: f.type for f in fields(Config)}
    keys: dict[str, dict[str, Entry]] = {}
    for group in GROUPS:
        below: tuple[Field, ...] = fields(types[group]) if is_dataclass(types[group]) else ()
        keys[group] = {f"{group}.{f.name.rstrip('_')}": f.metadata.get("entry", Entry()) for f in below}
    return keys


def read_entries(attribute: str) -> dict[str, str]:
    """What the table says for an ``attribute`` of :class:`Entry`: by group or, where its keys differ, by key."""
    values: dict[str, str] = {}
    for group, keys in single_keys().items():
        of_group = getattr(GROUPS[group], attribute)
        differ = any(getattr(entry, attribute) for entry in keys.values())
        for key, entry in keys.items() if differ else [(group, GROUPS[group])]:
            if value := getattr(entry, attribute) or of_group:
                values[key] = value
    return values


def older_values() -> dict[str, Any]:
    """Keys that some stored runs are too old to have, with the value that these runs had in effect."""
    entries: dict[str, Entry] = {}
    for keys in single_keys().values():
        entries |= keys
    entries |= GROUPS
    return {key: entry.older for key, entry in entries.items() if entry.older is not MISSING}


FORKS = read_entries("fork")
SAME = tuple(key for key, fork in FORKS.items() if fork == "same")
"""The keys that a fork shares with the run it starts from. The initial training does not see the public set."""
ONGOING = tuple(key for key, fork in FORKS.items() if fork == "labels")
"""The keys that a fork must share besides, to go on with the distilled labels of its source."""
RESULT = tuple(dict.fromkeys(key.split(".")[0] if GROUPS[key.split(".")[0]].fork else key for key in FORKS))
"""The keys that enter a run's result: all but how and where it runs."""
TRAINED = tuple(key for key, entry in GROUPS.items() if entry.fork and not entry.evaluate)
"""The groups that ``idkd evaluate`` takes from the run."""
LABELS = read_entries("label")
SETTING = tuple(key for key, label in LABELS.items() if label == "setting")
METHOD = tuple(key for key, label in LABELS.items() if label == "method")
"""The groups and keys that name a row of a comparison: what is compared in, and what is compared."""
OLDER = older_values()


def look_up(config: dict, key: str) -> Any:
    """What a resolved config has at a dotted key."""
    return functools.reduce(lambda c, k: c.get(k), key.split("."), config)


def add_newer_keys(config: dict) -> None:
    """Give the config of a stored run the keys that are newer than the run.

    Raises:
        KeyError: a group is missing, so that this is not the config of a run.
    """
    for key, value in OLDER.items():
        *groups, name = key.split(".")
        (config[groups[0]] if groups else config).setdefault(name, value)


def difference(a: dict, b: dict, keys: tuple[str, ...] = RESULT) -> tuple[str, Any, Any] | None:
    """The first dotted key, among ``keys`` or below, in which two resolved configs differ, with both values."""
    for key in keys:
        if differing := _difference(look_up(a, key), look_up(b, key), key):
            return differing
    return None


def _difference(a: Any, b: Any, key: str) -> tuple[str, Any, Any] | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for k in {**a, **b}:
            missing = k not in a or k not in b  # a stored run may be older than an argument that is off by default
            values = a.get(k), b.get(k)
            if not (missing and not any(values)) and (differing := _difference(*values, f"{key}.{k}")):
                return differing
        return None
    return None if a == b else (key, a, b)
