"""Every config key as Markdown, from the docstrings: ``python -m lightning_idkd.command.keys > configs/README.md``."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module

from lightning_idkd.checkout import CALLBACKS
from lightning_idkd.config.kinds import choices, class_keys, parameters
from lightning_idkd.config.parse import PLUGINS

HEAD = """# Configs

One file an experiment, headed by its command, time and result; `presets/` are laid over one of them, as in
`make train CFG="ring_cifar10 presets/official_code"`; `sweeps/` are W&B sweeps (`make sweep`, or `idkd sweep` without a
server). Each is found from any folder by its name, as in `--config presets/fedmd`. Any key may also be given on the command
line, as in `--train.lr 0.05`; of several `--config` files later ones win.

A class is named by `class_path` (a built-in one by its short name, yours by its import path) with its arguments in
`init_args`; on the command line `--gossip DSGD --gossip.momentum 0.9`. A class that is named starts from its own defaults, which
this page gives; arguments of an earlier file survive only where the same class is named again, or none is. A key given
twice in a file is an error; of options given twice on the command line the last counts.

*This page is made from the docstrings: `python -m lightning_idkd.command.keys > configs/README.md`.*

`seed`: seed of all randomness; default 0.
"""


def read_docstrings(cls: type) -> dict[str, str]:
    """The description of every argument of a class, from its docstring and those of its bases."""
    from docstring_parser import parse_from_object

    described: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        for part in parse_from_object(base).meta:
            if len(part.args) > 1:
                described[part.args[1]] = " ".join((part.description or "").split())
    return described


def show_default(value: object) -> str:
    """The default of an argument as YAML has it."""
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
    described, lines, made = read_docstrings(cls), [], {}
    if is_dataclass(cls):
        made = {f.name: f.default_factory() for f in fields(cls) if f.default_factory is not MISSING}
    for name, parameter in parameters(cls).items():
        default = show_default(made.get(name, parameter.default))
        lines.append(f"{prefix}{name.rstrip('_')}` ({default}): {described.get(name, '')}")
    return lines


def describe_class(name: str, cls: type) -> list[str]:
    """The first paragraph of a class's docstring, and its arguments."""
    paragraph = inspect.getdoc(cls).split("\n\n")[0]
    return [f"- **{name}**: {' '.join(paragraph.split())}", *describe_arguments(cls, "  - `")]


def text() -> str:
    """The whole page: of classes those of this project, of further callbacks those of its callbacks package."""
    for plugin in PLUGINS:
        import_module(plugin)
    lines, kinds = [HEAD], {}
    for key, cls in dict(class_keys(ours=True)).items():
        if is_dataclass(cls):
            lines += [f"## {key}", "", (inspect.getdoc(cls) or "").splitlines()[0], ""]
            lines += [*describe_arguments(cls, f"- `{key}."), ""]
        else:
            kinds.setdefault(cls, []).append(key)
    lines += ["## Classes", ""]
    for base, keys in kinds.items():
        package = CALLBACKS if keys == ["callbacks"] else "lightning_idkd"  # the core's callbacks are always there
        ours = {name: c for name, c in choices(base).items() if c.__module__.startswith(f"{package}.")}
        if ours:
            lines += [f"### {', '.join(keys)}", ""]
            for name in sorted(ours):
                lines += describe_class(name, ours[name])
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(text(), end="")
