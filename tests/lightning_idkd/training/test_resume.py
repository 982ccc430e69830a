"""Runs that are stopped and go on, and runs that start from another's checkpoint."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest
import torch
from interrupts import InterruptAt
from short_runs import SHORT, checkpoint, command_of, extra, latest, lines, same

from lightning_idkd import Callback
from lightning_idkd.cli import main
from lightning_idkd.models import cpu_norms
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.training import evaluation


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


class TestResume:
    def test_nodes_a_call_stay_those_of_the_run(self, fit, tmp_path, capsys):
        def run(folder, threads, *arguments):
            vmap = ["--run.engine", "vmap", "--run.threads", threads, "--graph.nodes", "7", "--train.batch_size", "64"]
            return fit(*vmap, "--train.epochs", "3", "--distillation", "null",
                       "--calibration", "null", *arguments, folder=folder)  # fmt: skip

        assert run("whole", "1") == 0
        assert run("cut", "1", "--run.until", "1") == 0
        assert run("cut", "2", "--run.resume", "auto") == 0
        a, b = checkpoint(latest(tmp_path / "whole")), checkpoint(latest(tmp_path / "cut"))
        assert a["abreast"] < 7
        assert same(a, b) is None

    def test_a_run_of_another_kind_of_device_goes_on_with_an_engine_of_this_one(self, fit):
        """Its config may be older than autocast, too."""
        assert fit("--run.until", "1") == 0
        run = latest(fit.runs)
        saved = checkpoint(run) | {"device": "cuda", "engine": "graph"}
        torch.save(saved, run / "checkpoints" / "last.ckpt")
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("  autocast: false\n", ""))
        assert fit("--run.resume", "auto", "--run.until", "2") == 0
        assert len(list(fit.runs.glob("ring_digits/2*"))) == 1
        assert checkpoint(run)["engine"] == "loop"
        assert checkpoint(run)["epoch"] == 2

    def test_bfloat16_is_chosen_once(self, fit, tmp_path, capsys, monkeypatch):
        auto = "--run.autocast", "auto", "--run.engine", "loop", "--distillation", "null"
        monkeypatch.setattr(NodeStack, "_time_step", lambda stack, *_: 1 - stack.autocast / 2)
        assert fit(*auto, "--run.until", "1") == 0
        assert "bfloat16" in capsys.readouterr().out
        monkeypatch.setattr(NodeStack, "_time_step", lambda stack, *_: 1 + stack.autocast)
        monkeypatch.setenv("IDKD_CACHE", str(tmp_path / "empty"))
        assert fit(*auto, "--run.resume", "auto", "--run.until", "2") == 0
        run = latest(fit.runs)
        assert checkpoint(run)["epoch"] == 2
        assert checkpoint(run)["autocast"] is True
        assert fit(*auto, "--run.from", str(run), "--train.epochs", "3", "--run.name", "fork") == 0
        assert checkpoint(latest(fit.runs, "fork"))["autocast"] is True
        assert json.loads((latest(fit.runs, "fork") / "summary.json").read_text())["autocast"] is True
        assert fit(*auto, "--run.until", "1", "--run.name", "new") == 0
        assert checkpoint(latest(fit.runs, "new"))["autocast"] is False

    def test_norms_by_another_are_told(self, fit, capsys, monkeypatch):
        assert fit("--run.until", "1") == 0
        monkeypatch.setattr(cpu_norms, "name_backend", lambda device: "another")
        assert fit("--run.resume", "auto", "--run.until", "2") == 0
        assert "by another from here" in capsys.readouterr().out

    @pytest.mark.parametrize("gossip", ["QGDSGDm", "RelaySGD", "LocalOptimizer"])
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

    @pytest.mark.parametrize("at", [2, 6])
    def test_a_stop_in_the_final_evaluation_comes_after_the_node_and_it_is_made_again(
        self, fit, tmp_path, monkeypatch, at
    ):
        """Before the final gossip 4 nodes are examined, after it their mean too."""
        calls, examined = [], evaluation.compute_accuracies

        def accuracy(outputs, labels):
            calls.append(outputs)
            if len(calls) == 10 + at:  # each of two evaluations on the way has made 5
                signal.raise_signal(signal.SIGINT)
            return examined(outputs, labels)

        assert fit(folder="whole") == 0
        monkeypatch.setattr(evaluation, "compute_accuracies", accuracy)
        assert fit("--run.resume", "auto", folder="cut") == 130
        assert len(calls) == 10 + at
        calls.clear()
        assert fit("--run.resume", "auto", folder="cut") == 0
        assert len(calls) == 9
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

    def test_a_file_of_the_partition_that_changed_in_between_is_told(self, fit, tmp_path, capsys):
        assert fit("--run.until", "1", folder="first") == 0
        given = tmp_path / "given.json"
        held = json.loads((latest(tmp_path / "first") / "partition.json").read_text())
        given.write_text(json.dumps(held))
        options = ["--data.partition", "FromFile", "--data.partition.path", str(given)]
        assert fit(*options, "--run.until", "1") == 0
        held["indices"] = {part: nodes[::-1] for part, nodes in held["indices"].items()}
        given.write_text(json.dumps(held))
        assert fit(*options, "--run.resume", "auto") == 2
        assert "data.partition: the nodes' samples are others than in" in capsys.readouterr().err

    def test_a_file_of_edges_that_changed_in_between_is_told(self, fit, tmp_path, capsys):
        file = tmp_path / "edges.txt"
        file.write_text("0 1\n1 2\n2 3\n")
        arguments = ["--graph.topology", "EdgeList", "--graph.topology.file", str(file)]
        assert fit(*arguments, "--run.until", "1") == 0
        file.write_text("0 1\n1 2\n1 3\n")
        assert fit(*arguments, "--run.resume", "auto") == 2
        assert "error: graph.topology: the checkpoint is of a graph with other edges" in capsys.readouterr().err

    def test_a_run_that_another_process_works_on_is_left_alone(self, fit, capsys):
        stop = extra(InterruptAt, steps=[20])
        assert fit(*stop) == 130
        folder = RunFolder(latest(fit.runs).resolve())
        with folder.lock():
            assert fit(*stop, "--run.resume", str(folder.path)) == 2
            assert "another process works on" in capsys.readouterr().err
            assert fit(*stop, "--run.resume", "auto") == 130  # a new one
        assert len(list((fit.runs / "ring_digits").glob("2*"))) == 2
        assert fit(*stop, "--run.resume", str(folder.path)) == 0

    @pytest.mark.slow
    def test_a_killed_run_ends_bit_equal(self, configs, tmp_path):
        command = [*command_of(configs / "ring_digits.yaml"), *SHORT, "--train.epochs", "12", "--run.dir"]
        assert main([*command[3:], str(tmp_path / "whole")]) == 0
        process = subprocess.Popen(
            [*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            found = list((tmp_path / "cut").glob("ring_digits/2*/metrics.jsonl"))
            if found and len(found[0].read_text().splitlines()) >= 2:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (latest(tmp_path / "cut") / "summary.json").exists(), "the run was over before the kill"
        assert main([*command[3:], str(tmp_path / "cut"), "--run.resume", "auto"]) == 0
        assert same(checkpoint(latest(tmp_path / "whole")), checkpoint(latest(tmp_path / "cut"))) is None
        assert lines(latest(tmp_path / "whole")) == lines(latest(tmp_path / "cut"))

    @pytest.mark.slow
    def test_ctrl_c_ends_with_a_checkpoint(self, configs, tmp_path):
        command = [*command_of(configs / "ring_digits.yaml"), *SHORT,
                   "--train.epochs", "500", "--run.dir", str(tmp_path)]  # fmt: skip
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

    def test_another_graph_node_or_seed_is_refused(self, fit, capsys):
        assert fit("--run.until", "1") == 0
        base = str(latest(fit.runs).resolve())
        for change, value, key in (("--graph.topology", "Complete", "graph.topology"), ("--seed", "1", "seed"),
                                   ("--node.network.width", "8", "node.network.init_args.width")):  # fmt: skip
            for option in ("--run.from", "--run.resume"):
                capsys.readouterr()
                assert fit(change, value, option, base) == 2
                assert key in capsys.readouterr().err

    def test_a_callback_that_both_have_goes_on_with_its_state(self, fit, tmp_path):
        assert fit(*extra(Count), "--run.keep", "[3]") == 0
        source = str(latest(fit.runs).resolve() / "checkpoints" / "epoch_3.ckpt")
        assert fit(*extra(Count), "--run.from", source, folder="fork") == 0
        for runs in (fit.runs, tmp_path / "fork"):
            assert json.loads((latest(runs) / "summary.json").read_text())["counted"] == 6

    def test_a_start_before_the_fork_is_refused(self, fit, capsys):
        fit("--run.keep", "[5]", "--distillation", "null")
        assert fit("--run.from", str(latest(fit.runs).resolve() / "checkpoints" / "epoch_5.ckpt")) == 2
        assert "distillation.start" in capsys.readouterr().err
