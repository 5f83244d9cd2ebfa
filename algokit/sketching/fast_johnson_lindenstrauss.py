r"""Fast Johnson-Lindenstrauss transform with the sparser projection of Fandina, Høgsgaard and Larsen (2023).

Random signs, a Walsh-Hadamard transform and a very sparse Gaussian matrix map points to few dimensions, all pairwise
distances kept within a factor :math:`1\pm\varepsilon`.

Reference: O. N. Fandina, M. M. Høgsgaard, K. G. Larsen, ICML 2023, arXiv:2204.01800.
Chapter: notebooks/sketching/fast_johnson_lindenstrauss.ipynb.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numba import njit, prange
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from algokit.arrays import Array, ArrayT, array_namespace, pick_kernel, to_numpy
from algokit.checks import (
    AlgokitWarning,
    RNGLike,
    check_allocation,
    check_array,
    check_bool,
    check_float,
    check_int,
    check_one_of,
    check_rng,
    check_state,
)
from algokit.sketching._hadamard import across, aligned, block_size, fwht_cpu, fwht_gpu, native, within
from algokit.sketching._simd import BYTES, load, muladd, splat, store, sub, transpose

__all__ = [
    "FastJLOperator",
    "FastJohnsonLindenstrauss",
    "ProjectedGram",
    "ProjectedGramSummary",
    "fast_jl_density",
    "fast_jl_dim",
    "fast_jl_operator",
    "fwht",
    "norm_variance",
]

VALUES = ("gaussian", "rademacher")
MAX_DIM = 2**31 - 1


def fwht(x: ArrayT, *, axis: int = -1, normalize: bool = True, overwrite: bool = False) -> ArrayT:
    r"""Walsh-Hadamard transform along one axis, in natural (Hadamard) order.

    For a vector, :math:`y = Hx` with :math:`H_{ij} = d^{-1/2}(-1)^{\langle i, j\rangle}`, where
    :math:`\langle i, j\rangle` counts the bits that i and j share. Costs :math:`d\log_2 d` additions.

    Parameters
    ----------
    x : array, shape (..., d, ...), float32 or float64
        NumPy, CuPy, or an array that can be handed to these; d a power of two. float32 stays float32, integers become
        float64.
    axis : int, default -1
        The axis of length d.
    normalize : bool, default True
        Multiply by :math:`d^{-1/2}`, which makes H orthogonal and its own inverse. Otherwise all entries of H are
        :math:`\pm1`.
    overwrite : bool, default False
        Allow the result to take the place of ``x``; it does where ``x`` is contiguous and writeable. Then its old
        content is lost even when an error is raised because of a NaN.

    Returns
    -------
    array, same shape, dtype and kind as ``x``
        The transform, in the units of ``x``.

    Raises
    ------
    ValueError
        If d is not a power of two, ``x`` has no such axis, is empty, or holds a NaN or an infinity.
    TypeError
        If ``x`` is not an array of real numbers.

    Notes
    -----
    The kernel works through a row in radix-8 passes inside the first-level cache, and rows in parallel; a batch moves
    through memory once. The order of the output is that of :func:`scipy.linalg.hadamard`.

    Examples
    --------
    >>> import numpy as np
    >>> fwht(np.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0]), normalize=False)
    array([ 4.,  2.,  0., -2.,  0.,  2.,  0.,  2.])
    """
    array = check_array(x, "x", finite=False)
    if array.ndim < 1:
        raise ValueError(f"x must have at least 1 dimension, got shape {tuple(array.shape)}")
    axis = check_int(axis, "axis", low=-array.ndim, high=array.ndim - 1) % array.ndim
    check_bool(normalize, "normalize")
    check_bool(overwrite, "overwrite")
    d = array.shape[axis]
    if d & (d - 1):
        raise ValueError(f"x must have a power of two as its length along axis {axis}, got {d}: pad with zeros")
    scale = d**-0.5 if normalize else 1.0
    y = pick_kernel(array, cpu=fwht_cpu, gpu=fwht_gpu)(array, axis, scale, overwrite)
    _check_sums(y[(slice(None),) * axis + (0, ...)], array, "x", lost=overwrite)
    return y


def fast_jl_dim(n_points: int, *, eps: float) -> int:
    r"""Output dimension that keeps all distances between ``n_points`` points within a factor :math:`1\pm\varepsilon`.

    :math:`k = \lceil 4\ln n / (\varepsilon^2/2 - \varepsilon^3/3)\rceil`: the constant of scikit-learn's
    ``johnson_lindenstrauss_min_dim`` (Dasgupta and Gupta, 2003), for a fair comparison.

    Parameters
    ----------
    n_points : int
        Number of points n, at least 2.
    eps : float
        Largest relative error :math:`\varepsilon` of a squared distance, in (0, 1).

    Returns
    -------
    int
        k.

    Raises
    ------
    ValueError
        If an argument is out of range.
    TypeError
        If an argument is not a number of the right kind.

    Examples
    --------
    >>> fast_jl_dim(2000, eps=0.1)
    6516
    """
    n_points = check_int(n_points, "n_points", low=2)
    eps = check_float(eps, "eps", low=0, high=1, open_low=True, open_high=True)
    return math.ceil(4 * math.log(n_points) / (eps**2 / 2 - eps**3 / 3))


def fast_jl_density(n_points: int, dim: int, *, eps: float, analysis: str = "tight", c: float = 2.0) -> float:
    r"""Probability q that an entry of the sparse projection P is not zero.

    ``"classic"`` is Ailon and Chazelle's :math:`q = c\ln^2 n/d`. ``"tight"`` divides it by
    :math:`\alpha = \min\{\varepsilon^{-1}\ln(1/\varepsilon), \ln n\}`, which suffices and cannot be improved by more
    than a constant. Both are cut off at 1.

    Parameters
    ----------
    n_points : int
        Number of points n, at least 2.
    dim : int
        Dimension of the points; d is the next power of two.
    eps : float
        Largest relative error of a squared distance, in (0, 1).
    analysis : {"tight", "classic"}, default "tight"
        Which of the two.
    c : float, default 2.0
        The constant that the theory leaves open, positive.

    Returns
    -------
    float
        q in (0, 1].

    Raises
    ------
    ValueError
        If an argument is out of range.
    TypeError
        If an argument is not a number of the right kind.

    Notes
    -----
    The theory asks for :math:`\varepsilon < 1/2`. Above, :math:`\alpha` is not allowed below 1, so that "tight" is
    never denser than "classic".

    Examples
    --------
    >>> q = fast_jl_density(2000, 16384, eps=0.1)
    >>> round(q * 16384, 1)  # non-zeros per row of P
    15.2
    >>> round(fast_jl_density(2000, 16384, eps=0.1, analysis="classic") * 16384, 1)
    115.5
    """
    n_points = check_int(n_points, "n_points", low=2)
    dim = check_int(dim, "dim", low=1, high=MAX_DIM)
    eps = check_float(eps, "eps", low=0, high=1, open_low=True, open_high=True)
    check_one_of(analysis, "analysis", ("tight", "classic"))
    c = check_float(c, "c", low=0, open_low=True)
    log_n = math.log(n_points)
    alpha = 1.0 if analysis == "classic" else max(1.0, min(math.log(1 / eps) / eps, log_n))
    return min(1.0, c * log_n**2 / (alpha * _padded(dim)))


def norm_variance(u: Array, *, density: float, n_components: int, values: str = "gaussian") -> float:
    r"""Exact variance, over P, of the squared norm of the embedded vector, given the mixed vector :math:`u = HDx`.

    .. math:: \operatorname{Var}\|k^{-1/2}Pu\|^2
              = \frac1k\Bigl(2\|u\|_2^4 + 3\,\frac{1-q}{q}\,\|u\|_4^4\Bigr)

    for Gaussian values; for random signs the last term is :math:`(q^{-1} - 3)\|u\|_4^4`.

    Parameters
    ----------
    u : array, shape (d,)
        The vector that P is applied to.
    density : float
        Probability q of a non-zero, in (0, 1].
    n_components : int
        Output dimension k.
    values : {"gaussian", "rademacher"}, default "gaussian"
        Law of the non-zeros of P.

    Returns
    -------
    float
        The variance, in the units of ``u`` to the fourth power.

    Raises
    ------
    ValueError
        If an argument is out of range, or ``u`` is not a finite vector.
    TypeError
        If an argument is not of the right kind.

    Examples
    --------
    >>> import numpy as np
    >>> norm_variance(np.full(4, 0.5), density=0.5, n_components=10)  # (2 + 3 / 4) / 10
    0.275
    """
    u = check_array(u, "u", ndim=1)
    q = check_float(density, "density", low=0, high=1, open_low=True)
    k = check_int(n_components, "n_components", low=1)
    check_one_of(values, "values", VALUES)
    xp = array_namespace(u)
    square = float(xp.sum(u**2))
    fourth = float(xp.sum(u**4))
    excess = 3 * (1 - q) / q if values == "gaussian" else 1 / q - 3
    return (2 * square**2 + excess * fourth) / k


def fast_jl_operator(
    dim: int,
    n_components: int,
    *,
    density: float,
    values: str = "gaussian",
    rng: RNGLike = None,
    dtype: Any = float,
) -> FastJLOperator:
    r"""Draw the random map :math:`\Phi = k^{-1/2}PHD` from a seed; it never sees the data.

    P is drawn by its non-zeros: the gaps between them along the flattened matrix are geometric, so the cost is
    proportional to :math:`qkd`, not :math:`kd`.

    Parameters
    ----------
    dim : int
        Dimension of the points; they are padded with zeros to d, the next power of two.
    n_components : int
        Output dimension k.
    density : float
        Probability q of a non-zero in P, in (0, 1], as :func:`fast_jl_density` gives it.
    values : {"gaussian", "rademacher"}, default "gaussian"
        Law of the non-zeros; random signs are not covered by the paper's theorem.
    rng : None, int or numpy.random.Generator
        The seed; the same seed gives the same operator.
    dtype : {float32, float64}, default float64
        Precision of signs and values; the positions do not depend on it.

    Returns
    -------
    FastJLOperator
        The map, with ``apply`` and ``T_apply``.

    Raises
    ------
    ValueError
        If an argument is out of range, or P would not fit into memory.
    TypeError
        If an argument is not of the right kind.

    Warns
    -----
    AlgokitWarning
        If k is larger than d: then nothing is gained over the points themselves.

    Examples
    --------
    >>> import numpy as np
    >>> phi = fast_jl_operator(1000, 64, density=0.02, rng=0)
    >>> phi.signs.shape, phi.P.shape, phi.apply(np.ones((3, 1000))).shape
    ((1024,), (64, 1024), (3, 64))
    """
    dim = check_int(dim, "dim", low=1, high=MAX_DIM)
    k = check_int(n_components, "n_components", low=1, high=MAX_DIM)
    q = check_float(density, "density", low=0, high=1, open_low=True)
    check_one_of(values, "values", VALUES)
    dtype = _check_dtype(dtype)
    rng = check_rng(rng)
    d = _padded(dim)
    check_allocation((d,), "dim", itemsize=dtype.itemsize)
    check_allocation((math.ceil(q * k * d) + k,), "n_components", itemsize=40)  # with what is needed on the way
    if k * d > 2**55:
        raise ValueError(f"n_components is too large: {k} rows of {d} entries cannot be counted safely")
    if k > d:
        warnings.warn(f"n_components={k} is larger than the padded dimension {d}", AlgokitWarning, stacklevel=2)

    signs = (2.0 * rng.integers(0, 2, d) - 1.0).astype(dtype)
    flat = _nonzeros(k * d, q, rng)
    draws = rng.standard_normal(len(flat)) if values == "gaussian" else 2.0 * rng.integers(0, 2, len(flat)) - 1.0
    small = np.int32 if len(flat) <= MAX_DIM else np.int64
    indptr = np.searchsorted(flat, d * np.arange(k + 1)).astype(small)
    columns = (flat & (d - 1)).astype(small)  # d is a power of two
    draws *= 1 / math.sqrt(q * k)
    P = sp.csr_array((draws.astype(dtype, copy=False), columns, indptr), shape=(k, d))
    return FastJLOperator(signs=signs, P=P, dim=dim, density=q)


def _nonzeros(n_cells: int, q: float, rng: np.random.Generator) -> np.ndarray:
    """Sorted positions, below ``n_cells``, of independent events of probability ``q`` each, by their gaps."""
    found = []
    last = -1
    while last < n_cells:
        mean = q * (n_cells - last)
        gaps = rng.geometric(q, int(mean + 6 * math.sqrt(mean)) + 8)  # enough, but once in 10^9
        np.minimum(gaps, n_cells + 1, out=gaps)
        positions = last + np.cumsum(gaps)
        found.append(positions)
        last = int(positions[-1])
    positions = np.concatenate(found)
    return positions[: np.searchsorted(positions, n_cells)]


@dataclass(frozen=True, eq=False)
class FastJLOperator:
    r"""The linear map :math:`\Phi = k^{-1/2}PHD`; made by :func:`fast_jl_operator`.

    Attributes
    ----------
    signs : numpy.ndarray, shape (d,)
        The diagonal of D: independent uniform signs.
    P : scipy.sparse.csr_array, shape (k, d)
        The sparse projection, the factor :math:`(qk)^{-1/2}` included.
    dim : int
        Dimension of the points, at most d; the rest is padding.
    density : float
        Probability q of a non-zero.
    """

    signs: np.ndarray
    P: sp.csr_array
    dim: int
    density: float

    @property
    def nnz(self) -> int:
        """Number of non-zeros of P; multiplications per embedded point."""
        return int(self.P.nnz)

    def apply(self, X: ArrayT) -> ArrayT:
        r"""Embed the rows of ``X``.

        Parameters
        ----------
        X : array, shape (n, dim), float32 or float64
            Points, one per row; float32 stays float32.

        Returns
        -------
        array, shape (n, k)
            :math:`\Phi x` for every row x.

        Raises
        ------
        ValueError
            If ``X`` has another width, or holds a NaN or an infinity.
        TypeError
            If ``X`` is not an array of real numbers.
        """
        X = check_array(X, "X", shape=(None, self.dim), finite=False)
        return pick_kernel(X, cpu=functools.partial(_apply_cpu, self), gpu=functools.partial(_apply_gpu, self))(X)

    def T_apply(self, Z: ArrayT) -> ArrayT:
        r"""Apply the adjoint :math:`\Phi^\top` to the rows of ``Z``.

        Parameters
        ----------
        Z : array, shape (n, k), float32 or float64
            Vectors of the embedding space, one per row.

        Returns
        -------
        array, shape (n, dim)
            :math:`\Phi^\top z` for every row z; its expectation for :math:`z = \Phi x` is x.

        Raises
        ------
        ValueError
            If ``Z`` has another width, or holds a NaN or an infinity.
        TypeError
            If ``Z`` is not an array of real numbers.
        """
        Z = check_array(Z, "Z", shape=(None, self.P.shape[0]))
        return pick_kernel(Z, cpu=functools.partial(_adjoint_cpu, self), gpu=functools.partial(_adjoint_gpu, self))(Z)


class FastJohnsonLindenstrauss(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Random projection that keeps pairwise distances, in time :math:`O(d\ln d)` plus few non-zeros per point.

    A drop-in for scikit-learn's ``GaussianRandomProjection``. ``fit`` looks only at the shape of the data.

    Parameters
    ----------
    n_components : int or "auto", default "auto"
        Output dimension k; ``"auto"`` asks :func:`fast_jl_dim`.
    eps : float, default 0.1
        Largest relative error of a squared distance, in (0, 1); for ``"auto"`` and for the density.
    density : {"tight", "classic"} or float, default "tight"
        Which analysis decides the density of P (see :func:`fast_jl_density`), or the density itself, in (0, 1].
    c : float, default 2.0
        The constant in the density.
    values : {"gaussian", "rademacher"}, default "gaussian"
        Law of the non-zeros of P.
    rng : None, int or numpy.random.Generator, default None
        The seed; a generator is advanced by each ``fit``.

    Attributes
    ----------
    n_components_ : int
        Output dimension.
    density_ : float
        Probability q of a non-zero.
    operator_ : FastJLOperator
        The map.
    n_features_in_ : int
        Dimension of the points.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(100, 10_000))
    >>> sketch = FastJohnsonLindenstrauss(eps=0.3, rng=0).fit(X)
    >>> sketch.transform(X).shape
    (100, 512)
    """

    def __init__(
        self,
        n_components: int | str = "auto",
        *,
        eps: float = 0.1,
        density: str | float = "tight",
        c: float = 2.0,
        values: str = "gaussian",
        rng: RNGLike = None,
    ) -> None:
        self.n_components = n_components
        self.eps = eps
        self.density = density
        self.c = c
        self.values = values
        self.rng = rng

    def fit(self, X: Any, y: Any = None) -> FastJohnsonLindenstrauss:
        """Draw the map for points of the width of ``X``.

        Parameters
        ----------
        X : array-like or sparse matrix, shape (n, dim)
            Only its shape and precision are used (its number of rows where k or the density is automatic).
        y : None
            Ignored.

        Returns
        -------
        FastJohnsonLindenstrauss
            The estimator itself.

        Raises
        ------
        ValueError
            If a parameter is out of range, or ``X`` is not a finite matrix.
        TypeError
            If a parameter is not of the right kind.
        """
        X = self._validated(X, reset=True)
        n = max(2, X.shape[0])  # a single point has no distances: treated as two
        eps = check_float(self.eps, "eps", low=0, high=1, open_low=True, open_high=True)
        c = check_float(self.c, "c", low=0, open_low=True)
        if isinstance(self.n_components, str):
            check_one_of(self.n_components, "n_components", ("auto",))
            k = fast_jl_dim(n, eps=eps)
        else:
            k = check_int(self.n_components, "n_components", low=1)
        if isinstance(self.density, str):
            check_one_of(self.density, "density", ("tight", "classic"))
            q = fast_jl_density(n, X.shape[1], eps=eps, analysis=self.density, c=c)
        else:
            q = check_float(self.density, "density", low=0, high=1, open_low=True)
        self.operator_ = fast_jl_operator(X.shape[1], k, density=q, values=self.values, rng=self.rng, dtype=X.dtype)
        self.n_components_ = self._n_features_out = k
        self.density_ = q
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Embed the rows of ``X``.

        Parameters
        ----------
        X : array-like or sparse matrix, shape (n, dim)
            Points, one per row; float32 stays float32.

        Returns
        -------
        numpy.ndarray, shape (n, k)
            The embedded points.

        Raises
        ------
        ValueError
            If ``X`` has another width than in ``fit``, or holds a NaN or an infinity.
        NotFittedError
            If ``fit`` was not called.
        """
        check_is_fitted(self)
        X = self._validated(X, reset=False, ensure_all_finite=False)  # apply finds out, without a pass of its own
        if not sp.issparse(X):
            return _apply_cpu(self.operator_, X)
        blocks = [X[i : i + 1024].toarray() for i in range(0, X.shape[0], 1024)]  # mixed points are dense anyway
        return np.concatenate([_apply_cpu(self.operator_, block) for block in blocks])

    def _validated(self, X: Any, **rules: Any) -> Any:
        try:
            return validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], **rules)
        except TypeError as error:
            raise TypeError(f"X must be a matrix of real numbers: {error}") from None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class ProjectedGram(NamedTuple):
    r"""Moments and principal components of projected rows :math:`y = \Phi x`.

    Attributes
    ----------
    n_rows : int
        Number of rows n.
    mean : numpy.ndarray, shape (k,)
        Their mean.
    gram : numpy.ndarray, shape (k, k)
        :math:`\sum_i y_i y_i^\top = \Phi X^\top X\Phi^\top`, not centred.
    components : numpy.ndarray, shape (r, k)
        Orthonormal principal directions, by falling variance; the largest entry of each is positive.
    variances : numpy.ndarray, shape (r,)
        Variance along each, with the divisor n - 1 (n = 1: zero).
    """

    n_rows: int
    mean: np.ndarray
    gram: np.ndarray
    components: np.ndarray
    variances: np.ndarray


class ProjectedGramSummary:
    r"""Gram matrix, mean and principal components of projected rows that lie in chunks, on one machine or on many.

    Mean and scatter about it are merged by the pairwise formula of [1]_: the answer is the same to rounding, whatever
    the chunks and the tree of merges, and a mean far from zero costs no digits.

    Parameters
    ----------
    operator : FastJLOperator
        The projection, the same everywhere.
    n_components : int, optional
        Principal components wanted, r; all k by default.

    Raises
    ------
    TypeError
        If ``operator`` is not a FastJLOperator, or ``n_components`` no integer.
    ValueError
        If ``n_components`` is less than 1 or more than k.

    Notes
    -----
    The state has k (k + 1) + 1 numbers, whatever the length and width of the table; the projection itself is
    approximate. ``operator.T_apply(components)`` lifts directions back to the space of the rows.

    .. [1] T. F. Chan, G. H. Golub, R. J. LeVeque, Updating formulae and a pairwise algorithm for computing sample
       variances, COMPSTAT 1982.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(100, 50)) + 7
    >>> summary = ProjectedGramSummary(fast_jl_operator(50, 8, density=0.5, rng=0))
    >>> a, b = summary.update(summary.init(), X[:30]), summary.update(summary.init(), X[30:])
    >>> Y = summary.operator.apply(X)
    >>> result = summary.finish(summary.merge(a, b))
    >>> np.allclose(result.gram, Y.T @ Y), np.allclose(result.mean, Y.mean(axis=0))
    (True, True)
    """

    _KEYS = ("count", "mean", "scatter")

    def __init__(self, operator: FastJLOperator, *, n_components: int | None = None) -> None:
        if not isinstance(operator, FastJLOperator):
            raise TypeError(f"operator must be a FastJLOperator, got {type(operator).__name__}")
        k = operator.P.shape[0]
        self.operator = operator
        self.n_components = k if n_components is None else check_int(n_components, "n_components", low=1, high=k)

    def init(self) -> dict[str, np.ndarray]:
        """State of no rows.

        Returns
        -------
        dict of str to numpy.ndarray
            ``count`` (), ``mean`` (k,), ``scatter`` (k, k).
        """
        k = self.operator.P.shape[0]
        return {"count": np.array(0), "mean": np.zeros(k), "scatter": np.zeros((k, k))}

    def update(
        self, state: dict[str, np.ndarray], chunk: Array, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """State after one more chunk.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            A state.
        chunk : array, shape (n, dim), NumPy or CuPy
            Rows; n may be zero. They are projected in their own precision and summed in float64.
        rng : numpy.random.Generator, optional
            Ignored: nothing is random but the operator, which is drawn before.

        Returns
        -------
        dict of str to numpy.ndarray
            ``count`` (), ``mean`` (k,), ``scatter`` (k, k) about the mean, float64.

        Raises
        ------
        TypeError, ValueError
            If ``state`` is not a state of this summary, or ``chunk`` not a finite matrix of the operator's width.
        """
        self._checked(state, "state")
        rows = check_array(chunk, "chunk", shape=(None, self.operator.dim), min_size=0)
        if not rows.shape[0]:
            return dict(state)
        projected = self.operator.apply(rows)
        xp = array_namespace(projected)
        y = xp.astype(projected, xp.float64)
        mean = xp.mean(y, axis=0)
        y = y - mean
        with np.errstate(over="ignore", invalid="ignore"):  # told below
            scatter = to_numpy(y.T @ y)
        if not np.isfinite(scatter).all():
            raise ValueError("chunk must have squares that fit into float64, got an overflow")
        new = {
            "count": np.array(rows.shape[0]),
            "mean": to_numpy(mean),
            "scatter": (scatter + scatter.T) / 2,  # BLAS may round the halves differently
        }
        return self.merge(state, new)

    def merge(self, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """State of the rows of both.

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
            If they are not states of this summary.
        """
        self._checked(a, "a")
        self._checked(b, "b")
        if not a["count"] or not b["count"]:
            return dict(a if a["count"] else b)
        share, delta = b["count"] / (a["count"] + b["count"]), b["mean"] - a["mean"]
        return {
            "count": np.asarray(a["count"] + b["count"]),
            "mean": a["mean"] + share * delta,
            "scatter": a["scatter"] + b["scatter"] + a["count"] * share * np.outer(delta, delta),
        }

    def finish(self, state: dict[str, np.ndarray]) -> ProjectedGram:
        """The moments and the leading eigenvectors of the covariance.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            A state of at least one row.

        Returns
        -------
        ProjectedGram
            In float64.

        Raises
        ------
        TypeError, ValueError
            If it is not a state of this summary, or covers no row.
        """
        self._checked(state, "state")
        n, mean, scatter = int(state["count"]), state["mean"].copy(), state["scatter"]
        if not n:
            raise ValueError("state must cover at least one row, got none")
        values, vectors = np.linalg.eigh(scatter / max(1, n - 1))
        components = vectors.T[::-1][: self.n_components]
        peaks = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
        variances = values[::-1][: self.n_components].clip(min=0)
        return ProjectedGram(n, mean, scatter + n * np.outer(mean, mean), components * np.sign(peaks), variances)

    def _checked(self, state: Any, name: str) -> None:
        check_state(state, name, self._KEYS)
        k = self.operator.P.shape[0]
        if state["mean"].shape != (k,) or state["scatter"].shape != (k, k):
            raise ValueError(f"{name} must be a state of {k} projected columns, got a mean of {state['mean'].shape}")


def _padded(dim: int) -> int:
    """Least power of two that is not below ``dim``."""
    return 1 << (dim - 1).bit_length()


def _check_sums(first: Array, x: Array, name: str, *, lost: bool = False) -> None:
    """Complain of a NaN or infinity in ``x``, given the first coefficients of its transforms.

    They are plain sums (up to signs), so one bad element spoils its sum: looking at them replaces a pass over ``x``.
    """
    xp = array_namespace(first)
    if bool(xp.all(xp.isfinite(first))):
        return
    if lost:
        raise ValueError(f"{name} must be finite and its sums must not overflow, got a transform that is not finite")
    check_array(x, name)  # raises, unless finite elements overflowed: then the infinity is the answer


def _check_dtype(dtype: Any) -> np.dtype:
    try:
        dtype = np.dtype(float if dtype is None else dtype)
    except TypeError:
        raise TypeError(f"dtype must be float32 or float64, got {dtype!r}") from None
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    return dtype


# ---------------------------------------------------------------------------------------------- the map on the CPU


def _apply_cpu(phi: FastJLOperator, X: np.ndarray) -> np.ndarray:
    X = native(X)
    n, dim = X.shape
    d = len(phi.signs)
    width = BYTES // X.dtype.itemsize
    signs = (phi.signs * d**-0.5).astype(X.dtype, copy=False)  # the scale of H rides along
    if n < width // 4:  # too few rows to fill the lanes
        u = np.zeros((n, d), X.dtype)
        np.multiply(X, signs[:dim], out=u[:, :dim])
        u = fwht_cpu(u, 1, 1.0, True)
        _check_sums(u[:, 0], X, "X")
        return np.ascontiguousarray((phi.P.astype(X.dtype, copy=False) @ u.T).T)
    values = phi.P.data.astype(X.dtype, copy=False)
    Z = np.empty((n, phi.P.shape[0]), X.dtype)
    sums = np.empty(n, X.dtype)
    _embed(X.reshape(-1), dim, signs, phi.P.indptr, phi.P.indices, values, Z.reshape(-1), sums, width)
    _check_sums(sums, X, "X")
    return Z


def _adjoint_cpu(phi: FastJLOperator, Z: np.ndarray) -> np.ndarray:
    u = np.ascontiguousarray((phi.P.T.astype(Z.dtype, copy=False) @ Z.T).T)
    u = fwht_cpu(u, 1, len(phi.signs) ** -0.5, True)
    return u[:, : phi.dim] * phi.signs[: phi.dim].astype(Z.dtype, copy=False)


@njit(cache=True, parallel=True)
def _embed(
    x: np.ndarray,
    dim: int,
    signs: np.ndarray,
    indptr: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray,
    z: np.ndarray,
    sums: np.ndarray,
    width: int,
) -> None:
    """Rows of ``x`` (n, dim) to rows of ``z`` (n, k), ``width`` rows at a time, side by side in the lanes of ``u``.

    So every stage of the transform, and every non-zero of P, works on full vectors: one non-zero is read once for
    ``width`` points. ``x`` is read once and ``z`` written once.
    """
    n, k, d = len(sums), len(indptr) - 1, len(signs)
    one = np.ones(1, x.dtype)[0]
    for block in prange((n + width - 1) // width):
        first = block * width
        rows = min(width, n - first)
        u = aligned(d * width, x, width)  # (d, width): element c of row r at u[c * width + r]
        whole = dim // width * width if rows == width else 0  # columns that come in full square tiles
        chunk = block_size(d * width, width)
        for s in range(0, d * width, chunk):
            low, high = s // width, (s + chunk) // width
            for c in range(low, min(high, whole), width):
                transpose(x, first * dim + c, dim, u, c * width, width, load(signs, c))
            u[max(low, min(high, whole)) * width : high * width] = 0
            for r in range(rows):
                for c in range(max(low, whole), min(high, dim)):
                    u[c * width + r] = x[(first + r) * dim + c] * signs[c]
            within(u, u, s, d * width, chunk, width, False, one)
        across(u, 0, d * width, chunk, width)
        sums[first : first + rows] = u[:rows]
        tile = aligned(width * width, x, width)
        ones = splat(u, one)
        for j in range(k):
            total = sub(ones, ones)
            for p in range(indptr[j], indptr[j + 1]):
                total = muladd(splat(u, values[p]), load(u, indices[p] * width), total)
            done = j % width
            store(tile, done * width, total)
            if done == width - 1 and rows == width:
                transpose(tile, 0, width, z, first * k + j - done, k, ones)
            elif done == width - 1 or j == k - 1:
                for r in range(rows):
                    for c in range(done + 1):
                        z[(first + r) * k + j - done + c] = tile[c * width + r]


# ---------------------------------------------------------------------------------------------- the map on the GPU


def _csr_gpu(P: sp.csr_array, dtype: Any) -> Any:
    import cupy
    import cupyx.scipy.sparse

    parts = (cupy.asarray(P.data.astype(dtype, copy=False)), cupy.asarray(P.indices), cupy.asarray(P.indptr))
    return cupyx.scipy.sparse.csr_matrix(parts, shape=P.shape)


def _apply_gpu(phi: FastJLOperator, X: Any) -> Any:
    import cupy

    u = cupy.zeros((X.shape[0], len(phi.signs)), X.dtype)
    u[:, : phi.dim] = X * cupy.asarray(phi.signs[: phi.dim].astype(X.dtype))
    u = fwht_gpu(u, 1, len(phi.signs) ** -0.5, True)
    _check_sums(u[:, 0], X, "X")
    return cupy.ascontiguousarray((_csr_gpu(phi.P, X.dtype) @ u.T).T)


def _adjoint_gpu(phi: FastJLOperator, Z: Any) -> Any:
    import cupy

    u = cupy.ascontiguousarray((_csr_gpu(phi.P, Z.dtype).T.tocsr() @ Z.T).T)
    u = fwht_gpu(u, 1, len(phi.signs) ** -0.5, True)
    return u[:, : phi.dim] * cupy.asarray(phi.signs[: phi.dim].astype(Z.dtype))
