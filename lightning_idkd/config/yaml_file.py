"""Reads and writes the YAML of configs and sweeps: a key given twice is an error, and what is written reads back equal."""

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
"""Floats as YAML 1.2 has them: 1e-3 is one, for which YAML 1.1 wants 1.0e-3."""


class Loader(yaml.SafeLoader):
    """PyYAML's, with the numbers of YAML 1.2; dates stay texts."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML keeps them in the class)
        first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in ("float", "timestamp")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class Dumper(yaml.SafeDumper):
    """PyYAML's, which also quotes texts that `Loader` would take for numbers."""


for _class in (Loader, Dumper):
    _class.add_implicit_resolver(FLOAT, NUMBER, list("-+.0123456789"))


def marks(node: yaml.Node, path: tuple[str, ...] = ()) -> Iterator[tuple[Hashable, str, int]]:
    """What may stand only once below ``node``, with its key and line: a key in its mapping, and a value's dotted key, in any of
    its spellings (``train: {lr: 1}`` and ``train.lr: 1``; ``init_args`` may be left out)."""
    for i, item in enumerate(node.value if isinstance(node, yaml.SequenceNode) else ()):
        yield from marks(item, (*path, str(i)))
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
            here, line = (*path, *(part for part in key.value.split(".") if part != "init_args")), key.start_mark.line + 1
            yield (path, key.value), key.value, line
            if not isinstance(value, yaml.MappingNode):
                yield here, ".".join(here), line
            yield from marks(value, here)


def read(text: str, loader: type[yaml.SafeLoader] = Loader) -> Any:
    """The values in a YAML or JSON ``text``.

    Raises:
        UserError: a key is given twice.
        yaml.YAMLError, ValueError: the text is not YAML.
    """
    if "\t" in text:
        with contextlib.suppress(ValueError):
            json.loads(text)
            text = text.replace("\t", " ")  # JSON may have tabs between values, and nowhere else; YAML has none there
    reader = loader(text)
    try:
        node, first = reader.get_single_node(), {}
        for mark, key, line in marks(node):
            if mark in first:
                raise UserError(f"line {line}: '{key}' is given already in line {first[mark]}; allowed: once")
            first[mark] = line
        return None if node is None else reader.construct_document(node)
    finally:
        reader.dispose()


def read_value(text: str) -> Any:
    """The value of an option's ``text``, or of a whole config, for jsonargparse; names that YAML takes for no value, such as
    ``#1``, ``&x``, ``x:`` and ``{a, b}``, stay texts."""
    found, bare = read(text), text.strip()
    if found is None:
        return None if bare.lower() in ("", "~", "null") else text
    if isinstance(found, dict) and found and all(v is None for v in found.values()):
        names = bare.removesuffix(":") if len(found) == 1 else bare.strip("{}").replace(" ", "")
        return text if set(names.split(",")) == set(map(str, found)) else found
    return found


def nest_dotted_keys(found: Any, names: Collection[str]) -> Any:
    """A config with these top-level ``names`` whose dotted keys, such as gossip.momentum, stand below the key they belong to
    where that is given too: the parser would let one replace the other. Anything else as it is.

    Raises:
        UserError: a key stands below null.
    """
    if not isinstance(found, dict) or not all(isinstance(k, str) and k.split(".")[0] in names for k in found):
        return found
    result: dict[str, Any] = {
        k: nest_dotted_keys(v, v) if isinstance(v, dict) and "class_path" not in v else v for k, v in found.items()
    }
    for key in sorted((k for k in result if "." in k), key=lambda k: k.count(".")):
        parts = key.split(".")
        above = next((a for i in range(1, len(parts)) if (a := ".".join(parts[:i])) in result), None)
        if above is not None and result[above] is None:
            raise UserError(f"{key}: given beside {above}: null, which has no keys; leave one of them out")
        if above is not None and isinstance(result[above], (dict, str)):
            result[above] = below(result[above], parts[above.count(".") + 1 :], result.pop(key))
    return result


def below(value: dict | str, parts: list[str], leaf: Any) -> dict:
    """``value``, a class or a group of keys, with ``leaf`` at the key ``parts`` below it."""
    value = {"class_path": value} if isinstance(value, str) else dict(value)
    head, *rest = parts
    if "class_path" in value and head != "init_args":
        return value | {"init_args": below(value.get("init_args") or {}, parts, leaf)}
    if rest and isinstance(value.get(head), (dict, str)):
        return value | {head: below(value[head], rest, leaf)}
    return value | {".".join(parts): leaf}


def write(values: Any) -> str:
    """``values`` as YAML that `read`, and any reader of YAML 1.1, reads back equal."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)
