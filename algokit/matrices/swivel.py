"""Swivel: low-rank factorisation of the whole PMI matrix, unobserved cells included, by Adagrad on round-robin shards.

Observed cells pay a weighted squared error, unobserved cells a soft hinge that punishes over-estimates only.

Reference: N. Shazeer, R. Doherty, C. Evans, C. Waterson, arXiv 1602.02215, 2016; code: tensorflow/models,
research/swivel. Chapter: notebooks/matrices/swivel.ipynb.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, check_non_negative, validate_data
from threadpoolctl import threadpool_limits

from algokit.arrays import Array, array_namespace, from_numpy, kind_of, to_numpy
from algokit.checks import (
    AlgokitWarning,
    RNGLike,
    check_allocation,
    check_array,
    check_bool,
    check_float,
    check_int,
    check_one_of,
    check_rng,
    check_sparse,
    check_state,
)

__all__ = [
    "Cooccurrence",
    "Swivel",
    "SwivelSummary",
    "VocabularySummary",
    "cooccurrence",
    "shard_indices",
    "shard_rounds",
    "swivel_loss_and_grad",
    "swivel_targets",
]

ACCUMULATOR = 0.1  # TensorFlow's initial Adagrad accumulator
DECAY, EPSILON = 0.1, 1e-10  # RMSProp in the official script: its flag `momentum`, 0.1, lands on TensorFlow's `decay`
RIDGE = 0.1  # on the vectors of new rows in `transform`: as much as one barely seen cell (the base of the confidence)
BLOCK_CELLS = 2**22  # cells of a dense block where no shard size is given
CELLS_FOR_THREADS = 2**22  # a smaller shard is done before a second thread has woken up
FACTORS_PER_LOG = 64  # factors 1 + exp(-|e|) <= 2 multiplied before a logarithm is taken: 2^64 fits float32


class Cooccurrence(NamedTuple):
    """Counts of which token was seen near which.

    Attributes
    ----------
    counts : scipy.sparse.csr_array, shape (n, n)
        Symmetric, weighted counts.
    vocabulary : tuple of str, length n
        Tokens, the most frequent first, ties in alphabetical order.
    """

    counts: sp.csr_array
    vocabulary: tuple[str, ...]


class _Confidence(NamedTuple):
    """Weight base + scale * x^exponent of an observed cell."""

    base: float
    scale: float
    exponent: float


def cooccurrence(
    documents: Iterable[Sequence[str]],
    *,
    window: int = 10,
    min_count: int = 5,
    max_vocab: int | None = None,
    weighting: Literal["harmonic", "flat"] = "harmonic",
    self_count: bool = False,
) -> Cooccurrence:
    r"""Co-occurrence counts of tokens within a symmetric window.

    Parameters
    ----------
    documents : iterable of sequences of str
        Tokens in their order. A window never reaches into another document.
    window : int, default 10
        Largest distance at which two tokens are counted, after tokens outside the vocabulary have been dropped: the
        window stretches over them.
    min_count : int, default 5
        Tokens seen less often are dropped.
    max_vocab : int, optional
        Keep only so many of the most frequent tokens.
    weighting : {"harmonic", "flat"}, default "harmonic"
        What a pair at distance :math:`\delta` adds: :math:`1/\delta`, or 1.
    self_count : bool, default False
        Add 1 to the diagonal for each occurrence of a token, as the official preparation script does.

    Returns
    -------
    Cooccurrence
        Counts, shape (n, n), and the vocabulary.

    Raises
    ------
    TypeError
        If ``documents`` is a string, or holds anything but sequences of strings.
    ValueError
        If no token is frequent enough, or a parameter is out of range.

    Notes
    -----
    Source: ``prep.py`` of the official code. It also cuts the vocabulary to a multiple of the shard size; here shards
    may be of unequal size, so nothing is cut.

    Examples
    --------
    >>> found = cooccurrence([["to", "be", "or", "not", "to", "be"]], window=2, min_count=2)
    >>> found.vocabulary  # "or" and "not" are dropped, so the text is: to be to be
    ('be', 'to')
    >>> found.counts.toarray()
    array([[1., 3.],
           [3., 1.]])
    """
    window = check_int(window, "window", low=1)
    min_count = check_int(min_count, "min_count", low=1)
    max_vocab = None if max_vocab is None else check_int(max_vocab, "max_vocab", low=1)
    check_one_of(weighting, "weighting", ("harmonic", "flat"))
    check_bool(self_count, "self_count")
    texts = _texts(documents)
    vocabulary = _vocabulary(Counter(chain.from_iterable(texts)), min_count, max_vocab, "documents")
    ids, document = _numbered(texts, vocabulary)
    shape = (len(vocabulary),) * 2
    counts = sp.csr_array(shape, dtype=np.float64)
    for distance, pair in _near(ids, document, window):
        weight = np.full(len(pair[0]), 1.0 / distance if weighting == "harmonic" else 1.0)
        counts = counts + sp.csr_array(sp.coo_array((weight, pair), shape=shape))
    counts = counts + counts.T
    if self_count:
        counts = counts + sp.diags_array(np.bincount(ids, minlength=shape[0]).astype(np.float64))
    return Cooccurrence(check_sparse(counts, "documents"), vocabulary)


def swivel_targets(X: Any, *, smoothing: float = 0.0) -> Array:
    r"""What each cell of the factorisation should come to: the PMI where it was seen, an upper estimate where not.

    .. math:: t_{ij} = \log\max(x_{ij}, 1_{x_{ij}=0}) + \log|D| - \log x_{i*} - \log x_{*j}

    with row sums :math:`x_{i*}`, column sums :math:`x_{*j}` and total :math:`|D|`: a cell of zero is taken as seen
    once.

    Parameters
    ----------
    X : array or sparse array, shape (m, n)
        Counts, not negative, fractions welcome. NumPy, SciPy sparse, CuPy, torch, JAX or another array-API array.
    smoothing : float, default 0
        Added to row sums, column sums and the total before the logarithm; the official code adds 1.

    Returns
    -------
    array, shape (m, n)
        Targets in nats, dense, of the kind of ``X`` (NumPy for sparse). NaN in rows and columns without counts,
        unless ``smoothing`` is positive.

    Raises
    ------
    TypeError
        If ``X`` is not numeric.
    ValueError
        If a count is negative or not finite, or all are zero.

    Notes
    -----
    Source: Shazeer et al. (2016); ``swivel.py`` of the official code.

    Examples
    --------
    >>> import numpy as np
    >>> swivel_targets(np.array([[3.0, 2.0], [4.0, 0.0]])).round(2)  # the last is log 9 * 1 / (4 * 2)
    array([[-0.26,  0.59],
           [ 0.25,  0.12]])
    """
    smoothing = check_float(smoothing, "smoothing", low=0)
    X = _counts(X)
    if sp.issparse(X):
        check_allocation(X.shape, "X")
        X = X.toarray()
    return _targets(array_namespace(X), X, smoothing)


def swivel_loss_and_grad(
    X: Any,
    W: Array,
    C: Array,
    *,
    base: float = 0.1,
    scale: float = 0.25,
    exponent: float = 0.5,
    hinge: bool = True,
    smoothing: float = 0.0,
) -> tuple[float, Array, Array]:
    r"""Swivel's loss summed over all cells, and its gradients.

    With :math:`e_{ij} = w_i^\top c_j - t_{ij}` and confidence :math:`f(x) = b_0 + b\,x^\alpha`, a cell costs
    :math:`\tfrac12 f(x_{ij})\,e_{ij}^2` where it was seen and :math:`\log(1 + \exp e_{ij})` where not.

    Parameters
    ----------
    X : array or sparse array, shape (m, n)
        Counts, as in :func:`swivel_targets`.
    W : array, shape (m, d)
        Row vectors.
    C : array, shape (n, d)
        Column vectors.
    base, scale, exponent : float, default 0.1, 0.25, 0.5
        :math:`b_0`, :math:`b` and :math:`\alpha`, none negative.
    hinge : bool, default True
        Whether unobserved cells cost anything; without, they are ignored.
    smoothing : float, default 0
        As in :func:`swivel_targets`.

    Returns
    -------
    loss : float
        Raw sum over cells: no factor for the size of a shard.
    grad_W : array, shape (m, d)
        Gradient with respect to ``W``.
    grad_C : array, shape (n, d)
        Gradient with respect to ``C``.

    Raises
    ------
    TypeError
        If an argument is not numeric.
    ValueError
        If shapes do not fit, a value is not finite, a count is negative, or all counts are zero.

    Notes
    -----
    Rows and columns without counts have no target and cost nothing (with ``smoothing`` they have one). Sparse ``X`` is
    worked through in blocks of rows and is never dense as a whole.

    Examples
    --------
    >>> import numpy as np
    >>> loss, grad_W, grad_C = swivel_loss_and_grad(np.ones((2, 2)), np.ones((2, 1)), np.ones((2, 1)))
    >>> round(loss, 6), grad_W.round(6).tolist()  # four cells with error 1 and weight 0.35
    (0.7, [[0.7], [0.7]])
    """
    confidence = _check_confidence(base, scale, exponent)
    check_bool(hinge, "hinge")
    smoothing = check_float(smoothing, "smoothing", low=0)
    X = _counts(X)
    W = check_array(W, "W", ndim=2)
    C = check_array(C, "C", ndim=2)
    if W.shape[0] != X.shape[0]:
        raise ValueError(f"W must have one row for each of the {X.shape[0]} rows of X, got shape {tuple(W.shape)}")
    if tuple(C.shape) != (X.shape[1], W.shape[1]):
        raise ValueError(f"C must have shape {(X.shape[1], W.shape[1])} to fit X and W, got {tuple(C.shape)}")
    if not sp.issparse(X) and kind_of(X) != "numpy":
        xp = array_namespace(X, W, C)
        P = xp.matmul(W, xp.matrix_transpose(C))
        target = _targets(xp, X, smoothing)
        G, loss = _cells_array_api(xp, P, target, _weights(xp, X, confidence), X > 0, hinge)
        return loss, xp.matmul(G, C), xp.matmul(xp.matrix_transpose(G), W)
    dtype = np.result_type(W, C)
    W, C, X = to_numpy(W).astype(dtype), to_numpy(C).astype(dtype), sp.csr_array(X)
    margins = _margins(X.sum(axis=1), X.sum(axis=0), X.sum(), smoothing)
    loss, grad_W, grad_C = 0.0, np.zeros_like(W), np.zeros_like(C)
    cols = np.flatnonzero(np.isfinite(margins.cols))
    step = max(1, BLOCK_CELLS // X.shape[1])
    for start in range(0, X.shape[0], step):
        rows = np.arange(start, min(start + step, X.shape[0]))
        rows = rows[np.isfinite(margins.rows[rows])]
        shard = _shard(X, rows, cols, margins, confidence, dtype)
        G, part = _cells(W[rows] @ C[cols].T, shard, hinge)
        loss += part
        grad_W[rows] = G @ C[cols]
        grad_C[cols] += G.T @ W[rows]
    return loss, grad_W, grad_C


def shard_indices(size: int, n_shards: int) -> list[np.ndarray]:
    """Round-robin shards: number i goes to shard ``i % n_shards``.

    Where numbers are sorted by frequency, every shard gets the same mix of frequent and rare ones.

    Parameters
    ----------
    size : int
        How many numbers, 0 to ``size - 1``.
    n_shards : int
        How many shards, at most ``size``.

    Returns
    -------
    list of numpy.ndarray of int
        One ascending array per shard; lengths differ by one at most.

    Raises
    ------
    TypeError
        If an argument is not an integer.
    ValueError
        If an argument is less than 1, or there are more shards than numbers.

    Examples
    --------
    >>> [shard.tolist() for shard in shard_indices(5, 2)]
    [[0, 2, 4], [1, 3]]
    """
    size = check_int(size, "size", low=1)
    check_allocation((size,), "size")
    n_shards = check_int(n_shards, "n_shards", low=1)
    if n_shards > size:
        raise ValueError(f"n_shards must not exceed size={size}, got {n_shards}")
    return [np.arange(a, size, n_shards) for a in range(n_shards)]


def shard_rounds(n_row_shards: int, n_column_shards: int) -> np.ndarray:
    """Schedule of shards in rounds: those of one round share no row and no column, so they can be fitted at once.

    Round t holds the shards (a, (a + t) mod n) along a diagonal; together the rounds hold every shard once, and there
    cannot be fewer of them.

    Parameters
    ----------
    n_row_shards, n_column_shards : int
        Number of blocks of rows and of columns, as :func:`shard_indices` makes them.

    Returns
    -------
    numpy.ndarray of int, shape (max, min, 2)
        ``rounds[t]`` lists the shards of round t by their blocks of rows and of columns; "max" and "min" are the
        larger and the smaller of the two numbers.

    Raises
    ------
    TypeError
        If an argument is not an integer.
    ValueError
        If it is less than 1, or the schedule does not fit into memory.

    Notes
    -----
    :meth:`Swivel.partial_fit_shard` gives the same vectors, to the last bit, for any order within a round: each shard
    reads and writes the vectors of its own rows and columns only.

    Examples
    --------
    >>> [r.tolist() for r in shard_rounds(2, 3)]
    [[[0, 0], [1, 1]], [[0, 1], [1, 2]], [[0, 2], [1, 0]]]
    """
    n_rows = check_int(n_row_shards, "n_row_shards", low=1)
    n_cols = check_int(n_column_shards, "n_column_shards", low=1)
    check_allocation((n_rows, n_cols, 2), "n_row_shards" if n_rows > n_cols else "n_column_shards")
    few, many = min(n_rows, n_cols), max(n_rows, n_cols)
    along = np.arange(few)
    rounds = np.empty((many, few, 2), np.int64)
    rounds[:, :, int(n_rows > n_cols)] = along
    rounds[:, :, int(n_rows <= n_cols)] = (along + np.arange(many)[:, None]) % many
    return rounds


class VocabularySummary:
    """How often each token occurs in texts that lie in chunks, and the vocabulary of all: the first of two passes.

    Whole numbers add: the vocabulary is exactly that of :func:`cooccurrence` on all documents, whatever the chunks and
    the tree of merges.

    Parameters
    ----------
    min_count : int, default 5
        Tokens seen less often, in all chunks together, are dropped.
    max_vocab : int, optional
        Keep only so many of the most frequent tokens.

    Raises
    ------
    TypeError, ValueError
        If a parameter is not a positive integer.

    Examples
    --------
    >>> summary = VocabularySummary(min_count=2)
    >>> a = summary.update(summary.init(), [["to", "be"], ["or"]])
    >>> summary.finish(summary.merge(a, summary.update(summary.init(), [["to", "be", "be"]])))
    ('be', 'to')
    """

    _KEYS = ("counts", "tokens")

    def __init__(self, *, min_count: int = 5, max_vocab: int | None = None) -> None:
        self.min_count = check_int(min_count, "min_count", low=1)
        self.max_vocab = None if max_vocab is None else check_int(max_vocab, "max_vocab", low=1)

    def init(self) -> dict[str, np.ndarray]:
        """State of no text.

        Returns
        -------
        dict of str to numpy.ndarray
            ``tokens`` (v,), sorted, and ``counts`` (v,).
        """
        return {"tokens": np.zeros(0, "U1"), "counts": np.zeros(0, np.int64)}

    def update(
        self, state: dict[str, np.ndarray], chunk: Any, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """State after one more chunk of documents.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            A state.
        chunk : iterable of sequences of str, or tuple of two arrays, shape (m,)
            As in :meth:`SwivelSummary.update`.
        rng : numpy.random.Generator, optional
            Ignored: nothing is random.

        Returns
        -------
        dict of str to numpy.ndarray
            Tokens and how often each was seen.

        Raises
        ------
        TypeError, ValueError
            If ``state`` is not a state of this summary, or ``chunk`` does not hold texts.
        """
        check_state(state, "state", self._KEYS)
        seen = Counter(chain.from_iterable(_chunk_texts(chunk)))
        tokens = np.array(sorted(seen), dtype=np.str_) if seen else np.zeros(0, "U1")
        if any(token.endswith("\0") for token in seen):
            raise ValueError("chunk must not hold tokens that end in a null character: arrays of strings drop it")
        return self.merge(state, {"tokens": tokens, "counts": np.array([seen[str(t)] for t in tokens], np.int64)})

    def merge(self, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """State of the texts of both.

        Parameters
        ----------
        a, b : dict of str to numpy.ndarray
            States.

        Returns
        -------
        dict of str to numpy.ndarray
            The state of all their texts.

        Raises
        ------
        TypeError, ValueError
            If they are not states of this summary.
        """
        check_state(a, "a", self._KEYS)
        check_state(b, "b", self._KEYS)
        tokens, counts = (np.concatenate([a[key], b[key]]) for key in ("tokens", "counts"))
        tokens, counts = _added(tokens, counts, "b")
        return {"tokens": tokens, "counts": counts}

    def finish(self, state: dict[str, np.ndarray]) -> tuple[str, ...]:
        """The vocabulary.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            A state.

        Returns
        -------
        tuple of str
            Tokens, the most frequent first, ties in alphabetical order.

        Raises
        ------
        TypeError, ValueError
            If it is not a state of this summary, or no token is frequent enough.
        """
        check_state(state, "state", self._KEYS)
        counted = dict(zip(state["tokens"].tolist(), state["counts"].tolist(), strict=True))
        return _vocabulary(counted, self.min_count, self.max_vocab, "state")


class SwivelSummary:
    r"""Co-occurrence counts of texts that lie in chunks, on one machine or on many: what :class:`Swivel` is fitted to.

    Counts are whole numbers of units (for harmonic weights :math:`1/\mathrm{lcm}(1, \dots, \text{window})`), so they
    add exactly: the state is the same to the last bit whatever the chunks and the tree of merges. The answer is that
    of :func:`cooccurrence` on all documents, to rounding (which adds fractions there).

    Parameters
    ----------
    vocabulary : sequence of str
        Tokens that are counted, none twice: from a first pass with :class:`VocabularySummary`, since windows stretch
        over tokens that are dropped.
    window : int, default 10
        As in :func:`cooccurrence`; with harmonic weights at most 24, so that units fit into 64 bits.
    weighting : {"harmonic", "flat"}, default "harmonic"
        As in :func:`cooccurrence`.
    self_count : bool, default False
        As in :func:`cooccurrence`.

    Raises
    ------
    TypeError, ValueError
        If a parameter is not one of these.

    Notes
    -----
    A document lies within one chunk. The state holds one number for each unordered pair of tokens that met and one
    for each token. The fit can be shared out as well: :func:`shard_rounds` lists shards that touch different vectors.

    Examples
    --------
    >>> summary = SwivelSummary(["be", "to"], window=2)
    >>> a = summary.update(summary.init(), [["to", "be", "or", "not", "to", "be"]])
    >>> b = summary.update(summary.init(), [["be", "be"]])
    >>> summary.finish(summary.merge(a, b)).counts.toarray()
    array([[3., 3.],
           [3., 1.]])
    """

    _KEYS = ("cells", "occurrences", "rule", "units")

    def __init__(
        self,
        vocabulary: Sequence[str],
        *,
        window: int = 10,
        weighting: Literal["harmonic", "flat"] = "harmonic",
        self_count: bool = False,
    ) -> None:
        if isinstance(vocabulary, (str, bytes, dict)) or not isinstance(vocabulary, (Sequence, np.ndarray)):
            raise TypeError(f"vocabulary must be a sequence of strings, got {type(vocabulary).__name__}")
        if not len(vocabulary) or not all(isinstance(token, str) for token in vocabulary):
            raise TypeError("vocabulary must hold strings, at least one")
        self.vocabulary = tuple(map(str, vocabulary))
        if len(set(self.vocabulary)) < len(self.vocabulary):
            raise ValueError("vocabulary must not hold a token twice")
        check_one_of(weighting, "weighting", ("harmonic", "flat"))
        self.window = check_int(window, "window", low=1, high=24 if weighting == "harmonic" else 2**62)
        self.weighting = weighting
        self.self_count = check_bool(self_count, "self_count")
        self._unit = math.lcm(*range(1, self.window + 1)) if weighting == "harmonic" else 1
        text = "\n".join(f"{len(token)} {token}" for token in self.vocabulary)
        mark = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=7).digest(), "little")
        self._rule = np.array([mark, self.window, self._unit])

    def init(self) -> dict[str, np.ndarray]:
        """State of no text.

        Returns
        -------
        dict of str to numpy.ndarray
            ``cells`` (c,), the pairs that met, i n + j with i <= j; ``units`` (c,), their counts; ``occurrences`` (n,)
            of each token; ``rule`` (3,), the parameters and a fingerprint of the vocabulary. All int64.
        """
        n = len(self.vocabulary)
        return self._state(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(n, np.int64), "state")

    def update(
        self, state: dict[str, np.ndarray], chunk: Any, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """State after one more chunk of documents.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            A state.
        chunk : iterable of sequences of str, or tuple of two arrays, shape (m,)
            Documents, each a sequence of tokens. Or all tokens, one after the other, and the number of the document
            of each: a change of number begins another document.
        rng : numpy.random.Generator, optional
            Ignored: nothing is random.

        Returns
        -------
        dict of str to numpy.ndarray
            Counts of pairs and of tokens.

        Raises
        ------
        TypeError, ValueError
            If ``state`` is not a state of this summary, or ``chunk`` does not hold texts.
        """
        self._checked(state, "state")
        n = len(self.vocabulary)
        ids, document = _numbered(_chunk_texts(chunk), self.vocabulary)
        cells, units = [state["cells"]], [state["units"]]
        for distance, (i, j) in _near(ids, document, self.window):
            pairs, count = np.unique(np.minimum(i, j) * n + np.maximum(i, j), return_counts=True)
            cells.append(pairs)
            units.append(count * (self._unit // distance if self.weighting == "harmonic" else 1))
        occurrences = state["occurrences"] + np.bincount(ids, minlength=n)
        return self._state(np.concatenate(cells), np.concatenate(units), occurrences, "chunk")

    def merge(self, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """State of the texts of both.

        Parameters
        ----------
        a, b : dict of str to numpy.ndarray
            States.

        Returns
        -------
        dict of str to numpy.ndarray
            The state of all their texts.

        Raises
        ------
        TypeError, ValueError
            If they are not states of this summary, or counts leave 64 bits.
        """
        self._checked(a, "a")
        self._checked(b, "b")
        cells, units = (np.concatenate([a[key], b[key]]) for key in ("cells", "units"))
        return self._state(cells, units, a["occurrences"] + b["occurrences"], "b")

    def finish(self, state: dict[str, np.ndarray]) -> Cooccurrence:
        """The counts.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            A state.

        Returns
        -------
        Cooccurrence
            Symmetric counts, shape (n, n), and the vocabulary.

        Raises
        ------
        TypeError, ValueError
            If it is not a state of this summary.
        """
        self._checked(state, "state")
        n = len(self.vocabulary)
        place = np.divmod(state["cells"], n)
        counts = sp.csr_array(sp.coo_array((state["units"] / self._unit, place), shape=(n, n)))
        counts = counts + counts.T
        if self.self_count:
            counts = counts + sp.diags_array(state["occurrences"].astype(np.float64))
        return Cooccurrence(check_sparse(counts, "state"), self.vocabulary)

    def _state(self, cells: np.ndarray, units: np.ndarray, occurrences: np.ndarray, name: str) -> dict[str, np.ndarray]:
        cells, units = _added(cells, units, name)
        return {"cells": cells, "units": units, "occurrences": occurrences, "rule": self._rule}

    def _checked(self, state: Any, name: str) -> None:
        check_state(state, name, self._KEYS)
        if not np.array_equal(state["rule"], self._rule):
            raise ValueError(f"{name} must be of the same vocabulary, window and weighting as the summary")


class Swivel(TransformerMixin, BaseEstimator):
    """Embeddings of the rows and columns of a matrix of counts, by Swivel.

    Parameters
    ----------
    n_components : int, default 100
        Dimension d of the vectors.
    n_epochs : int, default 40
        How often every shard is visited.
    learning_rate : float, default 0.1
        Step size of the optimiser.
    shard_size : int, default 4096
        Most rows, and most columns, of a shard: memory for one dense block of this size is needed.
    base, scale, exponent : float, default 0.1, 0.25, 0.5
        Confidence of an observed cell, as in :func:`swivel_loss_and_grad` (the paper's values; the flags of the
        official script default to 0, 1, 0.5).
    hinge : bool, default True
        Whether unobserved cells count.
    smoothing : float, default 0
        As in :func:`swivel_targets`.
    optimizer : {"adagrad", "rmsprop"}, default "adagrad"
        Adagrad starts its accumulator at 0.1; RMSProp has decay 0.1, as in the official script.
    symmetric_output : {"sum", "mean"}, default "sum"
        How row and column vectors are combined in ``embeddings_``.
    dtype : {None, "float32", "float64"}, default None
        Precision of vectors and steps; None is float32.
    rng : None, int or numpy.random.Generator
        Initial vectors, normal with variance 1/d, and the order of the shards.

    Attributes
    ----------
    row_embeddings_ : array, shape (m, d)
        Row vectors; zero for rows without counts.
    column_embeddings_ : array, shape (n, d)
        Column vectors; zero for columns without counts.
    embeddings_ : array, shape (n, d)
        Both combined; only where m = n.
    loss_history_ : numpy.ndarray, shape (n_epochs,)
        Raw loss summed over the shards of each epoch, each just before its update.
    n_features_in_ : int
        Number of columns n.

    Notes
    -----
    An epoch costs :math:`6mnd` floating-point operations whatever the number of observed cells. Source: Shazeer et al.
    (2016); ``swivel.py`` of the official code. NumPy and SciPy counts run on the CPU; counts in a dense CuPy, torch
    or other array-API array stay on their device, where the vectors are kept too.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.kron(np.eye(3), np.full((4, 4), 9.0)) + 0.1  # three groups of items that keep to themselves
    >>> model = Swivel(n_components=3, n_epochs=100, rng=0).fit(X)
    >>> bool(model.predict_pmi([0], [1]) > 0), bool(model.predict_pmi([0], [5]) > 0)
    (True, False)
    """

    def __init__(
        self,
        n_components: int = 100,
        *,
        n_epochs: int = 40,
        learning_rate: float = 0.1,
        shard_size: int = 4096,
        base: float = 0.1,
        scale: float = 0.25,
        exponent: float = 0.5,
        hinge: bool = True,
        smoothing: float = 0.0,
        optimizer: Literal["adagrad", "rmsprop"] = "adagrad",
        symmetric_output: Literal["sum", "mean"] = "sum",
        dtype: Literal["float32", "float64"] | None = None,
        rng: RNGLike = None,
    ) -> None:
        self.n_components = n_components
        self.n_epochs = n_epochs
        self.learning_rate = learning_rate
        self.shard_size = shard_size
        self.base = base
        self.scale = scale
        self.exponent = exponent
        self.hinge = hinge
        self.smoothing = smoothing
        self.optimizer = optimizer
        self.symmetric_output = symmetric_output
        self.dtype = dtype
        self.rng = rng

    def fit(self, X: Any, y: Any = None) -> Swivel:
        """Learn vectors from counts.

        Parameters
        ----------
        X : array or sparse array, shape (m, n)
            Counts, not negative, fractions welcome. Sparse counts are made dense one shard at a time.
        y : None
            Ignored.

        Returns
        -------
        Swivel
            Itself.

        Raises
        ------
        TypeError
            If an argument is of the wrong type.
        ValueError
            If a count is negative or not finite, all are zero, a parameter is out of range, or the iteration leaves
            the range of floating-point numbers.

        Warns
        -----
        AlgokitWarning
            If rows or columns have no counts.
        """
        rule = self._check_rule()
        X = self._check_counts(X, reset=True)
        rng = check_rng(self.rng)
        xp = None if sp.issparse(X) else array_namespace(X)
        row_sums, col_sums = (_sums(X, axis) for axis in (1, 0))
        margins = _margins(row_sums, col_sums, row_sums.sum(), rule.smoothing)
        self._start(margins, rule, rng, like=X)
        split = lambda size: shard_indices(size, -(-size // rule.shard_size))  # noqa: E731
        rows = [r[np.isfinite(margins.rows[r])] for r in split(X.shape[0])]
        cols = [c[np.isfinite(margins.cols[c])] for c in split(X.shape[1])]
        places = [(r, c) for r in rows for c in cols if len(r) and len(c)]
        if xp is None:
            shards = [_shard(X, r, c, margins, rule.confidence, rule.dtype) for r, c in places]
            update = lambda k: self._update(shards[k], *places[k], rule)  # noqa: E731
        else:
            update = lambda k: self._update_array_api(xp, X, places[k][0], places[k][1], margins, rule)  # noqa: E731
        history = np.empty(rule.n_epochs)
        work = 2 * self.n_components * max(len(r) * len(c) for r, c in places)
        # small products: waking the threads of BLAS would cost more than the work
        calm = threadpool_limits(1, user_api="blas") if work < 2e7 else contextlib.nullcontext()
        with calm, np.errstate(over="ignore", invalid="ignore"):  # _check_loss reports an overflow
            for epoch in range(rule.n_epochs):
                history[epoch] = sum(update(k) for k in rng.permutation(len(places)))
                _check_loss(history[epoch])
        self.loss_history_ = history
        return self

    def partial_fit_shard(
        self, X_shard: Any, rows: Any, cols: Any, row_sums: Any, col_sums: Any, total: float
    ) -> Swivel:
        """One update from one shard, so that a loop over files, or several workers, can drive the learning.

        The first call makes the vectors. Updates from shards that share no row and no column touch different vectors:
        they give the same result, to the last bit, in any order.

        Parameters
        ----------
        X_shard : array or sparse array, shape (a, b)
            Counts of the shard.
        rows, cols : array-like of int, shape (a,) and (b,)
            Which rows and columns of the whole matrix these are, none twice.
        row_sums, col_sums : array-like, shape (m,) and (n,)
            Sums of the whole matrix.
        total : float
            Sum of all counts of the whole matrix.

        Returns
        -------
        Swivel
            Itself; ``shard_loss_`` is the raw loss of the shard before the update.

        Raises
        ------
        TypeError
            If an argument is of the wrong type.
        ValueError
            If shapes do not fit, an index is out of range or comes twice, or a count is negative or not finite.
        """
        rule = self._check_rule()
        X_shard = check_sparse(X_shard, "X_shard", low=0)
        row_sums = to_numpy(check_array(row_sums, "row_sums", ndim=1, low=0)).astype(np.float64)
        col_sums = to_numpy(check_array(col_sums, "col_sums", ndim=1, low=0)).astype(np.float64)
        total = check_float(total, "total", low=0, open_low=True)
        places = []
        for name, index, sums, length in (("rows", rows, row_sums, 0), ("cols", cols, col_sums, 1)):
            index = to_numpy(check_array(index, name, dtype="integer", low=0, ndim=1))
            if index.max() >= len(sums):
                raise ValueError(f"{name} must be below {len(sums)}, the length of {name[:3]}_sums, got {index.max()}")
            if len(index) != X_shard.shape[length]:
                raise ValueError(f"{name} must name the {X_shard.shape[length]} {name} of X_shard, got {len(index)}")
            if len(np.unique(index)) < len(index):
                raise ValueError(f"{name} must not hold a number twice")
            places.append(index)
        margins = _margins(row_sums, col_sums, total, rule.smoothing)
        if not hasattr(self, "row_embeddings_"):
            self.n_features_in_ = len(col_sums)
            self._start(margins, rule, check_rng(self.rng), like=None)
        for name, sums, vectors in (("row_sums", row_sums, self._W), ("col_sums", col_sums, self._C)):
            if len(sums) != len(vectors):
                raise ValueError(f"{name} must have length {len(vectors)} as in the first call, got {len(sums)}")
        keep = [np.isfinite(margin[index]) for margin, index in zip(margins[:2], places, strict=True)]
        local = [np.flatnonzero(k) for k in keep]
        here = _Margins(margins.rows[places[0]], margins.cols[places[1]], margins.total)
        shard = _shard(X_shard, local[0], local[1], here, rule.confidence, rule.dtype)
        self.shard_loss_ = self._update(shard, places[0][keep[0]], places[1][keep[1]], rule)
        _check_loss(self.shard_loss_)
        return self

    def transform(self, X: Any) -> Array:
        """Vectors of new rows that fit the learned column vectors best.

        Each row's loss is convex in its vector; it is minimised by Newton's method, with a small ridge that settles
        what a row with few counts leaves open. Row sums are those of ``X``, column sums and total those of the
        training counts.

        Parameters
        ----------
        X : array or sparse array, shape (r, n)
            Counts of the new rows over the columns seen in ``fit``.

        Returns
        -------
        array, shape (r, d)
            Row vectors; zero for rows without counts.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If there are no vectors yet.
        ValueError
            If a count is negative or not finite, or the number of columns is wrong.
        """
        check_is_fitted(self, "row_embeddings_")
        rule = self._check_rule()
        X = self._check_counts(X, reset=False)
        like, X = X, X if sp.issparse(X) else sp.csr_array(to_numpy(X).astype(np.float64))
        C = to_numpy(self.column_embeddings_).astype(np.float64)
        margins = _Margins(_margin(_sums(X, 1), rule.smoothing), self._margins.cols, self._margins.total)
        out = np.zeros((X.shape[0], C.shape[1]))
        cols = np.flatnonzero(np.isfinite(margins.cols))
        step = max(1, BLOCK_CELLS // (4 * X.shape[1]))
        for start in range(0, X.shape[0], step):
            rows = np.arange(start, min(start + step, X.shape[0]))
            rows = rows[np.isfinite(margins.rows[rows])]
            counts = X[rows][:, cols].toarray()
            target = margins.total - margins.rows[rows][:, None] - margins.cols[cols]
            target += np.log(np.where(counts > 0, counts, 1.0))
            weight = _weights(np, counts, rule.confidence)
            out[rows] = _fold_in(C[cols], target, weight, counts > 0, rule.hinge)
        return from_numpy(out.astype(rule.dtype), like=like)

    def predict_pmi(self, rows: Any = None, cols: Any = None) -> Array:
        """Predicted PMI of cells, whether they were seen or not.

        Parameters
        ----------
        rows, cols : array-like of int, optional
            Which rows and columns; all by default.

        Returns
        -------
        array, shape (len(rows), len(cols))
            Inner products of row and column vectors, in nats.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If there are no vectors yet.
        ValueError
            If an index is out of range.
        """
        check_is_fitted(self, "row_embeddings_")
        chosen = []
        for name, index, vectors in (("rows", rows, self.row_embeddings_), ("cols", cols, self.column_embeddings_)):
            if index is not None:
                high = vectors.shape[0] - 1
                index = to_numpy(check_array(index, name, ndim=1, dtype="integer", low=0, high=high))
                vectors = vectors[array_namespace(vectors).asarray(index), :]
            chosen.append(vectors)
        check_allocation((chosen[0].shape[0], chosen[1].shape[0]), "rows")
        return chosen[0] @ chosen[1].T

    @property
    def row_embeddings_(self) -> Array:
        """Row vectors, shape (m, d)."""
        return self._W

    @property
    def column_embeddings_(self) -> Array:
        """Column vectors, shape (n, d)."""
        return self._C

    @property
    def embeddings_(self) -> Array:
        """Row and column vectors combined, shape (n, d), where the matrix is square."""
        if self._W.shape[0] != self._C.shape[0]:
            raise AttributeError(f"embeddings_ needs a square matrix, got {self._W.shape[0]} x {self._C.shape[0]}")
        both = self._W + self._C
        return both / 2 if self.symmetric_output == "mean" else both

    def _check_rule(self) -> _Rule:
        check_int(self.n_components, "n_components", low=1)
        check_one_of(self.optimizer, "optimizer", ("adagrad", "rmsprop"))
        check_one_of(self.symmetric_output, "symmetric_output", ("sum", "mean"))
        check_one_of(self.dtype, "dtype", (None, "float32", "float64"))
        return _Rule(
            n_epochs=check_int(self.n_epochs, "n_epochs", low=1, high=10**6),
            learning_rate=check_float(self.learning_rate, "learning_rate", low=0, open_low=True),
            shard_size=check_int(self.shard_size, "shard_size", low=1),
            confidence=_check_confidence(self.base, self.scale, self.exponent),
            hinge=check_bool(self.hinge, "hinge"),
            smoothing=check_float(self.smoothing, "smoothing", low=0),
            adagrad=self.optimizer == "adagrad",
            dtype=np.dtype(self.dtype or "float32").type,
        )

    def _check_counts(self, X: Any, *, reset: bool) -> Any:
        """Counts as CSR, or as a dense array of another kind than NumPy's."""
        if kind_of(X) in (None, "numpy"):
            try:
                X = validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=reset)
            except TypeError as error:
                raise TypeError(f"X must hold real numbers: {error}") from None
            check_non_negative(X, "Swivel (input X)")
            X = check_sparse(X, "X", low=0)
        else:
            X = check_array(X, "X", ndim=2, low=0)
            if reset:
                self.n_features_in_ = X.shape[1]
            elif X.shape[1] != self.n_features_in_:
                raise ValueError(f"X must have {self.n_features_in_} columns as in fit, got {X.shape[1]}")
        if reset and not _sums(X, 1).any():
            raise ValueError("X must hold at least one count above zero")
        return X

    def _start(self, margins: _Margins, rule: _Rule, rng: np.random.Generator, *, like: Any) -> None:
        """Random vectors; zero where there is nothing to learn from."""
        empty = [int((~np.isfinite(margin)).sum()) for margin in margins[:2]]
        if any(empty):
            text = f"{empty[0]} rows and {empty[1]} columns of X have no counts: their vectors are zero"
            warnings.warn(text, AlgokitWarning, stacklevel=3)
        d, vectors = self.n_components, []
        for margin in margins[:2]:
            check_allocation((len(margin), d), "n_components")
            made = rng.normal(0.0, 1.0 / math.sqrt(d), (len(margin), d)).astype(rule.dtype)
            made[~np.isfinite(margin)] = 0.0
            vectors.append(from_numpy(made, like=like))
        self._margins = margins
        self._W, self._C = vectors
        first = ACCUMULATOR if rule.adagrad else 1.0
        self._W_squares, self._C_squares = self._W * 0 + first, self._C * 0 + first

    def _update(self, shard: _Shard, rows: np.ndarray, cols: np.ndarray, rule: _Rule) -> float:
        """Steps 3 to 5 of the chapter's algorithm on one shard; its raw loss."""
        if len(rows) == 0 or len(cols) == 0:
            return 0.0
        W, C = self._W[rows], self._C[cols]  # (a, d), (b, d): copies
        G, loss = _cells(W @ C.T, shard, rule.hinge)
        factor = rule.dtype(1.0 / math.sqrt(len(rows) * len(cols)))
        rate = rule.dtype(rule.learning_rate)
        _step(self._W, self._W_squares, rows, G @ C, factor, rate, rule.adagrad)
        _step(self._C, self._C_squares, cols, G.T @ W, factor, rate, rule.adagrad)
        return loss

    def _update_array_api(
        self, xp: Any, X: Array, rows: np.ndarray, cols: np.ndarray, margins: _Margins, rule: _Rule
    ) -> float:
        """The same update as whole-array arithmetic, on whatever device ``X`` is."""
        to = lambda a: from_numpy(a, like=X)  # noqa: E731
        r, c = to(rows), to(cols)
        counts = xp.take(xp.take(X, r, axis=0), c, axis=1)
        counts = xp.astype(counts, self._W.dtype)
        W, C = xp.take(self._W, r, axis=0), xp.take(self._C, c, axis=0)
        offset = margins.total - margins.rows[rows][:, None] - margins.cols[cols]
        target = xp.log(xp.where(counts > 0, counts, xp.ones_like(counts))) + to(offset.astype(rule.dtype))
        P = xp.matmul(W, xp.matrix_transpose(C))
        weight = _weights(xp, counts, rule.confidence)
        cells = _cells_cupy if kind_of(X) == "cupy" else _cells_array_api
        G, loss = cells(xp, P, target, weight, counts > 0, rule.hinge)
        factor = 1.0 / math.sqrt(len(rows) * len(cols))
        gradients = xp.matmul(G, C) * factor, xp.matmul(xp.matrix_transpose(G), W) * factor
        self._W, self._W_squares = _step_array_api(xp, self._W, self._W_squares, rows, gradients[0], rule, to)
        self._C, self._C_squares = _step_array_api(xp, self._C, self._C_squares, cols, gradients[1], rule, to)
        return loss

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_W")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = True
        tags.transformer_tags.preserves_dtype = []
        return tags


