"""Runs with a simulated clock: their times, that training stays the same, resume, mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from interrupts import InterruptAt
from short_runs import SHORT, build, checkpoint, extra, latest, lines, same

from lightning_idkd.cli import main
from lightning_idkd.config.parse import configure

STEPS = 18  # in an epoch of these runs
DRAWN = ["--clock.compute", "LogNormal", "--clock.compute.median", "0.2", "--clock.compute.sigma", "0.5",
         "--clock.latency", "PerNode", "--clock.latency.seconds", "[0.01, 0.02, 0.03, 0.04]",
         "--clock.latency.sigma", "1", "--clock.bandwidth", "1e6", "--clock.slow", "{0: 3}"]  # fmt: skip
EXACT = ["--clock.compute", "Fixed", "--clock.compute.seconds", "0.5", "--clock.latency", "Fixed",
         "--clock.latency.seconds", "0.25", "--clock.bandwidth", "1e5"]  # fmt: skip
SHORTER = ["--train.epochs", "4"]
ALONE = ["--train.epochs", "1", "--distillation", "null", "--calibration", "null"]
TRANSFER = 0.25 + 4 * 14458 / 1e5  # of one message with the network's parameters


def summary(runs):
    return json.loads((latest(runs) / "summary.json").read_text())


class TestTime:
    @pytest.mark.parametrize(
        ("rule", "of_steps"),
        [
            (["DSGD"], STEPS * TRANSFER),
            (["GradientTracking"], 2 * STEPS * TRANSFER),
            (["Isolated"], 0),
            (["LocalSteps", "--gossip.rule", "DSGD", "--gossip.every", "3"], STEPS / 3 * TRANSFER),
            # 4 nodes: 6 turns with a quarter of the bytes each
            (["GossipPGA", "--gossip.period", "3"], STEPS * 2 / 3 * TRANSFER + STEPS / 3 * 6 * (0.25 + 0.25 * 0.57832)),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_equal_nodes_take_the_time_of_their_steps_and_messages(self, fit, rule, of_steps):
        assert fit(*ALONE, *EXACT, "--train.final_gossip", "0", "--gossip", *rule) == 0
        assert summary(fit.runs)["parameters"] == 14458
        assert summary(fit.runs)["time"]["simulated"] == pytest.approx(0.5 * STEPS + of_steps)

    def test_the_final_gossip_and_merge_count(self, fit):
        assert fit(*ALONE, *EXACT, "--train.final_gossip", "3", "--train.final_merge", "true") == 0
        merge = 6 * (0.25 + 0.25 * 0.57832)
        wanted = 0.5 * STEPS + (STEPS + 3) * TRANSFER + merge
        assert summary(fit.runs)["time"]["simulated"] == pytest.approx(wanted)

    def test_an_exchange_of_labels_takes_the_time_of_its_messages(self, fit):
        """Two exchanges in six epochs; of latency alone, since the labels of each node have bytes of their own."""
        clock = ["--clock.compute", "Fixed", "--clock.compute.seconds", "0", "--clock.latency", "Fixed",
                 "--clock.latency.seconds", "1"]  # fmt: skip
        assert fit(*clock) == 0
        steps = summary(fit.runs)["steps"]
        assert len(summary(fit.runs)["exchanges"]) == 2
        assert summary(fit.runs)["time"]["simulated"] == steps + 2 + 1  # 1 for the final gossip

    def test_every_evaluation_has_it_and_it_is_printed_and_drawn(self, fit, capsys):
        assert fit(*EXACT, "--run.pictures", "true", "--train.epochs", "4") == 0
        times = [line["time/simulated"] for line in lines(latest(fit.runs))]
        assert len(times) == 2
        assert times[0] == pytest.approx(2 * STEPS * (0.5 + TRANSFER))
        out = capsys.readouterr().out
        assert "clock      compute Fixed, latency Fixed, 100 kB/s an edge" in out
        assert f"{times[0]:.4g} s" in out
        assert (latest(fit.runs) / "plots" / "accuracy_over_time.png").exists()


class TestSameRun:
    def test_training_is_bit_equal_with_and_without_a_clock(self, fit, tmp_path):
        assert fit(*SHORTER, folder="without") == 0
        assert fit(*SHORTER, *DRAWN, folder="with") == 0
        without, timed = latest(tmp_path / "without"), latest(tmp_path / "with")
        state = checkpoint(timed)
        assert state.pop("time").dtype == torch.float64
        assert state.pop("step_began") < lines(timed)[-1]["time/simulated"]
        assert same(checkpoint(without), state) is None
        of_clock = lines(timed)
        times = [line.pop("time/simulated") for line in of_clock]
        assert times == sorted(times)
        assert lines(without) == of_clock
        assert "time" not in json.loads((without / "summary.json").read_text())

    def test_an_interrupted_run_ends_at_the_same_times(self, fit, tmp_path):
        def run(folder, stops):
            return fit(*DRAWN, *SHORTER, *extra(InterruptAt, steps=stops), "--run.resume", "auto", folder=folder)

        assert run("whole", []) == 0
        assert [run("cut", [3 * STEPS + 7]) for _ in range(2)] == [130, 0]  # after the exchange
        whole, cut = latest(tmp_path / "whole"), latest(tmp_path / "cut")
        assert checkpoint(whole)["time"].unique().numel() > 1
        assert same(checkpoint(whole), checkpoint(cut)) is None
        assert lines(whole) == lines(cut)

    def test_a_run_that_is_older_than_the_clock_goes_on(self, fit):
        assert fit(*ALONE, "--train.epochs", "2", "--run.until", "1") == 0
        config = latest(fit.runs) / "config.yaml"
        assert "clock: null\n" in config.read_text()
        config.write_text(config.read_text().replace("clock: null\n", ""))
        assert fit(*ALONE, "--train.epochs", "2", "--run.resume", "auto") == 0
        assert len(list(fit.runs.glob("ring_digits/2*"))) == 1

    def test_the_config_of_a_run_starts_the_same_run(self, fit, tmp_path):
        assert fit(*ALONE, *DRAWN) == 0
        config = str(latest(fit.runs) / "config.yaml")
        assert main(["fit", "--config", config, "--run.dir", str(tmp_path / "again")]) == 0
        assert lines(latest(fit.runs)) == lines(latest(tmp_path / "again"))

    def test_a_fork_keeps_the_time_and_has_the_same_clock(self, fit, tmp_path, capsys):
        assert fit(*SHORTER, *DRAWN, "--run.keep", "[3]") == 0
        source = str(latest(fit.runs).resolve() / "checkpoints" / "epoch_3.ckpt")
        assert fit(*SHORTER, *DRAWN, "--run.from", source, folder="fork") == 0
        assert lines(latest(tmp_path / "fork"))[-1]["time/simulated"] == lines(latest(fit.runs))[-1]["time/simulated"]
        assert fit(*SHORTER, "--run.from", source) == 2
        assert "run.from: clock is None here but" in capsys.readouterr().err


class TestAbsence:
    """Node 1 is away from second 3 to second 6, in which steps of one second begin at every second."""

    @pytest.fixture
    def away(self, tmp_path):
        (tmp_path / "away.csv").write_text("node,from,to\n1,3,6\n")
        trace = f"{{class_path: Trace, init_args: {{file: {tmp_path / 'away.csv'}, unit: seconds, forget: true}}}}"
        return [*ALONE, "--clock.compute", "Fixed", "--clock.compute.seconds", "1", "--faults", f"[{trace}]"]

    def test_a_node_that_was_away_for_some_seconds_returns_with_its_neighbours_mean(self, configs, away):
        run = build(configure(["--config", str(configs / "ring_digits.yaml"), *SHORT, *away]))
        order = run.store.order(0, run.progress.steps)
        for step in range(8):
            assert run.clock.seconds == step
            present, returning = run.network.present(step), run.network.returning(step)
            assert (present is not None and not present[1]) == (step in (3, 4, 5))
            assert (returning is not None and returning.tolist() == [False, True, False, False]) == (step == 6)
            run.train_step(order)

    def test_a_run_that_is_interrupted_before_the_return_ends_the_same(self, fit, tmp_path, away):
        for folder, stops in (("whole", []), ("cut", [6])):
            while fit(*away, *extra(InterruptAt, steps=stops), "--run.resume", "auto", folder=folder):
                pass
        whole, cut = latest(tmp_path / "whole"), latest(tmp_path / "cut")
        assert same(checkpoint(whole), checkpoint(cut)) is None
        assert lines(whole) == lines(cut)


TRACE = ["--clock.compute", "TraceTimes", "--clock.compute.file"]


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--clock.latency", "Fixed", "--clock.latency.seconds", "-1"],
             "clock.latency.seconds: -1.0 given; allowed: seconds, 0 or more"),
            (["--clock.bandwidth", "0"],
             "clock.bandwidth: 0.0 given; allowed: bytes per second, above 0, or null for no limit"),
            (["--clock.compute", "LogNormal", "--clock.compute.median", "1", "--clock.compute.sigma", "-2"],
             "clock.compute.sigma: -2.0 given; allowed: 0 or more"),
            (["--clock.compute", "PerNode", "--clock.compute.seconds", "[1, 2, 3]"],
             "clock.compute.seconds: 3 times given; allowed: 4, one for each node (graph.nodes)"),
            (["--clock.compute", "PerNode", "--clock.compute.seconds", "[1, 2, 3, -1]"],
             "clock.compute.seconds: -1.0 given; allowed: seconds, 0 or more"),
            (["--clock.slow", "{4: 2}"], "clock.slow: node 4 given; allowed: 0 to 3 (graph.nodes is 4)"),
            (["--clock.slow", "{1: 0}"], "clock.slow, node 1: 0.0 given; allowed: a factor above 0"),
            (["--clock.slow", "{a: 2}"],
             "clock.slow: {'a': 2} given; allowed: a mapping from a whole number to a number"),
            (["--clock.compute", "LogNorml", "--clock.compute.median", "1"],
             "clock.compute: there is no class 'LogNorml' of this kind. Did you mean 'LogNormal'?"),
            (["--clock.compute", "absent.Mine"],
             "clock.compute: 'absent.Mine' cannot be imported (no module 'absent')"),
            (["--clock.lateny", "Fixed"], "clock.lateny: there is no such key. Did you mean 'latency'?"),
        ],
    )  # fmt: skip
    def test_it_is_named_before_any_work(self, fit, capsys, arguments, said):
        assert fit(*arguments) == 2
        assert f"error: {said}" in capsys.readouterr().err
        assert not fit.runs.exists()

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("0,1\n1,2\n7,2\n", "node 7 in line 3 of 'trace.csv' given; allowed: 0 to 3 (graph.nodes is 4)"),
            ("node,seconds\n0,1\none,2\n", "node one in line 3 of 'trace.csv' given; allowed: 0 to 3"),
            ("0,1\n1,fast\n", "'fast' in line 2 of 'trace.csv' given; allowed: seconds, 0 or more"),
            ("0,1\n1,-2\n", "'-2' in line 2 of 'trace.csv' given; allowed: seconds, 0 or more"),
            ("0,1\n1\n", "'1' in line 2 of 'trace.csv' given; allowed: two columns, node and seconds"),
            ("0,1\n1,2\n3,1\n", "'trace.csv' has no row for node 2"),
            ("", "'trace.csv' has no row for node 0, 1, 2, 3"),
            (None, "cannot read 'trace.csv' (No such file or directory)"),
        ],
    )
    def test_a_trace_that_is_none_is_refused(self, fit, capsys, tmp_path, monkeypatch, text, said):
        monkeypatch.chdir(tmp_path)
        if text is not None:
            (tmp_path / "trace.csv").write_text(text)
        assert fit(*TRACE, "trace.csv") == 2
        assert f"error: clock.compute.file: {said}" in capsys.readouterr().err
