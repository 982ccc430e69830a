"""Sweep files: what they may say, which cells they make, what is shared, and what happens when one fails or all are stopped."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_idkd import sweep
from lightning_idkd.cli import configure, main
from lightning_idkd.errors import UserError

SWEEPS = sorted((Path(__file__).parents[2] / "configs" / "sweeps").glob("*.yaml"))
QUICK = ["--logger", "null", "--graph.nodes", "4", "--train.epochs", "4", "--data.public.samples", "200", "--run.engine", "loop",
         "--run.pictures", "false"]  # fmt: skip


@pytest.fixture
def file(tmp_path, configs):
    """Writes a sweep file over ring_digits."""

    def write(parameters, name="some", **others):
        command = ["${env}", "python", "-m", "lightning_idkd", "fit", "--config", str(configs / "ring_digits.yaml"), *QUICK,
                   "--config", "${args_json_file}"]  # fmt: skip
        content = {"program": "lightning_idkd", "method": "grid", "parameters": parameters, "command": command} | others
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return path

    return write


METHODS = {
    "values": [None, {"class_path": "VanillaKD", "init_args": {"start": 2}}, {"class_path": "IDKD", "init_args": {"start": 2}}]
}


class TestCells:
    def test_a_grid_is_the_product_in_the_order_of_the_file(self):
        points = sweep.combinations(
            {"method": "grid", "parameters": {"a": {"values": [1, 2]}, "b": {"values": [3, 4]}, "c": {"value": 5}}}
        )
        assert [tuple(p.values()) for p in points] == [(1, 3, 5), (1, 4, 5), (2, 3, 5), (2, 4, 5)]

    def test_random_draws_lie_in_their_ranges_and_are_the_same_every_time(self):
        entries = {
            "lr": {"min": 0.001, "max": 0.1, "distribution": "log_uniform_values"},
            "n": {"min": 2, "max": 5},
            "u": {"min": 0.0, "max": 1.0},
        }
        first, again = (sweep.combinations({"method": "random", "run_cap": 200, "parameters": entries}) for _ in range(2))
        assert first == again
        assert {p["n"] for p in first} == {2, 3, 4, 5}
        assert all(0.001 <= p["lr"] <= 0.1 and 0 <= p["u"] <= 1 for p in first)
        assert sum(p["lr"] < 0.01 for p in first) == pytest.approx(100, abs=30)  # half of the decades

    def test_names_say_what_varies_and_only_that(self, file, tmp_path):
        path = file({"seed": {"values": [0, 1]}, "train.lr": {"value": 0.05}, "distillation": METHODS})
        names = [c.name for c in sweep.cells(path, str(tmp_path / "runs"))]
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
        name = sweep.called({"data.public": both, "train.schedule.milestones": [0.6, 8], "callbacks": []})
        assert name == "public=Concat-partsHuggingFace-pathb-limit5+Noise,milestones=0.6+8,callbacks=none"

    def test_long_names_are_cut_and_stay_apart(self):
        names = [sweep.called({"a": "x" * 300 + end}) for end in "yz"]
        assert names[0] != names[1]
        assert max(map(len, names)) < 200

    def test_cells_that_differ_after_the_start_share_their_initial_training(self, file, tmp_path):
        late = {"class_path": "IDKD", "init_args": {"start": 3}}
        path = file({"seed": {"values": [0, 1]}, "distillation": {"values": [*METHODS["values"], late]}})
        runs = sweep.share(sweep.cells(path, str(tmp_path / "runs")), str(tmp_path / "runs"))
        *cells, zero, one = runs
        assert len(cells) == 8
        for first, seed in ((zero, 0), (one, 1)):
            assert (first.until, first.keep, first.config.distillation, first.config.seed) == (3, {2, 3}, None, seed)
            assert all(c.source is first for c in cells if c.config.seed == seed)
        for cell in cells:
            assert cell.source.checkpoint(cell.start).name == f"epoch_{cell.start or 3}.ckpt"

    def test_other_sweeps_find_the_same_initial_training(self, file, tmp_path):
        """Whatever their calibration and public set."""
        score = {"class_path": "Youden", "init_args": {"score": "Energy"}}
        runs = [
            sweep.share(sweep.cells(file({"distillation": METHODS} | more, name), str(tmp_path / "runs")), str(tmp_path / "runs"))
            for name, more in (("one", {}), ("two", {"calibration": {"value": score}, "data.public.samples": {"value": 100}}))
        ]
        assert runs[0][-1].folder.path == runs[1][-1].folder.path
        assert {c.name for c in runs[0]} == {c.name for c in runs[1]}

    def test_what_differs_after_the_exchange_alone_may_differ(self, file, tmp_path):
        """The learning rate drops at 0.6 of 4 epochs, or later; the exchange is before epoch 2."""
        late = {"class_path": "Step", "init_args": {"milestones": [0.9]}}
        early = {"class_path": "Step", "init_args": {"milestones": [0.25]}}
        path = file({"train.schedule": {"values": [late, {"class_path": "Step"}, early]}, "distillation": METHODS})
        runs = sweep.share(sweep.cells(path, str(tmp_path / "runs")), str(tmp_path / "runs"))
        sources = [c.source.name for c in runs if c.source]
        assert len(sources) == 9
        assert len(set(sources[:6])) == 1
        assert len(set(sources)) == 2

    def test_other_learning_rates_share_nothing(self, file, tmp_path):
        assert all(
            c.source is None
            for c in sweep.share(sweep.cells(file({"train.lr": {"values": [0.1, 0.2]}}), str(tmp_path / "runs")), str(tmp_path))
        )


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_sweep_is_expanded_as_the_agent_does_and_parses(path, tmp_path, configs, monkeypatch):
    """W&B replaces ${args_json_file} by a file with the cell's parameters, as a flat object, and ${args} by options."""
    monkeypatch.chdir(configs.parent)
    content = sweep.read(path)
    points = sweep.combinations(content)
    for i, point in enumerate(points[:: max(1, len(points) // 8)]):
        (tmp_path / f"{i}.json").write_text(json.dumps(point))
        env, python, flag, module, command, *arguments = content["command"]
        assert (env, python, flag, module, command) == ("${env}", "python", "-m", "lightning_idkd", "fit")
        options = [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in point.items()]
        given = {"${args_json_file}": [str(tmp_path / f"{i}.json")], "${args}": options}
        config = configure([word for a in arguments for word in given.get(a, [a])])
        config.check()
        assert config.seed == point.get("seed", 0)
        if "distillation" in point:
            assert (config.distillation is None) == (point["distillation"] is None)
    assert len(sweep.cells(path, str(tmp_path))) == len(points)


def test_a_config_among_the_parameters_comes_first_and_the_other_ones_lie_over_it():
    given = sweep.expanded("${args}", {"train.lr": 0.3, "config": "a.yaml", "distillation": None}, None)
    assert given == ["--config=a.yaml", "--train.lr=0.3", "--distillation=null"]


class TestMistakes:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"parametres": {}}, ["parametres", "'parameters'"]),
            ({"method": "bayes"}, ["method", "bayes", "grid, random"]),
            ({"parameters": None}, ["parameters", "missing"]),
            ({"command": ["python"]}, ["command", "${args_json_file}"]),
            ({"parameters": {"train.lr": {"vals": [1]}}}, ["parameters.train.lr", "vals", "values"]),
            ({"parameters": {"seed": {"valeus": [1]}}}, ["parameters.seed", "valeus", "'values'"]),
            ({"parameters": {"seed": {"value": 0, "values": [1]}}}, ["parameters.seed: value and values given", "one of"]),
            ({"parameters": {"callbacks": {"values": [None]}}}, ["callbacks: null given", "a list"]),
            ({"parameters": {"train.lr": {"min": 0.1, "max": 1}}}, ["train.lr", "grid needs values"]),
            ({"method": "random"}, ["run_cap"]),
            ({"parameters": ["seed"]}, ["parameters", "seed"]),
            ({"parameters": {"seed": {"values": 3}}}, ["parameters.seed.values", "3", "list"]),
            ({"parameters": {"seed": {"values": []}}}, ["parameters.seed.values", "list of one or more"]),
            ({"parameters": {"train.lr": {"min": "1e-3", "max": 1}}}, ["parameters.train.lr.min", "1.0e-3"]),
            ({"method": "random", "run_cap": "many"}, ["run_cap", "many"]),
            ({"method": "random", "run_cap": 1, "parameters": {"train.lr": {"min": 2, "max": 1}}}, ["train.lr.min", "at most"]),
            ({"command": "fit"}, ["command", "list of words"]),
            ({"parameters": {"train.lrr": {"values": [0.1]}}}, ["cell", "train.lrr", "'lr'"]),
            ({"parameters": {"train.lr": {"values": [0.1, 0]}}}, ["lr=0", "train.lr", "above 0"]),
        ],
    )
    def test_is_told_before_any_run(self, file, tmp_path, capsys, change, words):
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
        for path, right in (("sweeps/ood_score", "'sweeps/ood_scores'"), ("configs/sweeps/od_scores.yaml", "/ood_scores.yaml'")):
            assert main(["sweep", path]) == 2
            assert right in capsys.readouterr().err

    def test_a_file_in_the_place_of_the_folder(self, file, tmp_path, capsys):
        (tmp_path / "runs").write_text("")
        assert main(["sweep", str(file({"seed": {"values": [0]}})), "--dir", str(tmp_path / "runs")]) == 2
        assert "--dir" in capsys.readouterr().err

    def test_a_distribution_that_is_not_known(self):
        with pytest.raises(UserError, match=r"distribution: q_normal given; allowed: int_uniform, uniform, log_uniform_values"):
            sweep.combinations(
                {"method": "random", "run_cap": 1, "parameters": {"a": {"min": 0, "max": 1, "distribution": "q_normal"}}}
            )


