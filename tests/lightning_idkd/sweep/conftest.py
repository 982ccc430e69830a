"""Sweep files over ring_digits."""

from __future__ import annotations

import pytest
import yaml

QUICK = ["--logger", "null", "--graph.nodes", "4", "--train.epochs", "4", "--data.public.samples", "200",
         "--run.engine", "loop", "--run.pictures", "false"]  # fmt: skip


@pytest.fixture
def file(tmp_path, configs):
    """Writes a sweep file over ring_digits."""

    def write(parameters, file_name="some", **others):
        command = ["${env}", "python", "-m", "lightning_idkd", "fit", "--config", str(configs / "ring_digits.yaml"),
                   *QUICK, "--config", "${args_json_file}"]  # fmt: skip
        content = {"program": "lightning_idkd", "method": "grid", "parameters": parameters, "command": command} | others
        path = tmp_path / f"{file_name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return path

    return write
