r"""Mergeable summaries: what a cluster may compute in pieces, and three that need no chapter.

A summary is four functions, ``init``, ``update``, ``merge`` and ``finish`` (:class:`Summary`). Its state is a flat dict
of NumPy arrays, so that it can be sent, stored and counted in bytes. ``merge`` is associative, and keeps the order of
the data; then any tree of merges gives the summary of the whole, exactly or to rounding.

References: T. F. Chan, G. H. Golub, R. J. LeVeque, *Updating formulae and a pairwise algorithm for computing sample
variances*, COMPSTAT 1982 (the merge of two covariances); P. K. Agarwal et al., *Mergeable summaries*, PODS 2012.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from algokit.arrays import Array, array_namespace, to_numpy
from algokit.checks import check_array, check_int, check_state

__all__ = [
    "GramSummary",
    "MomentSummary",
    "Moments",
    "PCASummary",
    "PrincipalComponents",
    "merge_tree",
    "state_from_bytes",
    "state_nbytes",
    "state_to_bytes",
]

State: TypeAlias = dict[str, np.ndarray]  #: what a summary keeps; numbers are arrays without axes
Projection: TypeAlias = Any  #: a linear map: a callable on matrices of rows, or an object with ``apply``


@runtime_checkable
class Summary(Protocol):
    """What a cluster needs to know of an algorithm. Nobody inherits from it: four methods are enough.

    ``update`` and ``merge`` leave their arguments unchanged, ``merge`` is associative, and the state that ``init``
    returns is neutral in it.
    """

    def init(self) -> State:
        """State of no data."""

    def update(self, state: State, chunk: Any, rng: np.random.Generator) -> State:
        """State after one more chunk: an array of rows, or a tuple of arrays with one first axis.

        ``rng`` belongs to the chunk: it was spawned from one seed by the chunk's index.
        """

    def merge(self, a: State, b: State) -> State:
        """State of the data of ``a`` followed by those of ``b``."""

    def finish(self, state: State) -> Any:
        """The answer."""


def check_summary(summary: Any) -> Summary:
    """``summary``, when it has the four methods."""
    missing = [m for m in ("init", "update", "merge", "finish") if not callable(getattr(summary, m, None))]
    if missing or isinstance(summary, type):
        what = f"a {type(summary).__name__} without {', '.join(missing)}" if missing else f"the class {summary!r}"
        raise TypeError(f"summary must be an object with the methods init, update, merge and finish, got {what}")
    return summary


def state_nbytes(state: State) -> int:
    """Bytes of the arrays of a state: what one merge moves over the network, without the few bytes of framing.

    Parameters
    ----------
    state : dict of str to numpy.ndarray
        The state.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    TypeError
        If it is not a flat dict of arrays.

    Examples
    --------
    >>> state_nbytes({"count": np.array(3), "mean": np.zeros(4)})
    40
    """
    return sum(a.nbytes for a in check_state(state, "state").values())


def state_to_bytes(state: State) -> bytes:
    """A state as bytes, written by :func:`numpy.savez` without pickle; the same state gives the same bytes.

    Parameters
    ----------
    state : dict of str to numpy.ndarray
        The state.

    Returns
    -------
    bytes
        An uncompressed ``.npz`` archive.

    Raises
    ------
    TypeError
        If it is not a flat dict of arrays, or an array holds objects.
    ValueError
        If a key cannot name a file in the archive.

    Examples
    --------
    >>> state_from_bytes(state_to_bytes({"count": np.array(3)}))
    {'count': array(3)}
    """
    check_state(state, "state")
    for key in state:
        if key in ("file", "allow_pickle") or not key or "/" in key:
            raise ValueError(f"state must have keys that can name a file of an archive, got {key!r}")
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{key: state[key] for key in sorted(state)})
    return buffer.getvalue()


def state_from_bytes(data: bytes) -> State:
    """The state that :func:`state_to_bytes` wrote. Nothing is unpickled, so foreign bytes cannot run code.

    Parameters
    ----------
    data : bytes
        The archive.

    Returns
    -------
    dict of str to numpy.ndarray
        The state.

    Raises
    ------
    TypeError
        If ``data`` is not bytes.
    ValueError
        If it is not such an archive, is cut short, or holds objects.

    Examples
    --------
    >>> state_from_bytes(b"PK")
    Traceback (most recent call last):
    ...
    ValueError: data must be what state_to_bytes wrote, got 2 bytes that are not: File is not a zip file
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"data must be bytes, got {type(data).__name__}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            state = {
                name.removesuffix(".npy"): np.lib.format.read_array(archive.open(name), allow_pickle=False)
                for name in archive.namelist()
            }
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError) as error:
        raise ValueError(
            f"data must be what state_to_bytes wrote, got {len(data)} bytes that are not: {error}"
        ) from error
    return check_state(state, "data")


