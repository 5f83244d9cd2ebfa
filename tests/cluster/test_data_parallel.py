"""Training on four devices against training on one: the small GPT, on the virtual devices of a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("jax", reason="needs the extra neural")

PROGRAM = """
import jax, numpy as np, optax
from algokit.nn.models import GPTConfig, init_gpt
from algokit.nn.parallel import data_parallel_step
from algokit.nn.trees import flatten
from algokit.nn.training import next_token_loss

config = GPTConfig(vocab_size=50, context_length=16, d_model=16, n_layers=2, n_heads=2)
loss, optimizer = next_token_loss(config), optax.adamw(1e-3, eps=1e-4)
tokens = np.random.default_rng(0).integers(0, 50, (5, 8, 17)).astype(np.int32)
runs = {}
for n in (1, 4):
    step = data_parallel_step(loss, optimizer, devices=jax.devices()[:n])
    params = init_gpt(config, rng=0)
    state, losses = optimizer.init(params), []
    for batch in tokens:
        params, state, value = step(params, state, batch)
        losses.append(float(value))
    runs[n] = flatten(params), losses
    print(n, len(params["embedding"].sharding.device_set))
worst = max(float(np.abs(np.asarray(runs[1][0][k]) - np.asarray(runs[4][0][k])).max()) for k in runs[1][0])
start = flatten(init_gpt(config, rng=0))
moved = min(float(np.abs(np.asarray(runs[1][0][k]) - np.asarray(start[k])).max()) for k in start)
print(worst < 2e-6, np.allclose(runs[1][1], runs[4][1], rtol=1e-5), moved > 100 * worst)
try:
    data_parallel_step(loss, optimizer)(params, state, tokens[0][:6])
except ValueError as error:
    print(error)
"""


def test_four_devices_train_as_one() -> None:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "1 1",
        "4 4",
        "True True True",
        "batch must be divisible by the 4 devices, got 6 examples",
    ]