# --- arguments and their forms ----------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """Checked parameters."""

    n_epochs: int
    learning_rate: float
    shard_size: int
    confidence: _Confidence
    hinge: bool
    smoothing: float
    adagrad: bool
    dtype: Any


class _Margins(NamedTuple):
    """Logarithms of row sums (m,), column sums (n,) and the total; NaN where a sum is zero."""

    rows: np.ndarray
    cols: np.ndarray
    total: float


class _Shard(NamedTuple):
    """One shard as the kernel wants it: the observed cells by rows, and the two parts of pmi*."""

    indptr: np.ndarray  # (a + 1,)
    indices: np.ndarray  # (nnz,) column within the shard
    target: np.ndarray  # (nnz,) pmi
    weight: np.ndarray  # (nnz,) confidence
    row_part: np.ndarray  # (a,) log x_i* - log |D|
    col_part: np.ndarray  # (b,) log x_*j


def _texts(documents: Any, name: str = "documents") -> list[list[str]]:
    if isinstance(documents, (str, bytes, dict)) or not isinstance(documents, Iterable):
        raise TypeError(f"{name} must be sequences of tokens, got {type(documents).__name__}")
    texts = []
    for document in documents:
        if isinstance(document, (str, bytes)) or not isinstance(document, Iterable):
            raise TypeError(f"{name} must hold sequences of tokens, got {type(document).__name__}: split it first")
        texts.append(list(document))
        if not all(isinstance(token, str) for token in texts[-1]):
            raise TypeError(f"{name} must hold sequences of strings")
    return texts


