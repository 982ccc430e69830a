"""Every config and preset: on stand-in data of the same format, and on the real sets where they are."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_idkd.cli import main
from lightning_idkd.config.parse import configure
from lightning_idkd.records.run_folder import RunFolder


def latest(runs: Path, name: str) -> Path:
    return runs / name / "latest"


def files_of(configs: Path, names: list[str]) -> list[str]:
    return [part for name in names for part in ("--config", str(configs / f"{name}.yaml"))]


def options(changes: dict) -> list[str]:
    return [str(part) for key, value in changes.items() for part in (f"--{key}", value)]


def parquet(folder, split, samples, classes, size, seed):
    """An image-parquet file in the Hugging Face layout."""
    import datasets
    from PIL import Image

    rng = np.random.default_rng(seed)
    labels = (np.arange(samples) % classes).tolist()
    images = []
    for label in labels:
        buffer = io.BytesIO()
        pixels = np.clip(rng.normal(40 + 170 * label / classes, 40, (size, size, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"c{i}" for i in range(classes)])}
    )
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
        folder / f"{split}-00000-of-00001.parquet"
    )


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_in")
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        parquet(folder / name, "train", 1600, classes, 32, 1)
        parquet(folder / name, "test", 200, classes, 32, 2)
    parquet(folder / "imagenette-64", "train", 640, 10, 64, 4)
    parquet(folder / "imagenette-64", "test", 100, 10, 64, 5)
    parquet(folder / "tiny-imagenet-32", "train", 120, 20, 32, 3)
    return folder


def every_config():
    return sorted(p.stem for p in (Path(__file__).parents[3] / "configs").glob("*.yaml"))


PRESETS = [
    *([name] for name in every_config()),
    ["ring_cifar10", "presets/official_code"],
    ["ring_imagenette", "presets/official_code_imagenette"],
    ["ring_cifar10", "presets/recipe_idkd"],
    ["ring_cifar10", "presets/recipe_qgm"],
    ["ring_cifar10", "presets/recipe_gut"],
    ["ring_digits", "presets/balanced"],
    ["ring_digits", "presets/balanced_head"],
    *(
        ["ring_digits", f"presets/{method}"]
        for method in ("fedmd", "dsfl", "selective_fd", "def_kt", "idkd_aligned", "idkd_plus")
    ),
]


@pytest.mark.parametrize("names", PRESETS, ids="+".join)
def test_every_config_trains_on_stand_in_data(names, configs, stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("IDKD_DATA", str(stand_in))
    files = files_of(configs, names)
    config = configure(files)
    config.check()
    shrink = {"train.epochs": 2, "train.schedule": "Constant", "train.evaluate_samples": 16, "logger": "null",
              "run.engine": "loop", "run.dir": tmp_path, "run.pictures": "false", "run.devices": 1, "run.threads": 1,
              "run.control": "false"}  # fmt: skip
    if config.distillation is not None:
        shrink |= {"distillation.start": 1}
    if len(names) == 2 and names[0] == "ring_digits":  # the presets beside it are those of methods, not of graphs
        shrink |= {"graph.nodes": 4}
    if type(config.node.network).__name__ == "ResNet":
        shrink |= {"node.network.depth": 8, "node.network.width": 4, "data.partition": "IID"}
        shrink |= {"data.private.limit": 16 * config.graph.nodes, "train.batch_size": 8, "data.image_size": 16}
        shrink |= {} if config.node.network.pool is None else {"node.network.pool": 4}  # the last images are 4x4
    assert main(["fit", *files, *options(shrink)]) == 0
    summary = json.loads((latest(tmp_path, names[0]) / "summary.json").read_text())
    assert (summary["ood"]["kept_fraction"] is not None) == (
        config.distillation is not None and config.distillation.public
    )
    tells_more = "official_code" in names[-1] or names[-1] in ("presets/balanced_head", "presets/idkd_plus")
    assert (summary["communication"]["other_bytes"] > 0) == tells_more


def test_the_official_code_is_a_preset_of_its_own(configs):
    paper, official = (
        configure(files_of(configs, names)) for names in (["ring_cifar10"], ["ring_cifar10", "presets/official_code"])
    )
    assert type(paper.calibration).__name__ == "Youden"
    assert official.calibration.threshold(None, None) == pytest.approx(np.log(0.98 / 0.02))
    assert (paper.gossip.nesterov, official.gossip.nesterov) == (True, False)
    assert [e for e in range(300) if official.distillation.due(e, 300)] == list(range(246, 300, 5))  # eleven
    assert [e for e in range(300) if paper.distillation.due(e, 300)] == [241]
    assert official.distillation.labels == "relayed"
    assert sum(p.numel() for p in official.node.network.build(3, 32, 10).parameters()) == 272_474
    imagenette = configure(files_of(configs, ["ring_imagenette", "presets/official_code_imagenette"]))
    assert imagenette.node.network.build(3, 64, 10).head.in_features == 256
    assert [e for e in range(300) if imagenette.distillation.due(e, 300)] == [296]
    assert official.distillation.shares == "sizes of the nodes' sets, class histograms of private data"
    assert paper.distillation.shares == ""


PAPER = ["ring_cifar10", "ring_cifar100", "ring_imagenette", "social15_cifar10", "social32_cifar10", "torus_cifar100"]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [*([name] for name in PAPER), ["ring_cifar10", "presets/official_code"],
     ["ring_imagenette", "presets/official_code_imagenette"]],
    ids="+".join,
)  # fmt: skip
def test_every_preset_goes_30_steps_and_through_an_exchange_on_real_data(names, configs, data_folder, tmp_path):
    """Its own graph, rule, kind of network and (but for one) image size; sets, batches, depth and width are smaller."""
    files = files_of(configs, names)
    nodes = configure(files).graph.nodes
    small = {"data.private.limit": 56 * nodes, "data.public.limit": 64, "train.batch_size": 4,
             "distillation.start": 1, "train.evaluate_every": 3, "train.evaluate_samples": 8, "run.until": 3,
             "run.keep": "[1]", "run.engine": "loop", "run.threads": 1, "run.dir": tmp_path, "logger": "null",
             "node.network.depth": 8, "node.network.width": 4}  # fmt: skip
    if len(names) == 2:
        small |= {"calibration.probability": 0.12}  # so early no softmax reaches the preset's 0.98
    if names[-1] == "presets/official_code_imagenette":
        # torch 2.14's 1x1 convolutions with a stride write past their memory for 4 channels of 64x64
        small |= {"data.image_size": 32, "node.network.pool": 4}
    assert main(["fit", *files, *options(small)]) == 0
    run = RunFolder(latest(tmp_path, names[0]))
    before, after = (RunFolder.load(run.file(f"checkpoints/{name}.ckpt")) for name in ("epoch_1", "last"))
    (line,) = run.metrics()
    assert line["step"] >= 30
    assert (before["phase"], after["phase"], line["phase"]) == ("train", "distil", "distil")
    assert before["X"].shape[0] == nodes
    assert np.isfinite(line["train/loss"])
    assert line["communication/label_bytes"] > 0
    assert line["communication/parameter_bytes"] > line["communication/label_bytes"]
    assert (line["communication/other_bytes"] > 0) == (len(names) == 2)


@pytest.mark.data
@pytest.mark.slow
def test_torus_cifar100_goes_through_calibration_exchange_kill_and_resume(configs, data_folder, tmp_path, capsys):
    fish = "[aquarium_fish, flatfish, ray, shark, trout]"  # few test images too, which the end evaluates all of
    torus = "{nodes: 9, topology: {class_path: Torus, init_args: {rows: 3, cols: 3}}}"
    small = {"graph": torus, "data.private.classes": fish, "data.public.limit": 500, "data.image_size": 8,
             "node.network.depth": 8, "node.network.width": 4, "train.epochs": 4, "train.evaluate_every": 1,
             "train.evaluate_samples": 32, "distillation.start": 2, "run.engine": "loop", "run.threads": 1,
             "run.dir": tmp_path, "logger": "null"}  # fmt: skip
    fit = ["fit", *files_of(configs, ["torus_cifar100"]), *options(small)]
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_idkd", *fit], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if " distil " in line:
            break
    process.kill()
    process.wait()
    process.stdout.close()
    assert main([*fit, "--run.resume", "auto"]) == 0
    assert "continued at epoch" in capsys.readouterr().out
    summary = json.loads((latest(tmp_path, "torus_cifar100") / "summary.json").read_text())
    assert summary["steps"] == 4 * 7
    assert 0 < summary["ood"]["kept_fraction"] < 1
