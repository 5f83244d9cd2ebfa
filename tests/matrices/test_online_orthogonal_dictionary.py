"""Online orthogonal dictionary: gradient, oracle, gap against closed forms; recovery; the loop against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ortho_group
from sklearn.utils.estimator_checks import parametrize_with_checks

from algokit.arrays import kind_of, to_numpy
from algokit.matrices import online_orthogonal_dictionary as module
from algokit.matrices.online_orthogonal_dictionary import (
    OnlineOrthogonalDictionary,
    bernoulli_gaussian,
    dictionary_error,
    fw_gap,
    lp_objective_and_grad,
    polar_oracle,
)

EXAMPLES = {
    "bernoulli_gaussian": dict(n_samples=4, n=3, theta=0.5, dictionary=np.eye(3), noise=0.1, rng=0),
    "lp_objective_and_grad": dict(Y=np.ones((2, 3)), D=np.eye(3), p=3.0),
    "polar_oracle": dict(G=np.diag([1.0, 2.0])),
    "fw_gap": dict(G=np.diag([1.0, 2.0]), D=np.eye(2)),
    "dictionary_error": dict(D_hat=np.eye(3), D_true=np.eye(3)),
    "OnlineOrthogonalDictionary": dict(
        p=3.0, batch_size=2, step=1.0, step_power=0.75, averaging=1.0, averaging_power=0.5, precondition=False,
        init=np.eye(2), n_passes=1, tol=0.0, rng=0,
    ),
    "OnlineOrthogonalDictionary.fit": dict(X=np.array([[1.0, 0.5], [0.2, -1.0], [0.3, 2.0]])),
    "OnlineOrthogonalDictionary.partial_fit": dict(X=np.array([[1.0, 0.5], [0.2, -1.0]])),
    "OnlineOrthogonalDictionary.transform": dict(X=np.array([[1.0, 0.5]])),
    "OnlineOrthogonalDictionary.inverse_transform": dict(Z=np.array([[1.0, 0.5]])),
}  # fmt: skip
ACCEPTS = {"bernoulli_gaussian.rng": {"none"}, "OnlineOrthogonalDictionary.rng": {"none"}}


def orthogonal(n: int, seed: int) -> np.ndarray:
    return ortho_group.rvs(n, random_state=seed) if n > 1 else np.eye(1)


def plain_steps(X, D, size, p=3.0):
    """The algorithm, line by line, with an SVD."""
    d, gaps = np.zeros_like(D), []
    for t, start in enumerate(range(0, len(X), size), start=1):
        Y = X[start : start + size]
        Z = Y @ D
        rho, gamma = min(1, t**-0.5), min(1, t**-0.75)
        d = (1 - rho) * d + rho * p / len(Y) * Y.T @ (np.abs(Z) ** (p - 2) * Z)
        U, s, Vt = np.linalg.svd(d)
        gaps.append(s.sum() - (D * d).sum())
        D = D + gamma * (U @ Vt - D)
    return D, d, gaps


@pytest.mark.parametrize("p", [3.0, 4.0, 2.5])
def test_gradient_agrees_with_finite_differences(p):
    rng = np.random.default_rng(0)
    Y, D = rng.normal(size=(7, 4)), rng.normal(size=(4, 4))
    _, gradient = lp_objective_and_grad(Y, D, p=p)
    for i, j in np.ndindex(4, 4):
        step = np.zeros((4, 4))
        step[i, j] = 1e-6
        up, down = (lp_objective_and_grad(Y, D + s * step, p=p)[0] for s in (1, -1))
        assert gradient[i, j] == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-6)


def test_population_value_at_the_truth():
    """E|a'x|^3 = theta E|g|^3 for an atom, so n theta 2 sqrt(2/pi) in all."""
    data = bernoulli_gaussian(200_000, 6, theta=0.3, rng=0)
    value, _ = lp_objective_and_grad(data.X, data.dictionary)
    assert value == pytest.approx(6 * 0.3 * 2 * np.sqrt(2 / np.pi), rel=0.02)
    assert value > lp_objective_and_grad(data.X, orthogonal(6, 1))[0]


@given(st.integers(1, 6), st.integers(0, 1000))
def test_oracle_beats_every_point_of_the_ball_and_gap_is_its_lead(n, seed):
    rng = np.random.default_rng(seed)
    G, M = rng.normal(size=(2, n, n))
    S = polar_oracle(G)
    np.testing.assert_allclose(S @ S.T, np.eye(n), atol=1e-12)
    D = M / np.linalg.norm(M, 2)
    assert (S * G).sum() >= (D * G).sum() - 1e-10
    assert fw_gap(G, D) == pytest.approx(((S - D) * G).sum(), abs=1e-10)
    assert fw_gap(G, S) == pytest.approx(0, abs=1e-10)


def test_oracle_is_orthogonal_where_the_maximiser_is_not_unique():
    S = polar_oracle(np.diag([2.0, 0.0, 0.0]))
    np.testing.assert_allclose(S @ S.T, np.eye(3), atol=1e-12)
    assert S[0, 0] == pytest.approx(1)


