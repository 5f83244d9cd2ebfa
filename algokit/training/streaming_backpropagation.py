"""Exact backpropagation in slices of the sequence: head (cross-entropy, DPO, GRPO), attention, block, language model.

Reference: Q. Luo, M. Li, L. Zhao and X. Li, *StreamBP: Memory-Efficient Exact Backpropagation for Long Sequence
Training of LLMs*, NeurIPS 2025, arXiv:2506.03077. Chapter: notebooks/training/streaming_backpropagation.ipynb.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from algokit.arrays import Array, array_namespace, from_numpy, kind_of, to_numpy
from algokit.checks import (
    RNGLike,
    check_allocation,
    check_array,
    check_bool,
    check_float,
    check_int,
    check_one_of,
    check_rng,
)
from algokit.training import _tiles as tiles

__all__ = [
    "AttnGrad",
    "BlockGrad",
    "DpoGrad",
    "HeadGrad",
    "StreamLM",
    "activation_bytes",
    "block_forward",
    "causal_attention",
    "init_block",
    "stream_attention_vjp",
    "stream_block_vjp",
    "stream_dpo_head",
    "stream_grpo_head",
    "stream_lm_head",
]

FORWARD_CHUNK = 256  # rows of queries at a time where nothing is differentiated and the caller has no say
Method = Literal["plain", "checkpoint", "stream"]


class HeadGrad(NamedTuple):
    """Loss of a language-model head and its gradients.

    Attributes
    ----------
    loss : float
        The loss, in nats.
    grad_h : array, shape (T, d)
        Gradient with respect to the hidden states.
    grad_W : array, shape (d, C)
        Gradient with respect to the head's weights.
    logp : array, shape (T,)
        Log-probability of each target.
    """

    loss: float
    grad_h: Array
    grad_W: Array
    logp: Array


class DpoGrad(NamedTuple):
    """DPO loss of one pair of answers and its gradients.

    Attributes
    ----------
    loss : float
        :math:`-\\log\\sigma(m)`.
    grad_h_w, grad_h_l : array, shape (T_w, d) and (T_l, d)
        Gradients with respect to the hidden states of the preferred and of the rejected answer.
    grad_W : array, shape (d, C)
        Gradient with respect to the head's weights.
    margin : float
        :math:`m`, the scaled difference of the two log-ratios.
    """

    loss: float
    grad_h_w: Array
    grad_h_l: Array
    grad_W: Array
    margin: float


class AttnGrad(NamedTuple):
    """Gradients of attention, each of the shape of its argument.

    Attributes
    ----------
    q, k, v : array, shape (..., T, d_h)
        With respect to queries, keys and values.
    """

    q: Array
    k: Array
    v: Array


class BlockGrad(NamedTuple):
    """Gradients of a transformer block.

    Attributes
    ----------
    params : dict of str to array
        With respect to the weights, the keys of :func:`init_block`.
    x : array, shape (T, d) or (B, T, d)
        With respect to the input.
    """

    params: dict[str, Array]
    x: Array


# Head ----------------------------------------------------------------------------------------------------------------


def stream_lm_head(
    h: Any, W: Any, targets: Any, *, chunk: int, weights: Any = None, normalize: bool = True
) -> HeadGrad:
    r"""Cross-entropy of a language-model head with its gradients, in one pass that never holds a T x C array.

    The loss is :math:`-\sum_t w_t\log p_t/\sum_t w_t` with :math:`p_t=\mathrm{softmax}(h_tW)_{\text{target}_t}`. Its
    gradient with respect to the logits is :math:`E_t=(\mathrm{softmax}_t-\mathrm{onehot}_t)\,w_t/\sum w`, hence
    :math:`\nabla H=EW^\top` and :math:`\nabla W=H^\top E`: both are sums over slices of rows.

    Parameters
    ----------
    h : array, shape (T, d), float32 or float64
        Hidden states; NumPy, CuPy, torch, JAX.
    W : array, shape (d, C)
        Weights of the head, of the kind and dtype of ``h``.
    targets : array of int, shape (T,)
        Next token of each position, in [0, C).
    chunk : int
        Rows per slice, at least 1; T or more is the plain computation.
    weights : array, shape (T,), optional
        Non-negative weight of each position, such as a mask; 1 by default.
    normalize : bool, default True
        Whether to divide by the sum of the weights.

    Returns
    -------
    HeadGrad
        Loss, gradients and log-probabilities.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If shapes do not fit, a target is out of range, a value is not finite, or ``normalize`` is asked for and all
        weights are zero.

    Notes
    -----
    Memory beyond arguments and results: ``chunk * C`` numbers. Source: section 3.2 of the paper.

    Examples
    --------
    >>> import numpy as np
    >>> result = stream_lm_head(np.zeros((3, 2)), np.zeros((2, 4)), np.array([0, 1, 3]), chunk=2)
    >>> round(result.loss, 4), result.logp.round(4)
    (1.3863, array([-1.3863, -1.3863, -1.3863]))
    """
    h, W, targets = _head_arguments(h, W, targets, "h", "targets")
    chunk = check_int(chunk, "chunk", low=1)
    scale = _weights(weights, h, check_bool(normalize, "normalize"))
    grad_h, grad_W, logp = _head(h, W, targets, lambda logp, rows: -scale[rows], chunk)
    return HeadGrad(-float(array_namespace(h).sum(scale * logp)), grad_h, grad_W, logp)


def stream_dpo_head(
    h_w: Any,
    t_w: Any,
    h_l: Any,
    t_l: Any,
    W: Any,
    *,
    ref_w: float,
    ref_l: float,
    beta: float = 0.1,
    chunk: int = 256,
) -> DpoGrad:
    r"""DPO loss of a preferred and a rejected answer, streamed although it is not a sum over positions.

    :math:`\mathcal L=-\log\sigma(m)` with
    :math:`m=\beta[(\log\pi(y_w)-\log\pi_{ref}(y_w))-(\log\pi(y_l)-\log\pi_{ref}(y_l))]`. Both log-probabilities, and
    the gradient of their difference, are sums over positions and are streamed; the factor
    :math:`\partial\mathcal L/\partial\log\pi(y_w)=-\beta\sigma(-m)` is known at the end, and multiplies once.

    Parameters
    ----------
    h_w : array, shape (T_w, d)
        Hidden states of the preferred answer's positions.
    t_w : array of int, shape (T_w,)
        Its tokens.
    h_l : array, shape (T_l, d)
        Hidden states of the rejected answer's positions.
    t_l : array of int, shape (T_l,)
        Its tokens.
    W : array, shape (d, C)
        Weights of the head.
    ref_w, ref_l : float
        Log-probabilities of both answers under the reference model, at most 0.
    beta : float, default 0.1
        Strength of the tie to the reference, positive.
    chunk : int, default 256
        Rows per slice.

    Returns
    -------
    DpoGrad
        Loss, gradients and margin.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If shapes do not fit, a target is out of range, or a value is out of range.

    Notes
    -----
    Source: section 3.2 of the paper; the loss is that of Rafailov et al. (2023).

    Examples
    --------
    >>> import numpy as np
    >>> h, W = np.zeros((2, 3)), np.zeros((3, 4))
    >>> result = stream_dpo_head(h, np.array([0, 1]), h, np.array([2, 3]), W, ref_w=-3.0, ref_l=-3.0)
    >>> round(result.loss, 4), result.margin
    (0.6931, 0.0)
    """
    h_w, W, t_w = _head_arguments(h_w, W, t_w, "h_w", "t_w")
    h_l, W, t_l = _head_arguments(h_l, W, t_l, "h_l", "t_l")
    ref_w, ref_l = check_float(ref_w, "ref_w", high=0), check_float(ref_l, "ref_l", high=0)
    beta = check_float(beta, "beta", low=0, open_low=True)
    chunk = check_int(chunk, "chunk", low=1)
    up, down = _constant(1.0, h_w), _constant(-1.0, h_l)
    grad_h_w, grad_W, logp_w = _head(h_w, W, t_w, lambda logp, rows: up[rows], chunk)
    grad_h_l, grad_W, logp_l = _head(h_l, W, t_l, lambda logp, rows: down[rows], chunk, grad_W)
    xp = array_namespace(h_w)
    margin = beta * ((float(xp.sum(logp_w)) - ref_w) - (float(xp.sum(logp_l)) - ref_l))
    slope = -beta * _sigmoid(-margin)  # dL / d log pi(y_w); minus this for y_l, whose sign is already in its gradient
    grad_W *= slope
    return DpoGrad(float(np.logaddexp(0.0, -margin)), grad_h_w * slope, grad_h_l * slope, grad_W, margin)


def stream_grpo_head(
    h: Any,
    W: Any,
    targets: Any,
    *,
    old_logp: Any,
    ref_logp: Any,
    advantage: Any,
    clip: float = 0.2,
    beta_kl: float = 0.04,
    chunk: int = 256,
    weights: Any = None,
) -> HeadGrad:
    r"""GRPO loss of an answer, or of several laid end to end, streamed: a sum over positions of clipped ratios.

    .. math:: -\sum_t w_t\bigl[\min(\rho_tA_t,\mathrm{clip}(\rho_t,1-\epsilon,1+\epsilon)A_t)
        -\beta_{KL}(e^{\Delta_t}-\Delta_t-1)\bigr],

    :math:`\rho_t=e^{\log\pi_t-\log\pi^{old}_t}`, :math:`\Delta_t=\log\pi^{ref}_t-\log\pi_t`. Per position, the
    derivative with respect to :math:`\log\pi_t` is one number; it multiplies onehot - softmax.

    Parameters
    ----------
    h : array, shape (T, d)
        Hidden states of the answer's positions.
    W : array, shape (d, C)
        Weights of the head.
    targets : array of int, shape (T,)
        The answer's tokens.
    old_logp, ref_logp : array, shape (T,)
        Log-probabilities of the tokens under the policy that drew them and under the reference, at most 0.
    advantage : float or array, shape (T,)
        Advantage :math:`A` of the answer; an array where several answers lie end to end.
    clip : float, default 0.2
        :math:`\epsilon`, in (0, 1).
    beta_kl : float, default 0.04
        Weight of the divergence from the reference, at least 0.
    chunk : int, default 256
        Rows per slice.
    weights : array, shape (T,), optional
        Non-negative :math:`w_t`; :math:`1/T` by default. For a group of G answers use :math:`1/(G|o_g|)`.

    Returns
    -------
    HeadGrad
        Loss, gradients and log-probabilities.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If shapes do not fit, a target is out of range, or a value is out of range.

    Notes
    -----
    Source: section 3.2 of the paper; the loss is that of Shao et al. (2024), equation 3.

    Examples
    --------
    >>> import numpy as np
    >>> even = np.full(2, -np.log(4.0))
    >>> h, W, t = np.zeros((2, 3)), np.zeros((3, 4)), np.array([0, 1])
    >>> stream_grpo_head(h, W, t, old_logp=even, ref_logp=even, advantage=1.5).loss
    -1.5
    """
    h, W, targets = _head_arguments(h, W, targets, "h", "targets")
    old, ref = (_rows(x, name, h, high=0.0) for x, name in ((old_logp, "old_logp"), (ref_logp, "ref_logp")))
    if np.ndim(advantage) == 0:
        gain = _constant(check_float(advantage, "advantage"), h)
    else:
        gain = _rows(advantage, "advantage", h)
    clip = check_float(clip, "clip", low=0, high=1, open_low=True, open_high=True)
    beta_kl = check_float(beta_kl, "beta_kl", low=0)
    chunk = check_int(chunk, "chunk", low=1)
    scale = _constant(1 / h.shape[0], h) if weights is None else _weights(weights, h, False)
    xp = array_namespace(h)

    def value_and_slope(logp: Array, rows: slice) -> tuple[Array, Array]:
        ratio, delta = xp.exp(logp - old[rows]), ref[rows] - logp
        plain, clipped = ratio * gain[rows], xp.clip(ratio, 1 - clip, 1 + clip) * gain[rows]
        away = xp.exp(delta)
        value = xp.minimum(plain, clipped) - beta_kl * (away - delta - 1)
        slope = xp.where(plain <= clipped, plain, xp.zeros_like(plain)) + beta_kl * (away - 1)
        return -scale[rows] * value, -scale[rows] * slope

    grad_h, grad_W, logp = _head(h, W, targets, lambda logp, rows: value_and_slope(logp, rows)[1], chunk)
    return HeadGrad(float(xp.sum(value_and_slope(logp, slice(None))[0])), grad_h, grad_W, logp)


def _head(
    h: Array,
    W: Array,
    targets: Array,
    slope: Callable[[Array, slice], Array],
    chunk: int,
    grad_W: Array = None,
) -> tuple[Array, Array, Array]:
    """Gradients of a loss whose derivative by each ``logp`` is ``slope(logp, rows)``; adds to ``grad_W`` if given."""
    xp = array_namespace(h)
    grad_W = tiles.like(W.shape, W) if grad_W is None else grad_W
    grad_h, logps = [], []
    for rows in _slices(h.shape[0], chunk):
        logp, tile, total = tiles.cross_entropy_rows(h[rows, ...] @ W, targets[rows])
        factor = (-slope(logp, rows) / total)[:, None]  # (c, 1): E = factor * tile, never formed
        grad_h.append(factor * (tile @ W.T))
        grad_W = tiles.accumulate(grad_W, factor * h[rows, ...], tile)
        logps.append(logp)
        del tile  # before the next one is made
    return xp.concat(grad_h), grad_W, xp.concat(logps)


# Attention -----------------------------------------------------------------------------------------------------------


def causal_attention(q: Any, k: Any, v: Any) -> Array:
    r"""Causal attention :math:`\mathrm{softmax}(QK^\top/\sqrt{d_h})V`, each row seeing itself and the rows before.

    Parameters
    ----------
    q, k, v : array, shape (..., T, d_h), float32 or float64
        Queries, keys and values; NumPy, CuPy, torch, JAX.

    Returns
    -------
    array, shape (..., T, d_h)
        The output.

    Raises
    ------
    TypeError
        If an argument is not numeric.
    ValueError
        If shapes or dtypes differ, or a value is not finite.

    Notes
    -----
    At most 256 rows of scores are held at a time.

    Examples
    --------
    >>> import numpy as np
    >>> causal_attention(np.zeros((3, 1)), np.zeros((3, 1)), np.array([[3.0], [1.0], [2.0]]))
    array([[3.],
           [2.],
           [2.]])
    """
    q, k, v = _attention_arguments(q, k, v)
    out = [
        tiles.attend(_scaled(q[..., rows, :]), k[..., : rows.stop, :], v[..., : rows.stop, :], rows.start)[0]
        for rows in _slices(q.shape[-2], FORWARD_CHUNK)
    ]
    return array_namespace(q).concat(out, axis=-2)


def stream_attention_vjp(q: Any, k: Any, v: Any, g: Any, *, chunk: int) -> AttnGrad:
    r"""Gradient of :func:`causal_attention`, slice by slice of the queries; exact for every ``chunk``.

    With :math:`P=\mathrm{softmax}(QK^\top/\sqrt{d_h})` of a slice, :math:`dV\mathrel{+}=P^\top G`,
    :math:`dP=GV^\top`, :math:`dS=P\odot(dP-\mathrm{rowsum}(dP\odot P))`, :math:`dQ=dS\,K/\sqrt{d_h}` and
    :math:`dK\mathrel{+}=dS^\top Q/\sqrt{d_h}`.

    Parameters
    ----------
    q, k, v : array, shape (..., T, d_h)
        As in :func:`causal_attention`.
    g : array, shape (..., T, d_h)
        Gradient of the loss with respect to the output.
    chunk : int
        Rows of queries per slice, at least 1.

    Returns
    -------
    AttnGrad
        Gradients with respect to ``q``, ``k`` and ``v``.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If shapes or dtypes differ, a value is not finite, or ``chunk`` is less than 1.

    Notes
    -----
    A slice that ends at row e holds ``chunk * e`` scores per head; over all slices :math:`\frac{T^2}2(1+\frac1D)` are
    formed instead of :math:`T^2`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((3, 1))
    >>> stream_attention_vjp(x, x, x, x, chunk=2).v
    array([[1.83333333],
           [0.83333333],
           [0.33333333]])
    """
    q, k, v = _attention_arguments(q, k, v)
    g = _same(check_array(g, "g"), "g", q, "q", shape=True)
    chunk = check_int(chunk, "chunk", low=1)
    dq, dk, dv = [], tiles.like(q.shape, q), tiles.like(q.shape, q)
    for rows in _slices(q.shape[-2], chunk):
        here, keys, values = _scaled(q[..., rows, :]), k[..., : rows.stop, :], v[..., : rows.stop, :]
        _, weights = tiles.attend(here, keys, values, rows.start)
        dq_rows, dk, dv = tiles.attend_vjp(here, keys, values, weights, g[..., rows, :], dk, dv)
        dq.append(_scaled(dq_rows))
    return AttnGrad(array_namespace(q).concat(dq, axis=-2), dk, dv)


# Block ---------------------------------------------------------------------------------------------------------------


def init_block(
    d: int, *, n_heads: int, d_ff: int | None = None, rng: RNGLike = None, dtype: Any = np.float64
) -> dict[str, np.ndarray]:
    """Random weights of a pre-norm transformer block: RMS norm, causal attention, RMS norm, GELU MLP.

    Parameters
    ----------
    d : int
        Width.
    n_heads : int
        Heads; must divide ``d``.
    d_ff : int, optional
        Width of the MLP; ``4 * d`` by default.
    rng : None, int or numpy.random.Generator, optional
        Source of randomness (SPEC 7).
    dtype : {numpy.float64, numpy.float32}, default numpy.float64
        Precision.

    Returns
    -------
    dict of str to numpy.ndarray
        ``norm1``, ``norm2`` (d,); ``wq``, ``wk``, ``wv``, ``wo`` (d, d); ``w1`` (d, d_ff); ``w2`` (d_ff, d). Entries of
        matrices are normal with variance one over the number of rows.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If a size is not positive, or ``n_heads`` does not divide ``d``.

    Examples
    --------
    >>> {name: w.shape for name, w in init_block(4, n_heads=2, rng=0).items() if w.ndim == 1}
    {'norm1': (4,), 'norm2': (4,)}
    """
    d = check_int(d, "d", low=1)
    n_heads = check_int(n_heads, "n_heads", low=1)
    if d % n_heads:
        raise ValueError(f"n_heads must divide d, got n_heads = {n_heads} and d = {d}")
    d_ff = 4 * d if d_ff is None else check_int(d_ff, "d_ff", low=1)
    if dtype not in (np.float64, np.float32):
        raise ValueError(f"dtype must be numpy.float64 or numpy.float32, got {dtype!r}")
    check_allocation((d, d), "d")
    check_allocation((d, d_ff), "d_ff")
    generator = check_rng(rng)
    shapes = {name: _shape(name, d, d_ff) for name in KEYS}
    return {
        name: (np.ones(s) if len(s) == 1 else generator.normal(0, s[0] ** -0.5, s)).astype(dtype)
        for name, s in shapes.items()
    }


def block_forward(params: Any, x: Any, *, n_heads: int) -> Array:
    r"""Output of a pre-norm transformer block.

    :math:`y=x'+\mathrm{gelu}(\mathrm{norm}(x')W_1)W_2` with :math:`x'=x+\mathrm{attention}(\mathrm{norm}(x))W_o`.

    Parameters
    ----------
    params : dict of str to array
        Weights, as from :func:`init_block`, of the kind and dtype of ``x``.
    x : array, shape (T, d) or (B, T, d)
        Input.
    n_heads : int
        Heads; must divide d.

    Returns
    -------
    array
        Output, of the shape of ``x``.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If a weight is missing, shapes do not fit, or a value is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> block_forward(init_block(4, n_heads=2, rng=0), np.ones((3, 4)), n_heads=2).shape
    (3, 4)
    """
    x, params, n_heads = _block_arguments(params, x, n_heads)
    return _shaped(_forward(params, x[None, ...] if x.ndim == 2 else x, n_heads, FORWARD_CHUNK), *x.shape)


def stream_block_vjp(params: Any, x: Any, g: Any, *, n_heads: int, chunk: int, cache_kv: bool = True) -> BlockGrad:
    r"""Gradient of :func:`block_forward`, slice by slice of the sequence; exact for every ``chunk``.

    Each slice is computed forward again (its own queries, residual and MLP; keys and values of all rows up to its
    end), differentiated, and forgotten. Gradients of weights add up; so do those of keys and values, in buffers of full
    length, because later slices attend to earlier rows.

    Parameters
    ----------
    params : dict of str to array
        Weights, as from :func:`init_block`.
    x : array, shape (T, d) or (B, T, d)
        Input of the block; slices cut T, never B.
    g : array, of the shape of ``x``
        Gradient of the loss with respect to the output.
    n_heads : int
        Heads; must divide d.
    chunk : int
        Rows per slice, at least 1; T or more is gradient checkpointing's plain backward pass.
    cache_kv : bool, default True
        True: keys and values are computed once, and their gradients pushed through the weights once, after the last
        slice. False: both are done for the prefix in every slice, as in the authors' code, at (D + 1) / 2 times the
        work on those two projections.

    Returns
    -------
    BlockGrad
        Gradients with respect to the weights and ``x``.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If a weight is missing, shapes do not fit, a value is not finite, or ``chunk`` is less than 1.

    Notes
    -----
    Source: section 3.2 of the paper. The block has no dropout: with it, every slice would have to replay its mask.

    Examples
    --------
    >>> import numpy as np
    >>> params, x = init_block(4, n_heads=2, rng=0), np.arange(12.0).reshape(3, 4)
    >>> one, all_ = (stream_block_vjp(params, x, np.ones((3, 4)), n_heads=2, chunk=c) for c in (1, 3))
    >>> bool(np.allclose(one.params["wk"], all_.params["wk"]))
    True
    """
    x, params, n_heads = _block_arguments(params, x, n_heads)
    g = _same(check_array(g, "g"), "g", x, "x", shape=True)
    chunk = check_int(chunk, "chunk", low=1)
    lift = (lambda a: a[None, ...]) if x.ndim == 2 else (lambda a: a)
    grads, dx = _backward(params, lift(x), lift(g), n_heads, chunk, check_bool(cache_kv, "cache_kv"))
    return BlockGrad(grads, dx[0, ...] if x.ndim == 2 else dx)


KEYS = ("norm1", "wq", "wk", "wv", "wo", "norm2", "w1", "w2")


def _shape(name: str, d: int, d_ff: int) -> tuple[int, ...]:
    return {"norm1": (d,), "norm2": (d,), "w1": (d, d_ff), "w2": (d_ff, d)}.get(name, (d, d))


def _split(x: Array, n_heads: int) -> Array:
    """(B, T, d) as (B, n_heads, T, d_h): a view."""
    xp = array_namespace(x)
    return xp.permute_dims(xp.reshape(x, (*x.shape[:-1], n_heads, x.shape[-1] // n_heads)), (0, 2, 1, 3))


def _join(x: Array) -> Array:
    """(B, n_heads, T, d_h) as (B, T, d)."""
    xp = array_namespace(x)
    batch, n_heads, length, d_h = x.shape
    return xp.reshape(xp.permute_dims(x, (0, 2, 1, 3)), (batch, length, n_heads * d_h))


def _scaled(x: Array) -> Array:
    return x * x.shape[-1] ** -0.5


def _work(x: Array, n_heads: int, chunk: int) -> tuple[Any, Any]:
    """Buffers for the attention weights of one slice, and for one head's: made once, not once per slice."""
    if kind_of(x) != "numpy":
        return None, None
    batch, length, _ = x.shape
    tile = min(chunk, length) * length
    return np.empty(batch * n_heads * tile, x.dtype), np.empty(tile, x.dtype)


