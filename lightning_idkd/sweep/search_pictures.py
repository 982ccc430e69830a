"""Draws what a search has learnt: the importance of its parameters, and its trials as lines over them."""

from __future__ import annotations

import functools
import json
import math
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from lightning_idkd import colours
from lightning_idkd.files import write
from lightning_idkd.records.pictures import make_figure
from lightning_idkd.sweep.plan import describe_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

STORAGE = "search.db"
"""The file of Optuna in the folder of a sweep."""
STUDY = "sweep"
"""The name of the study in it. Optuna draws a trial's bracket from this name and the trial's number."""
FEWEST = 2
"""Trials that have ended, below which there is nothing to draw."""
LONGEST = 24
"""Characters of a category in a picture."""


def write_search_pictures(folder: Path | str) -> list[Path]:
    """Draw the search in the folder of a sweep into it: ``importance.svg`` and ``trials.svg``, each as PNG too.

    Returns:
        The files; none for a sweep that is no search, has fewer than two trials that ended, or varies no parameter.

    Raises:
        UserError: the folder cannot be written.
    """
    file = Path(folder) / STORAGE
    study = read_study(file)
    if study is None:
        return []
    from matplotlib import rc_context

    try:
        with rc_context({"text.parse_math": False}):  # a name may have a $
            figures = draw_study(study)
    except (LookupError, TypeError, ValueError, AttributeError):
        print(f"'{file}' is not drawn: it is damaged, or not that of a sweep", file=sys.stderr)
        return []
    files = []
    for name, figure in figures.items():
        for kind in ("svg", "png"):
            file = Path(folder) / f"{name}.{kind}"
            write(file, lambda part, f=figure, kind=kind: f.savefig(part, dpi=120, format=kind), "--dir")
            files.append(file)
    return files


def draw_study(study: Study) -> dict[str, Figure]:
    """Draw a study, by the names of the pictures; nothing of one with too few trials or without varied parameters."""
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    pruned = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    names = done[0].distributions if done else ()
    keys = [key for key in names if not all(trial.distributions[key].single() for trial in done)]
    if len(done) < FEWEST or not keys:
        return {}
    metric, goal = study.user_attrs["sweep"]["metric"]["name"], study.user_attrs["sweep"]["metric"]["goal"]
    figures = {"trials": draw_trials(done, pruned, keys, metric, goal)}
    if len({trial.value for trial in done}) > 1:
        figures = {"importance": draw_importance(rank_parameters(study, keys), metric, len(done))} | figures
    return figures


def read_study(file: Path) -> Study | None:
    """Read a study from its file, without writing to it; None if there is none, with a sentence why if there is a
    file."""
    if not file.exists():
        return None
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        print(f"'{file}' is not drawn: pip install lightning-idkd[search]", file=sys.stderr)
        return None
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return optuna.load_study(study_name=STUDY, storage=open_storage(file, "ro"))
    except (KeyError, RuntimeError, optuna.exceptions.OptunaError, SQLAlchemyError) as e:
        print(f"'{file}' is not drawn: {explain(e)}", file=sys.stderr)
        return None
    finally:
        optuna.logging.set_verbosity(verbosity)


def open_storage(file: Path, mode: str) -> BaseStorage:
    """Open Optuna's storage in a file; the ``mode`` is ``ro`` to read only, or ``rwc`` to make it unless it exists."""
    from optuna.storages import RDBStorage
    from sqlalchemy.pool import QueuePool

    # an address of SQLAlchemy would take the signs # ? % of a path for its own
    address = f"file:{quote(str(file.resolve()))}?mode={mode}"
    connect = functools.partial(sqlite3.connect, address, uri=True, timeout=60, check_same_thread=False)
    return RDBStorage("sqlite://", {"creator": connect, "poolclass": QueuePool})


def explain(error: Exception) -> str:
    """The reason for an error of Optuna or of its database, in a line."""
    return (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0]


