"""Plotting helpers draw what their docstrings say."""

from __future__ import annotations

import numpy as np
import pytest

from algokit.plotting import COLORS, fit_slope, slope_guide, spread, use_book_style

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

EXAMPLES = {"fit_slope": dict(x=np.array([1.0, 2.0, 4.0]), y=np.array([1.0, 4.0, 16.0]))}


@pytest.fixture
def ax():
    import matplotlib.pyplot as plt

    with matplotlib.rc_context():
        use_book_style()
        figure, axes = plt.subplots()
        yield axes
        plt.close(figure)


def test_fit_slope_recovers_an_exponent():
    x = np.array([1.0, 3.0, 10.0])
    assert fit_slope(x, 7 * x**-1.5) == pytest.approx(-1.5)


def test_slope_guide_has_the_slope(ax):
    slope_guide(ax, [10, 100, 1000], 5.0, 2.0, label="slope 2")
    x, y = ax.lines[0].get_data()
    assert fit_slope(x, y) == pytest.approx(2.0) and y[0] == 5.0 and ax.get_xscale() == "log"


def test_spread_draws_the_median_and_the_range(ax):
    spread(ax, [1, 2], [[1, 5], [2, 6], [9, 7]], label="three seeds", color="orange")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2, 6])
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 1 and band[:, 1].max() == 9 and ax.lines[0].get_color() == COLORS["orange"]
    with pytest.raises(ValueError, match="runs"):
        spread(ax, [1, 2, 3], [[1, 2]], label="", color="blue")


def test_style_is_set_and_colours_are_distinct():
    with matplotlib.rc_context():
        use_book_style()
        assert matplotlib.rcParams["axes.spines.top"] is False
    assert len(set(COLORS.values())) == len(COLORS)
