"""From a config to a finished run: build the parts, find what to continue, train, leave the promised files."""

from __future__ import annotations

import netrc
import os
import signal
import subprocess
import warnings
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

from lightning_idkd import report
from lightning_idkd.config import Config, LoggerConfig
from lightning_idkd.errors import UserError, did_you_mean
from lightning_idkd.run_folder import SAME, RunFolder, difference


def fit(config: Config) -> dict | None:
    """Run an experiment; returns its summary, None when it was interrupted or on processes other than the first."""
    config.check()
    graph = config.graph.build(config.seed)
    config.gossip.check(graph)
    folder, checkpoint = find(config)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # import-time notices of the stack below, none of which a user can act on
        import torch

        from lightning_idkd.launch import launch
    from lightning_idkd.data.store import Store
    from lightning_idkd.network import Network
    from lightning_idkd.orchestrator import Orchestrator
    from lightning_idkd.stack import NodeStack

    saved = RunFolder.load(checkpoint) if checkpoint else None
    private, test, public, split = load(config)
    fabric = launch(config.run)
    network = Network(graph, fabric.global_rank, fabric.world_size)
    dtype = torch.float64 if config.run.precision == 64 else torch.float32
    store = Store(
        private,
        test,
        public,
        split,
        network.rows,
        batch=config.train.batch_size,
        augment=config.data.augment,
        augment_public=config.data.augment_public,
        seed=config.seed,
        device=fabric.device,
        dtype=dtype,
    )

    Module = module_class(config.node.module)
    stack = NodeStack(
        lambda: Module(config.node.network.build(private.channels, private.size, store.k)),
        network.rows,
        config.seed,
        fabric.device,
        dtype,
    )
    stack.engine, threads = execution(config, saved, stack, store, fabric)
    torch.set_num_threads(threads)
    config.resolved["run"] |= {"engine": stack.engine, "threads": threads}

    new = folder is None
    if new:
        made = RunFolder.create(config.folder(), config.seed).path if fabric.is_global_zero else None
        folder = RunFolder(Path(fabric.broadcast(made)))
    header = {"from": config.run.from_, "git_commit": git_commit(), "partition_hash": split.hash, "parameters": stack.parameters}
    run = Orchestrator(
        fabric,
        folder,
        stack,
        network,
        store,
        config.gossip,
        config.train,
        config.calibration,
        config.distillation,
        config.callbacks,
        config.run.checkpoint_every,
        config.run.keep,
        config.seed,
        header,
    )
    before = network.report(store.mass())
    if saved:
        source = RunFolder(checkpoint.parent.parent)
        run.load(saved, source.metrics(), fork=bool(config.run.from_))
        check_epoch(config, run.epoch)
    if fabric.is_global_zero:
        if new:
            folder.yaml("config.yaml", config.resolved)
            folder.json("partition.json", split.to_dict())
        folder.point()
        fabric._loggers = loggers(config.logger, folder, config)
        parts = {
            "run": f"{folder.path}"
            + (f", continued at epoch {run.epoch}" if config.run.resume and saved else "")
            + (f", forked from {config.run.from_} at epoch {run.epoch}" if config.run.from_ else ""),
            "graph": f"{graph.name}, {graph.nodes} nodes, spectral gap {graph.spectral_gap():.4f}",
            "data": f"{store.samples:,} training samples, {len(test):,} test, {store.public:,} public, "
            f"{store.channels}x{store.size}x{store.size}, {store.k} classes, partition {split.hash}",
            "node": f"{type(config.node.network).__name__}, {stack.parameters:,} parameters; {type(config.gossip).__name__}; "
            f"{store.steps()} steps an epoch",
            "engine": f"{stack.engine} on {fabric.device}, {fabric.world_size} x {torch.get_num_threads()} threads",
        }
        print(report.started(parts), flush=True)

    def interrupt(*_) -> None:
        if run.interrupted:
            raise KeyboardInterrupt
        run.interrupted = True
        run.say("stopping after this step, with a checkpoint (again to stop at once)")

    handlers = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        summary = run.fit()
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    after = network.report(store.mass())
    if summary is None:
        run.say(f"interrupted at epoch {run.epoch}, step {run.step}; continue with the same command and --run.resume auto")
        return None
    if not fabric.is_global_zero:
        return None
    report.pictures(folder.file("plots"), run.lines, graph, run.per_node_accuracy, before.numpy(), after.numpy(), store.classes)
    for logger in fabric.loggers:
        logger.experiment.summary.update(summary)
        logger.finalize("success")
    folder.json("summary.json", summary)
    report.table(summary, folder.path)
    return summary


