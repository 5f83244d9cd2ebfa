r"""Run a mergeable summary over more data than one machine wants to hold: threads, a Dask cluster, Spark.

:math:`\text{finish}(\text{merge}_i\,\text{update}(\text{init}(), \text{chunk}_i))`, merged in a tree that depends on
the number of chunks alone: the answer is the same, bit for bit, whatever the workers' number, order or failures.

Chapter: book/cluster.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from algokit._lazy import require
from algokit.arrays import is_array
from algokit.checks import RNGLike, check_bool, check_int, check_rng
from algokit.cluster._dask import DaskPool
from algokit.cluster._task import ChunkError, MisfitError, Part, join_all, one_blas_thread, summarise, tree
from algokit.cluster._threads import ThreadPool, lazy_collection
from algokit.cluster.summaries import State, Summary, check_summary

__all__ = ["ChunkError", "map_merge", "map_merge_spark"]

GROUP = 16  # chunks whose states are merged on a worker, and come back as one: a power of two, a subtree
AHEAD = 4  # groups that may be begun while the first unfinished one is waited for


def map_merge(
    summary: Summary,
    chunks: Any,
    *,
    client: Any = None,
    rng: RNGLike = None,
    progress: bool | None = None,
    on_merge: Callable[[int, State], Any] | None = None,
    in_flight: int = 2,
    threads: int | None = None,
) -> Any:
    r"""Summarise chunks wherever they lie, and merge the summaries in a fixed tree.

    Parameters
    ----------
    summary : Summary
        An object with ``init``, ``update``, ``merge`` and ``finish`` (:class:`~algokit.cluster.summaries.Summary`).
    chunks : iterable or dask.array.Array
        The data, in order. A chunk is an array of rows, or a sparse one of SciPy's; a tuple of these with one first
        axis; a list of documents (strings, or lists of strings); a function without arguments that loads one of these
        where it is needed (the way to go when the data do not fit); or something of Dask's that computes to one of
        these. A ``dask.array`` is cut along its first axis as it is chunked. All chunks must have one width and dtype,
        and be finite; a chunk without rows is skipped.
    client : distributed.Client, optional
        A Dask cluster. None: threads of this machine, no server.
    rng : None, int or numpy.random.Generator
        Seed; chunk i gets a generator of its own, spawned by its index.
    progress : bool, optional
        Whether to show a progress bar. None: on a terminal, where tqdm is installed.
    on_merge : callable, optional
        ``on_merge(n, state)`` is called with the state of the first n chunks, for every n that is a multiple of 16,
        and at the end, in order: results while they grow. ``summary.finish(state)`` is the answer so far, the same as
        that of the first n chunks alone.
    in_flight : int, default 2
        Chunks handed out per thread of a worker: one in work, the others waiting. Memory is bounded by these; also, no
        chunk is begun that is 64 (or four times what is handed out) ahead of the first unfinished group.
    threads : int, optional
        Without a client: number of threads. None: one for each core that may be used.

    Returns
    -------
    object
        What ``summary.finish`` returns.

    Raises
    ------
    TypeError
        If an argument is not of the right kind.
    ValueError
        If there are no chunks, or a number is out of range.
    ChunkError
        If a chunk cannot be loaded, is not an array, holds NaN or infinities, does not fit the others, or the summary
        refuses it. It is a ValueError that names the chunk's index; the original error is its ``__cause__``. The other
        tasks are cancelled, and nothing is returned.
    ModuleNotFoundError
        If a client is given and Dask is not installed.

    Notes
    -----
    States of 16 chunks are merged on the workers, and only the merged one comes to this process. When a worker is lost,
    Dask computes again what it held: at most the unfinished groups. Chunks that are arrays travel with their task and
    stay with the scheduler until their group is done; functions travel as a few bytes. Workers run BLAS on one thread,
    for speed (they are parallel already) and for the last bit; between machines with different processors that bit may
    still differ.

    Examples
    --------
    >>> import numpy as np
    >>> from algokit.cluster.summaries import MomentSummary
    >>> X = np.arange(12.0).reshape(6, 2)
    >>> map_merge(MomentSummary(), [X[:2], lambda: X[2:5], X[5:]]).mean
    array([5., 6.])
    """
    check_summary(summary)
    total, items = _chunks(chunks)
    entropy = _entropy(rng)
    progress = None if progress is None else check_bool(progress, "progress")
    if on_merge is not None and not callable(on_merge):
        raise TypeError(f"on_merge must be callable, got {type(on_merge).__name__}")
    in_flight = check_int(in_flight, "in_flight", low=1, high=1000)
    threads = None if threads is None else check_int(threads, "threads", low=1, high=1000)
    pool = ThreadPool(threads) if client is None else DaskPool(client)
    bar = _bar(total, progress)
    try:
        run = _Run(summary, pool, entropy, in_flight, on_merge, bar)
        with one_blas_thread():
            part = run.result(items)
    finally:
        bar.close()
    return summary.finish(part.state)


class _Run:
    """One reduction: hands out chunks, merges whole groups where they lie, keeps what is done in order."""

    def __init__(
        self, summary: Summary, pool: Any, entropy: list[int], in_flight: int, on_merge: Any, bar: Any
    ) -> None:
        self.summary, self.pool, self.entropy, self.in_flight = summary, pool, entropy, in_flight
        self.on_merge, self.bar = on_merge, bar
        self.chunks: dict[Any, int] = {}  # in work: future -> index
        self.merges: dict[Any, int] = {}  # in work: future -> number of the group
        self.parts: dict[int, dict[int, Any]] = {}  # done, their group is not: group -> index -> future
        self.groups: dict[int, Part] = {}  # done, an earlier group is not
        self.merger = tree(summary)

    def result(self, items: Iterator[Any]) -> Part:
        started, more = 0, True
        try:
            while more or self.chunks or self.merges:
                while more and len(self.chunks) < self.in_flight * self.pool.workers() and self._near(started):
                    try:
                        chunk = next(items)
                    except StopIteration:
                        more = False
                    except Exception as error:
                        raise ChunkError(f"chunks[{started}] could not be had: {_what(error)}", started) from error
                    else:
                        self._submit(chunk, started)
                        started += 1
                if self.chunks or self.merges:
                    self._advance(self.pool.wait([*self.chunks, *self.merges]))
            if not started:
                raise ValueError("chunks must hold at least one chunk")
            return self._rest(started)
        finally:
            done = [part for group in self.parts.values() for part in group.values()]
            self.pool.close([*self.chunks, *self.merges, *done])

    def _near(self, index: int) -> bool:
        return index < self.merger.count + AHEAD * max(GROUP, self.in_flight * self.pool.workers())

    def _submit(self, chunk: Any, index: int) -> None:
        args = (f"chunks[{index}]", self.entropy, (index,))
        self.chunks[self.pool.submit(summarise, self.summary, chunk, *args)] = index

    def _advance(self, done: list[Any]) -> None:
        for future in sorted((f for f in done if f in self.chunks), key=self.chunks.__getitem__):
            index = self.chunks[future]
            self._check(future, f"chunks[{index}] could not be summarised", index)
            del self.chunks[future]
            self.bar.update(1)
            group = self.parts.setdefault(index // GROUP, {})
            group[index] = future
            if len(group) == GROUP:
                parts = [part for _, part in sorted(self.parts.pop(index // GROUP).items())]
                self.merges[self.pool.submit_merge(join_all, self.summary, parts)] = index // GROUP
        for future in [f for f in done if f in self.merges]:
            first = self.merges[future] * GROUP
            self._check(future, f"chunks[{first}] to chunks[{first + GROUP - 1}] could not be merged", first)
            self.groups[self.merges.pop(future)] = self.pool.result(future)
        while (part := self.groups.pop(self.merger.count // GROUP, None)) is not None:
            self._push(part, GROUP)
            self._tell()

    def _check(self, future: Any, what: str, index: int) -> None:
        error = self.pool.error(future)
        if isinstance(error, MisfitError):
            raise ChunkError(str(error), _index(str(error))) from error
        if error is not None:
            raise ChunkError(f"{what}: {_what(error)}", index) from error

    def _rest(self, n: int) -> Part:
        """The chunks after the last full group."""
        for group in [*self.parts]:
            for _, part in sorted(self.parts.pop(group).items()):
                self._push(self.pool.result(part), 1)
        if n % GROUP:
            self._tell()
        return self._merged()

    def _push(self, part: Part, size: int) -> None:
        with _merging():
            self.merger.push(part, size=size)

    def _merged(self) -> Part:
        with _merging():
            return self.merger.result()

    def _tell(self) -> None:
        if self.on_merge is not None:
            self.on_merge(self.merger.count, self._merged().state)


@contextmanager
def _merging() -> Iterator[None]:
    """Errors of a merge in this process, named as those of the workers are."""
    try:
        yield
    except MisfitError as error:
        raise ChunkError(str(error), _index(str(error))) from error
    except Exception as error:
        raise ChunkError(f"chunks could not be merged: {_what(error)}") from error


def _chunks(chunks: Any) -> tuple[int | None, Iterator[Any]]:
    """Number of chunks, where it is known, and the chunks."""
    if isinstance(getattr(chunks, "numblocks", None), tuple):  # a dask array
        if not chunks.ndim or 0 in chunks.numblocks:
            raise ValueError(f"chunks must have rows, got a dask array of shape {chunks.shape}")
        blocks = chunks.rechunk(dict.fromkeys(range(1, chunks.ndim), -1))
        return blocks.numblocks[0], (blocks.blocks[i] for i in range(blocks.numblocks[0]))
    if is_array(chunks) or lazy_collection(chunks):
        raise TypeError(f"chunks must be an iterable of arrays, got one {type(chunks).__name__}: put it into a list")
    if isinstance(chunks, (str, bytes, dict)) or not isinstance(chunks, Iterable):
        raise TypeError(f"chunks must be an iterable of arrays or a dask array, got {type(chunks).__name__}")
    return (len(chunks) if isinstance(chunks, Sized) else None), iter(chunks)


def _entropy(rng: RNGLike) -> list[int]:
    return [int(word) for word in check_rng(rng).integers(2**32, size=4)]


def _index(message: str) -> int | tuple[int, ...] | None:
    """The first index that a message names."""
    inside = message.partition("chunks[")[2].partition("]")[0]
    numbers = [int(word) for word in inside.split(",") if word.strip().isdigit()]
    return numbers[0] if len(numbers) == 1 else tuple(numbers) or None


def _what(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


class _NoBar:
    def update(self, n: int) -> None: ...

    def close(self) -> None: ...


def _bar(total: int | None, progress: bool | None) -> Any:
    """A bar of tqdm's."""
    if progress is False or (progress is None and not (sys.stderr and sys.stderr.isatty())):
        return _NoBar()
    try:
        tqdm = require("tqdm.auto", extra="cluster")
    except ModuleNotFoundError:
        if progress:
            raise
        return _NoBar()
    return tqdm.tqdm(total=total, unit="chunk", leave=False)


