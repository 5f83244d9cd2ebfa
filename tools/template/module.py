"""Compensated summation (Neumaier's variant of Kahan's): an error that does not grow with the number of terms.

Reference: A. Neumaier, ZAMM 54(1):39-51, 1974. Chapter: notebooks/__PART__/__SLUG__.ipynb.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from algokit.arrays import Array, pick_kernel
from algokit.checks import check_array

__all__ = ["compensated_sum"]


def compensated_sum(x: Array) -> float:
    r"""Sum of ``x`` with error bounded by :math:`2u\sum_i|x_i|` to first order, whatever the length.

    Parameters
    ----------
    x : array, shape (n,), float32 or float64
        The terms, all finite.

    Returns
    -------
    float
        :math:`\sum_i x_i`, in the units of ``x``.

    Raises
    ------
    TypeError
        If ``x`` does not hold real numbers.
    ValueError
        If ``x`` is not one-dimensional, is empty, or holds a NaN or an infinity.

    Notes
    -----
    Source: A. Neumaier, Rundungsfehleranalyse einiger Verfahren zur Summation endlicher Summen, ZAMM 54:39-51, 1974.

    Examples
    --------
    >>> import numpy as np
    >>> compensated_sum(np.array([1.0, 1e100, 1.0, -1e100]))
    2.0
    """
    x = check_array(x, "x", ndim=1)
    return float(pick_kernel(x, cpu=_sum)(x))


@njit(cache=True)
def _sum(x: np.ndarray) -> float:
    total, lost = x[0], x.dtype.type(0)
    for term in x[1:]:
        new = total + term
        lost += (total - new) + term if abs(total) >= abs(term) else (term - new) + total  # eq. (1) of the chapter
        total = new
    return total + lost
