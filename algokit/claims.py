"""Claims of a paper, stated, measured and asserted in one call; the book's ledger is made from them.

A claim has a rule (:func:`at_least`, :func:`close_to`, ...), the values measured, and a status that its author
declares. :func:`claim` raises when the measurement contradicts the status, whichever way: a claim declared "not
reproduced" that suddenly holds is as much news as the reverse.
"""

from __future__ import annotations

import html
import itertools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from algokit.checks import check_float, check_one_of

__all__ = [
    "MIME",
    "Claim",
    "ClaimContradictedError",
    "Rule",
    "at_least",
    "at_most",
    "between",
    "claim",
    "close_to",
    "decreasing",
    "increasing",
]

MIME = "application/vnd.algokit.claim+json"  #: type of the machine-readable part of a claim's output
STATUSES = ("reproduced", "in part", "not reproduced")


class ClaimContradictedError(AssertionError):
    """The measurement contradicts the status that was declared."""


@dataclass(frozen=True)
class Rule:
    """What is asserted of the measured values.

    Attributes
    ----------
    text : str
        The rule in words, such as ``"each >= 5"``.
    holds : callable
        ``list[float] -> list[bool]``: verdict on each value (or on each step, for rules about a sequence).
    """

    text: str
    holds: Callable[[Sequence[float]], list[bool]]


def at_least(bound: float) -> Rule:
    """Rule: every value is ``>= bound``.

    Parameters
    ----------
    bound : float
        The bound.

    Returns
    -------
    Rule
        For :func:`claim`.
    """
    bound = check_float(bound, "bound")
    return Rule(f"≥ {bound:g}", lambda values: [v >= bound for v in values])


def at_most(bound: float) -> Rule:
    """Rule: every value is ``<= bound``.

    Parameters
    ----------
    bound : float
        The bound.

    Returns
    -------
    Rule
        For :func:`claim`.
    """
    bound = check_float(bound, "bound")
    return Rule(f"≤ {bound:g}", lambda values: [v <= bound for v in values])


def between(low: float, high: float) -> Rule:
    """Rule: every value lies in ``[low, high]``.

    Parameters
    ----------
    low, high : float
        The bounds, both included.

    Returns
    -------
    Rule
        For :func:`claim`.
    """
    low, high = check_float(low, "low"), check_float(high, "high")
    return Rule(f"in [{low:g}, {high:g}]", lambda values: [low <= v <= high for v in values])


def close_to(target: float, *, rtol: float = 0.0, atol: float = 0.0) -> Rule:
    """Rule: every value is within ``atol + rtol * |target|`` of ``target``.

    Parameters
    ----------
    target : float
        The value expected.
    rtol, atol : float, default 0
        Tolerances, not both zero.

    Returns
    -------
    Rule
        For :func:`claim`.
    """
    target = check_float(target, "target")
    slack = check_float(atol, "atol", low=0) + check_float(rtol, "rtol", low=0) * abs(target)
    if slack == 0:
        raise ValueError("rtol or atol must be positive: measured numbers are never exactly equal")
    return Rule(f"{target:g} ± {slack:.2g}", lambda values: [abs(v - target) <= slack for v in values])


def increasing() -> Rule:
    """Rule: each value is larger than the one before.

    Returns
    -------
    Rule
        For :func:`claim` with two measured values or more.
    """
    return Rule("increasing", lambda values: [b > a for a, b in itertools.pairwise(values)])


def decreasing() -> Rule:
    """Rule: each value is smaller than the one before.

    Returns
    -------
    Rule
        For :func:`claim` with two measured values or more.
    """
    return Rule("decreasing", lambda values: [b < a for a, b in itertools.pairwise(values)])


