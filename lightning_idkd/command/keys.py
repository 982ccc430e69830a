"""Every config key as Markdown, from the docstrings: ``python -m lightning_idkd.command.keys > configs/README.md``."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module

from lightning_idkd import callback, config
from lightning_idkd.checkout import CALLBACKS
from lightning_idkd.config.explain import BASES, classes, parameters
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
GROUPS = {
    "graph": config.GraphConfig,
    "data": config.DataConfig,
    "node": config.NodeConfig,
    "train": config.TrainConfig,
    "distillation.tuning": callback.FineTuning,
    "logger": config.LoggerConfig,
    "run": config.RunConfig,
}


def documented(cls: type) -> dict[str, str]:
    """Parameter and its description, of a class and its bases."""
    from docstring_parser import parse_from_object

    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        found |= {d.args[1]: " ".join((d.description or "").split()) for d in parse_from_object(base).meta if len(d.args) > 1}
    return found


def shown(value: object) -> str:
    """A default as YAML has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if is_dataclass(value) or not isinstance(value, (int, float, str, list, tuple, dict)):
        return type(value).__name__
    return str(list(value) if isinstance(value, tuple) else value)


def arguments(cls: type) -> list[str]:
    """A line for every argument of a class."""
    said, lines = documented(cls), []
    made = {f.name: f.default_factory() for f in fields(cls) if f.default_factory is not MISSING} if is_dataclass(cls) else {}
    for name, parameter in parameters(cls).items():
        value = made.get(name, parameter.default)
        default = "required" if value is inspect.Parameter.empty else f"default {shown(value)}"
        lines.append(f"  - `{name}` ({default}): {said.get(name, '')}")
    return lines


def text() -> str:
    """The whole page."""
    for plugin in PLUGINS:
        import_module(plugin)
    lines = [HEAD]
    for group, cls in GROUPS.items():
        lines += [f"## {group}", "", (inspect.getdoc(cls) or "").splitlines()[0], ""]
        said = documented(cls)
        for f in fields(cls):
            made = f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else MISSING
            default = "required" if made is MISSING else f"default {shown(made)}"
            lines.append(f"- `{group}.{f.name.rstrip('_')}` ({default}): {said.get(f.name, '')}")
        lines.append("")
    lines += ["## Classes", ""]
    for key, base in BASES.items():
        same = [k for k, b in BASES.items() if b is base]
        ours = CALLBACKS if key == "callbacks" else "lightning_idkd"  # the core's callbacks are always there
        there = {name: c for name, c in classes(key).items() if c.__module__.startswith(f"{ours}.")}
        if key != same[0] or not there:
            continue
        lines += [f"### {', '.join(same)}", ""]
        for name, cls in sorted(there.items()):
            paragraph = inspect.getdoc(cls).split("\n\n")[0]
            lines += [f"- **{name}**: {' '.join(paragraph.split())}", *arguments(cls)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(text(), end="")
