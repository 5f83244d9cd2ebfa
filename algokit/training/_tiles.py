"""Tiles of a transformer's forward and backward pass: each step once for any array, once as a Numba kernel for NumPy.

The Numba kernels work in place, one row of a tile after the other, on one thread: tiles are small, and threads that
wait for each other between a kernel and a matrix product cost more than they bring.
Chapter: notebooks/training/streaming_backpropagation.ipynb.
"""

from __future__ import annotations

import math
from typing import Any

import array_api_compat as compat
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from algokit.arrays import Array, array_namespace, kind_of

__all__ = [
    "accumulate",
    "add_rows",
    "attend",
    "attend_vjp",
    "cross_entropy_rows",
    "gelu",
    "gelu_vjp",
    "like",
    "positions",
    "rms_norm",
    "rms_norm_vjp",
    "swap",
]

COLUMNS = 1024  # of a product that is added to a larger array at a time: the temporary stays small
EPS = 1e-6  #: added to the mean square in RMS norm
_SLOPE, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715  # tanh form of GELU: u * sigmoid(SLOPE * (u + CUBIC * u^3))


def like(shape: tuple[int, ...], x: Array) -> Array:
    """Zeros of the kind, dtype and device of ``x``."""
    return array_namespace(x).zeros(shape, dtype=x.dtype, device=compat.device(x))


def positions(start: int, stop: int, x: Array) -> Array:
    """The integers from ``start`` to ``stop - 1``, on the device of ``x``."""
    return array_namespace(x).arange(start, stop, device=compat.device(x))


def swap(x: Array) -> Array:
    """Last two axes exchanged."""
    return array_namespace(x).matrix_transpose(x)


def accumulate(total: Array, a: Array, b: Array) -> Array:
    """``total + a.T @ b``, all leading axes of ``a`` and ``b`` taken as rows; NumPy: in place."""
    xp = array_namespace(total)
    a, b = xp.reshape(a, (-1, a.shape[-1])), xp.reshape(b, (-1, b.shape[-1]))
    if kind_of(total) != "numpy":
        return total + swap(a) @ b
    for start in range(0, total.shape[1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        total[:, columns] += a.T @ b[:, columns]
    return total


def add_rows(total: Array, start: int, stop: int, x: Array) -> Array:
    """``total`` with ``x`` added to rows ``start:stop`` of its last axis but one; in place where arrays allow it."""
    if kind_of(total) == "jax":
        return total.at[..., start:stop, :].add(x)
    total[..., start:stop, :] += x
    return total


def rms_norm(x: Array, gain: Array) -> Array:
    """``gain * x / sqrt(mean(x^2) + EPS)`` along the last axis."""
    return x * _inverse_rms(x) * gain


def _inverse_rms(x: Array) -> Array:
    xp = array_namespace(x)
    return 1 / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + EPS)


def rms_norm_vjp(x: Array, gain: Array, g: Array) -> tuple[Array, Array]:
    """Gradients of the RMS norm with respect to ``x`` and ``gain``."""
    xp = array_namespace(x)
    inverse = _inverse_rms(x)
    unit = x * inverse
    d_gain = xp.sum(xp.reshape(g * unit, (-1, x.shape[-1])), axis=0)
    g = g * gain
    return inverse * (g - unit * xp.mean(g * unit, axis=-1, keepdims=True)), d_gain


def gelu(u: Array) -> Array:
    """GELU in its tanh form, a new array."""
    xp = array_namespace(u)
    if kind_of(u) == "numpy":
        out = np.empty(u.shape, u.dtype)
        _gelu_cpu(np.ascontiguousarray(u).reshape(-1, u.shape[-1]), out.reshape(-1, u.shape[-1]))
        return out
    return u * _sigmoid(_SLOPE * (u + _CUBIC * u * u * u), xp)


def gelu_vjp(u: Array, g: Array) -> Array:
    """``g`` times the derivative of GELU at ``u``; NumPy: in place of ``g``."""
    xp = array_namespace(u)
    if kind_of(u) == "numpy":
        _gelu_vjp_cpu(u.reshape(-1, u.shape[-1]), g.reshape(-1, u.shape[-1]))
        return g
    s = _sigmoid(_SLOPE * (u + _CUBIC * u * u * u), xp)
    return g * (s + u * s * (1 - s) * _SLOPE * (1 + 3 * _CUBIC * u * u))


def _sigmoid(z: Array, xp: Any) -> Array:
    return 1 / (1 + xp.exp(xp.clip(-z, -80.0, 80.0)))


def attend(q: Array, k: Array, v: Array, start: int, work: np.ndarray | None = None) -> tuple[Array, Array]:
    """Causal attention of the queries of rows ``start:stop`` to the keys of rows ``0:stop``.

    q (..., c, d_h), already divided by sqrt(d_h); k, v (..., stop, d_h). Returns the output (..., c, d_h) and the
    weights (..., c, stop). ``work``: a flat NumPy buffer for the weights.
    """
    xp = array_namespace(q)
    shape = (*q.shape[:-1], k.shape[-2])
    if kind_of(q) == "numpy":
        weights = np.empty(shape, q.dtype) if work is None else work[: math.prod(shape)].reshape(shape)
        np.matmul(q, swap(k), out=weights)
        _causal_softmax_cpu(weights.reshape(-1, *shape[-2:]), start)
        return weights @ v, weights
    seen = positions(start, start + shape[-2], q)[:, None] >= positions(0, shape[-1], q)[None, :]
    scores = xp.where(seen, q @ swap(k), xp.asarray(-math.inf, dtype=q.dtype, device=compat.device(q)))
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)
    return weights @ v, weights


