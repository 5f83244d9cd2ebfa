"""sl-BAMM: every variant against a plain copy of the algorithm, known solutions, SciPy on the reduced problem."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from algokit.arrays import kind_of, to_numpy
from algokit.bilevel.averaged_multipliers import bamm_step_sizes, kkt_residual, sl_bamm
from algokit.bilevel.problems import (
    BilevelProblem,
    cleaning_data,
    cleaning_problem,
    implicit_hypergradient,
    merely_convex_toy,
    quadratic_problem,
)

TOY = merely_convex_toy(2).problem
EXAMPLES = {
    "sl_bamm": dict(
        problem=TOY, x0=np.zeros(2), y0=np.zeros((2, 2)), v0=np.zeros((2, 2)), beta=0.1, mu0=0.5, p=0.2, tau=0.1,
        strategy="s3", x_scale=1.0, eta_scale=1.0, eta="schedule", order="jacobi", max_iter=3, tol=0.0, record_every=1,
    ),
    "kkt_residual": dict(problem=TOY, x=np.ones(2), y=np.ones((2, 2)), v=np.ones((2, 2))),
    "bamm_step_sizes": dict(k=3, beta=0.1, mu0=0.5, p=0.2, tau=0.1, strategy="s1"),
}  # fmt: skip
MUTED = {"negative", "zero", "huge"}
ACCEPTS = {f"sl_bamm.{name}": MUTED for name in ("x0", "y0", "v0")}


def plain(problem, x, y, *, beta, mu0, p, tau, powers, steps, eta="schedule", order="jacobi"):
    """The three lines of the algorithm, straight from the page."""
    v = np.zeros_like(y)
    for k in range(steps):
        mu = mu0 * (k + 1) ** -p
        psi = lambda parts_F, parts_f, mu=mu: mu * parts_F + (1 - mu) * parts_f  # noqa: E731
        eta_k, alpha = beta * mu ** powers[0] * (k + 1) ** (-tau / 2), beta * mu ** powers[1] * (k + 1) ** (-1.5 * tau)
        new_y = y - beta * psi(problem.dF(x, y)[1], problem.df(x, y)[1])
        at = new_y if order == "gauss-seidel" else y
        hessian = lambda u, x=x, at=at, psi=psi: psi(problem.hvp_F(x, at, u)[1], problem.hvp_f(x, at, u)[1])  # noqa: E731
        r = hessian(v) - problem.dF(x, at)[1]
        if eta == "exact":
            eta_k = (r * r).sum() / (r * hessian(r)).sum()
        new_v = v - eta_k * r
        w = new_v if order == "gauss-seidel" else v
        x = x - alpha * (problem.dF(x, at)[0] - psi(problem.hvp_F(x, at, w)[0], problem.hvp_f(x, at, w)[0]))
        y, v = new_y, new_v
    return x, y, v


POWERS = {"s1": (2, 7), "s2": (1, 5), "s3": (0, 3)}


@pytest.mark.parametrize("strategy", POWERS)
@pytest.mark.parametrize("eta", ["schedule", "exact"])
@pytest.mark.parametrize("order", ["jacobi", "gauss-seidel"])
def test_every_variant_follows_the_page(strategy, eta, order):
    problem = cleaning_problem(cleaning_data(30, 12))
    x, y = np.full(30, 0.1), np.zeros((10, 65))
    kwargs = dict(beta=0.3, mu0=0.6, p=0.3, tau=0.2)
    found = sl_bamm(problem, x, y, strategy=strategy, eta=eta, order=order, max_iter=8, **kwargs)
    expected = plain(problem, x, y, powers=POWERS[strategy], steps=8, eta=eta, order=order, **kwargs)
    for one, other in zip(found[:3], expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-13)


def test_hand_computed_first_step():
    """x = y = 0, beta = 1/2, mu = 1/2: d_y = (-1/2, 0), d_v = (1, 0), d_x = 0."""
    toy = merely_convex_toy(1).problem
    result = sl_bamm(toy, np.zeros(1), np.zeros((2, 1)), beta=0.5, mu0=0.5, max_iter=1)
    np.testing.assert_allclose(result.y, [[0.25], [0.0]])
    np.testing.assert_allclose(result.v, [[-0.5], [0.0]])
    assert result.x[0] == 0 and result.n_iter == 1


@pytest.mark.parametrize("order", ["jacobi", "gauss-seidel"])
def test_toy_is_solved_with_averaging_and_not_without(order):
    toy = merely_convex_toy(5)
    start = dict(x0=np.full(5, 0.01), y0=np.full((2, 5), 0.01), beta=0.5, max_iter=2000, record_every=500, order=order)
    assert abs(sl_bamm(toy.problem, **start).x - 1).max() < 1e-6
    assert abs(1 - sl_bamm(toy.problem, mu0=0.0, **start).x - 0.495).max() < 1e-6


@pytest.mark.parametrize("eta", ["schedule", "exact"])
def test_strongly_convex_quadratic_agrees_with_scipy_on_the_reduced_problem(eta):
    known = quadratic_problem(6, 7, rng=1)
    A = np.array([known.problem.hvp_f(known.x, known.y, e)[1] for e in np.eye(7)])
    B = -np.array([known.problem.hvp_f(known.x, known.y, e)[0] for e in np.eye(7)]).T

    def reduced(x):
        y = np.linalg.solve(A, B.T @ x)
        return known.problem.F(x, y), implicit_hypergradient(known.problem, x, y, n_terms=7).grad_x

    peer = minimize(reduced, np.zeros(6), jac=True, tol=1e-12)
    found = sl_bamm(
        known.problem, np.zeros(6), np.zeros(7), beta=0.4, mu0=0.0, tau=1e-3, max_iter=8000, tol=1e-20, eta=eta
    )
    np.testing.assert_allclose(found.x, peer.x, atol=1e-6)
    assert found.n_iter < 8000 and found.history["kkt"][-1] <= 1e-20


def test_bias_of_averaging_is_the_closed_form():
    """At a fixed weight mu the quadratic's fixed point is ((1 - mu)^2 B A^-1 B' + D)^-1 D x_hat."""
    known, mu = quadratic_problem(4, 4, rng=2), 0.3
    p = known.problem
    A = np.array([p.hvp_f(known.x, known.y, e)[1] for e in np.eye(4)])
    B = -np.array([p.hvp_f(known.x, known.y, e)[0] for e in np.eye(4)]).T
    D = np.array([p.dF(e, known.y)[0] - p.dF(0 * e, known.y)[0] for e in np.eye(4)])
    expected = np.linalg.solve((1 - mu) ** 2 * B @ np.linalg.solve(A, B.T) + D, -p.dF(np.zeros(4), known.y)[0])
    found = sl_bamm(p, np.zeros(4), np.zeros(4), beta=0.3, mu0=mu, p=1e-12, tau=1e-12, x_scale=20, max_iter=3000)
    np.testing.assert_allclose(found.x, expected, atol=1e-9)


@given(
    st.integers(0, 10**6), st.floats(0.01, 2), st.floats(0, 0.99), st.floats(0.01, 1), st.sampled_from(sorted(POWERS))
)
def test_step_sizes_are_the_table(k, beta, mu0, p, strategy):
    mu, eta, alpha = bamm_step_sizes(k, beta=beta, mu0=mu0, p=p, tau=0.2, strategy=strategy)
    if mu0 == 0:
        assert (mu, eta, alpha) == (0, pytest.approx((k + 1) ** -0.1 * beta), pytest.approx((k + 1) ** -0.2 * beta))
        return
    a, b = POWERS[strategy]
    assert mu == pytest.approx(mu0 * (k + 1) ** -p)
    assert eta == pytest.approx((k + 1) ** -0.1 * mu**a * beta)
    assert alpha == pytest.approx((k + 1) ** -0.3 * mu**b * beta)


@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_scaling_both_objectives_is_scaling_the_steps(seed, factor):
    """(cF, cf) with beta / c is the same iteration in x and y; the multiplier is the same too."""
    known = quadratic_problem(3, 3, rng=seed)
    p = known.problem
    both = lambda g: lambda *a: tuple(factor * part for part in g(*a))  # noqa: E731
    scaled = BilevelProblem(p.F, p.f, both(p.dF), both(p.df), both(p.hvp_F), both(p.hvp_f))
    rng = np.random.default_rng(seed)
    start = dict(x0=rng.normal(size=3), y0=rng.normal(size=3), max_iter=30)
    one, other = sl_bamm(p, beta=0.3, **start), sl_bamm(scaled, beta=0.3 / factor, **start)
    for a, b in zip(one[:3], other[:3], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_projection_keeps_x_in_the_set_and_enters_the_residual():
    toy = merely_convex_toy(3).problem
    clip = lambda x: np.clip(x, 0, 0.8)  # noqa: E731
    kwargs = dict(beta=0.5, mu0=0.5, p=0.05, max_iter=4000, record_every=4000)
    result = sl_bamm(toy, np.zeros(3), np.zeros((2, 3)), project_x=clip, **kwargs)
    np.testing.assert_allclose(result.x, 0.8)
    assert result.history["kkt"][-1] == pytest.approx(
        kkt_residual(toy, result.x, result.y, result.v, project_x=clip), rel=1e-12
    )
    assert kkt_residual(toy, np.ones(3), np.ones((2, 3)), np.zeros((2, 3))) == 0


def test_history_and_stopping():
    known = quadratic_problem(3, 3)
    x, y = np.zeros(3), np.zeros(3)
    none = sl_bamm(known.problem, x, y, max_iter=0)
    np.testing.assert_array_equal(none.x, x)
    assert none.n_iter == 0 and len(none.history["upper"]) == 1 and none.v.shape == (3,)
    result = sl_bamm(known.problem, x, y, max_iter=10, record_every=4)
    assert result.history["iteration"].tolist() == [0, 4, 8, 10]
    assert {len(v) for v in result.history.values()} == {4}
    assert result.history["upper"][-1] == pytest.approx(known.problem.F(result.x, result.y))
    assert result.history["kkt"][-1] == pytest.approx(kkt_residual(known.problem, *result[:3]))
    seen = []
    stopped = sl_bamm(known.problem, x, y, max_iter=10, callback=lambda k, *_: seen.append(k) or k == 6)
    assert seen == list(range(7)) and stopped.n_iter == 6


def test_every_backend_and_dtype(xp_array):
    toy = merely_convex_toy(3).problem
    expected = sl_bamm(toy, np.zeros(3), np.zeros((2, 3)), beta=0.5, max_iter=50)
    found = sl_bamm(toy, xp_array(np.zeros(3)), xp_array(np.zeros((2, 3))), beta=0.5, max_iter=50)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert kind_of(one) == xp_array.kind
        np.testing.assert_allclose(to_numpy(one), other, rtol=1e-12, atol=1e-15)
    single = sl_bamm(toy, np.zeros(3, np.float32), np.zeros((2, 3), np.float32), max_iter=5)
    assert {a.dtype for a in single[:3]} == {np.dtype(np.float32)}


def test_objectives_alone_are_enough():
    pytest.importorskip("jax")
    toy = merely_convex_toy(2).problem
    bare = BilevelProblem(toy.F, toy.f)
    one, other = (sl_bamm(p, np.zeros(2), np.zeros((2, 2)), beta=0.5, max_iter=40) for p in (toy, bare))
    np.testing.assert_allclose(one.x, other.x, rtol=1e-12)


def test_divergence_names_iteration_and_steps():
    known = quadratic_problem(3, 3)
    with pytest.raises(FloatingPointError, match=r"iteration \d+: try smaller steps \(now beta=50"):
        sl_bamm(known.problem, np.ones(3), np.ones(3), beta=50.0, max_iter=2000)


def test_a_singular_averaged_hessian_is_harmless_where_the_cross_term_is_blind():
    """F without y_2: the averaged Hessian is singular along y_2, and x never hears of it."""
    lame = BilevelProblem(
        lambda x, y: 0.5 * ((y[0] - 1) ** 2).sum(), TOY.f,
        dF=lambda x, y: (0 * x, np.stack([y[0] - 1, 0 * y[1]])), df=TOY.df,
        hvp_F=lambda x, y, v: (0 * x, np.stack([v[0], 0 * v[1]])), hvp_f=TOY.hvp_f,
    )  # fmt: skip
    result = sl_bamm(lame, np.zeros(2), np.zeros((2, 2)), v0=np.ones((2, 2)), beta=0.5, mu0=0.5, p=0.05, max_iter=3000)
    np.testing.assert_allclose(result.x, 1, atol=1e-3)
    np.testing.assert_array_equal(result.v[1], 1)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (dict(mu0=1.0), "mu0"),
        (dict(beta=0.0), "beta"),
        (dict(p=0.0), "p"),
        (dict(tau=0.0), "tau"),
        (dict(strategy="s4"), "strategy"),
        (dict(order="random"), "order"),
        (dict(v0=np.zeros(2)), "v0"),
        (dict(x0=np.array([np.inf, 0])), "x0"),
        (
            dict(problem=dataclasses.replace(TOY, df=lambda x, y: (x, y[0]))),
            "x0 and y0 must fit problem.*df gives",
        ),
    ],
)
def test_what_is_refused(change, part):
    with pytest.raises(ValueError, match=part):
        sl_bamm(**{**EXAMPLES["sl_bamm"], **change})
