"""Tests of the fast Johnson-Lindenstrauss transform: against dense matrices, closed forms and invariants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from sklearn.random_projection import johnson_lindenstrauss_min_dim
from sklearn.utils.estimator_checks import parametrize_with_checks

from algokit.arrays import kind_of, to_numpy
from algokit.checks import AlgokitWarning
from algokit.sketching._hadamard import butterflies
from algokit.sketching.fast_johnson_lindenstrauss import (
    FastJLOperator,
    FastJohnsonLindenstrauss,
    ProjectedGramSummary,
    fast_jl_density,
    fast_jl_dim,
    fast_jl_operator,
    fwht,
    norm_variance,
)

SUMMARY = ProjectedGramSummary(fast_jl_operator(6, 4, density=0.5, rng=0))
STATE = SUMMARY.update(SUMMARY.init(), np.arange(30.0).reshape(5, 6))

EXAMPLES: dict[str, Any] = {
    "ProjectedGramSummary": dict(operator=SUMMARY.operator, n_components=2),
    "ProjectedGramSummary.update": (lambda: SUMMARY, dict(state=STATE, chunk=np.ones((5, 6)))),
    "ProjectedGramSummary.merge": (lambda: SUMMARY, dict(a=STATE, b=STATE)),
    "ProjectedGramSummary.finish": (lambda: SUMMARY, dict(state=STATE)),
    "fwht": dict(x=np.ones((3, 8)), axis=-1, normalize=True, overwrite=False),
    "fast_jl_dim": dict(n_points=10, eps=0.5),
    "fast_jl_density": dict(n_points=10, dim=100, eps=0.25, analysis="classic", c=2.0),
    "fast_jl_operator": dict(dim=6, n_components=4, density=0.5, values="gaussian", rng=0),
    "norm_variance": dict(u=np.array([0.6, 0.8]), density=0.5, n_components=3, values="gaussian"),
    "FastJLOperator.apply": (lambda: fast_jl_operator(6, 4, density=0.5, rng=0), dict(X=np.ones((5, 6)))),
    "FastJLOperator.T_apply": (lambda: fast_jl_operator(6, 4, density=0.5, rng=0), dict(Z=np.ones((5, 4)))),
    "FastJohnsonLindenstrauss": dict(n_components=4, eps=0.25, density=0.5, c=2.0, values="gaussian", rng=0),
    "FastJohnsonLindenstrauss.fit": dict(X=np.eye(8)),
    "FastJohnsonLindenstrauss.transform": dict(X=np.eye(8)),
}
ACCEPTS = {"ProjectedGramSummary.update.chunk": {"empty"}}

BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def tolerance(dtype: Any) -> float:
    return 2e-5 if dtype == np.float32 else 1e-12


def cuts(n: int, seed: int) -> list[slice]:
    """A random partition of n rows into a few chunks, some of them empty."""
    bounds = np.sort(np.random.default_rng([seed, 1]).integers(0, n + 1, 4))
    return [slice(a, b) for a, b in zip([0, *bounds], [*bounds, n], strict=True)]


def dense(phi: FastJLOperator) -> np.ndarray:
    """The matrix of the map, shape (k, dim), by SciPy's Hadamard matrix."""
    d = len(phi.signs)
    return ((phi.P @ (scipy.linalg.hadamard(d) / math.sqrt(d))) * phi.signs)[:, : phi.dim]


# ----------------------------------------------------------------------------------------------------------- fwht


def test_fwht_by_hand() -> None:
    assert fwht(np.array([1.0, 2.0, 3.0, 4.0]), normalize=False).tolist() == [10.0, -2.0, -4.0, 0.0]
    assert fwht(np.array([3.0])).tolist() == [3.0]
    assert fwht([3, 1]).dtype == np.float64


