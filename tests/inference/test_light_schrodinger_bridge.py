"""Light Schrödinger bridge: quadrature, finite differences, closed forms, POT, invariants, backends, bad input."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.integrate import quad
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from algokit.arrays import kind_of, to_numpy
from algokit.checks import AlgokitWarning
from algokit.inference import light_schrodinger_bridge as module
from algokit.inference.light_schrodinger_bridge import (
    ConditionalMixture,
    LightSchrodingerBridge,
    bw_uvp,
    conditional_bw_uvp,
    gaussian_bridge,
)

_X = np.array([[0.0, 1.0], [1.0, 0.5], [0.3, 0.2], [-1.0, 0.4]])
_Y = np.array([[2.0, 1.0], [3.0, 2.5], [0.3, 2.2], [-1.0, 1.4], [2.0, 0.1]])
_PLAN = ConditionalMixture(np.full((2, 2), 0.5), np.arange(8.0).reshape(2, 2, 2), np.ones((2, 2)))
_COV = np.array([[2.0, 0.5], [0.5, 1.0]])
EXAMPLES: dict[str, Any] = {
    "gaussian_bridge": dict(mean0=np.zeros(2), cov0=_COV, mean1=np.ones(2), cov1=np.eye(2), epsilon=0.5),
    "bw_uvp": dict(mean_a=np.zeros(2), cov_a=_COV, mean_b=np.ones(2), cov_b=np.eye(2)),
    "conditional_bw_uvp": dict(plan_a=_PLAN, plan_b=_PLAN, target_var=1.0),
    "LightSchrodingerBridge": dict(
        n_components=2,
        epsilon=1.0,
        covariance="diag",
        init_scale=1.0,
        min_scale=0.1,
        optimizer="adam",
        max_iter=3,
        learning_rate=0.01,
        batch_size=4,
        tol=1e-8,
        rng=0,
    ),
    "LightSchrodingerBridge.fit": dict(X=_X, Y=_Y),
    "LightSchrodingerBridge.conditional": dict(X=_X),
    "LightSchrodingerBridge.transform": dict(X=_X),
    "LightSchrodingerBridge.sample": dict(X=_X, rng=0),
    "LightSchrodingerBridge.drift": dict(X=_X, t=0.5),
    "LightSchrodingerBridge.sample_path": dict(X=_X, times=np.array([0.0, 0.5, 1.0]), method="sde", n_steps=2, rng=0),
    "LightSchrodingerBridge.log_potential": dict(Y=_Y),
    "LightSchrodingerBridge.log_normalizer": dict(X=_X),
    "LightSchrodingerBridge.objective": dict(X=_X, Y=_Y),
}

FORMS = ["diag", "full"]


def _samples(seed: int = 0, n: int = 200, D: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Two samples far from the origin, the second with three groups."""
    rng = np.random.default_rng(seed)
    groups = rng.normal(0, 3, (3, D))
    X = rng.normal(0, 1, (n, D)) @ rng.normal(0, 1, (D, D)) + 1
    return X, groups[rng.integers(3, size=n + 7)] + rng.normal(0, 0.7, (n + 7, D)) - 2


def _fitted(form: str = "diag", D: int = 2, K: int = 3, epsilon: float = 0.7, **options: Any) -> LightSchrodingerBridge:
    options = dict(max_iter=20, min_scale=0.05, rng=3) | options
    return LightSchrodingerBridge(K, epsilon=epsilon, covariance=form, **options).fit(*_samples(D=D))


def _full(scales: np.ndarray) -> np.ndarray:
    return scales if scales.ndim == 3 else np.stack([np.diag(s) for s in scales])


def _components(model: LightSchrodingerBridge) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """log alpha, r and S (as a matrix) of each component."""
    return list(zip(np.log(model.weights_), model.locations_, _full(model.scales_), strict=True))


def _plain_potential(model: LightSchrodingerBridge, y: np.ndarray) -> float:
    """log v(y), as the paper writes it, from the public parameters."""
    parts = [a + multivariate_normal(r, model.epsilon * S).logpdf(y) for a, r, S in _components(model)]
    return float(logsumexp(parts))


