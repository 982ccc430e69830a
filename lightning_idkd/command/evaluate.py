"""``idkd evaluate``: evaluates the nodes of a run on any test set."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightning_idkd import checkout
from lightning_idkd.command import options
from lightning_idkd.errors import UserError, did_you_mean

OWN = ("-h", "--help", "--export", "--per-class", "--json", "--trust")
"""The options of this command; it also takes keys of a config."""


def main(arguments: list[str]) -> int:
    """Evaluate the nodes of a run, export their mean if ``--export`` asks for it, and print the result."""
    p = options.build_parser("evaluate")
    p.description += " Keys data.* and calibration.* are as for idkd fit; they replace the sets or score of the run."
    p.add_argument("run", help="Run folder, such as runs/NAME/latest.")
    export = "Folder to write the nodes' mean to."
    p.add_argument("--export", type=str | None, default=None, metavar="FOLDER", help=export)
    per_class = "Give the accuracy of every class and the confusion matrix too."
    p.add_argument("--per-class", action="store_true", help=per_class)
    p.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    trust = "Let the run's config name classes that are not part of this project, such as your own. Their code runs,"
    p.add_argument("--trust", action="store_true", help=f"{trust} so do not trust a run folder of a stranger.")
    p.usage = "idkd evaluate RUN [--export FOLDER] [--per-class] [--json] [--trust] [--data.KEY VALUE ...]"
    p.usage += " [--calibration.score CLASS]"
    own, changes = split_arguments(arguments)
    given = p.parse_args(own)
    from lightning_idkd.analysis.evaluate import evaluate, show
    from lightning_idkd.analysis.load import load
    from lightning_idkd.config.trust import names_own_code
    from lightning_idkd.files import write

    if given.trust or names_own_code(changes):
        checkout.add_working_folder()
    run = load(given.run, trust=given.trust)
    files = run.export(given.export) if given.export else []
    result = evaluate(run, changes, given.per_class)
    if given.export and given.per_class:
        files.append(Path(given.export) / "per_class.json")
        write(files[-1], lambda part: part.write_text(json.dumps(result["per_class"]) + "\n"), "--export")
    print("".join(f"{file}\n" for file in files), end="", file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    return 0


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Divide the arguments into those of this command and keys of a config, each with the values that follow it.

    Raises:
        UserError: an option is neither.
    """
    from lightning_idkd.config.arguments import TOP_KEYS

    own: list[str] = []
    changes: list[str] = []
    part = own
    for word in arguments:
        if word.startswith("-"):
            option, key = word.split("=")[0], word.lstrip("-").partition("=")[0]
            part = own if option in OWN else changes
            if part is changes and key.split(".")[0] not in TOP_KEYS:
                raise UserError(
                    f"{option}: there is no such option.{did_you_mean(option.replace('_', '-'), OWN)} "
                    f"Allowed: {', '.join(OWN[2:])}, and keys of data and calibration, such as --data.private"
                )
        part.append(word)
    return own, changes
