"""Synthetic sequence tasks with an exact answer, a split without overlap, and a metric: NumPy only.

Every task is a table of token sequences of one length and a mask of the tokens that are the answer. A model is trained
on the answer's tokens (:func:`algokit.nn.training.next_token_loss` takes ``(tokens, mask)`` batches) and judged by
:func:`exact_match` on test sequences, none of which is a training sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from algokit.arrays import is_array, to_numpy
from algokit.checks import RNGLike, check_float, check_int, check_one_of, check_rng

__all__ = ["Task", "brackets", "copying", "exact_match", "key_value_recall", "modular_arithmetic", "sorting"]


class Task(NamedTuple):
    """A synthetic task.

    Attributes
    ----------
    train, test : numpy.ndarray of int32, shape (n, time)
        Sequences; no test sequence is in ``train``.
    answers : numpy.ndarray of bool, shape (time,)
        Which tokens are the answer.
    vocab_size : int
        Number of tokens.
    symbols : tuple of str, length vocab_size
        How to print each token.
    """

    train: np.ndarray
    test: np.ndarray
    answers: np.ndarray
    vocab_size: int
    symbols: tuple[str, ...]

    def text(self, tokens: Any) -> str:
        """The symbols of a sequence, separated by spaces.

        Parameters
        ----------
        tokens : array of integers, shape (n,)
            Tokens of this task.

        Returns
        -------
        str
            Their symbols.

        Raises
        ------
        TypeError, ValueError
            If ``tokens`` is not a vector of tokens of this task.
        """
        x = _check_tokens(tokens, "tokens", ndim=1)
        if x.size and (x.min() < 0 or x.max() >= self.vocab_size):
            raise ValueError(f"tokens must lie in [0, {self.vocab_size}), got {x[(x < 0) | (x >= self.vocab_size)][0]}")
        return " ".join(self.symbols[t] for t in x)


def exact_match(predicted: Any, tokens: Any, answers: Any) -> float:
    """Share of sequences whose whole answer is right.

    Parameters
    ----------
    predicted : integer array, shape (n, time)
        ``predicted[i, t]`` is what the model says token ``t`` is, given those before it; looked at where ``answers`` is
        true.
    tokens : integer array, shape (n, time)
        The sequences.
    answers : bool array, shape (time,)
        Which tokens are the answer.

    Returns
    -------
    float
        Between 0 and 1.

    Raises
    ------
    TypeError, ValueError
        If the arrays do not fit, or no token is an answer.

    Examples
    --------
    >>> exact_match([[9, 1, 2], [9, 1, 3]], [[0, 1, 2], [0, 1, 2]], [False, True, True])
    0.5
    """
    predicted, tokens = _check_tokens(predicted, "predicted", ndim=2), _check_tokens(tokens, "tokens", ndim=2)
    mask = to_numpy(answers) if is_array(answers) else np.asarray(answers)
    if mask.dtype != bool:
        raise TypeError(f"answers must be an array of booleans, got dtype {mask.dtype}")
    if predicted.shape != tokens.shape:
        raise ValueError(f"predicted must have the shape of tokens, {tokens.shape}, got {predicted.shape}")
    if not tokens.size:
        raise ValueError(f"tokens must not be empty, got shape {tokens.shape}")
    if mask.shape != tokens.shape[1:] or not mask.any():
        raise ValueError(f"answers must have shape {tokens.shape[1:]} and a true element, got shape {mask.shape}")
    return float((predicted == tokens)[:, mask].all(axis=1).mean())


def modular_arithmetic(
    modulus: int = 23, *, operation: str = "+", train_fraction: float = 0.7, rng: RNGLike = 0
) -> Task:
    """``a o b = c`` for all pairs modulo a number: ``o`` is plus, minus or times.

    Parameters
    ----------
    modulus : int, default 23
        The modulus; sequences are ``a b = c``, with tokens 0 to modulus - 1 and one for the sign of equality.
    operation : {"+", "-", "*"}
        What is computed.
    train_fraction : float, default 0.7
        Share of the ``modulus ** 2`` pairs that is for training, in (0, 1).
    rng : None, int or numpy.random.Generator
        Which pairs.

    Returns
    -------
    Task
        ``modulus ** 2`` sequences of 4 tokens, the last of which is the answer.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> task = modular_arithmetic(7)
    >>> task.train.shape, task.test.shape
    ((34, 4), (15, 4))
    """
    p = check_int(modulus, "modulus", low=2, high=5000)
    check_one_of(operation, "operation", ("+", "-", "*"))
    a, b = np.divmod(np.arange(p * p), p)
    c = {"+": a + b, "-": a - b, "*": a * b}[operation] % p
    rows = np.stack([a, b, np.full_like(a, p), c], axis=1)
    symbols = (*map(str, range(p)), "=")
    return _split(rows, [False, False, False, True], symbols, train_fraction, check_rng(rng))


def copying(length: int = 8, *, n_symbols: int = 16, n_train: int = 2000, n_test: int = 500, rng: RNGLike = 0) -> Task:
    """Repeat a random string: ``x1 ... xn > x1 ... xn``.

    Parameters
    ----------
    length : int, default 8
        Length of the string.
    n_symbols : int, default 16
        Symbols it is drawn from.
    n_train, n_test : int
        Sequences, all different; there are ``n_symbols ** length``.
    rng : None, int or numpy.random.Generator
        Which strings.

    Returns
    -------
    Task
        Sequences of ``2 * length + 1`` tokens, the last ``length`` of which are the answer.

    Raises
    ------
    ValueError
        If an argument is out of range, or there are not as many different strings.

    Examples
    --------
    >>> task = copying(4, n_symbols=5, n_train=20, n_test=5)
    >>> task.text(task.train[0])
    'e d c b > e d c b'
    """
    return _mapping(lambda x: x, length, n_symbols, n_train, n_test, rng)


def sorting(length: int = 8, *, n_symbols: int = 16, n_train: int = 2000, n_test: int = 500, rng: RNGLike = 0) -> Task:
    """Sort a random string: ``x1 ... xn > x(1) ... x(n)``.

    Parameters
    ----------
    length : int, default 8
        Length of the string.
    n_symbols : int, default 16
        Symbols it is drawn from.
    n_train, n_test : int
        Sequences, all different; there are ``n_symbols ** length``.
    rng : None, int or numpy.random.Generator
        Which strings.

    Returns
    -------
    Task
        Sequences of ``2 * length + 1`` tokens, the last ``length`` of which are the answer.

    Raises
    ------
    ValueError
        As for :func:`copying`.

    Examples
    --------
    >>> task = sorting(4, n_symbols=5, n_train=20, n_test=5)
    >>> task.text(task.train[0])
    'e d c b > b c d e'
    """
    return _mapping(lambda x: np.sort(x, axis=1), length, n_symbols, n_train, n_test, rng)


def _mapping(
    f: Callable[[np.ndarray], np.ndarray], length: int, n_symbols: int, n_train: int, n_test: int, rng: RNGLike
) -> Task:
    """Strings, a separator, and ``f`` of the strings."""
    length = check_int(length, "length", low=1, high=10_000)
    n_symbols = check_int(n_symbols, "n_symbols", low=2, high=10_000)
    rng = check_rng(rng)
    x, n_train = _distinct(
        lambda n: rng.integers(0, n_symbols, (n, length)), n_train, n_test, n_symbols**length, "strings"
    )
    rows = np.concatenate([x, np.full((len(x), 1), n_symbols), f(x)], axis=1)
    symbols = (*(chr(97 + i) if n_symbols <= 26 else str(i) for i in range(n_symbols)), ">")
    return _task(rows, [False] * (length + 1) + [True] * length, symbols, n_train)


def brackets(length: int = 24, *, n_kinds: int = 3, n_train: int = 2000, n_test: int = 500, rng: RNGLike = 0) -> Task:
    """Is this a balanced string of brackets? ``( [ ] ) ? yes`` (the Dyck language of several kinds).

    Half of the strings are balanced: their depths are a uniform path from 0 back to 0, their kinds uniform. The others
    are such strings in which random brackets were replaced by random ones until the string was no longer balanced: they
    differ from a balanced string in one place, mostly, so counting symbols is not enough.

    Parameters
    ----------
    length : int, default 24
        Length of the string; even.
    n_kinds : int, default 3
        Kinds of brackets, 1 to 4.
    n_train, n_test : int
        Sequences, all different.
    rng : None, int or numpy.random.Generator
        Which strings.

    Returns
    -------
    Task
        Sequences of ``length + 2`` tokens, the last of which (yes or no) is the answer.

    Raises
    ------
    ValueError
        If an argument is out of range, or there are not as many different strings.

    Examples
    --------
    >>> task = brackets(6, n_kinds=2, n_train=20, n_test=5)
    >>> task.text(task.train[0])
    '[ ( ( ) ) ] ? yes'
    """
    length = check_int(length, "length", low=2, high=10_000)
    if length % 2:
        raise ValueError(f"length must be even, got {length}")
    n_kinds = check_int(n_kinds, "n_kinds", low=1, high=4)
    rng = check_rng(rng)
    up = _chance_up(length)

    def draw(n: int) -> np.ndarray:
        rows = np.stack([_bracket_string(length, n_kinds, up, rng) for _ in range(n)])
        wrong = rng.random(n) < 0.5
        for i in np.flatnonzero(wrong):
            while _balanced(rows[i], n_kinds):
                rows[i, rng.integers(length)] = rng.integers(2 * n_kinds)
        return np.concatenate([rows, np.full((n, 1), 2 * n_kinds), 2 * n_kinds + 1 + wrong[:, None]], axis=1)

    rows, n_train = _distinct(draw, n_train, n_test, (2 * n_kinds) ** length, "strings")
    pairs = ("()", "[]", "{}", "<>")[:n_kinds]
    symbols = (*(p[0] for p in pairs), *(p[1] for p in pairs), "?", "yes", "no")
    return _task(rows, [False] * (length + 1) + [True], symbols, n_train)


def _chance_up(length: int) -> np.ndarray:
    """``up[t, h]``: chance that a uniform path from depth h, t steps from its end at depth 0, goes up next."""
    log_paths = np.full((length + 1, length + 2), -np.inf)  # log of the number of such paths
    log_paths[0, 0] = 0
    for t in range(1, length + 1):
        log_paths[t, 1:-1] = np.logaddexp(log_paths[t - 1, :-2], log_paths[t - 1, 2:])
        log_paths[t, 0] = log_paths[t - 1, 1]
    up = np.zeros((length + 1, length + 1))
    for t in range(1, length + 1):
        possible = np.flatnonzero(np.isfinite(log_paths[t, :-1]))
        up[t, possible] = np.exp(log_paths[t - 1, possible + 1] - log_paths[t, possible])
    return up


def _bracket_string(length: int, n_kinds: int, up: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = np.empty(length, dtype=np.int64)
    stack: list[int] = []
    for i in range(length):
        if rng.random() < up[length - i, len(stack)]:
            stack.append(int(rng.integers(n_kinds)))
            row[i] = stack[-1]
        else:
            row[i] = n_kinds + stack.pop()
    return row


def _balanced(row: np.ndarray, n_kinds: int) -> bool:
    stack: list[int] = []
    for symbol in row.tolist():
        if symbol < n_kinds:
            stack.append(symbol)
        elif not stack or stack.pop() != symbol - n_kinds:
            return False
    return not stack


def key_value_recall(
    n_pairs: int = 6,
    *,
    n_keys: int = 16,
    n_values: int = 16,
    n_train: int = 2000,
    n_test: int = 500,
    rng: RNGLike = 0,
) -> Task:
    """Look up a key among pairs: ``k1 v1 k2 v2 ... ? ki vi``. Keys of one sequence differ.

    Parameters
    ----------
    n_pairs : int, default 6
        Pairs in a sequence.
    n_keys, n_values : int, default 16
        Keys and values they are drawn from; ``n_keys >= n_pairs``.
    n_train, n_test : int
        Sequences, all different.
    rng : None, int or numpy.random.Generator
        Which sequences.

    Returns
    -------
    Task
        Sequences of ``2 * n_pairs + 3`` tokens, the last of which is the answer.

    Raises
    ------
    ValueError
        If an argument is out of range, or there are not as many different sequences.

    Examples
    --------
    >>> task = key_value_recall(2, n_keys=4, n_values=4, n_train=20, n_test=5)
    >>> task.text(task.train[0])
    'k3 v0 k2 v1 ? k3 v0'
    """
    n_pairs = check_int(n_pairs, "n_pairs", low=1, high=5000)
    n_keys = check_int(n_keys, "n_keys", low=n_pairs, high=10_000)
    n_values = check_int(n_values, "n_values", low=2, high=10_000)
    rng = check_rng(rng)

    def draw(n: int) -> np.ndarray:
        keys = np.argsort(rng.random((n, n_keys)), axis=1)[:, :n_pairs]
        values = n_keys + rng.integers(0, n_values, (n, n_pairs))
        asked = rng.integers(0, n_pairs, (n, 1))
        question = np.full((n, 1), n_keys + n_values)
        pairs = np.stack([keys, values], axis=2).reshape(n, -1)
        return np.concatenate(
            [pairs, question, np.take_along_axis(keys, asked, 1), np.take_along_axis(values, asked, 1)], axis=1
        )

    possible = n_pairs * n_values**n_pairs
    for i in range(n_pairs):
        possible *= n_keys - i
    rows, n_train = _distinct(draw, n_train, n_test, possible, "sequences")
    symbols = (*(f"k{i}" for i in range(n_keys)), *(f"v{i}" for i in range(n_values)), "?")
    return _task(rows, [False] * (2 * n_pairs + 2) + [True], symbols, n_train)


def _distinct(
    draw: Callable[[int], np.ndarray], n_train: int, n_test: int, possible: int, what: str
) -> tuple[np.ndarray, int]:
    """Different rows in the order in which they were drawn, and how many are for training."""
    n_train = check_int(n_train, "n_train", low=1, high=10**7)
    n_test = check_int(n_test, "n_test", low=1, high=10**7)
    if (
        2 * (n_train + n_test) > possible
    ):  # more than half would make the drawing long, and the split a table of all there is
        raise ValueError(
            f"n_train + n_test must be at most half of the {possible} different {what}, got {n_train + n_test}"
        )
    rows = draw(n_train + n_test)
    for _ in range(1000):
        _, first = np.unique(rows, axis=0, return_index=True)
        rows = rows[np.sort(first)]
        if len(rows) >= n_train + n_test:
            return rows[: n_train + n_test], n_train
        rows = np.concatenate([rows, draw(n_train + n_test - len(rows))])
    raise ValueError(
        f"n_train + n_test must be smaller: not as many different {what} were found, got {n_train + n_test}"
    )


def _split(
    rows: np.ndarray, answers: list[bool], symbols: tuple[str, ...], train_fraction: float, rng: np.random.Generator
) -> Task:
    """All rows, in random order, of which a fraction is for training."""
    fraction = check_float(train_fraction, "train_fraction", low=0, high=1, open_low=True, open_high=True)
    n_train = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    return _task(rows[rng.permutation(len(rows))], answers, symbols, n_train)


def _task(rows: np.ndarray, answers: list[bool], symbols: tuple[str, ...], n_train: int) -> Task:
    rows = rows.astype(np.int32)
    return Task(rows[:n_train], rows[n_train:], np.array(answers), len(symbols), symbols)


def _check_tokens(tokens: Any, name: str, *, ndim: int) -> np.ndarray:
    try:
        x = to_numpy(tokens) if is_array(tokens) else np.asarray(tokens)
    except ValueError:
        raise ValueError(f"{name} must be an array of integers with {ndim} dimensions") from None
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {x.shape}")
    if x.size and not np.issubdtype(x.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got dtype {x.dtype}")
    return x
