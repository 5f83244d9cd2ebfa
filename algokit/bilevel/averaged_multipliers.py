"""Bilevel optimisation in a single loop without a strongly convex lower level: sl-BAMM, all its step-size strategies.

Reference: R. Liu, Y. Liu, W. Yao, S. Zeng, J. Zhang, *Averaged Method of Multipliers for Bi-Level Optimization without
Lower-Level Strong Convexity*, ICML 2023, arXiv 2302.03407. Chapter: notebooks/bilevel/averaged_multipliers.ipynb.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from algokit.arrays import Array, array_namespace
from algokit.bilevel.problems import BilevelProblem, check_start, with_derivatives
from algokit.checks import check_array, check_float, check_int, check_one_of

__all__ = ["SlBammResult", "bamm_step_sizes", "kkt_residual", "sl_bamm"]

Strategy = Literal["s1", "s2", "s3"]
_POWERS = {"s1": (2, 7), "s2": (1, 5), "s3": (0, 3)}  # powers of mu in the steps of v and x


class SlBammResult(NamedTuple):
    """Where the iteration ended, and how it went.

    Attributes
    ----------
    x, y, v : array
        Upper variable, lower variable and multiplier.
    n_iter : int
        Updates made.
    history : dict of str to numpy.ndarray
        ``"iteration"``, ``"upper"`` (F), ``"lower"`` (f), ``"kkt"`` (:func:`kkt_residual`), ``"mu"`` and ``"seconds"``
        since the start, all of one length: one entry for every ``record_every`` iterations, the last one included.
    """

    x: Array
    y: Array
    v: Array
    n_iter: int
    history: dict[str, np.ndarray]


class _Parts(NamedTuple):
    """Derivatives at one point: gradients and products with v, of F and of f."""

    Fx: Array
    Fy: Array
    Fxy_v: Array
    Fyy_v: Array
    fx: Array
    fy: Array
    fxy_v: Array
    fyy_v: Array


def sl_bamm(
    problem: BilevelProblem,
    x0: Array,
    y0: Array,
    *,
    v0: Array | None = None,
    beta: float = 0.1,
    mu0: float = 0.9,
    p: float = 0.1,
    tau: float = 1 / 40,
    strategy: Strategy = "s3",
    x_scale: float = 1.0,
    eta_scale: float = 1.0,
    eta: Literal["schedule", "exact"] = "schedule",
    order: Literal["jacobi", "gauss-seidel"] = "jacobi",
    project_x: Callable[[Array], Array] | None = None,
    max_iter: int = 1000,
    tol: float = 0.0,
    record_every: int = 1,
    callback: Callable[[int, Array, Array, Array], object] | None = None,
) -> SlBammResult:
    r"""Minimise F(x, y) over x and over the minimisers y of f(x, .), one step of each variable at a time.

    With :math:`\psi_k=\mu_kF+(1-\mu_k)f` and :math:`\mu_k=\mu_0(k+1)^{-p}`, every iteration does

    .. math::
        y &\leftarrow y-\beta\,\nabla_y\psi_k,\\
        v &\leftarrow v-\eta_k\,(\nabla^2_{yy}\psi_k\,v-\nabla_yF),\\
        x &\leftarrow \operatorname{Proj}_X\bigl(x-\alpha_k\,(\nabla_xF-\nabla^2_{xy}\psi_k\,v)\bigr).

    Parameters
    ----------
    problem : BilevelProblem
        Objectives and derivatives; missing derivatives come from JAX.
    x0, y0 : array, any shape
        Start; floating point, of one kind.
    v0 : array, like y0, optional
        Start of the multiplier; zero by default.
    beta : float, default 0.1
        Step of y, and the factor of all steps; below 2 over the largest curvature in y.
    mu0 : float, default 0.9
        First weight of F in the lower problem, in [0, 1). 0 switches averaging off: right if f(x, .) is
        strongly convex.
    p : float, default 0.1
        How fast that weight falls.
    tau : float, default 1/40
        How fast the other steps fall beyond the powers of :math:`\mu_k`.
    strategy : {"s1", "s2", "s3"}, default "s3"
        Powers of :math:`\mu_k` in the steps (:func:`bamm_step_sizes`).
    x_scale, eta_scale : float, default 1.0
        Factors of the steps of x and v. (Not in the paper: its steps are tiny for objectives that are averages.)
    eta : {"schedule", "exact"}, default "schedule"
        ``"exact"`` moves v by the exact line search :math:`\|r\|^2/\langle r,\nabla^2_{yy}\psi r\rangle` along its
        residual r, for one more Hessian product.
    order : {"jacobi", "gauss-seidel"}, default "jacobi"
        ``"jacobi"`` takes all three directions at the old point, so that they can be computed side by side;
        ``"gauss-seidel"`` updates y, then v, then x, each with the newest values (three evaluations).
    project_x : callable, optional
        Projection on the closed convex set X.
    max_iter : int, default 1000
        Updates at most; 0 returns the start.
    tol : float, default 0.0
        Stop when the KKT residual is at most this.
    record_every : int, default 1
        Iterations between two entries of the history (F and f are evaluated for these only).
    callback : callable, optional
        ``callback(k, x, y, v)`` before each update; a true answer stops.

    Returns
    -------
    SlBammResult
        Arrays of the kind and dtype of ``x0`` and ``y0``.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If a shape or a value is out of range, the start does not fit ``problem``, or ``problem.df`` or ``problem.dF``
        returns gradients of another shape.
    FloatingPointError
        If the iterates stop being finite; the message names the iteration and the steps.

    Notes
    -----
    If F is not strongly convex in y, :math:`\nabla^2_{yy}\psi` may be singular: v then drifts within its null space,
    which does no harm as long as the cross term does not see it. Memory: a few vectors like x and y. Source: algorithm
    of [1]_; steps as in the authors' released code.

    .. [1] R. Liu et al., Averaged Method of Multipliers for Bi-Level Optimization without Lower-Level Strong Convexity,
       ICML 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from algokit.bilevel.problems import merely_convex_toy
    >>> toy = merely_convex_toy(3)
    >>> sl_bamm(toy.problem, np.zeros(3), np.zeros((2, 3)), beta=0.5, max_iter=1000).x.round(4)
    array([1., 1., 1.])
    """
    x, y, v = _start(x0, y0, v0)
    steps = _step_rule(beta, mu0, p, tau, strategy)
    x_scale = check_float(x_scale, "x_scale", low=0, open_low=True, high=1e100)
    eta_scale = check_float(eta_scale, "eta_scale", low=0, open_low=True, high=1e100)
    exact = check_one_of(eta, "eta", ("schedule", "exact")) == "exact"
    together = check_one_of(order, "order", ("jacobi", "gauss-seidel")) == "jacobi"
    max_iter = check_int(max_iter, "max_iter", low=0, high=10**12)
    record_every = check_int(record_every, "record_every", low=1)
    tol = check_float(tol, "tol", low=0)
    _check_callable(project_x, "project_x")
    _check_callable(callback, "callback")
    problem = with_derivatives(problem)
    check_start(problem, x, y, ("x0", "y0"))
    averaged = mu0 > 0
    history: dict[str, list[float]] = {key: [] for key in ("iteration", "upper", "lower", "kkt", "mu", "seconds")}
    began = time.perf_counter()
    with np.errstate(over="ignore", invalid="ignore"):  # divergence is reported below
        for k in range(max_iter + 1):
            mu, eta_k, alpha = steps(k)
            eta_k, alpha = eta_scale * eta_k, x_scale * alpha
            at = _parts(problem, x, y, v, averaged)
            kkt = _kkt(at, x, project_x)
            if not math.isfinite(kkt):
                if k == 0:
                    raise ValueError("x0, y0 and v0 must give finite derivatives of problem, got NaN or infinity")
                raise FloatingPointError(
                    f"not finite at iteration {k}: try smaller steps "
                    f"(now beta={beta:.3g}, eta={eta_k:.3g}, alpha={alpha:.3g})"
                )
            stop = k == max_iter or kkt <= tol or (callback is not None and bool(callback(k, x, y, v)))
            if stop or k % record_every == 0:
                entry = (k, float(problem.F(x, y)), float(problem.f(x, y)), kkt, mu, time.perf_counter() - began)
                for key, value in zip(history, entry, strict=True):
                    history[key].append(value)
            if stop:
                break
            next_y = y - beta * (mu * at.Fy + (1 - mu) * at.fy)
            if not together:
                at = _parts(problem, x, next_y, v, averaged)
            d_v = mu * at.Fyy_v + (1 - mu) * at.fyy_v - at.Fy
            if exact:
                eta_k = _line_search(problem, x, y if together else next_y, d_v, mu, eta_k, eta_scale)
            next_v = v - eta_k * d_v
            if not together:
                at = _parts(problem, x, next_y, next_v, averaged)
            x = x - alpha * (at.Fx - mu * at.Fxy_v - (1 - mu) * at.fxy_v)
            x = x if project_x is None else project_x(x)
            y, v = next_y, next_v
    return SlBammResult(x, y, v, k, {key: np.array(values) for key, values in history.items()})


def kkt_residual(
    problem: BilevelProblem, x: Array, y: Array, v: Array, *, project_x: Callable[[Array], Array] | None = None
) -> float:
    r"""How far (x, y, v) is from a KKT point of: minimise F subject to :math:`\nabla_yf=0`.

    .. math:: \|\nabla_xF-\nabla^2_{xy}f\,v\|^2+\|\nabla_yF-\nabla^2_{yy}f\,v\|^2+\|\nabla_yf\|^2 .

    Parameters
    ----------
    problem : BilevelProblem
        The problem, without averaging.
    x, y, v : array
        Upper variable, lower variable, multiplier (like y).
    project_x : callable, optional
        Projection on X: the first term is then the squared length of a projected step of size one.

    Returns
    -------
    float
        The residual; zero exactly at KKT points.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If a shape does not fit or a value is not finite.

    Examples
    --------
    >>> from algokit.bilevel.problems import merely_convex_toy
    >>> toy = merely_convex_toy(3)
    >>> kkt_residual(toy.problem, toy.x, toy.y, 0 * toy.y)
    0.0
    """
    x, y = check_array(x, "x"), check_array(y, "y")
    v = _like(check_array(v, "v"), "v", y, "y")
    _check_callable(project_x, "project_x")
    problem = with_derivatives(problem)
    check_start(problem, x, y)
    return _kkt(_parts(problem, x, y, v, False), x, project_x)


def bamm_step_sizes(
    k: int, *, beta: float = 0.1, mu0: float = 0.9, p: float = 0.1, tau: float = 1 / 40, strategy: Strategy = "s3"
) -> tuple[float, float, float]:
    r"""Averaging weight :math:`\mu_k`, step :math:`\eta_k` of the multiplier, step :math:`\alpha_k` of x.

    :math:`\mu_k=\mu_0(k+1)^{-p}`, :math:`\eta_k=(k+1)^{-\tau/2}\mu_k^a\beta` and
    :math:`\alpha_k=(k+1)^{-3\tau/2}\mu_k^b\beta` with (a, b) = (2, 7) in s1, (1, 5) in s2, (0, 3) in s3. With
    ``mu0=0``: :math:`\eta_k=(k+1)^{-\tau/2}\beta` and :math:`\alpha_k=(k+1)^{-\tau}\beta`.

    Parameters
    ----------
    k : int
        Iteration, from 0.
    beta : float, default 0.1
        Step of y, the factor of the other steps.
    mu0 : float, default 0.9
        First weight of F, in [0, 1).
    p : float, default 0.1
        How fast that weight falls.
    tau : float, default 1/40
        How fast the steps fall beyond the powers of the weight.
    strategy : {"s1", "s2", "s3"}, default "s3"
        Powers of the weight in the steps.

    Returns
    -------
    tuple of float
        :math:`(\mu_k,\eta_k,\alpha_k)`.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If a value is out of range.

    Examples
    --------
    >>> bamm_step_sizes(0, beta=0.5, mu0=0.5, strategy="s2")
    (0.5, 0.25, 0.015625)
    """
    return _step_rule(beta, mu0, p, tau, strategy)(check_int(k, "k", low=0, high=10**15))


def _step_rule(beta: Any, mu0: Any, p: Any, tau: Any, strategy: Any) -> Callable[[int], tuple[float, float, float]]:
    """Checked step sizes as a function of the iteration."""
    beta = check_float(beta, "beta", low=0, open_low=True, high=1e100)
    mu0 = check_float(mu0, "mu0", low=0, high=1, open_high=True)
    p = check_float(p, "p", low=0, open_low=True, high=100)
    tau = check_float(tau, "tau", low=0, open_low=True, high=100)
    for_v, for_x = _POWERS[check_one_of(strategy, "strategy", tuple(_POWERS))]

    def steps(k: int) -> tuple[float, float, float]:
        if mu0 == 0:
            return 0.0, (k + 1) ** (-tau / 2) * beta, (k + 1) ** -tau * beta
        mu = mu0 * (k + 1) ** -p
        return mu, (k + 1) ** (-tau / 2) * mu**for_v * beta, (k + 1) ** (-1.5 * tau) * mu**for_x * beta

    return steps


def _parts(problem: BilevelProblem, x: Array, y: Array, v: Array, averaged: bool) -> _Parts:
    """All derivatives at one point; the second ones of F only where they have a weight."""
    assert problem.both_f and problem.both_F and problem.dF
    fx, fy, fxy_v, fyy_v = problem.both_f(x, y, v)
    if averaged:
        Fx, Fy, Fxy_v, Fyy_v = problem.both_F(x, y, v)
    else:
        (Fx, Fy), Fxy_v, Fyy_v = problem.dF(x, y), 0 * x, 0 * y
    return _Parts(Fx, Fy, Fxy_v, Fyy_v, fx, fy, fxy_v, fyy_v)


def _kkt(at: _Parts, x: Array, project_x: Callable[[Array], Array] | None) -> float:
    along_x = at.Fx - at.fxy_v
    if project_x is not None:
        along_x = x - project_x(x - along_x)
    return _square(along_x) + _square(at.Fy - at.fyy_v) + _square(at.fy)


def _line_search(
    problem: BilevelProblem, x: Array, y: Array, r: Array, mu: float, fallback: float, scale: float
) -> float:
    """Exact step along the residual r of the multiplier's linear system; the schedule's where there is no curvature."""
    assert problem.hvp_f and problem.hvp_F
    image = (1 - mu) * problem.hvp_f(x, y, r)[1]
    if mu > 0:
        image = image + mu * problem.hvp_F(x, y, r)[1]
    curvature = float(array_namespace(r).sum(r * image))
    return scale * _square(r) / curvature if curvature > 0 else fallback


def _square(a: Array) -> float:
    return float(array_namespace(a).sum(a * a))


def _start(x0: Any, y0: Any, v0: Any) -> tuple[Array, Array, Array]:
    x, y = check_array(x0, "x0"), check_array(y0, "y0")
    xp = array_namespace(x, y)
    v = xp.zeros_like(y) if v0 is None else _like(check_array(v0, "v0"), "v0", y, "y0")
    return x, y, v


def _like(v: Array, name: str, y: Array, other: str) -> Array:
    if tuple(v.shape) != tuple(y.shape):
        raise ValueError(f"{name} must have the shape of {other}, got {tuple(v.shape)} and {tuple(y.shape)}")
    return v


def _check_callable(value: Any, name: str) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable or None, got {type(value).__name__}")
