"""``idkd``: parse, refuse mistakes in a sentence, run. Nothing heavy is imported before the arguments are right."""

from __future__ import annotations

import os
import sys
from dataclasses import MISSING, fields
from importlib import import_module
from typing import TYPE_CHECKING, get_type_hints

from lightning_idkd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

if "OMP_WAIT_POLICY" not in os.environ:
    # read when torch is imported: threads that are done with their share would keep a core busy for milliseconds
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

PLUGINS = ("callbacks", "lightning_idkd.data", "lightning_idkd.models")
"""Packages whose classes may be named without their path; importing them is all that takes."""
EVALUATE = ("-h", "--help", "--export", "--per-class", "--json")
"""Options of ``idkd evaluate`` itself; it takes keys of a config too."""
SCORE = "callbacks.MSP"
"""The score of a calibration that names none."""

COMMANDS = {
    "fit": "train the nodes of an experiment",
    "bench": "time a step of an experiment, or of several, beside what else it could cost, on random images",
    "topology": "print a graph's numbers and draw it",
    "partition": "show how a partition divides the private set",
    "sweep": "run all cells of a W&B sweep file here, without a server",
    "compare": "tabulate finished runs: mean and spread over seeds, difference to a baseline",
    "evaluate": "look at the nodes of a run on any test set, and export their mean",
    "report": "write a run's report.md: its table, pictures and config",
    "init": "write a commented config and a callback of your own, to start from",
}


def parser(command: str = "fit"):
    """The parser of ``idkd COMMAND``: one key for every field of :class:`~lightning_idkd.config.Config`."""
    import yaml
    from docstring_parser import parse_from_object
    from jsonargparse import set_dumper, set_loader, set_parsing_settings

    from lightning_idkd import class_defaults, config, config_file
    from lightning_idkd.explain import Parser
    from lightning_idkd.given import NAMES

    class_defaults.apply()
    set_loader("yaml", lambda text: config_file.gathered(config_file.read_value(text), NAMES), (yaml.YAMLError,))
    set_dumper("yaml", config_file.write)
    for plugin in PLUGINS:
        if not hasattr(found := import_module(plugin), "__all__"):
            raise UserError(
                f"'{found.__file__ or plugin}' hides this project's package '{plugin}'; rename it, or start elsewhere"
            )
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    p = Parser(prog=f"idkd {command}", description=f"{COMMANDS[command].capitalize()}.", allow_abbrev=False)
    p.outermost = True
    p.add_argument("--config", action="config", help="YAML file of an experiment; repeatable, later ones win.")
    p.add_argument("--seed", type=int, default=0, help="Seed of all randomness.")
    p.add_class_arguments(config.GraphConfig, "graph")
    p.add_class_arguments(config.DataConfig, "data")
    p.add_class_arguments(config.NodeConfig, "node")
    p.add_class_arguments(config.TrainConfig, "train")
    p.add_argument("--gossip", type=config.Gossip, help="Decentralised optimiser: QGDSGDm, DSGD, AllReduce, Isolated, ...")
    p.add_argument("--calibration", type=config.Calibration | None, help="How nodes fix the threshold of their OoD score.")
    p.add_argument("--distillation", type=config.Distillation | None, help="IDKD, VanillaKD, or null for none.")
    p.add_argument("--callbacks", type=list[config.Callback], default=[], help="Further callbacks.")
    p.add_argument("--logger", type=config.LoggerConfig | None, default=config.LoggerConfig(), help="Experiment logger, or null.")
    said = {d.args[1]: d.description for d in parse_from_object(config.RunConfig).meta if len(d.args) > 1}
    types = get_type_hints(config.RunConfig)
    for f in fields(config.RunConfig):  # key by key, since "from" cannot be a field's name
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


