"""W&B's own ``wandb sweep`` and ``wandb agent``, as make starts them, against a stand-in of W&B's server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb_server import ENTITY, WandbServer

from lightning_idkd.records.run_folder import RunFolder

HERE = Path(__file__).parents[1]  # of the helpers that runs import
ROOT = HERE.parents[1]
LIMIT = 300  # seconds, on a machine that does much else
IDKD = {"class_path": "IDKD", "init_args": {"start": 1, "every": 1, "temperature": 2.0, "align": True}}
SHORT = ["--graph.nodes", "4", "--train.epochs", "3", "--train.evaluate_every", "1", "--data.public.samples", "100",
         "--run.engine", "loop", "--run.threads", "1"]  # fmt: skip


def make(*arguments, env):
    """Start ``make`` with this Python's environment in the place of .venv, which counts as ready."""
    prefix = Path(sys.prefix)
    command = ["make", "-o", str(prefix / ".ready"), *arguments, f"VENV={prefix}"]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_a_sweep_of_two_cells_by_two_agents(tmp_path):
    """The cells wait after their first epoch until they are stopped: one by a command to its agent, one by the status
    of its run. The server gives both out again. This is one test because it takes most of a minute."""
    place = tmp_path
    for folder in ("home", "waits", "agents"):
        (place / folder).mkdir()
    sweep = {
        "program": "lightning_idkd",
        "name": "two cells",
        "method": "grid",
        "metric": {"name": "accuracy/node_mean", "goal": "maximize"},
        "parameters": {
            "seed": {"values": [1]},
            "distillation": {"values": [None, IDKD]},
            "data.augment_public": {"value": True},
            "run.pictures": {"value": False},
            "run.keep": {"value": [1, 2]},
            "calibration": {"value": {"class_path": "IdQuantile",
                                      "init_args": {"score": {"class_path": "Energy"}, "q": 0.1}}},
            "callbacks": {"value": [{"class_path": "waits.Waits",
                                     "init_args": {"folder": str(place / "waits"), "seeds": [1]}}]},
        },
        "command": ["${env}", "python", "-m", "lightning_idkd", "fit", "--config", "configs/ring_digits.yaml", *SHORT,
                    "--run.dir", str(place / "runs"), "${args}"],
    }  # fmt: skip
    (place / "two.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    with WandbServer() as server:

        def stops(run):
            name = "NoneType" if run.given["distillation"] is None else "IDKD"
            waits = (place / "waits" / f"1 {name}").exists() and not run["exit"]
            return {"NoneType": "command", "IDKD": "status"}[name] if waits else None

        server.stops = stops
        env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | server.environment()
        env |= {"HOME": str(place / "home"), "MPLCONFIGDIR": str(place / "matplotlib"),
                "WANDB_DIR": str(place / "agents"), "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}  # fmt: skip
        created = make("sweep", f"SWEEP={place / 'two.yaml'}", env=env).communicate(timeout=LIMIT)[0]
        (path,) = re.findall(r"wandb agent (\S+)", re.sub(r"\x1b\[[0-9;]*m", "", created))
        agents = [make("agent", f"ID={path}", env=env) for _ in range(2)]
        try:
            said = [agent.communicate(timeout=LIMIT)[0] for agent in agents]
        finally:
            for agent in agents:
                if agent.poll() is None:
                    os.killpg(agent.pid, signal.SIGTERM)  # they end their cells too
                    agent.wait(LIMIT)
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert path == f"{ENTITY}/lightning-idkd/{next(iter(server.sweeps))}"
    assert server.unknown == []
    assert len(server.runs) == 2
    every_cell_comes_to_its_end_in_one_folder(place, server)
    cells_run_with_the_parameters_that_the_server_gave(place, server)
    history_summary_and_config_are_what_the_folder_holds(place, server)
    a_stopped_cell_leaves_a_checkpoint_and_goes_on_when_it_is_given_out_again(place, server, "".join(said))
    assert not list((place / "agents").glob("wandb/run-*"))
    assert not (place / "home" / ".local").exists()


def folders(place):
    """The run folder of every W&B id."""
    every = [RunFolder(path) for path in (place / "runs" / "ring_digits").glob("2*")]
    return {folder.wandb_id(): folder for folder in every}


def every_cell_comes_to_its_end_in_one_folder(place, server):
    assert folders(place).keys() == server.runs.keys()
    for id, folder in folders(place).items():
        assert folder.summary() is not None
        assert server.runs[id]["sweep"] in server.sweeps
        assert server.runs[id]["displayName"] == f"ring_digits/{folder.path.name}"


def cells_run_with_the_parameters_that_the_server_gave(place, server):
    for id, folder in folders(place).items():
        given, config = server.runs[id].given, folder.config()
        assert config["seed"] == given["seed"]
        if given["distillation"] is None:
            assert config["distillation"] is None
        else:
            assert config["distillation"]["class_path"].endswith(".IDKD")
            assert given["distillation"]["init_args"].items() <= config["distillation"]["init_args"].items()
        others = config["data"]["augment_public"], config["run"]["pictures"], config["run"]["keep"]
        assert others == (True, False, [1, 2])
        assert config["calibration"]["init_args"]["score"]["class_path"].endswith(".Energy")
        assert config["callbacks"][0]["init_args"] == {"folder": str(place / "waits"), "seeds": [1]}
    points = [(run.given["seed"], run.given["distillation"]) for run in server.runs.values()]
    assert all(points.count((1, method)) == 1 for method in (None, IDKD))


def history_summary_and_config_are_what_the_folder_holds(place, server):
    for id, folder in folders(place).items():
        sent, lines, summary = server.runs[id], folder.metrics(), folder.summary()
        history = [sent.history[i] for i in sorted(sent.history)]
        assert [line["_step"] for line in history] == [line["step"] for line in lines] == [18, 36, 54]
        for line, logged in zip(lines, history, strict=True):
            for key, value in line.items():
                if isinstance(value, (int, float)):
                    assert logged[key] == pytest.approx(value), key
        assert sent["summary"]["accuracy"]["node_mean"] == pytest.approx(summary["accuracy"]["node_mean"])
        assert sent["summary"]["seed"] == summary["seed"]
        assert sent["config"]["train"]["epochs"] == 3
        assert sent["config"]["seed"] == sent.given["seed"]


def a_stopped_cell_leaves_a_checkpoint_and_goes_on_when_it_is_given_out_again(place, server, said):
    for id, folder in folders(place).items():
        assert server.runs[id]["exit"] == [1, 0]
        assert len(list(folder.path.glob("wandb/run-*/run-*.wandb"))) == 2
        assert f"{folder.path}, continued at epoch 1" in said
    assert said.count("stopping, with a checkpoint") == said.count("stopped at epoch 1") == 2
    assert "locked" not in said
