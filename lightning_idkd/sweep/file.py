"""W&B sweep files: their keys, the points that their parameters make, and the command as W&B's agents expand it.

Keys and distributions are those of W&B's schema (wandb/sweeps, config/schema.json and params.py).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_idkd.checkout import CONFIGS
from lightning_idkd.config import yaml_file
from lightning_idkd.errors import UserError, did_you_mean, require

KEYS = ("program", "method", "name", "metric", "parameters", "command", "run_cap", "description", "kind", "apiVersion")
SERVER = ("project", "entity", "early_terminate", "controller", "scheduler", "metrics", "job", "image_uri", "launch", "settings")
"""Keys that only W&B's server or its other programs read."""

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
"""The distributions of parameters and the keys that each takes."""
DEFAULTS = {"q": 1.0, "mu": 0.0, "sigma": 1.0, "a": 1.0, "b": 1.0}
ENTRIES = tuple(dict.fromkeys(["distribution", *itertools.chain(*DISTRIBUTIONS.values()), "parameters"]))

MACROS = ("env", "interpreter", "program", "args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags", "args_json",
          "args_json_file", "args_append_hydra", "args_override_hydra")  # fmt: skip
ARGUMENTS = {f"${{{name}}}" for name in MACROS if name.startswith("args")}


# ------------------------------------------------------------------ the file


def read(path: Path) -> dict:
    """A sweep file, with its keys checked."""
    try:
        sweep = yaml_file.read(path.read_text(encoding="utf-8"), yaml.SafeLoader)  # W&B's agents read YAML 1.1
    except FileNotFoundError as e:
        known = [f"{at}/{file.stem}{end}" for file in (CONFIGS / "sweeps").glob("*.yaml")
                 for at, end in (("configs/sweeps", ".yaml"), ("sweeps", ""))]  # fmt: skip
        raise UserError(f"there is no sweep file {path}.{did_you_mean(str(path), known)}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is no sweep file ({getattr(e, 'strerror', None) or 'not a text'})") from e
    except UserError as e:
        raise UserError(f"{path}, {e}") from e
    except yaml.YAMLError as e:
        raise UserError(f"{path} is no YAML: {' '.join(str(e).split())[:150]}") from e
    if not isinstance(sweep, dict):
        raise UserError(f"{path} holds no keys; a sweep file has {', '.join(KEYS)}")
    for key in sweep:
        known = did_you_mean(str(key), (*KEYS, *SERVER))
        require(key in (*KEYS, *SERVER), f"{path.name}: key", f"'{key}'", f"{', '.join(KEYS)}.{known}")
    for key in ("method", "parameters", "command"):
        if key not in sweep:
            raise UserError(f"{path.name}: the key '{key}' is missing")
    method, cap, name = sweep["method"], sweep.get("run_cap"), sweep.get("name", path.stem)
    require(method in ("grid", "random"), f"{path.name}: method", method, "grid, random (bayes and custom need W&B's server)")
    require(cap is None or (type(cap) is int and cap >= 1), f"{path.name}: run_cap", cap, "a number of cells, 1 or more")
    require(isinstance(name, str) and word(name).strip("._"), f"{path.name}: name", repr(name), "a text")
    command = sweep["command"]
    require(isinstance(command, list), f"{path.name}: command", command, "a list of words")
    for macro in (m[1] for m in (re.fullmatch(r"\$\{(.*)\}", str(part)) for part in command) if m):
        known = f"{', '.join(MACROS)}, envvar:NAME.{did_you_mean(macro, MACROS)}"
        require(macro in MACROS or macro.startswith("envvar:"), f"{path.name}: command", f"${{{macro}}}", known)
    if "fit" not in command or not ARGUMENTS & set(map(str, command)):
        raise UserError(
            f"{path.name}: command must hold fit and ${{args_json_file}} or ${{args}}, as in the sweeps that come with this"
        )
    check(sweep["parameters"], f"{path.name}: parameters")
    return sweep


