"""Resolved configs as plain values: look up keys, and compare."""

from __future__ import annotations

import functools
from typing import Any

RESULT = ("seed", "graph", "data", "node", "train", "gossip", "calibration", "distillation", "callbacks", "run.precision",
          "run.autocast")  # fmt: skip
"""The config keys that enter a run's result: all but how and where it runs."""
SAME = ("seed", "graph", "node", "gossip", "run.precision", "run.autocast", "data.private", "data.partition", "data.validation",
        "data.image_size", "data.channels", "data.augment")  # fmt: skip
"""What a fork shares with the run it starts from. The initial training does not see the public set."""
ONGOING = ("calibration", "distillation", "data.public", "data.augment_public")
"""What a fork must share besides, to go on with the distilled labels that it finds."""


def at(config: dict, key: str) -> Any:
    """What a resolved config has at a dotted key."""
    return functools.reduce(lambda c, k: c.get(k), key.split("."), config)


def difference(a: dict, b: dict, keys: tuple[str, ...] = RESULT) -> tuple[str, Any, Any] | None:
    """The first dotted key, ``keys`` or below, in which two resolved configs differ, with both values."""
    for key in keys:
        if found := _difference(at(a, key), at(b, key), key):
            return found
    return None


def _difference(a: Any, b: Any, key: str) -> tuple[str, Any, Any] | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for k in {**a, **b}:
            if found := _difference(a.get(k), b.get(k), f"{key}.{k}"):
                return found
        return None
    return None if a == b else (key, a, b)
