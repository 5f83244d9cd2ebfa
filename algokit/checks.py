"""Argument checks: a clear ValueError or TypeError that names the argument and the rule, before any work.

Every public function of the book calls these first. A message reads ``name must ..., got ...``.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Collection, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import scipy.sparse as sp

from algokit.arrays import Array, array_namespace, is_array

__all__ = [
    "AlgokitWarning",
    "RNGLike",
    "check_allocation",
    "check_array",
    "check_bool",
    "check_float",
    "check_int",
    "check_one_of",
    "check_positive_definite",
    "check_rng",
    "check_same_length",
    "check_sparse",
    "check_state",
]

DTypeKind = Literal["floating", "integer", "bool", "real", "any"]
RNGLike: TypeAlias = (
    int | Sequence[int] | np.random.SeedSequence | np.random.BitGenerator | np.random.Generator | None
)  #: what SPEC 7 calls ``rng``


class AlgokitWarning(UserWarning):
    """Something legal that the caller probably wants to know, such as a sweep limit that was reached."""


def check_array(
    x: Any,
    name: str,
    *,
    ndim: int | tuple[int, ...] | None = None,
    shape: tuple[int | None, ...] | None = None,
    dtype: DTypeKind = "floating",
    finite: bool = True,
    min_size: int = 1,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
) -> Array:
    """Array ``x``, checked, of the same kind as it came; nested sequences become NumPy arrays.

    Parameters
    ----------
    x : array or array-like
        The argument.
    name : str
        The argument's name, for the message.
    ndim : int or tuple of int, optional
        Allowed numbers of dimensions.
    shape : tuple of int or None, optional
        Required shape; None stands for any length of that axis.
    dtype : {"floating", "integer", "bool", "real", "any"}, default "floating"
        ``"floating"`` turns integers and booleans into float64 and leaves float32 and float64 alone (float16 becomes
        float32); ``"integer"`` refuses anything with a fraction; ``"real"`` lets floats and integers through unchanged.
    finite : bool, default True
        Whether NaN and infinities are refused.
    min_size : int, default 1
        Least number of elements.
    low, high : float, optional
        Bounds on every element, both included.
    open_low : bool, default False
        Exclude ``low`` itself: ``low=0, open_low=True`` means positive.

    Returns
    -------
    array
        ``x``, converted as ``dtype`` says; never a copy where none is needed.

    Raises
    ------
    TypeError
        If ``x`` is not numeric (strings, objects, None, a sparse matrix, ragged rows) or complex.
    ValueError
        If a rule does not hold.

    Examples
    --------
    >>> check_array([1, 2], "x", ndim=1)
    array([1., 2.])
    >>> check_array([1.0, float("nan")], "x")
    Traceback (most recent call last):
    ...
    ValueError: x must be finite, got NaN or infinity at index (1,)
    """
    x = _as_array(x, name)
    x = _cast(x, name, dtype)
    if ndim is not None and x.ndim not in (ndim if isinstance(ndim, tuple) else (ndim,)):
        raise ValueError(f"{name} must have {_either(ndim)} dimension(s), got shape {tuple(x.shape)}")
    if shape is not None and (
        x.ndim != len(shape) or any(want is not None and got != want for got, want in zip(x.shape, shape, strict=True))
    ):
        wanted = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")
    size = math.prod(x.shape)
    if size < min_size:
        raise ValueError(f"{name} must have at least {min_size} element(s), got shape {tuple(x.shape)}")
    if size:
        _check_values(x, name, finite=finite, low=low, high=high, open_low=open_low)
    return x


def _as_array(x: Any, name: str) -> Array:
    if sp.issparse(x):
        raise TypeError(f"{name} must be a dense array, got a sparse one: call {name}.toarray() if it fits")
    if is_array(x):
        return x
    try:
        return np.asarray(x)
    except (ValueError, TypeError) as error:
        raise TypeError(f"{name} must be an array of numbers, got {type(x).__name__}: {error}") from None


def _cast(x: Array, name: str, dtype: DTypeKind) -> Array:
    """``x`` with a dtype of the wanted kind, or the error that says why not."""
    if isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of real numbers, got dtype {x.dtype} (from {_short(x)})")
    xp = array_namespace(x)
    is_a = lambda kind: xp.isdtype(x.dtype, kind)  # noqa: E731
    if not is_a(("bool", "integral", "real floating")):
        raise TypeError(f"{name} must be an array of real numbers, got dtype {x.dtype}")
    if dtype == "floating":
        if not is_a("real floating"):
            return xp.astype(x, xp.float64)
        if "float16" in str(x.dtype):  # bfloat16 too
            return xp.astype(x, xp.float32)
    elif dtype == "integer" and not is_a("integral"):
        if is_a("bool"):
            raise TypeError(f"{name} must be an array of integers, got dtype {x.dtype}")
        if not bool(xp.all(xp.isfinite(x))) or not bool(xp.all(x == xp.floor(x))):
            raise ValueError(f"{name} must be an array of integers, got fractions, NaN or infinity")
        return xp.astype(x, xp.int64)
    elif dtype == "bool" and not is_a("bool"):
        raise TypeError(f"{name} must be an array of booleans, got dtype {x.dtype}")
    elif dtype == "real" and is_a("bool"):
        return xp.astype(x, xp.float64)
    return x


def _check_values(x: Array, name: str, *, finite: bool, low: float | None, high: float | None, open_low: bool) -> None:
    xp = array_namespace(x)
    if finite and xp.isdtype(x.dtype, "real floating"):
        ok = xp.isfinite(x)
        if not bool(xp.all(ok)):
            raise ValueError(f"{name} must be finite, got NaN or infinity at index {_first(~ok)}")
    if low is not None:
        bad = x <= low if open_low else x < low
        if bool(xp.any(bad)):
            rule = "positive" if (low == 0 and open_low) else f"{'>' if open_low else '>='} {low:g}"
            raise ValueError(f"{name} must be {rule} everywhere, got {_at(x, bad)} at index {_first(bad)}")
    if high is not None:
        bad = x > high
        if bool(xp.any(bad)):
            raise ValueError(f"{name} must be <= {high:g} everywhere, got {_at(x, bad)} at index {_first(bad)}")


def _first(mask: Array) -> tuple[int, ...]:
    """Index of the first true element."""
    xp = array_namespace(mask)
    flat = int(xp.argmax(xp.astype(xp.reshape(mask, (-1,)), xp.int8)))
    return tuple(int(i) for i in np.unravel_index(flat, tuple(mask.shape))) if mask.ndim else ()


def _at(x: Array, mask: Array) -> str:
    return f"{float(x[_first(mask)]):g}"


def _either(options: int | tuple[int, ...]) -> str:
    return " or ".join(map(str, options)) if isinstance(options, tuple) else str(options)


def _short(x: Any) -> str:
    text = repr(x)
    return text if len(text) < 60 else text[:57] + "..."


def check_sparse(
    x: Any, name: str, *, square: bool = False, low: float | None = None, finite: bool = True
) -> sp.csr_array:
    """Two-dimensional sparse or dense ``x`` as a canonical CSR array of float64 (sorted, duplicates summed).

    Parameters
    ----------
    x : sparse array, array or array-like, shape (n, m)
        The argument; a GPU array is refused.
    name : str
        The argument's name, for the message.
    square : bool, default False
        Whether n = m is required.
    low : float, optional
        Bound on every stored element, included.
    finite : bool, default True
        Whether NaN and infinities are refused.

    Returns
    -------
    scipy.sparse.csr_array, shape (n, m)
        A new array: the argument is never changed.

    Raises
    ------
    TypeError
        If ``x`` is not numeric.
    ValueError
        If a rule does not hold.
    """
    if sp.issparse(x):
        if x.ndim != 2:
            raise ValueError(f"{name} must have 2 dimension(s), got shape {x.shape}")
        csr = sp.csr_array(x, copy=True)
        check_array(csr.data, name, ndim=1, finite=finite, min_size=0, low=low)
        csr = csr.astype(np.float64)
    else:
        dense = check_array(x, name, ndim=2, finite=finite, low=low)
        if not isinstance(dense, np.ndarray):
            raise TypeError(f"{name} must be a NumPy or SciPy array, got {type(dense).__name__}")
        csr = sp.csr_array(dense, dtype=np.float64)
    if square and csr.shape[0] != csr.shape[1]:
        raise ValueError(f"{name} must be square, got shape {csr.shape}")
    if min(csr.shape) < 1:
        raise ValueError(f"{name} must have at least one row and one column, got shape {csr.shape}")
    csr.sum_duplicates()
    csr.eliminate_zeros()
    return csr


def check_int(value: Any, name: str, *, low: int | None = None, high: int | None = None) -> int:
    """Integer ``value`` (NumPy's and 3.0 count, True does not) within bounds, both included.

    Parameters
    ----------
    value : int
        The argument.
    name : str
        The argument's name, for the message.
    low, high : int, optional
        Bounds.

    Returns
    -------
    int
        The value as a Python integer.

    Raises
    ------
    TypeError
        If ``value`` is not an integer.
    ValueError
        If it is out of bounds.
    """
    whole = isinstance(value, numbers.Real) and math.isfinite(value) and float(value).is_integer()
    if isinstance(value, (bool, np.bool_)) or not whole:
        raise TypeError(f"{name} must be an integer, got {_short(value)}")
    return int(_in_bounds(int(value), name, low, high, "", "an integer"))


def check_float(
    value: Any,
    name: str,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Finite real number ``value`` within bounds.

    Parameters
    ----------
    value : float
        The argument.
    name : str
        The argument's name, for the message.
    low, high : float, optional
        Bounds, included unless said otherwise.
    open_low, open_high : bool, default False
        Exclude the bound itself.

    Returns
    -------
    float
        The value as a Python float.

    Raises
    ------
    TypeError
        If ``value`` is not a real number.
    ValueError
        If it is NaN, infinite or out of bounds.
    """
    if isinstance(value, (bool, np.bool_, str)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {_short(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    outside = ("l" if open_low else "") + ("h" if open_high else "")
    return float(_in_bounds(float(value), name, low, high, outside, "a number"))


def _in_bounds(value: float, name: str, low: float | None, high: float | None, outside: str, what: str) -> float:
    too_low = low is not None and (value < low or ("l" in outside and value == low))
    too_high = high is not None and (value > high or ("h" in outside and value == high))
    if too_low or too_high:
        left = "(-inf" if low is None else f"{'(' if 'l' in outside else '['}{low}"
        right = "inf)" if high is None else f"{high}{')' if 'h' in outside else ']'}"
        raise ValueError(f"{name} must be {what} in {left}, {right}, got {value}")
    return value


def check_bool(value: Any, name: str) -> bool:
    """Boolean ``value`` (NumPy's counts, 0 and 1 do not).

    Parameters
    ----------
    value : bool
        The argument.
    name : str
        The argument's name, for the message.

    Returns
    -------
    bool
        The value as a Python boolean.

    Raises
    ------
    TypeError
        If ``value`` is not a boolean.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {_short(value)}")
    return bool(value)


def check_one_of(value: Any, name: str, options: Collection[Any]) -> Any:
    """``value``, when it is one of ``options``.

    Parameters
    ----------
    value : object
        The argument.
    name : str
        The argument's name, for the message.
    options : collection
        What is allowed, usually strings.

    Returns
    -------
    object
        The value.

    Raises
    ------
    ValueError
        If it is anything else.

    Examples
    --------
    >>> check_one_of("tigth", "density", ("tight", "classic"))
    Traceback (most recent call last):
    ...
    ValueError: density must be one of 'tight', 'classic', got 'tigth'
    """
    if not any(type(value) is type(o) and value == o for o in options):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {_short(value)}")
    return value


def check_same_length(**arrays: Array) -> int:
    """Common length of the first axis of ``arrays``.

    Parameters
    ----------
    **arrays : array
        Arguments by their names.

    Returns
    -------
    int
        The length.

    Raises
    ------
    ValueError
        If the lengths differ.

    Examples
    --------
    >>> check_same_length(x=[1, 2], y=[3])
    Traceback (most recent call last):
    ...
    ValueError: x and y must have the same length, got 2 and 1
    """
    lengths = [a.shape[0] if is_array(a) else len(a) for a in arrays.values()]
    if len(set(lengths)) > 1:
        *head, last = arrays
        got = ", ".join(map(str, lengths[:-1])) + f" and {lengths[-1]}"
        raise ValueError(f"{', '.join(head)} and {last} must have the same length, got {got}")
    return lengths[0]


def check_positive_definite(x: Any, name: str, *, rtol: float = 1e-8) -> Array:
    """Symmetric positive definite matrix ``x``.

    Parameters
    ----------
    x : array, shape (..., n, n)
        The argument: one matrix or a stack of them.
    name : str
        The argument's name, for the message.
    rtol : float, default 1e-8
        Largest accepted asymmetry, relative to the largest element.

    Returns
    -------
    array, shape (..., n, n)
        The matrix, as it came.

    Raises
    ------
    ValueError
        If it is not square, not symmetric or not positive definite.
    """
    x = check_array(x, name)
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{name} must be a square matrix, got shape {tuple(x.shape)}")
    xp = array_namespace(x)
    if float(xp.max(xp.abs(x - xp.matrix_transpose(x)))) > rtol * float(xp.max(xp.abs(x))):
        raise ValueError(f"{name} must be symmetric")
    smallest = float(xp.min(xp.linalg.eigvalsh(x)))
    if smallest <= 0:
        raise ValueError(f"{name} must be positive definite, got smallest eigenvalue {smallest:.3g}")
    return x


def check_rng(rng: RNGLike, name: str = "rng") -> np.random.Generator:
    """NumPy generator from a seed or generator, by the rules of SPEC 7.

    Parameters
    ----------
    rng : None, int, sequence of int, SeedSequence, BitGenerator or Generator
        None draws fresh entropy; a generator is used as it is (and advanced).
    name : str, default "rng"
        The argument's name, for the message.

    Returns
    -------
    numpy.random.Generator
        ``numpy.random.default_rng(rng)``.

    Raises
    ------
    TypeError
        If ``rng`` is none of these: the global state and ``RandomState`` are not accepted.
    ValueError
        If a seed is negative.

    Notes
    -----
    Source: Scientific Python SPEC 7, *Seeding pseudo-random number generation*.
    """
    if isinstance(rng, (bool, float, np.floating, str, np.random.RandomState)):
        raise TypeError(f"{name} must be None, an integer seed or a numpy.random.Generator, got {_short(rng)}")
    try:
        return np.random.default_rng(rng)
    except TypeError:
        raise TypeError(
            f"{name} must be None, an integer seed or a numpy.random.Generator, got {type(rng).__name__}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{name} must be a non-negative seed, got {_short(rng)}: {error}") from None


def check_state(state: Any, name: str, keys: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """State of a mergeable summary: a flat dict of NumPy arrays without objects.

    Parameters
    ----------
    state : object
        What to check.
    name : str
        Name of the argument, for the message.
    keys : collection of str, optional
        The keys that it must have, and no others.

    Returns
    -------
    dict of str to numpy.ndarray
        The state. NumPy's numbers have become arrays without axes, as the sum of two such arrays is a number.

    Raises
    ------
    TypeError
        If ``state`` is not a dict of NumPy arrays with strings as keys, or an array holds objects.
    ValueError
        If its keys are others.

    Examples
    --------
    >>> check_state({"wins": np.zeros(3)}, "state", ("wins", "names"))
    Traceback (most recent call last):
        ...
    ValueError: state must be a state with the keys ['names', 'wins'], got ['wins']: is it another summary's?
    """
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise TypeError(f"{name} must be a state: a dict of NumPy arrays by name, got {type(state).__name__}")
    state = {key: np.asarray(x) if isinstance(x, np.generic) else x for key, x in state.items()}
    for key, value in state.items():
        if not isinstance(value, np.ndarray) or value.dtype.hasobject:
            kind = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise TypeError(f"{name} must hold NumPy arrays without objects, got {kind} under {key!r}")
    if keys is not None and set(state) != set(keys):
        raise ValueError(
            f"{name} must be a state with the keys {sorted(keys)}, got {sorted(state)}: is it another summary's?"
        )
    return state


def check_allocation(shape: tuple[int, ...], name: str, *, itemsize: int = 8) -> None:
    """Refuse, before any work, an argument that asks for an array larger than this machine's memory.

    Parameters
    ----------
    shape : tuple of int
        Shape of the array that would be made.
    name : str
        The argument responsible, for the message.
    itemsize : int, default 8
        Bytes per element.

    Raises
    ------
    ValueError
        If the array would not fit.
    """
    needed = math.prod(shape) * itemsize
    try:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        available = 2**40
    if needed > available:
        raise ValueError(
            f"{name} is too large: it asks for an array of shape {shape} ({needed / 1e9:.3g} GB), "
            f"more than the {available / 1e9:.3g} GB of this machine"
        )
