"""What the bilevel chapters share: problems, two with known solutions and one on real digits, and hypergradients.

A bilevel problem is: minimise F(x, y) over x and y, where y minimises f(x, .). Chapters: notebooks/bilevel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.optimize import minimize

from algokit.arrays import Array, array_namespace, from_numpy, kind_of, to_numpy
from algokit.bilevel._softmax import SoftmaxPass, softmax_oracle
from algokit.checks import RNGLike, check_array, check_float, check_int, check_one_of, check_rng, check_same_length
from algokit.data import digits

__all__ = [
    "BilevelProblem",
    "CleaningData",
    "Hypergradient",
    "KnownProblem",
    "SoftmaxPass",
    "check_problem",
    "check_start",
    "cleaning_data",
    "cleaning_problem",
    "implicit_hypergradient",
    "jax_gradient",
    "merely_convex_toy",
    "quadratic_problem",
    "softmax_fit",
    "softmax_pass",
    "unrolled_hypergradient",
    "with_derivatives",
]

Pair = tuple[Array, Array]
Value = Callable[[Array, Array], float]
Gradient = Callable[[Array, Array], Pair]
Product = Callable[[Array, Array, Array], Pair]
Both = Callable[[Array, Array, Array], tuple[Array, Array, Array, Array]]


@dataclass(frozen=True)
class BilevelProblem:
    r"""Upper and lower objective, with as many derivatives as the author cares to write.

    Attributes
    ----------
    F, f : callable
        ``(x, y) -> float``: upper and lower objective.
    dF, df : callable, optional
        ``(x, y) -> (gradient in x, gradient in y)``.
    hvp_F, hvp_f : callable, optional
        ``(x, y, v) -> (h_x, h_y)`` with :math:`h_x=\nabla_x\langle\nabla_yF,v\rangle` and :math:`h_y=\nabla^2_{yy}F\,v`
        (and the same of f). Missing derivatives come from JAX (:func:`with_derivatives`).
    both_F, both_f : callable, optional
        ``(x, y, v) -> (gradient in x, gradient in y, h_x, h_y)``, where one pass over the data gives all four.
    """

    F: Value
    f: Value
    dF: Gradient | None = None
    df: Gradient | None = None
    hvp_F: Product | None = None
    hvp_f: Product | None = None
    both_F: Both | None = None
    both_f: Both | None = None


class KnownProblem(NamedTuple):
    """A problem whose solution is known.

    Attributes
    ----------
    problem : BilevelProblem
        The problem, with all derivatives.
    x, y : numpy.ndarray
        Its optimistic solution.
    """

    problem: BilevelProblem
    x: np.ndarray
    y: np.ndarray


class Hypergradient(NamedTuple):
    r"""Gradient of the upper objective through the lower solution.

    Attributes
    ----------
    value : float
        :math:`F(x, y)` at the y that was used.
    grad_x : array, like x
        The gradient.
    y : array, like y
        The y that was used.
    """

    value: float
    grad_x: Array
    y: Array


@dataclass(frozen=True)
class CleaningData:
    """Digits with wrong labels in the training part.

    Attributes
    ----------
    X_train, X_val, X_test : numpy.ndarray, shape (n, 65)
        Pixels in [0, 1], and a column of ones.
    labels : numpy.ndarray of int, shape (n_train,)
        Training labels, some wrong.
    clean : numpy.ndarray of bool, shape (n_train,)
        Which of them are right: for scoring only.
    y_val, y_test : numpy.ndarray of int, shape (n,)
        Labels of the other parts, all right.
    """

    X_train: np.ndarray
    labels: np.ndarray
    clean: np.ndarray
    X_val: np.ndarray
    y_val: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


def check_problem(problem: Any) -> BilevelProblem:
    """``problem``, if it is a :class:`BilevelProblem` made of callables.

    Parameters
    ----------
    problem : BilevelProblem
        The argument.

    Returns
    -------
    BilevelProblem
        The same.

    Raises
    ------
    TypeError
        If it is not one, or holds something that cannot be called.

    Examples
    --------
    >>> check_problem(merely_convex_toy(2).problem).df is not None
    True
    """
    if not isinstance(problem, BilevelProblem):
        raise TypeError(f"problem must be a BilevelProblem, got {type(problem).__name__}")
    for field in fields(problem):
        value = getattr(problem, field.name)
        if not callable(value) and (value is not None or field.name in ("F", "f")):
            raise TypeError(f"problem must hold callables, got {type(value).__name__} for {field.name}")
    return problem


def check_start(problem: BilevelProblem, x: Array, y: Array, names: tuple[str, str] = ("x", "y")) -> None:
    """Refuse a point that does not fit the problem: broadcasting would hide a wrong shape for ever.

    Parameters
    ----------
    problem : BilevelProblem
        With first derivatives.
    x, y : array
        The point.
    names : tuple of str, default ("x", "y")
        What the caller's arguments are called.

    Raises
    ------
    TypeError
        If ``problem`` is not a problem, or x or y is not an array of numbers.
    ValueError
        If a gradient cannot be evaluated at the point, or is not shaped like it.

    Examples
    --------
    >>> check_start(merely_convex_toy(2).problem, np.zeros(2), np.zeros((2, 3)))
    Traceback (most recent call last):
    ...
    ValueError: x and y must fit problem, got shapes (2,) and (2, 3): dF fails: operands could not be broadcast ...
    """
    x, y = check_array(x, names[0]), check_array(y, names[1])
    for name in ("dF", "df"):
        gradient = getattr(check_problem(problem), name)
        complaint = f"{names[0]} and {names[1]} must fit problem, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        try:
            shapes = [tuple(part.shape) for part in gradient(x, y)]
        except Exception as error:
            raise ValueError(f"{complaint}: {name} fails: {error}") from error
        if shapes != [tuple(x.shape), tuple(y.shape)]:
            raise ValueError(f"{complaint}: {name} gives gradients of shapes {' and '.join(map(str, shapes))}")


def with_derivatives(problem: BilevelProblem) -> BilevelProblem:
    """The same problem with every missing derivative filled in by JAX's automatic differentiation.

    Parameters
    ----------
    problem : BilevelProblem
        Objectives without derivatives must be written with ``jax.numpy`` (or plain operators).

    Returns
    -------
    BilevelProblem
        With ``dF``, ``df``, ``hvp_F``, ``hvp_f``, ``both_F`` and ``both_f``. Derivatives by JAX come back as the kind
        and dtype of x, in double precision where x is.

    Raises
    ------
    TypeError
        If ``problem`` is not a problem.

    Examples
    --------
    >>> problem = with_derivatives(merely_convex_toy(1).problem)
    >>> gx, gy, hx, hy = problem.both_f(np.zeros(1), np.ones((2, 1)), np.ones((2, 1)))
    >>> gy.ravel(), hx
    (array([1., 0.]), array([-1.]))
    """
    problem = check_problem(problem)
    filled: dict[str, Any] = {}
    for level in "Ff":
        value, first, second = getattr(problem, level), getattr(problem, f"d{level}"), getattr(problem, f"hvp_{level}")
        both = getattr(problem, f"both_{level}")
        first = first or jax_gradient(value)
        second = second or _jax_product(value)
        filled |= {f"d{level}": first, f"hvp_{level}": second, f"both_{level}": both or _joined(first, second)}
    return replace(problem, **filled)


def _joined(first: Gradient, second: Product) -> Both:
    return lambda x, y, v: (*first(x, y), *second(x, y, v))


def jax_gradient(value: Any) -> Gradient:
    """Gradient of ``value(x, y)`` in both arguments by JAX, as a function of arrays of any kind.

    Parameters
    ----------
    value : callable
        ``(x, y) -> float`` written with ``jax.numpy`` (or plain operators).

    Returns
    -------
    callable
        ``(x, y) -> (gradient in x, gradient in y)``; both may be arrays or nested dicts of arrays. Kind and dtype are
        those of the arguments.

    Raises
    ------
    TypeError
        If ``value`` cannot be called.

    Examples
    --------
    >>> jax_gradient(lambda x, y: (x * y).sum())(np.array([2.0]), np.array([3.0]))
    (array([3.]), array([2.]))
    """
    if not callable(value):
        raise TypeError(f"value must be callable, got {type(value).__name__}")
    import jax

    return _from_jax(jax.jit(jax.grad(value, argnums=(0, 1))))


def _jax_product(value: Value) -> Product:
    import jax
    import jax.numpy as jnp

    def slope(x: Any, y: Any, v: Any) -> Any:  # <grad_y value, v>, whose gradient is both products at once
        return jnp.sum(jax.grad(value, argnums=1)(x, y) * v)

    return _from_jax(jax.jit(jax.grad(slope, argnums=(0, 1))))


def _from_jax(function: Any) -> Any:
    """``function`` of JAX arrays as a function of arrays of any kind, in double precision where they are."""
    import jax
    import jax.experimental

    home: Any = jax if hasattr(jax, "enable_x64") else jax.experimental  # where it was before JAX 0.8
    tree_map = jax.tree_util.tree_map

    def call(*arguments: Any) -> Any:
        leaves = jax.tree_util.tree_leaves(arguments)
        if all(kind_of(leaf) == "jax" for leaf in leaves):
            return function(*arguments)
        with home.enable_x64(any(str(leaf.dtype).endswith("float64") for leaf in leaves)):
            results = function(*tree_map(to_numpy, arguments))
            return tree_map(lambda g, a: from_numpy(np.array(g), like=a), tuple(results), arguments[: len(results)])

    return call


def merely_convex_toy(n: int = 100) -> KnownProblem:
    r"""Toy whose lower problem has many solutions: half of y does not occur in it.

    :math:`y=(y_1,y_2)` is an array of shape (2, n),
    :math:`F=\tfrac12\|x-y_2\|^2+\tfrac12\|y_1-\mathbf 1\|^2` and :math:`f=\tfrac12\|y_1\|^2-\langle x,y_1\rangle`.

    Parameters
    ----------
    n : int, default 100
        Length of x.

    Returns
    -------
    KnownProblem
        The solution is all ones.

    Raises
    ------
    TypeError
        If ``n`` is not an integer.
    ValueError
        If it is not positive.

    Notes
    -----
    Source: the experiment of Liu et al., arXiv 2302.03407, as in the authors' released code.

    Examples
    --------
    >>> toy = merely_convex_toy(3)
    >>> float(toy.problem.F(toy.x, toy.y))
    0.0
    """
    n = check_int(n, "n", low=1, high=10**7)

    def F(x: Array, y: Array) -> float:
        xp = array_namespace(x)
        return 0.5 * (xp.sum((x - y[1, :]) ** 2) + xp.sum((y[0, :] - 1) ** 2))

    def f(x: Array, y: Array) -> float:
        xp = array_namespace(x)
        return 0.5 * xp.sum(y[0, :] ** 2) - xp.sum(x * y[0, :])

    def stack(*rows: Array) -> Array:
        return array_namespace(*rows).stack(rows)

    problem = BilevelProblem(
        F,
        f,
        dF=lambda x, y: (x - y[1, :], stack(y[0, :] - 1, y[1, :] - x)),
        df=lambda x, y: (-y[0, :], stack(y[0, :] - x, 0 * x)),
        hvp_F=lambda x, y, v: (-v[1, :], v),
        hvp_f=lambda x, y, v: (-v[0, :], stack(v[0, :], 0 * x)),
    )
    return KnownProblem(problem, np.ones(n), np.ones((2, n)))


def quadratic_problem(n: int = 20, m: int = 20, *, rng: RNGLike = 0) -> KnownProblem:
    r"""Quadratic with a strongly convex lower problem, solved in closed form.

    :math:`F=\tfrac12y^\top Ay+\tfrac12(x-\hat x)^\top D(x-\hat x)` and :math:`f=\tfrac12y^\top Ay-x^\top By`; the
    eigenvalues of A lie in [1, 2], those of D in [0, 1]; B is uniform in [0, 1] over :math:`\sqrt{nm}`. The solution is
    :math:`x=(BA^{-1}B^\top+D)^{-1}D\hat x`, :math:`y=A^{-1}B^\top x`.

    Parameters
    ----------
    n, m : int, default 20
        Lengths of x and y.
    rng : None, int or numpy.random.Generator, default 0
        Draws the matrices.

    Returns
    -------
    KnownProblem
        Problem and solution; its derivatives take NumPy arrays.

    Raises
    ------
    TypeError, ValueError
        If a size is not a positive integer.

    Examples
    --------
    >>> known = quadratic_problem(4, 5)
    >>> gx, gy = known.problem.df(known.x, known.y)
    >>> bool(abs(gy).max() < 1e-12)
    True
    """
    n, m = check_int(n, "n", low=1, high=20_000), check_int(m, "m", low=1, high=20_000)
    rng = check_rng(rng)
    A, D = _with_spectrum(1 + rng.random(m), rng), _with_spectrum(rng.random(n), rng)
    B = rng.random((n, m)) / np.sqrt(n * m)
    x_hat = rng.random(n)
    x = np.linalg.solve(B @ np.linalg.solve(A, B.T) + D, D @ x_hat)
    problem = BilevelProblem(
        F=lambda x, y: 0.5 * float(y @ (A @ y) + (x - x_hat) @ (D @ (x - x_hat))),
        f=lambda x, y: float(0.5 * y @ (A @ y) - x @ (B @ y)),
        dF=lambda x, y: (D @ (x - x_hat), A @ y),
        df=lambda x, y: (-(B @ y), A @ y - x @ B),
        hvp_F=lambda x, y, v: (np.zeros_like(x), A @ v),
        hvp_f=lambda x, y, v: (-(B @ v), A @ v),
    )
    return KnownProblem(problem, x, np.linalg.solve(A, B.T @ x))


def _with_spectrum(eigenvalues: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random symmetric matrix with these eigenvalues."""
    Q = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))[0]
    return (Q * eigenvalues) @ Q.T


