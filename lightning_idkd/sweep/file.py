"""Reads and checks W&B sweep files, and lists the points of their parameters: a grid, or random draws.

Keys and distributions are those of W&B's schema (wandb/sweeps, config/schema.json and params.py).
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_idkd.checkout import CONFIGS
from lightning_idkd.config import yaml_file
from lightning_idkd.errors import UserError, did_you_mean, require
from lightning_idkd.sweep.command_line import ARGUMENTS, MACROS

KEYS = (
    "program", "method", "name", "metric", "parameters", "command", "run_cap", "early_terminate", "description", "kind",
    "apiVersion",
)  # fmt: skip
"""The keys of a sweep file that are read here, and those that only describe it."""
SERVER = ("project", "entity", "controller", "scheduler", "metrics", "job", "image_uri", "launch", "settings")
"""Keys that only W&B's server or its other programs read."""

METHODS = ("grid", "random", "bayes")
METRIC_KEYS = ("name", "goal", "target", "impute", "impute_while_running")
"""The keys of a metric; the last three have no effect without W&B's server."""
METRIC_EXAMPLE = "{name: validation/node_mean, goal: maximize}"
GOALS = ("maximize", "minimize")
HYPERBAND = ("type", "min_iter", "max_iter", "eta", "s", "strict")
"""The keys of early_terminate."""

BOUNDS = ("min", "max")
DISTRIBUTIONS = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": BOUNDS,
    "uniform": BOUNDS,
    "q_uniform": (*BOUNDS, "q"),
    "log_uniform_values": BOUNDS,
    "q_log_uniform_values": (*BOUNDS, "q"),
    "inv_log_uniform_values": BOUNDS,
    "log_uniform": BOUNDS,
    "q_log_uniform": (*BOUNDS, "q"),
    "inv_log_uniform": BOUNDS,
    "normal": ("mu", "sigma"),
    "q_normal": ("mu", "sigma", "q"),
    "log_normal": ("mu", "sigma"),
    "q_log_normal": ("mu", "sigma", "q"),
    "beta": ("a", "b"),
    "q_beta": ("a", "b", "q"),
}
"""Per distribution of a parameter, the keys that it takes."""
SEARCHED = ("constant", "categorical", *(kind for kind in DISTRIBUTIONS if "uniform" in kind))
"""The distributions of method bayes; Optuna has no others."""
DEFAULTS = {"q": 1.0, "mu": 0.0, "sigma": 1.0, "a": 1.0, "b": 1.0}
"""The values of keys that may be missing."""
ENTRY_KEYS = tuple(dict.fromkeys(["distribution", *itertools.chain(*DISTRIBUTIONS.values()), "parameters"]))
"""Every key that the entry of a parameter may have."""


# ------------------------------------------------------------------ reading and checking


def read_sweep(path: Path) -> dict:
    """Read a sweep file and check its keys.

    Raises:
        UserError: the file cannot be read, or a key or value is not allowed.
    """
    try:
        sweep = yaml_file.read(path.read_text(encoding="utf-8"), yaml.SafeLoader)  # W&B's agents read YAML 1.1
    except FileNotFoundError as e:
        known = []
        for file in (CONFIGS / "sweeps").glob("*.yaml"):
            known += [f"configs/sweeps/{file.stem}.yaml", f"sweeps/{file.stem}"]
        raise UserError(f"there is no sweep file {path}.{did_you_mean(str(path), known)}") from e
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read as a sweep file ({reason})") from e
    except UserError as e:
        raise UserError(f"{path}, {e}") from e
    except yaml.YAMLError as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())[:150]}") from e
    if not isinstance(sweep, dict):
        raise UserError(f"{path} holds no keys; a sweep file has {', '.join(KEYS)}")
    for key in sweep:
        hint = did_you_mean(str(key), (*KEYS, *SERVER))
        require(key in (*KEYS, *SERVER), f"{path.name}: key", f"'{key}'", f"{', '.join(KEYS)}.{hint}")
    for key in ("method", "parameters", "command"):
        if key not in sweep:
            raise UserError(f"{path.name}: the key '{key}' is missing")
    method, cap, name = sweep["method"], sweep.get("run_cap"), sweep.get("name", path.stem)
    allowed = f"grid, random, bayes (custom needs W&B's server).{did_you_mean(str(method), METHODS)}"
    require(method in METHODS, f"{path.name}: method", method, allowed)
    right = cap is None or (type(cap) is int and cap >= 1)
    require(right, f"{path.name}: run_cap", cap, "a number of cells, 1 or more")
    right = isinstance(name, str) and make_file_name(name).strip("._")
    require(right, f"{path.name}: name", repr(name), "a text")
    check_command(sweep["command"], path.name)
    check_parameters(sweep["parameters"], f"{path.name}: parameters")
    if is_search(sweep):
        check_search(sweep, path.name)
    return sweep


