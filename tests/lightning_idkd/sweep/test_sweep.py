"""Sweep files: their keys, cells and shared initial trainings, and sweeps with a failing cell or stopped half-way."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import yaml
from scipy import stats

from lightning_idkd.cli import main
from lightning_idkd.config.parse import configure
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.sweep import command_line, plan, runner
from lightning_idkd.sweep import file as sweep_file

SWEEPS = sorted((Path(__file__).parents[3] / "configs" / "sweeps").glob("*.yaml"))
METHODS = {
    "values": [
        None,
        {"class_path": "VanillaKD", "init_args": {"start": 2}},
        {"class_path": "IDKD", "init_args": {"start": 2}},
    ]
}


class TestCells:
    def test_a_grid_is_the_product_in_the_order_of_the_file(self):
        points = sweep_file.list_points(
            {"method": "grid", "parameters": {"a": {"values": [1, 2]}, "b": {"values": [3, 4]}, "c": {"value": 5}}}
        )
        assert [tuple(p.values()) for p in points] == [(1, 3, 5), (1, 4, 5), (2, 3, 5), (2, 4, 5)]

    def test_random_draws_lie_in_their_ranges_and_are_the_same_every_time(self):
        entries = {
            "lr": {"min": 0.001, "max": 0.1, "distribution": "log_uniform_values"},
            "n": {"min": 2, "max": 5},
            "u": {"min": 0.0, "max": 1.0},
        }
        first, again = (
            sweep_file.list_points({"method": "random", "run_cap": 200, "parameters": entries}) for _ in range(2)
        )
        assert first == again
        assert {p["n"] for p in first} == {2, 3, 4, 5}
        assert all(0.001 <= p["lr"] <= 0.1 and 0 <= p["u"] <= 1 for p in first)
        assert sum(p["lr"] < 0.01 for p in first) == pytest.approx(100, abs=30)  # half of the decades

    def test_names_say_what_varies_and_only_that(self, file, tmp_path):
        path = file({"seed": {"values": [0, 1]}, "train.lr": {"value": 0.05}, "distillation": METHODS})
        names = [c.name for c in plan.plan_cells(path, str(tmp_path / "runs"))]
        assert names[:3] == [
            "seed=0,distillation=None",
            "seed=0,distillation=VanillaKD-start2",
            "seed=0,distillation=IDKD-start2",
        ]
        assert len(set(names)) == 6

    def test_names_go_through_lists_of_classes_and_of_numbers(self):
        parts = [
            {"class_path": "HuggingFace", "init_args": {"path": "a/b", "limit": 5}},
            {"class_path": "lightning_idkd.data.Noise"},
        ]
        both = {"class_path": "Concat", "init_args": {"parts": parts}}
        name = plan.describe_parameters({"data.public": both, "train.schedule.milestones": [0.6, 8], "callbacks": []})
        assert name == "public=Concat-partsHuggingFace-pathb-limit5+Noise,milestones=0.6+8,callbacks=none"

    def test_long_names_are_cut_and_stay_apart(self):
        names = [plan.describe_parameters({"a": "x" * 300 + end}) for end in "yz"]
        assert names[0] != names[1]
        assert max(map(len, names)) < 200

    def test_cells_that_differ_after_the_start_share_their_initial_training(self, file, tmp_path):
        late = {"class_path": "IDKD", "init_args": {"start": 3}}
        path = file({"seed": {"values": [0, 1]}, "distillation": {"values": [*METHODS["values"], late]}})
        runs = plan.share_initial_trainings(plan.plan_cells(path, str(tmp_path / "runs")), str(tmp_path / "runs"))
        *cells, zero, one = runs
        assert len(cells) == 8
        for first, seed in ((zero, 0), (one, 1)):
            assert (first.until, first.keep, first.config.distillation, first.config.seed) == (3, {2, 3}, None, seed)
            assert all(c.source is first for c in cells if c.config.seed == seed)
        for cell in cells:
            assert cell.source.checkpoint_file(cell.start).name == f"epoch_{cell.start or 3}.ckpt"

    def test_other_sweeps_find_the_same_initial_training(self, file, tmp_path):
        """Their calibration and public set may differ."""
        score = {"class_path": "Youden", "init_args": {"score": "Energy"}}
        folder, runs = str(tmp_path / "runs"), []
        others = {"calibration": {"value": score}, "data.public.samples": {"value": 100}}
        for name, more in (("one", {}), ("two", others)):
            cells = plan.plan_cells(file({"distillation": METHODS} | more, name), folder)
            runs.append(plan.share_initial_trainings(cells, folder))
        assert runs[0][-1].folder.path == runs[1][-1].folder.path
        assert {c.name for c in runs[0]} == {c.name for c in runs[1]}

    def test_what_differs_after_the_exchange_alone_may_differ(self, file, tmp_path):
        """The learning rate drops at 0.6 of 4 epochs, or later; the exchange is before epoch 2."""
        late = {"class_path": "Step", "init_args": {"milestones": [0.9]}}
        early = {"class_path": "Step", "init_args": {"milestones": [0.25]}}
        path = file({"train.schedule": {"values": [late, {"class_path": "Step"}, early]}, "distillation": METHODS})
        runs = plan.share_initial_trainings(plan.plan_cells(path, str(tmp_path / "runs")), str(tmp_path / "runs"))
        sources = [c.source.name for c in runs if c.source]
        assert len(sources) == 9
        assert len(set(sources[:6])) == 1
        assert len(set(sources)) == 2

    def test_other_learning_rates_share_nothing(self, file, tmp_path):
        cells = plan.plan_cells(file({"train.lr": {"values": [0.1, 0.2]}}), str(tmp_path / "runs"))
        assert all(cell.source is None for cell in plan.share_initial_trainings(cells, str(tmp_path)))

    def test_cells_that_start_from_a_checkpoint_share_nothing(self, file, tmp_path):
        checkpoint = {"value": "runs/other/latest/checkpoints/epoch_2.ckpt"}
        cells = plan.plan_cells(file({"distillation": METHODS, "run.from": checkpoint}), str(tmp_path / "runs"))
        shared = plan.share_initial_trainings(cells, str(tmp_path / "runs"))
        assert [cell.source for cell in shared] == [None] * 3
        assert all("--run.from" not in cell.build_command() for cell in shared)  # their parameters have it

    def test_a_grid_is_cut_at_run_cap(self):
        assert sweep_file.list_points({"method": "grid", "run_cap": 2, "parameters": {"a": {"values": [1, 2, 3]}}}) == [
            {"a": 1},
            {"a": 2},
        ]

    def test_a_grid_takes_whole_numbers_and_multiples_between_bounds(self):
        entries = {"a": {"min": 2, "max": 4}, "b": {"distribution": "q_uniform", "min": 0.1, "max": 0.7, "q": 0.2}}
        points = sweep_file.list_points({"method": "grid", "parameters": entries})
        expected = np.arange(0.1, 0.7, 0.2)  # as W&B's controller has it
        assert [p["a"] for p in points[::3]] == [2, 3, 4]
        assert [p["b"] for p in points[:3]] == pytest.approx(expected)

    def test_nested_parameters_are_given_nested_and_named_by_their_dotted_keys(self, file, tmp_path):
        entries = {
            "seed": {"value": 3},
            "train": {"parameters": {"lr": {"values": [0.1, 0.2]}, "epochs": {"value": 4}}},
        }
        cells = plan.plan_cells(file(entries), str(tmp_path / "runs"))
        assert [c.name for c in cells] == ["lr=0.1", "lr=0.2"]
        assert [c.parameters for c in cells] == [{"seed": 3, "train": {"lr": lr, "epochs": 4}} for lr in (0.1, 0.2)]
        assert [(c.config.seed, c.config.train.lr, c.config.train.epochs) for c in cells] == [(3, 0.1, 4), (3, 0.2, 4)]

    def test_the_name_of_the_sweep_names_its_folder_else_the_file_does(self, file, tmp_path):
        for name, folder in ((None, "some"), ("OoD scores / 2", "OoD_scores___2")):
            (cell,) = plan.plan_cells(file({"seed": {"value": 0}}, name=name), str(tmp_path / "runs"))
            assert cell.folder.path == tmp_path / "runs" / folder / "cell" / "latest"

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (["a", "b"], ["a,seed=0", "a,seed=1", "b,seed=0", "b,seed=1"]),
            (["a"], ["a,seed=0", "a,seed=1"]),
        ],
    )
    def test_a_run_name_among_the_parameters_begins_the_names(self, file, tmp_path, values, expected):
        path = file({"run.name": {"values": values}, "seed": {"values": [0, 1]}})
        cells = plan.plan_cells(path, str(tmp_path / "runs"))
        assert [c.name for c in cells] == expected
        assert [c.config.run.name for c in cells] == expected

    def test_a_run_name_of_one_cell_is_its_name(self, file, tmp_path):
        path = file({"run.name": {"values": ["a", "b"]}})
        assert [c.name for c in plan.plan_cells(path, str(tmp_path / "runs"))] == ["a", "b"]
        content = yaml.safe_load(path.read_text())
        content["command"] += ["--run.name", "mine"]
        content["parameters"] = {"seed": {"values": [0, 1]}}
        path.write_text(yaml.safe_dump(content))
        assert [c.name for c in plan.plan_cells(path, str(tmp_path / "runs"))] == ["mine,seed=0", "mine,seed=1"]


CASES = {
    "uniform": ({"min": 2.0, "max": 3.0}, stats.uniform(2, 1)),
    "log_uniform": ({"min": -2, "max": 1}, stats.loguniform(np.exp(-2), np.exp(1))),
    "inv_log_uniform": ({"min": -2, "max": 1}, stats.loguniform(np.exp(-1), np.exp(2))),
    "log_uniform_values": ({"min": 0.01, "max": 10}, stats.loguniform(0.01, 10)),
    "inv_log_uniform_values": ({"min": 0.01, "max": 10}, stats.loguniform(0.01, 10)),
    "normal": ({"mu": 1, "sigma": 2}, stats.norm(1, 2)),
    "log_normal": ({"mu": 1, "sigma": 0.5}, stats.lognorm(0.5, scale=np.exp(1))),
    "beta": ({"a": 2, "b": 3}, stats.beta(2, 3)),
}


class TestDistributions:
    """Draws follow the distributions that scipy has by these names, as in W&B's controller."""

    def drawn(self, entry, count=2000):
        points = sweep_file.list_points({"method": "random", "run_cap": count, "parameters": {"a": entry}})
        return [p["a"] for p in points]

    @pytest.mark.parametrize("kind", CASES)
    def test_continuous(self, kind):
        keys, right = CASES[kind]
        values = self.drawn({"distribution": kind} | keys)
        assert stats.kstest(values, right.cdf).statistic < 0.04

    @pytest.mark.parametrize("kind", [k for k in CASES if not k.startswith("inv")])
    @pytest.mark.parametrize("q", [1, 0.25])
    def test_rounded_to_multiples(self, kind, q):
        keys, right = CASES[kind]
        values = self.drawn({"distribution": f"q_{kind}", "q": q} | keys)
        assert {type(v) for v in values} == {type(q)}
        multiples, counts = np.unique(np.array(values) / q, return_counts=True)
        assert multiples == pytest.approx(multiples.round())
        assert counts.cumsum() / len(values) == pytest.approx(right.cdf((multiples + 0.5) * q), abs=0.04)

    def test_defaults_are_those_of_the_schema(self):
        for kind, right in (("normal", stats.norm), ("log_normal", stats.lognorm(1)), ("beta", stats.uniform)):
            assert stats.kstest(self.drawn({"distribution": kind}), right.cdf).statistic < 0.04
        assert {v == int(v) for v in self.drawn({"distribution": "q_normal"}, 50)} == {True}

    def test_categories_with_probabilities(self):
        values = self.drawn({"values": [None, "a", [1]], "probabilities": [0.5, 0.5, 0]})
        assert values.count(None) + values.count("a") == len(values)
        assert values.count(None) == pytest.approx(1000, abs=100)

    def test_constants_and_whole_numbers(self):
        assert set(self.drawn({"value": 3, "distribution": "constant"}, 5)) == {3}
        assert set(self.drawn({"distribution": "int_uniform", "min": 1, "max": 3}, 100)) == {1, 2, 3}

    def test_draws_of_earlier_sweeps_stay(self):
        """A cell is found again by its values, so that they must not change."""
        entries = {
            "lr": {"min": 0.001, "max": 0.1, "distribution": "log_uniform_values"},
            "s": {"value": 1},
            "n": {"min": 2, "max": 5},
        }
        rng, expected = random.Random(0), []
        for _ in range(5):
            lr = math.exp(rng.uniform(math.log(0.001), math.log(0.1)))
            expected.append({"lr": lr, "s": rng.choice([1]), "n": rng.randint(2, 5)})
        assert sweep_file.list_points({"method": "random", "run_cap": 5, "parameters": entries}) == expected


