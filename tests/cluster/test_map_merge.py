"""``map_merge`` on threads: one answer for any number of them, bounded memory, errors that name the chunk."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from algokit.cluster.map_merge import ChunkError, map_merge
from algokit.cluster.summaries import GramSummary, MomentSummary, PCASummary, merge_tree
from algokit.matrices.swivel import SwivelSummary, VocabularySummary
from algokit.optimization.bradley_terry import BradleyTerrySummary
from algokit.sketching.coordinated_sampling import CoordinatedSummary, sketch_rows
from algokit.sketching.fast_johnson_lindenstrauss import fast_jl_operator

X = np.random.default_rng(0).standard_normal((80, 3))
CHUNKS = np.array_split(X, 40)
SUMMARY = MomentSummary()

try:
    from pyspark import RDD
except ModuleNotFoundError:
    RDD = object  # type: ignore[assignment,misc]


class ListRDD(RDD):  # type: ignore[misc]
    """An RDD without Spark: each element is a partition. What the common bad-input test can afford."""

    def __init__(self, chunks: list[Any]) -> None:
        self.chunks = chunks

    def __deepcopy__(self, memo: Any) -> Any:
        return ListRDD(copy.deepcopy(self.chunks, memo))

    def __del__(self) -> None: ...

    def getNumPartitions(self) -> int:
        return len(self.chunks)

    def mapPartitionsWithIndex(self, f: Any, preservesPartitioning: bool = False) -> Any:
        return ListRDD([record for i, chunk in enumerate(self.chunks) for record in f(i, [chunk])])

    def collect(self) -> Any:
        return self.chunks


EXAMPLES = {
    "map_merge": dict(summary=SUMMARY, chunks=[X, X], rng=0, progress=False, in_flight=1, threads=1),
    "map_merge_spark": dict(summary=SUMMARY, data=ListRDD([X, X]), rng=0),
}


class Draws:
    """The first random number of each chunk, joined: shows order, seeds, and which chunks were seen."""

    def init(self) -> dict[str, np.ndarray]:
        return {"drawn": np.zeros(0), "sizes": np.zeros(0, np.int64)}

    def update(self, state: Any, chunk: Any, rng: np.random.Generator) -> Any:
        size = len(chunk[0] if isinstance(chunk, tuple) else chunk)
        return self.merge(state, {"drawn": rng.random(1), "sizes": np.array([size])})

    def merge(self, a: Any, b: Any) -> Any:
        return {key: np.concatenate([a[key], b[key]]) for key in a}

    def finish(self, state: Any) -> Any:
        return state


def _same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@given(
    n=st.integers(1, 70),
    threads=st.integers(1, 4),
    in_flight=st.integers(1, 5),
    lazily=st.sampled_from(["list", "generator", "functions"]),
)
def test_the_answer_is_that_of_the_fixed_tree_to_the_bit(n: int, threads: int, in_flight: int, lazily: str) -> None:
    chunks: Any = np.array_split(X, n)
    want = SUMMARY.finish(merge_tree(SUMMARY, [SUMMARY.update(SUMMARY.init(), c) for c in chunks]))
    if lazily == "generator":
        chunks = iter(chunks)
    elif lazily == "functions":
        chunks = [lambda c=c: c for c in chunks]
    assert _same(map_merge(SUMMARY, chunks, threads=threads, in_flight=in_flight), want)


def test_one_chunk_is_the_plain_algorithm() -> None:
    moments = map_merge(SUMMARY, [X])
    np.testing.assert_array_equal(moments.mean, X.mean(axis=0))
    np.testing.assert_allclose(moments.covariance, np.cov(X.T), rtol=1e-13)


def test_every_chunk_has_a_generator_of_its_own_and_order_is_kept() -> None:
    chunks = [np.zeros((i + 1, 2)) for i in range(53)]
    one = map_merge(Draws(), chunks, rng=5, threads=1)
    three = map_merge(Draws(), chunks, rng=5, threads=3, in_flight=4)
    other = map_merge(Draws(), chunks, rng=6)
    np.testing.assert_array_equal(one["sizes"], np.arange(1, 54))
    np.testing.assert_array_equal(one["drawn"], three["drawn"])
    assert len(np.unique(one["drawn"])) == 53
    assert not np.isin(other["drawn"], one["drawn"]).any()
    np.testing.assert_array_equal(map_merge(Draws(), chunks[:7], rng=5)["drawn"], one["drawn"][:7])


def test_results_grow_in_order_and_each_is_that_of_its_chunks_alone() -> None:
    seen: list[tuple[int, Any]] = []
    total = map_merge(SUMMARY, CHUNKS, on_merge=lambda n, state: seen.append((n, SUMMARY.finish(state))))
    assert [n for n, _ in seen] == [16, 32, 40]
    for n, answer in seen:
        assert _same(answer, map_merge(SUMMARY, CHUNKS[:n]))
    assert _same(seen[-1][1], total)


def test_at_most_the_chunks_in_flight_are_alive() -> None:
    lock, alive, most = threading.Lock(), set(), 0

    class Watched(Draws):
        def update(self, state: Any, chunk: Any, rng: np.random.Generator) -> Any:
            with lock:
                alive.discard(int(chunk[0, 0]))
            return super().update(state, chunk, rng)

    def chunks() -> Iterator[np.ndarray]:
        nonlocal most
        for i in range(200):
            with lock:
                alive.add(i)
                most = max(most, len(alive))
            yield np.full((1, 1), float(i))

    assert len(map_merge(Watched(), chunks(), threads=2, in_flight=2)["drawn"]) == 200
    assert most <= 4


def test_a_slow_chunk_holds_the_others_back() -> None:
    """While chunk 0 takes its time, no more than a bounded number of chunks is begun."""
    begun: list[int] = []
    ahead = 0

    def slow() -> np.ndarray:
        nonlocal ahead
        ahead = -1
        while len(begun) != ahead:  # until the others have come to rest
            ahead = len(begun)
            time.sleep(0.3)
        return np.zeros((1, 1))

    def quick(i: int) -> np.ndarray:
        begun.append(i)
        return np.zeros((1, 1))

    map_merge(Draws(), [slow, *(lambda i=i: quick(i) for i in range(1, 300))], threads=2)
    assert ahead == 63
    assert len(begun) == 299


def test_tuples_strings_and_chunks_without_rows() -> None:
    chunks = [(np.array(["a", "bcd"]), np.ones((2, 3))), (np.array(["e"]), np.ones((1, 3)))]
    np.testing.assert_array_equal(map_merge(Draws(), chunks)["sizes"], [2, 1])
    assert _same(map_merge(SUMMARY, [X[:0], X, X[:0]]), map_merge(SUMMARY, [X]))


def test_sparse_rows_are_sketched_as_at_once() -> None:
    rows = sp.random_array((60, 30), density=0.2, rng=np.random.default_rng(0), format="csr")
    keys = np.arange(60)
    chunks = [(keys[i : i + 7], rows[i : i + 7]) for i in range(0, 60, 7)]
    sketch = map_merge(CoordinatedSummary(9, seed=1), chunks)
    np.testing.assert_array_equal(sketch.keys, sketch_rows(rows, 9, keys=keys, seed=1).keys)
    broken = rows[:7].copy()
    broken.data[0] = np.nan
    with pytest.raises(ChunkError, match=r"chunks\[9\] .*finite"):
        map_merge(CoordinatedSummary(9, seed=1), [*chunks, (keys[:7] + 60, broken)])


def test_projection_with_a_parallel_kernel_runs_on_threads() -> None:
    wide = np.random.default_rng(1).standard_normal((60, 200)).astype(np.float32)
    summary = GramSummary(projection=fast_jl_operator(200, 16, density=0.2, rng=0, dtype=np.float32))
    chunks = np.array_split(wide, 12)
    np.testing.assert_array_equal(map_merge(summary, chunks, threads=3), map_merge(summary, chunks, threads=1))


def test_documents_are_counted_exactly_in_any_chunking() -> None:
    texts = ["the cat sat on the mat", "the dog sat", "a cat and a dog", "the end", "a cat"] * 5
    documents = [text.split() for text in texts]
    words = map_merge(VocabularySummary(min_count=1), [documents[i : i + 3] for i in range(0, 25, 3)])
    counts = [map_merge(SwivelSummary(words), [documents[i : i + n] for i in range(0, 25, n)]).counts for n in (4, 25)]
    assert (counts[0] != counts[1]).nnz == 0
    assert counts[0].sum() > 0


def test_merged_games_give_the_same_strengths_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    games = rng.integers(0, 9, (300, 2))
    winners, losers = games[games[:, 0] != games[:, 1]].T
    chunks = [(winners[i : i + 40], losers[i : i + 40]) for i in range(0, len(winners), 40)]
    many, one = map_merge(BradleyTerrySummary(), chunks), map_merge(BradleyTerrySummary(), [(winners, losers)])
    np.testing.assert_array_equal(many.strengths_, one.strengths_)


def _broken(i: int, bad: Any) -> list[Any]:
    return [*CHUNKS[:i], bad, *CHUNKS[i + 1 :]]


def _raises() -> Any:
    raise OSError("the disk is gone")


@pytest.mark.parametrize("at", [0, 1, 15, 16, 32, 39])
@pytest.mark.parametrize(
    ("bad", "message", "cause"),
    [
        (_raises, r"chunks\[{}\] could not be summarised: OSError: the disk is gone", OSError),
        (np.full((2, 3), np.nan), r"chunks\[{}\] .*must be finite, got NaN", ValueError),
        ([[1.0, 2.0, 3.0]], r"chunks\[{}\] .*must be an array or a tuple of arrays, got list", TypeError),
        (np.array([[object()] * 3]), r"chunks\[{}\] .*numbers or fixed-width strings, got dtype object", TypeError),
        ((np.ones((2, 3)), np.ones(3)), r"chunks\[{}\] .*one first axis", ValueError),
    ],
)
def test_a_bad_chunk_is_named(at: int, bad: Any, message: str, cause: type) -> None:
    with pytest.raises(ChunkError, match=message.format(at)) as caught:
        map_merge(SUMMARY, _broken(at, bad))
    assert isinstance(caught.value.__cause__, cause)
    assert caught.value.index == at


@pytest.mark.parametrize("at", [1, 16, 39])
@pytest.mark.parametrize("bad", [X[:2, :2], X[:2].astype(np.float32), (X[:2], X[:2])], ids=["width", "dtype", "tuple"])
def test_chunks_of_two_kinds_are_refused_where_they_meet(at: int, bad: Any) -> None:
    class Any_(Draws):
        pass

    with pytest.raises(ChunkError, match=r"chunks\[\d+\] must be as chunks\[\d+\], rows of shape") as caught:
        map_merge(Any_(), _broken(at, bad))
    assert abs(caught.value.index - at) <= 1


def test_errors_of_a_source_a_merge_and_a_state_are_named() -> None:
    def source() -> Iterator[np.ndarray]:
        yield X
        raise OSError("end of tape")

    with pytest.raises(ChunkError, match=r"chunks\[1\] could not be had: OSError: end of tape") as caught:
        map_merge(SUMMARY, source())
    assert isinstance(caught.value.__cause__, OSError)

    class NoMerge(Draws):
        def merge(self, a: Any, b: Any) -> Any:
            if len(a["sizes"]) and len(b["sizes"]):
                raise ArithmeticError("no")
            return super().merge(a, b)

    with pytest.raises(ChunkError, match=r"chunks\[0\] to chunks\[15\] could not be merged: ArithmeticError: no"):
        map_merge(NoMerge(), CHUNKS)
    with pytest.raises(ChunkError, match="could not be merged: ArithmeticError: no"):
        map_merge(NoMerge(), CHUNKS[:3:2] + CHUNKS[:1])

    class NoState(Draws):
        def update(self, state: Any, chunk: Any, rng: Any) -> Any:
            return {"list": [1]}

    with pytest.raises(ChunkError, match=r"summary\.update returned must hold NumPy arrays"):
        map_merge(NoState(), CHUNKS)


def test_bad_arguments_are_refused() -> None:
    for chunks, error in ([], ValueError), (iter([]), ValueError), (X, TypeError), ("abc", TypeError), (3, TypeError):
        with pytest.raises(error, match="chunks must"):
            map_merge(SUMMARY, chunks)
    with pytest.raises(TypeError, match=r"summary must be an object .* got the class"):
        map_merge(MomentSummary, CHUNKS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="summary must be an object"):
        map_merge(object(), CHUNKS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on_merge"):
        map_merge(SUMMARY, CHUNKS, on_merge=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least n_components = 7 columns"):
        map_merge(PCASummary(7), CHUNKS)


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    map_merge(SUMMARY, CHUNKS, progress=True)
    assert "40" in capsys.readouterr().err
    map_merge(SUMMARY, CHUNKS)
    assert capsys.readouterr().err == ""


def test_without_the_extra_everything_imports_and_says_what_is_missing() -> None:
    code = """
import sys
for name in ("dask", "distributed", "pyspark", "pyarrow"):
    sys.modules[name] = None
import numpy as np
from algokit.cluster.map_merge import map_merge, map_merge_spark
from algokit.cluster.summaries import MomentSummary
print(map_merge(MomentSummary(), [np.eye(2)]).n_rows)
for call, more in (map_merge, dict(client=object())), (map_merge_spark, {}):
    try:
        call(MomentSummary(), [np.eye(2)], **more)
    except ModuleNotFoundError as error:
        print("algokit-book[cluster]" in str(error))
print(sorted({"jax", "cupy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:4] == ["2", "True", "True", "[]"]
