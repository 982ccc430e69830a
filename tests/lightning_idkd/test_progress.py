"""The time left and the lines of progress."""

from __future__ import annotations

from types import SimpleNamespace

from lightning_idkd.machine import count_cores
from lightning_idkd.records import report
from lightning_idkd.training.orchestrator import Orchestrator


def run_at(epoch: int, phase: str = "train", **values) -> SimpleNamespace:
    """As much of a run as the time left looks at: 100 s for the epochs since epoch 2, of 10."""
    test, ends = [None] * 1000, [SimpleNamespace(at_the_end=5.0), SimpleNamespace(at_the_end=0.0)]
    known = {"_first": 2, "_clock": 0.0, "epochs": 10, "evaluating": 0.03}
    known |= {"store": SimpleNamespace(test=test), "callbacks": ends}
    return SimpleNamespace(epoch=epoch, phase=phase, **(known | values))


def test_time_left_counts_the_final_evaluation_and_what_callbacks_do_then(monkeypatch):
    monkeypatch.setattr("lightning_idkd.training.orchestrator.time.perf_counter", lambda: 100.0)
    assert Orchestrator.left(run_at(6)) == 100 / 4 * 4 + 2 * 0.03 * 1000 + 5
    assert Orchestrator.left(run_at(10)) == 2 * 0.03 * 1000 + 5  # nothing but the end is left
    assert Orchestrator.left(run_at(10, phase="final")) == 0
    assert Orchestrator.left(run_at(2)) != Orchestrator.left(run_at(2))  # not known yet: nan


def test_progress_is_said_every_ten_seconds(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    progress = report.Progress("evaluating", 40, said.append)
    for step in range(40):
        now[0] = step * 1.0
        progress.step()
    expected = ("25%, 0:30", "50%, 0:20", "75%, 0:10")
    assert said == [f"progress   evaluating: {done} left" for done in expected]


def test_a_short_piece_of_work_is_silent():
    said: list[str] = []
    progress = report.Progress("evaluating", 3, said.append)
    for _ in range(3):
        progress.step()
    assert said == []


def test_a_run_says_that_it_draws(fit, capsys):
    assert fit("--train.epochs", "1", "--distillation", "null", "--graph.nodes", "2", "--run.pictures", "true") == 0
    said = capsys.readouterr().out
    assert said.index("pictures   drawing plots/") < said.index("1/1  final")


def test_more_threads_than_cores_are_refused(fit, capsys):
    assert fit("--run.threads", "10000") == 2
    assert capsys.readouterr().err == f"error: run.threads: 10000 given; allowed: 1 to {count_cores()}, the cores here, or null\n"
    assert not fit.runs.exists()
