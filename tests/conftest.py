"""Fixtures shared by every test of the package."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from algokit.arrays import kind_of

settings.register_profile("book", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "book"))

BACKENDS = ("numpy", "array_api_strict", "jax", "torch", "cupy")


def _maker(backend: str) -> Callable[[np.ndarray], Any]:
    """Function that turns a NumPy array into one of the backend, in double precision; skips where it is missing."""
    module = pytest.importorskip("jax.numpy" if backend == "jax" else backend)
    if backend == "cupy" and not _has_gpu(module):
        pytest.skip("no CUDA device")
    if backend == "jax":
        importlib.import_module("jax").config.update("jax_enable_x64", True)
    return module.asarray


def _has_gpu(cupy: Any) -> bool:
    try:
        return cupy.cuda.runtime.getDeviceCount() > 0
    except Exception:
        return False


@pytest.fixture(params=BACKENDS)
def xp_array(request: pytest.FixtureRequest) -> Callable[[np.ndarray], Any]:
    """For each backend present: ``make(numpy_array)`` gives that backend's array; ``make.kind`` is its name."""
    make = _maker(request.param)

    def convert(x: Any) -> Any:
        made = make(np.asarray(x))
        assert kind_of(made) == request.param
        return made

    convert.kind = request.param  # type: ignore[attr-defined]
    return convert


@pytest.fixture
def assert_threads_agree() -> Callable[[str], None]:
    """Run a program with one thread and with two, and assert that it prints the same, to the bit."""

    def check(program: str) -> None:
        printed = {
            subprocess.run(
                [sys.executable, "-c", program],
                env={**os.environ, "NUMBA_NUM_THREADS": threads},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for threads in ("1", "2")
        }
        assert len(printed) == 1

    return check


@pytest.fixture(scope="session")
def in_a_tree() -> Callable[[Any, Any, int], dict[str, np.ndarray]]:
    """``in_a_tree(summary, chunks, seed)``: a mergeable summary's state of the chunks, by a random tree of merges."""

    def state_of(summary: Any, chunks: Any, seed: int) -> dict[str, np.ndarray]:
        """State of the chunks, some of them updates of one state, merged with their neighbours in a random tree."""
        rng, states = np.random.default_rng(seed), [summary.init()]
        for chunk in chunks:
            grown = states.pop() if rng.random() < 0.3 else summary.init()
            before = {key: value.copy() for key, value in grown.items()}
            states.append(summary.update(grown, chunk, np.random.default_rng(0)))
            for key, value in before.items():
                np.testing.assert_array_equal(grown[key], value)  # the argument is as it was
        while len(states) > 1:
            i = int(rng.integers(len(states) - 1))
            before = [{key: value.copy() for key, value in state.items()} for state in states[i : i + 2]]
            whole = summary.merge(*states[i : i + 2])
            for old, state in zip(before, states[i : i + 2], strict=True):
                for key, value in old.items():
                    np.testing.assert_array_equal(state[key], value)
            states[i : i + 2] = [whole]
        buffer = io.BytesIO()
        np.savez(buffer, **states[0])  # a state travels without pickle
        buffer.seek(0)
        with np.load(buffer, allow_pickle=False) as back:
            return {key: back[key] for key in back.files}

    return state_of
