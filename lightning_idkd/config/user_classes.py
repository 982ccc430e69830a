"""Explains errors that the classes of a config raise: their key, and of a user's own class the method and the line."""

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


def explain_constructor(e: BaseException, config: dict) -> str:
    """Sentence for an error that was raised while the classes of the resolved ``config`` were made.

    If a class refused an argument, the sentence begins with the key that the argument has in ``config``; the class
    itself names the key in the outermost class of its kind. If a user's own class or function failed, the sentence
    gives its key and the line."""
    called: set[str] = set()
    for frame, _ in traceback.walk_tb(e.__traceback__):
        called |= {frame.f_code.co_name, type(frame.f_locals.get("self")).__name__}
    made = [(key, spec) for key, spec in find_classes(config, "") if spec["class_path"].rpartition(".")[2] in called]
    if isinstance(e, UserError):
        stated, _, sentence = str(e).partition(": ")
        outer, _, name = stated.rpartition(".")
        keys = [key for key, spec in made if name in (spec.get("init_args") or {})]
        return str(e) if not keys or outer in keys else f"{keys[-1]}.{name}: {sentence}"
    for key, spec in made:
        path = spec["class_path"]
        if path.split(".")[0] not in OURS and frames_of_package(e, path):
            return describe_failure(key, path, e)
    return str(e).splitlines()[0] if str(e) else repr(e)


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
