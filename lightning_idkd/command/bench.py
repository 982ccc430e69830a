"""``idkd bench``."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_idkd.command.options import configure
from lightning_idkd.errors import UserError
from lightning_idkd.files import write
from lightning_idkd.machine import describe_machine


def main(arguments: list[str]) -> int:
    """Time the step of an experiment, or of several where none is given."""
    config = configure(["--data.private", "Digits", *arguments], "bench")
    from lightning_idkd.analysis import benchmark
    from lightning_idkd.command.topology import image_shape

    given = {k: config.resolved[k] for k in ("rounds", "samples", "quick", "out")}
    if any(word.split("=")[0] == "--config" for word in arguments):
        found = benchmark.bench(config, *image_shape(config), given["rounds"], given["samples"])
        found = {
            "machine": describe_machine(),
            "cases": {f"{type(config.node.network).__name__}, n = {config.graph.nodes}": found},
        }
    elif stray := [word for word in arguments if word.startswith("--") and word[2:].split("=")[0] not in ("quick", "out")]:
        raise UserError(f"{stray[0]}: bench takes it beside a --config; without one there are --quick and --out")
    else:
        found = benchmark.suite(given["quick"])
    if given["out"]:
        Path(given["out"]).parent.mkdir(parents=True, exist_ok=True)
        write(Path(given["out"]), lambda part: part.write_text(json.dumps(found, indent=1) + "\n"))
    print(benchmark.tables(found), end="")
    return 0
