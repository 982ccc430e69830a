"""Runs an experiment from start to end: finds what to continue, builds the parts, chooses the engine, and trains."""

from __future__ import annotations

import functools
import math
import os
import signal
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from lightning_idkd.callback import Fault, check_faults
from lightning_idkd.checkout import find_commit
from lightning_idkd.config import ClockConfig, Config
from lightning_idkd.graph import WATCHED
from lightning_idkd.records import loggers, report
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.training.launchers import check_launcher
from lightning_idkd.training.resume import Start, find_start

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from lightning_idkd.callback import Distillation, Loss
    from lightning_idkd.data.store import Store
    from lightning_idkd.links import Links
    from lightning_idkd.network import Network
    from lightning_idkd.training.build import Parts
    from lightning_idkd.training.orchestrator import Orchestrator


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals after which a run saves a checkpoint and ends; SLURM sends the last two before it takes the hosts away."""


def fit(config: Config) -> dict | None:
    """Run an experiment.

    Returns:
        The summary; None in all processes but the first, and if the run stopped after the epoch ``run.until``.

    Raises:
        UserError: a mistake in the config. It is raised before any work if it can be seen that early.
        KeyboardInterrupt: SIGINT, SIGTERM or SIGUSR1 interrupted the run. During training, the first signal stops the
            run after the step, with a checkpoint; a second one stops it at once, without a new checkpoint.
    """
    config.check()
    graph = config.graph.build(config.seed)
    config.gossip.check(graph)
    check_faults(config.faults, config.gossip, graph)
    check_launcher(config.run)
    alone = config.run.hosts * config.run.devices == 1
    start = find_start(config) if alone else None  # with several processes, the first one finds it for all
    if not alone:  # torch prints stack traces in C++ when a process dies, which the heartbeats tell in a sentence
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a user cannot act on the warnings that libraries give when imported
        from lightning_idkd.training.build import build_parts, check_same_data
        from lightning_idkd.training.calibrate import try_score
        from lightning_idkd.training.checkpoint import restore, share_rows
        from lightning_idkd.training.engine_choice import choose_engine
        from lightning_idkd.training.launch import agree, decide, find_heartbeat, launch

    fabric = launch(config.run)
    first = fabric.is_global_zero
    if start is None:
        start = share_start(config, fabric)
    parts = agree(fabric, lambda: build_parts(config, fabric, start.earlier_run))
    check_same_data(fabric, parts.split)
    decide(fabric, lambda: start.check_split(parts.split.hash))
    say = functools.partial(print, flush=True) if first else (lambda text: None)
    engine, threads = choose_engine(config, start, fabric, parts.store, parts.stack, say)
    config.resolved["run"] |= {"engine": engine, "threads": threads}
    if config.distillation is not None and config.distillation.calibrated:
        try_score(config.calibration.score, parts.stack, parts.store)
    run = build_run(config, fabric, parts, start)
    run.call("on_check")
    folder = start.folder or decide(fabric, lambda: RunFolder.create(config.folder(), config.seed))
    if heartbeat := find_heartbeat():
        heartbeat.checkpoint = folder.last
    with ExitStack() as kept:
        decide(fabric, lambda: kept.enter_context(folder.lock()))
        if start.state:
            restore(run, share_rows(start.state, parts.network), start.lines, start.keeps_labels, start.fork)
        if not first:
            return train(run, folder, [])
        folder.clean()
        if start.state:
            if fallback := start.source.describe_fallback(start.checkpoint, run.epoch):
                print(fallback, flush=True)
            if not start.fork:
                folder.continue_from(start.checkpoint)
            folder.start_log(run.lines)
        if start.folder is None:
            folder.yaml("config.yaml", config.resolved)
            folder.json("partition.json", parts.split.to_dict())
        folder.point_latest()
        run_loggers = loggers.make(config, folder)
        lines = describe_parts(config, run)
        lines["run"] = f"{folder.path}{describe_start(start, run.epoch)}"
        print(report.format_start(lines, simulated=run.clock is not None), flush=True)
        return train(run, folder, run_loggers)


def share_start(config: Config, fabric: Fabric) -> Start:
    """The start that the first process finds, in all processes."""
    from lightning_idkd.training.launch import decide

    found: list[Start] = []

    def find() -> dict:
        found.append(find_start(config))
        return found[0].share()

    shared = decide(fabric, find)
    return found[0] if found else Start.receive(config, shared)


def build_run(config: Config, fabric: Fabric, parts: Parts, start: Start) -> Orchestrator:
    """Build the run of an experiment, before its first step."""
    from lightning_idkd.training.orchestrator import Orchestrator, Plan

    return Orchestrator(
        fabric,
        parts.stack,
        parts.network,
        parts.store,
        config.gossip,
        config.train,
        config.calibration,
        config.distillation,
        [*config.faults, *config.callbacks, *pictures(config)],
        Plan(config.run.checkpoint_every, epochs_to_keep(config), config.run.until),
        {
            "from": str(start.checkpoint) if start.fork else None,
            "git_commit": find_commit(),
            "partition_hash": parts.split.hash,
            "parameters": parts.stack.parameters + parts.stack.frozen_parameters,
            "frozen_parameters": parts.stack.frozen_parameters,
            "predicted_memory_bytes": parts.memory,
        },
        seed=config.seed,
        clock=None if config.clock is None else config.clock.build(parts.network.graph, config.seed),
    )


def train(run: Orchestrator, folder: RunFolder, run_loggers: list) -> dict | None:
    """Train until the end or a signal; at the end, write and print the summary."""
    from lightning_idkd.training.launch import end_together

    def interrupt(number: int, _frame: object) -> None:
        if run.interrupted:
            raise KeyboardInterrupt
        run.stop()
        if number != signal.SIGINT:
            loggers.give_way(run_loggers)
        run.say("stopping, with a checkpoint (again to stop at once)")

    handlers = {s: signal.signal(s, interrupt) for s in STOP_SIGNALS}
    summary, whole = None, False
    try:
        summary = run.fit(folder, run_loggers)
        whole = True
        if summary is None:
            run.say(
                f"stopped at epoch {run.epoch}, step {run.step}; continue with the same command and --run.resume auto"
            )
            if run.interrupted:
                raise KeyboardInterrupt
            return None
        if not run.fabric.is_global_zero:
            return None
        folder.json("summary.json", summary)
        report.print_table(summary, folder.path)
        return summary
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
        loggers.finish(run_loggers, summary)
        if whole:  # otherwise the others may not come so far
            end_together()


def pictures(config: Config) -> list:
    """The callback that draws pictures, if ``run.pictures`` is true."""
    if not config.run.pictures:
        return []
    from lightning_idkd.records.pictures import Pictures

    return [Pictures()]


def epochs_to_keep(config: Config) -> tuple[int, ...]:
    """Epochs whose checkpoint stays: those in ``run.keep``, and the one from which a control starts."""
    first_exchange = config.first_exchange() if config.trains_control else None
    return (*config.run.keep, *([] if first_exchange is None else [first_exchange]))


def describe_start(start: Start, epoch: int) -> str:
    """Text after the run's folder in the first line, if the run continues or is a fork."""
    if not start.state:
        return ""
    origin = f"forked from {start.checkpoint}" if start.fork else "continued"
    drops = not start.keeps_labels and start.state["distilled"] is not None
    return f", {origin} at epoch {epoch}" + (", without its distilled labels" if drops else "")


