"""Reads and writes the YAML of configs and sweeps.

A key that is given twice is an error, and what is written reads back equal.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Hashable, Iterator
from typing import Any

import yaml

from lightning_idkd.errors import UserError

FLOAT, MERGE = "tag:yaml.org,2002:float", "tag:yaml.org,2002:merge"
NUMBER = re.compile(
    r"""(?: [-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)? | [-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    | [-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)? | [-+]?\.(?:inf|Inf|INF) | \.(?:nan|NaN|NAN) )$""",
    re.VERBOSE,
)
"""Floats as YAML 1.2 defines them. 1e-3 is a float there; YAML 1.1 requires 1.0e-3."""


class Loader(yaml.SafeLoader):
    """PyYAML's loader with the numbers of YAML 1.2; dates stay texts."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML keeps them in the class)
        first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in ("float", "timestamp")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class Dumper(yaml.SafeDumper):
    """PyYAML's dumper, which also quotes texts that `Loader` would read as numbers."""


for _class in (Loader, Dumper):
    _class.add_implicit_resolver(FLOAT, NUMBER, list("-+.0123456789"))


def find_keys(node: yaml.Node, path: tuple[str, ...] = ()) -> Iterator[tuple[Hashable, str, int]]:
    """Everything below ``node`` that may be given only once, with its name and line.

    That is every key within its mapping, and every value by its dotted key, so that all spellings of a key count as
    one: ``train: {lr: 1}`` and ``train.lr: 1``, with or without ``init_args``."""
    for i, item in enumerate(node.value if isinstance(node, yaml.SequenceNode) else ()):
        yield from find_keys(item, (*path, str(i)))
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
            dotted = (*path, *(part for part in key.value.split(".") if part != "init_args"))
            line = key.start_mark.line + 1
            yield (path, key.value), key.value, line
            if not isinstance(value, yaml.MappingNode):
                yield dotted, ".".join(dotted), line
            yield from find_keys(value, dotted)


def read(text: str, loader: type[yaml.SafeLoader] = Loader) -> Any:
    """Return the values in a YAML or JSON ``text``.

    Raises:
        UserError: a key is given twice.
        yaml.YAMLError, ValueError: the text is not YAML.
    """
    if "\t" in text:
        with contextlib.suppress(ValueError):
            json.loads(text)
            text = text.replace("\t", " ")  # JSON allows tabs between values only, where YAML does not
    reader = loader(text)
    try:
        node, first = reader.get_single_node(), {}
        for place, key, line in find_keys(node):
            if place in first:
                raise UserError(f"line {line}: '{key}' is given already in line {first[place]}; allowed: once")
            first[place] = line
        return None if node is None else reader.construct_document(node)
    finally:
        reader.dispose()


def read_value(text: str) -> Any:
    """Return the value of an option's ``text``, or of a whole config, for jsonargparse.

    Names that YAML reads as null or as keys without values, such as ``#1``, ``&x``, ``x:`` and ``{a, b}``, stay texts.
    """
    value, bare = read(text), text.strip()
    if value is None:
        return None if bare.lower() in ("", "~", "null") else text
    if isinstance(value, dict) and value and all(v is None for v in value.values()):
        names = bare.removesuffix(":") if len(value) == 1 else bare.strip("{}").replace(" ", "")
        return text if set(names.split(",")) == set(map(str, value)) else value
    return value


def nest_dotted_keys(value: Any, names: Collection[str]) -> Any:
    """Return a config with every dotted key, such as gossip.momentum, below the key it belongs to, where that is given
    too.

    The parser would let one of the two replace the other. ``names`` are the keys at the top of a config; a mapping with
    other keys, such as a user's own, is returned unchanged.

    Raises:
        UserError: a key stands below null.
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) and key.split(".")[0] in names for key in value):
        return value
    result: dict[str, Any] = {}
    for key, inner in value.items():
        is_group = isinstance(inner, dict) and "class_path" not in inner
        result[key] = nest_dotted_keys(inner, inner) if is_group else inner
    for key in sorted((key for key in result if "." in key), key=lambda key: key.count(".")):
        parts = key.split(".")
        prefixes = [".".join(parts[:i]) for i in range(1, len(parts))]
        above = next((prefix for prefix in prefixes if prefix in result), None)
        if above is not None and result[above] is None:
            raise UserError(f"{key}: given beside {above}: null, which has no keys; leave one of them out")
        if above is not None and isinstance(result[above], (dict, str)):
            result[above] = put_below(result[above], parts[above.count(".") + 1 :], result.pop(key))
    return result


def put_below(value: dict | str, parts: list[str], leaf: Any) -> dict:
    """Return ``value``, a class or a group of keys, with ``leaf`` at the key ``parts`` below it."""
    value = {"class_path": value} if isinstance(value, str) else dict(value)
    head, *rest = parts
    if "class_path" in value and head != "init_args":
        return value | {"init_args": put_below(value.get("init_args") or {}, parts, leaf)}
    if rest and isinstance(value.get(head), (dict, str)):
        return value | {head: put_below(value[head], rest, leaf)}
    return value | {".".join(parts): leaf}


def write(values: Any) -> str:
    """Return ``values`` as YAML that `read`, and any reader of YAML 1.1, reads back equal."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)
