"""Gaussian mixture learned in one pass over a stream, in O(K D^2) per point: precisions, updated by one rank-one step.

Two rules for the covariance: ``update="exact"`` keeps the weighted moments of what was seen; ``update="published"`` is
the recursion of the papers, which loses positive definiteness on some second points of a young component.

References: R. C. Pinto, P. M. Engel, PLOS ONE 10(10):e0139931, 2015 (arXiv 1506.04422); arXiv 1701.03940, 2017.
Chapter: notebooks/inference/incremental_gmm.ipynb.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numba import njit
from scipy.special import chdtri
from sklearn.base import BaseEstimator, ClassifierMixin, DensityMixin, clone
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from algokit.arrays import Array, array_namespace, from_numpy, kind_of, to_numpy
from algokit.checks import (
    check_allocation,
    check_array,
    check_bool,
    check_float,
    check_int,
    check_one_of,
    check_state,
)

__all__ = [
    "GaussianMixtureSummary",
    "IncrementalGaussianMixture",
    "IncrementalMixtureClassifier",
    "MixtureMoments",
    "RankOneUpdate",
    "rank_one_inverse_update",
]

MIN_PIVOT = 1e-12  # a step that divides the variance along e by more than 1e12 has lost positive definiteness
MIN_MASS = 1e-6  # points; a component with less of a chunk leaves them to the others
MIN_RESPONSIBILITY = 1e-12  # below it a component's mean and precision would not move: they are left alone
FAR = 1e100  # largest |x| in initial scales: beyond it squared distances could overflow
LOG_2_PI = math.log(2 * math.pi)


class RankOneUpdate(NamedTuple):
    """Inverse and log-determinant after a rank-one step.

    Attributes
    ----------
    precision : array, shape (D, D)
        Inverse of the new matrix, symmetric.
    log_det : float
        Natural logarithm of the determinant of the new matrix (not of its inverse).
    """

    precision: Array
    log_det: float


def rank_one_inverse_update(
    precision: Array, log_det: float, u: Array, *, scale: float = 1.0, weight: float
) -> RankOneUpdate:
    r"""Inverse and log-determinant of :math:`aC + w\,uu^\top` from those of :math:`C`, in :math:`O(D^2)`.

    Sherman and Morrison's formula with the matrix determinant lemma. With :math:`\Lambda = C^{-1}`,
    :math:`g = \Lambda u` and :math:`q = 1 + \tfrac{w}{a}\,u^\top g`:

    .. math::
        (aC + w\,uu^\top)^{-1} = \frac1a\Big(\Lambda - \frac{w\,gg^\top}{a\,q}\Big), \qquad
        \log|aC + w\,uu^\top| = D\log a + \log|C| + \log q .

    Parameters
    ----------
    precision : array, shape (D, D), NumPy, CuPy, torch or JAX
        :math:`\Lambda`, symmetric and positive definite (only its symmetry and its diagonal are checked: a
        factorisation would cost more than the update).
    log_det : float
        :math:`\log|C|`, which is :math:`-\log|\Lambda|`.
    u : array, shape (D,)
        Direction of the step, the same kind of array.
    scale : float, default 1
        :math:`a`, positive.
    weight : float
        :math:`w`, of either sign.

    Returns
    -------
    RankOneUpdate
        The new precision, of the kind and dtype of ``precision``, and the new log-determinant.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, ``scale`` is not positive, ``precision`` is not symmetric with a
        positive diagonal, or the new matrix is not positive definite (``q <= 0``), in which case ``weight`` is named.
    TypeError
        If an argument is not numeric.

    Notes
    -----
    Source: J. Sherman and W. J. Morrison, Ann. Math. Statist. 21(1):124-127, 1950.

    Examples
    --------
    >>> import numpy as np
    >>> new = rank_one_inverse_update(np.eye(2), 0.0, np.array([1.0, 0.0]), weight=3.0)  # C = diag(4, 1)
    >>> new.precision.diagonal(), round(new.log_det, 4)  # log 4
    (array([0.25, 1.  ]), 1.3863)
    """
    precision = check_array(precision, "precision", ndim=2, shape=(None, None))
    D = precision.shape[0]
    precision = check_array(precision, "precision", shape=(D, D))
    log_det = check_float(log_det, "log_det")
    u = check_array(u, "u", shape=(D,))
    scale = check_float(scale, "scale", low=0, open_low=True)
    weight = check_float(weight, "weight")
    xp = array_namespace(precision, u)
    diagonal = xp.linalg.diagonal(precision)
    largest = float(xp.max(xp.abs(precision)))
    asymmetry = float(xp.max(xp.abs(precision - xp.linalg.matrix_transpose(precision))))
    if float(xp.min(diagonal)) <= 0 or asymmetry > 1e-6 * largest:
        raise ValueError("precision must be symmetric with a positive diagonal")
    g = precision @ u  # (D,)
    d2 = float(u @ g)
    q = 1 + weight / scale * d2
    outer = weight / (scale * q) * (g[:, None] * g[None, :]) if q else precision  # symmetric: products commute
    new = (precision - outer) / scale
    if not (math.isfinite(d2) and math.isfinite(q) and bool(xp.all(xp.isfinite(new)))):
        raise ValueError(f"u, weight and scale must leave numbers finite, got weight {weight:g}, u'precision u {d2:g}")
    if d2 < 0 or q <= 0:
        raise ValueError(f"weight must leave the matrix positive definite, got 1 + weight/scale * d2 = {q:g}")
    return RankOneUpdate(new, D * math.log(scale) + log_det + math.log(q))


class IncrementalGaussianMixture(DensityMixin, BaseEstimator):
    r"""Gaussian mixture with full covariances, learned from a stream in one pass; it decides how many components.

    A point farther than a :math:`\chi^2` quantile from every component becomes a component of its own; any other point
    updates all components by their responsibilities. Time :math:`O(KD^2)` a point, memory :math:`O(KD^2)`; no point is
    kept.

    Parameters
    ----------
    delta : float, default 1.0
        Size of a new component: its standard deviation in each coordinate is ``delta * scale``.
    beta : float, default 0.1
        Novelty level in [0, 1): a point is novel when the squared distance to each component is beyond the
        ``1 - beta`` quantile of :math:`\chi^2_D`. With 0 there is one component for ever.
    scale : float or array, shape (D,), optional
        Typical spread of the coordinates, in their units. By default the standard deviations of the first batch
        (constant coordinates get the smallest positive one, or 1).
    min_age, min_mass : int and float, default 5 and 3
        A component older than ``min_age`` updates whose mass (sum of responsibilities) is below ``min_mass`` is
        removed; the last one never is.
    prune : bool, default True
        Whether components are removed at all.
    max_components : int, optional
        With so many, a novel point updates instead. By default there is no limit but memory.
    update : {"exact", "published"}, default "exact"
        Coefficient of the covariance step: :math:`\omega(1-\omega)`, the weighted moments; or the papers'
        :math:`\omega(1-3\omega+\omega^2)`, whose steps that are not positive definite are skipped and counted.
    representation : {"precision", "covariance"}, default "precision"
        What is stored. ``"covariance"`` factorises every covariance at every point, :math:`O(KD^3)`: the algorithm
        before the two papers, kept as a baseline.

    Attributes
    ----------
    means_ : array, shape (K, D)
        Means, in the order in which the surviving components were created (a removed one is replaced by the last).
    precisions_, covariances_ : array, shape (K, D, D)
        Inverse covariances and covariances.
    log_dets_ : array, shape (K,)
        Log-determinants of the covariances.
    masses_ : array, shape (K,)
        Sums of responsibilities; without pruning they add up to the number of points seen.
    ages_ : array of int, shape (K,)
        Number of updates since creation, plus one.
    weights_ : array, shape (K,)
        Masses divided by their sum.
    n_components_ : int
        K.
    n_rejected_ : int
        Steps skipped because the covariance would not have stayed positive definite (only ``update="published"``).
    n_features_in_ : int
        D.

    Notes
    -----
    The state is kept in double precision; results have the dtype of the ``X`` they were asked for. NumPy arrays run
    on the CPU. CuPy arrays run on the GPU, which pays from about D = 512 or K = 64: the points of a stream come one
    after the other, so only K and D give parallel work.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = np.concatenate([rng.normal(0, 1, (200, 2)), rng.normal(9, 1, (200, 2))])
    >>> mixture = IncrementalGaussianMixture(delta=0.3, beta=0.01).fit(X)
    >>> mixture.n_components_
    2
    >>> mixture.reconstruct(np.array([[9.0, np.nan]])).round()
    array([[9., 9.]])
    """

    _state: _State

    def __init__(
        self,
        *,
        delta: float = 1.0,
        beta: float = 0.1,
        scale: float | Array | None = None,
        min_age: int = 5,
        min_mass: float = 3.0,
        prune: bool = True,
        max_components: int | None = None,
        update: Literal["exact", "published"] = "exact",
        representation: Literal["precision", "covariance"] = "precision",
    ) -> None:
        self.delta = delta
        self.beta = beta
        self.scale = scale
        self.min_age = min_age
        self.min_mass = min_mass
        self.prune = prune
        self.max_components = max_components
        self.update = update
        self.representation = representation

    def fit(self, X: Array, y: Any = None) -> IncrementalGaussianMixture:
        """Forget everything, then learn the rows of ``X`` in their order.

        Parameters
        ----------
        X : array, shape (n, D)
            Points, all finite.
        y : object, optional
            Ignored.

        Returns
        -------
        IncrementalGaussianMixture
            Itself.

        Raises
        ------
        ValueError
            If ``X`` or a parameter is out of order, or ``scale`` is missing and ``X`` has one row.
        """
        return self._learn(X, reset=True)

    def partial_fit(self, X: Array, y: Any = None) -> IncrementalGaussianMixture:
        """Learn the rows of ``X`` in their order, after those learned before.

        Parameters
        ----------
        X : array, shape (n, D)
            Points, all finite. The first batch sets the scale unless ``scale`` is given.
        y : object, optional
            Ignored.

        Returns
        -------
        IncrementalGaussianMixture
            Itself.

        Raises
        ------
        ValueError
            If ``X`` or a parameter is out of order, or the number of columns has changed.
        """
        return self._learn(X, reset=not hasattr(self, "n_components_"))

    def score_samples(self, X: Array) -> Array:
        """Log-density of each row.

        Parameters
        ----------
        X : array, shape (n, D)
            Points.

        Returns
        -------
        array, shape (n,)
            Natural logarithms, in nats.
        """
        X = self._check_X(X)
        return _as_dtype(_log_sum_exp(self._log_joint(X)), X)

    def score(self, X: Array, y: Any = None) -> float:
        """Mean log-density of the rows.

        Parameters
        ----------
        X : array, shape (n, D)
            Points.
        y : object, optional
            Ignored.

        Returns
        -------
        float
            In nats a point.
        """
        return float(self.score_samples(X).mean())

    def predict(self, X: Array) -> Array:
        """Most responsible component of each row.

        Parameters
        ----------
        X : array, shape (n, D)
            Points.

        Returns
        -------
        array of int, shape (n,)
            Indices into ``means_``.
        """
        return self._log_joint(self._check_X(X)).argmax(axis=1)

    def predict_proba(self, X: Array) -> Array:
        """Responsibility of each component for each row.

        Parameters
        ----------
        X : array, shape (n, D)
            Points.

        Returns
        -------
        array, shape (n, K)
            Rows add up to 1.
        """
        X = self._check_X(X)
        return _as_dtype(_softmax(self._log_joint(X)), X)

    def reconstruct(self, X: Array) -> Array:
        r"""Rows of ``X`` with every NaN replaced by its conditional mean given the row's other entries.

        With missing coordinates t and given ones i, component j answers
        :math:`\mu_t - \Lambda_{tt}^{-1}\Lambda_{ti}(x_i - \mu_i)`; answers are weighted by the responsibilities under
        the marginal density of :math:`x_i`. Rows with the same pattern of NaN are answered together, and only
        systems as large as t are solved.

        Parameters
        ----------
        X : array, shape (n, D)
            Points; NaN marks what is missing.

        Returns
        -------
        array, shape (n, D)
            A copy without NaN. A row without NaN comes back unchanged; one of NaN alone becomes the mixture's mean.

        Raises
        ------
        ValueError
            If ``X`` holds an infinity or has the wrong number of columns.
        """
        X = self._check_X(X, missing=True)
        xp, out = array_namespace(X), X.astype(np.float64)
        missing = np.isnan(to_numpy(X))  # (n, D)
        patterns, group = missing[:1], np.zeros(len(missing), dtype=int)
        if (missing != missing[0]).any():
            patterns, group = np.unique(missing, axis=0, return_inverse=True)
        for p, pattern in enumerate(patterns):
            if pattern.any():
                rows, t = xp.asarray(np.flatnonzero(group.reshape(-1) == p)), xp.asarray(np.flatnonzero(pattern))
                out[rows[:, None], t] = self._conditional_means(out[rows], t)
        return _as_dtype(out, X)

    def _conditional_means(self, X: Array, t: Array) -> Array:
        """Coordinates ``t`` of the rows of ``X`` (m, D), which are NaN there and nowhere else; shape (m, |t|)."""
        xp, mean, precision = array_namespace(X), self.means_, self._precisions()
        block = precision[:, t[:, None], t]  # Lambda_tt, (K, |t|, |t|)
        offset = xp.log(self.weights_) - 0.5 * (self.log_dets_ + xp.linalg.slogdet(block)[1])  # with log |C_ii|
        answer = xp.empty((len(X), len(t)))
        step = max(1, 2**22 // mean.size)  # rows at a time: 32 MB
        for start in range(0, len(X), step):
            y = X[start : start + step] - mean[:, None]  # (K, m, D)
            y[:, :, t] = 0.0
            v = xp.matmul(y, precision)  # (K, m, D): Lambda_ii y_i and Lambda_ti y_i
            v_t = v[:, :, t]
            shift = xp.linalg.solve(block, v_t.swapaxes(1, 2)).swapaxes(1, 2)  # (K, m, |t|)
            d2 = (v * y).sum(axis=2) - (v_t * shift).sum(axis=2)  # (K, m), by the marginal precision
            r = _softmax(offset - 0.5 * xp.maximum(d2, 0.0).T)  # (m, K)
            answer[start : start + step] = (r.T[:, :, None] * (mean[:, t][:, None] - shift)).sum(axis=0)
        return answer

    @property
    def means_(self) -> Array:
        """Means, shape (K, D): a view of the state, like the masses and ages."""
        return self._state.means[: self._state.n]

    @property
    def precisions_(self) -> Array:
        """Inverse covariances, shape (K, D, D): a copy."""
        return self._precisions().copy()

    @property
    def covariances_(self) -> Array:
        """Covariances, shape (K, D, D): a copy."""
        stored = self._state.symmetric()
        return stored.copy() if self._state.covariance else _inverse(stored)

    @property
    def log_dets_(self) -> Array:
        """Log-determinants of the covariances, shape (K,)."""
        return self._state.log_dets[: self._state.n]

    @property
    def masses_(self) -> Array:
        """Sums of responsibilities, shape (K,): a view, which may be written to (lower masses forget faster)."""
        return self._state.masses[: self._state.n]

    @property
    def ages_(self) -> Array:
        """Updates since creation, plus one, shape (K,)."""
        return self._state.ages[: self._state.n]

    @property
    def weights_(self) -> Array:
        """Mixing proportions, shape (K,)."""
        return self.masses_ / self.masses_.sum()

    def _learn(self, X: Array, *, reset: bool) -> IncrementalGaussianMixture:
        X = self._check_X(X, reset=reset)
        rules = self._check_rules(X.shape[1])
        if reset:
            variance = (self.delta * _initial_scale(X, self.scale)) ** 2
            state = _State.empty(variance, rules.covariance, like=X)
        else:
            state = self._state
            if state.covariance != rules.covariance or kind_of(X) != kind_of(state.means):
                raise ValueError("representation and the kind of array of X must stay as in the first partial_fit")
        _check_not_far(X, state.variance)
        rejected = state.n_rejected
        learn = _learn_points if kind_of(X) == "numpy" else _learn_batched
        learn(X.astype(np.float64), state, rules)
        self._state = state
        self.n_components_ = state.n
        self.n_rejected_ = state.n_rejected
        if state.n_rejected and not rejected:
            warnings.warn(
                "update='published' asked for covariances that are not positive definite; those steps were skipped "
                "and are counted in n_rejected_ (update='exact' has none)",
                RuntimeWarning,
                stacklevel=3,
            )
        return self

    def _check_rules(self, D: int) -> _Rules:
        """The parameters, checked, in the form that the kernels take."""
        check_float(self.delta, "delta", low=0, open_low=True, high=1e50)
        beta = check_float(self.beta, "beta", low=0, high=1, open_high=True)
        min_age = check_int(self.min_age, "min_age", low=0, high=2**62)
        min_mass = check_float(self.min_mass, "min_mass", low=0)
        most = 2**62 if self.max_components is None else check_int(self.max_components, "max_components", low=1)
        return _Rules(
            threshold=float(chdtri(D, beta)) if beta > 0 else math.inf,
            max_components=min(most, 2**62),
            published=check_one_of(self.update, "update", ("exact", "published")) == "published",
            min_age=min_age if check_bool(self.prune, "prune") else 2**62,
            min_mass=min_mass,
            covariance=check_one_of(self.representation, "representation", ("precision", "covariance")) == "covariance",
        )

    def _check_X(self, X: Array, *, reset: bool | None = None, missing: bool = False) -> Array:
        """``X``, checked. ``reset`` is None for queries: then the estimator must be fitted."""
        if reset is None:
            check_is_fitted(self, "n_components_")
        if not reset and self._is_plain(X, missing):
            pass
        elif kind_of(X) != "cupy":
            finite = "allow-nan" if missing else True
            X = _validated(self, X, reset=bool(reset), ensure_all_finite=finite)
        else:  # scikit-learn would ask for its array API switch
            X = check_array(X, "X", ndim=2, finite=not missing)
            if reset:
                self.n_features_in_ = X.shape[1]
            X = check_array(X, "X", shape=(None, self.n_features_in_), finite=False)
        if reset is None:
            _check_not_far(X, self._state.variance)
        return X

    def _precisions(self) -> Array:
        stored = self._state.symmetric()
        return _inverse(stored) if self._state.covariance else stored

    def _is_plain(self, X: Array, missing: bool) -> bool:
        """Whether ``X`` is fine at a glance: a row of a stream takes less time than scikit-learn's full validation."""
        return (
            type(X) is np.ndarray
            and X.dtype in (np.float64, np.float32)
            and X.ndim == 2
            and X.shape[1] == self.n_features_in_
            and len(X) > 0
            and not hasattr(self, "feature_names_in_")
            and not (np.isinf(X).any() if missing else not np.isfinite(X).all())
        )

    def _log_joint(self, X: Array) -> Array:
        """Log of weight times density, shape (n, K)."""
        xp, D = array_namespace(X), X.shape[1]
        X = X.astype(np.float64)
        joint = xp.empty((len(X), self.n_components_))
        offset = xp.log(self.weights_) - 0.5 * (D * LOG_2_PI + self.log_dets_)  # (K,)
        for j, precision in enumerate(self._precisions()):
            e = X - self.means_[j]  # (n, D)
            joint[:, j] = offset[j] - 0.5 * ((e @ precision) * e).sum(axis=1)
        return joint


