"""A run, back in Python: nodes, graph, history; its models on other data, and as files for other programs."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_idkd import metrics
from lightning_idkd.callback import OodScore
from lightning_idkd.config import Config
from lightning_idkd.config.parse import configure
from lightning_idkd.config.resolved import TRAINED, difference
from lightning_idkd.config.user_classes import explain_errors
from lightning_idkd.data.identity import abridge, collect_notes, describe_change, renumber
from lightning_idkd.data.images import Images
from lightning_idkd.errors import UserError, require
from lightning_idkd.files import to_json, write
from lightning_idkd.graph import Graph
from lightning_idkd.labels import Outputs
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.nodes.stack import NodeStack, mean_buffers, run_network
from lightning_idkd.randomness import permutation
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.training.build import labelled, load_images, node_maker
from lightning_idkd.training.calibrate import compute_scores
from lightning_idkd.training.evaluation import summarise_nodes
from lightning_idkd.training.resume import Before

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_idkd.data.partition import Split

BATCH = 256
NAMES = {
    "accuracy": "accuracy",
    "calibration_error": "calibration error",
    "auroc_test_against_public": "AUROC, test against public images",
}
"""What :func:`evaluate` measures, in words. A run's own ``ood.auroc`` is of held-out private against public images."""


@dataclass(repr=False)
class Run:
    """What :func:`load` gives."""

    folder: RunFolder
    config: Config
    stack: NodeStack
    """All nodes; ``stack.modules[i]`` is node i, ``stack.X`` [n, P] their parameters."""
    graph: Graph
    history: list[dict]
    """The lines of ``metrics.jsonl``."""
    summary: dict | None
    """``summary.json``; None where the run has not come to its end."""
    images: dict
    """Channels, size and number of classes of the data, mean and std [channels] of the training pixels, 0..255, and ``data``:
    class names and identity of all sets (:func:`lightning_idkd.data.identity.record`; None for a run older than this)."""
    epoch: int
    """Epochs that the nodes have trained."""

    def __repr__(self) -> str:
        count = self.stack.parameters + self.stack.frozen_parameters
        return f"Run('{self.folder.path}': {self.stack.n} nodes of {count:,} parameters, {self.epoch} epochs)"

    def consensus(self) -> NodeModule:
        """The mean of all nodes, in evaluation mode."""
        return self.stack.model(self.stack.X.mean(0), mean_buffers(self.stack.buffers))

    def batches(self, images: Images) -> Iterator[Tensor]:
        """Images as the nodes see them, float32 [b, C, S, S]."""
        mean, std = (self.images[k][:, None, None] for k in ("mean", "std"))
        for pixels in images.pixels.split(BATCH):
            yield (pixels.to(mean.dtype) - mean) / std

    def outputs(self, module: NodeModule, images: Images) -> Outputs:
        """Outputs of one model on ``images``, in their order; the batches are those of the run's own evaluation, shuffled, since
        a network may use statistics of its batch and sets are often stored class by class."""
        order = permutation(len(images), 0, "examined")
        return run_network(module, self.batches(images[order]))[order.argsort()]

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the network's outputs; None for a run that is older than their being stored."""
        return tuple(self.images["data"]["classes"]) if self.images.get("data") else None

    def test_images(self, config: Config | None = None) -> tuple[Images, list[str]]:
        """The test images of the run, or of a ``config`` with other data, as the nodes see them: in the run's shape, and with
        labels numbered by the run's classes, whatever the order in that set. Also what is odd about them, in sentences.

        Raises:
            UserError: an image has no label, or a class that the run has not trained on.
        """
        config = config or self.config
        test = labelled(config, "test", self.images["size"], self.images["channels"])
        odd, before = collect_notes(("data.private", test)), self.images.get("data")
        if before is None:
            allowed = f"{self.images['classes']}, as trained"
            require(len(test.classes) == self.images["classes"], "data.private: classes", len(test.classes), allowed)
            return test, odd
        names, test = test.classes, renumber(test, self.classes, "data.private: the test part")
        if names != self.classes:
            if lacking := [name for name in self.classes if name not in names]:
                of = f"{len(names)} classes of {len(self.classes)}"
                odd.append(f"data.private: the test images have {of}, without {abridge(lacking)}")
            else:
                odd.append("data.private: the classes come in another order than in training; labels go by name")
        if test.stored != before["test"]["stored"]:
            shape = f"{test.size}x{test.size}, {test.channels} channel{'s' * (test.channels > 1)}"
            stored = f"{test.stored}, those of the run's test as {before['test']['stored']}"
            odd.append(f"data.private: the images are stored as {stored}; both are brought to {shape}")
        found, same = describe_change(test.identity, before["test"]), ("data.private", "data.image_size", "data.channels")
        if found and difference(config.resolved, self.config.resolved, same) is None:
            odd.append(f"data.private: the test images have changed since the run ({found})")
        return test, odd

    def test(self) -> Images:
        """The run's test images, uint8 pixels [N, C, S, S], and their labels [N], which number the run's classes.

        Raises:
            UserError: the set is not there, or has an image without a class that the run has trained on.
        """
        return self.test_images()[0]

    def train(self, node: int) -> Images:
        """The private images and labels that ``node`` trains on.

        Raises:
            UserError: the set is not there, or has changed since the run.
        """
        return self._of_node(node, "train")

    def held_out(self, node: int) -> Images:
        """The private images and labels of ``node`` that are held out for validation and calibration."""
        return self._of_node(node, "validation")

    def _of_node(self, node: int, part: str) -> Images:
        require(0 <= node < self.stack.n, "node", node, f"0 to {self.stack.n - 1}")
        images, split = self._private
        return images[getattr(split, part)[node]]

    def public(self) -> Images | None:
        """The public images, with labels where the set has some; None for a run without a public set."""
        source = self.config.data.public
        return source and source.load("train", self.images["size"], self.images["channels"], key="data.public")

    @functools.cached_property
    def _private(self) -> tuple[Images, Split]:
        before = Before(str(self.folder.path), self.images.get("data"), ("train",))
        images, _, _, split = load_images(self.config, before)
        if split.hash != self.folder.partition_hash():
            raise UserError(f"data.partition: the nodes' samples are not those of '{self.folder.path}'; a file has changed")
        return images, split

    def describe(self) -> dict:
        """What another program needs besides the parameters: ``classes`` in the order of the outputs, ``mean`` and ``std`` of
        every channel (of pixels from 0 to 255), ``size`` and ``channels`` of the images, and the ``config``."""
        return {
            "run": f"{self.folder.path.parent.name}/{self.folder.path.name}",
            "epochs": self.epoch,
            "classes": list(self.classes or map(str, range(self.images["classes"]))),
            "mean": self.images["mean"].tolist(),
            "std": self.images["std"].tolist(),
            "size": self.images["size"],
            "channels": self.images["channels"],
            "config": self.config.resolved,
        }

    def export(self, folder: str | Path) -> list[Path]:
        """Write the consensus model for other programs.

        ``consensus.safetensors`` and the plain state dict ``consensus.pt`` hold its parameters and buffers under the network's
        own names; ``consensus.json``, and the metadata of the first, what :meth:`describe` gives.
        """
        from safetensors.torch import save

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--export: cannot write '{folder}' ({e.strerror})") from e
        state = {k: v.detach().clone().contiguous() for k, v in self.consensus().network.state_dict().items()}
        about = self.describe()
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
        # safetensors' save_file would make a file that nobody else may read
        write(folder / "consensus.safetensors", lambda part: part.write_bytes(save(state, texts)))
        write(folder / "consensus.pt", lambda part: torch.save(state, part))
        write(folder / "consensus.json", lambda part: part.write_text(json.dumps(about, indent=1) + "\n"))
        return [folder / f"consensus.{end}" for end in ("safetensors", "pt", "json")]


