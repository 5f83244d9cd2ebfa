"""Race of the Bradley-Terry fit against choix, evalica, scikit-learn and SciPy, at equal log-likelihood.

    make bench PART=optimization SLUG=bradley_terry

All start from the same arrays of winners and losers, and stop when their log-likelihood is that of the maximum to 1e-8,
relative. Where a peer wants its input in a form of its own (lists, enumerations), that form is made before the clock
starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import choix
import evalica
import numpy as np
import scipy.sparse as sp
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from algokit.optimization.bradley_terry import bradley_terry, log_likelihood, strongly_connected_core, win_matrix
from algokit.races import Contestant, Race, race, write_results

AGREEMENT = "log-likelihood equal to 1e-8, relative"


class League(NamedTuple):
    """One league in the forms that the contestants take."""

    n: int
    winners: np.ndarray
    losers: np.ndarray
    games: list[tuple[int, int]]
    xs: list[int]
    ys: list[int]
    outcome: list[Any]
    index: Any


def league(n: int, games: int, spread: float) -> League:
    """Random games among n players with log-strengths N(0, spread^2), cut down to the connected core."""
    rng = np.random.default_rng(0)
    lam = rng.normal(0, spread, n)
    a, b = rng.integers(0, n, (2, games))
    a, b = a[a != b], b[a != b]
    won = rng.random(len(a)) < 1 / (1 + np.exp(lam[b] - lam[a]))
    winners, losers = np.where(won, a, b), np.where(won, b, a)
    core = strongly_connected_core(win_matrix(winners, losers, n=n))
    place = np.full(n, -1)
    place[core] = np.arange(len(core))
    inside = (place[winners] >= 0) & (place[losers] >= 0)
    winners, losers = place[winners[inside]], place[losers[inside]]
    xs, ys = winners.tolist(), losers.tolist()
    index = evalica.indexing(xs, ys)[2]
    return League(
        len(core), winners, losers, list(zip(xs, ys, strict=True)), xs, ys, [evalica.Winner.X] * len(xs), index
    )


def sparse_league() -> League:
    """5,000 players, 100,000 games."""
    return league(5000, 100_000, 1.0)


def dense_league() -> League:
    """2,000 players, 1,000,000 games."""
    return league(2000, 1_000_000, 1.0)


def ours(data: League) -> np.ndarray:
    """Newman's iteration."""
    return bradley_terry(win_matrix(data.winners, data.losers, n=data.n), tol=1e-6).log_strengths


def evalica_newman(data: League) -> np.ndarray:
    """The same iteration, compiled from Rust, on dense matrices."""
    result = evalica.newman(data.xs, data.ys, data.outcome, index=data.index, tolerance=1e-6, limit=10_000)
    return np.log(result.scores.reindex(range(data.n)).to_numpy())


def evalica_bradley_terry(data: League) -> np.ndarray:
    """Evalica's own Bradley-Terry iteration."""
    result = evalica.bradley_terry(data.xs, data.ys, data.outcome, index=data.index, tolerance=1e-6, limit=10_000)
    return np.log(result.scores.reindex(range(data.n)).to_numpy())


def choix_ilsr(data: League) -> np.ndarray:
    """Spectral iteration on a dense Markov chain."""
    return choix.ilsr_pairwise(data.n, data.games, alpha=0.0, tol=1e-6)


def choix_mm(data: League) -> np.ndarray:
    """Zermelo's iteration, all players at once."""
    return choix.mm_pairwise(data.n, data.games, alpha=0.0, tol=1e-8)


def logistic_regression(data: League) -> np.ndarray:
    """scikit-learn, one row per game: +1 for the winner, -1 for the loser, both orientations."""
    m = len(data.winners)
    rows = np.repeat(np.arange(m), 2)
    columns = np.stack([data.winners, data.losers], axis=1).ravel()
    x = sp.csr_matrix((np.tile([1.0, -1.0], m), (rows, columns)), shape=(m, data.n))
    x, y = sp.vstack([x, -x]), np.repeat([1, 0], m)
    return LogisticRegression(C=1e9, fit_intercept=False, tol=1e-7, max_iter=10_000).fit(x, y).coef_[0]


def lbfgs(data: League) -> np.ndarray:
    """SciPy's L-BFGS on the vectorised log-likelihood."""
    table = win_matrix(data.winners, data.losers, n=data.n).tocoo()
    i, j, w = table.row, table.col, table.data

    def minus(lam: np.ndarray) -> tuple[float, np.ndarray]:
        d = lam[i] - lam[j]
        pull = w / (1 + np.exp(d))
        gradient = np.bincount(j, pull, data.n) - np.bincount(i, pull, data.n)
        return float(w @ np.logaddexp(0, -d)), gradient

    result = minimize(
        minus, np.zeros(data.n), jac=True, method="L-BFGS-B", options={"ftol": 1e-13, "gtol": 1e-3, "maxiter": 10_000}
    )
    return result.x - result.x.mean()


def same_likelihood(data: League) -> Any:
    """Agreement of two answers: log-likelihoods equal to 1e-8, relative."""
    table = win_matrix(data.winners, data.losers, n=data.n)

    def agree(a: np.ndarray, b: np.ndarray) -> bool:
        one, other = log_likelihood(table, a - a.mean()), log_likelihood(table, b - b.mean())
        return abs(one - other) <= 1e-8 * abs(one)

    return agree


def main() -> list[Race]:
    """Both leagues, all peers."""
    sparse, dense = sparse_league(), dense_league()
    mine = Contestant("algokit, Newman", ours)
    return [
        race(
            f"{sparse.n:,} players, {len(sparse.winners):,} games",
            data=lambda: sparse,
            ours=mine,
            peers=[
                Contestant("choix ilsr_pairwise", choix_ilsr, "choix"),
                Contestant("choix mm_pairwise", choix_mm, "choix"),
                Contestant("evalica newman", evalica_newman, "evalica"),
                Contestant("evalica bradley_terry", evalica_bradley_terry, "evalica"),
                Contestant("scikit-learn LogisticRegression", logistic_regression, "scikit-learn"),
                Contestant("SciPy L-BFGS-B", lbfgs, "scipy"),
            ],
            agree=same_likelihood(sparse),
            agreement=AGREEMENT,
            runs=3,
        ),
        race(
            f"{dense.n:,} players, {len(dense.winners):,} games",
            data=lambda: dense,
            ours=mine,
            peers=[
                Contestant("evalica newman", evalica_newman, "evalica"),
                Contestant("evalica bradley_terry", evalica_bradley_terry, "evalica"),
                Contestant("SciPy L-BFGS-B", lbfgs, "scipy"),
            ],
            agree=same_likelihood(dense),
            agreement=AGREEMENT,
            runs=7,
        ),
    ]


if __name__ == "__main__":
    write_results("optimization", "bradley_terry", main(), folder=Path(__file__).parents[1] / "results")