@BOTH
@pytest.mark.parametrize("d", [2**m for m in range(13)])
def test_fwht_matches_scipy_hadamard(d: int, dtype: Any) -> None:
    x = np.random.default_rng(d).normal(size=(3, d)).astype(dtype)
    y = fwht(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, x @ scipy.linalg.hadamard(d) / math.sqrt(d), atol=tolerance(dtype))


@BOTH
@pytest.mark.parametrize("d", [2**13, 2**15, 2**18])
def test_fwht_of_long_rows_matches_whole_arraybutterflies(d: int, dtype: Any) -> None:
    x = np.random.default_rng(0).normal(size=(2, d)).astype(dtype)
    expected = butterflies(x.astype(float), 1) / math.sqrt(d)
    np.testing.assert_allclose(fwht(x), expected, atol=tolerance(dtype))


@BOTH
@pytest.mark.parametrize(
    ("shape", "axis"), [((64, 40), 0), ((3, 32, 5), 1), ((3, 32, 5), -2), ((2, 4, 8), 2), ((16,), 0)]
)
def test_fwht_along_any_axis_and_memory_layout(shape: tuple[int, ...], axis: int, dtype: Any) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    expected = np.moveaxis(butterflies(np.moveaxis(x, axis, -1).astype(float), 1), -1, axis) / math.sqrt(x.shape[axis])
    for layout in (x, np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2]):
        np.testing.assert_allclose(fwht(layout, axis=axis), expected, atol=tolerance(dtype))


@pytest.mark.parametrize("axis", [0, 1])
def test_overwrite_reuses_the_memory_and_the_default_does_not(axis: int) -> None:
    x = np.random.default_rng(0).normal(size=(64, 64))
    before = x.copy()
    y = fwht(x, axis=axis)
    np.testing.assert_array_equal(x, before)
    z = fwht(x, axis=axis, overwrite=True)
    assert np.shares_memory(x, z)
    np.testing.assert_array_equal(y, z)


def test_fwht_of_a_read_only_array() -> None:
    x = np.random.default_rng(0).normal(size=(4, 32))
    expected = fwht(x)
    x.flags.writeable = False
    np.testing.assert_array_equal(fwht(x, overwrite=True), expected)


def test_fwht_of_another_byte_order_and_precision() -> None:
    x = np.random.default_rng(0).normal(size=(4, 32))
    np.testing.assert_array_equal(fwht(x.astype(">f8")), fwht(x))
    np.testing.assert_allclose(fwht(x.astype(np.float16)), fwht(x), atol=0.01)


def test_nan_is_found_wherever_it_stands() -> None:
    phi = fast_jl_operator(50, 8, density=0.2, rng=0)
    for n, i, j in ((40, 17, 49), (3, 2, 18), (20, 19, 31)):
        X = np.ones((n, 50))
        X[i, j] = np.nan
        with pytest.raises(ValueError, match="X must be finite"):
            phi.apply(X)
        with pytest.raises(ValueError, match="x must be finite"):
            fwht(X[:, 18:])
        with pytest.raises(ValueError, match="x must be finite"):
            fwht(X[:, 18:].copy(), overwrite=True)


@pytest.mark.parametrize("d", [3, 6, 100])
def test_fwht_refuses_lengths_that_are_no_power_of_two(d: int) -> None:
    with pytest.raises(ValueError, match="x must have a power of two"):
        fwht(np.ones((2, d)))


vectors = st.builds(
    lambda m, n, seed: np.random.default_rng(seed).normal(size=(n, 2**m)),
    st.integers(0, 12),
    st.integers(1, 5),
    st.integers(0, 2**32),
)


@given(vectors)
def test_fwht_is_an_isometry_and_its_own_inverse(x: np.ndarray) -> None:
    y = fwht(x)
    np.testing.assert_allclose(np.sum(y**2, axis=1), np.sum(x**2, axis=1), rtol=1e-12)
    np.testing.assert_allclose(fwht(y), x, atol=1e-12)


