"""``run.control`` trains the same run without distillation too, from the checkpoint of its first exchange."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from short_runs import latest

from lightning_idkd.command import control
from lightning_idkd.config.parse import configure
from lightning_idkd.records.run_folder import RunFolder

ARGUMENTS = ("--run.control", "true", "--graph.nodes", "2", "--train.epochs", "4")


def summary(runs, name):
    return json.loads((latest(runs, name) / "summary.json").read_text())


@pytest.mark.slow
def test_the_control_forks_at_the_first_exchange_and_both_are_printed(fit, capfd):
    assert fit(*ARGUMENTS) == 0
    run, other = summary(fit.runs, "ring_digits"), summary(fit.runs, "ring_digits_control")
    assert other["from"] == str(latest(fit.runs).resolve() / "checkpoints" / "epoch_3.ckpt")
    assert (run["from"], other["exchanges"], other["epochs"], other["steps"]) == (None, [], 4, run["steps"])
    assert other["ood"]["kept_fraction"] is None
    said = capfd.readouterr().out
    rows = [line.split() for line in said[said.rindex("node mean") :].splitlines()]
    shown = {key: [f"{100 * result['accuracy'][k]:.1f}" for k in ("node_mean", "node_min", "consensus")]
             for key, result in (("IDKD", run), ("distillation", other))}  # fmt: skip
    assert rows[1][1:4] == shown["IDKD"]
    assert rows[2][2:5] == shown["distillation"]
    assert rows[3][:2] == [
        "difference",
        f"{100 * (run['accuracy']['node_mean'] - other['accuracy']['node_mean']):+.1f}",
    ]
    # the same command trains nothing that is finished: after the control is lost, it trains the control alone
    made = sorted(path.name for path in (fit.runs / "ring_digits").iterdir())
    (latest(fit.runs, "ring_digits_control") / "summary.json").unlink()
    assert fit(*ARGUMENTS, "--run.resume", "auto") == 0
    assert sorted(path.name for path in (fit.runs / "ring_digits").iterdir()) == made
    assert summary(fit.runs, "ring_digits_control")["accuracy"] == other["accuracy"]


def test_the_control_of_several_processes_does_not_count_itself_among_them(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # as Fabric sets them in the process that starts the others
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("KEPT", "1")
    seen = {}
    ended = SimpleNamespace(wait=lambda: 3)
    monkeypatch.setattr(control.subprocess, "Popen", lambda command, env: seen.update(env) or ended)
    config = configure(["--data.private", "Digits", "--distillation", "IDKD", "--distillation.start", "0"])
    assert control.train_control(RunFolder(Path("runs/x")), config) == 3
    assert seen["KEPT"] == "1"
    assert not {"LOCAL_RANK", "WORLD_SIZE"} & set(seen)


def test_a_run_without_distillation_has_no_control_and_says_so(fit, capsys):
    assert fit(*ARGUMENTS, "--distillation", "null") == 0
    assert capsys.readouterr().out.startswith("no control: the run itself has no distillation\n")
    assert sorted(path.name for path in fit.runs.iterdir()) == ["ring_digits"]


def test_the_control_starts_at_the_epoch_of_the_first_exchange():
    arguments = ["--data.private", "Digits", "--train.epochs", "10", "--distillation", "IDKD", "--distillation.start"]
    assert [configure([*arguments, start]).first_exchange() for start in ("0.6", "3", "0")] == [6, 3, 0]
    assert configure(["--data.private", "Digits"]).first_exchange() is None


def test_only_a_control_of_the_same_config_and_start_counts(tmp_path):
    """With start 0 there is no checkpoint that says which run a control belongs to."""

    def config(*changes):
        place = ["--run.dir", str(tmp_path), "--run.name", "run", "--train.epochs", "4"]
        return configure(["--data.private", "Digits", "--data.public", "Noise", "--distillation", "IDKD",
                          "--distillation.start", "0", *place, *changes])  # fmt: skip

    made = RunFolder.create(tmp_path / "run_control", 0)
    made.yaml("config.yaml", config("--distillation", "null").resolved)
    made.json("summary.json", {"seed": 0})
    run = RunFolder(tmp_path / "run" / "latest")
    assert control.find_control(run, config()) == {"seed": 0}
    assert control.find_control(run, config("--seed", "1")) is None
    assert control.find_control(run, config("--train.lr", "0.2")) is None
    assert control.find_control(run, config("--distillation.start", "2")) is None


def test_of_a_fork_at_the_exchange_the_control_starts_where_that_did(tmp_path):
    config = configure(
        ["--data.private", "Digits", "--distillation", "IDKD", "--distillation.start", "2", "--train.epochs", "4"]
    )
    folder = RunFolder.create(tmp_path, 0)
    folder.json("summary.json", {"from": "elsewhere/epoch_2.ckpt"})
    assert control.find_start(folder, config) == "elsewhere/epoch_2.ckpt"
    folder.text("checkpoints/epoch_2.ckpt", "")
    assert control.find_start(folder, config) == str(folder.file("checkpoints/epoch_2.ckpt"))


def test_a_jobs_end_reaches_the_control(tmp_path, monkeypatch):
    program, begun = tmp_path / "program", tmp_path / "begun"
    program.write_text(f"#!/bin/sh\ntrap 'exit 130' TERM\ntouch {begun}\nwhile true; do sleep 0.05; done\n")
    program.chmod(0o755)
    monkeypatch.setattr(control.sys, "executable", str(program))

    def end():
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    config = configure(["--data.private", "Digits", "--distillation", "IDKD", "--distillation.start", "0"])
    before, thread = signal.getsignal(signal.SIGTERM), threading.Thread(target=end)
    thread.start()
    assert control.train_control(RunFolder.create(tmp_path / "run", 0), config) == 130
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_table_shows_both_and_their_difference():
    def run(*accuracy):
        return {"accuracy": dict(zip(("node_mean", "node_min", "consensus"), accuracy, strict=True)),
                "communication": {"parameter_bytes": 2_000_000, "label_bytes": 500_000, "messages": 7}}  # fmt: skip

    lines = control.format_table("IDKD", run(0.5, 0.4, 0.6), run(0.45, 0.42, 0.6)).splitlines()
    assert lines[1].split() == ["node", "mean", "worst", "consensus", "sent"]
    assert lines[2].split() == ["IDKD", "50.0", "40.0", "60.0", "2.5", "MB"]
    assert lines[3].split() == ["no", "distillation", "45.0", "42.0", "60.0", "2.5", "MB"]
    assert lines[4].split() == ["difference", "+5.0", "-2.0", "+0.0"]
