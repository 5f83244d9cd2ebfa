"""Race of MEHA for the elastic net: against grids and random search with scikit-learn, and against its own plain form.

    make bench PART=bilevel SLUG=moreau_envelope

All choose the two penalties of an elastic net on the same validation rows, and agree when their validation errors are
within 3 % of ours. scikit-learn is given the precomputed Gram matrix, and along a path its warm starts.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNet, enet_path
from threadpoolctl import threadpool_limits

from algokit.bilevel.moreau_envelope import CompositeBilevelProblem, MehaElasticNetCV, meha, prox_elastic_net
from algokit.races import Contestant, Race, race, write_results


class Split(NamedTuple):
    """Training and validation rows of a sparse linear model, centred."""

    X: np.ndarray
    y: np.ndarray
    X_val: np.ndarray
    y_val: np.ndarray


def split(n: int, d: int) -> Split:
    """AR(1/2) design, a tenth of the coefficients not zero, signal-to-noise ratio 2."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(2 * n, d))
    for j in range(1, d):
        X[:, j] = 0.5 * X[:, j - 1] + np.sqrt(0.75) * X[:, j]
    w = np.zeros(d)
    w[rng.permutation(d)[: d // 10]] = rng.normal(size=d // 10)
    signal = X @ w
    y = signal + rng.normal(size=2 * n) * np.sqrt(signal.var() / 2)
    return Split(X[:n] - X[:n].mean(axis=0), y[:n] - y[:n].mean(), X[n:] - X[:n].mean(axis=0), y[n:] - y[:n].mean())


def error(data: Split, coef: np.ndarray) -> float:
    """Validation error."""
    return float(np.mean((data.X_val @ coef - data.y_val) ** 2))


def ours(data: Split) -> float:
    """One run, then one exact fit."""
    model = MehaElasticNetCV().fit(data.X, data.y, X_val=data.X_val, y_val=data.y_val)
    return error(data, model.coef_)


def plain(data: Split) -> float:
    """The same iteration by the general function, on NumPy arrays."""
    n, m = len(data.X), len(data.X_val)
    G, h = data.X.T @ data.X / n, data.X.T @ data.y / n
    V, q = data.X_val.T @ data.X_val / m, data.X_val.T @ data.y_val / m
    problem = CompositeBilevelProblem(
        F=lambda x, y: 0.0,
        f=lambda x, y: 0.0,
        dF=lambda x, y: (0 * x, V @ y - q),
        df=lambda x, y: (0 * x, G @ y - h),
        g=lambda x, y: 0.0,
        dg_dx=lambda x, y: np.array([abs(y).sum(), 0.5 * (y * y).sum()]),
        prox_g=lambda x, y, step: prox_elastic_net(y, step * x[0], step * x[1]),
        project_x=lambda x: np.clip(x, 1e-4, 10),
    )
    eta = 1 / (1.02 * np.linalg.eigvalsh(G)[-1] + 1)
    options = dict(alpha=0.2, beta=eta / 2, eta=eta, gamma=1.0, c0=10.0, p=0.3, max_iter=6000, record_every=6000)
    x = meha(problem, np.full(2, 0.5), np.zeros(len(h)), **options).x
    fit = ElasticNet(alpha=x.sum(), l1_ratio=x[0] / x.sum(), fit_intercept=False, max_iter=10_000)
    return error(data, fit.fit(data.X, data.y).coef_)


def fits(data: Split, pairs: Any) -> float:
    """Best validation error over one exact fit per pair (alpha, l1_ratio)."""
    gram = data.X.T @ data.X
    best = np.inf
    for alpha, ratio in pairs:
        model = ElasticNet(alpha=alpha, l1_ratio=ratio, fit_intercept=False, precompute=gram, max_iter=10_000)
        best = min(best, error(data, model.fit(data.X, data.y).coef_))
    return best


ALPHAS, RATIOS = np.geomspace(3, 0.03, 10), np.linspace(0.1, 1, 10)


def grid(data: Split) -> float:
    """100 fits on a grid."""
    return fits(data, [(a, r) for a in ALPHAS for r in RATIOS])


def random_search(data: Split) -> float:
    """100 fits at random."""
    rng = np.random.default_rng(0)
    return fits(data, zip(np.exp(rng.uniform(np.log(0.03), np.log(3), 100)), rng.uniform(0.1, 1, 100), strict=True))


def paths(data: Split) -> float:
    """The same grid as ten warm-started paths."""
    gram, h = data.X.T @ data.X, data.X.T @ data.y
    best = np.inf
    for ratio in RATIOS:
        coefs = enet_path(data.X, data.y, l1_ratio=ratio, alphas=ALPHAS, precompute=gram, Xy=h, max_iter=10_000)[1]
        best = min(best, *(error(data, c) for c in coefs.T))
    return best


def main() -> list[Race]:
    """Two sizes."""
    return [
        race(
            f"elastic net, two penalties: {n} + {n} rows, {d} features",
            data=lambda n=n, d=d: split(n, d),
            ours=Contestant("algokit MehaElasticNetCV", ours),
            peers=[
                Contestant("same iteration, NumPy", plain, "numpy"),
                Contestant("scikit-learn, grid of 100 fits", grid, "scikit-learn"),
                Contestant("scikit-learn, 100 random fits", random_search, "scikit-learn"),
                Contestant("scikit-learn, ten warm-started paths of ten", paths, "scikit-learn"),
            ],
            agree=lambda a, b: a <= 1.03 * b,
            agreement="our validation error at most 1.03 times theirs",
            runs=5,
        )
        for n, d in ((100, 150), (400, 800))
    ]


if __name__ == "__main__":
    warnings.simplefilter("ignore", ConvergenceWarning)
    with threadpool_limits(1):
        races = main()
    write_results("bilevel", "moreau_envelope", races, folder=Path(__file__).parents[1] / "results")
