"""Vectors of 64 bytes inside Numba kernels, for loops that LLVM cannot vectorise by itself.

A kernel that updates several slices of one array in place must, before each of its inner loops, prove that the slices
do not overlap; for short loops the proof costs more than the work. Here the kernel says what it means: ``load`` some
lanes, ``add`` and ``sub`` them, ``store`` them. LLVM turns the vectors into what the processor has (AVX-512, AVX2,
SSE, NEON). Nothing is bounds-checked: the callers' loops must be right.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.extending import register_model
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

__all__ = ["BYTES", "Lanes", "add", "load", "mix", "mul", "muladd", "splat", "store", "sub", "transpose"]

BYTES = 64  #: bytes in a vector: 16 lanes of float32 or 8 of float64, one cache line


class Lanes(types.Type):
    """Numba type of a vector of ``BYTES`` bytes with elements of type ``dtype``."""

    def __init__(self, dtype: Any) -> None:
        self.dtype, self.width = dtype, 8 * BYTES // dtype.bitwidth
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        element = ir.FloatType() if fe_type.dtype == types.float32 else ir.DoubleType()
        super().__init__(dmm, fe_type, ir.VectorType(element, fe_type.width))


def _operation(function: Any) -> Any:
    """Numba's ``intrinsic``; what it returns is called without the typing context, so it is left untyped."""
    return intrinsic(function)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Address of the lanes that start at element ``index`` of a one-dimensional contiguous array."""
    vector = context.get_value_type(Lanes(array_type.dtype))
    return builder.bitcast(
        builder.gep(make_array(array_type)(context, builder, array).data, [index]), vector.as_pointer()
    )


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Lanes picked from ``a`` (0 to width - 1) and ``b`` (width and up)."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


@_operation
def load(typingctx: Any, x: Any, i: Any) -> Any:
    """``load(x, i)``: the lanes ``x[i], x[i + 1], ...`` of a one-dimensional contiguous array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1])
        return builder.load(pointer, align=signature.args[0].dtype.bitwidth // 8)

    return Lanes(x.dtype)(x, types.intp), codegen


@_operation
def store(typingctx: Any, x: Any, i: Any, v: Any) -> Any:
    """``store(x, i, v)``: put the lanes ``v`` at ``x[i], x[i + 1], ...``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], pointer, align=signature.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(x, types.intp, v), codegen


@_operation
def add(typingctx: Any, a: Any, b: Any) -> Any:
    """``a + b``, lane by lane."""
    return a(a, b), lambda context, builder, signature, args: builder.fadd(*args)


@_operation
def sub(typingctx: Any, a: Any, b: Any) -> Any:
    """``a - b``, lane by lane."""
    return a(a, b), lambda context, builder, signature, args: builder.fsub(*args)


@_operation
def mul(typingctx: Any, a: Any, b: Any) -> Any:
    """``a * b``, lane by lane."""
    return a(a, b), lambda context, builder, signature, args: builder.fmul(*args)


@_operation
def muladd(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, lane by lane, in one instruction where the processor has it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.fmul(args[0], args[1], flags=("contract",))
        return builder.fadd(product, args[2], flags=("contract",))

    return a(a, a, a), codegen


@_operation
def splat(typingctx: Any, x: Any, value: Any) -> Any:
    """``splat(x, value)``: lanes of the element type of array ``x``, all equal to ``value``."""
    lanes = Lanes(x.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        empty = ir.Constant(context.get_value_type(lanes), ir.Undefined)
        one = builder.insert_element(empty, args[1], ir.Constant(ir.IntType(32), 0))
        return _shuffle(builder, one, one, [0] * lanes.width)

    return lanes(x, x.dtype), codegen


@_operation
def mix(typingctx: Any, a: Any) -> Any:
    """Unnormalised Walsh-Hadamard transform of the lanes of ``a``: one shuffle and one signed sum per stage."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, width, h = args[0], signature.args[0].width, 1
        while h < width:
            partner = _shuffle(builder, v, v, [i ^ h for i in range(width)])
            sign = ir.Constant(v.type, [-1.0 if i & h else 1.0 for i in range(width)])
            v = builder.fadd(builder.fmul(v, sign), partner)  # lane i: v[i] + v[i + h], or v[i - h] - v[i]
            h *= 2
        return v

    return a(a), codegen


@_operation
def transpose(typingctx: Any, x: Any, i: Any, x_stride: Any, y: Any, j: Any, y_stride: Any, factor: Any) -> Any:
    """``transpose(x, i, x_stride, y, j, y_stride, factor)``: move a square tile, rows becoming columns.

    ``y[j + c * y_stride + r] = x[i + r * x_stride + c] * factor[c]`` for every r and c below the number of lanes.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_type, _, _, y_type, _, _, lanes = signature.args
        width, align = lanes.width, x_type.dtype.bitwidth // 8
        index = lambda start, step, r: builder.add(start, builder.mul(step, ir.Constant(step.type, r)))  # noqa: E731
        rows = []
        for r in range(width):
            pointer = _pointer(context, builder, x_type, args[0], index(args[1], args[2], r))
            rows.append(builder.fmul(builder.load(pointer, align=align), args[6]))
        h = 1
        while h < width:  # swap the off-diagonal h x h squares of every 2h x 2h square
            upper = [c - h + width if c & h else c for c in range(width)]
            lower = [c + width if c & h else c + h for c in range(width)]
            for r in range(width):
                if not r & h:
                    a, b = rows[r], rows[r + h]
                    rows[r], rows[r + h] = _shuffle(builder, a, b, upper), _shuffle(builder, a, b, lower)
            h *= 2
        for c in range(width):
            pointer = _pointer(context, builder, y_type, args[3], index(args[4], args[5], c))
            builder.store(rows[c], pointer, align=align)
        return context.get_dummy_value()

    n = types.intp
    return types.void(x, n, n, y, n, n, factor), codegen
