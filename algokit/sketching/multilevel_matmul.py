r"""Multilevel Monte Carlo for matrix products: Giles' driver for :math:`E[AB]`, Haar levels for one large :math:`AB`.

The driver spends most samples at coarse resolution and few on the corrections; for fixed matrices the corrections are
the Haar details along the inner index, each level sampled by importance.

Reference: Y. Wu, N. Polydorides, A multilevel Monte Carlo estimator for matrix multiplication, arXiv:1904.00429.
Chapter: notebooks/sketching/multilevel_matmul.ipynb.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from algokit.arrays import Array, ArrayT, array_namespace, from_numpy, is_array, kind_of, pick_kernel, to_numpy
from algokit.checks import (
    AlgokitWarning,
    RNGLike,
    check_array,
    check_float,
    check_int,
    check_one_of,
    check_rng,
    check_same_length,
)

__all__ = [
    "MLMCResult",
    "MultilevelProduct",
    "basic_matmul",
    "haar_levels",
    "mlmc",
    "multilevel_matmul",
    "optimal_allocation",
]

Sampler = Callable[[int, int, np.random.Generator], tuple[Array, Array | None]]


class MLMCResult(NamedTuple):
    """An expectation by multilevel Monte Carlo, with what was measured on the way.

    Attributes
    ----------
    estimate : array
        The sum of the level means, of the kind that the sampler gives.
    n_samples : numpy.ndarray of int, shape (L + 1,)
        Samples of each level's difference.
    level_mean_norm : numpy.ndarray, shape (L + 1,)
        Frobenius norm of each level's mean.
    level_variance : numpy.ndarray, shape (L + 1,)
        Variance of one sample of each level's difference, summed over entries.
    cost : float
        Samples times their cost, summed over levels, in the units of ``cost(level)``.
    bias_estimate : float
        Estimated distance between the finest level's mean and the limit.
    converged : bool
        Whether the bias test was passed.
    """

    estimate: Array
    n_samples: np.ndarray
    level_mean_norm: np.ndarray
    level_variance: np.ndarray
    cost: float
    bias_estimate: float
    converged: bool


class MultilevelProduct(NamedTuple):
    """A product of fixed matrices by sampling within Haar levels.

    Attributes
    ----------
    product : array, shape (m, p)
        The estimate of AB.
    n_samples : numpy.ndarray of int, shape (L + 1,)
        Outer products spent on each level, coarse first.
    error_estimate : float
        Estimated root mean square of the Frobenius error.
    exact_levels : tuple of int
        Levels that were computed in full.
    """

    product: Array
    n_samples: np.ndarray
    error_estimate: float
    exact_levels: tuple[int, ...]


def optimal_allocation(variance: Any, cost: Any, *, eps: float, theta: float = 0.5) -> np.ndarray:
    r"""Samples per level that reach a given variance at least cost.

    .. math:: N_\ell=\Bigl\lceil\frac{1}{(1-\theta)\epsilon^2}\sqrt{V_\ell/C_\ell}\,\sum_j\sqrt{V_jC_j}\Bigr\rceil,

    which makes :math:`\sum_\ell V_\ell/N_\ell\le(1-\theta)\epsilon^2`.

    Parameters
    ----------
    variance : array-like, shape (L + 1,)
        Variance :math:`V_\ell\ge0` of one sample.
    cost : array-like, shape (L + 1,)
        Cost :math:`C_\ell>0` of one sample.
    eps : float
        Root of the mean square error allowed, positive.
    theta : float, default 0.5
        Share of :math:`\epsilon^2` set aside for the squared bias, in [0, 1).

    Returns
    -------
    numpy.ndarray of int, shape (L + 1,)
        :math:`N_\ell`; 0 where the variance is 0.

    Raises
    ------
    ValueError
        If an argument is out of range, or ``eps`` asks for more than 10^15 samples.
    TypeError
        If an argument is not numeric.

    Examples
    --------
    >>> optimal_allocation([4.0, 1.0], [1.0, 4.0], eps=0.5)
    array([64, 16])
    """
    V = to_numpy(check_array(variance, "variance", ndim=1, low=0)).astype(np.float64)
    C = to_numpy(check_array(cost, "cost", ndim=1, low=0, open_low=True)).astype(np.float64)
    check_same_length(variance=V, cost=C)
    eps = check_float(eps, "eps", low=0, open_low=True)
    theta = check_float(theta, "theta", low=0, high=1, open_high=True)
    root = np.sqrt(V) / eps  # in this order nothing overflows that is not too large anyway
    N = np.ceil(root / np.sqrt(C) * (root * np.sqrt(C)).sum() / (1 - theta) * (1 - 1e-12))
    if not (N <= 1e15).all():
        raise ValueError(f"eps is too small for these values of variance and cost: {N.max():.2g} samples")
    return N.astype(np.int64)


def mlmc(
    sampler: Sampler,
    *,
    eps: float,
    cost: Callable[[int], float] | None = None,
    min_level: int = 2,
    max_level: int = 12,
    pilot: int = 200,
    theta: float = 0.5,
    alpha: float | None = None,
    rng: RNGLike = None,
) -> MLMCResult:
    r"""Expectation of a random matrix (or array of any shape) that can be computed at resolutions 0, 1, 2, ...

    Estimates :math:`\lim_\ell E[P_\ell]` by :math:`\sum_\ell E[P_\ell-P_{\ell-1}]`, each term from samples of its own,
    their numbers chosen for a root mean square error (Frobenius norm) of ``eps`` at least cost.

    Parameters
    ----------
    sampler : callable
        ``sampler(level, size, rng) -> (fine, coarse)``: arrays of shape (size, ...) of :math:`P_\ell` and
        :math:`P_{\ell-1}` *from the same random input*; ``coarse`` is None at level 0. Arrays of any kind: sums stay on
        their device.
    eps : float
        Root mean square error asked for, in the units of P.
    cost : callable, optional
        ``cost(level)``: cost of one sample; by default :math:`2^\ell`.
    min_level, max_level : int, default 2 and 12
        Finest level at the start and at most; ``min_level`` is at least 1.
    pilot : int, default 200
        Samples with which the variance of a new level is estimated, at least 2.
    theta : float, default 0.5
        Share of :math:`\epsilon^2` for the squared bias, in (0, 1).
    alpha : float, optional
        Rate of the bias, :math:`\|E P_\ell-C\|\sim2^{-\alpha\ell}`, in [0.05, 50]; fitted (and taken as at least 0.5)
        by default.
    rng : None, int or numpy.random.Generator
        The seed.

    Returns
    -------
    MLMCResult
        Estimate and diagnosis.

    Raises
    ------
    TypeError
        If an argument is not of the right kind.
    ValueError
        If a parameter is out of range, or the sampler returns wrong shapes, NaN, or a coarse array at level 0.

    Warns
    -----
    AlgokitWarning
        If the bias is still too large at ``max_level``.

    Notes
    -----
    The state of a level is a count, a sum and a sum of squares: workers can draw in parallel and add them. Source:
    M. B. Giles, Multilevel Monte Carlo path simulation, Operations Research 56(3), 2008.

    Examples
    --------
    >>> import numpy as np
    >>> def square_of_rounded(level, size, rng):  # E[U^2] = 1/3, U rounded down to a grid of 2^-level
    ...     u = rng.random(size)
    ...     grids = [np.floor(u * 2.0**k) / 2.0**k for k in (level, level - 1)]
    ...     return grids[0] ** 2, grids[1] ** 2 if level else None
    >>> result = mlmc(square_of_rounded, eps=0.01, rng=0)
    >>> bool(abs(result.estimate - 1 / 3) < 0.03), result.converged
    (True, True)
    """
    if not callable(sampler):
        raise TypeError(f"sampler must be callable, got {type(sampler).__name__}")
    if cost is not None and not callable(cost):
        raise TypeError(f"cost must be callable, got {type(cost).__name__}")
    eps = check_float(eps, "eps", low=0, open_low=True)
    min_level = check_int(min_level, "min_level", low=1, high=60)
    max_level = check_int(max_level, "max_level", low=1, high=60)
    if max_level < min_level:
        raise ValueError(f"max_level must be at least min_level, got {max_level} and {min_level}")
    pilot = check_int(pilot, "pilot", low=2, high=10**9)
    theta = check_float(theta, "theta", low=0, high=1, open_low=True, open_high=True)
    alpha = None if alpha is None else check_float(alpha, "alpha", low=0.05, high=50)
    rng = check_rng(rng)
    levels: list[_Level] = []
    wanted = np.zeros(0, np.int64)
    while True:
        top = max(min_level, len(levels))  # one level more than before
        for k in range(len(levels), top + 1):
            shape = levels[0].shape if levels else None
            levels.append(_Level(sampler, k, _cost(cost, k), shape, pilot, rng))
        while True:  # top up until nothing is missing by more than one in a hundred
            V = np.array([level.variance for level in levels])
            C = np.array([level.cost for level in levels])
            wanted = optimal_allocation(V, C, eps=eps, theta=theta)
            short = [level for level, N in zip(levels, wanted, strict=True) if 1.01 * level.count < N]
            if not short:
                break
            for level, N in zip(levels, wanted, strict=True):
                if level.count < N:
                    level.draw(int(N) - level.count, rng)
        norms = np.array([_size(level.mean) for level in levels])
        rate = _rate(norms) if alpha is None else alpha
        last = norms[-1] if len(norms) < 3 else max(norms[-1], norms[-2] / 2**rate)
        bias = float(last / (2**rate - 1))
        converged = bias <= math.sqrt(theta) * eps
        if converged or len(levels) > max_level:
            break
    if not converged:
        message = f"the bias is still about {bias:.2g} at max_level={max_level}, for eps={eps:g}"
        warnings.warn(message, AlgokitWarning, stacklevel=2)
    counts = np.array([level.count for level in levels])
    return MLMCResult(sum(level.mean for level in levels), counts, norms, V, float(counts @ C), bias, converged)


def basic_matmul(
    A: ArrayT, B: ArrayT, n_samples: int, *, probabilities: Any = "optimal", rng: RNGLike = None
) -> ArrayT:
    r"""Product of A and B from sampled columns of A and the rows of B that go with them.

    Draws c indices with replacement and sums :math:`a_ib_i/(c\,p_i)`: unbiased, with
    :math:`E\|AB-W\|_F^2=\frac1c\bigl(\sum_i\|a_i\|^2\|b_i\|^2/p_i-\|AB\|_F^2\bigr)`.

    Parameters
    ----------
    A, B : array, shape (m, n) and (n, p)
        NumPy, CuPy, or another kind; float32 stays float32. Norms come to the host and indices are drawn there.
    n_samples : int
        Number c of draws.
    probabilities : {"optimal", "uniform"} or array-like, shape (n,), default "optimal"
        ``"optimal"`` is :math:`p_i\propto\|a_i\|\|b_i\|`. An array is normalised; it must be positive wherever neither
        factor is zero, or the estimate is biased (this is checked).
    rng : None, int or numpy.random.Generator
        The seed.

    Returns
    -------
    array, shape (m, p)
        The estimate W.

    Raises
    ------
    TypeError
        If an argument is not of the right kind.
    ValueError
        If shapes do not fit, a value is not finite, or probabilities are negative or zero where they must not be.

    Notes
    -----
    BASICMATRIXMULTIPLICATION of Drineas, Kannan and Mahoney, SIAM J. Comput. 36(1), 2006. Time O(n(m + p) + cmp).

    Examples
    --------
    >>> import numpy as np
    >>> A = np.array([[1.0, 0.0, 2.0]])
    >>> basic_matmul(A, A.T, 1, rng=0).shape
    (1, 1)
    """
    left, right = _factors(A, B)
    c = check_int(n_samples, "n_samples", low=1, high=2**31)
    rng = check_rng(rng)
    norms = _norms(left, axis=0) * _norms(right, axis=1)
    _check_norms(norms)
    if isinstance(probabilities, str):
        check_one_of(probabilities, "probabilities", ("optimal", "uniform"))
        weights = norms if probabilities == "optimal" else np.ones(len(norms))
    else:
        weights = to_numpy(check_array(probabilities, "probabilities", shape=norms.shape, low=0)).astype(np.float64)
        if ((weights == 0) & (norms > 0)).any():
            raise ValueError("probabilities must be positive where neither the column of A nor the row of B is zero")
    if not np.isfinite(weights.sum()):
        raise ValueError("probabilities must not overflow when they are added")
    if not norms.any():
        return array_namespace(left).zeros_like(left[:, :1] * right[:1, :])
    places, scale = _draw(weights, c, rng)
    return _scaled(_taken(left, places, axis=1), scale) @ _taken(right, places, axis=0)


def haar_levels(
    A: Array, *, axis: int = -1, n_levels: int | None = None, grid: tuple[int, int] | None = None
) -> list[Array]:
    r"""Orthonormal Haar transform along one axis, split into levels: coarse averages, then details, coarse to fine.

    Concatenated along the axis, the levels are an orthogonal transform of A: applied to both factors of a product, it
    leaves the product unchanged.

    Parameters
    ----------
    A : array, shape (m, n), or (n, m) with ``axis=0``
        NumPy, CuPy, or another kind; float32 stays float32.
    axis : {-1, 0, 1}, default -1
        The axis to transform, of length n.
    n_levels : int, optional
        Number of splittings L; by default so many that 16 to 31 averages are left (for a grid, 4 to 7 a side).
    grid : (int, int), optional
        Height and width, when the axis runs over the pixels of an image, row by row: then blocks are square, and a
        level has three bands of details.

    Returns
    -------
    list of array
        L + 1 arrays, of widths n_0, n_1 - n_0, ..., where n_l doubles (with a grid, quadruples) each time. Lengths that
        cannot be halved L times are padded with zeros.

    Raises
    ------
    TypeError
        If an argument is not of the right kind.
    ValueError
        If ``A`` is not a finite matrix, or a parameter does not fit its shape.

    Examples
    --------
    >>> import numpy as np
    >>> for level in haar_levels(np.array([[1.0, 3.0, 5.0, 5.0]]), n_levels=2):
    ...     print(level.round(3) + 0.0)
    [[7.]]
    [[-3.]]
    [[-1.414  0.   ]]
    """
    dense = check_array(A, "A", ndim=2)
    axis = check_int(axis, "axis", low=-2, high=1) % 2
    x = dense if axis == 1 else dense.T
    plan = _plan(x.shape[1], n_levels, grid, "A", keep_all=True)
    out, _ = _transform(x, plan)
    parts = (out[:, a:b] for a, b in zip((0, *plan.edges[:-1]), plan.edges, strict=True))
    parts = (part if axis == 1 else part.T for part in parts)
    return [np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part for part in parts]


def multilevel_matmul(
    A: ArrayT,
    B: ArrayT,
    *,
    budget: int | None = None,
    eps: float | None = None,
    n_levels: int | None = None,
    grid: tuple[int, int] | None = None,
    rng: RNGLike = None,
) -> MultilevelProduct:
    r"""Product of two fixed matrices whose inner index is ordered: exact at coarse resolution, sampled in the details.

    :math:`AB=A_0B_0+\sum_{\ell\ge1}D^A_\ell D^B_\ell` with the Haar levels of both factors. The first term is computed;
    each of the others is estimated from :math:`N_\ell\propto T_\ell=\sum_i\|a_i\|\|b_i\|` of its columns, drawn with
    probability proportional to :math:`\|a_i\|\|b_i\|`, or in full where that is no more work.

    Parameters
    ----------
    A, B : array, shape (m, n) and (n, p)
        NumPy, CuPy, or another kind; float32 stays float32. Norms come to the host and indices are drawn there: the
        same seed draws the same columns on every device.
    budget : int, optional
        Outer products to spend, at least the width of level 0.
    eps : float, optional
        Instead of ``budget``: root mean square error (Frobenius norm, in the units of AB) to aim for.
    n_levels, grid : optional
        As in :func:`haar_levels`.
    rng : None, int or numpy.random.Generator
        The seed.

    Returns
    -------
    MultilevelProduct
        Estimate, samples per level, estimated error, exact levels.

    Raises
    ------
    TypeError
        If an argument is not of the right kind.
    ValueError
        If shapes do not fit, a value is not finite, a parameter is out of range, or not exactly one of ``budget`` and
        ``eps`` is given.

    Notes
    -----
    One pass over A and B for the norms of all details, which are not stored; the details drawn are computed afterwards.
    (Of arrays that are not NumPy's, the whole transform is stored on their device.)
    Time O(n(m + p)) + 2 budget m p. The level construction is the book's own.

    Examples
    --------
    >>> import numpy as np
    >>> t = np.linspace(0, 1, 1024)
    >>> A = np.stack([t, t**2])  # smooth along the inner index
    >>> result = multilevel_matmul(A, A.T, budget=64, rng=0)
    >>> bool(np.linalg.norm(result.product - A @ A.T) < 1e-3 * np.linalg.norm(A @ A.T))
    True
    """
    left, right = _factors(A, B)
    plan = _plan(left.shape[1], n_levels, grid, "A", keep_all=not isinstance(left, np.ndarray))
    if (budget is None) == (eps is None):
        raise ValueError("budget or eps must be given, and not both")
    if budget is not None:
        budget = check_int(budget, "budget", low=1)
        if budget < plan.edges[0]:
            raise ValueError(
                f"budget must be at least the width of level 0, {plan.edges[0]} (raise n_levels), got {budget}"
            )
    else:
        eps = check_float(eps, "eps", low=0, open_low=True)
    rng = check_rng(rng)
    (head_a, norms_a), (head_b, norms_b) = _transform(left, plan), _transform(right.T, plan)
    weights = norms_a * norms_b
    _check_norms(weights)
    spans = list(zip((0, *plan.edges[:-1]), plan.edges, strict=True))
    T = np.array([weights[a:b].sum() for a, b in spans[1:]])
    width = np.array([b - a for a, b in spans[1:]])
    N = _allocate(T, width, None if budget is None else budget - plan.edges[0], eps)
    product = head_a[:, : plan.edges[0]] @ head_b[:, : plan.edges[0]].T
    variance = 0.0
    for k, (a, b) in enumerate(spans[1:]):
        if N[k] == 0:
            variance += T[k] ** 2  # nothing spent: the level is left out
            continue
        if N[k] >= width[k]:
            places, scale = a + np.flatnonzero(weights[a:b]), None
        else:
            places, scale = _draw(weights[a:b], int(N[k]), rng)
            places = places + a
        da, db = (_details(x, head, plan, places) for x, head in ((left, head_a), (right.T, head_b)))
        part = (da if scale is None else _scaled(da, scale)) @ db.T
        if scale is not None:  # E||part||^2 = ||P||^2 + (T^2 - ||P||^2) / N
            second = float(_size(part)) ** 2
            true = max(0.0, (N[k] * second - T[k] ** 2) / max(1, N[k] - 1)) if N[k] > 1 else 0.0
            variance += max(0.0, T[k] ** 2 - true) / N[k]
        product = product + part
    exact = (0, *(k + 1 for k in range(len(N)) if N[k] >= width[k] or T[k] == 0))
    N = np.where((width <= N) & (T == 0), 0, np.minimum(N, width))
    return MultilevelProduct(product, np.concatenate([[plan.edges[0]], N]), math.sqrt(variance), exact)


# ------------------------------------------------------------------------------------------- driver: helpers


class _Level:
    """Running count, sum and sum of squares of one level's differences."""

    def __init__(self, sampler: Sampler, k: int, cost: float, shape: Any, pilot: int, rng: Any) -> None:
        self.sampler, self.k, self.cost, self.shape = sampler, k, cost, shape
        self.count, self.squares = 0, 0.0
        self.total: Any = 0.0
        self.draw(pilot, rng)

    def draw(self, size: int, rng: np.random.Generator) -> None:
        """Add samples, in portions of moderate memory."""
        while size > 0:
            known = 1 if self.shape is None or self.count == 0 else math.prod(self.shape)
            portion = min(size, max(2, 2**21 // max(1, known)))
            difference = self._sample(portion, rng)
            xp = array_namespace(difference)
            self.total = self.total + xp.sum(difference, axis=0)
            self.squares += float(xp.sum(difference**2))
            self.count += portion
            size -= portion

    def _sample(self, size: int, rng: np.random.Generator) -> Array:
        answer = self.sampler(self.k, size, rng)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ValueError(f"sampler must return a pair (fine, coarse), got {type(answer).__name__}")
        fine, coarse = answer
        if (coarse is None) != (self.k == 0):
            raise ValueError(f"sampler must return None as coarse at level 0, and only there; level {self.k}")
        fine = _wide(fine if is_array(fine) else np.asarray(fine))
        difference = fine if coarse is None else fine - _wide(coarse if is_array(coarse) else np.asarray(coarse))
        self.shape = tuple(fine.shape[1:]) if self.shape is None else self.shape
        shape = (size, *self.shape)
        if tuple(fine.shape) != shape or tuple(difference.shape) != shape:
            raise ValueError(f"sampler must return arrays of shape {shape} at level {self.k}, got {tuple(fine.shape)}")
        xp = array_namespace(difference)
        if not bool(xp.all(xp.isfinite(difference))):
            raise ValueError(f"sampler must return finite values, got NaN or infinity at level {self.k}")
        return difference

    @property
    def mean(self) -> Any:
        return self.total / self.count

    @property
    def variance(self) -> float:
        n = self.count
        return max(0.0, (self.squares / n - _square(self.mean)) * n / (n - 1))


def _cost(cost: Callable[[int], float] | None, k: int) -> float:
    return 2.0**k if cost is None else check_float(cost(k), "cost", low=0, open_low=True)


def _wide(x: Array) -> Array:
    """``x`` in double precision, where its kind has that (JAX does not unless it is told to)."""
    if isinstance(x, (np.ndarray, np.generic)):
        return np.asarray(x, dtype=np.float64)
    xp = array_namespace(x)
    return xp.astype(x, xp.__array_namespace_info__().dtypes(kind="real floating").get("float64", x.dtype))


def _square(x: Array) -> float:
    wide = _wide(x)
    return float(array_namespace(wide).sum(wide * wide))


def _size(x: Array) -> float:
    return math.sqrt(_square(x))


def _rate(norms: np.ndarray) -> float:
    """Decay of the level means per level, in powers of two, from level 1 on; at least one half."""
    some = np.flatnonzero(norms[1:] > 0)
    if len(some) < 2:
        return 0.5
    return max(0.5, -float(np.polyfit(some, np.log2(norms[1:][some]), 1)[0]))


# ------------------------------------------------------------------------------------------- sampling: helpers


def _factors(A: Any, B: Any) -> tuple[Any, Any]:
    """Both factors as arrays of one kind, A's, and one dtype (their norms tell later whether they are finite)."""
    left, right = check_array(A, "A", ndim=2, finite=False), check_array(B, "B", ndim=2, finite=False)
    if left.shape[1] != right.shape[0]:
        got = f"{tuple(left.shape)} and {tuple(right.shape)}"
        raise ValueError(f"A and B must have the same inner dimension, got shapes {got}")
    if kind_of(left) != kind_of(right):
        pick_kernel(right, cpu=basic_matmul)  # refuses to bring an array from a GPU to the host
        right = from_numpy(to_numpy(right), like=left)
    xp = array_namespace(left)
    dtype = xp.result_type(left, right)
    return xp.astype(left, dtype, copy=False), xp.astype(right, dtype, copy=False)


def _norms(x: Array, *, axis: int) -> np.ndarray:
    """Euclidean norms along an axis, on the host."""
    if isinstance(x, np.ndarray):
        return np.sqrt(np.einsum("ij,ij->i" if axis else "ij,ij->j", x, x, dtype=np.float64))
    xp, wide = array_namespace(x), _wide(x)
    return to_numpy(xp.sqrt(xp.sum(wide * wide, axis=axis))).astype(np.float64)


def _taken(x: Array, places: np.ndarray, *, axis: int) -> Array:
    """Rows or columns of an array of any kind, where it lies."""
    if isinstance(x, np.ndarray):
        return x[:, places] if axis else x[places]
    return array_namespace(x).take(x, from_numpy(places, like=x), axis=axis)


def _scaled(x: Array, scale: np.ndarray) -> Array:
    xp = array_namespace(x)
    return x * xp.astype(from_numpy(scale, like=x), x.dtype)


def _check_norms(products: np.ndarray) -> None:
    """Complain of a NaN or infinity in a factor, given the products of its norms with the other's."""
    if not np.isfinite(products.sum()):
        raise ValueError("A and B must be finite, and their squared norms must not overflow")


def _draw(weights: np.ndarray, c: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Distinct places of c draws with replacement, and (times drawn) / (c p)."""
    total = np.cumsum(weights)
    drawn = np.searchsorted(total, rng.random(c) * total[-1], side="right")
    places, times = np.unique(np.minimum(drawn, np.flatnonzero(weights)[-1]), return_counts=True)
    return places, times * (total[-1] / (c * weights[places]))


def _allocate(T: np.ndarray, width: np.ndarray, budget: int | None, eps: float | None) -> np.ndarray:
    """Samples per level, proportional to T; what would get its width is computed in full, the rest shared anew."""
    N = np.zeros(len(T), np.int64)
    full = T == 0
    N[full] = width[full]  # empty levels are exact and free
    left = 0 if budget is None else budget
    while not full.all():
        share = T / T[~full].sum()
        wanted = share * left if eps is None else share * (T[~full].sum() / eps) ** 2
        now = ~full & (wanted >= width)
        if not now.any():
            open_ = ~full
            N[open_] = np.ceil(wanted[open_]) if eps is not None else _rounded(wanted[open_], left)
            break
        N[now] = width[now]
        left -= int(width[now].sum())
        full |= now
    return N


def _rounded(wanted: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers close to ``wanted`` with sum ``total``; none is 0 if that can be helped."""
    N = np.floor(wanted).astype(np.int64)
    order = np.argsort(-(wanted - N) - 10 * (N == 0))
    N[order[: total - int(N.sum())]] += 1
    return N


# ------------------------------------------------------------------------------------------- Haar: plan and passes


class _Plan(NamedTuple):
    """Where the levels lie: shape of the axis, padded shape, and the end of each level in the transformed axis."""

    shape: tuple[int, ...]
    padded: tuple[int, ...]
    edges: tuple[int, ...]
    keep: int  # coefficients before this are stored by the pass, later ones computed on demand


def _plan(n: int, n_levels: int | None, grid: tuple[int, int] | None, name: str, *, keep_all: bool = False) -> _Plan:
    if grid is None:
        shape: tuple[int, ...] = (n,)
    else:
        if not isinstance(grid, (tuple, list)) or len(grid) != 2:
            raise TypeError(f"grid must be a pair (height, width), got {grid!r}")
        shape = tuple(check_int(side, "grid", low=1) for side in grid)
        if math.prod(shape) != n:
            raise ValueError(f"grid must have as many pixels as {name} has along its inner axis, {n}, got {shape}")
    most = max(0, (min(shape) - 1).bit_length())
    if n_levels is None:
        L = max(0, min(shape).bit_length() - 1 - (4 if grid is None else 2))
    else:
        L = check_int(n_levels, "n_levels", low=0, high=most)
    unit = 2**L
    padded = tuple(-(-side // unit) * unit for side in shape)
    factor = 2 ** len(shape)
    coarse = math.prod(padded) // factor**L
    edges = tuple(coarse * factor**k for k in range(L + 1))
    small = [e for e in edges if e <= edges[-1] // 16]
    keep = edges[-1] if keep_all or padded != shape or n <= 4096 or not small else small[-1]
    return _Plan(shape, padded, edges, keep)


def _transform(x: Array, plan: _Plan) -> tuple[Array, np.ndarray]:
    """Rows of x (r, n) transformed: the first ``keep`` coefficients (r, keep), and the norms of all columns (N,)."""
    if not isinstance(x, np.ndarray):
        head = _haar_any(x, plan)
        return head, _norms(head, axis=0)
    rows, n = x.shape
    N = plan.edges[-1]
    head = np.empty((rows, plan.keep), x.dtype)
    squares = np.zeros(N)
    buffer = np.empty((16, n + 80), x.dtype)[:, :n]  # rows whose distance is no power of two, for the cache's sake
    step = _rows_1d if len(plan.shape) == 1 else _rows_2d
    for r in range(0, rows, 16):
        block = x[r : r + 16]
        if not block.flags.c_contiguous:
            _copy_rows(block, buffer)  # by columns: the inner axis of B is its first
            block = buffer[: len(block)]
        step(block, plan.shape, plan.padded, len(plan.edges) - 1, plan.keep, head[r : r + 16], squares)
    return head, np.sqrt(squares)


def _haar_any(x: Array, plan: _Plan) -> Array:
    """The whole transform (r, N) of the rows of an array of any kind: sums and differences of slices."""
    xp = array_namespace(x)
    x = xp.reshape(x, (x.shape[0], *plan.shape))
    for axis, (side, longer) in enumerate(zip(plan.shape, plan.padded, strict=True), start=1):
        zeros = np.zeros((*x.shape[:axis], longer - side, *x.shape[axis + 1 :]))
        x = xp.concat([x, xp.astype(from_numpy(zeros, like=x), x.dtype)], axis=axis)
    parts: list[Array] = []  # fine to coarse
    for _ in plan.edges[1:]:
        if len(plan.shape) == 1:
            a, b = x[:, 0::2], x[:, 1::2]
            x = (a + b) * 0.5**0.5
            parts.append((a - b) * 0.5**0.5)
        else:
            p, q, s, t = x[:, 0::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 0::2], x[:, 1::2, 1::2]
            x = (p + q + s + t) * 0.5
            parts += [(p - q - s + t) * 0.5, (p + q - s - t) * 0.5, (p - q + s - t) * 0.5]
    return xp.concat([xp.reshape(part, (x.shape[0], -1)) for part in (x, *reversed(parts))], axis=1)


def _details(x: Array, head: Array, plan: _Plan, places: np.ndarray) -> Array:
    """Columns of the transform (r, len(places)), all of one level: stored ones, or from the columns they combine."""
    if len(places) == 0 or places[-1] < plan.keep:
        return _taken(head, places, axis=1)
    below = next(e for e in reversed(plan.edges[:-1]) if e <= places[0])  # number of blocks
    if len(plan.shape) == 1:
        length = plan.shape[0] // below
        start = (places - below) * length
        out = np.zeros((x.shape[0], len(places)), x.dtype)
        for o in range(length):
            out += x[:, start + o] if o < length // 2 else -x[:, start + o]
        return out * x.dtype.type(length**-0.5)
    side = math.isqrt(math.prod(plan.shape) // below)
    across = plan.shape[1] // side
    band, block = np.divmod(places - below, below)
    i, j = block // across * side, block % across * side
    out = np.zeros((x.shape[0], len(places)), x.dtype)
    for di in range(side):
        for dj in range(side):
            right, lower = dj >= side // 2, di >= side // 2
            signs = np.array([1 - 2 * right, 1 - 2 * lower, 1 - 2 * (right ^ lower)], x.dtype)
            out += x[:, (i + di) * plan.shape[1] + j + dj] * signs[band]
    return out * x.dtype.type(1 / side)


@njit(cache=True, error_model="numpy")
def _copy_rows(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(x.shape[1]):
        for r in range(x.shape[0]):
            out[r, i] = x[r, i]


@njit(cache=True, error_model="numpy")
def _rows_1d(
    x: np.ndarray, shape: tuple, padded: tuple, L: int, keep: int, head: np.ndarray, squares: np.ndarray
) -> None:
    """Haar transform of each row of x: averages and kept details to ``head``, squares of all coefficients added up."""
    n, N = shape[0], padded[0]
    c = x.dtype.type(np.sqrt(0.5))
    one, two = np.zeros(N, x.dtype), np.empty(max(1, N // 2), x.dtype)
    for r in range(x.shape[0]):
        one[:n] = x[r]
        one[n:] = 0
        source, target, half = one, two, N
        for _ in range(L):
            half //= 2
            _split_pairs(source, target, squares[half : 2 * half], c)
            if half < keep:
                _differences(source, head[r, half : 2 * half], c)
            source, target = target, source
        for i in range(half):
            head[r, i] = source[i]
            squares[i] += np.float64(source[i]) * np.float64(source[i])


@njit(cache=True, error_model="numpy")
def _split_pairs(source: np.ndarray, target: np.ndarray, squares: np.ndarray, c: float) -> None:
    for i in range(len(squares)):
        a, b = source[2 * i], source[2 * i + 1]
        target[i] = (a + b) * c
        d = np.float64((a - b) * c)
        squares[i] += d * d


@njit(cache=True, error_model="numpy")
def _differences(source: np.ndarray, details: np.ndarray, c: float) -> None:
    for i in range(len(details)):
        details[i] = (source[2 * i] - source[2 * i + 1]) * c


@njit(cache=True, error_model="numpy")
def _rows_2d(
    x: np.ndarray, shape: tuple, padded: tuple, L: int, keep: int, head: np.ndarray, squares: np.ndarray
) -> None:
    """The same for images: a level has three bands of details, right, lower, and diagonal."""
    (h, w), (H, W) = shape, padded
    c = x.dtype.type(0.5)
    one, two = np.zeros(H * W, x.dtype), np.empty(H * W, x.dtype)
    for r in range(x.shape[0]):
        for i in range(h):
            one[i * W : i * W + w] = x[r, i * w : (i + 1) * w]
            one[i * W + w : (i + 1) * W] = 0
        one[h * W :] = 0
        source, target, height, width = one, two, H, W
        for _ in range(L):
            height, width = height // 2, width // 2
            size = height * width
            for i in range(height):
                for j in range(width):
                    k = 4 * i * width + 2 * j
                    p, q, s, t = source[k], source[k + 1], source[k + 2 * width], source[k + 2 * width + 1]
                    place = i * width + j
                    target[place] = (p + q + s + t) * c
                    right, lower, diagonal = (p - q + s - t) * c, (p + q - s - t) * c, (p - q - s + t) * c
                    squares[size + place] += np.float64(right) ** 2
                    squares[2 * size + place] += np.float64(lower) ** 2
                    squares[3 * size + place] += np.float64(diagonal) ** 2
                    if size < keep:
                        head[r, size + place] = right
                        head[r, 2 * size + place] = lower
                        head[r, 3 * size + place] = diagonal
            source, target = target, source
        for i in range(height * width):
            head[r, i] = source[i]
            squares[i] += np.float64(source[i]) ** 2