# ---- objective and gradient ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("D", [1, 3])
def test_gradient_matches_finite_differences(form: str, D: int) -> None:
    rng, full, K = np.random.default_rng(0), form == "full", 4
    X, Y = rng.standard_normal((37, D)), rng.standard_normal((29, D)) + 1
    problem = module._Problem(module._features(X, full), module._features(Y, full), 0.7, K, D, full)
    start = module._Potential(rng.normal(size=K), rng.normal(size=(K, D)), np.exp(rng.normal(0, 0.3, (K, D))))
    theta = module._pack(start, problem, 0.5)
    theta += 0.1 * rng.standard_normal(len(theta))
    _, gradient = module._objective(theta, problem, 0.5)
    ends = [[module._objective(theta + s * 1e-5 * e, problem, 0.5)[0] for s in (1, -1)] for e in np.eye(len(theta))]
    assert_allclose(gradient, np.diff(ends, axis=1)[:, 0] / -2e-5, atol=2e-9)


@pytest.mark.parametrize("form", FORMS)
def test_objective_is_the_one_of_the_paper(form: str) -> None:
    model, (X, Y) = _fitted(form), _samples(1)
    log_c = [
        logsumexp([a + (x @ S @ x + 2 * r @ x) / (2 * model.epsilon) for a, r, S in _components(model)]) for x in X
    ]
    log_v = [_plain_potential(model, y) for y in Y]
    assert_allclose(model.log_normalizer(X), log_c, atol=1e-8)
    assert_allclose(model.log_potential(Y), log_v, atol=1e-8)
    assert model.objective(X, Y) == pytest.approx(np.mean(log_c) - np.mean(log_v))
    assert model.objective(*_samples()) == pytest.approx(model.objective_, abs=1e-9)
    assert len(model.loss_curve_) == model.n_iter_ and (np.diff(model.loss_curve_) < 0).all()


@pytest.mark.parametrize("n", [1, 3, 4, 5, 255, 257, 3000])
@pytest.mark.parametrize("K", [1, 7, 40])
def test_kernel_agrees_with_matrix_products(n: int, K: int) -> None:
    rng = np.random.default_rng(n * K)
    X, W, offset = rng.standard_normal((n, 8)), rng.standard_normal((8, K)) * 30, rng.standard_normal(K) * 30
    for one, other in zip(module._pass_cpu(X, offset, W), module._pass_arrays(X, offset, W), strict=True):
        assert_allclose(one, other, rtol=1e-10, atol=1e-10)


def test_exponential_of_the_kernel_is_exact_to_rounding() -> None:
    x = -np.concatenate([[0.0], np.geomspace(1e-12, 700, 1000), [740.0, 1e6]])
    z = x.copy()
    assert module._exponentials(z, 0.0, np.empty(len(x))) == pytest.approx(np.exp(x).sum())
    assert_allclose(z[:-2], np.exp(x[:-2]), rtol=1e-15)
    assert (z[-2:] < 1e-300).all() and (z >= 0).all()


# ---- against quadrature ----


def test_normaliser_and_plan_match_quadrature_in_one_dimension() -> None:
    model = _fitted(D=1, K=3)
    v = lambda y: np.exp(model.log_potential([[y]])[0])  # noqa: E731
    for x in (-1.0, 0.4, 2.0):
        moments = [
            quad(
                lambda y, p=p, x=x: y**p * np.exp(x * y / model.epsilon) * v(y),
                -60,
                60,
                limit=500,
                points=[-6, -3, 0, 3],
            )[0]
            for p in range(3)
        ]
        assert model.log_normalizer([[x]])[0] == pytest.approx(np.log(moments[0]), abs=1e-6)
        mean, covariance = model.conditional([[x]]).moments()
        assert mean[0, 0] == pytest.approx(moments[1] / moments[0], abs=1e-6)
        assert covariance[0, 0, 0] == pytest.approx(moments[2] / moments[0] - mean[0, 0] ** 2, abs=1e-5)
        assert model.transform([[x]])[0, 0] == pytest.approx(mean[0, 0])


