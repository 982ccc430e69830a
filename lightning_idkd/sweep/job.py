"""Trains a cell in a job of SLURM. submitit stores an instance in a file, and calls it on the hosts of the job."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from submitit.helpers import DelayedSubmission

INTERRUPTED = 130
"""Exit status of ``idkd fit`` after a signal."""
KILL_WAIT = 120
"""Seconds for SLURM to end a job that has stopped after SIGTERM."""


class Training:
    """Trains a cell by ``command``, whose output is appended to ``log``; raises a RuntimeError if that fails."""

    def __init__(self, command: list[str], log: Path):
        self.command, self.log = command, log
        self.process: subprocess.Popen | None = None

    def __call__(self) -> None:
        with open(self.log, "a") as out:
            self.process = subprocess.Popen(self.command, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                                            preexec_fn=ignore_warning)  # fmt: skip
            status = self.process.wait()
        if status == INTERRUPTED:
            # SLURM also sends SIGTERM when it preempts a job. It starts that job again only if it has to end it.
            time.sleep(KILL_WAIT)
        if status:
            raise RuntimeError(f"status {status}, see {self.log}")

    def checkpoint(self) -> DelayedSubmission | None:
        """Stop the training with a checkpoint; returns what submitit then starts again, None if the training is over.

        submitit calls this in a signal handler, shortly before the time limit of the job.
        """
        if self.process is not None:
            if self.process.returncode == 0:
                return None
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.process.pid, signal.SIGUSR1)
                # the interrupted `wait` holds Popen's lock, and needs the exit status that this leaves to it
                end = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
                if end is not None and (end.si_code, end.si_status) == (os.CLD_EXITED, 0):
                    return None
        return DelayedSubmission(Training(self.command, self.log))


def ignore_warning() -> None:
    """Ignore SIGUSR2, which SLURM sends to all processes of a job and submitit alone answers."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
