"""Files that are written whole, appended to, linked and cleaned up, and locks, on file systems of every kind."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest

from lightning_idkd import files
from lightning_idkd.errors import UserError


@pytest.fixture
def calls(monkeypatch):
    """The synced and replaced paths in the order of the calls."""
    made, replace, fsync = [], os.replace, os.fsync

    def name(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        return "part" if path.endswith(".part") else path

    monkeypatch.setattr(os, "fsync", lambda handle: (made.append(("sync", name(handle))), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (made.append(("replace", str(b))), replace(a, b)))
    return made


def fail(code):
    def raise_error(*args, **options):
        raise OSError(code, os.strerror(code))

    return raise_error


class TestWrite:
    def test_the_file_is_on_the_disk_before_its_name_and_then_the_folder(self, tmp_path, calls):
        path = tmp_path / "a"
        files.write(path, lambda part: part.write_text("new"))
        assert calls == [("sync", "part"), ("replace", str(path)), ("sync", str(tmp_path))]
        assert path.read_text() == "new"

    def test_a_file_that_cannot_be_synced_leaves_the_earlier_one(self, tmp_path, monkeypatch):
        (tmp_path / "a").write_text("old")
        monkeypatch.setattr(os, "fsync", fail(errno.EIO))
        with pytest.raises(UserError, match=r"run.dir: cannot write '.*/a' \(Input/output error\)"):
            files.write(tmp_path / "a", lambda part: part.write_text("new"))
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]

    def test_a_folder_that_cannot_be_synced_does_not_matter(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "sync", lambda path: path.is_dir() and fail(errno.EINVAL)())
        files.write(tmp_path / "a", lambda part: part.write_text("new"))
        assert (tmp_path / "a").read_text() == "new"

    def test_a_disk_that_fails_and_becomes_read_only_is_one_sentence_with_the_first_cause(self, tmp_path, monkeypatch):
        """A read-only file system refuses to remove a file that is not there, too."""
        monkeypatch.setattr(type(tmp_path), "unlink", fail(errno.EROFS))
        with pytest.raises(UserError, match=r"^--out: cannot write '.*/a' \(Input/output error\); [^\n]*$"):
            files.write(tmp_path / "a", fail(errno.EIO), "--out")

    def test_two_containers_whose_processes_have_one_number_do_not_share_a_temporary_file(self, tmp_path):
        parts = []
        for _ in range(2):
            files.write(tmp_path / "a", lambda part: (parts.append(part), part.write_text("")))
        assert parts[0] != parts[1]


class TestAppend:
    def test_the_line_and_a_new_name_are_on_the_disk(self, tmp_path, calls):
        path = tmp_path / "a"
        files.append(path, "one\n")
        assert calls == [("sync", str(path)), ("sync", str(tmp_path))]
        files.append(path, "two\n")
        assert calls[2:] == [("sync", str(path))]
        assert path.read_text() == "one\ntwo\n"

    def test_half_a_line_is_taken_back(self, tmp_path):
        """The limit on the size of files lets the first three bytes of the line through."""
        path = tmp_path / "a"
        files.append(path, "one\n")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (7, before[1]))
        try:
            with pytest.raises(
                UserError, match=r"cannot write '.*/a' \(File too large\); what was there before is int"
            ):
                files.append(path, "second\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_text() == "one\n"


class TestLock:
    def test_a_held_lock_is_reported_with_the_message(self, tmp_path):
        with (
            files.lock_folder(tmp_path, "first"),
            pytest.raises(files.Locked, match=r"^second$"),
            files.lock_folder(tmp_path, "second"),
        ):
            pass

    @pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
    def test_a_file_system_without_locks_is_one_sentence_and_no_obstacle(self, tmp_path, monkeypatch, capsys, code):
        monkeypatch.setattr(files.fcntl, "flock", fail(code))
        with files.lock_folder(tmp_path, "another process"):
            pass
        said = f"'{tmp_path}' cannot be locked ({os.strerror(code)}), so nothing stops a second process from working on"
        assert capsys.readouterr().err == f"{said} it; start only one\n"
        with files.lock_folder(tmp_path, "another process", warn=False):
            pass
        assert capsys.readouterr().err == ""

    def test_a_folder_that_cannot_be_written_is_one_sentence(self, tmp_path):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(UserError, match=r"^cannot write in '.*/file' \(Not a directory\)$"),
            files.lock_folder(tmp_path / "file", "another process"),
        ):
            pass


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_a_file_is_copied_where_there_are_no_hard_links(tmp_path, monkeypatch, code):
    (tmp_path / "a").write_text("content")
    monkeypatch.setattr(os, "link", fail(code))
    files.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "content"


class TestRemoveParts:
    def leave(self, folder, process, seconds):
        """Leave a temporary file that ``process`` wrote to last ``seconds`` ago."""
        part = folder / f".last.ckpt.{process}-0123abcd.part"
        part.write_text("half")
        os.utime(part, (os.stat(part).st_mtime - seconds,) * 2)
        return part

    def test_without_the_lock_only_old_ones_of_no_process_go(self, tmp_path):
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        gone, running = process.pid, os.getpid()
        old, young, alive = (
            self.leave(tmp_path, *made) for made in ((gone, 7200), (gone + 2**22, 60), (running, 7200))
        )
        files.remove_parts(tmp_path)
        assert [old.exists(), young.exists(), alive.exists()] == [False, True, True]

    def test_with_the_lock_all_go_but_other_files_stay(self, tmp_path):
        self.leave(tmp_path, os.getpid(), 0)
        (tmp_path / f".latest.{os.getpid()}.part").symlink_to("nowhere")  # from before names had a second number
        others = {".notes.part", "last.ckpt", ".lock"}
        for name in others:
            (tmp_path / name).write_text("")
        files.remove_parts(tmp_path, locked=True)
        assert {path.name for path in tmp_path.iterdir()} == others
