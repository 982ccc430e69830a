"""A run folder may come from a stranger: to read it runs no code that does not come with this project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from short_runs import SHORT

import lightning_idkd
from lightning_idkd.analysis.rows import gather
from lightning_idkd.callback import OodScore
from lightning_idkd.cli import main
from lightning_idkd.config.parse import configure
from lightning_idkd.config.trust import read_trusted
from lightning_idkd.errors import UserError
from lightning_idkd.training.resume import find_start

ROOT = Path(__file__).resolve().parents[3]
CONFIG = str(ROOT / "configs" / "ring_digits.yaml")
PLANTED = """
from pathlib import Path
from lightning_idkd import Callback, OodScore
from lightning_idkd.callbacks import DSGD

Path(__file__).with_suffix(".ran").touch()


class Mine(Callback):
    pass


class PlantedScore(OodScore):
    def __call__(self, outputs):
        return outputs.logits[:, 0]
"""
NETWORK = "lightning_idkd.models.TorchModule"
PATHS = ("planted_code.X", "os.system", "torchvision.models.os.system", "torchvision.models.resnet.partial",
         "torchvision.models.get_model", "lightning_idkd.models.cpu_norms._compile",
         "lightning_idkd.models.norms.norm_layer", "lightning_idkd.records.run_folder.RunFolder")  # fmt: skip
"""What a TorchModule may not call: functions and other classes of this project may do harm with some arguments."""


class ImportedScore(OodScore):
    """A class of the user's own that is imported already, so that its short name is known."""

    def __call__(self, outputs):
        return outputs.logits[:, 0]


