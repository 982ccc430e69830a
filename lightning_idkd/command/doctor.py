"""``idkd doctor``: checks what runs need of this machine, for a user and for a bug report."""

from __future__ import annotations

import json
from dataclasses import asdict

from lightning_idkd.command import options


def main(arguments: list[str]) -> int:
    """Print what :func:`~lightning_idkd.analysis.environment.examine` finds; returns 1 if something is wrong."""
    from lightning_idkd.analysis.environment import examine, format_findings

    p = options.build_parser("doctor")
    p.description += " The exit status is 1 if something that every run needs is missing."
    p.add_argument("--json", action="store_true", help="Print JSON instead of text.")
    given = p.parse_args(arguments)
    findings = examine()
    wrong = [finding.name for finding in findings if finding.state == "wrong"]
    if given.json:
        print(json.dumps({"ok": not wrong, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print(format_findings(findings))
        print(f"\nwrong: {', '.join(wrong)}" if wrong else "\nnothing is wrong")
    return int(bool(wrong))
