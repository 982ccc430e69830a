"""From a config to a finished run: build the parts, find what to continue, train, leave the promised files."""

from __future__ import annotations

import signal
import subprocess
import warnings
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightning_idkd.config import Config
from lightning_idkd.config.resolved import ONGOING, SAME, difference
from lightning_idkd.errors import UserError, did_you_mean
from lightning_idkd.machine import count_cores
from lightning_idkd.records import loggers, report
from lightning_idkd.records.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.fabric import Fabric

    from lightning_idkd.data.images import Images
    from lightning_idkd.nodes.node import NodeModule
    from lightning_idkd.training.orchestrator import Orchestrator


def fit(config: Config) -> dict | None:
    """Run an experiment; returns its summary (None on processes other than the first).

    Raises:
        UserError: a mistake in the config, before any work where it can be seen so early.
        KeyboardInterrupt: it was interrupted, and has left a checkpoint.
    """
    config.check()
    config.gossip.check(config.graph.build(config.seed))
    folder, checkpoint = find(config)
    fork = checkpoint is not None and folder is None
    saved = RunFolder.load(checkpoint) if checkpoint else None
    source = RunFolder(checkpoint.parent.parent) if checkpoint else None
    goes_on = not fork or difference(config.resolved, source.config(), ONGOING) is None
    if fork:
        check_epoch(config, saved, goes_on)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # import-time notices of the stack below, none of which a user can act on
        from lightning_idkd.training.calibrate import rehearse
        from lightning_idkd.training.launch import launch
    fabric = launch(config.run)
    before = None
    if source:
        sets = ("train", "test", "public") if goes_on else ("train", "test")
        before = Before(str(source.path), saved["images"].get("data"), sets)
    run = build(config, fabric, before)
    if source and (there := source.partition_hash()) != run.store.split.hash:
        raise UserError(
            f"data.partition: the nodes' samples are others than in '{source.path}' (hash {run.store.split.hash}, not {there}): "
            "a file has changed"
        )
    run.stack.engine, threads = execution(config, saved, fork, run)
    config.resolved["run"] |= {"engine": run.stack.engine, "threads": threads}
    if config.distillation is not None and config.distillation.calibrated:
        rehearse(run)
    if folder is None:
        made = RunFolder.create(config.folder(), config.seed).path if fabric.is_global_zero else None
        run.folder = RunFolder(Path(fabric.broadcast(made)))
    else:
        run.folder = RunFolder(Path(fabric.broadcast(folder.path)))
    with run.folder.locked() if fabric.is_global_zero else nullcontext():
        run.header |= {"from": str(checkpoint) if fork else None, "git_commit": git_commit()}
        if saved:
            from lightning_idkd.training.checkpoint import restore

            restore(run, saved, source.metrics(), distillation=goes_on, fork=fork)
        if fabric.is_global_zero:
            if folder is None:
                run.folder.yaml("config.yaml", config.resolved)
                run.folder.json("partition.json", run.store.split.to_dict())
            run.folder.point()
            run.loggers = loggers.make(config, run.folder)
            begun = f", {f'forked from {checkpoint}' if fork else 'continued'} at epoch {run.epoch}" if saved else ""
            dropped = ", without its distilled labels" if saved and not goes_on and saved["distilled"] is not None else ""
            print(report.started(parts(config, run) | {"run": f"{run.folder.path}{begun}{dropped}"}), flush=True)
        return train(run)


class Before(NamedTuple):
    """The data of the run that is continued."""

    run: str
    """Its folder."""
    data: dict | None
    """See :func:`lightning_idkd.data.identity.record`; None for a run that is older than this."""
    sets: tuple[str, ...]
    """Which of train, test and public must not have changed."""


