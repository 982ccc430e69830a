"""``idkd audit``: what a finished run's messages reveal, for its own labels and for other forms of them.

:mod:`~lightning_idkd.analysis.leakage` has the attacker. This module rebuilds the run at the end of its training, lets
its nodes send their labels in every form, and reports the attacks.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_idkd import randomness
from lightning_idkd.analysis.leakage import ATTACKS, Attacker
from lightning_idkd.analysis.load import Run, configure_run, load
from lightning_idkd.callback import Distillation, Encoding
from lightning_idkd.config.kinds import choices
from lightning_idkd.config.parse import PLUGINS
from lightning_idkd.errors import UserError, require
from lightning_idkd.labels import Labels
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.training.build import build_parts
from lightning_idkd.training.checkpoint import restore
from lightning_idkd.training.fit import build_run, describe_privacy
from lightning_idkd.training.launch import launch
from lightning_idkd.training.resume import EarlierRun, Start

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lightning_idkd.training.orchestrator import Orchestrator

MOST_NODES = 32
"""Nodes that are attacked; of more, so many are drawn, and the others are left out."""


def audit(path: str | Path, epsilons: Sequence[float] = (1.0, 4.0), samples: int = 200, trust: bool = False) -> dict:
    """Attack the nodes of a finished run.

    What they would send in one more exchange is computed from ``last.ckpt`` by the run's own distillation and, one
    change at a time, in other forms (:func:`list_forms`).

    Args:
        path: the run folder.
        epsilons: bounds of the private labels among these forms.
        samples: number of members, and of non-members, that are taken from each node at most.
        trust: see :func:`~lightning_idkd.analysis.load.load`.

    Returns:
        A dict with the ``run``, its ``nodes`` and those ``attacked``, the number of candidate ``samples`` (half are
        members), the ``guesses`` of a label distribution without any message, and ``notes`` in sentences. ``results``
        is a list: each has what the attacker ``sees`` (nothing, labels, parameters or both), the form of the
        ``labels`` (None where it sees none) with their ``label_bytes`` per edge and ``epsilon``, the errors of the
        inferred ``distribution`` (``kl``, ``tv``) and, by attack, the ``membership`` (``auroc``, ``tpr`` at 1 % false
        positives). Each of these numbers is a ``value`` with the 95 % interval ``low`` to ``high`` of the bootstrap:
        over nodes for distributions, over the samples of each node for membership.

    Raises:
        UserError: the run is not finished, its data are missing or have changed, or its nodes hold out no samples.
    """
    require(samples >= 1, "--samples", samples, "1 or more")
    loaded = load(path, "last.ckpt", trust)
    if loaded.summary is None:
        end = f"after {loaded.epoch} of {loaded.config.train.epochs} epochs"
        raise UserError(f"'{path}' is not finished ({end}); idkd audit needs a finished run, with summary.json")
    with contextlib.redirect_stdout(sys.stderr):  # remarks of the run
        run = rebuild(loaded)
        attacker = Attacker(run, choose_nodes(run), samples)
        results = [{"sees": "nothing"} | attacker.report_nothing()]
        of_parameters = attacker.scores(attacker.confidence)
        results.append({"sees": "parameters"} | attacker.report([attacker.mass], [of_parameters]))
        forms, notes = list_forms(run, epsilons)
        for form, distillation in forms.items():
            sent = distillation.label(run)
            of_labels = attacker.scores(attacker.confidence_of_students(sent))
            mass = torch.stack([mean_label(sent[node]) for node in attacker.nodes])
            message = describe_message(form, distillation, [sent[node] for node in attacker.nodes])
            results.append({"sees": "labels"} | message | attacker.report([mass], [of_labels]))
            both = attacker.report([attacker.mass, mass], [of_parameters, of_labels])
            results.append({"sees": "both"} | message | both)
    if not (run.train.final_gossip or run.train.final_merge):
        notes.append("without a final gossip (train.final_gossip 0), nodes do not send the parameters attacked here")
    if privacy := describe_privacy(run.distillation, run.epochs, run.store.public):
        notes.append(f"the run's labels: {privacy}")
    uniform = torch.full_like(attacker.distributions, 1 / run.store.k)
    return {
        "run": str(loaded.folder.path),
        "nodes": run.network.graph.nodes,
        "attacked": attacker.nodes,
        "samples": len(attacker.targets),
        "guesses": {
            "uniform": attacker.report_distribution(uniform),
            "global": attacker.report_distribution(attacker.overall.expand_as(uniform)),
        },
        "results": [{"labels": None, "label_bytes": None, "epsilon": None} | result for result in results],
        "notes": notes,
    }


def rebuild(loaded: Run) -> Orchestrator:
    """The run at the end of its training, on the CPU, with its data.

    Raises:
        UserError: the data are missing or have changed.
    """
    here = ["--run.hosts", "1", "--run.devices", "1", "--run.accelerator", "cpu", "--run.engine", "loop"]
    config = configure_run(loaded.folder, [*here, "--run.pictures", "false"], loaded.trust)
    fabric = launch(config.run)
    earlier = EarlierRun(str(loaded.folder.path), loaded.images.get("data"), ("train", "test", "public"))
    parts = build_parts(config, fabric, earlier)
    if parts.split.hash != loaded.folder.partition_hash():
        others = f"the nodes' samples are not those of '{loaded.folder.path}'"
        raise UserError(f"data.partition: {others}; the files of data.private have changed")
    run = build_run(config, fabric, parts, Start(config))
    restore(run, RunFolder.load(loaded.folder.last), [])
    run.answers = functools.cache(run.answers)  # all forms have the same teacher
    return run


def choose_nodes(run: Orchestrator) -> list[int]:
    """The honest nodes that hold out samples, or :data:`MOST_NODES` of them, drawn by the hash.

    Raises:
        UserError: there are fewer than three.
    """
    honest = run.network.links.honest.nonzero()[0].tolist()
    nodes = [i for i in honest if len(run.store.split.train[i]) and len(run.store.split.validation[i])]
    if len(nodes) < 3:
        raise UserError(f"{len(nodes)} honest nodes hold out samples (data.validation); idkd audit needs 3 or more")
    drawn = randomness.permutation(len(nodes), run.seed, "audited nodes")[:MOST_NODES]
    return [nodes[place] for place in drawn.sort().values.tolist()]


def list_forms(run: Orchestrator, epsilons: Sequence[float]) -> tuple[dict[str, Distillation], list[str]]:
    """The forms of labels to attack, by name, and notes about those that are left out.

    The first form is the run's own. The others start from the float32 labels of all public samples at temperature 1 by
    the run's teacher, and change one thing. Filters use the run's calibration.
    """
    own = run.distillation
    if own is None:
        return {}, ["the run exchanges no labels (distillation is null), so that an attacker sees only parameters"]
    if getattr(own, "label", None) is None or getattr(own, "teacher", None) is None:
        return {}, [f"{type(own).__name__} sends no labels, so that an attacker sees only parameters"]
    for plugin in PLUGINS:
        import_module(plugin)
    methods, encodings = choices(Distillation), choices(Encoding)
    everything = functools.partial(methods["VanillaKD"], teacher=own.teacher)
    packed = encodings["Packed"]
    forms = {
        "as in the run": own,
        "raw": everything(),
        "aligned": everything(align=True),
        "sharpened, T 0.5": everything(temperature=0.5),
        "one-hot": everything(hard=True),
        "top-1": everything(encoding=packed("float32", top=1)),
        "float16": everything(encoding=packed("float16")),
        "uint8": everything(encoding=packed("uint8")),
    }
    notes = []
    if run.calibration is None:
        notes.append("the run has no calibration, so that labels are not filtered")
    else:
        filtered = functools.partial(methods["IDKD"], teacher=own.teacher)
        forms |= {"filtered": filtered(), "filtered, aligned": filtered(align=True)}
    for name in ("RandomizedResponse", "LaplaceLabels"):
        for epsilon in epsilons:
            forms[f"{name}, epsilon {epsilon:g}"] = everything(encoding=encodings[name](epsilon))
    return forms, notes


def mean_label(labels: Labels) -> Tensor:
    """The mean of a node's labels [k]; uniform where it sends none."""
    p = labels.probabilities
    return p.mean(0) if len(p) else torch.full((p.shape[1],), 1 / p.shape[1])