def is_search(sweep: dict) -> bool:
    """Whether results decide which cells run, or how long: Optuna then runs the sweep."""
    return sweep["method"] == "bayes" or "early_terminate" in sweep


def check_search(sweep: dict, file: str) -> None:
    """Refuse a search without a metric or a number of cells, and what Optuna cannot do."""
    metric, keys = sweep.get("metric"), ", ".join(METRIC_KEYS)
    if metric is None:
        raise UserError(f"{file}: metric is missing, by which a search judges; such as {METRIC_EXAMPLE}")
    require(isinstance(metric, dict), f"{file}: metric", metric, f"the keys {keys}")
    for key in metric:
        require(key in METRIC_KEYS, f"{file}: metric: key", f"'{key}'", f"{keys}.{did_you_mean(str(key), METRIC_KEYS)}")
    right = isinstance(metric.get("name"), str) and metric["name"]
    require(right, f"{file}: metric.name", metric.get("name"), "the name of a metric, such as validation/node_mean")
    goal = metric.get("goal")
    if goal is None:
        raise UserError(f"{file}: metric.goal is missing; allowed: maximize, minimize (W&B's server takes minimize)")
    require(goal in GOALS, f"{file}: metric.goal", goal, f"{', '.join(GOALS)}.{did_you_mean(str(goal), GOALS)}")
    if "early_terminate" in sweep:
        check_early_terminate(sweep["early_terminate"], f"{file}: early_terminate")
    if sweep["method"] != "bayes":
        return
    if sweep.get("run_cap") is None:
        raise UserError(f"{file}: run_cap is missing: how many trials does the search have?")
    for path, entry in walk_parameters(sweep["parameters"]):
        place = f"{file}: parameters.{'.'.join(path)}"
        kind = find_distribution(entry, place)
        allowed = f"for method bayes, by Optuna: {', '.join(SEARCHED)}"
        require(kind in SEARCHED, f"{place}.distribution", kind, allowed)


def check_early_terminate(given: Any, where: str) -> None:
    """Refuse early stopping that is not W&B's hyperband with keys and values that Optuna's pruner has too."""
    require(isinstance(given, dict), where, given, f"the keys {', '.join(HYPERBAND)}")
    require(given.get("type") == "hyperband", f"{where}.type", given.get("type"), "hyperband")
    for key in given:
        hint = did_you_mean(str(key), HYPERBAND)
        require(key in HYPERBAND, f"{where}: key", f"'{key}'", f"{', '.join(HYPERBAND)}.{hint}")
    for key in ("min_iter", "max_iter", "eta", "s"):
        least, value = 2 if key == "eta" else 1, given.get(key)
        right = value is None or (type(value) is int and value >= least)
        require(right, f"{where}.{key}", value, f"a whole number from {least}")
    if (given.get("min_iter") is None) == (given.get("max_iter") is None):
        raise UserError(f"{where}: give either min_iter, or max_iter and s")
    for one, other in (("max_iter", "s"), ("s", "max_iter")):
        if given.get(one) is not None and given.get(other) is None:
            raise UserError(f"{where}.{other} is missing, which {one} needs")
    strict = given.get("strict", False)
    require(strict is False, f"{where}.strict", strict, "false, since Optuna has no such mode")


