"""What numba kernels need and LLVM cannot be brought to by Python alone: vectors held in registers, bit casts, and a
vectorising exp.

A vector is 16 floats on every machine: one register with AVX-512, two with AVX2, four with SSE or NEON.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic, models, register_model

F, I = np.float32, np.int32  # noqa: E741
LANES = 16

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_FAST = ("fast",)


class _Vector(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="vector")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _VECTOR)


vector = _Vector()


def _place(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())


def _spread(builder: Any, number: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT, LANES), None))


@intrinsic
def load(typing_context, array, index):  # type: ignore[no-untyped-def]
    """The vector at array[index : index + LANES] of a contiguous float32 array."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(_place(context, builder, signature.args[0], *args), align=4)

    return vector(array, types.int64), generate


@intrinsic
def store(typing_context, array, index, values):  # type: ignore[no-untyped-def]
    """Write a vector to array[index : index + LANES]."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store(args[2], _place(context, builder, signature.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), generate


@intrinsic
def zeros(typing_context):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return ir.Constant(_VECTOR, [0.0] * LANES)

    return vector(), generate


@intrinsic
def add(typing_context, a, b):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.fadd(*args, flags=_FAST)

    return vector(vector, vector), generate


@intrinsic
def multiply_add(typing_context, a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c of three vectors; b may be a single number."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        a, b, c = args
        b = b if signature.args[1] == vector else _spread(builder, b)
        return builder.fadd(builder.fmul(a, b, flags=_FAST), c, flags=_FAST)

    return vector(vector, b, vector), generate


@intrinsic
def total(typing_context, values):  # type: ignore[no-untyped-def]
    """Sum of the vector's numbers."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR])
        reduce = get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(reduce, [ir.Constant(_FLOAT, 0.0), *args], fastmath=_FAST)

    return types.float32(vector), generate


def _instruction(name: str, source: Any, target: Any) -> Any:
    """A single LLVM cast as a function."""

    @intrinsic
    def cast(typing_context, x):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return getattr(builder, name)(args[0], _FLOAT if target is types.float32 else _INT)

        return target(source), generate

    return cast


bits_to_float = _instruction("bitcast", types.int32, types.float32)
float_to_bits = _instruction("bitcast", types.float32, types.int32)
truncate = _instruction("fptosi", types.float32, types.int32)
to_float = _instruction("sitofp", types.int32, types.float32)


@njit(inline="always", fastmath=True)
def exp_negative(x):  # type: ignore[no-untyped-def]
    """exp(x) for x <= 0, relative error about 1e-7, without a branch, so that a loop around it becomes vectors.

    Range reduction and coefficients of Cephes' expf (S. Moshier); results below exp(-87) are rounded up to that.
    """
    x = max(x, F(-87.0))
    whole = truncate(x * F(1.44269504) - F(0.5))
    n = to_float(whole)
    r = x - n * F(0.693359375) + n * F(2.12194440e-4)
    p = F(1.9875691500e-4)
    p = p * r + F(1.3981999507e-3)
    p = p * r + F(8.3334519073e-3)
    p = p * r + F(4.1665795894e-2)
    p = p * r + F(1.6666665459e-1)
    p = p * r + F(5.0000001201e-1)
    p = p * r * r + r + F(1.0)
    return p * bits_to_float(I((whole + I(127)) << I(23)))
