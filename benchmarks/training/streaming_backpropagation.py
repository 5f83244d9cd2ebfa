"""Race of the streamed gradient of a small language model against jax.checkpoint, plain JAX, and plain NumPy.

    make bench PART=training SLUG=streaming_backpropagation

One gradient of the same model in single precision. JAX is compiled before the clock starts and uses all threads; ours
and NumPy use one BLAS thread, which is faster for them on matrices of this size.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from algokit.races import Contestant, Limit, Race, matmul_rate, race, write_results
from algokit.training.streaming_backpropagation import StreamLM

SIZE = dict(vocab=4096, d=64, n_layers=2, n_heads=4)
EPS = 1e-6
AGREEMENT = "gradients of all weights equal to 1e-4 in norm, relative"


class Data(NamedTuple):
    """A model's weights and a text, in the forms that the contestants take."""

    params: dict[str, Any]
    stacked: dict[str, Any]
    tokens: np.ndarray
    positions: np.ndarray


def data(length: int) -> Data:
    """Random weights and tokens, single precision."""
    params = StreamLM(**SIZE, layer_chunk=1, logits_chunk=1).init(0)
    params = jax.tree.map(lambda w: w.astype(np.float32), params)
    stacked = {**params, "blocks": jax.tree.map(lambda *w: np.stack(w), *params["blocks"])}
    angle = np.arange(length)[:, None] / 10_000 ** (np.arange(0, SIZE["d"], 2) / SIZE["d"])
    positions = np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
    return Data(params, stacked, np.random.default_rng(1).integers(0, SIZE["vocab"], length + 1), positions)


def ours(data: Data, parts: int = 8, logits_chunk: int = 64) -> dict[str, Any]:
    """Streamed: chunks of an eighth of the text in the layers, of 64 rows in the head."""
    length = len(data.tokens) - 1
    model = StreamLM(**SIZE, layer_chunk=length // parts, logits_chunk=min(length, logits_chunk))
    with threadpool_limits(1):
        return model.value_and_grad(data.params, data.tokens)[1]


# JAX


def norm(x: Any, gain: Any) -> Any:
    """RMS norm."""
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * gain


def block(p: Any, x: Any) -> Any:
    """Pre-norm transformer block on x (T, d)."""
    n_heads = SIZE["n_heads"]
    split = lambda a: jnp.swapaxes(a.reshape(len(x), n_heads, -1), 0, 1)  # noqa: E731
    a = norm(x, p["norm1"])
    q, k, v = (split(a @ p[w]) for w in ("wq", "wk", "wv"))
    scores = jnp.where(np.tri(len(x), dtype=bool), q @ jnp.swapaxes(k, 1, 2) / q.shape[-1] ** 0.5, -jnp.inf)
    x = x + jnp.swapaxes(jax.nn.softmax(scores, -1) @ v, 0, 1).reshape(x.shape) @ p["wo"]
    return x + jax.nn.gelu(norm(x, p["norm2"]) @ p["w1"], approximate=True) @ p["w2"]


def loss(params: Any, tokens: Any, positions: Any, checkpoint: bool) -> Any:
    """Mean cross-entropy; layers under a scan, so that XLA cannot merge the second forward pass with the first."""
    x = params["embed"][tokens[:-1]] + positions
    body = jax.checkpoint(block) if checkpoint else block
    x, _ = jax.lax.scan(lambda x, p: (body(p, x), None), x, params["blocks"])
    logits = norm(x, params["norm"]) @ params["head"]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits, -1), tokens[1:, None], -1))


GRADIENTS = {flag: jax.jit(jax.grad(partial(loss, checkpoint=flag))) for flag in (True, False)}


def with_jax(data: Data, checkpoint: bool) -> dict[str, Any]:
    """Compiled gradient, waited for."""
    return jax.block_until_ready(GRADIENTS[checkpoint](data.stacked, data.tokens, data.positions))


# NumPy: everything kept, whole arrays


def rms(x: np.ndarray) -> np.ndarray:
    """Inverse root mean square of each row."""
    return 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(EPS))


