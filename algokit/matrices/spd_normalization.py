"""Bures-Wasserstein geometry of covariance matrices, and the batch normalisation built on it (GBWBN), with its VJP.

The generalised metric has an SPD parameter M and a power theta; the batch mean takes fixed-point steps from the
arithmetic mean, one by default, and no gradient flows through mean and variance, as in the official code.

Reference: R. Wang, S. Jin, Z. Chen, X. Luo, X.-J. Wu, CVPR 2025, arXiv 2504.00660; code: jjscc/GBWBN.
Chapter: notebooks/matrices/spd_normalization.ipynb.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from threadpoolctl import ThreadpoolController

from algokit.arrays import Array, array_namespace, from_numpy, to_numpy
from algokit.checks import (
    AlgokitWarning,
    RNGLike,
    check_array,
    check_bool,
    check_float,
    check_int,
    check_one_of,
    check_rng,
)

__all__ = [
    "BatchNormResult",
    "SPDBatchNorm",
    "SPDNet",
    "bw_distance",
    "bw_exp",
    "bw_geodesic",
    "bw_log",
    "bw_mean",
    "bw_transport",
    "spd_batch_norm",
    "spd_batch_norm_vjp",
    "spd_power",
]

SYMMETRY = 1e-8  # largest accepted asymmetry, relative to the largest element
TIE = 1e-6  # eigenvalues closer than this, relatively, share the derivative of their mean
RECTIFY = 1e-5  # ReEig's floor, as in the official code
MAX_THETA = 64.0  # powers beyond this are mistakes, and overflow
RAMP = 1e-7  # the bias starts at the identity plus this times 1, 2, ..., n, which breaks ties


class BatchNormResult(NamedTuple):
    """A batch after normalisation.

    Attributes
    ----------
    output : array, shape (N, n, n)
        Normalised matrices.
    mean : array, shape (n, n)
        The mean that was used, in the coordinates after the power and the congruence by :math:`M^{-1/2}`.
    variance : float
        The variance that was used.
    n_folded : int
        Matrices that centring, scaling or the way to the bias pushed past the edge of the cone, where the exponential
        map folds back.
    cache : object
        What :func:`spd_batch_norm_vjp` needs.
    """

    output: Array
    mean: Array
    variance: float
    n_folded: int
    cache: Any


# --- the geometry -----------------------------------------------------------------------------------------------------


def spd_power(X: Array, p: float) -> Array:
    """Power of symmetric positive (semi)definite matrices.

    Parameters
    ----------
    X : array, shape (..., n, n)
        Matrices; positive definite where ``p`` is negative.
    p : float
        Exponent.

    Returns
    -------
    array, shape (..., n, n)
        :math:`U\\,\\mathrm{diag}(\\lambda^p)\\,U^\\top`.

    Raises
    ------
    TypeError
        If ``X`` is not numeric.
    ValueError
        If a matrix is not symmetric, or has an eigenvalue out of range.

    Examples
    --------
    >>> import numpy as np
    >>> spd_power(np.diag([4.0, 9.0]), 0.5)
    array([[2., 0.],
           [0., 3.]])
    """
    p = check_float(p, "p")
    lam, U = _eigh(_check_symmetric(X, "X"), "X", singular=p >= 0)
    out = _spectral(U, lam**p)
    if not bool(array_namespace(out).all(array_namespace(out).isfinite(out))):
        raise ValueError(f"p must keep the eigenvalues of X finite, got {p:g}")
    return out


def bw_distance(
    X: Array, Y: Array, *, M: Array | None = None, theta: float = 1.0, squared: bool = False
) -> Array | float:
    r"""Bures-Wasserstein distance: between centred Gaussians with these covariances, the optimal-transport distance.

    .. math:: d^2(X,Y)=\operatorname{tr}X+\operatorname{tr}Y-2\operatorname{tr}(Y^{1/2}XY^{1/2})^{1/2}

    With ``M`` both matrices are first mapped to :math:`M^{-1/2}PM^{-1/2}`, with ``theta`` to :math:`P^\theta`, and
    the distance is divided by ``theta``.

    Parameters
    ----------
    X, Y : array, shape (..., n, n)
        Symmetric positive semidefinite; shapes broadcast.
    M : array, shape (n, n), optional
        Positive definite parameter of the generalised metric.
    theta : float, default 1
        Power, positive.
    squared : bool, default False
        Whether to return the square.

    Returns
    -------
    float or array, shape (...)
        In the units of the square root of ``X``. The square is a difference of traces: distances below about
        :math:`10^{-8}` of :math:`\sqrt{\operatorname{tr}X}` drown in rounding.

    Raises
    ------
    TypeError
        If an argument is not numeric.
    ValueError
        If a matrix is not symmetric or has a negative eigenvalue, shapes do not fit, or ``theta`` is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> float(bw_distance(np.diag([1.0, 4.0]), np.diag([9.0, 4.0])))  # square roots 1 and 3
    2.0
    """
    X, Y = _check_symmetric(X, "X"), _check_symmetric(Y, "Y", like=X)
    theta = check_float(theta, "theta", low=0, open_low=True, high=MAX_THETA)
    check_bool(squared, "squared")
    xp = array_namespace(X, Y)
    if theta != 1.0:
        X, Y = (_spectral(U, lam**theta) for lam, U in (_eigh(X, "X"), _eigh(Y, "Y")))
    if M is not None:
        lam, U = _eigh(_check_symmetric(M, "M", like=X, ndim=2), "M", singular=False)
        R = _spectral(U, lam**-0.5)
        X, Y = R @ X @ R, R @ Y @ R
    lam, U = _eigh(Y, "Y")
    H = _spectral(U, xp.sqrt(lam))
    between = _eigvalsh(_sym(H @ X @ H), "X")
    d2 = xp.linalg.trace(X) + xp.linalg.trace(Y) - 2.0 * xp.sum(xp.sqrt(between), axis=-1)
    d2 = xp.where(d2 > 0, d2, 0.0 * d2) / theta**2
    out = d2 if squared else xp.sqrt(d2)
    return float(out) if out.ndim == 0 else out


def bw_log(B: Array, X: Array) -> Array:
    r"""Logarithm :math:`(BX)^{1/2}+(XB)^{1/2}-2B`: the velocity at ``B`` of the geodesic that reaches ``X`` at time 1.

    Parameters
    ----------
    B : array, shape (..., n, n)
        Base point, positive definite.
    X : array, shape (..., n, n)
        End point, positive semidefinite; shapes broadcast.

    Returns
    -------
    array, shape (..., n, n)
        Symmetric tangent vector.

    Raises
    ------
    TypeError
        If an argument is not numeric.
    ValueError
        If a matrix is not symmetric, ``B`` not positive definite, or ``X`` has a negative eigenvalue.

    Examples
    --------
    >>> import numpy as np
    >>> bw_log(np.eye(1), np.array([[9.0]]))  # 2 (3 - 1)
    array([[4.]])
    """
    B = _check_symmetric(B, "B")
    X = _check_symmetric(X, "X", like=B)
    b, U = _eigh(B, "B", singular=False)
    return _log(B, b, U, X)


def bw_exp(B: Array, S: Array, *, check: bool = False) -> Array:
    r"""Exponential map :math:`B+S+LBL`, where :math:`L` solves :math:`BL+LB=S`.

    It undoes :func:`bw_log` as long as :math:`I+L` is positive definite; beyond that the geodesic has hit the edge of
    the cone and comes back (it *folds*).

    Parameters
    ----------
    B : array, shape (..., n, n)
        Base point, positive definite.
    S : array, shape (..., n, n)
        Symmetric tangent vector; shapes broadcast.
    check : bool, default False
        Whether to refuse tangent vectors that fold.

    Returns
    -------
    array, shape (..., n, n)
        Positive semidefinite.

    Raises
    ------
    TypeError
        If an argument is not numeric.
    ValueError
        If a matrix is not symmetric, ``B`` not positive definite, or ``check`` is set and a vector folds.

    Examples
    --------
    >>> import numpy as np
    >>> bw_exp(np.eye(1), np.array([[4.0]]))
    array([[9.]])
    """
    B = _check_symmetric(B, "B")
    S = _check_symmetric(S, "S", like=B)
    b, U = _eigh(B, "B", singular=False)
    L = _lyapunov(b, U, S)
    if check_bool(check, "check"):
        xp = array_namespace(L)
        lowest = xp.linalg.eigvalsh(L)[..., 0]
        if float(xp.min(lowest)) <= -1.0:
            raise ValueError(f"S must not fold: I + L has an eigenvalue <= 0{_where(xp, lowest <= -1.0)}")
    return B + S + L @ B @ L


def bw_transport(B: Array, S: Array, *, inverse: bool = False) -> Array:
    r"""Parallel transport of tangent vectors between ``B`` and the identity, in closed form since the two commute.

    In the eigenbasis of ``B`` the elements are multiplied by :math:`\sqrt{2/(b_i+b_j)}`, or divided for the inverse.

    Parameters
    ----------
    B : array, shape (..., n, n)
        Positive definite.
    S : array, shape (..., n, n)
        Symmetric tangent vector at ``B`` (at the identity for the inverse).
    inverse : bool, default False
        From the identity to ``B`` instead.

    Returns
    -------
    array, shape (..., n, n)
        Tangent vector of the same length at the other point.

    Raises
    ------
    TypeError
        If an argument is not numeric.
    ValueError
        If a matrix is not symmetric, or ``B`` not positive definite.

    Examples
    --------
    >>> import numpy as np
    >>> bw_transport(np.array([[4.0]]), np.array([[6.0]]))
    array([[3.]])
    """
    B = _check_symmetric(B, "B")
    S = _check_symmetric(S, "S", like=B)
    b, U = _eigh(B, "B", singular=False)
    return _transport(b, U, S, inverse=check_bool(inverse, "inverse"))


def bw_geodesic(A: Array, B: Array, t: float) -> Array:
    r"""Point :math:`(1-t)^2A+t^2B+t(1-t)[(AB)^{1/2}+(BA)^{1/2}]` of the geodesic from ``A`` to ``B``.

    Parameters
    ----------
    A : array, shape (..., n, n)
        Start, positive definite.
    B : array, shape (..., n, n)
        End, positive semidefinite; shapes broadcast.
    t : float
        Time in [0, 1].

    Returns
    -------
    array, shape (..., n, n)
        Positive semidefinite.

    Raises
    ------
    TypeError
        If an argument is not numeric.
    ValueError
        If a matrix is not symmetric, not positive (semi)definite, or ``t`` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> bw_geodesic(np.eye(1), np.array([[9.0]]), 0.5)  # the square root moves at constant speed
    array([[4.]])
    """
    A = _check_symmetric(A, "A")
    B = _check_symmetric(B, "B", like=A)
    t = check_float(t, "t", low=0, high=1)
    a, U = _eigh(A, "A", singular=False)
    return _geodesic(A, a, U, B, t)


def bw_mean(X: Array, *, weights: Array | None = None, n_iter: int = 50, tol: float = 1e-12) -> Array:
    r"""Bures-Wasserstein barycentre by the fixed-point iteration, started at the arithmetic mean.

    .. math:: G\leftarrow G^{-1/2}\Bigl(\sum_iw_i(G^{1/2}X_iG^{1/2})^{1/2}\Bigr)^2G^{-1/2}

    Parameters
    ----------
    X : array, shape (N, n, n)
        Positive semidefinite matrices, with a positive definite mean.
    weights : array, shape (N,), optional
        Non-negative, not all zero; equal by default.
    n_iter : int, default 50
        Most iterations. The official layer makes one.
    tol : float, default 1e-12
        Stop when the largest change, or the error that is left as estimated from the rate of convergence, is below
        this, relative to the largest element.

    Returns
    -------
    array, shape (n, n)
        The barycentre: the point at which the logarithms of all ``X`` cancel.

    Raises
    ------
    TypeError
        If an argument is not numeric.
    ValueError
        If a matrix is not symmetric, has a negative eigenvalue, weights do not fit, or the mean is singular.

    Warns
    -----
    AlgokitWarning
        If the tolerance was not reached.

    Notes
    -----
    Each iteration sums :math:`(G^{1/2}X_iG^{1/2})^{1/2}` over the batch, so shards of a batch can be summed apart.

    Examples
    --------
    >>> import numpy as np
    >>> bw_mean(np.array([[[1.0]], [[9.0]]]))  # the mean of the square roots, squared
    array([[4.]])
    """
    X = _check_symmetric(X, "X", ndim=3)
    n_iter = check_int(n_iter, "n_iter", low=1, high=10**6)
    tol = check_float(tol, "tol", low=0)
    if weights is not None:
        weights = check_array(weights, "weights", ndim=1, low=0)
        if weights.shape[0] != X.shape[0]:
            raise ValueError(f"weights must have one entry for each of the {X.shape[0]} X, got {weights.shape[0]}")
        total = array_namespace(weights).sum(weights)
        if not 0 < float(total) < math.inf:
            raise ValueError("weights must have a positive, finite sum")
        weights = weights / total
    with _blas().limit(limits=1, user_api="blas"):  # thin products: a second thread costs more than it brings
        G, error = _mean(X, weights, n_iter, tol)
    if error > tol:
        warnings.warn(f"n_iter={n_iter} left a relative error of about {error:.1e}", AlgokitWarning, stacklevel=2)
    return G


# --- the layer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cache:
    """What the backward pass needs; letters as in the chapter."""

    theta: float
    factor: float  # c = scale / sqrt(v^2 + eps)
    scale: float
    power_in: tuple[Array, Array] | None  # eigenvalues and vectors of X, if theta != 1
    power_bias: tuple[Array, Array]
    metric: tuple[Array, Array]
    X: Array  # X^theta
    G: Array  # bias^theta
    mean: tuple[Array, Array, Array]  # B^{1/2}, B^{-1/2}, transport factors in its basis
    mean_basis: tuple[Array, Array]
    root: tuple[Array, Array]  # B^{1/2} Y B^{1/2}
    A: tuple[Array, Array]  # I + S / 2
    bias: tuple[Array, Array]  # of G-hat
    F: Array  # Log_I of the scaled matrices
    L: Array  # Lyapunov solution at G-hat
    G_hat: Array
    Y_out: Array
    power_out: tuple[Array, Array] | None


def spd_batch_norm(
    X: Array,
    *,
    bias: Array | None = None,
    metric: Array | None = None,
    scale: float = 1.0,
    theta: float = 1.0,
    eps: float = 1e-5,
    mean: Array | None = None,
    variance: float | None = None,
    mean_iter: int = 1,
    variance_about: Literal["mean", "identity"] = "mean",
) -> BatchNormResult:
    r"""Batch normalisation of SPD matrices in generalised Bures-Wasserstein geometry.

    With :math:`Y_i=M^{-1/2}X_i^\theta M^{-1/2}` and their mean B: centre by
    :math:`\mathrm{Exp}_I(\Gamma_{B\to I}\mathrm{Log}_BY_i)`, scale in the tangent space at the identity by
    :math:`s/\sqrt{v^2+\epsilon}`, carry to the bias, and undo the congruence and the power.

    Parameters
    ----------
    X : array, shape (N, n, n)
        Batch of positive definite matrices.
    bias : array, shape (n, n), optional
        G, positive definite: where the batch is carried. The identity by default.
    metric : array, shape (n, n), optional
        M, positive definite. The identity by default, which is plain Bures-Wasserstein geometry.
    scale : float, default 1
        s, positive.
    theta : float, default 1
        Power, positive.
    eps : float, default 1e-5
        Added to the variance.
    mean : array, shape (n, n), optional
        Mean in the coordinates of Y, such as the running one. By default that of the batch.
    variance : float, optional
        Variance, such as the running one. By default that of the batch.
    mean_iter : int, default 1
        Fixed-point steps for the mean of the batch.
    variance_about : {"mean", "identity"}, default "mean"
        Where the variance of the batch is measured; the official code measures it about the identity, before centring.

    Returns
    -------
    BatchNormResult
        Output of shape (N, n, n), statistics, number of folded matrices, and the cache for the backward pass.

    Raises
    ------
    TypeError
        If an argument is not numeric.
    ValueError
        If a matrix is not symmetric positive definite, shapes do not fit, or a parameter is out of range.

    Notes
    -----
    Three eigendecompositions a matrix (five with ``theta``), where composing the maps one by one would take nine; to
    count folds on the way to a bias takes the eigenvalues of one more.
    Source: Wang et al. (2025); ``nn.py`` and ``functional.py`` of the official code.

    Examples
    --------
    >>> import numpy as np
    >>> batch = np.array([[[1.0]], [[4.0]], [[9.0]]])
    >>> result = spd_batch_norm(batch, eps=0.0)  # square roots 1, 2, 3: mean 2, variance 2/3
    >>> np.sqrt(result.output[:, 0, 0]).round(3), round(result.variance, 3), result.n_folded
    (array([0.225, 1.   , 2.225]), 0.667, 1)
    """
    X = _check_symmetric(X, "X", ndim=3)
    xp = array_namespace(X)
    eye = _eye(xp, X)
    bias = eye if bias is None else _check_symmetric(bias, "bias", like=X, ndim=2)
    metric = eye if metric is None else _check_symmetric(metric, "metric", like=X, ndim=2)
    scale = check_float(scale, "scale", low=0, open_low=True, high=1e6)
    theta = check_float(theta, "theta", low=0, open_low=True, high=MAX_THETA)
    eps = check_float(eps, "eps", low=0)
    mean_iter = check_int(mean_iter, "mean_iter", low=1, high=10**6)
    check_one_of(variance_about, "variance_about", ("mean", "identity"))
    power_in = _eigh(X, "X", singular=False) if theta != 1.0 else None
    power_bias = _eigh(bias, "bias", singular=False)
    m, V = _eigh(metric, "metric", singular=False)
    Xt = X if power_in is None else _spectral(power_in[1], power_in[0] ** theta)
    Gt = _spectral(power_bias[1], power_bias[0] ** theta)
    R, P = _spectral(V, m**-0.5), _spectral(V, xp.sqrt(m))
    Y, G_hat = _sym(R @ Xt @ R), _sym(R @ Gt @ R)  # step 1
    if mean is None:  # step 2
        B = _mean(Y, None, mean_iter, 1e-14, name="X")[0]
    else:
        B = _check_symmetric(mean, "mean", like=X, ndim=2)
    b, U = _eigh(B, "mean" if mean is not None else "X", singular=False)
    H, K = _spectral(U, xp.sqrt(b)), _spectral(U, b**-0.5)
    root = _eigh(_sym(H @ Y @ H), "X", singular=False)
    if variance is not None:
        v2 = check_float(variance, "variance", low=0)
    elif variance_about == "mean":
        v2 = float(xp.mean(xp.linalg.trace(Y)) + xp.sum(b) - 2 * xp.mean(xp.sum(xp.sqrt(root[0]), axis=-1)))
    else:
        lam = _eigvalsh(Y, "X")
        v2 = float(xp.mean(xp.sum((xp.sqrt(lam) - 1.0) ** 2, axis=-1)))
    v2 = max(v2, 0.0) / theta**2 if variance is None else v2
    if v2 + eps == 0.0:
        raise ValueError("eps must be positive where the variance of X is zero")
    c = scale / math.sqrt(v2 + eps)
    C = H @ _spectral(root[1], xp.sqrt(root[0])) @ K  # (BY)^{1/2}
    log = C + xp.matrix_transpose(C) - 2.0 * B
    T = _transport_factors(xp, b)
    UT = xp.matrix_transpose(U)
    S = U @ (T * (UT @ log @ U)) @ UT
    a, Q = xp.linalg.eigh(eye + 0.5 * _sym(S))  # step 3: the centred matrix is A^2
    scaled = 1.0 + c * (xp.abs(a) - 1.0)  # step 4: the scaled matrix has these eigenvalues, squared
    folded = xp.any((a < 0) | (scaled < 0), axis=-1)
    F = _spectral(Q, 2.0 * (xp.abs(scaled) - 1.0))
    g, W = _eigh(G_hat, "bias", singular=False)  # step 5
    S2 = _transport(g, W, F, inverse=True)
    L = _lyapunov(g, W, S2)
    if not (bias is eye and metric is eye):  # at the identity I + L = |scaled|, which cannot fold
        folded = folded | (xp.linalg.eigvalsh(_sym(L))[..., 0] < -1.0)
    Y_out = _sym(G_hat + S2 + L @ G_hat @ L)
    out = _sym(P @ Y_out @ P)  # step 6
    power_out = None
    if theta != 1.0:
        power_out = _eigh(out, "X")
        out = _spectral(power_out[1], power_out[0] ** (1.0 / theta))
    cache = _Cache(
        theta, c, scale, power_in, power_bias, (m, V), Xt, Gt, (H, K, T), (b, U), root, (a, Q), (g, W), F, L, G_hat,
        Y_out, power_out,
    )  # fmt: skip
    return BatchNormResult(out, B, v2, int(xp.sum(xp.astype(folded, xp.int64))), cache)


def spd_batch_norm_vjp(cache: Any, grad_output: Array) -> dict[str, Any]:
    """Gradients of a loss through :func:`spd_batch_norm`; mean and variance are taken as constants.

    Parameters
    ----------
    cache : object
        From :func:`spd_batch_norm`.
    grad_output : array, shape (N, n, n)
        Gradient of the loss with respect to the output; its symmetric part is used.

    Returns
    -------
    dict
        ``"X"`` of shape (N, n, n), ``"bias"`` and ``"metric"`` of shape (n, n), all symmetric, and ``"scale"``, a
        float.

    Raises
    ------
    TypeError
        If ``cache`` is not one, or ``grad_output`` is not numeric.
    ValueError
        If the shape of ``grad_output`` is wrong.

    Notes
    -----
    Spectral functions by Daleckii and Krein's formula; equal eigenvalues take the derivative, so nothing is NaN.

    Examples
    --------
    >>> import numpy as np
    >>> batch = np.array([[[1.0]], [[4.0]], [[9.0]]])
    >>> result = spd_batch_norm(batch, mean=np.array([[4.0]]), variance=1.0, eps=0.0)  # x -> (sqrt(x) - 1)^2
    >>> spd_batch_norm_vjp(result.cache, np.ones((3, 1, 1)))["X"][:, 0, 0].round(3)
    array([0.   , 0.5  , 0.667])
    """
    if not isinstance(cache, _Cache):
        raise TypeError(f"cache must come from spd_batch_norm, got {type(cache).__name__}")
    shape = tuple(cache.F.shape)
    D = _sym(check_array(grad_output, "grad_output", shape=shape))
    xp = array_namespace(cache.F, D)
    mT = xp.matrix_transpose
    if cache.power_out is not None:
        lam, U = cache.power_out
        D = _spectral_vjp(
            lam, U, D, lambda x: x ** (1 / cache.theta), lambda x: x ** (1 / cache.theta - 1) / cache.theta
        )
    m, V = cache.metric
    R, P = _spectral(V, m**-0.5), _spectral(V, xp.sqrt(m))
    D_P = _sum(2.0 * _sym(D @ P @ cache.Y_out))
    D = P @ D @ P  # now of Y_out = Exp_G(S2)
    g, W = cache.bias
    L, G_hat = cache.L, cache.G_hat
    D_L = _sym(2.0 * D @ L @ G_hat)
    D_C = _lyapunov(g, W, D_L)
    D_G = _sum(D + L @ D @ L - 2.0 * _sym(L @ D_C))
    D_S2 = D + D_C
    D_F = _transport(g, W, D_S2, inverse=True)
    D_G = D_G + _transport_vjp(xp, g, W, cache.F, D_S2)
    a, Q = cache.A
    c = cache.factor
    inner = 1.0 + c * (xp.abs(a) - 1.0)
    in_basis = mT(Q) @ D_F @ Q
    diagonal = xp.sum(xp.linalg.diagonal(in_basis) * xp.sign(inner) * (xp.abs(a) - 1.0), axis=None)
    D_scale = 2.0 * float(diagonal) * c / cache.scale
    D_A = _spectral_vjp(
        a, Q, D_F, lambda x: 2 * xp.abs(1 + c * (xp.abs(x) - 1)),
        lambda x: 2 * c * xp.sign(1 + c * (xp.abs(x) - 1)) * xp.sign(x),
    )  # fmt: skip
    (H, K, T), (_, U) = cache.mean, cache.mean_basis
    D_log = U @ (T * (mT(U) @ (0.5 * D_A) @ U)) @ mT(U)
    D_root = H @ (2.0 * D_log) @ K  # log = HCK + KCH - 2B with C = (HYH)^{1/2}
    lam, Z = cache.root
    D_Y = H @ _spectral_vjp(lam, Z, _sym(D_root), xp.sqrt, lambda x: 0.5 / xp.sqrt(x)) @ H
    D_R = _sum(2.0 * _sym(D_Y @ R @ cache.X)) + 2.0 * _sym(D_G @ R @ cache.G)
    D_X, D_bias = R @ D_Y @ R, R @ D_G @ R
    power = (lambda x: x**cache.theta, lambda x: cache.theta * x ** (cache.theta - 1))
    if cache.power_in is not None:
        D_X = _spectral_vjp(*cache.power_in, D_X, *power)
        D_bias = _spectral_vjp(*cache.power_bias, D_bias, *power)
    D_M = _spectral_vjp(m, V, D_R, lambda x: x**-0.5, lambda x: -0.5 * x**-1.5)
    D_M = D_M + _spectral_vjp(m, V, D_P, xp.sqrt, lambda x: 0.5 / xp.sqrt(x))
    return {"X": _sym(D_X), "bias": _sym(D_bias), "metric": _sym(D_M), "scale": D_scale}


class SPDBatchNorm:
    """The layer with its parameters and running statistics.

    Parameters
    ----------
    n : int
        Size of the matrices.
    theta : float, default 1
        Power, positive.
    momentum : float, default 0.1
        Step of the running statistics towards those of the batch, in [0, 1].
    eps : float, default 1e-5
        Added to the variance.
    mean_iter : int, default 1
        Fixed-point steps for the mean of a batch.

    Attributes
    ----------
    bias, metric : numpy.ndarray, shape (n, n)
        G and M; change them as you learn.
    scale : float
        s.
    running_mean_ : numpy.ndarray, shape (n, n)
        Starts at the identity, moves along geodesics.
    running_var_ : float
        Starts at 1.

    Examples
    --------
    >>> import numpy as np
    >>> layer = SPDBatchNorm(1)
    >>> batch = np.array([[[1.0]], [[4.0]], [[9.0]]])
    >>> layer.forward(batch, training=True).output.shape, float(layer.running_mean_[0, 0].round(4))
    ((3, 1, 1), 1.21)
    """

    def __init__(
        self, n: int, *, theta: float = 1.0, momentum: float = 0.1, eps: float = 1e-5, mean_iter: int = 1
    ) -> None:
        n = check_int(n, "n", low=1, high=10**4)
        self.theta = check_float(theta, "theta", low=0, open_low=True, high=MAX_THETA)
        self.momentum = check_float(momentum, "momentum", low=0, high=1)
        self.eps = check_float(eps, "eps", low=0)
        self.mean_iter = check_int(mean_iter, "mean_iter", low=1, high=10**6)
        self.bias = np.eye(n) + RAMP * np.diag(np.arange(1.0, n + 1))
        self.metric = np.eye(n)
        self.scale = 1.0
        self.running_mean_ = np.eye(n)
        self.running_var_ = 1.0

    def forward(self, X: Array, training: bool) -> BatchNormResult:
        """Normalise a batch; in training with its own statistics, which the running ones follow.

        Parameters
        ----------
        X : array, shape (N, n, n)
            Positive definite matrices.
        training : bool
            Whether to use, and learn from, the statistics of the batch.

        Returns
        -------
        BatchNormResult
            As from :func:`spd_batch_norm`.

        Raises
        ------
        ValueError
            If ``X`` is not a batch of positive definite matrices of the right size.
        """
        X = _check_symmetric(X, "X", ndim=3)
        if X.shape[-1] != self.running_mean_.shape[-1]:
            raise ValueError(f"X must hold matrices of size {self.running_mean_.shape[-1]}, got shape {tuple(X.shape)}")
        options: dict[str, Any] = {"bias": from_numpy(self.bias, like=X), "metric": from_numpy(self.metric, like=X)}
        if not check_bool(training, "training"):
            options |= {"mean": from_numpy(self.running_mean_, like=X), "variance": self.running_var_}
        result = spd_batch_norm(
            X, scale=self.scale, theta=self.theta, eps=self.eps, mean_iter=self.mean_iter, **options
        )
        if training:
            self.running_mean_ = bw_geodesic(self.running_mean_, to_numpy(result.mean), self.momentum)
            self.running_var_ = (1 - self.momentum) * self.running_var_ + self.momentum * result.variance
        return result


# --- the network ------------------------------------------------------------------------------------------------------


class SPDNet(ClassifierMixin, BaseEstimator):
    """Classifier of SPD matrices: layers of BiMap, normalisation and ReEig, then LogEig and a linear softmax.

    Parameters
    ----------
    dims : tuple of int, default (8,)
        Sizes of the matrices after each BiMap.
    normalization : {"gbw", "bw", "aim", None}, default "gbw"
        ``"gbw"`` learns bias, scale and metric; ``"bw"`` keeps the metric at the identity; ``"aim"`` is the
        affine-invariant layer (one Karcher step for the mean, congruences for centring and bias, no scale).
    theta : float, default 1
        Power of the Bures-Wasserstein layers.
    n_steps : int, default 200
        Steps of gradient descent.
    batch_size : int, default 30
        Matrices a step.
    learning_rate : float, default 0.05
        Step size; BiMap weights stay orthonormal by projection and QR, SPD parameters positive by exponential steps.
    rng : None, int or numpy.random.Generator
        Initial weights and batches.

    Attributes
    ----------
    classes_ : numpy.ndarray, shape (k,)
        Labels.
    loss_curve_ : numpy.ndarray, shape (n_steps,)
        Mean cross-entropy of each batch before its step, in nats.
    n_folded_ : int
        Matrices that folded during training, counted over all steps and layers.
    n_features_in_ : int
        Size of the matrices.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> G = rng.normal(size=(40, 4, 8)) * np.repeat([1.0, 3.0], 20)[:, None, None]
    >>> X, y = G @ G.transpose(0, 2, 1) / 8, np.repeat([0, 1], 20)
    >>> float(SPDNet(dims=(3,), n_steps=30, batch_size=10, rng=0).fit(X, y).score(X, y)) > 0.8
    True
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (8,),
        *,
        normalization: Literal["gbw", "bw", "aim"] | None = "gbw",
        theta: float = 1.0,
        n_steps: int = 200,
        batch_size: int = 30,
        learning_rate: float = 0.05,
        rng: RNGLike = None,
    ) -> None:
        self.dims = dims
        self.normalization = normalization
        self.theta = theta
        self.n_steps = n_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.rng = rng

    def fit(self, X: Any, y: Any) -> SPDNet:
        """Learn from labelled matrices.

        Parameters
        ----------
        X : array-like, shape (N, n, n)
            Positive definite matrices.
        y : array-like, shape (N,)
            Labels.

        Returns
        -------
        SPDNet
            Itself.

        Raises
        ------
        TypeError
            If an argument is of the wrong type.
        ValueError
            If a matrix is not positive definite, labels do not fit, or a parameter is out of range.
        """
        X = to_numpy(_check_symmetric(X, "X", ndim=3)).astype(np.float64)
        _eigh(X, "X", singular=False)
        y = np.asarray(y)
        if y.shape != X.shape[:1]:
            raise ValueError(f"y must have one label for each of the {X.shape[0]} matrices of X, got shape {y.shape}")
        if y.dtype.kind == "f" and not np.isfinite(y).all():
            raise ValueError("y must be finite")
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        rng = check_rng(self.rng)
        n_steps = check_int(self.n_steps, "n_steps", low=1, high=10**7)
        size = min(check_int(self.batch_size, "batch_size", low=2), len(X))
        rate = check_float(self.learning_rate, "learning_rate", low=0, open_low=True)
        self._build(X.shape[-1], rng)
        self.n_features_in_ = X.shape[-1]
        self.loss_curve_, self.n_folded_ = np.empty(n_steps), 0
        order = np.empty(0, dtype=int)
        for step in range(n_steps):
            if len(order) < size:
                order = rng.permutation(len(X))
            batch, order = order[:size], order[size:]
            try:
                self.loss_curve_[step] = self._step(X[batch], labels[batch], rate)
            except ValueError as error:
                text = f"learning_rate={rate:g} is too large for these X with theta={self.theta:g}: step {step} failed"
                raise ValueError(f"{text} ({error})") from None
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, with the running statistics.

        Parameters
        ----------
        X : array-like, shape (N, n, n)
            Positive definite matrices.

        Returns
        -------
        numpy.ndarray, shape (N, k)
            Rows add up to 1.

        Raises
        ------
        ValueError
            If a matrix is not positive definite or of the wrong size.
        """
        check_is_fitted(self, "classes_")
        X = to_numpy(_check_symmetric(X, "X", ndim=3)).astype(np.float64)
        if X.shape[-1] != self.n_features_in_:
            raise ValueError(f"X must hold matrices of size {self.n_features_in_}, got shape {X.shape}")
        _eigh(X, "X", singular=False)
        return _softmax(self._forward(X, training=False)[0])

    def predict(self, X: Any) -> np.ndarray:
        """Most likely class.

        Parameters
        ----------
        X : array-like, shape (N, n, n)
            Positive definite matrices.

        Returns
        -------
        numpy.ndarray, shape (N,)
            Labels.

        Raises
        ------
        ValueError
            If a matrix is not positive definite or of the wrong size.
        """
        proba = self.predict_proba(X)
        return self.classes_[proba.argmax(axis=1)]

    def _build(self, n: int, rng: np.random.Generator) -> None:
        check_one_of(self.normalization, "normalization", ("gbw", "bw", "aim", None))
        theta = check_float(self.theta, "theta", low=0, open_low=True, high=MAX_THETA)
        if not isinstance(self.dims, (tuple, list, np.ndarray)) or len(self.dims) == 0:
            raise TypeError(f"dims must be a non-empty tuple of sizes, got {self.dims!r}")
        sizes = [n, *(check_int(d, "dims", low=1) for d in np.asarray(self.dims).reshape(-1).tolist())]
        if any(b > a for a, b in pairwise(sizes)):
            raise ValueError(f"dims must not increase, starting from {n}, got {self.dims}")
        self._weights = [np.linalg.qr(rng.normal(size=(a, b)))[0] for a, b in pairwise(sizes)]
        self._norms = [SPDBatchNorm(d, theta=theta) if self.normalization else None for d in sizes[1:]]
        d, k = sizes[-1] ** 2, len(self.classes_)
        self._linear, self._offset = rng.normal(0, d**-0.5, (d, k)), np.zeros(k)

    def _forward(self, X: np.ndarray, *, training: bool) -> tuple[np.ndarray, list[Any]]:
        """Scores (N, k) and what the backward pass needs."""
        tape: list[Any] = []
        for W, norm in zip(self._weights, self._norms, strict=True):
            inner = _sym(W.T @ X @ W)
            lam, U = np.linalg.eigh(inner)
            safe = _spectral(U, np.maximum(lam, 1e-12)) if lam.min() < 1e-12 else inner
            out, cache = safe, None
            if norm is not None and self.normalization == "aim":
                out, cache = _aim_forward(safe, norm, training)
            elif norm is not None:
                result = norm.forward(safe, training)
                out, cache = result.output, result.cache
                self.n_folded_ += result.n_folded * training
            mu, V = np.linalg.eigh(out)
            tape.append((X, cache, mu, V))
            X = _spectral(V, np.maximum(mu, RECTIFY))
        lam, U = np.linalg.eigh(X)
        tape.append((lam, U))
        features = _spectral(U, np.log(lam)).reshape(len(X), -1)
        tape.append(features)
        return features @ self._linear + self._offset, tape

    def _step(self, X: np.ndarray, labels: np.ndarray, rate: float) -> float:
        """One step of Riemannian gradient descent; the loss before it."""
        scores, tape = self._forward(X, training=True)
        proba = _softmax(scores)
        rows = np.arange(len(X))
        loss = -np.log(np.maximum(proba[rows, labels], 1e-300)).mean()
        proba[rows, labels] -= 1
        proba /= len(X)
        features, (lam, U) = tape[-1], tape[-2]
        d = U.shape[-1]
        D = (proba @ self._linear.T).reshape(-1, d, d)
        self._linear -= rate * features.T @ proba
        self._offset -= rate * proba.sum(axis=0)
        D = _spectral_vjp(lam, U, _sym(D), np.log, lambda x: 1 / x)
        for k in range(len(self._weights) - 1, -1, -1):
            before, cache, mu, V = tape[k]
            D = _spectral_vjp(
                mu, V, D, lambda x: np.maximum(x, RECTIFY), lambda x: (x > RECTIFY).astype(float)
            )  # fmt: skip
            norm = self._norms[k]
            if norm is not None and self.normalization == "aim":
                D, D_bias = _aim_vjp(cache, D)
                norm.bias = _spd_step(norm.bias, D_bias, rate)
            elif norm is not None:
                grads = spd_batch_norm_vjp(cache, D)
                D = grads["X"]
                norm.bias = _spd_step(norm.bias, grads["bias"], rate)
                norm.scale = float(norm.scale * np.exp(np.clip(-rate * grads["scale"] * norm.scale, -0.5, 0.5)))
                if self.normalization == "gbw":
                    norm.metric = _spd_step(norm.metric, grads["metric"], rate)
            W = self._weights[k]
            D_W = 2.0 * (before @ W @ D).sum(axis=0)
            D = W @ D @ W.T
            tangent = D_W - W @ _sym(W.T @ D_W)
            Q, T = np.linalg.qr(W - rate * tangent)
            self._weights[k] = Q * np.where(np.diag(T) < 0, -1.0, 1.0)
        if not np.isfinite(loss):
            raise ValueError(f"learning_rate, theta and X must keep the loss finite, got {loss}")
        return float(loss)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "loss_curve_")


# --- building blocks --------------------------------------------------------------------------------------------------


def _sym(A: Array) -> Array:
    return 0.5 * (A + array_namespace(A).matrix_transpose(A))


def _sum(A: Array) -> Array:
    return array_namespace(A).sum(A, axis=0)


def _eye(xp: Any, like: Array) -> Array:
    return from_numpy(np.eye(like.shape[-1], dtype=to_numpy(like[..., 0, 0]).dtype), like=like)


def _softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _where(xp: Any, mask: Array) -> str:
    """Words for the first true element of a mask over a batch."""
    if mask.ndim == 0:
        return ""
    flat = int(xp.argmax(xp.astype(xp.reshape(mask, (-1,)), xp.int8)))
    return f" at batch index {tuple(int(i) for i in np.unravel_index(flat, tuple(mask.shape)))}"


def _check_symmetric(x: Any, name: str, *, like: Array | None = None, ndim: int | None = None) -> Array:
    x = check_array(x, name)
    if x.ndim < 2 or x.shape[-1] != x.shape[-2] or (ndim is not None and x.ndim != ndim):
        wanted = {2: "(n, n)", 3: "(N, n, n)", None: "(..., n, n)"}[ndim]
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")
    if like is not None and x.shape[-1] != like.shape[-1]:
        raise ValueError(f"{name} must hold matrices of size {like.shape[-1]}, got shape {tuple(x.shape)}")
    if like is not None:
        try:
            np.broadcast_shapes(tuple(x.shape), tuple(like.shape))
        except ValueError:
            raise ValueError(f"{name} must have a shape that fits {tuple(like.shape)}, got {tuple(x.shape)}") from None
    xp = array_namespace(x)
    skew = xp.max(xp.abs(x - xp.matrix_transpose(x)), axis=(-2, -1))
    bad = skew > SYMMETRY * xp.max(xp.abs(x), axis=(-2, -1))
    if bool(xp.any(bad)):
        raise ValueError(f"{name} must be symmetric, but is not{_where(xp, bad)}")
    return x


def _eigh(X: Array, name: str, *, singular: bool = True) -> tuple[Array, Array]:
    """Eigenvalues (..., n), not negative, and vectors (..., n, n)."""
    try:
        lam, U = array_namespace(X).linalg.eigh(X)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"{name} must leave eigenvalues that can be computed: {error}") from None
    return _check_eigenvalues(lam, name, singular), U


def _eigvalsh(X: Array, name: str) -> Array:
    """Eigenvalues (..., n), not negative."""
    try:
        lam = array_namespace(X).linalg.eigvalsh(X)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"{name} must leave eigenvalues that can be computed: {error}") from None
    return _check_eigenvalues(lam, name, True)


def _check_eigenvalues(lam: Array, name: str, singular: bool) -> Array:
    """Eigenvalues, ascending, with rounding errors below zero removed."""
    xp = array_namespace(lam)
    largest, lowest = xp.max(xp.abs(lam), axis=-1), lam[..., 0]
    slack = float(xp.finfo(lam.dtype).eps) * largest
    bad = lowest < -8 * lam.shape[-1] * slack if singular else lowest <= slack
    if bool(xp.any(bad | ~xp.isfinite(largest))):
        kind = "positive semidefinite" if singular else "positive definite"
        least = float(xp.min(lowest))
        raise ValueError(f"{name} must be {kind}, but is not{_where(xp, bad)}: smallest eigenvalue {least:.3g}")
    return xp.where(lam > 0, lam, 0.0 * lam)


def _spectral(U: Array, f: Array) -> Array:
    return (U * f[..., None, :]) @ array_namespace(U).matrix_transpose(U)


def _spectral_vjp(
    lam: Array, U: Array, D: Array, f: Callable[[Array], Array], derivative: Callable[[Array], Array]
) -> Array:
    """Daleckii-Krein: in the eigenbasis, multiply by divided differences of f; ties take the derivative."""
    xp = array_namespace(lam)
    left, right = lam[..., :, None], lam[..., None, :]
    gap = left - right
    tied = xp.abs(gap) <= TIE * (xp.abs(left) + xp.abs(right))
    value = f(lam)
    ratio = (value[..., :, None] - value[..., None, :]) / xp.where(tied, xp.ones_like(gap), gap)
    K = xp.where(tied, derivative(0.5 * (left + right)), ratio)
    UT = xp.matrix_transpose(U)
    return U @ (K * (UT @ D @ U)) @ UT


def _lyapunov(b: Array, U: Array, S: Array) -> Array:
    """Symmetric L with BL + LB = S, where B = U diag(b) U'."""
    UT = array_namespace(U).matrix_transpose(U)
    return U @ ((UT @ S @ U) / (b[..., :, None] + b[..., None, :])) @ UT