AWKWARD = {
    "seed": 3,
    "distillation": None,
    "data.augment_public": True,
    "data.private": {
        "class_path": "Digits",
        "init_args": {"classes": ["it's", 'a "b"', "None"], "limit": None, "skip": None},
    },
    "logger.group": "two words",
    "gossip": "DSGD",
    "gossip.momentum": 0.5,
    "train.lr": 1e-05,
    "train": {"epochs": 4, "final_merge": True, "schedule": {"class_path": "Step", "init_args": {"milestones": [0.5]}}},
    "run": {"threads": None, "keep": [1, 2], "pictures": False},
}


COMMAND = ["${env}", "${interpreter}", "-m", "${program}", "fit", "--run.dir=${envvar:IDKD_PLACE}/x",
           "--a=${envvar:NO_PLACE}", 7, "${args}", "${args_no_equals}", "${args_no_hyphens}",
           "${args_no_boolean_flags}", "${args_json}", "${args_append_hydra}",
           "${args_override_hydra}", "--config", "${args_json_file}", "a${args}"]  # fmt: skip


class TestAgent:
    """What W&B's own agent makes of a command."""

    @pytest.fixture
    def started(self, tmp_path, monkeypatch):
        """The command that an agent starts for these parameters."""
        from wandb import wandb_agent

        monkeypatch.chdir(tmp_path)
        for variable in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_SWEEP_ID"):
            monkeypatch.setenv(variable, "")
        monkeypatch.setenv("IDKD_PLACE", "/there")

        def start(command, parameters):
            agent, begun = object.__new__(wandb_agent.Agent), {}
            monkeypatch.setattr(wandb_agent, "AgentProcess", lambda **given: begun.update(given) or MagicMock())
            agent._sweep_command, agent._run_processes = list(command), {}
            agent._function = agent._in_jupyter = agent._forward_signals = None
            args = {k: {"value": v} for k, v in parameters.items()}
            agent._command_run({"type": "run", "run_id": "abc", "program": "lightning_idkd", "args": args})
            return begun["command"]

        return start

    def test_every_macro_is_expanded_alike(self, started):
        theirs = started(COMMAND, AWKWARD)
        file = next(w for w in theirs if w.endswith("config-abc.json"))
        assert command_line.expand_command(COMMAND, AWKWARD, file, "lightning_idkd") == theirs
        assert json.loads(Path(file).read_text()) == AWKWARD

    def test_fit_reads_every_spelling_alike(self, started, configs):
        spellings = (["${args}"], ["${args_no_equals}"], ["--config", "${args_json_file}"])
        words = [started(["--config", str(configs / "ring_digits.yaml"), *command], AWKWARD) for command in spellings]
        first, *others = (configure(arguments).resolved for arguments in words)
        assert others == [first, first]
        assert (first["distillation"], first["data"]["augment_public"], first["run"]["pictures"]) == (None, True, False)
        assert (first["train"]["lr"], first["train"]["epochs"], first["run"]["keep"]) == (1e-05, 4, [1, 2])
        assert first["gossip"]["class_path"].endswith(".DSGD")
        assert first["gossip"]["init_args"]["momentum"] == 0.5
        assert first["data"]["private"]["init_args"] == AWKWARD["data.private"]["init_args"]
        others = first["logger"]["group"], first["train"]["final_merge"], first["run"]["threads"]
        assert others == ("two words", True, None)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_sweep_is_expanded_as_the_agent_does_and_parses(path, tmp_path, configs, monkeypatch):
    """W&B replaces ${args_json_file} by a file with the cell's parameters, as a flat object, and ${args} by options."""
    monkeypatch.chdir(configs.parent)
    content = sweep_file.read_sweep(path)
    drawn = {"method": "random"} if content["method"] == "bayes" else {}
    points = sweep_file.list_points(content | drawn)
    for i, point in enumerate(points[:: max(1, len(points) // 8)]):
        (tmp_path / f"{i}.json").write_text(json.dumps(point))
        env, python, flag, module, command, *arguments = content["command"]
        assert (env, python, flag, module, command) == ("${env}", "python", "-m", "lightning_idkd", "fit")
        options = [f"--{k}={v}" for k, v in sorted(point.items(), key=lambda item: item[0] != "config")]
        given = {"${args_json_file}": [str(tmp_path / f"{i}.json")], "${args}": options}
        config = configure([word for a in arguments for word in given.get(a, [a])])
        config.check()
        assert config.seed == point.get("seed", 0)
        if "distillation" in point:
            assert (config.distillation is None) == (point["distillation"] is None)
    assert len(set(plan.name_cells(content, points))) == len(points)


def test_a_config_among_the_parameters_lies_below_the_others(file, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("train: {lr: 0.1, epochs: 3}")
    path = file({"train.lr": {"value": 0.3}, "config": {"value": str(config)}})
    content = yaml.safe_load(path.read_text())
    for macro in ("${args}", "${args_no_equals}"):
        path.write_text(yaml.safe_dump(content | {"command": [*content["command"][:-2], macro]}))
        (cell,) = plan.plan_cells(path, str(tmp_path / "runs"))
        assert (cell.config.train.lr, cell.config.train.epochs) == (0.3, 3)


class TestMistakes:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"parametres": {}}, ["parametres", "'parameters'"]),
            ({"method": "custom"}, ["method", "custom", "grid, random, bayes"]),
            ({"parameters": None}, ["parameters", "missing"]),
            ({"command": ["python"]}, ["command", "${args_json_file}"]),
            ({"parameters": {"train.lr": {"vals": [1]}}}, ["parameters.train.lr", "vals", "values"]),
            ({"parameters": {"seed": {"valeus": [1]}}}, ["parameters.seed", "valeus", "'values'"]),
            ({"parameters": {"seed": {"value": 0, "values": [1]}}},
             ["parameters.seed: value and values given", "one of"]),
            ({"parameters": {"callbacks": {"values": [None]}}}, ["callbacks: null given", "a list"]),
            ({"parameters": {"train.lr": {"min": 0.1, "max": 1}}}, ["train.lr", "grid needs values"]),
            ({"method": "random"}, ["run_cap"]),
            ({"parameters": ["seed"]}, ["parameters", "seed"]),
            ({"parameters": {"seed": {"values": 3}}}, ["parameters.seed.values", "3", "list"]),
            ({"parameters": {"seed": {"values": []}}}, ["parameters.seed.values", "list of one or more"]),
            ({"parameters": {"train.lr": {"min": "1e-3", "max": 1}}}, ["parameters.train.lr.min", "1.0e-3"]),
            ({"method": "random", "run_cap": "many"}, ["run_cap", "many"]),
            ({"method": "random", "run_cap": 1, "parameters": {"train.lr": {"min": 2, "max": 1}}},
             ["train.lr.min", "at most"]),
            ({"command": "fit"}, ["command", "list of words"]),
            ({"command": ["idkd", "fit", "${arg}"]}, ["command: ${arg}", "'args'"]),
            ({"name": 3}, ["name: 3", "a text"]),
            ({"earlyterminate": {}}, ["earlyterminate", "'early_terminate'"]),
            ({"parameters": {"train": {"parameters": {"lr": {"valeus": [1]}}}}},
             ["parameters.train.parameters.lr", "'values'"]),
            ({"parameters": {"train.lr": {"distribution": "normale", "mu": 1}}},
             ["train.lr.distribution: normale", "'normal'"]),
            ({"parameters": {"train.lr": {"distribution": "normal", "max": 1}}},
             ["train.lr: key: 'max'", "normal: mu, sigma"]),
            ({"parameters": {"train.lr": {"max": 1.0}}}, ["train.lr: min missing", "uniform"]),
            ({"parameters": {"train.lr": {"distribution": "log_uniform_values", "min": 0, "max": 1}}},
             ["min: 0", "above 0"]),
            ({"parameters": {"seed": {"values": [0, 1], "probabilities": [1]}}},
             ["seed.probabilities: [1]", "every value"]),
            ({"parameters": {"train.lr": {"distribution": "q_normal", "q": 0}}}, ["train.lr.q: 0", "above 0"]),
            ({"parameters": {"train.lr": {"distribution": "beta"}}}, ["train.lr: a grid needs values", "beta"]),
            ({"parameters": {"train.lrr": {"values": [0.1]}}}, ["cell", "train.lrr", "'lr'"]),
            ({"parameters": {"train.lr": {"values": [0.1, 0]}}}, ["lr=0", "train.lr", "above 0"]),
        ],
    )  # fmt: skip
    def test_is_reported_before_any_run(self, file, tmp_path, capsys, change, words):
        path = file(**({"parameters": {"seed": {"values": [0]}}} | change))
        assert main(["sweep", str(path), "--dir", str(tmp_path / "runs")]) == 2
        said = capsys.readouterr().err
        for word in words:
            assert word in said
        assert not (tmp_path / "runs").exists()

    def test_a_missing_file(self, tmp_path, capsys):
        for path in ("nowhere.yaml", str(tmp_path)):
            assert main(["sweep", path]) == 2
            assert path in capsys.readouterr().err

    def test_a_misspelt_file(self, capsys):
        for path, right in (
            ("sweeps/ood_score", "'sweeps/ood_scores'"),
            ("configs/sweeps/od_scores.yaml", "/ood_scores.yaml'"),
        ):
            assert main(["sweep", path]) == 2
            assert right in capsys.readouterr().err

    def test_a_file_in_the_place_of_the_folder(self, file, tmp_path, capsys):
        (tmp_path / "runs").write_text("")
        assert main(["sweep", str(file({"seed": {"values": [0]}})), "--dir", str(tmp_path / "runs")]) == 2
        assert "--dir" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_sweep_is_completed_and_a_failing_cell_stops_no_other(file, tmp_path, capsys, monkeypatch):
    """Two of four cells diverge in their initial training. A queue's SIGTERM acts as Ctrl-C and ends the sweep once."""
    path = file({"train.lr": {"values": [0.1, 1e9]}, "distillation": {"values": METHODS["values"][1:]}})
    command = ["sweep", str(path), "--jobs", "2", "--dir", str(tmp_path / "runs")]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_idkd", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as in a shell's background
    )
    assert any(": running" in line for line in process.stdout)
    assert main(command) == 2
    assert "another process runs this sweep" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "stopping; the same command continues the sweep" in said
    assert "of 4 cells done" in said
    assert "of 2 initial trainings done" in said
    assert "4 of 4" not in said  # the signal stopped them
    assert "Traceback" not in said
    assert main(command) == 1
    done = capsys.readouterr().out
    assert "not finite" in done
    for method in ("VanillaKD", "IDKD"):
        run = tmp_path / "runs" / "some" / f"lr=0.1,distillation={method}-start2"
        assert len(list(run.glob("2*"))) == 1
        assert "/initial/" in json.loads((run / "latest" / "summary.json").read_text())["from"]
        assert "its initial training failed" in done


