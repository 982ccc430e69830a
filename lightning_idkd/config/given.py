"""What a user gave, looked at first: files that are no YAML, arguments outside init_args, classes whose module fails.

jsonargparse tells these mistakes without the file, the key or the line.
"""

from __future__ import annotations

import ast
import contextlib
import json
import traceback
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args, get_origin

import yaml

from lightning_idkd import checkout
from lightning_idkd.config import Config, class_paths, yaml_file
from lightning_idkd.config.explain import OURS, allowed, classes, kind, parameters, types
from lightning_idkd.config.resolved import GROUPS
from lightning_idkd.errors import UserError, did_you_mean

NAMES = ("config", *GROUPS)  # a config's, at its top
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
SHIPPED = checkout.CONFIGS


def look_over(arguments: list[str]) -> list[str]:
    """The arguments, a config that comes with the project by its path instead of its name, values in Python's spelling as JSON.

    Raises:
        UserError: a config cannot be read, or arguments of a class stand outside its init_args.
    """
    arguments = classes_first(list(spread(arguments)))
    for at, option, text in options(arguments):
        if option == "--config":
            file = shipped(text)
            arguments[at] = f"--config={file}" if arguments[at].startswith("--config=") else file
        elif (plain := class_paths.of_option(option, from_python(text))) != text:
            arguments[at] = f"{option}={plain}" if arguments[at].startswith(f"{option}=") else plain
    for value, key in values(arguments):
        stray_arguments(value, key)
    return arguments


def from_python(text: str) -> str:
    """A value that YAML reads otherwise than Python, as agents of W&B write it, in JSON: None, or lists and dicts with True and
    None in them."""
    if text == "None" or text.startswith(("[", "{")):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):  # others are YAML
            value = ast.literal_eval(text)
            return text if value_of(text, "") == value else json.dumps(value, ensure_ascii=False)
    return text


