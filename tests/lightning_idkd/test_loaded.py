"""A finished run, back in Python and in files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import lightning_idkd
from lightning_idkd.cli import main
from lightning_idkd.errors import UserError

SHORT = ["--logger", "null", "--graph.nodes", "4", "--train.epochs", "3", "--train.evaluate_every", "2",
         "--distillation.start", "2", "--data.public.samples", "200", "--run.engine", "loop", "--run.threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from pathlib import Path

    folder = tmp_path_factory.mktemp("loaded")
    config = Path(__file__).parents[2] / "configs" / "ring_digits.yaml"
    assert main(["fit", "--config", str(config), *SHORT, "--run.dir", str(folder), "--train.final_gossip", "2"]) == 0
    return folder / "ring_digits" / "latest"


def test_load_gives_nodes_graph_history_and_summary(run):
    loaded = lightning_idkd.load(run)
    assert (loaded.stack.n, loaded.graph.nodes, loaded.graph.name) == (4, 4, "Ring")
    assert [line["epoch"] for line in loaded.history] == [2, 3]
    assert loaded.summary == json.loads((run / "summary.json").read_text())
    assert loaded.stack.views_intact()
    assert not any(module.training for module in loaded.stack.modules)


def test_it_shows_itself_in_a_line(run):
    for checkpoint in (None, "best.ckpt"):
        loaded = lightning_idkd.load(run, checkpoint)
        parameters, epochs = f"{loaded.summary['parameters']:,}", 2 if checkpoint else 3
        assert repr(loaded) == f"Run('{run.resolve()}': 4 nodes of {parameters} parameters, {epochs} epochs)"


def test_its_rows_are_those_after_the_final_gossip_and_the_last_checkpoints_those_before(run):
    after, before = lightning_idkd.load(run), lightning_idkd.load(run, "last.ckpt")
    W = torch.tensor(after.graph.mixing(0).W, dtype=torch.float32)
    torch.testing.assert_close(after.stack.X, W @ W @ before.stack.X, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after.consensus().network.head.bias, before.stack.X[:, -10:].mean(0), rtol=1e-4, atol=1e-6)


def test_evaluate_finds_what_the_run_found(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for key in ("node_mean", "node_std", "node_min", "node_max", "consensus"):
        assert found["accuracy"][key] == pytest.approx(summary["accuracy"][key])
    assert 0 < found["calibration_error"]["node_mean"] < 1
    assert 0 < found["ood_auroc"]["consensus"] < 1


def write_digits(folder):
    """The digits' test images as files, by class."""
    from PIL import Image

    from lightning_idkd.data import Digits

    for part in ("train", "test"):
        digits = Digits().load(part)
        for i, (pixels, label) in enumerate(zip(digits.pixels, digits.labels.tolist(), strict=True)):
            place = folder / part / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0].numpy()).save(place / f"{i}.png")


def test_evaluate_on_other_images(run, tmp_path, capsys):
    """The run's own test images, in another order."""
    write_digits(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert main(["evaluate", str(run), "--json", "--data.private", "ImageFolder", "--data.private.path", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"]["node_mean"] == pytest.approx(summary["accuracy"]["node_mean"])


def test_evaluate_finds_what_a_run_found_whose_network_looks_at_its_batch(tmp_path, configs, capsys):
    """On images that are stored class by class."""
    write_digits(tmp_path / "images")
    images = ["--data.private", "ImageFolder", "--data.private.path", str(tmp_path / "images")]
    arguments = ["fit", "--config", str(configs / "ring_digits.yaml"), *SHORT, "--run.dir", str(tmp_path), *images]
    assert main([*arguments, "--node.network.norm", "batch_statistics"]) == 0
    run = tmp_path / "ring_digits" / "latest"
    capsys.readouterr()
    assert main(["evaluate", "--json", str(run)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads(capsys.readouterr().out)["accuracy"]["node_mean"] == pytest.approx(summary["accuracy"]["node_mean"])


def test_evaluate_takes_another_score_but_no_other_training(run, capsys):
    auroc = {}
    for score in ("MSP", "Energy", "KNN"):
        assert main(["evaluate", str(run), "--json", "--calibration.score", score]) == 0
        said = capsys.readouterr()
        auroc[score] = json.loads(said.out).get("ood_auroc", {}).get("consensus")
    assert auroc["MSP"] != auroc["Energy"]
    assert auroc["KNN"] is None
    assert "KNN needs a node's training data" in said.err
    assert main(["evaluate", str(run), "--train.lr", "3"]) == 2
    assert "train.lr: 3.0 given" in capsys.readouterr().err


def test_the_consensus_model_is_exported_as_safetensors_and_as_a_plain_state_dict(run, tmp_path):
    assert main(["evaluate", str(run), "--export", str(tmp_path / "out")]) == 0
    plain = torch.load(tmp_path / "out" / "consensus.pt", weights_only=True)
    safe = load_file(tmp_path / "out" / "consensus.safetensors")
    loaded = lightning_idkd.load(run)
    network = loaded.config.node.network.build(1, 8, 10)  # the architecture alone, as another program would have it
    network.load_state_dict(safe)
    network.eval()
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(x), loaded.consensus().network(x))  # other memory formats, so not bit-equal
    assert plain.keys() == safe.keys()
    assert all(torch.equal(plain[k], safe[k]) for k in plain)


def test_a_report_holds_numbers_pictures_and_config(run, capsys):
    assert main(["report", str(run)]) == 0
    text = (run / "report.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['accuracy']['node_mean']:.2%}" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (run / line.split("(")[1].rstrip(")")).exists()
    assert text.count("![") == 5
    assert "class_path: callbacks.IDKD" in text


@pytest.mark.parametrize("command", [["evaluate"], ["report"]])
def test_what_is_no_run(command, tmp_path, capsys):
    assert main([*command, str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(UserError, match="no run folder"):
        lightning_idkd.load(tmp_path)


def test_a_checkpoint_that_is_not_there(run):
    with pytest.raises(UserError, match=r"epoch_9\.ckpt; it has: .*final\.ckpt, last\.ckpt"):
        lightning_idkd.load(run, "epoch_9.ckpt")


def test_init_writes_an_experiment_that_runs(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine"]) == 0
    assert "cd mine && idkd fit --config config.yaml" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert main(["fit", "--config", "config.yaml", "--train.epochs", "2", "--distillation.start", "1", "--graph.nodes", "4"]) == 0
    (line,) = (tmp_path / "mine" / "runs" / "mine" / "latest" / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["spread"] == pytest.approx(found["accuracy/node_max"] - found["accuracy/node_min"])
    assert lightning_idkd.load(tmp_path / "mine" / "runs" / "mine" / "latest").summary["spread"] == found["spread"]
    assert main(["init", str(tmp_path / "mine")]) == 2
    assert "exists already" in capsys.readouterr().err
