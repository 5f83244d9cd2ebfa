r"""Coordinated row sampling: :math:`A^\top B` from samples of A and B that were drawn apart, with a shared seed.

Priority sampling (exactly k rows) and threshold sampling (k rows on average) of Daliri, Freire, Li and Musco (2025),
with merging, streaming and least squares over a join; CountSketch and a Johnson-Lindenstrauss sketch as baselines.

Reference: M. Daliri, J. Freire, D. Li, C. Musco, ICLR 2025, arXiv:2501.17836.
Chapter: notebooks/sketching/coordinated_sampling.ipynb.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numba import njit

from algokit.arrays import Array, array_namespace, from_numpy, is_array, kind_of, to_numpy
from algokit.checks import (
    AlgokitWarning,
    check_allocation,
    check_array,
    check_float,
    check_int,
    check_one_of,
    check_state,
)

__all__ = [
    "CoordinatedSampler",
    "CoordinatedSummary",
    "JoinFit",
    "RowSketch",
    "countsketch",
    "jl_sketch",
    "merge_sketches",
    "shared_uniforms",
    "sketch_rows",
    "sketched_join_lstsq",
    "sketched_product",
]

METHODS = ("priority", "threshold", "threshold-adaptive")
WEIGHTS = ("norm2", "uniform", "leverage")
MAX_SEED = 2**63 - 1
BLOCK = 2**22  # numbers that work on an array of another kind copies at a time


def shared_uniforms(keys: Any, *, seed: int) -> np.ndarray:
    r"""Uniform numbers :math:`h(\text{key})\in(0,1)` that everybody who knows the seed computes alike.

    Parameters
    ----------
    keys : array-like of int, str or bytes, shape (n,)
        Join keys. Strings are hashed as UTF-8; a string and its bytes are the same key.
    seed : int
        The shared seed, in [0, 2^63).

    Returns
    -------
    numpy.ndarray, shape (n,), float64
        Never 0 and never 1.

    Raises
    ------
    TypeError
        If keys are neither integers nor strings.
    ValueError
        If ``keys`` is not one-dimensional or is empty, or the seed is out of range.

    Notes
    -----
    No stream of random numbers is consumed: h is a function (two rounds of the splitmix64 mixer), so the order in which
    rows arrive, the machine and the number of threads do not matter.

    Examples
    --------
    >>> shared_uniforms([3, 14, 15], seed=0).round(4)
    array([0.1291, 0.6547, 0.5619])
    >>> bool(shared_uniforms(["a", "b"], seed=0)[1] == shared_uniforms([b"b"], seed=0)[0])
    True
    """
    keys = _keys(keys, None)
    return _uniforms(keys, _state(seed, 0))


@dataclass(frozen=True, eq=False)
class RowSketch:
    r"""Sampled rows of a matrix, with what is needed to undo the sampling; made by :func:`sketch_rows`.

    Attributes
    ----------
    keys : numpy.ndarray, shape (m,), int64
        Keys of the rows kept, ascending (64-bit fingerprints where the keys were strings).
    rows : array or scipy.sparse.csr_array, shape (m, d)
        The rows themselves, of the kind, and on the device, of the matrix.
    norms : numpy.ndarray, shape (m,)
        :math:`\|A_i\|_2` of each (or what stands in for it: 1 for uniform weights, the root of the leverage).
    tau : float
        Threshold for :math:`\sqrt{h(i)}/\|A_i\|`; infinite if every non-zero row was kept. It is the root of the
        paper's :math:`\tau`: roots cannot overflow where squared norms would.
    size : int
        Rows asked for, k.
    method, weights : str
        As given to :func:`sketch_rows`.
    seed : int
        The shared seed.
    n_rows_seen : int
        Rows of the matrix, zero rows included.
    """

    keys: np.ndarray
    rows: Any
    norms: np.ndarray
    tau: float
    size: int
    method: str
    weights: str
    seed: int
    n_rows_seen: int

    @property
    def n_words(self) -> int:
        """Numbers stored: keys, norms, and of the rows every entry (dense) or every non-zero with its column."""
        stored = 2 * self.rows.nnz if sp.issparse(self.rows) else math.prod(self.rows.shape)
        return int(stored + 2 * len(self.keys) + 1)


class JoinFit(NamedTuple):
    """Least squares over the rows that two tables share.

    Attributes
    ----------
    coef : array, shape (d,), or (d, m) for m > 1 targets
        Coefficients.
    n_common : int
        Sampled rows with a key in both sketches.
    weights : numpy.ndarray, shape (n_common,)
        One over the probability of each: how many joined rows it stands for.
    """

    coef: Array
    n_common: int
    weights: np.ndarray


def sketch_rows(
    A: Any, size: int, *, keys: Any = None, seed: int, method: str = "priority", weights: str = "norm2"
) -> RowSketch:
    r"""Sample rows of A with probability growing with their norm, by a hash of their keys.

    ``"priority"`` keeps the k rows of smallest rank :math:`h(i)/\|A_i\|^2`; the next rank is the threshold
    :math:`\tau`. ``"threshold"`` keeps row i if :math:`h(i)\le t\|A_i\|^2` with :math:`t=k/\|A\|_F^2`;
    ``"threshold-adaptive"`` raises t until k rows are expected although probabilities stop at 1.

    Parameters
    ----------
    A : array or sparse array, shape (n, d)
        NumPy, SciPy sparse, CuPy, or another dense array; float32 stays float32. From a GPU only the n norms come to
        the host (for leverages a d by d matrix, too), where the rows are chosen; the rows stay where they are.
    size : int
        Rows to keep, k: exactly (at most, for short tables) or on average.
    keys : array-like of int, str or bytes, shape (n,), optional
        Distinct; by default the row numbers.
    seed : int
        The shared seed: sketches can be combined only if it is the same.
    method : {"priority", "threshold", "threshold-adaptive"}, default "priority"
        The rule.
    weights : {"norm2", "uniform", "leverage"}, default "norm2"
        What takes the place of :math:`\|A_i\|^2`: itself, 1, or the leverage :math:`A_i(A^\top A)^+A_i^\top`. Whatever
        it is, products stay unbiased.

    Returns
    -------
    RowSketch
        The sample. Zero rows are never in it.

    Raises
    ------
    TypeError
        If ``A`` or ``keys`` is not of the right kind.
    ValueError
        If ``A`` is not a finite matrix, ``keys`` repeat or are too few, or a parameter is out of range.

    Notes
    -----
    One pass, O(nnz(A) + n). Source: [1]_, section 2. (The rank of the row that defines :math:`\tau` must not be that of
    a row kept: the estimate would be biased.)

    .. [1] M. Daliri, J. Freire, D. Li, C. Musco, Matrix product sketching via coordinated sampling, ICLR 2025.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> sketch = sketch_rows(A, 2, seed=0)
    >>> sketch.keys, sketch.rows.shape
    (array([0, 3]), (2, 2))
    """
    table = _table(A)
    size = check_int(size, "size", low=1)
    keys = _keys(keys, table.shape[0])
    state = _state(seed, 0)
    check_one_of(method, "method", METHODS)
    check_one_of(weights, "weights", WEIGHTS)
    norms = _row_norms(table)
    if weights == "uniform":
        norms = (norms > 0).astype(np.float64)
    elif weights == "leverage":
        norms = _root_leverage(table, norms)
    ranks = _ranks(keys, norms, state)
    if method == "priority":
        chosen, tau = _smallest(ranks, keys, size)
    else:
        tau = _root_threshold(norms, size, adaptive=method == "threshold-adaptive")
        chosen = np.flatnonzero(ranks <= tau) if math.isfinite(tau) else np.flatnonzero(norms > 0)
    chosen = chosen[np.argsort(keys[chosen])]
    rows = _take(table, chosen)
    return RowSketch(keys[chosen], rows, norms[chosen], tau, size, method, weights, int(seed), table.shape[0])


def merge_sketches(first: RowSketch, *others: RowSketch) -> RowSketch:
    """The sketch of several tables stacked, from their sketches alone.

    Parameters
    ----------
    first, *others : RowSketch
        Of the same seed, size, method (``"priority"`` or ``"threshold"``) and weights (not leverage, which depends on
        the whole table), with disjoint keys.

    Returns
    -------
    RowSketch
        What :func:`sketch_rows` gives for the stacked tables: the same for ``"priority"``, the same up to rounding of
        the threshold for ``"threshold"``.

    Raises
    ------
    TypeError
        If an argument is not a RowSketch.
    ValueError
        If they do not belong together, or keys overlap.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.random.default_rng(0).normal(size=(100, 3))
    >>> parts = [sketch_rows(A[:60], 10, keys=range(60), seed=1), sketch_rows(A[60:], 10, keys=range(60, 100), seed=1)]
    >>> merged, whole = merge_sketches(*parts), sketch_rows(A, 10, seed=1)
    >>> bool((merged.keys == whole.keys).all()), merged.tau == whole.tau
    (True, True)
    """
    sketches = (first, *others)
    _check_sketch(first, "first")
    for sketch in others:
        _check_sketch(sketch, "others")
    for name in ("seed", "size", "method", "weights"):
        if len({getattr(s, name) for s in sketches}) > 1:
            raise ValueError(f"sketches must have the same {name}")
    if len({s.rows.shape[1] for s in sketches}) > 1 or len({sp.issparse(s.rows) for s in sketches}) > 1:
        raise ValueError("sketches must have rows of the same width and kind")
    if first.method == "threshold-adaptive":
        raise ValueError("sketches must not be 'threshold-adaptive': their threshold cannot be found from the parts")
    if first.weights == "leverage":
        raise ValueError("sketches must not have 'leverage' weights: these depend on the whole table")
    keys = np.concatenate([s.keys for s in sketches])
    _check_distinct(keys, "sketches must have disjoint keys")
    norms = np.concatenate([s.norms for s in sketches])
    ranks = _ranks(keys, norms, _state(first.seed, 0))
    if first.method == "priority":
        # each part's k + 1 smallest ranks are here, so the k + 1 smallest of the whole are; a tau is no row to keep
        pool = np.concatenate([ranks, [s.tau for s in sketches]])
        tau = float(np.partition(pool, first.size)[first.size]) if len(pool) > first.size else math.inf
        chosen = _smallest(ranks, keys, first.size)[0]
    else:
        tau = 1 / math.hypot(*(1 / s.tau for s in sketches)) if any(s.tau < math.inf for s in sketches) else math.inf
        chosen = np.flatnonzero(ranks <= tau)
    chosen = chosen[np.argsort(keys[chosen])]
    if sp.issparse(first.rows):
        rows = sp.csr_array(sp.vstack([s.rows for s in sketches], format="csr"))[chosen]
    else:
        parts = [_of_kind(s.rows, first.rows) for s in sketches]
        rows = _take(array_namespace(first.rows).concat(parts, axis=0), chosen)
    seen = sum(s.n_rows_seen for s in sketches)
    return RowSketch(keys[chosen], rows, norms[chosen], tau, first.size, first.method, first.weights, first.seed, seen)


def sketched_product(SA: RowSketch, SB: RowSketch) -> Any:
    r"""Unbiased estimate of :math:`A^\top B` from two sketches.

    .. math:: W=\sum_{i\in\mathcal K_A\cap\mathcal K_B}
              \frac{A_i^\top B_i}{\min\{1,\;\|A_i\|^2\tau_A,\;\|B_i\|^2\tau_B\}}.

    Parameters
    ----------
    SA, SB : RowSketch
        Sketches of A, shape (n, d), and B, shape (n, m), by the same seed and method.

    Returns
    -------
    array, shape (d, m), or scipy.sparse.csr_array if both have sparse rows
        W; of the kind of the rows of ``SA``.

    Raises
    ------
    TypeError
        If an argument is not a RowSketch.
    ValueError
        If seeds or methods differ.

    Warns
    -----
    AlgokitWarning
        If no key is in both sketches: then the estimate is zero.

    Examples
    --------
    >>> import numpy as np
    >>> A, B = np.arange(8.0).reshape(4, 2), np.ones((4, 1))
    >>> sketched_product(sketch_rows(A, 4, seed=0), sketch_rows(B, 4, seed=0))  # nothing left out: exact
    array([[12.],
           [16.]])
    """
    a, b, p = _join(SA, SB, "SB")
    if sp.issparse(SA.rows) and sp.issparse(SB.rows):
        scaled = sp.csr_array(sp.diags_array(1 / p) @ SA.rows[a]) if len(p) else SA.rows[a]
        return sp.csr_array(scaled.T @ SB.rows[b])
    if not (sp.issparse(SA.rows) or sp.issparse(SB.rows) or kind_of(SA.rows) == "numpy"):
        xp = array_namespace(SA.rows)
        right = _take(_of_kind(SB.rows, SA.rows), b) / from_numpy(p[:, None], like=SA.rows)
        return xp.matrix_transpose(xp.astype(_take(SA.rows, a), right.dtype)) @ right
    left, right = (s.rows if sp.issparse(s.rows) else to_numpy(s.rows) for s in (SA, SB))
    product = (right[b].T @ (left[a] / p[:, None]) if sp.issparse(right) else left[a].T @ (right[b] / p[:, None])).T
    product = product if sp.issparse(right) else product.T
    return from_numpy(np.ascontiguousarray(product), like=SA.rows)


def sketched_join_lstsq(SA: RowSketch, Sb: RowSketch, *, ridge: float = 0.0) -> JoinFit:
    r"""Least squares of one table's column on another's, over the keys that both have, without joining the tables.

    Minimises :math:`\sum_{i}\frac1{p_i}\|A_ix-b_i\|^2+\lambda\|x\|^2` over the sampled common rows, with :math:`p_i`
    the denominators of :func:`sketched_product`: an unbiased estimate of the objective on the whole join, for every x.

    Parameters
    ----------
    SA : RowSketch
        Sketch of the features, shape (n, d).
    Sb : RowSketch
        Sketch of the targets, shape (n, m), best with ``weights="uniform"``: a target close to 0 matters as much as any
        other. (A target of exactly 0 is taken for a missing key, whatever the weights: add a constant column.)
    ridge : float, default 0.0
        Penalty :math:`\lambda`, non-negative, in the units of the objective on the whole join.

    Returns
    -------
    JoinFit
        Coefficients, number of sampled common rows, and their weights.

    Raises
    ------
    TypeError
        If an argument is not of the right kind.
    ValueError
        If seeds or methods differ, or ``ridge`` is negative.

    Warns
    -----
    AlgokitWarning
        If fewer common rows than columns were sampled and ``ridge`` is 0: then the solution of least norm is returned.

    Notes
    -----
    This estimator is the book's own; the paper has a section on sketched regression. The common rows, weighted, are
    solved for on the host, wherever the tables lie.

    Examples
    --------
    >>> import numpy as np
    >>> A, b = np.eye(3), np.array([[1.0], [2.0], [3.0]])
    >>> sketches = sketch_rows(A, 5, seed=0), sketch_rows(b[:2], 5, seed=0, weights="uniform")
    >>> sketched_join_lstsq(*sketches, ridge=1.0)
    JoinFit(coef=array([0.5, 1. , 0. ]), n_common=2, weights=array([1., 1.]))
    """
    ridge = check_float(ridge, "ridge", low=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlgokitWarning)
        a, b, p = _join(SA, Sb, "Sb")
    d = SA.rows.shape[1]
    if len(p) < d and ridge == 0:
        warnings.warn(f"only {len(p)} common rows were sampled for {d} columns", AlgokitWarning, stacklevel=2)
    left, right = (_take(s.rows, i) for s, i in ((SA, a), (Sb, b)))  # on the device; a small system comes to the host
    left, right = (x.toarray() if sp.issparse(x) else to_numpy(x) for x in (left, right))
    root = np.sqrt(1 / p)[:, None]
    tall = np.concatenate([root * left, math.sqrt(ridge) * np.eye(d)])
    targets = np.concatenate([root * right, np.zeros((d, right.shape[1]))])
    coef = np.linalg.lstsq(tall, targets, rcond=None)[0]
    coef = coef[:, 0] if coef.shape[1] == 1 else coef
    return JoinFit(from_numpy(coef, like=SA.rows), len(p), 1 / p)


class CoordinatedSampler:
    """A row sketch of a stream: blocks of rows come and go, k rows stay.

    Parameters
    ----------
    size : int
        Rows to keep, k.
    seed : int
        The shared seed.
    method : {"priority", "threshold"}, default "priority"
        As in :func:`sketch_rows`.
    weights : {"norm2", "uniform"}, default "norm2"
        As in :func:`sketch_rows`.

    Attributes
    ----------
    sketch_ : RowSketch
        The sketch of all rows so far.

    Examples
    --------
    >>> import numpy as np
    >>> sampler = CoordinatedSampler(4, seed=0)
    >>> for start in (0, 10, 20):
    ...     keys = np.arange(start, start + 10)
    ...     sampler = sampler.partial_fit(np.ones((10, 2)), keys)
    >>> sampler.sketch_.n_rows_seen, len(sampler.sketch_.keys)
    (30, 4)
    """

    def __init__(self, size: int, *, seed: int, method: str = "priority", weights: str = "norm2") -> None:
        self.size = check_int(size, "size", low=1)
        self.seed = check_int(seed, "seed", low=0, high=MAX_SEED)
        self.method = check_one_of(method, "method", METHODS[:2])
        self.weights = check_one_of(weights, "weights", WEIGHTS[:2])

    def partial_fit(self, A: Any, keys: Any) -> CoordinatedSampler:
        """Take in a block of rows.

        Parameters
        ----------
        A : array or sparse array, shape (n, d)
            The rows.
        keys : array-like of int, str or bytes, shape (n,)
            Their keys, never seen before. (A repeated key is noticed only while its row is in the sketch.)

        Returns
        -------
        CoordinatedSampler
            Self.

        Raises
        ------
        TypeError
            If ``A`` or ``keys`` is not of the right kind.
        ValueError
            If ``A`` is not a finite matrix of the same width as before, or keys repeat.
        """
        if keys is None:
            raise TypeError("keys must be given: the row numbers of a block say nothing about the stream")
        block = sketch_rows(A, self.size, keys=keys, seed=self.seed, method=self.method, weights=self.weights)
        before: RowSketch | None = getattr(self, "sketch_", None)
        if before is not None:
            width = before.rows.shape[1]
            if sp.issparse(block.rows) != sp.issparse(before.rows) or block.rows.shape[1] != width:
                raise ValueError(f"A must have {width} columns, and be sparse or dense as the first block was")
            if np.isin(block.keys, before.keys).any():
                raise ValueError("keys must not have been seen before")
            block = merge_sketches(before, block)
        self.sketch_ = block
        return self


class CoordinatedSummary:
    """A row sketch of a table whose rows lie in chunks, on one machine or on many: k rows of each chunk are enough.

    Whatever the chunks and the tree of merges, the sketch is that of all rows at once: exactly, to the last bit, for
    ``"priority"``; for ``"threshold"`` the threshold is the same to rounding, and with it the rows (but for a row whose
    rank lies within rounding of the threshold).

    Parameters
    ----------
    size : int
        Rows to keep, k.
    seed : int
        The shared seed.
    method : {"priority", "threshold"}, default "priority"
        As in :func:`sketch_rows`.
    weights : {"norm2", "uniform"}, default "norm2"
        As in :func:`sketch_rows`.

    Raises
    ------
    TypeError, ValueError
        If a parameter is not one of these.

    Notes
    -----
    A chunk is a pair of keys, shape (n,), and rows, shape (n, d), dense or sparse. Keys of different chunks are
    different rows. A repeated key is refused within a chunk, and in a merge if both its rows are still in the sketches;
    where one has been dropped nobody can tell, and they count as two rows. (The same row twice under the same key has
    the same rank twice: if the sketch is to hold it, it is refused.)

    The state holds at most k rows (k on average for ``"threshold"``) with their keys and norms; of rows on a GPU, only
    those kept come to the host. Chunks are all dense or all sparse.

    Examples
    --------
    >>> import numpy as np
    >>> A, summary = np.random.default_rng(0).normal(size=(100, 3)), CoordinatedSummary(10, seed=1)
    >>> a = summary.update(summary.init(), (np.arange(60), A[:60]))
    >>> b = summary.update(summary.init(), (np.arange(60, 100), A[60:]))
    >>> merged, whole = summary.finish(summary.merge(a, b)), sketch_rows(A, 10, seed=1)
    >>> bool((merged.keys == whole.keys).all()), merged.tau == whole.tau
    (True, True)
    """

    _DENSE = ("keys", "norms", "rows", "rule", "seen", "tau")
    _SPARSE = (*_DENSE, "indices", "indptr", "width")

    def __init__(self, size: int, *, seed: int, method: str = "priority", weights: str = "norm2") -> None:
        self.size = check_int(size, "size", low=1, high=2**62)
        self.seed = check_int(seed, "seed", low=0, high=MAX_SEED)
        self.method = check_one_of(method, "method", METHODS[:2])
        self.weights = check_one_of(weights, "weights", WEIGHTS[:2])
        self._rule = np.array([self.size, self.seed, METHODS.index(method), WEIGHTS.index(weights)])

    def init(self) -> dict[str, np.ndarray]:
        """State of no rows: it takes its width from the first chunk.

        Returns
        -------
        dict of str to numpy.ndarray
            ``keys`` (0,), ``norms`` (0,), ``rows`` (0, 0), ``tau`` (), ``seen`` () and ``rule`` (4,), the parameters.
        """
        nothing = RowSketch(np.zeros(0, np.int64), np.zeros((0, 0)), np.zeros(0), math.inf, *self._parameters(), 0)
        return self._state_of(nothing)

    def update(
        self, state: dict[str, np.ndarray], chunk: tuple[Any, Any], rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """State after one more chunk.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            A state.
        chunk : tuple
            Keys, shape (n,), integers, strings or bytes, and rows, shape (n, d), as :func:`sketch_rows` takes them; n
            may be zero.
        rng : numpy.random.Generator, optional
            Ignored: the hash of the keys and the shared seed decide.

        Returns
        -------
        dict of str to numpy.ndarray
            Keys, norms and rows kept, the threshold and the number of rows seen. Sparse rows are kept as CSR:
            their values are ``rows``, with ``indices``, ``indptr`` and ``width``.

        Raises
        ------
        TypeError, ValueError
            If ``state`` is not a state of this summary, ``chunk`` not such a pair, not finite, of another width or of
            another kind than the state, or a key repeats.
        """
        before = self._sketch_of(state, "state")
        if not isinstance(chunk, tuple) or len(chunk) != 2:
            raise TypeError(f"chunk must be a tuple of keys and rows, got {type(chunk).__name__}")
        keys, rows = chunk
        if keys is None:
            raise TypeError("chunk must hold keys: the row numbers of a chunk say nothing about the table")
        if getattr(rows, "ndim", 0) == 2 and rows.shape[0] == 0 and len(keys) == 0:
            return dict(state)
        try:
            new = sketch_rows(rows, self.size, keys=keys, seed=self.seed, method=self.method, weights=self.weights)
        except (TypeError, ValueError) as error:
            raise type(error)(f"chunk must hold keys and rows A as sketch_rows takes them: {error}") from error
        if not sp.issparse(new.rows):
            new = replace(new, rows=to_numpy(new.rows))
        return self._state_of(self._merged(before, new, "chunk"))

    def merge(self, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """State of the rows of both.

        Parameters
        ----------
        a, b : dict of str to numpy.ndarray
            States.

        Returns
        -------
        dict of str to numpy.ndarray
            The state of all their rows.

        Raises
        ------
        TypeError, ValueError
            If they are not states of this summary, or of different widths or kinds, or a key is in both.
        """
        return self._state_of(self._merged(self._sketch_of(a, "a"), self._sketch_of(b, "b"), "b"))

    def finish(self, state: dict[str, np.ndarray]) -> RowSketch:
        """The sketch.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            A state of at least one row.

        Returns
        -------
        RowSketch
            With NumPy or CSR rows; to be combined with any other of the same seed and method.

        Raises
        ------
        TypeError, ValueError
            If it is not a state of this summary, or covers no row.
        """
        sketch = self._sketch_of(state, "state")
        if not sketch.n_rows_seen:
            raise ValueError("state must cover at least one row, got none")
        return sketch

    def _parameters(self) -> tuple[int, str, str, int]:
        return self.size, self.method, self.weights, self.seed

    def _merged(self, a: RowSketch, b: RowSketch, name: str) -> RowSketch:
        if not a.n_rows_seen or not b.n_rows_seen:
            return a if a.n_rows_seen else b
        width, sparse = a.rows.shape[1], sp.issparse(a.rows)
        if b.rows.shape[1] != width or sp.issparse(b.rows) != sparse:
            raise ValueError(f"{name} must have {'sparse' if sparse else 'dense'} rows of {width} columns, as before")
        _check_distinct(np.concatenate([a.keys, b.keys]), f"{name} must have keys not seen before")
        return merge_sketches(a, b)

    def _state_of(self, sketch: RowSketch) -> dict[str, np.ndarray]:
        rows = sketch.rows
        state = {
            "keys": sketch.keys,
            "norms": sketch.norms,
            "rows": rows.data if sp.issparse(rows) else rows,
            "rule": self._rule,
            "seen": np.array(sketch.n_rows_seen),
            "tau": np.array(sketch.tau),
        }
        if sp.issparse(rows):
            state |= {"indices": rows.indices, "indptr": rows.indptr, "width": np.array(rows.shape[1])}
        return state

    def _sketch_of(self, state: Any, name: str) -> RowSketch:
        check_state(state, name, self._SPARSE if isinstance(state, dict) and "indptr" in state else self._DENSE)
        if not np.array_equal(state["rule"], self._rule):
            raise ValueError(f"{name} must be of the same size, seed, method and weights as the summary")
        rows: Any = state["rows"]
        if "indptr" in state:
            parts, shape = (rows, state["indices"], state["indptr"]), (len(state["keys"]), int(state["width"]))
            rows = sp.csr_array(parts, shape=shape)
        tau, seen = float(state["tau"]), int(state["seen"])
        return RowSketch(state["keys"], rows, state["norms"], tau, *self._parameters(), seen)


def countsketch(A: Any, size: int, *, keys: Any = None, seed: int) -> Array:
    """CountSketch of the rows of A: each is added, with a random sign, to one of ``size`` buckets.

    Parameters
    ----------
    A : array or sparse array, shape (n, d)
        As in :func:`sketch_rows`.
    size : int
        Number of buckets.
    keys : array-like of int, str or bytes, shape (n,), optional
        As in :func:`sketch_rows`: the same key falls into the same bucket everywhere.
    seed : int
        The shared seed.

    Returns
    -------
    array, shape (size, d)
        S(A); ``countsketch(A, ...).T @ countsketch(B, ...)`` estimates the product without bias.

    Raises
    ------
    TypeError
        If an argument is not of the right kind.
    ValueError
        If ``A`` is not a finite matrix, or an argument is out of range.

    Notes
    -----
    Source: Clarkson and Woodruff, STOC 2013. O(nnz(A) + size d).

    Examples
    --------
    >>> import numpy as np
    >>> abs(countsketch(np.array([[2.0, 5.0]]), 1, seed=0))
    array([[2., 5.]])
    """
    table, keys, size, state = _linear(A, size, keys, seed)
    words = _words(keys, state)
    buckets, signs = (words >> np.uint64(1)) % np.uint64(size), 1.0 - 2.0 * (words & np.uint64(1)).astype(np.float64)
    buckets = buckets.astype(np.int64)
    if not sp.issparse(table) and kind_of(table) != "numpy":
        return _finite(_bucket_sums(table, buckets, signs, size))
    picks = sp.csr_array((signs, (buckets, np.arange(len(keys)))), shape=(size, len(keys)), dtype=table.dtype)
    return _finite(picks @ table)


def jl_sketch(A: Any, size: int, *, keys: Any = None, seed: int) -> Array:
    r"""Johnson-Lindenstrauss sketch of the rows of A: a product with a dense matrix of :math:`\pm\text{size}^{-1/2}`.

    Parameters
    ----------
    A : array or sparse array, shape (n, d)
        As in :func:`sketch_rows`.
    size : int
        Rows of the sketch.
    keys : array-like of int, str or bytes, shape (n,), optional
        As in :func:`sketch_rows`: the same key has the same signs everywhere.
    seed : int
        The shared seed.

    Returns
    -------
    array, shape (size, d)
        S(A); ``jl_sketch(A, ...).T @ jl_sketch(B, ...)`` estimates the product without bias.

    Raises
    ------
    TypeError
        If an argument is not of the right kind.
    ValueError
        If ``A`` is not a finite matrix, or an argument is out of range.

    Notes
    -----
    Signs come from the hash of the key: nothing is stored (to a GPU they go by blocks, a byte each). O(size nnz(A)).

    Examples
    --------
    >>> import numpy as np
    >>> S = jl_sketch(np.array([[2.0, 5.0]]), 4, seed=0)
    >>> S.shape, float((S**2).sum().round(9))
    ((4, 2), 29.0)
    """
    table, keys, size, state = _linear(A, size, keys, seed)
    step = 1024  # rows at a time: the signs of a block, not of the whole table, are in memory
    if not sp.issparse(table) and kind_of(table) != "numpy":
        xp, total = array_namespace(table), 0.0
        for i in range(0, len(keys), step):
            signs = from_numpy(_signs(keys[i : i + step], size, state).astype(np.int8), like=table)
            total = total + xp.astype(signs, table.dtype) @ table[i : min(i + step, len(keys)), :]
        return _finite(total / math.sqrt(size))
    out = np.zeros((size, table.shape[1]), table.dtype)
    for i in range(0, len(keys), step):
        signs = _signs(keys[i : i + step], size, state).astype(table.dtype, copy=False)
        out += np.asarray((table[i : i + step].T @ signs.T).T if sp.issparse(table) else signs @ table[i : i + step])
    return _finite(out / math.sqrt(size))


# ------------------------------------------------------------------------------------------------- arguments


def _table(A: Any) -> Any:
    """``A`` as a canonical CSR array, a C-ordered NumPy array, or the array of another kind that it is."""
    if sp.issparse(A):
        if A.ndim != 2 or min(A.shape) < 1:
            raise ValueError(f"A must have 2 dimension(s) and at least one row and column, got shape {A.shape}")
        if A.dtype.kind not in "biuf":
            raise TypeError(f"A must be a matrix of real numbers, got dtype {A.dtype}")
        csr = sp.csr_array(A)
        if csr.dtype not in (np.float32, np.float64):
            csr = csr.astype(np.float64)
        if not A.has_canonical_format if A.format == "csr" else True:
            csr = csr.copy() if A.format == "csr" else csr
            csr.sum_duplicates()
        return csr
    dense = check_array(A, "A", ndim=2, finite=False)
    return np.ascontiguousarray(dense) if isinstance(dense, np.ndarray) else dense


def _take(table: Any, places: np.ndarray) -> Any:
    """Rows of a table of any kind, where it lies."""
    if sp.issparse(table) or isinstance(table, np.ndarray):
        return table[places]
    return array_namespace(table).take(table, from_numpy(places, like=table), axis=0)


def _of_kind(x: Array, like: Array) -> Array:
    """``x``, moved only if it is not of the kind of ``like``."""
    return x if kind_of(x) == kind_of(like) else from_numpy(to_numpy(x), like=like)


def _wide(x: Array) -> Array:
    """``x`` in double precision, where its kind has that (JAX does not unless it is told to)."""
    xp = array_namespace(x)
    return xp.astype(x, xp.__array_namespace_info__().dtypes(kind="real floating").get("float64", x.dtype))


def _keys(keys: Any, n: int | None) -> np.ndarray:
    """Keys as int64: integers as they are (64 bits, two's complement), strings by a 64-bit fingerprint."""
    if keys is None and n is not None:
        return np.arange(n, dtype=np.int64)
    if isinstance(keys, (str, bytes, dict, set, frozenset)):
        raise TypeError(f"keys must be a sequence of integers or strings, got {type(keys).__name__}")
    try:
        array = to_numpy(keys) if is_array(keys) else np.asarray(keys if isinstance(keys, range) else list(keys))
    except (TypeError, ValueError):
        raise TypeError(f"keys must be a sequence of integers or strings, got {type(keys).__name__}") from None
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"keys must have 1 dimension and at least one element, got shape {array.shape}")
    if n is not None and len(array) != n:
        raise ValueError(f"keys must be as many as A has rows, {n}, got {len(array)}")
    if array.dtype.kind in "iu":
        whole = array.astype(np.int64, copy=False)  # uint64 wraps around, one to one
    elif array.dtype.kind in "USO" and all(isinstance(k, (str, bytes)) for k in array.tolist()):
        digests = [
            hashlib.blake2b(k.encode() if isinstance(k, str) else k, digest_size=8).digest() for k in array.tolist()
        ]
        whole = np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)
    else:
        raise TypeError(f"keys must be integers, strings or bytes, got dtype {array.dtype}")
    if n is not None:
        _check_distinct(whole, "keys must be distinct")
    return whole