def _chunk_texts(chunk: Any) -> list[list[str]]:
    """The documents of a chunk: as they are, or from all tokens and the number of each one's document."""
    if not (isinstance(chunk, tuple) and len(chunk) == 2 and isinstance(chunk[0], np.ndarray)):
        return _texts(chunk, "chunk")
    tokens, document = chunk[0], to_numpy(check_array(chunk[1], "chunk[1]", ndim=1, dtype="integer", min_size=0))
    if tokens.dtype.kind not in "OU" or tokens.shape != document.shape:
        raise ValueError(f"chunk must hold strings and numbers of one length, got {tokens.shape} {tokens.dtype}")
    bounds = np.flatnonzero(document[1:] != document[:-1]) + 1
    return _texts([part.tolist() for part in np.split(tokens, bounds)], "chunk")


def _vocabulary(counted: dict[str, int], min_count: int, max_vocab: int | None, name: str) -> tuple[str, ...]:
    """Tokens that are frequent enough, the most frequent first."""
    ordered = sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))
    vocabulary = tuple(token for token, count in ordered if count >= min_count)[:max_vocab]
    if not vocabulary:
        raise ValueError(f"{name} must hold a token at least min_count={min_count} times, got {len(counted)} tokens")
    return vocabulary


def _numbered(texts: list[list[str]], vocabulary: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Number of each token of the vocabulary, in the order of the texts, and of its document."""
    number = {token: i for i, token in enumerate(vocabulary)}
    kept = [[number[token] for token in text if token in number] for text in texts]
    ids = np.fromiter(chain.from_iterable(kept), dtype=np.int64)  # (number of tokens left,)
    return ids, np.repeat(np.arange(len(kept)), [len(text) for text in kept])


def _near(ids: np.ndarray, document: np.ndarray, window: int) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """Each distance up to ``window`` with the numbers of all pairs of tokens that far apart in one document."""
    longest = int(np.bincount(document).max()) if len(document) else 0
    for distance in range(1, min(window, longest - 1) + 1):
        together = document[distance:] == document[:-distance]
        yield distance, (ids[:-distance][together], ids[distance:][together])


def _added(keys: np.ndarray, counts: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Keys in ascending order, each once, and the sums of their non-negative counts, in 64-bit integers."""
    unique, index = np.unique(keys, return_inverse=True)
    total = np.zeros(len(unique), np.int64)
    np.add.at(total, index.reshape(-1), counts)
    if (total < 0).any() or np.bincount(index.reshape(-1), counts.astype(np.float64)).max(initial=0.0) > 2.0**63:
        raise ValueError(f"{name} must leave counts within 64 bits")
    return unique, total


def _check_confidence(base: float, scale: float, exponent: float) -> _Confidence:
    return _Confidence(
        check_float(base, "base", low=0), check_float(scale, "scale", low=0), check_float(exponent, "exponent", low=0)
    )


def _counts(X: Any) -> Any:
    """Counts as a dense array as it came, or as a canonical CSR array."""
    X = check_sparse(X, "X", low=0) if sp.issparse(X) else check_array(X, "X", ndim=2, low=0)
    if not _sums(X, 1).any():
        raise ValueError("X must hold at least one count above zero")
    return X


def _sums(X: Any, axis: int) -> np.ndarray:
    """Sums along an axis, on the host, in double precision."""
    sums = X.sum(axis=axis) if sp.issparse(X) else to_numpy(array_namespace(X).sum(X, axis=axis))
    return np.asarray(sums, dtype=np.float64).reshape(-1)


def _check_loss(loss: float) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            "learning_rate, n_components, base, scale, exponent and smoothing must keep the loss finite on these "
            f"counts X, got {loss}"
        )


