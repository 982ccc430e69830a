"""``idkd watch``: its table, what comes first in it, and what it does outside a terminal."""

from __future__ import annotations

import io
import json
from contextlib import ExitStack

import pytest
from rich.console import Console

from lightning_idkd.cli import main
from lightning_idkd.command import watch
from lightning_idkd.files import lock_folder

NODES = {"accuracy/node_mean": 0.5, "accuracy/consensus": 0.625, "accuracy/node_min": 0.25}


@pytest.fixture
def runs(tmp_path):
    """A finished, a stopped and a failed run of 60 epochs, one that runs, and a cell that waits."""
    with ExitStack() as locks:
        for name in ("finished", "stopped", "failed", "running"):
            run = tmp_path / "runs" / "sweep" / f"lr=[{name}]" / "2026-s0"
            run.mkdir(parents=True)
            (run / "config.yaml").write_text("train:\n  epochs: 60\n")
            (run / "metrics.jsonl").write_text(json.dumps({"epoch": 12, "throughput/seconds": 60} | NODES) + "\n")
            (run.parent / "log.txt").write_text("error: the [cpu] is hot\n" if name == "failed" else "")
            if name == "finished":
                (run / "summary.json").write_text("{}")
            if name == "running":
                locks.enter_context(lock_folder(run, ""))
        waiting = tmp_path / "runs" / "sweep" / "lr=[waiting]"
        waiting.mkdir()
        (waiting / "cell.json").write_text("{}")
        yield tmp_path / "runs"


def test_what_needs_attention_comes_first(runs, capsys):
    assert main(["watch", str(runs)]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.rstrip() == "1 running, 1 failed, 1 stopped, 1 waiting, 1 finished"
    rows = [line.split() for line in lines if "lr=" in line]
    states = ["running", "failed", "stopped", "waiting", "finished"]
    assert [row[0] for row in rows] == [f"sweep/lr=[{state}]" for state in states]
    running, failed, _, waiting, finished = rows
    assert running[1:6] == ["running", "12/60", "50.0%", "62.5%", "25.0%"]
    minutes, seconds = map(int, running[6].split(":"))
    assert 60 * minutes + seconds == pytest.approx(48 * 5, abs=20)
    assert failed[1:6] == ["failed", "12/60", "50.0%", "62.5%", "25.0%"]
    assert " ".join(failed[6:]) == "the [cpu] is hot"
    assert waiting[1:] == ["waiting"]
    assert finished[2] == "12/60"


def test_a_single_run_and_several_folders(runs, capsys):
    run = runs / "sweep" / "lr=[finished]" / "2026-s0"
    assert main(["watch", str(run), str(runs / "sweep" / "lr=[failed]"), "--once"]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "lr=" in line]
    assert rows == [["lr=[failed]", "failed"], ["lr=[finished]", "finished"]]


def test_a_table_longer_than_the_terminal_counts_the_rest(runs):
    table = watch.build_table(watch.read([runs]), 100, rows=3)
    assert [*table.columns[0].cells] == ["sweep/lr=\\[running]", "sweep/lr=\\[failed]", "and 3 more"]


def test_in_a_terminal_it_goes_on_until_ctrl_c(runs, monkeypatch):
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda self: True))
    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert main(["watch", str(runs)]) == 0
    assert looks == [watch.INTERVAL] * 3


def test_once_in_a_terminal_prints_once(runs, monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda self: True))
    monkeypatch.setattr(watch.time, "sleep", None)
    assert main(["watch", str(runs), "--once"]) == 0


@pytest.mark.parametrize("width", [72, 80, 100, 160])
def test_numbers_stay_whole_beside_long_names_and_notes(runs, width):
    statuses = [(100 * "name", status) for _, status in watch.read([runs])]
    for _, status in statuses:
        status.note = 100 * "note"
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(watch.build_table(statuses, width))
    lines = console.export_text().splitlines()
    (finished,) = (line for line in lines if "finished" in line and "name" in line)
    assert finished.split()[1:6] == ["finished", "12/60", "50.0%", "62.5%", "25.0%"]
    assert ("note" in finished) == (width >= 110)
    assert len(lines) == 7


def test_names_in_a_narrow_terminal_stay_apart():
    cells = [
        f"seed={seed},distillation={method}-start0.6-every4" for seed in (0, 1) for method in ("IDKD", "VanillaKD")
    ]
    names = [*(f"methods_digits/{cell}" for cell in cells), *(f"again/{cell}" for cell in cells), "a/short"]
    shown = watch.shorten_names(names, 18)
    assert shown[:2] == ["meth…0…IDKD…", "meth…0…VanillaKD…"]
    assert shown[-1] == "a/short"
    assert len(set(shown)) == len(names)
    assert watch.shorten_names(["digits/" + "x" * 30], 18) == ["…" + "x" * 16 + "…"]


def test_a_pipe_gets_whole_names_and_notes_and_no_spaces_at_the_ends(tmp_path, capsys):
    cell = tmp_path / "sweep" / ("name" * 50)
    cell.mkdir(parents=True)
    (cell / "log.txt").write_text(f"error: {'note' * 50}\n")
    assert main(["watch", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"sweep/{'name' * 50}" in out
    assert "note" * 50 in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_a_folder_without_runs_and_one_that_is_missing(tmp_path, capsys):
    assert main(["watch", str(tmp_path)]) == 0
    assert "no runs yet" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert "none' is not a folder" in capsys.readouterr().err


def test_damaged_lines_and_commands_to_the_terminal_are_not_shown(runs, capsys):
    run = runs / "sweep" / "lr=[failed]" / "2026-s0"
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 13, "accuracy/node_mean": "high"}) + "\n" + '{"epoch": "last"}\n')
    (run.parent / "log.txt").write_text("error: \x1b[2Jgone\n")
    assert main(["watch", str(runs)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "[failed]" in line]
    assert line.split() == ["sweep/lr=[failed]", "failed", "13/60", "[2Jgone"]
