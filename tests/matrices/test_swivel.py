"""Swivel: gradients, targets and counts against plain definitions, both code paths against each other, invariants."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import check_grad
from scipy.special import expit
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from algokit.arrays import kind_of, to_numpy
from algokit.checks import AlgokitWarning
from algokit.data import documentation_topics
from algokit.matrices import swivel as module
from algokit.matrices.swivel import (
    Swivel,
    SwivelSummary,
    VocabularySummary,
    cooccurrence,
    shard_indices,
    shard_rounds,
    swivel_loss_and_grad,
    swivel_targets,
)

TEXT = [["a", "b", "c", "a"], ["b", "a", "d"], ["c", "b"]]
X4 = np.array([[3.0, 1.0, 0.0, 2.0], [1.0, 4.0, 1.0, 0.0], [0.0, 1.0, 2.5, 1.0], [2.0, 0.0, 1.0, 0.5]])
VECTORS = np.arange(8.0).reshape(4, 2) / 8
SUMMARY = SwivelSummary(["a", "b", "c"], window=2)
COUNTS = SUMMARY.update(SUMMARY.init(), TEXT)
VOCABULARY = VocabularySummary(min_count=1)
TOKENS = VOCABULARY.update(VOCABULARY.init(), TEXT)

EXAMPLES = {
    "SwivelSummary": dict(vocabulary=("a", "b"), window=2, weighting="harmonic", self_count=True),
    "SwivelSummary.update": (lambda: SUMMARY, dict(state=COUNTS, chunk=TEXT)),
    "SwivelSummary.merge": (lambda: SUMMARY, dict(a=COUNTS, b=COUNTS)),
    "SwivelSummary.finish": (lambda: SUMMARY, dict(state=COUNTS)),
    "VocabularySummary": dict(min_count=2, max_vocab=3),
    "VocabularySummary.update": (lambda: VOCABULARY, dict(state=TOKENS, chunk=TEXT)),
    "VocabularySummary.merge": (lambda: VOCABULARY, dict(a=TOKENS, b=TOKENS)),
    "VocabularySummary.finish": (lambda: VOCABULARY, dict(state=TOKENS)),
    "shard_rounds": dict(n_row_shards=2, n_column_shards=3),
    "cooccurrence": dict(
        documents=TEXT, window=2, min_count=1, max_vocab=3, weighting="harmonic", self_count=True
    ),
    "swivel_targets": dict(X=X4, smoothing=0.5),
    "swivel_loss_and_grad": dict(
        X=X4, W=VECTORS, C=VECTORS, base=0.1, scale=0.25, exponent=0.5, hinge=True, smoothing=0.5
    ),
    "shard_indices": dict(size=7, n_shards=3),
    "Swivel": dict(
        n_components=2, n_epochs=3, learning_rate=0.1, shard_size=2, base=0.1, scale=0.25, exponent=0.5, hinge=True,
        smoothing=0.5, optimizer="adagrad", symmetric_output="sum", dtype="float64", rng=0,
    ),
    "Swivel.fit": dict(X=X4),
    "Swivel.transform": dict(X=X4),
    "Swivel.predict_pmi": dict(rows=np.array([0, 2]), cols=np.array([1])),
    "Swivel.partial_fit_shard": (
        lambda: Swivel(2, rng=0),
        dict(
            X_shard=X4[:2, 2:], rows=np.array([0, 1]), cols=np.array([2, 3]), row_sums=X4.sum(axis=1),
            col_sums=X4.sum(axis=0), total=float(X4.sum()),
        ),
    ),
}  # fmt: skip


def cuts(n: int, seed: int) -> list[slice]:
    """A random partition of n rows into a few chunks, some of them empty."""
    bounds = np.sort(np.random.default_rng([seed, 1]).integers(0, n + 1, 4))
    return [slice(a, b) for a, b in zip([0, *bounds], [*bounds, n], strict=True)]


def counts(m: int, n: int, seed: int, density: float = 0.4) -> np.ndarray:
    """Random counts with fractions and zeros, no empty row or column."""
    rng = np.random.default_rng(seed)
    X = rng.gamma(0.7, 3.0, (m, n)) * (rng.random((m, n)) < density)
    X[np.arange(m), rng.integers(0, n, m)] += 0.3
    X[rng.integers(0, m, n), np.arange(n)] += 0.3
    return X


def plain(X, W, C, base=0.1, scale=0.25, exponent=0.5, hinge=True, smoothing=0.0):
    """Loss and derivative by cells, cell by cell, straight from the definitions."""
    loss, G, total = 0.0, np.zeros(X.shape), X.sum() + smoothing
    for i in range(X.shape[0]):
        for j in range(X.shape[1]):
            row, col = X[i].sum() + smoothing, X[:, j].sum() + smoothing
            if row == 0 or col == 0:
                continue
            x = X[i, j]
            e = W[i] @ C[j] - np.log((x if x > 0 else 1.0) * total / (row * col))
            if x > 0:
                f = base + scale * x**exponent
                loss, G[i, j] = loss + 0.5 * f * e * e, f * e
            elif hinge:
                loss, G[i, j] = loss + np.logaddexp(0, e), expit(e)
    return loss, G @ C, G.T @ W


VARIANTS = [dict(), dict(hinge=False), dict(smoothing=1.0), dict(base=0.0, scale=1.0), dict(exponent=0.75, base=2.0)]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("empty", [False, True])
def test_loss_and_gradients_match_the_definition(options, empty):
    X, rng = counts(7, 9, 0), np.random.default_rng(1)
    if empty:
        X[2], X[:, 4] = 0, 0
    W, C = rng.normal(0, 1, (7, 3)), rng.normal(0, 1, (9, 3))
    for form in (X, sp.coo_array(X), sp.csr_array(X)):
        for ours, theirs in zip(swivel_loss_and_grad(form, W, C, **options), plain(X, W, C, **options), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_match_finite_differences(options):
    X, rng = counts(5, 4, 2), np.random.default_rng(3)
    start = rng.normal(0, 1, 18)
    split = lambda v: (v[:10].reshape(5, 2), v[10:].reshape(4, 2))  # noqa: E731
    loss = lambda v: swivel_loss_and_grad(X, *split(v), **options)[0]  # noqa: E731
    grad = lambda v: np.concatenate([g.ravel() for g in swivel_loss_and_grad(X, *split(v), **options)[1:]])  # noqa: E731
    assert check_grad(loss, grad, start) < 1e-4


def test_blocks_of_rows_change_nothing(monkeypatch):
    X, rng = counts(23, 11, 4), np.random.default_rng(5)
    W, C = rng.normal(0, 1, (23, 3)), rng.normal(0, 1, (11, 3))
    whole = swivel_loss_and_grad(X, W, C)
    monkeypatch.setattr(module, "BLOCK_CELLS", 40)
    for a, b in zip(whole, swivel_loss_and_grad(sp.csr_array(X), W, C), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_every_backend_agrees(xp_array):
    X, rng = counts(6, 5, 6), np.random.default_rng(7)
    X[1] = 0
    W, C = rng.normal(0, 1, (6, 2)), rng.normal(0, 1, (5, 2))
    target = swivel_targets(xp_array(X))
    assert kind_of(target) == xp_array.kind
    np.testing.assert_allclose(to_numpy(target), swivel_targets(X), rtol=1e-12)
    loss, *grads = swivel_loss_and_grad(xp_array(X), xp_array(W), xp_array(C))
    expected, *expected_grads = plain(X, W, C)
    assert loss == pytest.approx(expected, rel=1e-10)
    for g, e in zip(grads, expected_grads, strict=True):
        assert kind_of(g) == xp_array.kind
        np.testing.assert_allclose(to_numpy(g), e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adagrad", "rmsprop"])
@pytest.mark.parametrize("hinge", [True, False])
def test_fit_is_the_same_on_every_backend(xp_array, optimizer, hinge):
    X = counts(13, 10, 8)
    X[3] = 0
    make = lambda: Swivel(3, n_epochs=4, shard_size=4, dtype="float64", rng=0, optimizer=optimizer, hinge=hinge)  # noqa: E731
    with pytest.warns(AlgokitWarning, match="1 rows and 0 columns"):
        host, there = make().fit(X), make().fit(xp_array(X))
    assert kind_of(there.row_embeddings_) == xp_array.kind
    np.testing.assert_allclose(to_numpy(there.row_embeddings_), host.row_embeddings_, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(to_numpy(there.column_embeddings_), host.column_embeddings_, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(there.loss_history_, host.loss_history_, rtol=1e-10)
    assert kind_of(there.transform(xp_array(X))) == xp_array.kind
    assert not host.row_embeddings_[3].any()


@pytest.mark.parametrize("optimizer", ["adagrad", "rmsprop"])
def test_one_epoch_is_one_update_of_the_chosen_optimiser_per_shard(optimizer):
    """Against NumPy, in the order of shards that the generator gives."""
    X, d, size = counts(9, 7, 9), 2, 4
    model = Swivel(d, n_epochs=2, shard_size=size, dtype="float64", rng=3, optimizer=optimizer).fit(X)
    rng = np.random.default_rng(3)
    V = [rng.normal(0, d**-0.5, (length, d)) for length in X.shape]
    acc = [np.full_like(v, 0.1 if optimizer == "adagrad" else 1.0) for v in V]
    places = [(np.arange(a, 9, 3), np.arange(b, 7, 2)) for a in range(3) for b in range(2)]
    T = swivel_targets(X)
    for epoch in range(2):
        total = 0.0
        for k in rng.permutation(6):
            at = places[k]
            x, W, C = X[np.ix_(*at)], V[0][at[0]], V[1][at[1]]
            E = W @ C.T - T[np.ix_(*at)]
            f = 0.1 + 0.25 * np.sqrt(x)
            G = np.where(x > 0, f * E, expit(E)) / np.sqrt(x.size)
            total += np.where(x > 0, 0.5 * f * E**2, np.logaddexp(0, E)).sum()
            for side, g in enumerate((G @ C, G.T @ W)):
                s = acc[side][at[side]]
                s = s + g**2 if optimizer == "adagrad" else 0.1 * s + 0.9 * g**2
                acc[side][at[side]] = s
                V[side][at[side]] -= 0.1 * g / np.sqrt(s + (optimizer == "rmsprop") * 1e-10)
        assert model.loss_history_[epoch] == pytest.approx(total, rel=1e-10)
    np.testing.assert_allclose(model.row_embeddings_, V[0], rtol=1e-9)
    np.testing.assert_allclose(model.column_embeddings_, V[1], rtol=1e-9)


def test_rows_in_threads_are_rows_in_turn(monkeypatch):
    X = counts(30, 20, 21)
    in_turn = swivel_loss_and_grad(X, X[:, :3], X.T[:, :3])
    monkeypatch.setattr(module, "CELLS_FOR_THREADS", 0)
    for a, b in zip(in_turn, swivel_loss_and_grad(X, X[:, :3], X.T[:, :3]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_single_precision_kernel_is_accurate_to_single_precision():
    rng = np.random.default_rng(10)
    P = rng.normal(0, 30, (50, 333))
    X = sp.random_array((50, 333), density=0.1, rng=rng, format="csr")
    X.data = rng.gamma(1.0, 5.0, len(X.data)) + 0.01
    margins = module._margins(X.sum(axis=1) + 1, X.sum(axis=0) + 1, X.sum(), 0.0)
    results = []
    for dtype in (np.float32, np.float64):
        shard = module._shard(X, np.arange(50), np.arange(333), margins, module._Confidence(0.1, 0.25, 0.5), dtype)
        results.append(module._cells(P.astype(dtype), shard, True))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=2e-5, atol=2e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


def test_cooccurrence_matches_a_plain_count():
    rng = np.random.default_rng(11)
    words = np.array(list("abcdefghij"))
    documents = [words[rng.choice(10, n, p=np.arange(10, 0, -1) / 55)].tolist() for n in (1, 0, 30, 7, 25)]
    for weighting in ("harmonic", "flat"):
        for self_count in (False, True):
            found = cooccurrence(documents, window=3, min_count=4, weighting=weighting, self_count=self_count)
            place = {w: i for i, w in enumerate(found.vocabulary)}
            expected = np.zeros((len(place),) * 2)
            for document in documents:
                kept = [place[w] for w in document if w in place]
                for p, i in enumerate(kept):
                    expected[i, i] += self_count
                    for q in range(p + 1, min(p + 4, len(kept))):
                        add = 1 / (q - p) if weighting == "harmonic" else 1
                        expected[i, kept[q]] += add
                        expected[kept[q], i] += add
            np.testing.assert_allclose(found.counts.toarray(), expected, rtol=1e-12)
    frequency = [sum(d.count(w) for d in documents) for w in found.vocabulary]
    assert frequency == sorted(frequency, reverse=True) and min(frequency) >= 4
    assert (
        cooccurrence(documents, min_count=1, max_vocab=3).vocabulary
        == cooccurrence(documents, min_count=1).vocabulary[:3]
    )
    assert cooccurrence([["b", "a"]], min_count=1).vocabulary == ("a", "b")  # ties in alphabetical order


def test_documents_that_are_strings_are_refused():
    with pytest.raises(TypeError, match="documents"):
        cooccurrence(["not", "split"], min_count=1)
    with pytest.raises(TypeError, match="documents"):
        cooccurrence([["a", 3]], min_count=1)
    with pytest.raises(ValueError, match="min_count"):
        cooccurrence([["a"]], min_count=2)
    assert cooccurrence([["a"], ["b"]], min_count=1).counts.nnz == 0


def test_targets_by_hand():
    X = np.array([[2.0, 0.0], [1.0, 1.0]])
    expected = np.log([[2 * 4 / (2 * 3), 1 * 4 / (2 * 1)], [1 * 4 / (2 * 3), 1 * 4 / (2 * 1)]])
    np.testing.assert_allclose(swivel_targets(X), expected, rtol=1e-14)
    np.testing.assert_allclose(swivel_targets(sp.csr_array(X)), expected, rtol=1e-14)
    smooth = np.log([[2 * 5 / (3 * 4), 5 / (3 * 2)], [5 / (3 * 4), 5 / (3 * 2)]])
    np.testing.assert_allclose(swivel_targets(X, smoothing=1.0), smooth, rtol=1e-14)
    X[0] = 0
    assert np.isnan(swivel_targets(X)[0]).all() and np.isfinite(swivel_targets(X)[1]).all()
    assert np.isfinite(swivel_targets(X, smoothing=0.1)).all()


@given(st.integers(1, 40), st.integers(1, 8))
def test_shards_partition_and_are_balanced(size, n_shards):
    if n_shards > size:
        with pytest.raises(ValueError, match="n_shards"):
            shard_indices(size, n_shards)
        return
    shards = shard_indices(size, n_shards)
    assert sorted(np.concatenate(shards).tolist()) == list(range(size))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert all((shard % n_shards == a).all() for a, shard in enumerate(shards))


matrices = st.integers(0, 10**6).map(lambda seed: counts(6, 5, seed))


@given(matrices)
def test_loss_is_the_sum_over_any_shards(X):
    rng = np.random.default_rng(0)
    W, C = rng.normal(0, 1, (6, 2)), rng.normal(0, 1, (5, 2))
    whole = swivel_loss_and_grad(X, W, C)
    margins = module._margins(X.sum(axis=1), X.sum(axis=0), X.sum(), 0.0)
    loss, grad_W, grad_C = 0.0, np.zeros_like(W), np.zeros_like(C)
    for rows in np.array_split(rng.permutation(6), 3):
        for cols in np.array_split(rng.permutation(5), 2) if len(rows) else ():
            shard = module._shard(sp.csr_array(X), rows, cols, margins, module._Confidence(0.1, 0.25, 0.5), np.float64)
            G, part = module._cells(W[rows] @ C[cols].T, shard, True)
            loss += part
            grad_W[rows] += G @ C[cols]
            grad_C[cols] += G.T @ W[rows]
    # each block of rows draws its own split of the columns: still every cell once
    assert loss == pytest.approx(whole[0], rel=1e-10)
    np.testing.assert_allclose(grad_W, whole[1], atol=1e-10)
    np.testing.assert_allclose(grad_C, whole[2], atol=1e-10)


@given(matrices)
def test_transposing_the_counts_swaps_the_gradients(X):
    rng = np.random.default_rng(1)
    W, C = rng.normal(0, 1, (6, 2)), rng.normal(0, 1, (5, 2))
    a, b = swivel_loss_and_grad(X, W, C), swivel_loss_and_grad(X.T, C, W)
    assert a[0] == pytest.approx(b[0], rel=1e-12)
    np.testing.assert_allclose(a[1], b[2], atol=1e-12)
    np.testing.assert_allclose(a[2], b[1], atol=1e-12)


@given(matrices)
def test_derivative_of_an_unobserved_cell_lies_between_0_and_1(X):
    margins = module._margins(X.sum(axis=1), X.sum(axis=0), X.sum(), 0.0)
    shard = module._shard(
        sp.csr_array(X), np.arange(6), np.arange(5), margins, module._Confidence(0.1, 0.25, 0.5), np.float64
    )
    G, _ = module._cells(np.random.default_rng(2).normal(0, 20, X.shape), shard, True)
    assert ((G[X == 0] >= 0) & (G[X == 0] <= 1)).all()


def test_full_rank_reaches_the_pmi_matrix():
    X = counts(8, 8, 12, density=1.1) + 0.5
    model = Swivel(8, n_epochs=1000, learning_rate=1.0, dtype="float64", rng=0).fit(X)
    np.testing.assert_allclose(model.predict_pmi(), swivel_targets(X), atol=1e-6)


def test_shards_driven_by_hand_are_fit():
    X = counts(10, 8, 13)
    fitted = Swivel(3, n_epochs=2, shard_size=5, rng=4).fit(X)
    by_hand, rng = Swivel(3, shard_size=5, rng=4), np.random.default_rng(4)
    rng.normal(size=(10 + 8) * 3)  # the initial vectors come first
    places = [(r, c) for r in shard_indices(10, 2) for c in shard_indices(8, 2)]
    for _ in range(2):
        for k in rng.permutation(4):
            rows, cols = places[k]
            by_hand.partial_fit_shard(X[np.ix_(rows, cols)], rows, cols, X.sum(axis=1), X.sum(axis=0), X.sum())
    np.testing.assert_allclose(by_hand.row_embeddings_, fitted.row_embeddings_, rtol=1e-6)
    np.testing.assert_allclose(by_hand.column_embeddings_, fitted.column_embeddings_, rtol=1e-6)


def test_disjoint_shards_commute_exactly():
    X = counts(12, 12, 14)
    shards, results = shard_indices(12, 3), []
    for order in ([0, 1, 2], [2, 0, 1]):
        model = Swivel(3, rng=5)
        for shift in range(3):  # a Latin square: within one shift no two shards share a row or a column
            for a in order:
                rows, cols = shards[a], shards[(a + shift) % 3]
                model.partial_fit_shard(X[np.ix_(rows, cols)], rows, cols, X.sum(axis=1), X.sum(axis=0), X.sum())
        results.append((model.row_embeddings_, model.column_embeddings_))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_partial_fit_checks_its_places():
    X = counts(4, 4, 15)
    sums = X.sum(axis=1), X.sum(axis=0), X.sum()
    with pytest.raises(ValueError, match="rows"):
        Swivel(2).partial_fit_shard(X[:2], [0, 0], range(4), *sums)
    with pytest.raises(ValueError, match="cols"):
        Swivel(2).partial_fit_shard(X, range(4), [0, 1, 2, 4], *sums)
    model = Swivel(2, rng=0).partial_fit_shard(X, range(4), range(4), *sums)
    with pytest.raises(ValueError, match="row_sums"):
        model.partial_fit_shard(X, range(4), range(4), np.ones(5), *sums[1:])


def test_new_rows_are_minima_of_their_own_loss():
    X = counts(20, 15, 16)
    model = Swivel(4, n_epochs=60, dtype="float64", rng=6).fit(X)
    C, new = model.column_embeddings_, counts(5, 15, 17)
    W = model.transform(new)
    target = (
        np.log(np.where(new > 0, new, 1)) + np.log(X.sum()) - np.log(new.sum(axis=1))[:, None] - np.log(X.sum(axis=0))
    )
    E = W @ C.T - target
    G = np.where(new > 0, (0.1 + 0.25 * np.sqrt(new)) * E, expit(E))
    np.testing.assert_allclose(G @ C + module.RIDGE * W, 0, atol=1e-4)
    empty = np.zeros((1, 15))
    assert not model.transform(empty).any()
    correlation = np.corrcoef(model.transform(X).ravel(), model.row_embeddings_.ravel())[0, 1]
    assert correlation > 0.8


def test_zero_rows_are_zero_vectors_and_smoothing_keeps_them():
    X = counts(6, 6, 18)
    X[1] = X[:, 1] = 0
    with pytest.warns(AlgokitWarning, match="1 rows and 1 columns"):
        model = Swivel(2, n_epochs=3, shard_size=2, rng=0).fit(X)
    assert not model.row_embeddings_[1].any() and not model.embeddings_[1].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Swivel(2, n_epochs=3, smoothing=1.0, rng=0).fit(X).row_embeddings_[1].any()


def test_output_forms():
    X = counts(6, 6, 19)
    both = [Swivel(2, n_epochs=2, rng=0, symmetric_output=how).fit(X) for how in ("sum", "mean")]
    np.testing.assert_allclose(both[0].embeddings_, 2 * both[1].embeddings_)
    assert both[0].row_embeddings_.dtype == np.float32 and both[0].transform(X).dtype == np.float32
    with pytest.raises(AttributeError, match="square"):
        _ = Swivel(2, n_epochs=1, rng=0).fit(X[:4] + 1).embeddings_
    with pytest.raises(NotFittedError):
        Swivel(2).predict_pmi()
    np.testing.assert_allclose(both[0].predict_pmi([1], [2, 3]), both[0].predict_pmi()[[1], [2, 3]][None], rtol=1e-6)


def test_sparse_counts_stay_sparse():
    """2 x 10^10 cells, of which 3 are seen: dense anywhere, this would need 80 GB."""
    n = 150_000
    X = sp.csr_array((np.ones(3), ([0, 5, n - 1], [1, 5, n - 2])), shape=(n, n))
    with pytest.warns(AlgokitWarning):
        model = Swivel(2, n_epochs=1, shard_size=1000, rng=0).fit(X)
    assert np.count_nonzero(model.row_embeddings_.any(axis=1)) == 3


def test_divergence_is_an_error():
    with pytest.raises(ValueError, match="learning_rate"):
        Swivel(2, n_epochs=50, learning_rate=1e30, rng=0).fit(X4)


def test_corpus_is_real_text():
    topics = documentation_topics()
    found = cooccurrence([p for name in topics for p in topics[name]], min_count=12)
    assert len(topics) > 50 and {"float", "left", "bytes"} <= set(found.vocabulary)


@pytest.mark.gpu
def test_gpu_agrees_with_the_host():
    cupy = pytest.importorskip("cupy")
    X = counts(40, 30, 20)
    for hinge in (True, False):
        model = Swivel(5, n_epochs=5, shard_size=16, dtype="float64", rng=0, hinge=hinge)
        host, device = clone(model).fit(X), clone(model).fit(cupy.asarray(X))
        np.testing.assert_allclose(device.row_embeddings_.get(), host.row_embeddings_, rtol=1e-8, atol=1e-11)


SCRIPT = """
import hashlib, numpy as np
from algokit.matrices import swivel
from algokit.matrices.swivel import Swivel
swivel.CELLS_FOR_THREADS = 0
rng = np.random.default_rng(0)
X = rng.poisson(0.5, (60, 50)).astype(float)
model = Swivel(4, n_epochs=5, shard_size=20, rng=1).fit(X)
print(hashlib.sha256(model.row_embeddings_.tobytes() + model.loss_history_.tobytes()).hexdigest())
"""


def test_same_seed_same_answer_whatever_the_number_of_threads(assert_threads_agree):
    assert_threads_agree(SCRIPT)


@parametrize_with_checks([Swivel(n_components=2, n_epochs=3, rng=0)])
def test_scikit_learn_conventions(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlgokitWarning)
        check(estimator)


def some_texts(seed: int) -> list[list[str]]:
    rng = np.random.default_rng([seed, 3])
    return [[["a", "bb", "c", "dd", "e"][i] for i in rng.integers(0, 5, k)] for k in rng.integers(0, 9, 20)]


class TestSummary:
    @given(
        st.integers(0, 2**32 - 1), st.integers(1, 24), st.sampled_from(["harmonic", "flat"]), st.booleans(),
        st.sampled_from([None, 3]),
    )  # fmt: skip
    def test_any_chunks_and_any_tree_give_the_counts_of_all_texts(
        self, in_a_tree, seed, window, weighting, self_count, most
    ):
        texts = some_texts(seed)
        want = cooccurrence(
            texts, window=window, min_count=2, max_vocab=most, weighting=weighting, self_count=self_count
        )
        chunks = [texts[c] for c in cuts(len(texts), seed)]
        first = VocabularySummary(min_count=2, max_vocab=most)
        vocabulary = first.finish(in_a_tree(first, chunks, seed))
        assert vocabulary == want.vocabulary
        summary = SwivelSummary(vocabulary, window=window, weighting=weighting, self_count=self_count)
        state = in_a_tree(summary, chunks, seed)
        for key, value in summary.update(summary.init(), texts).items():
            np.testing.assert_array_equal(state[key], value)  # to the last bit
        got = summary.finish(state)
        assert got.vocabulary == want.vocabulary
        np.testing.assert_allclose(got.counts.toarray(), want.counts.toarray(), rtol=1e-13)

    def test_texts_as_arrays(self):
        tokens = np.array([token for text in TEXT for token in text])
        document = np.repeat(np.arange(len(TEXT)), [len(text) for text in TEXT])
        for summary, state in ((SUMMARY, COUNTS), (VOCABULARY, TOKENS)):
            got = summary.update(summary.init(), (tokens, document))
            for key, value in state.items():
                np.testing.assert_array_equal(got[key], value)
            nothing = summary.update(state, (tokens[:0], document[:0]))
            for key, value in state.items():
                np.testing.assert_array_equal(nothing[key], value)

    @pytest.mark.parametrize(
        "chunk", ["text", ["a b", "b"], [[1, 2]], (np.array(["a", "b"]), np.array([1.5, 2.0])),
                  (np.array(["a", "b"]), np.array([1])), (np.array([1, 2]), np.array([0, 0])), np.ones(3)]
    )  # fmt: skip
    def test_a_bad_chunk_is_named(self, chunk):
        for summary in (SUMMARY, VOCABULARY):
            with pytest.raises((TypeError, ValueError), match="chunk"):
                summary.update(summary.init(), chunk)

    def test_refused(self):
        other = SwivelSummary(["a", "c", "b"], window=2)
        with pytest.raises(ValueError, match="b must be of the same vocabulary, window and weighting"):
            SUMMARY.merge(COUNTS, other.init())
        with pytest.raises(ValueError, match="vocabulary must not hold a token twice"):
            SwivelSummary(["a", "a"])
        with pytest.raises(TypeError, match="vocabulary"):
            SwivelSummary("ab")
        with pytest.raises(ValueError, match="window"):
            SwivelSummary(["a"], window=25)
        full = COUNTS | {"units": COUNTS["units"] + 2**62}
        with pytest.raises(ValueError, match="b must leave counts within 64 bits"):
            SUMMARY.merge(full, full)
        with pytest.raises(ValueError, match="state must hold a token at least"):
            VOCABULARY.finish(VOCABULARY.init())


class TestShardRounds:
    @given(st.integers(1, 7), st.integers(1, 7))
    def test_every_shard_once_and_nothing_shared_in_a_round(self, m, n):
        rounds = shard_rounds(m, n)
        assert rounds.shape == (max(m, n), min(m, n), 2)  # the fewest rounds: a line of blocks has max(m, n) shards
        assert {tuple(s) for s in rounds.reshape(-1, 2)} == set(itertools.product(range(m), range(n)))
        for shards in rounds:
            assert len(np.unique(shards[:, 0])) == len(np.unique(shards[:, 1])) == len(shards)

    def test_the_order_within_a_round_does_not_matter_to_the_last_bit(self):
        X = np.random.default_rng(0).poisson(2.0, (12, 9)).astype(float)
        rows, cols = shard_indices(12, 3), shard_indices(9, 2)
        ends = []
        for step in (1, -1):
            model = Swivel(3, rng=0)
            for shards in shard_rounds(3, 2):
                for a, b in shards[::step]:
                    block = X[np.ix_(rows[a], cols[b])]
                    model.partial_fit_shard(block, rows[a], cols[b], X.sum(axis=1), X.sum(axis=0), float(X.sum()))
            ends.append((model.row_embeddings_, model.column_embeddings_))
        np.testing.assert_array_equal(ends[0][0], ends[1][0])
        np.testing.assert_array_equal(ends[0][1], ends[1][1])
