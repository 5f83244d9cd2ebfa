"""Bilevel optimisation by first derivatives only, for nonconvex and non-smooth lower problems: MEHA, single loop.

Reference: R. Liu, Z. Liu, W. Yao, S. Zeng, J. Zhang, *Moreau Envelope for Nonconvex Bi-Level Optimization: A
Single-loop and Hessian-free Solution Strategy*, ICML 2024, arXiv 2405.09927.
Chapter: notebooks/bilevel/moreau_envelope.ipynb.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numba import njit
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.linear_model import ElasticNet
from sklearn.utils.validation import check_is_fitted, validate_data

from algokit.arrays import Array, array_namespace, from_numpy, is_array, to_numpy
from algokit.bilevel.problems import jax_gradient
from algokit.checks import (
    AlgokitWarning,
    RNGLike,
    check_array,
    check_bool,
    check_float,
    check_int,
    check_one_of,
    check_rng,
    check_same_length,
)

__all__ = [
    "CompositeBilevelProblem",
    "Envelope",
    "MehaElasticNetCV",
    "MehaResult",
    "meha",
    "moreau_envelope",
    "prox_elastic_net",
    "prox_l1",
]

Tree = Any  # an array, or a dict of trees


@dataclass(frozen=True)
class CompositeBilevelProblem:
    r"""Upper objective F; lower objective :math:`\varphi=f+g`, f smooth, g with a cheap proximal operator.

    For many runs at once (``batched=True`` of :func:`meha`) x and y have a leading axis, one entry per start: then F, f
    and g give one number per start, shape (r,), and the other callables work on each start for itself.

    Attributes
    ----------
    F, f : callable
        ``(x, y) -> float``.
    dF, df : callable, optional
        ``(x, y) -> (gradient in x, gradient in y)``; by JAX where missing.
    g : callable, optional
        ``(x, y) -> float``, the non-smooth part.
    dg_dx : callable, optional
        ``(x, y) -> gradient of g in x``; zero where missing.
    prox_g : callable, optional
        ``(x, y, step) -> argmin over u of step g(x, u) + |u - y|^2 / 2``.
    project_x : callable, optional
        Projection on the closed convex set of the allowed x.
    """

    F: Callable[[Tree, Tree], Any]
    f: Callable[[Tree, Tree], Any]
    dF: Callable[[Tree, Tree], tuple[Tree, Tree]] | None = None
    df: Callable[[Tree, Tree], tuple[Tree, Tree]] | None = None
    g: Callable[[Tree, Tree], Any] | None = None
    dg_dx: Callable[[Tree, Tree], Tree] | None = None
    prox_g: Callable[[Tree, Tree, float], Tree] | None = None
    project_x: Callable[[Tree], Tree] | None = None


class MehaResult(NamedTuple):
    """Where the iteration ended, and how it went.

    Attributes
    ----------
    x, y : array or nested dict of arrays
        Upper and lower variable.
    theta : like y
        The tracked proximal point.
    n_iter : int, or numpy.ndarray of int, shape (r,), of a batched run
        Updates made.
    history : dict of str to numpy.ndarray
        ``"iteration"``, ``"upper"`` (F), ``"lower"`` (f + g), ``"gap"`` (the gap to the envelope, estimated with the
        tracked point), ``"step"`` (relative change of x and y by the update before) and ``"seconds"``: of shape (k,),
        or in a batched run (k, r) for all but the first and the last. A start that has stopped keeps its last values.
    """

    x: Tree
    y: Tree
    theta: Tree
    n_iter: Any
    history: dict[str, np.ndarray]


class Envelope(NamedTuple):
    """Moreau envelope at one point.

    Attributes
    ----------
    value : float
        Its value.
    theta : like y
        The proximal point.
    grad_x : like x
        Gradient in x.
    grad_y : like y
        Gradient in y.
    """

    value: float
    theta: Tree
    grad_x: Tree
    grad_y: Tree


def meha(
    problem: CompositeBilevelProblem,
    x0: Tree,
    y0: Tree,
    *,
    theta0: Tree | None = None,
    alpha: float = 0.01,
    beta: float = 0.01,
    eta: float = 0.1,
    gamma: float = 1.0,
    c0: float = 1.0,
    p: float = 0.25,
    order: Literal["xy", "yx"] = "xy",
    max_iter: int = 1000,
    tol: float = 0.0,
    record_every: int = 1,
    callback: Callable[[int, Tree, Tree, Tree], object] | None = None,
    batched: bool = False,
) -> MehaResult:
    r"""Minimise F(x, y) over x and over lower solutions y, by three first-order updates per iteration.

    With :math:`c_k=c_0(k+1)^p`, every iteration does

    .. math::
        \theta &\leftarrow\operatorname{prox}_{\eta g(x,\cdot)}
            \bigl(\theta-\eta[\nabla_yf(x,\theta)+(\theta-y)/\gamma]\bigr),\\
        x &\leftarrow\operatorname{Proj}_X
            \bigl(x-\alpha[\tfrac1{c_k}\nabla_xF+\nabla_x\varphi(x,y)-\nabla_x\varphi(x,\theta)]\bigr),\\
        y &\leftarrow\operatorname{prox}_{\beta g(x,\cdot)}
            \bigl(y-\beta[\tfrac1{c_k}\nabla_yF+\nabla_yf(x,y)-(y-\theta)/\gamma]\bigr).

    Parameters
    ----------
    problem : CompositeBilevelProblem
        Objectives, derivatives, proximal operator, projection.
    x0, y0 : array or nested dict of arrays
        Start, of any shape; NumPy, CuPy, torch, ... as the callables of ``problem`` take them.
    theta0 : like y0, optional
        Start of the tracked proximal point; ``y0`` by default.
    alpha, beta, eta : float, default 0.01, 0.01, 0.1
        Steps of x, y and the tracked point. With L the Lipschitz constant of :math:`\nabla_yf`, eta and beta should not
        exceed :math:`1/(L+1/\gamma)`.
    gamma : float, default 1.0
        Parameter of the envelope: below one over twice the weak-convexity constant of f + g; any, if that is convex.
    c0, p : float, default 1.0 and 0.25
        Penalty :math:`c_k`; p in [0, 1/2).
    order : {"xy", "yx"}, default "xy"
        Whether x or y moves first; the second uses the new value of the first.
    max_iter : int, default 1000
        Updates at most.
    tol : float, default 0.0
        Stop when the change of (x, y) over :math:`\sqrt{1+\|(x,y)\|^2}` is at most this. Projections count: an x
        held at the boundary does not move.
    record_every : int, default 1
        Iterations between two entries of the history.
    callback : callable, optional
        ``callback(k, x, y, theta)`` before each update; a true answer stops.
    batched : bool, default False
        Whether the first axis of every array counts r independent starts, run side by side with the same steps (see
        :class:`CompositeBilevelProblem`). Each stops by ``tol`` for itself; the run ends with the last.

    Returns
    -------
    MehaResult
        Arrays of the kind and dtype of the start.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If a value is out of range, or shapes do not fit.
    FloatingPointError
        If the iterates stop being finite; the message says what to lower.

    Warns
    -----
    AlgokitWarning
        If two probed points show that the proximal problem is not convex for this ``gamma``.

    Notes
    -----
    Four gradients of f and two of F per iteration, and one extra copy of y. Source: algorithm of [1]_. (The
    threshold of a soft-thresholding prox is the step times the weight, once; the released R package multiplies by the
    step twice.) A batched run does what separate runs do, to rounding, in a number of operations that does not grow
    with r: that pays most on a GPU.

    .. [1] R. Liu et al., Moreau Envelope for Nonconvex Bi-Level Optimization, ICML 2024.

    Examples
    --------
    >>> import numpy as np
    >>> problem = CompositeBilevelProblem(
    ...     F=lambda x, y: 0.5 * ((x - 1) ** 2 + (y + 1) ** 2).sum(), dF=lambda x, y: (x - 1, y + 1),
    ...     f=lambda x, y: 0.5 * ((y - x) ** 2).sum(), df=lambda x, y: (x - y, y - x))
    >>> result = meha(problem, np.ones(1), np.zeros(1), alpha=0.1, beta=0.3, eta=0.5, c0=10, p=0, max_iter=3000)
    >>> bool(abs(result.x[0] - 1 / (1 + 2 * 0.5 * 10)) < 1e-9)  # the bias of a fixed penalty c = 10
    True

    Three starts at once: the same derivatives, and objectives that add up each start for itself.

    >>> many = replace(problem, F=lambda x, y: 0.5 * ((x - 1) ** 2 + (y + 1) ** 2).sum(axis=1),
    ...                f=lambda x, y: 0.5 * ((y - x) ** 2).sum(axis=1))
    >>> x0 = np.array([[-1.0], [0.0], [1.0]])
    >>> meha(many, x0, 0 * x0, alpha=0.1, beta=0.3, eta=0.5, c0=10, p=0, tol=1e-6, batched=True).x.round(3).tolist()
    [[0.091], [0.091], [0.091]]
    """
    steps = {name: check_float(s, name, low=0, open_low=True, high=1e100) for name, s in
             (("alpha", alpha), ("beta", beta), ("eta", eta), ("gamma", gamma), ("c0", c0))}  # fmt: skip
    p = check_float(p, "p", low=0, high=0.5, open_high=True)
    x_first = check_one_of(order, "order", ("xy", "yx")) == "xy"
    max_iter = check_int(max_iter, "max_iter", low=0, high=10**12)
    record_every = check_int(record_every, "record_every", low=1)
    tol = check_float(tol, "tol", low=0)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable or None, got {type(callback).__name__}")
    batched = check_bool(batched, "batched")
    x, y = _check_tree(x0, "x0"), _check_tree(y0, "y0")
    theta = y if theta0 is None else _check_tree(theta0, "theta0")
    if _shapes(theta) != _shapes(y):
        raise ValueError(f"theta0 must have the shape of y0, got {_shapes(theta)} and {_shapes(y)}")
    starts = _batch_shape({"x0": x, "y0": y}) if batched else ()
    problem = _completed(problem, starts)
    _check_start(problem, x, y, ("x0", "y0"), starts)
    _probe(problem, x, y, gamma, batched)
    dF, df, dg, prox = problem.dF, problem.df, problem.dg_dx, problem.prox_g
    assert dF and df and problem.g

    def move_x(x: Tree, y: Tree, theta: Tree, share: float) -> Tree:
        parts = [dF(x, y)[0], df(x, y)[0], df(x, theta)[0]]
        d = _map(lambda up, at_y, at_theta: share * up + at_y - at_theta, *parts)
        if dg is not None:
            d = _map(lambda d, at_y, at_theta: d + at_y - at_theta, d, dg(x, y), dg(x, theta))
        moved = _map(lambda x, d: x - alpha * d, x, d)
        return moved if problem.project_x is None else problem.project_x(moved)

    def move_y(x: Tree, y: Tree, theta: Tree, share: float) -> Tree:
        up, low = dF(x, y)[1], df(x, y)[1]
        moved = _map(lambda y, u, l, t: y - beta * (share * u + l - (y - t) / gamma), y, up, low, theta)
        return moved if prox is None else prox(x, moved, beta)

    history: dict[str, list[Any]] = {k: [] for k in ("iteration", "upper", "lower", "gap", "step", "seconds")}
    began, step = time.perf_counter(), np.full(starts, math.inf)
    running, n_iter = np.ones(starts, dtype=bool), np.zeros(starts, dtype=np.int64)
    with np.errstate(over="ignore", invalid="ignore"):  # divergence is reported below
        for k in range(max_iter + 1):
            running = running & (step > tol)
            stop = k == max_iter or not running.any() or (callback is not None and bool(callback(k, x, y, theta)))
            if stop or k % record_every == 0:
                lower = _value(problem.f(x, y), batched) + _value(problem.g(x, y), batched)
                near = _value(problem.f(x, theta), batched) + _value(problem.g(x, theta), batched)
                gap = lower - near - _square(_map(_minus, theta, y), batched) / (2 * gamma)
                entry = (k, _value(problem.F(x, y), batched), lower, gap, step, time.perf_counter() - began)
                for key, value in zip(history, entry, strict=True):
                    history[key].append(value)
            if stop:
                break
            share = 1 / (c0 * (k + 1) ** p)
            slope = df(x, theta)[1]
            new_theta = _map(lambda t, s, y: t - eta * (s + (t - y) / gamma), theta, slope, y)
            new_theta = new_theta if prox is None else prox(x, new_theta, eta)
            if x_first:
                new_x = move_x(x, y, new_theta, share)
                new_y = move_y(new_x, y, new_theta, share)
            else:
                new_y = move_y(x, y, new_theta, share)
                new_x = move_x(x, new_y, new_theta, share)
            change = _square(_map(_minus, new_x, x), batched) + _square(_map(_minus, new_y, y), batched)
            new_step = np.sqrt(change / (1 + _square(x, batched) + _square(y, batched)))
            broken = running & ~(np.isfinite(new_step) & np.isfinite(_square(new_theta, batched)))
            if broken.any():
                given = ", ".join(f"{name}={value:.3g}" for name, value in steps.items())
                where = f" of start {np.flatnonzero(broken)[0]}" if batched else ""
                if k == 0:
                    raise ValueError(
                        f"x0, y0, theta0 and the steps ({given}) must give finite derivatives of problem{where}"
                    )
                raise FloatingPointError(f"not finite at iteration {k}{where}: try smaller steps (now {given})")
            if running.all():
                x, y, theta, step = new_x, new_y, new_theta, new_step
            else:  # those that have stopped stay where they are
                keep = functools.partial(_where, running)
                x, y, theta = _map(keep, new_x, x), _map(keep, new_y, y), _map(keep, new_theta, theta)
                step = np.where(running, new_step, step)
            n_iter = n_iter + running
    made = {key: np.array(values) for key, values in history.items()}
    return MehaResult(x, y, theta, n_iter if batched else k, made)


def moreau_envelope(
    problem: CompositeBilevelProblem,
    x: Tree,
    y: Tree,
    *,
    gamma: float = 1.0,
    eta: float | None = None,
    tol: float = 1e-10,
    max_iter: int = 100_000,
) -> Envelope:
    r"""Moreau envelope :math:`\min_\theta f(x,\theta)+g(x,\theta)+\frac1{2\gamma}\|\theta-y\|^2`, to high accuracy.

    Parameters
    ----------
    problem : CompositeBilevelProblem
        The problem (F is not used).
    x, y : array or nested dict of arrays
        Where.
    gamma : float, default 1.0
        Small enough for the minimum to be unique.
    eta : float, optional
        Step of the proximal gradient iteration; by default found by backtracking.
    tol : float, default 1e-10
        Stop when a step over ``eta`` is shorter than this times :math:`1+\|\theta\|`.
    max_iter : int, default 100_000
        Iterations at most.

    Returns
    -------
    Envelope
        Value, minimiser, and gradients :math:`\nabla_x(f+g)(x,\theta)` and :math:`(y-\theta)/\gamma`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Warns
    -----
    AlgokitWarning
        If ``max_iter`` was reached.

    Examples
    --------
    >>> import numpy as np
    >>> lasso = CompositeBilevelProblem(
    ...     F=lambda x, y: 0.0, dF=lambda x, y: (0 * x, 0 * y), f=lambda x, y: 0.0, df=lambda x, y: (0 * x, 0 * y),
    ...     g=lambda x, y: float(x[0] * abs(y).sum()), dg_dx=lambda x, y: np.array([abs(y).sum()]),
    ...     prox_g=lambda x, y, step: prox_l1(y, step * x[0]))
    >>> moreau_envelope(lasso, np.array([0.5]), np.array([2.0, 0.1])).theta
    array([1.5, 0. ])
    """
    gamma = check_float(gamma, "gamma", low=0, open_low=True, high=1e100)
    eta = None if eta is None else check_float(eta, "eta", low=0, open_low=True, high=1e100)
    tol = check_float(tol, "tol", low=0, open_low=True)
    max_iter = check_int(max_iter, "max_iter", low=1, high=10**12)
    x, y = _check_tree(x, "x"), _check_tree(y, "y")
    problem = _completed(problem)
    _check_start(problem, x, y, ("x", "y"))
    df, prox = problem.df, problem.prox_g
    assert df and problem.g

    def smooth(theta: Tree) -> float:
        return float(problem.f(x, theta)) + _square(_map(_minus, theta, y)) / (2 * gamma)

    theta, step = y, gamma if eta is None else eta
    for _ in range(max_iter):
        slope = _map(lambda s, t, y: s + (t - y) / gamma, df(x, theta)[1], theta, y)
        here = smooth(theta)
        if not math.isfinite(here):
            raise ValueError("x and y must give finite values of problem: the proximal iteration diverges")
        while True:
            moved = _map(lambda t, s: t - step * s, theta, slope)  # noqa: B023
            moved = moved if prox is None else prox(x, moved, step)
            d = _map(_minus, moved, theta)
            length = _square(d)
            bound = here + _inner(slope, d) + length / (2 * step)
            if eta is not None or smooth(moved) <= bound + 1e-13 * (1 + abs(here)) or step < 1e-30:
                break
            step /= 2
        theta = moved
        if math.sqrt(length) <= tol * step * (1 + math.sqrt(_square(theta))):
            break
    else:
        warnings.warn(f"no convergence of the proximal point in {max_iter} iterations", AlgokitWarning, stacklevel=2)
    grad_x = df(x, theta)[0]
    if problem.dg_dx is not None:
        grad_x = _map(lambda a, b: a + b, grad_x, problem.dg_dx(x, theta))
    value = smooth(theta) + float(problem.g(x, theta))
    return Envelope(value, theta, grad_x, _map(lambda y, t: (y - t) / gamma, y, theta))


def prox_l1(y: Array, t: Any) -> Array:
    r"""Soft thresholding: the minimiser of :math:`t\|u\|_1+\frac12\|u-y\|^2`.

    Parameters
    ----------
    y : array
        Where.
    t : float or array
        Non-negative threshold; an array must broadcast to the shape of ``y``.

    Returns
    -------
    array, like y
        :math:`\operatorname{sign}(y)\max(|y|-t,0)`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> prox_l1([2.0, -0.5, -3.0], 1.0)
    array([ 1.,  0., -2.])
    """
    y = check_array(y, "y")
    return _soft(y, _threshold(t, "t", y))


def prox_elastic_net(y: Array, t1: Any, t2: Any) -> Array:
    r"""Minimiser of :math:`t_1\|u\|_1+\frac{t_2}2\|u\|^2+\frac12\|u-y\|^2`: soft thresholding, then shrinking.

    Parameters
    ----------
    y : array
        Where.
    t1, t2 : float or array
        Non-negative; arrays must broadcast to the shape of ``y``.

    Returns
    -------
    array, like y
        :math:`\operatorname{prox}_{t_1\|\cdot\|_1}(y)/(1+t_2)`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> prox_elastic_net([2.0, -0.5, -3.0], 1.0, 1.0)
    array([ 0.5,  0. , -1. ])
    """
    y = check_array(y, "y")
    return _soft(y, _threshold(t1, "t1", y)) / (1 + _threshold(t2, "t2", y))


class MehaElasticNetCV(RegressorMixin, BaseEstimator):
    r"""Elastic net whose two penalties are learned on a validation set, in one run of MEHA.

    Minimises the validation error over :math:`x\in[10^{-4},10]^2` and over solutions y of
    :math:`\frac1{2n}\|Ay-b\|^2+x_1\|y\|_1+\frac{x_2}2\|y\|^2`, then solves the lower problem exactly at the x found.
    Nothing is scaled: columns should have about unit variance, and targets should not be far from it.

    Parameters
    ----------
    alpha : float, default 0.2
        Step of x. Too large a step can send :math:`x_1` so high that y = 0, where nothing moves any more.
    gamma : float, default 1.0
        Parameter of the envelope.
    c0, p : float, default 10.0 and 0.3
        Penalty :math:`c_0(k+1)^p`.
    start : float, default 0.5
        First value of both penalties.
    max_iter : int, default 6000
        Iterations.
    validation_fraction : float, default 0.5
        Share of the rows held out where ``fit`` is given no validation set.
    rng : None, int or numpy.random.Generator, default 0
        Chooses those rows.

    Attributes
    ----------
    alpha_, l1_ratio_ : float
        The penalties in scikit-learn's form: :math:`x_1+x_2` and :math:`x_1/(x_1+x_2)`.
    coef_ : numpy.ndarray, shape (d,)
        Coefficients of the exact solution.
    intercept_ : float
        Intercept.
    n_iter_ : int
        Iterations made.
    path_ : numpy.ndarray, shape (k, 2)
        Penalties along the run, about a hundred of them.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(200, 5))
    >>> model = MehaElasticNetCV().fit(X[:100], X[:100, 0], X_val=X[100:], y_val=X[100:, 0])
    >>> bool(model.coef_[0] > 0.9)
    True
    """

    def __init__(
        self,
        *,
        alpha: float = 0.2,
        gamma: float = 1.0,
        c0: float = 10.0,
        p: float = 0.3,
        start: float = 0.5,
        max_iter: int = 6000,
        validation_fraction: float = 0.5,
        rng: RNGLike = 0,
    ) -> None:
        self.alpha = alpha
        self.gamma = gamma
        self.c0 = c0
        self.p = p
        self.start = start
        self.max_iter = max_iter
        self.validation_fraction = validation_fraction
        self.rng = rng

    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> MehaElasticNetCV:
        """Learn the penalties, then the coefficients.

        Parameters
        ----------
        X : array-like, shape (n, d)
            Training rows.
        y : array-like, shape (n,)
            Training targets.
        X_val : array-like, shape (m, d), optional
            Validation rows; by default a share of the training rows is held out.
        y_val : array-like, shape (m,), optional
            Validation targets; goes with ``X_val``.

        Returns
        -------
        MehaElasticNetCV
            Self.

        Raises
        ------
        TypeError, ValueError
            If an argument or a parameter does not fit.
        """
        given = {name: check_float(getattr(self, name), name, low=0, open_low=True, high=1e100) for name in
                 ("alpha", "gamma", "c0")}  # fmt: skip
        p = check_float(self.p, "p", low=0, high=0.5, open_high=True)
        start = check_float(self.start, "start", low=1e-4, high=10)
        max_iter = check_int(self.max_iter, "max_iter", low=1, high=10**9)
        held_out = check_float(
            self.validation_fraction, "validation_fraction", low=0, high=1, open_low=True, open_high=True
        )
        rng = check_rng(self.rng)
        X, y = _validated(self, X, y, y_numeric=True, ensure_min_samples=2)
        if (X_val is None) != (y_val is None):
            raise ValueError("X_val and y_val must be given together")
        if X_val is None:
            chosen = rng.permutation(len(X))
            m = min(len(X) - 1, max(1, round(held_out * len(X))))
            X, y, X_val, y_val = X[chosen[m:]], y[chosen[m:]], X[chosen[:m]], y[chosen[:m]]
        else:
            X_val = np.asarray(
                check_array(X_val, "X_val", shape=(None, X.shape[1]), high=1e100, low=-1e100), np.float64
            )
            y_val = np.asarray(check_array(y_val, "y_val", ndim=1, high=1e100, low=-1e100), np.float64)
            check_same_length(X_val=X_val, y_val=y_val)
        with np.errstate(over="ignore", invalid="ignore"):
            mean, offset = X.mean(axis=0), y.mean()
            A, b, A_val, b_val = X - mean, y - offset, X_val - mean, y_val - offset
        every = max(1, max_iter // 100)
        with np.errstate(over="ignore", invalid="ignore"):
            grams = (A.T @ A / len(A), A.T @ b / len(A), A_val.T @ A_val / len(A_val), A_val.T @ b_val / len(A_val))
            sizes = ((b * b).sum(), (b_val * b_val).sum())
        if not all(np.isfinite(gram).all() for gram in (*grams, *sizes)):
            raise ValueError("X, y, X_val and y_val must have products within the range of floating point numbers")
        penalty = (given["alpha"], given["gamma"], given["c0"], p)
        x, path = _elastic_net_loop(*grams, np.array([start, start]), *penalty, max_iter, every)
        if not np.isfinite(x).all():
            raise FloatingPointError(f"not finite: try a smaller alpha (now {given['alpha']:.3g})")
        self.path_, self.n_iter_ = path, max_iter
        self.alpha_, self.l1_ratio_ = float(x.sum()), float(x[0] / x.sum())
        exact = ElasticNet(alpha=self.alpha_, l1_ratio=self.l1_ratio_, fit_intercept=False, tol=1e-6, max_iter=100_000)
        self.coef_ = exact.fit(A, b).coef_
        self.intercept_ = float(offset - (mean * self.coef_).sum())
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predicted targets.

        Parameters
        ----------
        X : array-like, shape (n, d)
            Rows.

        Returns
        -------
        numpy.ndarray, shape (n,)
            Predictions.

        Raises
        ------
        NotFittedError
            If ``fit`` was not called.
        ValueError
            If ``X`` does not fit.
        """
        check_is_fitted(self)
        return (_validated(self, X, reset=False) * self.coef_).sum(axis=1) + self.intercept_