def check_command(command: Any, file: str) -> None:
    """Refuse a command with an unknown macro, and one that does not give the parameters of a cell to ``idkd fit``."""
    require(isinstance(command, list), f"{file}: command", command, "a list of words")
    for part in command:
        match = re.fullmatch(r"\$\{(.*)\}", str(part))
        if match and not match[1].startswith("envvar:"):
            allowed = f"{', '.join(MACROS)}, envvar:NAME.{did_you_mean(match[1], MACROS)}"
            require(match[1] in MACROS, f"{file}: command", match[0], allowed)
    if "fit" not in command or not ARGUMENTS & set(map(str, command)):
        example = "as in the sweeps that come with this project"
        raise UserError(f"{file}: command must hold fit and ${{args_json_file}} or ${{args}}, {example}")


def check_parameters(parameters: Any, where: str) -> None:
    """Refuse parameters, nested ones too, that W&B's schema does not allow; ``where`` they stand begins a message."""
    require(isinstance(parameters, dict) and parameters, where, parameters, "keys with their values")
    for key, entry in parameters.items():
        place = f"{where}.{key}"
        if not isinstance(entry, dict) or not entry:
            raise UserError(f"{place} has no values; allowed: {', '.join(ENTRY_KEYS)}")
        for k in entry:
            allowed = f"{', '.join(ENTRY_KEYS)}.{did_you_mean(str(k), ENTRY_KEYS)}"
            require(k in ENTRY_KEYS, f"{place}: key", f"'{k}'", allowed)
        ways = [way for way in ("value", "values", "min", "parameters") if way in entry]
        require(len(ways) < 2, place, " and ".join(ways), "one of value, values, min and max, or nested parameters")
        if "parameters" in entry:
            check_parameters(entry["parameters"], f"{place}.parameters")
        else:
            check_distribution(entry, place)


def check_distribution(entry: dict, where: str) -> None:
    """Refuse an entry whose keys are not those of its distribution, or whose values are out of range."""
    kind = find_distribution(entry, where)
    takes = DISTRIBUTIONS[kind]
    for k in entry:
        allowed = f"for distribution {kind}: {', '.join(takes)}"
        require(k in ("distribution", *takes), f"{where}: key", f"'{k}'", allowed)
    if missing := [k for k in takes if k not in entry and k not in DEFAULTS]:
        raise UserError(f"{where}: {' and '.join(missing)} missing, which distribution {kind} needs")
    values, chances = entry.get("values", [0]), entry.get("probabilities")
    require(isinstance(values, list) and values, f"{where}.values", values, "a list of one or more")
    if chances is not None:
        right = isinstance(chances, list) and len(chances) == len(values) and all(map(is_number, chances))
        right = right and min(chances) >= 0 and sum(chances) > 0
        require(right, f"{where}.probabilities", chances, "a number from 0 for every value")
    for k in set(takes) & {*BOUNDS, *DEFAULTS}:
        number = entry.get(k, DEFAULTS.get(k))
        allowed = "a whole number" if kind == "int_uniform" else "a number"
        if isinstance(number, str):
            allowed += " (YAML wants 1.0e-3, not 1e-3)"
        right = type(number) is int if kind == "int_uniform" else is_number(number)
        require(right, f"{where}.{k}", repr(number), allowed)
        right = k in ("min", "max", "mu") or number > 0 or (k == "sigma" and number == 0)
        require(right, f"{where}.{k}", number, "above 0")
    if "min" in takes:
        low, high = entry["min"], entry["max"]
        require(low <= high, f"{where}.min", low, f"at most max, {high}")
        require(not kind.endswith("_values") or low > 0, f"{where}.min", low, f"above 0 for {kind}")


def is_number(value: Any) -> bool:
    """Whether ``value`` is an int or a float; True and False are neither."""
    return type(value) in (int, float)


def find_distribution(entry: dict, where: str = "parameters") -> str:
    """The distribution that an entry names, or that W&B takes for its keys."""
    if "distribution" in entry:
        kind = entry["distribution"]
        allowed = f"{', '.join(DISTRIBUTIONS)}.{did_you_mean(str(kind), DISTRIBUTIONS)}"
        require(kind in DISTRIBUTIONS, f"{where}.distribution", kind, allowed)
        return kind
    if "values" in entry:
        return "categorical_w_probabilities" if "probabilities" in entry else "categorical"
    if "value" in entry:
        return "constant"
    if "min" in entry or "max" in entry:
        return "int_uniform" if all(type(entry.get(k)) is int for k in BOUNDS) else "uniform"
    raise UserError(f"{where}: give value, values, min and max, or a distribution")