def _transport_factors(xp: Any, b: Array) -> Array:
    return xp.sqrt(2.0 / (b[..., :, None] + b[..., None, :]))


def _transport(b: Array, U: Array, S: Array, *, inverse: bool = False) -> Array:
    xp = array_namespace(U)
    T, UT = _transport_factors(xp, b), xp.matrix_transpose(U)
    return U @ ((UT @ S @ U) / T if inverse else (UT @ S @ U) * T) @ UT


def _transport_vjp(xp: Any, g: Array, U: Array, F: Array, D: Array) -> Array:
    """Gradient with respect to G of sum <D, transport of F from I to G>, summed over the batch.

    The factor tau(x, y) = sqrt((x + y) / 2) has the divided difference 1 / (2 (tau_ij + tau_kj)) in its first
    argument: smooth, whatever eigenvalues coincide.
    """
    UT = xp.matrix_transpose(U)
    tau = 1.0 / _transport_factors(xp, g)  # (n, n)
    Ft, Dt = UT @ F @ U, UT @ D @ U  # (N, n, n), symmetric
    products = xp.permute_dims(Dt, (2, 1, 0)) @ xp.permute_dims(Ft, (2, 0, 1))  # [j, i, k] = sum_b D_ij F_kj
    weights = 0.5 / (tau.T[:, :, None] + tau.T[:, None, :])  # [j, i, k]
    Z = xp.sum(weights * products, axis=0)
    return U @ (Z + Z.T) @ UT


