"""A claim raises exactly when the measurement contradicts the declared status, and leaves data for the ledger."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from algokit import claims
from algokit.claims import (
    MIME,
    ClaimContradictedError,
    at_least,
    at_most,
    between,
    claim,
    close_to,
    decreasing,
    increasing,
)


def judge(measured, rule, status="reproduced", reason="", digits=3):
    return claims._judge("slug/name", "A statement.", "abstract", measured, rule, status, reason, digits)


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (at_least(5), 5, 4.999),
        (at_most(5), 5, 5.001),
        (between(0.9, 1.1), 1.1, 1.2),
        (close_to(2, rtol=0.1), 2.19, 2.21),
        (close_to(0, atol=1e-3), -1e-3, 2e-3),
    ],
)
def test_rule_decides_the_status(rule, good, bad):
    assert judge(good, rule).status == "reproduced"
    assert judge(bad, rule, "not reproduced", "scale").status == "not reproduced"
    assert judge({"a": good, "b": bad}, rule, "in part", "scale").status == "in part"
    for wrong, status in (
        (bad, "reproduced"),
        (good, "not reproduced"),
        ({"a": good, "b": good}, "in part"),
        ({"a": bad, "b": good}, "reproduced"),
    ):
        with pytest.raises(ClaimContradictedError, match="slug/name"):
            judge(wrong, rule, status, "" if status == "reproduced" else "scale")


def test_sequences():
    assert judge({"1": 1, "2": 2, "3": 3}, increasing()).rule == "increasing"
    assert judge({"1": 3, "2": 2}, decreasing()).status == "reproduced"
    with pytest.raises(ClaimContradictedError):
        judge({"1": 1, "2": 1}, increasing())
    with pytest.raises(ValueError, match="two values"):
        judge(1.0, increasing())


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_unrounded_value_is_judged(value, bound):
    if value >= bound:
        judge(value, at_least(bound), digits=1)
    else:
        judge(value, at_least(bound), "not reproduced", "below", digits=1)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (dict(id="no slash"), "id must"),
        (dict(statement=" "), "statement"),
        (dict(status="maybe"), "status"),
        (dict(status="in part"), "reason"),
        (dict(reason="because"), "reason"),
        (dict(measured={}), "measured"),
        (dict(measured=float("nan")), "NaN"),
    ],
)
def test_malformed_claim_is_refused(change, part):
    arguments = dict(id="slug/name", statement="A.", source="s", measured=1.0, rule=at_least(0)) | change
    with pytest.raises(ValueError, match=part):
        claim(arguments.pop("id"), arguments.pop("statement"), **arguments)


def test_output_has_a_row_and_data():
    bundle = judge({"a<b": 1234.567, "n": 2.0}, at_least(1))._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", MIME}
    assert bundle[MIME] == {
        "id": "slug/name",
        "statement": "A statement.",
        "source": "abstract",
        "measured": {"a<b": 1230.0, "n": 2.0},
        "rule": "each ≥ 1",
        "status": "reproduced",
        "reason": "",
    }
    assert "a&lt;b" in bundle["text/html"] and 'data-status="reproduced"' in bundle["text/html"]


def test_outside_a_notebook_it_prints(capsys):
    claim("slug/name", "A statement.", source="abstract", measured=7, rule=at_least(5))
    assert re.fullmatch(r"\[reproduced\] A statement\. Measured 7; asserted ≥ 5\.\n", capsys.readouterr().out)


def test_exact_equality_is_not_a_rule():
    with pytest.raises(ValueError, match="rtol or atol"):
        close_to(1.0)