def describe_parts(config: Config, run: Orchestrator) -> dict[str, str]:
    """The lines that are printed before the first evaluation, by name; ``run`` is empty, to be filled in by `fit`.

    Warnings and notes also go to the summary, for reports.
    """
    from lightning_idkd.data.identity import abridge

    graph, store, stack, header = run.network.graph, run.store, run.stack, run.header
    plural, loss = store.inputs.plural, config.node.loss
    lines = {
        "run": "",
        "graph": f"{graph.name}, {graph.nodes} nodes, spectral gap {graph.spectral_gap():.4f}",
        "data": f"{store.samples:,} training samples, {len(store.test):,} test, "
        f"{store.inputs}, {store.k} classes, partition {store.split.hash}",
    }
    if store.public:
        stored, form = store.public_stored, store.inputs.form
        lines["public"] = f"{store.public:,} {plural}, {form}" + ("" if stored == form else f" from {stored}")
        if duplicates := store.duplicates():
            lines["warning"] = f"{duplicates:,} public {plural} are test {plural} too, so test accuracy may be too high"
    notes, counts = list(store.notes), store.test_labels.cpu().bincount(minlength=store.k).tolist()
    if absent := [name for name, count in zip(store.classes, counts, strict=True) if not count]:
        notes.append(f"data.private: no test {plural} of {abridge(absent)}")
    notes += describe_remarks(loss, store) + describe_bounds(config, run.network)
    notes += describe_reach(config)
    if notes:
        lines["note"] = f"\n{'note':<10} ".join(notes)
    frozen = f", {stack.frozen_parameters:,} of them frozen" if stack.frozen_parameters else ""
    rule = type(config.gossip).__name__ if loss.plain else f"{type(config.gossip).__name__}; {type(loss).__name__}"
    lines["node"] = (
        f"{type(config.node.network).__name__}, {header['parameters']:,} parameters{frozen}; {rule}; "
        f"{run.progress.steps} steps an epoch"
    )
    links = run.network.links
    if links.liars:
        lines["liars"] = describe_liars(links)
    lying, specs = [group.fault for group in links.liars], config.resolved["faults"]
    if faults := [describe_fault(s) for fault, s in zip(config.faults, specs, strict=True) if fault not in lying]:
        lines["faults"] = ", ".join(faults)
    lines["engine"] = describe_engine(run)
    each = " a process" if run.network.world > 1 else ""
    if config.clock is not None:
        lines["clock"] = describe_clock(config.clock)
    lines["memory"] = f"about {report.format_bytes(header['predicted_memory_bytes'])}{each}"
    shares = [config.gossip.shares, *(getattr(c, "shares", "") for c in config.callbacks)]
    if run.distillation is not None:
        shares += [run.distillation.shares, run.calibration.shares if run.distillation.calibrated else ""]
    if any(shares):
        lines["shares"] = ", ".join(dict.fromkeys(filter(None, shares)))
    if privacy := describe_privacy(config.distillation, config.train.epochs, store.public):
        lines["privacy"] = privacy
    header["notes"] = [lines["warning"], *notes] if "warning" in lines else notes
    return lines


