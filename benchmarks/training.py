"""A training step, forward and backward, by each backend and by the authors' code, taking turns: time and memory.

python benchmarks/training.py [--device cuda] [--preset light pft_light] [--batch 2] [--patch 64] [--published CHECKOUT]
                              [--precision fp32 bf16] [--repeat 5] --json FILE

Half precision is autocast, as `pft-sr train --precision` has it; the published extension takes float32 only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pft_arch.benchmark import (
    PRECISIONS,
    SEED,
    Contender,
    contenders,
    default_backends,
    error_text,
    machine,
    peak_memory,
    timed,
)

SCALE = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--preset", nargs="+", default=["light", "pft_light"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=PRECISIONS)
    parser.add_argument("--published", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()

    facts = {"machine": machine(given.device), "scale": SCALE, "batch": given.batch, "patch": given.patch}
    results: list[dict[str, Any]] = []
    for preset in given.preset:
        for precision in given.precision:
            rivals = contenders([preset], SCALE, default_backends(given.device), given.device, given.published)
            results += measure(rivals, precision, given.batch, given.patch, given.device, given.repeat)
            given.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n", "utf-8")


def measure(
    rivals: list[Contender], precision: str, batch: int, patch: int, device: torch.device, repeat: int
) -> list[dict[str, Any]]:
    """A record each, of the same weights and patches.

    gradient_difference: of all weights' gradients together, by their norm, from those of the first that ran.
    """
    torch.manual_seed(SEED)
    low = torch.rand(batch, 3, patch, patch, device=device)
    high = torch.rand(batch, 3, SCALE * patch, SCALE * patch, device=device)
    results: list[dict[str, Any]] = []
    runs: list[Callable[[], None]] = []
    first: Tensor | None = None
    for rival in rivals:
        result: dict[str, Any] = {"network": rival.network, "code": rival.backend or rival.code, "precision": precision}
        result |= {"seconds": [], "processor_seconds": []}
        torch.manual_seed(SEED)
        network = rival.build().to(device).train()
        run = partial(step, network, low, high, precision if rival.half else "fp32")
        runs.append(run)
        results.append(result)
        try:
            run()
            gradient = torch.cat(
                [p.grad.flatten() for _, p in sorted(network.named_parameters()) if p.grad is not None]
            )
            first = gradient if first is None else first
            result["gradient_difference"] = float((gradient - first).norm() / first.norm())
            result["peak_bytes"] = peak_memory(run, device)
        except (RuntimeError, MemoryError) as error:  # out of memory, mostly: that is a result too
            result["error"] = error_text(error)
    for _ in range(repeat):
        for run, result in zip(runs, results, strict=True):
            if "error" not in result:
                processor = time.process_time()
                result["seconds"].append(timed(run, device))
                result["processor_seconds"].append(time.process_time() - processor)
    for result in results:
        if result["seconds"]:
            result["median_seconds"] = statistics.median(result["seconds"])
        print({k: v for k, v in result.items() if k not in ("seconds", "processor_seconds")}, flush=True)
    return results


def step(network: nn.Module, low: Tensor, high: Tensor, precision: str) -> None:
    """Forward and backward of one batch by L1 loss; the gradients stay."""
    network.zero_grad()
    half = PRECISIONS[precision][0] != torch.float32
    with torch.autocast(low.device.type, PRECISIONS[precision][0]) if half else nullcontext():
        picture = network(low)
    (picture.float() - high).abs().mean().backward()


if __name__ == "__main__":
    main()
