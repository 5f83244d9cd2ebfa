"""Codes of one to eight bits, stored without gaps.

Code i of a row takes the bits ``i * bits`` to ``(i + 1) * bits - 1`` of the row, the lowest bit first; bit j of a row
is bit ``j % 8`` of its byte ``j // 8``. So two codes of four bits share a byte, the first in its lower half, and eight
codes of three bits take three bytes. Every row is filled up with zeros to whole bytes.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from algokit.arrays import Array, array_namespace, pick_kernel
from algokit.checks import check_array, check_int

__all__ = ["pack_codes", "packed_length", "unpack_codes"]


def pack_codes(codes: Array, bits: int) -> Array:
    """Small integers along the last axis as a dense stream of bits.

    Parameters
    ----------
    codes : integer array, shape (..., n)
        Codes in [0, 2**bits).
    bits : int
        Bits of a code, 1 to 8.

    Returns
    -------
    array of uint8, shape (..., ceil(n * bits / 8))
        Lowest bits first; each row is filled up with zeros to whole bytes.

    Raises
    ------
    TypeError
        If an argument is not made of integers.
    ValueError
        If a code does not fit into ``bits`` bits, or ``codes`` is empty.

    Examples
    --------
    >>> import numpy as np
    >>> pack_codes(np.array([1, 2, 3]), 4).tolist()
    [33, 3]
    >>> pack_codes(np.array([7, 0, 0, 0, 0, 0, 0, 1]), 3).tolist()
    [7, 0, 32]
    """
    bits = check_int(bits, "bits", low=1, high=8)
    codes = check_array(codes, "codes", dtype="integer", low=0, high=2**bits - 1)
    if codes.ndim == 0:
        raise ValueError("codes must have at least one dimension, got a single number")
    return pick_kernel(codes, cpu=_pack_cpu, gpu=_pack_planes)(codes, bits)


def unpack_codes(packed: Array, bits: int, size: int) -> Array:
    """Codes from a dense stream of bits: the inverse of :func:`pack_codes`.

    Parameters
    ----------
    packed : array of uint8, shape (..., ceil(size * bits / 8))
        What :func:`pack_codes` returned.
    bits : int
        Bits of a code, 1 to 8.
    size : int
        Number of codes in a row.

    Returns
    -------
    array of uint8, shape (..., size)
        The codes.

    Raises
    ------
    TypeError
        If an argument is not made of integers.
    ValueError
        If the last axis of ``packed`` has not the length that ``size`` codes take.

    Examples
    --------
    >>> import numpy as np
    >>> unpack_codes(np.array([33, 3], np.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    bits = check_int(bits, "bits", low=1, high=8)
    size = check_int(size, "size", low=1, high=2**40)
    packed = check_array(packed, "packed", dtype="integer", low=0, high=255)
    if packed.ndim == 0 or packed.shape[-1] != packed_length(size, bits):
        raise ValueError(
            f"packed must have a last axis of {packed_length(size, bits)} bytes for a size of {size} codes of {bits} "
            f"bits, got shape {tuple(packed.shape)}"
        )
    return pick_kernel(packed, cpu=_unpack_cpu, gpu=_unpack_planes)(packed, bits, size)


def packed_length(size: int, bits: int) -> int:
    """Bytes that ``size`` codes of ``bits`` bits take.

    Parameters
    ----------
    size, bits : int
        Number of codes, and bits of each.

    Returns
    -------
    int
        ``ceil(size * bits / 8)``.

    Examples
    --------
    >>> packed_length(8, 3)
    3
    """
    return -(-size * bits // 8)


def _pack_cpu(codes: np.ndarray, bits: int) -> np.ndarray:
    rows = np.ascontiguousarray(codes, dtype=np.uint8).reshape(-1, codes.shape[-1])
    out = np.zeros((len(rows), packed_length(rows.shape[1], bits)), np.uint8)
    _pack_rows(rows, bits, out)
    return out.reshape(*codes.shape[:-1], out.shape[1])


def _unpack_cpu(packed: np.ndarray, bits: int, size: int) -> np.ndarray:
    rows = np.ascontiguousarray(packed, dtype=np.uint8).reshape(-1, packed.shape[-1])
    out = np.empty((len(rows), size), np.uint8)
    _unpack_rows(rows, bits, out)
    return out.reshape(*packed.shape[:-1], size)


@njit(cache=True, parallel=True)
def _pack_rows(codes: np.ndarray, bits: int, out: np.ndarray) -> None:
    for k in prange(codes.shape[0]):
        held, pending, at = 0, 0, 0  # bits not yet written, how many, next byte
        for i in range(codes.shape[1]):
            held |= int(codes[k, i]) << pending
            pending += bits
            if pending >= 8:
                out[k, at] = held & 255
                held >>= 8
                pending -= 8
                at += 1
        if pending > 0:
            out[k, at] = held & 255


@njit(cache=True, parallel=True)
def _unpack_rows(packed: np.ndarray, bits: int, out: np.ndarray) -> None:
    mask = (1 << bits) - 1
    for k in prange(out.shape[0]):
        held, pending, at = 0, 0, 0
        for i in range(out.shape[1]):
            if pending < bits:
                held |= int(packed[k, at]) << pending
                pending += 8
                at += 1
            out[k, i] = held & mask
            held >>= bits
            pending -= bits


def _pack_planes(codes: Array, bits: int) -> Array:
    """The same in whole-array arithmetic, for arrays on a GPU: one array of ones and zeros, eight times the size."""
    xp = array_namespace(codes)
    *lead, n = codes.shape
    planes = (xp.astype(codes, xp.int32)[..., None] >> xp.arange(bits, dtype=xp.int32)) & 1  # (..., n, bits)
    stream = xp.reshape(planes, (*lead, n * bits))
    fill = 8 * packed_length(n, bits) - n * bits
    if fill:
        stream = xp.concat([stream, xp.zeros((*lead, fill), dtype=xp.int32)], axis=-1)
    weights = xp.asarray([1 << j for j in range(8)], dtype=xp.int32)
    return xp.astype(xp.sum(xp.reshape(stream, (*lead, -1, 8)) * weights, axis=-1), xp.uint8)


def _unpack_planes(packed: Array, bits: int, size: int) -> Array:
    xp = array_namespace(packed)
    *lead, n = packed.shape
    planes = (xp.astype(packed, xp.int32)[..., None] >> xp.arange(8, dtype=xp.int32)) & 1  # (..., bytes, 8)
    stream = xp.reshape(planes, (*lead, 8 * n))[..., : size * bits]
    weights = xp.asarray([1 << j for j in range(bits)], dtype=xp.int32)
    return xp.astype(xp.sum(xp.reshape(stream, (*lead, size, bits)) * weights, axis=-1), xp.uint8)
