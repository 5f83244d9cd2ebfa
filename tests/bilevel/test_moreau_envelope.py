"""MEHA: against closed forms, a plain copy of the algorithm, finite differences, and scikit-learn's elastic net."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.linear_model import ElasticNet
from sklearn.utils.estimator_checks import parametrize_with_checks

from algokit.arrays import array_namespace, kind_of, to_numpy
from algokit.bilevel import moreau_envelope as module
from algokit.bilevel.moreau_envelope import (
    CompositeBilevelProblem,
    MehaElasticNetCV,
    meha,
    moreau_envelope,
    prox_elastic_net,
    prox_l1,
)
from algokit.checks import AlgokitWarning

# F = |x - 1|^2 / 2 + |y + 1|^2 / 2, f = |y - x|^2 / 2: everything has a closed form
PAIR = CompositeBilevelProblem(
    F=lambda x, y: 0.5 * total((x - 1) ** 2 + (y + 1) ** 2),
    f=lambda x, y: 0.5 * total((y - x) ** 2),
    dF=lambda x, y: (x - 1, y + 1),
    df=lambda x, y: (x - y, y - x),
)


def total(a):
    """Sum of an array of any kind."""
    return array_namespace(a).sum(a)


def elastic_net(seed: int, n: int = 20, d: int = 6) -> tuple[CompositeBilevelProblem, tuple[np.ndarray, ...]]:
    """Elastic net with both penalties as upper variable, and its data."""
    rng = np.random.default_rng(seed)
    A, A_val, w = rng.normal(size=(n, d)), rng.normal(size=(n, d)), rng.normal(size=d) * (rng.random(d) < 0.5)
    b, b_val = A @ w + rng.normal(size=n), A_val @ w + rng.normal(size=n)
    problem = CompositeBilevelProblem(
        F=lambda x, y: 0.5 * np.mean((A_val @ y - b_val) ** 2),
        f=lambda x, y: 0.5 * np.mean((A @ y - b) ** 2),
        dF=lambda x, y: (0 * x, A_val.T @ (A_val @ y - b_val) / n),
        df=lambda x, y: (0 * x, A.T @ (A @ y - b) / n),
        g=lambda x, y: x[0] * abs(y).sum() + x[1] / 2 * (y * y).sum(),
        dg_dx=lambda x, y: np.array([abs(y).sum(), 0.5 * (y * y).sum()]),
        prox_g=lambda x, y, step: prox_elastic_net(y, step * x[0], step * x[1]),
        project_x=lambda x: np.clip(x, 1e-4, 10),
    )
    return problem, (A, b, A_val, b_val)


ROWS = np.random.default_rng(0).normal(size=(12, 3))
EXAMPLES = {
    "meha": dict(
        problem=PAIR, x0=np.ones(2), y0=np.ones(2), theta0=np.ones(2), alpha=0.1, beta=0.1, eta=0.1, gamma=1.0, c0=1.0,
        p=0.2, order="xy", max_iter=3, tol=0.0, record_every=1, batched=False,
    ),
    "moreau_envelope": dict(problem=PAIR, x=np.ones(2), y=np.ones(2), gamma=1.0, eta=0.3, tol=1e-6, max_iter=10_000),
    "prox_l1": dict(y=np.array([2.0, -1.0]), t=np.array([0.5, 0.5])),
    "prox_elastic_net": dict(y=np.array([2.0, -1.0]), t1=0.5, t2=np.array([0.5, 0.5])),
    "MehaElasticNetCV": dict(alpha=0.2, gamma=1.0, c0=10.0, p=0.3, start=0.5, max_iter=50,
                             validation_fraction=0.5, rng=0),
    "MehaElasticNetCV.fit": dict(X=ROWS, y=ROWS[:, 0], X_val=ROWS, y_val=ROWS[:, 0]),
    "MehaElasticNetCV.predict": dict(X=ROWS),
}  # fmt: skip


def plain(problem, x, y, *, alpha, beta, eta, gamma, c0, p, order, steps):
    """The three lines of the algorithm, straight from the page."""
    theta = y
    none = lambda x, y: 0 * x  # noqa: E731
    dg, prox = problem.dg_dx or none, problem.prox_g or (lambda x, y, step: y)
    project = problem.project_x or (lambda x: x)
    for k in range(steps):
        c = c0 * (k + 1) ** p
        theta = prox(x, theta - eta * (problem.df(x, theta)[1] + (theta - y) / gamma), eta)
        for which in order:
            if which == "x":
                at_y, at_theta = problem.df(x, y)[0] + dg(x, y), problem.df(x, theta)[0] + dg(x, theta)
                x = project(x - alpha * (problem.dF(x, y)[0] / c + at_y - at_theta))
            else:
                d = problem.dF(x, y)[1] / c + problem.df(x, y)[1] - (y - theta) / gamma
                y = prox(x, y - beta * d, beta)
    return x, y, theta


@pytest.mark.parametrize("order", ["xy", "yx"])
@pytest.mark.parametrize("problem", [PAIR, elastic_net(0)[0]], ids=["smooth", "non-smooth"])
def test_both_orders_follow_the_page(order, problem):
    x, y = np.full(2, 0.4), np.linspace(-1, 1, 2 if problem is PAIR else 6)
    options = dict(alpha=0.05, beta=0.1, eta=0.2, gamma=0.8, c0=2.0, p=0.3, order=order)
    found, expected = meha(problem, x, y, max_iter=25, **options), plain(problem, x, y, steps=25, **options)
    for one, other in zip(found[:3], expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)


def test_hand_computed_first_step():
    """x = y = 0: theta = 0; x = 0 - a (-1/c) = a/c; y = -b (1/c + 0 - a/c - 0)."""
    result = meha(PAIR, np.zeros(1), np.zeros(1), alpha=0.5, beta=0.25, eta=0.1, c0=2.0, p=0.1, max_iter=1)
    assert (result.x[0], result.y[0], result.theta[0]) == (0.25, -0.25 * (0.5 - 0.25), 0.0)


@pytest.mark.parametrize("c", [5, 10, 40])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_bias_of_a_fixed_penalty_is_the_closed_form(c, gamma):
    result = meha(PAIR, np.zeros(1), np.zeros(1), alpha=0.3, beta=0.2, eta=0.3, gamma=gamma, c0=c, p=0, max_iter=9000)
    expected = 1 / (1 + 2 * gamma / (1 + gamma) * c)
    assert result.x[0] == pytest.approx(expected, rel=1e-8) and result.y[0] == pytest.approx(-expected, rel=1e-8)


def test_nonconvex_sine_reaches_the_best_branch():
    a = c = 2.0
    sine = CompositeBilevelProblem(
        F=lambda x, y: ((x - a) ** 2).sum() + ((y - a - c) ** 2).sum(), f=lambda x, y: np.sin(x + y - c).sum(),
        dF=lambda x, y: (2 * (x - a), 2 * (y - a - c)),
        df=lambda x, y: (np.cos(x + y - c).sum(keepdims=True), np.cos(x + y - c)),
    )  # fmt: skip
    options = dict(alpha=0.01, beta=0.01, eta=0.1, gamma=0.4, c0=5, max_iter=20_000, record_every=20_000)
    result = meha(sine, np.array([3.0]), np.full(10, 4.0), **options)
    branch = ((1 - 10) * a + 10 * 1.5 * np.pi) / 11
    assert abs(result.x[0] / branch - 1) < 0.01 and result.history["gap"][-1] < 1e-3


def test_no_g_is_the_smooth_path_bit_for_bit():
    with_zero = dataclasses.replace(
        PAIR, g=lambda x, y: 0.0, dg_dx=lambda x, y: np.zeros_like(x), prox_g=lambda x, y, step: y
    )
    one, other = (meha(p, np.zeros(3), np.linspace(0, 1, 3), max_iter=40) for p in (PAIR, with_zero))
    for a, b in zip(one[:3], other[:3], strict=True):
        assert a.tobytes() == b.tobytes()


def test_dicts_of_arrays_are_one_long_vector():
    split = lambda a: {"one": a[:2], "two": {"three": a[2:]}}  # noqa: E731
    join = lambda t: np.concatenate([t["one"], t["two"]["three"]])  # noqa: E731
    trees = CompositeBilevelProblem(
        F=lambda x, y: PAIR.F(join(x), join(y)), f=lambda x, y: PAIR.f(join(x), join(y)),
        dF=lambda x, y: tuple(map(split, PAIR.dF(join(x), join(y)))),
        df=lambda x, y: tuple(map(split, PAIR.df(join(x), join(y)))),
    )  # fmt: skip
    x, y = np.zeros(5), np.linspace(0, 1, 5)
    flat, nested = meha(PAIR, x, y, max_iter=30), meha(trees, split(x), split(y), max_iter=30)
    np.testing.assert_array_equal(join(nested.x), flat.x)
    np.testing.assert_array_equal(join(nested.theta), flat.theta)
    np.testing.assert_allclose(nested.history["step"], flat.history["step"], rtol=1e-12)
    assert moreau_envelope(trees, split(x), split(y)).value == pytest.approx(moreau_envelope(PAIR, x, y).value)


@given(st.integers(0, 10_000), st.floats(0.2, 3))
def test_gradient_of_the_envelope_matches_finite_differences(seed, gamma):
    problem, _ = elastic_net(seed % 5)
    rng = np.random.default_rng(seed)
    x, y = 0.05 + rng.random(2), rng.normal(size=6)
    found = moreau_envelope(problem, x, y, gamma=gamma, tol=1e-12)
    value = lambda x, y: moreau_envelope(problem, x, y, gamma=gamma, tol=1e-12).value  # noqa: E731
    dx, dy = rng.normal(size=2), rng.normal(size=6)
    h = 1e-5
    assert (found.grad_x * dx).sum() == pytest.approx((value(x + h * dx, y) - value(x - h * dx, y)) / (2 * h), abs=1e-5)
    assert (found.grad_y * dy).sum() == pytest.approx((value(x, y + h * dy) - value(x, y - h * dy)) / (2 * h), abs=1e-5)


@given(st.integers(0, 10_000), st.floats(0.1, 3))
def test_gap_is_at_least_the_distance_to_the_proximal_point(seed, gamma):
    """Convex phi: phi - v >= |y - theta|^2 / (2 gamma), and v never exceeds phi."""
    problem, _ = elastic_net(seed % 5)
    rng = np.random.default_rng(seed)
    x, y = 0.05 + rng.random(2), rng.normal(size=6)
    found = moreau_envelope(problem, x, y, gamma=gamma)
    gap = problem.f(x, y) + problem.g(x, y) - found.value
    assert gap >= ((y - found.theta) ** 2).sum() / (2 * gamma) - 1e-9


def test_exact_lower_solution_is_its_own_proximal_point():
    problem, (A, b, _, _) = elastic_net(1)
    x = np.array([0.1, 0.2])
    y = ElasticNet(alpha=0.3, l1_ratio=1 / 3, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(A, b).coef_
    found = moreau_envelope(problem, x, y, gamma=1.0)
    np.testing.assert_allclose(found.theta, y, atol=1e-8)
    np.testing.assert_allclose(found.grad_y, 0, atol=1e-8)


def test_envelope_warns_and_a_fixed_step_agrees():
    problem, _ = elastic_net(2)
    x, y = np.array([0.1, 0.1]), np.ones(6)
    np.testing.assert_allclose(
        moreau_envelope(problem, x, y, eta=0.1).theta, moreau_envelope(problem, x, y).theta, atol=1e-8
    )
    with pytest.warns(AlgokitWarning, match="no convergence"):
        moreau_envelope(problem, x, y, eta=1e-4, max_iter=3)


@given(st.floats(-5, 5), st.floats(0, 3), st.floats(0, 3))
def test_proximal_operators_minimise(y, t1, t2):
    found = float(prox_elastic_net(np.array([y]), t1, t2)[0])
    best = minimize_scalar(
        lambda u: t1 * abs(u) + t2 / 2 * u * u + (u - y) ** 2 / 2, bounds=(-6, 6), method="bounded"
    ).x
    assert found == pytest.approx(best, abs=1e-4)
    assert float(prox_l1(np.array([y]), t1)[0]) == pytest.approx(found * (1 + t2), abs=1e-12)
    assert not np.signbit(prox_l1(np.array([-0.1]), 1.0))[0]


def test_proximal_operators_on_every_backend(xp_array):
    y, t = np.array([[2.0, -0.5], [0.1, -3.0]]), np.array([0.2, 1.0])
    found = prox_l1(xp_array(y), xp_array(t))
    assert kind_of(found) == xp_array.kind
    np.testing.assert_allclose(to_numpy(found), [[1.8, 0.0], [0.0, -2.0]], atol=1e-15)
    assert prox_elastic_net(y.astype(np.float32), 0.1, 0.1).dtype == np.float32


def test_meha_on_every_backend(xp_array):
    expected = meha(PAIR, np.zeros(2), np.ones(2), max_iter=20)
    found = meha(PAIR, xp_array(np.zeros(2)), xp_array(np.ones(2)), max_iter=20)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert kind_of(one) == xp_array.kind
        np.testing.assert_allclose(to_numpy(one), other, rtol=1e-12)
    single = meha(PAIR, np.zeros(2, np.float32), np.ones(2, np.float32), max_iter=5)
    assert {a.dtype for a in single[:3]} == {np.dtype(np.float32)}


def per_start(a):
    """Sum over all but the first axis of an array of any kind."""
    return array_namespace(a).sum(a, axis=1)


PAIRS = dataclasses.replace(
    PAIR,
    F=lambda x, y: 0.5 * per_start((x - 1) ** 2 + (y + 1) ** 2),
    f=lambda x, y: 0.5 * per_start((y - x) ** 2),
)
STARTS = np.array([[0.0, -1.0], [3.0, 0.5], [0.4, 0.4], [-2.0, 1.0]])


@pytest.mark.parametrize("order", ["xy", "yx"])
def test_a_batched_run_is_separate_runs(xp_array, order):
    """Each start stops when it would alone; those that have stopped keep their place and their last values."""
    options = dict(alpha=0.1, beta=0.3, eta=0.5, c0=10, p=0, tol=3e-4, max_iter=320, order=order)
    found = meha(PAIRS, xp_array(STARTS), xp_array(0.5 * STARTS), theta0=xp_array(-STARTS), batched=True, **options)
    alone = [meha(PAIR, s, 0.5 * s, theta0=-s, **options) for s in STARTS]
    assert len({r.n_iter for r in alone}) > 2 and max(r.n_iter for r in alone) == 320  # early, late, and not at all
    assert found.n_iter.tolist() == [r.n_iter for r in alone]
    for i, name in enumerate(("x", "y", "theta")):
        assert kind_of(found[i]) == xp_array.kind
        np.testing.assert_allclose(to_numpy(found[i]), [getattr(r, name) for r in alone], rtol=1e-11)
    for key in ("upper", "lower", "gap", "step"):
        assert found.history[key].shape == (321, 4)
        for i, r in enumerate(alone):
            np.testing.assert_allclose(found.history[key][: r.n_iter + 1, i], r.history[key], rtol=1e-9, atol=1e-12)
            np.testing.assert_array_equal(found.history[key][r.n_iter :, i], found.history[key][r.n_iter, i])
    assert found.history["iteration"].tolist() == list(range(321))


def test_a_batched_run_with_data_of_its_own_for_every_start(xp_array):
    """Elastic nets of five data sets at once: stacked data, batched products, a threshold per start."""
    separate = [elastic_net(seed) for seed in range(5)]
    A, b, A_val, b_val = (xp_array(np.stack([data[i] for _, data in separate])) for i in range(4))
    n, xp = A.shape[1], array_namespace(A)
    times = lambda M, v: xp.matmul(M, v[:, :, None])[:, :, 0]  # noqa: E731
    back = lambda M, v: xp.matmul(xp.matrix_transpose(M), v[:, :, None])[:, :, 0]  # noqa: E731
    sizes = lambda y: xp.stack([per_start(xp.abs(y)), 0.5 * per_start(y * y)], axis=1)  # noqa: E731
    problem = CompositeBilevelProblem(
        F=lambda x, y: 0.5 / n * per_start((times(A_val, y) - b_val) ** 2),
        f=lambda x, y: 0.5 / n * per_start((times(A, y) - b) ** 2),
        dF=lambda x, y: (0 * x, back(A_val, times(A_val, y) - b_val) / n),
        df=lambda x, y: (0 * x, back(A, times(A, y) - b) / n),
        g=lambda x, y: per_start(x * sizes(y)),
        dg_dx=lambda x, y: sizes(y),
        prox_g=lambda x, y, step: prox_elastic_net(y, step * x[:, :1], step * x[:, 1:]),
        project_x=lambda x: xp.clip(x, 1e-4, 10),
    )
    x0, y0 = np.linspace(0.1, 1.0, 10).reshape(5, 2), np.zeros((5, 6))
    options = dict(alpha=0.1, beta=0.1, eta=0.2, c0=5.0, p=0.3, max_iter=60, record_every=30)
    found = meha(problem, xp_array(x0), xp_array(y0), batched=True, **options)
    for i, (alone, _) in enumerate(separate):
        one = meha(alone, x0[i], y0[i], **options)
        for a, b_ in zip(found[:3], one[:3], strict=True):
            np.testing.assert_allclose(to_numpy(a)[i], b_, rtol=1e-9, atol=1e-12)
        for key in ("upper", "lower", "gap"):
            np.testing.assert_allclose(found.history[key][:, i], one.history[key], rtol=1e-8, atol=1e-12)


def test_batched_dicts_and_missing_gradients():
    pytest.importorskip("jax")
    split = lambda a: {"one": a[:, :1], "two": {"three": a[:, 1:]}}  # noqa: E731
    trees = CompositeBilevelProblem(
        F=lambda x, y: 0.5 * ((x["one"] - 1) ** 2 + (x["two"]["three"] - 1) ** 2 + (y["one"] + 1) ** 2
                              + (y["two"]["three"] + 1) ** 2)[:, 0],
        f=lambda x, y: 0.5 * ((y["one"] - x["one"]) ** 2 + (y["two"]["three"] - x["two"]["three"]) ** 2)[:, 0],
    )  # fmt: skip
    options = dict(max_iter=30, batched=True, tol=0.02, alpha=0.05)
    flat, nested = meha(PAIRS, STARTS, STARTS, **options), meha(trees, split(STARTS), split(STARTS), **options)
    np.testing.assert_allclose(nested.x["two"]["three"], flat.x[:, 1:], rtol=1e-12)
    np.testing.assert_allclose(nested.history["step"], flat.history["step"], rtol=1e-10)
    assert nested.n_iter.tolist() == flat.n_iter.tolist()


def test_what_a_batched_run_refuses():
    with pytest.raises(ValueError, match=r"F must give shape \(4,\)"):
        meha(PAIR, STARTS, STARTS, batched=True)
    with pytest.raises(ValueError, match="x0 and y0 must have one first axis"):
        meha(PAIRS, STARTS, STARTS[:3], batched=True)
    with pytest.raises(ValueError, match="x0 and y0 must have one first axis"):
        meha(PAIRS, np.array(1.0), np.array(1.0), batched=True)
    growing = dataclasses.replace(
        PAIRS, dF=lambda x, y: (0 * x, np.where(x > 2.5, 100.0, 1.0) * y), df=lambda x, y: (0 * x, y - x)
    )
    with pytest.raises(FloatingPointError, match="of start 1: try smaller steps"):
        meha(growing, STARTS, STARTS, alpha=1e-9, beta=0.3, eta=0.5, max_iter=2000, batched=True)


@pytest.mark.gpu
def test_gpu_agrees_with_the_host():
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    x0, y0 = rng.normal(size=(200, 2)), rng.normal(size=(200, 2))
    options = dict(alpha=0.1, beta=0.3, eta=0.5, tol=1e-4, max_iter=200, batched=True)
    host, device = meha(PAIRS, x0, y0, **options), meha(PAIRS, cupy.asarray(x0), cupy.asarray(y0), **options)
    assert kind_of(device.x) == "cupy" and isinstance(device.n_iter, np.ndarray)
    np.testing.assert_allclose(device.x.get(), host.x, rtol=1e-10)
    np.testing.assert_allclose(device.history["gap"], host.history["gap"], rtol=1e-8, atol=1e-12)


def test_objectives_alone_are_enough():
    pytest.importorskip("jax")
    bare = CompositeBilevelProblem(PAIR.F, PAIR.f)
    one, other = (meha(p, np.zeros(2), np.ones(2), max_iter=20) for p in (PAIR, bare))
    np.testing.assert_allclose(one.x, other.x, rtol=1e-12)


def test_history_stopping_and_divergence():
    result = meha(PAIR, np.zeros(1), np.zeros(1), max_iter=10, record_every=4)
    assert result.history["iteration"].tolist() == [0, 4, 8, 10] and np.isinf(result.history["step"][0])
    assert result.history["upper"][-1] == pytest.approx(PAIR.F(result.x, result.y))
    exact = PAIR.f(result.x, result.y) - PAIR.f(result.x, result.theta) - ((result.y - result.theta) ** 2).sum() / 2
    assert result.history["gap"][-1] == pytest.approx(exact)
    early = meha(PAIR, np.zeros(1), np.zeros(1), alpha=0.3, beta=0.3, eta=0.5, p=0, tol=1e-6, max_iter=10_000)
    assert early.n_iter < 10_000 and early.history["step"][-1] <= 1e-6
    held = meha(dataclasses.replace(PAIR, project_x=lambda x: np.clip(x, 0.5, 1)), np.ones(1), np.ones(1), c0=9,
                alpha=0.3, beta=0.3, eta=0.5, p=0, tol=1e-9, max_iter=10_000)  # fmt: skip
    assert held.x[0] == 0.5 and held.n_iter < 10_000
    stopped = meha(PAIR, np.zeros(1), np.zeros(1), callback=lambda k, *_: k == 6)
    assert stopped.n_iter == 6
    none = meha(PAIR, np.zeros(1), np.ones(1), max_iter=0)
    assert none.x[0] == 0 and none.y[0] == 1 and none.n_iter == 0
    with pytest.raises(FloatingPointError, match=r"smaller steps \(now alpha=50"):
        meha(PAIR, np.zeros(1), np.ones(1), alpha=50.0, beta=50.0, max_iter=2000)


def test_probe_warns_of_a_gamma_that_is_too_large():
    concave = CompositeBilevelProblem(
        F=lambda x, y: 0.0, f=lambda x, y: -2 * (y * y).sum(),
        dF=lambda x, y: (0 * x, 0 * y), df=lambda x, y: (0 * x, -4 * y),
    )  # fmt: skip
    with pytest.warns(AlgokitWarning, match="lower gamma"):
        meha(concave, np.zeros(1), np.zeros(2), gamma=1.0, max_iter=1)
    meha(concave, np.zeros(1), np.zeros(2), gamma=0.1, max_iter=1)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (dict(problem=CompositeBilevelProblem(PAIR.F, PAIR.f, prox_g=lambda x, y, s: y)), "problem must have g"),
        (dict(problem=CompositeBilevelProblem(PAIR.F, PAIR.f, g=lambda x, y: 0.0)), "problem must have prox_g"),
        (dict(p=0.5), "p"),
        (dict(c0=0.0), "c0"),
        (dict(gamma=-1.0), "gamma"),
        (dict(order="zz"), "order"),
        (dict(theta0=np.ones(3)), "theta0"),
        (dict(y0={}), "y0"),
        (dict(x0=np.ones(3)), "x0 and y0 must fit problem"),
    ],
)
def test_what_is_refused(change, part):
    with pytest.raises(ValueError, match=part):
        meha(**{**EXAMPLES["meha"], **change})


class TestEstimator:
    def test_kernel_is_the_general_algorithm(self):
        problem, (A, b, A_val, b_val) = elastic_net(3)
        n, d = A.shape
        G = A.T @ A / n
        eta = 1 / (module._largest_eigenvalue(G) + 1)
        x, path = module._elastic_net_loop(
            G, A.T @ b / n, A_val.T @ A_val / n, A_val.T @ b_val / n, np.full(2, 0.5), 0.2, 1.0, 10.0, 0.3, 200, 50
        )
        options = dict(alpha=0.2, beta=eta / 2, eta=eta, gamma=1.0, c0=10.0, p=0.3, record_every=200)
        expected = meha(problem, np.full(2, 0.5), np.zeros(d), max_iter=200, **options)
        np.testing.assert_allclose(x, expected.x, rtol=1e-9)
        assert path.shape == (5, 2) and path[0].tolist() == [0.5, 0.5]
        np.testing.assert_allclose(
            path[2], meha(problem, np.full(2, 0.5), np.zeros(d), max_iter=100, **options).x, rtol=1e-9
        )

    def test_largest_eigenvalue_is_bounded_from_above(self):
        for seed in range(20):
            A = np.random.default_rng(seed).normal(size=(9, 7))
            top = np.linalg.eigvalsh(A.T @ A)[-1]
            assert 0.97 * top <= module._largest_eigenvalue(A.T @ A) <= 1.03 * top
        assert module._largest_eigenvalue(np.zeros((3, 3))) == 0

    @pytest.mark.parametrize("seed", range(3))
    def test_it_is_as_good_as_a_grid(self, seed):
        _, (A, b, A_val, b_val) = elastic_net(seed, n=60, d=30)
        model = MehaElasticNetCV().fit(A, b, X_val=A_val, y_val=b_val)
        error = lambda m: np.mean((m.predict(A_val) - b_val) ** 2)  # noqa: E731
        best = min(
            error(ElasticNet(alpha=a, l1_ratio=r, max_iter=10_000).fit(A, b))
            for a in np.geomspace(0.01, 2, 10) for r in np.linspace(0.1, 1, 5)
        )  # fmt: skip
        assert error(model) <= 1.03 * best
        peer = ElasticNet(alpha=model.alpha_, l1_ratio=model.l1_ratio_, tol=1e-8, max_iter=100_000).fit(A, b)
        np.testing.assert_allclose(model.coef_, peer.coef_, atol=1e-4)
        assert model.intercept_ == pytest.approx(peer.intercept_, abs=1e-4)

    def test_validation_rows_go_together(self):
        with pytest.raises(ValueError, match="X_val and y_val"):
            MehaElasticNetCV().fit(ROWS, ROWS[:, 0], X_val=ROWS)

    def test_same_answer_whatever_the_number_of_threads(self, assert_threads_agree):
        code = (
            "import numpy as np; from algokit.bilevel.moreau_envelope import MehaElasticNetCV;"
            "X = np.random.default_rng(0).normal(size=(60, 20));"
            "print(MehaElasticNetCV(max_iter=500).fit(X, X[:, 0] - X[:, 1]).path_.tobytes().hex())"
        )
        assert_threads_agree(code)


@parametrize_with_checks([MehaElasticNetCV()])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)
