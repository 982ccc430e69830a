"""Whole runs: their files and numbers, processes, and one node beside a plain trainer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from short_runs import SHORT, checkpoint, command_of, extra, latest, lines, same

from lightning_idkd import Callback, NodeModule
from lightning_idkd.cli import main
from lightning_idkd.config.parse import configure
from lightning_idkd.data import Glyphs
from lightning_idkd.labels import MEASURES
from lightning_idkd.records import report


class Add(Callback):
    """Adds metrics, one of them with a name that is taken."""

    def on_evaluation_end(self, metrics):
        metrics |= {"drift": 1.0, "spread/accuracy": 2.0, "accuracy/median": 3.0, "ood/mine": 4.0, "nodes": 5.0}


class Lightnings(NodeModule):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)


class Mislabelled(Glyphs):
    """Glyphs whose own labels are all wrong."""

    def load(self, *arguments, **options):
        images = super().load(*arguments, **options)
        return replace(images, labels=images.labels.flip(0))


class Both(Callback):
    """A metric of the name of another one's area."""

    def on_evaluation_end(self, metrics):
        metrics |= {"mine": 1.0, "mine/more": 2.0}


class TestFiles:
    def test_a_run_leaves_the_promised_files_and_keys(self, fit):
        assert fit("--run.pictures", "true") == 0
        run = latest(fit.runs)
        for name in (
            "config.yaml",
            "metrics.jsonl",
            "summary.json",
            "partition.json",
            "checkpoints/last.ckpt",
            "plots/accuracy.png",
            "plots/graph.png",
            "plots/labels.png",
            "plots/scores.png",
            "plots/roc.png",
        ):
            assert (run / name).stat().st_size > 0, name
        assert not list(run.rglob("*.part"))
        summary = json.loads((run / "summary.json").read_text())
        assert summary["name"] == "ring_digits"
        assert (summary["nodes"], summary["epochs"], summary["engine"], summary["from"]) == (4, 6, "loop", None)
        assert summary["accuracy"].keys() == {
            "node_mean",
            "node_std",
            "node_min",
            "node_max",
            "consensus",
            "node_mean_before_final_gossip",
        }
        assert summary["communication"].keys() >= {"parameter_bytes", "label_bytes", "other_bytes", "messages"}
        assert summary["ood"].keys() >= {"auroc", "threshold", "kept_fraction"}
        assert summary["homogeneity"].keys() >= {"before", "after"}
        assert summary["throughput"].keys() == {"samples_per_second", "seconds"}
        assert summary.keys() >= {"seed", "steps", "consensus_distance", "peak_memory_bytes", "git_commit"}

    def test_parameter_bytes_are_two_messages_a_node_and_step_on_a_ring(self, fit):
        fit("--train.final_gossip", "3")
        summary = json.loads((latest(fit.runs) / "summary.json").read_text())
        mixings = summary["steps"] + 3
        assert summary["communication"]["parameter_bytes"] == 4 * 2 * 4 * summary["parameters"] * mixings
        exchanges = 2  # before epochs 3 and 5
        assert summary["communication"]["messages"] == 4 * 2 * (mixings + exchanges)

    def test_a_final_merge_makes_all_nodes_the_consensus_model_and_costs_an_all_reduce(self, fit):
        fit("--train.final_gossip", "2", "--train.final_merge", "true", "--distillation", "null")
        summary = json.loads((latest(fit.runs) / "summary.json").read_text())
        row, accuracy = 4 * summary["parameters"], summary["accuracy"]
        assert summary["communication"]["parameter_bytes"] == row * (4 * 2 * (summary["steps"] + 2) + 2 * 3)
        assert summary["communication"]["overhead_at_equal_epochs"] == 0
        assert accuracy["node_min"] == accuracy["node_max"] == accuracy["consensus"]
        assert summary["consensus_distance"] == 0
        assert "node accuracy, after 2 final gossip and the exact mean" in dict(report.list_results(summary))

    def test_the_written_config_reproduces_the_run(self, fit, tmp_path):
        fit()
        run = latest(fit.runs)
        assert main(["fit", "--config", str(run / "config.yaml"), "--run.dir", str(tmp_path / "again")]) == 0
        assert same(checkpoint(run), checkpoint(latest(tmp_path / "again"))) is None

    def test_the_best_checkpoint_is_that_of_the_best_validation_consensus(self, fit):
        fit("--train.evaluate_every", "1", "--train.lr", "0.3")
        run = latest(fit.runs)
        scores = {line["epoch"]: line["validation/consensus"] for line in lines(run) if line["phase"] != "final"}
        best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
        assert best["epoch"] == max(scores, key=scores.get)  # the first of equals
        assert best["best"] == max(scores.values())

    def test_without_distillation_homogeneity_stays_and_ood_is_null(self, fit):
        fit("--distillation", "null")
        summary = json.loads((latest(fit.runs) / "summary.json").read_text())
        assert summary["homogeneity"]["before"] == summary["homogeneity"]["after"]
        assert set(summary["ood"].values()) == {None}
        assert summary["communication"]["label_bytes"] == 0

    def test_overhead_is_what_distillation_adds_to_the_bytes_of_training(self, fit):
        """Labels at equal steps; at equal epochs the added steps too: 18 an epoch before the exchange, more after."""
        assert fit("--distillation", "VanillaKD", "--distillation.start", "3", "--distillation.every", "null",
                   "--distillation.steps", "grow") == 0  # fmt: skip
        sent = json.loads((latest(fit.runs) / "summary.json").read_text())["communication"]
        extra_bytes = sent["label_bytes"] + sent["other_bytes"]
        assert sent["overhead_at_equal_steps"] == pytest.approx(extra_bytes / sent["parameter_bytes"])
        steps = json.loads((latest(fit.runs) / "summary.json").read_text())["steps"]
        a_step = sent["parameter_bytes"] / (steps + 1)  # one of final gossip
        assert sent["overhead_at_equal_epochs"] == pytest.approx(
            (sent["parameter_bytes"] + extra_bytes) / (a_step * 109) - 1
        )

    def test_vanilla_kd_keeps_everything(self, fit):
        fit("--distillation", "VanillaKD", "--distillation.start", "3")
        summary = json.loads((latest(fit.runs) / "summary.json").read_text())
        assert {k: v for k, v in summary["ood"].items() if v is not None} == {"kept_fraction": 1.0}
        assert summary["communication"]["label_bytes"] == 2 * 4 * 2 * 300 * (4 + 10 * 4)  # two exchanges of all 300

    def test_every_exchange_is_kept_with_its_measures_of_every_node(self, fit):
        fit()
        summary = json.loads((latest(fit.runs) / "summary.json").read_text())
        first, second = summary["exchanges"]
        assert (first["epoch"], second["epoch"]) == (3, 5)
        before, between = first["homogeneity"]
        assert (before, second["homogeneity"][1]) == (summary["homogeneity"]["before"], summary["homogeneity"]["after"])
        assert second["homogeneity"][0] == between != before
        for k in MEASURES:
            assert len(first[k]) == 4
            assert second[k] == pytest.approx(summary["per_node"][k], nan_ok=True)
        own = 300 * np.array(first["kept_fraction"])
        near = [[j for j in range(4) if (i - j) % 4 != 2] for i in range(4)]  # a ring
        assert all(own[near[i]].max() <= first["distilled"][i] <= own[near[i]].sum() for i in range(4))

    def test_a_metric_and_an_area_of_one_name_are_both_kept(self, fit):
        assert fit(*extra(Both), "--train.epochs", "1", "--distillation", "null") == 0
        summary = json.loads((latest(fit.runs) / "summary.json").read_text())
        assert (summary["mine"], summary["mine/more"]) == (1, 2)

    def test_nodes_without_distilled_samples_are_named_and_train_on(self, fit, capsys):
        assert fit("--calibration", "Fixed", "--calibration.score", "MSP", "--calibration.threshold", "1e9") == 0
        assert "no distilled samples for 4 nodes: 0, 1, 2, 3" in capsys.readouterr().out
        exchanges = json.loads((latest(fit.runs) / "summary.json").read_text())["exchanges"]
        assert [e["distilled"] for e in exchanges] == [[0] * 4] * 2

    def test_growing_steps_follow_the_mean_union(self, fit):
        fit("--distillation", "VanillaKD", "--distillation.start", "3", "--distillation.steps", "grow")
        run = latest(fit.runs)
        summary = json.loads((run / "summary.json").read_text())
        batch, nodes = 16, 4
        train = sum(len(i) for i in json.loads((run / "partition.json").read_text())["indices"]["train"])
        before, after = -(-train // (nodes * batch)), -(-(train + nodes * 300) // (nodes * batch))
        assert summary["steps"] == 3 * before + 3 * after
        assert checkpoint(run)["samples"] == summary["steps"] * nodes * batch

    def test_relaysgd_sends_one_message_an_edge_and_step(self, fit):
        fit("--gossip", "RelaySGD", "--graph.topology", "Chain", "--distillation", "null", "--train.final_gossip", "0")
        summary = json.loads((latest(fit.runs) / "summary.json").read_text())
        assert summary["communication"]["messages"] == 6 * summary["steps"]
        assert summary["communication"]["parameter_bytes"] == 6 * summary["steps"] * 4 * (summary["parameters"] + 1)

    def test_a_rule_that_shares_more_than_parameters_says_so(self, fit, capsys):
        fit("--gossip", "NGC", "--distillation", "null", "--train.epochs", "1", "--train.final_gossip", "0")
        assert re.search(r"^shares +gradients of neighbours' models$", capsys.readouterr().out, re.MULTILINE)
        sent = json.loads((latest(fit.runs) / "summary.json").read_text())["communication"]
        assert sent["other_bytes"] == sent["parameter_bytes"] > 0

    def test_class_sums_of_features_go_back_with_every_batch(self, fit, capsys):
        fit("--gossip", "CCL", "--node.network.width", "4", "--train.epochs", "1", "--train.final_gossip", "0",
            "--distillation", "null")  # fmt: skip
        assert re.search(r"^shares +class sums of features$", capsys.readouterr().out, re.MULTILINE)
        summary = json.loads((latest(fit.runs) / "summary.json").read_text())
        edges, classes, features = 8, 10, 8
        assert summary["communication"]["other_bytes"] == summary["steps"] * edges * 4 * classes * (features + 1) > 0

    def test_every_line_has_the_values_of_every_node(self, fit):
        fit()
        read = lines(latest(fit.runs))
        for line in read:
            assert len(line["per_node"]["accuracy"]) == 4
            assert np.mean(line["per_node"]["accuracy"]) == pytest.approx(line["accuracy/node_mean"])
        assert "threshold" not in read[0]["per_node"]
        assert np.mean(read[-1]["per_node"]["threshold"]) == pytest.approx(read[-1]["ood/threshold"])

    def test_a_class_in_the_users_folder_is_found_by_its_import_path(self, fit, tmp_path, monkeypatch):
        (tmp_path / "my_rule.py").write_text(
            "from lightning_idkd.callbacks import DSGD\n\nclass Mine(DSGD):\n    pass\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", sys.path[:])
        assert fit("--gossip", "my_rule.Mine", "--train.epochs", "1", "--distillation", "null") == 0

    def test_metrics_that_a_callback_adds_to_the_last_line_are_in_the_summary_under_their_area(self, fit):
        assert fit(*extra(Add), "--train.epochs", "1", "--distillation", "null") == 0
        summary = json.loads((latest(fit.runs) / "summary.json").read_text())
        assert (summary["drift"], summary["spread"]["accuracy"], summary["accuracy"]["median"]) == (1.0, 2.0, 3.0)
        assert summary["ood"]["mine"] == 4.0
        assert summary["nodes"] == 4
        assert not {"epoch", "step", "phase", "train"} & summary.keys()

    def test_engines_are_timed_with_a_word_and_once_for_one_shape(self, fit, capsys, monkeypatch, tmp_path):
        monkeypatch.setenv("IDKD_CACHE", str(tmp_path / "cache"))
        arguments = ["--run.engine", "auto", "--train.epochs", "1", "--distillation", "null"]
        said = []
        for changes in ([], ["--seed", "1"], ["--train.batch_size", "8"]):
            assert fit(*arguments, *changes) == 0
            said.append(capsys.readouterr().out.splitlines()[0])
        timed = "timing     engines loop, parallel, vmap; threads 1"
        assert said[0] == said[2] == timed
        assert said[1].startswith("run ")
        run = yaml.safe_load((latest(fit.runs) / "config.yaml").read_text())["run"]
        assert [run["engine"], run["threads"], False] in json.loads(
            (tmp_path / "cache" / "engines.json").read_text()
        ).values()

    @pytest.mark.parametrize("content", ["", "[", "{}"])
    def test_a_damaged_list_of_timings_is_made_anew(self, fit, monkeypatch, tmp_path, content):
        monkeypatch.setenv("IDKD_CACHE", str(tmp_path / "cache"))
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "engines.json").write_text(content)
        assert fit("--run.engine", "auto", "--train.epochs", "1", "--distillation", "null") == 0
        assert len(json.loads((tmp_path / "cache" / "engines.json").read_text())) == 1

    def test_a_node_may_have_the_training_step_that_lightning_writes(self, fit):
        assert fit("--node.module", f"{__name__}.Lightnings", "--train.epochs", "1", "--distillation", "null") == 0

    def test_labels_of_the_public_set_are_never_read(self, fit, tmp_path):
        assert fit() == 0
        assert fit("--data.public", f"{__name__}.Mislabelled", "--data.public.samples", "300", folder="wrong") == 0
        right, wrong = checkpoint(latest(fit.runs)), checkpoint(latest(tmp_path / "wrong"))
        for state in (right, wrong):
            # measured of the selection, not used by it
            for measured in (state["ood"], state["per_node"], *state["exchanges"]):
                assert measured.pop("label_accuracy")
                assert measured.pop("known_fraction")
        assert same(right, wrong) is None


