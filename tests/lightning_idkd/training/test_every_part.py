"""Every rule and every graph, from the command line to the summary, in seconds."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from short_runs import SHORT, checkpoint, latest, lines

from lightning_idkd import topologies
from lightning_idkd.callback import Gossip
from lightning_idkd.callbacks import gossip
from lightning_idkd.cli import main

PRESETS = sorted((Path(__file__).parents[3] / "configs" / "presets" / "rules").glob("*.yaml"))
TINY = [*SHORT, "--distillation", "null", "--calibration", "null", "--data.public", "null", "--data.partition", "IID",
        "--train.lr", "0.05", "--train.evaluate_samples", "32", "--node.network.width", "4"]  # fmt: skip
GRAPHS = {
    "Torus": (12, {"rows": 3, "cols": 4}),
    "Grid": (12, {"rows": 3, "cols": 4}),
    "Hypercube": (8, {}),
    "HypercubeOnePeer": (8, {}),
    "Margulis": (9, {}),
    "ErdosRenyi": (8, {"p": 0.5}),
    "WattsStrogatz": (8, {"k": 4, "p": 0.1}),
    "Social15": (15, {}),
    "Social32": (32, {}),
    "Karate34": (34, {}),
    "Petersen10": (10, {}),
    "Dyck32": (32, {}),
    "NetworkX": (8, {"generator": "barbell_graph", "arguments": {"m1": 3, "m2": 2}}),
}


@pytest.fixture(autouse=True)
def _limit():
    """A run that hangs fails."""

    def late(*_):
        raise TimeoutError("this takes longer than three minutes")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_rule_trains_a_network(preset, configs, tmp_path):
    config = ["--config", str(configs / "ring_digits.yaml"), "--config", str(preset)]
    assert main(["fit", *config, *TINY, "--train.evaluate_every", "1", "--run.dir", str(tmp_path)]) == 0
    losses = [line["train/loss"] for line in lines(latest(tmp_path)) if "train/loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.01


def test_every_rule_has_a_preset():
    used = {yaml.safe_load(path.read_text())["gossip"]["class_path"] for path in PRESETS}
    rules = (getattr(gossip, name) for name in gossip.__all__)
    assert {rule.__name__ for rule in rules if issubclass(rule, Gossip)} == used


@pytest.mark.parametrize("name", sorted(set(topologies.__all__) - {"Topology"}))
def test_every_graph_trains(name, configs, tmp_path):
    nodes, arguments = GRAPHS.get(name, (8, {}))
    if name == "EdgeList":
        (tmp_path / "edges.txt").write_text(
            "".join(f"{i} {(3 * i + 1) % 8}\n{i} {(i + 1) % 8}\n" for i in (0, 1, 2, 4, 5, 6, 7))
        )
        arguments = {"file": str(tmp_path / "edges.txt")}
    graph = {"nodes": nodes, "topology": {"class_path": name, "init_args": arguments}}
    (tmp_path / "graph.yaml").write_text(yaml.safe_dump({"graph": graph}))
    config = ["--config", str(configs / "ring_digits.yaml"), *TINY, "--config", str(tmp_path / "graph.yaml")]
    once = ["--train.epochs", "1", "--gossip", "DSGD", "--run.dir", str(tmp_path)]
    assert main(["fit", *config, *once]) == 0
    summary = json.loads((latest(tmp_path) / "summary.json").read_text())
    assert summary["nodes"] == nodes
    assert summary["communication"]["parameter_bytes"] > 0
    assert np.isfinite(checkpoint(latest(tmp_path))["X"].numpy()).all()