def test_cells_of_a_failed_initial_training_show_its_reason_in_watch(file, tmp_path, capsys):
    """Their sweep may be another than the one that is watched; the reason is written once, however often it is run."""
    cells = plan.plan_cells(file({"distillation": METHODS}), str(tmp_path / "runs"))
    (*cells, training) = plan.share_initial_trainings(cells, str(tmp_path / "runs"))
    training.log.parent.mkdir(parents=True)
    training.log.write_text("memory 1 GB\nerror: the loss is not finite\n")
    sweep = runner.Runner([*cells, training], 1)
    sweep.finished[id(training)].set()
    for _ in range(2):
        for cell in cells:
            sweep.run_cell(cell)
    assert {cell.state for cell in cells} == {"failed: its initial training failed"}
    note = f"its initial training failed: the loss is not finite ({training.log})"
    assert cells[0].log.read_text() == f"error: {note}\n"
    assert main(["watch", str(cells[0].log.parents[1])]) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "3 failed"
    assert all(row.endswith(note) for row in rows)


@pytest.mark.parametrize("width", [60, 80])
def test_a_sweeps_table_cuts_no_path(tmp_path, width):
    from rich.console import Console

    config = configure(["--data.private", "Digits", "--run.dir", str(tmp_path)])
    path = "runs/initial/" + "0123456789" * 8 + "/log.txt"
    cell = plan.Cell("a", {}, [], config, None, state=f"failed: bad ({path})")
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(runner.Runner([cell], 1).build_table())
    shown = "".join(line.split("│")[2].strip() for line in console.export_text().splitlines() if line.count("│") > 2)
    assert path in shown


