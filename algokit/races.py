"""Races: ours and its peers timed in turn, in one run, after checking that they give the same answer.

What is kept is the ratio of a peer's time to ours, with its spread, and the fraction of the machine's limit that ours
reaches: never a time, which would only be true of one machine on one day.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from algokit.checks import check_bool, check_int, check_one_of

__all__ = [
    "AnswersDisagreeError",
    "Contestant",
    "Limit",
    "Race",
    "Ratio",
    "copy_bandwidth",
    "machine",
    "matmul_rate",
    "race",
    "write_results",
]


class AnswersDisagreeError(AssertionError):
    """A peer's answer is not ours: there is nothing to time."""


@dataclass(frozen=True)
class Contestant:
    """One entry of a race.

    Attributes
    ----------
    name : str
        As it is shown, such as ``"choix ilsr"``.
    run : callable
        ``run(data) -> answer``; what is timed. A GPU contestant synchronises before it returns.
    package : str, default ""
        Distribution whose version is reported; empty for our own code.
    """

    name: str
    run: Callable[[Any], Any]
    package: str = ""


@dataclass(frozen=True)
class Ratio:
    """A peer's time over ours: above 1 we are ahead.

    Attributes
    ----------
    peer, version : str
        Who.
    median, low, high : float
        Median and quartiles of the ratio over the runs.
    runs : int
        Number of paired runs.
    """

    peer: str
    version: str
    median: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Limit:
    """How much of what the machine can do our code reaches.

    Attributes
    ----------
    kind : {"bytes", "flops"}
        What is limiting.
    fraction : float
        Rate of our code over the machine's measured rate.
    of : str
        What it was compared with, such as ``"measured copy bandwidth"``.
    """

    kind: Literal["bytes", "flops"]
    fraction: float
    of: str


@dataclass(frozen=True)
class Race:
    """Result of one race.

    Attributes
    ----------
    name : str
        The input, such as ``"5,000 players, 100,000 games"``.
    ours : str
        Name of our contestant.
    agreement : str
        What was checked of the answers before timing.
    ratios : list of Ratio
        One per peer.
    limit : Limit or None
        Roofline fraction, where one was measured.
    note : str
        Anything a reader must know, such as why a race is lost.
    """

    name: str
    ours: str
    agreement: str
    ratios: list[Ratio] = field(default_factory=list)
    limit: Limit | None = None
    note: str = ""


def race(
    name: str,
    *,
    data: Callable[[], Any],
    ours: Contestant,
    peers: Sequence[Contestant],
    agree: Callable[[Any, Any], bool],
    agreement: str,
    runs: int = 7,
    isolate: bool = False,
    limit: Callable[[float], Limit] | None = None,
    note: str = "",
) -> Race:
    """Time ours and every peer in alternation on the same data, after checking that the answers agree.

    Parameters
    ----------
    name : str
        The input, in words.
    data : callable
        ``data() -> object`` given to every contestant; deterministic. With ``isolate`` it is called in each process.
    ours : Contestant
        Our entry.
    peers : sequence of Contestant
        At least one other.
    agree : callable
        ``agree(our_answer, peer_answer) -> bool``.
    agreement : str
        What ``agree`` checks, in words.
    runs : int, default 7
        Timed runs of each, after one that is not timed (compilation, warm caches).
    isolate : bool, default False
        One fresh process per contestant, where thread pools or compiled state would mix. Then ``data`` and every
        ``run`` must be module-level functions, and answers picklable.
    limit : callable, optional
        ``limit(our_median_seconds) -> Limit``.
    note : str, default ""
        Shown with the result.

    Returns
    -------
    Race
        Ratios with their spread.

    Raises
    ------
    AnswersDisagreeError
        If a peer's answer is not ours; nothing is timed then.
    ValueError
        If there is no peer, or ``runs`` is less than 3.
    """
    runs = check_int(runs, "runs", low=3)
    check_bool(isolate, "isolate")
    if not peers:
        raise ValueError("peers must name at least one contestant")
    entries = [ours, *peers]
    with contextlib.ExitStack() as stack:
        lanes = [stack.enter_context(_lane(e, data, isolate)) for e in entries]
        answers = [lane()[1] for lane in lanes]
        for peer, answer in zip(peers, answers[1:], strict=True):
            if not agree(answers[0], answer):
                raise AnswersDisagreeError(f"{name}: {peer.name} does not agree with {ours.name} ({agreement})")
        times = np.array([[lane()[0] for lane in lanes] for _ in range(runs)])  # (runs, entries), in turn
    ratios = times[:, 1:] / times[:, :1]
    ours_median = statistics.median(times[:, 0])
    return Race(
        name,
        ours.name,
        agreement,
        [_ratio(peer, ratios[:, i]) for i, peer in enumerate(peers)],
        limit(ours_median) if limit else None,
        note,
    )


def _ratio(peer: Contestant, ratios: np.ndarray) -> Ratio:
    median, low, high = (_three(q) for q in np.percentile(ratios, (50, 25, 75)))
    version = importlib.metadata.version(peer.package) if peer.package else ""
    return Ratio(peer.name, version, median, low, high, len(ratios))


