"""Trees and their paths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from algokit.nn.trees import check_like, flatten, map_paths, unflatten

EXAMPLES = {
    "flatten": dict(tree={"a": {"b": np.ones(2)}}),
    "unflatten": dict(flat={"a/b": np.ones(2)}),
    "map_paths": dict(f=lambda path, x: x, tree={"a": np.ones(2)}),
}
ACCEPTS = {
    "flatten.tree": {"dict"},
    "unflatten.flat": {"dict"},
    "map_paths.tree": {"dict"},
    "check_like.name": {"word"},
}

keys = st.text("abc01", min_size=1, max_size=2)
trees = st.dictionaries(keys, st.recursive(st.integers(), lambda t: st.dictionaries(keys, t, min_size=1, max_size=3)))


@given(trees)
def test_unflatten_inverts_flatten(tree: dict[str, Any]) -> None:
    assert unflatten(flatten(tree)) == tree


@given(trees)
def test_map_paths_keeps_paths(tree: dict[str, Any]) -> None:
    assert flatten(map_paths(lambda path, x: (path, x), tree)) == {p: (p, x) for p, x in flatten(tree).items()}


@pytest.mark.parametrize(
    ("tree", "error", "words"),
    [({"a/b": 1}, ValueError, "slash"), ({"": 1}, ValueError, "empty"), ({"a": {1: 2}}, TypeError, "1")],
)
def test_bad_trees(tree: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        flatten(tree)


@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}, {"a//b": 1}, {"": 1}])
def test_bad_paths(flat: Any) -> None:
    with pytest.raises(ValueError, match="flat"):
        unflatten(flat)


@pytest.mark.parametrize(
    ("tree", "error", "words"),
    [
        ({}, ValueError, "lacks 'a/b'"),
        ({"a": {"b": np.ones(3)}}, ValueError, r"\(2,\), got \(3,\)"),
        ({"a": {"b": np.ones(2), "c": np.ones(2)}}, ValueError, "a/c"),
        ({"a": {"b": "x"}}, TypeError, "a/b"),
        ([1], TypeError, "nested dict"),
    ],
)
def test_check_like(tree: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_like(tree, {"a/b": (2,)}, "params")
