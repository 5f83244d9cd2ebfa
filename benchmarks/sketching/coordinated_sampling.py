"""Race of coordinated sampling against the exact sparse product, and against linear sketches at equal memory.

    make bench PART=sketching SLUG=coordinated_sampling

Two sparse tables of a million rows, five non-zeros each, 2 % of the rows heavy, 60 % of the rows on each side. All
estimates are compared with the exact product: nobody may be less accurate than is said under "agreement".
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.linalg import clarkson_woodruff_transform
from sklearn.random_projection import GaussianRandomProjection

from algokit.races import Contestant, Race, race, write_results
from algokit.sketching.coordinated_sampling import sketch_rows, sketched_product

N, D, S = 1_000_000, 200, 5
MEMORY = 50  # rows of a linear sketch
SIZE = MEMORY * D // (2 * S + 1)  # rows of ours: as many numbers


class Tables(NamedTuple):
    """Both tables, their product, and the unit of error."""

    A: sp.csr_array
    B: sp.csr_array
    exact: np.ndarray
    unit: float


@functools.cache
def tables(n: int = N) -> Tables:
    """Correlated sparse tables with missing rows."""
    rng = np.random.default_rng(0)
    columns = (rng.integers(0, D // S, (n, S)) + np.arange(S) * (D // S)).astype(np.int32)
    a = rng.normal(size=(n, S))
    b = a + rng.normal(size=(n, S))
    size = np.where(rng.random((n, 1)) < 0.02, 10.0, 1.0)
    made = []
    for values in (a, b):
        csr = sp.csr_array(
            ((size * values * (rng.random((n, 1)) < 0.6)).ravel(), columns.ravel(), S * np.arange(n + 1)), shape=(n, D)
        )
        csr.eliminate_zeros()
        made.append(csr)
    A, B = made
    unit = float(np.sqrt(np.sum(A.data**2) * np.sum(B.data**2)))
    return Tables(A, B, (A.T @ B).toarray(), unit)


def dense(W: Any) -> np.ndarray:
    """A product as a NumPy array."""
    return W.toarray() if sp.issparse(W) else np.asarray(W)


def ours(t: Tables) -> np.ndarray:
    """Both sketches and the estimate."""
    return dense(sketched_product(sketch_rows(t.A, SIZE, seed=0), sketch_rows(t.B, SIZE, seed=0)))


def exact(t: Tables) -> np.ndarray:
    """SciPy's sparse product."""
    return dense(t.A.T @ t.B)


def scipy_countsketch(t: Tables) -> np.ndarray:
    """Both sketches by SciPy (the same seed gives the same map), and their product."""
    SA, SB = (clarkson_woodruff_transform(T, MEMORY, rng=1) for T in (t.A, t.B))
    return dense(SA).T @ dense(SB)


def gaussian(t: Tables) -> np.ndarray:
    """scikit-learn's Gaussian projection of the columns of A and B: drawing the matrix, too."""
    project = GaussianRandomProjection(MEMORY, random_state=0).fit(t.A.T)
    return np.asarray(project.transform(t.A.T)) @ np.asarray(project.transform(t.B.T)).T


def close(t: Tables, largest: float) -> Any:
    """Whether our error is at most ``largest``, and the peer's at most 0.3."""

    def agree(mine: np.ndarray, theirs: np.ndarray) -> bool:
        errors = [float(np.linalg.norm(W - t.exact)) / t.unit for W in (mine, theirs)]
        return errors[0] <= largest and errors[1] <= 0.3

    return agree


def main() -> list[Race]:
    """The product from a million rows; a tenth of that for the dense projection, whose matrix would not fit well."""
    big, small = tables(), tables(N // 10)
    return [
        race(
            f"product of two tables, {N:,} rows, {D} columns, {S} non-zeros a row",
            data=tables,
            ours=Contestant("algokit, priority sampling", ours),
            peers=[
                Contestant("SciPy A.T @ B (exact)", exact, "scipy"),
                Contestant("SciPy clarkson_woodruff_transform", scipy_countsketch, "scipy"),
            ],
            agree=close(big, 0.05),
            agreement="our error at most 0.05 of |A| |B| (CountSketch, same memory: at most 0.3)",
            runs=5,
        ),
        race(
            f"product of two tables, {N // 10:,} rows, {D} columns, {S} non-zeros a row",
            data=lambda: small,
            ours=Contestant("algokit, priority sampling", ours),
            peers=[
                Contestant("SciPy A.T @ B (exact)", exact, "scipy"),
                Contestant("SciPy clarkson_woodruff_transform", scipy_countsketch, "scipy"),
                Contestant("scikit-learn GaussianRandomProjection", gaussian, "scikit-learn"),
            ],
            agree=close(small, 0.05),
            agreement="our error at most 0.05 of |A| |B| (linear sketches, same memory: at most 0.3)",
            runs=5,
        ),
    ]


if __name__ == "__main__":
    write_results("sketching", "coordinated_sampling", main(), folder=Path(__file__).parents[1] / "results")
