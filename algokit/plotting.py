"""The book's look for matplotlib: one style, colours safe for colour-blind readers, and helpers shared by chapters.

Needs matplotlib, which comes with the extra ``book`` and with Colab.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from algokit.checks import check_array, check_float, check_same_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLORS", "fit_slope", "slope_guide", "spread", "use_book_style"]

#: Okabe and Ito's palette (2008), in the order in which the book uses it: ours first, the baseline second.
COLORS = {
    "blue": "#0072B2",
    "orange": "#D55E00",
    "green": "#009E73",
    "purple": "#AA4499",
    "amber": "#E69F00",
    "sky": "#56B4E9",
    "grey": "#6B7280",
}


def use_book_style() -> None:
    """Set matplotlib's defaults to the book's: readable at phone width, on a white card in dark mode."""
    import matplotlib as mpl
    from cycler import cycler

    mpl.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 100,
            "savefig.dpi": 130,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.bbox": "tight",
            "font.size": 11,
            "axes.titlesize": 11.5,
            "axes.titlelocation": "left",
            "axes.labelsize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#4B5563",
            "axes.grid": True,
            "grid.color": "#E5E7EB",
            "grid.linewidth": 0.8,
            "axes.axisbelow": True,
            "axes.prop_cycle": cycler(color=list(COLORS.values())),
            "lines.linewidth": 1.9,
            "lines.markersize": 5,
            "legend.frameon": False,
            "legend.fontsize": 10,
            "image.cmap": "viridis",
            "svg.hashsalt": "papers-executed",
        }
    )


def fit_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y against log x: the exponent of a power law.

    Parameters
    ----------
    x, y : array-like, shape (n,)
        Positive, n >= 2.

    Returns
    -------
    float
        The exponent.

    Raises
    ------
    ValueError
        If a value is not positive, or the lengths differ.

    Examples
    --------
    >>> round(fit_slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    x = check_array(x, "x", ndim=1, min_size=2, low=0, open_low=True)
    y = check_array(y, "y", ndim=1, min_size=2, low=0, open_low=True)
    check_same_length(x=x, y=y)
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def slope_guide(ax: Axes, x: Sequence[float], y0: float, slope: float, label: str | None = None) -> None:
    """Dashed line of the predicted slope on log-log axes, through ``(x[0], y0)``.

    Parameters
    ----------
    ax : matplotlib Axes
        Where to draw; set to log-log.
    x : array-like, shape (n,)
        Positive, n >= 2: the line spans from the first to the last.
    y0 : float
        Positive height at ``x[0]``.
    slope : float
        Predicted exponent.
    label : str, optional
        Text for the legend, such as ``"slope 2"``.

    Raises
    ------
    ValueError
        If a value is not positive.
    """
    x = check_array(x, "x", ndim=1, min_size=2, low=0, open_low=True)
    y0 = check_float(y0, "y0", low=0, open_low=True)
    slope = check_float(slope, "slope")
    ends = np.array([x[0], x[-1]])
    ax.loglog(ends, y0 * (ends / ends[0]) ** slope, ls="--", color=COLORS["grey"], lw=1.2, label=label)


def spread(ax: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], *, label: str, color: str) -> None:
    """Median over runs as a line, with the full range as a band.

    Parameters
    ----------
    ax : matplotlib Axes
        Where to draw.
    x : array-like, shape (n,)
        Abscissa.
    runs : array-like, shape (r, n)
        One row per seed.
    label : str
        Text for the legend.
    color : str
        A key of :data:`COLORS` or any matplotlib colour.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    x = check_array(x, "x", ndim=1)
    rows = check_array(runs, "runs", shape=(None, len(x)))
    color = COLORS.get(color, color)
    ax.plot(x, np.median(rows, axis=0), marker="o", color=color, label=label)
    ax.fill_between(x, rows.min(axis=0), rows.max(axis=0), color=color, alpha=0.18, lw=0)
