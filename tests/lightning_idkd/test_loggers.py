"""W&B's offline files read back, and the other loggers."""

from __future__ import annotations

import csv
import json
import os
import struct
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from lightning_idkd.cli import main
from lightning_idkd.loggers import logged_in

SHORT = ["--graph.nodes", "4", "--train.epochs", "4", "--train.evaluate_every", "2", "--distillation.start", "2",
         "--distillation.every", "1", "--data.public.samples", "200", "--run.engine", "loop", "--run.threads", "1"]  # fmt: skip


def records(path):
    """The protobuf records of a .wandb file: blocks of 32 kB after a header of 7 bytes, chunks of (crc, length, type)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(parts)
            parts = b""


def history(path):
    """Every logged line as a dict."""
    lines = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines


@pytest.mark.slow
def test_wandb_offline_a_resumed_run_continues_its_curve(configs, tmp_path):
    """Without a login nothing is asked. In processes of their own: wandb leaves threads and sockets behind."""
    command = [sys.executable, "-m", "lightning_idkd", "fit", "--config", str(configs / "ring_digits.yaml"), *SHORT]
    command += ["--run.dir", str(tmp_path), "--run.resume", "auto"]
    alone = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path / "home")}  # no login
    for more in (["--run.until", "3"], []):
        done = subprocess.run([*command, *more], capture_output=True, text=True, env=alone)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "deprecated" not in done.stderr
    run = tmp_path / "ring_digits" / "latest"
    assert len(list((tmp_path / "ring_digits").glob("2*"))) == 1
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert files[0].name == files[1].name == f"run-{(run / 'wandb' / 'run_id.txt').read_text()}.wandb"  # one curve when synced

    first, second = map(history, files)
    assert [line["epoch"] for line in first + second] == [2, 4]  # one log an evaluation
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, logged in zip(written, first + second, strict=True):
        for key, value in line.items():
            if isinstance(value, (int, float)):
                assert logged[key] == pytest.approx(value), key
        assert logged["per_node/_type"] == "incremental-table-file"
    pictures = {key for key, value in second[-1].items() if value == "image-file"}
    assert pictures == {f"pictures/{name}/_type" for name in ("accuracy", "graph", "labels", "scores", "roc")}

    axes = {m.metric.name or m.metric.glob_name: m.metric.step_metric for f in files for m in records(f) if m.metric.ByteSize()}
    assert axes["*"] == "epoch"
    keys = {item.key: item.value_json for f in files for r in records(f) for item in r.config.update}
    assert json.loads(keys["train"])["epochs"] == 4
    summaries = {i.key or "/".join(i.nested_key) for r in records(files[-1]) for i in r.summary.update}
    assert any("homogeneity" in key for key in summaries)

    tables = [json.loads(f.read_text()) for f in run.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert all(t["columns"][:3] == ["epoch", "node", "accuracy"] for t in tables)
    rows = {(epoch, node): dict(zip(t["columns"][2:], rest, strict=True)) for t in tables for epoch, node, *rest in t["data"]}
    assert sorted(rows) == [(epoch, node) for epoch in (2, 4) for node in range(4)]
    for line in written:
        for name, values in line["per_node"].items():
            assert [rows[line["epoch"], node][name] for node in range(4)] == pytest.approx(values), name

    listed = subprocess.run([sys.executable, "-m", "wandb", "sync", "--dry-run", *(str(f.parent) for f in files)],
                            capture_output=True, text=True, env=alone)  # fmt: skip
    assert "Would sync" in listed.stdout + listed.stderr


def tensorboard_values(folder):
    """(accuracy, step) of every evaluation, as the viewer reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload().Scalars("accuracy/node_mean")
    return [(event.value, event.step) for event in events]


def csv_values(folder):
    with open(folder / "metrics.csv") as file:
        return [(float(row["accuracy/node_mean"]), int(row["step"])) for row in csv.DictReader(file)]


@pytest.mark.parametrize(("kind", "read"), [("csv", csv_values), ("tensorboard", tensorboard_values)])
def test_other_loggers_have_the_numbers_of_every_evaluation(kind, read, configs, tmp_path):
    arguments = ["--logger.kind", kind, "--run.dir", str(tmp_path), "--run.pictures", "false"]
    assert main(["fit", "--config", str(configs / "ring_digits.yaml"), *SHORT, *arguments]) == 0
    run = tmp_path / "ring_digits" / "latest"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for (accuracy, step), line in zip(read(run / kind), lines, strict=True):
        assert accuracy == pytest.approx(line["accuracy/node_mean"])
        assert step == line["step"]


def test_tensorboard_says_what_to_install(configs, tmp_path, capsys, monkeypatch):
    for name in ("tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    arguments = ["--logger.kind", "tensorboard", "--run.dir", str(tmp_path)]
    assert main(["fit", "--config", str(configs / "ring_digits.yaml"), *SHORT, *arguments]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err


@pytest.mark.slow
def test_an_unreachable_server_is_told_in_one_line_and_the_run_goes_on_offline(configs, tmp_path):
    """Nobody listens on that port of this machine."""
    alone = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"} | {
        "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "2", "HOME": str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, "-m", "lightning_idkd", "fit", "--config", str(configs / "ring_digits.yaml"), *SHORT]
    done = subprocess.run([*command, "--run.dir", str(tmp_path)], capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    (said,) = (line for line in done.stdout.splitlines() if "W&B" in line)
    assert "logged offline" in said
    assert list((tmp_path / "ring_digits" / "latest" / "wandb").glob("offline-run-*"))


def test_a_resumed_run_keeps_its_lines_in_csv(configs, tmp_path):
    arguments = ["fit", "--config", str(configs / "ring_digits.yaml"), *SHORT, "--logger.kind", "csv", "--run.dir", str(tmp_path)]
    assert main([*arguments, "--run.until", "2", "--run.resume", "auto"]) == 0
    assert main([*arguments, "--run.resume", "auto", "--run.pictures", "false"]) == 0
    run = tmp_path / "ring_digits" / "latest"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step for _, step in csv_values(run / "csv")] == [line["step"] for line in lines]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("lines", "url", "found"),
    [
        ("machine api.wandb.ai", None, True),
        ("machine {default}", None, True),
        ("machine elsewhere.org", None, False),
        ("default", None, False),
        ("machine my.host", "https://my.host:8080", True),
        ("machine api.wandb.ai", "https://my.host", False),
    ],
)
def test_a_login_is_found_where_wandb_has_written_it(lines, url, found, tmp_path, monkeypatch):
    import wandb

    host = urlsplit(wandb.Settings().base_url).hostname
    (tmp_path / "netrc").write_text(f"{lines.format(default=host)}\n  login user\n  password {'0' * 40}\n")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
    assert logged_in() is found