def build(config: Config, fabric: Fabric, before: Before | None = None) -> Orchestrator:
    """All parts of an experiment in this process: data, nodes, graph, loop."""
    import torch

    from lightning_idkd import randomness
    from lightning_idkd.data.store import Store
    from lightning_idkd.network import Network
    from lightning_idkd.nodes.stack import NodeStack
    from lightning_idkd.records.pictures import Pictures
    from lightning_idkd.training import memory
    from lightning_idkd.training.orchestrator import Orchestrator

    private, test, public, split = load(config, before)
    network = Network(config.graph.build(config.seed), fabric.global_rank, fabric.world_size)
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
        tuning=None if config.distillation is None else config.distillation.tuning,
        seed=config.seed,
        device=fabric.device,
        dtype=dtype,
    )
    make = node_maker(config, private.channels, private.size, store.k)
    with randomness.fork_generators(config.seed, "trial"):
        trial = make().to(fabric.device, dtype)
        kept = memory.activations(trial, store, config.run.autocast)
    needs = memory.predict(config, trial, store, network.graph, kept, network.world)
    sharing = network.world if fabric.device.type == "cpu" else 1
    memory.check(needs, fabric.broadcast(memory.free(fabric.device)), network.graph.nodes, sharing)
    abreast = memory.abreast(kept, len(network.rows), fabric.device)
    stack = NodeStack(make, network.rows, config.seed, fabric.device, dtype, abreast=abreast, autocast=config.run.autocast)
    return Orchestrator(
        fabric,
        stack,
        network,
        store,
        config.gossip,
        config.train,
        config.calibration,
        config.distillation,
        [*config.callbacks, *([Pictures()] if config.run.pictures else [])],
        config.run.checkpoint_every,
        [*config.run.keep, *([config.first_exchange()] if config.trains_control else [])],
        config.run.until,
        config.seed,
        {
            "partition_hash": split.hash,
            "parameters": stack.parameters + stack.frozen_parameters,
            "frozen_parameters": stack.frozen_parameters,
            "predicted_memory_bytes": sum(needs.values()),
        },
    )


def node_maker(config: Config, channels: int, size: int, classes: int) -> Callable[[], NodeModule]:
    """What builds one node for images of this shape."""
    Module = module_class(config.node.module)

    from torch import nn

    def make() -> NodeModule:
        network = config.node.network.build(channels, size, classes)
        if not isinstance(network, nn.Module):
            name = type(config.node.network).__name__
            raise UserError(f"node.network: {name}.build returns {type(network).__name__}; allowed: a torch.nn.Module")
        try:
            return Module(network)
        except TypeError as e:
            raise UserError(f"node.module: {config.node.module} cannot be made from a network alone ({e})") from e

    return make


def parts(config: Config, run: Orchestrator) -> dict[str, str]:
    """What the lines above the first evaluation say."""
    import torch

    from lightning_idkd.data.identity import abridge
    from lightning_idkd.models import cpu_norms
    from lightning_idkd.nodes.engines import BATCHED

    graph, store = run.network.graph, run.store
    engine = f"{run.stack.engine} on {run.fabric.device}, {run.network.world} x {torch.get_num_threads()} threads"
    if run.stack.engine in BATCHED:
        engine += f", {min(run.stack.abreast, run.stack.n)} nodes a call"
    if run.fabric.device.type == "cpu" and cpu_norms.name_backend(run.fabric.device) != "C":
        engine += ", norms by torch (no C compiler)"
    public = {}
    if store.public:
        here = f"{store.size}x{store.size} {'grey' if store.channels == 1 else 'RGB'}"
        public["public"] = f"{store.public:,} images, {here}" + (f" from {store.public_stored}") * (store.public_stored != here)
        if same := store.duplicates():
            public["warning"] = f"{same:,} public images are test images too: what nodes learn of them is not distillation"
    notes, count = list(store.notes), store.test_labels.cpu().bincount(minlength=store.k)
    if absent := [name for name, images in zip(store.classes, count.tolist(), strict=True) if not images]:
        notes.append(f"data.private: no test image of {abridge(absent)}")
    told = [run.rule.shares]
    if run.distillation is not None:
        told += [run.distillation.shares, run.calibration.shares if run.distillation.calibrated else ""]
    still = f", {run.stack.frozen_parameters:,} of them frozen" * (run.stack.frozen_parameters > 0)
    shares = {"shares": ", ".join(filter(None, told))} if any(told) else {}
    return {
        "run": "",
        "graph": f"{graph.name}, {graph.nodes} nodes, spectral gap {graph.spectral_gap():.4f}",
        "data": f"{store.samples:,} training samples, {len(store.test):,} test, "
        f"{store.channels}x{store.size}x{store.size}, {store.k} classes, partition {store.split.hash}",
        **public,
        **({"note": f"\n{'note':<10} ".join(notes)} if notes else {}),
        "node": f"{type(config.node.network).__name__}, {run.header['parameters']:,} parameters{still}; "
        f"{type(config.gossip).__name__}; {run.steps} steps an epoch",
        "engine": engine,
        "memory": f"about {report.size(run.header['predicted_memory_bytes'])}{' a process' * (run.network.world > 1)}",
        **shares,
    }