@given(vectors, st.floats(-10, 10))
def test_fwht_is_linear(x: np.ndarray, a: float) -> None:
    y = x[::-1]
    np.testing.assert_allclose(fwht(a * x + y), a * fwht(x) + fwht(y), atol=1e-11)


@pytest.mark.parametrize("shape", [(3, 64), (64, 3)])
def test_fwht_on_every_backend(xp_array: Callable[[np.ndarray], Any], shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=shape)
    axis = shape.index(64)
    y = fwht(xp_array(x), axis=axis)
    assert kind_of(y) == xp_array.kind
    np.testing.assert_allclose(to_numpy(y), fwht(x, axis=axis), atol=1e-12)


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("d", [1, 2, 16, 4096, 8192, 2**16])
def test_fwht_on_the_gpu_matches_the_cpu(d: int, dtype: Any) -> None:
    cupy = pytest.importorskip("cupy")
    x = np.random.default_rng(0).normal(size=(5, d)).astype(dtype)
    np.testing.assert_allclose(fwht(cupy.asarray(x)).get(), fwht(x), atol=tolerance(dtype))
    np.testing.assert_allclose(fwht(cupy.asarray(x.T), axis=0).get(), fwht(x).T, atol=tolerance(dtype))


# ---------------------------------------------------------------------------------------------- dimension, density


@pytest.mark.parametrize(("n", "eps"), [(100, 0.3), (2000, 0.1), (10**6, 0.5)])
def test_dimension_is_that_of_sklearn_rounded_up(n: int, eps: float) -> None:
    assert fast_jl_dim(n, eps=eps) - johnson_lindenstrauss_min_dim(n, eps=eps) in (0, 1)


def test_density_by_hand() -> None:
    log_n = math.log(1000)
    assert fast_jl_density(1000, 4000, eps=0.1, analysis="classic", c=1) == pytest.approx(log_n**2 / 4096)
    assert fast_jl_density(1000, 4096, eps=0.1) == pytest.approx(2 * log_n / 4096)  # alpha = ln n
    assert fast_jl_density(10**9, 4096, eps=0.4) == pytest.approx(
        2 * math.log(10**9) ** 2 / (math.log(2.5) / 0.4) / 4096  # alpha = ln(1 / eps) / eps
    )
    assert fast_jl_density(1000, 8, eps=0.1) == 1.0


@given(st.integers(2, 10**9), st.integers(1, 10**6), st.floats(0.01, 0.99))
def test_tight_is_never_denser_than_classic(n: int, dim: int, eps: float) -> None:
    tight = fast_jl_density(n, dim, eps=eps)
    assert 0 < tight <= fast_jl_density(n, dim, eps=eps, analysis="classic") <= 1


# ------------------------------------------------------------------------------------------------------- the map

shapes = st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40))  # dim, k, n


@pytest.mark.filterwarnings("ignore::algokit.checks.AlgokitWarning")
@given(shapes, st.floats(0.01, 1), st.integers(0, 2**32), st.sampled_from([np.float32, np.float64]))
def test_apply_matches_the_dense_matrix(shape: tuple[int, int, int], q: float, seed: int, dtype: Any) -> None:
    dim, k, n = shape
    phi = fast_jl_operator(dim, k, density=q, rng=seed, dtype=dtype)
    X = np.random.default_rng(seed).normal(size=(n, dim)).astype(dtype)
    Z = phi.apply(X)
    assert Z.shape == (n, k)
    assert Z.dtype == dtype
    scale = 1 + np.abs(phi.P).sum(axis=1).max()
    np.testing.assert_allclose(Z, X @ dense(phi).T, atol=tolerance(dtype) * scale)


@pytest.mark.filterwarnings("ignore::algokit.checks.AlgokitWarning")
@given(shapes, st.floats(0.01, 1), st.integers(0, 2**32))
def test_adjoint(shape: tuple[int, int, int], q: float, seed: int) -> None:
    dim, k, n = shape
    phi = fast_jl_operator(dim, k, density=q, rng=seed)
    rng = np.random.default_rng(seed)
    X, Z = rng.normal(size=(n, dim)), rng.normal(size=(n, k))
    left, right = np.sum(phi.apply(X) * Z, axis=1), np.sum(X * phi.T_apply(Z), axis=1)
    np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**32))
