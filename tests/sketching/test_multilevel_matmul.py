"""Tests of multilevel Monte Carlo for matrix products: exact transforms, closed-form variances, known expectations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from algokit.arrays import kind_of, to_numpy
from algokit.checks import AlgokitWarning
from algokit.sketching import multilevel_matmul as module
from algokit.sketching.multilevel_matmul import (
    basic_matmul,
    haar_levels,
    mlmc,
    multilevel_matmul,
    optimal_allocation,
)


def brownian(level: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """Left-endpoint rule for the integral of W(t)^2, n = 4 * 2^level points: mean (1 - 1/n) / 2."""
    n = 4 * 2**level
    W = np.cumsum(rng.normal(size=(size, n)) / np.sqrt(n), axis=1)
    W = np.concatenate([np.zeros((size, 1)), W[:, :-1]], axis=1)
    fine, coarse = np.mean(W**2, axis=1), np.mean(W[:, ::2] ** 2, axis=1)
    return fine, coarse if level else None


rng0 = np.random.default_rng(0)
A48, B48 = rng0.normal(size=(3, 48)), rng0.normal(size=(48, 2))

EXAMPLES: dict[str, Any] = {
    "optimal_allocation": dict(variance=np.array([2.0, 1.0]), cost=np.array([1.0, 2.0]), eps=0.5, theta=0.25),
    "mlmc": dict(
        sampler=brownian,
        eps=0.2,
        cost=lambda k: 2.0**k,
        min_level=2,
        max_level=4,
        pilot=20,
        theta=0.5,
        alpha=1.0,
        rng=0,
    ),
    "basic_matmul": dict(A=A48, B=B48, n_samples=7, probabilities="optimal", rng=0),
    "haar_levels": dict(A=A48, axis=1, n_levels=2, grid=(6, 8)),
    "multilevel_matmul": dict(A=A48, B=B48, budget=24, n_levels=2, grid=(6, 8), rng=0),
}


def sizes(parts: list[np.ndarray]) -> list[int]:
    return [p.shape[1] for p in parts]


# ------------------------------------------------------------------------------------------------- allocation


def test_allocation_reaches_the_variance_at_least_cost() -> None:
    V, C = np.array([3.0, 0.7, 0.1]), np.array([1.0, 2.0, 4.0])
    N = optimal_allocation(V, C, eps=0.02, theta=0.3)
    goal = 0.7 * 0.02**2
    assert (V / N).sum() <= goal * (1 + 1e-9)
    rng = np.random.default_rng(0)
    for _ in range(200):  # any other allocation of that variance costs more
        other = N * np.exp(rng.normal(0, 0.3, 3))
        other *= (V / other).sum() / (V / N).sum()
        assert other @ C >= N @ C * (1 - 1e-12)
    assert optimal_allocation([0.0, 1.0], [1.0, 1.0], eps=1.0, theta=0.0).tolist() == [0, 1]


# ------------------------------------------------------------------------------------------------- the driver


def test_mlmc_finds_a_known_expectation_within_eps() -> None:
    errors = []
    for seed in range(10):
        result = mlmc(brownian, eps=0.02, rng=seed)
        assert result.converged and result.bias_estimate <= np.sqrt(0.5) * 0.02
        assert (np.diff(result.level_variance[1:]) < 0).all()
        assert result.cost == pytest.approx(float(result.n_samples @ 2.0 ** np.arange(len(result.n_samples))))
        errors.append(result.estimate - 0.5)
    assert np.sqrt(np.mean(np.square(errors))) < 0.02


def test_mlmc_of_matrices_is_entrywise_and_reproducible() -> None:
    def outer(level: int, size: int, rng: np.random.Generator) -> Any:
        fine, coarse = brownian(level, size, rng)
        M = np.array([[1.0, 2.0], [0.0, -1.0]])
        return fine[:, None, None] * M, None if coarse is None else coarse[:, None, None] * M

    one, two = (mlmc(outer, eps=0.1, rng=3) for _ in range(2))
    np.testing.assert_array_equal(one.estimate, two.estimate)
    assert one.estimate[1, 0] == 0
    np.testing.assert_allclose(one.estimate[0, 1], 2 * one.estimate[0, 0])


def test_mlmc_says_when_it_did_not_converge() -> None:
    with pytest.warns(AlgokitWarning, match="max_level"):
        result = mlmc(brownian, eps=0.02, max_level=2, rng=0)
    assert not result.converged and len(result.n_samples) == 3


@pytest.mark.parametrize(
    ("sampler", "part"),
    [
        (lambda k, n, rng: np.zeros(n), "pair"),
        (lambda k, n, rng: (np.zeros(n), np.zeros(n)), "None as coarse"),
        (lambda k, n, rng: (np.zeros(n), None), "None as coarse"),
        (lambda k, n, rng: (np.zeros(n + 1), np.zeros(n) if k else None), "shape"),
        (lambda k, n, rng: (np.zeros((n, 1 + k)), np.zeros((n, 1 + k)) if k else None), "shape"),
        (lambda k, n, rng: (np.full(n, np.nan), np.zeros(n) if k else None), "finite"),
    ],
)
def test_bad_samplers_are_refused(sampler: Any, part: str) -> None:
    with pytest.raises(ValueError, match=f"sampler.*{part}"):
        mlmc(sampler, eps=0.1, rng=0)


def test_constant_levels_need_no_further_samples() -> None:
    result = mlmc(lambda k, n, rng: (np.ones(n), np.ones(n) if k else None), eps=0.01, rng=0)
    assert result.estimate == 1 and result.n_samples.tolist() == [200, 200, 200] and result.converged


# ------------------------------------------------------------------------------------------------- column sampling


@pytest.mark.parametrize("probabilities", ["optimal", "uniform", "given"])
def test_basic_matmul_is_unbiased_with_the_variance_of_theory(probabilities: Any) -> None:
    A, B, c = A48, B48, 6
    a2, b2 = (A**2).sum(axis=0), (B**2).sum(axis=1)
    p = {"optimal": np.sqrt(a2 * b2), "uniform": np.ones(48), "given": np.arange(1.0, 49)}[probabilities]
    given_p = p if probabilities == "given" else probabilities
    draws = np.array([basic_matmul(A, B, c, probabilities=given_p, rng=s) for s in range(3000)])
    exact = A @ B
    assert (abs(draws.mean(axis=0) - exact) < 4.5 * draws.std(axis=0) / np.sqrt(3000)).all()
    squared = ((draws - exact) ** 2).sum(axis=(1, 2))
    theory = ((a2 * b2 / (p / p.sum())).sum() - (exact**2).sum()) / c
    assert squared.mean() == pytest.approx(theory, abs=4.5 * squared.std() / np.sqrt(3000))


def test_basic_matmul_edges() -> None:
    assert not basic_matmul(np.zeros((2, 4)), np.ones((4, 3)), 5, rng=0).any()
    A = np.array([[0.0, 2.0, 0.0]])  # one column that counts: exact
    np.testing.assert_allclose(basic_matmul(A, A.T, 3, rng=0), [[4.0]])
    with pytest.raises(ValueError, match="probabilities"):
        basic_matmul(A, A.T, 3, probabilities=[1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="inner dimension"):
        basic_matmul(A, A, 3)


# ------------------------------------------------------------------------------------------------- Haar levels


@given(st.integers(1, 70), st.integers(0, 3), st.integers(0, 10**6))
def test_haar_is_orthonormal_whatever_the_length(n: int, n_levels: int, seed: int) -> None:
    n_levels = min(n_levels, (n - 1).bit_length())
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(3, n)), rng.normal(size=(n, 2))
    left, right = haar_levels(A, n_levels=n_levels), haar_levels(B, axis=0, n_levels=n_levels)
    assert len(left) == n_levels + 1
    np.testing.assert_allclose(sum(x @ y for x, y in zip(left, right, strict=True)), A @ B, atol=1e-10)
    np.testing.assert_allclose(sum((x**2).sum() for x in left), (A**2).sum(), rtol=1e-12)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.integers(0, 10**6))
def test_haar_of_images_is_orthonormal_whatever_the_size(h: int, w: int, n_levels: int, seed: int) -> None:
    n_levels = min(n_levels, (min(h, w) - 1).bit_length())
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(3, h * w)), rng.normal(size=(h * w, 2))
    left = haar_levels(A, n_levels=n_levels, grid=(h, w))
    right = haar_levels(B, axis=0, n_levels=n_levels, grid=(h, w))
    np.testing.assert_allclose(sum(x @ y for x, y in zip(left, right, strict=True)), A @ B, atol=1e-10)


def test_haar_levels_are_the_telescoping_differences() -> None:
    """Coarse levels up to l give the product of the block averages at resolution n_l."""
    n = 64
    left, right = (
        haar_levels(A48.repeat(2, axis=1)[:, :n], n_levels=4),
        haar_levels(np.ones((n, 1)), axis=0, n_levels=4),
    )
    assert sizes(left) == [4, 4, 8, 16, 32]
    assert all(abs(r).max() < 1e-12 for r in right[1:])
    A, B = np.random.default_rng(1).normal(size=(2, n)), np.random.default_rng(2).normal(size=(n, 2))
    left, right = haar_levels(A, n_levels=4), haar_levels(B, axis=0, n_levels=4)
    total = np.zeros((2, 2))
    for k, (x, y) in enumerate(zip(left, right, strict=True)):
        total += x @ y
        block = n // (4 * 2**k)
        mean_a, mean_b = A.reshape(2, -1, block).mean(axis=2), B.reshape(-1, block, 2).mean(axis=1)
        np.testing.assert_allclose(total, block * mean_a @ mean_b, atol=1e-12)


def test_haar_of_a_block_by_hand() -> None:
    image = np.array([[1.0, 2.0, 3.0, 4.0]])  # [[1, 2], [3, 4]]
    coarse, detail = haar_levels(image, n_levels=1, grid=(2, 2))
    assert coarse.tolist() == [[5.0]]
    assert detail.tolist() == [[-1.0, -2.0, 0.0]]


def test_every_backend_agrees(xp_array: Any) -> None:
    for seed, options in enumerate(
        (dict(budget=30), dict(eps=20.0), dict(budget=48), dict(budget=30, n_levels=2, grid=(6, 8)))
    ):
        expected = multilevel_matmul(A48, B48, rng=seed, **options)
        result = multilevel_matmul(xp_array(A48), xp_array(B48), rng=seed, **options)
        assert kind_of(result.product) == xp_array.kind
        np.testing.assert_allclose(to_numpy(result.product), expected.product, rtol=1e-12)
        np.testing.assert_array_equal(result.n_samples, expected.n_samples)
        assert result.error_estimate == pytest.approx(expected.error_estimate, rel=1e-10, abs=1e-12)
        assert result.exact_levels == expected.exact_levels
    mixed = multilevel_matmul(xp_array(A48), B48, budget=30, rng=0)
    assert kind_of(mixed.product) == xp_array.kind
    for probabilities in ("uniform", np.arange(1.0, 49)):
        W = basic_matmul(xp_array(A48), xp_array(B48), 9, probabilities=probabilities, rng=1)
        expected_W = basic_matmul(A48, B48, 9, probabilities=probabilities, rng=1)
        np.testing.assert_allclose(to_numpy(W), expected_W, rtol=1e-12)
    zero = basic_matmul(xp_array(0 * A48), xp_array(B48), 9, rng=0)
    assert kind_of(zero) == xp_array.kind and zero.shape == (3, 2) and not to_numpy(zero).any()
    W = basic_matmul(xp_array(A48), xp_array(B48), 9, rng=0)
    assert kind_of(W) == xp_array.kind
    np.testing.assert_allclose(to_numpy(W), basic_matmul(A48, B48, 9, rng=0), rtol=1e-12)
    for x, y in zip(haar_levels(xp_array(A48)), haar_levels(A48), strict=True):
        assert kind_of(x) == xp_array.kind
        np.testing.assert_array_equal(to_numpy(x), y)


@pytest.mark.parametrize(
    ("n", "options"),
    [(1, {}), (45, dict(n_levels=2)), (64, dict(n_levels=3)), (45, dict(n_levels=2, grid=(5, 9))),
     (40, dict(n_levels=0, grid=(4, 10)))],
)  # fmt: skip
def test_haar_of_every_backend_is_that_of_the_kernel(xp_array: Any, n: int, options: dict[str, Any]) -> None:
    """Lengths that need padding, and both axes; single precision stays single."""
    A = np.random.default_rng(n).normal(size=(3, n))
    for axis, array in ((1, A), (0, np.ascontiguousarray(A.T))):
        made, plain = (haar_levels(x, axis=axis, **options) for x in (xp_array(array), array))
        for x, y in zip(made, plain, strict=True):
            assert kind_of(x) == xp_array.kind and tuple(x.shape) == y.shape
            np.testing.assert_allclose(to_numpy(x), y, rtol=0, atol=1e-14)
    single = haar_levels(xp_array(A.astype(np.float32)), **options)
    for x, y in zip(single, haar_levels(A.astype(np.float32), **options), strict=True):
        assert to_numpy(x).dtype == np.float32
        np.testing.assert_allclose(to_numpy(x), y, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("grid", "n_levels"), [(None, 4), ((128, 64), 2)])
def test_wide_factors_agree_on_every_backend(xp_array: Any, grid: Any, n_levels: int) -> None:
    """Past 4,096 columns the kernel makes fine details on demand; other kinds of arrays store them."""
    rng = np.random.default_rng(0)
    A, B = np.cumsum(rng.normal(size=(5, 8192)), axis=1), np.cumsum(rng.normal(size=(8192, 4)), axis=0)
    options: dict[str, Any] = dict(budget=1000, n_levels=n_levels, grid=grid, rng=0)
    expected, result = multilevel_matmul(A, B, **options), multilevel_matmul(xp_array(A), xp_array(B), **options)
    np.testing.assert_array_equal(result.n_samples, expected.n_samples)
    np.testing.assert_allclose(to_numpy(result.product), expected.product, rtol=1e-9)


def test_mlmc_keeps_the_kind_of_the_sampler(xp_array: Any) -> None:
    M = np.array([[1.0, 2.0], [0.0, -1.0]])

    def numpy_sampler(level: int, size: int, rng: np.random.Generator) -> Any:
        fine, coarse = brownian(level, size, rng)
        return fine[:, None, None] * M, None if coarse is None else coarse[:, None, None] * M

    def sampler(level: int, size: int, rng: np.random.Generator) -> Any:
        fine, coarse = numpy_sampler(level, size, rng)
        return xp_array(fine), None if coarse is None else xp_array(coarse)

    plain, made = mlmc(numpy_sampler, eps=0.2, rng=1), mlmc(sampler, eps=0.2, rng=1)
    assert kind_of(made.estimate) == xp_array.kind
    np.testing.assert_allclose(to_numpy(made.estimate), plain.estimate, rtol=1e-12)
    np.testing.assert_array_equal(made.n_samples, plain.n_samples)
    np.testing.assert_allclose(made.level_variance, plain.level_variance, rtol=1e-9)


@pytest.mark.gpu
def test_gpu_agrees_with_the_host() -> None:
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    A, B = np.cumsum(rng.normal(size=(50, 8192)), axis=1), np.cumsum(rng.normal(size=(8192, 40)), axis=0)
    for options in (dict(budget=400), dict(budget=400, grid=(128, 64))):
        host = multilevel_matmul(A, B, rng=0, **options)
        device = multilevel_matmul(cupy.asarray(A), cupy.asarray(B), rng=0, **options)
        assert kind_of(device.product) == "cupy"
        np.testing.assert_array_equal(device.n_samples, host.n_samples)
        np.testing.assert_allclose(device.product.get(), host.product, rtol=1e-9, atol=1e-6)
    W = basic_matmul(cupy.asarray(A), cupy.asarray(B), 200, rng=0)
    assert kind_of(W) == "cupy"
    np.testing.assert_allclose(W.get(), basic_matmul(A, B, 200, rng=0), rtol=1e-9, atol=1e-6)
    for x, y in zip(haar_levels(cupy.asarray(A), n_levels=5), haar_levels(A, n_levels=5), strict=True):
        assert kind_of(x) == "cupy"
        np.testing.assert_allclose(x.get(), y, atol=1e-10)
    with pytest.raises(TypeError, match="has no GPU kernel"):  # NumPy first: nothing is fetched from the GPU unasked
        basic_matmul(A, cupy.asarray(B), 200, rng=0)


# ------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("grid", [None, (128, 64)])
def test_details_on_demand_are_those_of_the_whole_transform(grid: Any) -> None:
    """Past 4,096 columns fine details are not stored: what is computed later must be what the transform has."""
    n = 8192
    x = np.random.default_rng(0).normal(size=(20, n))
    plan = module._plan(n, 5, grid, "A")
    whole = np.concatenate(haar_levels(x, n_levels=5, grid=grid), axis=1)
    assert plan.keep < n
    for data in (x, np.asfortranarray(x)):
        head, norms = module._transform(data, plan)
        np.testing.assert_allclose(head, whole[:, : plan.keep], atol=1e-12)
        np.testing.assert_allclose(norms, np.linalg.norm(whole, axis=0), rtol=1e-12)
        for a, b in zip(plan.edges[:-1], plan.edges[1:], strict=True):
            places = np.arange(a, b, 7)
            np.testing.assert_allclose(module._details(data, head, plan, places), whole[:, places], atol=1e-12)


@pytest.mark.parametrize("grid", [None, (8, 8)])
def test_multilevel_is_unbiased_and_knows_its_error(grid: Any) -> None:
    rng = np.random.default_rng(0)
    A, B = np.cumsum(rng.normal(size=(3, 64)), axis=1), np.cumsum(rng.normal(size=(64, 2)), axis=0)
    draws = [multilevel_matmul(A, B, budget=24, grid=grid, n_levels=2, rng=s) for s in range(2000)]
    exact = A @ B
    products = np.array([d.product for d in draws])
    deviation = products.std(axis=0) / np.sqrt(2000)
    assert (abs(products.mean(axis=0) - exact) <= 4.5 * deviation + 1e-12).all()
    rms = np.sqrt(((products - exact) ** 2).sum(axis=(1, 2)).mean())
    assert np.sqrt(np.mean([d.error_estimate**2 for d in draws])) == pytest.approx(rms, rel=0.15)
    assert all(d.n_samples.sum() <= 24 for d in draws)


def test_a_full_budget_is_exact_and_eps_is_met() -> None:
    rng = np.random.default_rng(0)
    A, B = np.cumsum(rng.normal(size=(4, 256)), axis=1), np.cumsum(rng.normal(size=(256, 3)), axis=0)
    full = multilevel_matmul(A, B, budget=256)
    np.testing.assert_allclose(full.product, A @ B)
    assert full.error_estimate == 0 and full.exact_levels == tuple(range(len(full.n_samples)))
    eps = 0.01 * np.linalg.norm(A @ B)
    results = [multilevel_matmul(A, B, eps=eps, rng=s) for s in range(20)]
    errors = [np.linalg.norm(r.product - A @ B) for r in results]
    assert np.sqrt(np.mean(np.square(errors))) <= 1.1 * eps
    assert results[0].n_samples.sum() < 256


def test_empty_levels_are_exact_and_free() -> None:
    A = np.repeat(np.arange(1.0, 9.0), 8)[None]  # constant on blocks of 8
    result = multilevel_matmul(A, A.T, budget=8, n_levels=3)
    np.testing.assert_allclose(result.product, A @ A.T)
    assert result.n_samples.tolist() == [8, 0, 0, 0] and result.exact_levels == (0, 1, 2, 3)
    zero = multilevel_matmul(np.zeros((2, 64)), np.zeros((64, 2)), budget=16)
    assert not zero.product.any()


@given(st.integers(0, 10**6), st.integers(0, 200))
def test_allocation_spends_the_budget(seed: int, budget: int) -> None:
    rng = np.random.default_rng(seed)
    width = np.array([4, 8, 16, 32, 64])
    T = rng.gamma(0.3, size=5) * (rng.random(5) < 0.8)
    N = module._allocate(T, width, budget, None)
    some = T > 0
    assert (width >= N).all() and N[some].sum() == min(budget, width[some].sum())


@pytest.mark.parametrize(
    ("kwargs", "part"),
    [
        (dict(), "budget or eps"),
        (dict(budget=30, eps=0.1), "budget or eps"),
        (dict(budget=2), "budget"),
        (dict(budget=30, grid=(5, 5)), "grid"),
        (dict(budget=30, n_levels=9), "n_levels"),
        (dict(budget=30, A=np.full((3, 48), np.nan)), "A and B must be finite"),
        (dict(budget=30, A=np.ones((3, 47))), "inner dimension"),
        (dict(eps=-1.0), "eps"),
    ],
)
def test_what_is_refused(kwargs: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        multilevel_matmul(**{"A": A48, "B": B48, **kwargs})


def test_float32_stays_float32() -> None:
    A, B = A48.astype(np.float32), B48.astype(np.float32)
    assert multilevel_matmul(A, B, budget=30, rng=0).product.dtype == np.float32
    assert basic_matmul(A, B, 5, rng=0).dtype == np.float32
    assert haar_levels(A)[0].dtype == np.float32


def test_same_answer_whatever_the_number_of_threads(assert_threads_agree) -> None:
    code = (
        "import numpy as np; from algokit.sketching.multilevel_matmul import *;"
        "A = np.random.default_rng(0).normal(size=(5, 300));"
        "r = multilevel_matmul(A, A.T, budget=60, rng=0);"
        "print(r.n_samples.tolist(), r.product.round(10).tolist())"
    )
    assert_threads_agree(code)