def rank_parameters(study: Study, keys: list[str]) -> dict[str, float]:
    """The importance of parameters by Optuna (PED-ANOVA), which sums to 1, the largest first."""
    from optuna.importance import get_param_importances

    shares = get_param_importances(study, params=keys)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def draw_importance(shares: dict[str, float], metric: str, trials: int) -> Figure:
    """Draw a bar for the importance of every parameter.

    Args:
        trials: the number of trials that ended.
    """
    figure = make_figure(3.5 + 0.07 * max(map(len, shares)) + 1.5, 1.2 + 0.32 * len(shares))
    label = f"share of the effect on {metric}\n(PED-ANOVA, {trials} trials)"
    axes = figure.add_subplot(xlabel=label, xlim=(0, max(shares.values()) * 1.15))
    bars = axes.barh(list(shares), list(shares.values()), color=colours.BLUE, height=0.65)
    axes.bar_label(bars, [f"{share:.0%}" for share in shares.values()], padding=3, fontsize="small")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_trials(done: list[FrozenTrial], pruned: list[FrozenTrial], keys: list[str], metric: str, goal: str) -> Figure:
    """Draw every trial as a line over parallel axes: its parameters, and at the right its result.

    The shade is the result's rank, the best trial is orange, and trials that were pruned are grey and end before the
    result.
    """
    from matplotlib.colors import Normalize

    sign = 1 if goal == "maximize" else -1
    ordered = sorted(done, key=lambda trial: sign * trial.value)
    places = {key: Scale([trial.distributions[key] for trial in (*done, *pruned)]) for key in keys}
    values = [trial.value for trial in done]
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 0.5
    result = Normalize(low - pad, high + pad)
    figure = make_figure(2.2 + 1.7 * len(keys), 4.2)
    axes = figure.add_subplot(xlim=(-0.1, len(keys) + 0.1), ylim=(-0.02, 1.02))
    for trial in pruned:
        heights = [places[key].place(trial.params[key]) for key in keys]
        axes.plot(heights, color="0.75", linewidth=0.8, linestyle="--", zorder=1)
    norm = Normalize(-0.3 * len(ordered), max(len(ordered) - 1, 1))  # the worst is no white line
    for rank, trial in enumerate(ordered):
        best = rank == len(ordered) - 1
        heights = [*(places[key].place(trial.params[key]) for key in keys), float(result(trial.value))]
        colour = colours.ORANGE if best else colours.shades()(norm(rank))
        axes.plot(heights, color=colour, linewidth=2.2 if best else 1.1, zorder=3 + best)
    for i, key in enumerate(keys):
        draw_axis(axes, i, places[key].ticks(), key)
    ticks = [(float(result(value)), f"{value:.4g}") for value in np.linspace(low, high, 5 if high > low else 1)]
    draw_axis(axes, len(keys), ticks, metric)
    axes.set_axis_off()
    about = f"{len(done)} trials, best {sign * max(sign * v for v in values):.4g} (orange, trial {ordered[-1].number})"
    about += f"; {len(pruned)} pruned (dashed)" if pruned else ""
    axes.set_title(f"{about}; darker is better", fontsize="small", pad=26)
    return figure


def draw_axis(axes: Axes, x: int, ticks: list[tuple[float, str]], heading: str) -> None:
    """Draw a vertical axis at ``x``, with its heading above."""
    axes.plot([x, x], [0, 1], color="0.2", linewidth=1, zorder=5)
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    for height, text in ticks:
        axes.plot([x - 0.02, x], [height, height], color="0.2", linewidth=1, zorder=5)
        axes.text(x - 0.03, height, text, ha="right", va="center", fontsize="x-small", zorder=6, bbox=box)
    axes.text(x, 1.05, heading, ha="center", va="bottom", fontsize="small")


class Scale:
    """Places the values of a parameter between 0 and 1, given its distribution in every trial."""

    def __init__(self, distributions: list[Any]):
        self.choices = list(getattr(distributions[0], "choices", ()))
        if not self.choices:
            self.log = distributions[0].log
            self.low, self.high = (
                self.stretch(min(d.low for d in distributions)),
                self.stretch(max(d.high for d in distributions)),
            )

    def stretch(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def place(self, value: Any) -> float:
        """The height of a value."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        return (self.stretch(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and texts of the axis."""
        if self.choices:
            texts = [describe_value(json.loads(choice)) for choice in self.choices]
            return [((i + 0.5) / len(texts), shorten(text)) for i, text in enumerate(texts)]
        values = np.linspace(self.low, self.high, 5)
        return [((v - self.low) / (self.high - self.low), f"{10**v if self.log else v:.3g}") for v in values]


def shorten(text: str) -> str:
    """Cut a long text."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
