"""What a cluster does to a reduction, done on purpose. Run with ``-s`` to read what was survived."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from algokit.cluster.map_merge import ChunkError, map_merge
from algokit.cluster.summaries import MomentSummary, PCASummary
from algokit.sketching.coordinated_sampling import CoordinatedSummary, sketch_rows

distributed = pytest.importorskip("distributed", reason="needs the extra cluster")
psutil = pytest.importorskip("psutil")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cluster")]
MB = 2**20


def _cluster(**options: Any) -> Any:
    defaults = dict(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50)
    return distributed.LocalCluster(**{**defaults, **options})


def _chunk(i: int, pause: float = 0.03) -> Any:
    def load() -> np.ndarray:
        time.sleep(pause)
        return np.random.default_rng(i).standard_normal((50, 6)) + i

    return load


def test_a_killed_worker_changes_nothing() -> None:
    """Kill one of two worker processes when a third of the chunks is merged, and once more later."""
    summary = PCASummary(3)
    chunks = [_chunk(i) for i in range(100)]
    undisturbed = map_merge(summary, [_chunk(i, pause=0) for i in range(100)])
    killed = []
    with _cluster() as cluster, distributed.Client(cluster) as client:

        def kill(n: int, state: Any) -> None:
            if n in (32, 64):
                victim = next(iter(client.run(os.getpid).values()))
                os.kill(victim, signal.SIGKILL)
                killed.append(n)

        answer = map_merge(summary, chunks, client=client, on_merge=kill)
    assert killed == [32, 64]
    assert all(np.array_equal(a, b) for a, b in zip(answer, undisturbed, strict=True))
    print(f"\nsurvived: a worker killed after {killed} of 100 chunks; the answer is the undisturbed one, bit for bit")


def test_a_chunk_that_raises_stops_the_run_soon() -> None:
    def bad() -> Any:
        raise OSError("the disk is gone")

    chunks = [*(_chunk(i) for i in range(40)), bad, *(_chunk(i) for i in range(400))]
    with _cluster() as cluster, distributed.Client(cluster) as client:
        start = time.perf_counter()
        with pytest.raises(ChunkError, match=r"chunks\[40\] .*OSError: the disk is gone") as caught:
            map_merge(MomentSummary(), chunks, client=client)
        assert time.perf_counter() - start < 6  # all of them would take longer than that
        assert isinstance(caught.value.__cause__, OSError)
        assert map_merge(MomentSummary(), chunks[:20], client=client).n_rows == 1000  # the cluster is still of use
    print("\nsurvived: a chunk that raises; the run stopped, named it, and the cluster went on to the next run")


def _rows_of(path: str, start: int, stop: int, shape: tuple[int, int], keyed: bool) -> Any:
    def load() -> Any:
        rows = np.array(np.memmap(path, np.float32, "r", shape=shape)[start:stop])  # a copy: the map is closed again
        return (np.arange(start, stop), rows) if keyed else rows

    return load


class _Peak:
    """Adds to a summary's state the peak of the process's own memory."""

    def __init__(self, summary: Any) -> None:
        self.summary = summary

    def init(self) -> Any:
        return {**self.summary.init(), "peak": np.array(0)}

    def update(self, state: Any, chunk: Any, rng: Any) -> Any:
        new = self.summary.update(self._inner(state), chunk, rng)
        return {**new, "peak": np.maximum(state["peak"], _peak_of_process())}

    def merge(self, a: Any, b: Any) -> Any:
        return {**self.summary.merge(self._inner(a), self._inner(b)), "peak": np.maximum(a["peak"], b["peak"])}

    def finish(self, state: Any) -> Any:
        return self.summary.finish(self._inner(state)), int(state["peak"])

    def _inner(self, state: Any) -> Any:
        return {key: value for key, value in state.items() if key != "peak"}


def _peak_of_process() -> int:
    """Peak resident memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("what", ["PCA", "coordinated sampling"])
def test_a_matrix_four_times_the_memory_goes_through(what: str, tmp_path: Path) -> None:
    """256 MB in a file, workers that may grow by 64 MB."""
    cap, shape, step = 64 * MB, (2**20, 64), 2**13
    path, keyed = str(tmp_path / "rows.bin"), what != "PCA"
    summary: Any = CoordinatedSummary(200, seed=0) if keyed else PCASummary(4)
    rng = np.random.default_rng(0)
    scale = np.linspace(4, 1, shape[1], dtype=np.float32)
    with open(path, "wb") as file:
        for _ in range(0, shape[0], 2**16):
            (rng.standard_normal((2**16, shape[1]), dtype=np.float32) * scale).tofile(file)
    assert Path(path).stat().st_size == 4 * cap
    chunks = [_rows_of(path, i, i + step, shape, keyed) for i in range(0, shape[0], step)]
    small = [_rows_of(path, i, i + 8, shape, keyed) for i in range(0, 32 * 8, 8)]
    with _cluster(memory_limit=0) as cluster, distributed.Client(cluster) as client:
        map_merge(_Peak(summary), small, client=client)  # imports and compiled kernels are no part of the data
        before = min(client.run(_peak_of_process).values())
        result, peak = map_merge(_Peak(summary), chunks, client=client)
    whole = np.fromfile(path, np.float32).reshape(shape)
    if keyed:
        want = sketch_rows(whole, 200, keys=np.arange(shape[0]), seed=0)
        np.testing.assert_array_equal(result.keys, want.keys)
        assert result.tau == want.tau
    else:
        blocks = whole.reshape(16, -1, shape[1])
        mean = whole.mean(axis=0, dtype=float)
        scatter = sum((b - mean).T @ (b - mean) for b in blocks)
        np.testing.assert_allclose(result.variance, np.linalg.eigvalsh(scatter / (shape[0] - 1))[::-1][:4], rtol=1e-9)
    assert peak - before < cap
    grown = f"{(peak - before) / MB:.0f} MB (cap {cap // MB} MB)"
    print(f"\nsurvived: {what} of {4 * cap // MB} MB, through two workers that grew by {grown}")


@pytest.fixture(autouse=True)
def _no_children_left() -> Any:
    yield
    assert not [p for p in multiprocessing.active_children() if "Dask" in p.name]
