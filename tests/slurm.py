"""A cluster for tests: SLURM with two hosts of one core, both of them this machine. It needs slurm-wlm and root."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from ports import free_ports

HOSTS = ("h1", "h2")


def find_obstacle() -> str | None:
    """Why there can be no such cluster on this machine; None if there can."""
    for program in ("slurmctld", "slurmd", "munged"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            return f"{program} is not installed (Debian: slurm-wlm, munge)"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


class Cluster:
    """Starts the daemons in ``folder``; ``env`` is the environment in which SLURM's commands find them."""

    def __init__(self, folder: Path):
        self.folder, machine = folder, socket.gethostname().partition(".")[0]
        control, *ports = free_ports(1 + len(HOSTS))
        settings = {
            "ClusterName": "tests", "SlurmctldHost": f"{machine}(127.0.0.1)", "SlurmctldPort": control,
            "SlurmUser": "root", "SlurmdUser": "root", "AuthType": "auth/munge", "MpiDefault": "none",
            "AuthInfo": f"socket={folder}/munge.socket", "CredType": "cred/munge",
            "StateSaveLocation": f"{folder}/state", "SlurmdSpoolDir": f"{folder}/spool-%n",
            "SlurmctldPidFile": f"{folder}/control.pid", "SlurmdPidFile": f"{folder}/%n.pid",
            "SlurmctldLogFile": f"{folder}/control.log", "SlurmdLogFile": f"{folder}/%n.log",
            "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "ReturnToService": 2,
            "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_CPU",
        }  # fmt: skip
        nodes = [f"NodeName={h} NodeHostname={machine} NodeAddr=127.0.0.1 Port={p} CPUs=1"
                 for h, p in zip(HOSTS, ports, strict=True)]  # fmt: skip
        lines = [*(f"{k}={v}" for k, v in settings.items()), *nodes, "PartitionName=all Nodes=ALL Default=YES"]
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (folder / "state").mkdir()
        search = f"{os.environ['PATH']}:/usr/sbin"
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": search}

    def __enter__(self) -> Cluster:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        files = ["pid", "log", "seed"]
        where = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in files]
        self.call("munged", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={key}", *where)
        self.call("slurmctld")
        for host in HOSTS:
            self.call("slurmd", "-N", host)
        end = time.monotonic() + 60
        while self.call("sinfo", "-h", "-o", "%D:%t", check=False) != f"{len(HOSTS)}:idle":
            assert time.monotonic() < end, (self.folder / "control.log").read_text()[-2000:]
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.folder.glob("*.pid"):
            with contextlib.suppress(ValueError, ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)

    def call(self, *command: str, check: bool = True, **options: object) -> str:
        """What a command prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, **options)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout.strip()