def _margin(sums: np.ndarray, smoothing: float) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(sums + smoothing)
    return np.where(np.isfinite(logs), logs, np.nan)


def _margins(rows: np.ndarray, cols: np.ndarray, total: float, smoothing: float) -> _Margins:
    return _Margins(_margin(rows, smoothing), _margin(cols, smoothing), math.log(total + smoothing))


def _targets(xp: Any, X: Array, smoothing: float) -> Array:
    rows, cols = xp.sum(X, axis=1, keepdims=True) + smoothing, xp.sum(X, axis=0, keepdims=True) + smoothing
    blank = lambda sums: xp.where(sums > 0, xp.log(xp.where(sums > 0, sums, 1.0 + 0 * sums)), xp.nan + 0 * sums)  # noqa: E731
    seen = xp.log(xp.where(X > 0, X, xp.ones_like(X)))
    return seen + xp.log(xp.sum(X) + smoothing) - blank(rows) - blank(cols)


def _weights(xp: Any, X: Array, confidence: _Confidence) -> Array:
    power = xp.where(X > 0, X, xp.ones_like(X)) ** confidence.exponent
    return confidence.base + confidence.scale * power


def _shard(
    X: sp.csr_array, rows: np.ndarray, cols: np.ndarray, margins: _Margins, confidence: _Confidence, dtype: Any
) -> _Shard:
    part = sp.csr_array(X[rows][:, cols])
    part.sort_indices()
    r = np.repeat(margins.rows[rows], np.diff(part.indptr))
    target = np.log(part.data) + margins.total - r - margins.cols[cols][part.indices]
    with np.errstate(over="ignore"):
        weight = _weights(np, part.data, confidence).astype(dtype)
    if not np.isfinite(weight).all():
        raise ValueError("base, scale and exponent must give finite weights to the counts of X or X_shard")
    return _Shard(
        part.indptr.astype(np.int64),
        part.indices.astype(np.int64),
        target.astype(dtype),
        weight,
        (margins.rows[rows] - margins.total).astype(dtype),
        margins.cols[cols].astype(dtype),
    )