def check(parameters: Any, where: str) -> None:
    """Refuse parameters, and those nested in them, that W&B's schema does not have; ``where`` they stand begins the sentence."""
    require(isinstance(parameters, dict) and parameters, where, parameters, "keys with their values")
    for key, entry in parameters.items():
        at = f"{where}.{key}"
        if not isinstance(entry, dict) or not entry:
            raise UserError(f"{at} has no values; allowed: {', '.join(ENTRIES)}")
        for k in entry:
            require(k in ENTRIES, f"{at}: key", f"'{k}'", f"{', '.join(ENTRIES)}.{did_you_mean(str(k), ENTRIES)}")
        ways = [way for way in ("value", "values", "min", "parameters") if way in entry]
        require(len(ways) < 2, at, " and ".join(ways), "one of value, values, min and max, or nested parameters")
        if "parameters" in entry:
            check(entry["parameters"], f"{at}.parameters")
        else:
            check_distribution(entry, at)


def check_distribution(entry: dict, at: str) -> None:
    """Refuse an entry whose keys are not those of its distribution, or have values out of range."""
    kind = distribution(entry, at)
    takes = DISTRIBUTIONS[kind]
    for k in entry:
        require(k in ("distribution", *takes), f"{at}: key", f"'{k}'", f"for distribution {kind}: {', '.join(takes)}")
    if missing := [k for k in takes if k not in entry and k not in DEFAULTS]:
        raise UserError(f"{at}: {' and '.join(missing)} missing, which distribution {kind} needs")
    values, chances = entry.get("values", [0]), entry.get("probabilities")
    require(isinstance(values, list) and values, f"{at}.values", values, "a list of one or more")
    if chances is not None:
        right = isinstance(chances, list) and len(chances) == len(values) and all(type(p) in (int, float) for p in chances)
        require(
            right and min(chances) >= 0 and sum(chances) > 0, f"{at}.probabilities", chances, "a number from 0 for every value"
        )
    for k in set(takes) & {*BOUNDS, *DEFAULTS}:
        number = entry.get(k, DEFAULTS.get(k))
        hint = " (YAML wants 1.0e-3, not 1e-3)" if isinstance(number, str) else ""
        whole = kind == "int_uniform"
        require(type(number) in ((int,) if whole else (int, float)), f"{at}.{k}", repr(number),
                f"a {'whole ' * whole}number{hint}")  # fmt: skip
        require(k in ("min", "max", "mu") or number > 0 or (k, number) == ("sigma", 0), f"{at}.{k}", number, "above 0")
    if "min" in takes:
        require(entry["min"] <= entry["max"], f"{at}.min", entry["min"], f"at most max, {entry['max']}")
        require(not kind.endswith("_values") or entry["min"] > 0, f"{at}.min", entry["min"], f"above 0 for {kind}")


def distribution(entry: dict, at: str = "parameters") -> str:
    """The distribution that an entry names, or that W&B takes for its keys."""
    if "distribution" in entry:
        known = f"{', '.join(DISTRIBUTIONS)}.{did_you_mean(str(entry['distribution']), DISTRIBUTIONS)}"
        require(entry["distribution"] in DISTRIBUTIONS, f"{at}.distribution", entry["distribution"], known)
        return entry["distribution"]
    if "values" in entry:
        return "categorical_w_probabilities" if "probabilities" in entry else "categorical"
    if "value" in entry:
        return "constant"
    if "min" in entry or "max" in entry:
        return "int_uniform" if all(type(entry.get(k)) is int for k in BOUNDS) else "uniform"
    raise UserError(f"{at}: give value, values, min and max, or a distribution")


def word(text: object) -> str:
    """A text as part of a folder's name."""
    return "".join(c if c.isalnum() or c in ".-+" else "_" for c in str(text))


# ------------------------------------------------------------------ its points


def combinations(sweep: dict) -> list[dict]:
    """The parameters of all cells, at most ``run_cap``: a grid's in the order of the file, or draws, the same every time."""
    entries, cap = dict(leaves(sweep["parameters"])), sweep.get("run_cap")
    if sweep["method"] == "grid":
        axes = [steps(entry, f"parameters.{'.'.join(path)}") for path, entry in entries.items()]
        return [nested(dict(zip(entries, point, strict=True))) for point in itertools.islice(itertools.product(*axes), cap)]
    if cap is None:
        raise UserError("run_cap is missing: how many random cells?")
    rng = random.Random(0)
    return [nested({path: draw(entry, rng) for path, entry in entries.items()}) for _ in range(cap)]