def spread(arguments: list[str]) -> Iterator[str]:
    """The arguments, those that give keys of ``run`` together split into one a key, as the parser has them."""
    words = iter(arguments)
    for word in words:
        option, equals, text = word.partition("=")
        if option != "--run":
            yield word
            continue
        text = text if equals else next(words, "")
        keys = value_of(from_python(text), "run")
        if isinstance(keys, dict):
            yield from (f"--run.{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in keys.items())
        else:
            yield f"--run={text}"


def classes_first(arguments: list[str]) -> list[str]:
    """Moves an option that names a class before options of its arguments, back to the last ``--config``: the parser reads options
    in order, and a class that is named starts afresh. Arguments that the class does not take were meant for another one."""
    groups: list[list[str]] = []  # an option and the words after it
    for word in arguments:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    keys = [group[0].partition("=")[0] for group in groups]
    for i, key in enumerate(keys):
        named = classes(key.lstrip("-")).get("=".join(groups[i]).partition("=")[2])
        if named is None:
            continue
        since = max((j + 1 for j in range(i) if keys[j] in ("--config", key)), default=0)
        takes = [f"{key}.{argument}" for argument in parameters(named)]
        first = next((j for j in range(since, i) if any(f"{keys[j]}.".startswith(f"{t}.") for t in takes)), i)
        groups.insert(first, groups.pop(i))
        keys.insert(first, keys.pop(i))
    return [word for group in groups for word in group]


def options(arguments: list[str]) -> Iterator[tuple[int, str, str]]:
    """Every option with its text, and the place in ``arguments`` where that stands."""
    for i, word in enumerate(arguments):
        option, equals, text = word.partition("=")
        at = i if equals else i + 1
        if option.startswith("--") and at < len(arguments):
            yield at, option, text if equals else arguments[at]


def values(arguments: list[str]) -> Iterator[tuple[Any, str]]:
    """What every option means, of a config all that it holds, and the dotted key it stands at."""
    for _, option, text in options(arguments):
        if option == "--config":
            found = content(text)
            no_keys(found, text)
            yield found, ""
        else:
            key = option.lstrip("-").removesuffix("+")
            yield value_of(text, key), key


def shipped(name: str) -> str:
    """The path of a config that comes with the project, where ``name`` is no file but one of these."""
    known = [] if Path(name).is_file() else [p for p in (SHIPPED / f"{name}.yaml", SHIPPED.parent / name) if p.is_file()]
    return str(known[0]) if known else name


def content(file: str) -> Any:
    """What a config holds."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"--config: '{file}' is no UTF-8 text (byte 0x{e.object[e.start]:02x} at {e.start})") from e
    except OSError as e:
        known = [str(p.relative_to(SHIPPED).with_suffix("")) for p in SHIPPED.rglob("*.yaml")]
        raise UserError(f"--config: there is no file '{file}'.{did_you_mean(file, known)}") from e
    try:
        return class_paths.full_paths(yaml_file.gathered(yaml_file.read(text), NAMES))
    except UserError as e:
        raise UserError(f"--config: '{file}', {e}") from e
    except (yaml.YAMLError, ValueError) as e:
        mark = getattr(e, "problem_mark", None)
        why = ", ".join(filter(None, (getattr(e, "context", ""), getattr(e, "problem", "")))) or str(e)
        raise UserError(f"--config: '{file}'{f', line {mark.line + 1}' if mark else ''}, is no YAML: {why}") from e


def value_of(text: str, key: str) -> Any:
    """What the text of option ``key`` means."""
    try:
        return yaml_file.read_value(text)
    except UserError as e:
        raise UserError(f"{key}: {e}") from e
    except (yaml.YAMLError, ValueError):
        return text


def no_keys(value: Any, file: str) -> None:
    """Refuse a config, or a group in it, that holds no keys."""

    def what(found: Any) -> str:
        return "nothing" if found is None else "a list" if isinstance(found, list) else f"only '{found}'"

    if not isinstance(value, dict):
        raise UserError(f"--config: '{file}' holds {what(value)}; allowed: keys and their values")
    for group in (f.name for f in fields(Config) if is_dataclass(f.type)):
        if group in value and not isinstance(value[group], dict):
            raise UserError(f"--config: '{file}' has {what(value[group])} below {group}; allowed: its keys and their values")


def nulls(value: Any, type_: Any, key: str) -> None:
    """Refuse null where a value of ``type_`` is needed, in ``value`` and the arguments of the classes it names.

    jsonargparse takes null for "not given" wherever it stands.
    """
    if value is None and not (type_ in (None, Any) or {None, type(None)} & set(get_args(type_))):
        raise UserError(f"{key}: null given; allowed: {instead(type_, key)}")
    for v in value if isinstance(value, list) else ():
        if isinstance(v, dict):
            nulls(v, None, key)
    if not isinstance(value, dict):
        return
    cls = next((t for t in (type_, *get_args(type_)) if is_dataclass(t)), None)
    given = value
    if isinstance(value.get("class_path"), str):
        module, _, name = value["class_path"].rpartition(".")
        cls, given = getattr(import_module(module), name), value.get("init_args") or {}
    if cls is not None:
        hints = types(cls)
        for name, p in parameters(cls).items():
            if name in given and p.default is not None:
                nulls(given[name], hints.get(name), f"{key}.{name}")


def instead(type_: Any, key: str) -> str:
    """What a value of ``type_`` may be, in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", tuple: "a list"}
    kinds = get_args(type_)
    if get_origin(type_) is Literal:
        return ", ".join(map(str, kinds))
    if get_origin(type_) in words:
        return words[get_origin(type_)]
    return allowed(key) if kind(key) else " or ".join(words.get(t, "a value") for t in kinds or (type_,))


def named(value: Any, key: str) -> Iterator[tuple[str, dict]]:
    """Every class that ``value`` names, as a mapping with class_path, and the dotted key it stands at."""
    if isinstance(value, list):
        for v in value:
            yield from named(v, key)
    elif isinstance(value, str):
        key = key.removesuffix(".class_path")
        if kind(key) or key == "node.module":
            yield key, {"class_path": value}
    elif isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield key, value
            value = value.get("init_args")
        for k, v in value.items() if isinstance(value, dict) else ():
            yield from named(v, f"{key}.{k}".lstrip("."))


def stray_arguments(value: Any, key: str) -> None:
    """Refuse arguments beside init_args."""
    for at, given in named(value, key):
        for stray in (k for k in given if k not in CLASS_KEYS):
            if isinstance(given[stray], dict) and (hint := did_you_mean(str(stray), CLASS_KEYS)):
                raise UserError(f"{at}.{stray}: there is no such key.{hint}")
            raise UserError(
                f"{at}.{stray}: the arguments of a class belong in init_args, as in "
                f"{{class_path: {given['class_path']}, init_args: {{{stray}: {given[stray]}}}}}"
            )


def failing_modules(arguments: list[str]) -> None:
    """Tell of a class whose module fails; to be asked after the parser has, which then imports before us: a class that was
    imported earlier would make the short name that it shares with a built-in one ambiguous."""
    for at, given in (found for value, key in values(arguments) for found in named(value, key)):
        path = given["class_path"]
        module = path.rpartition(".")[0]
        if module.split(".")[0] in OURS or not all(part.isidentifier() for part in module.split(".")):
            continue  # among the latter are short names
        try:
            import_module(module)
        except (Exception, SystemExit) as e:
            if not (isinstance(e, ModuleNotFoundError) and f"{module}.".startswith(f"{e.name}.")):  # the parser tells that one
                raise UserError(failure(at, path, e)) from e


def frames(e: BaseException, path: str) -> list[tuple[FrameType, int]]:
    """The frames of an error, with their lines, that lie in the package of the class at ``path``."""
    package = path.split(".")[0]
    return [(f, n) for f, n in traceback.walk_tb(e.__traceback__) if f.f_globals.get("__name__", "").split(".")[0] == package]


def failure(key: str, path: str, e: BaseException) -> str:
    """Sentence for an error in the package of the class at ``path``, with the last line there."""
    text, places = str(e), [(f.f_code.co_filename, n) for f, n in frames(e, path)]
    if isinstance(e, SyntaxError):
        text, places = e.msg, [(e.filename, e.lineno)]
    said = f"{type(e).__name__}: {text}".splitlines()[0]
    return f"{key}: {path} fails with {said}" + "".join(f"\n{file}, line {n}" for file, n in places[-1:])


def placed(e: UserError, config: dict) -> str:
    """The sentence of a class that refused an argument, which it calls by the key of the outermost class of its kind, with the
    key that the argument has in the resolved ``config``."""
    key, _, said = str(e).partition(": ")
    outer, _, name = key.rpartition(".")
    made = {type(f.f_locals.get("self")).__name__ for f, _ in traceback.walk_tb(e.__traceback__)}
    at = [k for k, given in named(config, "")
          if given["class_path"].rpartition(".")[2] in made and name in (given.get("init_args") or {})]  # fmt: skip
    return str(e) if not at or outer in at else f"{at[-1]}.{name}: {said}"


@contextlib.contextmanager
def own_classes(config: dict) -> Iterator[None]:
    """Inside, an error that comes out of a class of the user's own, which the resolved ``config`` names, becomes a sentence with
    the class, its method and the line there.

    Raises:
        UserError: in place of that error; others pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if said := at_work(e, config):
            raise UserError(said) from e
        raise


def at_work(e: BaseException, config: dict) -> str | None:
    """Sentence for an error in the package of a class of the user's own, by the class whose method was called; None where the
    error comes from elsewhere."""
    own = [(key, given["class_path"]) for key, given in named(config, "") if given["class_path"].split(".")[0] not in OURS]
    for key, path in own:
        if called := frames(e, path):
            frame = called[0][0]
            bases = [cls.__name__ for cls in type(frame.f_locals.get("self")).__mro__]
            key = next((k for k, p in own if p.rpartition(".")[2] in bases), key)
            method = f"{bases[0]}.{frame.f_code.co_name}" if "self" in frame.f_locals else frame.f_code.co_name
            return failure(key, f"{frame.f_globals['__name__']}.{method}", e)
    return None


def in_the_making(e: BaseException, config: dict) -> str | None:
    """Sentence for an error that a class of the user's own raised when it was made for the resolved ``config``."""
    for key, given in named(config, ""):
        path = given["class_path"]
        if path.split(".")[0] not in OURS and any(
            path.rpartition(".")[2] in (f.f_code.co_name, type(f.f_locals.get("self")).__name__) for f, _ in frames(e, path)
        ):
            return failure(key, path, e)
    return None