class IncrementalMixtureClassifier(ClassifierMixin, BaseEstimator):
    """Classifier by an incremental mixture over features and one-hot labels together, learned in one pass.

    The label of a point is read off as its missing coordinates: the conditional mean of the one-hot block, weighted
    over the components. With ``beta=0`` (one component) this is least-squares classification with a ridge penalty.

    Parameters
    ----------
    delta, beta, scale, min_age, min_mass, prune, max_components, update, representation : object
        As in :class:`IncrementalGaussianMixture`; ``scale`` is about the features. The one-hot coordinates get the
        standard deviation that they have with equally frequent classes.

    Attributes
    ----------
    classes_ : array, shape (n_classes,)
        Labels, sorted.
    mixture_ : IncrementalGaussianMixture
        The joint model: features first, then one coordinate per class.
    n_features_in_ : int
        Number of features.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = np.concatenate([rng.normal(0, 1, (50, 2)), rng.normal(4, 1, (50, 2))])
    >>> y = np.repeat(["near", "far"], 50)
    >>> IncrementalMixtureClassifier(beta=0.0).fit(X, y).predict([[0.0, 0.0], [4.0, 4.0]])
    array(['near', 'far'], dtype='<U4')
    """

    classes_: np.ndarray
    mixture_: IncrementalGaussianMixture

    def __init__(
        self,
        *,
        delta: float = 1.0,
        beta: float = 0.1,
        scale: float | Array | None = None,
        min_age: int = 5,
        min_mass: float = 3.0,
        prune: bool = True,
        max_components: int | None = None,
        update: Literal["exact", "published"] = "exact",
        representation: Literal["precision", "covariance"] = "precision",
    ) -> None:
        self.delta = delta
        self.beta = beta
        self.scale = scale
        self.min_age = min_age
        self.min_mass = min_mass
        self.prune = prune
        self.max_components = max_components
        self.update = update
        self.representation = representation

    def fit(self, X: Array, y: Any) -> IncrementalMixtureClassifier:
        """Forget everything, then learn the rows in their order.

        Parameters
        ----------
        X : array, shape (n, D)
            Features, all finite.
        y : array, shape (n,)
            Labels: numbers or strings.

        Returns
        -------
        IncrementalMixtureClassifier
            Itself.

        Raises
        ------
        ValueError
            If an argument or a parameter is out of order.
        """
        return self._learn(X, y, None, reset=True)

    def partial_fit(self, X: Array, y: Any, classes: Any = None) -> IncrementalMixtureClassifier:
        """Learn the rows in their order, after those learned before.

        Parameters
        ----------
        X : array, shape (n, D)
            Features. The first batch sets the scale unless ``scale`` is given.
        y : array, shape (n,)
            Labels.
        classes : array, optional
            All labels that will ever come; by default those of the first batch.

        Returns
        -------
        IncrementalMixtureClassifier
            Itself.

        Raises
        ------
        ValueError
            If a label is not among the classes, or ``classes`` differs from what it was.
        """
        return self._learn(X, y, classes, reset=not hasattr(self, "mixture_"))

    def predict(self, X: Array) -> np.ndarray:
        """Most likely label of each row.

        Parameters
        ----------
        X : array, shape (n, D)
            Features.

        Returns
        -------
        numpy.ndarray, shape (n,)
            Labels out of ``classes_``.
        """
        answers = self._answers(X)
        return self.classes_[answers.argmax(axis=1)]

    def predict_proba(self, X: Array) -> np.ndarray:
        """Conditional mean of the one-hot block, cut at 0 and rescaled to add up to 1.

        Parameters
        ----------
        X : array, shape (n, D)
            Features.

        Returns
        -------
        numpy.ndarray, shape (n, n_classes)
            Least-squares estimates of the probabilities, which is why cutting is needed.
        """
        positive = np.maximum(self._answers(X), 0.0)
        return positive / positive.sum(axis=1, keepdims=True)

    def _learn(self, X: Array, y: Any, classes: Any, *, reset: bool) -> IncrementalMixtureClassifier:
        X, y = _validated(self, X, y, reset=reset)
        check_classification_targets(y)
        known = np.unique(y) if classes is None else _check_classes(classes)
        if not reset:
            if classes is not None and not np.array_equal(known, self.classes_):
                raise ValueError(f"classes must stay as in the first call, got {known}, had {self.classes_}")
            known = self.classes_
        if not np.isin(y, known).all():
            raise ValueError(f"y must hold labels among the classes {known} only")
        onehot = (y[:, None] == known[None, :]).astype(X.dtype)  # (n, C)
        if reset:
            C = len(known)
            target = math.sqrt((1 / C) * (1 - 1 / C)) if C > 1 else 1.0
            parameters = self.get_params() | {"scale": np.append(_initial_scale(X, self.scale), np.full(C, target))}
            mixture = IncrementalGaussianMixture(**parameters)
        else:
            mixture = self.mixture_
        mixture.partial_fit(np.hstack([X, onehot]))
        self.classes_, self.mixture_ = known, mixture
        return self

    def _answers(self, X: Array) -> np.ndarray:
        check_is_fitted(self, "mixture_")
        X = _validated(self, X, reset=False)
        unknown = np.full((len(X), len(self.classes_)), np.nan, dtype=X.dtype)
        return self.mixture_.reconstruct(np.hstack([X, unknown]))[:, X.shape[1] :]


