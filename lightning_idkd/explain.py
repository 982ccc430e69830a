"""jsonargparse's errors in one or two lines, with the nearest right name."""

from __future__ import annotations

import re

from jsonargparse import ArgumentParser

from lightning_idkd.errors import UserError, did_you_mean


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are :class:`UserError`."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        raise UserError(explain(message, self)) from ex


def explain(message: str, parser: ArgumentParser) -> str:
    return message
