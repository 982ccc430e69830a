"""Loads a run from its folder: nodes, graph, history and data. Exports its consensus model for other programs."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lightning_idkd.config import Config, yaml_file
from lightning_idkd.config.parse import configure
from lightning_idkd.config.resolved import difference
from lightning_idkd.config.trust import read_trusted
from lightning_idkd.data.identity import abridge, collect_notes, describe_change, renumber
from lightning_idkd.data.inputs import Inputs, restore
from lightning_idkd.data.samples import Samples
from lightning_idkd.errors import UserError, require
from lightning_idkd.files import write
from lightning_idkd.graph import Graph
from lightning_idkd.labels import Outputs
from lightning_idkd.links import Links
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.nodes.stack import NodeStack, mean_buffers, run_network
from lightning_idkd.randomness import permutation
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.training.build import load_labelled, load_samples, node_maker
from lightning_idkd.training.resume import EarlierRun

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_idkd.data.partition import Split

BATCH = 256
"""Samples of a batch of :meth:`Run.batches`."""


@dataclass(repr=False)
class Run:
    """A run as :func:`load` reads it from its folder."""

    folder: RunFolder
    config: Config
    stack: NodeStack
    """All nodes; ``stack.modules[i]`` is node i, ``stack.X`` [n, P] their parameters."""
    graph: Graph
    history: list[dict]
    """The lines of ``metrics.jsonl``."""
    summary: dict | None
    """``summary.json``; None where the run has not finished."""
    images: dict
    """Facts about the data: number of ``classes``, ``channels`` and ``size`` of images or ``columns`` of vectors,
    ``mean`` and ``std`` of the training samples per channel (of pixels from 0 to 255) or feature, and ``data``, the
    class names and the identity of every set (:func:`lightning_idkd.data.identity.record`;
    absent in runs from before identities were recorded)."""
    epoch: int
    """Number of epochs that the nodes have trained."""
    inputs: Inputs
    """Form of the samples, and how nodes take them."""
    trust: bool = False
    """Whether the config may name classes that are not part of this project."""
    final: bool = False
    """Whether the parameters are those after the final gossip, which ``summary`` describes."""

    def __repr__(self) -> str:
        count = self.stack.parameters + self.stack.frozen_parameters
        return f"Run('{self.folder.path}': {self.stack.n} nodes of {count:,} parameters, {self.epoch} epochs)"

    def consensus(self) -> NodeModule:
        """The consensus model, which is the mean of all honest nodes, in evaluation mode."""
        honest = torch.from_numpy(self.honest)
        buffers = {name: b[honest] for name, b in self.stack.buffers.items()}
        return self.stack.model(self.stack.X[honest].mean(0), mean_buffers(buffers))

    @property
    def honest(self) -> np.ndarray:
        """bool [n], the nodes that do not lie."""
        return Links(self.graph, self.config.faults, self.config.seed).honest

    def batches(self, samples: Samples) -> Iterator[Tensor]:
        """Batches of ``samples`` as the nodes take them: scaled, images [b, C, S, S] or vectors [b, F]."""
        for values in samples.values.split(BATCH):
            yield self.inputs.scale(self.inputs.arrange(values))

    def outputs(self, module: NodeModule, samples: Samples) -> Outputs:
        """Outputs of one model on ``samples``, in their order.

        The batches are shuffled as in the run's own evaluation, because a network may use statistics of its batch and
        many sets are stored class by class.
        """
        order = permutation(len(samples), 0, "examined")
        return run_network(module, self.batches(samples[order]))[order.argsort()]

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the network's outputs; None for runs from before class names were stored."""
        return tuple(self.images["data"]["classes"]) if self.images.get("data") else None

    def test_images(self, config: Config | None = None) -> tuple[Samples, list[str]]:
        """The test samples of the run, or of a ``config`` with other data, and notes about them in sentences.

        The samples have the form of the run's. Their labels number the run's classes, whatever the order of the
        classes in the set is.

        Raises:
            UserError: a sample has no label, or a class that the run has not trained on.
        """
        config = config or self.config
        test, what = load_labelled(config, "test", self.inputs), self.inputs.plural
        notes, before = collect_notes(("data.private", test)), self.images.get("data")
        if before is None:  # a run from before class names were stored
            allowed = f"{self.images['classes']}, as trained"
            require(len(test.classes) == self.images["classes"], "data.private: classes", len(test.classes), allowed)
            return test, notes
        names, test = test.classes, renumber(test, self.classes, "data.private: the test part")
        if missing := [name for name in self.classes if name not in names]:
            has = f"{len(names)} classes of {len(self.classes)}"
            notes.append(f"data.private: the test {what} have {has}, without {abridge(missing)}")
        elif names != self.classes:
            notes.append("data.private: the classes come in another order than in training; labels go by name")
        if test.stored != before["test"]["stored"]:
            stored = f"{test.stored}, those of the run's test as {before['test']['stored']}"
            notes.append(f"data.private: the {what} are stored as {stored}; both are brought to {self.inputs.form}")
        keys = ("data.private", "data.image_size", "data.channels")
        change = describe_change(test.identity, before["test"])
        if change and difference(config.resolved, self.config.resolved, keys) is None:
            notes.append(f"data.private: the test {what} have changed since the run ({change})")
        return test, notes

    def test(self) -> Samples:
        """The run's test samples (images have uint8 ``pixels`` [N, C, S, S]), with labels [N] that number the run's
        classes.

        Raises:
            UserError: the set is missing, or a sample has no label or a class that the run has not trained on.
        """
        return self.test_images()[0]

    def train(self, node: int) -> Samples:
        """The private samples and labels that ``node`` trains on.

        Raises:
            UserError: the set is missing, or has changed since the run.
        """
        return self._select(node, "train")

    def held_out(self, node: int) -> Samples:
        """The private samples and labels that ``node`` holds out for validation and calibration.

        Raises:
            UserError: as for :meth:`train`.
        """
        return self._select(node, "validation")

    def _select(self, node: int, part: str) -> Samples:
        require(0 <= node < self.stack.n, "node", node, f"0 to {self.stack.n - 1}")
        samples, split = self._private
        return samples[getattr(split, part)[node]]

    def public(self) -> Samples | None:
        """The public samples, with labels if the set has them; None for a run without a public set."""
        source = self.config.data.public
        return source and source.load_like("train", self.inputs, key="data.public")

    @functools.cached_property
    def _private(self) -> tuple[Samples, Split]:
        this_run = EarlierRun(str(self.folder.path), self.images.get("data"), ("train",))
        samples, _, _, split = load_samples(self.config, this_run)
        if split.hash != self.folder.partition_hash():
            others = f"the nodes' samples are not those of '{self.folder.path}'"
            raise UserError(f"data.partition: {others}; the files of data.private have changed")
        return samples, split

    def describe(self) -> dict:
        """The facts that another program needs besides the parameters.

        They are the ``run``, its ``epochs``, ``classes`` in the order of the outputs, ``mean`` and ``std`` of every
        channel (for pixels from 0 to 255) or feature, ``size`` and ``channels`` of images or ``columns`` of vectors,
        and the ``config``.
        """
        return {
            "run": f"{self.folder.path.parent.name}/{self.folder.path.name}",
            "epochs": self.epoch,
            "classes": list(self.classes or map(str, range(self.images["classes"]))),
            "mean": self.images["mean"].tolist(),
            "std": self.images["std"].tolist(),
            **self.inputs.facts(),
            "config": self.config.resolved,
        }

    def export(self, folder: str | Path, evaluation: dict | None = None, licence: str = "unknown") -> list[Path]:
        """Write the consensus model for other programs.

        ``model.safetensors`` holds its parameters and buffers under the network's own names, ``config.json`` (and the
        metadata of ``model.safetensors``) what :meth:`describe` returns, and ``model.pt2`` a program of torch.export
        that takes samples as they are stored. ``network.py`` is the network in plain torch, for built-in networks, and
        ``README.md`` a model card. ``consensus.safetensors`` and ``consensus.json`` are former names of the first two.

        Args:
            evaluation: what :func:`~lightning_idkd.analysis.evaluate.evaluate` returns for the run's own test set, for
                the card; without one, the card has the accuracies of ``summary.json``.
            licence: the licence of the parameters, by its name on the Hugging Face hub.

        Returns:
            The files, without the former names.

        Raises:
            UserError: the folder cannot be written.
        """
        from lightning_idkd.analysis import export, model_card

        folder, module, about = export.make_folder(folder), self.consensus(), self.describe()
        network: nn.Module = module.network
        about |= {
            "architectures": [type(network).__name__],
            "id2label": dict(enumerate(about["classes"])),
            "config": export.shorten_paths(about["config"]),
        }
        files = export.write_parameters(folder, network, about)
        files += export.write_program(folder, module, self.inputs)
        card = model_card.write_card(
            about,
            self.inputs,
            self.images.get("data"),
            self.summary if self.final else None,
            evaluation,
            licence,
            parameters=sum(p.numel() for p in network.parameters()),
            has_program=files[-1].name == export.PROGRAM,
            depends_on_batch=export.depends_on_batch(network),
        )
        write(folder / "README.md", lambda part: part.write_text(card, encoding="utf-8"), "--export")
        return [*files, folder / "README.md"]


