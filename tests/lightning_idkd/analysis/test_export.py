"""Exported models: other programs get the run's logits from them, and the hub gets their files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml

import lightning_idkd
from lightning_idkd.analysis import export
from lightning_idkd.analysis.model_card import describe_class, describe_network
from lightning_idkd.cli import main
from lightning_idkd.data.images import ImageInputs
from lightning_idkd.errors import UserError
from lightning_idkd.models import CNN, MobileNetV2, TorchModule
from lightning_idkd.nodes.node import NodeModule

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SHORT = ["--logger", "null", "--graph.nodes", "2", "--train.epochs", "1", "--data.partition", "IID",
         "--data.private.limit", "64", "--run.threads", "1", "--run.engine", "loop",
         "--run.pictures", "false"]  # fmt: skip
ALONE = ["--distillation", "null"]
RUNS = {
    "cnn": ("ring_digits", [*ALONE, "--node.network.norm", "batch", "--node.network.dropout", "0.5"]),
    "resnet": ("ring_digits", [*ALONE, "--node.network", "ResNet", "--node.network.depth", "8"]),
    "mlp": (
        "ring_breast_cancer",
        ["--data.public.parts", "[{class_path: Noise, init_args: {samples: 64}}]", "--distillation.start", "0.5"],
    ),
}
"""Networks, each with its config and options: BatchNorm with buffers, EvoNorm, and vectors."""
ALONE_IN_TORCH = """
import importlib, json, os, re, sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning_idkd", "callbacks", "lightning", "torchmetrics"):
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refuse())
import torch

