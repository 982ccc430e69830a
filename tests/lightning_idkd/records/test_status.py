"""How a run is doing, read from folders in every state that a run or a killed process leaves them in."""

from __future__ import annotations

import json
import math
import os

import pytest

from lightning_idkd.files import lock_folder
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.records.status import find_runs, predict_seconds_left, read_status

CONFIG = "seed: 0\ntrain:\n  schedule:\n    epochs: 7\n  list:\n  - 1\n  epochs: 60\nrun:\n  keep: []\n  until: null\n"


def line(epoch, seconds=0.0, **more):
    return {"epoch": epoch, "throughput/seconds": seconds, "accuracy/node_mean": epoch / 100} | more


@pytest.fixture
def run(tmp_path):
    """Writes the files of a run of 60 epochs."""

    def write(lines=(), log=None, config=CONFIG, place="name/20260101-000000-s0"):
        folder = tmp_path / place
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text(config)
        if lines:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        if log is not None:
            (folder.parent / "log.txt").write_text(log)
        return folder

    return write


class TestState:
    def test_a_run_with_a_lock_runs(self, run):
        folder = run([line(12)])
        with lock_folder(folder, ""):
            assert read_status(folder).state == "running"
        assert read_status(folder).state == "stopped"

    def test_a_run_with_a_summary_is_finished_whatever_its_log_says(self, run):
        folder = run([line(60)], "error: an earlier attempt\n")
        (folder / "summary.json").write_text("{}")
        status = read_status(folder, folder.parent / "log.txt")
        assert (status.state, status.note, status.progress) == ("finished", "", "60/60")

    @pytest.mark.parametrize("text", ["", '{"accuracy": ', "[1]", "\xff"])
    def test_a_run_whose_summary_cannot_be_read_is_damaged(self, run, text):
        folder = run([line(60)])
        (folder / "summary.json").write_text(text, encoding="latin-1")
        status = read_status(folder)
        assert (status.state, status.note) == ("damaged", "summary.json is not the summary of a run")

    @pytest.mark.parametrize(
        ("log", "state", "note"),
        [
            ("2/60 train\nerror: the loss is not finite\n", "failed", "the loss is not finite"),
            ("error: old\n12/60 train\n", "stopped", "old"),
            ("x\nTraceback:\n  File a\ntorch.OutOfMemoryError: CUDA\n", "failed", "torch.OutOfMemoryError: CUDA"),
            ("warning    5 public images\n12/60 train\n", "stopped", "warning    5 public images"),
            ("stopped at epoch 2, step 5; continue with\n", "stopped", ""),
            ("x\npruned after 3 evaluations; kept\n", "pruned", "pruned after 3 evaluations; kept"),
            ("error: bad\nsrun: error: n0: task 0: Exited\n", "failed", "bad"),
            ("a/b.py:3: UserWarning: odd\n  warn()\n1/60\n", "stopped", "a/b.py:3: UserWarning: odd"),
            ("", "stopped", ""),
        ],
    )  # fmt: skip
    def test_the_log_of_one_that_does_not_run_says_why(self, run, log, state, note):
        folder = run([line(12)], log)
        status = read_status(folder, folder.parent / "log.txt")
        assert status.state == state
        assert status.note.startswith(note)
        assert bool(status.note) == bool(note)

    def test_a_cell_without_a_run_waits_starts_or_has_failed(self, tmp_path):
        log = tmp_path / "log.txt"
        assert read_status(tmp_path / "latest", log).state == "waiting"
        with lock_folder(tmp_path, ""):
            assert read_status(tmp_path / "latest", log).state == "running"
        log.write_text("error: data.private: no such file\n")
        status = read_status(tmp_path / "latest", log)
        assert (status.state, status.note) == ("failed", "data.private: no such file")

    def test_an_initial_training_is_finished_with_its_last_checkpoint(self, run):
        folder = run([line(20)], config=CONFIG.replace("until: null", "until: 24"))
        assert (read_status(folder).state, read_status(folder).progress) == ("stopped", "20/24")
        (folder / "checkpoints" / "epoch_24.ckpt").touch()
        assert read_status(folder).state == "finished"


