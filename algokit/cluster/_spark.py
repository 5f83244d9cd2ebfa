"""The part of ``map_merge_spark`` that runs in Spark's Python workers, and the plan around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from algokit._lazy import require
from algokit.cluster._task import ChunkError, Part, join_all, summarise, tree
from algokit.cluster.summaries import Summary, state_from_bytes, state_to_bytes

GROUP = 16  # a power of two: whole subtrees of the tree over all partitions
Record = tuple[int, bytes, Any, str]  # partition, state, signature, first chunk


def rdd_parts(summary: Summary, rdd: Any, entropy: list[int]) -> list[Part]:
    """Parts of the partitions (or of groups of them), in order."""

    def work(partition: int, chunks: Iterable[Any]) -> Iterator[Record]:
        return _partition(summary, partition, chunks, entropy)

    records = rdd.mapPartitionsWithIndex(work)
    partitions = rdd.getNumPartitions()
    if partitions > 2 * GROUP:

        def merged(group: tuple[int, Iterable[Record]]) -> Record:
            ordered = sorted(group[1], key=lambda r: r[0])
            return _record(ordered[0][0], join_all(summary, [_part(r) for r in ordered]))

        keyed = records.map(lambda r: (r[0] // GROUP, r))
        records = keyed.groupByKey(-(-partitions // GROUP)).map(merged)
    return [_part(r) for r in sorted(records.collect(), key=lambda r: r[0])]


def frame_parts(summary: Summary, frame: Any, entropy: list[int], to_chunk: Callable[[Any], Any] | None) -> list[Part]:
    """The same of a DataFrame: Arrow batches in, one small row for each partition out."""
    require("pyarrow", extra="cluster")

    def work(batches: Iterable[Any]) -> Iterator[Any]:
        import pyarrow as pa
        from pyspark import TaskContext

        chunks = map(to_chunk or _matrix, batches)
        context = TaskContext.get()
        assert context is not None
        for partition, state, signature, first in _partition(summary, context.partitionId(), chunks, entropy):
            row = {"partition": partition, "state": state, "signature": repr(signature), "first": first}
            types = (pa.int64(), pa.binary(), pa.string(), pa.string())
            yield pa.RecordBatch.from_pylist([row], schema=pa.schema(list(zip(row, types, strict=True))))

    rows = frame.mapInArrow(work, "partition long, state binary, signature string, first string").collect()
    return [
        Part(state_from_bytes(bytes(r.state)), r.signature, r.first) for r in sorted(rows, key=lambda r: r.partition)
    ]


def _matrix(batch: Any) -> np.ndarray:
    return np.column_stack([column.to_numpy(zero_copy_only=False) for column in batch.columns])


def _partition(summary: Summary, partition: int, chunks: Iterable[Any], entropy: list[int]) -> Iterator[Record]:
    """The one record of a partition; none where it has no chunks."""
    merger = tree(summary)
    place = 0
    try:
        for place, chunk in enumerate(chunks):
            name, key = f"chunks[{partition}, {place}]", (partition, place) if place else (partition,)
            merger.push(summarise(summary, chunk, name, entropy, key))
    except Exception as error:
        name = f"chunks[{partition}, {place}]"
        raise ChunkError(f"{name}: {type(error).__name__}: {error}", (partition, place)) from error
    if merger.count:
        yield _record(partition, merger.result())


def _record(partition: int, part: Part) -> Record:
    return partition, state_to_bytes(part.state), part.signature, part.first


def _part(record: Record) -> Part:
    return Part(state_from_bytes(record[1]), record[2], record[3])


def last_line(error: BaseException) -> str:
    """Of Spark's long message, what names the chunk."""
    return "chunks[" + str(error).partition("chunks[")[2].splitlines()[0]
