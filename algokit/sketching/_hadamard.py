"""Kernels of the Walsh-Hadamard transform: radix-8 passes in the caches on the CPU, shared memory on the GPU.

The transform of d numbers is log2(d) stages; a stage of stride h replaces every pair (x[i], x[i + h]) by its sum and
its difference. The stages commute, so they may be grouped as the caches like it. Those of stride 1, 2, 4, ... that fall
within one vector are shuffles (``mix``); all others add and subtract whole vectors. Values that lie ``width`` apart in
memory, as in a batch of columns, need no shuffles at all.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import njit, prange

from algokit.arrays import Array, array_namespace
from algokit.sketching._simd import BYTES, add, load, mix, mul, splat, store, sub

__all__ = ["across", "aligned", "block_size", "butterflies", "fwht_cpu", "fwht_gpu", "native", "within"]


def fwht_cpu(x: np.ndarray, axis: int, scale: float, overwrite: bool) -> np.ndarray:
    """Transform along ``axis``, times ``scale``; in the memory of ``x`` where that is allowed and possible."""
    source = native(x)
    in_place = overwrite and source.flags.writeable and np.shares_memory(source, x)
    y = source if in_place else np.empty_like(source)
    d = x.shape[axis]
    after = math.prod(x.shape[axis + 1 :])
    width = BYTES // source.itemsize
    factor = source.dtype.type(scale)
    args = (source.reshape(-1), y.reshape(-1), d)
    if after > 1:
        _strips(*args, after, factor, width)
    elif d < width:
        _tiny(*args, factor)
    elif x.size < 2**15:  # not worth waking the threads
        _rows(*args, factor, width)
    else:
        _rows_parallel(*args, factor, width)
    return y


def native(x: np.ndarray) -> np.ndarray:
    """``x`` as a contiguous array of float32 or float64 in the byte order of the machine, a copy only where needed."""
    return np.ascontiguousarray(x, np.float32 if x.dtype.itemsize == 4 else np.float64)


@njit(cache=True)
def _rows(x: np.ndarray, y: np.ndarray, d: int, scale: float, width: int) -> None:
    for start in range(0, len(x), d):
        _transform(x, y, start, d, width, True, scale)


@njit(cache=True, parallel=True)
def _rows_parallel(x: np.ndarray, y: np.ndarray, d: int, scale: float, width: int) -> None:
    for row in prange(len(x) // d):
        _transform(x, y, row * d, d, width, True, scale)


@njit(cache=True, parallel=True)
def _strips(x: np.ndarray, y: np.ndarray, d: int, after: int, scale: float, width: int) -> None:
    """Transform the middle axis of (before, d, after): strips of ``width`` columns pass through the cache."""
    per_slab = (after + width - 1) // width
    for job in prange(len(x) // (d * after) * per_slab):
        first = job % per_slab * width
        start = job // per_slab * d * after + first
        columns = min(width, after - first)
        u = aligned(d * width, x, width)
        if columns < width:
            u[:] = 0
        for i in range(d):
            for c in range(columns):
                u[i * width + c] = scale * x[start + i * after + c]
        _transform(u, u, 0, d * width, width, False, scale)
        for i in range(d):
            for c in range(columns):
                y[start + i * after + c] = u[i * width + c]


@njit(cache=True, parallel=True)
def _tiny(x: np.ndarray, y: np.ndarray, d: int, scale: float) -> None:
    """Rows shorter than a vector: plain radix 2."""
    for row in prange(len(x) // d):
        start = row * d
        for i in range(start, start + d):
            y[i] = scale * x[i]
        h = 1
        while h < d:
            for s in range(start, start + d, 2 * h):
                for i in range(s, s + h):
                    y[i], y[i + h] = y[i] + y[i + h], y[i] - y[i + h]
            h *= 2


@njit(cache=True)
def _transform(x: np.ndarray, y: np.ndarray, start: int, size: int, width: int, mixed: bool, scale: float) -> None:
    """Butterflies of all strides from ``width`` to ``size / 2`` on ``size`` elements; in the lanes too if ``mixed``.

    ``x`` is read once and in order, by the first pass; everything else happens in ``y``.
    """
    block = block_size(size, width)
    for s in range(start, start + size, block):
        within(x, y, s, size, block, width, mixed, scale)
    across(y, start, size, block, width)


@njit(cache=True)
def _first_radix(size: int, width: int) -> int:
    """Radix of the first pass, so that all others have radix 8."""
    stages = 0
    while width << stages < size:
        stages += 1
    return 1 << (stages if stages < 3 else (stages - 1) % 3 + 1)


@njit(cache=True)
def block_size(size: int, width: int) -> int:
    """Elements that are transformed together in the first-level cache: at most 512 vectors, 32 KiB."""
    block = width * _first_radix(size, width)
    while 8 * block <= min(size, 512 * width):
        block *= 8
    return block


@njit(cache=True)
def within(x: np.ndarray, y: np.ndarray, s: int, size: int, block: int, width: int, mixed: bool, scale: float) -> None:
    """Stages of strides below ``block``, for the block of a transform of ``size`` elements that starts at ``s``."""
    radix = _first_radix(size, width)
    factor = splat(x, scale)
    if radix == 8:
        _radix8(x, y, s, block, width, width, mixed, factor)
    else:
        _radix124(x, y, s, block, width, radix, mixed, factor)
    h = width * radix
    while h < block:
        _radix8(y, y, s, block, h, width, False, factor)
        h *= 8


@njit(cache=True)
def across(y: np.ndarray, start: int, size: int, block: int, width: int) -> None:
    """Stages of strides from ``block`` up."""
    one = splat(y, y[0])  # not used: these passes do not scale
    h = block
    while h < size:
        _radix8(y, y, start, size, h, width, False, one)
        h *= 8


@njit(cache=True)
def _take(x: np.ndarray, i: int, mixed: bool, factor: Any) -> Any:
    v = load(x, i)
    return mix(mul(v, factor)) if mixed else v


@njit(cache=True)
def _radix124(
    x: np.ndarray, y: np.ndarray, start: int, size: int, h: int, radix: int, mixed: bool, factor: Any
) -> None:
    for i in range(start, start + size, radix * h):
        a = _take(x, i, mixed, factor)
        if radix == 1:
            store(y, i, a)
        elif radix == 2:
            b = _take(x, i + h, mixed, factor)
            store(y, i, add(a, b))
            store(y, i + h, sub(a, b))
        else:
            b, c = _take(x, i + h, mixed, factor), _take(x, i + 2 * h, mixed, factor)
            d = _take(x, i + 3 * h, mixed, factor)
            a, b, c, d = add(a, b), sub(a, b), add(c, d), sub(c, d)
            store(y, i, add(a, c))
            store(y, i + h, add(b, d))
            store(y, i + 2 * h, sub(a, c))
            store(y, i + 3 * h, sub(b, d))


@njit(cache=True)
def _radix8(x: np.ndarray, y: np.ndarray, start: int, size: int, h: int, width: int, mixed: bool, factor: Any) -> None:
    """Three stages, of strides h, 2h and 4h, while eight vectors are in registers."""
    for s in range(start, start + size, 8 * h):
        for i in range(s, s + h, width):
            a, b = _take(x, i, mixed, factor), _take(x, i + h, mixed, factor)
            c, d = _take(x, i + 2 * h, mixed, factor), _take(x, i + 3 * h, mixed, factor)
            e, f = _take(x, i + 4 * h, mixed, factor), _take(x, i + 5 * h, mixed, factor)
            g, o = _take(x, i + 6 * h, mixed, factor), _take(x, i + 7 * h, mixed, factor)
            a, b, c, d = add(a, b), sub(a, b), add(c, d), sub(c, d)
            e, f, g, o = add(e, f), sub(e, f), add(g, o), sub(g, o)
            a, b, c, d = add(a, c), add(b, d), sub(a, c), sub(b, d)
            e, f, g, o = add(e, g), add(f, o), sub(e, g), sub(f, o)
            store(y, i, add(a, e))
            store(y, i + h, add(b, f))
            store(y, i + 2 * h, add(c, g))
            store(y, i + 3 * h, add(d, o))
            store(y, i + 4 * h, sub(a, e))
            store(y, i + 5 * h, sub(b, f))
            store(y, i + 6 * h, sub(c, g))
            store(y, i + 7 * h, sub(d, o))


@njit(cache=True)
def aligned(size: int, like: np.ndarray, width: int) -> np.ndarray:
    """Empty array whose vectors do not straddle cache lines."""
    room = np.empty(size + width, like.dtype)
    skip = (-(room.ctypes.data // room.itemsize)) % width
    return room[skip : skip + size]


_FWHT_CUDA = r"""
extern "C" __global__ void fwht_rows(const REAL* x, REAL* y, const int d, const REAL scale) {
    extern __shared__ char memory[];
    REAL* row = reinterpret_cast<REAL*>(memory);
    const long long start = (long long)blockIdx.x * d;
    for (int i = threadIdx.x; i < d; i += blockDim.x) row[i] = scale * x[start + i];
    for (int h = 1; h < d; h *= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < d / 2; i += blockDim.x) {
            const int j = 2 * i - (i & (h - 1));
            const REAL a = row[j], b = row[j + h];
            row[j] = a + b;
            row[j + h] = a - b;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < d; i += blockDim.x) y[start + i] = row[i];
}
"""


@functools.cache
def _fwht_kernel(real: str) -> Any:
    import cupy

    return cupy.RawKernel(_FWHT_CUDA.replace("REAL", real), "fwht_rows")


def fwht_gpu(x: Any, axis: int, scale: float, overwrite: bool) -> Any:
    """One block per row, the row in shared memory; longer rows are finished by whole-array butterflies."""
    import cupy

    moved = cupy.ascontiguousarray(cupy.moveaxis(x, axis, -1))
    d = moved.shape[-1]
    inner = min(d, 2**15 // x.dtype.itemsize)  # 32 KiB of shared memory
    y = moved if overwrite or not cupy.shares_memory(moved, x) else cupy.empty_like(moved)
    threads = max(32, min(1024, inner // 2))
    kernel = _fwht_kernel("float" if x.dtype == cupy.float32 else "double")
    kernel(
        (moved.size // inner,),
        (threads,),
        (moved, y, np.int32(inner), x.dtype.type(scale)),
        shared_mem=inner * x.dtype.itemsize,
    )
    y = butterflies(y, inner)
    return cupy.moveaxis(y, -1, axis)


def butterflies(x: Array, h: int) -> Array:
    """Stages of strides h, 2h, ... along the last axis by whole-array arithmetic, unnormalised."""
    xp = array_namespace(x)
    shape, d = x.shape, x.shape[-1]
    while h < d:
        x = xp.reshape(x, (-1, d // (2 * h), 2, h))
        a, b = x[:, :, 0, :], x[:, :, 1, :]
        x = xp.stack([a + b, a - b], axis=2)
        h *= 2
    return xp.reshape(x, shape)
