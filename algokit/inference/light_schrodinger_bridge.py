"""Light Schrödinger bridge: the adjusted potential is a Gaussian mixture, fitted by L-BFGS or Adam on one closed form.

Diagonal or full covariances; conditional plan, drift and paths in closed form; the bridge between two Gaussians.

Reference: A. Korotin, N. Gushchin, E. Burnaev, *Light Schrödinger Bridge*, ICLR 2024 (arXiv 2310.01174).
Chapter: notebooks/inference/light_schrodinger_bridge.ipynb.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numba import njit, prange
from scipy.optimize import OptimizeResult, minimize
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from threadpoolctl import threadpool_limits

from algokit.arrays import Array, array_namespace, from_numpy, kind_of, to_numpy
from algokit.checks import (
    AlgokitWarning,
    RNGLike,
    check_allocation,
    check_array,
    check_float,
    check_int,
    check_one_of,
    check_positive_definite,
    check_rng,
    check_same_length,
)

__all__ = [
    "ConditionalMixture",
    "GaussianBridge",
    "LightSchrodingerBridge",
    "bw_uvp",
    "conditional_bw_uvp",
    "gaussian_bridge",
]

MAX_SCALE = 1e8  # upper bound on the variances in S
FAR = 1e75  # largest |x| / sqrt(epsilon), |y| / sqrt(epsilon) after centring: squares must stay finite


@dataclass(frozen=True, eq=False)
class ConditionalMixture:
    r"""Conditional distributions :math:`\pi(y|x_i)`: for each row a Gaussian mixture, covariances shared by the rows.

    Attributes
    ----------
    weights : array, shape (n, K)
        Non-negative, rows add up to 1.
    means : array, shape (n, K, D)
        :math:`r_k + S_k x_i`, in the units of the data.
    covariances : array, shape (K, D) or (K, D, D)
        :math:`\varepsilon S_k`: diagonals, or full matrices.
    """

    weights: Array
    means: Array
    covariances: Array

    def moments(self) -> tuple[Array, Array]:
        """Mean and covariance of each row's mixture.

        Returns
        -------
        mean : array, shape (n, D)
            Conditional means.
        covariance : array, shape (n, D, D)
            Conditional covariances.
        """
        w, C = self.weights, self.covariances
        xp, (n, _, D) = array_namespace(w, self.means, C), self.means.shape
        mean = xp.sum(w[:, :, None] * self.means, axis=1)  # (n, D)
        around = self.means - mean[:, None, :]
        covariance = xp.matmul(xp.matrix_transpose(around * w[:, :, None]), around)  # (n, D, D)
        if C.ndim == 2:
            return mean, covariance + (w @ C)[:, :, None] * from_numpy(np.eye(D), like=w)
        return mean, covariance + xp.reshape(w @ xp.reshape(C, (-1, D * D)), (n, D, D))


class GaussianBridge(NamedTuple):
    r"""Static Schrödinger bridge of two Gaussians: :math:`y|x \sim N(\text{intercept} + \text{slope}\,x, C)`.

    Attributes
    ----------
    slope : array, shape (D, D)
        :math:`S`, symmetric and positive definite.
    intercept : array, shape (D,)
        :math:`r = m_1 - S m_0`.
    cond_cov : array, shape (D, D)
        :math:`C = \varepsilon S`.
    cross_cov : array, shape (D, D)
        :math:`\operatorname{Cov}(x, y) = \Sigma_0 S`.
    """

    slope: Array
    intercept: Array
    cond_cov: Array
    cross_cov: Array


def gaussian_bridge(mean0: Array, cov0: Array, mean1: Array, cov1: Array, *, epsilon: float) -> GaussianBridge:
    r"""Schrödinger bridge between :math:`N(m_0, \Sigma_0)` and :math:`N(m_1, \Sigma_1)`, in closed form.

    .. math:: S = \Sigma_0^{-1/2}\Big(\big(\Sigma_0^{1/2}\Sigma_1\Sigma_0^{1/2} + \tfrac{\varepsilon^2}{4}I\big)^{1/2}
        - \tfrac{\varepsilon}{2}I\Big)\Sigma_0^{-1/2}

    Parameters
    ----------
    mean0, mean1 : array, shape (D,), NumPy, CuPy, torch or JAX
        Means at times 0 and 1.
    cov0, cov1 : array, shape (D, D)
        Covariances, positive definite.
    epsilon : float
        Variance of the noise over the whole time, positive; in squared units of the data.

    Returns
    -------
    GaussianBridge
        Of the kind of ``cov0``.

    Raises
    ------
    ValueError
        If shapes do not fit, a covariance is not symmetric and positive definite, or ``epsilon`` is not positive.
    TypeError
        If an argument is not numeric.

    Notes
    -----
    The same formula as in Y. Chen, T. T. Georgiou, M. Pavon, IEEE Trans. Automat. Control 61(5):1158-1169, 2016.

    Examples
    --------
    >>> bridge = gaussian_bridge([0.0], [[1.0]], [3.0], [[1.0]], epsilon=1.5)
    >>> bridge.slope, bridge.intercept
    (array([[0.5]]), array([3.]))
    """
    cov0 = check_positive_definite(cov0, "cov0")
    D = cov0.shape[0]
    cov0 = check_array(cov0, "cov0", shape=(D, D), high=1e75)
    cov1 = check_positive_definite(check_array(cov1, "cov1", shape=(D, D), high=1e75), "cov1")
    mean0, mean1 = check_array(mean0, "mean0", shape=(D,)), check_array(mean1, "mean1", shape=(D,))
    epsilon = check_float(epsilon, "epsilon", low=0, open_low=True)
    xp = array_namespace(cov0, cov1, mean0, mean1)
    lam, Q = xp.linalg.eigh(cov0)
    root, inverse_root = (Q * xp.sqrt(lam)) @ Q.T, (Q / xp.sqrt(lam)) @ Q.T
    mu, P = xp.linalg.eigh(root @ cov1 @ root)
    mu = xp.where(mu > 0, mu, 0 * mu)
    half = epsilon / 2
    ratio = mu / (xp.sqrt(mu) * xp.sqrt(1 + half / xp.where(mu > 0, mu, 1 + 0 * mu) * half) + half)
    S = inverse_root @ (P * ratio) @ P.T @ inverse_root  # sqrt(mu + half^2) - half, without the cancellation
    S = (S + S.T) / 2
    return GaussianBridge(S, mean1 - S @ mean0, epsilon * S, cov0 @ S)


def bw_uvp(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    r"""Bures-Wasserstein error of a Gaussian, in percent of unexplained variance.

    .. math:: \frac{100}{\frac12\operatorname{tr}\Sigma_b}\Big(\|m_a-m_b\|^2
        + \operatorname{tr}\big(\Sigma_a+\Sigma_b-2(\Sigma_a^{1/2}\Sigma_b\Sigma_a^{1/2})^{1/2}\big)\Big)

    Parameters
    ----------
    mean_a, mean_b : array, shape (D,), NumPy, CuPy, torch or JAX
        Means; b is the reference.
    cov_a, cov_b : array, shape (D, D)
        Covariances, symmetric and positive semi-definite; ``cov_b`` is not zero.

    Returns
    -------
    float
        Percent; 0 for equal moments.

    Raises
    ------
    ValueError
        If shapes do not fit, or a covariance is not positive semi-definite.
    TypeError
        If an argument is not numeric.

    Notes
    -----
    Only means and covariances enter: distributions with the same moments are at distance 0. Source: [1]_.

    .. [1] A. Korotin, N. Gushchin, E. Burnaev, Light Schrödinger Bridge, ICLR 2024, section 5.

    Examples
    --------
    >>> bw_uvp([1.0], [[1.0]], [0.0], [[4.0]])  # 1 + (2 - 1)^2, over 4 / 2
    100.0
    """
    cov_a, cov_b = _check_covariance(cov_a, "cov_a"), _check_covariance(cov_b, "cov_b")
    D = cov_b.shape[0]
    cov_a = check_array(cov_a, "cov_a", shape=(D, D))
    mean_a = check_array(mean_a, "mean_a", shape=(D,), low=-FAR, high=FAR)
    mean_b = check_array(mean_b, "mean_b", shape=(D,), low=-FAR, high=FAR)
    total = float(_trace(cov_b))
    if total <= 0:
        raise ValueError("cov_b must not be zero: the error is relative to its trace")
    return 200 / total * float(_bures_wasserstein(mean_a, cov_a, mean_b, cov_b))


def conditional_bw_uvp(plan_a: ConditionalMixture, plan_b: ConditionalMixture, *, target_var: float) -> float:
    r"""Average over x of the Bures-Wasserstein distance between two conditional plans, in percent (cBW-UVP).

    .. math:: \frac{100}{\frac12\operatorname{Var}(p_1)}\,\frac1n\sum_i
        \mathrm{BW}_2^2\big(\pi_a(\cdot|x_i), \pi_b(\cdot|x_i)\big)

    Parameters
    ----------
    plan_a, plan_b : ConditionalMixture
        Conditional distributions at the same n points, as :meth:`LightSchrodingerBridge.conditional` gives them.
    target_var : float
        Total variance of :math:`p_1` (the trace of its covariance), positive.

    Returns
    -------
    float
        Percent. The moments of the mixtures are exact: nothing is sampled.

    Raises
    ------
    TypeError
        If a plan is not a :class:`ConditionalMixture`.
    ValueError
        If shapes do not fit, or ``target_var`` is not positive.

    Notes
    -----
    Source: N. Gushchin et al., *Building the Bridge of Schrödinger*, NeurIPS 2023 (arXiv 2306.10161), where moments
    are estimated from samples.

    Examples
    --------
    >>> import numpy as np
    >>> one = ConditionalMixture(np.ones((2, 1)), np.zeros((2, 1, 3)), np.ones((1, 3)))
    >>> two = ConditionalMixture(np.ones((2, 1)), np.ones((2, 1, 3)), np.ones((1, 3)))
    >>> round(conditional_bw_uvp(one, two, target_var=6.0), 6)  # 3 over 6 / 2
    100.0
    """
    plan_a, plan_b = _check_plan(plan_a, "plan_a"), _check_plan(plan_b, "plan_b")
    if plan_a.means.shape[::2] != plan_b.means.shape[::2]:
        raise ValueError("plan_a and plan_b must be about the same points, in the same dimension")
    target_var = check_float(target_var, "target_var", low=0, open_low=True)
    (mean_a, cov_a), (mean_b, cov_b) = plan_a.moments(), plan_b.moments()
    distances = _bures_wasserstein(mean_a, cov_a, mean_b, cov_b)  # (n,)
    return 200 / target_var * float(array_namespace(distances).mean(distances))


class LightSchrodingerBridge(BaseEstimator):
    r"""Schrödinger bridge from samples of :math:`p_0` to samples of :math:`p_1`, which need not be paired.

    With the adjusted potential :math:`v(y) = \sum_k \alpha_k N(y|r_k, \varepsilon S_k)`, everything is closed form: the
    normaliser :math:`c(x) = \sum_k \alpha_k \exp\frac{x^\top S_k x + 2r_k^\top x}{2\varepsilon}`, the conditional plan
    (a mixture with means :math:`r_k + S_k x` and covariances :math:`\varepsilon S_k`), the drift, and the objective

    .. math:: \frac1N\sum_n\log c(x_n) - \frac1M\sum_m\log v(y_m),

    which is, up to a constant, the Kullback-Leibler divergence from the true bridge to the model's.

    Parameters
    ----------
    n_components : int, default 50
        K; no more than there are target samples.
    epsilon : float, default 1.0
        Variance of the Wiener process at time 1, in squared units of the data.
    covariance : {"diag", "full"}, default "diag"
        Form of :math:`S_k`.
    init_scale : float, default 1.0
        :math:`S_k` starts as this multiple of the identity. (:math:`r_k` starts at K random target samples, relative
        to the means of both samples. With L-BFGS the weights start at those of the Gaussian bridge between samples of
        these variances, without which most components are never reached when epsilon is small; with Adam, equal.)
    min_scale : float, default 1e-8
        Lower bound on the variances in :math:`S_k` (full: on the squared diagonal of its Cholesky factor). Like a
        mixture's likelihood, the objective has no minimum when a component may shrink onto one sample; with few
        samples a value such as 0.1 fits better.
    optimizer : {"lbfgs", "adam"}, default "lbfgs"
        Full-batch L-BFGS, or Adam on mini-batches with the official parameters.
    max_iter : int, default 500
        Iterations, or steps of Adam (the paper's experiments take 10,000).
    learning_rate : float, optional
        Of Adam. By default 1e-3, 3e-3, 6e-2 at epsilon 0.1, 1, 10 (official) and log-linear between.
    batch_size : int, default 128
        Rows of either sample in a step of Adam, drawn with replacement.
    tol : float, default 1e-8
        L-BFGS stops when the relative decrease of the objective, or the largest entry of the gradient, is below this.
    rng : None, int or numpy.random.Generator
        Initial locations and mini-batches.

    Attributes
    ----------
    weights_ : numpy.ndarray, shape (K,)
        :math:`\alpha_k`, normalised to add up to 1.
    locations_ : numpy.ndarray, shape (K, D)
        :math:`r_k`.
    scales_ : numpy.ndarray, shape (K, D) or (K, D, D)
        :math:`S_k`, without unit.
    objective_ : float
        Objective at the end: over all samples with L-BFGS, over the last batch with Adam.
    loss_curve_ : numpy.ndarray, shape (iterations,)
        Objective after each iteration (Adam: of each batch, before its step).
    n_iter_ : int
        Iterations.
    converged_ : bool
        Whether L-BFGS met ``tol``; always False with Adam.
    n_features_in_ : int
        D.

    Notes
    -----
    An iteration costs :math:`O((N+M)KD)` with diagonal, :math:`O((N+M)KD^2)` with full covariances. The data are
    centred first, which changes neither the model nor its optimum (bridges commute with translations). Parameters
    are kept on the host in double precision; data of another kind (CuPy, torch, JAX) stay where they are, and results
    are of their kind. Random numbers are drawn on the host, so that a seed means the same everywhere.

    Source: arXiv 2310.01174, sections 3 and 4.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X, Y = rng.normal(0, 1, (400, 2)), rng.choice([-4, 4], (300, 1)) + rng.normal(0, 0.5, (300, 2))
    >>> model = LightSchrodingerBridge(2, epsilon=0.5, rng=1).fit(X, Y)
    >>> model.transform(np.array([[1.0, 1.0], [-1.0, -1.0]])).round(0)
    array([[ 4.,  4.],
           [-4., -4.]])
    """

    def __init__(
        self,
        n_components: int = 50,
        *,
        epsilon: float = 1.0,
        covariance: Literal["diag", "full"] = "diag",
        init_scale: float = 1.0,
        min_scale: float = 1e-8,
        optimizer: Literal["lbfgs", "adam"] = "lbfgs",
        max_iter: int = 500,
        learning_rate: float | None = None,
        batch_size: int = 128,
        tol: float = 1e-8,
        rng: RNGLike = None,
    ) -> None:
        self.n_components = n_components
        self.epsilon = epsilon
        self.covariance = covariance
        self.init_scale = init_scale
        self.min_scale = min_scale
        self.optimizer = optimizer
        self.max_iter = max_iter
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.tol = tol
        self.rng = rng

    def fit(self, X: Array, Y: Array) -> LightSchrodingerBridge:
        """Fit the potential to two samples. Note: ``Y`` holds target samples, not labels, and is not paired with ``X``.

        Parameters
        ----------
        X : array, shape (N, D)
            Sample of p0.
        Y : array, shape (M, D)
            Sample of p1.

        Returns
        -------
        LightSchrodingerBridge
            Itself.

        Raises
        ------
        ValueError
            If a sample or a parameter is out of order.
        TypeError
            If an argument is of the wrong type.

        Warns
        -----
        AlgokitWarning
            If a coordinate of ``Y`` is constant, or a component has shrunk onto a few target samples.
        """
        epsilon, full, rng = self._check_parameters()
        X = check_array(X, "X", ndim=2)
        D = X.shape[1]
        Y = check_array(Y, "Y", shape=(None, D))
        xp = array_namespace(X, Y)
        K = check_int(self.n_components, "n_components", low=1)
        N, M = X.shape[0], Y.shape[0]
        if K > M:
            raise ValueError(f"n_components must be at most the number of rows of Y, got {K} > {M}")
        centres, X, Y = _centre(X, Y, epsilon)
        spread = to_numpy(xp.max(Y, axis=0) - xp.min(Y, axis=0))
        features = _n_features(D, full)
        check_allocation((max(N, M), features), "X")
        check_allocation((64, features + 1, K), "n_components")
        r = to_numpy(Y)[rng.choice(M, K, replace=False)]
        log_alpha = _gaussian_weights(X, Y, r, epsilon) if self.optimizer == "lbfgs" else np.zeros(K)
        scale = np.where(spread > 0, float(self.init_scale), self.min_scale)  # (D,)
        start = _Potential(log_alpha, r, np.tile(scale, (K, 1)))
        problem = _Problem(_features(X, full), _features(Y, full), epsilon, K, D, full)
        run = _lbfgs if self.optimizer == "lbfgs" else _adam
        with threadpool_limits(1, user_api="blas"):  # vectors this short are slower on many threads
            potential, curve, converged = run(problem, start, self, rng)
        self.n_features_in_ = D
        self._centres, self._potential, self._full, self._epsilon = centres, potential, full, epsilon
        a, b = centres
        Sa = _apply(potential.S, a)
        self.locations_ = potential.r + b - Sa
        log_alpha = potential.log_alpha + (Sa - 2 * (potential.r + b)) @ a / (2 * epsilon)
        self._log_scale = float(_lse(log_alpha[None])[0])  # of alpha: the public weights add up to 1
        self.weights_ = np.exp(log_alpha - self._log_scale)
        self.scales_ = potential.S.copy()
        self.loss_curve_ = curve + float(a @ b) / epsilon
        self.n_iter_, self.converged_ = len(curve), converged
        self.objective_ = float(self.loss_curve_[-1])
        held = _pass(problem.target, _target(potential, epsilon), problem)[1] * M
        _warn(spread, potential.S, held, self.min_scale)
        return self

    def conditional(self, X: Array) -> ConditionalMixture:
        """Conditional plan at each row.

        Parameters
        ----------
        X : array, shape (n, D)
            Starting points.

        Returns
        -------
        ConditionalMixture
            Weights (n, K), means (n, K, D), covariances.
        """
        given, X = self._query(X)
        p, D = self._potential, self.n_features_in_
        check_allocation((X.shape[0], len(p.r), D), "X")
        xp = array_namespace(X)
        weights = _softmax(_logits(X, *_source(p, self._epsilon)))
        r, S = (from_numpy(part, like=X) for part in (p.r + self._centres[1], p.S))
        moved = X[:, None, :] * S if not self._full else xp.matmul(S, X[:, None, :, None])[..., 0]
        results = (weights, r + moved, self._epsilon * S)
        return ConditionalMixture(*(xp.astype(part, given.dtype) for part in results))

    def transform(self, X: Array) -> Array:
        """Conditional means: where each row goes on average (the barycentric map).

        Parameters
        ----------
        X : array, shape (n, D)
            Starting points.

        Returns
        -------
        array, shape (n, D)
            Conditional means.
        """
        given, X = self._query(X)
        p = self._potential
        mean = _average(X, _source(p, self._epsilon), p.r + self._centres[1], p.S)
        return array_namespace(X).astype(mean, given.dtype)

    def sample(self, X: Array, *, rng: RNGLike = None) -> Array:
        """One draw from the conditional plan at each row.

        Parameters
        ----------
        X : array, shape (n, D)
            Starting points.
        rng : None, int or numpy.random.Generator
            Source of randomness.

        Returns
        -------
        array, shape (n, D)
            End points: distributed as p1 if the rows are distributed as p0 and the fit is good.
        """
        given, X = self._query(X)
        generator = check_rng(rng)
        return array_namespace(X).astype(self._draw(X, generator), given.dtype)

    def drift(self, X: Array, t: float | Array) -> Array:
        r"""Drift of the diffusion :math:`dX_t = g(X_t, t)\,dt + \sqrt\varepsilon\,dW_t`.

        Parameters
        ----------
        X : array, shape (n, D)
            Positions at time t.
        t : float or array, shape (n,)
            Times in [0, 1). Rows with equal times are evaluated together.

        Returns
        -------
        array, shape (n, D)
            Velocities, in units of the data per unit of time.

        Raises
        ------
        ValueError
            If a time is outside [0, 1).
        """
        given, X = self._check_X(X)
        times = to_numpy(check_array(t, "t", ndim=(0, 1), low=0))
        if (times >= 1).any():
            raise ValueError(f"t must be in [0, 1), got {times.max():g}")
        if times.ndim:
            check_same_length(X=given, t=times)
        xp = array_namespace(given)
        if times.ndim == 0:
            return xp.astype(self._drift(X, float(times)), given.dtype)
        values, group = np.unique(times, return_inverse=True)
        order = np.argsort(group, kind="stable")
        blocks = [
            self._drift(xp.take(X, from_numpy(rows, like=X), axis=0), float(s))
            for s, rows in zip(values, np.split(order, np.cumsum(np.bincount(group))[:-1]), strict=True)
        ]
        return xp.astype(xp.take(xp.concat(blocks), from_numpy(np.argsort(order), like=X), axis=0), given.dtype)

    def sample_path(
        self,
        X: Array,
        times: Array,
        *,
        method: Literal["bridge", "sde"] = "bridge",
        n_steps: int = 100,
        rng: RNGLike = None,
    ) -> Array:
        """One path of the process from each row, seen at some times.

        Parameters
        ----------
        X : array, shape (n, D)
            Starting points, at time 0.
        times : array, shape (m,)
            When to look: ascending, in [0, 1].
        method : {"bridge", "sde"}, default "bridge"
            ``"bridge"`` draws the end point and then a Brownian bridge, without error; ``"sde"`` integrates the drift
            by Euler and Maruyama.
        n_steps : int, default 100
            Steps of ``"sde"`` over [0, 1]; a step is cut where one of ``times`` falls into it.
        rng : None, int or numpy.random.Generator
            Source of randomness.

        Returns
        -------
        array, shape (m, n, D)
            Positions.

        Raises
        ------
        ValueError
            If ``times`` is not ascending in [0, 1], or an option is unknown.
        """
        given, x = self._check_X(X)
        looks = to_numpy(check_array(times, "times", ndim=1, low=0, high=1)).astype(np.float64)
        if (np.diff(looks) < 0).any():
            raise ValueError("times must be ascending")
        check_one_of(method, "method", ("bridge", "sde"))
        n_steps = check_int(n_steps, "n_steps", low=1, high=10**7)
        generator = check_rng(rng)
        check_allocation((len(looks), *given.shape), "times")
        xp = array_namespace(given)
        normal = lambda: from_numpy(generator.standard_normal(tuple(x.shape)), like=x)  # noqa: E731
        seen, now = [], 0.0
        if method == "bridge":
            end = self._draw(x - from_numpy(self._centres[0], like=x), generator)
            for t in looks.tolist():
                if t > now:
                    left = (1 - t) / (1 - now)
                    x = left * x + (1 - left) * end + math.sqrt(self._epsilon * (t - now) * left) * normal()
                    now = t
                seen.append(x)
        else:
            grid = np.linspace(0, 1, n_steps + 1)
            for t in looks.tolist():
                for stop in [*grid[(grid > now) & (grid < t)].tolist(), t]:
                    if stop > now:
                        dt = stop - now
                        x = x + dt * self._drift(x, now) + math.sqrt(self._epsilon * dt) * normal()
                        now = stop
                seen.append(x)
        return xp.astype(xp.stack(seen), given.dtype)

    def log_potential(self, Y: Array) -> Array:
        r"""Logarithm of the adjusted potential, :math:`\log v(y)`, scaled so that the weights add up to 1.

        Parameters
        ----------
        Y : array, shape (m, D)
            Points.

        Returns
        -------
        array, shape (m,)
            :math:`\log v(y)`.
        """
        given, Y = self._check_X(Y, "Y")
        xp = array_namespace(given)
        a, b = (from_numpy(centre, like=given) for centre in self._centres)
        value = _lse(_logits(Y - b, *_target(self._potential, self._epsilon))) - (Y @ a) / self._epsilon
        return xp.astype(value - self._log_scale, given.dtype)

    def log_normalizer(self, X: Array) -> Array:
        r"""Logarithm of the normaliser, :math:`\log c(x) = \log\int e^{\langle x,y\rangle/\varepsilon}\,v(y)\,dy`.

        Parameters
        ----------
        X : array, shape (n, D)
            Points.

        Returns
        -------
        array, shape (n,)
            :math:`\log c(x)`.
        """
        given, X = self._query(X)
        b = from_numpy(self._centres[1], like=X)
        value = _lse(_logits(X, *_source(self._potential, self._epsilon))) + (X @ b) / self._epsilon
        return array_namespace(X).astype(value - self._log_scale, given.dtype)

    def objective(self, X: Array, Y: Array) -> float:
        """Objective on two samples, such as held-out ones: lower is closer to the true bridge.

        Parameters
        ----------
        X : array, shape (n, D)
            Sample of p0.
        Y : array, shape (m, D)
            Sample of p1.

        Returns
        -------
        float
            Mean of log c over X minus mean of log v over Y, in nats.
        """
        source, target = self.log_normalizer(X), self.log_potential(Y)
        return float(array_namespace(source).mean(source)) - float(array_namespace(target).mean(target))

    def _check_parameters(self) -> tuple[float, bool, np.random.Generator]:
        epsilon = check_float(self.epsilon, "epsilon", low=0, open_low=True)
        full = check_one_of(self.covariance, "covariance", ("diag", "full")) == "full"
        least = check_float(self.min_scale, "min_scale", low=0, high=MAX_SCALE, open_low=True)
        check_float(self.init_scale, "init_scale", low=0, high=MAX_SCALE, open_low=True)
        if self.init_scale < least:
            raise ValueError(f"init_scale must be at least min_scale, got {self.init_scale:g} < {least:g}")
        check_one_of(self.optimizer, "optimizer", ("lbfgs", "adam"))
        check_int(self.max_iter, "max_iter", low=1, high=10**9)
        check_int(self.batch_size, "batch_size", low=1, high=10**8)
        check_float(self.tol, "tol", low=0)
        if self.learning_rate is not None:
            check_float(self.learning_rate, "learning_rate", low=0, high=1e3, open_low=True)
        return epsilon, full, check_rng(self.rng)

    def _check_X(self, X: Array, name: str = "X") -> tuple[Array, Array]:
        """``X`` as it was given, and in double precision."""
        check_is_fitted(self, "weights_")
        given = check_array(X, name, shape=(None, self.n_features_in_))
        xp, bound = array_namespace(given), FAR * math.sqrt(self._epsilon)
        return given, check_array(xp.astype(given, xp.float64), name, low=-bound, high=bound)

    def _query(self, X: Array) -> tuple[Array, Array]:
        """``X`` as it was given, and centred in double precision."""
        given, X = self._check_X(X)
        return given, X - from_numpy(self._centres[0], like=X)

    def _draw(self, X: Array, generator: np.random.Generator) -> Array:
        """End points for centred ``X`` (n, D)."""
        xp, p = array_namespace(X), self._potential
        u, z = generator.random((X.shape[0], 1)), generator.standard_normal(tuple(X.shape))
        weights = _softmax(_logits(X, *_source(p, self._epsilon)))
        below = xp.cumulative_sum(weights, axis=1)[:, :-1] < from_numpy(u, like=X)
        k = xp.sum(xp.astype(below, xp.int64), axis=1)  # (n,)
        root = np.linalg.cholesky(p.S) if self._full else np.sqrt(p.S)
        r, S, L = (xp.take(from_numpy(part, like=X), k, axis=0) for part in (p.r + self._centres[1], p.S, root))
        return r + _apply(S, X) + math.sqrt(self._epsilon) * _apply(L, from_numpy(z, like=X))

    def _drift(self, X: Array, t: float) -> Array:
        r"""Drift at positions ``X`` (n, D), not centred, at one time.

        With :math:`B_k = (1-t)I + tS_k`: :math:`g = \sum_k w_k B_k^{-1}(r_k + S_k x - x)`, the softmax of
        :math:`\log\alpha_k - \frac12\log|B_k| + \frac{1}{2\varepsilon}[x^\top(S_k-I)B_k^{-1}x + 2x^\top B_k^{-1}r_k -
        t\,r_k^\top B_k^{-1}r_k]` being the weights. Centred paths differ by :math:`(1-t)a + tb`, their drift by b - a.
        """
        p, (a, b), D = self._potential, self._centres, self.n_features_in_
        if self._full:
            B = (1 - t) * np.eye(D) + t * p.S
            pull, slope = np.linalg.solve(B, p.r[:, :, None])[:, :, 0], np.linalg.solve(B, p.S - np.eye(D))
            log_det = np.linalg.slogdet(B)[1]
        else:
            B = (1 - t) + t * p.S
            pull, slope, log_det = p.r / B, (p.S - 1) / B, np.log(B).sum(axis=1)
        offset = p.log_alpha - 0.5 * log_det - t / (2 * self._epsilon) * (p.r * pull).sum(axis=1)
        form = offset, pull / self._epsilon, slope / (2 * self._epsilon)
        return _average(X - from_numpy((1 - t) * a + t * b, like=X), form, pull + (b - a), slope)


# ---- the potential, its two log-sum-exps, and the gradient ----


class _Potential(NamedTuple):
    """Parameters for centred data."""

    log_alpha: np.ndarray  # (K,)
    r: np.ndarray  # (K, D)
    S: np.ndarray  # (K, D) or (K, D, D)


class _Problem(NamedTuple):
    """Features of both samples: coordinates, then their squares (diagonal) or all their products (full)."""

    source: Array  # (N, F)
    target: Array  # (M, F)
    epsilon: float
    K: int
    D: int
    full: bool


Form = tuple[np.ndarray, np.ndarray, np.ndarray]  # offset (K,), linear (K, D), quadratic (K, D) or (K, D, D)


def _source(p: _Potential, epsilon: float) -> Form:
    """Logarithm of the terms of c(x), as quadratic forms in x."""
    return p.log_alpha, p.r / epsilon, p.S / (2 * epsilon)


def _target(p: _Potential, epsilon: float) -> Form:
    """Logarithm of the terms of v(y), as quadratic forms in y."""
    D = p.r.shape[1]
    if p.S.ndim == 2:
        precision, log_det = 1 / p.S, np.log(p.S).sum(axis=1)
    else:
        precision, log_det = np.linalg.inv(p.S), np.linalg.slogdet(p.S)[1]
    pull = _apply(precision, p.r)  # (K, D)
    offset = p.log_alpha - 0.5 * (D * math.log(2 * math.pi * epsilon) + log_det + (p.r * pull).sum(axis=1) / epsilon)
    return offset, pull / epsilon, -precision / (2 * epsilon)


def _objective(theta: np.ndarray, problem: _Problem, unit: float) -> tuple[float, np.ndarray]:
    """Objective and its gradient in ``theta`` (see :func:`_unpack`): one pass over either sample."""
    p, L = _unpack(theta, problem, unit)
    eps = problem.epsilon
    value0, mass0, first0, second0 = _pass(problem.source, _source(p, eps), problem)
    value1, mass1, first1, second1 = _pass(problem.target, _target(p, eps), problem)
    r, S = p.r, p.S
    if problem.full:
        precision = np.linalg.inv(S)
        cross = first1[:, :, None] * r[:, None, :]
        around = second1 - cross - cross.swapaxes(1, 2) + mass1[:, None, None] * r[:, :, None] * r[:, None, :]
        G = (second0 - precision @ around @ precision) / (2 * eps) + 0.5 * mass1[:, None, None] * precision
        slope = np.tril(2 * G @ L)  # derivative in the Cholesky factor
        i = np.arange(problem.D)
        slope[:, i, i] *= L[:, i, i]  # its diagonal is stored as a logarithm
        scale_part = slope[:, *np.tril_indices(problem.D)]
    else:
        precision = 1 / S
        around = second1 - 2 * r * first1 + r**2 * mass1[:, None]
        scale_part = S / (2 * eps) * second0 - 0.5 * (around * precision / eps - mass1[:, None])
    r_part = (first0 - _apply(precision, first1 - mass1[:, None] * r)) / eps
    return value0 - value1, np.concatenate([mass0 - mass1, (unit * r_part).ravel(), scale_part.ravel()])


def _pass(features: Array, form: Form, problem: _Problem) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Mean log-sum-exp over the rows; mean responsibility, first and second moment of each component."""
    offset, W = form[0], _coefficients(form[1], form[2], features.shape[1])
    value, mass, moments = (_pass_cpu if kind_of(features) == "numpy" else _pass_arrays)(features, offset, W)
    D, n = problem.D, features.shape[0]
    mass, moments = mass / n, moments.T / n  # (K,), (K, F)
    if not problem.full:
        return value / n, mass, moments[:, :D], moments[:, D : 2 * D]
    i, j = np.tril_indices(D)
    second = np.empty((len(mass), D, D))
    second[:, i, j] = second[:, j, i] = moments[:, D : D + len(i)]
    return value / n, mass, moments[:, :D], second


def _pass_arrays(features: Array, offset: np.ndarray, W: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Two matrix products and a softmax, on the device of ``features``, in tiles of rows."""
    xp, c, W = array_namespace(features), from_numpy(offset, like=features), from_numpy(W, like=features)
    value, mass, moments = 0.0, xp.zeros_like(c), xp.zeros_like(W)
    for rows in _tiles(features.shape[0], 2**24 // len(offset)):
        tile = features[rows, :]
        z = tile @ W + c
        lse = _lse(z)
        responsibility = xp.exp(z - lse[:, None])
        value += float(xp.sum(lse))
        mass = mass + xp.sum(responsibility, axis=0)
        moments = moments + tile.T @ responsibility
    return value, to_numpy(mass), to_numpy(moments)


def _n_features(D: int, full: bool) -> int:
    """D coordinates and their products, rounded up to a multiple of 4 (the kernel's step)."""
    return -(-(D + (D * (D + 1) // 2 if full else D)) // 4) * 4


def _features(X: Array, full: bool) -> Array:
    xp, (n, D) = array_namespace(X), X.shape
    if full:
        i, j = (from_numpy(index.astype(np.int64), like=X) for index in np.tril_indices(D))
        products = xp.take(X, i, axis=1) * xp.take(X, j, axis=1)
    else:
        products = X * X
    padding = from_numpy(np.zeros((n, _n_features(D, full) - D - products.shape[1])), like=X)
    return xp.concat([X, products, padding], axis=1)


def _coefficients(linear: np.ndarray, quadratic: np.ndarray, n_features: int) -> np.ndarray:
    """Weights (F, K) with which the features of x give ``linear . x + x' quadratic x``."""
    W = np.zeros((n_features, len(linear)))
    D = linear.shape[1]
    W[:D] = linear.T
    if quadratic.ndim == 2:
        W[D : 2 * D] = quadratic.T
    else:
        i, j = np.tril_indices(D)
        W[D : D + len(i)] = np.where(i == j, 1.0, 2.0)[:, None] * quadratic[:, i, j].T
    return W


def _logits(X: Array, offset: np.ndarray, linear: np.ndarray, quadratic: np.ndarray) -> Array:
    """Quadratic forms at the rows of ``X``, shape (n, K)."""
    features = _features(X, quadratic.ndim == 3)
    W = _coefficients(linear, quadratic, features.shape[1])
    return features @ from_numpy(W, like=X) + from_numpy(offset, like=X)


def _average(X: Array, form: Form, shift: np.ndarray, slope: np.ndarray) -> Array:
    """Average of ``shift_k + slope_k x`` with the softmax of the quadratic forms as weights; shape (n, D)."""
    xp, (K, D), full = array_namespace(X), shift.shape, slope.ndim == 3
    values = np.concatenate([shift, slope.reshape(K, -1)], axis=1)  # (K, Q)
    offset, linear, quadratic = form
    parts = []
    for rows in _tiles(X.shape[0], 2**22 // (K + values.shape[1])):
        x = X[rows, :]
        features = _features(x, full)
        W = _coefficients(linear, quadratic, features.shape[1])
        if kind_of(X) == "numpy":
            mean = _average_kernel(features, W, offset, values)
        else:
            z = features @ from_numpy(W, like=X) + from_numpy(offset, like=X)
            mean = _softmax(z) @ from_numpy(values, like=X)  # (n, Q)
        M = xp.reshape(mean[:, D:], (x.shape[0], D, D)) if full else mean[:, D:]
        parts.append(mean[:, :D] + _apply(M, x))
    return xp.concat(parts)


def _tiles(n: int, step: int) -> list[slice]:
    """Consecutive slices of ``range(n)``, at most ``step`` long."""
    step = max(1, step)
    return [slice(i, min(n, i + step)) for i in range(0, n, step)]


def _lse(z: Array) -> Array:
    xp = array_namespace(z)
    top = xp.max(z, axis=1)
    return top + xp.log(xp.sum(xp.exp(z - top[:, None]), axis=1))


def _softmax(z: Array) -> Array:
    xp = array_namespace(z)
    p = xp.exp(z - xp.max(z, axis=1)[:, None])
    return p / xp.sum(p, axis=1)[:, None]


def _apply(S: Array, x: Array) -> Array:
    """``S_k x_k`` row by row (or one x for all k), for diagonals (K, D) and matrices (K, D, D)."""
    return S * x if S.ndim == 2 else array_namespace(S).matmul(S, x[..., None])[..., 0]


# ---- the two optimisers ----

Fitted = tuple[_Potential, np.ndarray, bool]  # potential, curve, converged


def _pack(p: _Potential, problem: _Problem, unit: float) -> np.ndarray:
    """Free parameters from a potential with diagonal S: log alpha, r / unit, log S or rows of a Cholesky factor."""
    scale = np.log(p.S)
    if problem.full:
        i, j = np.tril_indices(problem.D)
        scale = np.where(i == j, 0.5 * scale[:, i], 0.0)
    return np.concatenate([p.log_alpha, p.r.ravel() / unit, scale.ravel()])


def _unpack(theta: np.ndarray, problem: _Problem, unit: float) -> tuple[_Potential, np.ndarray]:
    """Potential, and the Cholesky factors of its S (the S themselves if diagonal)."""
    K, D = problem.K, problem.D
    log_alpha, r, scale = theta[:K], theta[K : K + K * D].reshape(K, D) * unit, theta[K + K * D :].reshape(K, -1)
    if not problem.full:
        S = np.exp(scale)
        return _Potential(log_alpha, r, S), S
    L = np.zeros((K, D, D))
    L[:, *np.tril_indices(D)] = scale
    i = np.arange(D)
    L[:, i, i] = np.exp(L[:, i, i])
    return _Potential(log_alpha, r, L @ L.swapaxes(1, 2)), L


def _bounds(problem: _Problem, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds on the free parameters: only the logarithms of scales have some."""
    shape = problem.K * (problem.D + 1)
    low, high = math.log(least), math.log(MAX_SCALE)
    if problem.full:
        i, j = np.tril_indices(problem.D)
        lows, highs = np.where(i == j, low / 2, -MAX_SCALE), np.where(i == j, high / 2, MAX_SCALE)
    else:
        lows, highs = np.full(problem.D, low), np.full(problem.D, high)
    free = np.full(shape, np.inf)
    return np.append(-free, np.tile(lows, problem.K)), np.append(free, np.tile(highs, problem.K))


def _lbfgs(problem: _Problem, start: _Potential, model: LightSchrodingerBridge, rng: np.random.Generator) -> Fitted:
    unit = math.sqrt(problem.epsilon * model.init_scale)  # a component's spread: r moves on the scale of log S
    curve: list[float] = []

    def note(intermediate_result: OptimizeResult) -> None:
        curve.append(float(intermediate_result.fun))

    result = minimize(
        _objective,
        _pack(start, problem, unit),
        (problem, unit),
        jac=True,
        method="L-BFGS-B",
        bounds=np.stack(_bounds(problem, model.min_scale), axis=1),
        callback=note,
        options=dict(maxiter=model.max_iter, maxfun=20 * model.max_iter, maxcor=20, ftol=model.tol, gtol=model.tol),
    )
    return _unpack(result.x, problem, unit)[0], np.array(curve or [float(result.fun)]), bool(result.status == 0)


def _adam(problem: _Problem, start: _Potential, model: LightSchrodingerBridge, rng: np.random.Generator) -> Fitted:
    """Adam on epsilon * log alpha, r, and the logarithm (or Cholesky factor) of S: one rate serves all."""
    rate = model.learning_rate
    if rate is None:
        rate = float(np.exp(np.interp(math.log(problem.epsilon), np.log([0.1, 1, 10]), np.log([1e-3, 3e-3, 6e-2]))))
    theta = _pack(start, problem, 1.0)
    stretch = np.ones(len(theta))
    stretch[: problem.K] = 1 / problem.epsilon  # d log alpha / d (epsilon log alpha)
    low, high = _bounds(problem, model.min_scale)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    curve = np.empty(model.max_iter)
    for step in range(1, model.max_iter + 1):
        batch = problem._replace(
            source=_rows(problem.source, rng, model.batch_size), target=_rows(problem.target, rng, model.batch_size)
        )
        curve[step - 1], gradient = _objective(theta, batch, 1.0)
        gradient *= stretch
        m += 0.1 * (gradient - m)
        v += 0.001 * (gradient**2 - v)
        move = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        theta = np.clip(theta - rate * stretch * move, low, high)
    return _unpack(theta, problem, 1.0)[0], curve, False


def _rows(features: Array, rng: np.random.Generator, size: int) -> Array:
    index = from_numpy(rng.integers(0, features.shape[0], size), like=features)
    return array_namespace(features).take(features, index, axis=0)


# ---- checks and small pieces ----


def _centre(X: Array, Y: Array, epsilon: float) -> tuple[tuple[np.ndarray, np.ndarray], Array, Array]:
    """Means of both samples, and the samples minus their means, in double precision."""
    xp, centres, parts = array_namespace(X), [], []
    for name, sample in (("X", X), ("Y", Y)):
        bound = FAR * math.sqrt(epsilon)
        sample = xp.astype(sample, xp.float64)
        if float(xp.max(xp.abs(sample))) > min(bound, 1e150):
            raise ValueError(f"{name} must stay within {bound:g} ({FAR:g} times the square root of epsilon)")
        mean = xp.mean(sample, axis=0)
        centres.append(to_numpy(mean))
        parts.append(sample - mean)
    return (centres[0], centres[1]), parts[0], parts[1]


def _gaussian_weights(X: Array, Y: Array, r: np.ndarray, epsilon: float) -> np.ndarray:
    r"""Logarithms of weights with which the r drawn from ``Y`` are reached about equally often.

    The potential of the bridge between Gaussians with the samples' variances, over the density that the r come from:
    :math:`\log\alpha_k = \sum_d\frac{r_{kd}^2}{2v_{1d}}(\frac12 - \sqrt{\frac14 + v_{0d}v_{1d}/\varepsilon^2})`.
    """
    xp = array_namespace(X, Y)
    v0, v1 = to_numpy(xp.mean(X * X, axis=0)), to_numpy(xp.mean(Y * Y, axis=0))
    bend = 0.5 - np.sqrt(0.25 + v0 / epsilon * (v1 / epsilon))  # (D,), not positive
    return (0.5 * r**2 / np.where(v1 > 0, v1, 1.0) * bend).sum(axis=1)


def _warn(spread: np.ndarray, S: np.ndarray, held: np.ndarray, least: float) -> None:
    """Warn of constant columns of Y, and of components that have shrunk onto those rows of it that they hold."""
    smallest = np.linalg.eigvalsh(S)[:, 0] if S.ndim == 3 else S.min(axis=1)
    shrunk = int(((smallest <= 1e-6) & (held > 0.5)).sum())
    if (spread == 0).any():
        message = (
            f"Y is constant in column {np.argmin(spread)}: its conditional variance will be near {least:g} * epsilon"
        )
    elif shrunk:
        message = (
            f"{shrunk} of {len(S)} components have shrunk onto values of Y: raise min_scale or take fewer components, "
            "and compare objective() on held-out samples"
        )
    else:
        return
    warnings.warn(message, AlgokitWarning, stacklevel=3)


def _check_covariance(cov: Array, name: str) -> Array:
    cov = check_array(cov, name, ndim=2, low=-1e150, high=1e150)
    cov = check_array(cov, name, shape=(cov.shape[0], cov.shape[0]))
    xp = array_namespace(cov)
    size = float(xp.max(xp.abs(cov)))
    if float(xp.max(xp.abs(cov - cov.T))) > 1e-8 * size:
        raise ValueError(f"{name} must be symmetric")
    if float(xp.min(xp.linalg.eigvalsh(cov))) < -1e-8 * size:
        raise ValueError(f"{name} must be positive semi-definite")
    return cov


def _check_plan(plan: Any, name: str) -> ConditionalMixture:
    if not isinstance(plan, ConditionalMixture):
        raise TypeError(f"{name} must be a ConditionalMixture, got {type(plan).__name__}")
    means = check_array(plan.means, f"{name}.means", ndim=3)
    n, K, D = means.shape
    weights = check_array(plan.weights, f"{name}.weights", shape=(n, K), low=0)
    covariances = check_array(plan.covariances, f"{name}.covariances", ndim=(2, 3))
    check_array(covariances, f"{name}.covariances", shape=(K, D) if covariances.ndim == 2 else (K, D, D))
    return ConditionalMixture(weights, means, covariances)


def _bures_wasserstein(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> Array:
    """Squared distances of Gaussians, one or a stack; never negative."""
    xp = array_namespace(mean_a, cov_a, mean_b, cov_b)
    fidelity = xp.sum(xp.linalg.svdvals(xp.matmul(_root(cov_a), _root(cov_b))), axis=-1)
    squared = xp.sum((mean_a - mean_b) ** 2, axis=-1) + _trace(cov_a) + _trace(cov_b) - 2 * fidelity
    return xp.where(squared > 0, squared, 0 * squared)


def _root(cov: Array) -> Array:
    xp = array_namespace(cov)
    lam, Q = xp.linalg.eigh(cov)
    return xp.matmul(Q * xp.sqrt(xp.where(lam > 0, lam, 0 * lam))[..., None, :], xp.matrix_transpose(Q))


def _trace(cov: Array) -> Array:
    xp = array_namespace(cov)
    return xp.sum(xp.linalg.diagonal(cov), axis=-1)


# ---- CPU: one pass over the rows, compiled ----

_CONTRACT = {"contract"}  # fused multiply-adds; the rounding trick in _exponentials forbids reassociation
_REASSOCIATE = {"contract", "reassoc", "nsz"}  # sums of positive terms: any order is as accurate as any other


def _pass_cpu(features: np.ndarray, offset: np.ndarray, W: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    n = len(features)
    chunk = max(256, -(-n // 256) * 4)  # 64 chunks at most; their number does not depend on that of the threads
    values, sums = np.zeros(-(-n // chunk)), np.zeros((-(-n // chunk), len(W) + 1, len(offset)))
    run = _in_threads if n * W.size > 2e7 else _in_turn  # below some milliseconds, threads wait longer than they help
    run(np.ascontiguousarray(features), W, offset, chunk, values, sums)
    total = sums.sum(axis=0)  # (F + 1, K), in the order of the chunks
    return float(values.sum()), total[-1], total[:-1]


@njit(cache=True, error_model="numpy")
def _in_turn(
    X: np.ndarray, W: np.ndarray, offset: np.ndarray, chunk: int, values: np.ndarray, sums: np.ndarray
) -> None:
    for q in range(len(values)):
        values[q] = _rows_pass(X[q * chunk : (q + 1) * chunk], W, offset, sums[q])


@njit(cache=True, error_model="numpy", parallel=True)
def _in_threads(
    X: np.ndarray, W: np.ndarray, offset: np.ndarray, chunk: int, values: np.ndarray, sums: np.ndarray
) -> None:
    for q in prange(len(values)):
        values[q] = _rows_pass(X[q * chunk : (q + 1) * chunk], W, offset, sums[q])


@njit(cache=True, error_model="numpy", fastmath=_CONTRACT)
def _rows_pass(X: np.ndarray, W: np.ndarray, offset: np.ndarray, out: np.ndarray) -> float:
    """Sum of log-sum-exps; ``out`` (F + 1, K): sums of responsibility times feature, and in the last row times 1."""
    n, F, value = len(X), len(W), 0.0
    z, scratch = np.empty((4, len(offset))), np.empty(len(offset))
    for i in range(0, n, 4):
        value += _four_rows(X, i, W, offset, z, scratch)
        a, b, c, d = X[i], X[min(i + 1, n - 1)], X[min(i + 2, n - 1)], X[min(i + 3, n - 1)]
        for f in range(0, F, 2):
            u, v = (a[f], b[f], c[f], d[f]), (a[f + 1], b[f + 1], c[f + 1], d[f + 1])
            _add_two(u, v, z[0], z[1], z[2], z[3], out[f], out[f + 1])
        for k in range(len(offset)):
            out[F, k] += z[0, k] + z[1, k] + z[2, k] + z[3, k]
    return value


@njit(cache=True, error_model="numpy", fastmath=_CONTRACT)
def _average_kernel(X: np.ndarray, W: np.ndarray, offset: np.ndarray, V: np.ndarray) -> np.ndarray:
    """Averages of the rows of ``V`` (K, Q) by the responsibilities of each row of ``X``; shape (n, Q)."""
    out = np.empty((len(X), V.shape[1]))
    z, scratch = np.empty((4, len(offset))), np.empty(len(offset))
    columns = V.T.copy()
    for i in range(0, len(X), 4):
        _four_rows(X, i, W, offset, z, scratch)
        for r in range(min(4, len(X) - i)):
            for q in range(len(columns)):
                out[i + r, q] = _dot(z[r], columns[q])
    return out


@njit(cache=True, error_model="numpy", fastmath=_CONTRACT)
def _four_rows(X: np.ndarray, i: int, W: np.ndarray, offset: np.ndarray, z: np.ndarray, scratch: np.ndarray) -> float:
    """Responsibilities ``z`` (4, K) of rows i to i + 3, and the sum of their log-sum-exps.

    Beyond the last row responsibilities are zero. The number of features is a multiple of 4.
    """
    n, value = len(X), 0.0
    a, b, c, d = X[i], X[min(i + 1, n - 1)], X[min(i + 2, n - 1)], X[min(i + 3, n - 1)]
    for r in range(4):
        z[r] = offset
    for f in range(0, len(W), 4):
        w0, w1, w2, w3 = W[f], W[f + 1], W[f + 2], W[f + 3]
        u, v = (a[f], a[f + 1], a[f + 2], a[f + 3]), (b[f], b[f + 1], b[f + 2], b[f + 3])
        _add_two(u, v, w0, w1, w2, w3, z[0], z[1])
        u, v = (c[f], c[f + 1], c[f + 2], c[f + 3]), (d[f], d[f + 1], d[f + 2], d[f + 3])
        _add_two(u, v, w0, w1, w2, w3, z[2], z[3])
    for r in range(4):
        if i + r < n:
            top = _largest(z[r])
            total = _exponentials(z[r], top, scratch)
            value += top + math.log(total)
            for k in range(len(offset)):
                z[r, k] /= total
        else:
            z[r] = 0.0
    return value


Four = tuple[float, float, float, float]


@njit(cache=True, error_model="numpy", fastmath=_CONTRACT)
def _add_two(
    u: Four, v: Four, x0: np.ndarray, x1: np.ndarray, x2: np.ndarray, x3: np.ndarray, y: np.ndarray, z: np.ndarray
) -> None:
    """``y += u . (x0, x1, x2, x3)`` and ``z += v . (x0, x1, x2, x3)``: 8 multiply-adds for 8 loads and stores."""
    for k in range(len(y)):
        a, b, c, d = x0[k], x1[k], x2[k], x3[k]  # read before y is written: the compiler cannot know that they differ
        y[k] += u[0] * a + u[1] * b + u[2] * c + u[3] * d
        z[k] += v[0] * a + v[1] * b + v[2] * c + v[3] * d


@njit(cache=True, error_model="numpy", fastmath=_CONTRACT)
def _exponentials(z: np.ndarray, top: float, scratch: np.ndarray) -> float:
    """``z <- exp(z - top)`` for ``z <= top``, to rounding, in loops that become vector instructions. Returns the sum.

    ``exp(x) = 2^n exp(x - n log 2)`` with a polynomial for the second factor. Adding 1.5 * 2^52 rounds to an integer
    and leaves it in the low bits, from where it is shifted into the exponent.
    """
    bits = scratch.view(np.int64)
    for k in range(len(z)):
        x = max(z[k] - top, -708.0)
        scratch[k] = x * 1.4426950408889634 + 6755399441055744.0
        n = scratch[k] - 6755399441055744.0
        r = x - n * 0.6931471803691238 - n * 1.9082149292705877e-10  # log 2 in two parts
        p = 1 / 479001600.0
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
        z[k] = (p * r + 1.0) * r + 1.0
    for k in range(len(z)):
        bits[k] = (bits[k] + 1023) << 52
    for k in range(len(z)):
        z[k] *= scratch[k]
    return _sum(z)


@njit(cache=True, error_model="numpy", fastmath=_REASSOCIATE)
def _dot(a: np.ndarray, b: np.ndarray) -> float:
    total = 0.0
    for k in range(len(a)):
        total += a[k] * b[k]
    return total


@njit(cache=True, error_model="numpy", fastmath=_REASSOCIATE)
def _sum(z: np.ndarray) -> float:
    total = 0.0
    for k in range(len(z)):
        total += z[k]
    return total


@njit(cache=True, error_model="numpy", fastmath=_REASSOCIATE | {"nnan"})
def _largest(z: np.ndarray) -> float:
    top = z[0]
    for k in range(1, len(z)):
        top = max(top, z[k])
    return top
