"""From the arguments of a command to a :class:`~lightning_idkd.config.Config`, with mistakes as sentences."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_idkd.checkout import CALLBACKS
from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from lightning_idkd.config.groups import Config, Entry

PLUGINS = (CALLBACKS, "lightning_idkd.data", "lightning_idkd.models")
"""Packages whose classes may be named without their path; importing them is all that takes."""
SCORE = f"{CALLBACKS}.MSP"
"""The score of a calibration that names none."""


def parser(command: str = "fit", description: str = "") -> ArgumentParser:
    """The parser of ``idkd COMMAND``: one key for every field of :class:`~lightning_idkd.config.Config`."""
    import yaml
    from jsonargparse import set_dumper, set_loader, set_parsing_settings

    from lightning_idkd.config import class_defaults, class_paths, groups, yaml_file
    from lightning_idkd.config.arguments import TOP_KEYS
    from lightning_idkd.config.mistakes import Parser
    from lightning_idkd.config.resolved import GROUPS

    def load(text: str) -> Any:
        value = yaml_file.nest_dotted_keys(yaml_file.read_value(text), TOP_KEYS)
        if isinstance(value, str):  # it may be a name of anything
            return value
        return class_paths.drop_removed(class_paths.full_paths(value))

    class_defaults.apply()
    set_loader("yaml", load, (yaml.YAMLError,))
    set_dumper("yaml", yaml_file.write)
    for plugin in PLUGINS:
        import_module(plugin)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    p = Parser(prog=f"idkd {command}", description=description, allow_abbrev=False, parser_mode="yaml")
    p.outermost = True
    p.add_argument("--config", action="config", help="YAML file of an experiment; repeatable, later ones win.")
    described = read_docstrings(groups.Config)
    for name, entry in GROUPS.items():
        group = groups.Config.__dataclass_fields__[name]
        if not is_dataclass(group.type):
            p.add_argument(f"--{name}", type=group.type, help=described[name], **get_start(group, entry))
        elif any(f.name.endswith("_") for f in fields(group.type)):
            add_keys(p, name, group.type)
        else:
            p.add_class_arguments(group.type, name)
    if command == "bench":
        p.add_argument("--rounds", type=int, default=5, help="Turns that every form of a step gets.")
        p.add_argument("--samples", type=int | None, default=None, help="Training samples; null: a few.")
        p.add_argument("--quick", type=bool, default=False, help="Without a config: the smallest cases, once.")
        p.add_argument("--out", type=str | None, default=None, help="JSON file for the numbers.")
    if command in ("topology", "partition"):
        help = f"Picture file; null: a new {command.upper()}_NODES.png."
        p.add_argument("--out", type=str | None, default=None, help=help)
    return p


def read_docstrings(cls: type) -> dict[str, str | None]:
    """The docstring of every field of a dataclass."""
    from docstring_parser import parse_from_object

    return {part.args[1]: part.description for part in parse_from_object(cls).meta if len(part.args) > 1}


def get_start(group: Field, entry: Entry) -> dict[str, Any]:
    """The default of a key on the command line, as an argument of ``add_argument``; none for a key that must be
    given."""
    if isinstance(entry.start, str):
        return {"default": {"class_path": f"{CALLBACKS}.{entry.start}"}}
    default = entry.start if entry.start is not MISSING else get_default(group)
    return {} if default is MISSING else {"default": default() if callable(default) else default}


def get_default(f: Field) -> Any:
    """The default of a dataclass field, MISSING where it has none."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def add_keys(p: ArgumentParser, group: str, cls: type) -> None:
    """Add a group of keys one by one: jsonargparse would call the field ``from_`` by its name, but its key is
    ``from``."""
    described = read_docstrings(cls)
    for f in fields(cls):
        option = f"--{group}.{f.name.rstrip('_')}"
        p.add_argument(option, type=f.type, default=get_default(f), help=described.get(f.name))


def configure(arguments: list[str], command: str = "fit", description: str = "") -> Config:
    """The :class:`~lightning_idkd.config.Config` that the arguments of a command describe."""
    from jsonargparse import Namespace

    from lightning_idkd.config import groups, yaml_file
    from lightning_idkd.config.arguments import prepare
    from lightning_idkd.config.mistakes import refuse_nulls
    from lightning_idkd.config.resolved import GROUPS
    from lightning_idkd.config.user_classes import explain_constructor, refuse_failing_modules

    p = parser(command, description)
    arguments = prepare(arguments)
    try:
        cfg = p.parse_args(arguments)
    except (Exception, SystemExit):
        refuse_failing_modules(arguments)
        raise
    if cfg.calibration and "score" in cfg.calibration.get("init_args", {}) and cfg.calibration.init_args.score is None:
        cfg.calibration.init_args.score = Namespace(class_path=SCORE)
    resolved = yaml_file.read(p.dump(cfg, skip_validation=True, skip_unset=False))
    refuse_nulls(resolved)
    try:
        made = p.instantiate(cfg)
    except Exception as e:  # a class refused its arguments; jsonargparse wraps that where the key may also be null
        cause: BaseException | None = e
        while not isinstance(cause, UserError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(explain_constructor(cause, resolved)) from e
    run = {f.name: made.run[f.name.rstrip("_")] for f in fields(groups.RunConfig)}
    others = {name: made[name] for name in GROUPS if name != "run"}
    return groups.Config(**others, run=groups.RunConfig(**run), resolved=resolved)
