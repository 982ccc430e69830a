"""``idkd``: parse, refuse mistakes in a sentence, run. Nothing heavy is imported before the arguments are right."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from lightning_idkd.checkout import ROOT
from lightning_idkd.command import COMMANDS
from lightning_idkd.errors import UserError, did_you_mean

if "OMP_WAIT_POLICY" not in os.environ:
    # read when torch is imported: threads that are done with their share would keep a core busy for milliseconds
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: idkd COMMAND [--config FILE] [--key value ...]\n\ncommands:")
        print("\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items()))
        print("\n`idkd fit --help` explains every key; topology, partition and bench take the same ones.")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"error: no command '{command}'.{did_you_mean(command, COMMANDS)} Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if os.getcwd() not in sys.path:  # so that a class of the user's own can be named by its import path
        checkout = [i for i, entry in enumerate(sys.path) if entry == str(ROOT)]  # whose callbacks/ would hide the user's
        sys.path.insert(checkout[0] if checkout else len(sys.path), os.getcwd())
    try:
        return import_module(f"lightning_idkd.command.{command}").main(rest)
    except UserError as e:
        if (processes := sys.modules.get("lightning_idkd.training.launch")) is None or processes.is_first_to_report(str(e)):
            print(f"error: {e}", file=sys.stderr)
        return 2
    except RuntimeError:
        if (processes := sys.modules.get("lightning_idkd.training.launch")) is None or not processes.other_process_failed():
            raise
        return 2
    except SystemExit as e:  # jsonargparse ends --help and --print_config this way
        return e.code if isinstance(e.code, int) else 0
    except KeyboardInterrupt:
        return 130