def cleaning_data(n_train: int = 800, n_val: int = 100, *, noise: float = 0.5, rng: RNGLike = 0) -> CleaningData:
    """Digits split into a training part with wrong labels, a small clean validation part, and a test part.

    Parameters
    ----------
    n_train, n_val : int, default 800 and 100
        Images in the first two parts; the rest of the 1,797 is the test part.
    noise : float, default 0.5
        Share of the training labels that are replaced by another class, at random.
    rng : None, int or numpy.random.Generator, default 0
        Split and wrong labels.

    Returns
    -------
    CleaningData
        Everything.

    Raises
    ------
    TypeError, ValueError
        If a size does not leave a test part, or ``noise`` is not in [0, 1].

    Examples
    --------
    >>> data = cleaning_data(rng=0)
    >>> data.X_train.shape, int(data.clean.sum()), len(data.y_test)
    ((800, 65), 400, 897)
    """
    n_train = check_int(n_train, "n_train", low=1, high=1700)
    n_val = check_int(n_val, "n_val", low=1, high=1796 - n_train)
    noise = check_float(noise, "noise", low=0, high=1)
    rng = check_rng(rng)
    split = digits(test_fraction=1 - (n_train + n_val) / 1797, rng=rng)
    X = np.hstack([split.X_train, np.ones((len(split.X_train), 1))])
    wrong = rng.permutation(n_train)[: round(noise * n_train)]
    labels = split.y_train[:n_train].astype(np.int64)
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    clean = np.ones(n_train, dtype=bool)
    clean[wrong] = False
    X_test = np.hstack([split.X_test, np.ones((len(split.X_test), 1))])
    return CleaningData(X[:n_train], labels, clean, X[n_train:], split.y_train[n_train:], X_test, split.y_test)