def norm_vjp(x: np.ndarray, gain: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of the RMS norm."""
    r = rms(x)
    u = x * r
    return r * (g * gain - u * (g * gain * u).mean(-1, keepdims=True)), (g * u).sum(0)


def softmax(x: np.ndarray) -> np.ndarray:
    """Rows of non-negative numbers that sum to one."""
    x = np.exp(x - x.max(-1, keepdims=True))
    x /= x.sum(-1, keepdims=True)
    return x


def plain_numpy(data: Data) -> dict[str, Any]:
    """The textbook backward pass: full logits, full scores, everything kept."""
    with threadpool_limits(1):
        return _plain_numpy(data.params, data.tokens[:-1], data.tokens[1:], data.positions)


def _plain_numpy(params: dict[str, Any], inputs: np.ndarray, targets: np.ndarray, positions: np.ndarray) -> Any:
    x, kept = params["embed"][inputs] + positions, []
    length, d = x.shape
    n_heads, slope, cubic = SIZE["n_heads"], np.float32(2 * np.sqrt(2 / np.pi)), np.float32(0.044715)
    split = lambda z: z.reshape(length, n_heads, -1).swapaxes(0, 1)  # noqa: E731
    join = lambda z: z.swapaxes(0, 1).reshape(length, d)  # noqa: E731
    mask, scale = (
        np.where(np.tri(length, dtype=bool), np.float32(0), -np.float32(np.inf)),
        np.float32((d // n_heads) ** -0.5),
    )
    for p in params["blocks"]:
        a = x * rms(x) * p["norm1"]
        q, k, v = split(a @ p["wq"]) * scale, split(a @ p["wk"]), split(a @ p["wv"])
        weights = softmax(q @ k.swapaxes(1, 2) + mask)
        o = join(weights @ v)
        middle = x + o @ p["wo"]
        b = middle * rms(middle) * p["norm2"]
        u = b @ p["w1"]
        s = 1 / (1 + np.exp(-slope * (u + cubic * u * u * u)))
        kept.append((x, a, q, k, v, weights, o, middle, b, u, s))
        x = middle + (u * s) @ p["w2"]
    h = x * rms(x) * params["norm"]
    e = softmax(h @ params["head"])
    e[np.arange(length), targets] -= 1
    e /= length
    d_head = h.T @ e
    g, d_norm = norm_vjp(x, params["norm"], e @ params["head"].T)
    blocks = []
    for p in reversed(params["blocks"]):
        x, a, q, k, v, weights, o, middle, b, u, s = kept.pop()
        du = (g @ p["w2"].T) * (s + u * s * (1 - s) * slope * (1 + 3 * cubic * u * u))
        dm, d_norm2 = norm_vjp(middle, p["norm2"], du @ p["w1"].T)
        dm += g
        do = split(dm @ p["wo"].T)
        dp = do @ v.swapaxes(1, 2)
        ds = weights * (dp - (weights * dp).sum(-1, keepdims=True))
        dq, dk, dv = join(ds @ k) * scale, join(ds.swapaxes(1, 2) @ q), join(weights.swapaxes(1, 2) @ do)
        dx, d_norm1 = norm_vjp(x, p["norm1"], dq @ p["wq"].T + dk @ p["wk"].T + dv @ p["wv"].T)
        blocks.insert(0, dict(norm1=d_norm1, wq=a.T @ dq, wk=a.T @ dk, wv=a.T @ dv, wo=o.T @ dm, norm2=d_norm2,
                              w1=b.T @ du, w2=(u * s).T @ g))  # fmt: skip
        g = dx + dm
    d_embed = np.zeros_like(params["embed"])
    np.add.at(d_embed, inputs, g)
    return dict(embed=d_embed, blocks=blocks, norm=d_norm, head=d_head)


def agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Norm of the difference of every gradient, relative to its own norm."""
    if isinstance(b["blocks"], dict):
        a = {**a, "blocks": jax.tree.map(lambda *w: np.stack(w), *a["blocks"])}
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.linalg.norm(np.asarray(y) - x) <= 1e-4 * np.linalg.norm(x) for x, y in pairs)


def flops(length: int, parts: int = 8) -> float:
    """Multiplications and additions in our matrix products, forward and twice backward, layers forward once more."""
    d, vocab, layers = SIZE["d"], SIZE["vocab"], SIZE["n_layers"]
    scores = length**2 / 2 * (1 + 1 / parts)  # per head; two products forward (done twice), four back, over d in all
    return 2 * (3 * length * d * vocab + layers * (4 * length * 12 * d * d + 8 * scores * d))


def main() -> list[Race]:
    """Two lengths, all peers."""
    races = []
    with threadpool_limits(1):
        rate = matmul_rate()
    for length in (1024, 2048):
        material = data(length)
        note = (
            "Against our own single chunk, repeated races gave medians from 0.94 to 1.27: "
            "read it as a small gain at best."
        )
        races.append(
            race(
                f"one gradient, T = {length:,}, 4,096 words, width 64, two layers, float32",
                data=lambda material=material: material,
                ours=Contestant("algokit, streamed", ours),
                peers=[
                    Contestant("jax.checkpoint", partial(with_jax, checkpoint=True), "jax"),
                    Contestant("JAX, everything kept", partial(with_jax, checkpoint=False), "jax"),
                    Contestant("NumPy, everything kept", plain_numpy, "numpy"),
                    Contestant("algokit, one chunk (checkpointing)", partial(ours, parts=1, logits_chunk=10**6)),
                ],
                agree=agree,
                agreement=AGREEMENT,
                runs=9,
                note=note if length == 1024 else "",
                limit=lambda s, length=length: Limit(
                    "flops", round(flops(length) / s / 1e9 / rate, 3), "measured float32 matrix product, one thread"
                ),
            )
        )
    return races


if __name__ == "__main__":
    write_results("training", "streaming_backpropagation", main(), folder=Path(__file__).parents[1] / "results")
