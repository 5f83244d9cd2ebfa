"""Bures-Wasserstein maps against SciPy and closed forms; the layer's statistics and gradients; the network."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import solve_continuous_lyapunov, sqrtm
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from algokit.arrays import kind_of, to_numpy
from algokit.checks import AlgokitWarning
from algokit.matrices import spd_normalization as module
from algokit.matrices.spd_normalization import (
    SPDBatchNorm,
    SPDNet,
    bw_distance,
    bw_exp,
    bw_geodesic,
    bw_log,
    bw_mean,
    bw_transport,
    spd_batch_norm,
    spd_batch_norm_vjp,
    spd_power,
)


def spd(seed: int, n: int = 4, count: int | None = None, dof: int = 12) -> np.ndarray:
    """Wishart matrices divided by their degrees of freedom, shape (n, n) or (count, n, n)."""
    A = np.random.default_rng(seed).normal(size=(count or 1, n, dof))
    X = A @ A.transpose(0, 2, 1) / dof
    return X if count else X[0]


def symmetric(seed: int, *shape: int) -> np.ndarray:
    A = np.random.default_rng(seed).normal(size=shape)
    return A + np.swapaxes(A, -1, -2)


TINY, BATCH = spd(0, 2), spd(1, 2, 4)
EXAMPLES = {
    "spd_power": dict(X=BATCH, p=0.5),
    "bw_distance": dict(X=BATCH, Y=TINY, M=spd(2, 2), theta=0.5, squared=True),
    "bw_log": dict(B=TINY, X=BATCH),
    "bw_exp": dict(B=TINY, S=0.1 * symmetric(3, 4, 2, 2), check=True),
    "bw_transport": dict(B=TINY, S=symmetric(3, 4, 2, 2), inverse=True),
    "bw_geodesic": dict(A=TINY, B=BATCH, t=0.3),
    "bw_mean": dict(X=BATCH, weights=np.array([1.0, 2.0, 0.0, 1.0]), n_iter=100, tol=1e-8),
    "spd_batch_norm": dict(
        X=BATCH, bias=TINY, metric=spd(2, 2), scale=1.5, theta=0.5, eps=1e-5, mean=spd(4, 2), variance=0.5, mean_iter=2,
        variance_about="identity",
    ),
    "spd_batch_norm_vjp": dict(cache=spd_batch_norm(BATCH).cache, grad_output=symmetric(5, 4, 2, 2)),
    "SPDBatchNorm": dict(n=2, theta=0.5, momentum=0.1, eps=1e-5, mean_iter=1),
    "SPDBatchNorm.forward": (lambda: SPDBatchNorm(2), dict(X=BATCH, training=True)),
    "SPDNet": dict(
        dims=(2,), normalization="gbw", theta=0.5, n_steps=2, batch_size=3, learning_rate=0.05, rng=0,
    ),
    "SPDNet.fit": dict(X=BATCH, y=np.array([0, 1, 0, 1])),
    "SPDNet.predict": dict(X=BATCH),
    "SPDNet.predict_proba": dict(X=BATCH),
}  # fmt: skip
ACCEPTS = {  # any number is a label; a plain network ignores theta
    "SPDNet.fit.y": {"string", "zero", "negative", "huge"},
}


def test_maps_match_their_definitions_with_scipy():
    B, X, S = spd(0), spd(1), symmetric(2, 4, 4)
    root = sqrtm(sqrtm(B) @ X @ sqrtm(B))
    assert bw_distance(X, B, squared=True) == pytest.approx(np.trace(X + B - 2 * root).real, rel=1e-9)
    np.testing.assert_allclose(bw_log(B, X), (sqrtm(B @ X) + sqrtm(X @ B) - 2 * B).real, atol=1e-9)
    L = solve_continuous_lyapunov(B, S)
    np.testing.assert_allclose(bw_exp(B, S), B + S + L @ B @ L, atol=1e-10)
    np.testing.assert_allclose(spd_power(B, 0.3), np.linalg.matrix_power(spd_power(B, 0.1), 3), rtol=1e-10)
    np.testing.assert_allclose(spd_power(B, -1), np.linalg.inv(B), rtol=1e-9)


def test_commuting_matrices_are_flat_in_their_square_roots():
    a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 4.0])
    ra, rb = np.sqrt(a), np.sqrt(b)
    A, B = np.diag(a), np.diag(b)
    assert bw_distance(A, B) == pytest.approx(np.linalg.norm(ra - rb))
    np.testing.assert_allclose(bw_log(A, B), np.diag(2 * ra * (rb - ra)), atol=1e-12)
    np.testing.assert_allclose(bw_geodesic(A, B, 0.3), np.diag((0.7 * ra + 0.3 * rb) ** 2), atol=1e-12)
    np.testing.assert_allclose(bw_mean(np.stack([A, B, B])), np.diag(((ra + 2 * rb) / 3) ** 2), atol=1e-10)
    assert bw_distance(A, B, theta=0.5) == pytest.approx(2 * np.linalg.norm(a**0.25 - b**0.25))
    M = np.diag([4.0, 1.0, 9.0])
    assert bw_distance(A, B, M=M) == pytest.approx(np.linalg.norm((ra - rb) / np.sqrt(np.diag(M))))


seeds = st.integers(0, 10**6)


@given(seeds)
def test_exp_undoes_log_and_log_has_the_length_of_the_distance(seed):
    B, X = spd(seed), spd(seed + 1)
    S = bw_log(B, X)
    np.testing.assert_allclose(bw_exp(B, S, check=True), X, atol=1e-9)
    L = solve_continuous_lyapunov(B, S)
    assert 0.5 * np.trace(L @ S) == pytest.approx(bw_distance(B, X, squared=True), rel=1e-6, abs=1e-10)


@given(seeds)
def test_distance_is_a_metric_and_invariant_under_rotation(seed):
    X, Y, Z = spd(seed), spd(seed + 1), spd(seed + 2)
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0]
    d = bw_distance(X, Y)
    assert d == pytest.approx(bw_distance(Y, X), rel=1e-9)
    assert d <= bw_distance(X, Z) + bw_distance(Z, Y) + 1e-9
    rotated = [module._sym(Q @ P @ Q.T) for P in (X, Y)]
    assert bw_distance(*rotated) == pytest.approx(d, rel=1e-7, abs=1e-9)


@given(seeds, st.floats(0, 1))
def test_geodesics_have_constant_speed(seed, t):
    A, B = spd(seed), spd(seed + 1)
    d = bw_distance(A, B)
    assert bw_distance(A, bw_geodesic(A, B, t)) == pytest.approx(t * d, rel=1e-5, abs=1e-6)


@given(seeds)
def test_transport_keeps_lengths_and_comes_back(seed):
    B, S = spd(seed), symmetric(seed, 4, 4)
    moved = bw_transport(B, S)
    L = solve_continuous_lyapunov(B, S)
    assert np.trace(moved @ moved) / 4 == pytest.approx(0.5 * np.trace(L @ S), rel=1e-8)  # the metric at I
    np.testing.assert_allclose(bw_transport(B, moved, inverse=True), S, atol=1e-9)


@given(seeds)
def test_logarithms_cancel_at_the_mean(seed):
    X, weights = spd(seed, 3, 5), np.random.default_rng(seed).random(5) + 0.1
    G = bw_mean(X, weights=weights, n_iter=300)
    np.testing.assert_allclose(np.einsum("i,ijk->jk", weights / weights.sum(), bw_log(G, X)), 0, atol=1e-8)
    objective = lambda P: (weights * bw_distance(X, P, squared=True)).sum()  # noqa: E731
    assert objective(G) <= objective(G + 1e-3 * np.eye(3)) and objective(G) <= objective(X.mean(axis=0))


def test_mean_warns_when_it_stops_early():
    with pytest.warns(AlgokitWarning, match="n_iter=1"):
        one = bw_mean(spd(3, 4, 6), n_iter=1)
    root = spd_power(spd(3, 4, 6).mean(axis=0), 0.5)
    inner = spd_power(module._sym(root @ spd(3, 4, 6) @ root), 0.5).mean(axis=0)
    inverse = np.linalg.inv(root)
    np.testing.assert_allclose(one, inverse @ inner @ inner @ inverse, rtol=1e-8)


@pytest.mark.parametrize("theta", [0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_normalised_batch_has_mean_identity_and_variance_one(theta, seed):
    X = spd(seed, 6, 64, dof=60)
    result = spd_batch_norm(X, theta=theta, eps=0.0, mean_iter=500)
    assert result.n_folded == 0
    powered = spd_power(result.output, theta)
    G = bw_mean(powered, n_iter=500)
    np.testing.assert_allclose(G, np.eye(6), atol=1e-8)
    assert np.mean(bw_distance(powered, G, squared=True)) / theta**2 == pytest.approx(1.0, abs=1e-6)


def test_with_a_bias_the_mean_of_the_output_is_the_bias():
    X, G = spd(4, 4, 50, dof=60), spd(5, 4) + 2 * np.eye(4)
    result = spd_batch_norm(X, bias=G, mean_iter=500, scale=0.3)
    np.testing.assert_allclose(bw_mean(result.output, n_iter=500), G, atol=1e-7)


def test_metric_and_bias_at_the_mean_never_fold():
    A = np.random.default_rng(6).normal(size=(64, 6, 8)) * 3**0.5
    X = A @ A.transpose(0, 2, 1) / 8
    M = bw_mean(X, n_iter=500)
    plain, metric, both = (
        spd_batch_norm(X, mean_iter=500, **options) for options in ({}, {"metric": M}, {"metric": M, "bias": M})
    )
    assert plain.n_folded > 32 and 0 < metric.n_folded < 10  # from I to the bias, some still fold
    assert both.n_folded == 0
    R = spd_power(M, -0.5)
    np.testing.assert_allclose(bw_mean(module._sym(R @ both.output @ R), n_iter=500), np.eye(6), atol=1e-8)


def test_one_dimension_is_the_line_of_square_roots():
    x = np.array([0.01, 1.0, 4.0, 9.0])[:, None, None]
    result = spd_batch_norm(x, eps=0.0, mean_iter=100)
    roots = np.sqrt(x[:, 0, 0])
    centred = np.abs(1 + roots - roots.mean())
    expected = np.abs(1 + (centred - 1) / roots.std()) ** 2
    np.testing.assert_allclose(result.output[:, 0, 0], expected, rtol=1e-7)
    assert result.variance == pytest.approx(roots.var())
    about = spd_batch_norm(x, variance_about="identity", mean_iter=100)
    assert about.variance == pytest.approx(((roots - 1) ** 2).mean())


def test_a_batch_of_one_goes_to_the_bias():
    G = spd(7) + np.eye(4)
    result = spd_batch_norm(spd(8, 4, 1), bias=G, mean_iter=100)
    assert result.variance == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(result.output[0], G, atol=1e-4)
    with pytest.raises(ValueError, match="eps"):
        spd_batch_norm(np.eye(2)[None], variance=0.0, eps=0.0)


@pytest.mark.parametrize("theta", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("ties", [False, True])
def test_gradients_match_finite_differences(theta, ties):
    rng = np.random.default_rng(9)
    if ties:  # multiples of the identity: every divided difference is a derivative
        arrays = {"X": np.arange(1.0, 6.0)[:, None, None] * np.eye(4), "bias": 1.3 * np.eye(4), "metric": np.eye(4)}
    else:
        arrays = {"X": spd(10, 4, 5), "bias": spd(11) + 0.3 * np.eye(4), "metric": spd(12) + 0.3 * np.eye(4)}
    D = symmetric(13, 5, 4, 4)
    base = spd_batch_norm(**arrays, scale=1.2, theta=theta)
    fixed = dict(theta=theta, mean=base.mean, variance=base.variance)
    loss = lambda scale=1.2, **a: (spd_batch_norm(**a, scale=scale, **fixed).output * D).sum()  # noqa: E731
    grads, h = spd_batch_norm_vjp(base.cache, D), 1e-6
    for name, array in arrays.items():
        V = symmetric(int(rng.integers(1000)), *array.shape)
        numeric = (loss(**arrays | {name: array + h * V}) - loss(**arrays | {name: array - h * V})) / (2 * h)
        assert (grads[name] * V).sum() == pytest.approx(numeric, rel=1e-6, abs=1e-7)
        np.testing.assert_allclose(grads[name], np.swapaxes(grads[name], -1, -2))
    numeric = (loss(scale=1.2 + h, **arrays) - loss(scale=1.2 - h, **arrays)) / (2 * h)
    assert grads["scale"] == pytest.approx(numeric, rel=1e-6)


def test_every_backend_agrees(xp_array):
    B, X, S = spd(14), spd(15, 4, 5), 0.1 * symmetric(16, 5, 4, 4)
    b, x, s, w = xp_array(B), xp_array(X), xp_array(S), np.arange(1.0, 6.0)
    pairs = [
        (spd_power(x, 0.3), spd_power(X, 0.3)),
        (bw_distance(x, b, M=b, theta=0.5), bw_distance(X, B, M=B, theta=0.5)),
        (bw_log(b, x), bw_log(B, X)),
        (bw_exp(b, s, check=True), bw_exp(B, S)),
        (bw_transport(b, s), bw_transport(B, S)),
        (bw_geodesic(b, x, 0.3), bw_geodesic(B, X, 0.3)),
        (bw_mean(x, weights=xp_array(w), n_iter=200), bw_mean(X, weights=w, n_iter=200)),
    ]  # fmt: skip
    options = dict(theta=0.5, scale=1.2, mean_iter=2)
    there, here = spd_batch_norm(x, bias=b, metric=b, **options), spd_batch_norm(X, bias=B, metric=B, **options)
    grads, expected = spd_batch_norm_vjp(there.cache, s), spd_batch_norm_vjp(here.cache, S)
    pairs += [(there.output, here.output), (there.mean, here.mean)]
    pairs += [(grads[k], expected[k]) for k in ("X", "bias", "metric")]
    for got, want in pairs:
        assert kind_of(got) == xp_array.kind
        np.testing.assert_allclose(to_numpy(got), want, rtol=1e-6, atol=1e-9)
    assert there.n_folded == here.n_folded and there.variance == pytest.approx(here.variance)
    assert grads["scale"] == pytest.approx(expected["scale"])
    assert kind_of(SPDBatchNorm(4).forward(x, training=True).output) == xp_array.kind


def test_bad_matrices_are_named_with_their_place():
    X = spd(17, 3, 4)
    X[2, 0, 1] += 1
    with pytest.raises(ValueError, match=r"X must be symmetric.*\(2,\)"):
        spd_batch_norm(X)
    X = spd(17, 3, 4)
    X[1] = -np.eye(3)
    with pytest.raises(ValueError, match=r"X must be positive semidefinite.*\(1,\)"):
        bw_distance(X, np.eye(3))
    singular = np.diag([1.0, 0.0, 2.0])
    assert bw_distance(singular, np.eye(3)) == pytest.approx(np.sqrt(1 + (np.sqrt(2) - 1) ** 2))
    for call in (lambda: bw_log(singular, np.eye(3)), lambda: spd_power(singular, -0.5)):
        with pytest.raises(ValueError, match="must be positive definite"):
            call()
    with pytest.raises(ValueError, match="fold"):
        bw_exp(np.eye(2), np.array([[-3.0, 0.0], [0.0, 1.0]]), check=True)


def test_running_statistics():
    layer, X = SPDBatchNorm(3, momentum=0.5), spd(18, 3, 30)
    one = layer.forward(X, training=True)
    np.testing.assert_allclose(layer.running_mean_, bw_geodesic(np.eye(3), one.mean, 0.5), rtol=1e-12)
    assert layer.running_var_ == pytest.approx(0.5 + 0.5 * one.variance)
    for _ in range(60):
        layer.forward(X, training=True)
    np.testing.assert_allclose(layer.running_mean_, one.mean, atol=1e-6)
    np.testing.assert_allclose(layer.forward(X, training=False).output, one.output, atol=1e-3)


def task(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    L = np.linalg.cholesky(spd(seed, 5, 3, dof=8))
    Z = L[:, None] @ rng.normal(size=(3, 40, 5, 20))
    return (Z @ Z.transpose(0, 1, 3, 2) / 20).reshape(-1, 5, 5), np.repeat(np.array(["a", "b", "c"]), 40)


@pytest.mark.parametrize("normalization", [None, "aim", "bw", "gbw"])
def test_network_learns(normalization):
    X, y = task(19)
    net = SPDNet((4, 3), normalization=normalization, theta=0.5, n_steps=120, learning_rate=0.1, rng=0).fit(X, y)
    assert net.loss_curve_[-10:].mean() < 0.7 * net.loss_curve_[:10].mean()
    assert net.score(X, y) > 0.7 and set(net.predict(X)) <= {"a", "b", "c"}
    np.testing.assert_allclose(net.predict_proba(X).sum(axis=1), 1)
    for W in net._weights:
        np.testing.assert_allclose(W.T @ W, np.eye(W.shape[1]), atol=1e-10)
    again = clone(net).fit(X, y)
    np.testing.assert_array_equal(again.loss_curve_, net.loss_curve_)


@pytest.mark.parametrize("normalization", [None, "aim", "gbw"])
def test_a_step_follows_the_gradient(normalization):
    """After a tiny step the loss of the same batch falls by rate x |Riemannian gradient|^2 > 0 (statistics frozen)."""
    X, y = task(20)
    net = SPDNet((3,), normalization=normalization, n_steps=1, batch_size=120, learning_rate=1e-4, rng=0).fit(X, y)
    before = net.loss_curve_[0]
    labels = np.searchsorted(net.classes_, y)
    assert net._step(X, labels, 1e-4) < before


def test_network_checks_its_arguments():
    X, y = task(21)
    with pytest.raises(ValueError, match="dims"):
        SPDNet((6,)).fit(X, y)
    with pytest.raises(NotFittedError):
        SPDNet().predict(X)
    with pytest.raises(ValueError, match="size 5"):
        SPDNet((2,), n_steps=1, rng=0).fit(X, y).predict(X[:, :3, :3])


@pytest.mark.gpu
def test_gpu_agrees_with_the_host():
    cupy = pytest.importorskip("cupy")
    X = spd(22, 6, 40)
    host, device = spd_batch_norm(X, theta=0.5), spd_batch_norm(cupy.asarray(X), theta=0.5)
    np.testing.assert_allclose(device.output.get(), host.output, rtol=1e-8)


SCRIPT = """
import hashlib, numpy as np
from algokit.matrices.spd_normalization import SPDNet
A = np.random.default_rng(0).normal(size=(60, 4, 9))
net = SPDNet((3,), n_steps=20, rng=0).fit(A @ A.transpose(0, 2, 1) / 9, np.arange(60) % 2)
print(hashlib.sha256(net.loss_curve_.tobytes()).hexdigest())
"""


def test_same_seed_same_answer_whatever_the_number_of_threads(assert_threads_agree):
    assert_threads_agree(SCRIPT)
