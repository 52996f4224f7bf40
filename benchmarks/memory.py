"""Peak memory of one pass, measured and as `pft_arch.memory.peak_bytes` predicts it, by preset, precision and size.

python benchmarks/memory.py [--device cuda] [--backend torch numba] [--preset light pft] [--scale 2 4] [--size 128]
                            [--precision fp32 fp16] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pft_arch import PRESETS
from pft_arch.attention import get_backend, serving
from pft_arch.benchmark import PRECISIONS, default_backends, error_text, machine, peak_memory
from pft_arch.config import preset
from pft_arch.memory import peak_bytes
from pft_arch.network import from_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--backend", nargs="+")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["light", "base", "pft_light", "pft"])
    parser.add_argument("--scale", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--size", nargs="+", type=int)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    cpu = given.device.type == "cpu"
    sizes = given.size or ([64, 128] if cpu else [256, 512])
    precisions = given.precision or (["fp32", "bf16", "fp16"] if cpu else ["fp32", "fp16"])
    results = measure(given.device, given.preset, sizes, precisions, given.scale, given.backend)
    off = max((abs(r["predicted"] / r["measured"] - 1) for r in results if r.get("measured")), default=0.0)
    print(f"largest error of the prediction: {off:.1%}")
    if given.json:
        facts = {"machine": machine(given.device), "largest_error": off, "results": results}
        given.json.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def measure(
    device: torch.device,
    presets: Iterable[str],
    sizes: Iterable[int],
    precisions: Iterable[str],
    scales: Iterable[int] = (2,),
    backends: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """A record each: what was run, and bytes beyond weights and image, `measured` and `predicted`.

    The sizes are sides of square images. Where a pass fails (mostly because memory runs out), `error` says how and
    `measured` is absent.
    """
    results: list[dict[str, Any]] = []
    for name in presets:
        for scale in scales:
            network = from_config(preset(name, scale)).eval().requires_grad_(False)
            for precision in precisions:
                model = network.to(device, PRECISIONS[precision][0])
                for backend in backends or default_backends(device):
                    if serving(get_backend(backend), device, PRECISIONS[precision][0]) != backend:
                        continue  # it would be torch's that is measured
                    model.set_attention_backend(backend)
                    for size in sizes:
                        record = {"preset": name, "scale": scale, "precision": precision, "backend": backend}
                        record |= {"size": size, "predicted": round(peak_bytes(model, size, size))}
                        image = torch.rand(1, 3, size, size, device=device)
                        try:
                            with torch.inference_mode():
                                record["measured"] = peak_memory(lambda: model(image), device)  # noqa: B023
                        except (MemoryError, RuntimeError) as error:
                            record["error"] = error_text(error)
                        results.append(record)
                        print(record, flush=True)
    return results


if __name__ == "__main__":
    main()
