"""Searches through Optuna: what is drawn and pruned, what a stopped search goes on with, and its pictures.

Cells are trained by a stand-in for their process, whose accuracies have a closed form.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from lightning_idkd.cli import main
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.sweep import plan, run, search, search_pictures
from lightning_idkd.sweep.file import read_sweep
from lightning_idkd.sweep.plan import share_initial_trainings

METRIC = {"name": "validation/node_mean", "goal": "maximize"}
EARLY = {"type": "hyperband", "min_iter": 5, "eta": 2}
"""One check below 8 evaluations."""
LR = {"train.lr": {"distribution": "log_uniform_values", "min": 0.001, "max": 1.0}}
EPOCHS = 8
FIXED = {"train.epochs": EPOCHS, "train.evaluate_every": 1, "distillation": None}


class Training:
    """Stands for the process of a cell: at every look, it has trained and evaluated another epoch."""

    stop_at: int | None = None
    """The number of looks, over all cells, at which Ctrl-C arrives."""
    looks = 0
    begun: list[Training]
    fails = staticmethod(lambda cell: False)

    def __init__(self, cell):
        self.cell, self.returncode, self.signals = cell, None, []
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        with open(cell.log, "a") as log:
            log.write("training\n")
        self.folder = RunFolder.find_unfinished(cell.config.folder(), cell.config.resolved)
        if self.folder is None:
            self.folder = RunFolder.create(cell.config.folder(), cell.config.seed)
            self.folder.yaml("config.yaml", cell.config.resolved)
            self.folder.last.touch()
        self.folder.point_latest()
        self.open = contextlib.ExitStack()
        self.open.enter_context(self.folder.lock())
        type(self).begun.append(self)

    def accuracy(self, epoch):
        """The better, the nearer the learning rate is to 0.1."""
        lr = self.cell.config.train.lr
        return 0.9 * (1 - 0.5**epoch) - 0.1 * abs(math.log10(lr / 0.1))

    def poll(self):
        if self.returncode is not None:
            return self.returncode
        Training.looks += 1
        if Training.looks == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        if self.signals:
            return self.end(130)
        if self.fails(self.cell):
            with open(self.cell.log, "a") as log:
                log.write("error: the loss is not finite\n")
            return self.end(2)
        if self.cell.until is not None:
            for epoch in self.cell.keep:
                self.cell.checkpoint_file(epoch).touch()
            return self.end(0)
        epoch = len(self.folder.metrics()) + 1
        if epoch > EPOCHS:  # after the last evaluation, a run still writes its summary
            self.folder.json("summary.json", {})
            return self.end(0)
        accuracy = self.accuracy(epoch)
        self.folder.log({"epoch": epoch, "accuracy/node_mean": accuracy, METRIC["name"]: accuracy})
        return None

    def end(self, status):
        self.open.close()
        self.returncode = status
        return status

    def send_signal(self, number):
        self.signals.append(number)


@pytest.fixture
def fast(monkeypatch):
    """Optuna's storages are in memory, files do not wait for the disk, and no pictures are drawn."""
    storages = collections.defaultdict(optuna.storages.InMemoryStorage)
    monkeypatch.setattr(search, "open_storage", lambda file, mode: storages[file.parent])
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(run, "write_search_pictures", lambda folder: [])
    return storages


@pytest.fixture
def begun(monkeypatch, fast):
    """The stand-ins that were started."""
    monkeypatch.setattr(Training, "begun", [], raising=False)
    monkeypatch.setattr(Training, "looks", 0)
    monkeypatch.setattr(search, "INTERVAL", 0)

    def start(runner, cell):
        cell.state = "running"
        process = Training(cell)
        runner.processes.add(process)
        return process

    monkeypatch.setattr(search.Search, "start_process", start)
    for module in (plan, search):
        monkeypatch.setattr(module, "plan_cell", plan_quickly)
    return Training.begun


PLAN_CELL = plan.plan_cell
PARSED: list = []


