"""``map_merge`` on Dask: the answer of the threads to the bit, dask arrays, errors, a device's chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from algokit.cluster.map_merge import ChunkError, map_merge
from algokit.cluster.summaries import MomentSummary, PCASummary

distributed = pytest.importorskip("distributed", reason="needs the extra cluster")
dask = pytest.importorskip("dask", reason="needs the extra cluster")
da = pytest.importorskip("dask.array", reason="needs the extra cluster")

X = np.random.default_rng(0).standard_normal((200, 4))
CHUNKS = np.array_split(X, 37)
SUMMARY = PCASummary(2)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A cluster of two workers in this process."""
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def _same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("n", [1, 2, 16, 17, 37])
def test_a_cluster_gives_the_answer_of_threads(client: Any, n: int) -> None:
    seen: list[int] = []
    answer = map_merge(SUMMARY, CHUNKS[:n], client=client, on_merge=lambda n, state: seen.append(n))
    assert _same(answer, map_merge(SUMMARY, CHUNKS[:n]))
    assert seen == [*range(16, n + 1, 16), *([n] if n % 16 else [])]


def test_functions_and_generators_are_chunks_too(client: Any) -> None:
    want = map_merge(SUMMARY, CHUNKS)
    assert _same(map_merge(SUMMARY, [lambda c=c: c for c in CHUNKS], client=client, in_flight=1), want)
    assert _same(map_merge(SUMMARY, iter(CHUNKS), client=client), want)


@pytest.mark.parametrize("columns", [4, 2])
def test_a_dask_array_is_cut_along_its_rows(client: Any, columns: int) -> None:
    lazy = da.from_array(X, chunks=(11, columns))
    want = map_merge(SUMMARY, [X[i : i + 11] for i in range(0, 200, 11)])
    assert _same(map_merge(SUMMARY, lazy), want)
    assert _same(map_merge(SUMMARY, lazy, client=client), want)
    assert _same(map_merge(SUMMARY, lazy.persist(), client=client), want)
    listed = [lazy.blocks[i] for i in range(lazy.numblocks[0])]
    if columns == 4:
        assert _same(map_merge(SUMMARY, listed, client=client), want)


def test_nothing_stays_on_the_cluster(client: Any) -> None:
    map_merge(SUMMARY, CHUNKS, client=client)
    with pytest.raises(ChunkError):
        map_merge(SUMMARY, [*CHUNKS, X * np.nan], client=client)
    assert not client.futures


def test_errors_name_the_chunk_and_keep_the_cause(client: Any) -> None:
    def bad() -> Any:
        raise OSError("the disk is gone")

    with pytest.raises(ChunkError, match=r"chunks\[20\] could not be summarised: OSError: the disk") as caught:
        map_merge(SUMMARY, [*CHUNKS[:20], bad, *CHUNKS[21:]], client=client)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.index == 20
    with pytest.raises(ChunkError, match=r"chunks\[20\] must be as chunks\[16\], rows of shape \(4,\)"):
        map_merge(SUMMARY, [*CHUNKS[:20], X[:, :3]], client=client)
    with pytest.raises(ValueError, match="chunks must hold at least one"):
        map_merge(SUMMARY, [], client=client)
    with pytest.raises(TypeError, match=r"client must be a distributed\.Client"):
        map_merge(SUMMARY, CHUNKS, client="scheduler:8786")
    with pytest.raises(TypeError, match="put it into a list"):
        map_merge(SUMMARY, dask.delayed(np.eye)(2))
    with pytest.raises(ValueError, match="chunks must have rows"):
        map_merge(SUMMARY, da.asarray(3.0))


@pytest.mark.gpu
def test_chunks_on_a_gpu_give_the_same(client: Any) -> None:
    cupy = pytest.importorskip("cupy")
    lazy = da.from_array(X, chunks=(11, 4)).map_blocks(cupy.asarray)
    for where in (None, client):
        answer = map_merge(MomentSummary(), lazy, client=where)
        np.testing.assert_allclose(answer.covariance, np.cov(X.T), rtol=1e-12)