def spec(cls: str, /, **arguments) -> dict:
    return {"class_path": cls, "init_args": arguments}


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Path:
    """A folder on Python's path, with modules that leave a file when they are imported."""
    folder = tmp_path / "planted"
    folder.mkdir()
    for name in ("planted_code", "callbacks", "lightning_idkd_x"):
        (folder / f"{name}.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ("planted_code", "callbacks", "lightning_idkd_x"):
        if getattr(sys.modules.get(name), "__file__", "").startswith(str(folder)):
            del sys.modules[name]


def ran(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.ran"))


@pytest.fixture(scope="module")
def resolved() -> str:
    """What a run of ring_digits stores as its config."""
    from lightning_idkd.config import yaml_file

    return yaml_file.write(configure(["--config", CONFIG, *SHORT]).resolved)


def change(resolved: str, key: str, value: object) -> str:
    """A stored config with another value at a place, whose parts are separated by slashes."""
    config = yaml.safe_load(resolved)
    *above, name = key.split("/")
    below = config
    for part in above:
        below = below[part]
    below[name] = value
    return yaml.safe_dump(config, sort_keys=False)


ASKED = [
    # where, what stands there, the key and the path that the message names
    ("gossip", spec("planted_code.X"), "gossip", "planted_code.X"),
    ("gossip", "planted_code.X", "gossip", "planted_code.X"),
    ("gossip", "{class_path: planted_code.X}", "gossip", "{class_path: planted_code.X}"),
    ("gossip", spec("lightning_idkd_x.X"), "gossip", "lightning_idkd_x.X"),
    ("gossip", spec("lightning_idkd.training.launch.os.system"), "gossip", "lightning_idkd.training.launch.os.system"),
    ("gossip", spec("__main__.X"), "gossip", "__main__.X"),
    ("gossip", spec(".planted_code.X"), "gossip", ".planted_code.X"),
    ("gossip", "planted_code/X.yaml", "gossip", "planted_code/X.yaml"),
    ("gossip", spec("callbacks.Mine"), "gossip", "callbacks.Mine"),
    ("data/augment", "callbacks.DSGD", "data.augment", "callbacks.DSGD"),
    ("graph", "planted_code.X", "graph", "planted_code.X"),
    ("graph", spec("planted_code.X"), "graph", "planted_code.X"),
    ("clock", "planted_code.X", "clock", "planted_code.X"),
    ("node/module", "planted_code.X", "node.module", "planted_code.X"),
    ("node/module", "subprocess.Popen", "node.module", "subprocess.Popen"),
    ("callbacks", [spec("planted_code.Mine")], "callbacks", "planted_code.Mine"),
    ("callbacks", ["planted_code.Mine"], "callbacks", "planted_code.Mine"),
    ("callbacks", "[planted_code.Mine]", "callbacks", "[planted_code.Mine]"),
    ("callbacks+", "planted_code.Mine", "callbacks", "planted_code.Mine"),
    ("calibration/init_args/score", spec("planted_code.X"), "calibration.score", "planted_code.X"),
    ("calibration/init_args/score", "planted_code.PlantedScore", "calibration.score", "planted_code.PlantedScore"),
    ("calibration/init_args/score", "ImportedScore", "calibration.score", "ImportedScore"),
    ("calibration.init_args.score", "planted_code.PlantedScore", "calibration.score", "planted_code.PlantedScore"),
    ("distillation/init_args/tuning", "planted_code.X", "distillation.tuning", "planted_code.X"),
    ("faults", [spec("MessageLoss", p=spec("planted_code.X"))], "faults.p", "planted_code.X"),
    *[("node/network", spec(NETWORK, path=path), "node.network.path", path) for path in PATHS],
    ("node/network", spec("TorchModule", path="os.system"), "node.network.path", "os.system"),
    ("node/network", {"class_path": NETWORK, "dict_kwargs": {"path": "os.system"}}, "node.network.path", "os.system"),
    ("node/network", spec(NETWORK, path="torchvision.models.resnet18", arguments={"norm_layer": spec("os.system")}),
     "node.network.arguments.norm_layer", "os.system"),
    ("node/network", spec(NETWORK, path="torchvision.models.resnet18", arguments={"x": "{class_path: os.system}"}),
     "node.network.arguments.x", "os.system"),
    ("gossip", spec("LocalOptimizer", optimizer="planted_code.X"), "gossip.optimizer", "planted_code.X"),
    ("gossip", spec("LocalSteps", rule=spec("LocalOptimizer", optimizer="os.X")), "gossip.rule.optimizer", "os.X"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "key", "path"), ASKED, ids=[f"{a[0]}-{a[3]}" for a in ASKED])
def test_code_from_elsewhere_is_refused_before_anything_is_imported(place, value, key, path, resolved, planted):
    file = planted / "config.yaml"
    file.write_text(change(resolved, place, value))
    with pytest.raises(UserError) as refused:
        read_trusted(file)
    said = str(refused.value)
    assert said.startswith(f"'{file}': {key} asks for '{path}', ")
    assert "--trust" in said
    assert "trust=True" in said
    assert not ran(planted)


@pytest.mark.parametrize(
    "text",
    [
        "gossip: !!python/object/apply:os.system [touch ran]\n",
        "gossip: !!python/name:planted_code.Mine\n",
        "callbacks: !!set {planted_code.Mine}\n",
        "callbacks: !!omap [a: planted_code.Mine]\n",
        "x: &x {class_path: planted_code.Mine}\ngossip: {<<: *x}\n",
        "config: other.yaml\n",
        "a: &a [*a]\n",
        "- a list\n",
    ],
)
def test_a_config_that_is_not_plain_is_refused(text, planted):
    (planted / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml'"):
        read_trusted(planted / "config.yaml")
    assert not ran(planted)


def test_a_path_with_control_characters_is_printed_as_one_line(resolved, tmp_path):
    (tmp_path / "config.yaml").write_text(change(resolved, "gossip", "x.\x1b[2J\ny"))
    with pytest.raises(UserError) as refused:
        read_trusted(tmp_path / "config.yaml")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("node/network", spec(NETWORK, path="torchvision.models.resnet18", arguments={"weights": "Weights.DEFAULT"})),
        ("node/network", spec(NETWORK, path="torchvision.models.resnet.resnet18")),
        ("node/network", spec(NETWORK, path="torchvision.models.MobileNetV2")),
        ("node/network", spec("lightning_idkd.models.architectures.MLP")),
        ("gossip", spec("LocalOptimizer", optimizer="torch.optim.AdamW")),
        ("gossip", spec("lightning_idkd.callbacks.gossip.dsgd.DSGD")),
        ("gossip", "DSGD"),
        ("run/name", "callbacks.DSGD"),
        ("data/private", spec("HuggingFace", path="user.name/set")),
    ],
)  # fmt: skip
def test_the_projects_own_classes_and_torchvisions_networks_need_no_trust(place, value, resolved, tmp_path):
    (tmp_path / "config.yaml").write_text(change(resolved, place, value))
    configure(["--config", str(tmp_path / "config.yaml")])
    assert read_trusted(tmp_path / "config.yaml") == yaml.safe_load(change(resolved, place, value))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    more = ["--train.epochs", "2", "--distillation", "null", "--run.dir", str(folder)]
    assert main(["fit", "--config", CONFIG, *SHORT, *more]) == 0
    return (folder / "ring_digits" / "latest").resolve()


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a run, which asks for a class from elsewhere."""
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(change(file.read_text(), "callbacks", [spec("planted_code.Mine")]))
    return tmp_path / "run"


def test_load_takes_a_users_own_class_only_with_trust(run, planted):
    with pytest.raises(UserError, match=r"config\.yaml': callbacks asks for 'planted_code\.Mine'"):
        lightning_idkd.load(run)
    assert not ran(planted)
    loaded = lightning_idkd.load(run, trust=True)
    assert type(loaded.config.callbacks[0]).__module__ == "planted_code"
    assert ran(planted) == ["planted_code"]


def test_the_parser_does_not_work_in_the_run_folder(finished, monkeypatch):
    """Python may import modules from the folder in which it works."""
    visited, chdir = [], os.chdir
    monkeypatch.setattr(os, "chdir", lambda folder: visited.append(str(folder)) or chdir(folder))
    lightning_idkd.load(finished)
    assert not [folder for folder in visited if folder.startswith(str(finished))]


def test_reports_tables_and_forks_read_a_config_as_text(run, planted):
    assert main(["report", str(run)]) == 0
    assert len(gather([str(run)])) == 1
    config = [*SHORT, "--train.epochs", "3", "--distillation", "null", "--run.from", str(run)]
    assert find_start(configure(["--config", CONFIG, *config])).fork
    (run / "config.yaml").write_text(change((run / "config.yaml").read_text(), "node/module", "planted_code.X"))
    with pytest.raises(UserError, match=r"run\.from: node\.module is .* here but planted_code\.X in"):
        find_start(configure(["--config", CONFIG, *config]))
    assert not ran(planted)


@pytest.fixture
def working_folder(planted, monkeypatch) -> Path:
    """The folder with the planted modules, as that in which the user stands."""
    monkeypatch.chdir(planted)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(planted)])
    return planted


def test_evaluate_runs_a_users_own_class_only_with_trust(run, working_folder, capsys):
    assert main(["evaluate", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: '{run / 'config.yaml'}': callbacks asks for 'planted_code.Mine', ")
    assert said.count("\n") == 1
    assert not ran(working_folder)
    assert main(["evaluate", str(run), "--trust"]) == 0
    assert ran(working_folder) == ["planted_code"]


def test_a_score_of_the_users_own_on_the_command_line_needs_no_trust(finished, working_folder):
    assert main(["evaluate", str(finished), "--calibration.score", "planted_code.PlantedScore"]) == 0
    assert ran(working_folder) == ["planted_code"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_python_m_takes_no_module_from_the_working_folder(command, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "older")
    file = tmp_path / "older" / "config.yaml"
    file.write_text(file.read_text().replace("lightning_idkd.callbacks.", "callbacks."))
    for name in ("callbacks", "torchvision", "torchmetrics"):
        (tmp_path / f"{name}.py").write_text(PLANTED)
    python, env = [sys.executable, "-m", "lightning_idkd"], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*python, command, "older"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not ran(tmp_path)
