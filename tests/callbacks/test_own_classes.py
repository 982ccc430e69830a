"""Every class in callbacks/README.md runs as it stands there, by the YAML line under it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "callbacks" / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n# (\w+)\.py\n(.*?)```\n\n```yaml\n(.*?)```", README, re.DOTALL)
SHORT = ["--logger", "null", "--graph.nodes", "4", "--train.epochs", "3", "--data.public.samples", "200", "--run.engine", "loop",
         "--run.threads", "1", "--run.pictures", "false", "--distillation.start", "1"]  # fmt: skip


def test_there_is_one_for_each_heading():
    assert len(EXAMPLES) == README.count("```python") == README.count("```yaml") == 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code", "line"), EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_it_runs_and_is_short(name, code, line, configs, tmp_path):
    assert len([written for written in code.splitlines() if written.strip()]) < 20
    (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "mine.yaml").write_text(line)
    command = [
        sys.executable,
        "-m",
        "lightning_idkd",
        "fit",
        "--config",
        str(configs / "ring_digits.yaml"),
        "--config",
        "mine.yaml",
    ]
    done = subprocess.run([*command, *SHORT, "--run.name", "mine"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "runs" / "mine" / "latest" / "summary.json").read_text())
    assert 0 < summary["ood"]["kept_fraction"] <= 1
    assert re.search(r"class (\w+)", code)[1] in (tmp_path / "runs" / "mine" / "latest" / "config.yaml").read_text()