@pytest.mark.parametrize("t", [0.0, 0.3, 0.95])
def test_drift_matches_quadrature(t: float) -> None:
    """g = eps d/dx log of the heat flow of exp(y^2 / 2 eps) v(y), by numerical integration and differences."""
    model = _fitted(D=1, K=3)
    eps = model.epsilon

    def log_flow(x: float) -> float:
        y = np.linspace(-40, 40, 160_001)
        f = y**2 / (2 * eps) + model.log_potential(y[:, None]) - (y - x) ** 2 / (2 * eps * (1 - t))
        return float(logsumexp(f))

    for x in (-1.3, 0.2, 2.5):
        expected = eps * (log_flow(x + 1e-4) - log_flow(x - 1e-4)) / 2e-4
        assert model.drift([[x]], t)[0, 0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t", [0.0, 0.4, 0.9])
def test_drift_is_the_formula_of_the_paper(form: str, t: float) -> None:
    """A_k, h_k as published, and finite differences of the log-sum; ours has no 1 / (1 - t) in it."""
    model, x = _fitted(form, D=3), np.array([0.3, -1.0, 2.0])
    eps = model.epsilon

    def log_sum(x: np.ndarray) -> float:
        parts = []
        for alpha, r, S in zip(model.weights_, model.locations_, _full(model.scales_), strict=True):
            P = np.linalg.inv(S)
            A, h = t / (eps * (1 - t)) * np.eye(3) + P / eps, x / (eps * (1 - t)) + P @ r / eps
            parts.append(
                np.log(alpha) - 0.5 * np.linalg.slogdet(S)[1] - 0.5 * np.linalg.slogdet(A)[1]
                - r @ P @ r / (2 * eps) + 0.5 * h @ np.linalg.solve(A, h)
            )  # fmt: skip
        return float(logsumexp(parts)) - x @ x / (2 * eps * (1 - t))

    expected = [eps * (log_sum(x + 1e-5 * e) - log_sum(x - 1e-5 * e)) / 2e-5 for e in np.eye(3)]
    assert_allclose(model.drift(x[None], t)[0], expected, atol=1e-4)


def test_drift_at_time_zero_points_to_the_conditional_mean_and_times_may_differ_by_row() -> None:
    for form in FORMS:
        model, (X, _) = _fitted(form), _samples(2)
        assert_allclose(model.drift(X, 0.0), model.transform(X) - X, atol=1e-10)
        t = np.random.default_rng(0).choice([0.0, 0.25, 0.9], len(X))
        assert_allclose(model.drift(X, t), [model.drift(x[None], s)[0] for x, s in zip(X, t, strict=True)], atol=1e-12)


# ---- closed forms and peers ----


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("D", [1, 3])
def test_one_component_is_the_gaussian_bridge(D: int, epsilon: float) -> None:
    X, Y = _samples(D=D)
    model = LightSchrodingerBridge(1, epsilon=epsilon, covariance="full", tol=1e-13, rng=0).fit(X, Y)
    cov = [np.atleast_2d(np.cov(Z.T, bias=True)) for Z in (X, Y)]
    exact = gaussian_bridge(X.mean(0), cov[0], Y.mean(0), cov[1], epsilon=epsilon)
    assert_allclose(model.scales_[0], exact.slope, rtol=1e-4, atol=1e-5)
    assert_allclose(model.locations_[0], exact.intercept, rtol=1e-4, atol=1e-4)
    assert model.converged_


@given(st.integers(1, 4), st.floats(0.01, 100), st.integers(0, 10**6))
def test_gaussian_bridge_has_the_right_marginal(D: int, epsilon: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(2, D, D))
    cov0, cov1 = A @ A.T + 0.1 * np.eye(D), B @ B.T + 0.1 * np.eye(D)
    mean0, mean1 = rng.normal(size=(2, D))
    bridge = gaussian_bridge(mean0, cov0, mean1, cov1, epsilon=epsilon)
    S = bridge.slope
    assert_allclose(S @ cov0 @ S + bridge.cond_cov, cov1, atol=1e-7 * np.abs(cov1).max())
    assert_allclose(bridge.intercept + S @ mean0, mean1, atol=1e-9)
    assert_allclose(bridge.cond_cov, epsilon * S)
    assert_allclose(bridge.cross_cov, cov0 @ S)


def test_gaussian_bridge_without_noise_is_optimal_transport_and_with_much_is_independent() -> None:
    quiet = gaussian_bridge([0.0], [[4.0]], [1.0], [[9.0]], epsilon=1e-9)
    assert quiet.slope[0, 0] == pytest.approx(1.5) and quiet.cond_cov[0, 0] < 1e-8
    loud = gaussian_bridge([0.0], [[4.0]], [1.0], [[9.0]], epsilon=1e9)
    assert loud.cross_cov[0, 0] < 1e-6 and loud.cond_cov[0, 0] == pytest.approx(9.0)


def test_metric_agrees_with_pot() -> None:
    ot = pytest.importorskip("ot")
    rng = np.random.default_rng(0)
    for _ in range(5):
        A, B = rng.normal(size=(2, 3, 3))
        a, b = rng.normal(size=(2, 3))
        distance = ot.gaussian.bures_wasserstein_distance(a, b, A @ A.T, B @ B.T)
        assert bw_uvp(a, A @ A.T, b, B @ B.T) == pytest.approx(200 * distance**2 / np.trace(B @ B.T), rel=1e-6)


def test_metric_of_equal_and_of_singular_covariances() -> None:
    assert bw_uvp([1.0, 2.0], _COV, [1.0, 2.0], _COV) == pytest.approx(0, abs=1e-10)
    assert bw_uvp([0.0, 0.0], np.zeros((2, 2)), [0.0, 0.0], np.diag([3.0, 1.0])) == pytest.approx(200)


def test_moments_of_a_plan_are_those_of_its_samples() -> None:
    for form in FORMS:
        model = _fitted(form, K=3)
        mean, covariance = model.conditional([[0.5, 1.0]]).moments()
        draws = model.sample(np.tile([0.5, 1.0], (200_000, 1)), rng=0)
        assert_allclose(draws.mean(0), mean[0], atol=0.03)
        assert_allclose(np.cov(draws.T), covariance[0], atol=0.06)


def test_conditional_metric_averages_the_metric() -> None:
    diagonal, full = _fitted("diag"), _fitted("full")
    X = _samples(4)[0][:6]
    one, other = diagonal.conditional(X), full.conditional(X)
    pairs = zip(*one.moments(), *other.moments(), strict=True)
    expected = np.mean([bw_uvp(m, C, n, E) * np.trace(E) / 200 for m, C, n, E in pairs])
    assert conditional_bw_uvp(one, other, target_var=3.0) == pytest.approx(200 / 3 * expected)
    assert conditional_bw_uvp(one, one, target_var=3.0) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="same points"):
        conditional_bw_uvp(one, full.conditional(X[:3]), target_var=1.0)