def test_same_seed_same_operator(seed: int) -> None:
    a, b = (fast_jl_operator(100, 20, density=0.1, rng=seed) for _ in range(2))
    assert np.array_equal(a.signs, b.signs)
    assert np.array_equal(a.P.toarray(), b.P.toarray())
    single = fast_jl_operator(100, 20, density=0.1, rng=seed, dtype=np.float32)
    np.testing.assert_allclose(single.P.toarray(), a.P.toarray(), rtol=1e-6)


@pytest.mark.parametrize("values", ["gaussian", "rademacher"])
def test_law_of_the_sparse_matrix(values: str) -> None:
    q, k, d = 0.03, 500, 1024
    P = fast_jl_operator(d, k, density=q, values=values, rng=0).P
    cells = k * d
    assert abs(P.nnz - q * cells) < 5 * math.sqrt(cells * q * (1 - q))
    assert P.has_canonical_format
    rows, columns = np.diff(P.indptr), np.bincount(P.indices, minlength=d)
    assert rows.var() == pytest.approx(d * q * (1 - q), rel=0.3)  # binomial, neither fixed nor clustered
    assert columns.var() == pytest.approx(k * q * (1 - q), rel=0.3)
    scaled = P.data * math.sqrt(q * k)
    assert abs(scaled.mean()) < 5 / math.sqrt(P.nnz)
    assert np.mean(scaled**2) == pytest.approx(1, abs=5 * math.sqrt(2 / P.nnz))
    assert np.mean(scaled**4) == pytest.approx(3 if values == "gaussian" else 1, rel=0.1)


def test_density_one_fills_the_matrix_and_tiny_density_may_leave_it_empty() -> None:
    assert fast_jl_operator(8, 4, density=1.0, rng=0).nnz == 32
    empty = fast_jl_operator(8, 4, density=1e-12, rng=0)
    assert empty.nnz == 0
    assert not empty.apply(np.ones((20, 8))).any()


def test_zero_maps_to_zero_and_padding_changes_nothing() -> None:
    phi = fast_jl_operator(100, 30, density=0.2, rng=0)
    assert not phi.apply(np.zeros((20, 100))).any()
    wide = FastJLOperator(signs=phi.signs, P=phi.P, dim=128, density=phi.density)
    X = np.random.default_rng(0).normal(size=(20, 100))
    np.testing.assert_allclose(phi.apply(X), wide.apply(np.pad(X, ((0, 0), (0, 28)))), atol=1e-12)
    assert phi.apply(np.ones((2, 100), dtype=int)).dtype == np.float64


def test_more_components_than_dimensions_is_only_a_warning() -> None:
    with pytest.warns(AlgokitWarning, match="n_components=9"):
        fast_jl_operator(8, 9, density=0.5, rng=0)


def test_operator_too_large_for_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="n_components is too large"):
        fast_jl_operator(2**30, 2**29, density=1.0)


@pytest.mark.parametrize("n", [1, 20])
def test_apply_on_every_backend(xp_array: Callable[[np.ndarray], Any], n: int) -> None:
    phi = fast_jl_operator(50, 8, density=0.2, rng=0)
    X = np.random.default_rng(0).normal(size=(n, 50))
    Z = phi.apply(xp_array(X))
    back = phi.T_apply(Z)
    assert kind_of(Z) == kind_of(back) == xp_array.kind
    np.testing.assert_allclose(to_numpy(Z), phi.apply(X), atol=1e-12)
    np.testing.assert_allclose(to_numpy(back), phi.T_apply(phi.apply(X)), atol=1e-12)


