"""What a cluster costs: seconds with one and with two workers, bytes of each state, and the model that predicts more.

    python benchmarks/cluster/scaling.py

Writes ``benchmarks/cluster/scaling.json`` and the figure of book/cluster.md, ``book/_static/cluster_scaling.svg``.
Needs the extra ``cluster``. Only ratios are stored for the page: seconds are those of the machine that ran it.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from algokit.cluster.map_merge import map_merge
from algokit.cluster.summaries import GramSummary, MomentSummary, PCASummary, state_nbytes
from algokit.inference.incremental_gmm import GaussianMixtureSummary, IncrementalGaussianMixture
from algokit.matrices.swivel import SwivelSummary, VocabularySummary
from algokit.optimization.bradley_terry import BradleyTerrySummary
from algokit.sketching.coordinated_sampling import CoordinatedSummary
from algokit.sketching.fast_johnson_lindenstrauss import ProjectedGramSummary, fast_jl_operator

ROOT = Path(__file__).parents[2]
WIDTH, ROWS, CHUNKS, RUNS, PAUSE = 256, 2**13, 64, 3, 0.25
NETWORK = 1.25e8  # bytes a second of a network of 1 Gbit/s, for the model
GROUP = 16  # chunks merged on the workers before one state comes to the client


class Load:
    """Chunk i of the file, read where it is needed."""

    def __init__(self, path: str, i: int) -> None:
        self.path, self.i = path, i

    def __call__(self) -> np.ndarray:
        table = np.memmap(self.path, np.float32, "r", shape=(ROWS * CHUNKS, WIDTH))
        return np.array(table[self.i * ROWS : (self.i + 1) * ROWS])


class Tiny:
    """A chunk that costs nothing: what is left is the price of a task."""

    def __call__(self) -> np.ndarray:
        return np.zeros((2, 1))


class Wait:
    """A chunk that waits for a slow disk: cores are not what is scarce."""

    def __call__(self) -> np.ndarray:
        time.sleep(PAUSE)
        return np.zeros((2, 1))


def seconds(summary: Any, chunks: list[Any], client: Any) -> float:
    start = time.perf_counter()
    map_merge(summary, chunks, client=client)
    return time.perf_counter() - start


def measure() -> dict[str, Any]:
    from distributed import Client, LocalCluster

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.bin")
        rng = np.random.default_rng(0)
        with open(path, "wb") as file:
            for _ in range(CHUNKS):
                rng.standard_normal((ROWS, WIDTH), dtype=np.float32).tofile(file)
        summary, chunks = PCASummary(8), [Load(path, i) for i in range(CHUNKS)]
        answers, times, waits, task = [], {}, {}, 0.0
        for workers in (1, 2, 4):
            options = dict(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None)
            with LocalCluster(**options) as cluster, Client(cluster) as client:
                waits[workers] = seconds(MomentSummary(), [Wait()] * 32, client)
                if workers > 2:
                    continue
                answers.append(map_merge(summary, chunks, client=client))  # also warms the workers
                times[workers] = [seconds(summary, chunks, client) for _ in range(RUNS)]
                task = seconds(MomentSummary(), [Tiny()] * 256, client) / 256
        assert all(np.array_equal(a, b) for a, b in zip(*answers, strict=True)), "one answer for any number of workers"
        state = summary.update(summary.init(), chunks[0](), rng)
        start = time.perf_counter()
        for _ in range(20):
            summary.merge(state, state)
        merge = (time.perf_counter() - start) / 20
    one, two = (statistics.median(times[w]) for w in (1, 2))
    return {
        "workload": f"PCA of {CHUNKS} chunks of {ROWS} x {WIDTH} float32 ({CHUNKS * ROWS * WIDTH * 4 // 2**20} MiB)",
        "speedup": {"1": 1.0, "2": round(one / two, 2)},
        "speedup_waiting": {str(w): round(waits[1] / t, 2) for w, t in waits.items()},
        "load": round(os.getloadavg()[0], 1),  # other processes that wanted the cores meanwhile, and our own
        "spread": [round(min(times[1]) / max(times[2]), 2), round(max(times[1]) / min(times[2]), 2)],
        "task_per_chunk": round(task / (one / CHUNKS), 4),  # the price of a task, in chunks' work
        "merge_per_chunk": round(merge / (one / CHUNKS), 4),
        "chunk_seconds": round(one / CHUNKS, 4),
        "state_bytes": state_nbytes(state),
    }


def model(workers: float, chunks: int, size: float, measured: dict[str, Any]) -> float:
    """Predicted speed-up: Amdahl's law with three serial parts, in units of the work of one measured chunk.

    ``size`` is the work of a chunk in these units. Serial are the scheduler (a task a chunk, which overlaps with the
    work), one state for each 16 chunks that enters this process (the same), and at the end the last group and the tree
    over the groups, of depth log2.
    """
    send = measured["state_bytes"] / NETWORK / measured["chunk_seconds"]
    merge = measured["merge_per_chunk"] + send
    work = chunks * size / workers
    scheduler = chunks * measured["task_per_chunk"]
    inbox = chunks / GROUP * merge
    return chunks * size / (max(work, scheduler, inbox) + (GROUP + math.log2(chunks / GROUP)) * merge)


def states() -> dict[str, int]:
    """Bytes of the state of each summary of the book after 10,000 rows (games, tokens)."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((10_000, 64))
    operator = fast_jl_operator(64, 16, density=0.3, rng=0)
    words = [[f"w{i}" for i in rng.zipf(1.5, 20) if i < 500] for _ in range(500)]
    games = rng.integers(0, 100, (10_000, 2))
    winners, losers = games[games[:, 0] != games[:, 1]].T
    vocabulary = map_merge(VocabularySummary(min_count=5), [words])
    runs: dict[str, tuple[Any, Any]] = {
        "MomentSummary, 64 columns": (MomentSummary(), rows),
        "GramSummary, 64 columns": (GramSummary(), rows),
        "PCASummary, 64 columns": (PCASummary(4), rows),
        "ProjectedGramSummary, 64 columns to 16": (ProjectedGramSummary(operator), rows),
        "GaussianMixtureSummary, 2 components of 2 columns": (
            GaussianMixtureSummary(IncrementalGaussianMixture(scale=1.0, beta=1e-4)),
            rows[:, :2] + 40 * rng.integers(0, 2, (10_000, 1)),
        ),
        "CoordinatedSummary, 200 of 10,000 rows": (CoordinatedSummary(200, seed=0), (np.arange(10_000), rows)),
        "VocabularySummary, 500 documents": (VocabularySummary(min_count=5), words),
        f"SwivelSummary, {len(vocabulary)} tokens": (SwivelSummary(vocabulary), words),
        "BradleyTerrySummary, 100 players": (BradleyTerrySummary(), (winners, losers)),
    }
    return {name: state_nbytes(s.update(s.init(), chunk, rng)) for name, (s, chunk) in runs.items()}