# --- the cells: predictions in, derivatives out -----------------------------------------------------------------------


def _cells(P: np.ndarray, shard: _Shard, hinge: bool) -> tuple[np.ndarray, float]:
    """Derivative G of every cell's loss, in the place of the predictions P, and the raw loss."""
    losses, error = np.zeros(P.shape[0]), np.empty_like(shard.target)
    (_rows_in_threads if P.size > CELLS_FOR_THREADS else _rows_in_turn)(P, shard, hinge, losses, error)
    return P, float(losses.sum())


@njit(cache=True, error_model="numpy", parallel=True)
def _rows_in_threads(P: np.ndarray, shard: _Shard, hinge: bool, losses: np.ndarray, error: np.ndarray) -> None:
    for i in prange(P.shape[0]):
        _row(P[i], i, shard, hinge, losses, error)


@njit(cache=True, error_model="numpy")
def _rows_in_turn(P: np.ndarray, shard: _Shard, hinge: bool, losses: np.ndarray, error: np.ndarray) -> None:
    for i in range(P.shape[0]):
        _row(P[i], i, shard, hinge, losses, error)


@njit(cache=True, error_model="numpy")
def _row(row: np.ndarray, i: int, shard: _Shard, hinge: bool, losses: np.ndarray, error: np.ndarray) -> None:
    """Row i of P becomes row i of G. The observed cells step aside while one pass takes the whole row as unobserved."""
    first, last = shard.indptr[i], shard.indptr[i + 1]
    for k in range(first, last):
        j = shard.indices[k]
        error[k] = row[j] - shard.target[k]
        row[j] = -100.0 - shard.row_part[i] - shard.col_part[j]  # e = -100 costs nothing
    if hinge:
        losses[i] = _hinge_row(row, shard.row_part[i], shard.col_part)
    else:
        row[:] = 0.0
    for k in range(first, last):
        pull = shard.weight[k] * error[k]
        losses[i] += 0.5 * pull * error[k]
        row[shard.indices[k]] = pull


