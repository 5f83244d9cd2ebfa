"""Checks refuse what they should, name the argument, and leave the rest alone."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from algokit import checks
from algokit.arrays import kind_of

CASES = [  # (call, exception, part of the message)
    (lambda: checks.check_array("abc", "x"), TypeError, "real numbers"),
    (lambda: checks.check_array([[1], [1, 2]], "x"), TypeError, "array of numbers"),
    (lambda: checks.check_array([None], "x"), TypeError, "dtype object"),
    (lambda: checks.check_array([1j], "x"), TypeError, "dtype complex128"),
    (lambda: checks.check_array(sp.eye_array(2), "x"), TypeError, "sparse"),
    (lambda: checks.check_array([1.0], "x", ndim=2), ValueError, "2 dimension"),
    (lambda: checks.check_array([1.0], "x", ndim=(2, 3)), ValueError, "2 or 3 dimension"),
    (lambda: checks.check_array([[1.0]], "x", shape=(None, 2)), ValueError, "(any, 2)"),
    (lambda: checks.check_array([], "x"), ValueError, "at least 1"),
    (lambda: checks.check_array([1.0, np.inf], "x"), ValueError, "index (1,)"),
    (lambda: checks.check_array([[0.0], [np.nan]], "x"), ValueError, "index (1, 0)"),
    (lambda: checks.check_array([0.0], "x", low=0, open_low=True), ValueError, "positive"),
    (lambda: checks.check_array([-1.0], "x", low=0), ValueError, ">= 0"),
    (lambda: checks.check_array([2.0], "x", high=1), ValueError, "<= 1"),
    (lambda: checks.check_array([1.5], "x", dtype="integer"), ValueError, "fractions"),
    (lambda: checks.check_array([True], "x", dtype="integer"), TypeError, "integers"),
    (lambda: checks.check_array([1.0], "x", dtype="bool"), TypeError, "booleans"),
    (lambda: checks.check_sparse(np.ones((2, 3)), "x", square=True), ValueError, "square"),
    (lambda: checks.check_sparse(sp.csr_array([[np.nan]]), "x"), ValueError, "finite"),
    (lambda: checks.check_sparse(sp.csr_array((0, 3)), "x"), ValueError, "at least one"),
    (lambda: checks.check_int(1.5, "x"), TypeError, "integer"),
    (lambda: checks.check_int(True, "x"), TypeError, "integer"),
    (lambda: checks.check_int("1", "x"), TypeError, "integer"),
    (lambda: checks.check_int(float("inf"), "x"), TypeError, "integer"),
    (lambda: checks.check_int(0, "x", low=1), ValueError, "[1, inf)"),
    (lambda: checks.check_float("1", "x"), TypeError, "real number"),
    (lambda: checks.check_float(float("nan"), "x"), ValueError, "finite"),
    (lambda: checks.check_float(1.0, "x", low=0, high=1, open_high=True), ValueError, "[0, 1)"),
    (lambda: checks.check_bool(1, "x"), TypeError, "True or False"),
    (lambda: checks.check_one_of("b", "x", ("a", "c")), ValueError, "'a', 'c'"),
    (lambda: checks.check_one_of(True, "x", (1,)), ValueError, "one of 1"),
    (lambda: checks.check_same_length(x=[1], y=[]), ValueError, "same length"),
    (lambda: checks.check_state([1], "x", ("a",)), TypeError, "dict of NumPy arrays"),
    (lambda: checks.check_state({"b": np.ones(2)}, "x", ("a",)), ValueError, "keys"),
    (lambda: checks.check_positive_definite(np.ones((2, 3)), "x"), ValueError, "square"),
    (lambda: checks.check_positive_definite([[1.0, 2.0], [0.0, 1.0]], "x"), ValueError, "symmetric"),
    (lambda: checks.check_positive_definite(-np.eye(2), "x"), ValueError, "positive definite"),
    (lambda: checks.check_rng(-1, "x"), ValueError, "non-negative"),
    (lambda: checks.check_rng(0.5, "x"), TypeError, "seed"),
    (lambda: checks.check_rng(np.random.RandomState(0), "x"), TypeError, "RandomState"),
    (lambda: checks.check_allocation((10**9, 10**9), "x"), ValueError, "too large"),
]


@pytest.mark.parametrize(("call", "error", "part"), CASES)
def test_refusal_names_argument_and_rule(call, error, part):
    with pytest.raises(error, match=re.escape(part)) as caught:
        call()
    assert re.search(r"\bx\b", str(caught.value))


def test_every_check_is_in_the_table_of_refusals():
    tested = {name for name in checks.__all__ if name.startswith("check_")}
    source = Path(__file__).read_text()
    assert not [name for name in tested if f"checks.{name}(" not in source]


def test_dtypes_are_kept_or_promoted():
    assert checks.check_array(np.ones(2, np.float32), "x").dtype == np.float32
    assert checks.check_array(np.ones(2, np.float16), "x").dtype == np.float32
    assert checks.check_array([1, 2], "x").dtype == np.float64
    assert checks.check_array([1.0, 2.0], "x", dtype="integer").dtype == np.int64
    assert checks.check_array(np.ones(2, np.int8), "x", dtype="real").dtype == np.int8


def test_valid_array_is_not_copied():
    x = np.ones(3)
    assert checks.check_array(x, "x") is x


def test_every_backend_is_checked_by_its_own_namespace(xp_array):
    x = xp_array(np.array([[1.0, 2.0]]))
    assert kind_of(checks.check_array(x, "x", ndim=2, low=0)) == xp_array.kind
    with pytest.raises(ValueError, match=r"index \(0, 1\)"):
        checks.check_array(xp_array(np.array([[1.0, np.nan]])), "x")


def test_check_sparse_gives_canonical_copy():
    raw = sp.coo_array(([1.0, 2.0, 0.0], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    csr = checks.check_sparse(raw, "x")
    assert csr.nnz == 1 and csr[0, 1] == 3.0 and csr.has_sorted_indices
    dense = np.ones((2, 2))
    checks.check_sparse(dense, "x").data[:] = 5
    assert (dense == 1).all()


def test_huge_but_valid_integers_pass():
    assert checks.check_int(np.int64(2**40), "x") == 2**40 and checks.check_int(10**30, "x") == 10**30


@given(st.integers(0, 2**32))
def test_rng_follows_spec_7(seed):
    expected = np.random.default_rng(seed).random(3)
    np.testing.assert_array_equal(checks.check_rng(seed).random(3), expected)
    generator = np.random.default_rng(seed)
    assert checks.check_rng(generator) is generator