@pytest.mark.slow
def test_a_stopped_sweep_is_completed_and_a_failing_cell_stops_no_other(file, tmp_path, capsys, monkeypatch):
    """Four cells, of which two diverge in their initial training; ended once by a queue's SIGTERM, which comes as Ctrl-C."""
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
    assert "stopping; the same command goes on" in said
    assert "of 6 done" in said  # four cells and two initial trainings, which were told to stop
    assert "6 of 6 done" not in said
    assert "Traceback" not in said
    assert main(command) == 1
    done = capsys.readouterr().out
    assert "not finite" in done
    for method in ("VanillaKD", "IDKD"):
        run = tmp_path / "runs" / "some" / f"lr=0.1,distillation={method}-start2"
        assert len(list(run.glob("2*"))) == 1
        assert "/initial/" in json.loads((run / "latest" / "summary.json").read_text())["from"]
        assert "its initial training did" in done


def test_what_a_cell_says_is_shown_as_it_is(tmp_path):
    """Brackets are no markup."""
    from rich.console import Console

    config = configure(["--data.private", "Digits", "--run.dir", str(tmp_path)])
    cell = sweep.Cell("a[cpu]b", {}, [], config, None, state="failed: cannot open [/data/x]")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(sweep.Runner([cell], 1).table())
    shown = console.export_text()
    assert "a[cpu]b" in shown
    assert "[/data/x]" in shown


def test_processes_of_a_cell_share_the_cores(file, tmp_path, monkeypatch):
    commands = []

    class Process:
        def __init__(self, command, **_):
            commands.append(command)

        def wait(self):
            return 1

    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    monkeypatch.setattr(sweep.os, "cpu_count", lambda: 16)
    for devices, threads in ((1, "8"), (4, "2")):
        path = file({"run.devices": {"value": devices}}, f"on{devices}")
        sweep.Runner(sweep.cells(path, str(tmp_path / "runs")), 2).run()
        assert commands[-1][commands[-1].index("--run.threads") + 1] == threads


def test_make_sweep_says_how_to_do_without_a_server(tmp_path, configs):
    """In a virtual environment whose W&B knows no login."""
    wandb = tmp_path / "bin" / "wandb"
    wandb.parent.mkdir()
    wandb.write_text("#!/bin/sh\nexit 1\n")
    wandb.chmod(0o755)
    (tmp_path / ".ready").write_text("")
    command = ["make", "sweep", "SWEEP=graphs", f"VENV={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=configs.parent)
    assert done.returncode != 0
    assert f"without a server: {tmp_path}/bin/idkd sweep configs/sweeps/graphs.yaml" in done.stdout.splitlines()