def attend_vjp(
    q: Array, k: Array, v: Array, weights: Array, g: Array, dk: Array, dv: Array, work: np.ndarray | None = None
) -> tuple[Array, Array, Array]:
    """Backward pass of :func:`attend`: gradient of q; what the slice adds to ``dk`` and ``dv`` (..., T, d_h) is added.

    NumPy goes head by head, so that one tile (c, stop) is alive besides the weights.
    """
    stop = k.shape[-2]
    if kind_of(q) == "numpy":
        dq = np.empty(q.shape, q.dtype)
        size = math.prod(weights.shape[-2:])
        tile = (np.empty(size, q.dtype) if work is None else work[:size]).reshape(weights.shape[-2:])
        for i in np.ndindex(*weights.shape[:-2]):
            np.matmul(g[i], v[i].T, out=tile)
            dv[i][:stop] += weights[i].T @ g[i]
            _softmax_vjp_cpu(weights[i], tile)
            np.matmul(tile, k[i], out=dq[i])
            dk[i][:stop] += tile.T @ q[i]
        return dq, dk, dv
    xp = array_namespace(q)
    d_weights = g @ swap(v)
    d_scores = weights * (d_weights - xp.sum(weights * d_weights, axis=-1, keepdims=True))
    dk = add_rows(dk, 0, stop, swap(d_scores) @ q)
    dv = add_rows(dv, 0, stop, swap(weights) @ g)
    return d_scores @ k, dk, dv


def cross_entropy_rows(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """Log-probability of each target, and the two factors of the gradient's tile.

    logits (c, C), targets (c,). Returns ``logp`` (c,), ``tile`` (c, C) and ``total`` (c,) such that the gradient of
    ``logp`` with respect to the logits, onehot - softmax, is ``-tile / total``. NumPy: ``tile`` takes the place of
    ``logits``. Dividing is left to the caller, who divides a (c, d) matrix instead of this one.
    """
    if kind_of(logits) == "numpy":
        logp, total = np.empty(len(logits), logits.dtype), np.empty(len(logits), logits.dtype)
        _cross_entropy_cpu(logits, targets, logp, total)
        return logp, logits, total
    xp = array_namespace(logits)
    hit = positions(0, logits.shape[1], logits)[None, :] == targets[:, None]
    shifted = logits - xp.max(logits, axis=1, keepdims=True)
    tile = xp.exp(shifted)
    total = xp.sum(tile, axis=1)
    logp = xp.sum(xp.where(hit, shifted, xp.zeros_like(shifted)), axis=1) - xp.log(total)
    return logp, xp.where(hit, tile - total[:, None], tile), total


def _bits(as_float: bool) -> Any:
    """Reinterpret the 64 bits of a float as an integer, or back."""

    @intrinsic
    def cast(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], ir.DoubleType() if as_float else ir.IntType(64))

        return (types.float64(types.int64) if as_float else types.int64(types.float64)), codegen

    return cast