def _keys_values(p: dict[str, Array], x: Array, n_heads: int) -> tuple[Array, Array, Array]:
    a = tiles.rms_norm(x, p["norm1"])
    return a, _split(a @ p["wk"], n_heads), _split(a @ p["wv"], n_heads)


def _forward(p: dict[str, Array], x: Array, n_heads: int, chunk: int) -> Array:
    """Output (B, T, d) of the block, slice by slice: nothing is kept."""
    _, k, v = _keys_values(p, x, n_heads)
    work, _ = _work(x, n_heads, chunk)
    out = []
    for rows in _slices(x.shape[1], chunk):
        xs = x[:, rows, :]
        q = _scaled(_split(tiles.rms_norm(xs, p["norm1"]) @ p["wq"], n_heads))
        o, _ = tiles.attend(q, k[..., : rows.stop, :], v[..., : rows.stop, :], rows.start, work)
        middle = xs + _join(o) @ p["wo"]
        out.append(middle + tiles.gelu(tiles.rms_norm(middle, p["norm2"]) @ p["w1"]) @ p["w2"])
    return array_namespace(x).concat(out, axis=1)


def _backward(
    p: dict[str, Array], x: Array, g: Array, n_heads: int, chunk: int, cache_kv: bool
) -> tuple[dict[str, Array], Array]:
    """Gradients of the weights and of ``x``; g (B, T, d) is the gradient of the output."""
    grads = {name: tiles.like(w.shape, w) for name, w in p.items()}
    work, one_head = _work(x, n_heads, chunk)
    dx = tiles.like(x.shape, x)
    if cache_kv:
        _, k, v = _keys_values(p, x, n_heads)
        dk, dv = (_split(tiles.like(x.shape, x), n_heads) for _ in "kv")
    for rows in _slices(x.shape[1], chunk):
        if not cache_kv:
            _, k, v = _keys_values(p, x[:, : rows.stop, :], n_heads)
            dk, dv = (_split(tiles.like((x.shape[0], rows.stop, x.shape[2]), x), n_heads) for _ in "kv")
        dx_rows, dk, dv = _backward_rows(p, x, g, rows, k, v, dk, dv, grads, work, one_head)
        dx = tiles.add_rows(dx, rows.start, rows.stop, dx_rows)
        if not cache_kv:
            dx = _through_projections(p, x[:, : rows.stop, :], dk, dv, grads, dx)
    if cache_kv:
        del k, v, work, one_head
        dx = _through_projections(p, x, dk, dv, grads, dx)
    return grads, dx


