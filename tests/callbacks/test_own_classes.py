"""Every class and network in callbacks/README.md runs as it stands there, by the YAML line under it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "callbacks" / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n# (\w+)\.py\n(.*?)```\n\n```yaml\n(.*?)```", README, re.DOTALL)
SHORT = ["--logger", "null", "--graph.nodes", "4", "--train.epochs", "2", "--data.private.limit", "300",
         "--data.public.samples", "200", "--run.engine", "loop", "--run.threads", "1",
         "--run.pictures", "false", "--distillation.start", "1"]  # fmt: skip


def test_there_is_one_for_each_heading():
    assert len(EXAMPLES) == README.count("```python") == README.count("```yaml") == 13


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of one run of each, in a process of their own: there alone their classes are known."""
    folder = tmp_path_factory.mktemp("mine")
    for name, code, line in EXAMPLES:
        (folder / f"{name}.py").write_text(code)
        (folder / f"{name}.yaml").write_text(line)
    fit = ["fit", "--config", str(ROOT / "configs" / "ring_digits.yaml"), *SHORT]
    commands = [[*fit, "--config", f"{name}.yaml", "--run.name", name] for name, *_ in EXAMPLES]
    script = f"from lightning_idkd.cli import main\nfor command in {commands}:\n    assert main(command) == 0, command"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [e[:2] for e in EXAMPLES], ids=[e[0] for e in EXAMPLES])
def test_it_runs_and_is_short(name, code, runs):
    assert len([written for written in code.splitlines() if written.strip()]) < 20
    summary = json.loads((runs / name / "latest" / "summary.json").read_text())
    assert 0 < summary["ood"]["kept_fraction"] <= 1
    assert re.search(r"(?:class|def) (\w+)", code)[1] in (runs / name / "latest" / "config.yaml").read_text()
