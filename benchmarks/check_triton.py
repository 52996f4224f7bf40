"""Every Triton kernel, forward and backward, against the torch backend in float64.

    python benchmarks/check_triton.py [--device cuda] [--json triton.json]
    python benchmarks/check_triton.py --device cpu [--compiled 80]

On a GPU: chains of layers with the head widths, windows and schedules of the presets, in every precision, by compiled
kernels; most of the time goes into compiling, once per machine. On a CPU: small chains in Triton's interpreter, which
is made to compute as a GPU does (see `interpreter`), or, on a CPU too, what the compiler makes of the kernels for a GPU
of that compute capability (see `ptx`). The exit status is 1 if any error is above its tolerance.

A borderline entry may be kept by one and cut by the other. In float32 such rows are counted and left out of both sides
(a row of the map depends on no other row); in half precision they are part of the error, and what the torch backend
loses there on the same inputs in the same precision is the yardstick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "cpu" in sys.argv and "--compiled" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from interpreter import like_a_gpu
from ptx import compiled
from torch import Tensor

from pft_arch.attention import torch_backend, triton_backend
from pft_arch.attention.chain import join

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative errors (of the norm) allowed in outputs and in gradients. A rounding to half precision changes a number by up
# to u = 2^-8 (bf16) or 2^-11 (fp16), by 0.4 u on average: outputs are rounded, and so are weights before they are
# multiplied, together 0.6 u, of which u is allowed (in fp16 3e-3, for the float16 logits of the carry); gradients see
# four roundings, 0.8 u, and differences of such numbers: 2 u, in fp16 4 u. Or else HALF times what torch loses, which
# multiplies in float32 and rounds no factor.
TOLERANCES = {"fp32": (1e-5, 1e-5), "tf32": (3e-3, 1e-2), "fp16": (3e-3, 2e-3), "bf16": (4e-3, 8e-3)}
HALF = 2.0
MAX_BORDERLINE = 0.01  # share of rows in float32


@dataclass(frozen=True)
class Chain:
    """Layers of one chain: entries `kept` after each; heads of `width` channels; images of down x across windows."""

    window: int
    heads: int
    width: int
    kept: tuple[int, ...]
    shifted: bool = True
    bias_per_head: bool = False
    images: int = 1
    down: int = 2
    across: int = 2


CHAINS = {
    "pft": Chain(32, 2, 40, (1024, 1024, 256, 256, 128, 64, 64, 32, 16, 16), bias_per_head=True),
    "pft_light": Chain(32, 2, 13, (1024, 256, 256, 128, 128, 64, 32, 32), images=2),
    "light": Chain(8, 6, 8, (64,) * 4, images=2, down=3, across=5),
    "window 16, width 10": Chain(16, 6, 10, (256, 256, 256, 60, 60, 9), down=3, bias_per_head=True),
    "window 12, width 8": Chain(12, 2, 8, (144, 144, 37, 1), shifted=False),
}
SMALL = {
    "dense, then a map": Chain(8, 1, 8, (64, 64), down=1),
    "cut at once": Chain(4, 2, 5, (7, 7, 3), down=1, bias_per_head=True),
    "all kinds of layers": Chain(6, 1, 4, (36, 36, 11, 11, 5), across=1),
}
# precision, whether with gradients
MODES = (("fp32", True), ("fp16", False), ("bf16", True), ("tf32", False))


def check(
    chain: Chain,
    precision: str,
    gradients: bool,
    device: str | torch.device = "cpu",
    seed: int = 0,
    capability: int | None = None,
) -> dict[str, Any]:
    """Errors of one chain: of each layer's output and, if asked for, of the gradients of its inputs and tables.

    On a CPU kernels are interpreted or, with the capability of a GPU, compiled for it and run as `ptx` does.

    Returns:
        JSON types: outputs, gradients (lists of relative errors), torch (likewise, of the torch backend in the same
        half precision), borderline (share of rows left out), passed.

    Raises:
        RuntimeError: the kernels do not run here.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    dtype, columns = DTYPES[precision], chain.heads if chain.bias_per_head else 1
    size = (chain.images, chain.down * chain.window, chain.across * chain.window)

    def draw(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(device, dtype) for _ in chain.kept]

    inputs = draw(*size, 3 * chain.heads * chain.width)
    tables = draw((2 * chain.window - 1) ** 2, columns)
    cotangents = draw(*size, chain.heads * chain.width)

    def run(backend: Any, to: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        leaves = [x.to(to).requires_grad_(gradients) for x in inputs + tables]
        outs, chosen, carry = [], [], None
        for qkv, table, keep in zip(leaves[: len(inputs)], leaves[len(inputs) :], chain.kept, strict=True):
            shift = chain.window // 2 if chain.shifted else 0
            options = {"heads": chain.heads, "window": chain.window, "shift": shift, "keep": keep}
            out, carry = backend.attend(qkv, table, carry, **options)
            outs.append(out)
            chosen.append(_indices(carry, chain))
        return leaves, outs, chosen

    def errors(same: Tensor | None, ours: Any, expected: Any) -> tuple[list[float], list[float]]:
        """Of outputs and of gradients, where `same` is 1."""
        (leaves, outs, _), (expected_leaves, expected_outs, _) = ours, expected
        mask: Any = 1 if same is None else same
        pairs = zip(outs, expected_outs, strict=True)
        of_outputs = [relative_error(out * mask, want * mask) for out, want in pairs]
        if not gradients:
            return of_outputs, []
        weights = [g * mask for g in cotangents]
        got = torch.autograd.grad(outs, leaves, [g.to(dtype) for g in weights])
        want = torch.autograd.grad(expected_outs, expected_leaves, [g.double() for g in weights], retain_graph=True)
        return of_outputs, [relative_error(a, b) for a, b in zip(got, want, strict=True)]

    kernels = compiled(capability) if capability else like_a_gpu() if device.type == "cpu" else nullcontext()
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        with torch.set_grad_enabled(gradients), kernels:
            ours, expected = run(triton_backend, dtype), run(torch_backend, torch.float64)
            same = _same_rows(ours[2], expected[2], chain) if precision == "fp32" else None
            outputs, of_gradients = errors(same, ours, expected)
            if triton_backend.failure:
                raise RuntimeError(f"the kernels do not run here: {triton_backend.failure}")
            yardstick = ([], []) if dtype == torch.float32 else errors(None, run(torch_backend, dtype), expected)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    borderline = 0.0 if same is None else 1 - float(same.double().mean())
    limits = (
        max(tolerance, HALF * max(torchs, default=0.0))
        for tolerance, torchs in zip(TOLERANCES[precision], yardstick, strict=True)
    )
    passed = borderline <= MAX_BORDERLINE and all(
        max(values, default=0.0) <= limit for values, limit in zip((outputs, of_gradients), limits, strict=True)
    )
    result = {"outputs": outputs, "gradients": of_gradients, "borderline": borderline, "passed": passed}
    return result if dtype == torch.float32 else result | {"torch": list(yardstick)}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Of the norm; not a number where one of them is not finite."""
    return float(
        (got.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm().clamp_min(1e-30)
    )


def _indices(carry: Any, chain: Chain) -> Tensor | None:
    """(windows, heads, n, k) kept entries in ascending order, whichever backend the carry is of; None if dense."""
    if isinstance(carry, triton_backend.MapCarry) and carry.indices is not None:
        return carry.indices.unflatten(0, (-1, chain.heads)).sort(-1).values
    if isinstance(carry, torch_backend.MapCarry) and carry.groups[0][1] is not None:
        indices = [indices.sort(-1).values for _, indices in carry.groups]
        per_block = -(-chain.heads // indices[0].shape[1])  # a block of windows has groups of heads
        return torch.cat([torch.cat(indices[i : i + per_block], 1) for i in range(0, len(indices), per_block)])
    return None


def _same_rows(chosen: Sequence[Tensor | None], expected: Sequence[Tensor | None], chain: Chain) -> Tensor:
    """(images, H, W, channels) 1 where a query's kept entries are the same in all layers, else 0."""
    windows, n = chain.images * chain.down * chain.across, chain.window**2
    same = torch.ones(windows, chain.heads, n, dtype=torch.bool)
    for a, b in zip(chosen, expected, strict=True):
        if a is not None and b is not None:
            same &= (a == b).all(-1).cpu()
    shift = chain.window // 2 if chain.shifted else 0
    rows = same[..., None].expand(-1, -1, -1, chain.width).float()
    device = next((x.device for x in chosen if x is not None), torch.device("cpu"))
    return join(rows, chain.window, shift, chain.down * chain.window, chain.across * chain.window).to(device)


def check_all(device: str = "cuda", path: Path | None = None, capability: int | None = None) -> dict[str, Any]:
    """All chains in all precisions: {"passed", "device", "torch", "triton", "cases"}, written to `path` on the way."""
    on_gpu = torch.device(device).type == "cuda"
    simulated = f"code for sm_{capability}, simulated" if capability else "Triton's interpreter"
    name = torch.cuda.get_device_name(device) if on_gpu else simulated
    result: dict[str, Any] = {"passed": True, "device": name, "torch": torch.__version__, "triton": triton.__version__}
    result["cases"] = []
    for precision, gradients in MODES:
        for label, chain in (CHAINS if on_gpu else SMALL).items():
            case: dict[str, Any] = {"chain": label, "precision": precision}
            start = time.perf_counter()
            try:
                case |= check(chain, precision, gradients, device, capability=capability)
            except Exception as error:  # the other cases are worth knowing
                case |= {"passed": False, "error": f"{type(error).__name__}: {error}"}
            case["seconds"] = round(time.perf_counter() - start, 1)
            result["passed"] &= case["passed"]
            result["cases"].append(case)
            worst = " ".join(f"{k} {max(case[k]):.1e}" for k in ("outputs", "gradients") if case.get(k))
            print(
                f"{'ok  ' if case['passed'] else 'FAIL'} {precision} {label}: {worst or case.get('error')}", flush=True
            )
            if path:
                path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compiled", type=int, metavar="CAPABILITY", help="80, 86, 89, 90 or 120; with --device cpu")
    options = parser.parse_args()
    return 0 if check_all(options.device, options.json, options.compiled)["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
