"""A GPT, a multilayer perceptron and a convolutional network as plain functions on nested dicts of arrays.

The weights of every layer stand on the right: ``x @ W`` with ``W`` of shape (inputs, outputs). The path of each array
is stable (``blocks/0/query``), and every function that runs a model takes a ``tap``, which sees, and may replace, the
input of each weight matrix: calibration data, quantised activations, dropout, attention maps all come through it.

References: A. Vaswani et al., *Attention is all you need*, 2017; A. Radford et al., *Language models are unsupervised
multitask learners*, 2019 (GPT-2: norms before the layers); B. Zhang and R. Sennrich, *Root mean square layer
normalization*, 2019; J. Su et al., *RoFormer*, 2021 (rotary positions); N. Shazeer, *GLU variants improve transformer*,
2020 (SwiGLU). Chapter: notebooks/foundations/tiny_language_model.ipynb.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from algokit._lazy import require
from algokit.checks import RNGLike, check_bool, check_float, check_int, check_one_of, check_rng
from algokit.nn.trees import Tree, check_like, flatten, unflatten

jax = require("jax", extra="neural")
jnp = jax.numpy

__all__ = [
    "GPTConfig",
    "KVCache",
    "conv",
    "gpt",
    "gpt_cached",
    "gpt_shapes",
    "init_cache",
    "init_conv",
    "init_gpt",
    "init_mlp",
    "layer_inputs",
    "mlp",
]

Array = Any
Tap = Callable[[str, Array], Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT: decoder-only, norms before the layers (RMSNorm), no biases.

    Attributes
    ----------
    vocab_size : int
        Number of tokens; 256 for bytes.
    context_length : int
        Longest sequence, in tokens.
    d_model : int
        Width of the residual stream; divisible by ``n_heads``, and d_model / n_heads is even with rotary positions.
    n_layers, n_heads : int
        Blocks, and attention heads in each.
    d_ff : int or None
        Width of the hidden layer of each block's MLP. None: ``4 * d_model``, and two thirds of that for SwiGLU (rounded
        up to a multiple of 8), which has three matrices instead of two.
    positions : {"rotary", "learned"}
        Rotations of queries and keys, or a learned vector added to each token's embedding.
    activation : {"gelu", "swiglu"}
        ``gelu(x W_up) W_down`` or ``(silu(x W_gate) * (x W_up)) W_down``.
    tied_head : bool
        Whether the logits use the embedding, transposed, or a matrix ``head`` of their own.
    eps : float
        Added to the mean square in RMSNorm.
    rotary_base : float
        Base of the rotations' frequencies.
    """

    vocab_size: int = 256
    context_length: int = 256
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_ff: int | None = None
    positions: str = "rotary"
    activation: str = "gelu"
    tied_head: bool = True
    eps: float = 1e-6
    rotary_base: float = 10_000.0

    def __post_init__(self) -> None:
        for field in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads"):
            object.__setattr__(self, field, check_int(getattr(self, field), field, low=1, high=10**6))
        check_one_of(self.positions, "positions", ("rotary", "learned"))
        check_one_of(self.activation, "activation", ("gelu", "swiglu"))
        check_bool(self.tied_head, "tied_head")
        check_float(self.eps, "eps", low=0)
        check_float(self.rotary_base, "rotary_base", low=1)
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model must be divisible by n_heads = {self.n_heads}, got {self.d_model}")
        if self.positions == "rotary" and self.d_head % 2:
            raise ValueError(f"d_model / n_heads must be even with rotary positions, got {self.d_head}")
        if self.d_ff is None:
            wide = 4 * self.d_model
            object.__setattr__(self, "d_ff", wide if self.activation == "gelu" else -(-2 * wide // 24) * 8)
        else:
            object.__setattr__(self, "d_ff", check_int(self.d_ff, "d_ff", low=1, high=10**6))

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads


def gpt_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The path of every parameter of a GPT, and its shape.

    Parameters
    ----------
    config : GPTConfig
        Shape of the model.

    Returns
    -------
    dict of str to tuple of int
        In each block ``i``: ``blocks/i/attention_norm`` (d_model,), ``query``, ``key``, ``value``, ``output`` (d_model,
        d_model), ``mlp_norm`` (d_model,), ``up`` and, with SwiGLU, ``gate`` (d_model, d_ff), ``down`` (d_ff, d_model).
        Around them ``embedding`` (vocab_size, d_model), ``positions`` (context_length, d_model) where they are learned,
        ``norm`` (d_model,), and ``head`` (d_model, vocab_size) where it is not tied.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`GPTConfig`.

    Examples
    --------
    >>> sum(int(np.prod(shape)) for shape in gpt_shapes(GPTConfig(d_model=64, n_layers=2)).values())
    115008
    """
    _check_config(config)
    d, f = config.d_model, int(config.d_ff or 0)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, d)}
    if config.positions == "learned":
        shapes["positions"] = (config.context_length, d)
    for i in range(config.n_layers):
        block = {"attention_norm": (d,), "query": (d, d), "key": (d, d), "value": (d, d), "output": (d, d)}
        block |= {"mlp_norm": (d,), "up": (d, f), "down": (f, d)}
        if config.activation == "swiglu":
            block["gate"] = (d, f)
        shapes |= {f"blocks/{i}/{name}": shape for name, shape in block.items()}
    shapes["norm"] = (d,)
    if not config.tied_head:
        shapes["head"] = (d, config.vocab_size)
    return shapes


def init_gpt(config: GPTConfig, *, rng: RNGLike = None, dtype: Any = np.float32) -> Tree:
    """Random parameters of a GPT.

    Weights are normal with standard deviation 0.02, those that write to the residual stream (``output``, ``down``)
    smaller by the square root of the number of such writes, 2 n_layers, so that the stream's variance at the top does
    not grow with depth (Radford et al., 2019). Norms start at one.

    Parameters
    ----------
    config : GPTConfig
        Shape of the model.
    rng : None, int or numpy.random.Generator
        Source of the weights. They are drawn with NumPy: the same seed gives the same weights with every version of
        JAX.
    dtype : dtype, default float32
        Of every array.

    Returns
    -------
    nested dict of jax.Array
        With the paths and shapes of :func:`gpt_shapes`.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`GPTConfig`.

    Examples
    --------
    >>> init_gpt(GPTConfig(d_model=32, n_layers=1), rng=0)["blocks"]["0"]["query"].shape
    (32, 32)
    """
    shapes, dtype = gpt_shapes(config), check_floating(dtype, "dtype")
    rng = check_rng(rng)
    flat = {}
    for path, shape in shapes.items():
        name = path.rpartition("/")[2]
        scale = 0.02 / np.sqrt(2 * config.n_layers) if name in ("output", "down") else 0.02
        draw = np.ones(shape) if name.endswith("norm") else scale * rng.standard_normal(shape)
        flat[path] = jnp.asarray(draw, dtype)
    return unflatten(flat)


def gpt(params: Tree, tokens: Array, config: GPTConfig, *, tap: Tap | None = None) -> Array:
    """Logits of the next token at every position.

    Parameters
    ----------
    params : nested dict of arrays
        As :func:`init_gpt` makes them.
    tokens : integer array, shape (batch, time) or (time,)
        ``0 <= token < vocab_size``, ``time <= context_length``.
    config : GPTConfig
        Shape of the model.
    tap : callable, optional
        ``tap(path, x) -> x`` is called with the path of each weight matrix and the input that it multiplies (batch,
        time, inputs), and what it returns is used. It also sees ``blocks/i``, the residual stream that enters block
        ``i``, ``norm``, the stream that leaves the last block, ``blocks/i/attention``, the probabilities (batch, heads,
        queries, keys), and ``head``, the normalised states that make the logits (also with a tied head).

    Returns
    -------
    jax.Array, shape (batch, time, vocab_size) or (time, vocab_size)
        Logits, of the dtype of the parameters.

    Raises
    ------
    ValueError
        If a parameter is missing or misshapen (with its path), a token is out of range (looked at outside of ``jit``
        only: inside, its values are not known), or the sequence is longer than the context.

    Examples
    --------
    >>> config = GPTConfig(d_model=32, n_layers=1)
    >>> gpt(init_gpt(config, rng=0), np.array([[72, 105]]), config).shape
    (1, 2, 256)
    """
    check_like(params, gpt_shapes(config), "params")
    tokens = _check_tokens(tokens, "tokens", config)
    batched = tokens if tokens.ndim == 2 else tokens[None]
    if tap is None:
        logits = _logits(params, batched, config)
    else:
        logits, _ = _forward(params, batched, config, None, _check_tap(tap))
    return logits if tokens.ndim == 2 else logits[0]


def layer_inputs(
    params: Tree, tokens: Array, config: GPTConfig, *, paths: Collection[str] | None = None
) -> dict[str, Array]:
    """What enters each layer: calibration data for quantisers and pruners, hidden states, attention maps.

    Parameters
    ----------
    params : nested dict of arrays
        As for :func:`gpt`.
    tokens : integer array, shape (batch, time) or (time,)
        As for :func:`gpt`.
    config : GPTConfig
        Shape of the model.
    paths : collection of str, optional
        Which of the paths that a tap sees (see :func:`gpt`) to keep. None keeps the inputs of all weight matrices.

    Returns
    -------
    dict of str to jax.Array
        For the path of a weight matrix its input, shape (batch, time, inputs); likewise for the other paths.

    Raises
    ------
    ValueError
        If a path is unknown; as for :func:`gpt`.

    Examples
    --------
    >>> config = GPTConfig(d_model=32, n_layers=2)
    >>> inputs = layer_inputs(init_gpt(config, rng=0), np.array([[72, 105]]), config, paths=["blocks/1/down", "norm"])
    >>> {path: x.shape for path, x in inputs.items()}
    {'blocks/1/down': (1, 2, 128), 'norm': (1, 2, 32)}
    """
    shapes = gpt_shapes(config)
    matrices = {path for path, shape in shapes.items() if path.startswith("blocks") and len(shape) == 2} | {"head"}
    known = matrices | {"norm"} | {f"blocks/{i}{end}" for i in range(config.n_layers) for end in ("", "/attention")}
    if isinstance(paths, str):
        raise TypeError(f"paths must be a collection of strings, got the string {paths!r}")
    wanted = matrices if paths is None else set(paths)
    if unknown := sorted(map(str, wanted - known)):
        raise ValueError(f"paths holds {unknown[0]!r}, which no tap sees; known are {', '.join(sorted(known))}")
    check_like(params, shapes, "params")
    tokens = _check_tokens(tokens, "tokens", config)
    seen = _seen(params, tokens if tokens.ndim == 2 else tokens[None], config, frozenset(wanted))
    return {path: seen[path] for path in sorted(seen)}


class KVCache(NamedTuple):
    """Keys and values of the positions that a GPT has already seen.

    Attributes
    ----------
    keys, values : dict of str to jax.Array, shape (batch, capacity, n_heads, d_head)
        One entry per block. Keys are stored rotated.
    length : jax.Array, int32, shape ()
        Number of positions that are filled.
    """

    keys: dict[str, Array]
    values: dict[str, Array]
    length: Array


def init_cache(config: GPTConfig, batch_size: int, *, capacity: int | None = None, dtype: Any = np.float32) -> KVCache:
    """An empty cache.

    Parameters
    ----------
    config : GPTConfig
        Shape of the model.
    batch_size : int
        Number of sequences.
    capacity : int, optional
        Most positions it will hold; None: ``config.context_length``, which is also the most there may be.
    dtype : dtype, default float32
        That of the parameters.

    Returns
    -------
    KVCache
        With length 0.

    Raises
    ------
    ValueError
        If a size is out of range.

    Examples
    --------
    >>> init_cache(GPTConfig(d_model=32, n_layers=1), 2).keys["0"].shape
    (2, 256, 4, 8)
    """
    _check_config(config)
    batch_size = check_int(batch_size, "batch_size", low=1, high=10**6)
    limit, dtype = config.context_length, check_floating(dtype, "dtype")
    capacity = limit if capacity is None else check_int(capacity, "capacity", low=1, high=limit)
    empty = jnp.zeros((batch_size, capacity, config.n_heads, config.d_head), dtype)
    blocks = [str(i) for i in range(config.n_layers)]
    return KVCache(dict.fromkeys(blocks, empty), dict.fromkeys(blocks, empty), jnp.zeros((), jnp.int32))


def gpt_cached(
    params: Tree, tokens: Array, cache: KVCache, config: GPTConfig, *, tap: Tap | None = None
) -> tuple[Array, KVCache]:
    """Logits for tokens that continue what the cache has seen: the same, to rounding, as without a cache.

    Parameters
    ----------
    params : nested dict of arrays
        As for :func:`gpt`.
    tokens : integer array, shape (batch, time)
        The tokens that come next; one, or a whole prompt.
    cache : KVCache
        What came before; left unchanged.
    config : GPTConfig
        Shape of the model.
    tap : callable, optional
        As for :func:`gpt`.

    Returns
    -------
    logits : jax.Array, shape (batch, time, vocab_size)
        Of the new positions.
    cache : KVCache
        With the new positions in it.

    Raises
    ------
    ValueError
        As for :func:`gpt`; or if the cache is of another batch size, or too short for the new tokens (looked at outside
        of ``jit`` only).

    Examples
    --------
    >>> config = GPTConfig(d_model=32, n_layers=1)
    >>> params = init_gpt(config, rng=0)
    >>> logits, cache = gpt_cached(params, np.array([[72, 105]]), init_cache(config, 1), config)
    >>> int(cache.length)
    2
    """
    check_like(params, gpt_shapes(config), "params")
    tokens = _check_tokens(tokens, "tokens", config, ndim=2)
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}")
    batch, capacity = cache.keys["0"].shape[:2]
    if tokens.shape[0] != batch:
        raise ValueError(f"cache must hold {tokens.shape[0]} sequences, as tokens does, got {batch}")
    if _is_concrete(cache.length) and int(cache.length) + tokens.shape[1] > capacity:
        raise ValueError(
            f"tokens must fit into the {capacity - int(cache.length)} positions that the cache has left, "
            f"got {tokens.shape[1]}"
        )
    if tap is None:
        return _cached_logits(params, tokens, config, cache)
    return _forward(params, tokens, config, cache, _check_tap(tap))


def _forward(params: Tree, tokens: Array, config: GPTConfig, cache: KVCache | None, tap: Tap) -> tuple[Array, Any]:
    """Logits (batch, time, vocab), and the cache with the new keys and values, None where there was none."""
    time = tokens.shape[1]
    start = jnp.int32(0) if cache is None else cache.length
    corner = (jnp.int32(0), start, jnp.int32(0), jnp.int32(0))
    places = start + jnp.arange(time)  # (time,)
    x = params["embedding"][tokens]  # (batch, time, d_model)
    if config.positions == "learned":
        x = x + params["positions"][places]
    angles = _angles(places, config, x.dtype) if config.positions == "rotary" else None
    seen = time if cache is None else cache.keys["0"].shape[1]
    mask = jnp.arange(seen) <= places[:, None]  # (time, keys): no look ahead, nor at slots not filled yet
    keys, values = ({}, {}) if cache is None else (dict(cache.keys), dict(cache.values))
    for name in (str(i) for i in range(config.n_layers)):
        block, at = params["blocks"][name], f"blocks/{name}"
        x = tap(at, x)
        h = _rms_norm(x, block["attention_norm"], config.eps)
        q, k, v = (_heads(tap(f"{at}/{m}", h) @ block[m], config) for m in ("query", "key", "value"))
        if angles is not None:
            q, k = _rotate(q, *angles), _rotate(k, *angles)
        if cache is not None:
            k = keys[name] = jax.lax.dynamic_update_slice(keys[name], k, corner)
            v = values[name] = jax.lax.dynamic_update_slice(values[name], v, corner)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(config.d_head).astype(x.dtype)
        attention = tap(f"{at}/attention", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", attention, v).reshape(x.shape)
        x = x + tap(f"{at}/output", mixed) @ block["output"]
        h = _rms_norm(x, block["mlp_norm"], config.eps)
        if config.activation == "swiglu":
            h = jax.nn.silu(tap(f"{at}/gate", h) @ block["gate"]) * (tap(f"{at}/up", h) @ block["up"])
        else:
            h = jax.nn.gelu(tap(f"{at}/up", h) @ block["up"])
        x = x + tap(f"{at}/down", h) @ block["down"]
    x = tap("head", _rms_norm(tap("norm", x), params["norm"], config.eps))
    logits = x @ (params["embedding"].T if config.tied_head else params["head"])
    return logits, None if cache is None else KVCache(keys, values, cache.length + time)


@partial(jax.jit, static_argnames="config")
def _logits(params: Tree, tokens: Array, config: GPTConfig) -> Array:
    return _forward(params, tokens, config, None, _identity)[0]


@partial(jax.jit, static_argnames="config")
def _cached_logits(params: Tree, tokens: Array, config: GPTConfig, cache: KVCache) -> tuple[Array, KVCache]:
    return _forward(params, tokens, config, cache, _identity)


@partial(jax.jit, static_argnames=("config", "wanted"))
def _seen(params: Tree, tokens: Array, config: GPTConfig, wanted: frozenset[str]) -> dict[str, Array]:
    """What a tap sees at the wanted paths."""
    seen: dict[str, Array] = {}

    def keep(path: str, x: Array) -> Array:
        if path in wanted:
            seen[path] = x
        return x

    _forward(params, tokens, config, None, keep)
    return seen


def _identity(path: str, x: Array) -> Array:
    return x


def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def _heads(x: Array, config: GPTConfig) -> Array:
    """(batch, time, d_model) as (batch, time, n_heads, d_head)."""
    return x.reshape(*x.shape[:2], config.n_heads, config.d_head)


def _angles(places: Array, config: GPTConfig, dtype: Any) -> tuple[Array, Array]:
    """Cosines and sines of the rotary positions, (time, 1, d_head / 2)."""
    half = config.d_head // 2
    frequencies = config.rotary_base ** (-np.arange(half) / half)
    angles = places[:, None, None] * jnp.asarray(frequencies, dtype)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Coordinates j and j + d_head / 2 of each head, turned together by the angle of their position."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def init_mlp(sizes: Sequence[int], *, rng: RNGLike = None, biases: bool = True, dtype: Any = np.float32) -> Tree:
    """Random parameters of a multilayer perceptron: ``0/weight`` (sizes[0], sizes[1]), ``0/bias`` (sizes[1],), ...

    Weights are normal with variance 2 / inputs (K. He et al., 2015), in the last layer 1 / inputs; biases are zero.

    Parameters
    ----------
    sizes : sequence of int
        Widths, from the input to the output; at least two.
    rng : None, int or numpy.random.Generator
        Source of the weights, drawn with NumPy.
    biases : bool, default True
        Whether layers have biases.
    dtype : dtype, default float32
        Of every array.

    Returns
    -------
    nested dict of jax.Array
        One entry per layer.

    Raises
    ------
    ValueError
        If there are fewer than two sizes, or one is not positive.

    Examples
    --------
    >>> {path: x.shape for path, x in flatten(init_mlp([64, 32, 10], rng=0)).items()}
    {'0/weight': (64, 32), '0/bias': (32,), '1/weight': (32, 10), '1/bias': (10,)}
    """
    widths = _check_sizes(sizes, "sizes", least=2)
    biases, dtype = check_bool(biases, "biases"), check_floating(dtype, "dtype")
    rng = check_rng(rng)
    params: Tree = {}
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        gain = 1 if i == len(widths) - 2 else 2
        params[str(i)] = {"weight": jnp.asarray(rng.standard_normal((n_in, n_out)) * np.sqrt(gain / n_in), dtype)}
        if biases:
            params[str(i)]["bias"] = jnp.zeros(n_out, dtype)
    return params


def mlp(params: Tree, x: Array, *, activation: str = "relu", tap: Tap | None = None) -> Array:
    """Outputs of a multilayer perceptron; the last layer is linear.

    Parameters
    ----------
    params : nested dict of arrays
        As :func:`init_mlp` makes them.
    x : array, shape (..., inputs)
        Inputs.
    activation : {"relu", "gelu", "tanh"}
        Between the layers.
    tap : callable, optional
        ``tap(path, x) -> x`` with the path of each weight matrix (``0/weight``) and its input.

    Returns
    -------
    jax.Array, shape (..., outputs)
        Outputs.

    Raises
    ------
    ValueError
        If layers do not fit each other or the input (with the path).

    Examples
    --------
    >>> mlp(init_mlp([64, 32, 10], rng=0), np.ones((5, 64))).shape
    (5, 10)
    """
    x = _check_input(x, "x", ndim=None)
    check_one_of(activation, "activation", tuple(ACTIVATIONS))
    layers = _check_layers(params, x.shape[-1])
    tap = _check_tap(tap)
    for i in range(layers):
        layer = params[str(i)]
        x = tap(f"{i}/weight", x) @ layer["weight"] + layer.get("bias", 0)
        if i < layers - 1:
            x = ACTIVATIONS[activation](x)
    return x


def init_conv(
    channels: Sequence[int], *, n_classes: int, size: int = 3, rng: RNGLike = None, dtype: Any = np.float32
) -> Tree:
    """Random parameters of a convolutional classifier (see :func:`conv`).

    Parameters
    ----------
    channels : sequence of int
        Channels, from the image's to the last convolution's; at least two.
    n_classes : int
        Outputs.
    size : int, default 3
        Height and width of each filter; odd.
    rng : None, int or numpy.random.Generator
        Source of the weights, drawn with NumPy.
    dtype : dtype, default float32
        Of every array.

    Returns
    -------
    nested dict of jax.Array
        ``0/weight`` (size, size, channels[0], channels[1]), ``0/bias``, and so on; ``head/weight`` (channels[-1],
        n_classes), ``head/bias``.

    Raises
    ------
    ValueError
        If a size is out of range.

    Examples
    --------
    >>> {path: x.shape for path, x in flatten(init_conv([1, 8], n_classes=10, rng=0)).items()}
    {'0/weight': (3, 3, 1, 8), '0/bias': (8,), 'head/weight': (8, 10), 'head/bias': (10,)}
    """
    widths = _check_sizes(channels, "channels", least=2)
    n_classes = check_int(n_classes, "n_classes", low=1, high=10**6)
    size = check_int(size, "size", low=1, high=99)
    if size % 2 == 0:
        raise ValueError(f"size must be odd, got {size}")
    dtype = check_floating(dtype, "dtype")
    rng = check_rng(rng)
    params: Tree = {}
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        draw = rng.standard_normal((size, size, n_in, n_out)) * np.sqrt(2 / (size * size * n_in))
        params[str(i)] = {"weight": jnp.asarray(draw, dtype), "bias": jnp.zeros(n_out, dtype)}
    draw = rng.standard_normal((widths[-1], n_classes)) / np.sqrt(widths[-1])
    params["head"] = {"weight": jnp.asarray(draw, dtype), "bias": jnp.zeros(n_classes, dtype)}
    return params


def conv(params: Tree, x: Array, *, tap: Tap | None = None) -> Array:
    """Logits of a convolutional classifier.

    Each layer is a convolution that keeps the size (zero padding), a ReLU and, but for the last, a mean over 2 x 2
    pixels; then a mean over all pixels and a linear head.

    Parameters
    ----------
    params : nested dict of arrays
        As :func:`init_conv` makes them.
    x : array, shape (batch, height, width, channels)
        Images.
    tap : callable, optional
        ``tap(path, x) -> x`` with the path of each weight and its input.

    Returns
    -------
    jax.Array, shape (batch, n_classes)
        Logits.

    Raises
    ------
    ValueError
        If the parameters do not fit each other or the images (with the path).

    Examples
    --------
    >>> conv(init_conv([1, 8, 16], n_classes=10, rng=0), np.ones((5, 8, 8, 1))).shape
    (5, 10)
    """
    x = _check_input(x, "x", ndim=4)
    layers = _check_layers(
        {k: v for k, v in params.items() if k != "head"} if isinstance(params, Mapping) else params, x.shape[-1]
    )
    last = params[str(layers - 1)]["weight"].shape[-1]
    if "head" not in params or params["head"]["weight"].shape[0] != last:
        raise ValueError(
            f"params['head/weight'] must be there and have {last} rows, the channels of the last convolution"
        )
    tap = _check_tap(tap)
    for i in range(layers):
        layer = params[str(i)]
        x = jax.lax.conv_general_dilated(
            tap(f"{i}/weight", x).astype(layer["weight"].dtype),
            layer["weight"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + layer["bias"])
        if i < layers - 1:
            x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME") / 4
    x = tap("head/weight", x.mean((1, 2)))
    return x @ params["head"]["weight"] + params["head"]["bias"]


def check_floating(dtype: Any, name: str) -> Any:
    """A floating-point ``dtype`` (bfloat16 counts)."""
    try:
        floating = dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating))
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"{name} must be a floating-point type, got {dtype!r}")
    return dtype


def _check_tap(tap: Any) -> Tap:
    if tap is None:
        return _identity
    if not callable(tap):
        raise TypeError(f"tap must be callable, got {type(tap).__name__}")
    return tap


def _is_concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _check_config(config: Any) -> None:
    if not isinstance(config, GPTConfig):
        raise TypeError(f"config must be a GPTConfig, got {type(config).__name__}")


def _check_tokens(tokens: Any, name: str, config: GPTConfig, *, ndim: int | None = None) -> Array:
    """``tokens`` as a JAX array of one or two dimensions, or the error that says what is wrong."""
    try:
        tokens = jnp.asarray(tokens)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array of integers, got {type(tokens).__name__}") from None
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{name} must be an array of integers, got dtype {tokens.dtype}")
    if tokens.ndim not in ((1, 2) if ndim is None else (ndim,)):
        raise ValueError(
            f"{name} must have shape (batch, time){' or (time,)' if ndim is None else ''}, got {tokens.shape}"
        )
    if 0 in tokens.shape:
        raise ValueError(f"{name} must not be empty, got shape {tokens.shape}")
    if tokens.shape[-1] > config.context_length:
        raise ValueError(
            f"{name} must be at most context_length = {config.context_length} long, got {tokens.shape[-1]}"
        )
    if _is_concrete(tokens):
        values = np.asarray(tokens)
        if values.min() < 0 or values.max() >= config.vocab_size:
            wrong = values[(values < 0) | (values >= config.vocab_size)][0]
            raise ValueError(f"{name} must lie in [0, {config.vocab_size}), got {wrong}")
    return tokens


def _check_input(x: Any, name: str, *, ndim: int | None) -> Array:
    """``x`` as a finite floating JAX array."""
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array of numbers, got {type(x).__name__}") from None
    if not jnp.issubdtype(x.dtype, jnp.number) or jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be an array of real numbers, got dtype {x.dtype}")
    if x.ndim == 0 or (ndim is not None and x.ndim != ndim):
        raise ValueError(f"{name} must have {ndim or 'at least 1'} dimensions, got shape {x.shape}")
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got shape {x.shape}")
    if _is_concrete(x) and not np.isfinite(np.asarray(x)).all():
        raise ValueError(f"{name} must be finite")
    return x


def _check_sizes(sizes: Any, name: str, *, least: int) -> list[int]:
    if isinstance(sizes, str) or not isinstance(sizes, Sequence | np.ndarray) or len(sizes) < least:
        raise ValueError(f"{name} must be a sequence of at least {least} positive integers, got {sizes!r}")
    return [check_int(s, f"{name}[{i}]", low=1, high=10**6) for i, s in enumerate(sizes)]


def _check_layers(params: Any, inputs: int) -> int:
    """Number of layers ``0/weight``, ``1/weight``, ..., when each takes as many inputs as the one before gives."""
    flat = flatten(params) if isinstance(params, Mapping) else None
    if not flat:
        raise TypeError(f"params must be a nested dict of arrays, got {type(params).__name__}")
    layers = len(params)
    rows = getattr(flat.get("0/weight"), "shape", (inputs, 0))[-2]
    if rows != inputs:
        raise ValueError(f"x must have {rows} numbers on its last axis, as params['0/weight'] has rows, got {inputs}")
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        weight = flat.get(f"{i}/weight")
        if weight is None or not hasattr(weight, "shape"):
            raise ValueError(f"params lacks the array {f'{i}/weight'!r}; it has {', '.join(flat)}")
        outputs = weight.shape[-1]
        shapes[f"{i}/weight"] = (*weight.shape[:-2], inputs, outputs)
        if f"{i}/bias" in flat:
            shapes[f"{i}/bias"] = (outputs,)
        inputs = outputs
    check_like(params, shapes, "params")
    return layers