def plan_quickly(sweep, path, runs, name, point, draft, file=None):
    """Plans a cell whose learning rate alone varies without parsing its config, which takes a quarter of a second."""
    lr = point.get("train.lr", 0)
    if lr <= 0 or FIXED | {"train.lr": lr} != point:
        return PLAN_CELL(sweep, path, runs, name, point, draft, file)
    if not PARSED:
        PARSED.append(PLAN_CELL(sweep, path, runs, name, point, draft, file).config)
    config, folder = copy.copy(PARSED[0]), plan.sweep_folder(sweep, path, runs)
    config.train = dataclasses.replace(config.train, lr=lr)
    config.run = dataclasses.replace(config.run, dir=str(folder), name=name)
    config.resolved = config.resolved | {"train": config.resolved["train"] | {"lr": lr}}
    return plan.Cell(name, point, [], config, None)


@pytest.fixture
def early(monkeypatch):
    """TPE learns from the third trial on."""
    tpe = functools.partial(optuna.samplers.TPESampler, n_startup_trials=3)
    monkeypatch.setattr(optuna.samplers, "TPESampler", tpe)


@pytest.fixture
def sweep(file, tmp_path):
    """Writes a search over ring_digits and runs it; returns the exit status."""

    def call(parameters=LR, *options, file_name="some", **others):
        epochs = {
            "train.epochs": {"value": EPOCHS},
            "train.evaluate_every": {"value": 1},
            "distillation": {"value": None},
        }
        content = {"method": "bayes", "run_cap": 6, "metric": METRIC} | others
        path = file(epochs | parameters, file_name, **content)
        return main(["sweep", str(path), "--dir", str(tmp_path / "runs"), *options])

    call.folder = tmp_path / "runs" / "some"
    return call


def trials(folder):
    return optuna.load_study(study_name="sweep", storage=search.open_storage(folder / "search.db", "rwc")).trials


def prepare(path, runs, jobs=1):
    """A search that has not begun to run."""
    content = read_sweep(path)
    cells = share_initial_trainings(search.plan_probes(content, path, runs), runs)
    Path(runs, path.stem).mkdir(parents=True, exist_ok=True)
    return search.Search(content, path, runs, cells, jobs, "some")


class TestParameters:
    @pytest.mark.parametrize(
        ("entry", "expected"),
        [
            ({"min": 0.5, "max": 2}, FloatDistribution(0.5, 2.0)),
            ({"min": 1, "max": 7}, IntDistribution(1, 7)),
            ({"distribution": "log_uniform_values", "min": 0.01, "max": 1}, FloatDistribution(0.01, 1.0, log=True)),
            ({"distribution": "inv_log_uniform_values", "min": 2, "max": 9}, FloatDistribution(2.0, 9.0, log=True)),
            ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}, FloatDistribution(0.0, 1.0)),
            ({"values": [None, 1, "a", 1]}, CategoricalDistribution(["null", "1", '"a"'])),
            ({"value": {"b": [1], "a": 2}}, CategoricalDistribution(['{"a": 2, "b": [1]}'])),
        ],
    )
    def test_have_the_distributions_of_the_file(self, entry, expected):
        assert search.build_distribution(entry) == expected

    @pytest.mark.parametrize(("kind", "low", "high"), [("log_uniform", 0.1, 10), ("inv_log_uniform", 0.1, 10)])
    def test_whose_bounds_are_exponents(self, kind, low, high):
        for name in (kind, f"q_{kind}" if kind == "log_uniform" else kind):
            entry = {"distribution": name, "min": math.log(low), "max": math.log(high)}
            drawn = search.build_distribution(entry)
            assert (drawn.low, drawn.high, drawn.log) == (pytest.approx(0.1), pytest.approx(10), True)

    def test_are_rounded_and_read_back_as_the_file_has_them(self):
        tenths = {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.1}
        assert [search.decode(v, tenths) for v in (0.26, 0.34, 0.96)] == [0.3, 0.3, 1.0]
        values = [None, 1, 1.5, "1", True, {"class_path": "A", "init_args": {"x": [1, 2]}}]
        stored = search.build_distribution({"values": values}).choices
        assert [search.decode(text, {"values": values}) for text in stored] == values

    def test_of_every_kind_reach_the_cells_in_their_ranges(self, sweep, begun):
        parameters = LR | {
            "seed": {"min": 1, "max": 3},
            "gossip": {"parameters": {"momentum": {"distribution": "q_uniform", "min": 0.5, "max": 0.9, "q": 0.2}}},
            "node.loss": {"values": ["CrossEntropy", {"class_path": "BalancedSoftmax", "init_args": {"tau": 0.5}}]},
        }
        assert sweep(parameters, run_cap=5) == 0
        for process in begun:
            config = process.cell.config
            assert config.seed in (1, 2, 3)
            assert 0.001 <= config.train.lr <= 1
            assert round(config.gossip.momentum, 12) in (0.4, 0.6, 0.8, 1.0)  # multiples of q, as W&B rounds
            stored = json.loads((process.cell.log.parent / "cell.json").read_text())
            assert config.seed == stored["seed"]
            assert stored["gossip"]["momentum"] == config.gossip.momentum
        assert {type(p.cell.config.node.loss).__name__ for p in begun} == {"CrossEntropy", "BalancedSoftmax"}
        assert [p.cell.name.split(",")[0] for p in begun] == [f"trial=00{i}" for i in range(5)]