def _validated(estimator: BaseEstimator, *data: Any, **rules: Any) -> Any:
    """scikit-learn's validation, with messages that name the argument."""
    try:
        return validate_data(estimator, *data, dtype=np.float64, **rules)
    except (TypeError, ValueError) as error:
        if "float" in str(error) and "X" not in str(error):
            raise type(error)(f"X and y must be arrays of numbers: {error}") from error
        raise


@njit(cache=True, error_model="numpy")
def _elastic_net_loop(
    G: np.ndarray,
    h: np.ndarray,
    G_val: np.ndarray,
    h_val: np.ndarray,
    x: np.ndarray,
    alpha: float,
    gamma: float,
    c0: float,
    p: float,
    max_iter: int,
    every: int,
) -> tuple[np.ndarray, np.ndarray]:
    """MEHA for the elastic net on Gram matrices: three symmetric products per iteration, no allocation in the loop."""
    d = len(h)
    eta = 1 / (_largest_eigenvalue(G) + 1 / gamma)
    beta = eta / 2
    y, theta, Gy, Gt, Vy = np.zeros(d), np.zeros(d), np.zeros(d), np.zeros(d), np.zeros(d)
    x = x.copy()
    path = np.empty(((max_iter - 1) // every + 2, 2))
    for k in range(max_iter):
        if k % every == 0:
            path[k // every] = x
        share = 1 / (c0 * (k + 1) ** p)
        _symmetric_product(G, theta, Gt)
        for j in range(d):
            t = theta[j] - eta * (Gt[j] - h[j] + (theta[j] - y[j]) / gamma)
            theta[j] = _soft_scalar(t, eta * x[0]) / (1 + eta * x[1])
        l1, l2 = 0.0, 0.0
        for j in range(d):
            l1 += abs(y[j]) - abs(theta[j])
            l2 += 0.5 * (y[j] * y[j] - theta[j] * theta[j])
        x[0] = min(max(x[0] - alpha * l1, 1e-4), 10.0)
        x[1] = min(max(x[1] - alpha * l2, 1e-4), 10.0)
        _symmetric_product(G, y, Gy)
        _symmetric_product(G_val, y, Vy)
        for j in range(d):
            t = y[j] - beta * (share * (Vy[j] - h_val[j]) + Gy[j] - h[j] - (y[j] - theta[j]) / gamma)
            y[j] = _soft_scalar(t, beta * x[0]) / (1 + beta * x[1])
    path[-1] = x
    return x, path


_REASSOCIATE = {"reassoc", "contract"}  # a sum of products: any order is as accurate as any other


@njit(cache=True, error_model="numpy", fastmath=_REASSOCIATE)
def _symmetric_product(G: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
    """``out = G y``, column by column, skipping the zeros of a sparse y."""
    out[:] = 0.0
    for j in range(len(y)):
        if y[j] != 0.0:
            row, factor = G[j], y[j]
            for i in range(len(out)):
                out[i] += factor * row[i]


@njit(cache=True, error_model="numpy")
def _largest_eigenvalue(G: np.ndarray) -> float:
    """Upper estimate of the largest eigenvalue: power iteration, 2 % on top; at most the trace."""
    u, w, size = np.ones(len(G)), np.zeros(len(G)), 0.0
    for i in range(len(u)):
        u[i] += 0.1 * (i % 7)
    for _ in range(100):
        _symmetric_product(G, u, w)
        size = 0.0
        for i in range(len(w)):
            size = max(size, abs(w[i]))
        if size == 0.0:
            return 0.0
        u[:] = w / size
    return 1.02 * size


@njit(cache=True)
def _soft_scalar(t: float, threshold: float) -> float:
    if t > threshold:
        return t - threshold
    if t < -threshold:
        return t + threshold
    return 0.0


def _soft(y: Array, t: Array) -> Array:
    xp = array_namespace(y)
    zero = xp.zeros_like(y)
    return xp.maximum(y - t, zero) + xp.minimum(y + t, zero)  # never minus zero


def _threshold(t: Any, name: str, y: Array) -> Array:
    t = check_array(t, name, low=0)
    if isinstance(t, np.ndarray):
        t = from_numpy(t, like=y)
    xp = array_namespace(y)
    try:
        return xp.broadcast_to(xp.astype(t, y.dtype), y.shape)
    except (ValueError, TypeError, RuntimeError):
        raise ValueError(f"{name} and y must have shapes that fit, got {tuple(t.shape)} and {tuple(y.shape)}") from None


def _map(function: Callable[..., Any], *trees: Tree) -> Tree:
    """``function`` of corresponding leaves of arrays or nested dicts of arrays."""
    if isinstance(trees[0], dict):
        return {key: _map(function, *(tree[key] for tree in trees)) for key in trees[0]}
    return function(*trees)


def _minus(a: Array, b: Array) -> Array:
    return a - b


def _leaves(tree: Tree) -> list[Array]:
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]


def _where(mask: np.ndarray, a: Array, b: Array) -> Array:
    """Starts of a where the mask, of shape (r,), is true, and of b elsewhere."""
    return array_namespace(a).where(from_numpy(mask.reshape(-1, *(1,) * (a.ndim - 1)), like=a), a, b)


def _value(v: Any, batched: bool) -> Any:
    """One number, or one number per start as a NumPy array."""
    return to_numpy(v) if batched else float(v)


def _sum(a: Array, batched: bool) -> Any:
    xp = array_namespace(a)
    return to_numpy(xp.sum(xp.reshape(a, (a.shape[0], -1)), axis=1)) if batched else float(xp.sum(a))


def _square(tree: Tree, batched: bool = False) -> Any:
    return sum(_sum(a * a, batched) for a in _leaves(tree))


def _inner(one: Tree, other: Tree, batched: bool = False) -> Any:
    return sum(_sum(a * b, batched) for a, b in zip(_leaves(one), _leaves(other), strict=True))


def _shapes(tree: Tree) -> Any:
    return {k: _shapes(v) for k, v in tree.items()} if isinstance(tree, dict) else tuple(tree.shape)


def _check_tree(tree: Any, name: str) -> Tree:
    if isinstance(tree, dict):
        if not tree:
            raise ValueError(f"{name} must not be an empty dict")
        return {key: _check_tree(value, f"{name}[{key!r}]") for key, value in tree.items()}
    return check_array(tree, name)


def _batch_shape(trees: dict[str, Tree]) -> tuple[int]:
    """Number of starts: the length of the first axis of every array."""
    lengths = {a.shape[0] if a.ndim else 0 for tree in trees.values() for a in _leaves(tree)}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(f"{' and '.join(trees)} must have one first axis, of the starts, if batched=True")
    return (lengths.pop(),)


def _completed(problem: Any, starts: tuple[int, ...] = ()) -> CompositeBilevelProblem:
    """``problem``, checked, with derivatives by JAX where missing and g = 0 where there is none."""
    if not isinstance(problem, CompositeBilevelProblem):
        raise TypeError(f"problem must be a CompositeBilevelProblem, got {type(problem).__name__}")
    for field in fields(problem):
        value = getattr(problem, field.name)
        if not callable(value) and (value is not None or field.name in ("F", "f")):
            raise TypeError(f"problem must hold callables, got {type(value).__name__} for {field.name}")
    if problem.g is None and (problem.prox_g is not None or problem.dg_dx is not None):
        raise ValueError("problem must have g where it has prox_g or dg_dx")
    if problem.g is not None and problem.prox_g is None:
        raise ValueError("problem must have prox_g where it has g")
    F, f = problem.F, problem.f
    return replace(
        problem,  # starts know nothing of each other: the gradient of a sum over them is the gradient of each
        dF=problem.dF or jax_gradient((lambda x, y: F(x, y).sum()) if starts else F),
        df=problem.df or jax_gradient((lambda x, y: f(x, y).sum()) if starts else f),
        g=problem.g or (lambda x, y: np.zeros(starts)),
    )


def _check_start(
    problem: CompositeBilevelProblem, x: Tree, y: Tree, names: tuple[str, str], starts: tuple[int, ...] = ()
) -> None:
    """Refuse a point that does not fit: broadcasting would hide a wrong shape for ever."""
    for name in ("dF", "df"):
        complaint = f"{names[0]} and {names[1]} must fit problem, got shapes {_shapes(x)} and {_shapes(y)}"
        try:
            shapes = [_shapes(part) for part in getattr(problem, name)(x, y)]
        except Exception as error:
            raise ValueError(f"{complaint}: {name} fails: {error}") from error
        if shapes != [_shapes(x), _shapes(y)]:
            raise ValueError(f"{complaint}: {name} gives gradients of shapes {shapes[0]} and {shapes[1]}")
    for name in ("F", "f", "g") if starts else ():
        value = getattr(problem, name)(x, y)
        shape = tuple(value.shape) if is_array(value) else ()
        if shape != starts:
            raise ValueError(f"{complaint}: in a batched run {name} must give shape {starts}, got {shape}")


def _probe(problem: CompositeBilevelProblem, x: Tree, y: Tree, gamma: float, batched: bool) -> None:
    """Warn if the gradient of f between y and a point nearby falls faster than 1/gamma."""
    assert problem.df
    rng, size = (
        np.random.default_rng(0),
        0.1 * (1 + math.sqrt(_square(y) / sum(math.prod(a.shape) for a in _leaves(y)))),
    )
    away = _map(
        lambda a: a + from_numpy(np.asarray(size * rng.normal(size=tuple(a.shape)), dtype=np.float64), like=a), y
    )
    away = _map(lambda a, b: array_namespace(b).astype(a, b.dtype), away, y)
    d = _map(_minus, away, y)
    slopes = _inner(_map(_minus, problem.df(x, away)[1], problem.df(x, y)[1]), d, batched)
    curvature = np.min(slopes / _square(d, batched))
    if curvature < -1 / gamma:
        warnings.warn(
            f"f has curvature {curvature:.3g} between two points near y0, below -1/gamma = {-1 / gamma:.3g}: "
            "the proximal problem may not be convex; lower gamma",
            AlgokitWarning,
            stacklevel=3,
        )
