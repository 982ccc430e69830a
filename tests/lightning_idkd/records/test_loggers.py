"""W&B's offline files read back, and the other loggers."""

from __future__ import annotations

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import pytest
from short_runs import extra
from wandb_server import WandbServer

from lightning_idkd import Callback
from lightning_idkd.cli import main
from lightning_idkd.config.parse import configure
from lightning_idkd.errors import UserError
from lightning_idkd.records import loggers
from lightning_idkd.records.loggers import is_logged_in
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.training.resume import find_start

SHORT = ["--graph.nodes", "4", "--train.epochs", "4", "--train.evaluate_every", "2",
         "--distillation.start", "2", "--distillation.every", "1", "--data.public.samples", "200",
         "--run.engine", "loop", "--run.threads", "1"]  # fmt: skip


def records(path):
    """The protobuf records of a .wandb file."""
    return [record for _, record in positions(path)]


def positions(path):
    """The protobuf records and their ends: blocks of 32 kB after a header of 7 bytes, chunks of (crc, length, type)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(content):  # whole, or the last piece
            yield at, Record.FromString(parts)
            parts = b""


def wait_until_still(path):
    """Until nothing more is appended to a file."""
    size = -1
    while size != path.stat().st_size:
        size = path.stat().st_size
        time.sleep(0.5)


def history(path):
    """Every logged line as a dict."""
    lines = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines


@dataclass
class Resumed:
    """A run that was killed, with W&B's process, and went on."""

    run: Path
    home: Path
    said: str
    ends: list[int]
    """Where the records of evaluations end that the first session has written; the last one is cut."""

    def __post_init__(self):
        self.files = sorted(self.run.glob("wandb/offline-run-*/run-*.wandb"))
        self.written = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """It has no login. W&B's file ends within a record, as when a machine goes down; after that, nothing can be written
    to the user's home. The run is in processes of its own, since wandb leaves threads and sockets behind."""
    folder = tmp_path_factory.mktemp("wandb")
    (folder / "home").mkdir()
    (folder / "file").touch()  # as a home it cannot be written to, by root neither
    config = Path(__file__).resolve().parents[3] / "configs" / "ring_digits.yaml"
    command = [sys.executable, "-m", "lightning_idkd", "fit", "--config", str(config), *SHORT,
               "--train.evaluate_every", "1", "--run.dir", str(folder), "--run.resume", "auto"]  # fmt: skip
    alone = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    alone |= {"MPLCONFIGDIR": str(folder / "matplotlib")}
    run = folder / "ring_digits" / "latest"
    with (folder / "said").open("w") as said:
        first = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True,
                                 env=alone | {"HOME": str(folder / "home")})  # fmt: skip
        while len(RunFolder(run).metrics()) < 3:
            assert first.poll() is None
            time.sleep(0.01)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
        wait_until_still(file)  # in a session of its own, W&B's process has written what it had
        ends = [at for at, record in positions(file) if record.WhichOneof("record_type") == "history"]
        os.truncate(file, ends[-1] - 20 if ends else file.stat().st_size)
        second = subprocess.run(command, stdout=said, stderr=said, env=alone | {"HOME": str(folder / "file")})
    output = (folder / "said").read_text()
    assert second.returncode == 0, output[-2000:]
    return Resumed(run, folder / "home", output, ends)


@pytest.mark.slow
def test_wandb_offline_asks_nothing_and_leaves_the_home_alone(resumed):
    for word in ("deprecated", "anonymous", "wandb:", "ERROR"):
        assert word not in resumed.said
    assert list(resumed.home.iterdir()) == []


@pytest.mark.slow
def test_wandb_offline_has_every_evaluation_once_after_a_kill(resumed):
    first, second = map(history, resumed.files)
    written = resumed.written
    assert [line["epoch"] for line in written] == [1, 2, 3, 4]
    assert [line["_step"] for line in first + second] == [line["step"] for line in written]
    assert len(first) == max(0, len(resumed.ends) - 1)
    tables = [json.loads(f.read_text()) for f in resumed.files[1].parent.glob("files/media/table/*.json")]
    assert {epoch for t in tables for epoch, *_ in t["data"]} == {line["epoch"] for line in second}
    with WandbServer() as server:
        sync = [sys.executable, "-m", "wandb", "sync", "--yes", *(str(file.parent) for file in resumed.files)]
        env = os.environ | server.environment()
        done = subprocess.run(sync, capture_output=True, text=True, env=env, cwd=resumed.home.parent)
        assert done.returncode == 0, done.stderr
        (synced,) = server.runs.values()
    assert [synced.history[i]["_step"] for i in range(len(synced.history))] == [line["step"] for line in written]


