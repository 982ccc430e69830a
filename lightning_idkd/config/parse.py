"""From the arguments of a command to a :class:`~lightning_idkd.config.Config`, with mistakes as sentences."""

from __future__ import annotations

from dataclasses import MISSING, fields
from importlib import import_module
from typing import get_type_hints

from lightning_idkd.errors import UserError

PLUGINS = ("callbacks", "lightning_idkd.data", "lightning_idkd.models")
"""Packages whose classes may be named without their path; importing them is all that takes."""
SCORE = "callbacks.MSP"
"""The score of a calibration that names none."""


def parser(command: str = "fit", description: str = ""):
    """The parser of ``idkd COMMAND``: one key for every field of :class:`~lightning_idkd.config.Config`."""
    import yaml
    from docstring_parser import parse_from_object
    from jsonargparse import set_dumper, set_loader, set_parsing_settings

    from lightning_idkd.config import class_defaults, groups, yaml_file
    from lightning_idkd.config.explain import Parser
    from lightning_idkd.config.given import NAMES

    class_defaults.apply()
    set_loader("yaml", lambda text: yaml_file.gathered(yaml_file.read_value(text), NAMES), (yaml.YAMLError,))
    set_dumper("yaml", yaml_file.write)
    for plugin in PLUGINS:
        if not hasattr(found := import_module(plugin), "__all__"):
            raise UserError(
                f"'{found.__file__ or plugin}' hides this project's package '{plugin}'; rename it, or start elsewhere"
            )
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    p = Parser(prog=f"idkd {command}", description=description, allow_abbrev=False)
    p.outermost = True
    p.add_argument("--config", action="config", help="YAML file of an experiment; repeatable, later ones win.")
    p.add_argument("--seed", type=int, default=0, help="Seed of all randomness.")
    p.add_class_arguments(groups.GraphConfig, "graph")
    p.add_class_arguments(groups.DataConfig, "data")
    p.add_class_arguments(groups.NodeConfig, "node")
    p.add_class_arguments(groups.TrainConfig, "train")
    p.add_argument("--gossip", type=groups.Gossip, help="Decentralised optimiser: QGDSGDm, DSGD, AllReduce, Isolated, ...")
    p.add_argument("--calibration", type=groups.Calibration | None, help="How nodes fix the threshold of their OoD score.")
    p.add_argument("--distillation", type=groups.Distillation | None, help="IDKD, VanillaKD, or null for none.")
    p.add_argument("--callbacks", type=list[groups.Callback], default=[], help="Further callbacks.")
    p.add_argument("--logger", type=groups.LoggerConfig | None, default=groups.LoggerConfig(), help="Experiment logger, or null.")
    said = {d.args[1]: d.description for d in parse_from_object(groups.RunConfig).meta if len(d.args) > 1}
    types = get_type_hints(groups.RunConfig)
    for f in fields(groups.RunConfig):  # key by key, since "from" cannot be a field's name
        default = f.default if f.default is not MISSING else f.default_factory()
        p.add_argument(f"--run.{f.name.rstrip('_')}", type=types[f.name], default=default, help=said.get(f.name))
    p.set_defaults(
        {
            "gossip": {"class_path": "callbacks.QGDSGDm"},
            "calibration": {"class_path": "callbacks.Youden"},
            "distillation": None,
        }
    )
    if command == "bench":
        p.add_argument("--rounds", type=int, default=5, help="Turns that every form of a step gets.")
        p.add_argument("--samples", type=int | None, default=None, help="Training images; null: a few.")
        p.add_argument("--quick", type=bool, default=False, help="Without a config: the smallest cases, once.")
        p.add_argument("--out", type=str | None, default=None, help="JSON file for the numbers.")
    if command in ("topology", "partition"):
        help = f"Picture file; null: a new {command.upper()}_NODES.png."
        p.add_argument("--out", type=str | None, default=None, help=help)
    return p


def configure(arguments: list[str], command: str = "fit", description: str = ""):
    """The :class:`~lightning_idkd.config.Config` that the arguments of a command describe."""
    from jsonargparse import Namespace

    from lightning_idkd.config import groups, yaml_file
    from lightning_idkd.config.given import failing_modules, in_the_making, look_over, nulls, placed
    from lightning_idkd.config.resolved import at

    p = parser(command, description)
    arguments = look_over(arguments)
    try:
        cfg = p.parse_args(arguments)
    except (Exception, SystemExit):
        failing_modules(arguments)
        raise
    if cfg.calibration and "score" in cfg.calibration.get("init_args", {}) and cfg.calibration.init_args.score is None:
        cfg.calibration.init_args.score = Namespace(class_path=SCORE)
    resolved = yaml_file.read(p.dump(cfg, skip_validation=True, skip_none=False))
    for action in p._actions:
        if action.dest in cfg and (of := getattr(action, "_typehint", None) or action.type):
            nulls(at(resolved, action.dest), of, action.dest)
    try:
        made = p.instantiate(cfg)
    except Exception as e:  # a class refused its arguments; jsonargparse wraps that where the key may also be null
        cause: BaseException | None = e
        while not isinstance(cause, UserError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise UserError(placed(cause, resolved)) from e
        if said := in_the_making(cause, resolved):
            raise UserError(said) from e
        raise UserError(str(cause).splitlines()[0] if str(cause) else repr(cause)) from e
    run = {f.name: made.run[f.name.rstrip("_")] for f in fields(groups.RunConfig)}
    return groups.Config(
        **{
            k: made[k]
            for k in ("data", "gossip", "graph", "node", "train", "calibration", "distillation", "callbacks", "logger", "seed")
        },
        run=groups.RunConfig(**run),
        resolved=resolved,
    )
