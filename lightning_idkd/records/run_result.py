"""A finished run as its report reads it, and what was run in a few sentences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_idkd.config import class_paths
from lightning_idkd.records import report
from lightning_idkd.records.run_folder import RunFolder


@dataclass
class Result:
    """A finished run, as a report reads it from its folder."""

    folder: RunFolder
    config: dict
    summary: dict
    lines: list[dict]
    """The lines of ``metrics.jsonl``."""
    partition: dict
    """``partition.json``; empty if it is missing."""
    data: dict
    """``plots/report.json``; empty for runs without pictures and for older ones."""

    @classmethod
    def read(cls, folder: RunFolder, summary: dict) -> Result:
        """Read the files of a run.

        Raises:
            UserError: config or metrics are missing or damaged.
        """
        partition, data = (read_json(folder.file(name)) for name in ("partition.json", "plots/report.json"))
        return cls(folder, folder.config(), summary, folder.metrics(), partition, data)

    @property
    def name(self) -> str:
        return str(self.summary.get("name") or self.folder.path.parent.name)

    @property
    def liars(self) -> list[int]:
        return self.data.get("liars", [])


@dataclass
class Confusion:
    """How often the consensus model takes test samples of one class for another."""

    counts: np.ndarray
    """[true class, predicted class]."""
    classes: list[str]


def read_json(path: Path) -> dict:
    """Read a JSON file that a report can do without; empty if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def name_class(spec: Any) -> str:
    """The name of a class in a config, of a user's class its import path; none for null."""
    return class_paths.name_class(str(spec["class_path"])) if isinstance(spec, dict) else "none"


def describe_class(spec: Any) -> str:
    """A class in a config, with its numbers and texts."""
    arguments = (spec.get("init_args") or {}) if isinstance(spec, dict) else {}
    shown = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in arguments.items()
        if isinstance(value, (int, float, str)) and not isinstance(value, bool)
    ]
    return f"{name_class(spec)} ({', '.join(shown)})" if shown and len(shown) <= 3 else name_class(spec)


def describe_source(spec: Any) -> str:
    """A source of samples in words."""
    arguments = (spec.get("init_args") or {}) if isinstance(spec, dict) else {}
    parts = arguments.get("parts")
    if isinstance(parts, list):
        return " and ".join(dict.fromkeys(map(name_class, parts)))
    path = arguments.get("path")
    return f"{name_class(spec)} ({Path(path).name})" if isinstance(path, str) else name_class(spec)


def describe_run(config: dict, summary: dict, partition: dict) -> str:
    """Say in a few sentences what was run."""
    graph, data, distillation = config["graph"], config["data"], config["distillation"]
    sizes = (partition.get("sizes") or {}).get("train")
    samples = f"the {sum(sizes):,} training samples" if sizes else "the training samples"
    classes = (partition.get("data") or {}).get("classes")
    of_classes = f" ({len(classes)} classes)" if classes else ""
    network, parameters = name_class(config["node"]["network"]), summary.get("parameters")
    size = f" of {parameters:,} parameters" if parameters else ""
    loss = name_class(config["node"].get("loss"))
    by_loss = "" if loss in ("CrossEntropy", "none") else f" with the loss {loss}"
    text = (
        f"{summary['nodes']} nodes on a graph {name_class(graph['topology'])} train one {network}{size} each for "
        f"{summary['epochs']} epochs ({summary['steps']:,} steps) by {name_class(config['gossip'])}{by_loss}. "
        f"They share {samples} of {describe_source(data['private'])}{of_classes}, divided by "
        f"{describe_class(data['partition'])}."
    )
    if distillation is not None:
        exchanges = summary.get("exchanges") or []
        times = "once" if len(exchanges) == 1 else f"{len(exchanges)} times"
        begin = f", first after epoch {exchanges[0]['epoch']}" if exchanges else ""
        public = (partition.get("data") or {}).get("public")
        number = f"{public['images']:,} public samples" if public else "public samples"
        source = "" if data["public"] is None else f" ({describe_source(data['public'])})"
        text += f" By {name_class(distillation)} they exchange labels of {number}{source} {times}{begin}."
    else:
        text += " They exchange no labels."
    names = [name_class(spec) for spec in config.get("faults") or []]
    return text + (f" Faults: {', '.join(names)}." if names else "")


def describe_origin(summary: dict) -> str:
    """Where a fork begins, as the last part of a line."""
    source = summary.get("from")
    return f", forked from {'/'.join(Path(source).parts[-4:])}" if source else ""


def name_nodes(nodes: Sequence[int]) -> str:
    """Name the first eight nodes, and how many more there are."""
    names = ", ".join(map(str, nodes[:8]))
    more = f" and {len(nodes) - 8} more" if len(nodes) > 8 else ""
    return f"node{'s' * (len(nodes) > 1)} {names}{more}"


def read_points(lines: Sequence[dict], axis: str, key: str, by: float = 1) -> list[tuple[float, float]]:
    """A metric over an axis, as pairs; lines without either are left out."""
    points = []
    for line in lines:
        place, value = report.read_axis(line, axis), line.get(key)
        if isinstance(value, (int, float)) and place is not None:
            points.append((place, by * value))
    return points


def drop_shared(lines: list[dict], others: list[dict]) -> list[dict]:
    """The lines from the last one on that two runs share, such as a control and the run that it forks from."""
    shared = 0
    for a, b in zip(lines, others, strict=False):
        if a["epoch"] != b["epoch"] or a["accuracy/node_mean"] != b["accuracy/node_mean"]:
            break
        shared += 1
    return lines[max(0, shared - 1) :]