def test_what_a_cell_says_is_shown_as_it_is(tmp_path):
    """Brackets are not read as markup."""
    from rich.console import Console

    config = configure(["--data.private", "Digits", "--run.dir", str(tmp_path)])
    cell = plan.Cell("a[cpu]b", {}, [], config, None, state="failed: cannot open [/data/x]")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(runner.Runner([cell], 1).build_table())
    shown = console.export_text()
    assert "a[cpu]b" in shown
    assert "[/data/x]" in shown


def test_the_table_shows_epochs_of_all_and_the_time_left(file, tmp_path):
    """The run has evaluated epoch 3 of 4 after 30 seconds, just now."""
    (cell,) = plan.plan_cells(file({"seed": {"value": 0}}), str(tmp_path / "runs"))
    run = RunFolder.create(cell.config.folder(), 0)
    line = {"epoch": 3, "accuracy/node_mean": 0.5, "accuracy/consensus": 0.625, "throughput/seconds": 30.0}
    run.log(line)
    cell.state = "running"
    with run.lock():
        table = runner.Runner([cell], 1).build_table()
        shown = [next(iter(column.cells)) for column in table.columns]
    assert shown[:-1] == ["cell", "running", "3/4", "50.0%", "62.5%"]
    assert shown[-1] in ("0:10", "0:09", "0:08")