def describe_message(form: str, distillation: Distillation, sent: list[Labels]) -> dict:
    """The form of the labels ``sent`` by every node, the mean size of a message, and the epsilon of each label."""
    epsilon = getattr(getattr(distillation, "encoding", None), "epsilon", math.inf)
    size = sum(part.nbytes for part in sent) / len(sent)
    return {"labels": form, "label_bytes": size, "epsilon": None if epsilon == math.inf else epsilon}


def show(result: dict) -> None:
    """Print what :func:`audit` returns, of intervals half their width."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    print(f"{result['run']}: {len(result['attacked'])} nodes attacked, {result['samples']:,} samples\n")
    # gaps so narrow that in 80 columns no word is broken
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("seen", overflow="fold")
    for column in ("bytes", "KL", "TV", "AUROC\nloss", "\nLiRA", "TPR\nloss", "\nLiRA"):
        table.add_column(column, no_wrap=True, justify="right")
    for name, errors in result["guesses"].items():
        table.add_row(f"guess: {name}", "", *(f"{error['value']:.3f}" for error in errors.values()), "", "", "", "")
    for row in result["results"]:
        seen = f"{row['sees']}: {row['labels']}" if row["labels"] else row["sees"]
        cells = [seen, "" if row["label_bytes"] is None else f"{row['label_bytes']:,.0f}"]
        cells += [f"{error['value']:.3f}" for error in row["distribution"].values()]
        rates = [row["membership"][attack] for attack in ATTACKS]
        cells += ["{:.2f} ±{:.2f}".format(r["auroc"]["value"], halve(r["auroc"])) for r in rates]
        cells += [f"{r['tpr']['value']:.1%}" for r in rates]
        table.add_row(*map(escape, cells))
    Console().print(table)
    print(f"\n{EXPLANATION}")
    for note in result["notes"]:
        print(f"note: {note}")


def halve(number: dict[str, float]) -> float:
    """Half the width of the interval of a number."""
    return (number["high"] - number["low"]) / 2


EXPLANATION = """\
KL (in nats) and TV (total variation) compare a node's true and inferred label
distribution, as means over nodes. AUROC: of samples that a node trains on against
held-out ones, with half a 95 % interval; 0.5 if nothing is known. TPR: at 1 %
false positives. --json has all intervals, --help what the attacker knows."""
