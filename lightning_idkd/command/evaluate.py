"""``idkd evaluate``: evaluates the nodes of a run on any test set."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightning_idkd import checkout
from lightning_idkd.command import options
from lightning_idkd.errors import UserError, did_you_mean

OWN = ("-h", "--help", "--export", "--push", "--license", "--per-class", "--json", "--trust")
"""The options of this command; it also takes keys of a config."""


def main(arguments: list[str]) -> int:
    """Evaluate the nodes of a run, print the result, and export and upload their mean if the options ask for it."""
    p = options.build_parser("evaluate")
    p.description += " Keys data.* and calibration.* are as for idkd fit; they replace the sets or score of the run."
    p.add_argument("run", help="Run folder, such as runs/NAME/latest.")
    export = "Folder to write the nodes' mean to."
    p.add_argument("--export", type=str | None, default=None, metavar="FOLDER", help=export)
    push = "Name on the Hugging Face hub, such as USER/MODEL, to upload the exported folder to."
    p.add_argument("--push", type=str | None, default=None, metavar="NAME", help=push)
    licence = "Licence of the exported parameters, by its name on the hub, such as mit or cc-by-4.0."
    p.add_argument("--license", type=str, default="unknown", metavar="NAME", help=licence)
    per_class = "Give the accuracy of every class and the confusion matrix too."
    p.add_argument("--per-class", action="store_true", help=per_class)
    p.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    trust = "Let the run's config name classes that are not part of this project, such as your own. Their code runs,"
    p.add_argument("--trust", action="store_true", help=f"{trust} so do not trust a run folder of a stranger.")
    p.usage = "idkd evaluate RUN [--export FOLDER [--license NAME] [--push NAME]] [--per-class] [--json] [--trust]"
    p.usage += " [--data.KEY VALUE ...] [--calibration.score CLASS]"
    own, changes = split_arguments(arguments)
    given = p.parse_args(own)
    for option, value in (("--push", given.push), ("--license", given.license != "unknown" and given.license)):
        if value and not given.export:
            raise UserError(f"{option}: {value} given without --export FOLDER, the folder of the model")
    from lightning_idkd.analysis import export
    from lightning_idkd.analysis.evaluate import evaluate, show
    from lightning_idkd.analysis.load import load
    from lightning_idkd.config.trust import names_own_code
    from lightning_idkd.files import write

    if given.trust or names_own_code(changes):
        checkout.add_working_folder()
    # what stops an upload or export is reported before the evaluation, which may take minutes
    hub = export.open_hub(given.push) if given.push else None
    run, files = load(given.run, trust=given.trust), []
    if given.export:
        export.check_folder(given.export)
    result = evaluate(run, changes, given.per_class)
    if given.export:
        # the card has the numbers of the run's own test set and score
        files = run.export(given.export, None if changes else result, given.license)
    if given.export and given.per_class:
        files.append(Path(given.export) / "per_class.json")
        write(files[-1], lambda part: part.write_text(json.dumps(result["per_class"]) + "\n"), "--export")
    lines = [str(file) for file in files]
    if hub:
        lines.append(f"uploaded to {export.push(hub, given.push, Path(given.export), files)}")
    print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr if given.json else sys.stdout)
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
