"""Whole runs: files, resuming, forking, processes, and what a user can get wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from lightning_idkd import Callback, NodeModule
from lightning_idkd.cli import configure, main
from lightning_idkd.data import Digits, Glyphs, Images
from lightning_idkd.run_folder import RunFolder

SHORT = [
    "--logger",
    "null",
    "--graph.nodes",
    "4",
    "--train.epochs",
    "6",
    "--train.evaluate_every",
    "2",
    "--distillation.start",
    "3",
    "--distillation.every",
    "2",
    "--data.public.samples",
    "300",
    "--run.engine",
    "loop",
    "--run.threads",
    "1",
    "--run.pictures",
    "false",
]


class InterruptAt(Callback):
    """Asks to stop after these steps, as Ctrl-C does."""

    def __init__(self, steps: list[int]):
        self.steps = steps

    def on_step_end(self, run, step):
        run.interrupted = step in self.steps


class TestDigits(Digits):
    """The test images as a public set: what must not be."""

    __test__ = False

    def load(self, split, *arguments, **options):
        return super().load("test", *arguments, **options)


class Mislabelled(Glyphs):
    """Glyphs whose own labels are all wrong."""

    def load(self, *arguments, **options):
        images = super().load(*arguments, **options)
        return Images(images.pixels, images.labels.flip(0), images.classes)


class Renamed(Digits):
    """Digits whose test part has its classes in another order."""

    def load(self, split, *arguments, **options):
        images = super().load(split, *arguments, **options)
        return Images(images.pixels, images.labels, images.classes[::-1] if split == "test" else images.classes)


class Needy(NodeModule):
    """A node with an argument that no config gives."""

    def __init__(self, network, weight):
        super().__init__(network)


class Count(Callback):
    """Counts epochs."""

    def __init__(self):
        self.epochs = 0

    def on_epoch_end(self):
        self.epochs += 1

    def on_fit_end(self, summary):
        summary["counted"] = self.epochs

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


class Explode(Callback):
    """Breaks node 2's parameters before an epoch."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_epoch_start(self, run, epoch):
        if epoch == self.epoch:
            run.stack.X[2].fill_(float("nan"))


class Overflow(Callback):
    """Breaks node 1's parameters right after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, run, step):
        if step == self.step:
            run.stack.X[1].fill_(float("inf"))


def command_of(config) -> list[str]:
    """What runs a config in a process of its own."""
    return [sys.executable, "-m", "lightning_idkd", "fit", "--config", str(config)]


def extra(callback: type, **arguments) -> list[str]:
    """The option that adds a callback of this file."""
    return ["--callbacks", f"[{{class_path: {__name__}.{callback.__name__}, init_args: {arguments}}}]"]


@pytest.fixture
def fit(configs, tmp_path):
    def call(*arguments, folder="runs"):
        return main(
            ["fit", "--config", str(configs / "ring_digits.yaml"), *SHORT, "--run.dir", str(tmp_path / folder), *arguments]
        )

    call.runs = tmp_path / "runs"
    return call


def latest(runs, name="ring_digits"):
    return runs / name / "latest"


def checkpoint(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def same(a, b, path=""):
    """The first place where two checkpoints differ, times apart."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return next(
            (d for k in a if k not in ("seconds", "train_seconds", "devices") and (d := same(a[k], b[k], f"{path}.{k}"))), None
        )
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        return next((d for i, (x, y) in enumerate(zip(a, b, strict=True)) if (d := same(x, y, f"{path}[{i}]"))), None)
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)
    return None if equal else f"{path}: {a} != {b}"


