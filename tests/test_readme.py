"""The README does what it says: its classes, its YAML, its commands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import yaml

import lightning_idkd
from lightning_idkd.cli import main
from lightning_idkd.command import COMMANDS
from lightning_idkd.config.parse import configure

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SHORT = ["--logger", "null", "--graph.nodes", "4", "--distillation.start", "1",
         "--train.epochs", "2", "--run.threads", "1", "--run.engine", "loop",
         "--run.pictures", "false", "--run.name", "readme", "--run.keep", "[1]"]  # fmt: skip
ALONE = [*SHORT[:4], *SHORT[6:], "--distillation", "null", "--run.until", "1"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = (line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines())
    return [part.strip() for line in lines if line for part in line.split(";")]


@pytest.mark.slow
def test_its_rule_and_score_run_as_they_stand(tmp_path, configs):
    """In a process of its own: two classes of one short name would stay ambiguous in this one."""
    (tmp_path / "mine.py").write_text("\n\n".join(block for block in blocks("python") if "class " in block))
    (command,) = (c for c in commands() if "mine." in c)
    config = str(configs / "ring_digits.yaml")
    arguments = shlex.split(command.replace("configs/ring_digits.yaml", config))[1:]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_idkd", *arguments, *SHORT], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(["fit", "--config", config, *ALONE, "--run.dir", str(tmp_path / "ours")]) == 0
    theirs = json.loads((tmp_path / "runs/readme/latest/summary.json").read_text())
    assert len(theirs["per_node"]["threshold"]) == 4
    shared = torch.load(tmp_path / "ours/readme/latest/checkpoints/last.ckpt")
    kept = torch.load(tmp_path / "runs/readme/latest/checkpoints/epoch_1.ckpt")
    assert torch.equal(kept["X"], shared["X"])  # the README's rule is the built-in one


def test_its_yaml_is_a_config(tmp_path):
    images, vectors = blocks("yaml")
    assert yaml.safe_load(images)["data"]["image_size"] == 32
    for block, path in ((images, "my/images"), (vectors, "my/patients.csv")):
        (tmp_path / "data.yaml").write_text(block)
        config = configure(["--config", str(tmp_path / "data.yaml")])
        assert config.data.private.path == path


@pytest.mark.parametrize("command", commands())
def test_its_commands_exist_with_these_arguments(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    launched = re.sub(r"^(\w+=\S+ )*((torchrun|srun|mpirun) .*?(-m lightning_)?)?(?=idkd )(idkd )", "idkd ", command)
    launched = re.sub(r"^sbatch .*configs/slurm.sbatch ", "idkd fit ", launched)
    words = shlex.split(launched)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        for word in words[2:]:
            name, _, value = word.partition("=")
            for config in value.split() if name == "CFG" else []:
                assert (ROOT / "configs" / f"{config}.yaml").exists()
            assert name != "SWEEP" or (ROOT / "configs" / "sweeps" / f"{value}.yaml").exists()
        return
    assert words[0] in ("idkd", ".venv/bin/idkd")
    assert words[1] in COMMANDS
    if words[1] == "fit" and "--help" not in words and "mine." not in command:
        configure(words[2:])
    if words[1] != "fit":
        replaced = ("sweep.runner.run_sweep", "analysis.compare.show", "analysis.load.load",
                    "analysis.evaluate.evaluate", "analysis.evaluate.show", "command.init.write_skeleton")  # fmt: skip
        for place in replaced:
            monkeypatch.setattr(f"lightning_idkd.{place}", MagicMock())
        assert main(words[1:]) == 0
    for word in words[2:]:
        assert not word.startswith("configs/") or (ROOT / word).exists()


def test_its_way_back_into_python_runs_as_it_stands(tmp_path, configs, monkeypatch):
    short = [*ALONE, "--run.dir", str(tmp_path / "runs"), "--run.name", "ring_digits"]
    assert main(["fit", "--config", str(configs / "ring_digits.yaml"), *short]) == 0
    (block,) = (block for block in blocks("python") if "idkd.load" in block)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(block, found)
    assert found["run"].stack.n == 4


def test_its_export_is_used_without_this_project(tmp_path, configs):
    """Its six lines as they stand, in a process that cannot import the project, answer as the run does."""
    network = ["--node.network", "TorchModule", "--node.network.path", "torchvision.models.resnet18",
               "--data.channels", "3"]  # fmt: skip
    short = [*ALONE, "--graph.nodes", "2", "--train.epochs", "1", "--run.until", "1", "--data.private.limit", "64"]
    arguments = [*short, *network, "--run.dir", str(tmp_path / "runs")]
    assert main(["fit", "--config", str(configs / "ring_digits.yaml"), *arguments]) == 0
    run = lightning_idkd.load(tmp_path / "runs" / "readme" / "latest")
    run.export(tmp_path / "exported")
    images = run.test()[:50]
    torch.save(images.pixels, tmp_path / "images.pt")
    (block,) = (block for block in blocks("python") if "exported" in block)
    assert len([line for line in block.splitlines() if line]) == 6
    code = f"import sys, torch\npixels = torch.load('images.pt')\n{block}\nprint(answers.tolist())\n"
    code += "assert not any(m.startswith(('lightning', 'callbacks')) for m in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == run.outputs(run.consensus(), images).logits.argmax(1).tolist()


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
