"""Where metrics go besides metrics.jsonl: Weights & Biases, TensorBoard through Lightning's logger, and CSV."""

from __future__ import annotations

import csv
import io
import json
import netrc
import os
import secrets
import shutil
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from lightning_idkd.config import Config, LoggerConfig
from lightning_idkd.errors import UserError
from lightning_idkd.records.run_folder import RunFolder

STAGING = {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache"}
"""Where W&B stages artifacts and keeps its own logs, below ``wandb/`` in the run folder instead of the user's home."""


def make(config: Config, folder: RunFolder) -> list:
    """The logger that ``config.logger`` asks for; its files lie in the run folder."""
    asked = config.logger
    if asked is None or (asked.kind == "wandb" and os.environ.get("WANDB_MODE") == "disabled"):
        return []
    return [{"csv": Table, "tensorboard": TensorBoard, "wandb": WandB}[asked.kind](config, folder)]


def select_numbers(line: dict) -> dict[str, float]:
    """What loggers can plot of a line of metrics."""
    return {k: v for k, v in line.items() if isinstance(v, (int, float))}


def log(loggers: list, lines: list[dict], pictures: dict[str, Path]) -> None:
    """Log the last line of metrics at once; W&B also gets new pictures and the growing table of every node's values."""
    for logger in loggers:
        logger.write(lines, pictures)


def finish(loggers: list, summary: dict | None) -> None:
    """Close the loggers, with the run's summary where it came to its end."""
    for logger in loggers:
        logger.finish(summary)


class Table:
    """All lines of metrics as ``csv/metrics.csv``, written anew each time: a resumed run keeps its earlier ones."""

    def __init__(self, config: Config, folder: RunFolder):
        self.folder = folder
        folder.file("csv").mkdir(exist_ok=True)

    def write(self, lines: list[dict], pictures: dict[str, Path]) -> None:
        rows = [select_numbers(line) for line in lines]
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        self.folder.text("csv/metrics.csv", text.getvalue())

    def finish(self, summary: dict | None) -> None:
        """Nothing is left to write."""


class TensorBoard:
    """Events in ``tensorboard/``."""

    def __init__(self, config: Config, folder: RunFolder):
        from lightning.fabric.loggers import TensorBoardLogger

        try:
            self.logger = TensorBoardLogger(str(folder.path), name="tensorboard", version="")
        except ModuleNotFoundError as e:
            raise UserError("logger.kind: tensorboard needs a package that is not installed: pip install tensorboard") from e

    def write(self, lines: list[dict], pictures: dict[str, Path]) -> None:
        self.logger.log_metrics(select_numbers(lines[-1]), step=lines[-1]["step"])
        self.logger.save()

    def finish(self, summary: dict | None) -> None:
        self.logger.finalize("success" if summary else "aborted")


class WandB:
    """A W&B run, offline where there is no login or no answer, with all of its files in the run folder.

    A resumed run continues under its own id. W&B's step is the training step of a line, and a line that W&B does not have,
    because the run was killed before it was written or sent, is logged before the next one.
    """

    def __init__(self, config: Config, folder: RunFolder):
        import wandb

        self.folder, self.table = folder, None
        if folder.wandb_id() is None:
            folder.file("wandb").mkdir(exist_ok=True)
            folder.text("wandb/run_id.txt", read_wandb_id(config) or secrets.token_hex(4))
        self.id = folder.wandb_id()
        there = read_logged_steps(folder.file("wandb"), self.id)
        self.staging = {k: folder.file(f"wandb/{name}") for k, name in STAGING.items() if k not in os.environ}
        os.environ.update({k: str(path.resolve()) for k, path in self.staging.items()})
        offline = config.logger.offline if config.logger.offline is not None else not is_logged_in()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.run = self.start(config, offline)
            except wandb.errors.Error as e:
                if offline:
                    raise
                print(
                    f"W&B does not answer ({str(e).splitlines()[0]}): this run is logged offline, `wandb sync` sends it later",
                    flush=True,
                )
                wandb.teardown()  # it still holds the run's id
                self.run = self.start(config, True)
            self.run.define_metric("epoch")
            self.run.define_metric("*", step_metric="epoch")
            fixed = set(self.run.config.keys()) if "WANDB_SWEEP_ID" in os.environ else set()  # W&B does not let these be changed
            self.run.config.update({k: v for k, v in config.resolved.items() if k not in fixed}, allow_val_change=True)
        self.logged = there if self.run.offline else set(range(self.run.step))  # online the server says how far it is

    def start(self, config: Config, offline: bool):
        """Begin or continue the run; what the config leaves open is as W&B's environment variables say."""
        import wandb

        asked, settings = config.logger, {"silent": True, "init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT", "30"))}
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:  # newer than the oldest version allowed
            settings["x_transaction_log_flush_interval"] = 1.0
        project = os.environ.get("WANDB_PROJECT") if asked.project == LoggerConfig.project else None
        return wandb.init(
            project=project or asked.project,
            name=os.environ.get("WANDB_NAME") or f"{config.run.name}/{self.folder.path.name}",
            group=asked.group,
            dir=str(self.folder.path),
            id=self.id,
            resume="allow",
            mode="offline" if offline else None,
            settings=wandb.Settings(**settings),
        )

    def write(self, lines: list[dict], pictures: dict[str, Path]) -> None:
        import wandb

        for step, line in zip(number_steps(lines), lines, strict=True):
            if step not in self.logged:
                shown = pictures if line is lines[-1] else {}
                media = {f"pictures/{name}": wandb.Image(str(path)) for name, path in shown.items()}
                self.run.log({}, step=step, commit=False)  # files are named by the step that the run is at
                self.run.log(select_numbers(line) | media | {"per_node": self.rows(line)}, step=step, commit=True)
                self.logged.add(step)

    def rows(self, line: dict):
        """The run's table of values per epoch and node, accuracy and all measures of its selection; only new rows are sent."""
        import wandb

        from lightning_idkd.labels import MEASURES

        if self.table is None:
            self.table = wandb.Table(columns=["epoch", "node", "accuracy", *MEASURES], log_mode="INCREMENTAL")
        found = line["per_node"]
        for node in range(len(found["accuracy"])):
            self.table.add_data(line["epoch"], node, *(found[k][node] if k in found else None for k in self.table.columns[2:]))
        return self.table

    def finish(self, summary: dict | None) -> None:
        """End the run. Staged files stay where `wandb sync` will need them."""
        self.run.summary.update(summary or {})
        self.run.finish(exit_code=int(summary is None))
        for variable, path in self.staging.items():
            if not (self.run.offline and variable == "WANDB_DATA_DIR"):
                shutil.rmtree(path, ignore_errors=True)
            del os.environ[variable]


