"""Losses of two short runs as they were: a change of the code that is to change no number must leave every bit.

`python tests/lightning_idkd/test_losses.py` stores those of this machine anew, where a change of numbers was meant.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from short_runs import SHORT

from lightning_idkd import Callback
from lightning_idkd.cli import main
from lightning_idkd.machine import describe_machine
from lightning_idkd.models import cpu_norms

CONFIG = Path(__file__).parents[3] / "configs" / "ring_digits.yaml"
STORED = Path(__file__).with_name("losses.json")
RUNS = {
    "digits": ["--distillation.start", "2"],
    "resnet": ["--node.network", "ResNet", "--node.network.depth", "8", "--node.network.width", "16",
               "--node.network.norm", "evonorm", "--graph.nodes", "6", "--graph.topology", "Grid",
               "--graph.topology.rows", "2", "--graph.topology.cols", "3", "--gossip", "DSGD",
               "--gossip.momentum", "0.9", "--gossip.nesterov", "true", "--gossip.weight_decay", "0.0001",
               "--data.augment", "crop_flip", "--distillation", "null", "--train.epochs", "2",
               "--data.private.limit", "400", "--data.partition", "IID"],
}  # fmt: skip


class Noting(Callback):
    """Keeps the losses of every node and step."""

    losses: list = []  # noqa: RUF012 (made by the command line, so found by the class)

    def on_step_end(self, losses):
        self.losses.append(losses.tolist())


def key() -> list:
    """What every bit depends on."""
    return [*describe_machine(), "fused norms" if cpu_norms.load_library() else "torch's norms"]


def losses(name: str, runs: Path) -> list[list[float]]:
    """Of every step and node."""
    Noting.losses.clear()
    noting = f"[{{class_path: {Noting.__module__}.Noting}}]"
    assert (
        main(["fit", "--config", str(CONFIG), *SHORT, *RUNS[name], "--callbacks", noting, "--run.dir", str(runs)]) == 0
    )
    return list(Noting.losses)


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_as_they_were(name, tmp_path):
    stored = json.loads(STORED.read_text())
    found = losses(name, tmp_path)
    assert len(found) == len(stored[name])
    if stored["machine"] == key():
        assert found == stored[name]
    else:  # another processor or torch rounds otherwise, which training amplifies
        found, stored = torch.tensor(found), torch.tensor(stored[name])
        torch.testing.assert_close(found[:5], stored[:5], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[-10:].mean(), stored[-10:].mean(), rtol=0.2, atol=0.1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["test_losses"] = sys.modules["__main__"]
    with tempfile.TemporaryDirectory() as folder:
        kept = {"machine": key(), **{name: losses(name, Path(folder)) for name in RUNS}}
    STORED.write_text(json.dumps(kept) + "\n")