def describe_privacy(distillation: Distillation | None, epochs: int, public: int) -> str:
    """The bound that the noise of labels gives, and what has none; empty without such noise.

    A label has the epsilon of the encoding. Those of a node have the sum over the ``public`` samples and all exchanges
    (basic composition).
    """
    encoding = getattr(distillation, "encoding", None)
    if distillation is None or encoding is None or encoding.epsilon == math.inf:
        return ""
    exchanges = distillation.count_exchanges(epochs)
    composed = f"{encoding.epsilon * public * exchanges:,.10g} for all {public:,} labels of {exchanges} "
    composed += "exchanges" if exchanges > 1 else "exchange"
    bare = "which samples a node labels, and the parameters" if distillation.calibrated else "the parameters"
    return f"epsilon {encoding.epsilon:g} per label, at most {composed}; not protected: {bare}"


def describe_remarks(loss: Loss, store: Store) -> list[str]:
    """What the loss finds odd at some nodes, a sentence for every remark."""
    from lightning_idkd.data.identity import abridge

    nodes: dict[str, list[str]] = {}
    for node, indices in enumerate(store.split.train):
        counts = store.labels[indices].bincount(minlength=store.k)
        if remark := loss.remark(counts):
            nodes.setdefault(remark, []).append(str(node))
    remarks = [f"node.loss: {remark}: nodes {abridge(names)}" for remark, names in nodes.items()]
    if loss.plain and store.tuning.count_distilled:
        name = type(loss).__name__
        remarks.append(f"distillation.tuning.count_distilled: {name} uses no label counts, so this changes nothing")
    return remarks


