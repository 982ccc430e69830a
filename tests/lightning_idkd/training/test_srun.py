"""On a login node of SLURM ``srun`` is in the PATH: a start says the same as elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

from lightning_idkd.config import RunConfig
from lightning_idkd.training.launch import launch

START = "from lightning_idkd.config import RunConfig; from lightning_idkd.training.launch import launch; "


@pytest.fixture
def srun(tmp_path, monkeypatch):
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_its_hint_is_no_error(srun):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch(RunConfig(accelerator="cpu"))


@pytest.mark.slow
def test_its_hint_is_not_printed(srun):
    code = f"{START}launch(RunConfig(accelerator='cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
