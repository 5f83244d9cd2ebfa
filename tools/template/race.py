"""Race of compensated summation against the exact sum of Python's standard library.

make bench PART=__PART__ SLUG=__SLUG__
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from algokit.__PART__.__SLUG__ import compensated_sum
from algokit.races import Contestant, Race, race, write_results


def terms() -> np.ndarray:
    """A million normal numbers."""
    return np.random.default_rng(0).normal(size=1_000_000)


def main() -> list[Race]:
    """One race."""
    return [
        race(
            "a million float64 terms",
            data=terms,
            ours=Contestant("algokit", compensated_sum),
            peers=[Contestant("math.fsum", math.fsum)],
            agree=lambda a, b: abs(a - b) < 1e-9,
            agreement="sums equal to 1e-9",
        )
    ]


if __name__ == "__main__":
    write_results("__PART__", "__SLUG__", main(), folder=Path(__file__).parents[1] / "results")
