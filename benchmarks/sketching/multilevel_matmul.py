"""Race of the multilevel product against the exact one, for smooth factors with a long inner dimension.

    make bench PART=sketching SLUG=multilevel_matmul

The rows of both factors are random sums of waves with a little noise. The multilevel product must be within 1 % of the
exact one in the Frobenius norm. Both may use one thread: ours does, and on a machine that is shared a product on all
threads would be a race of schedulers.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from algokit.races import Contestant, Race, race, write_results
from algokit.sketching.multilevel_matmul import basic_matmul, multilevel_matmul

M, N, BUDGET = 400, 262_144, 512


def waves(seed: int, dtype: Any) -> np.ndarray:
    """Random combinations of sixteen waves over a unit of time, and white noise of 1 % of their size, shape (M, N)."""
    rng = np.random.default_rng(seed)
    t = np.arange(N) / N
    basis = np.stack([np.sin(2 * np.pi * k * t + rng.uniform(0, 6)) / k for k in range(1, 17)]).astype(dtype)
    return rng.normal(size=(M, 16)).astype(dtype) @ basis + dtype(0.01) * rng.standard_normal((M, N), dtype)


@functools.cache
def factors(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """A, shape (M, N), and B, shape (N, M), both in C order."""
    return waves(0, dtype), np.ascontiguousarray(waves(1, dtype).T)


def ours(data: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Multilevel product of 512 outer products."""
    return multilevel_matmul(*data, budget=BUDGET, rng=0).product


def exact(data: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """NumPy, which is BLAS."""
    return data[0] @ data[1]


def within_one_percent(mine: np.ndarray, theirs: np.ndarray) -> bool:
    """Relative Frobenius distance of at most 1 %."""
    return bool(np.linalg.norm(mine - theirs) <= 0.01 * np.linalg.norm(theirs))


def main() -> list[Race]:
    """Both precisions."""
    races = []
    with threadpool_limits(1):
        for dtype in (np.float64, np.float32):
            data = factors(dtype)
            product = exact(data)
            columns = [
                float(np.linalg.norm(basic_matmul(*data, BUDGET, rng=s) - product) / np.linalg.norm(product))
                for s in range(3)
            ]
            races.append(
                race(
                    f"product ({M} x {N:,}) ({N:,} x {M}), smooth factors, {np.dtype(dtype).name}",
                    data=lambda dtype=dtype: factors(dtype),  # type: ignore[misc]
                    ours=Contestant(f"algokit, multilevel, {BUDGET} outer products", ours),
                    peers=[Contestant("NumPy A @ B (exact), one thread", exact, "numpy")],
                    agree=within_one_percent,
                    agreement="within 1 % of the exact product, Frobenius norm",
                    runs=5,
                    note=f"Column sampling with as many outer products is off by {np.median(columns):.1%}.",
                )
            )
            factors.cache_clear()
    return races


if __name__ == "__main__":
    write_results("sketching", "multilevel_matmul", main(), folder=Path(__file__).parents[1] / "results")