class TestSearch:
    def test_comes_nearer_to_the_optimum_than_random_draws(self, sweep, begun, early):
        """Half of random draws are more than 0.75 decades from 0.1, in 0.001 to 1."""
        assert sweep(run_cap=14) == 0
        distances = [abs(math.log10(p.cell.config.train.lr / 0.1)) for p in begun]
        assert len(distances) == 14
        assert np.median(distances[7:]) < 0.5
        assert [t.state for t in trials(sweep.folder)] == [TrialState.COMPLETE] * 14

    def test_reports_every_evaluation_and_the_last_as_the_result(self, sweep, begun):
        sweep(run_cap=1)
        (trial,) = trials(sweep.folder)
        expected = {epoch: begun[0].accuracy(epoch) for epoch in range(1, EPOCHS + 1)}
        assert trial.intermediate_values == pytest.approx(expected)
        assert trial.value == pytest.approx(expected[EPOCHS])

    def test_a_stopped_search_draws_what_it_would_have_drawn(self, sweep, begun, fast, early, monkeypatch, capsys):
        """It is stopped in the middle of its fourth run, which goes on in its folder."""
        assert sweep(run_cap=7) == 0
        whole = [t.params for t in trials(sweep.folder)]
        shutil.rmtree(sweep.folder)
        fast.clear()
        begun.clear()
        monkeypatch.setattr(Training, "stop_at", Training.looks + 3 * (EPOCHS + 1) + 3)
        assert sweep(run_cap=7) == 1
        assert "stopping; the same command continues the sweep" in capsys.readouterr().out
        assert [p.returncode for p in begun] == [0, 0, 0, 130]
        assert len(begun[-1].folder.metrics()) == 3
        monkeypatch.setattr(Training, "stop_at", None)
        assert sweep(run_cap=7) == 0
        assert [t.params for t in trials(sweep.folder)] == whole
        assert len(list(begun[3].cell.log.parent.glob("2*"))) == 1
        assert len(begun) == 4 + 4

    def test_goes_on_after_kill_9_with_its_open_trials(self, file, tmp_path, begun):
        """The process of one trial has died with it; that of the other one is still training."""
        fixed = {key: {"value": value} for key, value in FIXED.items()}
        path = file(LR | fixed, method="bayes", run_cap=2, metric=METRIC)
        killed = prepare(path, str(tmp_path / "runs"), jobs=2)
        for _ in range(3):
            killed.advance()
        died, survived = begun
        died.open.close()
        again = prepare(path, str(tmp_path / "runs"), jobs=2)
        again.advance()
        assert len(begun) == 3
        assert again.cells[1].state == "running, started by another sweep"
        while survived.poll() is None:
            again.advance()
        while not again.advance():
            pass
        assert len(begun) == 3
        assert begun[2].folder.path == died.folder.path
        assert [cell.state for cell in again.cells] == ["done", "done"]
        assert [t.value for t in trials(tmp_path / "runs" / "some")] == [p.accuracy(EPOCHS) for p in (died, survived)]

    def test_a_larger_run_cap_adds_trials(self, sweep, begun):
        assert sweep(run_cap=2) == 0
        assert sweep(run_cap=3) == 0
        assert len(begun) == len(trials(sweep.folder)) == 3

    def test_two_cells_run_at_once(self, sweep, begun, monkeypatch):
        most = []
        poll = Training.poll
        monkeypatch.setattr(
            Training, "poll", lambda self: most.append(sum(p.returncode is None for p in begun)) or poll(self)
        )
        assert sweep(LR, "--jobs", "2", run_cap=4) == 0
        assert max(most) == 2

    def test_the_same_parameters_are_not_trained_twice(self, sweep, begun, capsys):
        assert sweep({"train.lr": {"values": [0.1, 0.01]}}, run_cap=5) == 0
        assert len(begun) == 2
        assert len(trials(sweep.folder)) == 5
        assert "repeats trial=00" in capsys.readouterr().out

    def test_minimizes_where_the_goal_says_so(self, sweep, begun):
        metric = METRIC | {"goal": "minimize"}
        assert sweep(run_cap=3, metric=metric, early_terminate=EARLY) == 0
        values = [p.accuracy(5) for p in begun]
        expected = [i > 0 and values[i] > min(values[:i]) for i in range(3)]
        assert [t.state == TrialState.PRUNED for t in trials(sweep.folder)] == expected

    def test_trials_that_fail_are_tried_again_by_the_same_command(self, sweep, begun, monkeypatch, capsys):
        monkeypatch.setattr(Training, "fails", staticmethod(lambda cell: cell.name.startswith("trial=001")))
        assert sweep(run_cap=3) == 1
        assert "failed: the loss is not finite" in capsys.readouterr().out
        monkeypatch.setattr(Training, "fails", staticmethod(lambda cell: False))
        assert sweep(run_cap=3) == 0
        assert len(begun) == 4
        assert len(trials(sweep.folder)) == 3

    def test_stops_where_the_first_three_trials_fail(self, sweep, begun, monkeypatch, capsys):
        monkeypatch.setattr(Training, "fails", staticmethod(lambda cell: True))
        assert sweep(run_cap=9) == 1
        assert len(begun) == 3
        assert "the first 3 trials failed" in capsys.readouterr().out

    def test_a_metric_that_no_evaluation_has_is_named(self, sweep, begun, capsys):
        assert sweep(run_cap=9, metric={"name": "validation/nod_mean", "goal": "maximize"}) == 1
        said = capsys.readouterr().out
        assert said.count("do not have 'validation/nod_mean'. Did you mean 'validation/node_mean'?") == 1
        assert len(begun) == 3

    def test_a_combination_that_is_refused_does_not_end_the_others(self, sweep, begun, capsys):
        """The probes have neither combination of a late exchange with few epochs."""
        parameters = {
            "train.epochs": {"values": [4, EPOCHS]},
            "distillation": {"values": [{"class_path": "IDKD", "init_args": {"start": s}} for s in (2, 6)]},
        }
        assert sweep(parameters, run_cap=8) == 1
        assert "refused: some.yaml, cell trial=" in capsys.readouterr().out
        starts = [(p.cell.start, p.cell.config.train.epochs) for p in begun if p.cell.until is None]
        assert starts
        assert all(start < epochs for start, epochs in starts)

    def test_trials_that_begin_alike_fork_from_one_initial_training(self, sweep, begun):
        methods = [{"class_path": "IDKD", "init_args": {"start": s}} for s in (2, 4)]
        parameters = {"distillation": {"values": methods}, "data.public.samples": {"min": 100, "max": 300}}
        assert sweep(parameters, run_cap=3) == 0
        training, *cells = (p.cell for p in begun)
        assert (training.until, training.keep) == (4, {2, 4})
        for cell in cells:
            source = training.folder.path / "checkpoints" / f"epoch_{cell.start}.ckpt"
            assert cell.build_command()[-2:] == ["--run.from", str(source)]

    def test_trials_that_begin_differently_share_nothing(self, sweep, begun):
        methods = [{"class_path": "IDKD", "init_args": {"start": s}} for s in (2, 4)]
        assert sweep(LR | {"distillation": {"values": methods}}, run_cap=2) == 0
        assert all(p.cell.until is None and p.cell.source is None for p in begun)


