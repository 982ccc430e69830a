"""Expands the ``command`` of a sweep file as W&B's agents do."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

MACROS = (
    "env", "interpreter", "program", "args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags", "args_json",
    "args_json_file", "args_append_hydra", "args_override_hydra",
)  # fmt: skip
"""What may stand between ``${`` and ``}`` in a command."""
ARGUMENTS = {f"${{{name}}}" for name in MACROS if name.startswith("args")}
"""The macros that stand for the parameters of a cell."""


def expand_command(command: list, parameters: dict, file: Path | str, program: str = "") -> list[str]:
    """The command line of a cell, as ``create_sweep_command`` and ``_command_run`` of W&B's agent build it.

    Values are written as Python writes them, such as None and True. ``file`` holds the parameters as JSON.
    """
    flags = [f"{key}={value}" for key, value in parameters.items()]
    no_equals, no_boolean_flags = [], []
    for key, value in parameters.items():
        no_equals += [f"--{key}", str(value)]
        if value is True:
            no_boolean_flags.append(f"--{key}")
        elif value is not False:
            no_boolean_flags.append(f"--{key}={value}")
    expansions = {
        "env": ["/usr/bin/env"],
        "interpreter": ["python"],
        "program": [program],
        "args": [f"--{flag}" for flag in flags],
        "args_no_equals": no_equals,
        "args_no_hyphens": flags,
        "args_no_boolean_flags": no_boolean_flags,
        "args_json": [json.dumps(parameters)],
        "args_json_file": [str(file)],
        "args_append_hydra": [f"+{flag}" for flag in flags],
        "args_override_hydra": [f"++{flag}" for flag in flags],
    }
    words: list[str] = []
    for part in command:
        word = re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", lambda match: os.environ.get(match[1], match[1]), str(part))
        if word.startswith("${") and word.endswith("}"):
            words += expansions.get(word[2:-1], [])
        else:
            words.append(word)
    return words
