"""Race of the Bures-Wasserstein barycentre against POT and pyRiemann, and of distances against both.

    make bench PART=matrices SLUG=spd_normalization

POT iterates G <- mean (G^{1/2} X G^{1/2})^{1/2}, which has the same fixed point as our map and converges at half its
rate or worse; pyRiemann iterates the same map as we do.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import ot
from pyriemann.geometry.distance import distance_wasserstein
from pyriemann.geometry.mean import mean_wasserstein

from algokit.matrices.spd_normalization import bw_distance, bw_mean
from algokit.races import Contestant, Race, race, write_results


def batch(N: int = 500, n: int = 20) -> np.ndarray:
    """Covariances of 2n Gaussian samples each, shape (N, n, n)."""
    A = np.random.default_rng(0).normal(size=(N, n, 2 * n))
    return A @ A.transpose(0, 2, 1) / (2 * n)


def ours(X: np.ndarray) -> np.ndarray:
    """algokit, to a relative change of 1e-9."""
    return bw_mean(X, tol=1e-9)


def pot(X: np.ndarray) -> np.ndarray:
    """POT; its tolerance is absolute, and 1e-7 leaves an error of 4e-8."""
    return ot.gaussian.bures_wasserstein_barycenter(np.zeros(X.shape[:2]), X, eps=1e-7)[1]


def pyriemann(X: np.ndarray) -> np.ndarray:
    """pyRiemann, the same map as ours."""
    return mean_wasserstein(X, tol=1e-9)


def our_distances(X: np.ndarray) -> np.ndarray:
    """All matrices to the first, in one call."""
    return np.asarray(bw_distance(X, X[0]))


def pot_distances(X: np.ndarray) -> np.ndarray:
    """POT takes one pair a call."""
    zero = np.zeros(X.shape[-1])
    return np.array([ot.gaussian.bures_wasserstein_distance(zero, zero, x, X[0]) for x in X])


def pyriemann_distances(X: np.ndarray) -> np.ndarray:
    """pyRiemann, in one call."""
    return distance_wasserstein(X, X[0])


def main() -> list[Race]:
    """Barycentre and distances."""
    warnings.simplefilter("ignore")  # the distance of a matrix to itself is the root of a rounding error
    return [
        race(
            "barycentre of 500 matrices, n = 20",
            data=batch,
            ours=Contestant("algokit bw_mean", ours),
            peers=[
                Contestant("POT bures_wasserstein_barycenter", pot, "pot"),
                Contestant("pyRiemann mean_wasserstein", pyriemann, "pyriemann"),
            ],
            agree=lambda a, b: bool(np.abs(a - b).max() < 1e-6),
            agreement="largest difference below 1e-6",
            note="Nine tenths of our time is LAPACK's: 500 eigendecompositions an iteration, as in pyRiemann, which "
            "iterates the same map. We stop an iteration sooner, by an estimate of the error that is left.",
        ),
        race(
            "500 distances, n = 20",
            data=batch,
            ours=Contestant("algokit bw_distance", our_distances),
            peers=[
                Contestant("POT bures_wasserstein_distance", pot_distances, "pot"),
                Contestant("pyRiemann distance_wasserstein", pyriemann_distances, "pyriemann"),
            ],
            agree=lambda a, b: bool(np.allclose(a, np.nan_to_num(b), atol=1e-6)),
            agreement="equal to 1e-6",
        ),
    ]


if __name__ == "__main__":
    write_results("matrices", "spd_normalization", main(), folder=Path(__file__).parents[1] / "results")
