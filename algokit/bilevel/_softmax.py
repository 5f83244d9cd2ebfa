"""Softmax regression's losses, gradient, slopes and Hessian product in one pass over the rows: kernels of the part."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from algokit.arrays import Array, array_namespace, kind_of, pick_kernel

__all__ = ["SoftmaxPass", "softmax_oracle"]


class SoftmaxPass(NamedTuple):
    """Everything that one pass over the rows gives.

    Attributes
    ----------
    losses : array, shape (n,)
        Cross-entropy of each row.
    gradient : array, shape (c, d)
        Gradient of the weighted sum of losses.
    slopes : array, shape (n,)
        Directional derivative of each loss along ``V`` (zeros without ``V``).
    product : array, shape (c, d)
        Hessian of the weighted sum of losses times ``V`` (zeros without ``V``).
    """

    losses: Array
    gradient: Array
    slopes: Array
    product: Array


def softmax_oracle(X: Array, labels: Array, weights: Array, Y: Array, V: Array | None) -> SoftmaxPass:
    """The pass of :func:`algokit.bilevel.problems.softmax_pass`, without its checks."""
    if kind_of(X) in ("cupy", "jax"):  # whole-array arithmetic, on the array's own device
        return _arrays(X, labels, weights, Y, V)
    return SoftmaxPass(*pick_kernel(X, cpu=_cpu, gpu=_arrays)(X, labels, weights, Y, V))


def _arrays(X: Array, labels: Array, weights: Array, Y: Array, V: Array | None) -> SoftmaxPass:
    """Four matrix products and whole-array arithmetic."""
    xp = array_namespace(X)
    hit = xp.astype(labels[:, None] == xp.arange(Y.shape[0])[None, :], X.dtype)  # (n, c)
    Z = X @ Y.T  # (n, c)
    Z = Z - xp.max(Z, axis=1, keepdims=True)
    total = xp.sum(xp.exp(Z), axis=1, keepdims=True)
    P = xp.exp(Z) / total  # (n, c)
    losses = xp.log(total[:, 0]) - xp.sum(Z * hit, axis=1)
    gradient = ((P - hit) * weights[:, None]).T @ X
    if V is None:
        return SoftmaxPass(losses, gradient, xp.zeros_like(losses), xp.zeros_like(Y))
    U = X @ V.T  # (n, c)
    PU = P * U
    mean = xp.sum(PU, axis=1, keepdims=True)
    product = ((PU - P * mean) * weights[:, None]).T @ X
    return SoftmaxPass(losses, gradient, xp.sum((P - hit) * U, axis=1), product)


def _cpu(X: Array, labels: Array, weights: Array, Y: Array, V: Array | None) -> SoftmaxPass:
    dtype = np.result_type(X, Y)
    X, Y = np.ascontiguousarray(X, dtype), np.ascontiguousarray(Y, dtype)
    direction = Y if V is None else np.ascontiguousarray(V, dtype)
    out = SoftmaxPass(np.empty(len(X), dtype), np.zeros_like(Y), np.zeros(len(X), dtype), np.zeros_like(Y))
    weights = np.ascontiguousarray(weights, dtype)
    _softmax_kernel(X, np.ascontiguousarray(labels, np.int64), weights, Y, direction, V is not None, *out)
    return out


_REASSOCIATE = {"reassoc", "contract", "arcp"}  # sums of products: any order is as accurate as any other


@njit(cache=True, error_model="numpy", fastmath=_REASSOCIATE)
def _products(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, Y: np.ndarray, z: np.ndarray) -> None:
    """``z[k] = (Y[k] . a, Y[k] . b, Y[k] . c, Y[k] . d)``: each row of Y is read once for four rows of data."""
    for k in range(Y.shape[0]):
        y = Y[k]
        z0, z1, z2, z3 = y[0] * 0, y[0] * 0, y[0] * 0, y[0] * 0
        for j in range(len(y)):
            z0 += a[j] * y[j]
            z1 += b[j] * y[j]
            z2 += c[j] * y[j]
            z3 += d[j] * y[j]
        z[k, 0], z[k, 1], z[k, 2], z[k, 3] = z0, z1, z2, z3


@njit(cache=True, error_model="numpy", fastmath=_REASSOCIATE)
def _accumulate(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, z: np.ndarray, G: np.ndarray) -> None:
    """``G[k] += z[k, 0] a + z[k, 1] b + z[k, 2] c + z[k, 3] d``."""
    for k in range(G.shape[0]):
        g, z0, z1, z2, z3 = G[k], z[k, 0], z[k, 1], z[k, 2], z[k, 3]
        for j in range(len(g)):
            g[j] += z0 * a[j] + z1 * b[j] + z2 * c[j] + z3 * d[j]


@njit(cache=True, error_model="numpy", fastmath=_REASSOCIATE)
def _softmax_kernel(
    X: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    Y: np.ndarray,
    V: np.ndarray,
    second: bool,
    losses: np.ndarray,
    G: np.ndarray,
    slopes: np.ndarray,
    H: np.ndarray,
) -> None:
    """One read of the rows, four at a time; the last block repeats the last row with weight zero."""
    n, c = len(X), len(Y)
    z, u = np.zeros((c, 4), X.dtype), np.zeros((c, 4), X.dtype)
    for i in range(0, n, 4):
        i1, i2, i3 = min(i + 1, n - 1), min(i + 2, n - 1), min(i + 3, n - 1)
        _products(X[i], X[i1], X[i2], X[i3], Y, z)
        if second:
            _products(X[i], X[i1], X[i2], X[i3], V, u)
        for r in range(4):
            row = min(i + r, n - 1)
            w = weights[row] if i + r < n else weights[row] * 0
            label = labels[row]
            top = z[0, r]
            for k in range(1, c):
                top = max(top, z[k, r])
            at_label, total = z[label, r] - top, top * 0
            for k in range(c):
                z[k, r] = np.exp(z[k, r] - top)
                total += z[k, r]
            losses[row] = np.log(total) - at_label
            mean = total * 0
            for k in range(c):
                z[k, r] /= total
                mean += z[k, r] * u[k, r]
            slopes[row] = mean - u[label, r]
            for k in range(c):
                z[k, r] *= w
                u[k, r] = z[k, r] * (u[k, r] - mean)
            z[label, r] -= w
        _accumulate(X[i], X[i1], X[i2], X[i3], z, G)
        if second:
            _accumulate(X[i], X[i1], X[i2], X[i3], u, H)