def _three(value: float) -> float:
    return float(f"{value:.3g}")


Lane = Callable[[], tuple[float, Any]]  # one run: seconds and answer


@contextlib.contextmanager
def _lane(entry: Contestant, data: Callable[[], Any], isolate: bool) -> Iterator[Lane]:
    if not isolate:
        material = data()
        yield lambda: _timed(entry.run, material)
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, entry.run, data), daemon=True)
    process.start()
    there.close()

    def ask() -> tuple[float, Any]:
        here.send("run")
        try:
            answer = here.recv()
        except EOFError:
            raise RuntimeError(f"the process of {entry.name} died") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        yield ask
    finally:
        here.close()
        process.join(timeout=5)
        process.kill()


def _serve(pipe: Any, run: Callable[[Any], Any], data: Callable[[], Any]) -> None:
    """In the contestant's own process: run once for every message, until the other side hangs up."""
    material = data()
    with contextlib.suppress(EOFError):
        while pipe.recv() == "run":
            try:
                pipe.send(_timed(run, material))
            except Exception as error:
                pipe.send(error)


def _timed(run: Callable[[Any], Any], material: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    answer = run(material)
    return time.perf_counter() - start, answer


def copy_bandwidth(n_bytes: int = 2**28, *, runs: int = 5) -> float:
    """Bandwidth of a plain copy between two arrays, by NumPy on one thread.

    Parameters
    ----------
    n_bytes : int, default 2**28
        Size of the array copied; larger than the last-level cache for memory, smaller for the cache.
    runs : int, default 5
        The best of so many.

    Returns
    -------
    float
        GB/s, bytes read and bytes written both counted.
    """
    n_bytes = check_int(n_bytes, "n_bytes", low=1024, high=2**34)
    runs = check_int(runs, "runs", low=1, high=1000)
    source = np.ones(n_bytes // 8)
    target = np.zeros_like(source)
    repeats = max(1, 2**26 // n_bytes)

    def copy(repeats: int) -> None:
        for _ in range(repeats):
            np.copyto(target, source)

    best = min(_timed(copy, repeats)[0] for _ in range(runs))
    return 2 * n_bytes * repeats / best / 1e9


def matmul_rate(n: int = 2048, *, runs: int = 3, dtype: str = "float32") -> float:
    """Rate of a square matrix product by the BLAS behind NumPy, on all its threads.

    Parameters
    ----------
    n : int, default 2048
        Order of the matrices.
    runs : int, default 3
        The best of so many.
    dtype : {"float32", "float64"}, default "float32"
        Precision.

    Returns
    -------
    float
        GFLOP/s, a multiplication and an addition counted as two.
    """
    n = check_int(n, "n", low=16, high=16384)
    runs = check_int(runs, "runs", low=1, high=1000)
    check_one_of(dtype, "dtype", ("float32", "float64"))
    a = np.ones((n, n), dtype=dtype)
    a @ a
    return 2 * n**3 / min(_timed(lambda m: m @ m, a)[0] for _ in range(runs)) / 1e9


def machine(*, device: str = "cpu") -> dict[str, Any]:
    """Description of this machine, with its two limits measured now.

    Parameters
    ----------
    device : str, default "cpu"
        Name of the device that ran, such as ``"NVIDIA H100"``.

    Returns
    -------
    dict
        Plain data: processor, cores, versions, copy bandwidth in GB/s, matrix product in GFLOP/s.
    """
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": importlib.metadata.version("numba"),
        "device": device,
        "copy_bandwidth_gb_s": _three(copy_bandwidth()),
        "matmul_gflop_s": _three(matmul_rate()),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_results(part: str, slug: str, races: Sequence[Race], *, folder: str | Path, device: str = "cpu") -> Path:
    """Write the races of one chapter to ``folder/<part>/<slug>.json``, whole or not at all.

    Parameters
    ----------
    part, slug : str
        The chapter.
    races : sequence of Race
        What :func:`race` returned.
    folder : path
        Usually ``benchmarks/results``.
    device : str, default "cpu"
        Name of the device that ran; another device than the CPU gets a file of its own, ``<slug>.<device>.json``.

    Returns
    -------
    pathlib.Path
        The file written.

    Raises
    ------
    ValueError
        If ``races`` is empty.
    """
    if not races:
        raise ValueError("races must hold at least one race")
    suffix = "" if device == "cpu" else "." + device.lower().replace(" ", "-")
    path = Path(folder) / part / f"{slug}{suffix}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"part": part, "slug": slug, "machine": machine(device=device), "races": [asdict(r) for r in races]}
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    draft.replace(path)
    for one in races:
        for r in one.ratios:
            verdict = "ahead" if r.median > 1 else "behind"
            print(f"{one.name}: {r.peer} takes {r.median:g}x our time [{r.low:g}, {r.high:g}] ({verdict})")
        if one.limit:
            print(f"{one.name}: {one.limit.fraction:.0%} of {one.limit.of}")
    return path
