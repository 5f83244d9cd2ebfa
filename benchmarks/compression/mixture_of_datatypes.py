"""Race of the mixture's quantiser against a vectorised NumPy stack, and of the packed product against BLAS.

    make bench PART=compression SLUG=mixture_of_datatypes

The stack tries every format on the whole matrix and picks by error: the same formats and weights. The packed product
reads 3 or 4 bits a weight and decodes on the fly; BLAS reads the same weights, dequantised to float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from algokit.compression.mixture_of_datatypes import (
    BITMOD3,
    BITMOD4,
    DATATYPES,
    PackedMixture,
    dequantize,
    pack_mixture,
    packed_matmul,
    quantize_mixture,
)
from algokit.races import Contestant, Limit, Race, copy_bandwidth, race, write_results

GROUP = 128
NOTE = (
    "Lost. Ours reads 8 to 10 times fewer bytes, but is limited by its look-ups, one for every two codes, and these "
    "two cores are fed by memory and a large cache at over 40 GB/s, which is as fast as BLAS can use the plain matrix. "
    "The gain is in memory; a decoder with byte shuffles, which Numba's loops do not make, is what would turn the race."
)


def weights(n: int) -> np.ndarray:
    """A square matrix of normal weights in float32."""
    return np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)


def ours(bits: int):  # type: ignore[no-untyped-def]
    """Formats and codes by the compiled search."""

    def run(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        q = quantize_mixture(w, bits=bits, group=GROUP)
        return q.types, q.codes

    return run


def numpy_stack(bits: int):  # type: ignore[no-untyped-def]
    """Formats and codes, all formats tried on the whole matrix at once, codes by binary search."""

    def run(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = w.reshape(len(w), -1, GROUP)
        largest = np.abs(x).max(axis=-1, keepdims=True)
        codes, errors = [], []
        for name in BITMOD3 if bits == 3 else BITMOD4:
            levels = np.array(DATATYPES[name], w.dtype)
            step = np.clip(largest / np.abs(levels).max(), 1e-5, 1e4)
            code = np.searchsorted((levels[1:] + levels[:-1]) / 2, x / step).astype(np.uint8)
            codes.append(code)
            errors.append(((x - step * levels[code]) ** 2).mean(axis=-1))
        types = np.argmin(errors, axis=0)
        code = np.take_along_axis(np.stack(codes), types[None, ..., None], axis=0)[0]
        return types, code.reshape(w.shape)

    return run


def numpy_ladder(bits: int):  # type: ignore[no-untyped-def]
    """The same with one comparison of the whole matrix for each midpoint, as the official code does."""

    def run(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = w.reshape(len(w), -1, GROUP)
        largest = np.abs(x).max(axis=-1, keepdims=True)
        codes, errors = [], []
        for name in BITMOD3 if bits == 3 else BITMOD4:
            levels = np.array(DATATYPES[name], w.dtype)
            step = np.clip(largest / np.abs(levels).max(), 1e-5, 1e4)
            scaled, code = x / step, np.zeros(x.shape, np.uint8)
            for mid in (levels[1:] + levels[:-1]) / 2:
                code += scaled > mid
            codes.append(code)
            errors.append(((x - step * levels[code]) ** 2).mean(axis=-1))
        types = np.argmin(errors, axis=0)
        code = np.take_along_axis(np.stack(codes), types[None, ..., None], axis=0)[0]
        return types, code.reshape(w.shape)

    return run


def same_choice(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> bool:
    """Formats of all groups but a few near ties, and codes of the groups with the same format."""
    same = a[0] == b[0]
    shape = (*same.shape, GROUP)
    return bool(same.mean() > 0.9999 and np.mean(a[1].reshape(shape)[same] == b[1].reshape(shape)[same]) > 0.99999)


class Product(NamedTuple):
    """A packed matrix, the same dequantised, and a vector."""

    packed: PackedMixture
    dense: np.ndarray
    x: np.ndarray


def product(n: int, bits: int) -> Product:
    """A square matrix of order n."""
    q = quantize_mixture(weights(n), bits=bits, group=GROUP)
    x = np.random.default_rng(1).standard_normal((1, n)).astype(np.float32)
    return Product(pack_mixture(q), dequantize(q), x)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to 1e-5 of the largest output."""
    return bool(np.abs(a - b).max() <= 1e-5 * np.abs(b).max())


def main() -> list[Race]:
    """The search at both widths, and the products."""
    matrix, bandwidth, races = weights(2048), copy_bandwidth(), []
    for bits in (3, 4):
        races.append(
            race(
                f"choose formats, 2048 x 2048, {bits} bits, groups of 128",
                data=lambda: matrix,
                ours=Contestant("algokit", ours(bits)),
                peers=[
                    Contestant("NumPy, binary search", numpy_stack(bits), "numpy"),
                    Contestant("NumPy, one comparison a midpoint", numpy_ladder(bits), "numpy"),
                ],
                agree=same_choice,
                agreement="same formats and codes (but for near ties)",
                runs=5,
                note="The NumPy stacks keep four arrays of codes and several of floats; ours none but the result.",
            )
        )
    for n in (4096, 8192):
        for bits in (3, 4):
            case = product(n, bits)
            size = case.packed.packed.nbytes + case.packed.scales.nbytes + case.packed.types.nbytes
            races.append(
                race(
                    f"product with one vector, {n} x {n}, {bits} bits",
                    data=lambda case=case: case,
                    ours=Contestant("algokit, packed", lambda c: packed_matmul(c.packed, c.x)[0]),
                    peers=[Contestant("NumPy (BLAS), float32", lambda c: c.dense @ c.x[0], "numpy")],
                    agree=close,
                    agreement="equal to 1e-5 of the largest output",
                    runs=15,
                    limit=lambda s, size=size: Limit(
                        "bytes", float(f"{size / s / 1e9 / bandwidth:.3g}"), "measured copy bandwidth"
                    ),
                    note=NOTE,
                )
            )
    return races


if __name__ == "__main__":
    write_results("compression", "mixture_of_datatypes", main(), folder=Path(__file__).parents[1] / "results")