def halve(values, eta):
    """Asynchronous successive halving with one check: which of these values, as they come, are among the best 1 /
    eta, but at least one, of those so far."""
    kept = []
    for i, value in enumerate(values):
        better = sum(other > value for other in values[: i + 1])
        kept.append(better < max(1, (i + 1) // eta))
    return kept


class TestPruning:
    def test_keeps_the_best_half_at_the_only_check(self, sweep, begun, capsys):
        """One check lies below 8 evaluations, since the next would be after 10."""
        assert sweep(run_cap=10, early_terminate=EARLY) == 0
        kept = halve([p.accuracy(5) for p in begun], eta=2)
        assert [t.state == TrialState.COMPLETE for t in trials(sweep.folder)] == kept
        assert 1 < sum(kept) < 10
        for process, whole in zip(begun, kept, strict=True):
            assert len(process.folder.metrics()) == (EPOCHS if whole else 5)
            assert process.folder.file("summary.json").exists() == whole
            assert process.signals == ([] if whole else [signal.SIGINT])
            assert process.folder.has_checkpoint()
            assert ("pruned after 5 evaluations" in process.cell.log.read_text()) != whole
            assert process.cell.state == ("done" if whole else "pruned")
        assert f"{sum(kept)} of 10 trials done, {10 - sum(kept)} pruned" in " ".join(capsys.readouterr().out.split())

    @pytest.mark.parametrize(
        ("keys", "checks"),
        [
            ({"min_iter": 2}, {2, 6}),
            ({"min_iter": 1, "eta": 2}, {1, 2, 4}),
            ({"max_iter": 8, "s": 1, "eta": 2}, {4}),
            ({"max_iter": 8, "s": 2, "eta": 2}, {2, 4}),
        ],
    )
    def test_checks_after_the_evaluations_that_the_file_gives(self, sweep, begun, keys, checks):
        assert sweep(run_cap=9, method="random", early_terminate={"type": "hyperband"} | keys) == 0
        pruned = {len(p.folder.metrics()) for p in begun if p.cell.state == "pruned"}
        assert pruned <= checks
        assert min(checks) in pruned

    def test_a_grid_keeps_its_cells_and_their_names(self, sweep, begun):
        """The first two checks are in an order where each trial is worse than those before."""
        rates = [0.1, 0.05, 0.03, 0.01]
        assert sweep({"train.lr": {"values": rates}}, method="grid", run_cap=None, early_terminate=EARLY) == 0
        assert [p.cell.name for p in begun] == [f"lr={rate}" for rate in rates]
        assert [p.cell.state for p in begun] == ["done", "pruned", "pruned", "pruned"]
        assert [json.loads(t.params["train.lr"]) for t in trials(sweep.folder)] == rates

    def test_more_random_draws_may_have_further_values(self, sweep, begun):
        parameters = {"train.lr": {"values": [0.1, 0.05, 0.03]}, "seed": {"distribution": "q_normal", "mu": 9, "q": 1}}
        for cap in (1, 8):
            assert sweep(parameters, method="random", run_cap=cap, early_terminate=EARLY) == 0
        assert len({p.cell.config.train.lr for p in begun}) == 3
        assert {t.params["seed"] for t in trials(sweep.folder)} == {p.cell.config.seed for p in begun}

    def test_a_pruned_trial_stays_pruned_and_is_not_repeated(self, sweep, begun):
        rates = {"train.lr": {"values": [0.1, 0.05]}}
        for _ in range(2):
            assert sweep(rates, method="grid", run_cap=None, early_terminate=EARLY) == 0
        assert len(begun) == 2

    def test_a_trial_whose_sweep_was_killed_while_it_ended_is_pruned(self, sweep, begun, monkeypatch):
        rates = {"train.lr": {"values": [0.1, 0.05]}}
        monkeypatch.setattr(Training, "stop_at", EPOCHS + 7)  # the look in which the signal is answered
        tell = optuna.Study.tell
        monkeypatch.setattr(optuna.Study, "tell", lambda self, n, v=None, state=None: v is None or tell(self, n, v))
        sweep(rates, method="grid", run_cap=None, early_terminate=EARLY)
        monkeypatch.setattr(optuna.Study, "tell", tell)
        monkeypatch.setattr(Training, "stop_at", None)
        assert sweep(rates, method="grid", run_cap=None, early_terminate=EARLY) == 0
        assert len(begun) == 2
        assert [t.state for t in trials(sweep.folder)] == [TrialState.COMPLETE, TrialState.PRUNED]


class TestMistakes:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"metric": None}, ["metric is missing", "validation/node_mean"]),
            ({"metric": {"goal": "maximize"}}, ["metric.name", "name of a metric"]),
            ({"metric": {"name": "a"}}, ["metric.goal is missing", "maximize, minimize"]),
            ({"metric": METRIC | {"goal": "maximise"}}, ["metric.goal: maximise", "'maximize'"]),
            ({"metric": METRIC | {"gaol": 1}}, ["metric: key: 'gaol'", "'goal'"]),
            ({"run_cap": None}, ["run_cap is missing", "how many trials"]),
            ({"method": "bayess"}, ["method: bayess", "'bayes'"]),
            ({"early_terminate": {"type": "envelope"}}, ["early_terminate.type: envelope", "hyperband"]),
            ({"early_terminate": "hyperband"}, ["early_terminate: hyperband given", "min_iter"]),
            ({"early_terminate": {"type": "hyperband"}}, ["either min_iter, or max_iter and s"]),
            ({"early_terminate": {"type": "hyperband", "min_iter": 1, "max_iter": 9, "s": 1}}, ["either min_iter"]),
            ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, ["early_terminate.s is missing"]),
            ({"early_terminate": {"type": "hyperband", "min_iter": 1, "s": 2}}, ["max_iter is missing"]),
            ({"early_terminate": {"type": "hyperband", "min_iters": 1}}, ["key: 'min_iters'", "'min_iter'"]),
            ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, ["min_iter: 0", "whole number from 1"]),
            ({"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 1.5}}, ["eta: 1.5", "from 2"]),
            ({"early_terminate": {"type": "hyperband", "min_iter": 1, "strict": True}}, ["strict: True", "Optuna"]),
            ({"early_terminate": {"type": "hyperband", "min_iter": 9}}, ["min_iter: 9", "1 to 8", "evaluate_every"]),
            ({"parameters": {"train.lr": {"distribution": "normal", "mu": 1}}},
             ["parameters.train.lr.distribution: normal", "log_uniform_values"]),
            ({"parameters": {"train.lr": {"values": [0.1, 0.2], "probabilities": [1, 2]}}},
             ["train.lr.distribution: categorical_w_probabilities", "Optuna"]),
            ({"parameters": {"train.lr": {"values": [0.1, 0]}}}, ["cell lr=0", "train.lr", "above 0"]),
            ({"parameters": {"train.lr": {"min": -0.1, "max": 0.1}}}, ["cell lr=-0.1", "train.lr", "above 0"]),
        ],
    )  # fmt: skip
    def test_is_reported_before_any_run(self, sweep, begun, capsys, change, words):
        parameters = change.pop("parameters", LR)
        assert sweep(parameters, **change) == 2
        said = capsys.readouterr().err
        for word in words:
            assert word in said
        assert said.count("\n") == 1
        assert not begun

    def test_a_search_on_slurm(self, sweep, capsys):
        assert sweep(LR, "--on", "slurm") == 2
        assert "--on: slurm given; allowed: here, for method bayes and for early_terminate" in capsys.readouterr().err

    def test_a_missing_optuna_names_the_extra(self, sweep, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "optuna", None)
        assert sweep() == 2
        assert "pip install lightning-idkd[search]" in capsys.readouterr().err
        assert not sweep.folder.exists()

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            ({"parameters": {"train.lr": {"values": [0.1, 0.3]}}}, "other parameters: train.lr"),
            ({"metric": METRIC | {"goal": "minimize"}}, "other metric"),
            ({"early_terminate": {"type": "hyperband", "min_iter": 1}}, "other early_terminate"),
        ],
    )
    def test_the_storage_of_another_sweep_file(self, sweep, begun, capsys, change, what):
        assert sweep(run_cap=1) == 0
        assert sweep(change.pop("parameters", LR), run_cap=1, **change) == 2
        said = capsys.readouterr().err
        assert f"{sweep.folder}/search.db' is the search of another sweep file ({what})" in said
        assert len(begun) == 1

    def test_a_damaged_storage(self, sweep, capsys):
        sweep.folder.mkdir(parents=True)
        (sweep.folder / "search.db").write_bytes(b"no database at all" * 100)
        assert sweep() == 2
        assert "cannot be used as the storage of this search (file is not a database)" in capsys.readouterr().err

    def test_keys_without_an_effect_are_named(self, sweep, begun, capsys):
        assert sweep(run_cap=1, project="p", metric=METRIC | {"target": 0.9}) == 0
        assert capsys.readouterr().out.startswith("project, metric.target have no effect without W&B's server\n")

    def test_a_search_by_test_accuracy_is_pointed_out(self, sweep, begun, capsys):
        for name, pointed_out in (("accuracy/node_mean", True), (METRIC["name"], False)):
            assert sweep(run_cap=1, name=name, metric=METRIC | {"name": name}) == 0
            assert ("accuracy/node_mean is measured on test samples" in capsys.readouterr().out) == pointed_out

    def test_a_storage_that_cannot_be_written_any_more(self, sweep, begun, monkeypatch, capsys):
        def fail(*_, **__):
            raise optuna.exceptions.StorageInternalError("database or disk is full")

        monkeypatch.setattr(optuna.Study, "tell", fail)
        assert sweep(run_cap=1) == 2
        assert "search.db' cannot be written (database or disk is full)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A search whose result depends on x alone, by (x - 0.3)²."""
    folder = tmp_path_factory.mktemp("search")
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder}/search.db")
    study = optuna.create_study(study_name="sweep", storage=storage, direction="minimize")
    study.set_user_attr("sweep", {"metric": {"name": "loss", "goal": "minimize"}})
    rng = np.random.default_rng(0)
    classes = CategoricalDistribution(['{"class_path": "a.IDKD"}', "null"])
    spaces = {"x": FloatDistribution(0, 1), "lr": FloatDistribution(1e-3, 1, log=True), "c": classes}
    spaces["fixed"] = IntDistribution(3, 3)
    for i in range(24):
        point = {"x": rng.uniform(), "lr": 10 ** rng.uniform(-3, 0), "c": spaces["c"].choices[i % 2], "fixed": 3}
        value, state = (point["x"] - 0.3) ** 2, TrialState.PRUNED if i % 6 == 5 else TrialState.COMPLETE
        study.add_trial(optuna.create_trial(params=point, distributions=spaces, value=value, state=state))
    return folder


