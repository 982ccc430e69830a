"""Writes the page of all config keys from docstrings: ``python -m lightning_idkd.command.keys > configs/README.md``."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module

from lightning_idkd.checkout import CALLBACKS
from lightning_idkd.config.kinds import choices, class_keys, is_group, parameters, summarise
from lightning_idkd.config.parse import PLUGINS

HEAD = """# Configs

Each file is one experiment. Its first lines give the command, its duration and the result. Files in `presets/` change
an experiment, as in `make train CFG="ring_cifar10 presets/official_code"`. Files in `sweeps/` are W&B sweeps; `make
sweep` runs them, or `idkd sweep` without a server. A file is found by its name from any folder, as in `--config
presets/fedmd`. The command line may set any key too, as in `--train.lr 0.05`. Of several `--config` files, later ones
win.

`class_path` names a class: a built-in class by its short name, yours by its import path. `init_args` contains its
arguments. On the command line, this is `--gossip DSGD --gossip.momentum 0.9`. A class that is named starts from its own
defaults, which this page gives. Arguments of an earlier file remain only if a later file names the same class again or
no class. It is an error if a file has a key twice. If the command line has an option twice, the last one counts.

*The docstrings generate this page: `python -m lightning_idkd.command.keys > configs/README.md`.*

`seed` (default 0): Seed of all randomness.
"""


def read_docstrings(cls: type) -> dict[str, str]:
    """The description of every argument of a class, from its own docstring and those of its bases."""
    from docstring_parser import parse_from_object

    descriptions: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        for part in parse_from_object(base).meta:
            if len(part.args) > 1:
                descriptions[part.args[1].rstrip("_")] = " ".join((part.description or "").split())
    return descriptions


def format_default(value: object) -> str:
    """The default of an argument as YAML writes it."""
    if value is inspect.Parameter.empty:
        return "required"
    if value is None:
        return "default null"
    if isinstance(value, bool):
        return f"default {str(value).lower()}"
    if is_dataclass(value) or not isinstance(value, (int, float, str, list, tuple, dict)):
        return f"default {type(value).__name__}"
    return f"default {list(value) if isinstance(value, tuple) else value}"


def describe_arguments(cls: type, prefix: str) -> list[str]:
    """A line for every argument of a class, or every key of a group."""
    descriptions, lines, defaults = read_docstrings(cls), [], {}
    if is_dataclass(cls):
        defaults = {f.name.rstrip("_"): f.default_factory() for f in fields(cls) if f.default_factory is not MISSING}
    for name, parameter in parameters(cls).items():
        default = format_default(defaults.get(name, parameter.default))
        lines.append(f"{prefix}{name}` ({default}): {descriptions.get(name, '')}")
    return lines


def describe_class(name: str, cls: type) -> list[str]:
    """The first paragraph of a class's docstring, and its arguments."""
    return [f"- **{name}**: {summarise(cls)}", *describe_arguments(cls, "  - `")]


def gather_classes() -> dict[type, tuple[list[str], dict[str, type]]]:
    """For every base class: the keys that take its classes, and this project's classes by name, in alphabetical order;
    under ``callbacks`` only those of the callbacks package, since the core's own are in every run."""
    for plugin in PLUGINS:
        import_module(plugin)
    kinds: dict[type, list[str]] = {}
    for key, base in dict(class_keys(ours=True)).items():
        if not is_group(base):
            kinds.setdefault(base, []).append(key)
    gathered = {}
    for base, keys in kinds.items():
        package = CALLBACKS if keys == ["callbacks"] else "lightning_idkd"
        ours = {name: c for name, c in sorted(choices(base).items()) if c.__module__.startswith(f"{package}.")}
        if ours:
            gathered[base] = keys, ours
    return gathered


def build_page() -> str:
    """The page, with the classes of this project."""
    classes, lines = gather_classes(), [HEAD]
    for key, cls in dict(class_keys(ours=True)).items():
        if is_group(cls):
            lines += [f"## {key}", "", (inspect.getdoc(cls) or "").splitlines()[0], ""]
            lines += [*describe_arguments(cls, f"- `{key}."), ""]
    lines += ["## Classes", ""]
    for keys, ours in classes.values():
        lines += [f"### {', '.join(keys)}", ""]
        for name, cls in ours.items():
            lines += describe_class(name, cls)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(build_page(), end="")
