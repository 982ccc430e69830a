"""A finished run, back in Python and in files."""

from __future__ import annotations

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix

import lightning_idkd
from lightning_idkd.analysis.evaluate import NAMES
from lightning_idkd.analysis.report import measure_confusion
from lightning_idkd.cli import main
from lightning_idkd.data import Digits
from lightning_idkd.errors import UserError
from lightning_idkd.records import report

SHORT = ["--logger", "null", "--graph.nodes", "4", "--train.epochs", "3",
         "--train.evaluate_every", "2", "--distillation.start", "2", "--data.public.samples", "200",
         "--run.engine", "loop", "--run.threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from pathlib import Path

    folder = tmp_path_factory.mktemp("loaded")
    config = Path(__file__).parents[3] / "configs" / "ring_digits.yaml"
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
    torch.testing.assert_close(
        after.consensus().network.head.bias, before.stack.X[:, -10:].mean(0), rtol=1e-4, atol=1e-6
    )


def test_a_damaged_final_checkpoint_is_named_with_those_that_can_be_loaded_instead(run, tmp_path, capsys):
    copy = shutil.copytree(run.resolve(), tmp_path / "copy")
    final = copy / "checkpoints" / "final.ckpt"
    final.write_bytes(final.read_bytes()[:-1])
    assert main(["evaluate", str(copy)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: checkpoint '{final}' is damaged (")
    assert said.endswith("; whole ones beside it: best.ckpt, last.ckpt, previous.ckpt\n")
    assert lightning_idkd.load(copy, "last.ckpt").epoch == 3


def test_a_run_that_is_being_written_is_loaded_without_its_cut_line(run, tmp_path):
    copy = shutil.copytree(run.resolve(), tmp_path / "copy")
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "ste')
    assert lightning_idkd.load(copy).history == lightning_idkd.load(run).history


def test_evaluate_finds_what_the_run_found(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for key in ("node_mean", "node_std", "node_min", "node_max", "consensus"):
        assert found["accuracy"][key] == pytest.approx(summary["accuracy"][key])
    assert 0 < found["calibration_error"]["node_mean"] < 1
    assert 0 < found["auroc_test_against_public"]["consensus"] < 1
    assert "per_class" not in found


def answers(run):
    """What every node and the consensus model answer to the digits' test images, without the evaluation's code."""
    loaded, digits = lightning_idkd.load(run), Digits().load("test")
    x = (digits.pixels.float() - loaded.images["mean"][:, None, None]) / loaded.images["std"][:, None, None]
    with torch.no_grad():
        return [module.eval()(x).argmax(1) for module in [*loaded.stack.modules, loaded.consensus()]], digits.labels


def test_per_class_gives_every_nodes_confusion_matrix_and_accuracy_by_class(run, capsys, tmp_path):
    arguments = ["evaluate", str(run), "--per-class", "--export", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)["per_class"]
    assert json.loads((tmp_path / "per_class.json").read_text()) == found
    assert str(tmp_path / "per_class.json") in said.err
    of_all, labels = answers(run)
    *nodes, consensus = (confusion_matrix(labels, of_one, labels=range(10)) for of_one in of_all)
    assert np.array_equal(found["confusion"]["nodes"], nodes)
    assert np.array_equal(found["confusion"]["consensus"], consensus)
    accuracy = np.array([m.diagonal() / m.sum(1) for m in nodes])
    assert np.allclose(found["accuracy"]["nodes"], accuracy)
    for key, values in (("node_mean", accuracy.mean(0)), ("node_min", accuracy.min(0)), ("node_max", accuracy.max(0)),
                        ("node_std", accuracy.std(0)),
                        ("consensus", consensus.diagonal() / consensus.sum(1))):  # fmt: skip
        assert np.allclose(found["accuracy"][key], values)
    assert found["classes"] == list("0123456789")
    assert found["images"] == consensus.sum(1).tolist()
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"{accuracy.mean(0)[3]:.1%}" in next(line for line in said.splitlines() if line.startswith("│ 3 "))
    assert str(tmp_path / "per_class.json") in said


def test_a_class_without_a_test_image_has_no_accuracy(run, tmp_path, capsys):
    write_digits(tmp_path)
    shutil.rmtree(tmp_path / "test" / "7")
    images = ["--data.private", "ImageFolder", "--data.private.path", str(tmp_path)]
    for form in ([], ["--json"]):
        assert main(["evaluate", str(run), "--per-class", *form, *images]) == 0
    said = capsys.readouterr().out
    found = json.loads(said[said.index("{") :])["per_class"]
    assert found["images"][7] == 0
    assert found["accuracy"]["node_mean"][7] is None
    assert found["accuracy"]["nodes"][0][7] is None
    assert None not in found["accuracy"]["node_mean"][:7]
    row = next(line for line in said.splitlines() if line.startswith("│ 7 "))
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["0", *"-----"]


def test_both_aurocs_are_named_for_what_they_compare(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    summary = json.loads((run / "summary.json").read_text())
    shown = dict(report.list_results(summary))["AUROC, held-out own against public samples"]
    assert f"{summary['ood']['auroc']:.3f}" == shown
    assert main(["evaluate", str(run), "--calibration.score", "Energy"]) == 0
    assert "AUROC, test against public samples" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert set(NAMES) == {"accuracy", "calibration_error", "auroc_test_against_public"}


def write_digits(folder):
    """The digits' test images as files, by class."""
    from PIL import Image

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
    images = ["--data.private", "ImageFolder", "--data.private.path", str(tmp_path)]
    assert main(["evaluate", str(run), "--json", *images]) == 0
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
    assert json.loads(capsys.readouterr().out)["accuracy"]["node_mean"] == pytest.approx(
        summary["accuracy"]["node_mean"]
    )


def test_evaluate_takes_another_score_but_no_other_training(run, capsys):
    auroc = {}
    for score in ("MSP", "Energy", "KNN"):
        assert main(["evaluate", str(run), "--json", "--calibration.score", score]) == 0
        said = capsys.readouterr()
        auroc[score] = json.loads(said.out).get("auroc_test_against_public", {}).get("consensus")
    assert auroc["MSP"] != auroc["Energy"]
    assert auroc["KNN"] is None
    assert "KNN needs a node's training data" in said.err
    assert main(["evaluate", str(run), "--train.lr", "3"]) == 2
    assert "train.lr: 3.0 given" in capsys.readouterr().err


def test_the_consensus_model_is_exported_as_safetensors(run, tmp_path):
    assert main(["evaluate", str(run), "--export", str(tmp_path / "out")]) == 0
    safe = load_file(tmp_path / "out" / "model.safetensors")
    loaded = lightning_idkd.load(run)
    network = loaded.config.node.network.build(1, 8, 10)  # the architecture alone, as another program would have it
    network.load_state_dict(safe)
    network.eval()
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(x), loaded.consensus().network(x))  # other memory formats, so not bit-equal
    assert load_file(tmp_path / "out" / "consensus.safetensors").keys() == safe.keys()  # its former name


def test_an_export_says_how_to_use_it_in_metadata_and_in_a_file_beside_it(run, tmp_path):
    files = lightning_idkd.load(run).export(tmp_path)
    names = ["model.safetensors", "config.json", "network.py", "model.pt2", "README.md"]
    assert [f.name for f in files] == names
    about = json.loads((tmp_path / "config.json").read_text())
    assert json.loads((tmp_path / "consensus.json").read_text()) == about
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("format") == "pt"
    assert metadata.keys() == about.keys()
    assert metadata.pop("run") == about["run"] == f"ring_digits/{run.resolve().name}"
    assert {k: json.loads(v) for k, v in metadata.items()} == {k: v for k, v in about.items() if k != "run"}
    train = json.loads((run / "partition.json").read_text())["indices"]["train"]
    pixels = Digits().load("train").pixels[sorted(i for node in train for i in node)].double()
    assert about["mean"] == pytest.approx([pixels.mean().item()], rel=1e-6)
    assert about["std"] == pytest.approx([pixels.std(correction=0).item()], rel=1e-6)
    assert about["classes"] == list("0123456789")
    assert (about["size"], about["channels"], about["epochs"]) == (8, 1, 3)
    assert about["id2label"] == {str(i): str(i) for i in range(10)}
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["run"]["dir"] = run.parents[1].name  # an absolute path keeps its last part
    assert about["config"] == config


def test_a_run_that_is_older_than_stored_class_names_numbers_them(run):
    loaded = lightning_idkd.load(run)
    del loaded.images["data"]
    assert loaded.describe()["classes"] == [str(c) for c in range(10)]


def test_a_run_gives_its_own_images(run):
    loaded, digits = lightning_idkd.load(run), Digits().load("train")
    written, test = json.loads((run / "partition.json").read_text())["indices"], loaded.test()
    assert torch.equal(test.pixels, Digits().load("test").pixels)
    right = (loaded.outputs(loaded.consensus(), test).logits.argmax(1) == test.labels).double().mean().item()
    assert right == pytest.approx(loaded.summary["accuracy"]["consensus"])
    for node in range(4):
        for found, part in ((loaded.train(node), "train"), (loaded.held_out(node), "validation")):
            index = written[part][node]
            assert torch.equal(found.pixels, digits.pixels[index])
            assert torch.equal(found.labels, digits.labels[index])
    assert len(loaded.public()) == 200
    (batch,) = loaded.batches(test[:5])
    expected = (test.pixels[:5] - loaded.images["mean"][:, None, None]) / loaded.images["std"][:, None, None]
    torch.testing.assert_close(batch, expected)


def test_a_run_whose_images_have_changed_gives_no_private_ones(run, tmp_path, monkeypatch):
    loaded = lightning_idkd.load(run)
    monkeypatch.setattr(type(loaded.folder), "partition_hash", lambda folder: "another")
    with pytest.raises(UserError, match="samples are not those of"):
        loaded.train(0)


def test_every_file_has_the_permissions_that_the_user_asks_for(tmp_path, monkeypatch, configs):
    monkeypatch.setenv("IDKD_CACHE", str(tmp_path / "cache"))
    mask = 0o027
    before = os.umask(mask)
    try:
        short = [*SHORT, "--train.epochs", "1", "--distillation", "null",
                 "--run.dir", str(tmp_path), "--logger.kind", "csv"]  # fmt: skip
        assert main(["fit", "--config", str(configs / "ring_digits.yaml"), *short[2:]]) == 0
        made = tmp_path / "ring_digits" / "latest"
        assert main(["evaluate", str(made), "--export", str(tmp_path / "out"), "--per-class"]) == 0
        assert main(["report", str(made)]) == 0
        assert main(["compare", str(tmp_path), "--plot", str(tmp_path / "compare.png")]) == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    assert {"consensus.safetensors", "summary.json", "final.ckpt", "graph.png", "report.md", "metrics.csv"} <= {
        path.name for path in files
    }  # fmt: skip
    for path in files:
        whole = 0o777 if path.is_dir() or path.suffix == ".so" else 0o666
        assert path.stat().st_mode & 0o777 == whole & ~mask, path


def test_the_final_table_names_the_score_and_gives_its_threshold_as_a_probability_too(run):
    summary = json.loads((run / "summary.json").read_text())
    ood = summary["ood"]
    assert ood["threshold_probability"] == pytest.approx(1 / (1 + math.exp(-ood["threshold"])))
    assert dict(report.list_results(summary))["threshold"] == (
        f"{ood['threshold']:.3f} (MSP, log-odds of the top class; probability {ood['threshold_probability']:.3f})"
    )
    for older in ("score", "threshold_probability"):
        del ood[older]
    assert dict(report.list_results(summary))["threshold"] == f"{ood['threshold']:.3f}"
    none = dict(report.list_results(summary | {"ood": dict.fromkeys(ood), "exchanges": []}))
    # nothing was selected
    assert not none.keys() & {"threshold", "public set", "AUROC, held-out own against public samples"}
    assert none["heterogeneity"] == f"{summary['homogeneity']['before']:.3f}"
    assert none.keys() < dict(report.list_results(summary)).keys()


def test_people_read_heterogeneity_and_files_keep_homogeneity(run, tmp_path, capsys, configs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(configs / "ring_digits.yaml")
    assert main(["fit", "--config", config, *SHORT, "--run.pictures", "false", "--run.dir", str(tmp_path)]) == 0
    assert main(["report", str(tmp_path / "ring_digits" / "latest")]) == 0
    assert main(["partition", "--config", config]) == 0
    assert main(["compare", str(tmp_path), "--metrics", "homogeneity/after", "--format", "markdown"]) == 0
    said = capsys.readouterr().out + (tmp_path / "ring_digits" / "latest" / "report.md").read_text()
    for line in ("samples a node, heterogeneity 0.", "│ heterogeneity ", "labels     heterogeneity 0.",
                 "| heterogeneity after distillation |", "| heterogeneity | 0."):  # fmt: skip
        assert line in said
    assert "homogeneity" not in said
    assert json.loads((run / "summary.json").read_text())["homogeneity"].keys() >= {"before", "after"}
    assert "homogeneity/after" in json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_report_holds_numbers_pictures_and_config(run, capsys):
    assert main(["report", str(run)]) == 0
    text = (run / "report.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['accuracy']['node_mean']:.2%}" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (run / line.split("(")[1].rstrip(")")).exists()
    assert text.count("![") == 5
    assert "class_path: lightning_idkd.callbacks.IDKD" in text
    page, stored = (run / "report.html").read_text(), json.loads((run / "plots" / "report.json").read_text())
    assert f"<dd>{summary['accuracy']['node_mean']:.1%}</dd>" in page
    assert page.count('class="small"') == 4  # histograms of the nodes' scores
    loaded = lightning_idkd.load(run)
    for node in range(4):
        assert stored["label_mass"]["before"][node] == loaded.train(node).labels.bincount(minlength=10).tolist()
    after = np.array(stored["label_mass"]["after"])
    sizes = [len(loaded.train(node)) + summary["exchanges"][-1]["distilled"][node] for node in range(4)]
    assert after.sum(1) == pytest.approx(sizes, abs=0.01)
    test = loaded.test()
    said = loaded.outputs(loaded.consensus(), test).logits.argmax(1)
    assert np.array_equal(measure_confusion(loaded.folder, False).counts, confusion_matrix(test.labels, said))


@pytest.mark.parametrize("command", [["evaluate"], ["report"]])
def test_a_folder_without_a_run_is_refused(command, tmp_path, capsys):
    assert main([*command, str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(UserError, match="not a run folder"):
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
    short = ["--train.epochs", "2", "--distillation.start", "1", "--graph.nodes", "4"]
    assert main(["fit", "--config", "config.yaml", *short]) == 0
    (line,) = (tmp_path / "mine" / "runs" / "mine" / "latest" / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["spread"] == pytest.approx(found["accuracy/node_max"] - found["accuracy/node_min"])
    loaded = lightning_idkd.load(tmp_path / "mine" / "runs" / "mine" / "latest", trust=True)
    assert loaded.summary["spread"] == found["spread"]
    assert main(["init", str(tmp_path / "mine")]) == 2
    assert "exists already" in capsys.readouterr().err