@pytest.mark.slow
def test_wandb_offline_a_resumed_run_continues_its_curve(resumed):
    run, files, written = resumed.run, resumed.files, resumed.written
    assert len(list(run.parent.glob("2*"))) == 1
    assert len(files) == 2
    # one curve when synced
    assert files[0].name == files[1].name == f"run-{(run / 'wandb' / 'run_id.txt').read_text()}.wandb"
    first, second = map(history, files)
    for line, logged in zip(written, first + second, strict=True):
        for key, value in line.items():
            if isinstance(value, (int, float)):
                assert logged[key] == pytest.approx(value), key
        assert logged["per_node/_type"] == "incremental-table-file"
    assert {f.name.split("_")[2] for f in run.glob("wandb/offline-run-*/files/media/table/*.json")} == {
        str(line["step"]) for line in written
    }
    pictures = {key for key, value in second[-1].items() if value == "image-file"}
    assert pictures == {f"pictures/{name}/_type" for name in ("accuracy", "graph", "labels", "scores", "roc")}
    assert second[-1]["report/_type"] == "html-file"
    (report,) = run.glob("wandb/offline-run-*/files/media/html/*.html")
    assert f"<dd>{written[-1]['accuracy/node_mean']:.1%}</dd>" in report.read_text()

    axes = {
        m.metric.name or m.metric.glob_name: m.metric.step_metric
        for f in files
        for m in records(f)
        if m.metric.ByteSize()
    }
    assert axes["*"] == "epoch"
    keys = {item.key: item.value_json for f in files for r in records(f) for item in r.config.update}
    assert json.loads(keys["train"])["epochs"] == 4
    summaries = {i.key or "/".join(i.nested_key) for r in records(files[-1]) for i in r.summary.update}
    assert any("homogeneity" in key for key in summaries)

    tables = [json.loads(f.read_text()) for f in run.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert all(t["columns"][:3] == ["epoch", "node", "accuracy"] for t in tables)
    rows = {
        (epoch, node): dict(zip(t["columns"][2:], rest, strict=True))
        for t in tables
        for epoch, node, *rest in t["data"]
    }
    assert sorted(rows) == [(epoch, node) for epoch in (1, 2, 3, 4) for node in range(4)]
    for line in written:
        for name, values in line["per_node"].items():
            assert [rows[line["epoch"], node][name] for node in range(4)] == pytest.approx(values, nan_ok=True), name


@pytest.mark.parametrize(
    ("given", "arguments", "expected"),
    [
        ({}, [], {"project": "lightning-idkd", "mode": "offline"}),
        ({"WANDB_PROJECT": "theirs", "WANDB_NAME": "mine"}, [], {"project": "theirs", "name": "mine"}),
        ({"WANDB_PROJECT": "theirs"}, ["--logger.project", "here"], {"project": "here"}),
        ({"WANDB_API_KEY": "0" * 40}, [], {"mode": None}),
        ({"WANDB_API_KEY": "0" * 40}, ["--logger.offline", "true"], {"mode": "offline"}),
        ({"WANDB_DIR": "/nowhere", "WANDB_RUN_ID": "abc"}, [], {"dir": "RUN", "id": "abc", "resume": "allow"}),
        ({"WANDB_MODE": "disabled"}, [], None),
    ],
)
def test_wandb_follows_its_environment_where_the_config_says_nothing(given, arguments, expected, tmp_path, monkeypatch):
    import wandb

    for variable in [v for v in os.environ if v.startswith("WANDB")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    asked = {}
    monkeypatch.setattr(wandb, "init", lambda **arguments: asked.update(arguments) or MagicMock(offline=True))
    config = configure(["--data.private", "Digits", "--run.dir", str(tmp_path), *arguments])
    folder = RunFolder.create(config.folder(), 0)
    loggers.finish(loggers.make(config, folder), None)
    assert bool(asked) == (expected is not None)
    for key, value in (expected or {}).items():
        assert asked[key] == (str(folder.path) if value == "RUN" else value)
    assert not {"WANDB_DATA_DIR", "WANDB_CACHE_DIR"} & set(os.environ)


class Signalled(Callback):
    """Sends its own run a signal after the second step."""

    def __init__(self, number: int):
        self.number = number

    def on_step_end(self, run, step):
        if step == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "marked"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 1), (signal.SIGINT, 0)])
def test_wandb_is_told_when_a_queue_takes_the_machine(fit, monkeypatch, number, marked):
    import wandb

    run = MagicMock(offline=True)
    monkeypatch.setattr(wandb, "init", lambda **arguments: run)
    stop = extra(Signalled, number=int(number))
    assert fit("--logger", "{kind: wandb, offline: true}", *stop, "--distillation", "null") == 130
    assert run.mark_preempting.call_count == marked
    assert run.finish.call_args.kwargs == {"exit_code": 1}


