"""The files of a run: checkpoints that survive kills and damage, and metrics that are appended to."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from lightning_idkd.errors import UserError
from lightning_idkd.records.run_folder import RunFolder


class Killed(BaseException):
    """Ends a process in a test; no code that handles errors catches it."""


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "runs", 0)


def save(folder, epoch, keep=()):
    folder.save({"epoch": epoch, "X": torch.full((4, 5), float(epoch))}, "last.ckpt", list(keep))


def damage(path, position=100):
    """Flip a bit, in a file of its own if it has several names."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.unlink()
    path.write_bytes(content)


def epoch_of(path):
    return RunFolder.load(path)["epoch"]


class TestCheckpoints:
    def test_the_one_before_is_kept(self, folder):
        save(folder, 1)
        assert not folder.previous.exists()
        save(folder, 2, ["best.ckpt"])
        save(folder, 3)
        assert [epoch_of(p) for p in (folder.last, folder.previous, folder.last.with_name("best.ckpt"))] == [3, 2, 2]
        folder.save({"epoch": 4}, "final.ckpt", [])
        assert [epoch_of(folder.last), epoch_of(folder.previous)] == [3, 2]

    def test_without_hard_links_too(self, folder, monkeypatch):
        def link(*args):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
        for epoch in (1, 2, 3):
            save(folder, epoch, [f"epoch_{epoch}.ckpt"])
        assert {path.stem: epoch_of(path) for path in folder.last.parent.iterdir()} == {
            "last": 3, "previous": 2, "epoch_1": 1, "epoch_2": 2, "epoch_3": 3,
        }  # fmt: skip

    def test_a_kill_at_any_moment_leaves_a_whole_one(self, folder, monkeypatch):
        """The process is killed before every call that changes a file, and after it."""
        save(folder, 1)
        save(folder, 2)
        newest, moments, calls, limit = 2, 0, 0, 0

        def dying(call):
            def run(*args):
                nonlocal calls
                for done in (False, True):
                    calls += 1
                    if calls == limit:
                        raise Killed
                    if not done:
                        result = call(*args)
                return result

            return run

        for module, name in ((os, "link"), (os, "fsync"), (os, "replace"), (torch, "save")):
            monkeypatch.setattr(module, name, dying(getattr(module, name)))
        while True:
            limit, calls, before = moments + 1, 0, newest
            try:
                save(folder, before + 1)
                break
            except Killed:
                newest = epoch_of(folder.last)
                assert newest in (before, before + 1)
                assert epoch_of(folder.previous) in (before - 1, before)
            moments += 1
        assert moments == 16  # torch.save, the link, and for both files sync, replace and sync of the folder

    def test_the_previous_one_stands_in_for_a_damaged_or_missing_last(self, folder):
        save(folder, 1)
        save(folder, 2)
        assert folder.newest() == folder.last
        assert folder.describe_fallback(folder.last, 2) == ""
        damage(folder.last)
        assert folder.newest() == folder.previous
        said = f"checkpoint '{folder.last}' is %s; continuing from previous.ckpt, epoch 1"
        assert folder.describe_fallback(folder.previous, 1) == said % "damaged"
        folder.last.unlink()
        assert folder.newest() == folder.previous
        assert folder.describe_fallback(folder.previous, 1) == said % "missing"

    def test_a_damaged_one_is_named_with_the_whole_ones_beside_it(self, folder):
        save(folder, 1, ["epoch_1.ckpt"])
        save(folder, 2, ["best.ckpt"])
        damage(folder.last)
        size = folder.last.stat().st_size
        for call in (lambda: RunFolder.load(folder.last), folder.newest):
            if call == folder.newest:
                damage(folder.previous)
            with pytest.raises(UserError) as e:
                call()
            whole = "best.ckpt, epoch_1.ckpt" + ("" if call == folder.newest else ", previous.ckpt")
            assert (
                str(e.value) == f"checkpoint '{folder.last}' is damaged ({size} bytes); whole ones beside it: {whole}"
            )

    def test_a_damaged_last_one_does_not_become_the_previous_one(self, folder, monkeypatch):
        """Otherwise a kill before the next is in place leaves two damaged ones."""
        save(folder, 1)
        save(folder, 2)
        damage(folder.last)
        folder.continue_from(folder.newest())
        assert [epoch_of(folder.last), epoch_of(folder.previous)] == [1, 1]
        save(folder, 2)
        assert [epoch_of(folder.last), epoch_of(folder.previous)] == [2, 1]
        assert not list(folder.path.rglob("*.part"))

    def test_a_run_that_goes_back_leaves_later_ones_behind(self, folder):
        for epoch in (1, 2, 3):
            save(folder, epoch, [f"epoch_{epoch}.ckpt"])
        folder.continue_from(folder.last.with_name("epoch_1.ckpt"))
        assert epoch_of(folder.newest()) == 1
        assert not folder.previous.exists()

    def test_one_from_before_checksums_is_read(self, folder):
        torch.save({"epoch": 5}, folder.last)
        assert epoch_of(folder.newest()) == 5

    def test_one_that_torch_does_not_read_is_named(self, folder):
        torch.save({"epoch": print}, folder.last)
        with pytest.raises(UserError, match=r"last.ckpt' is unreadable: torch does not understand it \(\d+ bytes\); "):
            RunFolder.load(folder.last)

    @pytest.mark.soak
    def test_a_thousand_flipped_bytes_are_each_refused_by_name(self, folder):
        folder.save({"X": torch.randn(16, 50_000)}, "last.ckpt", [])
        content = folder.last.read_bytes()
        draw = torch.Generator().manual_seed(0)
        positions = torch.randint(len(content), (1000,), generator=draw).tolist()
        values = torch.randint(1, 256, (1000,), generator=draw).tolist()
        for position, value in zip(positions, values, strict=True):
            damaged = bytearray(content)
            damaged[position] ^= value
            folder.last.write_bytes(damaged)
            with pytest.raises(UserError, match=r"checkpoint '.*/last.ckpt' is damaged"):
                RunFolder.load(folder.last)