def train(run: Orchestrator) -> dict | None:
    """The run itself, stoppable, and its summary."""

    def interrupt(*_) -> None:
        if run.interrupted:
            raise KeyboardInterrupt
        run.interrupted = True
        run.say("stopping, with a checkpoint (again to stop at once)")

    handlers = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    summary = None
    try:
        summary = run.fit()
        if summary is None:
            run.say(f"stopped at epoch {run.epoch}, step {run.step}; continue with the same command and --run.resume auto")
            if run.interrupted:
                raise KeyboardInterrupt
            return None
        if not run.fabric.is_global_zero:
            return None
        run.folder.json("summary.json", summary)
        report.table(summary, run.folder.path)
        return summary
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
        loggers.finish(run.loggers, summary)


def find(config: Config) -> tuple[RunFolder | None, Path | None]:
    """The folder to continue (None: a new one) and the checkpoint to load (None: from scratch; with a new folder: a fork)."""
    run = config.run
    id = loggers.given_id(config)  # an agent of W&B gives it, and a stopped cell again under the same one
    if run.resume == "auto" or (id and run.resume is None):
        folder = RunFolder.unfinished(config.folder(), config.resolved, id)
        if folder:
            return folder, folder.last
    if run.from_:
        folder, checkpoint = RunFolder.named(run.from_, "run.from")
        found = difference(config.resolved, folder.config(), SAME)
        if found:
            key, here, there = found
            raise UserError(f"run.from: {key} is {here} here but {there} in '{run.from_}'; a fork shares {', '.join(SAME)}")
        return None, checkpoint
    if run.resume and run.resume != "auto":
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