def _log(B: Array, b: Array, U: Array, X: Array) -> Array:
    xp = array_namespace(U)
    H, K = _spectral(U, xp.sqrt(b)), _spectral(U, b**-0.5)
    lam, Z = _eigh(_sym(H @ X @ H), "X")
    C = H @ _spectral(Z, xp.sqrt(lam)) @ K
    return C + xp.matrix_transpose(C) - 2.0 * B


def _geodesic(A: Array, a: Array, U: Array, B: Array, t: float) -> Array:
    xp = array_namespace(U)
    H, K = _spectral(U, xp.sqrt(a)), _spectral(U, a**-0.5)
    lam, Z = _eigh(_sym(H @ B @ H), "B")
    C = H @ _spectral(Z, xp.sqrt(lam)) @ K
    return (1 - t) ** 2 * A + t**2 * B + t * (1 - t) * (C + xp.matrix_transpose(C))


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _mean(X: Array, weights: Array | None, n_iter: int, tol: float, name: str = "X") -> tuple[Array, float]:
    """Barycentre and its estimated relative error. Products over the batch are done as single large ones."""
    xp = array_namespace(X)
    N, n, _ = X.shape
    w = xp.ones_like(X[:, 0, 0]) / N if weights is None else weights
    G, change = xp.reshape(xp.reshape(w, (1, N)) @ xp.reshape(X, (N, n * n)), (n, n)), math.inf
    G, error = _sym(G), math.inf
    for _ in range(n_iter):
        g, U = _eigh(G, name, singular=False)
        H, K = _spectral(U, xp.sqrt(g)), _spectral(U, g**-0.5)
        half = xp.reshape(xp.reshape(X, (N * n, n)) @ H, (N, n, n))
        inner = xp.reshape(xp.reshape(xp.matrix_transpose(half), (N * n, n)) @ H, (N, n, n))  # H X_i H
        lam, Z = _eigh(inner, name)
        Z = Z * xp.sqrt(xp.sqrt(lam) * w[:, None])[:, None, :]
        flat = xp.reshape(xp.permute_dims(Z, (1, 0, 2)), (n, N * n))
        root = flat @ flat.T  # sum of w_i (H X_i H)^{1/2}
        KR = K @ root
        new = KR @ KR.T
        before, change = change, float(xp.max(xp.abs(new - G))) / float(xp.max(xp.abs(G)))
        G = new
        shrink = (
            change / before if 0 < before < math.inf else 1.0
        )  # convergence is linear: what is left is a geometric series
        error = min(change, change * shrink / (1.0 - shrink) if shrink < 1.0 else math.inf)
        if error <= tol:
            break
    return _sym(G), error


