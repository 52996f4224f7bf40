"""Compiles every Triton kernel that the presets launch, ahead of time, for GPUs that need not be there.

    python benchmarks/triton_aot.py [--presets pft] [--capabilities 90] [--dtypes fp16] [--only rows]

Everything takes about half an hour of one core; results are added to those in the file.

The launches are those of the backend itself: layers of a preset run on the meta device, forward and backward, and what
they would start is compiled for sm_80, sm_89, sm_90 and sm_120. Written down for each: registers of a thread, spilled
4-byte words of a thread, bytes of shared memory, warps, and how many programs one multiprocessor can hold of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from pft_arch.attention import triton_backend
from pft_arch.config import PRESETS

KEY = ("preset", "dtype", "training", "kernel", "capability")
PRESET_NAMES = ("pft", "pft_light", "light")
CAPABILITIES = (80, 89, 90, 120)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
# per multiprocessor: registers, warps, programs; bytes of shared memory (CUDA programming guide, compute capabilities)
LIMITS = {
    80: (65536, 64, 32, 167936),
    89: (65536, 48, 24, 102400),
    90: (65536, 64, 32, 233472),
    120: (65536, 48, 24, 102400),
}


def launches(preset: str, dtype: torch.dtype, training: bool) -> list[tuple[Any, tuple[Tensor, ...], dict[str, Any]]]:
    """(kernel, tensors, constants) of every launch of one unshifted and one shifted chain, without repetitions."""
    config = PRESETS[preset]
    side = 2 * config.window_size
    heads = config.num_heads
    seen: dict[str, tuple[Any, tuple[Tensor, ...], dict[str, Any]]] = {}

    def record(kernel: Any, programs: int, *tensors: Tensor, **constants: Any) -> None:
        key = str((kernel.__name__, [x.dtype for x in tensors], {**constants, "SHIFT": 0}))
        seen.setdefault(key, (kernel, tensors, constants))

    with mock.patch.object(triton_backend, "_launch", record), torch.set_grad_enabled(training):
        for shifted in (False, True):
            carry, total = None, torch.zeros((), device="meta")
            shift = config.window_size // 2 if shifted else 0
            geometry = triton_backend.Geometry(heads, config.head_dim, config.window_size, shift, 2, 2)
            for keep in (keep for s, keep in config.layers() if s == shifted):
                size = (1, side, side, 3 * config.embed_dim)
                qkv = torch.empty(size, dtype=dtype, device="meta", requires_grad=training)
                columns = heads if config.embed_dim > 100 else 1
                size = ((2 * config.window_size - 1) ** 2, columns)
                table = torch.empty(size, device="meta", requires_grad=training)
                out, carry = triton_backend.layer(qkv, table, carry, geometry, keep)
                total = total + out.float().sum()
            if training:
                total.backward()
    return list(seen.values())


def compile_launch(kernel: Any, tensors: tuple[Tensor, ...], constants: dict[str, Any], capability: int) -> Any:
    """The compiled kernel, for a GPU of that compute capability."""
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    names = kernel.arg_names
    signature, attributes = {}, {}
    for i, (name, tensor) in enumerate(zip(names, tensors, strict=False)):
        signature[name] = POINTERS[tensor.dtype]
        attributes[(i,)] = [["tt.divisibility", 16]]
    values = {}
    for parameter in kernel.params[len(tensors) :]:
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            values[parameter.name] = constants[parameter.name]
        else:
            signature[parameter.name] = "i32"
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in values.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def measure(compiled: Any, capability: int) -> dict[str, Any]:
    """Registers and spills as the assembler says, shared memory, and programs that fit on one multiprocessor."""
    registers, spills = resources(compiled, capability)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    all_registers, all_warps, all_programs, all_shared = LIMITS[capability]
    per_warp = -(-registers * 32 // 256) * 256
    resident = min(all_registers // (per_warp * warps), all_warps // warps, all_programs, all_shared // (shared + 1024))
    return {"registers": registers, "spills": spills, "shared": shared, "warps": warps, "resident": resident}


def resources(compiled: Any, capability: int) -> tuple[int, int]:
    """Registers and spilled 4-byte words of a thread, from the assembler that comes with triton."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"], "utf-8")
        arch = sm_arch_from_capability(capability)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", str(source), "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", text)
    spilled = re.search(r"(\d+) bytes spill loads", text)
    assert registers is not None and spilled is not None, text
    return int(registers[1]), int(spilled[1]) // 4


def label(kernel: Any, constants: dict[str, Any]) -> str:
    """What tells a variant from the others of its kernel."""
    names = (
        "D",
        "QK",
        "N",
        "KEPT",
        "KEEP",
        "MASKED",
        "HAS_CARRY",
        "HAS_NEW",
        "SAVE",
        "INVERSE",
        "ROWS",
        "COLUMNS",
        "TILE",
    )
    parts = (f"{name.lower()}={constants[name]}" for name in names if name in constants)
    return f"{kernel.__name__} " + " ".join(part for part in parts if not part.endswith("=False"))


def measurements(
    presets: Iterable[str], capabilities: Iterable[int], dtypes: Iterable[str], only: str = ""
) -> Iterator[dict[str, Any]]:
    """One record for each variant of a kernel that a preset launches; training only where inference has no such."""
    for preset, name in product(presets, dtypes):
        done = set()
        for training in (False, True):
            for kernel, tensors, constants in launches(preset, DTYPES[name], training):
                key = (label(kernel, constants), *(x.dtype for x in tensors))
                if key in done or not key[0].startswith(only):
                    continue
                done.add(key)
                for capability in capabilities:
                    row: dict[str, Any] = {"preset": preset, "dtype": name, "training": training, "kernel": key[0]}
                    row["capability"] = capability
                    try:
                        row |= measure(compile_launch(kernel, tensors, constants, capability), capability)
                    except Exception as error:  # whatever a compiler may raise is a result here
                        row["error"] = f"{type(error).__name__}: {str(error)[-300:]}"
                    print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
                    yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--presets", nargs="+", default=PRESET_NAMES, choices=PRESET_NAMES)
    parser.add_argument("--capabilities", nargs="+", type=int, default=CAPABILITIES, choices=CAPABILITIES)
    parser.add_argument("--dtypes", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    parser.add_argument("--only", default="", help="kernels whose label begins so")
    options = parser.parse_args()
    rows = json.loads(options.json.read_text("utf-8"))["kernels"] if options.json.exists() else []
    known = {tuple(row[name] for name in KEY): row for row in rows}
    for row in measurements(options.presets, options.capabilities, options.dtypes, options.only):
        known[tuple(row[name] for name in KEY)] = row
        rows = [known[key] for key in sorted(known)]
        text = ",\n  ".join(json.dumps(row) for row in rows)
        options.json.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n  {text}\n]}}\n', "utf-8")


if __name__ == "__main__":
    main()