@given(st.integers(1, 7), st.integers(0, 1000))
def test_error_ignores_order_and_signs(n, seed):
    rng = np.random.default_rng(seed)
    D = orthogonal(n, seed)
    signed = D[:, rng.permutation(n)] * rng.choice([-1, 1], n)
    assert dictionary_error(signed, D) == pytest.approx(0, abs=1e-12)
    assert 0 <= dictionary_error(orthogonal(n, seed + 1), D) <= 1


def test_pure_functions_serve_every_kind_of_array(xp_array):
    rng = np.random.default_rng(0)
    Y, D = rng.normal(size=(5, 3)), orthogonal(3, 0)
    value, gradient = lp_objective_and_grad(xp_array(Y), xp_array(D))
    expected = lp_objective_and_grad(Y, D)
    assert value == pytest.approx(expected[0]) and kind_of(gradient) == xp_array.kind
    np.testing.assert_allclose(to_numpy(gradient), expected[1], rtol=1e-10)
    S = polar_oracle(gradient)
    assert kind_of(S) == xp_array.kind
    np.testing.assert_allclose(to_numpy(S), polar_oracle(expected[1]), atol=1e-10)
    assert fw_gap(gradient, xp_array(D)) == pytest.approx(fw_gap(expected[1], D))


@pytest.mark.parametrize("p", [3.0, 4.0])
def test_compiled_loop_is_the_algorithm(p):
    data = bernoulli_gaussian(400, 6, theta=0.3, noise=0.2, rng=1)  # noise: gradients of full rank
    start = orthogonal(6, 2)
    model = OnlineOrthogonalDictionary(init=start, p=p).fit(data.X)
    D, d, gaps = plain_steps(data.X, start, 10, p)
    np.testing.assert_allclose(model.relaxed_dictionary_, D, atol=1e-9)
    np.testing.assert_allclose(model.averaged_gradient_, d, atol=1e-9)
    np.testing.assert_allclose(model.gap_history_, gaps, atol=1e-8)


def test_whole_array_form_is_the_same():
    """The form that runs on a GPU, on NumPy arrays."""
    data = bernoulli_gaussian(600, 5, theta=0.3, noise=0.2, rng=3)
    for precondition in (False, True):
        model = OnlineOrthogonalDictionary(init=orthogonal(5, 4), precondition=precondition)
        expected = model.fit(data.X)
        zero = np.zeros((5, 5))
        state = module._State(orthogonal(5, 4), zero, zero, zero, 0, 0, np.zeros(0))
        state, whitening = module._stream_arrays(data.X, 10, 1, state, model._rule(), precondition)
        np.testing.assert_allclose(state.D, expected.relaxed_dictionary_, atol=1e-8)
        np.testing.assert_allclose(state.gaps, expected.gap_history_, atol=1e-7)
        np.testing.assert_allclose(whitening, expected.whitening_, atol=1e-8)


def test_steps_one_by_one_are_one_fit():
    data = bernoulli_gaussian(300, 5, theta=0.3, rng=5)
    whole = OnlineOrthogonalDictionary(rng=0).fit(data.X)
    steps = OnlineOrthogonalDictionary(rng=0)
    for start in range(0, 300, 10):
        steps.partial_fit(data.X[start : start + 10])
    np.testing.assert_allclose(steps.relaxed_dictionary_, whole.relaxed_dictionary_, atol=1e-12)
    np.testing.assert_allclose(steps.gap_history_, whole.gap_history_, atol=1e-12)
    assert steps.n_steps_ == whole.n_steps_ == 30


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sparse_codes_are_recovered(seed):
    data = bernoulli_gaussian(20_000, 10, theta=0.3, noise=0.05, rng=seed)
    model = OnlineOrthogonalDictionary(rng=seed + 1).fit(data.X)
    assert dictionary_error(model.components_.T, data.dictionary) < 2e-3
    assert np.linalg.norm(model.relaxed_dictionary_, 2) <= 1 + 1e-12
    assert np.linalg.norm(model.relaxed_dictionary_.T @ model.relaxed_dictionary_ - np.eye(10)) < 0.05
    assert (model.gap_history_ >= 0).all()


def test_preconditioning_recovers_a_dictionary_that_is_not_orthogonal():
    rng = np.random.default_rng(0)
    skew = orthogonal(6, 0) @ np.diag([1, 1.5, 2, 0.7, 1, 3]) @ orthogonal(6, 1)
    skew /= np.sqrt((skew**2).sum(axis=0))
    data = bernoulli_gaussian(40_000, 6, theta=0.2, dictionary=skew, rng=rng)
    errors = {}
    for precondition in (False, True):
        model = OnlineOrthogonalDictionary(precondition=precondition, rng=1).fit(data.X)
        atoms = model.inverse_transform(np.eye(6)).T
        errors[precondition] = dictionary_error(atoms / np.sqrt((atoms**2).sum(axis=0)), skew)
    assert errors[True] < 0.01 < errors[False]
    np.testing.assert_allclose(model.inverse_transform(model.transform(data.X[:5])), data.X[:5], atol=1e-9)