def cleaning_problem(data: CleaningData) -> BilevelProblem:
    r"""Data cleaning as a bilevel problem: the weights of the training rows that make validation loss smallest.

    :math:`f(x,y)=\frac1n\sum_i\sigma(x_i)\,\ell_i(y)` over the training rows and :math:`F(y)=\frac1m\sum_i\ell_i(y)`
    over the validation rows, :math:`\ell` being the cross-entropy of softmax regression and :math:`\sigma` the logistic
    function.

    Parameters
    ----------
    data : CleaningData
        As from :func:`cleaning_data`.

    Returns
    -------
    BilevelProblem
        ``x`` has shape (n_train,), ``y`` has shape (10, 65); one pass over the rows serves all derivatives.

    Raises
    ------
    TypeError
        If ``data`` is not a CleaningData.

    Examples
    --------
    >>> problem = cleaning_problem(cleaning_data())
    >>> round(float(problem.F(np.zeros(800), np.zeros((10, 65)))), 4)
    2.3026
    """
    if not isinstance(data, CleaningData):
        raise TypeError(f"data must be a CleaningData, got {type(data).__name__}")
    n = len(data.labels)
    held: dict[tuple[str | None, str], CleaningData] = {}

    def rows(y: Array) -> CleaningData:  # the data as arrays of the kind and dtype of y, converted once
        key = (kind_of(y), str(y.dtype))
        if key not in held:
            xp = array_namespace(y)
            arrays = (from_numpy(getattr(data, field.name), like=y) for field in fields(data))
            held[key] = CleaningData(*(xp.astype(a, y.dtype) if a.ndim == 2 else a for a in arrays))
        return held[key]

    def weights(x: Array) -> Array:
        return 1 / (1 + array_namespace(x).exp(-x))

    def upper(x: Array, y: Array, V: Array | None) -> tuple[Array, Array, Array, Array]:
        part = rows(y)
        share = array_namespace(y).full_like(part.X_val[:, 0], 1 / len(data.y_val))
        one = softmax_oracle(part.X_val, part.y_val, share, y, V)
        return 0 * x, one.gradient, 0 * x, one.product

    def lower(x: Array, y: Array, V: Array | None) -> tuple[Array, Array, Array, Array]:
        s = weights(x)
        one = softmax_oracle(rows(y).X_train, rows(y).labels, s / n, y, V)
        slope = s * (1 - s) / n
        return slope * one.losses, one.gradient, slope * one.slopes, one.product

    def F(x: Array, y: Array) -> float:
        losses = softmax_oracle(rows(y).X_val, rows(y).y_val, 0 * rows(y).X_val[:, 0], y, None).losses
        return float(array_namespace(y).mean(losses))

    def f(x: Array, y: Array) -> float:
        losses = softmax_oracle(rows(y).X_train, rows(y).labels, 0 * x, y, None).losses
        return float(array_namespace(y).sum(weights(x) * losses)) / n

    return BilevelProblem(
        F,
        f,
        dF=lambda x, y: upper(x, y, None)[:2],
        df=lambda x, y: lower(x, y, None)[:2],
        hvp_F=lambda x, y, v: upper(x, y, v)[2:],
        hvp_f=lambda x, y, v: lower(x, y, v)[2:],
        both_F=upper,
        both_f=lower,
    )


