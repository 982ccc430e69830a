"""What several commands share: their parsers, and pictures they draw."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lightning_idkd.command import COMMANDS
from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_idkd.config import Config


def describe(command: str) -> str:
    """What a command does, as a sentence."""
    return f"{COMMANDS[command].capitalize()}."


def parser(command: str):
    """A parser without options, for a command that takes no experiment."""
    from lightning_idkd.config.mistakes import Parser

    p = Parser(prog=f"idkd {command}", description=describe(command), allow_abbrev=False, parser_mode="yaml")
    p.outermost = True
    return p


def configure(arguments: list[str], command: str) -> Config:
    """The experiment that the arguments of a command describe."""
    from lightning_idkd.config import parse

    return parse.configure(arguments, command, describe(command))


def draw(out: str | None, picture: str, save: Callable[[str], None]) -> None:
    """Draw into the file ``out``, or over no file as ``picture``."""
    if out is None and os.path.exists(picture):
        print(f"not drawn: there is a {picture} already; --out FILE draws in any case")
        return
    try:
        save(out or picture)
    except (OSError, ValueError) as e:
        raise UserError(f"--out: cannot write '{out or picture}' ({getattr(e, 'strerror', None) or e})") from e
    print(f"drawn: {out or picture}")
