"""Kneser-Ney against its definition, and as a distribution."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from algokit.nn.ngram import fit_ngram

TEXT = np.array([0, 1, 2, 0, 1, 3, 0, 1, 2, 2, 1, 0])
EXAMPLES = {
    "fit_ngram": dict(tokens=TEXT, order=3, vocab_size=4),
    "NGram.probabilities": (lambda: fit_ngram(TEXT, order=3, vocab_size=4), dict(tokens=TEXT)),
    "NGram.bits_per_token": (lambda: fit_ngram(TEXT, order=3, vocab_size=4), dict(tokens=TEXT)),
}
ACCEPTS = {
    "fit_ngram.tokens": {"zero"},
    "NGram.probabilities.tokens": {"zero"},
    "NGram.bits_per_token.tokens": {"zero"},
}


def definition(train: list[int], order: int, vocab: int) -> Any:
    """p(w | h) by dictionaries, as the module's docstring has it."""
    counts = []
    for n in range(1, order + 1):
        grams = Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1))
        if n < order:
            longer = {tuple(train[i : i + n + 1]) for i in range(len(train) - n)}
            grams = Counter(g[1:] for g in longer)
        counts.append(grams)

    def p(h: tuple[int, ...], w: int) -> float:
        n = len(h) + 1
        lower = p(h[1:], w) if n > 1 else 1 / vocab
        followers = {g[-1]: c for g, c in counts[n - 1].items() if g[:-1] == h}
        if not followers:
            return lower
        values = list(counts[n - 1].values())
        ones, twos = values.count(1), values.count(2)
        discount = ones / (ones + 2 * twos) if ones and twos else 0.5
        mass = max(followers.get(w, 0) - discount, 0) + discount * len(followers) * lower
        return mass / sum(followers.values())

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@given(st.lists(st.integers(0, 3), min_size=6, max_size=60), st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_agrees_with_the_definition(order: int, train: list[int], text: list[int]) -> None:
    model, p = fit_ngram(train, order=order, vocab_size=4), definition(train, order, 4)
    expected = [p(tuple(text[max(0, i - order + 1) : i]), w) for i, w in enumerate(text)]
    np.testing.assert_allclose(model.probabilities(text), expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 3, 8])
def test_probabilities_sum_to_one(order: int) -> None:
    train = np.random.default_rng(0).integers(0, 5, 500)
    model = fit_ngram(train, order=order, vocab_size=5)
    for context in ([], [1], [0, 4, 2], list(train[40:50])):
        total = sum(model.probabilities([*context, w])[-1] for w in range(5))
        assert abs(total - 1) < 1e-12


def test_eight_bytes_fit_and_nine_do_not() -> None:
    text = np.frombuffer(b"\xff" * 30 + b"ab" * 30, dtype=np.uint8)
    assert fit_ngram(text, order=8).bits_per_token(text) < 1
    with pytest.raises(ValueError, match="order"):
        fit_ngram(text, order=9)