def softmax_pass(X: Array, labels: Array, weights: Array, Y: Array, V: Array | None = None) -> SoftmaxPass:
    r"""Losses, gradient, slopes and Hessian product of softmax regression, in one pass over the rows.

    With :math:`p_i=\operatorname{softmax}(Yx_i)` and :math:`u_i=Vx_i`: loss :math:`-\log p_{i,l_i}`, gradient
    :math:`\sum_iw_i(p_i-e_{l_i})x_i^\top`, slope :math:`\langle p_i-e_{l_i},u_i\rangle`, product
    :math:`\sum_iw_i(p_i\circ u_i-p_i\langle p_i,u_i\rangle)x_i^\top`.

    Parameters
    ----------
    X : array, shape (n, d)
        Rows.
    labels : array of int, shape (n,)
        Classes, from 0 to c - 1.
    weights : array, shape (n,)
        Weight of each row.
    Y : array, shape (c, d)
        Coefficients, one class a row.
    V : array, shape (c, d), optional
        Direction.

    Returns
    -------
    SoftmaxPass
        Arrays of the kind of ``X``.

    Raises
    ------
    TypeError, ValueError
        If shapes, labels or values do not fit.

    Examples
    --------
    >>> one = softmax_pass(np.eye(2), [0, 1], [0.5, 0.5], np.zeros((2, 2)))
    >>> one.losses.round(4), one.gradient
    (array([0.6931, 0.6931]), array([[-0.25,  0.25],
           [ 0.25, -0.25]]))
    """
    X, Y = check_array(X, "X", ndim=2), check_array(Y, "Y", ndim=2)
    labels = check_array(labels, "labels", ndim=1, dtype="integer", low=0)
    weights = check_array(weights, "weights", ndim=1)
    largest = int(array_namespace(labels).max(labels))
    if largest >= Y.shape[0]:
        raise ValueError(f"labels must be numbers of rows of Y, got {largest} for {Y.shape[0]} rows")
    for name, rows in (("labels", labels), ("weights", weights)):
        if rows.shape[0] != X.shape[0]:
            raise ValueError(f"X and {name} must have the same length, got {X.shape[0]} and {rows.shape[0]}")
    if Y.shape[1] != X.shape[1]:
        raise ValueError(f"Y must have as many columns as X, got {Y.shape[1]} and {X.shape[1]}")
    V = None if V is None else check_array(V, "V", shape=tuple(Y.shape))
    return softmax_oracle(X, labels, weights, Y, V)