def read_wandb_id(config: Config) -> str | None:
    """The id of the W&B run that this run is to be, which agents of sweeps give; None where W&B is not asked for one."""
    return os.environ.get("WANDB_RUN_ID") or None if config.logger is not None and config.logger.kind == "wandb" else None


def number_steps(lines: list[dict]) -> list[int]:
    """W&B's step of every line: the training step, but one more than the line before where that is as far."""
    found: list[int] = []
    for line in lines:
        found.append(max(line["step"], found[-1] + 1 if found else 0))
    return found


def read_logged_steps(folder: Path, id: str) -> set[int]:
    """The steps that the W&B files of a run hold. A file that a kill cut within a record is ended before it: `wandb sync` takes
    no further file of a run behind a broken one."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    found: set[int] = set()
    for path in folder.glob(f"*run-*/run-{id}.wandb"):
        content, whole = path.read_bytes(), HEADER
        for whole, text in read_records(content):  # noqa: B007 (read behind the loop)
            try:
                record = Record.FromString(text)
            except DecodeError:
                break
            if record.WhichOneof("record_type") == "history":
                found |= {int(json.loads(i.value_json)) for i in record.history.item if "_step" in (i.key, *i.nested_key)}
        else:
            if HEADER <= whole < len(content):
                os.truncate(path, whole)
    return found


HEADER = 7  # bytes before the first record of a .wandb file


def read_records(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The records of a .wandb file and where each ends. The format is LevelDB's log: blocks of 32 KiB with pieces of records,
    each headed by checksum (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last)."""
    at, record = HEADER, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # too little for a piece: filled with zeros
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(content):
            yield at, record
            record = b""


def is_logged_in() -> bool:
    """Whether W&B would find a key, without asking for one."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    given = os.environ.get("WANDB_BASE_URL")
    urls = [given] if given else [wandb.Settings().base_url, "https://api.wandb.ai"]  # its host has changed with its versions
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(urlsplit(url).hostname in known for url in urls)
