"""BitMoD: the best of several small number formats for every group of weights, and the bit-serial machine for it.

Scales from the largest magnitude, round to nearest with ties to the lower level, formats chosen by squared error; with
the integer, floating-point, ANT and MX formats it is compared with. No calibration data.

Reference: Y. Chen et al., *BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration*, HPCA 2025 (arXiv 2411.11745).
Chapter: notebooks/compression/mixture_of_datatypes.ipynb.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from algokit.arrays import Array, array_namespace, from_numpy, pick_kernel, to_numpy
from algokit.checks import check_array, check_bool, check_int, check_one_of
from algokit.compression._packing import pack_codes, unpack_codes

__all__ = [
    "ANT3",
    "ANT4",
    "BITMOD3",
    "BITMOD4",
    "DATATYPES",
    "BitSerialCost",
    "MixtureQuantized",
    "PackedMixture",
    "bit_serial_cost",
    "bit_serial_matmul",
    "bit_serial_terms",
    "dequantize",
    "effective_bits",
    "pack_codes",
    "pack_mixture",
    "packed_matmul",
    "quantize_int",
    "quantize_mixture",
    "quantize_mx",
    "quantize_to_datatype",
    "unpack_codes",
]


def _signed(*magnitudes: int, extra: int | None = None) -> tuple[float, ...]:
    """Zero, both signs of the magnitudes, and one extra level: ascending."""
    levels = {0, *magnitudes, *(-m for m in magnitudes)} | ({extra} if extra is not None else set())
    return tuple(float(v) for v in sorted(levels))


_FP3, _FP4 = (1, 2, 4), (1, 2, 3, 4, 6, 8, 12)

#: Levels of each format as integers, ascending: only their ratios matter. ``er`` adds a level inside the range of the
#: floating-point format (extra resolution), ``ea`` one beyond its end (extra asymmetry); both use its negative zero.
DATATYPES: dict[str, tuple[float, ...]] = {
    "int3": _signed(1, 2, 3),
    "fp3": _signed(*_FP3),
    "fp3_er_pos": _signed(*_FP3, extra=3),
    "fp3_er_neg": _signed(*_FP3, extra=-3),
    "fp3_ea_pos": _signed(*_FP3, extra=6),
    "fp3_ea_neg": _signed(*_FP3, extra=-6),
    "int4": _signed(*range(1, 8)),
    "fp4": _signed(*_FP4),
    "flint4": _signed(1, 2, 3, 4, 6, 8, 16),
    "fp4_er_pos": _signed(*_FP4, extra=10),
    "fp4_er_neg": _signed(*_FP4, extra=-10),
    "fp4_ea_pos": _signed(*_FP4, extra=16),
    "fp4_ea_neg": _signed(*_FP4, extra=-16),
}
BITMOD3 = ("fp3_er_pos", "fp3_er_neg", "fp3_ea_pos", "fp3_ea_neg")  #: the four formats of BitMoD at 3 bits
BITMOD4 = ("fp4_er_pos", "fp4_er_neg", "fp4_ea_pos", "fp4_ea_neg")  #: the four formats of BitMoD at 4 bits
ANT3 = ("int3", "fp3")  #: the adaptive choice of ANT at 3 bits
ANT4 = ("int4", "flint4")  #: the adaptive choice of ANT at 4 bits

SCALE_LOW, SCALE_HIGH = 1e-5, 1e4  # where a scale is clamped
_TERM_SLOTS = 2  # terms of a weight that the machine can hold: enough for every format here
_FRACTION_BITS = 24  # float16 numbers are integers times 2**-24


@dataclass(frozen=True, eq=False)
class MixtureQuantized:
    """A matrix with a format of its own for every group of weights.

    Attributes
    ----------
    codes : array of uint8, shape (K, C)
        Index into the ascending levels of the group's format.
    scales : array, shape (K, C / group)
        Step of each group: a weight is ``scale * level``.
    types : array of uint8, shape (K, C / group)
        Index into ``names``.
    names : tuple of str
        The formats to choose from, keys of :data:`DATATYPES`.
    group : int
        Weights in a group, along the inputs.
    shape : tuple of int
        (K, C): outputs and inputs.
    bits : int
        Bits of a code.
    scale_codes : array of uint8 or None, shape (K, C / group)
        With ``scale_bits=8``: ``scales = row_scales * scale_codes``.
    row_scales : array or None, shape (K, 1)
        With ``scale_bits=8``: a float16 number for each output.
    """

    codes: Array
    scales: Array
    types: Array
    names: tuple[str, ...]
    group: int
    shape: tuple[int, int]
    bits: int
    scale_codes: Array = None
    row_scales: Array = None


@dataclass(frozen=True, eq=False)
class PackedMixture:
    """What :class:`MixtureQuantized` says, with codes stored without gaps: what :func:`packed_matmul` multiplies with.

    Attributes
    ----------
    packed : array of uint8, shape (K, C * bits / 8)
        Codes as :func:`pack_codes` lays them out.
    scales : array of float32, shape (K, C / group)
        Step of each group.
    types : array of uint8, shape (K, C / group)
        Index into ``names``.
    names, group, shape, bits
        As in :class:`MixtureQuantized`.
    """

    packed: Array
    scales: Array
    types: Array
    names: tuple[str, ...]
    group: int
    shape: tuple[int, int]
    bits: int


class BitSerialCost(NamedTuple):
    """What one product of a quantised matrix with one vector costs.

    Attributes
    ----------
    cycles : int
        Cycles of the machine, rescaling included where it is not hidden.
    bytes : float
        Bytes of weights read, formats and scales included.
    terms : int
        Signed powers of two that are actually added.
    """

    cycles: int
    bytes: float
    terms: int


# --- quantisers -------------------------------------------------------------------------------------------------------


def quantize_to_datatype(w: Array, datatype: str, *, scale: Any = None) -> tuple[Array, Array]:
    r"""Nearest levels of one format for groups that lie along the last axis.

    With levels :math:`\mathcal D`, the step is :math:`\Delta=\max|w|/\max|\mathcal D|`, clamped to
    :math:`[10^{-5},10^4]`, and a weight goes to the level nearest to :math:`w/\Delta`; midpoints go down.

    Parameters
    ----------
    w : array, shape (..., G)
        Weights; every row of the last axis is a group. Any kind of array.
    datatype : str
        A key of :data:`DATATYPES`.
    scale : array, shape (..., 1), optional
        Steps to use instead, positive.

    Returns
    -------
    codes : array of uint8, shape (..., G)
        Index into ``DATATYPES[datatype]``.
    scale : array, shape (..., 1)
        The steps, in the units of ``w``.

    Raises
    ------
    TypeError
        If ``w`` is not numeric.
    ValueError
        If ``w`` is empty or not finite, the format is unknown, or ``scale`` does not fit.

    Notes
    -----
    The step is symmetric even where the levels are not: if the largest weight lies on the side without the extra
    level, it is cut off at the end of the range. The search of :func:`quantize_mixture` avoids that. Source: the
    official code, ``quant_weight.py``.

    Examples
    --------
    >>> import numpy as np
    >>> codes, scale = quantize_to_datatype(np.array([-1.0, 0.4, 6.0]), "fp3_ea_pos")
    >>> scale * np.array(DATATYPES["fp3_ea_pos"])[codes]
    array([-1.,  0.,  6.])
    """
    w = check_array(w, "w")
    if w.ndim == 0:
        raise ValueError("w must have at least one dimension, got a single number")
    check_one_of(datatype, "datatype", tuple(DATATYPES))
    xp = array_namespace(w)
    if scale is None:
        scale = _clamped(xp.max(xp.abs(w), axis=-1, keepdims=True), datatype)
    else:
        scale = check_array(scale, "scale", low=0, open_low=True)
        if tuple(scale.shape) != (*w.shape[:-1], 1):
            raise ValueError(
                f"scale must be one step for each group of w, {(*w.shape[:-1], 1)}, got {tuple(scale.shape)}"
            )
        scale = xp.astype(from_numpy(to_numpy(scale), like=w), w.dtype)
    return _ladder(w / scale, datatype), scale


def _clamped(largest: Array, datatype: str) -> Array:
    """Step from the largest magnitude of a group."""
    xp = array_namespace(largest)
    return xp.clip(largest / max(map(abs, DATATYPES[datatype])), SCALE_LOW, SCALE_HIGH)


def _ladder(x: Array, datatype: str) -> Array:
    """Index of the nearest level: how many midpoints lie below."""
    xp = array_namespace(x)
    levels = DATATYPES[datatype]
    codes = xp.zeros_like(x, dtype=xp.uint8)
    for low, high in pairwise(levels):
        codes = codes + xp.astype(x > (low + high) / 2, xp.uint8)
    return codes


def quantize_int(w: Array, bits: int, *, group: int = 128, symmetric: bool = True) -> Array:
    r"""Round-to-nearest integers for every group: the usual baseline.

    Parameters
    ----------
    w : array, shape (K, C)
        Weights: K outputs, C inputs. Any kind of array.
    bits : int
        2 to 8.
    group : int, default 128
        Weights that share a step, along the inputs.
    symmetric : bool, default True
        Levels :math:`-(2^{b-1}-1),\dots,2^{b-1}-1` and a step from :math:`\max|w|`; else :math:`2^b` levels from
        the smallest to the largest weight, with an integer zero point.

    Returns
    -------
    array, shape (K, C)
        What the weights have become.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If C is not a multiple of ``group``, or ``w`` is not a finite matrix.

    Notes
    -----
    Halves are rounded to even. Steps are clamped as in :func:`quantize_to_datatype`.

    Examples
    --------
    >>> import numpy as np
    >>> quantize_int(np.array([[-3.0, 0.4, 1.6, 12.0]]), 4, group=4, symmetric=False)
    array([[-3.,  0.,  2., 12.]])
    """
    w = _check_weights(w)
    bits = check_int(bits, "bits", low=2, high=8)
    group = _check_group(group, w)
    check_bool(symmetric, "symmetric")
    xp = array_namespace(w)
    x = xp.reshape(w, (w.shape[0], -1, group))
    if symmetric:
        top = 2 ** (bits - 1) - 1
        step = xp.clip(xp.max(xp.abs(x), axis=-1, keepdims=True) / top, SCALE_LOW, SCALE_HIGH)
        return xp.reshape(xp.clip(xp.round(x / step), -top, top) * step, tuple(w.shape))
    low = xp.min(x, axis=-1, keepdims=True)
    step = xp.clip((xp.max(x, axis=-1, keepdims=True) - low) / (2**bits - 1), SCALE_LOW, SCALE_HIGH)
    zero = xp.clip(xp.round(-low / step), 0, 2**bits - 1)
    return xp.reshape((xp.clip(xp.round(x / step) + zero, 0, 2**bits - 1) - zero) * step, tuple(w.shape))


def quantize_mx(w: Array, datatype: str, *, group: int = 32) -> Array:
    r"""Microscaling: one format, and a step that is a power of two for every group.

    The step is :math:`2^{\lfloor\log_2\max|w|\rfloor}\cdot2/\max|\mathcal D|`, so that the largest weight falls into
    the upper half of the range.

    Parameters
    ----------
    w : array, shape (K, C)
        Weights. Any kind of array.
    datatype : str
        A key of :data:`DATATYPES`; the format of the standard is ``"fp4"``.
    group : int, default 32
        Weights that share a step, along the inputs.

    Returns
    -------
    array, shape (K, C)
        What the weights have become.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If C is not a multiple of ``group``, or ``w`` is not a finite matrix.

    Notes
    -----
    As in the official code, whose factor 2 / max is a power of two only for formats whose largest level is one; the
    standard's own scale for ``"fp4"`` differs by the factor 4/3.

    Examples
    --------
    >>> import numpy as np
    >>> quantize_mx(np.array([[1.0, 0.3, -0.5, 0.0]]), "fp4", group=4)
    array([[ 1.        ,  0.33333333, -0.5       ,  0.        ]])
    """
    w = _check_weights(w)
    check_one_of(datatype, "datatype", tuple(DATATYPES))
    group = _check_group(group, w)
    xp = array_namespace(w)
    x = xp.reshape(w, (w.shape[0], -1, group))
    largest = xp.max(xp.abs(x), axis=-1, keepdims=True)
    safe = xp.where(largest > 0, largest, xp.ones_like(largest))
    exponent = xp.floor(xp.log2(safe))
    power = 2.0**exponent
    power = xp.where(power > safe, power / 2, power)  # log2 may round up to the next integer
    step = power * (2.0 / max(map(abs, DATATYPES[datatype])))
    levels = xp.asarray(DATATYPES[datatype], dtype=w.dtype)
    codes = xp.reshape(xp.astype(_ladder(x / step, datatype), xp.int64), (-1,))
    return xp.reshape(xp.reshape(xp.take(levels, codes, axis=0), tuple(x.shape)) * step, tuple(w.shape))


def quantize_mixture(
    w: Any,
    *,
    bits: int = 3,
    group: int = 128,
    datatypes: Sequence[str] | None = None,
    scale_bits: int | None = None,
) -> MixtureQuantized:
    r"""For every group of weights, the format with the least squared error.

    Parameters
    ----------
    w : array, shape (K, C)
        Weights: K outputs, C inputs. Any kind of array; CuPy arrays are quantised where they are.
    bits : {3, 4}, default 3
        Bits of a weight.
    group : int, default 128
        Weights that share a format and a step, along the inputs.
    datatypes : sequence of str, optional
        Formats to choose from, at most 16; :data:`BITMOD3` or :data:`BITMOD4` by default. ``BITMOD3[:2]`` chooses among
        extra resolutions only, ``BITMOD3[2:]`` among asymmetries, :data:`ANT3` as ANT does, and a single name is that
        format everywhere.
    scale_bits : {None, 8}, default None
        8 stores steps as bytes times a float16 number for each output; weights are then rounded with the stored steps.

    Returns
    -------
    MixtureQuantized
        Codes, steps and formats; arrays are of the kind of ``w``.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If C is not a multiple of ``group``, a format is unknown or has other bits, or ``w`` is not a finite matrix.

    Notes
    -----
    Of equal errors the first format in the list wins. A group of zeros stays zero. A single huge weight makes the step
    so large that all others of its group may become zero. Time is proportional to K C times the number of levels.
    Source: the official code, ``quant_weight.py``, which differs in one corner: it leaves groups
    with a mean squared error above 1,000 at zero.

    Examples
    --------
    >>> import numpy as np
    >>> q = quantize_mixture(np.array([[-2.0, 0.0, 1.0, 6.0]]), group=4)
    >>> q.names[q.types[0, 0]], dequantize(q)
    ('fp3_ea_pos', array([[-2.,  0.,  1.,  6.]]))
    """
    w = _check_weights(w)
    bits = check_int(bits, "bits", low=3, high=4)
    group = _check_group(group, w)
    names = _check_names(datatypes, bits)
    check_one_of(scale_bits, "scale_bits", (None, 8))
    scales, types = pick_kernel(w, cpu=_search_cpu, gpu=_search_gpu)(w, names, group)
    scale_codes = row_scales = None
    if scale_bits == 8:
        xp = array_namespace(w)
        wanted = to_numpy(xp.max(scales, axis=1, keepdims=True)) / 255
        rounded = wanted.astype(np.float16)
        rounded = np.where(rounded < wanted, np.nextafter(rounded, np.float16(np.inf)), rounded)  # 255 must suffice
        row_scales = xp.astype(from_numpy(rounded.astype(np.float32), like=w), w.dtype)
        scale_codes = xp.astype(xp.clip(xp.round(scales / row_scales), 1, 255), xp.uint8)
        scales = xp.astype(scale_codes, w.dtype) * row_scales
    codes = pick_kernel(w, cpu=_encode_cpu, gpu=_encode_gpu)(w, scales, types, names, group)
    shape = (int(w.shape[0]), int(w.shape[1]))
    return MixtureQuantized(codes, scales, types, names, group, shape, bits, scale_codes, row_scales)


def dequantize(q: MixtureQuantized) -> Array:
    """The weights that a quantised matrix stands for.

    Parameters
    ----------
    q : MixtureQuantized
        From :func:`quantize_mixture`.

    Returns
    -------
    array, shape (K, C)
        ``scale * level``, in the precision of the steps.

    Raises
    ------
    TypeError
        If ``q`` is something else.

    Examples
    --------
    >>> import numpy as np
    >>> dequantize(quantize_mixture(np.array([[4.0, -1.0]]), group=2))
    array([[ 4., -1.]])
    """
    _check_quantized(q, "q", MixtureQuantized)
    xp = array_namespace(q.codes)
    table = xp.astype(from_numpy(_tables(q.names).levels, like=q.codes), q.scales.dtype)  # (T, L)
    codes = xp.reshape(xp.astype(q.codes, xp.int64), (q.shape[0], -1, q.group))
    index = codes + table.shape[1] * xp.astype(q.types, xp.int64)[..., None]
    levels = xp.reshape(xp.take(xp.reshape(table, (-1,)), xp.reshape(index, (-1,)), axis=0), tuple(index.shape))
    return xp.reshape(levels * q.scales[..., None], q.shape)


def effective_bits(q: MixtureQuantized) -> float:
    """Bits of storage for each weight: code, format and step of its group, and the output's own number.

    Parameters
    ----------
    q : MixtureQuantized
        From :func:`quantize_mixture`.

    Returns
    -------
    float
        ``bits + (ceil(log2(formats)) + scale) / group``, where scale is 16 (a float16 number), or 8 with
        ``scale_bits=8`` and then 16 / C more.

    Raises
    ------
    TypeError
        If ``q`` is something else.

    Examples
    --------
    >>> import numpy as np
    >>> effective_bits(quantize_mixture(np.ones((2, 128)), bits=3, group=128, scale_bits=8))
    3.203125
    """
    _check_quantized(q, "q", MixtureQuantized)
    choice = (len(q.names) - 1).bit_length()
    if q.scale_codes is None:
        return q.bits + (16 + choice) / q.group
    return q.bits + (8 + choice) / q.group + 16 / q.shape[1]


# --- the bit-serial machine -------------------------------------------------------------------------------------------


def bit_serial_terms(level: int) -> tuple[tuple[int, int], ...]:
    r"""A whole number as the shortest sum of signed powers of two :math:`\sum(-1)^s2^e`.

    The binary digits where there are at most two of them, else the non-adjacent form, which no other signed form beats
    and which has at most :math:`\lceil b/2\rceil` terms for :math:`|q|<2^{b-1}`.

    Parameters
    ----------
    level : int
        At most 2**31 in magnitude.

    Returns
    -------
    tuple of (int, int)
        (s, e) of each term, largest power first; empty for zero.

    Raises
    ------
    TypeError, ValueError
        If ``level`` is not a whole number within bounds.

    Examples
    --------
    >>> bit_serial_terms(-6), bit_serial_terms(7)
    (((1, 2), (1, 1)), ((0, 3), (1, 0)))
    """
    level = check_int(level, "level", low=-(2**31), high=2**31)
    sign, rest = int(level < 0), abs(level)
    if rest.bit_count() <= 2:
        return tuple((sign, e) for e in range(rest.bit_length() - 1, -1, -1) if rest >> e & 1)
    terms, e = [], 0
    while rest:
        if rest & 1:
            digit = 2 - (rest & 3)  # 1, or -1 where two ones follow each other
            terms.append((sign ^ int(digit < 0), e))
            rest -= digit
        rest >>= 1
        e += 1
    return tuple(reversed(terms))


def bit_serial_matmul(q: MixtureQuantized, x: Any) -> Array:
    """The product with a quantised matrix as the machine computes it: shifts and integer additions only, then scales.

    For each group, one term of every weight in each step: the activation, shifted, is added to an integer accumulator
    or taken from it. Then the sum is multiplied by the group's 8-bit step, one bit of the step at a time.

    Parameters
    ----------
    q : MixtureQuantized
        From :func:`quantize_mixture`; with ``scale_bits=8`` nothing but the output's own scale is a float.
    x : array, shape (n, C)
        Activations: integers, or floats, which are rounded to float16 (an integer times 2**-24, hence exact).

    Returns
    -------
    array of float64, shape (n, K)
        ``x @ dequantize(q).T`` for the rounded ``x``, of the kind of ``x``.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If shapes differ, ``x`` is not finite or beyond float16, or a 64-bit accumulator could overflow.

    Notes
    -----
    A simulation on the host, exact but slow; :func:`packed_matmul` is for speed.

    Examples
    --------
    >>> import numpy as np
    >>> q = quantize_mixture(np.array([[4.0, -1.0]]), group=2)
    >>> bit_serial_matmul(q, np.array([[10, 3]]))
    array([[37.]])
    """
    _check_quantized(q, "q", MixtureQuantized)
    x = check_array(x, "x", ndim=2, dtype="real")
    if x.shape[1] != q.shape[1]:
        raise ValueError(f"x must have {q.shape[1]} columns, the inputs of q, got shape {tuple(x.shape)}")
    given, unit = to_numpy(x), 1.0
    if given.dtype.kind == "f":
        check_array(given, "x", low=-65504, high=65504)
        given, unit = given.astype(np.float16).astype(np.float64) * 2.0**_FRACTION_BITS, 2.0**-_FRACTION_BITS
    largest = float(np.abs(given.astype(np.float64)).max())
    if largest * 16 * q.group * (255 if q.scale_codes is not None else 1) >= 2.0**62:
        raise ValueError(f"x must be small enough for a 64-bit accumulator of {q.group} products, got {largest:g}")
    signs, exponents = _term_tables(q.names)
    out = np.zeros((x.shape[0], q.shape[0]))
    serial = q.scale_codes is not None
    steps = q.scale_codes if serial else q.scales
    _machine(
        to_numpy(q.codes), to_numpy(q.types), to_numpy(steps).astype(np.float64), serial, signs, exponents,
        given.astype(np.int64), q.group, out,
    )  # fmt: skip
    if serial:
        out *= to_numpy(q.row_scales).astype(np.float64).T
    return from_numpy(out * unit, like=x)


def bit_serial_cost(q: MixtureQuantized, *, lanes: int = 4, pes: int = 1) -> BitSerialCost:
    r"""Cycles, bytes and terms of one matrix-vector product on bit-serial processing elements.

    An element takes one term of each of ``lanes`` weights per cycle: a group takes
    :math:`\lceil G/\text{lanes}\rceil\lceil b/2\rceil` cycles. Rescaling the
    group before takes 8 cycles (one for each bit of its step) at the same time.

    Parameters
    ----------
    q : MixtureQuantized
        From :func:`quantize_mixture`.
    lanes : int, default 4
        Weights that an element takes at once.
    pes : int, default 1
        Processing elements; each computes one output at a time.

    Returns
    -------
    BitSerialCost
        Cycles, bytes of weights, terms.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or not positive.

    Notes
    -----
    ``ceil(bits / 2)`` cycles and 4 lanes are those of the official simulator (``pe_array.py``, ``test_bitmod.py``).

    Examples
    --------
    >>> import numpy as np
    >>> bit_serial_cost(quantize_mixture(np.ones((2, 128)), bits=4), lanes=4).cycles
    128
    """
    _check_quantized(q, "q", MixtureQuantized)
    lanes = check_int(lanes, "lanes", low=1, high=2**20)
    pes = check_int(pes, "pes", low=1, high=2**40)
    outputs, inputs = q.shape
    per_group = max(-(-q.group // lanes) * -(-q.bits // 2), 8 if q.scale_codes is not None else 0)
    cycles = -(-outputs // pes) * (inputs // q.group) * per_group
    count = (_term_tables(q.names)[0] != 0).sum(axis=2)  # (T, L)
    types = np.repeat(to_numpy(q.types).astype(np.int64), q.group, axis=1)
    return BitSerialCost(cycles, effective_bits(q) * outputs * inputs / 8, int(count[types, to_numpy(q.codes)].sum()))


# --- packed products --------------------------------------------------------------------------------------------------


def pack_mixture(q: MixtureQuantized) -> PackedMixture:
    """The same matrix with its codes stored without gaps.

    Parameters
    ----------
    q : MixtureQuantized
        From :func:`quantize_mixture`, with groups of a multiple of 8 weights.

    Returns
    -------
    PackedMixture
        Arrays of the same kind, steps in float32.

    Raises
    ------
    TypeError
        If ``q`` is something else.
    ValueError
        If a group does not end with a byte.

    Examples
    --------
    >>> import numpy as np
    >>> pack_mixture(quantize_mixture(np.ones((2, 128)), bits=3)).packed.shape
    (2, 48)
    """
    _check_quantized(q, "q", MixtureQuantized)
    if q.group % 8:
        raise ValueError(f"q must have groups of a multiple of 8 weights, got {q.group}")
    xp = array_namespace(q.codes)
    packed = pack_codes(q.codes, q.bits)
    return PackedMixture(packed, xp.astype(q.scales, xp.float32), q.types, q.names, q.group, q.shape, q.bits)


def packed_matmul(p: PackedMixture, x: Any) -> Array:
    """The product with a packed matrix, decoded on the fly: reads ``bits / 32`` of what a float32 matrix takes.

    Two codes at a time are looked up in a table of pairs of levels, and each decoded group is used for all rows of
    ``x``.

    Parameters
    ----------
    p : PackedMixture
        From :func:`pack_mixture`.
    x : array, shape (n, C)
        Activations, of the kind of the arrays in ``p``; used in float32.

    Returns
    -------
    array of float32, shape (n, K)
        ``x @ W.T`` with the weights that ``p`` stands for.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If shapes differ, or ``x`` is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> p = pack_mixture(quantize_mixture(np.eye(2, 8), group=8))
    >>> packed_matmul(p, np.arange(16.0).reshape(2, 8))
    array([[0., 1.],
           [8., 9.]], dtype=float32)
    """
    _check_quantized(p, "p", PackedMixture)
    x = check_array(x, "x", ndim=2)
    if x.shape[1] != p.shape[1]:
        raise ValueError(f"x must have {p.shape[1]} columns, the inputs of p, got shape {tuple(x.shape)}")
    kernel = pick_kernel(x, cpu=_packed_cpu, gpu=_packed_gpu)
    return kernel(x, p.packed, p.scales, p.types, p.names, p.group, p.bits)


# --- checks and tables ------------------------------------------------------------------------------------------------


def _check_weights(w: Any) -> Array:
    return check_array(w, "w", ndim=2)


def _check_group(group: Any, w: Array) -> int:
    group = check_int(group, "group", low=1, high=2**31)
    if w.shape[1] % group:
        raise ValueError(f"group must divide the {w.shape[1]} inputs of w, got {group}")
    return group


def _check_names(datatypes: Any, bits: int) -> tuple[str, ...]:
    if datatypes is None:
        return BITMOD3 if bits == 3 else BITMOD4
    if isinstance(datatypes, str) or not isinstance(datatypes, Sequence):
        raise TypeError(f"datatypes must be a sequence of names, got {type(datatypes).__name__}")
    if not 1 <= len(datatypes) <= 16:
        raise ValueError(f"datatypes must hold 1 to 16 names, got {len(datatypes)}")
    for name in datatypes:
        check_one_of(name, "datatypes", tuple(DATATYPES))
        if (3 if len(DATATYPES[name]) <= 8 else 4) != bits:
            raise ValueError(f"datatypes must be formats of {bits} bits, the argument bits, got {name!r}")
    return tuple(datatypes)


def _check_quantized(q: Any, name: str, kind: type) -> None:
    if not isinstance(q, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(q).__name__}")


class _Tables(NamedTuple):
    """Levels (T, L) with unused places repeated, midpoints (T, L - 1) with unused ones at infinity, the ends (T,).

    ``clamp`` holds the bounds of a step, then 0 and 1, in the precision of the weights (a literal would be double).
    """

    levels: np.ndarray
    mids: np.ndarray
    tops: np.ndarray
    clamp: np.ndarray


def _tables(names: Sequence[str], dtype: Any = np.float64) -> _Tables:
    length = 8 if all(len(DATATYPES[n]) <= 8 for n in names) else 16
    levels = np.array([DATATYPES[n] + DATATYPES[n][-1:] * (length - len(DATATYPES[n])) for n in names], dtype)
    mids = np.where(np.diff(levels) > 0, (levels[:, 1:] + levels[:, :-1]) / 2, np.inf).astype(dtype)
    return _Tables(levels, mids, np.abs(levels).max(axis=1), np.array([SCALE_LOW, SCALE_HIGH, 0, 1], dtype))


def _term_tables(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sign (0 where there is no term) and exponent of each term of each level: (T, L, 2)."""
    levels = _tables(names).levels
    signs, exponents = np.zeros((2, *levels.shape, _TERM_SLOTS), np.int64)
    for place, level in np.ndenumerate(levels):
        for slot, (s, e) in enumerate(bit_serial_terms(int(level))):
            signs[place][slot], exponents[place][slot] = 1 - 2 * s, e
    return signs, exponents