for name in sys.argv[1:]:
    os.chdir(name)
    sys.path.insert(0, name)
    sys.modules.pop("network", None)
    blocks = re.findall(r"```python\\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names, samples = {}, torch.load("samples.pt")
    answers = []
    for block in blocks:
        exec(block, names)
        answers.append(names["model"](samples).detach())
        assert names["model"](samples[:1]).shape == answers[-1][:1].shape  # batches of other sizes, one too
    torch.save(answers, "answers.pt")
    sys.path.remove(name)
assert "lightning_idkd" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The runs of RUNS and the folders they are exported to, with ``samples.pt`` and, from a process that cannot import
    the project, ``answers.pt``: the logits that the code of each card gives."""
    root = tmp_path_factory.mktemp("exported")
    runs = {}
    for name, (config, options) in RUNS.items():
        arguments = ["--config", str(CONFIGS / f"{config}.yaml"), *SHORT, *options, "--run.dir", str(root / "runs")]
        assert main(["fit", *arguments, "--run.name", name]) == 0
        runs[name] = lightning_idkd.load(root / "runs" / name / "latest")
        runs[name].export(root / name)
        torch.save(runs[name].test().values[:40], root / name / "samples.pt")
    folders = {name: root / name for name in RUNS}
    command = [sys.executable, "-I", "-c", ALONE_IN_TORCH, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (runs[name], folders[name]) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_both_forms_answer_as_the_run_does_where_the_project_is_missing(exported, name):
    """Up to rounding: 1e-5 of the largest logit."""
    run, folder = exported[name]
    expected = run.outputs(run.consensus(), run.test()[:40]).logits
    program, plain = torch.load(folder / "answers.pt")
    for answers in (program, plain):
        torch.testing.assert_close(answers, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", RUNS)
def test_a_program_has_no_operation_but_torchs_and_names_no_folder_of_this_machine(exported, name):
    folder = exported[name][1]
    program = torch.export.load(folder / "model.pt2")
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {target.split(".")[0] for target in targets} == {"aten"}
    assert {node.op for node in program.graph.nodes} <= {"placeholder", "call_function", "output"}
    assert not any(p.requires_grad for p in program.module().parameters())
    content = (folder / "model.pt2").read_bytes()  # its parts are not compressed
    assert b"aten" in content
    assert str(Path(lightning_idkd.__file__).parent).encode() not in content


def test_no_weights_are_stored_twice(exported):
    """The former names of files are names of the same files."""
    folder = exported["cnn"][1]
    for older, file in export.OLDER.items():
        assert (folder / older).samefile(folder / file)


def test_what_is_published_has_no_absolute_path(exported):
    run, folder = exported["cnn"]
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config["run"]["dir"] == "runs"
    config["run"]["dir"] = run.config.resolved["run"]["dir"]
    assert config == run.config.resolved
    for file in (folder / name for name in ("model.safetensors", "config.json", "README.md", "network.py")):
        assert str(run.folder.path.parent).encode() not in file.read_bytes()


def test_a_card_has_the_results_of_the_run_for_the_hub(exported, tmp_path):
    run, folder = exported["mlp"]
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("unknown", "tabular-classification")
    consensus, nodes = card.data.eval_results
    assert consensus.metric_value == pytest.approx(run.summary["accuracy"]["consensus"], abs=1e-6)
    assert nodes.metric_value == pytest.approx(run.summary["accuracy"]["node_mean"], abs=1e-6)
    for text in ("113 test samples of breast_cancer", "IDKD(", "MLP(width=32", "malignant, benign", "30 features",
                 "2304.04326", "float64 [N, 30]", "2 nodes"):  # fmt: skip
        assert text in card.text
    measured = {key: dict.fromkeys(("node_mean", "node_std", "node_min", "node_max", "consensus"), value)
                for key, value in (("accuracy", 0.625), ("calibration_error", 0.0375))}  # fmt: skip
    run.export(tmp_path, measured | {"images": 7}, licence="cc0-1.0")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "cc0-1.0"
    assert card.data.eval_results[0].metric_value == 0.625
    assert "| calibration error | 0.0375 |" in card.text
    assert "all 7 test samples" in card.text


def test_a_card_of_an_earlier_checkpoint_has_no_results_of_the_run(exported, tmp_path):
    run = lightning_idkd.load(exported["cnn"][0].folder.path, "last.ckpt")
    run.export(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert "The parameters are from before the end of the run." in card.text
    assert card.data.eval_results is None


@pytest.mark.parametrize(
    "architecture", [MobileNetV2("group"), TorchModule("torchvision.models.resnet18", {"zero_init_residual": True})]
)
def test_the_code_of_a_card_loads_networks_of_torchvision(architecture, tmp_path, monkeypatch):
    network = architecture.build(3, 16, 4).eval()
    name = type(architecture).__name__
    chosen = {"class_path": f"lightning_idkd.models.{name}", "init_args": asdict(architecture)}
    about = {"channels": 3, "size": 16, "classes": list("abcd"), "config": {"node": {"network": chosen}}}
    export.write_parameters(tmp_path, network, about)
    (block,) = re.findall(r"```python\n(.*?)```", describe_network(about, "pixels"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(names["network"](x), network(x))
    assert not (tmp_path / "network.py").exists()


def test_a_card_has_arguments_that_are_0():
    arguments = {"scale": 0.0, "count": 0, "flag": False, "other": None, "none": [], "loss": {"class_path": "a.B"}}
    assert describe_class({"class_path": "mine.C", "init_args": arguments}) == "mine.C(scale=0.0, count=0, loss=a.B)"


def test_a_card_says_how_the_pixels_of_a_built_in_set_are_scaled(exported):
    """The model takes pixels from 0 to 255, and scikit-learn's digits have 0 to 16."""
    card = (exported["cnn"][1] / "README.md").read_text()
    assert (
        "Digits: The 1,797 handwritten digits of scikit-learn: 8x8 pixels, grey, with their ink 0..16 scaled to" in card
    )
    assert "breast_cancer: " not in (exported["mlp"][1] / "README.md").read_text()


def test_a_card_names_sets_of_the_hub_and_has_names_of_classes_as_plain_text(exported, tmp_path, monkeypatch):
    run, _ = exported["cnn"]
    monkeypatch.setitem(run.images["data"], "classes", ["<img src=x>", *"*_345678", "9"])
    sets = {"private": "uoft-cs/cifar10", "public": "zh-plus/tiny-imagenet"}
    for key, path in sets.items():
        chosen = {"class_path": "lightning_idkd.data.HuggingFace", "init_args": {"path": path}}
        monkeypatch.setitem(run.config.resolved["data"], key, chosen)
    run.export(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == [*sets.values()]
    assert r"- Classes: \<img src=x\>, \*, \_, 3, 4, ..." in card.text


class Undecided(torch.nn.Module):
    """A network that torch.export cannot follow: what it does depends on the values."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 3)

    def forward(self, x):
        return self.head(x.flatten(1)) if x.sum() > 0 else -self.head(x.flatten(1))


def test_a_network_that_cannot_be_traced_is_left_out_with_a_sentence(tmp_path, capsys):
    inputs = ImageInputs(1, 8)._scaled_by(torch.tensor([100.0]), torch.tensor([50.0]), torch.float32)
    (tmp_path / "model.pt2").write_text("of an earlier export")
    assert export.write_program(tmp_path, NodeModule(Undecided()).eval(), inputs) == []
    assert "note: no model.pt2, because torch.export cannot follow Undecided (" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_program_that_answers_otherwise_than_the_node_is_left_out(tmp_path, capsys):
    """As where a user's node does more than its network."""

    class Negative(NodeModule):
        def outputs(self, x):
            outputs = super().outputs(x)
            outputs.logits = -outputs.logits
            return outputs

    inputs = ImageInputs(1, 8)._scaled_by(torch.tensor([100.0]), torch.tensor([50.0]), torch.float32)
    module = Negative(CNN(8, norm="none").build(1, 8, 3)).eval()
    assert export.write_program(tmp_path, module, inputs) == []
    assert "the program has other logits than the run" in capsys.readouterr().err


@pytest.mark.parametrize(("norm", "depends"), [("batch_statistics", True), ("batch", False), ("group", False)])
def test_a_network_with_statistics_of_its_batch_is_recognised(norm, depends):
    assert export.depends_on_batch(CNN(8, norm=norm).build(1, 8, 3)) == depends


class Hub:
    """A stand-in for HfApi, up to the network."""

    calls: list

    def __init__(self):
        Hub.calls = []

    def create_repo(self, name, **options):
        self.calls.append(("create_repo", name, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options))


def test_a_push_makes_a_private_repository_and_uploads_the_exported_files(exported, tmp_path, monkeypatch, capsys):
    run, _ = exported["cnn"]
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    arguments = ["--export", str(tmp_path / "out"), "--license", "mit", "--push", "me/model"]
    assert main(["evaluate", str(run.folder.path), *arguments]) == 0
    (_, name, made), (_, uploaded) = Hub.calls
    assert (name, made["private"], made["exist_ok"]) == ("me/model", True, True)
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/model", str(tmp_path / "out"))
    names = ["model.safetensors", "config.json", "network.py", "model.pt2", "README.md"]
    assert uploaded["allow_patterns"] == names
    assert "uploaded to https://huggingface.co/me/model" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])["license"] == "mit"


