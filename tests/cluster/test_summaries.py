"""States, trees and the three generic summaries, against NumPy, scikit-learn and the tree drawn by hand."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from algokit.cluster.summaries import (
    GramSummary,
    MomentSummary,
    PCASummary,
    Summary,
    TreeMerger,
    merge_tree,
    state_from_bytes,
    state_nbytes,
    state_to_bytes,
)
from algokit.sketching.fast_johnson_lindenstrauss import fast_jl_operator

X = np.random.default_rng(0).standard_normal((6, 3)) @ np.diag([3.0, 2.0, 1.0]) + 5
MOMENTS, GRAM, PRINCIPAL = MomentSummary(), GramSummary(), PCASummary(2)
STATE = MOMENTS.update(MOMENTS.init(), X)
SUM = GRAM.update(GRAM.init(), X)


def _letters() -> TreeMerger:
    return TreeMerger(lambda a, b: f"({a}{b})")


EXAMPLES = {
    "state_nbytes": dict(state=STATE),
    "state_to_bytes": dict(state=STATE),
    "state_from_bytes": dict(data=state_to_bytes(STATE)),
    "merge_tree": dict(summary=MOMENTS, states=[STATE, STATE]),
    "MomentSummary": dict(projection=np.sqrt, ddof=1),
    "MomentSummary.update": (MomentSummary, dict(state=STATE, chunk=X)),
    "MomentSummary.merge": (MomentSummary, dict(a=STATE, b=STATE)),
    "MomentSummary.finish": (MomentSummary, dict(state=STATE)),
    "GramSummary": dict(projection=np.sqrt),
    "GramSummary.update": (GramSummary, dict(state=SUM, chunk=X)),
    "GramSummary.merge": (GramSummary, dict(a=SUM, b=SUM)),
    "GramSummary.finish": (GramSummary, dict(state=SUM)),
    "PCASummary": dict(n_components=2),
    "PCASummary.finish": (lambda: PRINCIPAL, dict(state=STATE)),
}
ACCEPTS = {"MomentSummary.update.chunk": {"empty"}, "GramSummary.update.chunk": {"empty"}}


def _pieces(X: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    return np.split(X, sorted(cut % (len(X) + 1) for cut in cuts))


def _random_tree(summary: Summary, states: list[Any], choose: np.random.Generator) -> Any:
    """Merge neighbours in an arbitrary order until one state is left."""
    states = list(states)
    while len(states) > 1:
        i = int(choose.integers(len(states) - 1))
        states[i : i + 2] = [summary.merge(states[i], states[i + 1])]
    return states[0]


def test_the_tree_is_the_one_described() -> None:
    expected = {1: "a", 2: "(ab)", 3: "((ab)c)", 5: "(((ab)(cd))e)", 7: "(((ab)(cd))((ef)g))"}
    for n, tree in expected.items():
        merger = _letters()
        for letter in "abcdefg"[:n]:
            merger.push(letter)
        assert merger.result() == tree
        assert merger.count == n


def test_subtrees_may_be_pushed_whole() -> None:
    merger = _letters()
    merger.push("((ab)(cd))", size=4)
    merger.push("(ef)", size=2)
    merger.push("g")
    assert merger.result() == "(((ab)(cd))((ef)g))"
    with pytest.raises(ValueError, match=r"size .* divides the 7 chunks"):
        merger.push("xy", size=2)


@pytest.mark.parametrize("summary", [MOMENTS, GRAM, PRINCIPAL], ids=lambda s: type(s).__name__)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 200), max_size=9))
def test_any_chunking_and_any_tree_agree_to_rounding(summary: Any, seed: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((int(rng.integers(2, 60)), 4)) * [5, 3, 2, 1] + rng.uniform(-100, 100)
    states = [summary.update(summary.init(), piece) for piece in _pieces(X, cuts)]
    before = [{k: v.copy() for k, v in s.items()} for s in states]
    whole = summary.update(summary.init(), X)
    for merged in (_random_tree(summary, states, rng), merge_tree(summary, states)):
        for key, value in whole.items():
            np.testing.assert_allclose(merged[key], value, rtol=1e-10, atol=1e-8 * np.abs(X).max())
    in_turn = summary.init()
    for piece in _pieces(X, cuts):
        in_turn = summary.update(in_turn, piece)
    np.testing.assert_allclose(summary.finish(in_turn)[0], summary.finish(whole)[0], rtol=1e-10)
    for state, old in zip(states, before, strict=True):
        assert all((state[k] == old[k]).all() for k in old)


def test_the_empty_state_is_neutral_to_the_bit() -> None:
    for summary in (MOMENTS, GRAM):
        state = summary.update(summary.init(), X)
        for merged in (summary.merge(summary.init(), state), summary.merge(state, summary.init())):
            assert all((merged[k] == state[k]).all() for k in state)


def test_gram_of_integers_is_exact_in_any_tree() -> None:
    rng = np.random.default_rng(1)
    X = rng.integers(-1000, 1000, (100, 5))
    states = [GRAM.update(GRAM.init(), piece) for piece in np.array_split(X, 13)]
    for _ in range(5):
        assert (GRAM.finish(_random_tree(GRAM, states, rng)) == X.T @ X).all()


def test_moments_are_numpys_and_keep_their_digits_far_from_zero() -> None:
    rng = np.random.default_rng(2)
    X = rng.standard_normal((1000, 3))
    moments = MOMENTS.finish(merge_tree(MOMENTS, [MOMENTS.update(MOMENTS.init(), p) for p in np.array_split(X, 7)]))
    np.testing.assert_allclose(moments.mean, X.mean(axis=0), atol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(X.T), rtol=1e-12)
    far = X + 1e7
    states = [MOMENTS.update(MOMENTS.init(), p) for p in np.array_split(far, 7)]
    np.testing.assert_allclose(MOMENTS.finish(merge_tree(MOMENTS, states)).covariance, np.cov(far.T), atol=1e-8)
    textbook = (far.T @ far - 1000 * np.outer(far.mean(axis=0), far.mean(axis=0))) / 999
    assert np.abs(textbook - np.cov(far.T)).max() > 1e-3  # what the formula is for


def test_components_are_scikit_learns() -> None:
    X = np.random.default_rng(3).standard_normal((500, 6)) @ np.diag([6.0, 5, 4, 3, 2, 1]) + 7
    summary = PCASummary(3)
    result = summary.finish(merge_tree(summary, [summary.update(summary.init(), p) for p in np.array_split(X, 9)]))
    peer = PCA(3).fit(X)
    signs = np.sign((peer.components_ * result.components).sum(axis=1))
    np.testing.assert_allclose(result.components * signs[:, None], peer.components_, atol=1e-10)
    np.testing.assert_allclose(result.variance, peer.explained_variance_)
    np.testing.assert_allclose(result.share, peer.explained_variance_ratio_)
    np.testing.assert_allclose(result.mean, peer.mean_)
    assert result.n_rows == 500


def test_projection_is_applied_to_every_chunk() -> None:
    X = np.random.default_rng(4).standard_normal((40, 100))
    phi = fast_jl_operator(100, 8, density=0.3, rng=0)
    for projection in (phi, phi.apply):
        summary = GramSummary(projection=projection)
        states = [summary.update(summary.init(), p) for p in np.array_split(X, 5)]
        np.testing.assert_allclose(summary.finish(merge_tree(summary, states)), phi.apply(X).T @ phi.apply(X))


def test_backends_agree(xp_array: Any) -> None:
    for summary in (MOMENTS, GRAM):
        state = summary.update(summary.init(), xp_array(X))
        for key, value in summary.update(summary.init(), X).items():
            assert isinstance(state[key], np.ndarray)
            np.testing.assert_allclose(state[key], value, rtol=1e-12)


def test_misfits_are_refused() -> None:
    wide = MOMENTS.update(MOMENTS.init(), np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"b must be 3 columns wide, .* got 5"):
        MOMENTS.merge(STATE, wide)
    with pytest.raises(ValueError, match="chunk must be 5 columns wide"):
        MOMENTS.update(wide, X)
    with pytest.raises(ValueError, match=r"b must be a state with the keys .* another summary's"):
        MOMENTS.merge(STATE, SUM)
    with pytest.raises(ValueError, match="overflow"):
        GRAM.update(GRAM.init(), np.full((2, 2), 1e200))
    with pytest.raises(ValueError, match="at least n_components = 2"):
        PRINCIPAL.finish(MOMENTS.update(MOMENTS.init(), X[:, :1]))
    with pytest.raises(ValueError, match="more than ddof = 1"):
        MOMENTS.finish(MOMENTS.init())


@given(
    st.dictionaries(
        st.text("abcxyz_0", min_size=1, max_size=5),
        st.sampled_from(
            [np.array(3), np.zeros((0, 4)), np.arange(6.0, dtype=np.float32).reshape(2, 3), np.array(["a", "bc"])]
        ),
        max_size=4,
    )
)
def test_bytes_round_trip(state: dict[str, np.ndarray]) -> None:
    data = state_to_bytes(state)
    back = state_from_bytes(data)
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value)
    assert data == state_to_bytes(back)
    assert state_nbytes(state) == sum(v.nbytes for v in state.values()) <= len(data)


def test_nothing_is_unpickled() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="data must be what state_to_bytes wrote"):
        state_from_bytes(buffer.getvalue())
    with pytest.raises(TypeError, match="without objects"):
        state_to_bytes({"x": np.array([object()])})
    data = state_to_bytes(STATE)
    for cut in (0, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="data must be"):
            state_from_bytes(data[:cut])


def test_summaries_need_not_inherit() -> None:
    assert isinstance(MOMENTS, Summary)
    assert not isinstance(object(), Summary)
