"""The time left and the lines of progress."""

from __future__ import annotations

import math
from types import SimpleNamespace

from lightning_idkd.machine import count_cores
from lightning_idkd.records import report
from lightning_idkd.training.progress import Progress
from lightning_idkd.training.record import Recorder


def recorder_at(epoch: int, phase: str = "train") -> Recorder:
    """As much of a recorder as the time left looks at: 100 s for the epochs since epoch 2, of 10."""
    recorder = Recorder.__new__(Recorder)
    recorder.progress = Progress(steps=1, last_lr=0.1, epoch=epoch, phase=phase)
    recorder.store, recorder.train = SimpleNamespace(test=[None] * 1000), SimpleNamespace(epochs=10)
    recorder._first_epoch, recorder._clock, recorder._seconds_per_sample = 2, 0.0, 0.03
    return recorder


def test_time_left_counts_the_final_evaluation_and_what_callbacks_do_then(monkeypatch):
    monkeypatch.setattr("lightning_idkd.training.record.time.perf_counter", lambda: 100.0)
    assert recorder_at(6).seconds_left(5.0) == 100 / 4 * 4 + 2 * 0.03 * 1000 + 5
    assert recorder_at(10).seconds_left(5.0) == 2 * 0.03 * 1000 + 5  # nothing but the end is left
    assert recorder_at(10, phase="final").seconds_left(5.0) == 0
    assert math.isnan(recorder_at(2).seconds_left(5.0))  # not known yet


def test_progress_is_said_every_ten_seconds(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    progress = report.Countdown("evaluating", 40, said.append)
    for step in range(40):
        now[0] = step * 1.0
        progress.step()
    expected = ("25%, 0:30", "50%, 0:20", "75%, 0:10")
    assert said == [f"progress   evaluating: {done} left" for done in expected]


def test_a_short_piece_of_work_is_silent():
    said: list[str] = []
    progress = report.Countdown("evaluating", 3, said.append)
    for _ in range(3):
        progress.step()
    assert said == []


def test_a_run_says_that_it_draws(fit, capsys):
    assert fit("--train.epochs", "1", "--distillation", "null", "--graph.nodes", "2", "--run.pictures", "true") == 0
    said = capsys.readouterr().out
    assert said.index("pictures   drawing plots/") < said.index("1/1  final")


def test_more_threads_than_cores_are_refused(fit, capsys):
    assert fit("--run.threads", "10000") == 2
    said = f"error: run.threads: 10000 given; allowed: 1 to {count_cores()}, the cores here, or null\n"
    assert capsys.readouterr().err == said
    assert not fit.runs.exists()