class TestMetrics:
    def test_a_line_that_is_being_written_is_left_out(self, run):
        folder = run([line(4), line(8)])
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"epoch": 12, "accuracy/no')
        assert read_status(folder).line == line(8)

    def test_damage_is_left_out(self, run):
        folder = run([line(4)])
        (folder / "metrics.jsonl").write_bytes(b"\xff\x00\n[1]\n" + json.dumps(line(8)).encode() + b"\n\x00\x00\n")
        assert read_status(folder).line == line(8)

    def test_a_run_without_an_evaluation_or_a_config(self, run, tmp_path):
        assert read_status(run()).progress == "0/60"
        assert read_status(tmp_path / "nowhere").progress == "0"

    def test_the_end_of_a_long_file_is_read_alone(self, run, monkeypatch):
        """Also where a single line is longer than what is read first."""
        big = line(8, per_node=[0.5] * 60000)
        folder = run([line(e, per_node=[0.5] * 60000) for e in range(1, 8)] + [big])
        read = []

        def parse(text):
            read.append(len(text))
            return json.loads(text) if text else None

        monkeypatch.setattr("lightning_idkd.records.status.parse_line", parse)
        assert read_status(folder).line == big
        assert sum(read) < 4 * len(json.dumps(big))

    def test_nothing_is_written(self, run):
        folder = run([line(4)], "x\n")
        before = {path: path.stat() for path in [folder, folder.parent, *folder.rglob("*")]}
        read_status(folder, folder.parent / "log.txt")
        list(find_runs(folder.parent))
        after = {path: path.stat() for path in [folder, folder.parent, *folder.rglob("*")]}
        assert {p: (s.st_mtime_ns, s.st_size) for p, s in before.items()} == {
            p: (s.st_mtime_ns, s.st_size) for p, s in after.items()
        }


class TestTimeLeft:
    def test_follows_the_pace_since_the_start(self):
        """Ten seconds an epoch; 48 epochs are left, of which 7 seconds have passed."""
        assert predict_seconds_left([line(6, 60), line(12, 120)], 60, 7) == pytest.approx(48 * 10 - 7)

    def test_follows_the_last_evaluations_where_the_pace_has_changed(self):
        lines = [line(e, 100 * e) for e in range(1, 11)] + [line(10 + e, 1000 + 2 * e) for e in range(1, 6)]
        assert predict_seconds_left(lines, 60, 0) == pytest.approx(45 * 2)

    def test_begins_anew_with_a_fork(self):
        """The initial training took 10 s an epoch; the fork has trained 4 epochs in 12 s."""
        assert predict_seconds_left([line(20, 200), line(24, 12)], 60, 0) == pytest.approx(36 * 212 / 24)
        lines = [line(e, 10 * e) for e in range(14, 20)] + [line(20 + 2 * i, 6.0 * i) for i in range(1, 6)]
        assert predict_seconds_left(lines, 60, 0) == pytest.approx(30 * 30 / 11)

    def test_is_unknown_before_the_first_evaluation_and_never_negative(self):
        assert math.isnan(predict_seconds_left([], 60, 0))
        assert math.isnan(predict_seconds_left([line(5, 10)], None, 0))
        assert predict_seconds_left([line(59, 590)], 60, 300) == 0

    def test_is_given_for_runs_that_run(self, run):
        folder = run([line(30, 300)])
        os.utime(folder / "metrics.jsonl")
        assert math.isnan(read_status(folder).seconds_left)
        with lock_folder(folder, ""):
            assert read_status(folder).seconds_left == pytest.approx(300, abs=20)


class TestSearchForRuns:
    def test_finds_the_newest_of_every_name_and_all_that_run(self, run, tmp_path):
        old, older = run(place="a/b/2026-2"), run(place="a/b/2026-1")
        new = run(place="a/b/2026-3")
        (tmp_path / "a/b/latest").symlink_to("2026-3")
        single = run(place="c/2026-1")
        (tmp_path / "a/waits").mkdir()
        (tmp_path / "a/waits/cell.json").write_text("{}")
        (tmp_path / "a/.probes").mkdir()
        (tmp_path / "a/.probes/cell.json").write_text("{}")
        with lock_folder(older, ""):
            found = list(find_runs(tmp_path))
        b, c, waits = tmp_path / "a/b", tmp_path / "c", tmp_path / "a/waits"
        assert found == [(b, older), (b, new), (waits, None), (c, single)]
        assert old not in [run for _, run in found]

    def test_takes_a_run_folder_itself(self, run):
        folder = run()
        assert list(find_runs(folder)) == [(folder.parent, folder)]

    def test_finds_what_the_program_writes(self, tmp_path):
        folder = RunFolder.create(tmp_path / "name", 0)
        assert list(find_runs(tmp_path)) == []
        folder.yaml("config.yaml", {"train": {"epochs": 3}, "run": {"until": None}})
        assert [run for _, run in find_runs(tmp_path)] == [folder.path]
        assert read_status(folder.path).epochs == 3
