"""Where metrics go besides metrics.jsonl: Weights & Biases and TensorBoard, through Lightning's loggers, and CSV."""

from __future__ import annotations

import csv
import io
import netrc
import os
import secrets
import warnings
from pathlib import Path
from urllib.parse import urlsplit

from lightning_idkd.config import Config
from lightning_idkd.errors import UserError
from lightning_idkd.run_folder import RunFolder


def make(config: Config, folder: RunFolder) -> list:
    """The logger that ``config.logger`` asks for; its files lie in the run folder."""
    asked = config.logger
    if asked is None:
        return []
    if asked.kind == "csv":
        return [Table(folder)]
    if asked.kind == "tensorboard":
        from lightning.fabric.loggers import TensorBoardLogger

        try:
            return [TensorBoardLogger(str(folder.path), name="tensorboard", version="")]
        except ModuleNotFoundError as e:
            raise UserError("logger.kind: tensorboard needs a package that is not installed: pip install tensorboard") from e
    return [wandb_logger(config, folder)]


def wandb_logger(config: Config, folder: RunFolder):
    """W&B, offline where there is no login or no answer; a resumed run continues under its own id."""
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    asked = config.logger
    ids = folder.file("wandb/run_id.txt")
    ids.parent.mkdir(exist_ok=True)
    if not ids.exists():
        folder.text("wandb/run_id.txt", os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    offline = asked.offline if asked.offline is not None else not logged_in()

    def start(offline: bool) -> WandbLogger:
        logger = WandbLogger(
            name=f"{config.run.name}/{folder.path.name}",
            project=asked.project,
            save_dir=str(folder.path),
            offline=offline,
            group=asked.group,
            id=ids.read_text(),
            resume="allow",
            settings=wandb.Settings(silent=True, init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", "30"))),
        )
        logger.experiment.define_metric("epoch")
        logger.experiment.define_metric("*", step_metric="epoch")
        return logger

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            logger = start(offline)
        except wandb.errors.Error as e:
            if offline:
                raise
            print(
                f"W&B does not answer ({str(e).splitlines()[0]}): this run is logged offline, `wandb sync` sends it later",
                flush=True,
            )
            wandb.teardown()  # it still holds the run's id
            logger = start(True)
        logger.log_hyperparams(config.resolved)
    return logger


def logged_in() -> bool:
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


class Table:
    """All lines of metrics as ``csv/metrics.csv``, written anew each time: a resumed run keeps its earlier ones."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        folder.file("csv").mkdir(exist_ok=True)

    def write(self, lines: list[dict]) -> None:
        rows = [numbers(line) for line in lines]
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        self.folder.text("csv/metrics.csv", text.getvalue())

    def finalize(self, status: str) -> None:
        """Nothing is left to write."""


def numbers(line: dict) -> dict[str, float]:
    """What loggers can plot of a line of metrics."""
    return {k: v for k, v in line.items() if isinstance(v, (int, float))}


def log(loggers: list, lines: list[dict], pictures: dict[str, Path]) -> None:
    """The last line of metrics, at once; W&B also gets new pictures and the growing table of every node's values."""
    line = lines[-1]
    for logger in loggers:
        if isinstance(logger, Table):
            logger.write(lines)
        elif hasattr(logger, "log_table"):  # WandbLogger
            import wandb

            table, found = node_table(logger), line["per_node"]
            for node in range(len(found["accuracy"])):
                table.add_data(line["epoch"], node, *(found[k][node] if k in found else None for k in table.columns[2:]))
            media = {f"pictures/{name}": wandb.Image(str(path)) for name, path in pictures.items()}
            logger.log_metrics(numbers(line) | media | {"per_node": table}, step=line["step"])
        else:
            logger.log_metrics(numbers(line), step=line["step"])
            logger.save()


def node_table(logger):
    """The run's table of values per epoch and node, accuracy and all measures of its selection; only its new rows are sent."""
    import wandb

    from lightning_idkd.selection import MEASURES

    if not hasattr(logger, "node_table"):
        logger.node_table = wandb.Table(columns=["epoch", "node", "accuracy", *MEASURES], log_mode="INCREMENTAL")
    return logger.node_table


def finish(loggers: list, summary: dict | None) -> None:
    """Close them, with the run's summary where it came to its end."""
    for logger in loggers:
        if hasattr(logger, "log_table"):
            logger.experiment.summary.update(summary or {})
            logger.experiment.finish(exit_code=int(summary is None))
        else:
            logger.finalize("success" if summary else "aborted")
