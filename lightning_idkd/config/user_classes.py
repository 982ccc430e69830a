"""Explains errors that come out of a user's own class: its key, its method and the line there."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from importlib import import_module
from types import FrameType

from lightning_idkd.config.arguments import read_values
from lightning_idkd.config.kinds import OURS, find_classes
from lightning_idkd.errors import UserError


@contextlib.contextmanager
def explain_errors(config: dict) -> Iterator[None]:
    """Within it, an error in the package of a user's own class, which the resolved ``config`` names, becomes a
    sentence.

    Raises:
        UserError: in place of that error; other errors pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if sentence := explain_method(e, config):
            raise UserError(sentence) from e
        raise


def user_classes(config: dict) -> list[tuple[str, str]]:
    """Key and import path of every class in a resolved config that does not come with this project."""
    specs = [(key, spec["class_path"]) for key, spec in find_classes(config, "")]
    return [(key, path) for key, path in specs if path.split(".")[0] not in OURS]


def explain_method(e: BaseException, config: dict) -> str | None:
    """Sentence for an error in the package of a user's own class, by the class whose method was called; None where the
    error comes from elsewhere."""
    classes = user_classes(config)
    for key, path in classes:
        if inside := frames_of_package(e, path):
            frame = inside[0][0]
            bases = [cls.__name__ for cls in type(frame.f_locals.get("self")).__mro__]
            key = next((k for k, p in classes if p.rpartition(".")[2] in bases), key)
            method = f"{bases[0]}.{frame.f_code.co_name}" if "self" in frame.f_locals else frame.f_code.co_name
            return describe_failure(key, f"{frame.f_globals['__name__']}.{method}", e)
    return None


def explain_constructor(e: BaseException, config: dict) -> str | None:
    """Sentence for an error that a user's own class, or function, raised when it was called to make a part of the
    resolved ``config``; None where the error comes from elsewhere."""
    for key, path in user_classes(config):
        name = path.rpartition(".")[2]
        for frame, _ in frames_of_package(e, path):
            if name in (frame.f_code.co_name, type(frame.f_locals.get("self")).__name__):
                return describe_failure(key, path, e)
    return None


def refuse_failing_modules(arguments: list[str]) -> None:
    """Refuse a class whose module cannot be imported.

    Called after the parser has failed, since the parser imports first: if a class were imported before, the short name
    that it shares with a class of this project would be ambiguous. The parser itself reports a module that does not
    exist."""
    for value, option in read_values(arguments):
        for key, spec in find_classes(value, option):
            path = spec["class_path"]
            module = path.rpartition(".")[0]
            if module.split(".")[0] in OURS or not all(part.isidentifier() for part in module.split(".")):
                continue  # a short name has no module
            try:
                import_module(module)
            except (Exception, SystemExit) as e:
                if not (isinstance(e, ModuleNotFoundError) and f"{module}.".startswith(f"{e.name}.")):
                    raise UserError(describe_failure(key, path, e)) from e


def frames_of_package(e: BaseException, path: str) -> list[tuple[FrameType, int]]:
    """The frames of an error, with their lines, that lie in the package of the class at ``path``."""
    package = path.split(".")[0]
    frames = traceback.walk_tb(e.__traceback__)
    return [(f, n) for f, n in frames if f.f_globals.get("__name__", "").split(".")[0] == package]


def describe_failure(key: str, path: str, e: BaseException) -> str:
    """Sentence for an error in the package of the class at ``path``, with the last line there."""
    text, places = str(e), [(f.f_code.co_filename, n) for f, n in frames_of_package(e, path)]
    if isinstance(e, SyntaxError):
        text, places = e.msg, [(e.filename, e.lineno)]
    kind = f"{type(e).__name__}: {text}".splitlines()[0]
    return f"{key}: {path} fails with {kind}" + "".join(f"\n{file}, line {n}" for file, n in places[-1:])