def _backward_rows(
    p: dict[str, Array],
    x: Array,
    g: Array,
    rows: slice,
    k: Array,
    v: Array,
    dk: Array,
    dv: Array,
    grads: dict[str, Array],
    work: Any,
    one_head: Any,
) -> tuple[Array, Array, Array]:
    """One slice, forward again and back: gradient of its rows of ``x`` but for keys and values, which go to dk and dv.

    What the slice adds to the gradients of the weights is added to ``grads``.
    """
    n_heads, k, v = k.shape[1], k[..., : rows.stop, :], v[..., : rows.stop, :]
    x, g = x[:, rows, :], g[:, rows, :]
    # forward again, these rows only
    a = tiles.rms_norm(x, p["norm1"])
    q = _scaled(_split(a @ p["wq"], n_heads))
    o, weights = tiles.attend(q, k, v, rows.start, work)
    o = _join(o)
    middle = x + o @ p["wo"]
    b = tiles.rms_norm(middle, p["norm2"])
    u = b @ p["w1"]
    # MLP, backward
    grads["w2"] = tiles.accumulate(grads["w2"], tiles.gelu(u), g)
    du = tiles.gelu_vjp(u, g @ p["w2"].T)
    grads["w1"] = tiles.accumulate(grads["w1"], b, du)
    d_middle, d_norm2 = tiles.rms_norm_vjp(middle, p["norm2"], du @ p["w1"].T)
    grads["norm2"] = grads["norm2"] + d_norm2
    d_middle = d_middle + g
    # attention, backward: this slice's share of the keys and values of all rows up to its end
    grads["wo"] = tiles.accumulate(grads["wo"], o, d_middle)
    do = _split(d_middle @ p["wo"].T, n_heads)
    dq, dk, dv = tiles.attend_vjp(q, k, v, weights, do, dk, dv, one_head)
    dq = _join(_scaled(dq))
    grads["wq"] = tiles.accumulate(grads["wq"], a, dq)
    da, d_norm1 = tiles.rms_norm_vjp(x, p["norm1"], dq @ p["wq"].T)
    grads["norm1"] = grads["norm1"] + d_norm1
    return d_middle + da, dk, dv