def _spd_step(P: np.ndarray, grad: np.ndarray, rate: float) -> np.ndarray:
    """Step against the Euclidean gradient along an affine-invariant geodesic: P stays positive definite."""
    lam, U = np.linalg.eigh(P)
    H = _spectral(U, np.sqrt(lam))
    size, V = np.linalg.eigh(_sym(-rate * H @ grad @ H))
    return _sym(H @ _spectral(V, np.exp(np.clip(size, -0.5, 0.5))) @ H)


def _aim_forward(X: np.ndarray, norm: SPDBatchNorm, training: bool) -> tuple[np.ndarray, Any]:
    """Affine-invariant normalisation: centre by B^{-1/2} X B^{-1/2}, carry to the bias by a congruence."""
    if training:
        B = X.mean(axis=0)  # one Karcher step from here
        lam, U = np.linalg.eigh(B)
        H, K = _spectral(U, np.sqrt(lam)), _spectral(U, lam**-0.5)
        mu, V = np.linalg.eigh(_sym(K @ X @ K))
        step, Z = np.linalg.eigh(_spectral(V, np.log(np.maximum(mu, 1e-300))).mean(axis=0))
        B = _sym(H @ _spectral(Z, np.exp(step)) @ H)
        norm.running_mean_ = _aim_geodesic(norm.running_mean_, B, norm.momentum)
    else:
        B = norm.running_mean_
    lam, U = np.linalg.eigh(B)
    K = _spectral(U, lam**-0.5)
    g, W = np.linalg.eigh(norm.bias)
    E = _spectral(W, np.sqrt(g))
    centred = K @ X @ K
    return _sym(E @ centred @ E), (K, E, g, W, centred)


def _aim_vjp(cache: Any, D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    K, E, g, W, centred = cache
    D_E = 2.0 * _sym(D @ E @ centred).sum(axis=0)
    return K @ E @ D @ E @ K, _spectral_vjp(g, W, D_E, np.sqrt, lambda x: 0.5 / np.sqrt(x))


def _aim_geodesic(A: np.ndarray, B: np.ndarray, t: float) -> np.ndarray:
    lam, U = np.linalg.eigh(A)
    H, K = _spectral(U, np.sqrt(lam)), _spectral(U, lam**-0.5)
    mu, V = np.linalg.eigh(_sym(K @ B @ K))
    return _sym(H @ _spectral(V, np.maximum(mu, 1e-300) ** t) @ H)
