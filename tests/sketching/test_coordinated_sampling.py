"""Tests of coordinated row sampling: against brute force, exact expectations, closed-form variances and invariants."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from algokit.arrays import kind_of, to_numpy
from algokit.checks import AlgokitWarning
from algokit.sketching import coordinated_sampling as module
from algokit.sketching.coordinated_sampling import (
    CoordinatedSampler,
    CoordinatedSummary,
    RowSketch,
    countsketch,
    jl_sketch,
    merge_sketches,
    shared_uniforms,
    sketch_rows,
    sketched_join_lstsq,
    sketched_product,
)

METHODS = ("priority", "threshold", "threshold-adaptive")
A6 = np.arange(1.0, 13.0).reshape(6, 2)
SKETCH = sketch_rows(A6, 4, seed=0)
SUMMARY = CoordinatedSummary(3, seed=0)
STATE = SUMMARY.update(SUMMARY.init(), (np.arange(6), A6))

EXAMPLES: dict[str, Any] = {
    "shared_uniforms": dict(keys=np.arange(5), seed=0),
    "sketch_rows": dict(A=A6, size=3, keys=np.arange(6), seed=0, method="priority", weights="norm2"),
    "merge_sketches": dict(first=SKETCH),
    "sketched_product": dict(SA=SKETCH, SB=SKETCH),
    "sketched_join_lstsq": dict(SA=SKETCH, Sb=SKETCH, ridge=0.5),
    "CoordinatedSampler": dict(size=3, seed=0, method="priority", weights="norm2"),
    "CoordinatedSampler.partial_fit": dict(A=A6, keys=np.arange(6)),
    "CoordinatedSummary": dict(size=3, seed=0, method="priority", weights="norm2"),
    "CoordinatedSummary.update": (lambda: SUMMARY, dict(state=STATE, chunk=([7, 8], A6[:2]))),
    "CoordinatedSummary.merge": (
        lambda: SUMMARY,
        dict(a=STATE, b=SUMMARY.update(SUMMARY.init(), (np.arange(6, 12), A6))),
    ),
    "CoordinatedSummary.finish": (lambda: SUMMARY, dict(state=STATE)),
    "countsketch": dict(A=A6, size=3, keys=np.arange(6), seed=0),
    "jl_sketch": dict(A=A6, size=3, keys=np.arange(6), seed=0),
}
ACCEPTS = {"shared_uniforms.keys": {"string"}}


def tables(seed: int, n: int = 60, d: int = 5, m: int = 4, share: float = 0.6) -> tuple[sp.csr_array, sp.csr_array]:
    """Two sparse tables, some rows empty, some heavy."""
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(n, d)), rng.normal(size=(n, m))
    heavy = rng.random(n) < 0.1
    A[heavy] *= 10
    B[heavy] *= 10
    A[rng.random((n, d)) < 0.4] = 0
    A[rng.random(n) > share] = 0
    B[rng.random(n) > share] = 0
    return sp.csr_array(A), sp.csr_array(B)


def cuts(n: int, seed: int) -> list[slice]:
    """A random partition of n rows into a few chunks, some of them empty."""
    bounds = np.sort(np.random.default_rng([seed, 1]).integers(0, n + 1, 4))
    return [slice(a, b) for a, b in zip([0, *bounds], [*bounds, n], strict=True)]


def by_the_book(A: np.ndarray, k: int, keys: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """Priority sampling as the paper writes it: keys kept and the threshold of h / ||row||^2."""
    h, w = shared_uniforms(keys, seed=seed), (A**2).sum(axis=1)
    ranks = {int(key): hi / wi for key, hi, wi in zip(keys, h, w, strict=True) if wi > 0}
    order = sorted(ranks, key=lambda key: ranks[key])
    tau = ranks[order[k]] if len(order) > k else np.inf
    return np.array(sorted(order[:k])), tau


# ------------------------------------------------------------------------------------------------- the hash


def test_uniforms_are_uniform_and_independent_between_seeds() -> None:
    u, v = (shared_uniforms(np.arange(200_000), seed=s) for s in (0, 1))
    assert u.min() > 0 and u.max() < 1
    for sample in (u, v):
        deciles = np.bincount((sample * 10).astype(int), minlength=10)
        assert abs(deciles - 20_000).max() < 600  # 4.5 standard deviations
    assert abs(np.corrcoef(u, v)[0, 1]) < 0.01
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.01


def test_uniforms_are_the_same_numbers_everywhere() -> None:
    """Written down once: another machine, another version, must give these."""
    expected = [0.1847, 0.46341, 0.2454]
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    keys, seed = [0, -1, 2**62], 7
    state = mix(mix((seed + golden) & mask))
    plain = [((mix(mix((key + golden) & mask) ^ state) >> 12) + 0.5) / 2**52 for key in keys]
    np.testing.assert_array_equal(shared_uniforms(keys, seed=seed), plain)
    np.testing.assert_allclose(plain, expected, atol=6e-6)


def test_strings_and_bytes_are_the_same_keys() -> None:
    a, b = shared_uniforms(["x", "naïve"], seed=3), shared_uniforms([b"x", "naïve".encode()], seed=3)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, shared_uniforms(np.array(["x", "naïve"]), seed=3))
    with pytest.raises(TypeError, match="keys"):
        shared_uniforms([1.0, 2.0], seed=0)
    with pytest.raises(TypeError, match="keys"):
        shared_uniforms(np.array(["a", 1.5], object), seed=0)


# ------------------------------------------------------------------------------------------------- one sketch


@given(st.integers(0, 10**6), st.integers(1, 70))
def test_priority_keeps_what_the_paper_says(seed: int, k: int) -> None:
    A, _ = tables(seed)
    keys = np.random.default_rng(seed).permutation(1000)[: A.shape[0]]
    sketch = sketch_rows(A, k, keys=keys, seed=seed)
    kept, tau = by_the_book(A.toarray(), k, keys, seed)
    np.testing.assert_array_equal(sketch.keys, kept)
    np.testing.assert_allclose(sketch.tau**2, tau, rtol=1e-12)
    place = {int(key): i for i, key in enumerate(keys)}
    np.testing.assert_array_equal(sketch.rows.toarray(), A.toarray()[[place[int(key)] for key in kept]])


@given(st.integers(0, 10**6), st.integers(1, 70))
def test_thresholds_expect_k_rows(seed: int, k: int) -> None:
    A, _ = tables(seed)
    w = (A.toarray() ** 2).sum(axis=1)
    plain, adaptive = (sketch_rows(A, k, seed=seed, method=m) for m in METHODS[1:])
    np.testing.assert_allclose(plain.tau**2, k / w.sum(), rtol=1e-12)
    if np.count_nonzero(w) > k:
        np.testing.assert_allclose(np.minimum(1, adaptive.tau**2 * w).sum(), k, rtol=1e-9)
    else:
        assert adaptive.tau == np.inf and len(adaptive.keys) == np.count_nonzero(w)
    for sketch in (plain, adaptive):
        ranks = np.full(len(w), np.inf)
        ranks[w > 0] = shared_uniforms(np.arange(len(w)), seed=seed)[w > 0] / w[w > 0]
        np.testing.assert_array_equal(sketch.keys, np.flatnonzero((ranks <= sketch.tau**2) & (w > 0)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-170, 1e-3, 1e170])
def test_scale_does_not_matter(scale: float, method: str) -> None:
    """Squared norms would be 0 or infinite at the ends."""
    A, _ = tables(0)
    plain, scaled = sketch_rows(A, 12, seed=0, method=method), sketch_rows(A * scale, 12, seed=0, method=method)
    np.testing.assert_array_equal(plain.keys, scaled.keys)
    np.testing.assert_allclose(scaled.tau * scale, plain.tau, rtol=1e-12)
    np.testing.assert_allclose(
        sketched_product(scaled, plain).toarray() / scale, sketched_product(plain, plain).toarray(), rtol=1e-10
    )


def test_leverage_weights_are_leverage_scores() -> None:
    A = np.random.default_rng(0).normal(size=(40, 4)) * [1, 10, 0.1, 1]
    A[:, 3] = A[:, 0] + A[:, 1]  # rank 3
    sketch = sketch_rows(A, 40, seed=0, weights="leverage")
    U = np.linalg.svd(A, full_matrices=False)[0][:, :3]
    np.testing.assert_allclose(sketch.norms**2, (U**2).sum(axis=1), rtol=1e-8)
    np.testing.assert_allclose(sketch_rows(sp.csr_array(A), 40, seed=0, weights="leverage").norms, sketch.norms)


def test_ties_are_broken_by_key() -> None:
    chosen, tau = module._smallest(np.array([2.0, 1.0, 2.0, 2.0, np.inf]), np.array([9, 8, 7, 6, 5]), 2)
    assert sorted(chosen.tolist()) == [1, 3] and tau == 2.0
    chosen, tau = module._smallest(np.array([2.0, np.inf, 1.0]), np.arange(3), 2)
    assert sorted(chosen.tolist()) == [0, 2] and tau == np.inf


def test_dense_sparse_and_every_backend_agree(xp_array: Any) -> None:
    A, B = (t.toarray() for t in tables(1))
    expected = sketch_rows(sp.csr_array(A), 10, seed=0), sketch_rows(sp.csr_array(B), 10, seed=0)
    made = sketch_rows(xp_array(A), 10, seed=0), sketch_rows(xp_array(B), 10, seed=0)
    assert kind_of(made[0].rows) == xp_array.kind
    np.testing.assert_array_equal(to_numpy(made[0].rows), expected[0].rows.toarray())
    assert made[0].tau == pytest.approx(expected[0].tau, rel=0 if xp_array.kind == "numpy" else 1e-14)
    W = sketched_product(*made)
    assert kind_of(W) == xp_array.kind
    np.testing.assert_allclose(to_numpy(W), sketched_product(*expected).toarray(), rtol=1e-12)
    for linear in (countsketch, jl_sketch):
        S = linear(xp_array(A), 7, seed=0)
        assert kind_of(S) == xp_array.kind
        np.testing.assert_allclose(to_numpy(S), linear(sp.csr_array(A), 7, seed=0), atol=1e-12)
    merged = merge_sketches(made[0], sketch_rows(xp_array(A), 10, keys=np.arange(100, 160), seed=0))
    assert kind_of(merged.rows) == xp_array.kind
    fit = sketched_join_lstsq(*made)
    assert kind_of(fit.coef) == xp_array.kind


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", ["norm2", "uniform", "leverage"])
def test_every_backend_keeps_the_same_keys(xp_array: Any, method: str, weights: str) -> None:
    for seed in range(3):
        A, B = (t.toarray() for t in tables(seed))
        options: dict[str, Any] = dict(size=4 + 7 * seed, seed=seed, method=method, weights=weights)
        plain = [sketch_rows(T, **options) for T in (A, B)]
        made = [sketch_rows(xp_array(T), keys=xp_array(np.arange(60)), **options) for T in (A, B)]
        for one, other in zip(made, plain, strict=True):
            assert kind_of(one.rows) == xp_array.kind
            np.testing.assert_array_equal(one.keys, other.keys)
            np.testing.assert_array_equal(to_numpy(one.rows), other.rows)
            np.testing.assert_allclose(one.norms, other.norms, rtol=1e-10)
            assert one.tau == pytest.approx(other.tau, rel=1e-10) and one.n_words == other.n_words
        W = sketched_product(*made)
        assert kind_of(W) == xp_array.kind
        np.testing.assert_allclose(to_numpy(W), sketched_product(*plain), rtol=1e-9, atol=1e-9)
        fit = sketched_join_lstsq(*made, ridge=0.1)
        assert kind_of(fit.coef) == xp_array.kind
        np.testing.assert_allclose(
            to_numpy(fit.coef), sketched_join_lstsq(*plain, ridge=0.1).coef, rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("method", METHODS[:2])
def test_every_backend_merges_and_streams(xp_array: Any, method: str) -> None:
    A, _ = (t.toarray() for t in tables(9))
    whole = sketch_rows(A, 12, seed=0, method=method)
    sampler = CoordinatedSampler(12, seed=0, method=method)
    for i, j in ((0, 25), (25, 26), (26, 60)):
        sampler.partial_fit(xp_array(A[i:j]), np.arange(i, j))
    parts = [sketch_rows(xp_array(A[i:j]), 12, keys=range(i, j), seed=0, method=method) for i, j in ((0, 30), (30, 60))]
    host = sketch_rows(A[30:], 12, keys=range(30, 60), seed=0, method=method)
    for merged in (sampler.sketch_, merge_sketches(*parts), merge_sketches(parts[0], host)):
        assert kind_of(merged.rows) == xp_array.kind
        np.testing.assert_array_equal(merged.keys, whole.keys)
        np.testing.assert_array_equal(to_numpy(merged.rows), whole.rows)
        assert merged.tau == pytest.approx(whole.tau, rel=1e-12)


def test_norms_of_every_backend_have_the_whole_range(xp_array: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    A, _ = (t.toarray() for t in tables(0))
    plain = sketch_rows(A, 12, seed=0)
    monkeypatch.setattr(module, "BLOCK", 17)  # three rows at a time
    for scale in (1e-200, 1e-3, 1e170):
        made = sketch_rows(xp_array(A * scale), 12, seed=0)
        np.testing.assert_array_equal(made.keys, plain.keys)
        np.testing.assert_allclose(made.norms / scale, plain.norms, rtol=1e-12)
    single = sketch_rows(xp_array(A.astype(np.float32)), 60, seed=0)
    assert to_numpy(single.rows).dtype == np.float32
    np.testing.assert_allclose(single.norms, sketch_rows(A.astype(np.float32), 60, seed=0).norms, rtol=1e-14)
    assert to_numpy(sketched_product(single, single)).dtype == np.float64
    assert len(sketch_rows(xp_array(np.zeros((3, 2))), 2, seed=0).keys) == 0
    for broken in (np.nan, np.inf, -np.inf):
        bad = A.copy()
        bad[41, 2] = broken
        for function in (sketch_rows, countsketch, jl_sketch):
            with pytest.raises(ValueError, match="A must be finite"):
                function(xp_array(bad), 5, seed=0)


@pytest.mark.parametrize("size", [1, 7, 200])
def test_linear_sketches_agree_on_every_backend(xp_array: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    A = np.random.default_rng(0).normal(size=(1500, 3))
    plain = countsketch(A, size, seed=1), jl_sketch(A, size, seed=1)
    monkeypatch.setattr(module, "BLOCK", 1000)
    for linear, expected in zip((countsketch, jl_sketch), plain, strict=True):
        made = linear(xp_array(A), size, seed=1)
        assert kind_of(made) == xp_array.kind
        np.testing.assert_allclose(to_numpy(made), expected, atol=1e-10)
        assert to_numpy(linear(xp_array(A.astype(np.float32)), size, seed=1)).dtype == np.float32


def test_mixed_kinds_go_to_the_kind_of_the_first(xp_array: Any) -> None:
    A, B = tables(6)
    expected = sketched_product(*(sketch_rows(T, 12, seed=0) for T in (A, B))).toarray()
    device = [sketch_rows(xp_array(T.toarray()), 12, seed=0) for T in (A, B)]
    for other in (B, B.toarray()):
        W = sketched_product(device[0], sketch_rows(other, 12, seed=0))
        assert kind_of(W) == xp_array.kind
        np.testing.assert_allclose(to_numpy(W), expected, atol=1e-12)
    for other in (A, A.toarray()):
        W = sketched_product(sketch_rows(other, 12, seed=0), device[1])
        assert isinstance(W, np.ndarray)
        np.testing.assert_allclose(W, expected, atol=1e-12)
    apart = sketch_rows(xp_array(B.toarray()), 12, keys=range(100, 160), seed=0)
    with pytest.warns(AlgokitWarning, match="no key"):
        zero = sketched_product(device[0], apart)
    assert kind_of(zero) == xp_array.kind and zero.shape == (5, 4) and not to_numpy(zero).any()


@pytest.mark.gpu
def test_gpu_agrees_with_the_host() -> None:
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    A, B = rng.standard_t(3, size=(20_000, 30)), rng.standard_t(3, size=(20_000, 10))
    for method in METHODS:
        host = [sketch_rows(T, 300, seed=0, method=method) for T in (A, B)]
        device = [sketch_rows(cupy.asarray(T), 300, seed=0, method=method) for T in (A, B)]
        for one, other in zip(device, host, strict=True):
            assert kind_of(one.rows) == "cupy"
            np.testing.assert_array_equal(one.keys, other.keys)
            np.testing.assert_array_equal(one.rows.get(), other.rows)
        W = sketched_product(*device)
        assert kind_of(W) == "cupy"
        np.testing.assert_allclose(W.get(), sketched_product(*host), rtol=1e-10, atol=1e-8)
    for linear in (countsketch, jl_sketch):
        S = linear(cupy.asarray(A), 100, seed=0)
        assert kind_of(S) == "cupy"
        np.testing.assert_allclose(S.get(), linear(A, 100, seed=0), rtol=1e-10, atol=1e-9)


def test_float32_stays_float32_and_unsorted_sparse_rows_are_welcome() -> None:
    A, _ = tables(2)
    assert sketch_rows(A.toarray().astype(np.float32), 5, seed=0).rows.dtype == np.float32
    assert sketch_rows(A.astype(np.float32), 5, seed=0).rows.dtype == np.float32
    twice = sp.csr_array((np.array([1.0, 2.0, 4.0]), np.array([1, 1, 0]), np.array([0, 2, 3])), shape=(2, 2))
    np.testing.assert_allclose(sketch_rows(twice, 2, seed=0).norms, [3.0, 4.0])
    assert twice.nnz == 3  # the argument is as it was
    assert sketch_rows(A.astype(int), 5, seed=0).rows.dtype == np.float64


# ------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", ["norm2", "uniform", "leverage"])
def test_product_is_unbiased(method: str, weights: str) -> None:
    A, B = tables(3, n=30)
    exact = (A.T @ B).toarray()
    draws = np.array([estimate(A, B, 8, seed, method, weights) for seed in range(800)])
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert (abs(draws.mean(axis=0) - exact) <= 4.5 * error + 1e-12).all()


def estimate(A: Any, B: Any, k: int, seed: int, method: str = "priority", weights: str = "norm2") -> np.ndarray:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlgokitWarning)
        made = (sketch_rows(T, k, seed=seed, method=method, weights=weights) for T in (A, B))
        return sketched_product(*made).toarray()


def test_threshold_variance_matches_closed_form_and_bound() -> None:
    A, B = tables(4)
    k, exact = 15, (A.T @ B).toarray()
    a, b = ((T.toarray() ** 2).sum(axis=1) for T in (A, B))
    both = (a > 0) & (b > 0)
    p = np.minimum(1, np.minimum(a / a.sum(), b / b.sum()) * k)[both]
    closed = (a[both] * b[both] * (1 / p - 1)).sum()
    draws = [((estimate(A, B, k, s, "threshold") - exact) ** 2).sum() for s in range(1500)]
    assert np.mean(draws) == pytest.approx(closed, rel=4 * np.std(draws) / np.sqrt(1500) / closed)
    assert closed <= (a.sum() * b[both].sum() + a[both].sum() * b.sum()) / k


def test_everything_kept_is_exact() -> None:
    A, B = tables(5)
    for method in ("priority", "threshold-adaptive"):
        W = sketched_product(*(sketch_rows(T, 60, seed=0, method=method) for T in (A, B)))
        np.testing.assert_allclose(W.toarray(), (A.T @ B).toarray(), rtol=1e-12)


def test_mixed_kinds_give_the_same_product() -> None:
    A, B = tables(6)
    sparse, dense = [sketch_rows(T, 12, seed=0) for T in (A, B)], [sketch_rows(T.toarray(), 12, seed=0) for T in (A, B)]
    expected = sketched_product(*sparse).toarray()
    for SA, SB in ((sparse[0], dense[1]), (dense[0], sparse[1]), (dense[0], dense[1])):
        W = sketched_product(SA, SB)
        assert isinstance(W, np.ndarray)
        np.testing.assert_allclose(W, expected, atol=1e-12)


def test_disjoint_tables_give_zero_and_a_warning() -> None:
    SA, SB = sketch_rows(A6, 4, keys=range(6), seed=0), sketch_rows(A6, 4, keys=range(10, 16), seed=0)
    with pytest.warns(AlgokitWarning, match="no key"):
        assert not sketched_product(SA, SB).any()
    with pytest.warns(AlgokitWarning, match="no key"):
        assert sketched_product(sketch_rows(sp.csr_array(A6), 4, seed=0), SB).shape == (2, 2)
    with pytest.warns(AlgokitWarning, match="common rows"):
        fit = sketched_join_lstsq(SA, SB)
    assert fit.n_common == 0 and not fit.coef.any()
    zero = sketch_rows(np.zeros((3, 2)), 2, seed=0)
    assert len(zero.keys) == 0 and zero.tau == np.inf


# ------------------------------------------------------------------------------------------------- merging


@given(st.integers(0, 10**6), st.integers(1, 40), st.lists(st.integers(1, 59), max_size=4, unique=True))
def test_merging_parts_is_sketching_the_whole(seed: int, k: int, cuts: list[int]) -> None:
    A, _ = tables(seed)
    edges = [0, *sorted(cuts), A.shape[0]]
    for method in ("priority", "threshold"):
        whole = sketch_rows(A, k, seed=seed, method=method)
        parts = [
            sketch_rows(A[i:j], k, keys=np.arange(i, j), seed=seed, method=method) for i, j in itertools.pairwise(edges)
        ]
        merged = merge_sketches(*reversed(parts))
        np.testing.assert_array_equal(merged.keys, whole.keys)
        np.testing.assert_array_equal(merged.rows.toarray(), whole.rows.toarray())
        assert merged.n_rows_seen == whole.n_rows_seen
        assert merged.tau == whole.tau if method == "priority" else np.isclose(merged.tau, whole.tau, rtol=1e-12)
        sampler = CoordinatedSampler(k, seed=seed, method=method)
        for i, j in itertools.pairwise(edges):
            sampler.partial_fit(A[i:j].toarray(), np.arange(i, j))
        np.testing.assert_array_equal(sampler.sketch_.keys, whole.keys)


def test_what_cannot_be_merged() -> None:
    one = sketch_rows(A6, 3, seed=0)
    other = dict(keys=range(10, 16))
    for kwargs, part in (
        (dict(seed=1), "seed"),
        (dict(seed=0, size=4), "size"),
        (dict(seed=0, method="threshold"), "method"),
        (dict(seed=0, weights="uniform"), "weights"),
        (dict(seed=0, A=A6[:, :1]), "width"),
        (dict(seed=0, keys=range(6)), "disjoint"),
    ):
        with pytest.raises(ValueError, match=part):
            merge_sketches(one, sketch_rows(**{"A": A6, "size": 3, **other, **kwargs}))
    with pytest.raises(TypeError, match="others"):
        merge_sketches(one, "a")  # type: ignore[arg-type]
    for kwargs, part in ((dict(method="threshold-adaptive"), "adaptive"), (dict(weights="leverage"), "leverage")):
        with pytest.raises(ValueError, match=part):
            merge_sketches(sketch_rows(A6, 3, seed=0, **kwargs))


def test_sampler_notices_repeated_keys_and_changed_widths() -> None:
    sampler = CoordinatedSampler(20, seed=0).partial_fit(A6, range(6))
    with pytest.raises(ValueError, match="keys"):
        sampler.partial_fit(A6, range(6))
    with pytest.raises(ValueError, match="A must"):
        sampler.partial_fit(A6[:, :1], range(10, 16))


@pytest.mark.parametrize(
    ("kwargs", "part"),
    [
        (dict(keys=[0, 0, 1, 2, 3, 4]), "distinct"),
        (dict(keys=[0, 1]), "as many"),
        (dict(size=0), "size"),
        (dict(A=np.full((6, 2), np.nan)), "A must be finite"),
        (dict(A=sp.csr_array(np.full((6, 2), np.inf))), "A must be finite"),
        (dict(A=np.where(np.arange(12).reshape(6, 2) == 4, np.nan, 0.0)), "A must be finite"),  # a NaN, then a zero
        (dict(method="bottom-k"), "method"),
        (dict(seed=-1), "seed"),
    ],
)
def test_what_is_refused(kwargs: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        sketch_rows(**{"A": A6, "size": 3, "seed": 0, **kwargs})


def test_sketches_that_do_not_belong_together() -> None:
    one = sketch_rows(A6, 3, seed=0)
    for other in (sketch_rows(A6, 3, seed=1), sketch_rows(A6, 3, seed=0, method="threshold")):
        with pytest.raises(ValueError, match="seed and method"):
            sketched_product(one, other)
    with pytest.raises(TypeError, match="SB"):
        sketched_product(one, A6)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- regression


def test_join_lstsq_on_everything_is_lstsq_on_the_join() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(50, 3)), rng.normal(size=(50, 2))
    SA = sketch_rows(X[:40], 99, keys=range(40), seed=0)
    Sb = sketch_rows(sp.csr_array(y[20:]), 99, keys=range(20, 50), seed=0)
    fit = sketched_join_lstsq(SA, Sb)
    assert fit.n_common == 20 and (fit.weights == 1).all()
    np.testing.assert_allclose(fit.coef, np.linalg.lstsq(X[20:40], y[20:40], rcond=None)[0], rtol=1e-10)
    G = X[20:40].T @ X[20:40] + 3 * np.eye(3)
    np.testing.assert_allclose(sketched_join_lstsq(SA, Sb, ridge=3).coef, np.linalg.solve(G, X[20:40].T @ y[20:40]))


def test_join_weights_add_up_to_the_join() -> None:
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(40, 2)), rng.normal(size=(40, 1))
    draws = []
    for seed in range(1000):
        SA, Sy = sketch_rows(X, 20, seed=seed), sketch_rows(y, 20, seed=seed, weights="uniform")
        draws.append(sketched_join_lstsq(SA, Sy, ridge=1.0).weights.sum())
    assert np.mean(draws) == pytest.approx(40, abs=4.5 * np.std(draws) / np.sqrt(1000))  # the weights count the join


# ------------------------------------------------------------------------------------------------- baselines


def test_linear_sketches_are_linear_unbiased_and_keyed() -> None:
    A, B = tables(7, n=30)
    exact = (A.T @ B).toarray()
    for linear in (countsketch, jl_sketch):
        draws = np.array([linear(A, 8, seed=s).T @ linear(B, 8, seed=s) for s in range(1000)])
        assert (abs(draws.mean(axis=0) - exact) <= 4.5 * draws.std(axis=0) / np.sqrt(1000) + 1e-12).all()
        split = linear(A[:10], 8, seed=0) + linear(A[10:], 8, keys=range(10, 30), seed=0)
        np.testing.assert_allclose(linear(A, 8, seed=0), split, atol=1e-12)


def test_countsketch_has_the_variance_of_scipys() -> None:
    from scipy.linalg import clarkson_woodruff_transform

    A, B = (t.toarray() for t in tables(8))
    exact, k = A.T @ B, 10
    both = np.hstack([A, B])

    def theirs(seed: int) -> np.ndarray:
        S = clarkson_woodruff_transform(both, k, rng=seed)
        return S[:, : A.shape[1]].T @ S[:, A.shape[1] :]

    ours = [((countsketch(A, k, seed=s).T @ countsketch(B, k, seed=s) - exact) ** 2).sum() for s in range(1000)]
    peer = [((theirs(s) - exact) ** 2).sum() for s in range(1000)]
    assert np.mean(ours) == pytest.approx(np.mean(peer), rel=0.2)


def test_jl_signs_are_signs_and_balanced() -> None:
    S = jl_sketch(np.eye(3000), 100, seed=0) * 10
    assert set(np.unique(S).round(9)) == {-1.0, 1.0}
    assert abs(S.mean()) < 0.01 and abs(S @ S.T / 3000 - np.eye(100)).max() < 0.12


def test_same_answer_whatever_the_number_of_threads(assert_threads_agree) -> None:
    code = (
        "import numpy as np; from algokit.sketching.coordinated_sampling import *;"
        "A = np.random.default_rng(0).normal(size=(500, 6));"
        "S = sketch_rows(A, 50, seed=0);"
        "print(S.keys.tobytes().hex(), S.tau.hex(), countsketch(A, 9, seed=0).tobytes().hex())"
    )
    assert_threads_agree(code)


def test_words_stored() -> None:
    assert sketch_rows(np.ones((5, 3)), 2, seed=0).n_words == 2 * 3 + 2 * 2 + 1
    assert sketch_rows(sp.csr_array(np.eye(5)), 2, seed=0).n_words == 2 * 2 + 2 * 2 + 1
    assert isinstance(SKETCH, RowSketch)


class TestSummary:
    @given(
        st.integers(0, 2**32 - 1),
        st.integers(1, 12),
        st.sampled_from(METHODS[:2]),
        st.sampled_from(["norm2", "uniform"]),
        st.booleans(),
    )
    def test_any_chunks_and_any_tree_give_the_sketch_of_all_rows(self, in_a_tree, seed, size, method, weights, sparse):
        A = tables(seed, n=40)[0]
        A = A if sparse else A.toarray()
        keys = np.random.default_rng(seed).permutation(1000)[:40]
        summary = CoordinatedSummary(size, seed=seed, method=method, weights=weights)
        state = in_a_tree(summary, [(keys[c], A[c]) for c in cuts(40, seed)], seed)
        got, want = summary.finish(state), sketch_rows(A, size, keys=keys, seed=seed, method=method, weights=weights)
        np.testing.assert_array_equal(got.keys, want.keys)
        np.testing.assert_array_equal(got.norms, want.norms)
        dense = [s.rows.toarray() if sparse else s.rows for s in (got, want)]
        np.testing.assert_array_equal(*dense)
        assert got.n_rows_seen == 40 and sp.issparse(got.rows) == sparse
        if method == "priority":
            assert got.tau == want.tau
        else:
            np.testing.assert_allclose(got.tau, want.tau, rtol=1e-13)

    def test_string_keys_and_single_precision_stay(self, in_a_tree):
        A = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
        keys = [f"row {i}" for i in range(30)]
        summary = CoordinatedSummary(7, seed=3)
        state = in_a_tree(summary, [(keys[c], A[c]) for c in cuts(30, 0)], 0)
        got, want = summary.finish(state), sketch_rows(A, 7, keys=keys, seed=3)
        np.testing.assert_array_equal(got.rows, want.rows)
        assert got.rows.dtype == np.float32

    def test_the_state_is_small_and_products_come_from_two_summaries(self, in_a_tree):
        rng = np.random.default_rng(0)
        A, B = rng.normal(size=(500, 3)), rng.normal(size=(500, 2))
        sketches = []
        for table in (A, B):
            summary = CoordinatedSummary(500, seed=1)
            state = in_a_tree(summary, [(np.arange(500)[c], table[c]) for c in cuts(500, 2)], 2)
            sketches.append(summary.finish(state))
        np.testing.assert_allclose(sketched_product(*sketches), A.T @ B, rtol=1e-12)  # nothing was left out
        small = CoordinatedSummary(10, seed=1)
        state = small.update(small.init(), (np.arange(500), A))
        assert sum(a.nbytes for a in state.values()) < 10 * (3 + 2) * 8 + 100

    def test_rows_of_any_kind_of_array(self, xp_array):
        summary = CoordinatedSummary(3, seed=0)
        state = summary.update(summary.init(), (np.arange(6), xp_array(A6)))
        for key, value in STATE.items():
            np.testing.assert_allclose(state[key], value, rtol=1e-15)  # norms are another kernel's

    def test_a_repeated_key(self):
        """Refused within a chunk and where both rows are sketched; where one was dropped it counts as two rows."""
        summary = CoordinatedSummary(3, seed=0)
        with pytest.raises(ValueError, match=r"chunk must hold keys .* 4 twice"):
            summary.update(summary.init(), ([4, 4], A6[:2]))
        with pytest.raises(ValueError, match="chunk must have keys not seen before"):
            summary.update(STATE, (STATE["keys"][:1], A6[:1]))
        with pytest.raises(ValueError, match="b must have keys not seen before"):
            summary.merge(STATE, STATE)
        dropped = np.setdiff1d(np.arange(6), STATE["keys"])[:1]
        assert int(summary.update(STATE, (dropped, A6[:1]))["seen"]) == 7

    def test_what_does_not_belong_together_is_refused(self):
        for changed in (dict(size=4), dict(seed=1), dict(weights="uniform"), dict(method="threshold")):
            other = CoordinatedSummary(**(dict(size=3, seed=0) | changed))
            with pytest.raises(ValueError, match="a must be of the same size, seed, method and weights"):
                other.merge(STATE, other.init())
        with pytest.raises(ValueError, match="dense rows of 2 columns"):
            SUMMARY.update(STATE, ([8], A6[:1, :1]))
        with pytest.raises(ValueError, match="dense rows of 2 columns"):
            SUMMARY.update(STATE, ([8], sp.csr_array(A6[:1])))
        with pytest.raises(ValueError, match="state must cover at least one row"):
            SUMMARY.finish(SUMMARY.init())
        with pytest.raises(ValueError, match="state must be a state with the keys"):
            SUMMARY.finish({"keys": np.zeros(3)})

    @pytest.mark.parametrize(
        "chunk", [A6, ([1], A6), (None, A6), ([1.5] * 6, A6), (np.arange(6), A6 * np.nan), (np.arange(6), "word"), ()]
    )
    def test_a_bad_chunk_is_named(self, chunk):
        with pytest.raises((TypeError, ValueError), match="chunk"):
            SUMMARY.update(SUMMARY.init(), chunk)
