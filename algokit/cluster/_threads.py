"""The pool of this machine's threads: the cluster of one, without a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any


class ThreadPool:
    """``submit``, ``submit_merge``, ``wait``, ``error``, ``result``, ``close``: all that the driver asks of a pool."""

    def __init__(self, threads: int | None) -> None:
        self._threads = _threads_allowed(threads)
        self._executor = ThreadPoolExecutor(self._threads, "map_merge", initializer=_one_numba_thread)

    def workers(self) -> int:
        return self._threads

    def submit(self, function: Callable[..., Any], summary: Any, chunk: Any, *args: Any) -> Future[Any]:
        if lazy_collection(chunk):
            return self._executor.submit(function, summary, lambda: _compute(chunk), *args)
        return self._executor.submit(function, summary, chunk, *args)

    def submit_merge(self, function: Callable[..., Any], summary: Any, parts: list[Future[Any]]) -> Future[Any]:
        return self._executor.submit(function, summary, [part.result() for part in parts])  # they are done

    def wait(self, futures: Iterable[Future[Any]]) -> list[Future[Any]]:
        return list(wait(futures, return_when=FIRST_COMPLETED).done)

    def error(self, future: Future[Any]) -> BaseException | None:
        return future.exception()

    def result(self, future: Future[Any]) -> Any:
        return future.result()

    def close(self, running: Iterable[Future[Any]]) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def lazy_collection(chunk: Any) -> bool:
    """Whether a chunk is something of Dask's that has not been computed yet."""
    return any(hasattr(x, "__dask_graph__") for x in (chunk if isinstance(chunk, tuple) else (chunk,)))


def _compute(chunk: Any) -> Any:
    import dask  # there, since the chunk is Dask's

    return dask.compute(chunk, scheduler="synchronous")[0]


def _threads_allowed(threads: int | None) -> int:
    wanted = threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    return 1 if wanted > 1 and _numba_refuses_company() else wanted


def _numba_refuses_company() -> bool:
    """Whether kernels of Numba, if any is loaded, must not run from two threads at once."""
    if "numba" not in sys.modules:
        return False
    import numba
    import numpy as np

    numba.njit(parallel=True)(_fill)(np.zeros(2))  # the layer is chosen by the first parallel kernel
    return numba.threading_layer() == "workqueue"


def _fill(x: Any) -> None:
    x[:] = 1.0


def _one_numba_thread() -> None:
    """A pool of threads is parallel already."""
    if "numba" in sys.modules:
        import numba

        numba.set_num_threads(1)