class TestMetrics:
    LINES = tuple({"epoch": epoch, "step": 10 * epoch, "phase": "train"} for epoch in (1, 2, 3))

    def log(self, folder, lines=LINES):
        for line in lines:
            folder.log(line)
        return folder.file("metrics.jsonl")

    def test_lines_are_appended_to_one_file_that_a_reader_can_follow(self, folder):
        with open(self.log(folder, self.LINES[:1])) as reader:
            assert len(reader.readlines()) == 1
            self.log(folder, self.LINES[1:])
            assert len(reader.readlines()) == 2
        assert folder.metrics() == list(self.LINES)

    def test_a_cut_last_line_is_left_out_wherever_it_is_cut(self, folder):
        path = self.log(folder)
        content = path.read_bytes()
        start = content[:-1].rindex(b"\n") + 1
        for length in range(start, len(content) - 1):
            path.write_bytes(content[:length])
            assert folder.metrics() == list(self.LINES[:2]), length
        path.write_bytes(content[:start] + bytes(20))  # as some file systems leave it after a power cut
        assert folder.metrics() == list(self.LINES[:2])

    @pytest.mark.parametrize("text", [b'{"epoch": 2, "st\n', b"7\n", b"\xff\xfe\n", b"\n"])
    def test_another_damaged_line_is_reported_with_its_number(self, folder, text):
        path = self.log(folder)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + text + lines[2])
        with pytest.raises(UserError, match=r"^'.*/metrics.jsonl' is damaged in line 2 of 3; delete that line"):
            folder.metrics()

    def test_a_resumed_run_keeps_the_lines_of_its_checkpoint(self, folder, capsys):
        path = self.log(folder)
        os.link(path, path.with_name("before"))
        folder.start_log(list(self.LINES))
        assert path.samefile(path.with_name("before"))  # there was nothing to write
        folder.start_log(list(self.LINES[:2]))
        assert folder.metrics() == list(self.LINES[:2])
        assert capsys.readouterr().out == ""

    def test_a_cut_line_is_dropped_with_a_word(self, folder, capsys):
        path = self.log(folder)
        path.write_bytes(path.read_bytes()[:-5])
        folder.start_log(folder.metrics())
        folder.log(self.LINES[2])
        assert folder.metrics() == list(self.LINES)
        assert capsys.readouterr().out == f"'{path}': the last line is cut, and dropped\n"


@pytest.mark.parametrize("text", ["{", "", "[1]", "3"])
def test_a_damaged_summary_is_named(folder, text):
    folder.file("summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary.json' is damaged"):
        folder.summary()
    folder.file("summary.json").write_text(json.dumps({"seed": 0}))
    assert folder.summary() == {"seed": 0}