@pytest.mark.parametrize("values", ["gaussian", "rademacher"])
@pytest.mark.parametrize("q", [0.02, 0.2, 1.0])
def test_norm_variance_matches_simulation(q: float, values: str) -> None:
    u = np.random.default_rng(1).normal(size=64) * (np.arange(64) < 16)
    k, draws = 8, 20_000
    with pytest.warns(AlgokitWarning):  # rows are independent: one tall operator is many short ones
        tall = fast_jl_operator(64, k * draws, density=q, values=values, rng=0)
    norms = np.sum((tall.P @ u * math.sqrt(draws)).reshape(draws, k) ** 2, axis=1)
    assert norms.mean() == pytest.approx(np.sum(u**2), rel=0.05)
    assert norms.var() == pytest.approx(norm_variance(u, density=q, n_components=k, values=values), rel=0.15)


def test_expected_fourth_norm_after_mixing() -> None:
    """E |HDx|_4^4 = (3 - 2 |x|_4^4) / d for a unit vector x."""
    d = 64
    rng = np.random.default_rng(0)
    x = np.r_[0.8, 0.6 * np.ones(9) / 3, np.zeros(d - 10)]
    mixed = fwht(x * rng.choice([-1.0, 1.0], size=(20_000, d)))
    assert np.sum(mixed**4, axis=1).mean() == pytest.approx((3 - 2 * np.sum(x**4)) / d, rel=0.02)


def test_answer_does_not_depend_on_the_number_of_threads(assert_threads_agree) -> None:
    program = (
        "import hashlib, numpy as np\n"
        "from algokit.sketching.fast_johnson_lindenstrauss import fast_jl_operator, fwht\n"
        "X = np.random.default_rng(0).normal(size=(100, 1000))\n"
        "Z = fast_jl_operator(1000, 50, density=0.05, rng=0).apply(X)\n"
        "y, z = fwht(np.pad(X, ((0, 0), (0, 24)))), fwht(X[:64], axis=0)\n"
        "print(hashlib.sha256(Z.tobytes() + y.tobytes() + z.tobytes()).hexdigest())"
    )
    assert_threads_agree(program)


# ------------------------------------------------------------------------------------------------- the estimator


