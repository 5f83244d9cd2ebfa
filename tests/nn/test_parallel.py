"""The data-parallel step on one device: the plain step. Several devices: tests/cluster/test_data_parallel.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algokit.nn.parallel import data_parallel_step


def square(params: Any, batch: Any) -> Any:
    return ((params["w"] - batch) ** 2).mean()


EXAMPLES = {"data_parallel_step": dict(loss=square, optimizer=optax.sgd(0.1))}
STEP = data_parallel_step(square, optax.sgd(0.25), devices=jax.devices()[:1])
PARAMS = {"w": jnp.zeros(())}
STATE = optax.sgd(0.25).init(PARAMS)


def test_step_follows_the_closed_form() -> None:
    params, state = PARAMS, STATE
    for t in range(1, 5):
        params, state, _ = STEP(params, state, np.full(4, 3.0, np.float32))
        assert float(params["w"]) == 3 * (1 - 0.5**t)
    assert float(PARAMS["w"]) == 0


def test_batches_that_cannot_be_divided_are_refused() -> None:
    for batch in (np.float32(1), {}, np.zeros(0), (np.zeros(2), np.zeros(3))):
        with pytest.raises(ValueError, match="batch must hold arrays with one first axis"):
            STEP(PARAMS, STATE, batch)
    with pytest.raises(ValueError, match="devices must hold at least one"):
        data_parallel_step(square, optax.sgd(0.1), devices=[])
    with pytest.raises(TypeError, match=r"devices must be a list of jax\.Device"):
        data_parallel_step(square, optax.sgd(0.1), devices=["cpu"])
