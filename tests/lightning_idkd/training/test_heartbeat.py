"""A process that is lost is named by the others; one that has ended is not."""

import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from lightning_idkd.training import heartbeat, launch
from lightning_idkd.training.heartbeat import Heartbeat
from lightning_idkd.training.launch import Starter

NAMES = ["h1", "h2", "h3"]


@pytest.fixture
def beats(monkeypatch):
    """The heartbeats of three processes, in threads of this one; each puts the processes that it reports in `lost`."""
    monkeypatch.setattr(heartbeat, "PERIOD", 0.02)
    monkeypatch.setattr(heartbeat, "SILENCE", 0.5)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    connect = lambda: TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))  # noqa: E731
    monkeypatch.setattr(heartbeat, "connect_to_store", connect)
    statuses: dict[int, int | None] = {}
    beats = [Heartbeat(rank, NAMES, lambda: statuses) for rank in range(3)]
    for beat in beats:
        beat.lost, beat.statuses = None, statuses
        monkeypatch.setattr(beat, "end", lambda lost, beat=beat: (setattr(beat, "lost", lost), beat.stopping.set()))
    yield beats
    for beat in beats:
        beat.stopping.set()
        if beat.is_alive():
            beat.join()


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_silent_process_is_reported_by_all_others(beats):
    for beat in beats[:2]:
        beat.start()
    wait_until(lambda: beats[0].lost and beats[1].lost)
    assert beats[0].lost == beats[1].lost == [2]


def test_a_process_that_has_ended_is_not_reported(beats):
    beats[1].stop()
    beats[2].stop()
    beats[0].start()
    assert not beats[0].stopping.wait(1.0)
    assert beats[0].lost is None


def test_a_child_that_died_is_reported_at_once_and_to_all(beats):
    beats[0].silence = beats[1].silence = 1000.0
    beats[0].statuses[2] = -9
    beats[0].start()
    wait_until(lambda: beats[0].lost)
    assert beats[0].lost == [2]
    assert json.loads(beats[0].store.get("lost")) == [2]


def test_a_child_that_made_a_mistake_reports_it_itself(beats):
    beats[0].silence = 1000.0
    beats[0].statuses |= {1: 2, 2: 0}
    beats[0].start()
    assert not beats[0].stopping.wait(0.5)


def test_the_message_names_the_host_and_the_checkpoint(beats, capsys, monkeypatch, tmp_path):
    ended = threading.Event()
    monkeypatch.setattr(heartbeat.os, "_exit", lambda status: ended.set() if status == 1 else None)
    beats[1].checkpoint = tmp_path / "last.ckpt"
    Heartbeat.end(beats[1], [2])
    assert ended.is_set()
    said = capsys.readouterr().err
    assert "error: process 2 on host h3 died or cannot be reached, so this run ends; " in said
    assert f"last checkpoint, on the first host: {tmp_path / 'last.ckpt'}" in said


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # from Python 3.12 on
class TestStart:
    """Before the first beat, processes watch those that started them, and those that they started."""

    @staticmethod
    def watch(parent, *started):
        """What a forked process does until heartbeats begin."""
        try:
            starter = Starter.__new__(Starter)
            starter.procs, starter.together = started, threading.Event()
            starter._watch_start(parent)
        finally:
            os._exit(3)

    def test_a_process_ends_with_the_one_that_started_it(self):
        read, written = os.pipe()
        if (middle := os.fork()) == 0:
            parent = str(os.getpid())
            if os.fork() == 0:
                self.watch(parent)
            os._exit(0)
        os.close(written)
        os.waitpid(middle, 0)
        readable, _, _ = select.select([read], [], [], 30)
        assert readable  # the pipe has ended with the last process that could write into it
        os.close(read)

    @pytest.mark.parametrize("listens", [True, False])
    def test_a_process_ends_without_the_store_of_torchrun(self, listens, monkeypatch, capfd):
        monkeypatch.setattr(launch, "PERIOD", 0.02)
        monkeypatch.setattr(launch, "SILENCE", 0.1)
        store = socket.create_server(("127.0.0.1", 0))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(store.getsockname()[1]))
        if not listens:
            store.close()
        if (child := os.fork()) == 0:
            self.watch(None)
        time.sleep(1)
        ended = os.waitpid(child, os.WNOHANG)[0] == child
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        store.close()
        assert ended != listens
        assert ("torchrun" in capfd.readouterr().err) == ended

    @pytest.mark.parametrize("status", [0, 2, 7])
    def test_a_process_ends_with_one_that_it_started(self, status, capfd):
        started = subprocess.Popen(["sh", "-c", f"exit {status}"])
        started.wait()
        if (child := os.fork()) == 0:
            self.watch(None, started)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (2 if status == 2 else 1)
        assert ("a process that this one started died" in capfd.readouterr().err) == (status != 2)