def test_a_failing_upload_is_one_sentence_that_says_where_the_files_are(tmp_path, monkeypatch):
    def fail(self, **options):
        raise ConnectionError("no route to host\nTraceback")

    monkeypatch.setattr(Hub, "upload_folder", fail)
    with pytest.raises(
        UserError, match=rf"'me/x' failed \(no route to host\); the files are in '{re.escape(str(tmp_path))}'$"
    ):
        export.push(Hub(), "me/x", tmp_path, [tmp_path / "README.md"])


@pytest.mark.parametrize(
    ("arguments", "token", "said"),
    [
        (["--push", "me/x"], "hf_secret", "--push: me/x given without --export FOLDER"),
        (["--license", "mit"], "hf_secret", "--license: mit given without --export FOLDER"),
        (["--export", "out", "--push", "me/x"], None, "--push: you are not logged in to the Hugging Face hub; run"),
        (["--export", "out", "--push", "a/b/c"], "hf_secret", "--push: 'a/b/c' given; allowed: a name on the hub"),
    ],
)  # fmt: skip
def test_a_push_that_cannot_work_is_refused_before_anything_is_written(
    arguments, token, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    assert main(["evaluate", "no/run", *arguments]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_export_that_cannot_be_written_is_refused_before_the_evaluation(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lightning_idkd.analysis.evaluate.evaluate", None)
    (tmp_path / "file").touch()
    assert main(["evaluate", str(exported["cnn"][0].folder.path), "--export", str(tmp_path / "file" / "below")]) == 2
    file, said = tmp_path / "file", capsys.readouterr().err
    assert said == f"error: --export: cannot write '{file / 'below'}', because '{file}' is not a folder\n"


def test_a_push_without_the_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub is not installed; pip install"):
        export.open_hub("me/x")


def test_the_stand_in_takes_the_arguments_of_the_real_hub(monkeypatch):
    """Against the signatures of huggingface_hub."""
    import inspect

    hub = Hub()
    export.push(hub, "me/x", Path("/out"), [Path("/out/README.md")])
    (_, name, made), (_, uploaded) = hub.calls
    inspect.signature(huggingface_hub.HfApi.create_repo).bind(SimpleNamespace(), name, **made)
    inspect.signature(huggingface_hub.HfApi.upload_folder).bind(SimpleNamespace(), **uploaded)


def test_an_export_replaces_no_file_that_no_export_has_written(exported, tmp_path, monkeypatch, capsys):
    run = exported["cnn"][0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.py").write_text("mine")
    (tmp_path / "README.md").write_text("mine")
    assert main(["evaluate", str(run.folder.path), "--export", "."]) == 2
    message = "error: --export: '.' has README.md, network.py from elsewhere, which the export would replace; "
    assert capsys.readouterr().err == f"{message}give a new folder, or that of an earlier export\n"
    with pytest.raises(UserError, match="from elsewhere"):
        run.export(".")
    assert {file.read_text() for file in tmp_path.iterdir()} == {"mine"}
    (tmp_path / "consensus.safetensors").touch()  # of an earlier version, which wrote no card
    run.export(".")
    assert (tmp_path / "model.safetensors").exists()
