"""Small functions for numba kernels that LLVM cannot be brought to by Python alone: bit casts and a vectorising exp."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

F, I = np.float32, np.int32  # noqa: E741


def _instruction(name: str, source: Any, target: Any) -> Any:
    """A single LLVM cast as a function."""

    @intrinsic
    def cast(typing_context, x):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            to = ir.FloatType() if target is types.float32 else ir.IntType(32)
            return getattr(builder, name)(args[0], to)

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