class TreeMerger:
    """Merges states that come in order, in the tree that :func:`merge_tree` describes, holding log2(n) of them.

    Parameters
    ----------
    merge : callable
        ``merge(a, b) -> state``, where ``a`` covers what comes before ``b``.

    Attributes
    ----------
    count : int
        Chunks covered so far.

    Raises
    ------
    TypeError
        If ``merge`` is not callable.

    Examples
    --------
    >>> merger = TreeMerger(lambda a, b: f"({a}{b})")
    >>> for letter in "abcdefg":
    ...     merger.push(letter)
    >>> merger.result()
    '(((ab)(cd))((ef)g))'
    """

    def __init__(self, merge: Callable[[Any, Any], Any]) -> None:
        if not callable(merge):
            raise TypeError(f"merge must be callable, got {type(merge).__name__}")
        self._merge = merge
        self._stack: list[tuple[int, Any]] = []  # (chunks covered, state); the sizes are falling powers of two
        self.count = 0

    def push(self, state: Any, *, size: int = 1) -> None:
        """Add the state of the next ``size`` chunks.

        Parameters
        ----------
        state : object
            What the tree made of these chunks.
        size : int, default 1
            How many they are: a power of two, no larger than what lets the tree stay that of single chunks.

        Raises
        ------
        TypeError, ValueError
            If ``size`` is not such a number.
        """
        size = check_int(size, "size", low=1)
        if size & (size - 1) or self.count % size:
            raise ValueError(f"size must be a power of two that divides the {self.count} chunks so far, got {size}")
        self.count += size
        while self._stack and self._stack[-1][0] == size:
            state = self._merge(self._stack.pop()[1], state)
            size *= 2
        self._stack.append((size, state))

    def result(self) -> Any:
        """State of all chunks so far; more can follow.

        Returns
        -------
        object
            The merged state.

        Raises
        ------
        ValueError
            If there was none.
        """
        if not self._stack:
            raise ValueError("there must be at least one state")
        *before, (_, state) = self._stack
        for _, left in reversed(before):
            state = self._merge(left, state)
        return state


def merge_tree(summary: Summary, states: Iterable[State]) -> State:
    r"""Merge states in a tree that depends on their number alone.

    Neighbours are merged in pairs, pairs in fours, and so on; what is left over joins from the right. For n states the
    tree is at most :math:`\lceil\log_2 n\rceil` deep, and at most :math:`\lfloor\log_2 n\rfloor + 1` states are held.

    Parameters
    ----------
    summary : Summary
        Whose states they are.
    states : iterable of dict
        In the order of the data.

    Returns
    -------
    dict of str to numpy.ndarray
        The state of all the data.

    Raises
    ------
    TypeError
        If ``summary`` is not a summary, or a state is not a flat dict of arrays.
    ValueError
        If there is no state, or the summary refuses to merge two of them.

    Examples
    --------
    >>> summary = MomentSummary()
    >>> states = [summary.update(summary.init(), np.full((2, 1), float(i))) for i in range(5)]
    >>> merge_tree(summary, states)["mean"]
    array([2.])
    """
    merger = TreeMerger(check_summary(summary).merge)
    if not isinstance(states, Iterable) or isinstance(states, (dict, str, bytes)):
        raise TypeError(f"states must be an iterable of states, got {type(states).__name__}")
    for i, state in enumerate(states):
        merger.push(check_state(state, f"states[{i}]"))
    if not merger.count:
        raise ValueError("states must hold at least one state")
    return merger.result()