def test_a_run_that_a_killed_sweep_has_left_is_waited_for(file, tmp_path, monkeypatch):
    """It comes to its end, so that no second process trains the cell."""
    (cell,) = plan.plan_cells(file({"seed": {"value": 0}}), str(tmp_path / "runs"))
    run = RunFolder.create(cell.config.folder(), 0)
    run.yaml("config.yaml", cell.config.resolved)
    left = contextlib.ExitStack()
    left.enter_context(run.lock())
    states = []

    def sleep(_):
        states.append(cell.state)
        if len(states) == 2:
            run.json("summary.json", {})
            left.close()

    monkeypatch.setattr(runner.time, "sleep", sleep)
    monkeypatch.setattr(runner.subprocess, "Popen", None)
    runner.Runner([cell], 1).run_cell(cell)
    assert states == ["running, started by another sweep"] * 2
    assert cell.state == "done"


def test_keys_for_the_server_are_named_in_one_line_and_the_folder_at_the_end(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner.Runner, "run", lambda self: bool(print(self.title)) or True)
    path = file({"seed": {"value": 0}}, name="A sweep", project="p", entity="e",
                description="d", metric={"name": "accuracy/node_mean"})  # fmt: skip
    assert main(["sweep", str(path), "--dir", str(tmp_path / "runs")]) == 0
    first, title, last = capsys.readouterr().out.splitlines()
    assert first == ("project, entity have no effect without W&B's server: all cells run to their end")
    assert title == "A sweep"
    assert last == f"runs: {tmp_path}/runs/A_sweep (a table: idkd compare {tmp_path}/runs/A_sweep)"