def execution(config: Config, saved: dict | None, fork: bool, run: Orchestrator) -> tuple[str, int]:
    """Engine and threads: as asked, as in the checkpoint, or the fastest of a short trial that all processes follow, made once
    on a machine for networks and batches of one shape.

    The threads are set. A resumed run keeps its own whatever is asked; a fork keeps its source's unless something else is
    asked. For another number of processes or kind of device both are chosen anew.
    """
    import torch

    from lightning_idkd.models import cpu_norms
    from lightning_idkd.training import timings

    asked, share = config.run, max(1, count_cores() // config.run.devices)
    engines = run.stack.engines() if asked.engine == "auto" else [asked.engine]
    threads = [asked.threads] if asked.threads else sorted({1, share}) if run.fabric.device.type == "cpu" else [1]
    norms = cpu_norms.name_backend(run.fabric.device)
    same = saved and (saved["devices"], saved.get("device", "cpu")) == (asked.devices, run.fabric.device.type)
    if same and (not fork or (asked.engine == "auto" and asked.threads is None)):
        found, run.stack.abreast = (saved["engine"], saved["threads"]), saved.get("abreast") or run.stack.abreast
        if (before := saved.get("norms", norms)) != norms:
            run.say(report.part("note", f"norms by {before} so far, by {norms} from here: last bits differ"))
    elif len(engines) * len(threads) == 1:
        found = engines[0], threads[0]
    else:
        x, y, *_ = run.store.batch(run.store.order(0, 1), 0)
        shape = [*x.shape], str(x.dtype), run.store.nodes, asked.devices, run.fabric.device.type, engines, threads
        key = timings.digest(config.resolved["node"], *shape, asked.autocast, norms)
        found = run.fabric.broadcast(timings.known().get(key))
        if found is None:
            run.say(report.part("timing", f"engines {', '.join(engines)}; threads {', '.join(map(str, threads))}"))
            found = run.fabric.broadcast(run.stack.choose(x, y, engines, threads))
            if run.fabric.is_global_zero:
                timings.remember(key, found)
        run.stack.engine = found[0]
    torch.set_num_threads(found[1])
    if run.fabric.device.type == "cpu" and (count := asked.devices * found[1]) > count_cores():
        run.say(report.part("note", f"{count} threads of all processes on {count_cores()} cores wait for each other"))
    return found


def check_epoch(config: Config, saved: dict, goes_on: bool) -> None:
    """A fork cannot begin after what it is to do, unless its distillation is the one that was under way."""
    from lightning_idkd.schedule import epoch_of

    source, epochs, epoch = config.run.from_, config.train.epochs, saved["epoch"]
    if epoch >= epochs:
        raise UserError(f"train.epochs: {epochs}, but '{source}' has trained {epoch} epochs already; give more")
    if config.distillation is not None and not goes_on:
        start = epoch_of(config.distillation.start, epochs, "distillation.start")
        if start < epoch or (start == epoch and saved["epoch_step"]):
            raise UserError(f"distillation.start: epoch {start} is over in '{source}', which is at epoch {epoch}, step "
                            f"{saved['epoch_step']} of it")  # fmt: skip


def private_images(config: Config, before: Before | None = None) -> Images:
    """The private set's training part, all of its images with a label, its classes in the order of the run ``before``."""
    from lightning_idkd.data.identity import abridge

    private = labelled(config, "train", config.data.image_size, config.data.channels)
    if len(private.classes) < 2:
        raise UserError(f"data.private: this set has only one class, '{private.classes[0]}'; nodes need two classes or more")
    if twice := {name for name in private.classes if private.classes.count(name) > 1}:
        raise UserError(f"data.private: several classes have the same name: {abridge(sorted(twice))}; classes go by name")
    if before and before.data:
        known = before.data["classes"]
        if set(known) != set(private.classes):
            more, less = ([name for name in a if name not in b] for a, b in ((private.classes, known), (known, private.classes)))
            said = " and ".join(f"{word} {abridge(names)}" for word, names in (("has", more), ("lacks", less)) if names)
            raise UserError(f"data.private: the classes are not those of '{before.run}': this set {said}")
        private = private.named(known)
    config.data.partition.check(private)
    return private


def labelled(config: Config, split: str, size: int | None, channels: int | None = None) -> Images:
    """The private set's images of ``split``, refused where some have no label."""
    key, source = "data.private", config.data.private
    images = source.load(split, size, channels, key=key)
    bare = int((images.labels < 0).sum())
    if not bare:
        return images
    some = f"{bare:,} of {len(images):,} {split} images have no label"
    why = images.unlabelled or f": {'this set has no labels' if bare == len(images) and split == 'train' else some}"
    advice = source.labelled_splits(split, size, key) if split == "test" else ""
    raise UserError(f"{key}{why}; {advice or 'only a public set does without labels'}")


def load(config: Config, before: Before | None = None) -> tuple:
    """Private, test and public images (in the private set's shape), and the split.

    Raises:
        UserError: data that do not fit together, or are not those of the run ``before``.
    """
    from lightning_idkd.data import identity
    from lightning_idkd.data.partition import partition

    data, private = config.data, private_images(config, before)
    test = labelled(config, "test", private.size, private.channels)
    test = identity.renumber(test, private.classes, "data.private: the test part")
    public = None
    if data.public is not None and config.distillation is not None and config.distillation.public:
        public = data.public.load("train", private.size, private.channels, key="data.public")
        if len(public) < config.train.batch_size:
            raise UserError(
                f"data.public: {len(public)} images are less than a batch, train.batch_size {config.train.batch_size}"
            )
    found = identity.record(private, test, public)
    if before:
        identity.check(found, before.data, before.sets, before.run)
    labels, k = private.labels.numpy(), len(private.classes)
    split = partition(data.partition, labels, config.graph.nodes, config.seed, data.validation, k)
    split.data = found
    return data.partition.transform(private, split, config.seed), test, public, split


def module_class(path: str) -> type:
    """The NodeModule class at an import path."""
    from lightning_idkd.nodes.node import NodeModule

    name, _, attribute = path.rpartition(".")
    if not name:
        raise UserError(f"node.module: '{path}' is no import path; allowed: one such as package.module.Class")
    try:
        module = import_module(name)
    except (ImportError, ValueError) as e:
        raise UserError(f"node.module: cannot import '{name}' ({e})") from e
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, NodeModule)):
        allowed = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, NodeModule)]
        raise UserError(f"node.module: '{path}' is no NodeModule class.{did_you_mean(attribute, allowed)}")
    return found


def git_commit() -> str | None:
    """The commit of the working folder, with + where it has changes."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()
