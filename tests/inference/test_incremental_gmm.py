"""Incremental Gaussian mixtures: the plain algorithm, batch peers, invariants, missing values, bad input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.stats import chi2, multivariate_normal
from sklearn.base import BaseEstimator
from sklearn.linear_model import Ridge
from sklearn.mixture import GaussianMixture
from sklearn.utils.estimator_checks import parametrize_with_checks

from algokit.arrays import kind_of, to_numpy
from algokit.data import digits
from algokit.inference import incremental_gmm
from algokit.inference.incremental_gmm import (
    GaussianMixtureSummary,
    IncrementalGaussianMixture,
    IncrementalMixtureClassifier,
    rank_one_inverse_update,
)

_X = np.array([[0.0, 1.0], [1.0, 0.5], [0.3, 0.2], [5.0, 5.0], [5.5, 4.0], [4.0, 5.1]])
_PARAMETERS = dict(
    delta=1.0,
    beta=0.1,
    scale=1.0,
    min_age=5,
    min_mass=3.0,
    prune=True,
    max_components=4,
    update="exact",
    representation="precision",
)
_SUMMARY = GaussianMixtureSummary(IncrementalGaussianMixture(scale=1.0))
_MOMENTS = _SUMMARY.update(_SUMMARY.init(), _X)
EXAMPLES = {
    "GaussianMixtureSummary": dict(mixture=IncrementalGaussianMixture(scale=1.0), max_components=4),
    "GaussianMixtureSummary.update": (lambda: _SUMMARY, dict(state=_MOMENTS, chunk=_X)),
    "GaussianMixtureSummary.merge": (lambda: _SUMMARY, dict(a=_MOMENTS, b=_MOMENTS)),
    "GaussianMixtureSummary.finish": (lambda: _SUMMARY, dict(state=_MOMENTS)),
    "rank_one_inverse_update": dict(
        precision=np.array([[2.0, 0.5], [0.5, 1.0]]), log_det=0.3, u=np.array([1.0, 2.0]), scale=0.5, weight=0.2
    ),
    "IncrementalGaussianMixture": _PARAMETERS,
    "IncrementalGaussianMixture.fit": dict(X=_X),
    "IncrementalGaussianMixture.partial_fit": dict(X=_X),
    "IncrementalGaussianMixture.score_samples": dict(X=_X),
    "IncrementalGaussianMixture.score": dict(X=_X),
    "IncrementalGaussianMixture.predict": dict(X=_X),
    "IncrementalGaussianMixture.predict_proba": dict(X=_X),
    "IncrementalGaussianMixture.reconstruct": dict(X=_X),
    "IncrementalMixtureClassifier": _PARAMETERS,
    "IncrementalMixtureClassifier.fit": dict(X=_X, y=np.array([0, 0, 0, 1, 1, 1])),
    "IncrementalMixtureClassifier.partial_fit": dict(X=_X, y=np.array([0, 0, 0, 1, 1, 1]), classes=np.array([0, 1, 2])),
    "IncrementalMixtureClassifier.predict": dict(X=_X),
    "IncrementalMixtureClassifier.predict_proba": dict(X=_X),
}
ACCEPTS = {
    "GaussianMixtureSummary.update.chunk": {"empty"},
    "IncrementalGaussianMixture.reconstruct.X": {"nan"},
    "IncrementalMixtureClassifier.fit.y": {"string"},
}


def cuts(n: int, seed: int) -> list[slice]:
    """A random partition of n rows into a few chunks, some of them empty."""
    bounds = np.sort(np.random.default_rng([seed, 1]).integers(0, n + 1, 4))
    return [slice(a, b) for a, b in zip([0, *bounds], [*bounds, n], strict=True)]


@parametrize_with_checks([IncrementalGaussianMixture(), IncrementalMixtureClassifier()])
def test_follows_scikit_learn(estimator: BaseEstimator, check: Callable[[BaseEstimator], None]) -> None:
    check(estimator)


def _cloud(seed: int = 0, n: int = 300, D: int = 4, K: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    means, roots = rng.normal(0, 5, (K, D)), rng.normal(0, 1, (K, D, D))
    z = rng.integers(K, size=n)
    return means[z] + np.einsum("nij,nj->ni", roots[z], rng.standard_normal((n, D)))


def _quiet(**parameters: Any) -> Callable[[np.ndarray], IncrementalGaussianMixture]:
    def fit(X: np.ndarray) -> IncrementalGaussianMixture:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return IncrementalGaussianMixture(**parameters).fit(X)

    return fit


def _plain(
    X: np.ndarray, *, delta: float, beta: float, update: str, min_age: int = 5, min_mass: float = 3.0
) -> tuple[np.ndarray, ...]:
    """The stream as the papers write it: covariances, inverted and factorised anew for every point."""
    D = X.shape[1]
    threshold = chi2.isf(beta, D) if beta else np.inf
    mu: list[np.ndarray] = []
    C: list[np.ndarray] = []
    sp: list[float] = []
    v: list[int] = []
    for x in X:
        e = [x - m for m in mu]
        d2 = [ej @ np.linalg.solve(Cj, ej) for ej, Cj in zip(e, C, strict=True)]
        if not any(d < threshold for d in d2):
            mu.append(x.copy())
            C.append(np.diag((delta * X.std(0)) ** 2))
            sp.append(1.0)
            v.append(1)
            continue
        log_p = np.array([np.log(s) - 0.5 * (np.linalg.slogdet(Cj)[1] + d) for s, Cj, d in zip(sp, C, d2, strict=True)])
        r = np.exp(log_p - log_p.max())
        r /= r.sum()
        for j in range(len(mu)):
            v[j] += 1
            sp[j] += r[j]
            w = r[j] / sp[j]
            step = w * e[j]
            mu[j] = mu[j] + step
            after = x - mu[j]
            if update == "exact":
                new = (1 - w) * C[j] + w * (1 - w) * np.outer(e[j], e[j])
            else:
                new = (1 - w) * C[j] + w * np.outer(after, after) - np.outer(step, step)
            if np.linalg.eigvalsh(new).min() > 0:
                C[j] = new
        for j in reversed(range(len(mu))):
            if v[j] > min_age and sp[j] < min_mass and len(mu) > 1:
                for column in (mu, C, sp, v):
                    column[j] = column[-1]  # type: ignore[index]
                    column.pop()  # type: ignore[attr-defined]
    return np.array(mu), np.array(C), np.array(sp), np.array(v)


@pytest.mark.parametrize("update", ["exact", "published"])
@pytest.mark.parametrize("representation", ["precision", "covariance"])
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("D", [1, 2, 5])
def test_agrees_with_the_plain_algorithm(update: str, representation: str, beta: float, D: int) -> None:
    X = _cloud(1, D=D)
    fast = _quiet(delta=0.5, beta=beta, update=update, representation=representation)(X)
    mu, C, sp, v = _plain(X, delta=0.5, beta=beta, update=update)
    assert_allclose(fast.means_, mu, rtol=1e-8, atol=1e-10)
    assert_allclose(fast.covariances_, C, rtol=1e-6, atol=1e-8)
    assert_allclose(fast.log_dets_, np.linalg.slogdet(C)[1], rtol=1e-8, atol=1e-8)
    assert_allclose(fast.masses_, sp, rtol=1e-8)
    assert_allclose(fast.ages_, v)


def test_two_points_by_hand() -> None:
    # scale 1, delta 1: C = 1. Second point at distance 1, w = 1/2: mean 1/2, C = 1/2 + 1/4.
    one = IncrementalGaussianMixture(beta=0.0, scale=1.0).fit([[0.0], [1.0]])
    assert_allclose(one.means_, [[0.5]])
    assert_allclose(one.covariances_, [[[0.75]]])
    assert_allclose(one.log_dets_, [np.log(0.75)])
    assert one.ages_.tolist() == [2]
    # the papers' coefficient is -1/8 there: C = 1/2 - 1/8
    two = IncrementalGaussianMixture(beta=0.0, scale=1.0, update="published").fit([[0.0], [1.0]])
    assert_allclose(two.covariances_, [[[0.375]]])


def test_published_loses_positive_definiteness_at_squared_distance_four() -> None:
    inside = IncrementalGaussianMixture(beta=0.0, scale=1.0, update="published").fit([[0.0, 0.0], [1.999, 0.0]])
    assert inside.n_rejected_ == 0
    with pytest.warns(RuntimeWarning, match="not positive definite"):
        outside = IncrementalGaussianMixture(beta=0.0, scale=1.0, update="published").fit([[0.0, 0.0], [2.0, 0.0]])
    assert outside.n_rejected_ == 1
    assert_allclose(outside.covariances_[0], np.eye(2))  # skipped; mean and mass moved on
    assert_allclose(outside.means_[0], [1.0, 0.0])
    assert_allclose(outside.masses_, [2.0])


@pytest.mark.parametrize("w", [0.5, 0.4, 0.2, 0.01])
def test_two_published_steps_are_one(w: float) -> None:
    rng = np.random.default_rng(0)
    root = rng.standard_normal((4, 4))
    C, e = root @ root.T + np.eye(4), 0.4 * rng.standard_normal(4)
    precision, log_det = np.linalg.inv(C), np.linalg.slogdet(C)[1]
    up = rank_one_inverse_update(precision, log_det, (1 - w) * e, scale=1 - w, weight=w)
    two = rank_one_inverse_update(up.precision, up.log_det, w * e, weight=-1.0)
    one = rank_one_inverse_update(precision, log_det, e, scale=1 - w, weight=w * (1 - 3 * w + w * w))
    assert_allclose(one.precision, two.precision, rtol=1e-12, atol=1e-14)
    assert_allclose(one.log_det, two.log_det, rtol=1e-12)


@given(seed=st.integers(0, 2**32 - 1), D=st.integers(1, 8), scale=st.floats(0.1, 5), weight=st.floats(-0.05, 5))
def test_rank_one_update_is_the_inverse_and_its_log_det(seed: int, D: int, scale: float, weight: float) -> None:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((D, D))
    C, u = root @ root.T + np.eye(D), rng.uniform(-1, 1, D)
    new = scale * C + weight * np.outer(u, u)
    if np.linalg.eigvalsh(new).min() < 1e-3:
        return
    got = rank_one_inverse_update(np.linalg.inv(C), np.linalg.slogdet(C)[1], u, scale=scale, weight=weight)
    assert_allclose(got.precision @ new, np.eye(D), atol=1e-6)
    assert_allclose(got.log_det, np.linalg.slogdet(new)[1], atol=1e-8)


def test_rank_one_update_refuses_an_indefinite_result() -> None:
    with pytest.raises(ValueError, match="weight must leave the matrix positive definite"):
        rank_one_inverse_update(np.eye(2), 0.0, np.array([1.0, 0.0]), weight=-1.0)
    with pytest.raises(ValueError, match="precision must be symmetric"):
        rank_one_inverse_update(np.array([[1.0, 0.5], [0.0, 1.0]]), 0.0, np.ones(2), weight=1.0)


def test_rank_one_update_keeps_the_kind_of_array(xp_array: Callable[[np.ndarray], Any]) -> None:
    C = np.array([[2.0, 0.5], [0.5, 1.0]])
    u = np.array([1.0, -1.0])
    got = rank_one_inverse_update(xp_array(np.linalg.inv(C)), np.log(np.linalg.det(C)), xp_array(u), weight=0.5)
    assert kind_of(got.precision) == xp_array.kind  # type: ignore[attr-defined]
    assert_allclose(to_numpy(got.precision), np.linalg.inv(C + 0.5 * np.outer(u, u)), rtol=1e-12)
    assert isinstance(got.log_det, float)


def test_one_component_is_the_mean_and_the_penalised_covariance() -> None:
    X = _cloud(2, n=200, D=6, K=1)
    one = IncrementalGaussianMixture(delta=0.7, beta=0.0).fit(X)
    centred = X - X.mean(0)
    assert_allclose(one.means_[0], X.mean(0), rtol=1e-10, atol=1e-10)
    assert_allclose(
        one.covariances_[0], (np.diag((0.7 * X.std(0)) ** 2) + centred.T @ centred) / len(X), rtol=1e-10, atol=1e-10
    )


def test_one_component_is_ridge_regression() -> None:
    X = _cloud(3, n=150, D=5, K=2)
    one = IncrementalGaussianMixture(delta=0.7, beta=0.0).fit(X)
    sigma = 0.7 * X.std(0)[:4]
    ridge = Ridge(alpha=1.0).fit(X[:, :4] / sigma, X[:, 4])
    question = X.copy()
    question[:, 4] = np.nan
    assert_allclose(one.reconstruct(question)[:, 4], ridge.predict(X[:, :4] / sigma), rtol=1e-8, atol=1e-8)


def test_one_component_classifies_as_ridge_does() -> None:
    d = digits()
    ours = IncrementalMixtureClassifier(beta=0.0).fit(d.X_train, d.y_train)
    sigma = np.sqrt(ours.mixture_._state.variance[:64])
    ridge = Ridge(alpha=1.0).fit(d.X_train / sigma, np.eye(10)[d.y_train])
    np.testing.assert_array_equal(ours.predict(d.X_test), ridge.predict(d.X_test / sigma).argmax(1))


def test_likelihood_is_close_to_batch_em() -> None:
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(c, 1.0, (500, 3)) for c in (0.0, 12.0, 24.0)])
    X = X[rng.permutation(len(X))]
    ours = IncrementalGaussianMixture(delta=0.3, beta=0.001).fit(X[:1000])
    em = GaussianMixture(3, n_init=3, random_state=0).fit(X[:1000])
    assert ours.n_components_ == 3
    assert abs(ours.score(X[1000:]) - em.score(X[1000:])) < 0.05


def test_densities_and_responsibilities_match_scipy() -> None:
    X = _cloud(4)
    mixture = IncrementalGaussianMixture(delta=0.4, beta=0.01).fit(X)
    parts = np.stack(
        [
            w * multivariate_normal(m, C).pdf(X)
            for w, m, C in zip(mixture.weights_, mixture.means_, mixture.covariances_, strict=True)
        ],
        axis=1,
    )
    assert_allclose(mixture.score_samples(X), np.log(parts.sum(1)), rtol=1e-8)
    assert_allclose(mixture.predict_proba(X), parts / parts.sum(1, keepdims=True), atol=1e-8)
    np.testing.assert_array_equal(mixture.predict(X), parts.argmax(1))
    assert_allclose(mixture.score(X), np.log(parts.sum(1)).mean())


def test_reconstruct_matches_conditioning_by_covariances() -> None:
    mixture = IncrementalGaussianMixture(delta=0.4, beta=0.01).fit(_cloud(5))
    row = np.array([0.5, np.nan, -1.0, np.nan])
    i, t = [0, 2], [1, 3]
    weight, answer = [], []
    for w, m, C in zip(mixture.weights_, mixture.means_, mixture.covariances_, strict=True):
        weight.append(w * multivariate_normal(m[i], C[np.ix_(i, i)]).pdf(row[i]))
        answer.append(m[t] + C[np.ix_(t, i)] @ np.linalg.solve(C[np.ix_(i, i)], row[i] - m[i]))
    expected = np.average(answer, axis=0, weights=weight)
    rows = np.stack([row, [1.0, 2.0, 3.0, 4.0], np.full(4, np.nan), row])
    got = mixture.reconstruct(rows)
    assert_allclose(got[0, t], expected, rtol=1e-8)
    assert_allclose(got[[0, 3]][:, i], rows[[0, 3]][:, i])
    assert_allclose(got[1], rows[1], rtol=0)
    assert_allclose(got[2], mixture.weights_ @ mixture.means_, rtol=1e-10)


@given(
    seed=st.integers(0, 2**32 - 1),
    D=st.integers(1, 6),
    n=st.integers(2, 60),
    beta=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9]),
    delta=st.floats(0.05, 2.0),
)
def test_invariants(seed: int, D: int, n: int, beta: float, delta: float) -> None:
    X = np.random.default_rng(seed).normal(0, 1, (n, D)) * 10.0 ** np.linspace(-3, 3, D)
    mixture = IncrementalGaussianMixture(delta=delta, beta=beta, prune=False).fit(X)
    precisions, covariances = mixture.precisions_, mixture.covariances_
    np.testing.assert_array_equal(precisions, precisions.swapaxes(1, 2))
    assert (np.linalg.eigvalsh(covariances) > 0).all()
    spread = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))
    unit = (precisions @ covariances) * spread[:, :, None] / spread[:, None, :]  # free of the coordinates' units
    assert_allclose(unit, np.broadcast_to(np.eye(D), unit.shape), atol=1e-6)
    assert_allclose(mixture.log_dets_, -np.linalg.slogdet(precisions)[1], rtol=1e-8, atol=1e-7)
    assert_allclose(mixture.masses_.sum(), n, rtol=1e-10)
    assert_allclose(mixture.weights_.sum(), 1.0)
    assert mixture.ages_.min() >= 1
    assert mixture.n_rejected_ == 0
    assert 1 <= mixture.n_components_ <= n


@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(1, 99), max_size=4))
def test_chunks_equal_one_pass(seed: int, cuts: list[int]) -> None:
    X = _cloud(seed, n=100, D=3)
    whole = IncrementalGaussianMixture(delta=0.5, beta=0.05, scale=2.0).fit(X)
    parts = IncrementalGaussianMixture(delta=0.5, beta=0.05, scale=2.0)
    for chunk in np.split(X, sorted(set(cuts))):
        parts.partial_fit(chunk)
    assert_allclose(parts.means_, whole.means_, rtol=1e-9, atol=1e-9)
    assert_allclose(parts.precisions_, whole.precisions_, rtol=1e-6, atol=1e-9)
    assert_allclose(parts.log_dets_, whole.log_dets_, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 2**32 - 1))
def test_without_novelty_the_order_does_not_matter(seed: int) -> None:
    X = _cloud(seed % 1000, n=80, D=3)
    shuffled = X[np.random.default_rng(seed).permutation(len(X))]
    one, other = (IncrementalGaussianMixture(beta=0.0, scale=1.5).fit(Z) for Z in (X, shuffled))
    assert_allclose(one.means_, other.means_, rtol=1e-9, atol=1e-9)
    assert_allclose(one.covariances_, other.covariances_, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("update", ["exact", "published"])
@pytest.mark.parametrize("beta", [0.0, 0.05, 0.5])
def test_whole_array_path_equals_the_loop(update: str, beta: float) -> None:
    X = _cloud(6)
    loop = _quiet(delta=0.5, beta=beta, update=update)(X)
    state = incremental_gmm._State.empty((0.5 * X.std(0)) ** 2, False, like=X)
    incremental_gmm._learn_batched(X, state, loop._check_rules(X.shape[1]))
    assert (state.n, state.n_rejected) == (loop.n_components_, loop.n_rejected_)
    assert_allclose(state.means[: state.n], loop.means_, rtol=1e-8, atol=1e-9)
    assert_allclose(state.matrices[: state.n], loop.precisions_, rtol=1e-6, atol=1e-8)
    assert_allclose(state.log_dets[: state.n], loop.log_dets_, rtol=1e-8)
    assert_allclose(state.masses[: state.n], loop.masses_, rtol=1e-8)
    np.testing.assert_array_equal(state.ages[: state.n], loop.ages_)


def test_max_components_is_kept() -> None:
    X = _cloud(7)
    assert IncrementalGaussianMixture(beta=0.5, prune=False).fit(X).n_components_ > 3
    assert IncrementalGaussianMixture(beta=0.5, prune=False, max_components=3).fit(X).n_components_ == 3


def test_the_last_component_is_never_removed() -> None:
    X = np.random.default_rng(0).normal(size=(50, 2))
    mixture = IncrementalGaussianMixture(beta=0.9, min_age=0, min_mass=1e9).fit(X)
    assert mixture.n_components_ >= 1


def test_single_precision_in_single_precision_out() -> None:
    X = _cloud(8).astype(np.float32)
    mixture = IncrementalGaussianMixture(delta=0.4, beta=0.01).fit(X)
    for result in (mixture.score_samples(X), mixture.predict_proba(X), mixture.reconstruct(X)):
        assert result.dtype == np.float32
    assert mixture.precisions_.dtype == np.float64
    double = IncrementalGaussianMixture(delta=0.4, beta=0.01).fit(X.astype(float))
    assert_allclose(mixture.score_samples(X), double.score_samples(X.astype(float)), rtol=1e-4)
    labels = (X[:, 0] > 0).astype(int)
    assert IncrementalMixtureClassifier().fit(X, labels).predict_proba(X).dtype == np.float32


def test_constant_features_get_a_scale() -> None:
    X = np.column_stack([np.full(20, 0.1), np.linspace(0, 1, 20)])
    mixture = IncrementalGaussianMixture(beta=0.0).fit(X)
    assert_allclose(mixture.covariances_[0, 0, 0], np.linspace(0, 1, 20).var() / 20)
    assert np.isfinite(IncrementalGaussianMixture().fit(np.ones((5, 2))).score(np.ones((1, 2))))


def test_one_row_needs_a_scale() -> None:
    with pytest.raises(ValueError, match="scale must be given"):
        IncrementalGaussianMixture().partial_fit([[1.0, 2.0]])
    mixture = IncrementalGaussianMixture(scale=[1.0, 3.0]).partial_fit([[1.0, 2.0]])
    assert_allclose(mixture.covariances_[0], np.diag([1.0, 9.0]))


def test_fit_forgets_and_partial_fit_does_not() -> None:
    X = _cloud(9)
    twice = IncrementalGaussianMixture(beta=0.0).fit(X).fit(X)
    assert_allclose(twice.masses_, [len(X)])
    assert_allclose(twice.partial_fit(X).masses_, [2 * len(X)])


def test_overflow_is_refused() -> None:
    mixture = IncrementalGaussianMixture().fit(_X)
    for far in (np.full((2, 2), 1e200), -np.full((2, 2), 1e200)):
        with pytest.raises(ValueError, match="X must stay within"):
            mixture.partial_fit(far)
        with pytest.raises(ValueError, match="X must stay within"):
            mixture.score_samples(far)
    with pytest.raises(ValueError, match="X must have standard deviations below"):
        IncrementalGaussianMixture().fit([[1e300], [-1e300]])


def test_classifier_streams_strings_and_unseen_classes() -> None:
    rng = np.random.default_rng(0)
    y = rng.choice(["a", "b", "c"], 300)
    X = rng.normal(size=(300, 2)) + 6.0 * (y[:, None] == np.array(["b", "c"]))
    stream = IncrementalMixtureClassifier(beta=0.0)
    stream.partial_fit(X[:50], y[:50], classes=["c", "b", "a", "d"])
    for start in range(50, 300, 50):
        stream.partial_fit(X[start : start + 50], y[start : start + 50])
    assert stream.classes_.tolist() == ["a", "b", "c", "d"]
    assert (stream.predict(X) == y).mean() > 0.98
    proba = stream.predict_proba(X)
    assert_allclose(proba.sum(1), 1.0)
    assert proba.min() >= 0
    with pytest.raises(ValueError, match="y must hold labels among the classes"):
        stream.partial_fit(X[:2], ["a", "z"])
    with pytest.raises(ValueError, match="classes must stay"):
        stream.partial_fit(X[:2], y[:2], classes=["a", "b"])


def test_a_mixture_reads_digits_better_than_one_component() -> None:
    d = digits()
    one = IncrementalMixtureClassifier(beta=0.0).fit(d.X_train, d.y_train)
    many = IncrementalMixtureClassifier(beta=0.1, max_components=30, prune=False).fit(d.X_train, d.y_train)
    assert many.score(d.X_test, d.y_test) > one.score(d.X_test, d.y_test) + 0.02


def test_ten_thousand_updates_leave_the_inverse_an_inverse() -> None:
    X = np.random.default_rng(0).normal(size=(10_000, 8)) * np.logspace(-2, 2, 8)
    mixture = IncrementalGaussianMixture(beta=0.0).fit(X)
    centred = X - X.mean(0)
    C = (np.diag(X.var(0)) + centred.T @ centred) / len(X)
    s = np.sqrt(np.diag(C))
    assert_allclose((mixture.precisions_[0] * s * s[:, None]) @ (C / s / s[:, None]), np.eye(8), atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("update", ["exact", "published"])
def test_gpu_equals_cpu(update: str) -> None:
    cupy = pytest.importorskip("cupy")
    X = _cloud(10)
    cpu = _quiet(delta=0.5, beta=0.05, update=update)(X)
    gpu = _quiet(delta=0.5, beta=0.05, update=update)(cupy.asarray(X))
    holes = np.where(np.random.default_rng(0).random(X.shape) < 0.3, np.nan, X)
    assert (gpu.n_components_, gpu.n_rejected_) == (cpu.n_components_, cpu.n_rejected_)
    for got, expected in (
        (gpu.means_, cpu.means_),
        (gpu.precisions_, cpu.precisions_),
        (gpu.log_dets_, cpu.log_dets_),
        (gpu.score_samples(cupy.asarray(X)), cpu.score_samples(X)),
        (gpu.predict_proba(cupy.asarray(X)), cpu.predict_proba(X)),
        (gpu.reconstruct(cupy.asarray(holes)), cpu.reconstruct(holes)),
    ):
        assert kind_of(got) == "cupy"
        assert_allclose(to_numpy(got), expected, rtol=1e-6, atol=1e-8)


def three_groups(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of three groups in turn, fifty standard deviations apart, and their groups."""
    rng, group = np.random.default_rng([seed, 5]), np.arange(n) % 3
    centres = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    return centres[group] + rng.normal(size=(n, 2)), group