class Moments(NamedTuple):
    """Count, mean and covariance.

    Attributes
    ----------
    n_rows : int
        Number of rows n.
    mean : numpy.ndarray, shape (d,)
        Mean of the rows.
    covariance : numpy.ndarray, shape (d, d)
        Scatter about the mean divided by n - ``ddof``.
    """

    n_rows: int
    mean: np.ndarray
    covariance: np.ndarray


class MomentSummary:
    r"""Count, mean and covariance of rows, merged to rounding by the formula of Chan, Golub and LeVeque.

    With :math:`\delta = \bar x_b - \bar x_a`, the scatter about the mean of the union is
    :math:`S_a + S_b + \frac{n_a n_b}{n_a + n_b}\delta\delta^\top`: no large numbers are subtracted, so a mean far from
    zero costs no digits. Merging is to rounding: another tree moves the last digits.

    Parameters
    ----------
    projection : callable or object with ``apply``, optional
        A linear map of the rows, applied to each chunk: the moments are those of the projected rows.
    ddof : int, default 1
        The covariance is divided by n - ``ddof``.

    Raises
    ------
    TypeError
        If ``projection`` is neither, or ``ddof`` is no integer.
    ValueError
        If ``ddof`` is negative.

    Examples
    --------
    >>> summary = MomentSummary()
    >>> a = summary.update(summary.init(), np.array([[0.0], [2.0]]))
    >>> b = summary.update(summary.init(), np.array([[4.0]]))
    >>> summary.finish(summary.merge(a, b))
    Moments(n_rows=3, mean=array([2.]), covariance=array([[4.]]))
    """

    _KEYS = ("count", "mean", "scatter")

    def __init__(self, *, projection: Projection | None = None, ddof: int = 1) -> None:
        self.projection = _check_projection(projection)
        self.ddof = check_int(ddof, "ddof", low=0, high=10**6)

    def init(self) -> State:
        """State of no rows: it takes its width from the first chunk.

        Returns
        -------
        dict
            ``count`` (), ``mean`` (0,), ``scatter`` (0, 0).
        """
        return {"count": np.array(0), "mean": np.zeros(0), "scatter": np.zeros((0, 0))}

    def update(self, state: State, chunk: Array, rng: np.random.Generator | None = None) -> State:
        """State after one more chunk of rows.

        Parameters
        ----------
        state : dict
            A state.
        chunk : array, shape (n, d), NumPy or CuPy
            Rows, all finite; none is allowed.
        rng : numpy.random.Generator, optional
            Ignored: nothing is random.

        Returns
        -------
        dict
            ``count`` (), ``mean`` (k,), ``scatter`` (k, k), float64; k = d unless there is a projection.

        Raises
        ------
        TypeError, ValueError
            If the chunk is not a matrix of finite numbers, has another width, or squares overflow.
        """
        check_state(state, "state", keys=self._KEYS)
        rows = _project(self.projection, chunk)
        if not rows.shape[0]:
            return dict(state)
        xp = array_namespace(rows)
        mean = xp.mean(rows, axis=0)
        scatter = _gram(rows - mean)
        new = {"count": np.array(rows.shape[0]), "mean": to_numpy(mean), "scatter": scatter}
        return self._merged(state, new, "chunk")

    def merge(self, a: State, b: State) -> State:
        """State of the rows of both.

        Parameters
        ----------
        a, b : dict
            States.

        Returns
        -------
        dict
            The state of their union.

        Raises
        ------
        TypeError, ValueError
            If they are not states of this summary, or of different widths.
        """
        check_state(a, "a", keys=self._KEYS)
        check_state(b, "b", keys=self._KEYS)
        return self._merged(a, b, "b")

    def _merged(self, a: State, b: State, name: str) -> State:
        if not a["count"] or not b["count"]:
            return dict(b if not a["count"] else a)
        if a["mean"].shape != b["mean"].shape:
            raise ValueError(f"{name} must be {len(a['mean'])} columns wide, as what it joins, got {len(b['mean'])}")
        n, share = a["count"] + b["count"], b["count"] / (a["count"] + b["count"])
        delta = b["mean"] - a["mean"]
        scatter = a["scatter"] + b["scatter"] + np.outer(delta, delta) * (a["count"] * share)
        return {"count": np.asarray(n), "mean": a["mean"] + delta * share, "scatter": scatter}

    def finish(self, state: State) -> Moments:
        """Mean and covariance.

        Parameters
        ----------
        state : dict
            A state of more than ``ddof`` rows.

        Returns
        -------
        Moments
            In float64.

        Raises
        ------
        TypeError, ValueError
            If it is not a state of this summary, or has too few rows.
        """
        check_state(state, "state", keys=self._KEYS)
        n = int(state["count"])
        if n <= self.ddof:
            raise ValueError(f"state must cover more than ddof = {self.ddof} row(s), got {n}")
        return Moments(n, state["mean"].copy(), state["scatter"] / (n - self.ddof))