def map_merge_spark(
    summary: Summary, data: Any, *, rng: RNGLike = None, to_chunk: Callable[[Any], Any] | None = None
) -> Any:
    r"""The same over Spark: an RDD whose elements are chunks, or a DataFrame, which comes in Arrow batches.

    Parameters
    ----------
    summary : Summary
        As for :func:`map_merge`.
    data : pyspark.RDD or pyspark.sql.DataFrame
        The elements of an RDD are chunks: arrays, tuples of arrays, or functions that load one. Of a DataFrame, every
        Arrow batch is a chunk.
    rng : None, int or numpy.random.Generator
        Seed. A chunk's generator is spawned by its partition, and by its place in there if that is not the first.
    to_chunk : callable, optional
        ``to_chunk(batch)`` makes a chunk of a ``pyarrow.RecordBatch``; only for a DataFrame. None: numeric columns, all
        of one table, become the columns of a matrix.

    Returns
    -------
    object
        What ``summary.finish`` returns.

    Raises
    ------
    TypeError
        If an argument is not of the right kind.
    ValueError
        If there are no chunks.
    ChunkError
        If a chunk fails; it names ``chunks[partition, place]``, and Spark's error, with the original traceback in its
        text, is its ``__cause__``.
    ModuleNotFoundError
        If PySpark, or for a DataFrame PyArrow, is not installed.

    Notes
    -----
    States are merged within a partition, then, where there are many partitions, in groups of 16 by a shuffle, then on
    the driver; in the order of the partitions' indices, in the tree of
    :func:`~algokit.cluster.summaries.merge_tree`. Spark's own ``treeReduce`` would merge in the order of arrival. With
    one chunk in each partition the answer is that of :func:`map_merge`, bit for bit.

    Examples
    --------
    With a session called ``spark``: ``map_merge_spark(PCASummary(8), spark.read.parquet("rows.parquet"))``.

    >>> map_merge_spark("PCA", None)
    Traceback (most recent call last):
    ...
    TypeError: summary must be an object with the methods init, update, merge and finish, got a str without ...
    """
    check_summary(summary)
    pyspark = require("pyspark", extra="cluster")
    from algokit.cluster import _spark

    entropy = _entropy(rng)
    if to_chunk is not None and not callable(to_chunk):
        raise TypeError(f"to_chunk must be callable, got {type(to_chunk).__name__}")
    frame = hasattr(data, "mapInArrow") and hasattr(data, "schema")
    if not frame and not isinstance(data, pyspark.RDD):
        raise TypeError(f"data must be an RDD or a DataFrame of Spark, got {type(data).__name__}")
    if not frame and to_chunk is not None:
        raise ValueError("to_chunk must be None for an RDD: its elements are the chunks")
    try:
        parts = _spark.frame_parts(summary, data, entropy, to_chunk) if frame else None
        parts = _spark.rdd_parts(summary, data, entropy) if parts is None else parts
        merger = tree(summary)
        with _merging():
            for part in parts:
                merger.push(part)
            total = merger.result() if merger.count else None
    except ChunkError:
        raise
    except Exception as error:
        index = _index(str(error))
        if index is None:
            raise
        raise ChunkError(_spark.last_line(error), index) from error
    if total is None:
        raise ValueError("data must hold at least one chunk, got none")
    return summary.finish(total.state)
