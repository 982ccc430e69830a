"""Evaluates a loaded run on any test set: accuracy, calibration error and the AUROC of a score, in all and by class."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from lightning_idkd import metrics
from lightning_idkd.analysis.load import Run, configure_run
from lightning_idkd.analysis.model_card import NAMES
from lightning_idkd.callback import OodScore
from lightning_idkd.config.resolved import TRAINED, difference
from lightning_idkd.config.user_classes import explain_errors
from lightning_idkd.data.identity import collect_notes, describe_change
from lightning_idkd.data.samples import Samples
from lightning_idkd.errors import UserError
from lightning_idkd.files import to_json
from lightning_idkd.labels import Outputs
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.training.calibrate import compute_scores
from lightning_idkd.training.evaluation import summarise_nodes

BINS = 15
"""Bins of confidence in the calibration error."""


def evaluate(run: Run, changes: list[str], per_class: bool = False) -> dict:
    """Measure the nodes and the consensus model on a test set: accuracy, calibration error, and the AUROC of the score,
    which compares the test samples with the public ones. Means are those of honest nodes.

    Args:
        run: what :func:`~lightning_idkd.analysis.load.load` returns.
        changes: options as for ``idkd fit``, for other data than the run's and another ``calibration.score``.
        per_class: whether to add ``per_class``. It has the ``classes`` with the number of their ``images``;
            ``accuracy`` [class] as node mean, worst node and so on (None where the set has no image of the class), and
            of all ``nodes`` [node, class]; and ``confusion``, the counts of samples of the ``nodes`` [node, true class,
            predicted class] and of the ``consensus`` model [true class, predicted class].

    Raises:
        UserError: an option changes what was trained.
    """
    config = configure_run(run.folder, changes, run.trust)
    if change := difference(config.resolved, run.folder.config(), TRAINED):
        key, value, trained = change
        allowed = "idkd evaluate changes only data and calibration"
        raise UserError(f"{key}: {value} given, but this run was trained with {trained}; {allowed}")
    test, notes = run.test_images(config)
    public, score = config.data.public, config.calibration and config.calibration.score
    if score is not None and (score.fitted or type(score).perturb is not OodScore.perturb):
        print(
            f"no AUROC: {type(score).__name__} needs a node's training data; choose another --calibration.score",
            file=sys.stderr,
        )
        score = None
    if public is not None and score is not None:
        public = public.load_like("train", run.inputs, key="data.public")
        notes += collect_notes(("data.public", public))
        change = describe_change(public.identity, (run.images.get("data") or {}).get("public"))
        if change and difference(config.resolved, run.config.resolved, ("data.public",)) is None:
            notes.append(f"data.public: the {public.inputs.plural} have changed since the run ({change})")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    with explain_errors(config.resolved):
        models = [measure_model(run, module, test, public, score) for module in [*run.stack.modules, run.consensus()]]
    confusion = torch.stack([model.pop("confusion") for model in models])
    *nodes, consensus = models
    result: dict = {"run": str(run.folder.path), "images": len(test), "nodes": len(nodes)}
    for key, value in consensus.items():
        of_nodes = torch.tensor([node[key] for node in nodes], dtype=torch.float64)
        result[key] = summarise_nodes(of_nodes[torch.from_numpy(run.honest)]) | {"consensus": value}
    if per_class:
        result["per_class"] = to_json(measure_classes(confusion, run.honest, run.describe()["classes"]), "evaluate")
    return result


def measure_model(run: Run, module: NodeModule, test: Samples, public: Samples | None, score: OodScore | None) -> dict:
    """Measure one model: the values that :data:`NAMES` lists, and ``confusion``, the counts of test samples
    [true class, predicted class]. Without ``public`` or ``score`` there is no AUROC."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    outputs = run.outputs(module, test)
    confusion = count_confusion(outputs, test)
    p = outputs.logits.softmax(1)
    calibration_error = multiclass_calibration_error(p, test.labels, len(confusion), n_bins=BINS)
    measures: dict = {
        "confusion": confusion,
        "accuracy": (outputs.logits.argmax(1) == test.labels).double().mean().item(),
        "calibration_error": calibration_error.item(),
    }
    if public is not None and score is not None:
        of_public = run.outputs(module, public)
        scores = compute_scores(score, Outputs.cat([outputs, of_public])).split([len(outputs), len(of_public)])
        measures["auroc_test_against_public"] = metrics.auroc(*scores)
    return measures


def count_confusion(outputs: Outputs, test: Samples) -> Tensor:
    """Count the test samples by their class and the one that a model predicts, int64 [true class, predicted class]."""
    k = outputs.logits.shape[1]
    return (test.labels * k + outputs.logits.argmax(1)).bincount(minlength=k * k).view(k, k)


def measure_classes(confusion: Tensor, honest: np.ndarray, classes: list[str]) -> dict:
    """Build ``per_class`` of :func:`evaluate` from the counts of all nodes and, as the last, the consensus model
    [n + 1, true class, predicted class]; ``honest`` is bool [n]."""
    images = confusion[0].sum(1)
    accuracies = confusion.diagonal(dim1=1, dim2=2).double() / images  # [n + 1, class], nan where there is no sample
    *nodes, consensus = accuracies.unbind()
    accuracy: dict[str, list] = {}
    for of_class in torch.stack(nodes)[torch.from_numpy(honest)].unbind(1):
        for key, value in summarise_nodes(of_class).items():
            accuracy.setdefault(key, []).append(value)
    accuracy |= {"consensus": consensus.tolist(), "nodes": [of_node.tolist() for of_node in nodes]}
    counts = {"nodes": confusion[:-1].tolist(), "consensus": confusion[-1].tolist()}
    return {"classes": classes, "images": images.tolist(), "accuracy": accuracy, "confusion": counts}


def show(result: dict) -> None:
    """Print what :func:`evaluate` returns. Confusion matrices are shown by the consensus model's most frequent
    mistake."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    columns = ("node mean", "sd", "least", "most", "consensus")
    table = Table("", *columns, title=f"{escape(result['run'])}: {result['images']:,} test samples")
    for key, name in NAMES.items():
        if key in result:
            table.add_row(name, *(f"{value:.4f}" for value in result[key].values()))
    console = Console()
    console.print(table)
    if per_class := result.get("per_class"):
        table = Table("class", "samples", "node mean", "worst node", "best node", "consensus", "it is taken for")
        for row in list_class_rows(per_class):
            table.add_row(*row)
        console.print(table)
        print(f"confusion matrices of {result['nodes']} nodes and the consensus model: --json, or --export FOLDER")


def list_class_rows(per_class: dict) -> list[list[str]]:
    """The cells of a table of classes: name, images, accuracies, and the class that samples are most often mistaken
    for."""
    from rich.markup import escape

    classes, rows = per_class["classes"], []
    for c, name in enumerate(classes):
        cells = [escape(name), f"{per_class['images'][c]:,}"]
        for key in ("node_mean", "node_min", "node_max", "consensus"):
            accuracy = per_class["accuracy"][key][c]
            cells.append("-" if accuracy is None else f"{accuracy:.1%}")
        counts = per_class["confusion"]["consensus"][c]
        wrong = max((other for other in range(len(counts)) if other != c), key=counts.__getitem__)
        cells.append(escape(f"{classes[wrong]}, {counts[wrong] / sum(counts):.1%}") if counts[wrong] else "-")
        rows.append(cells)
    return rows
