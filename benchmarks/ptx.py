"""Runs PTX, which Triton's compiler makes for a GPU, on a CPU: what the interpreter cannot show, layouts, shuffles,
tensor cores' fragments, shared memory and barriers of the compiled kernels, is then compared with float64 too.

All threads of a program go in lockstep, one number each in an array; a branch that only some of them take, an address
outside the tensors, one that is not aligned, or two warps at one place of shared memory without a barrier between them,
one of them writing, is an error. Knows what Triton 3.6 makes of the kernels for sm_80 to sm_90 and sm_120.
After NVIDIA's PTX ISA, release 8.7, section 9.7.
"""

from __future__ import annotations

import ctypes
import operator
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from interpreter import unwritten_memory_shows
from torch import Tensor

from pft_arch.attention import triton_backend

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
WIDTHS = {"%rs": 16, "%rd": 64, "%SP": 64, "%SPL": 32}  # of registers; others have 32 bits
LOCAL = 2**20  # address of a thread's own memory, which no tensor has
COMPARISONS = {"eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "lo": "lt", "ls": "le"}
COMPARISONS |= {"hi": "gt", "hs": "ge"}
IGNORED = {"fence", "griddepcontrol", "nop"}


@contextmanager
def compiled(capability: int) -> Iterator[None]:
    """Within: the backend's launches on tensors of the CPU run what Triton compiles for that compute capability."""
    from triton_aot import compile_launch  # takes TRITON_INTERPRET out of the environment

    programs: dict[str, tuple[Program, int]] = {}

    def launch(kernel: Any, count: int, *tensors: Tensor, **constants: Any) -> None:
        key = str((kernel.__name__, [x.dtype for x in tensors], constants))
        if key not in programs:
            code = compile_launch(kernel, tensors, constants, capability)
            programs[key] = Program(code.asm["ptx"]), code.metadata.shared
        program, shared = programs[key]
        scalars = [constants[x.name] for x in kernel.params[len(tensors) :] if not x.is_constexpr]
        for i in range(count):
            Machine(program, [*(x.data_ptr() for x in tensors), *scalars, 0, 0], i, tensors, shared).run()

    serves = mock.patch.object(triton_backend, "serves", lambda _, dtype: dtype != torch.float64)
    with serves, mock.patch.object(triton_backend, "_launch", launch), unwritten_memory_shows():
        yield


class Program:
    """Parsed PTX of one kernel. instructions: (predicate, whether negated, opcode's parts, operands, text)."""

    def __init__(self, text: str) -> None:
        head, body = text[text.index(".visible .entry") :].split("{", 1)
        self.parameters = re.findall(r"\w+_param_\d+", head)
        self.threads = int(re.search(r"\.reqntid (\d+)", head)[1])
        local = re.search(r"__local_depot\d+\[(\d+)\]", body)
        self.local = int(local[1]) if local else 0
        body = re.split(r"^\}", body, maxsplit=1, flags=re.MULTILINE)[0]
        body = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*$", "", body, flags=re.MULTILINE)
        body = re.sub(r"(\$[\w$]+):", r"\1:;", body)
        self.instructions: list[tuple[str, bool, list[str], list[str], str]] = []
        self.labels: dict[str, int] = {}
        for line in body.split(";"):
            statement = " ".join(line.split())
            # braces around inline assembly are scopes, not vectors
            statement = re.sub(r"^[{} ]+(?=[.@a-z$]|$)", "", statement)
            if statement.endswith(":"):
                self.labels[statement[:-1]] = len(self.instructions)
            elif statement and not statement.startswith("."):
                match = re.match(r"(?:@(!?)(%\w+) )?([\w.:]+) ?(.*)$", statement)
                negated, predicate, opcode, operands = match.groups()
                parts = re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{}\[\]])+", operands)
                self.instructions.append(
                    (predicate or "", negated == "!", opcode.split("."), [x.strip() for x in parts], statement)
                )


