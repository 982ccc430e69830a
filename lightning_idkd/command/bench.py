"""``idkd bench``: times a step of an experiment in every form."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_idkd.command.options import configure
from lightning_idkd.errors import UserError
from lightning_idkd.files import write
from lightning_idkd.machine import describe_machine


def main(arguments: list[str]) -> int:
    """Time the step of the experiment in ``--config``, or of several experiments without one."""
    config = configure(["--data.private", "Digits", *arguments], "bench")
    from lightning_idkd.analysis import benchmark
    from lightning_idkd.command.topology import expect_inputs

    options = {k: config.resolved[k] for k in ("rounds", "samples", "quick", "out")}
    if any(word.split("=")[0] == "--config" for word in arguments):
        case = benchmark.bench(config, expect_inputs(config), options["rounds"], options["samples"])
        name = f"{type(config.node.network).__name__}, n = {config.graph.nodes}"
        results = {"machine": describe_machine(), "cases": {name: case}}
    else:
        for word in arguments:
            if word.startswith("--") and word[2:].split("=")[0] not in ("quick", "out"):
                raise UserError(f"{word}: bench takes it beside a --config; without one there are --quick and --out")
        results = benchmark.run_suite(options["quick"])
    if options["out"]:
        out = Path(options["out"])
        out.parent.mkdir(parents=True, exist_ok=True)
        write(out, lambda part: part.write_text(json.dumps(results, indent=1) + "\n"), "--out")
    print(benchmark.format_tables(results), end="")
    return 0
