"""Text from a GPT, one token at a time, with a cache of keys and values. Greedy, by temperature, or by any rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from algokit._lazy import require
from algokit.checks import RNGLike, check_float, check_int
from algokit.nn.models import GPTConfig, _check_tokens, gpt_cached, gpt_shapes, init_cache
from algokit.nn.training import as_key
from algokit.nn.trees import Tree, check_like

jax = require("jax", extra="neural")
jnp = jax.numpy

__all__ = ["generate"]

Array = Any


def generate(
    params: Tree,
    prompt: Array,
    config: GPTConfig,
    *,
    n_tokens: int,
    temperature: float = 1.0,
    logits_fn: Callable[[Array], Array] | None = None,
    rng: RNGLike = None,
) -> Array:
    """Tokens that continue each prompt.

    Parameters
    ----------
    params : nested dict of arrays
        As :func:`~algokit.nn.models.init_gpt` makes them.
    prompt : integer array, shape (batch, time) or (time,)
        What comes before; prompts of one call are of one length.
    config : GPTConfig
        Shape of the model.
    n_tokens : int
        How many to generate; with the prompt at most ``context_length``.
    temperature : float, default 1.0
        Logits are divided by it; 0 takes the likeliest token (greedy).
    logits_fn : callable, optional
        ``logits_fn(logits) -> logits`` on an array of shape (batch, vocab_size), before temperature: minus infinity
        forbids a token. Top-k and top-p are such functions. It must be traceable by JAX; pass the same function again
        and nothing is compiled again.
    rng : None, int or numpy.random.Generator
        Source of the samples; not used at temperature 0.

    Returns
    -------
    jax.Array of int32, shape (batch, n_tokens) or (n_tokens,)
        The new tokens.

    Raises
    ------
    ValueError
        As for :func:`~algokit.nn.models.gpt`; if prompt and new tokens do not fit into the context; if the temperature
        is negative.
    TypeError
        If ``logits_fn`` is not callable.

    Examples
    --------
    >>> import numpy as np
    >>> from algokit.nn.models import init_gpt
    >>> config = GPTConfig(d_model=32, n_layers=1)
    >>> generate(init_gpt(config, rng=0), np.array([72, 105]), config, n_tokens=5, rng=0).shape
    (5,)

    The three likeliest tokens only:

    >>> def top_3(logits):
    ...     return jnp.where(logits < jax.lax.top_k(logits, 3)[0][:, -1:], -jnp.inf, logits)
    >>> generate(init_gpt(config, rng=0), np.array([[72, 105]]), config, n_tokens=5, logits_fn=top_3, rng=0).shape
    (1, 5)
    """
    check_like(params, gpt_shapes(config), "params")
    tokens = _check_tokens(prompt, "prompt", config)
    n_tokens = check_int(n_tokens, "n_tokens", low=1)
    if tokens.shape[-1] + n_tokens > config.context_length:
        raise ValueError(
            f"n_tokens must be at most {config.context_length - tokens.shape[-1]}: "
            f"prompt and new tokens have to fit into context_length = {config.context_length}; got {n_tokens}"
        )
    temperature = check_float(temperature, "temperature", low=0)
    if logits_fn is not None and not callable(logits_fn):
        raise TypeError(f"logits_fn must be callable, got {type(logits_fn).__name__}")
    key = as_key(0 if temperature == 0 else rng)
    batched = tokens if tokens.ndim == 2 else tokens[None]
    new = _generate(params, batched, key, temperature or 1.0, config, n_tokens, temperature == 0, logits_fn)
    return new if tokens.ndim == 2 else new[0]


@partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _generate(
    params: Tree,
    prompt: Array,
    key: Array,
    temperature: Array,
    config: GPTConfig,
    n_tokens: int,
    greedy: bool,
    logits_fn: Callable[[Array], Array] | None,
) -> Array:
    batch, time = prompt.shape
    cache = init_cache(config, batch, capacity=time + n_tokens, dtype=params["embedding"].dtype)

    def choose(logits: Array, key: Array) -> Array:
        if logits_fn is not None:
            logits = logits_fn(logits)
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    def step(carry: tuple[Any, Array], key: Array) -> tuple[tuple[Any, Array], Array]:
        cache, token = carry
        logits, cache = gpt_cached(params, token[:, None], cache, config)
        token = choose(logits[:, -1], key)
        return (cache, token), token

    first, *_ = keys = jax.random.split(key, n_tokens)
    logits, cache = gpt_cached(params, prompt, cache, config)
    token = choose(logits[:, -1], first)
    _, rest = jax.lax.scan(step, (cache, token), keys[1:])
    return jnp.concatenate([token[:, None], rest.T], axis=1)