def softmax_fit(
    X: np.ndarray, labels: np.ndarray, *, weights: np.ndarray | None = None, n_classes: int = 10, ridge: float = 1e-3
) -> np.ndarray:
    r"""Coefficients of weighted softmax regression from scratch: what a learned weighting is worth.

    Minimises :math:`\sum_iw_i\ell_i(Y)/\sum_iw_i+\frac\rho2\|Y\|^2` by L-BFGS.

    Parameters
    ----------
    X : numpy.ndarray, shape (n, d)
        Rows.
    labels : numpy.ndarray of int, shape (n,)
        Classes, from 0.
    weights : numpy.ndarray, shape (n,), optional
        Non-negative, not all zero; by default all equal.
    n_classes : int, default 10
        Number of classes.
    ridge : float, default 1e-3
        :math:`\rho`, positive.

    Returns
    -------
    numpy.ndarray, shape (n_classes, d)
        Y; the class of a row x is the largest entry of ``Y @ x``.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> data = cleaning_data()
    >>> Y = softmax_fit(data.X_val, data.y_val)
    >>> bool(((data.X_val @ Y.T).argmax(axis=1) == data.y_val).mean() > 0.95)
    True
    """
    n_classes = check_int(n_classes, "n_classes", low=2, high=10_000)
    ridge = check_float(ridge, "ridge", low=0, open_low=True, high=1e12)
    X = check_array(X, "X", ndim=2)
    labels = check_array(labels, "labels", ndim=1, dtype="integer", low=0, high=n_classes - 1)
    w = np.ones(len(X)) if weights is None else check_array(weights, "weights", ndim=1, low=0, high=1e100)
    check_same_length(X=X, labels=labels, weights=w)
    if not w.sum() > 0:
        raise ValueError("weights must not be all zero")
    w = w / w.sum()

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        Y = flat.reshape(n_classes, -1)
        one = softmax_oracle(X, labels, w, Y, None)
        return float((w * one.losses).sum() + ridge / 2 * (Y * Y).sum()), (one.gradient + ridge * Y).ravel()

    start = np.zeros(n_classes * X.shape[1])
    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x.reshape(n_classes, -1)