def leaves(parameters: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Every parameter and its entry, by the path of those it is nested in."""
    for key, entry in parameters.items():
        if "parameters" in entry:
            yield from leaves(entry["parameters"], (*path, key))
        else:
            yield (*path, key), entry


def nested(point: dict[tuple[str, ...], Any]) -> dict:
    """Values by their paths as W&B gives them to a run: those of nested parameters in a dict."""
    found: dict = {}
    for (*path, key), value in point.items():
        below = found
        for part in path:
            below = below.setdefault(part, {})
        below[key] = value
    return found


def steps(entry: dict, at: str) -> list:
    """The values of a parameter in a grid."""
    kind = distribution(entry, at)
    if kind in ("constant", "categorical"):
        return entry.get("values", [entry.get("value")])
    if kind == "int_uniform":
        return list(range(entry["min"], entry["max"] + 1))
    if kind == "q_uniform":  # without max, as W&B has it
        q = entry.get("q", DEFAULTS["q"])
        return [multiple(entry["min"], i, q) for i in range(math.ceil((entry["max"] - entry["min"]) / q))]
    raise UserError(f"{at}: a grid needs values, or distribution int_uniform or q_uniform; {kind} is for method random")


def draw(entry: dict, rng: random.Random) -> Any:
    """A value from the distribution of a parameter."""
    kind, given = distribution(entry), DEFAULTS | entry
    low, high, mu, sigma = (given.get(k, math.nan) for k in ("min", "max", "mu", "sigma"))
    base = kind.removeprefix("q_")
    if base in ("constant", "categorical"):
        return rng.choice(given["values"] if base == "categorical" else [given["value"]])
    if base == "categorical_w_probabilities":
        return rng.choices(given["values"], given["probabilities"])[0]
    if base == "int_uniform":
        return rng.randint(low, high)
    if base == "uniform":
        found = rng.uniform(low, high)
    elif base == "log_uniform":  # bounds are exponents
        found = math.exp(rng.uniform(low, high))
    elif base == "inv_log_uniform":
        found = math.exp(-rng.uniform(low, high))
    elif base in ("log_uniform_values", "inv_log_uniform_values"):  # x has the distribution of 1 / x between inverted bounds
        found = math.exp(rng.uniform(math.log(low), math.log(high)))
    elif base in ("normal", "log_normal"):
        found = rng.normalvariate(mu, sigma)
        found = math.exp(found) if base == "log_normal" else found
    else:
        found = rng.betavariate(given["a"], given["b"])
    return multiple(0, round(found / given["q"]), given["q"]) if kind != base else found


def multiple(start: float, times: int, q: float) -> float:
    """``start`` + ``times`` q, without the last digits of a float that only rounding makes."""
    found = start + times * q
    return found if isinstance(found, int) else float(f"{found:.12g}")


# ------------------------------------------------------------------ its command


def expand(command: list, parameters: dict, file: Path | str, program: str = "") -> list[str]:
    """The command of a cell as an agent of W&B starts it (``create_sweep_command`` and ``_command_run`` there).

    Values are written as Python writes them, such as None and True; ``file`` holds the parameters as JSON.
    """
    flags = [f"{k}={v}" for k, v in parameters.items()]
    known = {
        "env": ["/usr/bin/env"],
        "interpreter": ["python"],
        "program": [program],
        "args": [f"--{flag}" for flag in flags],
        "args_no_equals": [word for k, v in parameters.items() for word in (f"--{k}", str(v))],
        "args_no_hyphens": flags,
        "args_no_boolean_flags": [f"--{k}" if v is True else f"--{k}={v}" for k, v in parameters.items() if v is not False],
        "args_json": [json.dumps(parameters)],
        "args_json_file": [str(file)],
        "args_append_hydra": [f"+{flag}" for flag in flags],
        "args_override_hydra": [f"++{flag}" for flag in flags],
    }
    words = [re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", lambda m: os.environ.get(m[1], m[1]), str(part)) for part in command]
    return [w for part in words for w in (known.get(part[2:-1], []) if part.startswith("${") and part.endswith("}") else [part])]
