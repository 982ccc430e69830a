"""A run, back in Python: nodes, graph, history; its models on other data, and as files for other programs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_idkd import metrics
from lightning_idkd.callback import OodScore
from lightning_idkd.cli import configure
from lightning_idkd.config import Config
from lightning_idkd.data.identity import by_name, changed, listed, notes
from lightning_idkd.data.source import Images
from lightning_idkd.errors import UserError, require
from lightning_idkd.evaluation import over_nodes
from lightning_idkd.fit import labelled, node_maker
from lightning_idkd.graph import Graph
from lightning_idkd.node import NodeModule, Outputs
from lightning_idkd.randomness import permutation
from lightning_idkd.run_folder import RunFolder, difference, write
from lightning_idkd.selection import fitting
from lightning_idkd.stack import NodeStack, mean_buffers, run_network

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH = 256


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

    def batches(self, images: Images) -> Iterator[torch.Tensor]:
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
        odd, before = notes(("data.private", test)), self.images.get("data")
        if before is None:
            allowed = f"{self.images['classes']}, as trained"
            require(len(test.classes) == self.images["classes"], "data.private: classes", len(test.classes), allowed)
            return test, odd
        names, test = test.classes, by_name(test, self.classes, "data.private: the test part")
        if names != self.classes:
            if lacking := [name for name in self.classes if name not in names]:
                of = f"{len(names)} classes of {len(self.classes)}"
                odd.append(f"data.private: the test images have {of}, without {listed(lacking)}")
            else:
                odd.append("data.private: the classes come in another order than in training; labels go by name")
        if test.stored != before["test"]["stored"]:
            shape = f"{test.size}x{test.size}, {test.channels} channel{'s' * (test.channels > 1)}"
            stored = f"{test.stored}, those of the run's test as {before['test']['stored']}"
            odd.append(f"data.private: the images are stored as {stored}; both are brought to {shape}")
        found, same = changed(test.identity, before["test"]), ("data.private", "data.image_size", "data.channels")
        if found and difference(config.resolved, self.config.resolved, same) is None:
            odd.append(f"data.private: the test images have changed since the run ({found})")
        return test, odd

    def export(self, folder: str | Path) -> list[Path]:
        """Write the consensus model's parameters and buffers as ``consensus.safetensors`` and as a plain state dict."""
        from safetensors.torch import save_file

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--export: cannot write '{folder}' ({e.strerror})") from e
        state = {k: v.detach().clone().contiguous() for k, v in self.consensus().network.state_dict().items()}
        write(folder / "consensus.safetensors", lambda part: save_file(state, part))
        write(folder / "consensus.pt", lambda part: torch.save(state, part))
        return [folder / "consensus.safetensors", folder / "consensus.pt"]


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


def evaluate(path: str, changes: list[str]) -> dict:
    """Accuracy and calibration error of nodes and consensus on a test set, and the AUROC of it against a public set.

    ``changes`` are options as for ``idkd fit``: other sets than those of the run, and another ``calibration.score``.

    Raises:
        UserError: an option changes what was trained.
    """
    run = load(path)
    config = configure(["--config", str(run.folder.file("config.yaml")), *changes])
    if found := difference(config.resolved, run.folder.config(), ("seed", "graph", "node", "train", "gossip", "distillation")):
        raise UserError(
            f"{found[0]}: {found[1]} given, but this run was trained with {found[2]}; evaluate takes data and calibration"
        )
    images, (test, odd) = run.images, run.test_images(config)
    print("".join(f"note: {note}\n" for note in odd), end="", file=sys.stderr)
    public, score = config.data.public, config.calibration and config.calibration.score
    if score is not None and (score.fitted or type(score).perturb is not OodScore.perturb):
        print(f"no AUROC: {type(score).__name__} needs a node's training data; give another --calibration.score", file=sys.stderr)
        score = None
    if public is not None and score is not None:
        public = public.load("train", images["size"], images["channels"], key="data.public")
    found = [judged(run, module, test, public, score) for module in [*run.stack.modules, run.consensus()]]
    nodes, consensus = found[:-1], found[-1]
    result: dict = {"run": str(run.folder.path), "images": len(test), "nodes": len(nodes)}
    for key in consensus:
        result[key] = over_nodes(torch.tensor([n[key] for n in nodes], dtype=torch.float64)) | {"consensus": consensus[key]}
    return result


def judged(run: Run, module: NodeModule, test: Images, public: Images | None, score: OodScore | None) -> dict[str, float]:
    """Accuracy, expected calibration error (15 bins), and AUROC of a score of one model."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    outputs = run.outputs(module, test)
    classes = outputs.logits.shape[1]
    found = {
        "accuracy": (outputs.logits.argmax(1) == test.labels).double().mean().item(),
        "calibration_error": multiclass_calibration_error(outputs.logits.softmax(1), test.labels, classes, n_bins=15).item(),
    }
    if public is not None and score is not None:
        others = run.outputs(module, public)
        found["ood_auroc"] = metrics.auroc(*fitting(score, Outputs.cat([outputs, others])).split([len(outputs), len(others)]))
    return found


def show(result: dict) -> None:
    """Print what :func:`evaluate` found."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "",
        "node mean",
        "sd",
        "worst or least",
        "best or most",
        "consensus",
        title=f"{result['run']}: {result['images']:,} images",
    )
    for key, values in result.items():
        if isinstance(values, dict):
            table.add_row(key.replace("_", " "), *(f"{v:.4f}" for v in values.values()))
    Console().print(table)
