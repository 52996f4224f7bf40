"""Triton's interpreter made to compute as a GPU does, and to watch memory as no GPU does.

As it comes (3.6 to 3.9) it multiplies in float32 whatever precision is asked for, takes the bits of bfloat16 for
numbers in products, cuts bits off where a GPU rounds to bfloat16, and reads and writes any address that it is given.
Everything else that the kernels do with bfloat16 is right as it comes: they only move it, and cast it to float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

from pft_arch.attention import triton_backend


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """Within: kernels take bfloat16 too, products are those of tensor cores, and memory is watched (see `_Memory`)."""
    memory = _Memory()
    serves = mock.patch.object(
        triton_backend, "serves", lambda _, dtype: not triton_backend.failure and dtype != torch.float64
    )
    launch = mock.patch.object(triton_backend, "_launch", memory.watched(triton_backend._launch))
    methods = {"create_dot": _dot, "cast_impl": _cast(InterpreterBuilder.cast_impl)}
    for name, kind in (("create_masked_load", "read"), ("create_masked_store", "write"), ("create_atomic_rmw", "add")):
        methods[name] = memory.recorded(getattr(InterpreterBuilder, name), kind)
    with serves, launch, mock.patch.multiple(InterpreterBuilder, **methods), unwritten_memory_shows():
        yield


@contextmanager
def unwritten_memory_shows() -> Iterator[None]:
    """Within: memory that nobody has written holds NaN and the largest integers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # this is what fills memory that is handed out
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _dot(builder: Any, a: Any, b: Any, c: Any, precision: Any, _: Any) -> Any:
    """a b + c as Triton compiles it for an A100.

    Exact products of a few channels are added to the sum, which is then cut to float32's 24 bits (M. Fasi et al.,
    Numerical behavior of NVIDIA tensor cores, 2021). Of a tf32 operand the last 13 bits are ignored; "tf32x3" makes it
    of two: a + b = (a1 + a2)(b1 + b2) without a2 b2, a1 being a rounded to tf32.
    """
    half = a.data.dtype.itemsize == 2
    x, y = (_float32(operand) for operand in (a, b))
    if half:
        result = _accumulate(x, y, c.data, 8)
    elif precision.name == "TF32":
        result = _accumulate(_tf32(x), _tf32(y), c.data, 4)
    elif precision.name == "TF32x3":
        x1, y1 = _tf32(x, rounded=True), _tf32(y, rounded=True)
        result = _accumulate(_tf32(x - x1), y1, np.zeros_like(c.data), 4)
        result = _accumulate(x1, _tf32(y - y1), result, 4)
        result = _accumulate(x1, y1, np.nan_to_num(result, posinf=np.inf, neginf=-np.inf), 4) + c.data
    else:
        result = x @ y + c.data
    return TensorHandle(result, c.dtype.scalar)


def _accumulate(x: Any, y: Any, total: Any, channels: int) -> Any:
    """total + x y, cut to 24 bits after every few channels."""
    x, y, total = (part.astype(np.float64) for part in (x, y, total))
    for first in range(0, x.shape[-1], channels):
        total = total + x[..., first : first + channels] @ y[..., first : first + channels, :]
        total = (total.view(np.uint64) & np.uint64(0xFFFFFFFFE0000000)).view(np.float64)
    return total.astype(np.float32)


def _tf32(x: Any, rounded: bool = False) -> Any:
    """float32 with the last 13 bits of its fraction cut off, or rounded to nearest, halves away from zero."""
    bits = x.view(np.uint32) + np.uint32(0x1000 if rounded else 0)
    return np.where(np.isfinite(x), (bits & np.uint32(0xFFFFE000)).view(np.float32), x)


def _float32(handle: Any) -> Any:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _cast(original: Any) -> Any:
    def cast(builder: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return original(builder, source, to)
        bits = source.data.view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FC0), nearest), to.scalar)

    return cast


class _Memory:
    """What the programs of one launch read, write and add to atomically.

    No element may lie outside the tensors given to the kernel. Programs run in any order, and threads of one program
    wait for each other only where they exchange data: so an element is written at most once in a launch, read by no
    other program than that, and not after it; and what is added to atomically is accessed in no other way.
    """

    def __init__(self) -> None:
        self.bounds: tuple[Any, Any] = (np.zeros(0), np.zeros(0))
        self.accesses: dict[str, list[tuple[Any, Any]]] = {}  # kind: addresses, and program << 32 | time

    def watched(self, launch: Any) -> Any:
        def watch(kernel: Any, programs: int, *tensors: Tensor, **constants: Any) -> None:
            ends = sorted((x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors)
            self.bounds = (np.array([e[0] for e in ends], np.uint64), np.array([e[1] for e in ends], np.uint64))
            self.accesses = {kind: [] for kind in ("read", "write", "add")}
            launch(kernel, programs, *tensors, **constants)
            self.check(kernel.__name__)

        return watch

    def recorded(self, access: Any, kind: str) -> Any:
        def record(builder: Any, *arguments: Any) -> Any:
            handles = [x for x in arguments if isinstance(x, TensorHandle)]
            pointers, mask = handles[0], handles[1 if kind == "read" else 2]
            addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            starts, ends = self.bounds
            tensor = np.searchsorted(starts, addresses, "right") - 1
            if (tensor < 0).any() or (addresses + np.uint64(size) > ends[tensor]).any():
                raise IndexError(f"{kind} outside the tensors")
            time = sum(len(x) for x in self.accesses.values())
            when = np.full(len(addresses), interpreter_builder.grid_idx[0] << 32 | time, np.int64)
            self.accesses[kind].append((addresses, when))
            return access(builder, *arguments)

        return record

    def check(self, kernel: str) -> None:
        """Raises AssertionError where the order of programs or threads would matter."""
        read, write, add = (
            tuple(np.concatenate([x[i] for x in self.accesses[kind]] or [np.zeros(0, np.int64)]) for i in (0, 1))
            for kind in ("read", "write", "add")
        )
        written, first, counts = np.unique(write[0], return_index=True, return_counts=True)
        assert (counts == 1).all(), f"{kernel}: an element is written more than once"
        assert not np.isin(add[0], np.concatenate([read[0], written])).any(), f"{kernel}: not only added to"
        if len(written):
            place = np.searchsorted(written, read[0]).clip(max=len(written) - 1)
            both = written[place] == read[0]
            before, after = read[1][both], write[1][first][place[both]]
            assert ((before >> 32 == after >> 32) & (before < after)).all(), f"{kernel}: read while it is written"
