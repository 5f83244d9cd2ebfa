"""Race of the train step: our GPT under JAX against the same model in eager PyTorch, forward, backward and Adam.

    make bench PART=foundations SLUG=tiny_language_model

Both start from the same parameters, see the same batches, and must arrive at the same losses. Compile time is left out
(a warm-up run comes first); PyTorch has its fastest CPU forms: fused attention, fused Adam, as many threads as JAX.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from algokit.nn.models import GPTConfig, init_gpt
from algokit.nn.text import language_reference
from algokit.nn.training import next_token_loss
from algokit.nn.trees import flatten
from algokit.races import Contestant, Race, race, write_results

STEPS, RATE = 10, 1e-3


class Work(NamedTuple):
    """Where to start, and what to see."""

    config: GPTConfig
    params: dict[str, Any]
    batches: np.ndarray  # (STEPS, batch, time + 1)


def work(config: GPTConfig, batch_size: int) -> Work:
    """Windows of the language reference."""
    text = language_reference().train
    starts = np.random.default_rng(0).integers(0, len(text) - config.context_length - 1, (STEPS, batch_size, 1))
    return Work(config, init_gpt(config, rng=0), text[starts + np.arange(config.context_length + 1)].astype(np.int32))


def by_jax(w: Work) -> np.ndarray:
    """Losses of the steps, in one ``scan``."""
    return np.asarray(_run(w.params, w.batches, w.config))


def _steps(params: Any, batches: Any, config: GPTConfig) -> Any:
    loss, optimizer = next_token_loss(config), optax.adam(RATE)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, optimizer.init(params)), batches)[1]


_run = jax.jit(_steps, static_argnames="config")


def by_torch(w: Work) -> np.ndarray:
    """The same steps, one operation at a time."""
    import torch
    import torch.nn.functional as F

    c = w.config
    p = {path: torch.tensor(np.asarray(x), requires_grad=True) for path, x in flatten(w.params).items()}
    optimizer = torch.optim.Adam(list(p.values()), lr=RATE, eps=1e-8, fused=True)
    half = c.d_head // 2
    angles = torch.arange(c.context_length)[:, None] * torch.tensor(
        c.rotary_base ** (-np.arange(half) / half), dtype=torch.float32
    )
    cos, sin = angles.cos(), angles.sin()  # (time, half)

    def norm(x: Any, scale: Any) -> Any:
        return F.rms_norm(x, (c.d_model,), scale, c.eps)

    def turn(x: Any) -> Any:
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(tokens: Any) -> Any:
        x = p["embedding"][tokens]
        for b in (f"blocks/{i}/" for i in range(c.n_layers)):
            h = norm(x, p[b + "attention_norm"])
            q, k, v = (
                (h @ p[b + m]).unflatten(-1, (c.n_heads, c.d_head)).transpose(1, 2) for m in ("query", "key", "value")
            )
            mixed = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
            x = x + mixed.transpose(1, 2).flatten(2) @ p[b + "output"]
            h = norm(x, p[b + "mlp_norm"])
            if c.activation == "swiglu":
                h = F.silu(h @ p[b + "gate"]) * (h @ p[b + "up"])
            else:
                h = F.gelu(h @ p[b + "up"], approximate="tanh")
            x = x + h @ p[b + "down"]
        return norm(x, p["norm"]) @ p["embedding"].T

    losses = []
    for batch in torch.tensor(w.batches, dtype=torch.int64):
        loss = F.cross_entropy(forward(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def main() -> list[Race]:
    """The shape of the shipped model, and a smaller one such as chapters train live."""
    import torch

    shapes = {
        "the shipped model's shape, 8 x 256 bytes": (GPTConfig(d_ff=384, activation="swiglu"), 8),
        "2 blocks of width 64, 16 x 64 bytes": (GPTConfig(context_length=64, d_model=64, n_layers=2, n_heads=4), 16),
    }
    races = []
    for name, (config, batch_size) in shapes.items():
        made = work(config, batch_size)
        races.append(
            race(
                f"{STEPS} train steps: {name}",
                data=lambda made=made: made,
                ours=Contestant("algokit.nn (JAX, one scan)", by_jax),
                peers=[Contestant("PyTorch, eager", by_torch, "torch")],
                agree=lambda a, b: bool(np.allclose(a, b, rtol=2e-4)),
                agreement="all ten losses equal to 2e-4",
                runs=7,
                note=f"{torch.get_num_threads()} threads each; compilation, once per run of a chapter, is not counted",
            )
        )
    return races


if __name__ == "__main__":
    write_results("foundations", "tiny_language_model", main(), folder=Path(__file__).parents[1] / "results")