def load(path: str | Path, checkpoint: str | None = None) -> Run:
    """A run by its folder, such as ``runs/X/latest``; needs none of its data.

    Args:
        checkpoint: a file in ``checkpoints/``; None: the rows after the final gossip, or the last ones there are.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    folder = RunFolder(Path(path).resolve())
    if not folder.file("config.yaml").exists():
        raise UserError(f"'{path}' is no run folder; give one such as runs/NAME/latest")
    final = folder.file("checkpoints/final.ckpt")
    file = folder.file(f"checkpoints/{checkpoint}") if checkpoint else (final if final.exists() else folder.last)
    if not file.exists():
        there = ", ".join(sorted(f.name for f in file.parent.glob("*.ckpt")))
        raise UserError(f"'{path}' has no checkpoint {file.name}; it has: {there or 'none yet'}")
    state = RunFolder.load(file)
    config = configure(["--config", str(folder.file("config.yaml"))])
    images = state["images"]
    graph = config.graph.build(config.seed)
    stack = NodeStack(
        node_maker(config, images["channels"], images["size"], images["classes"]),
        range(graph.nodes),
        config.seed,
        dtype=torch.float64 if config.run.precision == 64 else torch.float32,
    )
    stack.restore(state)
    for module in stack.modules:
        module.eval()
    return Run(folder, config, stack, graph, folder.metrics(), folder.summary(), images, state["epoch"])


def evaluate(run: Run, changes: list[str], per_class: bool = False) -> dict:
    """Accuracy and calibration error of nodes and consensus on a test set, and the AUROC of a score of it against a public set.

    Args:
        run: as :func:`load` gives it.
        changes: options as for ``idkd fit``: other sets than those of the run, and another ``calibration.score``.
        per_class: also ``per_class``: the ``classes`` with their ``images``; ``accuracy`` [class] by node mean, worst and so on
            (None where the set has no such image), and ``nodes`` [node, class]; and ``confusion``, of all ``nodes``
            [node, true class, answer] and of the ``consensus``, counts of images.

    Raises:
        UserError: an option changes what was trained.
    """
    config = configure(["--config", str(run.folder.file("config.yaml")), *changes])
    if found := difference(config.resolved, run.folder.config(), TRAINED):
        raise UserError(
            f"{found[0]}: {found[1]} given, but this run was trained with {found[2]}; evaluate takes data and calibration"
        )
    images, (test, odd) = run.images, run.test_images(config)
    public, score = config.data.public, config.calibration and config.calibration.score
    if score is not None and (score.fitted or type(score).perturb is not OodScore.perturb):
        print(f"no AUROC: {type(score).__name__} needs a node's training data; give another --calibration.score", file=sys.stderr)
        score = None
    if public is not None and score is not None:
        public = public.load("train", images["size"], images["channels"], key="data.public")
        odd += collect_notes(("data.public", public))
        since = describe_change(public.identity, (images.get("data") or {}).get("public"))
        if since and difference(config.resolved, run.config.resolved, ("data.public",)) is None:
            odd.append(f"data.public: the images have changed since the run ({since})")
    print("".join(f"note: {note}\n" for note in odd), end="", file=sys.stderr)
    with explain_errors(config.resolved):
        judgements = [judged(run, module, test, public, score) for module in [*run.stack.modules, run.consensus()]]
    confusion = [judgement.pop("confusion") for judgement in judgements]
    nodes, consensus = judgements[:-1], judgements[-1]
    result: dict = {"run": str(run.folder.path), "images": len(test), "nodes": len(nodes)}
    for key in consensus:
        result[key] = summarise_nodes(torch.tensor([n[key] for n in nodes], dtype=torch.float64)) | {"consensus": consensus[key]}
    if per_class:
        result["per_class"] = to_json(by_class(torch.stack(confusion), run.describe()["classes"]), "evaluate")
    return result


def by_class(confusion: Tensor, names: list[str]) -> dict:
    """What ``evaluate`` says of every class, from counts [nodes and consensus, true class, answer]."""
    images = confusion[0].sum(1)
    right = confusion.diagonal(dim1=1, dim2=2).double() / images  # nan where there is no image
    *nodes, consensus = right.unbind()
    spread = [summarise_nodes(values) for values in torch.stack(nodes).unbind(1)]
    return {
        "classes": names,
        "images": images.tolist(),
        "accuracy": {key: [of[key] for of in spread] for key in spread[0]}
        | {"consensus": consensus.tolist(), "nodes": [values.tolist() for values in nodes]},
        "confusion": {"nodes": confusion[:-1].tolist(), "consensus": confusion[-1].tolist()},
    }


def judged(run: Run, module: NodeModule, test: Images, public: Images | None, score: OodScore | None) -> dict:
    """What is measured of one model: :data:`NAMES` (15 bins of confidence), and the ``confusion`` matrix [true class, answer]."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    outputs = run.outputs(module, test)
    classes, answers = outputs.logits.shape[1], outputs.logits.argmax(1)
    found: dict = {
        "confusion": (test.labels * classes + answers).bincount(minlength=classes**2).view(classes, classes),
        "accuracy": (answers == test.labels).double().mean().item(),
        "calibration_error": multiclass_calibration_error(outputs.logits.softmax(1), test.labels, classes, n_bins=15).item(),
    }
    if public is not None and score is not None:
        others = run.outputs(module, public)
        scores = compute_scores(score, Outputs.cat([outputs, others])).split([len(outputs), len(others)])
        found["auroc_test_against_public"] = metrics.auroc(*scores)
    return found