def lines(run):
    """Metrics without times."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("throughput")} for line in read]


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
        """Labels at equal steps; at equal epochs the added steps too: 18 an epoch before the exchange, more after it."""
        assert fit("--distillation", "VanillaKD", "--distillation.start", "3", "--distillation.every", "null",
                   "--distillation.steps", "grow") == 0  # fmt: skip
        sent = json.loads((latest(fit.runs) / "summary.json").read_text())["communication"]
        extra_bytes = sent["label_bytes"] + sent["other_bytes"]
        assert sent["overhead_at_equal_steps"] == pytest.approx(extra_bytes / sent["parameter_bytes"])
        steps = json.loads((latest(fit.runs) / "summary.json").read_text())["steps"]
        a_step = sent["parameter_bytes"] / (steps + 1)  # one of final gossip
        assert sent["overhead_at_equal_epochs"] == pytest.approx((sent["parameter_bytes"] + extra_bytes) / (a_step * 109) - 1)

    def test_vanilla_kd_keeps_everything(self, fit):
        fit("--distillation", "VanillaKD", "--distillation.start", "3")
        summary = json.loads((latest(fit.runs) / "summary.json").read_text())
        assert {k: v for k, v in summary["ood"].items() if v is not None} == {"kept_fraction": 1.0}
        assert summary["communication"]["label_bytes"] == 2 * 4 * 2 * 300 * (4 + 10 * 4)  # two exchanges of all 300

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

    def test_every_line_has_the_values_of_every_node(self, fit):
        fit()
        read = lines(latest(fit.runs))
        for line in read:
            assert len(line["per_node"]["accuracy"]) == 4
            assert np.mean(line["per_node"]["accuracy"]) == pytest.approx(line["accuracy/node_mean"])
        assert "threshold" not in read[0]["per_node"]
        assert np.mean(read[-1]["per_node"]["threshold"]) == pytest.approx(read[-1]["ood/threshold"])

    def test_a_class_in_the_users_folder_is_found_by_its_import_path(self, fit, tmp_path, monkeypatch):
        (tmp_path / "my_rule.py").write_text("from callbacks import DSGD\n\nclass Mine(DSGD):\n    pass\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", sys.path[:])
        assert fit("--gossip", "my_rule.Mine", "--train.epochs", "1", "--distillation", "null") == 0

    def test_labels_of_the_public_set_are_never_read(self, fit, tmp_path):
        assert fit() == 0
        assert fit("--data.public", f"{__name__}.Mislabelled", "--data.public.samples", "300", folder="wrong") == 0
        right, wrong = checkpoint(latest(fit.runs)), checkpoint(latest(tmp_path / "wrong"))
        for state in (right, wrong):
            for measured in (state["ood"], state["per_node"]):  # what is measured of the selection, not used by it
                assert measured.pop("label_accuracy")
                assert measured.pop("known_fraction")
        assert same(right, wrong) is None


class TestResume:
    @pytest.mark.parametrize("gossip", ["QGDSGDm", "RelaySGD"])
    def test_an_interrupted_run_ends_bit_equal(self, fit, tmp_path, gossip):
        def run(folder, stops):
            variant = ["--gossip", gossip, "--graph.topology", "Chain", *extra(InterruptAt, steps=stops)]
            return fit(*variant, "--run.resume", "auto", folder=folder)

        # of 18 steps an epoch: in the first, with the last step before an evaluation, and between two exchanges
        stops = [7, 4 * 18, 4 * 18 + 5]
        assert run("whole", []) == 0
        assert [run("cut", stops) for _ in range(4)] == [130, 130, 130, 0]
        assert len(list((tmp_path / "cut" / "ring_digits").glob("2*"))) == 1
        whole, cut = latest(tmp_path / "whole"), latest(tmp_path / "cut")
        assert same(checkpoint(whole), checkpoint(cut)) is None
        assert lines(whole) == lines(cut)

    def test_a_run_that_stops_where_an_evaluation_is_due_makes_it(self, fit, tmp_path):
        assert fit(folder="whole") == 0
        assert fit("--run.until", "4", folder="cut") == 0
        assert [line["epoch"] for line in lines(latest(tmp_path / "cut"))] == [2, 4]
        assert fit("--run.resume", "auto", folder="cut") == 0
        assert lines(latest(tmp_path / "whole")) == lines(latest(tmp_path / "cut"))

    def test_pictures_may_be_switched_off_on_the_way(self, fit):
        assert fit("--run.pictures", "true", "--run.until", "4") == 0
        assert fit("--run.resume", "auto") == 0
        assert len(list((fit.runs / "ring_digits").glob("2*"))) == 1

    def test_auto_starts_anew_where_the_config_differs_or_the_run_is_finished(self, fit):
        assert fit("--run.resume", "auto") == 0
        assert fit("--run.resume", "auto") == 0
        assert fit("--run.resume", "auto", "--train.lr", "0.05") == 0
        assert len(list((fit.runs / "ring_digits").glob("2*"))) == 3

    def test_a_run_that_another_process_works_on_is_left_alone(self, fit, capsys):
        stop = extra(InterruptAt, steps=[20])
        assert fit(*stop) == 130
        folder = RunFolder(latest(fit.runs).resolve())
        with folder.locked():
            assert fit(*stop, "--run.resume", str(folder.path)) == 2
            assert "another process works on" in capsys.readouterr().err
            assert fit(*stop, "--run.resume", "auto") == 130  # a new one
        assert len(list((fit.runs / "ring_digits").glob("2*"))) == 2
        assert fit(*stop, "--run.resume", str(folder.path)) == 0

    @pytest.mark.slow
    def test_a_killed_run_ends_bit_equal(self, configs, tmp_path):
        command = [*command_of(configs / "ring_digits.yaml"), *SHORT, "--train.epochs", "12", "--run.dir"]
        assert main([*command[3:], str(tmp_path / "whole")]) == 0
        process = subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            found = list((tmp_path / "cut").glob("ring_digits/2*/metrics.jsonl"))
            if found and len(found[0].read_text().splitlines()) >= 2:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (latest(tmp_path / "cut") / "summary.json").exists(), "the run was over before the kill"
        assert subprocess.run([*command, str(tmp_path / "cut"), "--run.resume", "auto"], capture_output=True).returncode == 0
        assert same(checkpoint(latest(tmp_path / "whole")), checkpoint(latest(tmp_path / "cut"))) is None
        assert lines(latest(tmp_path / "whole")) == lines(latest(tmp_path / "cut"))

    @pytest.mark.slow
    def test_ctrl_c_ends_with_a_checkpoint(self, configs, tmp_path):
        command = [*command_of(configs / "ring_digits.yaml"), *SHORT, "--train.epochs", "500", "--run.dir", str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            if " train " in line:
                process.send_signal(signal.SIGINT)
                break
        said = process.communicate()[0]
        assert process.returncode == 130
        assert "--run.resume auto" in said
        assert "Traceback" not in said
        assert checkpoint(latest(tmp_path))["step"] > 0


class TestFork:
    def test_variants_share_the_initial_training(self, fit):
        assert fit("--run.keep", "[3]", "--distillation", "null") == 0
        base = latest(fit.runs).resolve()
        assert fit("--run.from", str(base / "checkpoints" / "epoch_3.ckpt")) == 0
        fork = latest(fit.runs).resolve()
        assert json.loads((fork / "summary.json").read_text())["from"] == str(base / "checkpoints" / "epoch_3.ckpt")
        assert lines(fork)[0] == lines(base)[0]  # epoch 2 is shared
        assert fit(folder="whole") == 0
        whole = checkpoint(latest(fit.runs.parent / "whole"))
        assert torch.equal(whole["X"], checkpoint(fork)["X"])  # as if trained in one go

    @pytest.mark.parametrize("distillation", ["null", "IDKD"])
    def test_a_longer_fork_of_a_finished_run_equals_one_go(self, fit, distillation):
        variant = ["--train.schedule", "Constant", "--distillation", distillation]
        assert fit(*variant) == 0
        assert fit(*variant, "--run.from", str(latest(fit.runs)), "--train.epochs", "8") == 0
        assert fit(*variant, "--train.epochs", "8", folder="whole") == 0
        fork, whole = (checkpoint(latest(fit.runs.parent / name)) for name in ("runs", "whole"))
        for key in ("X", "rule", "distilled", "generation", "step", "samples", "counts"):
            assert same(fork[key], whole[key], key) is None

    def test_an_interrupted_fork_is_resumed_and_remembers_its_source(self, fit, capsys):
        assert fit("--run.keep", "[3]", "--distillation", "null") == 0
        source = latest(fit.runs).resolve() / "checkpoints" / "epoch_3.ckpt"
        # the name `latest` means the fork as soon as that has begun
        fork = ["--run.from", str(latest(fit.runs) / "checkpoints" / "epoch_3.ckpt"), "--run.resume", "auto"]
        assert fit(*fork, *extra(InterruptAt, steps=[80])) == 130
        capsys.readouterr()
        assert fit("--run.resume", "auto", *extra(InterruptAt, steps=[80]), "--train.epochs", "4") == 0  # not the fork
        assert "continued" not in capsys.readouterr().out
        assert fit(*fork, *extra(InterruptAt, steps=[80])) == 0
        assert "continued at epoch 4" in capsys.readouterr().out
        cut = latest(fit.runs).resolve()
        assert json.loads((cut / "summary.json").read_text())["from"] == str(source)
        assert fit("--run.from", str(source)) == 0
        assert torch.equal(checkpoint(cut)["X"], checkpoint(latest(fit.runs))["X"])

    def test_an_exchange_before_the_forks_first_step_is_not_skipped(self, fit, capsys):
        assert fit("--distillation", "null", *extra(InterruptAt, steps=[60])) == 130  # in epoch 3
        assert fit("--run.from", str(latest(fit.runs)), "--distillation.start", "3") == 2
        assert "distillation.start: epoch 3 is over" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("change", "key"),
        [
            (("--graph.topology", "Complete"), "graph.topology"),
            (("--seed", "1"), "seed"),
            (("--node.network.width", "8"), "node.network.init_args.width"),
        ],
    )
    def test_another_graph_node_or_seed_is_refused(self, fit, capsys, change, key):
        fit("--run.keep", "[3]")
        base = str(latest(fit.runs).resolve())
        for option in ("--run.from", "--run.resume"):
            capsys.readouterr()
            assert fit(*change, option, base) == 2
            assert key in capsys.readouterr().err

    def test_a_callback_that_both_have_goes_on_with_its_state(self, fit, tmp_path):
        assert fit(*extra(Count), "--run.keep", "[3]") == 0
        assert (
            fit(*extra(Count), "--run.from", str(latest(fit.runs).resolve() / "checkpoints" / "epoch_3.ckpt"), folder="fork") == 0
        )
        for runs in (fit.runs, tmp_path / "fork"):
            assert json.loads((latest(runs) / "summary.json").read_text())["counted"] == 6

    def test_a_start_before_the_fork_is_refused(self, fit, capsys):
        fit("--run.keep", "[5]", "--distillation", "null")
        assert fit("--run.from", str(latest(fit.runs).resolve() / "checkpoints" / "epoch_5.ckpt")) == 2
        assert "distillation.start" in capsys.readouterr().err


class TestMistakes:
    """Each is told in at most two lines with status 2, before any run folder exists."""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--train.lrr", "0.1"], ["train.lrr", "'lr'"]),
            (["--train.lr", "abc"], ["train.lr", "abc", "float"]),
            (["--train.lr", "0"], ["train.lr", "above 0"]),
            (["--gossip", "DGSD"], ["gossip", "'DSGD'"]),
            (["--gossip", "MSP"], ["gossip", "MSP", "QGDSGDm"]),
            (["--gossip.momentun", "0.3"], ["gossip.momentun", "'momentum'"]),
            (["--graph.topology", "Rign"], ["graph.topology", "'Ring'"]),
            (["--graph.weights", "metropolys"], ["graph.weights", "'metropolis'", "uniform"]),
            (["--calibration.score", "Enrgy"], ["calibration.score", "'Energy'"]),
            (["--calibration.score.temp", "2"], ["calibration.score.temp", "temperature"]),
            (["--distillation", "IDKDD"], ["distillation", "'IDKD'"]),
            (["--distillation.start", "abc"], ["distillation.start", "abc", "float"]),
            (["--distillation.labels", "frsh"], ["distillation.labels", "'fresh'", "relayed"]),
            (["--distillation.start", "6"], ["distillation.start", "6", "5"]),
            (["--distillation.temperature", "0"], ["distillation.temperature", "above 0"]),
            (["--data.partition.alpha", "0"], ["data.partition.alpha", "above 0"]),
            (["--data.partition.alpha", "-1"], ["data.partition.alpha", "-1", "above 0"]),
            (["--data.public", "null"], ["data.public"]),
            (["--data.private", "HuggingFace"], ["data.private.path", "required"]),
            (["--data.private.path", "x"], ["data.private.path", "HuggingFace"]),
            (
                ["--data.private", "HuggingFace", "--data.private.path", "nowhere/cifar"],
                ["data.private.path", "nowhere/cifar", "IDKD_DATA"],
            ),
            (["--graph.nodes", "1500"], ["graph.nodes", "1500", "1438"]),
            (["--graph.nodes", "100000"], ["graph.nodes", "10000"]),
            (
                ["--graph.topology", "Torus", "--graph.topology.rows", "3", "--graph.topology.cols", "5", "--graph.nodes", "16"],
                ["graph.topology", "15", "16", "4 x 4"],
            ),
            (["--graph.topology", "Social15", "--graph.nodes", "16"], ["graph.topology", "15", "16"]),
            (["--gossip", "RelaySGD"], ["RelaySGD", "Chain", "Ring"]),
            (["--node.network", "ResNet", "--node.network.depth", "21"], ["node.network.depth", "20", "26"]),
            (["--node.module", "lightning_idkd.node.NodeModul"], ["node.module", "NodeModule"]),
            (["--config", "nope.yaml"], ["--config", "nope.yaml"]),
            (["--run.engine", "vmapp"], ["run.engine", "'vmap'"]),
            (["--run.frm", "x"], ["run.frm", "'from'"]),
            (["--run.from", "nowhere"], ["run.from", "nowhere"]),
            (["--run.resume", "nowhere"], ["run.resume", "nowhere"]),
            (["--run.keep", "[99]"], ["run.keep", "99", "6"]),
            (["--run.name", ""], ["run.name", "''", "run.dir"]),
            (["--run.name", "../x"], ["run.name", "../x", "run.dir"]),
            (["--run.accelerator", "cuda"], ["run.accelerator", "cuda"]),
            (["--run.devices", "5"], ["run.devices", "5", "4"]),
            (["--train.batch_size", "0"], ["train.batch_size"]),
            (["stray"], ["stray"]),
            (["--trian.lr", "0.1"], ["trian.lr", "'train.lr'"]),
            (["--epochs", "3"], ["epochs", "'train.epochs'"]),
            (["--logger", "foo"], ["logger", "foo", "null"]),
            (["--gossip", "nope.Foo"], ["gossip", "nope.Foo", "no module 'nope'", "DSGD"]),
            (["--gossip", "callbacks.gossip.DSGDD"], ["gossip", "no class 'DSGDD'", "'DSGD'"]),
            (["--gossip", "lightning_idkd.callback.Gossip"], ["gossip", "base class", "DSGD"]),
            (["--gossip.momentum", "1"], ["gossip.momentum", "1.0", "below 1"]),
            (["--gossip.weight_decay", "-1"], ["gossip.weight_decay", "-1", "0 or more"]),
            (["--callbacks", "[QGDSGDm]"], ["callbacks", "QGDSGDm", "gossip"]),
            (["--calibration", "null"], ["calibration", "IDKD", "Youden"]),
            (["--calibration", "Fixed", "--calibration.threshold", ".nan"], ["calibration.threshold", "nan", "finite"]),
            (["--distillation.start", ".nan"], ["distillation.start", "nan"]),
            (["--train.schedule.warmup", "2", "--train.schedule.milestones", "[9]"], ["train.schedule.milestones", "9", "5"]),
            (["--train.schedule.warmup", "-3"], ["train.schedule.warmup", "-3"]),
            (["--train.lr", ".inf"], ["train.lr", "inf"]),
            (["--seed", "-1"], ["seed", "-1"]),
            (["--graph.nodes", "0"], ["graph.nodes", "0", "10000"]),
            (["--data.private", f"{__name__}.Renamed"], ["data.private", "9, 8, 7, 6, 5, ...", "0, 1, 2, 3, 4, ..."]),
            (["--data.image_size", "1"], ["data.image_size", "1", "2 or more"]),
            (["--node.module", f"{__name__}.Needy"], ["node.module", "Needy", "weight"]),
        ],
    )
    def test_is_told_with_the_key_and_what_is_allowed(self, fit, capsys, monkeypatch, arguments, words):
        if "cuda" in arguments and torch.cuda.is_available():
            pytest.skip("here cuda is no mistake")
        monkeypatch.delenv("IDKD_DATA", raising=False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert fit(*arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") <= 2
        for word in words:
            assert word in said
        assert not fit.runs.exists()

    def test_a_config_that_is_no_utf8(self, tmp_path, capsys):
        (tmp_path / "latin.yaml").write_bytes(b"run: {name: M\xfcller}")
        assert main(["fit", "--config", str(tmp_path / "latin.yaml")]) == 2
        assert "no UTF-8 text" in capsys.readouterr().err

    def test_a_file_that_hides_the_callbacks(self, tmp_path):
        (tmp_path / "callbacks.py").write_text("")
        done = subprocess.run(
            [sys.executable, "-m", "lightning_idkd", "fit", "--help"], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: '{tmp_path / 'callbacks.py'}' hides")

    def test_a_misspelt_command(self, capsys):
        assert main(["fti"]) == 2
        assert "'fit'" in capsys.readouterr().err

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_an_unwritable_folder(self, fit, tmp_path, capsys):
        (tmp_path / "runs").mkdir(mode=0o500)
        assert fit() == 2
        assert "run.dir" in capsys.readouterr().err

    def test_a_file_where_the_run_folder_should_be(self, fit, tmp_path, capsys):
        (tmp_path / "runs").write_text("")
        assert fit() == 2
        assert "run.dir" in capsys.readouterr().err

    def test_a_full_disk_leaves_the_last_checkpoint_intact(self, fit, capsys, monkeypatch):
        save, calls = torch.save, []

        def full(state, path):
            calls.append(path)
            save(state, path)
            if len(calls) == 3:
                path.write_bytes(path.read_bytes()[:100])
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        assert fit("--distillation", "null") == 2
        assert "No space left on device" in capsys.readouterr().err
        assert checkpoint(latest(fit.runs))["epoch"] == 2
        assert not list(fit.runs.rglob("*.part"))

    def test_a_public_set_smaller_than_a_batch(self, fit, capsys):
        assert fit("--data.public.samples", "10") == 2
        assert "data.public: 10 images are less than a batch, train.batch_size 16" in capsys.readouterr().err

    def test_a_private_set_of_one_class(self, fit, capsys):
        assert fit("--data.private.classes", "['3']") == 2
        assert "data.private: this set has only one class, '3'" in capsys.readouterr().err

    def test_a_public_set_with_test_images_is_told(self, fit, capsys):
        class_path = f"{__name__}.TestDigits"
        assert fit("--data.public", class_path, "--train.epochs", "1", "--distillation.start", "0") == 0
        assert "359 public images are test images too" in capsys.readouterr().out

    def test_a_checkpoint_cut_short(self, fit, capsys):
        fit("--distillation", "null")
        last = latest(fit.runs).resolve() / "checkpoints" / "last.ckpt"
        last.write_bytes(last.read_bytes()[:1000])
        assert fit("--run.from", str(latest(fit.runs))) == 2
        said = capsys.readouterr().err
        assert "last.ckpt" in said
        assert "1000 bytes" in said

    def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(self, fit, capsys):
        assert fit(*extra(Explode, epoch=2)) == 2
        said = capsys.readouterr().err
        assert "node 1" in said or "node 2" in said
        assert "step 36" in said
        saved = checkpoint(latest(fit.runs))
        assert saved["epoch"] == 2
        assert torch.isfinite(saved["X"]).all()

    @pytest.mark.parametrize("step", [3 * 18, 6 * 18])
    def test_parameters_that_overflow_in_the_last_step_of_an_epoch_are_not_kept(self, fit, capsys, step):
        assert fit(*extra(Overflow, step=step)) == 2
        assert f"node 1 or its parameters are not finite at step {step - 1}" in capsys.readouterr().err
        assert checkpoint(latest(fit.runs))["step"] == step - 18
        assert not (latest(fit.runs) / "summary.json").exists()

    @pytest.mark.slow
    def test_help_and_a_misspelt_key_load_nothing_heavy(self, configs):
        for arguments in (["fit", "--help"], ["fit", "--config", str(configs / "ring_digits.yaml"), "--train.lrr", "1"]):
            probe = f"import sys; from lightning_idkd.cli import main; main({arguments!r}); print('torch' in sys.modules)"
            said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
            assert said.splitlines()[-1] == "False"


@pytest.mark.slow
def test_two_processes_are_bit_equal_to_one(configs, tmp_path):
    command = [
        *command_of(configs / "ring_digits.yaml"),
        *SHORT,
        "--graph.nodes",
        "5",
        "--run.dir",
    ]
    assert main([*command[3:], str(tmp_path / "1")]) == 0
    done = subprocess.run([*command, str(tmp_path / "2"), "--run.devices", "2"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = latest(tmp_path / "1"), latest(tmp_path / "2")
    assert same(checkpoint(one), checkpoint(two)) is None
    assert lines(one) == lines(two)


class TestCentral:
    @pytest.mark.filterwarnings("ignore:.*does not have many workers")
    def test_one_node_agrees_with_a_plain_lightning_trainer(self, configs, tmp_path):
        """Same node, same batches, SGD with Nesterov momentum and weight decay: float64, so only rounding differs."""
        from lightning.pytorch import Trainer

        from lightning_idkd import NodeModule, randomness
        from lightning_idkd.data.store import Store
        from lightning_idkd.fit import load

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
        private, test, public, split = load(config)
        store = Store(private, test, public, split, range(1), batch=64, dtype=torch.float64)
        steps = store.steps()
        batches = []
        for epoch in range(2):
            order = store.order(epoch * steps, steps)
            for s in range(steps):
                x, y = store.batch(order[:, s * 64 : (s + 1) * 64], epoch * steps + s)
                batches.append((x[0], y[0].argmax(1)))
        with randomness.forked(0, "initialisation"):
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
            node, torch.utils.data.DataLoader(batches, batch_size=None), torch.utils.data.DataLoader(batches[:2], batch_size=None)
        )
        row = torch.cat([(p.movedim(1, -1) if p.ndim == 4 else p).flatten() for p in node.parameters()])
        torch.testing.assert_close(saved["X"][0], row.detach(), rtol=1e-9, atol=1e-12)