def test_processes_of_a_cell_share_the_cores(file, tmp_path, monkeypatch):
    commands = []

    class Process:
        def __init__(self, command, **_):
            commands.append(command)

        def wait(self):
            return 1

    monkeypatch.setattr(runner.subprocess, "Popen", Process)
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 16)
    for devices, threads in ((1, "8"), (4, "2")):
        path = file({"run.devices": {"value": devices}}, f"on{devices}")
        runner.Runner(plan.plan_cells(path, str(tmp_path / "runs")), 2).run()
        assert commands[-1][commands[-1].index("--run.threads") + 1] == threads


@pytest.mark.parametrize(("variables", "status"), [({}, 130), ({"WANDB_SWEEP_ID": "abc"}, 0)])
def test_a_cell_that_an_agent_stops_does_not_count_as_a_failure(variables, status, monkeypatch, configs):
    """W&B's agents take a status above 0 for a failure, and end themselves after three in the first minute."""

    def stopped(config):
        raise KeyboardInterrupt

    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(import_module("lightning_idkd.training.fit"), "fit", stopped)
    assert main(["fit", "--config", str(configs / "ring_digits.yaml")]) == status


@pytest.mark.parametrize(
    ("arguments", "content", "expected"),
    [
        (["SWEEP=graphs"], None, "wandb sweep --project lightning-idkd configs/sweeps/graphs.yaml"),
        (["SWEEP={file}"], "method: grid", "wandb sweep --project lightning-idkd {file}"),
        (["SWEEP={file}"], "project: mine", "wandb sweep  {file}"),
        (["SWEEP=graphs", "WANDB_PROJECT=theirs"], None, "wandb sweep  configs/sweeps/graphs.yaml"),
    ],
)
def test_make_sweep_creates_it_in_the_project_of_the_file_or_the_environment(
    arguments, content, expected, tmp_path, configs
):
    file = tmp_path / "own.yaml"
    file.write_text(content or "")
    command = ["make", "-n", "-o", ".venv/.ready", "sweep", *(a.format(file=file) for a in arguments)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    said = subprocess.run(command, capture_output=True, text=True, cwd=configs.parent, env=env).stdout
    assert expected.format(file=file) in said


def test_make_agent_forwards_signals_and_asks_for_an_id(configs):
    command = ["make", "-o", ".venv/.ready", "agent"]
    said = subprocess.run(
        [*command, "-n", "ID=a/b/c", "ARGS=--count 1"], capture_output=True, text=True, cwd=configs.parent
    ).stdout
    assert "wandb agent --forward-signals --count 1 a/b/c" in said
    without = subprocess.run(command, capture_output=True, text=True, cwd=configs.parent)
    assert "make agent ID=entity/project/id" in without.stdout
    assert without.returncode == 2


def test_make_sweep_says_how_to_do_without_a_server(tmp_path, configs):
    """The virtual environment has a W&B without a login."""
    wandb = tmp_path / "bin" / "wandb"
    wandb.parent.mkdir()
    wandb.write_text("#!/bin/sh\nexit 1\n")
    wandb.chmod(0o755)
    (tmp_path / ".ready").write_text("")
    command = ["make", "sweep", "SWEEP=graphs", f"VENV={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=configs.parent)
    assert done.returncode != 0
    assert f"without a server: {tmp_path}/bin/idkd sweep configs/sweeps/graphs.yaml" in done.stdout.splitlines()
