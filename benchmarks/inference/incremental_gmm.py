"""Race: the incremental mixture against batch EM, against ridge regression refitted, and against plain NumPy.

    python benchmarks/inference/incremental_gmm.py

Runs in about a minute and a half on two cores; writes benchmarks/results/inference/incremental_gmm.json.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.linalg
from scipy.special import chdtri
from sklearn.linear_model import Ridge
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

from algokit.inference.incremental_gmm import IncrementalGaussianMixture
from algokit.races import Contestant, Limit, Race, copy_bandwidth, race, write_results

RESULTS = Path(__file__).parents[1] / "results"

Answer = np.ndarray


# ---- a stream of six groups: held-out likelihood, against batch EM that knows the number of groups ----


def _groups() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    K, D, n = 6, 8, 60_000
    means = rng.normal(0, 8, (K, D))
    roots = np.linalg.qr(rng.standard_normal((K, D, D)))[0] * rng.uniform(0.5, 2.5, (K, 1, D))
    z = rng.integers(K, size=n)
    X = means[z] + np.einsum("nij,nj->ni", roots[z], rng.standard_normal((n, D)))
    return X[:50_000], X[50_000:]


def _ours_on_groups(data: tuple[np.ndarray, np.ndarray]) -> float:
    return IncrementalGaussianMixture(delta=0.3, beta=0.001).fit(data[0]).score(data[1])


def _em_on_groups(data: tuple[np.ndarray, np.ndarray]) -> float:
    return float(GaussianMixture(6, random_state=0).fit(data[0]).score(data[1]))


# ---- one component: a prediction of the last column is wanted after every so many points ----


class Line(NamedTuple):
    """Points (n, D) whose last column is to be predicted, and after how many a prediction is wanted."""

    Z: np.ndarray
    every: int

    @property
    def ends(self) -> range:
        return range(self.every, len(self.Z) + 1, self.every)

    @property
    def ask(self) -> np.ndarray:
        return np.append(self.Z[0, :-1], np.nan)[None]


def _line(n: int, D: int, every: int) -> Line:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, D - 1))
    return Line(np.column_stack([X, X @ rng.standard_normal(D - 1) + rng.standard_normal(n)]), every)


def _ours_streaming(line: Line) -> Answer:
    model, answers = IncrementalGaussianMixture(beta=0.0, scale=1.0), []
    for end in line.ends:
        answers.append(model.partial_fit(line.Z[end - line.every : end]).reconstruct(line.ask)[0, -1])
    return np.array(answers)


def _ridge_refitted(line: Line) -> Answer:
    X, y, ask = line.Z[:, :-1], line.Z[:, -1], line.ask[:, :-1]
    return np.array([Ridge(alpha=1.0).fit(X[:end], y[:end]).predict(ask)[0] for end in line.ends])


def _normal_equations(line: Line) -> Answer:
    """The closed form with sums carried along, and one system as large as D solved per prediction."""
    D, ask, answers = line.Z.shape[1] - 1, line.ask[0, :-1], []
    total, second = np.zeros(D + 1), np.zeros((D + 1, D + 1))
    for end in line.ends:
        chunk = line.Z[end - line.every : end]
        total += chunk.sum(0)
        second += chunk.T @ chunk
        mean = total / end
        scatter = second - end * np.outer(mean, mean)
        slope = scipy.linalg.solve(scatter[:D, :D] + np.eye(D), scatter[:D, D], assume_a="pos", check_finite=False)
        answers.append(mean[D] + (ask - mean[:D]) @ slope)
    return np.array(answers)


# ---- the authors' two rank-one steps, in NumPy ----


def _numpy_reference(X: np.ndarray, *, delta: float, threshold: float, most: int) -> Answer:
    """Means and log-determinants, sorted, by the two rank-one steps of the first paper, one point after the other."""
    D, variance = X.shape[1], (delta * X.std(0)) ** 2
    mu, L, ld, sp = np.empty((0, D)), np.empty((0, D, D)), np.empty(0), np.empty(0)
    for x in X:
        e = x - mu
        d2 = np.einsum("kd,kde,ke->k", e, L, e, optimize=True)
        if len(mu) == 0 or (d2.min() >= threshold and len(mu) < most):
            mu, L = np.vstack([mu, x]), np.concatenate([L, np.diag(1 / variance)[None]])
            ld, sp = np.append(ld, np.log(variance).sum()), np.append(sp, 1.0)
            continue
        log_r = np.log(sp) - 0.5 * (ld + d2)
        r = np.exp(log_r - log_r.max())
        r /= r.sum()
        sp += r
        for j in np.flatnonzero(r > 1e-12):
            w = r[j] / sp[j]
            step = w * e[j]
            mu[j] += step
            after = (x - mu[j]) * np.sqrt(w)
            up = L[j] / (1 - w)
            g = up @ after
            q = 1 + g @ after
            up -= np.outer(g, g) / q
            h = up @ step
            s = 1 - h @ step
            if s > 0:
                L[j] = up + np.outer(h, h) / s
                ld[j] += D * np.log1p(-w) + np.log(q) + np.log(s)
    return np.column_stack([mu, ld])[np.lexsort(mu.T)]


def _published(X: np.ndarray, *, delta: float, beta: float, most: int) -> Answer:
    model = IncrementalGaussianMixture(delta=delta, beta=beta, max_components=most, prune=False, update="published")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rejected steps: both contestants skip the same ones
        model.fit(X)
    return np.column_stack([model.means_, model.log_dets_])[np.lexsort(model.means_.T)]


def _normal(n: int, D: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, D))


def _blobs(n: int, D: int, K: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(0, 5, (K, D))[rng.integers(K, size=n)] + rng.standard_normal((n, D))


def _share_of_bandwidth(n: int, D: int) -> Callable[[float], Limit]:
    """Bytes that the algorithm must move, the upper triangle in and out once a point, over a copy of that size."""
    moved = 8 * D * (D + 1) * n

    def limit(seconds: float) -> Limit:
        return Limit(
            "bytes",
            round(moved / seconds / 1e9 / copy_bandwidth(4 * D * (D + 1)), 3),
            "measured copy bandwidth at the size of the triangle, in cache",
        )

    return limit


def main() -> None:
    """Run every race, all contestants on one core, and write the results."""
    with threadpool_limits(limits=1):
        write_results("inference", "incremental_gmm", _races(), folder=RESULTS)


def _races() -> list[Race]:
    close = functools.partial(np.allclose, rtol=1e-6, atol=1e-8)
    races: list[Race] = [
        race(
            "50,000 points, D = 8, six groups, one pass",
            data=_groups,
            ours=Contestant("algokit", _ours_on_groups),
            peers=[Contestant("scikit-learn GaussianMixture, six components given", _em_on_groups, "scikit-learn")],
            agree=lambda a, b: abs(a - b) < 0.1,
            agreement="mean held-out log-likelihood within 0.1 nat",
            note="All contestants of this chapter run on one core. Batch EM is told the number of components and sees "
            "the data as often as it likes.",
        ),
        _line_race(
            "one component, D = 256: a prediction after each of 300 points",
            functools.partial(_line, 300, 256, 1),
        ),
        _line_race(
            "one component, D = 256: a prediction after every 50 of 5,000 points",
            functools.partial(_line, 5_000, 256, 50),
            note="Between predictions nobody asks for the inverse. Carried sums take 50 points at once, as one product "
            "of matrices, and solve once; the stream keeps an inverse up to date after each point.",
        ),
        _line_race(
            "one component, D = 256: one prediction after 5,000 points",
            functools.partial(_line, 5_000, 256, 5_000),
            note="Not what a stream needs: with all data at hand, one product of matrices takes all points at once.",
        ),
    ]
    for D, n in ((64, 4_000), (256, 1_000), (512, 400)):
        races.append(
            race(
                f"one component, D = {D}, {n:,} points",
                data=functools.partial(_normal, n, D),
                ours=Contestant("algokit", functools.partial(_published, delta=1.0, beta=0.0, most=1)),
                peers=[
                    Contestant(
                        "NumPy reference, the papers' two rank-one steps",
                        functools.partial(_numpy_reference, delta=1.0, threshold=np.inf, most=1),
                        "numpy",
                    )
                ],
                agree=close,
                agreement="means and log-determinants equal to 1e-6 relative",
                limit=_share_of_bandwidth(n, D),
            )
        )
    races.append(_many_components())
    return races


def _line_race(name: str, data: Callable[[], Line], note: str = "") -> Race:
    return race(
        name,
        data=data,
        ours=Contestant("algokit", _ours_streaming),
        peers=[
            Contestant("scikit-learn Ridge, refitted", _ridge_refitted, "scikit-learn"),
            Contestant("NumPy normal equations, sums carried along", _normal_equations, "numpy"),
        ],
        agree=functools.partial(np.allclose, rtol=1e-6, atol=1e-6),
        agreement="all predictions equal to 1e-6",
        note=note,
    )


def _many_components() -> Race:
    return race(
        "16 groups, D = 64, 2,000 points",
        data=functools.partial(_blobs, 2_000, 64, 16),
        ours=Contestant("algokit", functools.partial(_published, delta=0.5, beta=0.001, most=16)),
        peers=[
            Contestant(
                "NumPy reference, the papers' two rank-one steps",
                functools.partial(_numpy_reference, delta=0.5, threshold=float(chdtri(64, 0.001)), most=16),
                "numpy",
            )
        ],
        agree=lambda a, b: a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=1e-8),
        agreement="the same components, means and log-determinants equal to 1e-6 relative",
    )


if __name__ == "__main__":
    main()