def test_a_run_goes_on_by_the_id_that_an_agent_gives(tmp_path, monkeypatch):
    """Cells that differ in nothing that enters a result have one config, and two agents may work on them."""
    arguments = ["--data.private", "Digits", "--run.dir", str(tmp_path)]
    config = configure(arguments)
    made = {}
    for i, id in enumerate(("first", "second", None)):
        folder = RunFolder.create(config.folder(), i)
        folder.yaml("config.yaml", config.resolved)
        folder.save({}, "last.ckpt", [])
        if id:
            folder.file("wandb").mkdir()
            folder.text("wandb/run_id.txt", id)
        made[id] = folder.path
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    assert find_start(config).checkpoint is None
    assert find_start(configure([*arguments, "--run.resume", "auto"])).folder.path == made[None]
    for resume in ([], ["--run.resume", "auto"]):
        for id in ("first", "second"):
            monkeypatch.setenv("WANDB_RUN_ID", id)
            assert find_start(configure([*arguments, *resume])).folder.path == made[id]
        monkeypatch.setenv("WANDB_RUN_ID", "third")
        assert find_start(configure([*arguments, *resume])).checkpoint is None
    monkeypatch.setenv("WANDB_RUN_ID", "first")
    assert find_start(configure([*arguments, "--logger", "null"])).checkpoint is None


@pytest.mark.parametrize("id", ["", "../../x", "a*", "a\nb", "x" * 129])
def test_an_id_that_names_other_files_is_refused(id, tmp_path, monkeypatch):
    monkeypatch.setattr("wandb.init", None)
    config = configure(["--data.private", "Digits", "--run.dir", str(tmp_path), "--logger.offline", "true"])
    folder = RunFolder.create(config.folder(), 0)
    folder.file("wandb").mkdir()
    folder.text("wandb/run_id.txt", id)
    with pytest.raises(UserError) as refused:
        loggers.make(config, folder)
    assert str(refused.value).startswith(f"'{folder.path}/wandb/run_id.txt': {id!r} given; allowed: ")


def test_wandb_steps_are_those_of_training_and_rise_with_every_line():
    assert loggers.number_steps([{"step": s} for s in (0, 18, 18, 19, 40)]) == [0, 18, 19, 20, 40]


@pytest.mark.parametrize("length", [0, 1, 32754, 32755, 32756, 32761, 65515, 100_000])
def test_records_are_cut_into_blocks_as_leveldb_cuts_them(length, tmp_path):
    """A block of 32768 bytes has pieces with heads of 7 bytes, the first one 7 bytes of the file's own before."""
    whole = [b"first", b"x" * length, b"last"]
    content = bytearray(7)
    for record in whole:
        rest, kinds = record, []
        while True:
            if (left := 32768 - len(content) % 32768) < 7:
                content += bytes(left)
                left = 32768
            piece, rest = rest[: left - 7], rest[left - 7 :]
            kinds.append(1 if not rest and not kinds else 2 if not kinds else 3 if rest else 4)
            content += struct.pack("<IHB", 0, len(piece), kinds[-1]) + piece
            if not rest:
                break
    assert [record for _, record in loggers.read_records(bytes(content))] == whole
    cut = list(loggers.read_records(bytes(content[:-1])))
    assert [record for _, record in cut] == whole[:2]
    assert list(loggers.read_records(bytes(content[: cut[-1][0]]))) == cut


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
def test_an_unreachable_server_is_reported_in_one_line_and_the_run_continues_offline(configs, tmp_path):
    """Nobody listens on that port of this machine."""
    alone = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"} | {
        "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40,
        "WANDB_INIT_TIMEOUT": "2", "HOME": str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, "-m", "lightning_idkd", "fit", "--config", str(configs / "ring_digits.yaml"),
               "--graph.nodes", "2", "--train.epochs", "1", "--distillation", "null", "--run.engine", "loop",
               "--run.threads", "1", "--run.pictures", "false", "--run.dir", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    (said,) = (line for line in done.stdout.splitlines() if "W&B" in line)
    assert "logged offline" in said
    assert list((tmp_path / "ring_digits" / "latest" / "wandb").glob("offline-run-*"))


def test_a_resumed_run_keeps_its_lines_in_csv(configs, tmp_path):
    arguments = ["fit", "--config", str(configs / "ring_digits.yaml"), *SHORT,
                 "--logger.kind", "csv", "--run.dir", str(tmp_path)]  # fmt: skip
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
    assert is_logged_in() is found