def configure(arguments: list[str], command: str = "fit"):
    """The :class:`~lightning_idkd.config.Config` that the arguments of a command describe."""
    from jsonargparse import Namespace

    from lightning_idkd import config, config_file
    from lightning_idkd.given import failing_modules, in_the_making, look_over, nulls, placed
    from lightning_idkd.run_folder import at

    p = parser(command)
    arguments = look_over(arguments)
    try:
        cfg = p.parse_args(arguments)
    except (Exception, SystemExit):
        failing_modules(arguments)
        raise
    if cfg.calibration and "score" in cfg.calibration.get("init_args", {}) and cfg.calibration.init_args.score is None:
        cfg.calibration.init_args.score = Namespace(class_path=SCORE)
    resolved = config_file.read(p.dump(cfg, skip_validation=True, skip_none=False))
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
    run = {f.name: made.run[f.name.rstrip("_")] for f in fields(config.RunConfig)}
    return config.Config(
        **{
            k: made[k]
            for k in ("data", "gossip", "graph", "node", "train", "calibration", "distillation", "callbacks", "logger", "seed")
        },
        run=config.RunConfig(**run),
        resolved=resolved,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: idkd COMMAND [--config FILE] [--key value ...]\n\ncommands:")
        print("\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items()))
        print("\n`idkd fit --help` explains every key; topology, partition and bench take the same ones.")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"error: no command '{command}'.{did_you_mean(command, COMMANDS)} Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that a class of the user's own can be named by its import path
    try:
        return globals()[command](rest)
    except UserError as e:
        if (processes := sys.modules.get("lightning_idkd.launch")) is None or processes.first_to_tell(str(e)):
            print(f"error: {e}", file=sys.stderr)
        return 2
    except RuntimeError:
        if (processes := sys.modules.get("lightning_idkd.launch")) is None or not processes.lost_to_a_mistake():
            raise
        return 2
    except SystemExit as e:  # jsonargparse ends --help and --print_config this way
        return e.code if isinstance(e.code, int) else 0
    except KeyboardInterrupt:
        return 130


def fit(arguments: list[str]) -> int:
    from lightning_idkd.control import finished, train_control
    from lightning_idkd.fit import fit
    from lightning_idkd.given import own_classes

    config = configure(arguments)
    if config.run.control and not config.trains_control:
        print("no control: this run has no distillation itself", flush=True)
    folder = finished(config) if config.trains_control and config.run.resume == "auto" else None
    try:
        with own_classes(config.resolved):
            summary = fit(config) if folder is None else None
        if summary is not None and config.trains_control:
            folder = finished(config)
    except KeyboardInterrupt:
        if "WANDB_SWEEP_ID" not in os.environ:
            raise
        # stopped by an agent of W&B, which takes a status above 0 for a failure and ends itself after a few
    return 0 if folder is None else train_control(folder, config)


def bench(arguments: list[str]) -> int:
    """Time the step of an experiment, or of several where none is given."""
    import json
    from pathlib import Path

    from lightning_idkd.run_folder import write

    config = configure(["--data.private", "Digits", *arguments], "bench")
    from lightning_idkd import bench
    from lightning_idkd.preview import image_shape

    given = {k: config.resolved[k] for k in ("rounds", "samples", "quick", "out")}
    if any(word.split("=")[0] == "--config" for word in arguments):
        found = bench.bench(config, *image_shape(config), given["rounds"], given["samples"])
        found = {"machine": bench.machine(), "cases": {f"{type(config.node.network).__name__}, n = {config.graph.nodes}": found}}
    elif stray := [word for word in arguments if word.startswith("--") and word[2:].split("=")[0] not in ("quick", "out")]:
        raise UserError(f"{stray[0]}: bench takes it beside a --config; without one there are --quick and --out")
    else:
        found = bench.suite(given["quick"])
    if given["out"]:
        Path(given["out"]).parent.mkdir(parents=True, exist_ok=True)
        write(Path(given["out"]), lambda part: part.write_text(json.dumps(found, indent=1) + "\n"))
    print(bench.tables(found), end="")
    return 0


def topology(arguments: list[str]) -> int:
    """Print a graph's numbers and draw it."""
    config = configure(["--data.private", "Digits", *arguments], "topology")  # no data are needed or read
    graph = config.graph.build(config.seed)
    from lightning_idkd import preview, report

    print("\n".join(report.part(*found) for found in preview.topology(config, graph).items()))
    draw(config.resolved["out"], f"{graph.name.lower()}_{graph.nodes}.png", graph.draw)
    return 0


def partition(arguments: list[str]) -> int:
    """Print the label histogram of every node and draw it."""
    config = configure(arguments, "partition")
    from lightning_idkd import pictures, preview, report
    from lightning_idkd.data.identity import notes
    from lightning_idkd.data.partition import partition
    from lightning_idkd.fit import private_images

    private = private_images(config)
    print("".join(report.part("note", note) + "\n" for note in notes(("data.private", private))), end="")
    labels, k = private.labels.numpy(), len(private.classes)
    split = partition(config.data.partition, labels, config.graph.nodes, config.seed, config.data.validation, k)
    preview.table(split, private.classes)
    print("\n".join(report.part(*found) for found in preview.partition(split).items()))
    figure = pictures.label_counts(split.histogram, private.classes)
    draw(config.resolved["out"], f"{split.rule.lower()}_{config.graph.nodes}.png", lambda file: figure.savefig(file, dpi=120))
    return 0


def draw(out: str | None, picture: str, save: Callable[[str], None]) -> None:
    """Draw into the file ``out``, or over no file as ``picture``."""
    if out is None and os.path.exists(picture):
        print(f"not drawn: there is a {picture} already; --out FILE draws in any case")
        return
    try:
        save(out or picture)
    except (OSError, ValueError) as e:
        raise UserError(f"--out: cannot write '{out or picture}' ({getattr(e, 'strerror', None) or e})") from e
    print(f"drawn: {out or picture}")


def options(command: str):
    """An empty parser for a command that is no experiment."""
    from lightning_idkd.explain import Parser

    p = Parser(prog=f"idkd {command}", description=f"{COMMANDS[command].capitalize()}.", allow_abbrev=False)
    p.outermost = True
    return p


def sweep(arguments: list[str]) -> int:
    from pathlib import Path

    from lightning_idkd.given import shipped
    from lightning_idkd.sweep import run

    p = options("sweep")
    p.add_argument("file", help="Sweep file, such as configs/sweeps/ood_scores.yaml.")
    p.add_argument("--jobs", type=int, default=1, help="Cells at the same time.")
    p.add_argument("--dir", type=str, default="runs", help="Folder of all runs; a sweep's lie below its name, else its file's.")
    given = p.parse_args(arguments)
    return 0 if run(Path(shipped(given.file)), given.jobs, given.dir) else 1


def compare(arguments: list[str]) -> int:
    from typing import Literal

    from lightning_idkd.compare import METRICS, show

    p = options("compare")
    p.add_argument("runs", nargs="+", help="Run folders, or folders with runs below them.")
    p.add_argument("--metrics", nargs="+", default=list(METRICS), help="Keys of summary.json, with slashes.")
    p.add_argument("--baseline", type=str | None, default=None, help="Method to take differences to, as the table names it.")
    p.add_argument("--format", type=Literal["table", "markdown", "csv", "latex"], default="table",
                   help="How to print it: table (aligned text), markdown, csv or latex.")  # fmt: skip
    p.add_argument("--plot", type=str | None, default=None, help="Also draw it into this image file.")
    given = p.parse_args(arguments)
    show(given.runs, given.metrics, given.baseline, given.format, given.plot)
    return 0


def evaluate(arguments: list[str]) -> int:
    import json
    from pathlib import Path

    from lightning_idkd.given import NAMES

    p = options("evaluate")
    p.description += " Keys data.* and calibration.* are as for idkd fit: other sets than the run's, another score."
    p.add_argument("run", help="Run folder, such as runs/NAME/latest.")
    p.add_argument("--export", type=str | None, default=None, metavar="FOLDER", help="Write the nodes' mean there too.")
    p.add_argument("--per-class", action="store_true", help="Accuracy and confusion matrix of every class too.")
    p.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    p.usage = "idkd evaluate RUN [--export FOLDER] [--per-class] [--json] [--data.KEY VALUE ...] [--calibration.score CLASS]"
    own: list[str] = []
    changes: list[str] = []
    to = own
    for word in arguments:
        if word.startswith("-"):  # an option, whose value follows
            option, key = word.split("=")[0], word.lstrip("-").partition("=")[0]
            to = own if option in EVALUATE else changes
            if to is changes and key.split(".")[0] not in NAMES:
                raise UserError(
                    f"{option}: there is no such option.{did_you_mean(option.replace('_', '-'), EVALUATE)} "
                    f"Allowed: {', '.join(EVALUATE[2:])}, and keys of data and calibration, such as --data.private"
                )
        to.append(word)
    given = p.parse_args(own)
    from lightning_idkd.loaded import evaluate, load, show
    from lightning_idkd.run_folder import write

    run = load(given.run)
    files = run.export(given.export) if given.export else []
    found = evaluate(run, changes, given.per_class)
    if given.export and given.per_class:
        files.append(Path(given.export) / "per_class.json")
        write(files[-1], lambda part: part.write_text(json.dumps(found["per_class"]) + "\n"))
    print("".join(f"{file}\n" for file in files), end="", file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0


def report(arguments: list[str]) -> int:
    from lightning_idkd.report import write_report

    p = options("report")
    p.add_argument("runs", nargs="+", help="Run folders, such as runs/NAME/latest.")
    for run in p.parse_args(arguments).runs:
        print(write_report(run))
    return 0


def init(arguments: list[str]) -> int:
    from lightning_idkd.skeleton import write_skeleton

    p = options("init")
    p.add_argument("name", help="Name of the experiment, and of the new folder.")
    print(write_skeleton(p.parse_args(arguments).name))
    return 0
