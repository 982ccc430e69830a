"""Whole runs, in this process."""

from __future__ import annotations

import pytest
from short_runs import SHORT

from lightning_idkd.cli import main


@pytest.fixture
def fit(configs, tmp_path):
    def call(*arguments, folder="runs"):
        config = str(configs / "ring_digits.yaml")
        return main(["fit", "--config", config, *SHORT, "--run.dir", str(tmp_path / folder), *arguments])

    call.runs = tmp_path / "runs"
    return call