def _check_distinct(keys: np.ndarray, rule: str) -> None:
    if len(keys) > 1 and not (np.diff(keys) > 0).all():  # ascending keys need no sort
        ordered = np.sort(keys)
        if (ordered[1:] == ordered[:-1]).any():
            raise ValueError(f"{rule}, got {ordered[:-1][ordered[1:] == ordered[:-1]][0]} twice")


def _state(seed: int, stream: int) -> np.uint64:
    """Starting state of the hash; each stream is a hash function of its own."""
    return np.uint64(_mixed(np.uint64(check_int(seed, "seed", low=0, high=MAX_SEED)), np.uint64(stream)))


def _linear(A: Any, size: int, keys: Any, seed: int) -> tuple[Any, np.ndarray, int, np.uint64]:
    table = _table(A)
    size = check_int(size, "size", low=1)
    check_allocation((size, table.shape[1]), "size")
    return table, _keys(keys, table.shape[0]), size, _state(seed, 1)


def _finite(sketch: Any) -> Array:
    """Dense form of a linear sketch, refused if ``A`` held a NaN or an infinity: a sum of finite numbers shows it."""
    dense = sketch.toarray() if sp.issparse(sketch) else sketch
    xp = array_namespace(dense)
    if not bool(xp.all(xp.isfinite(dense))):
        raise ValueError("A must be finite and its sums must not overflow")
    return dense


