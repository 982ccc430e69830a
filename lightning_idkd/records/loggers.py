"""Loggers, which get the metrics besides ``metrics.jsonl``: Weights & Biases, TensorBoard (through Lightning's logger)
and CSV."""

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
from lightning_idkd.errors import UserError, require
from lightning_idkd.files import to_json
from lightning_idkd.records.run_folder import RunFolder

STAGING = {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache"}
"""Environment variables for W&B's staged artifacts and own logs, and the folders below ``wandb/`` in the run folder
that they name. Otherwise W&B writes to the user's home."""
HEADER = 7
"""Bytes before the first record of a .wandb file, and bytes before each piece of a record."""
ID_WITHOUT = "/\\#?%:*[]"
"""Characters that W&B refuses in the id of a run, and those that stand for other characters in patterns of files."""
BLOCK = 32768
"""Bytes of a block of a .wandb file."""
WHOLE, LAST = 1, 4
"""Kinds of pieces that end a record. The first piece of several is of kind 2, those between are of kind 3."""


def make(config: Config, folder: RunFolder) -> list:
    """Make the logger that ``config.logger`` names, or none; its files lie in the run folder."""
    logger = config.logger
    if logger is None or (logger.kind == "wandb" and os.environ.get("WANDB_MODE") == "disabled"):
        return []
    return [{"csv": Table, "tensorboard": TensorBoard, "wandb": WandB}[logger.kind](config, folder)]


def select_numbers(line: dict) -> dict[str, float]:
    """Select the values of a line of metrics that are numbers, which is what loggers can plot."""
    return {k: v for k, v in line.items() if isinstance(v, (int, float))}


def log(loggers: list, lines: list[dict], pictures: dict[str, Path]) -> None:
    """Give the lines of metrics so far, and new pictures, to all loggers, which write the last line at once.

    Args:
        lines: all lines of ``metrics.jsonl``.
        pictures: image files by name, which W&B gets with the last line.
    """
    for logger in loggers:
        logger.write(lines, pictures)


def finish(loggers: list, summary: dict | None) -> None:
    """Close the loggers, with the run's summary; None if the run has not finished."""
    for logger in loggers:
        logger.finish(summary)


def give_way(loggers: list) -> None:
    """Tell the loggers that the machine is taken away and the run goes on later, on another one."""
    for logger in loggers:
        logger.give_way()


class Table:
    """Writes all lines of metrics to ``csv/metrics.csv``. The file is written anew each time, so a resumed run keeps
    its earlier lines."""

    def __init__(self, config: Config, folder: RunFolder):
        self.folder = folder
        folder.make_folder("csv")

    def write(self, lines: list[dict], pictures: dict[str, Path]) -> None:
        rows = [select_numbers(line) for line in lines]
        text = io.StringIO()
        columns: dict[str, None] = {}  # in the order of their first line
        for row in rows:
            columns |= dict.fromkeys(row)
        table = csv.DictWriter(text, list(columns), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        self.folder.text("csv/metrics.csv", text.getvalue())

    def give_way(self) -> None:
        """Do nothing: a file can wait."""

    def finish(self, summary: dict | None) -> None:
        """Do nothing: every line is written already."""


class TensorBoard:
    """Writes events to ``tensorboard/``."""

    def __init__(self, config: Config, folder: RunFolder):
        from lightning.fabric.loggers import TensorBoardLogger

        try:
            self.logger = TensorBoardLogger(str(folder.path), name="tensorboard", version="")
        except ModuleNotFoundError as e:
            missing = "tensorboard needs a package that is not installed: pip install tensorboard"
            raise UserError(f"logger.kind: {missing}") from e

    def write(self, lines: list[dict], pictures: dict[str, Path]) -> None:
        self.logger.log_metrics(select_numbers(lines[-1]), step=lines[-1]["step"])
        self.logger.save()

    def give_way(self) -> None:
        """Do nothing: a file can wait."""

    def finish(self, summary: dict | None) -> None:
        self.logger.finalize("success" if summary else "aborted")


class WandB:
    """Logs to a W&B run, with all of W&B's files in the run folder. Without a login, or if the server does not answer,
    the run is logged offline.

    A resumed run continues under the same id. W&B's step is the training step of a line. Lines that W&B lacks, because
    the run was killed before they were written or sent, are logged before the next one.
    """

    def __init__(self, config: Config, folder: RunFolder):
        import wandb

        self.folder, self.table, self.open_step = folder, None, None
        if folder.wandb_id() is None:
            folder.make_folder("wandb")
            folder.text("wandb/run_id.txt", read_wandb_id(config) or secrets.token_hex(4))
        self.id = folder.wandb_id()
        right = 0 < len(self.id) <= 128 and self.id.isprintable() and not set(self.id) & set(ID_WITHOUT)
        allowed = f"up to 128 printable characters without {ID_WITHOUT}"
        require(right, f"'{folder.file('wandb/run_id.txt')}'", repr(self.id), allowed)
        in_files = read_logged_steps(folder.file("wandb"), self.id)
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
                why = str(e).splitlines()[0]
                then = "this run is logged offline, and `wandb sync` sends it later"
                print(f"W&B does not answer ({why}); {then}", flush=True)
                wandb.teardown()  # releases the run's id
                self.run = self.start(config, True)
            self.run.define_metric("epoch")
            self.run.define_metric("*", step_metric="epoch")
            # the keys that a sweep sets cannot be changed
            fixed = set(self.run.config.keys()) if "WANDB_SWEEP_ID" in os.environ else set()
            self.run.config.update({k: v for k, v in config.resolved.items() if k not in fixed}, allow_val_change=True)
        # online, the server knows the last step
        self.logged = in_files if self.run.offline else set(range(self.run.step))

    def start(self, config: Config, offline: bool):
        """Start or continue the W&B run. W&B's environment variables decide what the config leaves open."""
        import wandb

        logger, timeout = config.logger, float(os.environ.get("WANDB_INIT_TIMEOUT", "30"))
        settings = {"silent": True, "init_timeout": timeout}
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:  # the oldest version allowed lacks it
            settings["x_transaction_log_flush_interval"] = 1.0
        project = os.environ.get("WANDB_PROJECT") if logger.project == LoggerConfig.project else None
        return wandb.init(
            project=project or logger.project,
            name=os.environ.get("WANDB_NAME") or f"{config.run.name}/{self.folder.path.name}",
            group=logger.group,
            dir=str(self.folder.path),
            id=self.id,
            resume="allow",
            mode="offline" if offline else None,
            settings=wandb.Settings(**settings),
        )

    def write(self, lines: list[dict], pictures: dict[str, Path]) -> None:
        import wandb

        for step, line in zip(number_steps(lines), lines, strict=True):
            if step in self.logged:
                continue
            values = select_numbers(line)
            for name, path in pictures.items() if line is lines[-1] else ():
                values[f"pictures/{name}"] = wandb.Image(str(path))
            values["per_node"] = self.add_rows(line)
            self.run.log({}, step=step, commit=False)  # W&B names files by the step that the run is at
            last = line["phase"] == "final"
            self.run.log(values, step=step, commit=not last)  # `finish` adds the report
            self.open_step = step if last else None
            self.logged.add(step)

    def add_rows(self, line: dict):
        """Add a row for every node to the run's table, and return the table. A row has epoch, node, accuracy and all
        measures of the node's selection. W&B sends only the new rows."""
        import wandb

        from lightning_idkd.labels import MEASURES

        if self.table is None:
            self.table = wandb.Table(columns=["epoch", "node", "accuracy", *MEASURES], log_mode="INCREMENTAL")
        per_node = line["per_node"]
        for node in range(len(per_node["accuracy"])):
            values = [per_node[key][node] if key in per_node else None for key in self.table.columns[2:]]
            self.table.add_data(line["epoch"], node, *values)
        return self.table

    def add_report(self, summary: dict) -> None:
        """Log the HTML report of the run with its last line, without the confusion matrix and the control, which is
        trained later."""
        import wandb

        from lightning_idkd.records.run_page import build_run_page
        from lightning_idkd.records.run_result import Result

        try:
            page = build_run_page(Result.read(self.folder, to_json(summary, "summary")))
        except Exception as e:  # a report that fails must not cost W&B the run's end
            print(f"W&B gets no report of this run ({type(e).__name__}: {e})", flush=True)
            return
        self.run.log({"report": wandb.Html(io.StringIO(page), inject=False)}, step=self.open_step, commit=True)

    def give_way(self) -> None:
        """Mark the run as preempting, so that a sweep's server gives it to another agent once it ends."""
        self.run.mark_preempting()

    def finish(self, summary: dict | None) -> None:
        """Log the report, end the run, and remove staged files unless `wandb sync` will need them."""
        if summary is not None:
            self.add_report(summary)
        self.run.summary.update(summary or {})
        self.run.finish(exit_code=int(summary is None))
        for variable, path in self.staging.items():
            if not (self.run.offline and variable == "WANDB_DATA_DIR"):
                shutil.rmtree(path, ignore_errors=True)
            del os.environ[variable]


def read_wandb_id(config: Config) -> str | None:
    """Read the id that this run must have in W&B, which the agents of sweeps set; None if there is none, or no W&B
    logger."""
    if config.logger is None or config.logger.kind != "wandb":
        return None
    return os.environ.get("WANDB_RUN_ID") or None


def number_steps(lines: list[dict]) -> list[int]:
    """W&B's step for every line. It is the training step, or one more than the previous line's if that is larger, since
    W&B's steps must rise."""
    numbers: list[int] = []
    for line in lines:
        numbers.append(max(line["step"], numbers[-1] + 1 if numbers else 0))
    return numbers


def read_logged_steps(folder: Path, id: str) -> set[int]:
    """Read which steps the offline files of a W&B run hold.

    A file whose last record was cut short by a kill is truncated before that record, because `wandb sync` stops at a
    broken file and skips those after it.

    Args:
        folder: the ``wandb/`` folder of the run.
        id: the run's id in W&B.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    steps: set[int] = set()
    for path in folder.glob(f"*run-*/run-{id}.wandb"):
        content, end = path.read_bytes(), HEADER
        for end, text in read_records(content):  # noqa: B007 (used after the loop)
            try:
                record = Record.FromString(text)
            except DecodeError:
                break
            if record.WhichOneof("record_type") != "history":
                continue
            for item in record.history.item:
                if "_step" in (item.key, *item.nested_key):
                    steps.add(int(json.loads(item.value_json)))
        else:
            if HEADER <= end < len(content):
                os.truncate(path, end)
    return steps


def read_records(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The records of a .wandb file, each with the position where it ends; an incomplete last record is left out.

    The format is LevelDB's log: blocks of 32 KiB hold pieces of records. Each piece follows a header of 7 bytes:
    checksum (4), length (2) and kind (1).
    """
    position, record = HEADER, b""
    while position + HEADER <= len(content):
        if (left := BLOCK - position % BLOCK) < HEADER:  # too short for a header, so it is filled with zeros
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + HEADER])
        position += HEADER
        record += content[position : position + length]
        position += length
        if kind in (WHOLE, LAST) and position <= len(content):
            yield position, record
            record = b""


def is_logged_in() -> bool:
    """Whether W&B has an API key for its server, in the environment or in netrc; the user is not asked for one."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    # the default server depends on W&B's version
    urls = [server] if server else [wandb.Settings().base_url, "https://api.wandb.ai"]
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(urlsplit(url).hostname in hosts for url in urls)