@pytest.mark.slow
def test_two_processes_are_bit_equal_to_one(configs, tmp_path):
    command = [
        *command_of(configs / "ring_digits.yaml"),
        *SHORT,
        "--graph.nodes",
        "5",
        *("--clock.compute", "LogNormal", "--clock.compute.median", "0.2", "--clock.compute.sigma", "0.5"),
        *("--clock.bandwidth", "1e6"),
        "--run.dir",
    ]
    assert main([*command[3:], str(tmp_path / "1")]) == 0
    done = subprocess.run(
        [*command, str(tmp_path / "2"), "--run.devices", "2"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = latest(tmp_path / "1"), latest(tmp_path / "2")
    assert same(checkpoint(one), checkpoint(two)) is None
    assert checkpoint(two)["time"].unique().numel() > 1
    assert lines(one) == lines(two)


class TestCentral:
    @pytest.mark.filterwarnings("ignore:.*does not have many workers")
    def test_one_node_agrees_with_a_plain_lightning_trainer(self, configs, tmp_path):
        """Same node, same batches, SGD with Nesterov momentum and weight decay: float64, so only rounding differs."""
        from lightning.pytorch import Trainer

        from lightning_idkd import NodeModule, randomness
        from lightning_idkd.data.store import Store
        from lightning_idkd.training.build import load_samples

        arguments = [
            "--config",
            str(configs / "central_digits.yaml"),
            "--train.epochs",
            "2",
            "--train.schedule",
            "Constant",
            "--logger",
            "null",
            "--run.precision",
            "64",
            "--run.engine",
            "loop",
            "--run.dir",
            str(tmp_path),
        ]
        assert main(["fit", *arguments]) == 0
        saved = checkpoint(latest(tmp_path, "central_digits"))

        config = configure(arguments)
        private, test, public, split = load_samples(config)
        store = Store(private, test, public, split, range(1), batch=64, dtype=torch.float64)
        steps = store.steps()
        batches = []
        for epoch in range(2):
            order = store.order(epoch * steps, steps)
            for s in range(steps):
                x, y = store.batch(order[:, s * 64 : (s + 1) * 64], epoch * steps + s)
                batches.append((x[0], y[0].argmax(1)))
        with randomness.fork_generators(0, "initialisation"):
            node = NodeModule(
                config.node.network.build(1, 8, 10), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
            ).double()
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            precision="64-true",
        )
        trainer.fit(
            node,
            torch.utils.data.DataLoader(batches, batch_size=None),
            torch.utils.data.DataLoader(batches[:2], batch_size=None),
        )
        row = torch.cat([(p.movedim(1, -1) if p.ndim == 4 else p).flatten() for p in node.parameters()])
        torch.testing.assert_close(saved["X"][0], row.detach(), rtol=1e-9, atol=1e-12)
