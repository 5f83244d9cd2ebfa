"""Where an array lives and which kernel serves it: namespace, device, conversion, kernel choice.

Every function of the book gives back the kind of array that it was given. Whole-array arithmetic goes through the
array API (:func:`array_namespace`); a hand-written kernel is chosen by :func:`pick_kernel`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import array_api_compat as compat
import numpy as np

__all__ = ["Array", "ArrayT", "array_namespace", "from_numpy", "is_array", "kind_of", "pick_kernel", "to_numpy"]

Array: TypeAlias = Any  #: an array of any kind named in :func:`kind_of`
ArrayT = TypeVar("ArrayT")  #: the same kind of array in and out


def kind_of(x: Any) -> str | None:
    """Kind of array that ``x`` is.

    Parameters
    ----------
    x : object
        Anything.

    Returns
    -------
    str or None
        ``"numpy"``, ``"cupy"``, ``"torch"``, ``"jax"`` or ``"array_api_strict"``; None for anything else.

    Examples
    --------
    >>> import numpy as np
    >>> kind_of(np.ones(3)), kind_of([1.0, 2.0])
    ('numpy', None)
    """
    if isinstance(x, (np.ndarray, np.generic)):
        return "numpy"
    if compat.is_cupy_array(x):
        return "cupy"
    if compat.is_torch_array(x):
        return "torch"
    if compat.is_jax_array(x):
        return "jax"
    if type(x).__module__.partition(".")[0] == "array_api_strict":
        return "array_api_strict"
    return None


def is_array(x: Any) -> bool:
    """Whether ``x`` is an array of a kind that the book knows (see :func:`kind_of`).

    Parameters
    ----------
    x : object
        Anything.

    Returns
    -------
    bool
        True for NumPy, CuPy, torch, JAX and array-api-strict arrays.
    """
    return kind_of(x) is not None


def array_namespace(*arrays: Array) -> Any:
    """Array-API namespace shared by ``arrays``.

    Parameters
    ----------
    *arrays : array
        Arrays of one kind.

    Returns
    -------
    module
        ``numpy``, ``cupy``, ... in the form that `array-api-compat` gives it.

    Raises
    ------
    TypeError
        If an argument is not an array, or the arrays are of different kinds.
    """
    return compat.array_namespace(*arrays)


def to_numpy(x: Array) -> np.ndarray:
    """Copy (or, on the CPU, view) of ``x`` as a NumPy array.

    Parameters
    ----------
    x : array or array-like
        An array of any kind on any device, or nested sequences of numbers.

    Returns
    -------
    numpy.ndarray
        The same shape and dtype, on the host.

    Examples
    --------
    >>> to_numpy([[1.0, 2.0]]).shape
    (1, 2)
    """
    kind = kind_of(x)
    if kind == "cupy":
        return x.get()
    if kind == "torch":
        return x.detach().cpu().numpy()
    if kind == "array_api_strict":
        return np.array(np.from_dlpack(x))  # a copy: DLPack hands out a read-only view
    return np.asarray(x)


def from_numpy(x: np.ndarray, *, like: Array) -> Array:
    """NumPy array ``x`` as the kind of array, and on the device, of ``like``.

    Parameters
    ----------
    x : numpy.ndarray
        What to convert.
    like : array
        The array whose kind and device are wanted. Anything that is not an array means NumPy.

    Returns
    -------
    array
        The same values as ``x``.
    """
    if kind_of(like) in (None, "numpy"):
        return x
    xp = array_namespace(like)
    return xp.asarray(x, device=compat.device(like))


def pick_kernel(x: Array, *, cpu: Callable[..., Any], gpu: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The kernel that serves arrays such as ``x``: same signature, same kind of array back.

    NumPy arrays go to ``cpu`` and CuPy arrays to ``gpu`` as they are. Arrays of another kind are handed over without a
    copy where DLPack can do so (host memory to ``cpu``, CUDA memory to ``gpu``), and the result is handed back.

    Parameters
    ----------
    x : array
        The array that decides.
    cpu : callable
        Kernel on NumPy arrays.
    gpu : callable, optional
        Kernel on CuPy arrays. Without one, arrays on a GPU are refused: moving them to the host behind the caller's
        back would hide the cost.

    Returns
    -------
    callable
        Takes what ``cpu`` takes.

    Raises
    ------
    TypeError
        If ``x`` is on a GPU and there is no GPU kernel.
    """
    kind = kind_of(x)
    if kind in (None, "numpy"):
        return cpu
    on_gpu = kind == "cupy" or "cuda" in str(compat.device(x)).lower()
    if on_gpu and gpu is None:
        raise TypeError(
            f"{cpu.__name__.strip('_')} has no GPU kernel: pass a NumPy array, for example algokit.arrays.to_numpy(x)"
        )
    if kind == "cupy":
        assert gpu is not None
        return gpu
    if not on_gpu:
        return functools.partial(_through, cpu, to_numpy, functools.partial(from_numpy, like=x))
    import cupy

    xp = array_namespace(x)
    assert gpu is not None
    return functools.partial(_through, gpu, cupy.from_dlpack, xp.from_dlpack)


def _through(
    kernel: Callable[..., Any], there: Callable[[Any], Any], back: Callable[[Any], Any], *args: Any, **kwargs: Any
) -> Any:
    """Call ``kernel`` with every array argument taken ``there``, and bring every array of the result ``back``."""
    result = kernel(
        *(there(a) if is_array(a) else a for a in args),
        **{k: there(a) if is_array(a) else a for k, a in kwargs.items()},
    )
    if isinstance(result, tuple):
        return (
            type(result)(*(back(r) if is_array(r) else r for r in result))
            if hasattr(result, "_fields")
            else tuple(back(r) if is_array(r) else r for r in result)
        )
    return back(result) if is_array(result) and np.ndim(result) else result