def load(path: str | Path, checkpoint: str | None = None, trust: bool = False) -> Run:
    """Load a run from its folder, such as ``runs/X/latest``. This needs none of the run's data, and runs no code that
    does not come with this project or with torchvision, unless you trust the run.

    Args:
        path: the run folder.
        checkpoint: a file in ``checkpoints/``; None for the parameters after the final gossip, or, of an unfinished
            run, the last ones saved.
        trust: whether the run's config may name other classes, such as your own; to load them is to run their code.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or it asks for code that needs ``trust``.
    """
    folder = RunFolder(Path(path).resolve())
    if not folder.file("config.yaml").exists():
        raise UserError(f"'{path}' is not a run folder; give one such as runs/NAME/latest")
    final = folder.file("checkpoints/final.ckpt")
    file = folder.file(f"checkpoints/{checkpoint}") if checkpoint else (final if final.exists() else folder.last)
    if not file.exists():
        names = ", ".join(sorted(f.name for f in file.parent.glob("*.ckpt")))
        raise UserError(f"'{path}' has no checkpoint {file.name}; it has: {names or 'none yet'}")
    config = configure_run(folder, [], trust)
    state = RunFolder.load(file)
    images, dtype = state["images"], torch.float64 if config.run.precision == 64 else torch.float32
    inputs = restore(images, dtype)
    graph = config.graph.build(config.seed)
    stack = NodeStack(
        node_maker(config, inputs, images["classes"]),
        range(graph.nodes),
        config.seed,
        dtype=dtype,
    )
    stack.restore(state)
    for module in stack.modules:
        module.eval()
    history, summary = folder.metrics(), folder.summary()
    return Run(folder, config, stack, graph, history, summary, images, state["epoch"], inputs, trust, file == final)


def configure_run(folder: RunFolder, changes: list[str], trust: bool) -> Config:
    """Parse the config of a run, with ``changes`` as for ``idkd fit``.

    Raises:
        UserError: a mistake in the changes, or the config is damaged or names classes that need ``trust``.
    """
    file = folder.file("config.yaml")
    if trust:
        return configure(["--config", str(file), *changes])
    config = read_trusted(file)
    # a copy, because the parser works in the folder of the file that it reads, from where Python may import modules
    with tempfile.TemporaryDirectory() as private:
        copy = Path(private) / "config.yaml"
        copy.write_text(yaml_file.write(config), encoding="utf-8")
        try:
            return configure(["--config", str(copy), *changes])
        except UserError as e:
            raise UserError(str(e).replace(str(copy), str(file))) from e