@pytest.mark.filterwarnings("ignore::algokit.checks.AlgokitWarning")
@parametrize_with_checks([FastJohnsonLindenstrauss(n_components=2, rng=0)])
def test_sklearn_conventions(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@BOTH
def test_estimator_keeps_distances_of_dense_and_sparse_rows(dtype: Any) -> None:
    X = sp.random_array((60, 3000), density=0.01, rng=0, format="csr", dtype=np.float64).astype(dtype)
    sketch = FastJohnsonLindenstrauss(eps=0.3, rng=0).fit(X)
    Z = sketch.transform(X)
    assert Z.dtype == dtype
    assert sketch.n_components_ == fast_jl_dim(60, eps=0.3)
    assert sketch.density_ == fast_jl_density(60, 3000, eps=0.3)
    np.testing.assert_allclose(Z, sketch.transform(X.toarray()), atol=tolerance(dtype))
    ratio = pdist(Z, "sqeuclidean") / pdist(X.toarray(), "sqeuclidean")
    assert abs(ratio - 1).max() < 0.3
    assert list(sketch.get_feature_names_out()[:2]) == ["fastjohnsonlindenstrauss0", "fastjohnsonlindenstrauss1"]


def test_mixing_saves_one_hot_points() -> None:
    """Without the signs and the Hadamard matrix, points with one non-zero fall between the entries of P."""
    X = np.eye(512)[:200]
    phi = fast_jl_operator(512, 200, density=fast_jl_density(200, 512, eps=0.25) / 8, rng=0)
    unmixed = pdist((phi.P @ X.T).T, "sqeuclidean") / 2
    assert unmixed.min() < 0.1
    assert (pdist(phi.apply(X), "sqeuclidean") / 2).min() > 3 * unmixed.min()


class TestSummary:
    @given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.floats(-1e6, 1e6))
    def test_any_chunks_and_any_tree_give_the_moments_of_all_rows(self, in_a_tree, seed, n, centre):
        X = np.random.default_rng(seed).normal(size=(n, 6)) + centre
        got = SUMMARY.finish(in_a_tree(SUMMARY, [X[c] for c in cuts(n, seed)], seed))
        Y = SUMMARY.operator.apply(X)
        size = np.abs(Y).max()
        assert got.n_rows == n
        np.testing.assert_allclose(got.mean, Y.mean(axis=0), atol=1e-13 * size)
        np.testing.assert_allclose(got.gram, Y.T @ Y, atol=1e-12 * n * size**2)
        covariance = got.components.T * got.variances @ got.components
        np.testing.assert_allclose(covariance, np.cov(Y.T), atol=1e-12 * size * max(1.0, size / 1e3))

    def test_principal_components_against_a_singular_value_decomposition(self, in_a_tree):
        rng = np.random.default_rng(0)
        X = rng.normal(size=(200, 60)) * np.geomspace(10, 0.1, 60) + 3
        summary = ProjectedGramSummary(fast_jl_operator(60, 16, density=0.5, rng=1), n_components=3)
        got = summary.finish(in_a_tree(summary, [X[c] for c in cuts(200, 0)], 0))
        Y = summary.operator.apply(X)
        _, s, V = np.linalg.svd(Y - Y.mean(axis=0), full_matrices=False)
        np.testing.assert_allclose(got.variances, s[:3] ** 2 / 199, rtol=1e-10)
        np.testing.assert_allclose(np.abs((got.components * V[:3]).sum(axis=1)), 1, rtol=1e-10)
        assert (got.components[np.arange(3), np.abs(got.components).argmax(axis=1)] > 0).all()
        assert summary.operator.T_apply(got.components).shape == (3, 60)

    def test_a_mean_far_away_costs_no_digits(self, in_a_tree):
        X = np.random.default_rng(0).normal(size=(400, 6))
        near, far = (
            SUMMARY.finish(in_a_tree(SUMMARY, [(X + c)[s] for s in cuts(400, 1)], 1)).variances for c in (0, 1e7)
        )
        np.testing.assert_allclose(near, far, rtol=1e-6)  # Y.T @ Y - n m m.T would have two digits left

    @BOTH
    def test_chunks_of_any_kind_of_array(self, xp_array, dtype):
        X = np.random.default_rng(0).normal(size=(5, 6)).astype(dtype)
        got = SUMMARY.update(SUMMARY.init(), xp_array(X))
        Y = SUMMARY.operator.apply(X).astype(np.float64)
        np.testing.assert_allclose(got["scatter"], np.cov(Y.T) * 4, atol=tolerance(dtype) * 10)
        assert all(isinstance(a, np.ndarray) and a.dtype in (np.float64, np.int64) for a in got.values())

    def test_one_row_and_none(self):
        state = SUMMARY.update(SUMMARY.init(), np.zeros((0, 6)))
        with pytest.raises(ValueError, match="state must cover at least one row"):
            SUMMARY.finish(state)
        one = SUMMARY.finish(SUMMARY.update(state, np.ones((1, 6))))
        assert one.n_rows == 1 and not one.variances.any()

    def test_foreign_states_and_wrong_sizes_are_refused(self):
        other = ProjectedGramSummary(fast_jl_operator(6, 3, density=0.5, rng=0))
        with pytest.raises(ValueError, match="b must be a state of 4 projected columns"):
            SUMMARY.merge(STATE, other.init())
        with pytest.raises(ValueError, match="n_components"):
            ProjectedGramSummary(SUMMARY.operator, n_components=5)
        with pytest.raises(ValueError, match="chunk must have squares"):
            SUMMARY.update(STATE, np.eye(5, 6) * 1e200)
