"""Sweep files: what they may say, which cells they make, what is shared, and what happens when one fails or all are stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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
        assert names[:3] == ["seed=0,distillation=None", "seed=0,distillation=VanillaKD", "seed=0,distillation=IDKD"]
        assert len(set(names)) == 6

    def test_cells_that_differ_after_the_start_share_their_initial_training(self, file, tmp_path):
        runs = sweep.share(sweep.cells(file({"seed": {"values": [0, 1]}, "distillation": METHODS}), str(tmp_path / "runs")))
        assert len(runs) == 6  # the cell without distillation serves
        for cell in runs:
            seed = cell.parameters["seed"]
            assert (cell.source is None) == (cell.parameters["distillation"] is None)
            assert cell.source is None or cell.source.parameters == {"seed": seed, "distillation": None}
            assert cell.keep == ({2} if cell.source is None else set())

    def test_without_such_a_cell_one_run_of_the_initial_training_is_added(self, file, tmp_path):
        late = {"class_path": "IDKD", "init_args": {"start": 3}}
        runs = sweep.share(
            sweep.cells(file({"distillation": {"values": [*METHODS["values"][1:], late]}}), str(tmp_path / "runs"))
        )
        *forks, first = runs
        assert (first.until, first.keep, first.config.distillation) == (3, {2, 3}, None)
        assert all(cell.source is first for cell in forks)

    def test_other_learning_rates_share_nothing(self, file, tmp_path):
        assert all(
            c.source is None for c in sweep.share(sweep.cells(file({"train.lr": {"values": [0.1, 0.2]}}), str(tmp_path / "runs")))
        )


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_sweep_is_expanded_as_the_agent_does_and_parses(path, tmp_path, configs, monkeypatch):
    """W&B replaces ${args_json_file} by a file with the cell's parameters, as a flat object."""
    monkeypatch.chdir(configs.parent)
    content = sweep.read(path)
    for i, point in enumerate(sweep.combinations(content)):
        (tmp_path / f"{i}.json").write_text(json.dumps(point))
        env, python, flag, module, command, *arguments = content["command"]
        assert (env, python, flag, module, command) == ("${env}", "python", "-m", "lightning_idkd", "fit")
        config = configure([str(tmp_path / f"{i}.json") if a == "${args_json_file}" else a for a in arguments])
        config.check()
        assert config.seed == point.get("seed", 0)
        if "distillation" in point:
            assert (config.distillation is None) == (point["distillation"] is None)
    assert len(sweep.cells(path, str(tmp_path))) == i + 1


class TestMistakes:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"parametres": {}}, ["parametres", "'parameters'"]),
            ({"method": "bayes"}, ["method", "bayes", "grid, random"]),
            ({"parameters": None}, ["parameters", "missing"]),
            ({"command": ["python"]}, ["command", "${args_json_file}"]),
            ({"parameters": {"train.lr": {"vals": [1]}}}, ["parameters.train.lr", "vals", "values"]),
            ({"parameters": {"train.lr": {"min": 0.1, "max": 1}}}, ["train.lr", "grid needs values"]),
            ({"method": "random"}, ["run_cap"]),
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
        assert not list((tmp_path / "runs").rglob("config.yaml"))

    def test_a_missing_file(self, capsys):
        assert main(["sweep", "nowhere.yaml"]) == 2
        assert "nowhere.yaml" in capsys.readouterr().err

    def test_a_distribution_that_is_not_known(self):
        with pytest.raises(UserError, match=r"distribution: q_normal given; allowed: int_uniform, uniform, log_uniform_values"):
            sweep.combinations(
                {"method": "random", "run_cap": 1, "parameters": {"a": {"min": 0, "max": 1, "distribution": "q_normal"}}}
            )


@pytest.mark.slow
def test_a_stopped_sweep_is_completed_and_a_failing_cell_stops_no_other(file, tmp_path):
    """Four cells, of which one has a learning rate that diverges."""
    path = file({"train.lr": {"values": [0.1, 1e9]}, "distillation": {"values": METHODS["values"][::2]}})
    command = [sys.executable, "-m", "lightning_idkd", "sweep", str(path), "--jobs", "2", "--dir", str(tmp_path / "runs")]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=alone)
    while not list((tmp_path / "runs").rglob("last.ckpt")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "Traceback" not in said
    done = subprocess.run(command, capture_output=True, text=True, env=alone, timeout=300)
    assert done.returncode == 1
    assert "2 of 4 done" in done.stdout
    assert "not finite" in done.stdout
    for name in ("lr=0.1,distillation=None", "lr=0.1,distillation=IDKD"):
        assert (tmp_path / "runs" / "some" / name / "latest" / "summary.json").exists()
    fork = json.loads((tmp_path / "runs" / "some" / "lr=0.1,distillation=IDKD" / "latest" / "summary.json").read_text())
    assert "lr=0.1,distillation=None" in fork["from"]