def describe_clock(clock: ClockConfig) -> str:
    """The distributions of simulated times, the bandwidth and the slow nodes."""
    text = f"compute {type(clock.compute).__name__}, latency {type(clock.latency).__name__}"
    if clock.bandwidth is not None:
        text += f", {report.format_bytes(clock.bandwidth)}/s an edge"
    slow = [f"node {node} x {factor:g}" for node, factor in clock.slow.items()]
    if len(slow) > 4:
        slow = [f"{len(slow)} nodes x {min(clock.slow.values()):g} to {max(clock.slow.values()):g}"]
    return ", ".join([text, *slow])


def describe_liars(links: Links) -> str:
    """The nodes that lie, and what about."""
    parts = []
    for group in links.liars:
        nodes = np.flatnonzero(group.nodes).tolist()
        about = {"rows": group.fault.attack, "labels": group.fault.labels}
        lies = [f"{type(attack).__name__} in {what}" for what, attack in about.items() if attack is not None]
        lies += ["flipped private labels"] if group.fault.flip else []
        parts.append(f"node{'s' * (len(nodes) > 1)} {', '.join(map(str, nodes))}: {', '.join(lies)}")
    return "; ".join(parts)


def describe_bounds(config: Config, network: Network) -> list[str]:
    """Where more neighbours lie to an honest node than the aggregation of rows or of labels bears, a sentence each."""
    from lightning_idkd.data.identity import abridge

    rule, graph, notes = config.gossip, network.graph, []
    while not hasattr(rule, "aggregator") and hasattr(rule, "rule"):
        rule = rule.rule
    aggregations = {
        "gossip.aggregator": (getattr(rule, "aggregator", None), "attack"),
        "distillation.aggregation": (getattr(config.distillation, "aggregation", None), "labels"),
    }
    for key, (aggregation, about) in aggregations.items():
        groups = [group.nodes for group in network.links.liars if getattr(group.fault, about) is not None]
        if aggregation is None or not groups:
            continue
        lying, beyond = np.any(groups, 0), {}
        for step in range(min(graph.period or WATCHED, WATCHED)):
            for node in np.flatnonzero(network.links.honest).tolist():
                senders = graph.mixing(step).neighbours(node)
                bound = aggregation.bears(len(senders))
                if bound is not None and lying[senders].sum() > bound:
                    beyond.setdefault((bound, len(senders)), set()).add(node)
        for (bound, received), nodes in beyond.items():
            name, names = type(aggregation).__name__, abridge([str(node) for node in sorted(nodes)])
            notes.append(f"{key}: {name} bears {bound} lying of {received} neighbours, and more lie to nodes {names}")
    return notes


def describe_reach(config: Config) -> list[str]:
    """What lost messages do to the rule, where that is not plain."""
    rule, name = config.gossip, type(config.gossip).__name__
    losing = [fault for fault in config.faults if type(fault).lost is not Fault.lost]
    if losing and not {"mix", "swap", "receive"} & set(rule.sends):
        return [f"faults: lost messages change nothing here, since {name} sends none over single edges"]
    if any(not fault.told for fault in losing) and "mix" in rule.sends and "column" not in rule.takes:
        return ["faults: where senders do not know of a loss (told: false), the mean of the rows drifts"]
    return []


def describe_fault(spec: dict) -> str:
    """A fault of the config, with the arguments that are set."""
    given = spec.get("init_args") or {}
    arguments = {name: value for name, value in given.items() if value is not None and value is not False}
    given = ", ".join(name if value is True else f"{name} {value}" for name, value in arguments.items())
    return spec["class_path"].rpartition(".")[2] + (f" ({given})" if given else "")


def describe_engine(run: Orchestrator) -> str:
    """The engine, its device, and on a CPU its threads."""
    import torch

    from lightning_idkd.models import cpu_norms
    from lightning_idkd.nodes.engines import BATCHED

    stack, device = run.stack, run.fabric.device
    text = f"{stack.engine} on {device}, {run.network.world} x {torch.get_num_threads()} threads"
    if stack.engine in BATCHED:
        text += f", {min(stack.nodes_per_call, stack.n)} nodes a call"
    if stack.autocast:
        text += ", bfloat16"
    if device.type == "cpu" and cpu_norms.name_backend(device) != "C":
        text += ", norms by torch (no C compiler, or its library cannot be written to IDKD_CACHE)"
    return text