class GramSummary:
    r"""Gram matrix :math:`X^\top X` of rows, not centred; merging adds, so it is exact but for rounding.

    Integers up to :math:`2^{53}` add exactly: counts merge bit for bit in any tree.

    Parameters
    ----------
    projection : callable or object with ``apply``, optional
        A linear map :math:`\Phi` of the rows, applied to each chunk: then the sum is :math:`\Phi X^\top X\Phi^\top`.

    Raises
    ------
    TypeError
        If ``projection`` is neither.

    Examples
    --------
    >>> summary = GramSummary()
    >>> summary.finish(summary.update(summary.init(), np.array([[1.0, 2.0], [0.0, 1.0]])))
    array([[1., 2.],
           [2., 5.]])
    """

    _KEYS = ("count", "gram")

    def __init__(self, *, projection: Projection | None = None) -> None:
        self.projection = _check_projection(projection)

    def init(self) -> State:
        """State of no rows.

        Returns
        -------
        dict
            ``count`` (), ``gram`` (0, 0).
        """
        return {"count": np.array(0), "gram": np.zeros((0, 0))}

    def update(self, state: State, chunk: Array, rng: np.random.Generator | None = None) -> State:
        """State after one more chunk of rows.

        Parameters
        ----------
        state : dict
            A state.
        chunk : array, shape (n, d), NumPy or CuPy
            Rows, all finite; none is allowed.
        rng : numpy.random.Generator, optional
            Ignored: nothing is random.

        Returns
        -------
        dict
            ``count`` (), ``gram`` (k, k), float64; k = d unless there is a projection.

        Raises
        ------
        TypeError, ValueError
            If the chunk is not a matrix of finite numbers, has another width, or squares overflow.
        """
        check_state(state, "state", keys=self._KEYS)
        rows = _project(self.projection, chunk)
        if not rows.shape[0]:
            return dict(state)
        new = {"count": np.array(rows.shape[0]), "gram": _gram(rows)}
        return self._merged(state, new, "chunk")

    def merge(self, a: State, b: State) -> State:
        """State of the rows of both.

        Parameters
        ----------
        a, b : dict
            States.

        Returns
        -------
        dict
            Their sum.

        Raises
        ------
        TypeError, ValueError
            If they are not states of this summary, or of different widths.
        """
        check_state(a, "a", keys=self._KEYS)
        check_state(b, "b", keys=self._KEYS)
        return self._merged(a, b, "b")

    def _merged(self, a: State, b: State, name: str) -> State:
        if not a["count"] or not b["count"]:
            return dict(b if not a["count"] else a)
        if a["gram"].shape != b["gram"].shape:
            raise ValueError(f"{name} must be {len(a['gram'])} columns wide, as what it joins, got {len(b['gram'])}")
        return {"count": np.asarray(a["count"] + b["count"]), "gram": a["gram"] + b["gram"]}

    def finish(self, state: State) -> np.ndarray:
        """The Gram matrix.

        Parameters
        ----------
        state : dict
            A state of at least one row.

        Returns
        -------
        numpy.ndarray, shape (k, k)
            In float64.

        Raises
        ------
        TypeError, ValueError
            If it is not a state of this summary, or has no rows.
        """
        check_state(state, "state", keys=self._KEYS)
        if not state["count"]:
            raise ValueError("state must cover at least one row, got none")
        return state["gram"].copy()