def test_barycentric_map_is_that_of_sinkhorn() -> None:
    """Entropic optimal transport between the samples themselves, by POT, on 300 points of either side."""
    ot = pytest.importorskip("ot")
    rng = np.random.default_rng(0)
    X, Y = rng.normal(0, 1, (300, 2)), rng.choice([-2, 2], (300, 2)) + rng.normal(0, 0.5, (300, 2))
    epsilon = 1.0
    plan = ot.sinkhorn([], [], 0.5 * ot.dist(X, Y), epsilon, method="sinkhorn_log", numItermax=5000)
    expected = plan @ Y / plan.sum(1, keepdims=True)
    model = LightSchrodingerBridge(8, epsilon=epsilon, init_scale=0.3, min_scale=0.02, rng=1).fit(X, Y)
    assert ((model.transform(X) - expected) ** 2).sum(1).mean() < 0.05 * Y.var(0).sum()


# ---- what the optimum must satisfy ----


@pytest.mark.parametrize("form", FORMS)
def test_at_the_optimum_moments_match(form: str) -> None:
    """Each component holds the same mass of source and target, and the model's target mean is the sample's."""
    X, Y = _samples()
    model = LightSchrodingerBridge(3, epsilon=1.0, covariance=form, min_scale=0.05, tol=1e-14, rng=0).fit(X, Y)
    source = model.conditional(X).weights.mean(0)
    log_parts = [a + multivariate_normal(r, S).logpdf(Y) for a, r, S in _components(model)]
    assert_allclose(source, softmax(log_parts, axis=0).mean(1), atol=1e-4)
    assert_allclose(model.transform(X).mean(0), Y.mean(0), atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_translations_commute_with_the_fit(form: str) -> None:
    X, Y = _samples()
    a, b = np.array([100.0, -50.0]), np.array([-3.0, 1000.0])
    one = _fitted(form)
    other = clone(one).fit(X + a, Y + b)
    assert_allclose(other.transform(X + a), one.transform(X) + b, rtol=1e-6, atol=1e-6)
    t = 0.6
    assert_allclose(other.drift(X + (1 - t) * a + t * b, t), one.drift(X, t) + b - a, rtol=1e-6, atol=1e-5)


@given(st.floats(0.02, 50), st.integers(0, 10**6))
def test_plan_is_a_plan(epsilon: float, seed: int) -> None:
    X, Y = _samples(seed, n=60)
    plan = LightSchrodingerBridge(4, epsilon=epsilon, max_iter=5, min_scale=0.1, rng=seed).fit(X, Y).conditional(X)
    assert_allclose(plan.weights.sum(1), 1)
    assert (plan.weights >= 0).all() and (plan.covariances > 0).all() and np.isfinite(plan.means).all()


def test_adam_reaches_what_lbfgs_reaches() -> None:
    X, Y = _samples()
    options = dict(n_components=3, epsilon=1.0, min_scale=0.05, rng=0)
    best = LightSchrodingerBridge(**options).fit(X, Y)
    adam = LightSchrodingerBridge(optimizer="adam", max_iter=3000, learning_rate=0.01, **options).fit(X, Y)
    assert adam.n_iter_ == 3000 and not adam.converged_
    assert adam.objective(X, Y) < best.objective(X, Y) + 0.1


# ---- paths ----


def test_paths_start_at_the_source_and_both_methods_have_the_same_law() -> None:
    model = _fitted("full", epsilon=1.0)
    X = np.tile([0.5, 1.0], (20_000, 1))
    times = np.array([0.0, 0.4, 0.4, 1.0])
    exact = model.sample_path(X, times, rng=0)
    euler = model.sample_path(X, times, method="sde", n_steps=100, rng=1)
    for paths in (exact, euler):
        assert_array_equal(paths[0], X)
        assert_array_equal(paths[1], paths[2])  # the same time is the same place
    mean, covariance = model.conditional(X[:1]).moments()
    assert_allclose(exact[3].mean(0), mean[0], atol=0.1)
    assert_allclose(np.cov(exact[3].T), covariance[0], rtol=0.05, atol=0.1)
    middle = 0.6 * X[0] + 0.4 * mean[0], 0.16 * covariance[0] + 0.24 * np.eye(2)  # of a Brownian bridge
    assert_allclose(exact[1].mean(0), middle[0], atol=0.05)
    assert_allclose(np.cov(exact[1].T), middle[1], rtol=0.05, atol=0.05)
    for i in (1, 3):
        assert_allclose(euler[i].mean(0), exact[i].mean(0), atol=0.12)
        assert_allclose(np.cov(euler[i].T), np.cov(exact[i].T), rtol=0.08, atol=0.15)


def test_bridge_increments_have_the_variance_of_the_noise() -> None:
    model = _fitted(D=1)
    paths = model.sample_path(np.zeros((500, 1)), np.linspace(0, 1, 401), rng=0)[:, :, 0]
    assert (np.diff(paths, axis=0) ** 2).sum(0).mean() == pytest.approx(model.epsilon, rel=0.05)


# ---- backends, threads, edges ----


def test_every_backend_gives_the_same_and_its_own_kind(xp_array: Any) -> None:
    X, Y = (Z[:40] for Z in _samples(n=40))
    halves = np.repeat([0.9, 0.2], 20)
    for form in FORMS:
        options = dict(epsilon=0.7, covariance=form, max_iter=3, min_scale=0.05, rng=3)
        host = LightSchrodingerBridge(3, **options).fit(X, Y)
        model = LightSchrodingerBridge(3, **options).fit(xp_array(X), xp_array(Y))
        assert_allclose(model.locations_, host.locations_, rtol=1e-6, atol=1e-6)
        assert_allclose(model.scales_, host.scales_, rtol=1e-6, atol=1e-6)
        there = xp_array(X)
        pairs = [(model.transform(there), host.transform(X)), (model.drift(there, 0.3), host.drift(X, 0.3))]
        pairs += zip(vars(model.conditional(there)).values(), vars(host.conditional(X)).values(), strict=True)
        if form == "diag":
            pairs += [
                (model.drift(there, xp_array(halves)), host.drift(X, halves)),
                (model.sample(there, rng=0), host.sample(X, rng=0)),
                (model.log_potential(xp_array(Y)), host.log_potential(Y)),
                (model.log_normalizer(there), host.log_normalizer(X)),
            ]
            for method in ("bridge", "sde"):
                look = dict(times=[0.5, 1.0], method=method, n_steps=2, rng=0)
                pairs.append((model.sample_path(there, **look), host.sample_path(X, **look)))
        for got, expected in pairs:
            assert kind_of(got) == xp_array.kind
            assert_allclose(to_numpy(got), expected, rtol=1e-5, atol=1e-5)
        assert model.objective(there, xp_array(Y)) == pytest.approx(host.objective(X, Y))
    value = conditional_bw_uvp(model.conditional(there), model.conditional(there * 2), target_var=2.0)
    assert value == pytest.approx(conditional_bw_uvp(host.conditional(X), host.conditional(2 * X), target_var=2.0))
    adam = dict(epsilon=0.7, optimizer="adam", max_iter=2, batch_size=40, rng=3)
    there, host = (LightSchrodingerBridge(3, **adam).fit(*pair) for pair in ((xp_array(X), xp_array(Y)), (X, Y)))
    assert_allclose(there.locations_, host.locations_, rtol=1e-8)
    arguments = [np.zeros(2), _COV, np.ones(2), np.eye(2)]
    there = gaussian_bridge(*map(xp_array, arguments), epsilon=0.5)
    assert kind_of(there.slope) == xp_array.kind
    assert_allclose(to_numpy(there.slope), gaussian_bridge(*arguments, epsilon=0.5).slope)
    assert bw_uvp(*map(xp_array, arguments)) == pytest.approx(bw_uvp(*arguments))


def test_single_precision_stays_single() -> None:
    X, Y = (Z.astype(np.float32) for Z in _samples())
    model = LightSchrodingerBridge(3, max_iter=5, rng=0).fit(X, Y)
    for result in (model.transform(X), model.sample(X, rng=0), model.drift(X, 0.5), model.conditional(X).weights):
        assert result.dtype == np.float32


def test_same_answer_whatever_the_number_of_threads(assert_threads_agree: Any) -> None:
    assert_threads_agree(
        "import numpy as np; from algokit.inference.light_schrodinger_bridge import LightSchrodingerBridge as B;"
        "r = np.random.default_rng(0); X, Y = r.normal(size=(40_000, 5)), r.normal(size=(40_000, 5)) ** 3;"
        "m = B(60, epsilon=0.3, max_iter=3, rng=1).fit(X, Y);"
        "print(m.locations_.tobytes().hex()[:200], m.objective_)"
    )


def test_small_noise_stays_finite() -> None:
    X, Y = _samples()
    model = LightSchrodingerBridge(20, epsilon=1e-4, init_scale=0.3, min_scale=0.1, max_iter=30, rng=0).fit(X, Y)
    for result in (model.transform(X), model.drift(X, 0.999), model.log_potential(Y), model.log_normalizer(X)):
        assert np.isfinite(result).all()


def test_the_start_reaches_most_components_when_noise_is_small() -> None:
    """With equal weights only locations on the rim are ever reached; with the Gaussian bridge's nearly all are."""
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(1000, 2)), rng.normal(size=(1000, 2))
    r, epsilon = Y[:50], 0.01
    smart = module._gaussian_weights(X, Y, r, epsilon)
    forms = (0.1 * (X**2).sum(1)[:, None] + 2 * X @ r.T) / (2 * epsilon)  # (1000, 50)
    reached = [np.count_nonzero(softmax(la + forms, axis=1).mean(0) > 1e-3) for la in (np.zeros(50), smart)]
    assert reached[0] <= 15 and reached[1] >= 40