@dataclass(frozen=True)
class Claim:
    """One claim with its measurement and verdict; knows how to show itself in a notebook.

    Attributes
    ----------
    id : str
        ``"<slug>/<short-name>"``, unique in the book.
    statement : str
        The claim in the book's words.
    source : str
        Where the paper says it.
    measured : dict of str to float
        What was measured, rounded to what is stable.
    rule : str
        The rule asserted, in words.
    status : str
        ``"reproduced"``, ``"in part"`` or ``"not reproduced"``.
    reason : str
        Why, unless reproduced.
    """

    id: str
    statement: str
    source: str
    measured: dict[str, float]
    rule: str
    status: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """The claim as plain data, as it stands in the ledger.

        Returns
        -------
        dict
            Ready for JSON.
        """
        return dict(vars(self))

    def __str__(self) -> str:
        numbers = ", ".join(f"{k}: {_show(v)}" if k else _show(v) for k, v in self.measured.items())
        tail = f" ({self.reason})" if self.reason else ""
        return f"[{self.status}] {self.statement} Measured {numbers}; asserted {self.rule}.{tail}"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {"text/plain": str(self), "text/html": self._html(), MIME: self.as_dict()}

    def _html(self) -> str:
        say = html.escape
        numbers = "; ".join(
            f"{say(k)} <b>{_show(v)}</b>" if k else f"<b>{_show(v)}</b>" for k, v in self.measured.items()
        )
        reason = f'<div class="reason">{say(self.reason)}</div>' if self.reason else ""
        return (
            f'<div class="algokit-claim" data-status="{self.status}" id="claim-{say(self.id.replace("/", "-"))}">'
            f'<span class="status">{self.status}</span> <span class="statement">{say(self.statement)}</span> '
            f'<span class="source">({say(self.source)})</span>'
            f'<div class="measured">measured {numbers} · asserted {say(self.rule)}</div>{reason}</div>'
        )


def claim(
    id: str,
    statement: str,
    *,
    source: str,
    measured: float | Mapping[str, float],
    rule: Rule,
    status: str = "reproduced",
    reason: str = "",
    digits: int = 3,
) -> None:
    """State one claim of a paper, assert it, and show it.

    Parameters
    ----------
    id : str
        ``"<slug>/<short-name>"``, unique in the book, lower case.
    statement : str
        The claim in our words, a sentence.
    source : str
        Where the paper says it, such as ``"abstract; Theorem 2"``.
    measured : float or mapping of str to float
        One number, or several by name (seeds, sizes, data sets).
    rule : Rule
        What is asserted.
    status : {"reproduced", "in part", "not reproduced"}, default "reproduced"
        What the author of the chapter declares.
    reason : str, default ""
        Why, as far as we know; needed unless the claim is reproduced.
    digits : int, default 3
        Significant digits shown and stored: as many as are the same on every machine. The rule is applied to the
        unrounded values.

    Raises
    ------
    ClaimContradictedError
        If the measurement contradicts the status: "reproduced" needs the rule to hold for every value, "not
        reproduced" for none, "in part" for some but not all.
    ValueError
        If an argument is malformed (an id without a slash, a missing reason, no value, a NaN).

    Examples
    --------
    >>> claim("bradley_terry/sweeps", "Newman needs fewer sweeps.", source="abstract",
    ...       measured={"s=1": 9.81, "s=3": 25.2}, rule=at_least(5))
    [reproduced] Newman needs fewer sweeps. Measured s=1: 9.81, s=3: 25.2; asserted each ≥ 5.
    """
    result = _judge(id, statement, source, measured, rule, status, reason, digits)
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from IPython.display import display

        display(result)
    else:
        print(result)


def _judge(
    id: str,
    statement: str,
    source: str,
    measured: float | Mapping[str, float],
    rule: Rule,
    status: str,
    reason: str,
    digits: int,
) -> Claim:
    if not isinstance(id, str) or not re.fullmatch(r"[a-z0-9_]+/[a-z0-9-]+", id):
        raise ValueError(f"id must look like 'slug/short-name' in lower case, got {id!r}")
    if not isinstance(statement, str) or not statement.strip():
        raise ValueError(f"statement must be a sentence, got {statement!r}")
    check_one_of(status, "status", STATUSES)
    if (status != "reproduced") != bool(reason.strip()):
        raise ValueError("reason must be given exactly when status is not 'reproduced'")
    values = dict(measured) if isinstance(measured, Mapping) else {"": measured}
    if not values:
        raise ValueError("measured must hold at least one value")
    values = {str(k): float(v) for k, v in values.items()}
    if any(math.isnan(v) for v in values.values()):
        raise ValueError(f"measured must hold no NaN, got {values}")
    verdicts = rule.holds(list(values.values()))
    if not verdicts:
        raise ValueError(f"measured must hold two values or more for the rule '{rule.text}'")
    found = "reproduced" if all(verdicts) else "in part" if any(verdicts) else "not reproduced"
    if found != status:
        raise ClaimContradictedError(
            f"{id} is declared '{status}' but the measurement says '{found}': asserted {rule.text}, measured {values}"
        )
    text = f"each {rule.text}" if len(values) > 1 and rule.text not in ("increasing", "decreasing") else rule.text
    return Claim(id, statement, source, {k: _round(v, digits) for k, v in values.items()}, text, status, reason)


def _round(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _show(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:g}"
