"""Calls the hooks of all callbacks, and checks what they add to metrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lightning_idkd.callback import Callback
from lightning_idkd.errors import UserError
from lightning_idkd.files import to_json

ADDED_TO = ("metrics", "summary")
"""Parts of a payload to which callbacks may add."""


class Hooks:
    """The callbacks of a run, in the order in which they are called."""

    def __init__(self, callbacks: list[Callback]):
        self.callbacks = callbacks
        self._methods: dict[str, list[tuple[Callable, list[str]]]] = {}

    def call(self, hook: str, payload: dict[str, Any]) -> None:
        """Call a hook of every callback with those parts of the payload that it names.

        Raises:
            UserError: a callback changed what is in ``metrics`` or ``summary``, or added what JSON cannot hold.
        """
        for method, names in self._methods_of(hook):
            before = {name: to_json(payload[name], name) for name in names if name in ADDED_TO}
            method(**{name: payload[name] for name in names})
            for name, values in before.items():
                check_additions(payload[name], values, f"callbacks: {type(method.__self__).__name__}: {name}")

    def _methods_of(self, hook: str) -> list[tuple[Callable, list[str]]]:
        """The callbacks' methods for a hook, each with the names of its arguments."""
        if hook not in self._methods:
            methods = [getattr(callback, hook) for callback in self.callbacks if hasattr(callback, hook)]
            self._methods[hook] = [(method, list(inspect.signature(method).parameters)) for method in methods]
        return self._methods[hook]


def check_additions(values: dict, before: dict, what: str) -> None:
    """Turn what a callback added to ``values`` into plain numbers and texts; ``what`` names the values in messages.

    Raises:
        UserError: the callback changed or removed what was there ``before``, or added what JSON cannot hold.
    """
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"{what} has the key {key!r}, of type {type(key).__name__}; allowed: text")
    values.update(to_json(values, what))
    for key in before:
        if key not in values or values[key] != before[key]:
            raise UserError(f"{what}[{key!r}] is changed or removed; allowed: new keys")
