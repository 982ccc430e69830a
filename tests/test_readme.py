"""The README and the pages of the documentation do what they say: their classes, YAML, commands and links."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_idkd.cli import main
from lightning_idkd.command import COMMANDS
from lightning_idkd.config.mistakes import Parser
from lightning_idkd.config.parse import configure

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "configs" / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
README, OWN_DATA, FINISHED_RUNS = ROOT / "README.md", DOCS / "how_to/own_data.md", DOCS / "how_to/finished_runs.md"
LAUNCHERS = r"^(\w+=\S+ )*((torchrun|srun|mpirun) .*?(-m lightning_)?)?(?=idkd )"
"""What may stand before ``idkd`` in a command."""
SHORT = ["--logger", "null", "--graph.nodes", "4", "--distillation.start", "1",
         "--train.epochs", "2", "--run.threads", "1", "--run.engine", "loop",
         "--run.pictures", "false", "--run.name", "readme", "--run.keep", "[1]"]  # fmt: skip
ALONE = [*SHORT[:4], *SHORT[6:], "--distillation", "null", "--run.until", "1"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(*pages):
    """The commands of this project in the shell blocks of some pages, each once."""
    lines = (line.split("  #")[0] for page in pages for block in blocks(page, "sh") for line in block.splitlines())
    parts = (part.strip() for line in lines for part in re.split(";|&&|[|>]", line))
    return list(dict.fromkeys(part for part in parts if re.match("make |sbatch |.venv/bin/idkd |" + LAUNCHERS, part)))


class Parsed(Exception):
    """The arguments of a command have been read."""


@pytest.mark.slow
def test_its_rule_and_score_run_as_they_stand(tmp_path, configs):
    """In a process of its own: two classes of one short name would stay ambiguous in this one."""
    (tmp_path / "mine.py").write_text("\n\n".join(block for block in blocks(README, "python") if "class " in block))
    (command,) = (c for c in commands(README) if "mine." in c)
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


def test_the_yaml_of_own_data_is_a_config(tmp_path):
    images, vectors = blocks(OWN_DATA, "yaml")
    assert yaml.safe_load(images)["data"]["image_size"] == 32
    for block, path in ((images, "my/images"), (vectors, "my/patients.csv")):
        (tmp_path / "data.yaml").write_text(block)
        config = configure(["--config", str(tmp_path / "data.yaml")])
        assert config.data.private.path == path


@pytest.mark.parametrize("command", commands(*PAGES))
def test_commands_exist_with_these_arguments(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    launched = re.sub(f"{LAUNCHERS}(idkd )", "idkd ", command)
    launched = re.sub(r"^sbatch .*configs/slurm.sbatch ", "idkd fit ", launched)
    program, name, *words = shlex.split(launched)
    if program == "make":
        assert name in re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in words:
            variable, _, value = word.partition("=")
            for config in value.split() if variable == "CFG" else []:
                assert (ROOT / "configs" / f"{config}.yaml").exists()
            assert variable != "SWEEP" or (ROOT / "configs" / "sweeps" / f"{value}.yaml").exists()
        return
    assert name in COMMANDS
    for word in words:
        assert not word.startswith("configs/") or (ROOT / word).exists()
    if name in ("fit", "topology", "partition", "bench") and "--help" not in words and "mine." not in command:
        theirs = [
            i for i, word in enumerate(words[1:]) if words[i] == "--config" and word in ("data.yaml", "mine.yaml")
        ]
        for i in reversed(theirs):  # a reader writes these files
            del words[i : i + 2]
        configure(words if "--config" in words else ["--data.private", "Digits", *words], name)
    elif name != "fit":
        parse = Parser.parse_args

        def parse_only(*arguments, **options):
            parse(*arguments, **options)
            raise Parsed

        monkeypatch.setattr(Parser, "parse_args", parse_only)
        with pytest.raises(Parsed):
            main([name, *words])


def test_the_way_back_into_python_runs_as_it_stands(tmp_path, configs, monkeypatch):
    short = [*ALONE, "--run.dir", str(tmp_path / "runs"), "--run.name", "ring_digits"]
    assert main(["fit", "--config", str(configs / "ring_digits.yaml"), *short]) == 0
    (block,) = (block for block in blocks(FINISHED_RUNS, "python") if "idkd.load" in block)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(block, found)
    assert found["run"].stack.n == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target
