"""The pool of a Dask cluster: the same few verbs as :class:`algokit.cluster._threads.ThreadPool`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from algokit._lazy import require
from algokit.cluster._threads import lazy_collection

REFRESH_S = 2.0  # how often the cluster is asked for its size


class DaskPool:
    """Tasks on the workers of a ``distributed.Client``. What a lost worker held is computed again by Dask."""

    def __init__(self, client: Any) -> None:
        self._distributed = require("distributed", extra="cluster")
        if not isinstance(client, self._distributed.Client):
            raise TypeError(f"client must be a distributed.Client or None, got {type(client).__name__}")
        if client.asynchronous:
            raise ValueError("client must be a synchronous one, got asynchronous=True")
        if client.status != "running":
            raise ValueError(f"client must be connected, got status {client.status!r}")
        self._client = client
        self._size, self._asked = 1, float("-inf")

    def workers(self) -> int:
        if time.monotonic() - self._asked > REFRESH_S:
            self._size, self._asked = max(1, sum(self._client.nthreads().values())), time.monotonic()
        return self._size

    def submit(self, function: Callable[..., Any], summary: Any, chunk: Any, *args: Any) -> Any:
        if lazy_collection(chunk):
            import dask

            return self._client.compute(dask.delayed(function, pure=False)(summary, chunk, *args))
        return self._client.submit(function, summary, chunk, *args, pure=False)

    def submit_merge(self, function: Callable[..., Any], summary: Any, parts: list[Any]) -> Any:
        return self._client.submit(function, summary, parts, pure=False, priority=1)  # before more chunks

    def wait(self, futures: Iterable[Any]) -> list[Any]:
        return list(self._distributed.wait(list(futures), return_when="FIRST_COMPLETED").done)

    def error(self, future: Any) -> BaseException | None:
        return None if future.status == "finished" else future.exception()

    def result(self, future: Any) -> Any:
        return future.result()

    def close(self, running: Iterable[Any]) -> None:
        running = list(running)
        if running:
            self._client.cancel(running)