class TestPictures:
    def test_are_drawn_without_a_change_to_the_storage(self, folder):
        before = (folder / "search.db").read_bytes(), sorted(folder.iterdir())
        files = search_pictures.write_search_pictures(folder)
        assert [f.name for f in files] == ["importance.svg", "importance.png", "trials.svg", "trials.png"]
        assert all(f.stat().st_size > 1000 for f in files)
        assert (folder / "search.db").read_bytes() == before[0]
        assert set(folder.iterdir()) == {*before[1], *files}

    def test_rank_the_parameter_that_matters_first(self, folder):
        study = search_pictures.read_study(folder / "search.db")
        shares = search_pictures.rank_parameters(study, ["lr", "c", "x"])
        assert next(iter(shares)) == "x"
        assert shares["x"] > 0.6
        assert sum(shares.values()) == pytest.approx(1)

    def test_have_a_line_for_every_trial_and_the_best_in_orange(self, folder):
        study = search_pictures.read_study(folder / "search.db")
        done = [t for t in study.trials if t.state == TrialState.COMPLETE]
        pruned = [t for t in study.trials if t.state == TrialState.PRUNED]
        figure = search_pictures.draw_trials(done, pruned, ["x", "lr"], "loss", "minimize")
        (axes,) = figure.axes
        lines = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 3]
        assert len(lines) == len(done) == 20
        best = min(done, key=lambda t: t.value)
        (orange,) = (line.get_ydata() for line in axes.lines if line.get_color() == search_pictures.colours.ORANGE)
        assert orange[:2] == pytest.approx([best.params["x"], (math.log10(best.params["lr"]) + 3) / 3])
        assert orange[2] == min(line[2] for line in lines)

    def test_of_no_search_are_none(self, tmp_path, capsys):
        assert search_pictures.write_search_pictures(tmp_path) == []
        (tmp_path / "search.db").write_text("no database")
        assert search_pictures.write_search_pictures(tmp_path) == []
        assert "is not drawn" in capsys.readouterr().err

    def test_of_a_folder_with_signs_of_addresses_lie_in_it(self, folder, tmp_path):
        place = tmp_path / "50%41 #1?" / "{x}"
        place.mkdir(parents=True)
        storage = search_pictures.open_storage(place / "search.db", "rwc")
        study = optuna.create_study(study_name="sweep", storage=storage)
        study.set_user_attr("sweep", {"metric": {"name": "$\\frac$", "goal": "minimize"}})
        study.add_trials(search_pictures.read_study(folder / "search.db").trials)
        assert len(search_pictures.write_search_pictures(place)) == 4
        assert len(list(place.iterdir())) == 5
        assert [path.name for path in tmp_path.rglob("*") if path.parent != place] == ["50%41 #1?", "{x}"]

    def test_of_another_program_are_none(self, tmp_path, capsys):
        storage = search_pictures.open_storage(tmp_path / "search.db", "rwc")
        study = optuna.create_study(study_name="sweep", storage=storage)
        for x in (0.1, 0.2):
            trial = optuna.create_trial(params={"x": x}, distributions={"x": FloatDistribution(0, 1)}, value=x)
            study.add_trial(trial)
        assert search_pictures.write_search_pictures(tmp_path) == []
        assert "is not drawn: it is damaged, or not that of a sweep" in capsys.readouterr().err

    def test_follow_a_search(self, sweep, begun, monkeypatch, capsys):
        monkeypatch.setattr(run, "write_search_pictures", lambda folder: [folder / "a.svg"])
        assert sweep(run_cap=1) == 0
        assert f"drawn: {sweep.folder}/a.svg" in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_search_that_is_killed_goes_on(file, tmp_path, monkeypatch):
    """kill -9 of the sweep leaves its two runs, which come to their end; the same command takes them over."""
    path = file(LR | {"train.epochs": {"value": 2}, "distillation": {"value": None}, "data.public": {"value": None}},
                method="bayes", run_cap=2, metric=METRIC)  # fmt: skip
    command = ["sweep", str(path), "--jobs", "2", "--dir", str(tmp_path / "runs")]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_idkd", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    running = 0
    while running < 2:
        running += ": running" in process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert main(command) == 0
    values = []
    for cell in sorted((tmp_path / "runs" / "some").glob("trial=*")):
        (run,) = (folder for folder in cell.glob("2*"))
        values.append(RunFolder(run).summary()["validation"]["node_mean"])
    assert [t.value for t in trials(tmp_path / "runs" / "some")] == values
    assert len(values) == 2
