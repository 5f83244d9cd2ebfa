"""Execute notebooks in parallel, clean them, and rewrite only those whose content changed.

    python -m tools.execute [NOTEBOOK ...] [--jobs N]

A notebook that fails is left as it was; the error and the cell are printed, and the exit status is 1. Outputs of cells
tagged ``nbval-ignore-output`` (times) alone are no change. Seconds and peak memory of each rewritten notebook go to
``benchmarks/results/notebooks.json``, from which the book's page of execution times is made.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

from tools import notebooks as nbs

TIMES = nbs.ROOT / "benchmarks" / "results" / "notebooks.json"


class Outcome(NamedTuple):
    """What became of one notebook."""

    path: Path
    error: str
    changed: bool
    seconds: float
    peak_mb: float


def main() -> int:
    """Run the command line; 0 when every notebook ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--jobs", type=int, default=max(1, len(os.sched_getaffinity(0))))
    arguments = parser.parse_args()
    paths = [p.resolve() for p in arguments.notebooks] or nbs.chapters()
    missing = [p for p in paths if not p.exists()]
    if missing:
        parser.error(f"no such notebook: {', '.join(map(str, missing))}")
    outcomes = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(execute, path) for path in paths]
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="notebook", disable=None):
            outcome = job.result()
            outcomes.append(outcome)
            verdict = "FAILED" if outcome.error else "rewritten" if outcome.changed else "unchanged"
            name = outcome.path.relative_to(nbs.ROOT) if outcome.path.is_relative_to(nbs.ROOT) else outcome.path
            tqdm.write(f"{verdict:>9}  {outcome.seconds:6.1f} s  {outcome.peak_mb:6.0f} MB  {name}")
            if outcome.error:
                tqdm.write(outcome.error)
    _record(outcomes)
    return int(any(o.error for o in outcomes))


def execute(path: Path) -> Outcome:
    """Run one notebook in a fresh kernel, and write it back if anything changed."""
    stored, nb = nbs.read(path), nbs.read(path)
    start = time.perf_counter()
    client = NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    client.record_timing = False
    peak = _Peak()
    error = ""
    with peak:
        try:
            client.execute()
        except CellExecutionError as failure:
            error = str(failure)
    seconds = time.perf_counter() - start
    if error:
        return Outcome(path, error, False, seconds, peak.megabytes)
    nb.metadata["algokit"]["fingerprint"] = nbs.fingerprint(nb)
    nbs.clean(nb, path)
    changed = not nbs.volatile_outputs_only(stored, nb)
    if changed:
        draft = path.with_suffix(".tmp")
        draft.write_text(nbs.dump(nb))
        draft.replace(path)
    return Outcome(path, "", changed, seconds, peak.megabytes)


class _Peak:
    """Largest resident memory of this process's children while the context is open."""

    def __init__(self) -> None:
        self.megabytes = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.1):
            total = 0
            for child in me.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.Error:
                    continue
            self.megabytes = max(self.megabytes, total / 1e6)


def _record(outcomes: list[Outcome]) -> None:
    """Seconds and memory of the notebooks that were rewritten, and of those not yet on record."""
    book = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    before = dict(book)
    for o in outcomes:
        if o.error or not o.path.is_relative_to(nbs.ROOT):
            continue
        key = str(o.path.relative_to(nbs.ROOT))
        if o.changed or key not in book:
            book[key] = {"seconds": round(o.seconds, 1), "peak_mb": round(o.peak_mb)}
    book = {k: v for k, v in sorted(book.items()) if (nbs.ROOT / k).exists()}
    if book != before:
        TIMES.parent.mkdir(parents=True, exist_ok=True)
        TIMES.write_text(json.dumps(book, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
