"""Colours that people with and without colour blindness can distinguish."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

CLASSES = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
"""Ten colours for adjacent classes (Petroff, 2021, arXiv 2107.02270)."""
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
"""Four colours for lines (Okabe and Ito, 2008)."""


@functools.cache
def shades() -> Colormap:
    """A colour map for amounts: exactly white for 0, then darker and darker through green to blue."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    dark = colormaps["YlGnBu"]([0.14, 0.28, 0.42, 0.56, 0.7, 0.85, 1.0])
    return LinearSegmentedColormap.from_list("shades", ["white", *dark])


def choose_text_colour(background) -> str:
    """Black or white, whichever has more contrast with the colour ``background`` (r, g, b[, a]), values in 0 to 1."""
    red, green, blue = background[:3]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
