"""Runs that go on although a file was damaged, and end bit-equal."""

from __future__ import annotations

import errno
import os

import pytest
from interrupts import InterruptAt
from short_runs import SHORT, checkpoint, extra, latest, lines, same

from lightning_idkd import files
from lightning_idkd.cli import main


@pytest.fixture(scope="module")
def whole(tmp_path_factory, request):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    config = str(request.config.rootpath / "configs" / "ring_digits.yaml")
    assert main(["fit", "--config", config, *SHORT, *extra(InterruptAt, steps=[]), "--run.dir", str(folder)]) == 0
    return latest(folder)


STOP = extra(InterruptAt, steps=[4 * 18 + 5])  # after the second evaluation and the first exchange


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("resume", ["auto", "folder", "last.ckpt"])
def test_a_run_with_a_damaged_last_checkpoint_goes_on_from_the_one_before_and_ends_bit_equal(
    fit, whole, capsys, resume
):
    assert fit(*STOP) == 130
    run = latest(fit.runs).resolve()
    last = run / "checkpoints" / "last.ckpt"
    damage(last)
    given = {"auto": "auto", "folder": str(run), "last.ckpt": str(last)}[resume]
    capsys.readouterr()
    assert fit(*STOP, "--run.resume", given) == 130  # the step of the stop comes again
    said = capsys.readouterr().out
    assert f"checkpoint '{last}' is damaged; continuing from previous.ckpt, epoch 4\n" in said
    assert "continued at epoch 4" in said
    assert fit(*STOP, "--run.resume", "auto") == 0
    assert "is damaged" not in capsys.readouterr().out
    assert latest(fit.runs).resolve() == run
    assert same(checkpoint(whole), checkpoint(run)) is None
    assert lines(whole) == lines(run)


def test_a_run_with_two_damaged_checkpoints_is_refused_by_name_with_what_else_there_is(fit, capsys):
    assert fit(*STOP) == 130
    folder = latest(fit.runs).resolve() / "checkpoints"
    for name in ("last.ckpt", "previous.ckpt"):
        damage(folder / name)
    for option in ("--run.resume", "--run.from"):
        capsys.readouterr()
        assert fit(*STOP, option, str(folder.parent)) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: checkpoint '{folder / 'last.ckpt'}' is damaged (")
        assert said.endswith("; whole ones beside it: best.ckpt\n")


def test_a_fork_falls_back_from_a_folder_but_not_from_a_file(fit, capsys):
    fork = ["--distillation", "null", "--train.schedule", "Constant"]
    assert fit(*fork) == 0
    run = latest(fit.runs).resolve()
    last = run / "checkpoints" / "last.ckpt"
    damage(last)
    capsys.readouterr()
    assert fit(*fork, "--run.from", str(last), "--train.epochs", "8") == 2
    assert capsys.readouterr().err.startswith(f"error: checkpoint '{last}' is damaged (")
    assert fit(*fork, "--run.from", str(run), "--train.epochs", "8") == 0
    said = capsys.readouterr().out
    assert f"checkpoint '{last}' is damaged; continuing from previous.ckpt, epoch 5\n" in said
    assert f"forked from {last.with_name('previous.ckpt')} at epoch 5" in said
    assert last.exists()  # the fork leaves the run as it is


def test_a_cut_line_of_metrics_is_dropped_and_made_again(fit, whole, capsys):
    """As a kill leaves it that comes while the line is written, before the checkpoint of its epoch."""
    assert fit(*extra(InterruptAt, steps=[4 * 18 - 5])) == 130
    run = latest(fit.runs).resolve()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "step": 72, "accur')
    assert fit(*extra(InterruptAt, steps=[4 * 18 - 5]), "--run.resume", "auto") == 0
    assert "metrics.jsonl': the last line is cut, and dropped" in capsys.readouterr().out
    assert lines(whole) == lines(run)


def test_a_damaged_line_of_metrics_stops_a_resume_with_its_number(fit, capsys):
    assert fit(*STOP) == 130
    path = latest(fit.runs).resolve() / "metrics.jsonl"
    path.write_text(path.read_text().replace('"epoch"', '"epoch', 1))
    capsys.readouterr()
    assert fit(*STOP, "--run.resume", "auto") == 2
    assert capsys.readouterr().err.startswith(f"error: '{path}' is damaged in line 1 of 2; ")


def test_the_next_start_removes_what_killed_processes_left(fit):
    assert fit(*STOP) == 130
    run = latest(fit.runs).resolve()
    parts = [run / ".config.yaml.1.part", run / "checkpoints" / ".last.ckpt.1-00ff00ff.part"]
    for part in parts:
        part.write_text("half")
    assert fit(*STOP, "--run.resume", "auto") == 0
    assert not any(part.exists() for part in parts)


def test_auto_says_which_damaged_run_it_does_not_continue(fit, capsys):
    assert fit("--run.until", "1") == 0
    run = latest(fit.runs).resolve()
    (run / "config.yaml").write_text("gossip: [")
    capsys.readouterr()
    assert fit("--run.resume", "auto", "--run.until", "1") == 0
    said = f"run.resume: not continued: '{run / 'config.yaml'}' is damaged, or not the config of a run\n"
    assert said in capsys.readouterr().err
    assert latest(fit.runs).resolve() != run


@pytest.mark.parametrize("key", ["node_mean", "homogeneity", "seconds", "steps"])
def test_a_summary_with_a_damaged_key_is_one_sentence_of_the_report(whole, tmp_path, capsys, key):
    text = (whole / "summary.json").read_text()
    damaged = tmp_path / "summary.json"
    damaged.write_text(text.replace(f'"{key}"', f'"{key[:-1]}?"'))
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: '{damaged}' is damaged, or not the summary of a run\n"


def test_a_run_goes_on_where_there_are_no_locks(fit, capsys, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    assert fit("--run.until", "1") == 0
    assert fit("--run.until", "2", "--run.resume", "auto") == 0
    assert len(list(fit.runs.glob("ring_digits/2*"))) == 1
    assert capsys.readouterr().err.count("cannot be locked (No locks available)") == 2  # once a start


def test_a_run_folder_that_cannot_be_written_is_one_sentence(fit, capsys):
    assert fit("--run.until", "1") == 0
    run = latest(fit.runs).resolve()
    (run / ".lock").unlink()
    (run / ".lock").mkdir()  # root may write anywhere, but not into a folder
    capsys.readouterr()
    assert fit("--run.resume", str(run)) == 2
    assert capsys.readouterr().err == f"error: cannot write in '{run}' (Is a directory)\n"