def find(config: Config) -> tuple[RunFolder | None, Path | None]:
    """The folder to continue (None: a new one) and the checkpoint to load (None: from scratch)."""
    run = config.run
    if run.from_:
        folder, checkpoint = RunFolder.named(run.from_, "run.from")
        found = difference(config.resolved, folder.config(), SAME)
        if found:
            key, here, there = found
            raise UserError(f"run.from: {key} is {here} here but {there} in '{run.from_}'; a fork shares {', '.join(SAME)}")
        return None, checkpoint
    if run.resume == "auto":
        folder = RunFolder.unfinished(config.folder(), config.resolved)
        return folder, folder and folder.last
    if run.resume:
        folder, checkpoint = RunFolder.named(run.resume, "run.resume")
        found = difference(config.resolved, folder.config())
        if found:
            key, here, there = found
            raise UserError(
                f"run.resume: {key} is {here} here but {there} in '{run.resume}'; a run continues with its own config"
            )
        if folder.file("summary.json").exists():
            raise UserError(f"run.resume: '{run.resume}' is finished; use run.from to start from its checkpoints")
        return folder, checkpoint
    return None, None


def execution(config: Config, saved: dict | None, stack, store, fabric) -> tuple[str, int]:
    """Engine and threads: as asked, as in the checkpoint, or the fastest of a short trial that all processes follow.

    A resumed run keeps its own whatever is asked; a fork keeps its source's unless something else is asked.
    """
    run, cores = config.run, max(1, (os.cpu_count() or 1) // config.run.devices)
    if saved and (not run.from_ or (run.engine == "auto" and run.threads is None)):
        return saved["engine"], saved["threads"]
    engines = ["loop", "vmap"] if run.engine == "auto" else [run.engine]
    threads = [run.threads] if run.threads else sorted({1, cores})
    if len(engines) * len(threads) == 1:
        return engines[0], threads[0]
    return fabric.broadcast(stack.choose(*store.batch(store.order(0, 1), 0), engines, threads))


def check_epoch(config: Config, epoch: int) -> None:
    """A fork cannot begin after what it is to do."""
    from lightning_idkd.schedule import epoch_of

    if epoch >= config.train.epochs and config.run.from_:
        raise UserError(
            f"train.epochs: {config.train.epochs}, but '{config.run.from_}' has trained {epoch} epochs already; give more"
        )
    if config.run.from_ and config.distillation is not None:
        start = epoch_of(config.distillation.start, config.train.epochs, "distillation.start")
        if start < epoch:
            raise UserError(f"distillation.start: epoch {start} is over in '{config.run.from_}', which begins at epoch {epoch}")


def load(config: Config) -> tuple:
    """Private, test and public images (in the private set's shape) and the split."""
    from lightning_idkd.data.partition import partition

    data = config.data
    private = data.private.load("train", data.image_size, key="data.private")
    if not private.classes:
        raise UserError("data.private: this set has no labels; nodes need them (a public set does without)")
    test = data.private.load("test", private.size, private.channels, key="data.private")
    public = None
    if data.public is not None and config.distillation is not None:
        public = data.public.load("train", private.size, private.channels, key="data.public")
    split = partition(data.partition, private.labels.numpy(), config.graph.nodes, config.seed, data.validation)
    return private, test, public, split


def module_class(path: str) -> type:
    """The NodeModule class at an import path."""
    from lightning_idkd.node import NodeModule

    name, _, attribute = path.rpartition(".")
    try:
        module = import_module(name)
    except (ImportError, ValueError) as e:
        raise UserError(f"node.module: cannot import '{name}' ({e})") from e
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, NodeModule)):
        allowed = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, NodeModule)]
        raise UserError(f"node.module: '{path}' is no NodeModule class.{did_you_mean(attribute, allowed)}")
    return found


def loggers(config: LoggerConfig | None, folder: RunFolder, run: Config) -> list:
    """W&B, offline where there is no login."""
    if config is None:
        return []
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    offline = not logged_in() if config.offline is None else config.offline
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = WandbLogger(
            name=f"{run.run.name}/{folder.path.name}",
            project=config.project,
            save_dir=str(folder.path),
            offline=offline,
            group=config.group,
            settings=wandb.Settings(silent=True),
        )
        logger.experiment.define_metric("epoch")
        logger.experiment.define_metric("*", step_metric="epoch")
        logger.log_hyperparams(run.resolved)
    return [logger]


def logged_in() -> bool:
    """Whether W&B would find a key, without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def git_commit() -> str | None:
    """The commit of the working folder, with + where it has changes."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()