class TestSummary:
    @given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from([None, 1.0]), st.sampled_from([None, 2]))
    def test_rows_mean_and_covariance_of_the_data_stay(self, in_a_tree, seed, n, scale, cap):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(n, 3)) + 3 * rng.integers(0, 3, (n, 1))
        summary = GaussianMixtureSummary(IncrementalGaussianMixture(scale=scale, delta=0.5), max_components=cap)
        got = summary.finish(in_a_tree(summary, [X[c] for c in cuts(n, seed)], seed))
        assert cap is None or len(got.masses) <= cap
        assert_allclose(got.masses.sum(), n, rtol=1e-12)
        mean = got.masses @ got.means / n
        assert_allclose(mean, X.mean(axis=0), atol=1e-11)
        e = got.means - mean
        total = np.einsum("j,jkl->kl", got.masses, got.covariances) + (got.masses[:, None] * e).T @ e
        assert_allclose(total / n, np.cov(X.T, ddof=0), atol=1e-10)
        assert np.isfinite(got.mixture.score(X))

    @given(st.integers(0, 2**32 - 1))
    def test_components_far_apart_are_merged_exactly(self, in_a_tree, seed):
        X, group = three_groups(240, seed)
        summary = GaussianMixtureSummary(IncrementalGaussianMixture(scale=1.0, delta=3.0, beta=1e-9, prune=False))
        got = summary.finish(in_a_tree(summary, [X[c] for c in cuts(240, seed) if c.stop - c.start > 2], seed))
        kept = np.concatenate([np.arange(c.start, c.stop) for c in cuts(240, seed) if c.stop - c.start > 2])
        X, group = X[kept], group[kept]
        assert len(got.masses) == 3
        order = got.mixture.predict(np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]]))
        for j, k in enumerate(order):
            mine = X[group == j]
            assert_allclose(got.masses[k], len(mine), rtol=1e-12)
            assert_allclose(got.means[k], mean := mine.mean(axis=0), atol=1e-10)
            assert_allclose(got.covariances[k], (mine - mean).T @ (mine - mean) / len(mine), atol=1e-9)
        if len(X) > 60:
            assert (got.mixture.predict(X) == order[group]).all()

    def test_pairs_are_joined_by_hand(self):
        """The closest pair first, each component once: 0 and 1 here, 0.9 and 9 there, radius 2."""
        summary = GaussianMixtureSummary(IncrementalGaussianMixture(scale=1.0, beta=0.05))  # novel beyond 1.96

        def state(*points: float) -> dict[str, np.ndarray]:
            K = len(points)
            return {
                "masses": np.ones(K), "means": np.array(points)[:, None], "scatters": np.zeros((K, 1, 1)),
                "ages": np.ones(K, np.int64),
            }  # fmt: skip

        got = summary.merge(state(0.0, 1.0), state(0.9, 9.0))
        assert_allclose(got["means"][:, 0], [0.0, 0.95, 9.0])
        assert_allclose(got["masses"], [1, 2, 1])
        assert_allclose(got["scatters"][:, 0, 0], [0, 0.005, 0], atol=1e-15)
        assert len(summary.merge(state(0.0), state(1.95))["masses"]) == 1  # as a second point would be found: C0 = 1
        assert len(summary.merge(state(0.0), state(1.97))["masses"]) == 2
        capped = GaussianMixtureSummary(summary.mixture, max_components=2).merge(state(0.0, 1.0), state(0.9, 9.0))
        assert_allclose(capped["means"][:, 0], [1.9 / 3, 9.0])

    def test_the_model_learns_on_and_one_chunk_is_close_to_the_plain_algorithm(self):
        X, _ = three_groups(300, 0)
        plain = IncrementalGaussianMixture(scale=1.0, delta=3.0, beta=1e-9, prune=False)
        got = GaussianMixtureSummary(plain).finish(state_of(plain, X)).mixture
        fitted = IncrementalGaussianMixture(scale=1.0, delta=3.0, beta=1e-9, prune=False).fit(X)
        assert_allclose(got.means_, fitted.means_, atol=1e-8)
        assert_allclose(got.covariances_, fitted.covariances_, atol=1e-8)
        assert_allclose(got.score_samples(X), fitted.score_samples(X), atol=1e-6)
        got.partial_fit(X[:50])
        fitted.partial_fit(X[:50])
        assert_allclose(got.precisions_, fitted.precisions_, rtol=1e-6, atol=1e-9)

    def test_covariance_representation_and_published_rule(self, in_a_tree):
        X, _ = three_groups(120, 1)
        for options in (dict(representation="covariance"), dict(update="published")):
            plain = IncrementalGaussianMixture(scale=1.0, delta=3.0, beta=1e-9, prune=False, **options)
            summary = GaussianMixtureSummary(plain)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # steps of the published rule that are skipped
                got = summary.finish(in_a_tree(summary, [X[:40], X[40:]], 0))
            assert_allclose(got.masses.sum(), 120)
            assert np.isfinite(got.mixture.partial_fit(X).score(X))

    def test_refused(self):
        summary = GaussianMixtureSummary(IncrementalGaussianMixture(scale=1.0))
        with pytest.raises(ValueError, match="b must be 2 columns wide"):
            summary.merge(_MOMENTS, summary.update(summary.init(), np.ones((3, 1))))
        with pytest.raises(ValueError, match="state must cover at least one row"):
            summary.finish(summary.init())
        with pytest.raises(ValueError, match="beta"):
            GaussianMixtureSummary(IncrementalGaussianMixture(beta=2.0))
        with pytest.raises(ValueError, match=r"chunk .* standard deviations of zero"):
            summary.update(summary.init(), np.array([[1e200], [0.0]]))

    @pytest.mark.gpu
    def test_cupy_chunks(self):
        cupy = pytest.importorskip("cupy")
        got = _SUMMARY.update(_SUMMARY.init(), cupy.asarray(_X))
        for key, value in _MOMENTS.items():
            assert_allclose(got[key], value, rtol=1e-10)


def state_of(plain: IncrementalGaussianMixture, X: np.ndarray) -> dict[str, np.ndarray]:
    summary = GaussianMixtureSummary(plain)
    return summary.update(summary.init(), X)
