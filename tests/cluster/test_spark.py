"""``map_merge_spark`` in local mode: the tree of the driver, whatever Spark's order."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from algokit.cluster.map_merge import ChunkError, map_merge, map_merge_spark
from algokit.cluster.summaries import GramSummary, PCASummary

pyspark = pytest.importorskip("pyspark", reason="needs the extra cluster")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("spark"),
    pytest.mark.skipif(
        not (shutil.which("java") or os.environ.get("JAVA_HOME")), reason="Spark needs Java 17, and there is none"
    ),
]
X = np.random.default_rng(0).standard_normal((200, 4))
CHUNKS = np.array_split(X, 34)
SUMMARY = PCASummary(2)


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    """One local session with two workers."""
    from pyspark.sql import SparkSession

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
        builder = builder.config("spark.ui.showConsoleProgress", "false")
        session = builder.config("spark.driver.host", "127.0.0.1").getOrCreate()
        session.sparkContext.setLogLevel("OFF")
        yield session
        session.stop()


def _same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_one_chunk_to_a_partition_gives_the_answer_of_threads_to_the_bit(spark: Any) -> None:
    """34 partitions: merged in groups by a shuffle."""
    answer = map_merge_spark(SUMMARY, spark.sparkContext.parallelize(CHUNKS, 34))
    assert _same(answer, map_merge(SUMMARY, CHUNKS))


def test_partitions_of_many_chunks_or_none_agree_to_rounding(spark: Any) -> None:
    rdd = spark.sparkContext.parallelize(CHUNKS[:5], 8)
    want = map_merge(SUMMARY, CHUNKS[:5])
    answer = map_merge_spark(SUMMARY, rdd)
    np.testing.assert_allclose(answer.components, want.components, rtol=1e-10)
    assert _same(answer, map_merge_spark(SUMMARY, rdd))
    lazily = spark.sparkContext.parallelize(range(5), 2).map(lambda i: lambda: np.full((2, 2), float(i)))
    assert (map_merge_spark(GramSummary(), lazily) == 60).all()


def test_errors_name_partition_and_place(spark: Any) -> None:
    def bad() -> Any:
        raise OSError("the disk is gone")

    parallelize = spark.sparkContext.parallelize
    with pytest.raises(ChunkError, match=r"^chunks\[1, 2\]: OSError: the disk is gone$") as caught:
        map_merge_spark(SUMMARY, parallelize([*CHUNKS[:4], bad], 2))
    assert "OSError" in str(caught.value.__cause__)
    assert caught.value.index == (1, 2)
    with pytest.raises(ChunkError, match=r"chunks\[2, 0\] must be as chunks\[0, 0\], rows of shape \(4,\)"):
        map_merge_spark(SUMMARY, parallelize([*CHUNKS[:2], X[:, :3]], 3))
    with pytest.raises(ValueError, match="data must hold at least one chunk"):
        map_merge_spark(SUMMARY, parallelize([], 2))
    with pytest.raises(TypeError, match="data must be an RDD or a DataFrame"):
        map_merge_spark(SUMMARY, CHUNKS)
    with pytest.raises(ValueError, match="to_chunk must be None for an RDD"):
        map_merge_spark(SUMMARY, parallelize(CHUNKS, 2), to_chunk=np.asarray)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_data_frame_comes_in_arrow_batches(spark: Any) -> None:
    pytest.importorskip("pyarrow", reason="DataFrames come through PyArrow, of the extra cluster")
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "30")
    frame = spark.createDataFrame([tuple(map(float, row)) for row in X], list("abcd")).repartition(3)
    answer = map_merge_spark(SUMMARY, frame)
    np.testing.assert_allclose(answer.variance, map_merge(SUMMARY, [X]).variance, rtol=1e-10)
    assert answer.n_rows == 200
    two = map_merge_spark(GramSummary(), frame, to_chunk=lambda batch: np.asarray(batch.to_pandas()[["a", "b"]]))
    np.testing.assert_allclose(two, X[:, :2].T @ X[:, :2])
    with pytest.raises(ChunkError, match=r"chunks\[\d+, 0\]: ValueError: it must be finite"):
        map_merge_spark(SUMMARY, spark.createDataFrame([(1.0, 2.0), (None, 3.0)], ["a", "b"]))