_to_int, _to_float = _bits(False), _bits(True)
_ROUND = 1.5 * 2.0**52  # adding this rounds to an integer and leaves it in the low bits
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693147180369123816490, 1.90821492927058770002e-10
_SUM = {"reassoc", "contract", "nnan", "nsz"}  # lets a row's sum and maximum use vectors; the order is fixed


@njit(cache=True, error_model="numpy", inline="never")
def _exp(x: float) -> float:
    """exp(x) to one unit in the last place for -700 <= x <= 700, without a branch: loops over it become vectors.

    x = k ln 2 + r with |r| <= ln(2) / 2; the Taylor series of exp(r), times 2^k by way of the exponent's bits.
    """
    x = min(max(x, -700.0), 700.0)
    t = x * _LOG2E + _ROUND
    k = t - _ROUND
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = 1 / 6227020800.0
    p = p * r + 1 / 479001600.0
    p = p * r + 1 / 39916800.0
    p = p * r + 1 / 3628800.0
    p = p * r + 1 / 362880.0
    p = p * r + 1 / 40320.0
    p = p * r + 1 / 5040.0
    p = p * r + 1 / 720.0
    p = p * r + 1 / 120.0
    p = p * r + 1 / 24.0
    p = p * r + 1 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * _to_float((_to_int(t) << np.int64(52)) + np.int64(0x3FF0000000000000))


@njit(cache=True, error_model="numpy", fastmath=_SUM)
def _row_max(x: np.ndarray) -> float:
    top = x[0]
    for j in range(1, x.size):
        top = max(top, x[j])
    return top


@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _exp_row(x: np.ndarray, top: float) -> float:
    """x <- exp(x - top) in place; the sum of the row."""
    total = 0.0
    for j in range(x.size):
        e = _exp(np.float64(x[j]) - top)
        x[j] = e
        total += e
    return total


@njit(cache=True, error_model="numpy")
def _cross_entropy_cpu(logits: np.ndarray, targets: np.ndarray, logp: np.ndarray, total: np.ndarray) -> None:
    for i in range(logits.shape[0]):
        row = logits[i]
        top = np.float64(_row_max(row))
        at_target = np.float64(row[targets[i]])
        total_i = _exp_row(row, top)
        logp[i] = at_target - top - np.log(total_i)
        row[targets[i]] -= total_i
        total[i] = total_i


@njit(cache=True, error_model="numpy")
def _causal_softmax_cpu(scores: np.ndarray, start: int) -> None:
    n, c, width = scores.shape
    for i in range(n * c):
        row = scores[i // c, i % c]
        seen = start + i % c + 1
        total = _exp_row(row[:seen], np.float64(_row_max(row[:seen])))
        scale = 1 / total
        for j in range(seen):
            row[j] *= scale
        for j in range(seen, width):
            row[j] = 0


@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _softmax_vjp_row(weights: np.ndarray, g: np.ndarray) -> None:
    mean = 0.0
    for j in range(g.size):
        mean += weights[j] * g[j]
    for j in range(g.size):
        g[j] = weights[j] * (g[j] - mean)


@njit(cache=True, error_model="numpy")
def _softmax_vjp_cpu(weights: np.ndarray, g: np.ndarray) -> None:
    for i in range(g.shape[0]):
        _softmax_vjp_row(weights[i], g[i])


@njit(cache=True, error_model="numpy")
def _gelu_cpu(u: np.ndarray, out: np.ndarray) -> None:
    for i in range(u.shape[0]):
        for j in range(u.shape[1]):
            x = np.float64(u[i, j])
            out[i, j] = x / (1 + _exp(-_SLOPE * (x + _CUBIC * x * x * x)))


@njit(cache=True, error_model="numpy")
def _gelu_vjp_cpu(u: np.ndarray, g: np.ndarray) -> None:
    for i in range(u.shape[0]):
        for j in range(u.shape[1]):
            x = np.float64(u[i, j])
            s = 1 / (1 + _exp(-_SLOPE * (x + _CUBIC * x * x * x)))
            g[i, j] *= s + x * s * (1 - s) * _SLOPE * (1 + 3 * _CUBIC * x * x)