def test_same_seed_does_not_start_from_the_answer():
    data = bernoulli_gaussian(50, 8, theta=0.3, rng=0)
    start = module._first_dictionary("random", 8, np.random.default_rng(0))
    assert dictionary_error(start, data.dictionary) > 0.2


def test_codes_and_samples_are_inverse_to_each_other():
    data = bernoulli_gaussian(1000, 4, theta=0.3, rng=0)
    model = OnlineOrthogonalDictionary(rng=0).fit(data.X)
    np.testing.assert_allclose(model.inverse_transform(model.transform(data.X)), data.X, atol=1e-10)
    assert model.transform(data.X.astype(np.float32)).dtype == np.float32


def test_batch_of_zeros_moves_nothing_and_decays_the_gradient():
    zeros = np.zeros((4, 3))
    fresh = OnlineOrthogonalDictionary(init=np.eye(3)).partial_fit(zeros)
    np.testing.assert_array_equal(fresh.relaxed_dictionary_, np.eye(3))
    assert fresh.gap_history_.tolist() == [0.0]
    model = OnlineOrthogonalDictionary(init=np.eye(3)).partial_fit(np.ones((4, 3)) * [1, 2, 3])
    before = model.averaged_gradient_.copy()
    model.partial_fit(zeros)
    np.testing.assert_allclose(model.averaged_gradient_, (1 - 2**-0.5) * before)


def test_gradient_of_low_rank_is_completed_near_the_last_target():
    X = np.array([[1.0, 0.0, 0.0]])
    model = OnlineOrthogonalDictionary(init=np.eye(3)).fit(np.repeat(X, 20, axis=0))
    np.testing.assert_allclose(model.relaxed_dictionary_, np.eye(3), atol=1e-5)


def test_one_dimension_and_gaussian_data():
    assert abs(OnlineOrthogonalDictionary(rng=0).fit([[2.0], [-1.0]]).components_) == pytest.approx(1)
    flat = bernoulli_gaussian(5000, 5, theta=1.0, rng=0)
    model = OnlineOrthogonalDictionary(rng=0).fit(flat.X)
    np.testing.assert_allclose(model.components_ @ model.components_.T, np.eye(5), atol=1e-12)


def test_tolerance_stops_early():
    data = bernoulli_gaussian(20_000, 6, theta=0.2, rng=0)
    model = OnlineOrthogonalDictionary(rng=0, tol=0.05).fit(data.X)
    assert 10 < model.n_steps_ < 2000 and len(model.gap_history_) == model.n_steps_


def test_newton_schulz_is_the_svd_or_says_so():
    rng = np.random.default_rng(0)
    with_products = 0
    for n in (1, 2, 5, 30):
        for spread in (0.0, 1.0, 8.0):
            G = orthogonal(n, n) * np.exp(-spread * rng.random(n)) @ orthogonal(n, n + 1)
            S = np.full((n, n), np.nan)
            if module._newton_schulz(G, S):
                with_products += 1
                np.testing.assert_allclose(S, polar_oracle(G), atol=1e-9)
            else:
                assert np.isnan(S).all()
    assert with_products >= 6


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        (dict(p=2.0), "p must"),
        (dict(batch_size=0), "batch_size"),
        (dict(step=0.0), "step"),
        (dict(init="dct"), "init"),
        (dict(init=2 * np.eye(2)), "init"),
        (dict(n_passes=0), "n_passes"),
        (dict(tol=-1.0), "tol"),
    ],
)
def test_bad_parameters_are_refused_by_fit(parameters, part):
    with pytest.raises((ValueError, TypeError), match=part):
        OnlineOrthogonalDictionary(**parameters).fit(np.eye(2))


def test_theta_and_atoms_are_checked():
    with pytest.raises(ValueError, match="theta"):
        bernoulli_gaussian(3, 2, theta=0.0)
    with pytest.raises(ValueError, match="D_hat"):
        dictionary_error(2 * np.eye(2), np.eye(2))


def test_same_answer_whatever_the_number_of_threads(assert_threads_agree):
    code = (
        "from algokit.matrices.online_orthogonal_dictionary import *;"
        "d = bernoulli_gaussian(2000, 64, theta=0.1, rng=0);"
        "print(OnlineOrthogonalDictionary(rng=0, batch_size=50).fit(d.X).relaxed_dictionary_.tobytes().hex()[:4000])"
    )
    assert_threads_agree(code)


@pytest.mark.gpu
def test_gpu_agrees_with_the_host():
    cupy = pytest.importorskip("cupy")
    data = bernoulli_gaussian(2000, 16, theta=0.2, rng=0)
    model = OnlineOrthogonalDictionary(init=orthogonal(16, 0), batch_size=100)
    host = model.fit(data.X).relaxed_dictionary_.copy()
    device = model.fit(cupy.asarray(data.X))
    assert kind_of(device.components_) == "cupy"
    np.testing.assert_allclose(device.relaxed_dictionary_.get(), host, atol=1e-6)


@parametrize_with_checks([OnlineOrthogonalDictionary(rng=0)])
def test_follows_scikit_learn(estimator, check):
    check(estimator)