def _through_projections(
    p: dict[str, Array], x: Array, dk: Array, dv: Array, grads: dict[str, Array], dx: Array
) -> Array:
    """Push the gradients of keys and values of the rows of ``x`` through their weights and the norm before."""
    dk, dv = _join(dk), _join(dv)
    a = tiles.rms_norm(x, p["norm1"])
    grads["wk"] = tiles.accumulate(grads["wk"], a, dk)
    grads["wv"] = tiles.accumulate(grads["wv"], a, dv)
    da, d_norm1 = tiles.rms_norm_vjp(x, p["norm1"], dk @ p["wk"].T + dv @ p["wv"].T)
    grads["norm1"] = grads["norm1"] + d_norm1
    return tiles.add_rows(dx, 0, x.shape[1], da)


# Language model ------------------------------------------------------------------------------------------------------


class StreamLM:
    """A small causal language model whose loss and gradients are streamed along the sequence.

    For models that fit a laptop, set BLAS to one thread (``threadpoolctl.threadpool_limits(1)``): the matrices of a
    slice are small, and a second thread usually slows them down.

    Embedding plus fixed sinusoidal positions, ``n_layers`` blocks (:func:`block_forward`), RMS norm, head. Its
    parameters are a plain nested dict: ``embed`` (C, d), ``blocks`` (list of dicts), ``norm`` (d,), ``head`` (d, C).

    Parameters
    ----------
    vocab : int
        Number of tokens, C.
    d : int
        Width.
    n_layers : int
        Number of blocks.
    n_heads : int
        Heads per block; must divide ``d``.
    layer_chunk : int
        Rows per slice in the blocks. The sequence's length or more: gradient checkpointing. The authors' advice: T / 3.
    logits_chunk : int
        Rows per slice in the head. The authors' advice: 100.

    Raises
    ------
    TypeError
        If an argument is not an integer.
    ValueError
        If a size is not positive, or ``n_heads`` does not divide ``d``.

    Examples
    --------
    >>> import numpy as np
    >>> model = StreamLM(vocab=5, d=4, n_layers=2, n_heads=2, layer_chunk=3, logits_chunk=2)
    >>> params = model.init(0)
    >>> loss, grads = model.value_and_grad(params, np.array([0, 1, 2, 3, 4, 0]))
    >>> sorted(grads), loss > 0
    (['blocks', 'embed', 'head', 'norm'], True)
    """

    def __init__(self, *, vocab: int, d: int, n_layers: int, n_heads: int, layer_chunk: int, logits_chunk: int) -> None:
        self.vocab = check_int(vocab, "vocab", low=1)
        self.d = check_int(d, "d", low=1)
        self.n_layers = check_int(n_layers, "n_layers", low=1)
        self.n_heads = check_int(n_heads, "n_heads", low=1)
        if self.d % self.n_heads:
            raise ValueError(f"n_heads must divide d, got n_heads = {n_heads} and d = {d}")
        self.layer_chunk = check_int(layer_chunk, "layer_chunk", low=1)
        self.logits_chunk = check_int(logits_chunk, "logits_chunk", low=1)

    def init(self, rng: RNGLike = None) -> dict[str, Any]:
        """Random parameters.

        Parameters
        ----------
        rng : None, int or numpy.random.Generator, optional
            Source of randomness (SPEC 7).

        Returns
        -------
        dict
            ``embed``, ``blocks``, ``norm``, ``head``; float64.
        """
        check_allocation((self.vocab, self.d), "vocab")
        generator = check_rng(rng)
        return {
            "embed": generator.normal(0, 1, (self.vocab, self.d)),
            "blocks": [init_block(self.d, n_heads=self.n_heads, rng=generator) for _ in range(self.n_layers)],
            "norm": np.ones(self.d),
            "head": generator.normal(0, self.d**-0.5, (self.d, self.vocab)),
        }

    def loss(self, params: dict[str, Any], tokens: Any) -> float:
        """Mean cross-entropy of every token but the first of each sequence, given those before it.

        Parameters
        ----------
        params : dict
            As from :meth:`init`.
        tokens : array of int, shape (T + 1,) or (B, T + 1)
            Sequences of at least two tokens in [0, vocab).

        Returns
        -------
        float
            In nats per token; forward pass only.
        """
        params, tokens = self._check(params, tokens)
        h = self._states(params, tokens[:, :-1])[-1]
        h = tiles.rms_norm(_shaped(h, -1, self.d), params["norm"])
        targets, total = _flat(tokens[:, 1:]), 0.0
        for rows in _slices(targets.shape[0], self.logits_chunk):
            logp, _, _ = tiles.cross_entropy_rows(h[rows, ...] @ params["head"], targets[rows])
            total -= float(array_namespace(h).sum(logp))
        return total / targets.shape[0]

    def value_and_grad(
        self, params: dict[str, Any], tokens: Any, *, weights: Any = None
    ) -> tuple[float, dict[str, Any]]:
        """Loss and its gradient with respect to every parameter, streamed.

        Parameters
        ----------
        params : dict
            As from :meth:`init`; NumPy, or another kind throughout.
        tokens : array of int, shape (T + 1,) or (B, T + 1)
            Sequences of at least two tokens in [0, vocab).
        weights : array, shape (T,) or (B, T), optional
            Non-negative weight of each predicted token; the loss is the weighted mean.

        Returns
        -------
        tuple of float and dict
            The loss in nats, and gradients in the structure of ``params``.
        """
        params, tokens = self._check(params, tokens)
        inputs, targets = tokens[:, :-1], _flat(tokens[:, 1:])
        if weights is not None:
            weights = check_array(weights, "weights", ndim=(1, 2))
            if math.prod(weights.shape) != targets.shape[0]:
                raise ValueError(
                    f"weights must have one entry per predicted token of tokens, got {math.prod(weights.shape)}"
                )
            weights = _flat(weights)
        states = self._states(params, inputs)
        shape = states[-1].shape
        top = _shaped(states.pop(), -1, self.d)
        scale = _weights(weights, top, True)
        g, d_head, logp = _head(
            tiles.rms_norm(top, params["norm"]),
            params["head"],
            targets,
            lambda _, rows: -scale[rows],
            self.logits_chunk,
        )
        loss = -float(array_namespace(top).sum(scale * logp))
        g, d_norm = tiles.rms_norm_vjp(top, params["norm"], g)
        del top
        g = _shaped(g, *shape)
        blocks: list[dict[str, Array]] = []
        for p in reversed(params["blocks"]):  # last to first; each layer's input is dropped when it has served
            grads, g = _backward(p, states.pop(), g, self.n_heads, self.layer_chunk, True)
            blocks.insert(0, grads)
        d_embed = self._embedding_grad(params["embed"], _flat(inputs), _shaped(g, -1, self.d))
        return loss, {"embed": d_embed, "blocks": blocks, "norm": d_norm, "head": d_head}

    def _states(self, params: dict[str, Any], inputs: Array) -> list[Array]:
        """Inputs of every layer and the last layer's output, (B, T, d) each: what checkpointing keeps."""
        xp = array_namespace(params["embed"])
        x = _shaped(xp.take(params["embed"], _flat(inputs), axis=0), *inputs.shape, self.d)
        states = [x + from_numpy(_positions(inputs.shape[1], self.d).astype(_numpy_dtype(x)), like=x)]
        for p in params["blocks"]:
            states.append(_forward(p, states[-1], self.n_heads, self.layer_chunk))
        return states

    def _embedding_grad(self, embed: Array, inputs: Array, g: Array) -> Array:
        total = tiles.like(embed.shape, embed)
        if kind_of(embed) == "numpy":
            np.add.at(total, inputs, g)
            return total
        xp = array_namespace(embed)
        for rows in _slices(
            inputs.shape[0], self.logits_chunk
        ):  # a product with one-hot rows: no scatter in the array API
            hit = inputs[rows][:, None] == tiles.positions(0, self.vocab, embed)[None, :]
            total = tiles.accumulate(total, xp.astype(hit, embed.dtype), g[rows, ...])
        return total

    def _check(self, params: Any, tokens: Any) -> tuple[dict[str, Any], Array]:
        if not isinstance(params, dict) or set(params) != {"embed", "blocks", "norm", "head"}:
            raise ValueError("params must be a dict with the keys embed, blocks, norm and head")
        if not isinstance(params["blocks"], (list, tuple)) or len(params["blocks"]) != self.n_layers:
            raise ValueError(f"params['blocks'] must be a list of {self.n_layers} dicts")
        shapes = {"embed": (self.vocab, self.d), "norm": (self.d,), "head": (self.d, self.vocab)}
        checked: dict[str, Any] = {
            name: check_array(params[name], f"params['{name}']", shape=s) for name, s in shapes.items()
        }
        embed = checked["embed"]
        for name in ("norm", "head"):
            _same(checked[name], f"params['{name}']", embed, "params['embed']")
        checked["blocks"] = [_check_params(p, embed, self.d) for p in params["blocks"]]
        tokens = check_array(tokens, "tokens", ndim=(1, 2), dtype="integer", low=0, high=self.vocab - 1)
        if tokens.shape[-1] < 2:
            raise ValueError(f"tokens must have at least two tokens per sequence, got shape {tuple(tokens.shape)}")
        tokens = np.ascontiguousarray(np.atleast_2d(to_numpy(tokens)), dtype=np.int64)
        return checked, from_numpy(tokens, like=embed)