_NUMBERS = {"reassoc", "contract", "nnan", "nsz"}  # sums and products of finite numbers, none of which cancel


@njit(cache=True, error_model="numpy")
def _hinge_row(row: np.ndarray, row_part: float, col_part: np.ndarray) -> float:
    """Unobserved cells of one row: row becomes sigmoid(row - pmi*); returns the sum of softplus(row - pmi*)."""
    loss = 0.0
    for start in range(0, len(row), FACTORS_PER_LOG):
        stop = start + FACTORS_PER_LOG
        positive, product = _hinge_lanes(row[start:stop], row_part, col_part[start:stop])
        loss += positive + math.log(product)
    return loss


@njit(cache=True, error_model="numpy", fastmath=_NUMBERS)
def _hinge_lanes(row: np.ndarray, row_part: float, col_part: np.ndarray) -> tuple[float, float]:
    """With y = exp(-|e|): softplus(e) = max(e, 0) + log(1 + y); the factors 1 + y are multiplied, logged by the caller.

    Slices and plain arithmetic only, so that LLVM works on as many cells at a time as the processor has lanes.
    """
    zero, half, one = row.dtype.type(0.0), row.dtype.type(0.5), row.dtype.type(1.0)
    positive, product = zero, one
    for j in range(len(row)):
        e = row[j] + row_part + col_part[j]
        size = e if e > zero else -e
        y = _exp_minus(size)
        q = one / (one + y)
        positive += half * (e + size)
        product *= one + y
        row[j] = q if e > zero else y * q
    return positive, product