def test_degenerate_samples() -> None:
    X, Y = _samples()
    flat = np.column_stack([Y[:, 0], np.full(len(Y), 3.0)])
    with pytest.warns(AlgokitWarning, match="constant in column 1"):
        model = LightSchrodingerBridge(3, max_iter=50, rng=0).fit(X, flat)
    assert_allclose(model.transform(X)[:, 1], 3.0, atol=1e-3)
    with pytest.warns(AlgokitWarning, match="constant"):
        model = LightSchrodingerBridge(2, rng=0).fit(np.zeros((3, 2)), np.ones((4, 2)))
    assert_allclose(model.transform(np.zeros((1, 2))), 1.0, atol=1e-3)
    twice = np.repeat(Y[:10], 5, axis=0)
    model = LightSchrodingerBridge(6, min_scale=0.05, rng=0).fit(np.repeat(X[:10], 5, axis=0), twice)
    assert np.isfinite(model.objective_) and np.isfinite(model.transform(X)).all()


def test_shrinking_onto_samples_is_reported() -> None:
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(30, 8)), rng.normal(size=(30, 8))
    with pytest.warns(AlgokitWarning, match="min_scale"):
        LightSchrodingerBridge(10, epsilon=0.1, rng=0).fit(X, Y)
    held = [LightSchrodingerBridge(10, epsilon=0.1, min_scale=s, rng=0).fit(X, Y) for s in (0.3,)]
    assert held[0].scales_.min() >= 0.3 * (1 - 1e-9)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (dict(epsilon=0.0), "epsilon"),
        (dict(n_components=0), "n_components"),
        (dict(n_components=6), "rows of Y"),
        (dict(covariance="tied"), "covariance"),
        (dict(optimizer="sgd"), "optimizer"),
        (dict(min_scale=0.5, init_scale=0.1), "min_scale"),
    ],
)
def test_what_fit_refuses(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        LightSchrodingerBridge(**(dict(n_components=2) | options)).fit(_X, _Y)


def test_what_queries_refuse() -> None:
    with pytest.raises(NotFittedError):
        LightSchrodingerBridge().transform(_X)
    model = LightSchrodingerBridge(2, max_iter=3, rng=0).fit(_X, _Y)
    with pytest.raises(ValueError, match="Y must have"):
        LightSchrodingerBridge(2).fit(_X, _Y[:, :1])
    for t in (1.0, -0.1, [0.0, 0.5, 1.0, 0.2], [0.5]):
        with pytest.raises(ValueError, match=r"\bt\b"):
            model.drift(_X, t)
    with pytest.raises(ValueError, match="ascending"):
        model.sample_path(_X, [0.5, 0.2])
    with pytest.raises(TypeError, match="plan_a"):
        conditional_bw_uvp((1, 2, 3), _PLAN, target_var=1.0)


def test_scikit_learns_conventions() -> None:
    model = LightSchrodingerBridge(2, epsilon=0.3, rng=0, max_iter=3)
    assert clone(model).get_params() == model.get_params()
    before = vars(model).copy()
    with pytest.raises(ValueError, match="X"):
        model.fit(_X * np.nan, _Y)
    assert vars(model) == before
    model.fit(_X, _Y)
    assert_array_equal(pickle.loads(pickle.dumps(model)).transform(_X), model.transform(_X))
    assert_array_equal(clone(model).fit(_X, _Y).transform(_X), model.transform(_X))
    assert model.weights_.sum() == pytest.approx(1) and model.n_features_in_ == 2


@pytest.mark.gpu
def test_gpu_agrees_with_the_host() -> None:
    cupy = pytest.importorskip("cupy")
    X, Y = _samples(n=2000)
    options = dict(epsilon=0.5, max_iter=20, min_scale=0.05, rng=0)
    host = LightSchrodingerBridge(20, **options).fit(X, Y)
    device = LightSchrodingerBridge(20, **options).fit(cupy.asarray(X), cupy.asarray(Y))
    assert_allclose(device.transform(cupy.asarray(X)).get(), host.transform(X), rtol=1e-5, atol=1e-5)