def _positions(length: int, d: int) -> np.ndarray:
    """Fixed sinusoidal positions (T, d): waves whose length grows from 2 pi to 10,000 times that."""
    angle = np.arange(length)[:, None] / 10_000 ** (np.arange(0, d, 2) / d)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)[:, :d]


# Memory --------------------------------------------------------------------------------------------------------------


def activation_bytes(
    T: int,
    *,
    d: int,
    d_ff: int,
    vocab: int,
    n_layers: int,
    n_heads: int,
    method: Method,
    layer_chunk: int | None = None,
    logits_chunk: int | None = None,
    itemsize: int = 8,
) -> dict[str, int]:
    """Predicted peak memory of one forward and backward pass of :class:`StreamLM`, weights not counted.

    Parameters
    ----------
    T : int
        Predicted positions, batch included.
    d, d_ff, vocab, n_layers, n_heads : int
        The model.
    method : {"plain", "checkpoint", "stream"}
        Keep every activation; keep each layer's input and compute one layer again; the same in slices.
    layer_chunk, logits_chunk : int, optional
        Rows per slice; needed for ``"stream"``, ignored otherwise.
    itemsize : int, default 8
        Bytes per number.

    Returns
    -------
    dict of str to int
        Bytes: ``gradients`` (of all weights), ``checkpoints`` (layer inputs, or all activations), ``head`` and
        ``layer`` (what each of the two stages adds while it runs), ``peak``.

    Raises
    ------
    TypeError
        If a size is not an integer.
    ValueError
        If a size is not positive, ``n_heads`` does not divide ``d``, ``method`` is unknown, or a chunk is missing.

    Examples
    --------
    >>> size = dict(d=64, d_ff=256, vocab=4096, n_layers=2, n_heads=4)
    >>> a = activation_bytes(2048, **size, method="checkpoint")
    >>> b = activation_bytes(2048, **size, method="stream", layer_chunk=256, logits_chunk=64)
    >>> round(b["peak"] / a["peak"], 2)
    0.17
    """
    sizes = {
        "T": T,
        "d": d,
        "d_ff": d_ff,
        "vocab": vocab,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "itemsize": itemsize,
    }
    T, d, d_ff, vocab, n_layers, n_heads, itemsize = (check_int(v, k, low=1) for k, v in sizes.items())
    if d % n_heads:
        raise ValueError(f"n_heads must divide d, got n_heads = {n_heads} and d = {d}")
    check_one_of(method, "method", ("plain", "checkpoint", "stream"))
    rows, tile = T, T
    if method == "stream":
        rows = min(T, check_int(layer_chunk, "layer_chunk", low=1))
        tile = min(T, check_int(logits_chunk, "logits_chunk", low=1))
    block = 4 * d * d + 2 * d * d_ff + 2 * d
    gradients = 2 * vocab * d + n_layers * block + d
    if method == "plain":  # per layer: input, norm, q, k, v, output, middle, norm; MLP before and after GELU; weights
        checkpoints = n_layers * (8 * T * d + 2 * T * d_ff + n_heads * T * T)
        head = 2 * T * vocab + 3 * T * d  # logits and their gradient
        layer = 5 * T * d + 2 * T * d_ff + 2 * n_heads * T * T
    else:
        checkpoints = n_layers * T * d
        head = tile * vocab + 4 * T * d  # last state, its norm, and the gradients of both
        # gradients of output and input, k, v and theirs; one slice of the block; all heads' weights and one head's
        layer = 6 * T * d + rows * (8 * d + 3 * d_ff) + (n_heads + 1) * rows * T
    peak = max(vocab * d + head, gradients - vocab * d + layer) + checkpoints
    parts = {"gradients": gradients, "checkpoints": checkpoints, "head": head, "layer": layer, "peak": peak}
    return {name: itemsize * count for name, count in parts.items()}


