"""What several commands share: their parsers, and how they save a picture."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lightning_idkd.command import COMMANDS
from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_idkd.config import Config
    from lightning_idkd.config.mistakes import Parser


def describe(command: str) -> str:
    """A sentence that says what a command does."""
    text = COMMANDS[command]
    return f"{text[0].upper()}{text[1:]}."


def build_parser(command: str) -> Parser:
    """A parser without options, for a command that does not take the keys of an experiment."""
    from lightning_idkd.config.mistakes import Parser

    p = Parser(prog=f"idkd {command}", description=describe(command), allow_abbrev=False, parser_mode="yaml")
    p.outermost = True
    return p


def configure(arguments: list[str], command: str) -> Config:
    """The experiment that the arguments of a command describe."""
    from lightning_idkd.config import parse

    return parse.configure(arguments, command, describe(command))


def draw(out: str | None, picture: str, save: Callable[[str], None]) -> None:
    """Save a picture by ``save(file)`` in the file ``out``; if that is None, as ``picture`` unless it exists."""
    if out is None and os.path.exists(picture):
        print(f"not drawn: there is a {picture} already; --out FILE overwrites a file")
        return
    try:
        save(out or picture)
    except (OSError, ValueError) as e:
        raise UserError(f"--out: cannot write '{out or picture}' ({getattr(e, 'strerror', None) or e})") from e
    print(f"drawn: {out or picture}")
