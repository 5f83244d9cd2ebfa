"""One training loop for every chapter that trains: a pure step under ``lax.scan``, and a readable loop around it.

A loss is ``loss(params, batch) -> scalar``; a source of batches is ``batches(key) -> batch``, so that what is random
(the choice of examples, dropout keys) comes from the batch. Optimisers are optax ``GradientTransformation`` objects.
Chapter: notebooks/foundations/tiny_language_model.ipynb.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from algokit._lazy import require
from algokit.checks import AlgokitWarning, RNGLike, check_bool, check_int, check_rng
from algokit.nn.models import GPTConfig, gpt
from algokit.nn.trees import Tree

jax = require("jax", extra="neural")
jnp = jax.numpy
optax = require("optax", extra="neural")

__all__ = [
    "TrainResult",
    "as_key",
    "bits_per_token",
    "cross_entropy",
    "minibatches",
    "next_token_loss",
    "scan_steps",
    "train",
    "windows",
]

Array = Any
Loss = Callable[[Tree, Any], Array]
Batches = Callable[[Array], Any]
MOST = 10**6  # examples in a batch


class TrainResult(NamedTuple):
    """What a training run leaves.

    Attributes
    ----------
    params : nested dict of jax.Array
        The last parameters; with ``patience``, those of the best evaluation.
    loss : numpy.ndarray, shape (steps,)
        Training loss of each step, before its update.
    evaluations : numpy.ndarray, shape (n,)
        What ``evaluate`` returned, in order.
    evaluated_at : numpy.ndarray of int, shape (n,)
        After how many steps; the first is 0.
    """

    params: Tree
    loss: np.ndarray
    evaluations: np.ndarray
    evaluated_at: np.ndarray


def as_key(rng: RNGLike) -> Array:
    """A JAX key from a seed or a NumPy generator.

    Parameters
    ----------
    rng : None, int or numpy.random.Generator
        By the rules of SPEC 7; None draws fresh entropy.

    Returns
    -------
    jax.Array
        A typed key.

    Raises
    ------
    TypeError, ValueError
        If ``rng`` is neither.

    Examples
    --------
    >>> bool((jax.random.key_data(as_key(0)) == jax.random.key_data(as_key(0))).all())
    True
    """
    return jax.random.key(int(check_rng(rng).integers(2**32, dtype=np.uint32)))


def windows(tokens: Any, *, batch_size: int, length: int) -> Batches:
    """Batches of random windows of a text: ``batches(key)`` is an int32 array of shape (batch_size, length).

    Parameters
    ----------
    tokens : array of integers, shape (n,)
        The text.
    batch_size : int
        Windows in a batch.
    length : int
        Tokens in a window: one more than the positions that :func:`next_token_loss` predicts.

    Returns
    -------
    callable
        A JAX pytree that can be called under ``jit``.

    Raises
    ------
    TypeError, ValueError
        If the text is not a vector of integers at least ``length`` long, or a size is not positive.

    Examples
    --------
    >>> windows(np.arange(100), batch_size=4, length=9)(as_key(0)).shape
    (4, 9)
    """
    x = np.asarray(tokens)
    batch_size = check_int(batch_size, "batch_size", low=1, high=MOST)
    length = check_int(length, "length", low=1)
    if not np.issubdtype(x.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got dtype {x.dtype}")
    if x.ndim != 1 or len(x) < length:
        raise ValueError(f"tokens must be a vector at least length = {length} long, got shape {x.shape}")
    return jax.tree_util.Partial(_sampler(_windows, batch_size, length), jnp.asarray(x, jnp.int32))


def minibatches(data: Any, *, batch_size: int) -> Batches:
    """Batches of examples drawn with replacement: ``batches(key)`` is an array, or a tuple of arrays, as ``data`` is.

    Parameters
    ----------
    data : array, shape (n, ...), or tuple of such arrays
        Examples; inputs and targets, say, aligned along the first axis.
    batch_size : int
        Examples in a batch.

    Returns
    -------
    callable
        A JAX pytree that can be called under ``jit``.

    Raises
    ------
    TypeError, ValueError
        If ``data`` is not made of finite numbers, is empty, lengths differ, or ``batch_size`` is not positive.

    Examples
    --------
    >>> x, y = minibatches((np.ones((50, 3)), np.arange(50)), batch_size=8)(as_key(0))
    >>> x.shape, y.shape
    ((8, 3), (8,))
    """
    batch_size = check_int(batch_size, "batch_size", low=1, high=MOST)
    single = not isinstance(data, tuple)
    arrays = [np.asarray(a) for a in ((data,) if single else data)]
    if any(a.dtype.kind not in "biuf" for a in arrays):
        raise TypeError(f"data must hold numbers, got dtypes {[str(a.dtype) for a in arrays]}")
    if not arrays or any(a.ndim == 0 or len(a) != len(arrays[0]) or not len(a) for a in arrays):
        raise ValueError(f"data must not be empty, and of one length, got shapes {[a.shape for a in arrays]}")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("data must be finite")
    return jax.tree_util.Partial(_sampler(_minibatch, batch_size, int(single)), *map(jnp.asarray, arrays))


@lru_cache
def _sampler(kernel: Callable[..., Any], batch_size: int, length: int) -> Callable[..., Any]:
    """The same function for the same sizes, so that ``jit`` compiles once."""
    return partial(kernel, batch_size, length)


def _windows(batch_size: int, length: int, tokens: Array, key: Array) -> Array:
    starts = jax.random.randint(key, (batch_size, 1), 0, len(tokens) - length + 1)
    return tokens[starts + jnp.arange(length)]


def _minibatch(batch_size: int, single: int, *data_and_key: Array) -> Any:
    *data, key = data_and_key
    rows = jax.random.randint(key, (batch_size,), 0, len(data[0]))
    return data[0][rows] if single else tuple(a[rows] for a in data)


def cross_entropy(logits: Array, targets: Array, *, mask: Array | None = None) -> Array:
    """Mean over positions of minus the log-probability of the target, in nats.

    Parameters
    ----------
    logits : array, shape (..., n_classes)
        Unnormalised log-probabilities.
    targets : integer array, shape (...)
        The class of each position.
    mask : array, shape (...), optional
        Weights, or True where a position counts.

    Returns
    -------
    jax.Array, shape ()
        Nats per position that counts.

    Raises
    ------
    ValueError
        If shapes do not fit.

    Examples
    --------
    >>> round(float(cross_entropy(np.zeros((2, 8)), np.array([3, 5]))), 4)
    2.0794
    """
    logits, targets = _numbers(logits, "logits"), _numbers(targets, "targets")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets must be integers, got dtype {targets.dtype}")
    if logits.ndim == 0 or logits.size == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have the shape of logits without its last axis, got {targets.shape} and {logits.shape}"
        )
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    if mask is None:
        return losses.mean()
    mask = _numbers(mask, "mask").astype(losses.dtype)
    if mask.shape != targets.shape:
        raise ValueError(f"mask must have the shape of targets, {targets.shape}, got {mask.shape}")
    return (losses * mask).sum() / mask.sum()


def _numbers(x: Any, name: str) -> Array:
    """``x`` as a JAX array of real numbers; a concrete one without NaN."""
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array of numbers, got {type(x).__name__}") from None
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be an array of real numbers, got dtype {x.dtype}")
    if not isinstance(x, jax.core.Tracer) and np.isnan(np.asarray(x, dtype=np.float64)).any():
        raise ValueError(f"{name} must not hold NaN")
    return x


@lru_cache
def next_token_loss(config: GPTConfig) -> Loss:
    """The loss of a language model: ``loss(params, batch)`` for a batch of windows, shape (batch, time + 1).

    Parameters
    ----------
    config : GPTConfig
        Shape of the model.

    Returns
    -------
    callable
        Mean cross-entropy of each token given those before it, in nats; the same function each time, so ``jit``
        compiles it once. A batch may also be a pair ``(tokens, mask)`` of that shape: only targets where the mask is
        true count.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`~algokit.nn.models.GPTConfig`.

    Examples
    --------
    >>> from algokit.nn.models import init_gpt
    >>> config = GPTConfig(d_model=32, n_layers=1, tied_head=False)
    >>> loss = next_token_loss(config)(init_gpt(config, rng=0), np.full((2, 9), 65))
    >>> round(float(loss / np.log(256)), 1)
    1.0
    """
    if not isinstance(config, GPTConfig):
        raise TypeError(f"config must be a GPTConfig, got {type(config).__name__}")

    def loss(params: Tree, batch: Any) -> Array:
        tokens, mask = batch if isinstance(batch, tuple) else (batch, None)
        logits = gpt(params, tokens[:, :-1], config)
        return cross_entropy(logits, tokens[:, 1:], mask=None if mask is None else mask[:, 1:])

    return loss


def bits_per_token(params: Tree, tokens: Any, config: GPTConfig, *, batch_size: int = 32) -> float:
    """Mean of ``-log2 p(token | tokens before)`` over a text: bits per byte when tokens are bytes.

    Windows of ``context_length`` overlap by half, and each token but the first is scored once: those of the first
    window with what they have, all others with at least half a context before them.

    Parameters
    ----------
    params : nested dict of arrays
        As :func:`~algokit.nn.models.init_gpt` makes them.
    tokens : array of integers, shape (n,)
        The text; at least 2 tokens.
    config : GPTConfig
        Shape of the model.
    batch_size : int, default 32
        Windows that are evaluated at once.

    Returns
    -------
    float
        Bits per token.

    Raises
    ------
    TypeError, ValueError
        If ``tokens`` is not a vector of at least two tokens of the vocabulary.

    Examples
    --------
    >>> from algokit.nn.models import init_gpt
    >>> config = GPTConfig(d_model=32, n_layers=1, tied_head=False)
    >>> round(bits_per_token(init_gpt(config, rng=0), np.arange(200), config), 1)
    8.0
    """
    if not isinstance(config, GPTConfig):
        raise TypeError(f"config must be a GPTConfig, got {type(config).__name__}")
    x = np.asarray(tokens)
    if not np.issubdtype(x.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got dtype {x.dtype}")
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"tokens must be a vector of at least 2, got shape {x.shape}")
    if x.min() < 0 or x.max() >= config.vocab_size:
        raise ValueError(f"tokens must lie in [0, {config.vocab_size}), got {x[(x < 0) | (x >= config.vocab_size)][0]}")
    batch_size = check_int(batch_size, "batch_size", low=1, high=MOST)
    context, last = config.context_length, len(x) - 1
    starts = np.append(np.arange(0, max(1, last - context), max(1, context // 2)), max(0, last - context))
    starts = np.unique(starts)
    padded = np.concatenate([x, np.zeros(max(0, context - last), x.dtype)])  # a short text: one window, one compilation
    total, scored = 0.0, 0
    for at in range(0, len(starts), batch_size):
        some = starts[at : at + batch_size]
        rows = np.concatenate([some, np.repeat(some[-1:], batch_size - len(some))])  # one shape again
        tokens = padded[rows[:, None] + np.arange(context + 1)].astype(np.int32)
        losses = np.asarray(_window_losses(params, tokens, config), dtype=np.float64)
        for start, row in zip(some, losses, strict=False):  # row[i] scores token start + 1 + i
            new = row[scored - start : last - start]
            total, scored = total + float(new.sum()), scored + len(new)
    return float(total / scored / np.log(2))


@partial(jax.jit, static_argnames="config")
def _window_losses(params: Tree, tokens: Array, config: GPTConfig) -> Array:
    logits = gpt(params, tokens[:, :-1], config)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def scan_steps(
    loss: Loss, params: Tree, state: Any, batches: Batches, optimizer: Any, key: Array, steps: int
) -> tuple[Tree, Any, Array]:
    """Optimiser steps as one ``lax.scan``: a pure function, to be put under ``jit``, or ``vmap`` over seeds.

    Parameters
    ----------
    loss : callable
        ``loss(params, batch) -> scalar``.
    params : nested dict of arrays
        Where to start.
    state : pytree
        ``optimizer.init(params)``, or what an earlier call returned.
    batches : callable
        ``batches(key) -> batch``.
    optimizer : optax.GradientTransformation
        The optimiser.
    key : jax.Array
        Step ``t`` uses ``fold_in(key, t)`` for its batch.
    steps : int
        How many.

    Returns
    -------
    params, state
        After the last step.
    losses : jax.Array, shape (steps,)
        Of each step, before its update.

    Raises
    ------
    ValueError
        If ``steps`` is not positive.

    Examples
    --------
    >>> def loss(params, batch):
    ...     return ((params["w"] - batch) ** 2).mean()
    >>> optimizer = optax.sgd(0.25)
    >>> params = {"w": jnp.zeros(())}
    >>> batches = minibatches(np.full(8, 3.0), batch_size=4)
    >>> params, state, losses = scan_steps(loss, params, optimizer.init(params), batches, optimizer, as_key(0), 2)
    >>> params["w"].item(), losses.tolist()
    (2.25, [9.0, 2.25])
    """
    steps = check_int(steps, "steps", low=1, high=10**9)
    _check_training(loss, params, batches, optimizer)
    if jax.tree.structure(state) != jax.tree.structure(jax.eval_shape(optimizer.init, params)):
        raise ValueError("state must have the structure of optimizer.init(params)")

    def step(carry: tuple[Tree, Any], t: Array) -> tuple[tuple[Tree, Any], Array]:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batches(jax.random.fold_in(key, t)))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, state), losses = jax.lax.scan(step, (params, state), jnp.arange(steps))
    return params, state, losses


_jitted_steps = jax.jit(scan_steps, static_argnames=("loss", "optimizer", "steps"))


def train(
    loss: Loss,
    params: Tree,
    batches: Batches,
    optimizer: Any,
    *,
    steps: int,
    rng: RNGLike = None,
    evaluate: Callable[[Tree], Any] | None = None,
    every: int | None = None,
    patience: int | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train: compiled chunks of ``every`` steps, an evaluation between them.

    Parameters
    ----------
    loss : callable
        ``loss(params, batch) -> scalar``, differentiable by JAX. Pass the same function again and nothing is compiled
        again.
    params : nested dict of arrays
        Where to start; left unchanged.
    batches : callable
        ``batches(key) -> batch``: see :func:`windows` and :func:`minibatches`, or any function of a JAX key.
    optimizer : optax.GradientTransformation
        The optimiser.
    steps : int
        Most steps to take.
    rng : None, int or numpy.random.Generator
        Order of the batches; the same seed gives the same run.
    evaluate : callable, optional
        ``evaluate(params) -> number``, lower is better; called before the first step and after every chunk.
    every : int, optional
        Steps in a chunk; None: a twentieth of all.
    patience : int, optional
        Stop when this many evaluations in a row were not better than the best one, and return the best parameters.
    progress : bool, optional
        Whether to show a progress bar. None: on a terminal.

    Returns
    -------
    TrainResult
        Parameters and history.

    Raises
    ------
    TypeError
        If a function is not callable, or the optimiser has no ``init`` and ``update``.
    ValueError
        If a number is out of range, or ``patience`` is given without ``evaluate``.

    Warns
    -----
    AlgokitWarning
        When the loss is no longer finite; training stops there.

    Examples
    --------
    >>> def loss(params, batch):
    ...     return ((params["w"] - batch) ** 2).mean()
    >>> result = train(loss, {"w": jnp.zeros(())}, minibatches(np.full(8, 3.0), batch_size=4), optax.sgd(0.1), steps=60)
    >>> round(float(result.params["w"]), 3)
    3.0
    """
    _check_training(loss, params, batches, optimizer)
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate must be callable, got {type(evaluate).__name__}")
    if progress is not None:
        progress = check_bool(progress, "progress")
    steps = check_int(steps, "steps", low=1, high=10**9)
    every = max(1, steps // 20) if every is None else check_int(every, "every", low=1)
    if patience is not None:
        patience = check_int(patience, "patience", low=1)
        if evaluate is None:
            raise ValueError("patience must be None where there is no evaluate")
    key = as_key(rng)
    if not isinstance(batches, jax.tree_util.Partial):
        batches = jax.tree_util.Partial(batches)
    state = optimizer.init(params)
    losses: list[np.ndarray] = []
    evaluations = [] if evaluate is None else [float(evaluate(params))]
    evaluated_at = [0] * len(evaluations)
    best, waited, done = params, 0, 0
    bar = _progress_bar(steps, progress)
    while done < steps:
        chunk = min(every, steps - done)
        params, state, new = _jitted_steps(
            loss, params, state, batches, optimizer, jax.random.fold_in(key, done), chunk
        )
        losses.append(np.asarray(new))
        done += chunk
        bar.update(chunk)
        bar.set_postfix_str(f"loss {losses[-1].mean():.4f}" + (f", best {min(evaluations):.4f}" if evaluations else ""))
        if not np.isfinite(losses[-1]).all():
            at = done - chunk + int(np.argmin(np.isfinite(losses[-1])))
            _warn(f"the loss is not finite at step {at}: training stops (a smaller learning rate may help)")
            break
        if evaluate is not None:
            evaluations.append(float(evaluate(params)))
            evaluated_at.append(done)
            better = evaluations[-1] < min(evaluations[:-1])
            best, waited = (params, 0) if better else (best, waited + 1)
            if patience is not None and waited >= patience:
                break
    bar.close()
    return TrainResult(
        params if patience is None else best, np.concatenate(losses), np.array(evaluations), np.array(evaluated_at, int)
    )


def _check_training(loss: Any, params: Any, batches: Any, optimizer: Any) -> None:
    """Refuse what is no loss, tree, source of batches or optimiser."""
    for name, f in {"loss": loss, "batches": batches}.items():
        if not callable(f):
            raise TypeError(f"{name} must be callable, got {type(f).__name__}")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be an optax GradientTransformation, got {type(optimizer).__name__}")
    leaves = jax.tree.leaves(params) if isinstance(params, dict) else []
    if not leaves or not all(hasattr(x, "dtype") and hasattr(x, "shape") for x in leaves):
        raise TypeError("params must be a nested dict of arrays, and hold at least one")


def _warn(message: str) -> None:
    warnings.warn(message, AlgokitWarning, stacklevel=3)


def _progress_bar(total: int, progress: bool | None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="step", disable=None if progress is None else not progress, leave=False)
