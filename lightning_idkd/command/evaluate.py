"""``idkd evaluate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightning_idkd.command import options
from lightning_idkd.errors import UserError, did_you_mean

OWN = ("-h", "--help", "--export", "--per-class", "--json")
"""Options of this command itself; it takes keys of a config too."""


def main(arguments: list[str]) -> int:
    """Look at the nodes of a run on any test set."""
    from lightning_idkd.config.arguments import TOP_KEYS

    p = options.parser("evaluate")
    p.description += " Keys data.* and calibration.* are as for idkd fit: other sets than the run's, another score."
    p.add_argument("run", help="Run folder, such as runs/NAME/latest.")
    p.add_argument("--export", type=str | None, default=None, metavar="FOLDER", help="Write the nodes' mean there too.")
    p.add_argument("--per-class", action="store_true", help="Accuracy and confusion matrix of every class too.")
    p.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    p.usage = "idkd evaluate RUN [--export FOLDER] [--per-class] [--json] [--data.KEY VALUE ...] [--calibration.score CLASS]"
    own: list[str] = []
    changes: list[str] = []
    to = own
    for word in arguments:
        if word.startswith("-"):  # an option, whose value follows
            option, key = word.split("=")[0], word.lstrip("-").partition("=")[0]
            to = own if option in OWN else changes
            if to is changes and key.split(".")[0] not in TOP_KEYS:
                raise UserError(
                    f"{option}: there is no such option.{did_you_mean(option.replace('_', '-'), OWN)} "
                    f"Allowed: {', '.join(OWN[2:])}, and keys of data and calibration, such as --data.private"
                )
        to.append(word)
    given = p.parse_args(own)
    from lightning_idkd.analysis.evaluate import evaluate, show
    from lightning_idkd.analysis.load import load
    from lightning_idkd.files import write

    run = load(given.run)
    files = run.export(given.export) if given.export else []
    found = evaluate(run, changes, given.per_class)
    if given.export and given.per_class:
        files.append(Path(given.export) / "per_class.json")
        write(files[-1], lambda part: part.write_text(json.dumps(found["per_class"]) + "\n"))
    print("".join(f"{file}\n" for file in files), end="", file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0
