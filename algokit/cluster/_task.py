"""What runs on a worker: one chunk, one merge. Everything here must travel: plain functions on plain data."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from threadpoolctl import threadpool_limits

from algokit.arrays import array_namespace, is_array
from algokit.checks import check_state
from algokit.cluster.summaries import State, Summary, TreeMerger

Signature = tuple[tuple[tuple[int, ...], str], ...]  # of each array of a chunk: shape without the first axis, dtype


class Part(NamedTuple):
    """A state, and what must be known to refuse what does not fit."""

    state: State
    signature: Signature
    first: str  # the first chunk it covers, as messages name it


class ChunkError(ValueError):
    """A chunk that could not be read, summarised or merged; the original error is the ``__cause__``.

    Attributes
    ----------
    index : int or tuple of int
        Which chunk; in Spark the pair of its partition and its place in there.
    """

    def __init__(self, message: str, index: Any = None) -> None:
        super().__init__(message, index)
        self.index = index

    def __str__(self) -> str:
        return str(self.args[0])


class MisfitError(ValueError):
    """Two chunks that cannot belong to one data set."""


def summarise(summary: Summary, chunk: Any, name: str, entropy: list[int], key: tuple[int, ...]) -> Part:
    """The part of one chunk: loaded, checked, summarised with a generator of its own."""
    chunk = chunk() if callable(chunk) else chunk
    signature, rows = _signature(chunk)
    state = summary.init()
    if rows:
        rng = np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=key))
        with one_blas_thread():
            state = summary.update(state, chunk, rng)
    return Part(check_state(state, "the state that summary.update returned"), signature, name)


def join(summary: Summary, a: Part, b: Part) -> Part:
    """Merge neighbours; ``a`` is the earlier one."""
    if a.signature != b.signature:
        raise MisfitError(f"{b.first} must be as {a.first}, {_describe(a.signature)}, got {_describe(b.signature)}")
    with one_blas_thread():
        state = summary.merge(a.state, b.state)
    return Part(check_state(state, "the state that summary.merge returned"), a.signature, a.first)


def join_all(summary: Summary, parts: list[Part]) -> Part:
    """Merge neighbours, in the tree of :func:`algokit.cluster.summaries.merge_tree`."""
    merger = tree(summary)
    for part in parts:
        merger.push(part)
    return merger.result()


def tree(summary: Summary) -> TreeMerger:
    """A tree of parts, without any so far."""
    return TreeMerger(lambda a, b: join(summary, a, b))


def _signature(chunk: Any) -> tuple[Signature, int]:
    if isinstance(chunk, list) and all(map(_is_document, chunk)):
        return (((), "documents"),), len(chunk)
    arrays = chunk if isinstance(chunk, tuple) else (chunk,)
    if not arrays:
        raise TypeError("it must be an array or a tuple of arrays, got an empty tuple")
    for x in arrays:
        if sp.issparse(x) and x.ndim == 2:
            continue
        if not is_array(x):
            raise TypeError(f"it must be an array or a tuple of arrays, got {type(x).__name__}")
        if isinstance(x, np.ndarray) and x.dtype.kind not in "biufSU":
            raise TypeError(f"it must hold numbers or fixed-width strings, got dtype {x.dtype}")
        if not x.ndim:
            raise ValueError("it must have rows, got an array without axes")
    if len({x.shape[0] for x in arrays}) > 1:
        raise ValueError(f"its arrays must have one first axis, got shapes {[tuple(x.shape) for x in arrays]}")
    for x in arrays:
        _check_finite(x.data if sp.issparse(x) else x)
    return tuple((tuple(x.shape[1:]), _dtype(x)) for x in arrays), int(arrays[0].shape[0])


def _is_document(x: Any) -> bool:
    return isinstance(x, str) or (isinstance(x, (list, tuple)) and all(isinstance(token, str) for token in x))


def _check_finite(x: Any) -> None:
    if isinstance(x, np.ndarray) and x.dtype.kind not in "f":
        return
    xp = array_namespace(x)
    if xp.isdtype(x.dtype, "real floating") and not bool(xp.all(xp.isfinite(x))):
        raise ValueError("it must be finite, got NaN or infinity")


def _dtype(x: Any) -> str:
    if sp.issparse(x):
        return f"{x.dtype}, sparse"
    return x.dtype.kind if isinstance(x, np.ndarray) and x.dtype.kind in "SU" else str(x.dtype)  # any width of string


def _describe(signature: Signature) -> str:
    return " with ".join(f"rows of shape {shape} and dtype {dtype}" for shape, dtype in signature)


_lock = threading.Lock()
_users = 0
_limits: Any = None


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS on one thread while anybody is inside: its sums then do not depend on the machine's cores."""
    global _users, _limits
    with _lock:
        _users += 1
        if _users == 1:
            _limits = threadpool_limits(1, user_api="blas")
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _limits.restore_original_limits()
                _limits = None
