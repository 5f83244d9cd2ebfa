"""The models against an independent NumPy forward, finite differences, and each other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from algokit.nn.models import (
    GPTConfig,
    conv,
    gpt,
    gpt_cached,
    gpt_shapes,
    init_cache,
    init_conv,
    init_gpt,
    init_mlp,
    layer_inputs,
    mlp,
)
from algokit.nn.trees import flatten, map_paths, unflatten

TINY = GPTConfig(vocab_size=11, context_length=12, d_model=8, n_layers=2, n_heads=2, d_ff=12)
TOKENS = np.array([[1, 2, 3, 4], [5, 6, 7, 10]])
CACHE = init_cache(TINY, 2)
EXAMPLES = {
    "gpt_shapes": dict(config=TINY),
    "init_gpt": dict(config=TINY, rng=0, dtype=np.float32),
    "gpt": dict(params=init_gpt(TINY, rng=0), tokens=TOKENS, config=TINY, tap=None),
    "layer_inputs": dict(params=init_gpt(TINY, rng=0), tokens=TOKENS, config=TINY, paths=("norm",)),
    "init_cache": dict(config=TINY, batch_size=2, capacity=5, dtype=np.float32),
    "gpt_cached": dict(params=init_gpt(TINY, rng=0), tokens=TOKENS, cache=CACHE, config=TINY, tap=None),
    "init_mlp": dict(sizes=[3, 4, 2], rng=0, biases=True, dtype=np.float32),
    "mlp": dict(params=init_mlp([3, 4, 2], rng=0), x=np.ones((2, 3)), activation="relu", tap=None),
    "init_conv": dict(channels=[1, 2], n_classes=3, size=3, rng=0, dtype=np.float32),
    "conv": dict(params=init_conv([1, 2], n_classes=3, rng=0), x=np.ones((2, 4, 4, 1)), tap=None),
}
CONFIGS = [
    GPTConfig(
        vocab_size=11, context_length=12, d_model=8, n_layers=2, n_heads=2, positions=p, activation=a, tied_head=t
    )
    for p in ("rotary", "learned")
    for a in ("gelu", "swiglu")
    for t in (True, False)
]


@pytest.fixture(autouse=True)
def _double() -> Any:
    with jax.enable_x64(True):
        yield


def shaken(params: Any, rng: int = 5) -> Any:
    """Parameters far from their initial values, so that no term is negligible."""
    draw = np.random.default_rng(rng)
    return map_paths(lambda _, x: jnp.asarray(np.asarray(x) + 0.5 * draw.standard_normal(x.shape)), params)


def numpy_gpt(params: Any, tokens: np.ndarray, c: GPTConfig) -> np.ndarray:
    """One sequence, one head and one query at a time, straight from the definitions."""
    p = {path: np.asarray(x, dtype=np.float64) for path, x in flatten(params).items()}
    d_head, logits = c.d_model // c.n_heads, []

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + c.eps) * scale

    def turn(x: np.ndarray, position: int) -> np.ndarray:
        """Pairs (j, j + half) as complex numbers times exp(i position theta_j)."""
        half = d_head // 2
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * c.rotary_base ** (-np.arange(half) / half))
        return np.concatenate([z.real, z.imag])

    for sequence in tokens:
        x = [p["embedding"][t] + (p["positions"][i] if c.positions == "learned" else 0) for i, t in enumerate(sequence)]
        for b in (f"blocks/{i}/" for i in range(c.n_layers)):
            h = [norm(row, p[b + "attention_norm"]) for row in x]
            out = []
            for i in range(len(x)):
                heads = []
                for head in range(c.n_heads):
                    cut = slice(head * d_head, (head + 1) * d_head)
                    q = (h[i] @ p[b + "query"])[cut]
                    ks = [(h[j] @ p[b + "key"])[cut] for j in range(i + 1)]
                    if c.positions == "rotary":
                        q, ks = turn(q, i), [turn(k, j) for j, k in enumerate(ks)]
                    weights = np.exp([q @ k / np.sqrt(d_head) for k in ks])
                    vs = np.array([(h[j] @ p[b + "value"])[cut] for j in range(i + 1)])
                    heads.append(weights @ vs / weights.sum())
                out.append(x[i] + np.concatenate(heads) @ p[b + "output"])
            x = []
            for row in out:
                h_row = norm(row, p[b + "mlp_norm"])
                up = h_row @ p[b + "up"]
                if c.activation == "swiglu":
                    gate = h_row @ p[b + "gate"]
                    hidden = gate / (1 + np.exp(-gate)) * up
                else:  # the tanh form of GELU
                    hidden = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
                    assert np.allclose(hidden, up / 2 * (1 + erf(up / np.sqrt(2))), atol=1e-3)
                x.append(row + hidden @ p[b + "down"])
        head = p["embedding"].T if c.tied_head else p["head"]
        logits.append([norm(row, p["norm"]) @ head for row in x])
    return np.array(logits)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_forward_agrees_with_numpy(config: GPTConfig) -> None:
    params = shaken(init_gpt(config, rng=0, dtype=np.float64))
    np.testing.assert_allclose(gpt(params, TOKENS, config), numpy_gpt(params, TOKENS, config), rtol=1e-9, atol=1e-10)


def assert_gradient(f: Any, params: Any) -> None:
    """jax.grad against central differences, along one random direction in each array."""
    f, grads = jax.jit(f), jax.jit(jax.grad(f))(params)
    flat, rng, h = flatten(params), np.random.default_rng(0), 1e-5
    for path, x in flat.items():
        direction = rng.standard_normal(x.shape)
        high, low = (f(unflatten({**flat, path: x + s * direction})) for s in (h, -h))
        exact = float((flatten(grads)[path] * direction).sum())
        assert abs(float(high - low) / (2 * h) - exact) < 1e-6 * max(1, abs(exact)), path


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradient_of_gpt(config: GPTConfig) -> None:
    params = shaken(init_gpt(config, rng=1, dtype=np.float64))
    assert_gradient(lambda p: jnp.sin(gpt(p, TOKENS, config)).mean(), params)


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_gradient_and_forward_of_mlp(activation: str) -> None:
    params, x = shaken(init_mlp([3, 5, 2], rng=0, dtype=np.float64)), np.random.default_rng(1).standard_normal((7, 3))
    assert_gradient(lambda p: jnp.sin(mlp(p, x, activation=activation)).mean(), params)
    if activation == "tanh":
        p = {path: np.asarray(v) for path, v in flatten(params).items()}
        expected = np.tanh(x @ p["0/weight"] + p["0/bias"]) @ p["1/weight"] + p["1/bias"]
        np.testing.assert_allclose(mlp(params, x, activation="tanh"), expected, rtol=1e-12)


def test_gradient_and_forward_of_conv() -> None:
    params = shaken(init_conv([2, 3, 4], n_classes=5, rng=0, dtype=np.float64))
    x = np.random.default_rng(1).standard_normal((2, 4, 6, 2))
    assert_gradient(lambda p: jnp.sin(conv(p, x)).mean(), params)
    maps = x
    for layer in ("0", "1"):
        w, b = np.asarray(params[layer]["weight"]), np.asarray(params[layer]["bias"])
        padded = np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
        n, height, width, _ = maps.shape
        out = np.zeros((n, height, width, w.shape[-1]))
        for i in range(height):
            for j in range(width):
                out[:, i, j] = np.maximum(np.einsum("nhwc,hwco->no", padded[:, i : i + 3, j : j + 3], w) + b, 0)
        maps = out
        if layer == "0":
            maps = maps.reshape(n, height // 2, 2, width // 2, 2, -1).mean(axis=(2, 4))
    head = params["head"]
    np.testing.assert_allclose(conv(params, x), maps.mean((1, 2)) @ head["weight"] + head["bias"], rtol=1e-10)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1), (3, 1)])
def test_cache_changes_nothing(config: GPTConfig, cuts: tuple[int, ...]) -> None:
    params = shaken(init_gpt(config, rng=2, dtype=np.float64))
    step = jax.jit(gpt_cached, static_argnames="config")
    cache, parts, at = init_cache(config, 2, capacity=6, dtype=np.float64), [], 0
    for n in cuts:
        logits, cache = step(params, TOKENS[:, at : at + n], cache, config)
        parts.append(logits)
        at += n
    assert int(cache.length) == 4
    np.testing.assert_allclose(np.concatenate(parts, axis=1), gpt(params, TOKENS, config), rtol=1e-11, atol=1e-11)


def test_no_position_sees_later_ones() -> None:
    params = shaken(init_gpt(TINY, rng=0, dtype=np.float64))
    changed = TOKENS.copy()
    changed[:, 2] = 0
    before, after = (np.asarray(gpt(params, t, TINY)) for t in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert np.abs(before[:, 2:] - after[:, 2:]).min(axis=-1).max() > 0


def test_rotary_scores_depend_on_distance_only() -> None:
    config = GPTConfig(vocab_size=11, context_length=12, d_model=8, n_layers=1, n_heads=2)
    params = shaken(init_gpt(config, rng=0, dtype=np.float64))
    same = np.full((1, 9), 3)  # one token everywhere: scores differ by distance only
    seen: dict[str, Any] = {}
    gpt(params, same, config, tap=lambda path, x: seen.setdefault(path, x))
    attention = np.asarray(seen["blocks/0/attention"])[0]
    for row in range(2, 9):  # ratios within a row do not depend on the row
        last = attention[:, row, row - 2 : row + 1]
        first = attention[:, 2, :3]
        np.testing.assert_allclose(last[:, 1:] / last[:, :-1], first[:, 1:] / first[:, :-1], rtol=1e-10)


@pytest.mark.parametrize("config", CONFIGS[:4], ids=str)
def test_taps_see_the_input_of_each_matrix(config: GPTConfig) -> None:
    params = shaken(init_gpt(config, rng=0, dtype=np.float64))
    inputs = layer_inputs(params, TOKENS, config)
    matrices = {p for p, s in gpt_shapes(config).items() if p.startswith("blocks") and len(s) == 2}
    assert set(inputs) == matrices | {"head"}
    for path in matrices:  # a matrix acts through its input alone: scaling one is scaling the other
        flat = flatten(params)
        scaled = gpt(unflatten({**flat, path: 2 * flat[path]}), TOKENS, config)
        tapped = gpt(params, TOKENS, config, tap=lambda at, x, path=path: 2 * x if at == path else x)
        np.testing.assert_allclose(scaled, tapped, rtol=1e-10)
        assert inputs[path].shape[-1] == flat[path].shape[0]
    head = params["embedding"].T if config.tied_head else params["head"]
    np.testing.assert_allclose(inputs["head"] @ head, gpt(params, TOKENS, config), rtol=1e-12)


def test_taps_of_mlp_and_conv() -> None:
    params, x = init_mlp([3, 4, 2], rng=0, dtype=np.float64), np.ones((2, 3))
    doubled = map_paths(lambda path, w: 2 * w if path == "1/weight" else w, params)
    np.testing.assert_allclose(mlp(params, x, tap=lambda p, h: 2 * h if p == "1/weight" else h), mlp(doubled, x))
    params, x = init_conv([1, 2], n_classes=3, rng=0, dtype=np.float64), np.ones((2, 4, 4, 1))
    doubled = map_paths(lambda path, w: 2 * w if path == "0/weight" else w, params)
    np.testing.assert_allclose(conv(params, x, tap=lambda p, h: 2 * h if p == "0/weight" else h), conv(doubled, x))


def test_initial_stream_does_not_grow_with_depth() -> None:
    config = GPTConfig(d_model=64, n_layers=12)
    stream = layer_inputs(
        init_gpt(config, rng=0), np.random.default_rng(0).integers(0, 256, (4, 64)), config, paths=["blocks/1", "norm"]
    )
    assert float(stream["norm"].std()) < 2 * float(stream["blocks/1"].std())


def test_same_seed_same_weights_and_dtype() -> None:
    a, b = (flatten(init_gpt(TINY, rng=3, dtype=np.float32)) for _ in range(2))
    assert all((a[path] == b[path]).all() and a[path].dtype == np.float32 for path in a)
    assert gpt(init_gpt(TINY, rng=3, dtype=np.float32), TOKENS, TINY).dtype == np.float32


def test_errors_name_the_path() -> None:
    flat = flatten(init_gpt(TINY, rng=0))
    with pytest.raises(ValueError, match="blocks/1/down"):
        gpt(unflatten({k: v for k, v in flat.items() if k != "blocks/1/down"}), TOKENS, TINY)
    with pytest.raises(ValueError, match=r"blocks/0/query.*\(8, 8\).*\(8, 7\)"):
        gpt(unflatten({**flat, "blocks/0/query": np.ones((8, 7))}), TOKENS, TINY)
    with pytest.raises(ValueError, match="blocks/2/query"):
        gpt(unflatten({**flat, "blocks/2/query": np.ones((8, 8))}), TOKENS, TINY)
    with pytest.raises(ValueError, match="1/weight"):
        mlp({"0": {"weight": np.ones((3, 4))}, "1": {"weight": np.ones((5, 2))}}, np.ones((2, 3)))
    with pytest.raises(ValueError, match="head"):
        conv({"0": init_conv([1, 2], n_classes=3, rng=0)["0"]}, np.ones((2, 4, 4, 1)))


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        (np.zeros((1, 13), int), ValueError, "context_length"),
        ([[1, 11]], ValueError, "11"),
        ([[1, -1]], ValueError, "-1"),
        ([[1.0, 2.0]], TypeError, "integers"),
        (np.zeros((1, 2, 3), int), ValueError, "batch, time"),
    ],
)
def test_bad_tokens(tokens: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gpt(init_gpt(TINY, rng=0), tokens, TINY)


def test_cache_that_is_full() -> None:
    params = init_gpt(TINY, rng=0)
    _, cache = gpt_cached(params, TOKENS, init_cache(TINY, 2, capacity=5), TINY)
    with pytest.raises(ValueError, match="1 positions"):
        gpt_cached(params, TOKENS[:, :2], cache, TINY)
    with pytest.raises(ValueError, match="cache"):
        gpt_cached(params, TOKENS[:1], cache, TINY)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(d_model=9), "n_heads"),
        (dict(d_model=6), "even"),
        (dict(positions="sinusoidal"), "positions"),
        (dict(activation="relu"), "activation"),
        (dict(n_layers=0), "n_layers"),
        (dict(d_ff=-1), "d_ff"),
    ],
)
def test_bad_config(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**dict(d_model=8, n_heads=2), **changes})


def test_unknown_tap_path() -> None:
    with pytest.raises(ValueError, match="blocks/7"):
        layer_inputs(init_gpt(TINY, rng=0), TOKENS, TINY, paths=["blocks/7"])
