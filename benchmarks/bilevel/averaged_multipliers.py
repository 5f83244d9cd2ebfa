"""Race of sl-BAMM: the fused pass against array arithmetic and JAX, and the method against hypergradients and SciPy.

    make bench PART=bilevel SLUG=averaged_multipliers

Data cleaning: the same 300 iterations, with the derivatives by our kernel, by NumPy's matrix products, and by JAX's
automatic differentiation of the two objectives. Quadratic: every method runs until x is within 1 % of the solution, its
step tuned on a grid; SciPy minimises the reduced problem, whose value and gradient come from dense solves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from algokit.bilevel import _softmax
from algokit.bilevel.averaged_multipliers import sl_bamm
from algokit.bilevel.problems import (
    BilevelProblem,
    KnownProblem,
    cleaning_data,
    cleaning_problem,
    implicit_hypergradient,
    quadratic_problem,
    unrolled_hypergradient,
)
from algokit.races import Contestant, Race, race, write_results

DATA = cleaning_data()


def clean(problem: BilevelProblem) -> np.ndarray:
    """300 iterations on the digits."""
    start = dict(x0=np.zeros(800), y0=np.zeros((10, 65)))
    return sl_bamm(problem, **start, beta=1.0, mu0=0.5, x_scale=200, max_iter=300, record_every=300).x


def by_arrays() -> BilevelProblem:
    """The same problem by NumPy's matrix products: four for each level."""
    share = np.full(len(DATA.y_val), 1 / len(DATA.y_val))

    def both_F(x: Any, y: Any, v: Any) -> Any:
        one = _softmax._arrays(DATA.X_val, DATA.y_val, share, y, v)
        return 0 * x, one.gradient, 0 * x, one.product

    def both_f(x: Any, y: Any, v: Any) -> Any:
        s = 1 / (1 + np.exp(-x))
        one = _softmax._arrays(DATA.X_train, DATA.labels, s / 800, y, v)
        slope = s * (1 - s) / 800
        return slope * one.losses, one.gradient, slope * one.slopes, one.product

    ours = cleaning_problem(DATA)
    return BilevelProblem(ours.F, ours.f, ours.dF, ours.df, ours.hvp_F, ours.hvp_f, both_F, both_f)


def by_jax() -> BilevelProblem:
    """The same problem, given as two objectives only."""
    import jax
    import jax.numpy as jnp

    def losses(X: Any, labels: Any, y: Any) -> Any:
        Z = X @ y.T
        return jax.nn.logsumexp(Z, axis=1) - jnp.take_along_axis(Z, labels[:, None], axis=1)[:, 0]

    return BilevelProblem(
        lambda x, y: jnp.mean(losses(DATA.X_val, DATA.y_val, y)) + 0 * jnp.sum(x),
        lambda x, y: jnp.mean(jax.nn.sigmoid(x) * losses(DATA.X_train, DATA.labels, y)),
    )


def near(known: KnownProblem, x: np.ndarray) -> bool:
    """Whether x is within 1 % of the solution."""
    return bool(np.linalg.norm(x - known.x) < 0.01 * np.linalg.norm(known.x))


def quadratic_ours(known: KnownProblem) -> np.ndarray:
    """Single loop, no averaging."""
    zero = np.zeros(len(known.x))
    return sl_bamm(
        known.problem, zero, zero, beta=0.8, mu0=0.0, tau=1e-3, max_iter=5000, record_every=5000,
        callback=lambda k, x, y, v: near(known, x),
    ).x  # fmt: skip


def quadratic_rhg(known: KnownProblem) -> np.ndarray:
    """Reverse mode through 5 warm-started inner steps."""
    x, y = np.zeros(len(known.x)), np.zeros(len(known.x))
    while not near(known, x):
        found = unrolled_hypergradient(known.problem, x, y, n_steps=5, step=0.5)
        x, y = x - 1.5 * found.grad_x, found.y
    return x


def quadratic_cg(known: KnownProblem) -> np.ndarray:
    """2 warm-started inner steps, 2 conjugate gradient steps."""
    x, y, df = np.zeros(len(known.x)), np.zeros(len(known.x)), known.problem.df
    assert df
    while not near(known, x):
        for _ in range(2):
            y = y - 0.5 * df(x, y)[1]
        x = x - 1.5 * implicit_hypergradient(known.problem, x, y, n_terms=2).grad_x
    return x


def quadratic_scipy(known: KnownProblem) -> np.ndarray:
    """SciPy's L-BFGS on the reduced problem, with dense solves of the lower level; matrices are read off first."""
    p, n = known.problem, len(known.x)
    assert p.hvp_f and p.dF
    hvp, dF = p.hvp_f, p.dF
    columns = [hvp(known.x, known.y, e) for e in np.eye(n)]
    A, B = cho_factor(np.array([c[1] for c in columns])), -np.array([c[0] for c in columns]).T

    def reduced(x: np.ndarray) -> tuple[float, np.ndarray]:
        y = cho_solve(A, B.T @ x)
        gx, gy = dF(x, y)
        return p.F(x, y), gx + B @ cho_solve(A, gy)

    return minimize(reduced, np.zeros(n), jac=True, method="L-BFGS-B", options={"ftol": 1e-9}).x


def main() -> list[Race]:
    """Both races."""
    known = quadratic_problem(20, 20, rng=0)
    forms = (cleaning_problem(DATA), by_arrays(), by_jax())
    return [
        race(
            "data cleaning on digits: 800 + 100 rows, 300 iterations",
            data=lambda: forms,
            ours=Contestant("algokit, fused pass", lambda d: clean(d[0])),
            peers=[
                Contestant("same iteration, NumPy matrix products", lambda d: clean(d[1]), "numpy"),
                Contestant("same iteration, JAX derivatives", lambda d: clean(d[2]), "jax"),
            ],
            agree=lambda a, b: bool(abs(a - b).max() < 1e-6),
            agreement="weights equal to 1e-6",
            runs=5,
        ),
        race(
            "strongly convex quadratic, 20 + 20 variables, until x is within 1 %",
            data=lambda: known,
            ours=Contestant("algokit, sl-BAMM without averaging", quadratic_ours),
            peers=[
                Contestant("our RHG, 5 inner steps", quadratic_rhg),
                Contestant("our CG hypergradient, 2 + 2 steps", quadratic_cg),
                Contestant("SciPy L-BFGS-B on the reduced problem", quadratic_scipy, "scipy"),
            ],
            agree=lambda a, b: bool(np.linalg.norm(a - b) < 0.03 * np.linalg.norm(a)),
            agreement="x within 3 % of each other, all within 1 % of the solution",
            runs=7,
            note="SciPy solves the lower level exactly by LAPACK at every evaluation, which for 20 variables takes "
            "microseconds: where that is possible there is no need of a single-loop method.",
        ),
    ]


if __name__ == "__main__":
    with threadpool_limits(1):  # two threads are far slower than one on matrices this small
        races = main()
    write_results("bilevel", "averaged_multipliers", races, folder=Path(__file__).parents[1] / "results")