def _exp_minus(a: Any) -> Any:
    """exp(-a) for a >= 0, inside kernels only: see the overload."""
    raise NotImplementedError


@overload(_exp_minus, inline="always", strict=False)
def _exp_minus_by_type(a: Any) -> Any:
    """exp(-a) = 2^-n exp(r), |r| <= log(2) / 2, as a polynomial and a shift: LLVM can run both in lanes."""
    double = a == types.float64
    number = np.float64 if double else np.float32
    top, half, one, per_log2 = number(708 if double else 87), number(0.5), number(1.0), number(1.4426950408889634)
    high, low = number(0.693145751953125), number(1.4286068203094172e-6)  # log 2 in two parts, the first exact
    c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12 = (number(1.0 / math.factorial(k)) for k in range(2, 13))
    bias, fraction = np.int64(1023 if double else 127), np.int64(52 if double else 23)

    def exp_minus(a: Any) -> Any:
        a = top if a > top else a
        n = np.int32(a * per_log2 + half)
        k = number(n)
        r = (k * high - a) + k * low
        q = c6 + r * (c7 + r * (c8 + r * (c9 + r * (c10 + r * (c11 + r * c12))))) if double else c6
        p = one + r * (one + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * q)))))
        return p * _from_bits(np.int64(bias - n) << fraction, p)

    return exp_minus