class MixtureMoments(NamedTuple):
    """A mixture of all chunks.

    Attributes
    ----------
    masses : numpy.ndarray, shape (K,)
        Points of each component; they add up to the number of rows.
    means : numpy.ndarray, shape (K, D)
        Means.
    covariances : numpy.ndarray, shape (K, D, D)
        Scatter about the mean divided by the mass; singular where a component has few points.
    mixture : IncrementalGaussianMixture
        A fitted model of these components, whose covariances hold the initial one with mass 1, as always: it predicts,
        scores, reconstructs, and learns on.
    """

    masses: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    mixture: IncrementalGaussianMixture


class GaussianMixtureSummary:
    r"""Mixtures of chunks, on one machine or on many, merged by their moments; approximate.

    Each chunk is learned by an :class:`IncrementalGaussianMixture` of its own and summed up by the masses, means and
    scatter of its components, with the final responsibilities. Two mixtures are merged by pairs: of all pairs of a
    component here and one there, the closest is joined first, then the next closest of those still alone, until the
    next would be novel, that is, beyond the :math:`1-\beta` quantile of :math:`\chi^2_D`. Joining adds moments.

    The distance of two components of masses :math:`m_i, m_j` and scatters :math:`S_i, S_j` is that of Mahalanobis
    between their means under :math:`(S_i + S_j + 2 C_0)/(m_i + m_j)`, with the covariance :math:`C_0` of a new
    component: between two single points it is the distance by which the second would be found novel.

    Parameters
    ----------
    mixture : IncrementalGaussianMixture, optional
        Parameters for every chunk, and ``delta``, ``beta`` and ``scale`` for the merges. Give it a ``scale``: without,
        each chunk takes its own standard deviations, and a merge those of all rows of both sides.
    max_components : int, optional
        Cap on the merged mixture: its closest pairs are joined, novel or not. By default that of ``mixture``.

    Raises
    ------
    TypeError
        If ``mixture`` is not an IncrementalGaussianMixture, or ``max_components`` no integer.
    ValueError
        If a parameter is out of range.

    Notes
    -----
    Whatever the chunks and the tree of merges, the components together have the number of rows, the mean and the
    covariance of the data, to rounding (rows of a pruned component go to the others; in short chunks, do not prune).
    The components themselves depend on chunks and tree. They do not, but for
    rounding, where every chunk's mixture finds the same components, apart by many of their standard deviations: then
    each has the moments of its own points.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(400, 2)) + 40 * rng.integers(0, 2, (400, 1))
    >>> summary = GaussianMixtureSummary(IncrementalGaussianMixture(scale=1.0, beta=1e-4))
    >>> a, b = summary.update(summary.init(), X[:150]), summary.update(summary.init(), X[150:])
    >>> result = summary.finish(summary.merge(a, b))
    >>> len(result.masses), np.allclose(result.masses @ result.means / 400, X.mean(axis=0))
    (2, True)
    """

    _KEYS = ("ages", "masses", "means", "scatters")

    def __init__(self, mixture: IncrementalGaussianMixture | None = None, *, max_components: int | None = None) -> None:
        if mixture is not None and not isinstance(mixture, IncrementalGaussianMixture):
            raise TypeError(f"mixture must be an IncrementalGaussianMixture, got {type(mixture).__name__}")
        self.mixture = IncrementalGaussianMixture() if mixture is None else mixture
        own = self.mixture._check_rules(1).max_components
        if self.mixture.scale is not None:
            _initial_scale(np.zeros((1, np.size(self.mixture.scale))), self.mixture.scale)
        self.max_components = (
            own if max_components is None else check_int(max_components, "max_components", low=1, high=2**62)
        )

    def init(self) -> dict[str, np.ndarray]:
        """State of no rows: it takes its width from the first chunk.

        Returns
        -------
        dict of str to numpy.ndarray
            ``masses`` (0,), ``means`` (0, 0), ``scatters`` (0, 0, 0), ``ages`` (0,).
        """
        return {
            "masses": np.zeros(0),
            "means": np.zeros((0, 0)),
            "scatters": np.zeros((0, 0, 0)),
            "ages": np.zeros(0, np.int64),
        }

    def update(
        self, state: dict[str, np.ndarray], chunk: Array, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """State after one more chunk, learned in the order of its rows.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            A state.
        chunk : array, shape (n, D), NumPy or CuPy
            Rows, all finite; n may be zero.
        rng : numpy.random.Generator, optional
            Ignored: nothing is random.

        Returns
        -------
        dict of str to numpy.ndarray
            Masses (K,), means (K, D), scatter about the means (K, D, D), and ages (K,).

        Raises
        ------
        TypeError, ValueError
            If ``state`` is not a state of this summary, or ``chunk`` not a finite matrix of its width.
        """
        self._checked(state, "state")
        X = check_array(chunk, "chunk", ndim=2, min_size=0)
        if X.shape[1] < 1:
            raise ValueError(f"chunk must have at least one column, got shape {tuple(X.shape)}")
        if not X.shape[0]:
            return dict(state)
        X = (X if kind_of(X) == "cupy" else to_numpy(X)).astype(np.float64)
        new = self._moments(X)
        if not np.isfinite(new["scatters"]).all():
            raise ValueError("chunk must have squares that fit into float64, got an overflow")
        return self._merged(state, new, "chunk")

    def merge(self, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """State of the rows of both: joined components and those alone of ``a``, then those alone of ``b``.

        Parameters
        ----------
        a, b : dict of str to numpy.ndarray
            States.

        Returns
        -------
        dict of str to numpy.ndarray
            The state of all their rows.

        Raises
        ------
        TypeError, ValueError
            If they are not states of this summary, or of different widths.
        """
        self._checked(a, "a")
        self._checked(b, "b")
        return self._merged(a, b, "b")

    def finish(self, state: dict[str, np.ndarray]) -> MixtureMoments:
        """The mixture.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            A state of at least one row.

        Returns
        -------
        MixtureMoments
            In float64.

        Raises
        ------
        TypeError, ValueError
            If it is not a state of this summary, or covers no row.
        """
        self._checked(state, "state")
        masses, means, ages = (state[key].copy() for key in ("masses", "means", "ages"))
        if not len(masses):
            raise ValueError("state must cover at least one row, got none")
        variance = self._variance(state)
        stored = (state["scatters"] + np.diag(variance)) / masses[:, None, None]
        log_dets = np.linalg.slogdet(stored)[1]
        model = clone(self.mixture)
        covariance = model.representation == "covariance"
        matrices = stored if covariance else _inverse(stored)
        model._state = _State(
            means.copy(), matrices, log_dets, masses.copy(), ages, variance, covariance, n=len(masses)
        )
        model.n_components_, model.n_rejected_, model.n_features_in_ = len(masses), 0, means.shape[1]
        return MixtureMoments(masses, means, state["scatters"] / masses[:, None, None], model)

    def _moments(self, X: Array) -> dict[str, np.ndarray]:
        """The components of a chunk, with what its rows give to each."""
        xp = array_namespace(X)
        shares, ages = xp.ones((len(X), 1)), np.ones(1, np.int64)  # a single row has no spread to learn from
        if len(X) > 1:
            try:
                model = clone(self.mixture).fit(X)
            except ValueError as error:
                raise ValueError(f"chunk must be what the mixture can learn: {error}") from error
            shares, ages = model.predict_proba(X), to_numpy(model.ages_)
            kept = to_numpy(shares.sum(axis=0)) > MIN_MASS
            shares, ages = shares[:, xp.asarray(kept)], ages[kept]
            shares = shares / shares.sum(axis=1)[:, None]
        masses, means, scatters = shares.sum(axis=0), [], []
        for share, mass in zip(shares.T, masses, strict=True):
            mean = (share[:, None] * X).sum(axis=0) / mass
            e = X - mean
            scatter = to_numpy((share[:, None] * e).T @ e)
            means.append(to_numpy(mean))
            scatters.append((scatter + scatter.T) / 2)
        return {"masses": to_numpy(masses), "means": np.array(means), "scatters": np.array(scatters), "ages": ages}

    def _merged(self, a: dict[str, np.ndarray], b: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
        if len(a["masses"]) and len(b["masses"]):
            D = a["means"].shape[1]
            if b["means"].shape[1] != D:
                raise ValueError(f"{name} must be {D} columns wide, as what it joins, got {b['means'].shape[1]}")
            both = {key: np.concatenate([a[key], b[key]]) for key in self._KEYS}
            floor, size = np.diag(self._variance(both)), len(a["masses"])
            d2 = self._distances(both, floor)[:size, size:]
            keep, threshold = np.ones(len(both["masses"]), bool), self.mixture._check_rules(D).threshold
            free = [np.ones(n, bool) for n in d2.shape]
            for i, j in zip(*np.unravel_index(np.argsort(d2, axis=None, kind="stable"), d2.shape), strict=True):
                if d2[i, j] >= threshold or not (free[0].any() and free[1].any()):
                    break
                if free[0][i] and free[1][j]:
                    _join_components(both, i, size + j)
                    free[0][i] = free[1][j] = keep[size + j] = False
            both = {key: value[keep] for key, value in both.items()}
        else:
            both = dict(a if len(a["masses"]) else b)
        return self._capped(both)

    def _capped(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The state with the closest components joined until there are few enough."""
        if len(state["masses"]) <= self.max_components:
            return state
        floor = np.diag(self._variance(state))  # the rows are the same all along
        while (K := len(state["masses"])) > self.max_components:
            d2 = self._distances(state, floor)
            d2[np.tril_indices(K)] = np.inf
            i, j = divmod(int(d2.argmin()), K)
            state = {key: value.copy() for key, value in state.items()}
            _join_components(state, i, j)
            state = {key: np.delete(value, j, axis=0) for key, value in state.items()}
        return state

    def _distances(self, state: dict[str, np.ndarray], floor: np.ndarray) -> np.ndarray:
        """Squared distances of all components, shape (K, K), in the metric of each pair."""
        masses, means, scatters = (state[key] for key in ("masses", "means", "scatters"))
        d2 = np.empty((len(masses),) * 2)
        for i in range(len(masses)):
            u = (means - means[i])[:, :, None]
            pooled = (scatters + scatters[i] + 2 * floor) / (masses + masses[i])[:, None, None]
            d2[i] = (u * np.linalg.solve(pooled, u)).sum(axis=(1, 2))
        return d2

    def _variance(self, state: dict[str, np.ndarray]) -> np.ndarray:
        """Variances of a new component, shape (D,), from ``scale`` or the spread of all rows of the state."""
        masses, means = state["masses"], state["means"]
        D = means.shape[1]
        if self.mixture.scale is not None:
            spread = _initial_scale(np.zeros((1, D)), self.mixture.scale)
        else:
            centre = masses @ means / masses.sum()
            within = np.diagonal(state["scatters"], axis1=1, axis2=2).sum(axis=0)
            spread = np.sqrt((within + masses @ (means - centre) ** 2) / masses.sum())
            flat = spread <= 1e-14 * np.abs(means).max(axis=0) + 1e-50
            spread = np.where(flat, 1.0 if flat.all() else spread[~flat].min(initial=np.inf), spread)
        return (self.mixture.delta * spread) ** 2

    def _checked(self, state: Any, name: str) -> None:
        check_state(state, name, self._KEYS)
        K, D = len(state["masses"]), state["means"].shape[-1]
        if state["means"].shape != (K, D) or state["scatters"].shape != (K, D, D) or state["ages"].shape != (K,):
            raise ValueError(f"{name} must hold {K} components, got means of shape {state['means'].shape}")


def _join_components(state: dict[str, np.ndarray], i: int, j: int) -> None:
    """Component i takes in component j, in place, so that mass, mean and scatter of both together stay."""
    masses, means, scatters = state["masses"], state["means"], state["scatters"]
    share, delta = masses[j] / (masses[i] + masses[j]), means[j] - means[i]
    scatters[i] += scatters[j] + masses[i] * share * np.outer(delta, delta)
    means[i] += share * delta
    masses[i] += masses[j]
    state["ages"][i] += state["ages"][j]


class _Rules(NamedTuple):
    """Checked parameters, as the kernels take them."""

    threshold: float
    max_components: int
    published: bool
    min_age: int
    min_mass: float
    covariance: bool


@dataclass
class _State:
    """What is known after the points so far: arrays longer than needed, of which the first ``n`` rows count."""

    means: Array  # (capacity, D)
    matrices: Array  # (capacity, D, D): precisions, or covariances; upper triangles count
    log_dets: Array  # (capacity,), of the covariances
    masses: Array  # (capacity,)
    ages: Array  # (capacity,), integers
    variance: Array  # (D,), of a new component
    covariance: bool
    n: int = 0
    n_rejected: int = 0
    mirrored: bool = True  # whether the lower triangles are up to date, too

    @classmethod
    def empty(cls, variance: Array, covariance: bool, *, like: Array) -> _State:
        xp, D = array_namespace(like), len(variance)
        return cls(
            xp.zeros((0, D)),
            xp.zeros((0, D, D)),
            xp.zeros(0),
            xp.zeros(0),
            xp.zeros(0, dtype=np.int64),
            variance,
            covariance,
        )

    def symmetric(self) -> Array:
        """The ``n`` matrices with both triangles; the CPU kernel leaves the lower ones stale."""
        if not self.mirrored:
            if not self.matrices.flags.writeable:  # loaded as a read-only memory map
                self.matrices = self.matrices.copy()
            _mirror(self.matrices[: self.n])
            self.mirrored = True
        return self.matrices[: self.n]

    def grow(self, most: int) -> None:
        """Double the capacity, to ``most`` at most."""
        xp, D = array_namespace(self.means), len(self.variance)
        capacity = min(max(4, 2 * self.n), most)
        check_allocation((capacity, D, D), "X")
        for name in ("means", "matrices", "log_dets", "masses", "ages"):
            old = getattr(self, name)
            new = xp.zeros((capacity, *old.shape[1:]), dtype=old.dtype)
            new[: self.n] = old[: self.n]
            setattr(self, name, new)


def _initial_scale(X: Array, scale: float | Array | None) -> Array:
    """Spread of each coordinate, shape (D,), positive."""
    xp, D = array_namespace(X), X.shape[1]
    if scale is not None:
        spread = check_array(to_numpy(scale), "scale", ndim=(0, 1), low=1e-50, high=1e50)
        if spread.ndim and len(spread) != D:
            raise ValueError(f"scale must be a number or have one entry per column of X ({D}), got {len(spread)}")
        return from_numpy(np.broadcast_to(spread, D).astype(np.float64), like=X)
    if len(X) == 1:
        raise ValueError("scale must be given when the first batch has n_samples=1: one point of X has no spread")
    with np.errstate(over="ignore", invalid="ignore"):
        spread = X.astype(np.float64).std(axis=0)
    if not bool(xp.isfinite(spread).all()) or float(spread.max()) > 1e50:
        raise ValueError("X must have standard deviations below 1e50: rescale it")
    flat = spread <= 1e-14 * xp.abs(X).max(axis=0) + 1e-50
    return xp.where(flat, 1.0 if bool(flat.all()) else float(spread[~flat].min()), spread)


def _check_not_far(X: Array, variance: Array) -> None:
    xp = array_namespace(X)
    if bool((xp.abs(X) > FAR * xp.sqrt(variance)).any()):
        raise ValueError(f"X must stay within {FAR:g} initial standard deviations of zero")


def _validated(estimator: BaseEstimator, *data: Any, **options: Any) -> Any:
    """scikit-learn's validation in double or single precision, with messages that name the argument."""
    try:
        return validate_data(estimator, *data, dtype=[np.float64, np.float32], **options)
    except (TypeError, ValueError) as error:
        if "float" in str(error) and "X" not in str(error):
            raise type(error)(f"X must be an array of numbers: {error}") from error
        raise


def _check_classes(classes: Any) -> np.ndarray:
    labels = np.asarray(classes)
    if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "biufUS":
        raise ValueError(f"classes must be a one-dimensional array of labels, got {classes!r}")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError("classes must be finite")
    return np.unique(labels)


def _as_dtype(result: Array, X: Array) -> Array:
    return result.astype(X.dtype)


def _log_sum_exp(z: Array) -> Array:
    xp = array_namespace(z)
    top = z.max(axis=1)
    return top + xp.log(xp.exp(z - top[:, None]).sum(axis=1))


def _softmax(z: Array) -> Array:
    xp = array_namespace(z)
    p = xp.exp(z - z.max(axis=1)[:, None])
    return p / p.sum(axis=1)[:, None]


def _inverse(stack: Array) -> Array:
    """Inverses of symmetric positive definite matrices, symmetric to the last bit."""
    inverse = array_namespace(stack).linalg.inv(stack)
    return (inverse + inverse.swapaxes(1, 2)) / 2


# ---- CPU: one loop over the points, compiled ----


def _learn_points(X: np.ndarray, state: _State, rules: _Rules) -> None:
    """Learn the rows of ``X`` (n, D), growing the state whenever the compiled loop asks for room."""
    X, done = np.ascontiguousarray(X), 0
    if not state.means.flags.writeable:  # a model that was loaded as a read-only memory map
        state.grow(max(rules.max_components, state.n))
    state.mirrored = state.covariance
    counts = np.array([state.n, state.n_rejected])
    while done < len(X):
        if state.n == len(state.means):
            state.grow(rules.max_components)
        arrays = (state.means, state.matrices, state.log_dets, state.masses, state.ages)
        done = _stream(X, done, *arrays, state.variance, rules, counts)
        state.n, state.n_rejected = int(counts[0]), int(counts[1])
    if state.covariance:
        state.log_dets[: state.n] = np.linalg.slogdet(state.matrices[: state.n])[1]


@njit(cache=True)
def _stream(
    X: np.ndarray,
    start: int,
    means: np.ndarray,
    matrices: np.ndarray,
    log_dets: np.ndarray,
    masses: np.ndarray,
    ages: np.ndarray,
    variance: np.ndarray,
    rules: _Rules,
    counts: np.ndarray,
) -> int:
    """Learn rows from ``start`` on; return the first row not learned (the number of rows, or where room ran out).

    A rank-one step is not written when it is decided but in the sweep that computes the next point's distances:
    one pass over each upper triangle a point.
    """
    n, D = X.shape
    capacity = len(means)
    e = np.empty((capacity, D))  # x - mean
    g = np.empty((capacity, D))  # precision @ e
    y = np.empty((capacity, D))  # pending step of component j: matrix <- a[j] * matrix + b[j] * y[j] y[j]'
    a, b = np.ones(capacity), np.zeros(capacity)
    d2, r = np.empty(capacity), np.empty(capacity)
    for i in range(start, n):
        K = counts[0]
        near = False
        for j in range(K):
            for l in range(D):
                e[j, l] = X[i, l] - means[j, l]
            if rules.covariance:
                d2[j], log_dets[j] = _distance_by_factorising(matrices[j], e[j])
            elif a[j] != 1.0:
                d2[j] = _step_and_distance(matrices[j], a[j], b[j], y[j], e[j], g[j])
                a[j] = 1.0
            else:
                d2[j] = _distance(matrices[j], e[j], g[j])
            near |= d2[j] < rules.threshold
        if K == 0 or not (near or rules.max_components <= K):
            if counts[0] == capacity:
                return i  # nothing is pending: the sweeps above wrote it all
            _create(X[i], variance, rules.covariance, K, means, matrices, log_dets, masses, ages)
            a[K] = 1.0
            counts[0] += 1
            continue
        _responsibilities(d2[:K], log_dets[:K], masses[:K], r)
        for j in range(K):
            ages[j] += 1
            masses[j] += r[j]
            if r[j] <= MIN_RESPONSIBILITY:
                continue
            w = r[j] / masses[j]
            for l in range(D):
                means[j, l] += w * e[j, l]
            c = w * (1 - 3 * w + w * w) if rules.published else w * (1 - w)
            q = 1 + c / (1 - w) * d2[j]
            if q <= MIN_PIVOT:
                counts[1] += 1
                continue
            if rules.covariance:
                for k in range(D):
                    for l in range(D):
                        matrices[j, k, l] = (1 - w) * matrices[j, k, l] + c * e[j, k] * e[j, l]
            else:
                a[j] = 1 / (1 - w)
                b[j] = -c / ((1 - w) ** 2 * q)
                y[j] = g[j]
                log_dets[j] += D * math.log1p(-w) + math.log(q)
        j = K - 1
        while j >= 0:
            if ages[j] > rules.min_age and masses[j] < rules.min_mass and counts[0] > 1:
                last = counts[0] - 1  # the last one takes the place of the one removed
                means[j], matrices[j], y[j] = means[last], matrices[last], y[last]
                log_dets[j], masses[j], ages[j] = log_dets[last], masses[last], ages[last]
                a[j], b[j] = a[last], b[last]
                a[last] = 1.0
                counts[0] = last
            j -= 1
    for j in range(counts[0]):
        if a[j] != 1.0:
            e[j] = 0.0
            _step_and_distance(matrices[j], a[j], b[j], y[j], e[j], g[j])
    return n


@njit(cache=True)
def _create(
    x: np.ndarray,
    variance: np.ndarray,
    covariance: bool,
    j: int,
    means: np.ndarray,
    matrices: np.ndarray,
    log_dets: np.ndarray,
    masses: np.ndarray,
    ages: np.ndarray,
) -> None:
    means[j] = x
    matrices[j] = 0.0
    log_dets[j] = 0.0
    for l in range(len(x)):
        matrices[j, l, l] = variance[l] if covariance else 1 / variance[l]
        log_dets[j] += math.log(variance[l])
    masses[j] = 1.0
    ages[j] = 1


@njit(cache=True)
def _responsibilities(d2: np.ndarray, log_dets: np.ndarray, masses: np.ndarray, r: np.ndarray) -> None:
    K = len(d2)
    top = -np.inf
    for j in range(K):
        r[j] = math.log(masses[j]) - 0.5 * (log_dets[j] + d2[j])
        top = max(top, r[j])
    total = 0.0
    for j in range(K):
        r[j] = math.exp(r[j] - top) if r[j] - top > -40 else 0.0  # below 1e-17 nothing would change
        total += r[j]
    for j in range(K):
        r[j] /= total


# Sums may be taken in another order ("reassoc"), which is what lets the compiler use vector registers; every number
# here is finite (checked before), and the order is fixed when the code is compiled, so answers are repeatable.
_SUMS = {"reassoc", "contract", "nsz"}


@njit(cache=True, fastmath=_SUMS)
def _step_and_distance(M: np.ndarray, a: float, b: float, y: np.ndarray, e: np.ndarray, g: np.ndarray) -> float:
    """M <- a M + b y y', then g = M e; returns e'g. Upper triangle only, two rows at a time, each read once."""
    D = len(e)
    g[:] = 0.0
    for i in range(0, D - 1, 2):
        e0, e1, b0, b1 = e[i], e[i + 1], b * y[i], b * y[i + 1]
        m00 = a * M[i, i] + b0 * y[i]
        m01 = a * M[i, i + 1] + b0 * y[i + 1]
        m11 = a * M[i + 1, i + 1] + b1 * y[i + 1]
        M[i, i], M[i, i + 1], M[i + 1, i + 1] = m00, m01, m11
        s0, s1 = m00 * e0 + m01 * e1, m01 * e0 + m11 * e1
        row0, row1, yy, ee, gg = M[i, i + 2 :], M[i + 1, i + 2 :], y[i + 2 :], e[i + 2 :], g[i + 2 :]
        for l in range(len(ee)):  # slices from zero: the compiler sees that no index wraps, and vectorises
            m0 = a * row0[l] + b0 * yy[l]
            m1 = a * row1[l] + b1 * yy[l]
            row0[l], row1[l] = m0, m1
            s0 += m0 * ee[l]
            s1 += m1 * ee[l]
            gg[l] += m0 * e0 + m1 * e1
        g[i] += s0
        g[i + 1] += s1
    if D % 2:
        M[D - 1, D - 1] = a * M[D - 1, D - 1] + b * y[D - 1] * y[D - 1]
        g[D - 1] += M[D - 1, D - 1] * e[D - 1]
    return _dot(e, g)


@njit(cache=True, fastmath=_SUMS)
def _distance(M: np.ndarray, e: np.ndarray, g: np.ndarray) -> float:
    """g = M e; returns e'g. As above, without writing."""
    D = len(e)
    g[:] = 0.0
    for i in range(0, D - 1, 2):
        e0, e1, m01 = e[i], e[i + 1], M[i, i + 1]
        s0, s1 = M[i, i] * e0 + m01 * e1, m01 * e0 + M[i + 1, i + 1] * e1
        row0, row1, ee, gg = M[i, i + 2 :], M[i + 1, i + 2 :], e[i + 2 :], g[i + 2 :]
        for l in range(len(ee)):
            s0 += row0[l] * ee[l]
            s1 += row1[l] * ee[l]
            gg[l] += row0[l] * e0 + row1[l] * e1
        g[i] += s0
        g[i + 1] += s1
    if D % 2:
        g[D - 1] += M[D - 1, D - 1] * e[D - 1]
    return _dot(e, g)


@njit(cache=True, fastmath=_SUMS)
def _dot(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for l in range(len(x)):
        total += x[l] * y[l]
    return total


@njit(cache=True)
def _mirror(matrices: np.ndarray) -> None:
    """Copy the upper triangles to the lower ones, in tiles, so that neither side strides through memory."""
    K, D = matrices.shape[:2]
    for j in range(K):
        for top in range(0, D, 32):
            for left in range(0, top + 1, 32):
                for k in range(top, min(top + 32, D)):
                    for l in range(left, min(left + 32, k)):
                        matrices[j, k, l] = matrices[j, l, k]


@njit(cache=True)
def _distance_by_factorising(C: np.ndarray, e: np.ndarray) -> tuple[float, float]:
    """Squared distance e'C^-1 e and log|C| by Cholesky: what the precision representation saves."""
    L = np.linalg.cholesky(C)
    z = np.empty_like(e)
    d2 = log_det = 0.0
    for i in range(len(e)):
        z[i] = (e[i] - _dot(L[i, :i], z[:i])) / L[i, i]
        d2 += z[i] * z[i]
        log_det += 2 * math.log(L[i, i])
    return d2, log_det


# ---- GPU: the same step for all components at once ----


def _learn_batched(X: Array, state: _State, rules: _Rules) -> None:
    """Learn the rows of ``X`` (n, D) with whole-array operations: batched matvec, fused rank-one write."""
    xp, D = array_namespace(X), X.shape[1]
    if rules.covariance:
        raise ValueError("representation must be 'precision' for CuPy arrays")
    for x in X:
        K = state.n
        e = x - state.means[:K]  # (K, D)
        g = xp.matmul(state.matrices[:K], e[:, :, None])[:, :, 0]  # (K, D)
        d2 = (e * g).sum(axis=1)  # (K,)
        if K == 0 or not (rules.max_components <= K or bool((d2 < rules.threshold).any())):
            if state.n == len(state.means):
                state.grow(rules.max_components)
            state.means[K] = x
            state.matrices[K] = xp.diag(1 / state.variance)
            state.log_dets[K] = xp.log(state.variance).sum()
            state.masses[K] = 1.0
            state.ages[K] = 1
            state.n += 1
            continue
        r = _softmax((xp.log(state.masses[:K]) - 0.5 * (state.log_dets[:K] + d2))[None, :])[0]
        state.ages[:K] += 1
        state.masses[:K] += r
        w = xp.where(r > MIN_RESPONSIBILITY, r / state.masses[:K], 0.0)
        state.means[:K] += w[:, None] * e
        c = w * (1 - 3 * w + w * w) if rules.published else w * (1 - w)
        q = 1 + c / (1 - w) * d2
        kept = q > MIN_PIVOT
        state.n_rejected += K - int(kept.sum())
        q = xp.where(kept, q, 1.0)
        a = xp.where(kept, 1 / (1 - w), 1.0)
        b = xp.where(kept, -c / ((1 - w) ** 2 * q), 0.0)
        state.log_dets[:K] += xp.where(kept, D * xp.log1p(-w) + xp.log(q), 0.0)
        _rank_one_write(state.matrices[:K], a, b, g)
        _prune_batched(state, rules)


def _prune_batched(state: _State, rules: _Rules) -> None:
    old = (state.ages[: state.n] > rules.min_age) & (state.masses[: state.n] < rules.min_mass)
    for j in np.flatnonzero(to_numpy(old))[::-1]:
        if state.n == 1:
            break
        state.n -= 1
        for array in (state.means, state.matrices, state.log_dets, state.masses, state.ages):
            array[j] = array[state.n]


def _rank_one_write(matrices: Array, a: Array, b: Array, g: Array) -> None:
    """matrices[j] <- a[j] matrices[j] + b[j] g[j] g[j]', in place; symmetric, because products commute."""
    if kind_of(matrices) == "cupy":
        _rank_one_kernel()(a, b, g, g.shape[1], matrices)
    else:
        matrices *= a[:, None, None]
        matrices += b[:, None, None] * (g[:, :, None] * g[:, None, :])


@functools.cache
def _rank_one_kernel() -> Any:
    import cupy

    return cupy.ElementwiseKernel(
        "raw float64 a, raw float64 b, raw float64 g, int64 d",
        "float64 m",
        """
        const long long j = i / (d * d), k = i / d % d, l = i % d;
        m = a[j] * m + b[j] * (g[j * d + k] * g[j * d + l]);
        """,
        "rank_one_write",
    )
