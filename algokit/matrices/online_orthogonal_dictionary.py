"""Orthogonal dictionary from a stream: Frank-Wolfe on the spectral ball with averaged stochastic gradients.

The objective is the mean p-th power of the codes' p-norm, p > 2 (3 by default), which is larger for spikier codes of
the same energy.

Reference: Y. Xue, V. Lau, *Online Orthogonal Dictionary Learning Based on Frank-Wolfe Method*, arXiv 2103.01484, 2021.
Chapter: notebooks/matrices/online_orthogonal_dictionary.ipynb.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal, NamedTuple

import numpy as np
from numba import njit
from scipy.optimize import linear_sum_assignment
from scipy.stats import ortho_group
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from threadpoolctl import threadpool_limits

from algokit.arrays import Array, array_namespace, from_numpy, kind_of, to_numpy
from algokit.checks import (
    RNGLike,
    check_allocation,
    check_array,
    check_bool,
    check_float,
    check_int,
    check_rng,
)

__all__ = [
    "OnlineOrthogonalDictionary",
    "SparseSamples",
    "bernoulli_gaussian",
    "dictionary_error",
    "fw_gap",
    "lp_objective_and_grad",
    "polar_oracle",
]


class SparseSamples(NamedTuple):
    """Samples with their sparse codes.

    Attributes
    ----------
    X : numpy.ndarray, shape (n_samples, n)
        Samples, one per row: ``codes @ dictionary.T`` plus noise.
    codes : numpy.ndarray, shape (n_samples, n)
        Sparse codes.
    dictionary : numpy.ndarray, shape (n, n)
        Atoms in its columns.
    """

    X: np.ndarray
    codes: np.ndarray
    dictionary: np.ndarray


def bernoulli_gaussian(
    n_samples: int, n: int, *, theta: float, dictionary: Any = None, noise: float = 0.0, rng: RNGLike = None
) -> SparseSamples:
    r"""Samples :math:`y = D^\star x + \text{noise}` whose codes are Bernoulli-Gaussian.

    Parameters
    ----------
    n_samples : int
        Number of samples.
    n : int
        Dimension.
    theta : float
        Probability that a coordinate of a code is not zero, in (0, 1]; non-zeros are standard normal.
    dictionary : array, shape (n, n), optional
        Atoms in its columns; by default a random orthogonal matrix.
    noise : float, default 0.0
        Standard deviation of the noise in each coordinate.
    rng : None, int or numpy.random.Generator
        The seed.

    Returns
    -------
    SparseSamples
        Samples, codes and dictionary.

    Raises
    ------
    ValueError
        If an argument is out of range.
    TypeError
        If an argument is of the wrong type.

    Examples
    --------
    >>> data = bernoulli_gaussian(4, 3, theta=0.5, rng=0)
    >>> data.X.shape, bool(np.allclose(data.X, data.codes @ data.dictionary.T))
    ((4, 3), True)
    """
    n_samples = check_int(n_samples, "n_samples", low=1)
    n = check_int(n, "n", low=1)
    theta = check_float(theta, "theta", low=0, high=1, open_low=True)
    noise = check_float(noise, "noise", low=0)
    check_allocation((n, n), "n")
    check_allocation((n_samples, n), "n_samples")
    rng = check_rng(rng)
    if dictionary is not None:
        dictionary = to_numpy(check_array(dictionary, "dictionary", shape=(n, n))).astype(np.float64)
    codes = np.where(rng.random((n_samples, n)) < theta, rng.standard_normal((n_samples, n)), 0.0)
    if dictionary is None:  # after the codes: else a learner with the same seed would start from the answer
        dictionary = _random_orthogonal(n, rng)
    X = codes @ dictionary.T
    if noise:
        X += noise * rng.standard_normal(X.shape)
    return SparseSamples(X, codes, dictionary)


def lp_objective_and_grad(Y: Array, D: Array, *, p: float = 3.0) -> tuple[float, Array]:
    r"""Mean of :math:`\|D^\top y\|_p^p` over the rows of ``Y``, and its gradient in ``D``.

    The gradient is :math:`\frac pB Y^\top(|Z|^{p-2}\circ Z)` with :math:`Z = YD`.

    Parameters
    ----------
    Y : array, shape (B, n)
        A batch of samples; NumPy, CuPy, torch, JAX or any array-API kind.
    D : array, shape (n, n)
        Dictionary, atoms in its columns; the same kind of array.
    p : float, default 3.0
        Exponent, larger than 2.

    Returns
    -------
    objective : float
        The mean.
    gradient : array, shape (n, n)
        Of the kind of ``Y``.

    Raises
    ------
    ValueError
        If shapes do not fit, ``p`` is not larger than 2, or a value is not finite.
    TypeError
        If an argument is not numeric.

    Examples
    --------
    >>> import numpy as np
    >>> lp_objective_and_grad(np.array([[1.0, -2.0]]), np.eye(2))
    (9.0, array([[  3., -12.],
           [ -6.,  24.]]))
    """
    Y = check_array(Y, "Y", ndim=2)
    D = check_array(D, "D", shape=(Y.shape[1], Y.shape[1]))
    p = check_float(p, "p", low=2, open_low=True)
    xp = array_namespace(Y, D)
    Z = Y @ D  # (B, n)
    size = xp.abs(Z)
    value = float(xp.sum(size**p)) / Y.shape[0]
    return value, (p / Y.shape[0]) * (xp.matrix_transpose(Y) @ (size ** (p - 2) * Z))


def polar_oracle(G: Array) -> Array:
    r"""Orthogonal polar factor of ``G``: the maximiser of :math:`\langle S, G\rangle` over :math:`\|S\|_2\le1`.

    With :math:`G = U\Sigma V^\top` it is :math:`UV^\top` (von Neumann's trace inequality). Where singular values vanish
    the maximiser is not unique; the one returned is orthogonal all the same.

    Parameters
    ----------
    G : array, shape (n, n)
        NumPy, CuPy, torch, JAX or any array-API kind.

    Returns
    -------
    array, shape (n, n)
        Orthogonal, of the kind of ``G``.

    Raises
    ------
    ValueError
        If ``G`` is not square or not finite.
    TypeError
        If ``G`` is not numeric.

    Examples
    --------
    >>> import numpy as np
    >>> polar_oracle(np.array([[0.0, -3.0], [2.0, 0.0]])).round(12)
    array([[ 0., -1.],
           [ 1.,  0.]])
    """
    G = _square(G, "G")
    xp = array_namespace(G)
    U, _, Vt = xp.linalg.svd(G, full_matrices=False)
    return U @ Vt


def fw_gap(G: Array, D: Array) -> float:
    r"""Frank-Wolfe gap :math:`\max_{\|S\|_2\le1}\langle S - D, G\rangle = \|G\|_* - \langle D, G\rangle`.

    For a concave maximisation it bounds the distance to the best value; here, where the objective is convex, it is zero
    exactly at stationary points.

    Parameters
    ----------
    G : array, shape (n, n)
        Gradient at ``D``.
    D : array, shape (n, n)
        A point of the spectral ball; the same kind of array.

    Returns
    -------
    float
        The gap; not negative when :math:`\|D\|_2\le1`.

    Raises
    ------
    ValueError
        If shapes do not fit or a value is not finite.
    TypeError
        If an argument is not numeric.

    Examples
    --------
    >>> import numpy as np
    >>> fw_gap(np.diag([3.0, 2.0]), np.eye(2))
    0.0
    """
    G = _square(G, "G")
    D = check_array(D, "D", shape=tuple(G.shape))
    xp = array_namespace(G, D)
    return float(xp.sum(xp.linalg.svdvals(G))) - float(xp.sum(D * G))


def dictionary_error(D_hat: Array, D_true: Array) -> float:
    r"""Error of a dictionary up to order and signs.

    .. math:: 1 - \frac1n\max_\pi\sum_i|\langle\hat d_i,d_{\pi(i)}\rangle|

    Parameters
    ----------
    D_hat : array, shape (n, n)
        Estimated atoms in its columns, of norm 1.
    D_true : array, shape (n, n)
        True atoms in its columns, of norm 1.

    Returns
    -------
    float
        0 for a signed permutation, at most 1.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or an atom does not have norm 1.
    TypeError
        If an argument is not numeric.

    Notes
    -----
    The matching is an assignment problem, solved by :func:`scipy.optimize.linear_sum_assignment`.

    Examples
    --------
    >>> import numpy as np
    >>> dictionary_error(np.array([[0.0, 1.0], [-1.0, 0.0]]), np.eye(2))
    0.0
    """
    D_hat = to_numpy(_square(D_hat, "D_hat"))
    D_true = to_numpy(check_array(D_true, "D_true", shape=D_hat.shape))
    for name, D in (("D_hat", D_hat), ("D_true", D_true)):
        norms = np.sqrt((D**2).sum(axis=0))
        if abs(norms - 1).max() > 1e-3:
            raise ValueError(
                f"{name} must have columns of norm 1, got norms from {norms.min():.3g} to {norms.max():.3g}"
            )
    overlap = np.abs(D_hat.T @ D_true)
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    return float(max(0.0, 1.0 - overlap[rows, columns].mean()))


class OnlineOrthogonalDictionary(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Orthogonal dictionary learned from mini-batches; keeps two n x n matrices and no data.

    Each step moves towards the polar factor of an averaged gradient, inside the spectral ball:
    :math:`d_t=(1-\rho_t)d_{t-1}+\rho_tg_t`, :math:`D_{t+1}=(1-\gamma_t)D_t+\gamma_t\,\mathrm{polar}(d_t)`,
    :math:`\rho_t=\min(1,\rho_0t^{-a})`, :math:`\gamma_t=\min(1,\gamma_0t^{-b})`.

    Parameters
    ----------
    p : float, default 3.0
        Exponent of the objective, larger than 2.
    batch_size : int, default 10
        Rows per step in ``fit``; ``partial_fit`` takes one step with all the rows it is given.
    step, step_power : float, default 1.0 and 0.75
        :math:`\gamma_0` and b.
    averaging, averaging_power : float, default 1.0 and 0.5
        :math:`\rho_0` and a; ``averaging_power=0`` and ``averaging=1`` switches averaging off.
    precondition : bool, default False
        Whiten by the running second moment first: for dictionaries that are complete but not orthogonal.
    init : "random" or array, shape (n, n), default "random"
        First dictionary, atoms in its columns, of spectral norm at most 1.
    n_passes : int, default 1
        Passes over the rows in ``fit``.
    tol : float, default 0.0
        ``fit`` stops when the running mean of the relative gap falls below; 0 means never.
    rng : None, int or numpy.random.Generator
        Draws the first dictionary.

    Attributes
    ----------
    components_ : array, shape (n, n)
        Orthonormal atoms in its *rows*: the polar factor of the iterate.
    relaxed_dictionary_ : array, shape (n, n)
        The iterate itself, atoms in its columns, inside the spectral ball.
    averaged_gradient_ : array, shape (n, n)
        :math:`d_t`.
    whitening_ : array, shape (n, n)
        What rows are multiplied by first; the identity unless ``precondition``.
    gap_history_ : numpy.ndarray, shape (t,)
        Gap estimates :math:`\|d_t\|_* - \langle D_t, d_t\rangle`, one per step.
    n_steps_ : int
        Steps so far.
    n_features_in_ : int
        n.

    Notes
    -----
    Time :math:`O(Bn^2+n^3)` a step, in double precision; codes have the precision of the rows. The polar factor
    comes from Newton-Schulz iterations (products only) where they
    converge, from an SVD where not. A batch of zeros decays the averaged gradient and leaves the dictionary alone while
    that is zero. NumPy arrays run in a compiled loop, CuPy arrays in whole-array operations.

    Examples
    --------
    >>> data = bernoulli_gaussian(20_000, 8, theta=0.2, rng=0)
    >>> model = OnlineOrthogonalDictionary(rng=0).fit(data.X)
    >>> dictionary_error(model.components_.T, data.dictionary) < 1e-3
    True
    """

    _state: _State

    def __init__(
        self,
        *,
        p: float = 3.0,
        batch_size: int = 10,
        step: float = 1.0,
        step_power: float = 0.75,
        averaging: float = 1.0,
        averaging_power: float = 0.5,
        precondition: bool = False,
        init: Literal["random"] | Array = "random",
        n_passes: int = 1,
        tol: float = 0.0,
        rng: RNGLike = None,
    ) -> None:
        self.p = p
        self.batch_size = batch_size
        self.step = step
        self.step_power = step_power
        self.averaging = averaging
        self.averaging_power = averaging_power
        self.precondition = precondition
        self.init = init
        self.n_passes = n_passes
        self.tol = tol
        self.rng = rng

    def fit(self, X: Array, y: Any = None) -> OnlineOrthogonalDictionary:
        """Forget everything, then take one step per ``batch_size`` rows, in their order.

        Parameters
        ----------
        X : array, shape (m, n)
            Samples, one per row.
        y : None
            Ignored.

        Returns
        -------
        OnlineOrthogonalDictionary
            The estimator itself.

        Raises
        ------
        ValueError
            If ``X`` is not a finite matrix or a parameter is out of range.
        """
        X = self._check_X(X, reset=True)
        size = check_int(self.batch_size, "batch_size", low=1)
        n_passes = check_int(self.n_passes, "n_passes", low=1)
        return self._learn(X, min(size, X.shape[0]), n_passes, fresh=True)

    def partial_fit(self, X: Array, y: Any = None) -> OnlineOrthogonalDictionary:
        """Take one step with all rows of ``X`` as the batch.

        Parameters
        ----------
        X : array, shape (B, n)
            Samples, one per row.
        y : None
            Ignored.

        Returns
        -------
        OnlineOrthogonalDictionary
            The estimator itself.

        Raises
        ------
        ValueError
            If ``X`` is not a finite matrix, its width has changed, or a parameter is out of range.
        """
        fresh = not hasattr(self, "n_steps_")
        X = self._check_X(X, reset=fresh)
        return self._learn(X, X.shape[0], 1, fresh=fresh)

    def transform(self, X: Array) -> Array:
        """Codes of the rows of ``X``.

        Parameters
        ----------
        X : array, shape (m, n)
            Samples.

        Returns
        -------
        array, shape (m, n)
            ``X @ whitening_ @ components_.T``.

        Raises
        ------
        ValueError
            If ``X`` is not a finite matrix of width n.
        NotFittedError
            Before ``fit``.
        """
        check_is_fitted(self, "n_steps_")
        X = self._check_X(X, reset=False)
        if self.precondition:
            X = X @ from_numpy(to_numpy(self.whitening_), like=X)
        return X @ self._as(X, self.components_).T

    def inverse_transform(self, Z: Array) -> Array:
        """Samples of given codes.

        Parameters
        ----------
        Z : array, shape (m, n)
            Codes.

        Returns
        -------
        array, shape (m, n)
            ``Z @ components_``, whitening undone.

        Raises
        ------
        ValueError
            If ``Z`` is not a finite matrix of width n.
        NotFittedError
            Before ``fit``.
        """
        check_is_fitted(self, "n_steps_")
        Z = check_array(Z, "Z", shape=(None, self.n_features_in_))
        X = Z @ self._as(Z, self.components_)
        return X @ self._as(X, np.linalg.inv(to_numpy(self.whitening_))) if self.precondition else X

    def _as(self, like: Array, matrix: Array) -> Array:
        return from_numpy(to_numpy(matrix).astype(str(like.dtype), copy=False), like=like)

    def _check_X(self, X: Array, *, reset: bool) -> Array:
        if kind_of(X) == "cupy":  # scikit-learn would ask for its array API switch
            X = check_array(X, "X", ndim=2)
            if reset:
                self.n_features_in_ = X.shape[1]
            return check_array(X, "X", shape=(None, self.n_features_in_), finite=False)
        try:
            return validate_data(self, X, dtype=[np.float64, np.float32], reset=reset)
        except TypeError as error:
            raise TypeError(f"X must be a matrix of real numbers: {error}") from None

    def _rule(self) -> _Rule:
        return _Rule(
            check_float(self.p, "p", low=2, open_low=True, high=100),
            check_float(self.step, "step", low=0, open_low=True),
            check_float(self.step_power, "step_power", low=0),
            check_float(self.averaging, "averaging", low=0, open_low=True),
            check_float(self.averaging_power, "averaging_power", low=0),
            check_float(self.tol, "tol", low=0),
        )

    def _learn(self, X: Array, size: int, n_passes: int, *, fresh: bool) -> OnlineOrthogonalDictionary:
        rule, n = self._rule(), X.shape[1]
        precondition = check_bool(self.precondition, "precondition")
        rng = check_rng(self.rng)
        xp = array_namespace(X)
        check_allocation((n_passes, -(-X.shape[0] // size)), "n_passes")
        limit = 10 ** (100 / rule.p)
        if float(xp.max(xp.abs(X))) > limit:
            raise ValueError(f"X must stay below {limit:.3g} in size, or powers of it overflow: rescale it")
        if fresh:
            D = from_numpy(_first_dictionary(self.init, n, rng), like=X)
            zero = xp.zeros_like(D)
            state = _State(D, zero, D, zero, 0, 0, np.zeros(0))
        else:
            state = self._state
            if kind_of(state.D) != kind_of(X):
                raise ValueError("X must be of the kind of array that the first call got")
        run = _stream_numpy if kind_of(X) == "numpy" else _stream_arrays
        state, whitening = run(X, size, n_passes, state, rule, precondition)
        self._state = state
        self.relaxed_dictionary_, self.averaged_gradient_ = state.D, state.d
        self.n_steps_, self.gap_history_ = state.n_steps, state.gaps
        self.whitening_ = whitening
        self.components_ = polar_oracle(state.D).T
        self._n_features_out = n
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class _Rule(NamedTuple):
    """Checked parameters."""

    p: float
    step: float
    step_power: float
    averaging: float
    averaging_power: float
    tol: float


class _State(NamedTuple):
    """What is carried from batch to batch."""

    D: Array  # (n, n) iterate, atoms in columns
    d: Array  # (n, n) averaged gradient
    S: Array  # (n, n) last polar factor
    moment: Array  # (n, n) running second moment
    n_seen: int
    n_steps: int
    gaps: np.ndarray  # (n_steps,)


def _square(x: Array, name: str) -> Array:
    x = check_array(x, name, ndim=2)
    if x.shape[0] != x.shape[1]:
        raise ValueError(f"{name} must be square, got shape {tuple(x.shape)}")
    return x


def _random_orthogonal(n: int, rng: np.random.Generator) -> np.ndarray:
    return ortho_group.rvs(n, random_state=rng) if n > 1 else np.where(rng.random((1, 1)) < 0.5, -1.0, 1.0)


def _first_dictionary(init: Any, n: int, rng: np.random.Generator) -> np.ndarray:
    if isinstance(init, str):
        if init != "random":
            raise ValueError(f"init must be 'random' or an array, got {init!r}")
        return _random_orthogonal(n, rng)
    D = to_numpy(check_array(init, "init", shape=(n, n))).astype(np.float64)
    if np.linalg.norm(D, 2) > 1 + 1e-6:
        raise ValueError(f"init must have spectral norm at most 1, got {np.linalg.norm(D, 2):.3g}")
    return D


def _stream_numpy(
    X: np.ndarray, size: int, n_passes: int, state: _State, rule: _Rule, precondition: bool
) -> tuple[_State, np.ndarray]:
    """All batches in one compiled loop; the matrices are small, so BLAS works on one thread."""
    X = np.ascontiguousarray(X, dtype=np.float64)
    D, d, S, moment = (np.array(m, dtype=np.float64, order="C") for m in (state.D, state.d, state.S, state.moment))
    gaps = np.empty(n_passes * -(-len(X) // size))
    with threadpool_limits(1, user_api="blas") if len(gaps) > 20 else contextlib.nullcontext():  # asking takes a while
        steps, seen, whitening = _steps(
            X, size, n_passes, D, d, S, moment, state.n_seen, state.n_steps, rule, precondition, gaps
        )
    return _State(D, d, S, moment, seen, state.n_steps + steps, np.concatenate([state.gaps, gaps[:steps]])), whitening


@njit(cache=True, error_model="numpy")
def _steps(
    X: np.ndarray,
    size: int,
    n_passes: int,
    D: np.ndarray,
    d: np.ndarray,
    S: np.ndarray,
    moment: np.ndarray,
    seen: int,
    t: int,
    rule: _Rule,
    precondition: bool,
    gaps: np.ndarray,
) -> tuple[int, int, np.ndarray]:
    """Steps of Algorithm 1 in place; (steps taken, rows seen, whitening matrix)."""
    whitening = np.eye(len(D))
    running, done, slow = 1.0, 0, 0
    for _ in range(n_passes):
        for start in range(0, len(X), size):
            Y = X[start : start + size]
            if precondition:
                seen += len(Y)
                moment += (np.dot(Y.T, Y) - len(Y) * moment) / seen
                whitening = _inverse_root(moment)
                Y = np.dot(Y, whitening)
            Z = np.dot(Y, D)  # 1.
            for i in range(Z.shape[0]):
                for j in range(Z.shape[1]):
                    size_ij = abs(Z[i, j])
                    Z[i, j] *= size_ij if rule.p == 3.0 else size_ij ** (rule.p - 2.0)
            t += 1
            rho = min(1.0, rule.averaging * t**-rule.averaging_power)
            d *= 1.0 - rho  # 2.
            d += (rho * rule.p / len(Y)) * np.dot(Y.T, Z)
            scale = np.abs(d).max()
            if scale == 0.0:  # nothing but zeros so far: no direction to go
                gaps[done] = 0.0
                done += 1
                continue
            ok = False
            if slow == 0:  # 3. products only, where they converge
                ok = _newton_schulz(d, S)
                slow = 0 if ok else 10
            if not ok:
                slow = max(0, slow - 1)
                U, s, Vt = np.linalg.svd(d)
                if s[-1] <= 1e-12 * s[0]:  # not unique: the maximiser nearest to the last one
                    U, s, Vt = np.linalg.svd(d + 1e-6 * s[0] * S)
                S[:] = np.dot(U, Vt)
            nuclear, inner = 0.0, 0.0
            for i in range(len(d)):
                for j in range(len(d)):
                    nuclear += S[i, j] * d[i, j]
                    inner += D[i, j] * d[i, j]
            gaps[done] = max(0.0, nuclear - inner)
            gamma = min(1.0, rule.step * t**-rule.step_power)
            D += gamma * (S - D)  # 4.
            running += 0.02 * (gaps[done] / nuclear - running)
            done += 1
            if running < rule.tol:
                return done, seen, whitening
    return done, seen, whitening


@njit(cache=True, error_model="numpy")
def _newton_schulz(G: np.ndarray, S: np.ndarray) -> bool:
    """Polar factor of ``G`` into ``S`` by S <- S (3 I - S'S) / 2; False, and S as it was, if that converges slowly."""
    n = len(G)
    X = G * np.sqrt(n / (G**2).sum())  # singular values of mean square 1
    for sweep in range(12):
        gram = np.dot(X.T, X)
        if sweep == 0:  # they must be below sqrt(3): row sums bound their squares
            bound = 0.0
            for i in range(n):
                bound = max(bound, np.abs(gram[i]).sum())
            if bound > 2.9:
                X *= np.sqrt(2.9 / bound)
                gram *= 2.9 / bound
        off = 0.0
        for i in range(n):
            for j in range(n):
                off = max(off, abs(gram[i, j] - (1.0 if i == j else 0.0)))
                gram[i, j] = (1.5 if i == j else 0.0) - gram[i, j] / 2
        X = np.dot(X, gram)
        if off < 1e-5:  # the step just taken squared it
            S[:] = X
            return True
    return False


@njit(cache=True, error_model="numpy")
def _inverse_root(moment: np.ndarray) -> np.ndarray:
    """Inverse square root of a second moment; directions not yet seen are left alone."""
    values, vectors = np.linalg.eigh(moment)
    top = values[-1]
    for i in range(len(values)):
        values[i] = 1.0 / np.sqrt(values[i]) if values[i] > 1e-6 * top and top > 0 else 0.0
    return np.dot(vectors * values, vectors.T)


def _stream_arrays(
    X: Array, size: int, n_passes: int, state: _State, rule: _Rule, precondition: bool
) -> tuple[_State, Array]:
    """The same steps in whole-array operations, on whatever device the arrays are."""
    xp, n = array_namespace(X), X.shape[1]
    D, d, S, moment, seen, t, old = state
    gaps, running, whitening = [], 1.0, xp.eye(n, dtype=xp.float64)
    for _ in range(n_passes):
        for start in range(0, X.shape[0], size):
            Y = xp.astype(X[start : start + size, :], xp.float64)
            if precondition:
                seen += Y.shape[0]
                moment = moment + (xp.matrix_transpose(Y) @ Y - Y.shape[0] * moment) / seen
                values, vectors = xp.linalg.eigh(moment)
                kept = values > 1e-6 * values[-1]
                whitening = (vectors * xp.where(kept, 1 / xp.sqrt(xp.abs(values) + 1e-30), 0.0)) @ vectors.T
                Y = Y @ whitening
            _, g = lp_objective_and_grad(Y, D, p=rule.p)
            t += 1
            rho = min(1.0, rule.averaging * t**-rule.averaging_power)
            d = (1 - rho) * d + rho * g
            if not bool(xp.any(d != 0)):
                gaps.append(0.0)
                continue
            S = polar_oracle(d)
            nuclear = float(xp.sum(S * d))
            gaps.append(max(0.0, nuclear - float(xp.sum(D * d))))
            D = D + min(1.0, rule.step * t**-rule.step_power) * (S - D)
            running += 0.02 * (gaps[-1] / nuclear - running)
            if running < rule.tol:
                break
    return _State(D, d, S, moment, seen, t, np.concatenate([old, gaps])), whitening