# --- kernels on the host ----------------------------------------------------------------------------------------------


def _search_cpu(w: np.ndarray, names: tuple[str, ...], group: int) -> tuple[np.ndarray, np.ndarray]:
    scales = np.empty((w.shape[0], w.shape[1] // group), w.dtype)
    types = np.empty(scales.shape, np.uint8)
    _search(np.ascontiguousarray(w), _tables(names, w.dtype), group, scales, types)
    return scales, types


def _encode_cpu(w: np.ndarray, scales: np.ndarray, types: np.ndarray, names: tuple[str, ...], group: int) -> np.ndarray:
    codes = np.empty(w.shape, np.uint8)
    _encode(np.ascontiguousarray(w), _tables(names, w.dtype), group, scales, types, codes)
    return codes


@njit(cache=True, error_model="numpy", parallel=True)
def _search(w: np.ndarray, tables: _Tables, group: int, scales: np.ndarray, types: np.ndarray) -> None:
    """Step and format of each group; everything of a group stays in the first-level cache."""
    for k in prange(w.shape[0]):
        x, value, error = np.empty(group, w.dtype), np.empty(group, w.dtype), np.empty(group, w.dtype)
        for g in range(scales.shape[1]):
            part = w[k, g * group : (g + 1) * group]
            zero = tables.clamp[2]
            largest = best = zero
            for i in range(group):
                largest = max(largest, abs(part[i]))
            for t in range(len(tables.tops)):
                scale = min(max(largest / tables.tops[t], tables.clamp[0]), tables.clamp[1])
                for i in range(group):
                    x[i] = part[i] / scale
                    value[i] = tables.levels[t, 0]
                for j in range(tables.mids.shape[1]):  # the ladder: each midpoint below raises the value by a step
                    mid, step = tables.mids[t, j], tables.levels[t, j + 1] - tables.levels[t, j]
                    for i in range(group):
                        value[i] += step if x[i] > mid else zero
                for i in range(group):
                    off = part[i] - scale * value[i]
                    error[i] = off * off
                n = group
                while n > 1:  # sum by halves: the same on every machine, and vectorised
                    half = (n + 1) // 2
                    for i in range(n - half):
                        error[i] += error[half + i]
                    n = half
                if t == 0 or error[0] < best:
                    best = error[0]
                    scales[k, g], types[k, g] = scale, t


@njit(cache=True, error_model="numpy", parallel=True)
def _encode(
    w: np.ndarray, tables: _Tables, group: int, scales: np.ndarray, types: np.ndarray, codes: np.ndarray
) -> None:
    """Codes with the steps and formats given."""
    for k in prange(w.shape[0]):
        x, count = np.empty(group, w.dtype), np.empty(group, w.dtype)
        zero, one = tables.clamp[2], tables.clamp[3]
        for g in range(scales.shape[1]):
            t, start = types[k, g], g * group
            for i in range(group):
                x[i] = w[k, start + i] / scales[k, g]
                count[i] = 0
            for j in range(tables.mids.shape[1]):
                mid = tables.mids[t, j]
                for i in range(group):
                    count[i] += one if x[i] > mid else zero
            for i in range(group):
                codes[k, start + i] = np.uint8(np.int32(count[i]))


@njit(cache=True, error_model="numpy", parallel=True)
def _machine(
    codes: np.ndarray, types: np.ndarray, steps: np.ndarray, serial: bool, signs: np.ndarray, exponents: np.ndarray,
    x: np.ndarray, group: int, out: np.ndarray,
) -> None:  # fmt: skip
    """Shifts and additions; ``serial`` says that steps are 8-bit integers, multiplied with one bit at a time."""
    for k in prange(codes.shape[0]):
        for n in range(x.shape[0]):
            for g in range(types.shape[1]):
                t, partial = types[k, g], 0
                for slot in range(signs.shape[2]):
                    for i in range(g * group, (g + 1) * group):
                        c = codes[k, i]
                        partial += signs[t, c, slot] * (x[n, i] << exponents[t, c, slot])
                if serial:
                    scaled, step = 0, int(steps[k, g])
                    for bit in range(8):
                        if step >> bit & 1:
                            scaled += partial << bit
                    out[n, k] += scaled
                else:
                    out[n, k] += partial * steps[k, g]


def _packed_cpu(
    x: np.ndarray, packed: np.ndarray, scales: np.ndarray, types: np.ndarray, names: tuple[str, ...], group: int,
    bits: int,
) -> np.ndarray:  # fmt: skip
    levels = _tables(names, np.float32).levels
    low, high = np.arange(4**bits) % 2**bits, np.arange(4**bits) // 2**bits
    pairs = np.ascontiguousarray(np.stack([levels[:, low], levels[:, high]], axis=-1)).view(np.float64)[..., 0]
    out = np.empty((x.shape[0], packed.shape[0]), np.float32)
    packed, scales, types = (to_numpy(a) for a in (packed, scales, types))
    _decode_and_multiply(np.ascontiguousarray(x, np.float32), packed, scales, types, pairs, group, bits, out)
    return out


@njit(cache=True, error_model="numpy", parallel=True, fastmath={"reassoc", "contract", "nsz"})
def _decode_and_multiply(
    x: np.ndarray, packed: np.ndarray, scales: np.ndarray, types: np.ndarray, pairs: np.ndarray, group: int, bits: int,
    out: np.ndarray,
) -> None:  # fmt: skip
    """``pairs[t, two codes]`` holds two float32 levels side by side, moved as one number of 64 bits."""
    n_bytes = group * bits // 8
    for k in prange(packed.shape[0]):
        two = np.empty(group // 2, np.float64)
        one = two.view(np.float32)
        for n in range(x.shape[0]):
            out[n, k] = 0
        for g in range(types.shape[1]):
            table, part = pairs[types[k, g]], packed[k, g * n_bytes : (g + 1) * n_bytes]
            if bits == 4:
                for j in range(n_bytes):
                    two[j] = table[part[j]]
            else:
                for j in range(n_bytes // 3):  # eight codes in three bytes
                    held = np.uint32(part[3 * j]) | np.uint32(part[3 * j + 1]) << 8 | np.uint32(part[3 * j + 2]) << 16
                    two[4 * j] = table[held & 63]
                    two[4 * j + 1] = table[held >> 6 & 63]
                    two[4 * j + 2] = table[held >> 12 & 63]
                    two[4 * j + 3] = table[held >> 18]
            for n in range(x.shape[0]):
                row, total = x[n, g * group : (g + 1) * group], np.float32(0)
                for i in range(group):
                    total += one[i] * row[i]
                out[n, k] += total * scales[k, g]


# --- kernels on the GPU -----------------------------------------------------------------------------------------------

_QUANTIZE = r"""
extern "C" __global__ void quantize(const REAL* w, const REAL* levels, const REAL* mids, const REAL* tops,
    int n_types, int n_levels, int group, long long n_groups, int given, REAL* scales, unsigned char* types,
    unsigned char* codes)
{   // one warp per group; given: scales and types are there, write codes
    long long g = (blockIdx.x * (long long) blockDim.x + threadIdx.x) / 32;
    int lane = threadIdx.x % 32;
    if (g >= n_groups) return;
    const REAL* part = w + g * group;
    if (given) {
        REAL scale = scales[g];
        const REAL* mid = mids + types[g] * (n_levels - 1);
        for (int i = lane; i < group; i += 32) {
            REAL x = part[i] / scale;
            int code = 0;
            for (int j = 0; j < n_levels - 1; j++) code += x > mid[j];
            codes[g * group + i] = code;
        }
        return;
    }
    REAL largest = 0;
    for (int i = lane; i < group; i += 32) largest = max(largest, abs(part[i]));
    for (int step = 16; step; step /= 2) largest = max(largest, __shfl_xor_sync(0xffffffff, largest, step));
    REAL best = 0, best_scale = 0;
    int choice = 0;
    for (int t = 0; t < n_types; t++) {
        REAL scale = min(max(largest / tops[t], (REAL) 1e-5), (REAL) 1e4), error = 0;
        for (int i = lane; i < group; i += 32) {
            REAL x = part[i] / scale;
            int code = 0;
            for (int j = 0; j < n_levels - 1; j++) code += x > mids[t * (n_levels - 1) + j];
            REAL off = part[i] - scale * levels[t * n_levels + code];
            error += off * off;
        }
        for (int step = 16; step; step /= 2) error += __shfl_xor_sync(0xffffffff, error, step);
        if (t == 0 || error < best) { best = error; best_scale = scale; choice = t; }
    }
    if (lane == 0) { scales[g] = best_scale; types[g] = choice; }
}
"""

_MULTIPLY = r"""
extern "C" __global__ void multiply(const float* x, const unsigned char* packed, const float* scales,
    const unsigned char* types, const float* levels, int n_levels, int inputs, int outputs, int group, int bits,
    float* out)
{   // one warp per output and row of x; eight codes a lane
    int k = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32, n = blockIdx.y;
    if (k >= outputs) return;
    float total = 0.0f;
    for (int block = lane; block < inputs / 8; block += 32) {
        int g = block * 8 / group;
        const float* table = levels + types[(long long) k * (inputs / group) + g] * n_levels;
        const unsigned char* from = packed + ((long long) k * inputs / 8 + block) * bits;
        unsigned int held = 0;
        for (int b = 0; b < bits; b++) held |= (unsigned int) from[b] << 8 * b;
        float sum = 0.0f;
        for (int j = 0; j < 8; j++)
            sum += table[held >> j * bits & (1u << bits) - 1u] * x[(long long) n * inputs + block * 8 + j];
        total += sum * scales[(long long) k * (inputs / group) + g];
    }
    for (int step = 16; step; step /= 2) total += __shfl_xor_sync(0xffffffff, total, step);
    if (lane == 0) out[(long long) n * outputs + k] = total;
}
"""


def _quantize_gpu(w: Array, names: tuple[str, ...], group: int, scales: Array, types: Array, codes: Array) -> None:
    """Both phases: with an empty ``codes`` the search, else the encoding."""
    import cupy

    real = "float" if w.dtype == np.float32 else "double"
    kernel = cupy.RawKernel(_QUANTIZE.replace("REAL", real), "quantize", options=("--fmad=false",))
    tables = _tables(names, w.dtype)
    levels, mids, tops = (cupy.asarray(a) for a in (tables.levels, tables.mids, tables.tops))
    numbers = np.array([len(names), levels.shape[1], group], np.int32)
    kernel(
        ((scales.size * 32 + 255) // 256,), (256,),
        (cupy.ascontiguousarray(w), levels, mids, tops, *numbers, np.int64(scales.size), np.int32(codes.size > 0),
         scales, types, codes),
    )  # fmt: skip


def _search_gpu(w: Array, names: tuple[str, ...], group: int) -> tuple[Array, Array]:
    import cupy

    scales = cupy.empty((w.shape[0], w.shape[1] // group), w.dtype)
    types = cupy.empty(scales.shape, cupy.uint8)
    _quantize_gpu(w, names, group, scales, types, cupy.empty(0, cupy.uint8))
    return scales, types


def _encode_gpu(w: Array, scales: Array, types: Array, names: tuple[str, ...], group: int) -> Array:
    import cupy

    codes = cupy.empty(w.shape, cupy.uint8)
    _quantize_gpu(w, names, group, cupy.ascontiguousarray(scales), cupy.ascontiguousarray(types), codes)
    return codes


def _packed_gpu(
    x: Array, packed: Array, scales: Array, types: Array, names: tuple[str, ...], group: int, bits: int
) -> Array:
    import cupy

    levels = cupy.asarray(_tables(names, np.float32).levels)
    x = cupy.ascontiguousarray(x, dtype=cupy.float32)
    outputs = packed.shape[0]
    out = cupy.empty((x.shape[0], outputs), cupy.float32)
    numbers = np.array([levels.shape[1], x.shape[1], outputs, group, bits], np.int32)
    cupy.RawKernel(_MULTIPLY, "multiply")(
        ((outputs * 32 + 255) // 256, x.shape[0]), (256,),
        (x, packed, scales, types, levels, *numbers, out),
    )  # fmt: skip
    return out