def _bucket_sums(table: Array, buckets: np.ndarray, signs: np.ndarray, size: int) -> Array:
    """Signed rows added up by bucket, for arrays of any kind, in an order that does not change from run to run.

    A matrix with a line per bucket holds the places of its rows; short lines are filled up with places of sign 0.
    """
    xp, d, total = array_namespace(table), table.shape[1], 0.0
    order = np.argsort(buckets, kind="stable")
    line = buckets[order]
    column = np.arange(len(line)) - np.searchsorted(line, line)
    places = np.zeros((size, int(column.max()) + 1), np.int64)
    sign = np.zeros(places.shape)
    places[line, column], sign[line, column] = order, signs[order]
    step = max(1, BLOCK // (size * d))  # columns at a time
    for j in range(0, places.shape[1], step):
        some = places[:, j : j + step]
        rows = xp.reshape(_take(table, some.reshape(-1)), (*some.shape, d))
        some_signs = xp.astype(from_numpy(sign[:, j : j + step, None], like=table), table.dtype)
        total = total + xp.sum(rows * some_signs, axis=1)
    return total


def _check_sketch(sketch: Any, name: str) -> None:
    if not isinstance(sketch, RowSketch):
        raise TypeError(f"{name} must be a RowSketch, as sketch_rows gives it, got {type(sketch).__name__}")


def _join(SA: RowSketch, SB: RowSketch, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the common keys in both sketches, and their probabilities."""
    _check_sketch(SA, "SA")
    _check_sketch(SB, name)
    if SA.seed != SB.seed or SA.method != SB.method:
        got = f"{SA.seed}, {SA.method!r} and {SB.seed}, {SB.method!r}"
        raise ValueError(f"SA and {name} must have the same seed and method, got {got}")
    _, a, b = np.intersect1d(SA.keys, SB.keys, assume_unique=True, return_indices=True)
    if len(a) == 0:
        warnings.warn("no key is in both sketches: the estimate is zero", AlgokitWarning, stacklevel=3)
    root = np.minimum(1.0, np.minimum(SA.norms[a] * SA.tau, SB.norms[b] * SB.tau))
    return a, b, root**2


# ------------------------------------------------------------------------------------------------- which rows


def _smallest(ranks: np.ndarray, keys: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Places of the k smallest finite ranks, ties broken by key, and the rank after them."""
    tau = float(np.partition(ranks, k)[k]) if len(ranks) > k else math.inf
    below = np.flatnonzero(ranks < tau)
    if len(below) < k and tau < math.inf:
        tied = np.flatnonzero(ranks == tau)
        below = np.concatenate([below, tied[np.argsort(keys[tied])][: k - len(below)]])
    return below, tau


def _root_threshold(norms: np.ndarray, k: int, *, adaptive: bool) -> float:
    """Root of t with ``sum(min(1, t * norms**2)) = k``; without ``adaptive``, of ``k / sum(norms**2)``."""
    largest = norms.max()
    if largest == 0 or (adaptive and np.count_nonzero(norms) <= k):
        return math.inf
    w = (norms / largest) ** 2
    t, certain = k / w.sum(), 0
    while adaptive and (sure := int(np.count_nonzero(t * w >= 1))) > certain:
        certain = sure  # these are kept with certainty: the others share what is left
        t = (k - certain) / w[t * w < 1].sum()
    return math.sqrt(t) / float(largest)


def _root_leverage(table: Any, norms: np.ndarray) -> np.ndarray:
    """Roots of the leverage scores, by the Gram matrix; positive for every non-zero row."""
    unit = norms.max() or np.float64(1.0)  # of double precision, and so is the quotient
    scaled = table / unit if sp.issparse(table) or isinstance(table, np.ndarray) else _wide(table) / float(unit)
    gram = scaled.T @ scaled
    values, vectors = np.linalg.eigh(gram.toarray() if sp.issparse(gram) else to_numpy(gram))
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    basis = vectors[:, kept] / np.sqrt(values[kept])
    coordinates = scaled @ (basis if sp.issparse(table) else from_numpy(basis, like=table))
    return np.where(norms > 0, np.maximum(_row_norms(coordinates), 1e-8), 0.0)


def _row_norms(table: Any) -> np.ndarray:
    if sp.issparse(table):
        norms = _row_norms_csr(table.data, table.indptr, table.shape[0])
    else:
        norms = _row_norms_dense(table) if isinstance(table, np.ndarray) else _row_norms_any(table)
    if not np.isfinite(norms).all():
        raise ValueError(f"A must be finite, got NaN or infinity in row {int(np.argmin(np.isfinite(norms)))}")
    return norms


def _row_norms_any(table: Array) -> np.ndarray:
    """Norms of the rows of an array of any kind, on its own device, a block at a time; only they come to the host."""
    xp, step, parts = array_namespace(table), max(1, BLOCK // table.shape[1]), []
    for i in range(0, table.shape[0], step):
        x = _wide(table[i : min(i + step, table.shape[0]), :])
        largest = xp.max(xp.abs(x), axis=1)
        unit = xp.where((largest > 0) & xp.isfinite(largest), largest, xp.ones_like(largest))
        parts.append(largest * xp.sqrt(xp.sum((x / unit[:, None]) ** 2, axis=1)))  # squares of numbers up to 1
    return to_numpy(xp.concat(parts, axis=0)).astype(np.float64)


# ------------------------------------------------------------------------------------------------- kernels

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S12 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(12)


@njit(cache=True, error_model="numpy")
def _mix(z: np.uint64) -> np.uint64:
    """The mixer of splitmix64: every bit of the result depends on every bit of z."""
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


@njit(cache=True, error_model="numpy")
def _mixed(seed: np.uint64, stream: np.uint64) -> np.uint64:
    return _mix(_mix(seed + _GOLDEN) + stream * _GOLDEN)


@njit(cache=True, error_model="numpy")
def _word(key: np.int64, state: np.uint64) -> np.uint64:
    return _mix(_mix(np.uint64(key) + _GOLDEN) ^ state)


@njit(cache=True, error_model="numpy")
def _uniform(key: np.int64, state: np.uint64) -> float:
    return (np.float64(_word(key, state) >> _S12) + 0.5) * 2.0**-52  # 52 bits and a half: neither 0 nor 1


@njit(cache=True, error_model="numpy")
def _uniforms(keys: np.ndarray, state: np.uint64) -> np.ndarray:
    h = np.empty(len(keys))
    for i in range(len(keys)):
        h[i] = _uniform(keys[i], state)
    return h


@njit(cache=True, error_model="numpy")
def _words(keys: np.ndarray, state: np.uint64) -> np.ndarray:
    words = np.empty(len(keys), np.uint64)
    for i in range(len(keys)):
        words[i] = _word(keys[i], state)
    return words


@njit(cache=True, error_model="numpy")
def _signs(keys: np.ndarray, size: int, state: np.uint64) -> np.ndarray:
    """Signs (size, len(keys)): bit j mod 64 of the word j // 64 of each key."""
    signs = np.empty((size, len(keys)))
    for i in range(len(keys)):
        first = _word(keys[i], state)
        word = first
        for j in range(size):
            if j % 64 == 0:
                word = _mix(first + np.uint64(j // 64) * _GOLDEN)
            signs[j, i] = 1.0 - 2.0 * np.float64((word >> np.uint64(j % 64)) & np.uint64(1))
    return signs


@njit(cache=True, error_model="numpy")
def _ranks(keys: np.ndarray, norms: np.ndarray, state: np.uint64) -> np.ndarray:
    """Roots of the ranks; infinite for zero rows."""
    ranks = np.empty(len(keys))
    for i in range(len(keys)):
        ranks[i] = math.sqrt(_uniform(keys[i], state)) / norms[i] if norms[i] > 0 else np.inf
    return ranks


@njit(cache=True, error_model="numpy")
def _norm(row: np.ndarray) -> float:
    """Euclidean norm of a row; where squares leave the range of double precision, in units of its largest."""
    total = 0.0
    for v in row:
        total += np.float64(v) * np.float64(v)
    if 1e-280 < total < np.inf:
        return math.sqrt(total)
    if math.isnan(total):
        return np.nan
    largest = 0.0
    for v in row:
        largest = max(largest, np.float64(abs(v)))
    if largest == 0.0 or not np.isfinite(largest):
        return largest
    total = 0.0
    for v in row:
        total += (np.float64(v) / largest) ** 2
    return largest * math.sqrt(total)


@njit(cache=True, error_model="numpy")
def _row_norms_csr(data: np.ndarray, indptr: np.ndarray, n: int) -> np.ndarray:
    norms = np.empty(n)
    for i in range(n):
        norms[i] = _norm(data[indptr[i] : indptr[i + 1]])
    return norms


@njit(cache=True, error_model="numpy")
def _row_norms_dense(table: np.ndarray) -> np.ndarray:
    norms = np.empty(len(table))
    for i in range(len(table)):
        norms[i] = _norm(table[i])
    return norms