# Checks --------------------------------------------------------------------------------------------------------------


def _slices(length: int, chunk: int) -> Iterator[slice]:
    """Consecutive slices of at most ``chunk`` rows."""
    return (slice(start, min(start + chunk, length)) for start in range(0, length, min(chunk, length)))


def _same(x: Array, name: str, other: Array, other_name: str, shape: bool = False) -> Array:
    """``x``, when it is of the kind and dtype (and, if asked, of the shape) of ``other``."""
    if kind_of(x) != kind_of(other):
        raise TypeError(f"{name} must be an array of the kind of {other_name}, got {kind_of(x)} and {kind_of(other)}")
    if x.dtype != other.dtype:
        raise ValueError(f"{name} must have the dtype of {other_name}, got {x.dtype} and {other.dtype}")
    if shape and x.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, got {tuple(x.shape)} and {tuple(other.shape)}")
    return _contiguous(x)


def _shaped(x: Array, *shape: int) -> Array:
    return array_namespace(x).reshape(x, shape)


def _flat(x: Array) -> Array:
    return _shaped(x, -1)


def _contiguous(x: Array) -> Array:
    return np.ascontiguousarray(x) if kind_of(x) == "numpy" else x


def _head_arguments(h: Any, W: Any, targets: Any, h_name: str, t_name: str) -> tuple[Array, Array, Array]:
    h = _contiguous(check_array(h, h_name, ndim=2))
    W = _same(check_array(W, "W", ndim=2), "W", h, h_name)
    if W.shape[0] != h.shape[1]:
        raise ValueError(f"{h_name} and W must agree in d, got shapes {tuple(h.shape)} and {tuple(W.shape)}")
    targets = check_array(targets, t_name, ndim=1, dtype="integer", low=0, high=W.shape[1] - 1)
    if targets.shape[0] != h.shape[0]:
        raise ValueError(f"{t_name} and {h_name} must have the same length, got {targets.shape[0]} and {h.shape[0]}")
    return h, W, from_numpy(np.ascontiguousarray(to_numpy(targets), dtype=np.int64), like=h)


