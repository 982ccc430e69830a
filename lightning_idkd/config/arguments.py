"""Prepares the arguments of a command for jsonargparse: finds the project's configs by name, reads Python's spelling of
values, puts classes before their arguments, and checks what jsonargparse would report without the file, the key or the
line."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_idkd.checkout import CONFIGS
from lightning_idkd.config import Config, class_paths, yaml_file
from lightning_idkd.config.kinds import base_of, choices, find_classes, parameters
from lightning_idkd.config.resolved import GROUPS
from lightning_idkd.errors import UserError, did_you_mean

TOP_KEYS = ("config", *GROUPS)
"""The keys at the top of a config."""
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


def prepare(arguments: list[str]) -> list[str]:
    """The arguments as jsonargparse takes them: a config of the project by its path, values in Python's spelling as
    JSON.

    Raises:
        UserError: a config cannot be read, or arguments of a class stand outside its init_args.
    """
    arguments = put_classes_first(list(split_run_keys(arguments)))
    for place, option, text in read_options(arguments):
        new = find_config(text) if option == "--config" else class_paths.of_option(option, json_from_python(text))
        arguments[place] = f"{option}={new}" if arguments[place].startswith(f"{option}=") else new
    for value, key in read_values(arguments):
        refuse_stray_arguments(value, key)
    return arguments


def json_from_python(text: str) -> str:
    """A value that Python and YAML read differently, as JSON: None, or lists and dicts with True and None in them, as
    agents of W&B write them."""
    if text == "None" or text.startswith(("[", "{")):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):  # others are YAML
            value = ast.literal_eval(text)
            return text if read_value(text, "") == value else json.dumps(value, ensure_ascii=False)
    return text


def split_run_keys(arguments: list[str]) -> Iterator[str]:
    """The arguments, with an option ``--run`` for several keys split into one option per key, as the parser has
    them."""
    words = iter(arguments)
    for word in words:
        option, equals, text = word.partition("=")
        if option != "--run":
            yield word
            continue
        text = text if equals else next(words, "")
        keys = read_value(json_from_python(text), "run")
        if not isinstance(keys, dict):
            raise UserError(f"run: '{text}' given; allowed: single keys run.KEY; --help lists them")
        for key, value in keys.items():
            yield f"--run.{key}={value if isinstance(value, str) else json.dumps(value)}"


def put_classes_first(arguments: list[str]) -> list[str]:
    """Moves an option that names a class before options of its arguments, back to the last ``--config``.

    The parser reads options in order, and a class that is named starts from its own defaults. Arguments that the class
    does not take were meant for another class and stay where they are."""
    words: list[list[str]] = []  # an option and the words after it
    for word in arguments:
        if word.startswith("--") or not words:
            words.append([])
        words[-1].append(word)
    keys = [group[0].partition("=")[0] for group in words]
    for i, key in enumerate(keys):
        base = base_of(key.lstrip("-"))
        cls = choices(base).get("=".join(words[i]).partition("=")[2]) if base else None
        if cls is None:
            continue
        since = max((j + 1 for j in range(i) if keys[j] in ("--config", key)), default=0)
        takes = tuple(f"{key}.{argument}." for argument in parameters(cls))
        first = next((j for j in range(since, i) if f"{keys[j]}.".startswith(takes)), i)
        words.insert(first, words.pop(i))
        keys.insert(first, keys.pop(i))
    return [word for group in words for word in group]


def read_options(arguments: list[str]) -> Iterator[tuple[int, str, str]]:
    """Every option with its text, and the place in ``arguments`` where the text stands."""
    for i, word in enumerate(arguments):
        option, equals, text = word.partition("=")
        place = i if equals else i + 1
        if option.startswith("--") and place < len(arguments):
            yield place, option, text if equals else arguments[place]


def read_values(arguments: list[str]) -> Iterator[tuple[Any, str]]:
    """The value of every option, of ``--config`` all that the file holds, and the dotted key it stands at."""
    for _, option, text in read_options(arguments):
        if option == "--config":
            yield read_config(text), ""
        else:
            key = option.lstrip("-").removesuffix("+")
            yield read_value(text, key), key


def read_value(text: str, key: str) -> Any:
    """The value that the text of option ``key`` stands for."""
    try:
        return yaml_file.read_value(text)
    except UserError as e:
        raise UserError(f"{key}: {e}") from e
    except (yaml.YAMLError, ValueError):
        return text


def find_config(name: str) -> str:
    """The path of a config of this project, where ``name`` is not a file but one of these; else ``name``."""
    if Path(name).is_file():
        return name
    return next((str(path) for path in (CONFIGS / f"{name}.yaml", CONFIGS.parent / name) if path.is_file()), name)


def read_config(file: str) -> dict:
    """The keys in a config file.

    Raises:
        UserError: the file is missing, is not YAML, or it, or a group in it, holds no keys.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"--config: '{file}' is not UTF-8 text (byte 0x{e.object[e.start]:02x} at {e.start})") from e
    except OSError as e:
        known = [str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml")]
        raise UserError(f"--config: there is no file '{file}'.{did_you_mean(file, known)}") from e
    try:
        keys = class_paths.full_paths(yaml_file.nest_dotted_keys(yaml_file.read(text), TOP_KEYS))
    except UserError as e:
        raise UserError(f"--config: '{file}', {e}") from e
    except (yaml.YAMLError, ValueError) as e:
        mark = getattr(e, "problem_mark", None)
        why = ", ".join(filter(None, (getattr(e, "context", ""), getattr(e, "problem", "")))) or str(e)
        raise UserError(f"--config: '{file}'{f', line {mark.line + 1}' if mark else ''}, is not YAML: {why}") from e
    if not isinstance(keys, dict):
        raise UserError(f"--config: '{file}' holds {describe_content(keys)}; allowed: keys and their values")
    for group in fields(Config):
        if is_dataclass(group.type) and not isinstance(below := keys.get(group.name, {}), dict):
            what = describe_content(below)
            raise UserError(f"--config: '{file}' has {what} below {group.name}; allowed: its keys and their values")
    return keys


def describe_content(value: Any) -> str:
    """What stands where keys should."""
    return "nothing" if value is None else "a list" if isinstance(value, list) else f"only '{value}'"


def refuse_stray_arguments(value: Any, key: str) -> None:
    """Refuse arguments of a class beside its init_args."""
    for place, spec in find_classes(value, key):
        for stray in (name for name in spec if name not in CLASS_KEYS):
            if isinstance(spec[stray], dict) and (hint := did_you_mean(str(stray), CLASS_KEYS)):
                raise UserError(f"{place}.{stray}: there is no such key.{hint}")
            raise UserError(
                f"{place}.{stray}: the arguments of a class belong in init_args, as in "
                f"{{class_path: {spec['class_path']}, init_args: {{{stray}: {spec[stray]}}}}}"
            )
