"""``idkd``: runs a command, and prints a user's mistake as a sentence.

Nothing heavy is imported before the arguments are known to be right.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from lightning_idkd import checkout
from lightning_idkd.command import COMMANDS, READERS
from lightning_idkd.errors import UserError, did_you_mean

if "OMP_WAIT_POLICY" not in os.environ:
    # torch reads it at import; without it, threads that have done their share keep a core busy for milliseconds
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 if ``doctor`` finds a fault, 2 for a user's mistake, 130 when
    interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: idkd COMMAND [--config FILE] [--key value ...]\n\ncommands:")
        print("\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items()))
        print("\n`idkd fit --help` explains every key; topology, partition and bench take the same keys.")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        print(f"error: there is no command '{command}'.{hint} Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if command not in READERS:
        checkout.add_working_folder()
    try:
        return import_module(f"lightning_idkd.command.{command}").main(rest)
    except UserError as e:
        launch = sys.modules.get("lightning_idkd.training.launch")
        if launch is None or launch.is_first_to_report(str(e)):
            print(f"error: {e}", file=sys.stderr)
        return 2
    except RuntimeError:
        launch = sys.modules.get("lightning_idkd.training.launch")
        if launch is None or not launch.other_process_failed():
            raise
        return 2
    except SystemExit as e:  # jsonargparse ends --help and --print_config this way
        return e.code if isinstance(e.code, int) else 0
    except KeyboardInterrupt:
        return 130