def _rows(x: Any, name: str, h: Array, low: float | None = None, high: float | None = None) -> Array:
    """One number per row of ``h``, of its kind and dtype."""
    x = check_array(x, name, shape=(h.shape[0],), low=low, high=high)
    if kind_of(x) == kind_of(h):
        return array_namespace(h).astype(x, h.dtype)
    return from_numpy(to_numpy(x).astype(_numpy_dtype(h)), like=h)


def _weights(weights: Any, h: Array, normalize: bool) -> Array:
    """Factor of each row's log-probability in the loss."""
    if weights is None:
        return _constant(1 / h.shape[0] if normalize else 1.0, h)
    weights = _rows(weights, "weights", h, low=0)
    if not normalize:
        return weights
    total = float(array_namespace(h).sum(weights))
    if not 0 < total < math.inf:
        raise ValueError(f"weights must have a positive, finite sum, got {total}")
    return weights / total


def _constant(value: float, h: Array) -> Array:
    return tiles.like((h.shape[0],), h) + value


def _numpy_dtype(x: Array) -> Any:
    return np.float32 if "float32" in str(x.dtype) else np.float64


def _sigmoid(x: float) -> float:
    return float(np.exp(-np.logaddexp(0.0, -x)))


def _attention_arguments(q: Any, k: Any, v: Any) -> tuple[Array, Array, Array]:
    q = check_array(q, "q")
    if q.ndim < 2:
        raise ValueError(f"q must have at least 2 dimensions, got shape {tuple(q.shape)}")
    q = _contiguous(q)
    k, v = (_same(check_array(x, name), name, q, "q", shape=True) for x, name in ((k, "k"), (v, "v")))
    return q, k, v


def _check_params(params: Any, x: Array, d: int) -> dict[str, Array]:
    if not isinstance(params, dict) or set(params) != set(KEYS):
        raise ValueError(f"params must be a dict with the keys {', '.join(KEYS)}")
    w1 = check_array(params["w1"], "params['w1']", shape=(d, None))
    return {
        name: _same(
            check_array(params[name], f"params['{name}']", shape=_shape(name, d, w1.shape[1])),
            f"params['{name}']",
            x,
            "x",
        )
        for name in KEYS
    }


def _block_arguments(params: Any, x: Any, n_heads: int) -> tuple[Array, dict[str, Array], int]:
    x = _contiguous(check_array(x, "x", ndim=(2, 3)))
    n_heads = check_int(n_heads, "n_heads", low=1)
    if x.shape[-1] % n_heads:
        raise ValueError(f"n_heads must divide the width of x, got n_heads = {n_heads} and shape {tuple(x.shape)}")
    return x, _check_params(params, x, x.shape[-1]), n_heads