def draw(measured: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    from algokit.plotting import use_book_style

    use_book_style()
    workers = np.geomspace(1, 100, 60)
    fig, ax = plt.subplots()
    ax.plot(workers, workers, color="#9CA3AF", linestyle=":", label="linear")
    for size, chunks, label in ((1, 6400, "chunks as measured"), (20, 6400, "chunks 20 times as large")):
        ax.plot(workers, [model(p, chunks, size, measured) for p in workers], label=f"model, {label}")
    pair = measured["speedup"]
    ax.plot([1, 2], [pair["1"], pair["2"]], "o", color="black", label="measured, chunks that compute", zorder=5)
    waiting = measured["speedup_waiting"]
    ax.plot(
        [int(w) for w in waiting],
        list(waiting.values()),
        "s",
        color="black",
        fillstyle="none",
        label="measured, chunks that wait",
    )
    ax.set(xscale="log", yscale="log", xlabel="workers", ylabel="speed-up", xlim=(0.9, 115), ylim=(0.9, 115))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:.0f}")
    ax.legend()
    fig.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    measured = measure()
    measured["predicted"] = {
        "100 workers, 6400 chunks as measured": round(model(100, 6400, 1, measured), 1),
        "100 workers, 6400 chunks 20 times as large": round(model(100, 6400, 20, measured), 1),
    }
    measured["states"] = states()
    Path(__file__).with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    draw(measured, ROOT / "book" / "_static" / "cluster_scaling.svg")
    print(json.dumps({k: v for k, v in measured.items() if k != "states"}, indent=1))
    print("what one merge moves over the network:")
    for name, size in measured["states"].items():
        print(f"  {name:50s} {size:>9,} bytes")


if __name__ == "__main__":
    main()