def make_file_name(text: object) -> str:
    """``text`` as part of a file name: letters, digits, ``.``, ``-`` and ``+`` stay, other characters become ``_``."""
    return "".join(c if c.isalnum() or c in ".-+" else "_" for c in str(text))


# ------------------------------------------------------------------ points


def list_points(sweep: dict) -> list[dict]:
    """The parameters of all cells, at most ``run_cap`` of them.

    Those of a grid stand in the order of the file. Random draws are the same every time.
    """
    entries, cap = dict(walk_parameters(sweep["parameters"])), sweep.get("run_cap")
    if sweep["method"] == "grid":
        axes = [list_grid_values(entry, f"parameters.{'.'.join(path)}") for path, entry in entries.items()]
        points = itertools.islice(itertools.product(*axes), cap)
        return [nest(dict(zip(entries, values, strict=True))) for values in points]
    if cap is None:
        raise UserError("run_cap is missing: how many random cells?")
    rng = random.Random(0)
    return [nest({path: draw(entry, rng) for path, entry in entries.items()}) for _ in range(cap)]


def walk_parameters(parameters: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Every parameter that has values: its path, which begins with the keys it is nested in, and its entry."""
    for key, entry in parameters.items():
        if "parameters" in entry:
            yield from walk_parameters(entry["parameters"], (*path, key))
        else:
            yield (*path, key), entry


def nest(values: dict[tuple[str, ...], Any]) -> dict:
    """Turn values by path into the nested dicts that W&B gives to a run."""
    point: dict = {}
    for (*path, key), value in values.items():
        inner = point
        for part in path:
            inner = inner.setdefault(part, {})
        inner[key] = value
    return point


def list_grid_values(entry: dict, where: str) -> list:
    """The values of a parameter in a grid."""
    kind = find_distribution(entry, where)
    if kind in ("constant", "categorical"):
        return entry.get("values", [entry.get("value")])
    if kind == "int_uniform":
        return list(range(entry["min"], entry["max"] + 1))
    if kind == "q_uniform":  # W&B leaves max out
        low, q = entry["min"], entry.get("q", DEFAULTS["q"])
        return [add_multiple(low, i, q) for i in range(math.ceil((entry["max"] - low) / q))]
    allowed = "values, or distribution int_uniform or q_uniform"
    raise UserError(f"{where}: a grid needs {allowed}; {kind} is for method random")


def draw(entry: dict, rng: random.Random) -> Any:
    """Draw a value from the distribution of a parameter."""
    kind, keys = find_distribution(entry), DEFAULTS | entry
    low, high, mu, sigma = (keys.get(k, math.nan) for k in ("min", "max", "mu", "sigma"))
    base = kind.removeprefix("q_")
    if base == "constant":
        return rng.choice([keys["value"]])  # the choice of one value uses the generator too, as older sweeps did
    if base == "categorical":
        return rng.choice(keys["values"])
    if base == "categorical_w_probabilities":
        return rng.choices(keys["values"], keys["probabilities"])[0]
    if base == "int_uniform":
        return rng.randint(low, high)
    if base == "uniform":
        value = rng.uniform(low, high)
    elif base == "log_uniform":  # the bounds are exponents
        value = math.exp(rng.uniform(low, high))
    elif base == "inv_log_uniform":
        value = math.exp(-rng.uniform(low, high))
    elif base in ("log_uniform_values", "inv_log_uniform_values"):  # if x is log-uniform, so is 1 / x
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
    elif base == "normal":
        value = rng.normalvariate(mu, sigma)
    elif base == "log_normal":
        value = math.exp(rng.normalvariate(mu, sigma))
    else:
        value = rng.betavariate(keys["a"], keys["b"])
    return quantise(value, entry)


def quantise(value: float, entry: dict) -> float:
    """Round ``value`` to a multiple of q if the distribution of a parameter has one."""
    q = (DEFAULTS | entry)["q"]
    return add_multiple(0, round(value / q), q) if find_distribution(entry).startswith("q_") else value


def add_multiple(start: float, times: int, q: float) -> float:
    """``start + times * q``; a float is rounded to 12 digits, since further ones are rounding errors."""
    value = start + times * q
    return value if isinstance(value, int) else float(f"{value:.12g}")