def unrolled_hypergradient(problem: BilevelProblem, x: Array, y0: Array, *, n_steps: int, step: float) -> Hypergradient:
    r"""Reverse-mode gradient of :math:`x\mapsto F(x,y_T(x))`, :math:`y_T` being T gradient steps on f ("RHG").

    Parameters
    ----------
    problem : BilevelProblem
        The problem.
    x : array
        Where.
    y0 : array
        Start of the lower iteration.
    n_steps : int
        T. All T iterates are kept.
    step : float
        Step of the lower iteration.

    Returns
    -------
    Hypergradient
        With y the last iterate.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Notes
    -----
    Costs T gradients and T Hessian products of f, and one gradient of F. Source: Franceschi et al., *Forward and
    reverse gradient-based hyperparameter optimization*, ICML 2017.

    Examples
    --------
    >>> known = quadratic_problem(3, 3)
    >>> found = unrolled_hypergradient(known.problem, known.x, 0 * known.y, n_steps=100, step=0.5)
    >>> bool(abs(found.grad_x).max() < 1e-12)
    True
    """
    problem = with_derivatives(problem)
    x, y = check_array(x, "x"), check_array(y0, "y0")
    n_steps = check_int(n_steps, "n_steps", low=0, high=10**7)
    step = check_float(step, "step", low=0, open_low=True, high=1e100)
    check_start(problem, x, y, ("x", "y0"))
    assert problem.df and problem.dF and problem.hvp_f
    path = [y]
    for _ in range(n_steps):
        path.append(path[-1] - step * problem.df(x, path[-1])[1])
    y = path.pop()
    grad_x, adjoint = problem.dF(x, y)
    for earlier in reversed(path):
        h_x, h_y = problem.hvp_f(x, earlier, adjoint)
        grad_x, adjoint = grad_x - step * h_x, adjoint - step * h_y
    return Hypergradient(float(problem.F(x, y)), grad_x, y)