def show(result: dict) -> None:
    """Print what :func:`evaluate` found; of confusion matrices the consensus model's most frequent mistake."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    columns = ("node mean", "sd", "least", "most", "consensus")
    table = Table("", *columns, title=f"{result['run']}: {result['images']:,} images")
    for key, name in NAMES.items():
        if key in result:
            table.add_row(name, *(f"{v:.4f}" for v in result[key].values()))
    console = Console()
    console.print(table)
    if of := result.get("per_class"):
        table = Table("class", "images", "node mean", "worst node", "best node", "consensus", "it is taken for")
        for c, name in enumerate(of["classes"]):
            row = of["confusion"]["consensus"][c]
            wrong = max((i for i in range(len(row)) if i != c), key=row.__getitem__)
            mistake = f"{of['classes'][wrong]}, {row[wrong] / sum(row):.1%}" if row[wrong] else "-"
            values = (of["accuracy"][key][c] for key in ("node_mean", "node_min", "node_max", "consensus"))
            cells = ("-" if v is None else f"{v:.1%}" for v in values)
            table.add_row(escape(name), f"{of['images'][c]:,}", *cells, escape(mistake))
        console.print(table)
        print(f"confusion matrices of {result['nodes']} nodes and the consensus model: --json, or --export FOLDER")