def _operation(function: Any) -> Any:
    """Numba's ``intrinsic``; what it returns is called without the typing context, so it is left untyped."""
    return intrinsic(function)


@_operation
def _from_bits(typingctx: Any, bits: Any, like: Any) -> Any:
    """Floating-point number with these bits, of the type of ``like``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        width, kind = (64, ir.DoubleType()) if signature.return_type == types.float64 else (32, ir.FloatType())
        return builder.bitcast(builder.trunc(args[0], ir.IntType(width)) if width == 32 else args[0], kind)

    return like(types.int64, like), codegen


def _cells_array_api(xp: Any, P: Array, target: Array, weight: Array, seen: Array, hinge: bool) -> tuple[Array, float]:
    """The same as whole-array arithmetic; cells without a target (NaN) count for nothing."""
    known = ~xp.isnan(target)
    zero = xp.zeros_like(P)
    e = xp.where(known, P - xp.where(known, target, zero), zero)
    y = xp.exp(-xp.abs(e))
    soft = xp.where(e > 0, 1.0 / (1.0 + y), y / (1.0 + y)) if hinge else zero
    cost = xp.log1p(y) + xp.where(e > 0, e, zero) if hinge else zero
    G = xp.where(known, xp.where(seen, weight * e, soft), zero)
    return G, float(xp.sum(xp.where(known, xp.where(seen, 0.5 * weight * e * e, cost), zero)))


def _cells_cupy(xp: Any, P: Array, target: Array, weight: Array, seen: Array, hinge: bool) -> tuple[Array, float]:
    """The same in one pass over the cells on a CUDA device."""
    import cupy

    kernel = cupy.ElementwiseKernel(
        "T p, T t, T w, bool seen, bool hinge",
        "T g, T cost",
        """
        T e = p - t, y = exp(-abs(e)), q = T(1) / (T(1) + y);
        g = seen ? w * e : hinge ? (e > T(0) ? q : y * q) : T(0);
        cost = seen ? T(0.5) * w * e * e : hinge ? log1p(y) + max(e, T(0)) : T(0);
        """,
        "swivel_cells",
    )
    G, cost = kernel(P, target, weight, seen, hinge)
    return G, float(cost.sum(dtype=cupy.float64))


# --- the optimiser ----------------------------------------------------------------------------------------------------


@njit(cache=True, error_model="numpy")
def _step(
    V: np.ndarray, squares: np.ndarray, index: np.ndarray, grad: np.ndarray, factor: float, rate: float, adagrad: bool
) -> None:
    """One step for the vectors ``V[index]``, in place."""
    decay, epsilon = V.dtype.type(DECAY), V.dtype.type(EPSILON)
    for r in range(len(index)):
        v, s = V[index[r]], squares[index[r]]
        for k in range(len(v)):
            g = grad[r, k] * factor
            s[k] = s[k] + g * g if adagrad else decay * s[k] + (1 - decay) * g * g
            v[k] -= rate * g / np.sqrt(s[k] + (0 if adagrad else epsilon))


def _step_array_api(
    xp: Any, V: Array, squares: Array, index: np.ndarray, g: Array, rule: _Rule, to: Any
) -> tuple[Array, Array]:
    """The same, out of place: rows are put back through a permutation, since the array API has no scatter."""
    s = xp.take(squares, to(index), axis=0)
    s = s + g * g if rule.adagrad else DECAY * s + (1 - DECAY) * g * g
    v = xp.take(V, to(index), axis=0) - rule.learning_rate * g / xp.sqrt(s + (0.0 if rule.adagrad else EPSILON))
    others = np.setdiff1d(np.arange(V.shape[0]), index)
    place = to(np.argsort(np.concatenate([index, others])))
    whole = lambda new, old: xp.take(xp.concat([new, xp.take(old, to(others), axis=0)]), place, axis=0)  # noqa: E731
    return whole(v, V), whole(s, squares)


def _fold_in(
    C: np.ndarray, target: np.ndarray, weight: np.ndarray, seen: np.ndarray, hinge: bool, n_steps: int = 30
) -> np.ndarray:
    """Vectors (r, d) of rows with these targets (r, n), by Newton's method with step halving, row by row at once."""
    r, d = len(target), C.shape[1]
    W, cost = np.zeros((r, d)), np.full(r, np.inf)
    step, scale = np.zeros((r, d)), np.ones((r, 1))
    for _ in range(n_steps):
        trial = W - scale * step
        e = trial @ C.T - target
        y = np.exp(-np.abs(e))
        p = np.where(e > 0, 1.0, y) / (1.0 + y)
        soft = (np.log1p(y) + np.maximum(e, 0.0)) * hinge
        new = np.where(seen, 0.5 * weight * e * e, soft).sum(axis=1) + 0.5 * RIDGE * (trial**2).sum(axis=1)
        better = new <= cost
        W[better], scale[~better] = trial[better], scale[~better] / 2
        if not better.any() or np.abs(cost[better] - new[better]).max() <= 1e-10 * (1.0 + np.abs(new).max()):
            break
        cost[better], scale[better] = new[better], 1.0
        G = np.where(seen, weight * e, p * hinge) @ C + RIDGE * trial
        curvature = np.where(seen, weight, p * (1.0 - p) * hinge)[better]  # (rows that moved, n)
        H = np.empty((len(curvature), d, d))
        for k in range(d):
            H[:, k] = curvature @ (C * C[:, k : k + 1])
        try:
            step[better] = np.linalg.solve(H + RIDGE * np.eye(d), G[better][:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:
            raise ValueError("X must hold counts whose weights leave the ridge visible: they are too large") from None
    return W