def implicit_hypergradient(
    problem: BilevelProblem,
    x: Array,
    y: Array,
    *,
    n_terms: int,
    solver: Literal["cg", "neumann"] = "cg",
    step: float = 1.0,
) -> Hypergradient:
    r"""Hypergradient by implicit differentiation: :math:`\nabla_xF-\nabla^2_{xy}f\,[\nabla^2_{yy}f]^{-1}\nabla_yF`.

    Parameters
    ----------
    problem : BilevelProblem
        The problem; its lower level must be strongly convex for the inverse to exist.
    x, y : array
        Where; y should solve the lower problem.
    n_terms : int
        Hessian products spent on the linear system.
    solver : {"cg", "neumann"}, default "cg"
        Conjugate gradients, or that many terms of the series :math:`s\sum_j(I-s\nabla^2_{yy}f)^j`.
    step : float, default 1.0
        s, below two over the largest eigenvalue; for ``"neumann"`` only.

    Returns
    -------
    Hypergradient
        With y as it was given.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> known = quadratic_problem(3, 3)
    >>> found = implicit_hypergradient(known.problem, known.x, known.y, n_terms=3)
    >>> bool(abs(found.grad_x).max() < 1e-12)
    True
    """
    problem = with_derivatives(problem)
    x, y = check_array(x, "x"), check_array(y, "y")
    n_terms = check_int(n_terms, "n_terms", low=1, high=10**7)
    check_one_of(solver, "solver", ("cg", "neumann"))
    step = check_float(step, "step", low=0, open_low=True, high=1e100)
    check_start(problem, x, y)
    assert problem.dF and problem.hvp_f
    product = problem.hvp_f
    xp = array_namespace(y)
    grad_x, residual = problem.dF(x, y)
    v, direction, size = xp.zeros_like(y), residual, float(xp.sum(residual * residual))
    for _ in range(n_terms):
        if solver == "neumann":
            v, residual = v + step * residual, residual - step * product(x, y, residual)[1]
            continue
        image = product(x, y, direction)[1]
        curvature = float(xp.sum(direction * image))
        if not curvature > 1e-14 * float(
            xp.sum(direction * direction)
        ):  # solved already, or not strongly convex along this direction
            break
        length = size / curvature
        v, residual = v + length * direction, residual - length * image
        old, size = size, float(xp.sum(residual * residual))
        direction = residual + (size / old) * direction
    return Hypergradient(float(problem.F(x, y)), grad_x - product(x, y, v)[0], y)