class Machine:
    """One program of a kernel: its threads' registers and shared memory.

    Methods named after opcodes take its parts (`add.rn.f32` as ["add", "rn", "f32"]) and its operands.
    """

    def __init__(self, program: Program, arguments: Sequence[int], index: int, tensors: Sequence[Tensor], shared: int):
        self.program, self.size = program, program.threads
        self.arguments = dict(zip(program.parameters, arguments, strict=False))
        thread = np.arange(self.size)
        self.lane, self.warp = thread % 32, thread // 32
        self.special = {"%tid.x": thread.astype(np.uint32), "%ctaid.x": np.full(self.size, index, np.uint32)}
        self.registers: dict[str, Any] = {}
        self.active: Any = np.ones(self.size, bool)
        self.shared = np.zeros(shared + 16, np.uint8)
        self.local = np.zeros(self.size * program.local, np.uint8)
        self.accesses: list[tuple[bool, Any, Any]] = []  # of shared memory since the last barrier
        self.memory = [(x.data_ptr(), x.numel() * x.element_size()) for x in tensors]
        self.next = 0

    def run(self) -> None:
        while self.next >= 0:
            predicate, negated, parts, operands, text = self.program.instructions[self.next]
            self.next += 1
            self.active = np.ones(self.size, bool) if not predicate else self.registers[predicate] ^ negated
            if parts[0] in IGNORED:
                continue
            name = parts[0] + "_" if parts[0] in ("and", "or", "not") else parts[0]
            try:
                execute = getattr(self, name, None)
                if execute is None:
                    raise NotImplementedError
                with np.errstate(all="ignore"):
                    execute(parts, operands)
            except Exception as error:
                raise RuntimeError(f"{text}: {type(error).__name__}: {error}") from error
        self.barrier()

    # registers

    def register(self, name: str) -> Any:
        """What it holds; before it is written, anything, which is to be seen where it has an effect."""
        if name in self.registers:
            return self.registers[name]
        width = WIDTHS.get(name, WIDTHS.get(name[:3], 32))
        return np.full(self.size, 0xA5A5A5A5A5A5A5A5 >> (64 - width), UNSIGNED[width])

    def read(self, operand: str, type: str = "b32") -> Any:
        """Of every thread, as that type: b, u, s, f and bits, perhaps "x2" for [threads, 2], or "pred"."""
        if type == "pred":
            return self.registers[operand] if operand[0] == "%" else np.full(self.size, operand != "0")
        kind, each, pair = re.fullmatch(r"(\D)(\d+)(x2)?", type).groups()
        width = int(each) * (2 if pair else 1)
        if operand[0] == "{":
            parts = [self.register(x) for x in _names(operand)]
            value = np.ascontiguousarray(np.stack(parts, 1)).view(UNSIGNED[width])[:, 0]
        elif operand in self.special:
            value = self.special[operand]
        elif operand[0] == "%":
            value = self.register(operand)
        elif operand == "global_smem" or operand.startswith("__local_depot"):
            value = np.full(self.size, LOCAL if operand[0] == "_" else 0, UNSIGNED[width])
        else:
            bits = int(operand[2:], 16) if operand[:2] in ("0f", "0d") else int(operand.rstrip("U"), 0)
            value = np.full(self.size, bits & (2**width - 1), UNSIGNED[width])
        value = np.ascontiguousarray(value.astype(UNSIGNED[width], copy=False))
        value = value.view({"s": SIGNED, "f": FLOAT}.get(kind, UNSIGNED)[int(each)])
        return value.reshape(-1, 2) if pair else value

    def write(self, operand: str, value: Any) -> None:
        if operand[0] == "{":
            names = _names(operand)
            width = value.dtype.itemsize * 8 * value[0].size // len(names)
            value = np.ascontiguousarray(value).view(UNSIGNED[width]).reshape(self.size, -1)
            for name, part in zip(names, value.T, strict=True):
                self.write(name, part)
            return
        if value.ndim == 2:
            value = np.ascontiguousarray(value).view(UNSIGNED[16 * value.dtype.itemsize])[:, 0]
        if value.dtype != bool:
            width = WIDTHS.get(operand, WIDTHS.get(operand[:3], 32))
            if value.dtype.kind == "f":
                value = value.view(UNSIGNED[value.dtype.itemsize * 8])
            value = value.astype((SIGNED if value.dtype.kind == "i" else UNSIGNED)[width]).view(UNSIGNED[width])
        if not self.active.all():
            value = np.where(
                self.active, value, self.registers[operand] if value.dtype == bool else self.register(operand)
            )
        self.registers[operand] = value

    # memory

    def address(self, operand: str) -> Any:
        base, offset = re.match(r"\[ ?([^+\] ]+)(?: ?\+ ?(-?\w+))? ?\]", operand).groups()
        return self.read(base, "b64" if base[:3] == "%rd" else "b32").astype(np.int64) + int(offset or "0", 0)

    def place(self, address: Any, size: int, write: bool, space: str) -> Any:
        """(bytes of a tensor or of shared memory, indices into them) for the active threads."""
        address = address[self.active]
        if (address % size).any():
            raise IndexError("not aligned")
        if space.startswith("shared"):
            start, memory, warp = 0, self.shared, np.repeat(self.warp[self.active], size)
            self.accesses.append((write, (address[:, None] + np.arange(size)).ravel(), warp))
            length = len(memory) - 16
        elif LOCAL <= address[0] < LOCAL + self.program.local:
            start, length, memory = LOCAL, self.program.local, self.local
        else:
            start, length = next(((b, n) for b, n in self.memory if b <= address.min() < b + n), (0, 0))
            memory = np.frombuffer((ctypes.c_uint8 * length).from_address(start), np.uint8) if length else None
        if (address < start).any() or (address + size > start + length).any():
            raise IndexError("outside the tensor")
        own = np.nonzero(self.active)[0] * length if start == LOCAL else 0
        return memory, (address - start + own)[:, None] + np.arange(size)

    def barrier(self) -> None:
        """Raises where, since the last one, a warp wrote what another read or wrote."""
        writer, reader = (np.full(len(self.shared), -1) for _ in range(2))
        for write, address, warp in self.accesses:
            others = (writer[address] != warp) & (writer[address] != -1)
            if write:
                others |= (reader[address] != warp) & (reader[address] != -1)
                writer[address] = warp
            else:
                several = (reader[address] != warp) & (reader[address] != -1)
                reader[address] = np.where(several, -2, warp)
            if others.any():
                raise RuntimeError("two warps meet in shared memory")
        self.accesses.clear()

    def ld(self, parts: list[str], operands: list[str]) -> None:
        width = int(parts[-1][1:])
        if parts[1] == "param":
            value = self.arguments[operands[1].strip("[] ")] & (2**width - 1)
            return self.write(operands[0], np.full(self.size, value, UNSIGNED[width]))
        size = width // 8 * max((int(x[1]) for x in parts if x in ("v2", "v4")), default=1)
        data = np.zeros((self.size, size), np.uint8)
        if self.active.any():
            memory, index = self.place(self.address(operands[1]), size, False, parts[1])
            data[self.active] = memory[index]
        value = data.view(UNSIGNED[width])
        return self.write(operands[0], value if operands[0][0] == "{" else value[:, 0])

    def st(self, parts: list[str], operands: list[str]) -> None:
        names = _names(operands[1])
        data = np.stack([self.read(name, parts[-1]) for name in names], 1).view(np.uint8)
        if self.active.any():
            memory, index = self.place(self.address(operands[0]), data.shape[1], True, parts[1])
            memory[index] = data[self.active]

    def atom(self, parts: list[str], operands: list[str]) -> None:
        """Also `red`, without a result; the kernels use none."""
        if parts[-1] != "f32" or "add" not in parts:
            raise NotImplementedError
        value = np.stack([self.read(name, "f32") for name in _names(operands[-1])], 1)
        if self.active.any():
            memory, index = self.place(self.address(operands[-2]), 4 * value.shape[1], True, "global")
            np.add.at(memory.view(np.float32), index[:, ::4] // 4, value[self.active])

    red = atom

    def cp(self, parts: list[str], operands: list[str]) -> None:
        if parts[2] not in ("ca", "cg"):
            return
        size, active = int(operands[2], 0), self.active
        data = np.zeros((self.size, size), np.uint8)
        self.active = active & (self.read(operands[3]) > 0) if len(operands) > 3 else active
        if self.active.any():
            memory, index = self.place(self.address(operands[1]), size, False, "global")
            data[self.active] = memory[index]
        self.active = active
        memory, index = self.place(self.address(operands[0]), size, True, "shared")
        memory[index] = data[active]

    def bar(self, parts: list[str], operands: list[str]) -> None:
        if parts[1] == "sync":
            self.barrier()

    def bra(self, parts: list[str], operands: list[str]) -> None:
        if self.active.all():
            self.next = self.program.labels[operands[0]]
        elif self.active.any():
            raise RuntimeError("threads part")

    def ret(self, parts: list[str], operands: list[str]) -> None:
        if self.active.all():
            self.next = -1
        elif self.active.any():
            raise RuntimeError("threads part")

    # arithmetic

    def cvta(self, parts: list[str], operands: list[str]) -> None:
        self.apply(lambda x: x, parts, operands)

    def mov(self, parts: list[str], operands: list[str]) -> None:
        self.write(operands[0], self.read(operands[1], parts[-1]))

    def apply(self, function: Any, parts: list[str], operands: list[str]) -> None:
        self.write(operands[0], function(*(self.read(x, parts[-1]) for x in operands[1:])))

    def add(self, parts: list[str], operands: list[str]) -> None:
        self.apply(np.add, parts, operands)

    def sub(self, parts: list[str], operands: list[str]) -> None:
        self.apply(np.subtract, parts, operands)

    def max(self, parts: list[str], operands: list[str]) -> None:
        self.apply(np.fmax, parts, operands)

    def min(self, parts: list[str], operands: list[str]) -> None:
        self.apply(np.fmin, parts, operands)

    def and_(self, parts: list[str], operands: list[str]) -> None:
        self.apply(np.bitwise_and, parts, operands)

    def or_(self, parts: list[str], operands: list[str]) -> None:
        self.apply(np.bitwise_or, parts, operands)

    def xor(self, parts: list[str], operands: list[str]) -> None:
        self.apply(np.bitwise_xor, parts, operands)

    def not_(self, parts: list[str], operands: list[str]) -> None:
        self.apply(np.invert, parts, operands)

    def neg(self, parts: list[str], operands: list[str]) -> None:
        self.apply(np.negative, parts, operands)

    def abs(self, parts: list[str], operands: list[str]) -> None:
        self.apply(np.abs, parts, operands)

    def ex2(self, parts: list[str], operands: list[str]) -> None:
        self.apply(np.exp2, parts, operands)

    def lg2(self, parts: list[str], operands: list[str]) -> None:
        self.apply(np.log2, parts, operands)

    def popc(self, parts: list[str], operands: list[str]) -> None:
        self.apply(lambda x: np.array([int(n).bit_count() for n in x], np.uint32), parts, operands)

    def fma(self, parts: list[str], operands: list[str]) -> None:
        self.apply(lambda x, y, z: (x.astype(np.float64) * y + z).astype(np.float32), parts, operands)

    def div(self, parts: list[str], operands: list[str]) -> None:
        whole = parts[-1][0] != "f"
        self.apply(lambda x, y: np.trunc(x / y).astype(x.dtype) if whole else x / y, parts, operands)

    def rem(self, parts: list[str], operands: list[str]) -> None:
        self.apply(np.fmod, parts, operands)

    def mul(self, parts: list[str], operands: list[str]) -> None:
        """Also `mad`: wide gives twice the bits, hi the upper half of them."""
        type = parts[-1]
        x, y = (self.read(operand, type) for operand in operands[1:3])
        if parts[1] in ("wide", "hi"):
            width = x.dtype.itemsize * 8
            twice = object if width == 64 else (SIGNED if type[0] == "s" else UNSIGNED)[2 * width]
            product = x.astype(twice) * y.astype(twice)
            product = (product >> width).astype(x.dtype) if parts[1] == "hi" else product
            type = f"{type[0]}{product.dtype.itemsize * 8}"
        else:
            product = x * y
        self.write(operands[0], product + self.read(operands[3], type) if len(operands) > 3 else product)

    mad = mul

    def shl(self, parts: list[str], operands: list[str]) -> None:
        """Also `shr`, which repeats the sign of a signed number."""
        x, count = self.read(operands[1], parts[-1]), self.read(operands[2]).astype(np.int64)
        width = x.dtype.itemsize * 8
        shift = np.left_shift if parts[0] == "shl" else np.right_shift
        result = shift(x, np.minimum(count, width - 1).astype(x.dtype))
        beyond = (count >= width) & ~((parts[0] == "shr") & (parts[-1][0] == "s"))
        self.write(operands[0], np.where(beyond, 0, result).astype(x.dtype))

    shr = shl

    def bfe(self, parts: list[str], operands: list[str]) -> None:
        """`count` bits from `first` on, the highest of them the sign."""
        first, count = (int(x, 0) for x in operands[2:])
        field = (self.read(operands[1]).astype(np.int64) >> first) & (2**count - 1)
        sign = 2 ** (count - 1) if parts[-1] == "s32" else 0
        self.write(operands[0], ((field ^ sign) - sign).astype(np.int32).view(np.uint32))

    def prmt(self, parts: list[str], operands: list[str]) -> None:
        """Four bytes out of eight."""
        pair = np.stack([self.read(x) for x in operands[1:3]], 1).view(np.uint8)
        selector = self.read(operands[3]).astype(np.int64)
        which = np.stack([(selector >> (4 * i)) & 7 for i in range(4)], 1)
        self.write(operands[0], np.ascontiguousarray(np.take_along_axis(pair, which, 1)).view(np.uint32)[:, 0])

    def setp(self, parts: list[str], operands: list[str]) -> None:
        """With a "u" behind the comparison, true where one of the numbers is NaN."""
        x, y = (self.read(operand, parts[-1]) for operand in operands[1:])
        if parts[1] in ("num", "nan"):
            return self.write(operands[0], (np.isnan(x) | np.isnan(y)) ^ (parts[1] == "num"))
        result = getattr(operator, COMPARISONS[parts[1][:2]])(x, y)
        if parts[-1][0] == "f":
            result = np.where(np.isnan(x) | np.isnan(y), len(parts[1]) == 3, result)
        return self.write(operands[0], result)

    def selp(self, parts: list[str], operands: list[str]) -> None:
        x, y = (self.read(operand, parts[-1]) for operand in operands[1:3])
        self.write(operands[0], np.where(self.read(operands[3], "pred"), x, y))

    def cvt(self, parts: list[str], operands: list[str]) -> None:
        to, source = parts[-2:]
        if to in ("f16x2", "bf16x2"):
            halves = [_rounded(self.read(x, "f32"), to[:-2]) for x in operands[:0:-1]]
            return self.write(operands[0], np.ascontiguousarray(np.stack(halves, 1)).view(np.uint32)[:, 0])
        if to == "tf32":
            return self.write(operands[0], (self.read(operands[1]) + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
        if to == "bf16":
            return self.write(operands[0], _rounded(self.read(operands[1], "f32"), to))
        if source == "bf16":
            return self.write(operands[0], self.read(operands[1], "b16").astype(np.uint32) << np.uint32(16))
        x, width = self.read(operands[1], source), int(to[1:])
        if source[0] == "f" and to[0] != "f":
            limits = np.iinfo((SIGNED if to[0] == "s" else UNSIGNED)[width])
            x = np.trunc(np.nan_to_num(x.astype(np.float64), posinf=np.inf, neginf=-np.inf)).clip(
                limits.min, limits.max
            )
        return self.write(operands[0], x.astype({"s": SIGNED, "f": FLOAT}.get(to[0], UNSIGNED)[width]))

    # between the threads of a warp; g and t: row and column of a thread in an 8 x 4 fragment

    def shfl(self, parts: list[str], operands: list[str]) -> None:
        count, limit = self.read(operands[2]).astype(np.int64) & 31, self.read(operands[3]).astype(np.int64) & 0x1F1F
        low = self.lane & (limit >> 8)
        bound = low | (limit & 31 & ~(limit >> 8))
        mode = parts[2]
        source = {"bfly": self.lane ^ count, "up": self.lane - count, "down": self.lane + count, "idx": low | count}[
            mode
        ]
        inside = source >= bound if mode == "up" else source <= bound
        value = self.read(operands[1])[self.warp * 32 + np.where(inside, source, self.lane)]
        self.write(operands[0].split("|")[0], value)

    def redux(self, parts: list[str], operands: list[str]) -> None:
        values = self.read(operands[1], parts[-1]).reshape(-1, 32)
        self.write(operands[0], np.repeat(getattr(np, {"add": "sum"}.get(parts[2], parts[2]))(values, 1), 32))

    def ldmatrix(self, parts: list[str], operands: list[str]) -> None:
        count = int(next(x for x in parts if re.fullmatch(r"x\d", x))[1])
        self.active = self.lane < 8 * count
        memory, index = self.place(self.address(operands[1]), 16, False, "shared")
        matrices = memory[index].view(np.uint16).reshape(-1, count, 8, 8)
        matrices = matrices.swapaxes(2, 3) if "trans" in parts else matrices
        self.active = np.ones(self.size, bool)
        pairs = np.ascontiguousarray(matrices).view(np.uint32)  # [warp, matrix, g, t]
        self.write(operands[0], pairs.reshape(-1, count, 32).swapaxes(1, 2).reshape(self.size, count))

    def stmatrix(self, parts: list[str], operands: list[str]) -> None:
        names = _names(operands[1])
        pairs = np.stack([self.read(name) for name in names], 1).reshape(-1, 32, len(names))
        matrices = np.ascontiguousarray(pairs.swapaxes(1, 2)).view(np.uint16).reshape(-1, len(names), 8, 8)
        matrices = matrices.swapaxes(2, 3) if "trans" in parts else matrices
        self.active = self.lane < 8 * len(names)
        memory, index = self.place(self.address(operands[0]), 16, True, "shared")
        memory[index] = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)

    def mma(self, parts: list[str], operands: list[str]) -> None:
        """[16, k] times [k, 8] for every warp: k is 16 in half precision, 8 in tf32."""
        d, a, b, c = (_names(operand) for operand in operands)
        left, right = self.fragment(a, parts[-2], 2), self.fragment(b, parts[-2], 1)
        self.accumulate(d, left @ right.swapaxes(1, 2), [self.read(x, "f32") for x in c])

    def wgmma(self, parts: list[str], operands: list[str]) -> None:
        """[64, 16] times [16, n] for every four warps, in half precision; nothing is ever late here."""
        if parts[1] != "mma_async":
            return
        d, (a, b, keep) = _names(operands[0]), operands[1:4]
        columns = int(re.search(r"n(\d+)", parts[4])[1])
        if a[0] == "{":
            left = self.fragment(_names(a), parts[-1], 2).reshape(-1, 64, 16)
        else:
            left = self.tile(a, 64, operands[6] == "1", parts[-1])
        product = left @ self.tile(b, columns, operands[-1] == "1", parts[-1]).swapaxes(1, 2)
        kept = self.read(keep, "pred")
        self.accumulate(d, product.reshape(-1, 16, columns), [np.where(kept, self.read(x, "f32"), 0) for x in d])

    def tile(self, descriptor: str, rows: int, transposed: bool, type: str) -> Any:
        """[four warps, rows, 16] out of swizzled shared memory; of a transposed tile, rows are contiguous."""
        bits = self.read(descriptor, "b64")[::128, None, None]
        start, leading, stride = (
            ((bits >> np.uint64(x)) & np.uint64(0x3FFF)).astype(np.int64) << 4 for x in (0, 16, 32)
        )
        width = {1: 128, 2: 64, 3: 32}[int(bits.flat[0] >> np.uint64(62))]
        row, k = np.arange(rows)[:, None], np.arange(16)
        if transposed:
            offset = 2 * row // width * leading + 2 * row % width + k // 8 * stride + k % 8 * width
        else:
            offset = row // 8 * stride + row % 8 * width + 2 * k
        address = start + offset
        address ^= ((address >> 7) & (width // 16 - 1)) << 4
        if (address + 2 > len(self.shared) - 16).any():
            raise IndexError("outside shared memory")
        if any(np.isin(written, address).any() for write, written, _ in self.accesses if write):
            raise RuntimeError("multiplied without a barrier after it was written")
        return _numbers(self.shared[address[..., None] + np.arange(2)].view(np.uint16)[..., 0], type)

    def fragment(self, registers: list[str], type: str, halves: int) -> Any:
        """[warp, 8 * halves, k] in float64 from its registers."""
        g, t = np.arange(32) // 4, np.arange(32) % 4
        each = 1 if type == "tf32" else 2  # numbers in a register
        result = np.zeros((self.size // 32, 8 * halves, 4 * each * len(registers) // halves))
        for i, register in enumerate(registers):
            bits = self.read(register)
            numbers = _numbers(bits if each == 1 else bits.view(np.uint16), type).reshape(-1, 32, each)
            for j in range(each):
                result[:, g + 8 * (i % halves), each * t + j + 4 * each * (i // halves)] = numbers[..., j]
        return result

    def accumulate(self, to: list[str], product: Any, start: list[Any]) -> None:
        """Adds [warp, 16, columns]."""
        g, t = np.arange(32) // 4, np.arange(32) % 4
        for i, (register, total) in enumerate(zip(to, start, strict=True)):
            part = product[:, g + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * t + i % 2].reshape(-1)
            self.write(register, (total + part).astype(np.float32))


def _names(operand: str) -> list[str]:
    return [x.strip() for x in operand.strip("{}").split(",")]


def _numbers(bits: Any, type: str) -> Any:
    """In float64."""
    if type == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if type == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.view(np.float16).astype(np.float64)


def _rounded(x: Any, type: str) -> Any:
    """float32 as bits of that half precision, to nearest even."""
    if type == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)
