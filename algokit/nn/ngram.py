r"""Interpolated Kneser-Ney n-grams: the baseline that a small language model of bytes has to beat. NumPy only.

With the highest order :math:`n`, the context :math:`h` of the last :math:`n - 1` tokens, and :math:`h'` the same
without its first token,

.. math:: p_n(w \mid h) = \frac{\max(c(hw) - D_n, 0) + D_n N(h) \, p_{n-1}(w \mid h')}{c(h)},

where :math:`c` counts occurrences, :math:`N(h)` different successors, and :math:`D_n = n_1 / (n_1 + 2 n_2)` comes from
the numbers of n-grams seen once and twice. Below the highest order :math:`c(hw)` is the number of different tokens that
precede :math:`hw`, and the recursion ends in the uniform distribution.

Reference: R. Kneser and H. Ney, *Improved backing-off for m-gram language modeling*, ICASSP 1995; the interpolated form
is that of S. Chen and J. Goodman, *An empirical study of smoothing techniques for language modeling*, 1998.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from algokit.arrays import is_array, to_numpy
from algokit.checks import check_int

__all__ = ["NGram", "fit_ngram"]


class _Order(NamedTuple):
    """Counts of one order: n-grams and contexts as sorted integers."""

    grams: np.ndarray  # sorted codes of n-grams
    counts: np.ndarray  # c(hw)
    contexts: np.ndarray  # sorted codes of contexts
    totals: np.ndarray  # c(h)
    kinds: np.ndarray  # N(h)
    discount: float


class NGram(NamedTuple):
    """A fitted n-gram model.

    Attributes
    ----------
    order : int
        Length of the longest n-gram.
    vocab_size : int
        Number of tokens.
    orders : tuple
        Counts, from order 1 up.
    """

    order: int
    vocab_size: int
    orders: tuple[_Order, ...]

    def probabilities(self, tokens: Any) -> np.ndarray:
        """Probability of each token, given those before it.

        Parameters
        ----------
        tokens : array of integers, shape (n,)
            A text; its first tokens have shorter contexts.

        Returns
        -------
        numpy.ndarray of float64, shape (n,)
            Between 0 and 1, never 0.

        Raises
        ------
        TypeError, ValueError
            If ``tokens`` is not a vector of tokens.
        """
        x = _check_tokens(tokens, "tokens", self.vocab_size)
        base = np.uint64(self.vocab_size)
        p = np.full(len(x), 1 / self.vocab_size)
        gram: np.ndarray = np.zeros(len(x), dtype=np.uint64)
        for n, order in enumerate(self.orders, start=1):
            before = np.concatenate([x[: n - 1], x])[: len(x)]  # the token n - 1 places before, where there is one
            gram = gram + before * base ** np.uint64(n - 1)
            context = gram // base
            total = _look_up(order.contexts, order.totals, context)
            kinds = _look_up(order.contexts, order.kinds, context)
            count = _look_up(order.grams, order.counts, gram)
            use = (total > 0) & (np.arange(len(x)) >= n - 1)
            mixed = np.maximum(count - order.discount, 0) + order.discount * kinds * p
            p = np.where(use, mixed / np.maximum(total, 1), p)
        return p

    def bits_per_token(self, tokens: Any) -> float:
        """Mean of ``-log2`` of the probabilities: bits per byte when tokens are bytes.

        Parameters
        ----------
        tokens : array of integers, shape (n,)
            A text.

        Returns
        -------
        float
            Bits per token.

        Raises
        ------
        TypeError, ValueError
            If ``tokens`` is not a vector of tokens.
        """
        return float(-np.log2(self.probabilities(tokens)).mean())


def fit_ngram(tokens: Any, *, order: int = 5, vocab_size: int = 256) -> NGram:
    """Count the n-grams of a text.

    Parameters
    ----------
    tokens : array of integers in [0, vocab_size), shape (n,)
        The text.
    order : int, default 5
        Length of the longest n-gram; ``vocab_size ** order`` must be below 2^64 (8 for bytes is the most).
    vocab_size : int, default 256
        Number of tokens.

    Returns
    -------
    NGram
        The model.

    Raises
    ------
    TypeError, ValueError
        If ``tokens`` is not a vector of tokens at least ``order`` long, or ``order`` is out of range.

    Examples
    --------
    >>> model = fit_ngram(list(b"abracadabra " * 9), order=3)
    >>> round(model.bits_per_token(list(b"abracadabra")), 2)
    0.42
    """
    vocab_size = check_int(vocab_size, "vocab_size", low=2, high=2**32)
    order = check_int(order, "order", low=1)
    if order > 64 or vocab_size**order > 2**64:
        raise ValueError(f"order must have vocab_size ** order <= 2^64, got {vocab_size} ** {order}")
    x = _check_tokens(tokens, "tokens", vocab_size)
    if len(x) < order:
        raise ValueError(f"tokens must be at least order = {order} long, got {len(x)}")
    base = np.uint64(vocab_size)
    grams: list[np.ndarray] = []  # codes of the n-grams that end at each position
    code: np.ndarray = np.zeros(len(x), dtype=np.uint64)
    for n in range(1, order + 1):
        code = code[1:] if n > 1 else code  # positions with n tokens
        code = code + x[: len(x) - n + 1] * base ** np.uint64(n - 1)
        grams.append(code)
    orders = []
    for n in range(1, order + 1):
        if n == order:
            kinds, counts = np.unique(grams[n - 1], return_counts=True)
        else:  # different tokens before, one vote each
            kinds, counts = np.unique(np.unique(grams[n]) % base ** np.uint64(n), return_counts=True)
        contexts, start = np.unique(kinds // base, return_index=True)
        ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
        discount = ones / (ones + 2 * twos) if ones and twos else 0.5
        successors = np.diff(np.append(start, len(kinds)))
        orders.append(_Order(kinds, counts, contexts, np.add.reduceat(counts, start), successors, discount))
    return NGram(order, vocab_size, tuple(orders))


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Values at the wanted keys, 0 where there is none."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _check_tokens(tokens: Any, name: str, vocab_size: int) -> np.ndarray:
    try:
        x = to_numpy(tokens) if is_array(tokens) else np.asarray(tokens)
    except ValueError:
        raise ValueError(f"{name} must be a vector of integers") from None
    if x.ndim != 1 or not x.size:
        raise ValueError(f"{name} must be a vector that is not empty, got shape {x.shape}")
    if not np.issubdtype(x.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got dtype {x.dtype}")
    if x.min() < 0 or x.max() >= vocab_size:
        raise ValueError(f"{name} must lie in [0, {vocab_size}), got {x[(x < 0) | (x >= vocab_size)][0]}")
    return x.astype(np.uint64)
