"""One import name, ``lightning_idkd.callbacks``, in a checkout and a wheel, also beside a user's own ``callbacks``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from short_runs import SHORT

from lightning_idkd import checkout

ROOT = Path(__file__).resolve().parents[2]
OWN = """
from lightning_idkd import Callback
from lightning_idkd.callbacks import DSGD


class Mine(Callback):
    def on_evaluation_end(self, metrics):
        metrics["mine"] = 1.0


class ChocoSGD(DSGD):
    pass
"""
PLACES = {
    "callbacks.py": "callbacks.Mine",
    "callbacks/__init__.py": "callbacks.Mine",
    "callbacks/mine.py": "callbacks.mine.Mine",
}
"""Where a user's own ``callbacks`` may lie, the last without an ``__init__.py``, and the path of a class there."""
RESOLVE = (
    "import json, sys; from lightning_idkd.config.parse import configure; "
    "print(json.dumps([configure(arguments).resolved for arguments in json.loads(sys.argv[1])]))"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The unpacked wheel of a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copied = ("lightning_idkd", "callbacks", "configs")
    for name in copied:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    if find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed; pip would fetch it from the network")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        ".",
    ]
    done = subprocess.run(build, cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


@pytest.fixture
def idkd(request, tmp_path):
    """Runs Python in a folder of the user's, with the package in a checkout or, if so parametrised, as a wheel leaves
    it."""
    package = request.getfixturevalue("wheel") if getattr(request, "param", "") == "wheel" else ROOT

    def run(*arguments: str) -> subprocess.CompletedProcess:
        env = os.environ | {"PYTHONPATH": str(package)}
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.fixture
def own(request, tmp_path) -> str:
    """The path of a class in a ``callbacks`` of the user's own."""
    file = tmp_path / request.param
    file.parent.mkdir(exist_ok=True)
    file.write_text(OWN)
    return PLACES[request.param]


def test_the_wheel_has_every_package():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [
        f.parent.relative_to(ROOT).parts
        for top in ("lightning_idkd", "callbacks")
        for f in (ROOT / top).rglob("__init__.py")
    ]
    names = [".".join(parts if parts[0] == "lightning_idkd" else ("lightning_idkd", *parts)) for parts in folders]
    assert sorted(listed) == sorted([*names, "lightning_idkd.configs"])


@pytest.mark.slow
def test_a_wheel_takes_one_top_level_name(wheel):
    names = {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"}
    assert names == {"lightning_idkd"}
    shipped = {
        path.relative_to(wheel / "lightning_idkd") for path in (wheel / "lightning_idkd" / "configs").rglob("*.yaml")
    }
    assert shipped == {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    assert (wheel / "lightning_idkd/models/cpu_norms.c").exists()


@pytest.mark.parametrize("first", ["callbacks.gossip.dsgd", "lightning_idkd.callbacks", "lightning_idkd"])
def test_a_checkout_has_every_module_of_callbacks_once(first):
    modules = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in (ROOT / "callbacks").rglob("*.py")]
    code = f"import {first}, sys\nfrom importlib import import_module\n"
    code += f"for name in {[m.removesuffix('.__init__') for m in modules]}:\n"
    code += "    assert import_module(name) is import_module(f'lightning_idkd.{name}')\n"
    code += "    assert import_module(name).__spec__.name == import_module(name).__name__ == f'lightning_idkd.{name}'\n"
    code += "import callbacks.gossip.dsgd as dsgd, lightning_idkd.callbacks as ours\nassert dsgd.DSGD is ours.DSGD"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_configs_lie_where_the_package_says():
    assert ROOT / "configs" == checkout.CONFIGS
    assert import_module("lightning_idkd.callbacks").__file__ == str(ROOT / "callbacks" / "__init__.py")


@pytest.mark.parametrize(
    ("idkd", "own"),
    [*(("checkout", place) for place in PLACES), pytest.param("wheel", "callbacks.py", marks=pytest.mark.slow)],
    indirect=True,
)
def test_help_and_classes_beside_a_callbacks_of_the_users_own(idkd, own):
    """The user's class counts where it exists, else the project's; full and short names always mean the project's."""
    help = idkd("-m", "lightning_idkd", "fit", "--help")
    assert (help.returncode, help.stderr) == (0, "")
    module = own.rpartition(".")[0]
    expected = {
        "callbacks.DSGD": "lightning_idkd.callbacks.DSGD",
        "callbacks.gossip.DSGD": "lightning_idkd.callbacks.gossip.DSGD",
        f"{module}.ChocoSGD": f"{module}.ChocoSGD",
        "lightning_idkd.callbacks.ChocoSGD": "lightning_idkd.callbacks.ChocoSGD",
        "QGDSGDm": "lightning_idkd.callbacks.QGDSGDm",
    }
    mine = ["--config", "ring_digits", "--callbacks", f"[{{class_path: {own}}}]"]
    done = idkd("-c", RESOLVE, json.dumps([[*mine, "--gossip", gossip] for gossip in expected]))
    assert done.returncode == 0, done.stderr
    configs = json.loads(done.stdout)
    assert [config["gossip"]["class_path"] for config in configs] == list(expected.values())
    assert all(config["callbacks"] == [{"class_path": own}] for config in configs)


@pytest.mark.slow
@pytest.mark.parametrize(("idkd", "own"), [("wheel", "callbacks/__init__.py")], indirect=True)
def test_a_run_beside_a_callbacks_of_the_users_own(idkd, own, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"gossip: callbacks.DSGD\ncallbacks: [{{class_path: {own}}}]\n")
    short = [*SHORT, "--run.until", "2"]
    command = ["-m", "lightning_idkd", "fit", "--config", "ring_digits", "--config", "mine.yaml", *short]
    done = idkd(*command)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/ring_digits/latest"
    assert '"mine": 1.0' in (run / "metrics.jsonl").read_text()
    config = (run / "config.yaml").read_text()
    assert "class_path: lightning_idkd.callbacks.DSGD" in config
    assert f"class_path: {own}" in config


@pytest.mark.parametrize(
    "spelling", ["gossip: {class_path: callbacks.%s}", "gossip: callbacks.%s", "gossip.class_path: callbacks.%s"]
)
def test_a_config_may_name_a_class_without_the_package(spelling, tmp_path):
    from lightning_idkd.config.parse import configure

    (tmp_path / "config.yaml").write_text(spelling % "gossip.DSGD" + "\nrun: {name: callbacks.DSGD}\n")
    config = configure(["--config", str(tmp_path / "config.yaml"), "--data.private", "Digits"]).resolved
    assert config["gossip"]["class_path"] == "lightning_idkd.callbacks.gossip.DSGD"
    assert config["run"]["name"] == "callbacks.DSGD"
    word = spelling.partition(":")[0]
    config = configure([f"--{word}", "callbacks.D2", "--data.private", "Digits", "--run.name", "callbacks.D2"]).resolved
    assert config["gossip"]["class_path"] == "lightning_idkd.callbacks.D2"
    assert config["run"]["name"] == "callbacks.D2"


def test_an_error_in_the_users_own_callbacks_is_reported(idkd, tmp_path):
    (tmp_path / "callbacks.py").write_text("def f(:\n")
    for name in ("DSGD", "Mine"):
        done = idkd("-m", "lightning_idkd", "fit", "--config", "ring_digits", "--gossip", f"callbacks.{name}")
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: gossip: callbacks.{name} fails with SyntaxError")


class TestOlderRuns:
    """Their config.yaml names the project's classes ``callbacks.X``."""

    def age(self, folder: Path) -> None:
        text = (folder / "config.yaml").read_text()
        assert "class_path: lightning_idkd.callbacks." in text
        (folder / "config.yaml").write_text(text.replace("lightning_idkd.callbacks.", "callbacks."))

    def test_a_run_goes_on_and_is_forked(self, fit, tmp_path):
        assert fit("--run.until", "1") == 0
        runs = tmp_path / "runs/ring_digits"
        self.age(next(runs.glob("2*")))
        assert fit("--run.resume", "auto", "--run.keep", "[2]") == 0
        (run,) = runs.glob("2*")
        assert (run / "summary.json").exists()
        assert "lightning_idkd.callbacks." not in (run / "config.yaml").read_text()
        assert fit("--run.from", str(run / "checkpoints/epoch_2.ckpt"), "--run.name", "fork") == 0

    def test_compare_takes_both_spellings_for_one_config(self, fit, tmp_path):
        from lightning_idkd.analysis.rows import gather

        assert fit() == 0
        (run,) = (tmp_path / "runs/ring_digits").glob("2*")
        shutil.copytree(run, tmp_path / "runs/ring_digits/older")
        self.age(tmp_path / "runs/ring_digits/older")
        assert len(gather([str(tmp_path / "runs")])) == 1

    def test_a_users_own_class_of_a_newer_run_stays(self):
        from lightning_idkd.config.class_paths import of_run

        newer = "gossip:\n  class_path: callbacks.DSGD\ncalibration:\n  class_path: lightning_idkd.callbacks.Youden\n"
        assert of_run(newer) == newer
