"""__TITLE__: against exact rational arithmetic, and the invariants of a sum."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from algokit.__PART__.__SLUG__ import compensated_sum

EXAMPLES = {"compensated_sum": dict(x=np.array([1.0, 2.0]))}

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


def test_hand_computed_case():
    assert compensated_sum(np.array([1.0, 1e100, 1.0, -1e100])) == 2.0


@given(numbers)
def test_error_is_within_the_bound(values):
    exact = math.fsum(values)
    bound = 2 * np.finfo(float).eps * sum(map(abs, values))
    assert abs(compensated_sum(np.array(values)) - exact) <= bound


def test_every_kind_of_array(xp_array):
    if xp_array.kind == "cupy":
        pytest.skip("no GPU kernel")
    assert compensated_sum(xp_array(np.array([0.1, 0.2, 0.3]))) == pytest.approx(0.6)