class PrincipalComponents(NamedTuple):
    """Principal components of rows.

    Attributes
    ----------
    mean : numpy.ndarray, shape (k,)
        Mean of the (projected) rows.
    components : numpy.ndarray, shape (n_components, k)
        Orthonormal directions, by falling variance; the largest entry of each is positive.
    variance : numpy.ndarray, shape (n_components,)
        Variance along each, with the divisor n - 1.
    share : numpy.ndarray, shape (n_components,)
        Part of the total variance.
    n_rows : int
        Number of rows.
    """

    mean: np.ndarray
    components: np.ndarray
    variance: np.ndarray
    share: np.ndarray
    n_rows: int


class PCASummary(MomentSummary):
    """Principal components of rows that are seen once, from their merged covariance; to rounding.

    The state has k (k + 1) + 1 numbers, whatever the number of rows. For wide rows pass a random projection to k
    columns: distances, and with them variances, are kept within its distortion (then approximate, and the merge
    still is to rounding).

    Parameters
    ----------
    n_components : int
        Directions wanted, at most k.
    projection : callable or object with ``apply``, optional
        A linear map of the rows to k columns, such as
        :func:`~algokit.sketching.fast_johnson_lindenstrauss.fast_jl_operator` draws. All workers must hold the same.

    Raises
    ------
    TypeError
        If an argument is not of the right kind.
    ValueError
        If ``n_components`` is not positive.

    Examples
    --------
    >>> summary = PCASummary(1)
    >>> X = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    >>> result = summary.finish(summary.update(summary.init(), X))
    >>> result.components.round(4), result.variance.round(4)
    (array([[0.7071, 0.7071]]), array([2.]))
    """

    def __init__(self, n_components: int, *, projection: Projection | None = None) -> None:
        super().__init__(projection=projection)
        self.n_components = check_int(n_components, "n_components", low=1, high=10**6)

    def finish(self, state: State) -> PrincipalComponents:  # type: ignore[override]
        """The leading eigenvectors of the covariance.

        Parameters
        ----------
        state : dict
            A state of at least two rows.

        Returns
        -------
        PrincipalComponents
            In float64.

        Raises
        ------
        TypeError, ValueError
            If it is not a state of this summary, has one row or none, or fewer columns than ``n_components``.
        """
        count, mean, covariance = super().finish(state)
        if self.n_components > len(mean):
            raise ValueError(f"state must have at least n_components = {self.n_components} columns, got {len(mean)}")
        variance, vectors = np.linalg.eigh(covariance)
        variance, components = variance[::-1].clip(min=0), vectors.T[::-1][: self.n_components]
        peaks = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
        leading, total = variance[: self.n_components], variance.sum()
        share = leading / total if total else np.zeros_like(leading)
        return PrincipalComponents(mean, components * np.sign(peaks), leading, share, count)


def _check_projection(projection: Any) -> Projection | None:
    if projection is None or callable(projection) or callable(getattr(projection, "apply", None)):
        return projection
    raise TypeError(f"projection must be a callable or have a method apply, got {type(projection).__name__}")


def _project(projection: Projection | None, chunk: Any) -> Array:
    """The rows of a chunk, checked, through the linear map, in float64: sums over a cluster are long."""
    rows = check_array(chunk, "chunk", ndim=2, min_size=0)
    if rows.shape[1] < 1:
        raise ValueError(f"chunk must have at least one column, got shape {tuple(rows.shape)}")
    if projection is not None and rows.shape[0]:
        rows = projection.apply(rows) if hasattr(projection, "apply") else projection(rows)
        rows = check_array(rows, "projection(chunk)", ndim=2, shape=(chunk.shape[0], None))
    xp = array_namespace(rows)
    return xp.astype(rows, xp.float64)


def _gram(rows: Array) -> np.ndarray:
    """Sum of the outer products of the rows, with equal halves (BLAS may round them differently)."""
    with np.errstate(over="ignore", invalid="ignore"):
        gram = to_numpy(rows.T @ rows)
    if not np.isfinite(gram).all():
        raise ValueError("chunk must have squares that fit into float64, got an overflow")
    return (gram + gram.T) / 2
