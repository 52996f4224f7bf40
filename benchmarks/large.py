"""A large image through `pft` x2 in half precision: peak memory and time of tile sizes, and what tiling changes.

python benchmarks/large.py [--device cuda] [--size 1024] [--preset pft] --json FILE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pft_arch import upscale
from pft_arch.benchmark import SEED, default_backends, error_text, machine, peak_memory, timed
from pft_arch.config import preset
from pft_arch.images import read_image
from pft_arch.network import PFTSR, from_config

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--preset", default="pft")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()

    device, size = arguments.device, arguments.size
    torch.manual_seed(SEED)
    model = from_config(preset(arguments.preset, 2)).eval()
    model = model.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    pixels = read_image(HERE.parent / "docs" / "photo.jpg").pixels
    image = pixels.repeat(-(-size // len(pixels)), -(-size // pixels.shape[1]), 1)[None, :size, :size]

    facts = {"machine": machine(device), "preset": arguments.preset, "scale": 2, "size": size}
    runs: list[dict[str, Any]] = []
    for backend in default_backends(device):
        whole = None
        for tile in (size, size // 2, size // 4):
            run: dict[str, Any] = {"backend": backend, "tile": tile}
            runs.append(run)
            try:
                model.set_attention_backend(backend)
                picture = measure(model, image, tile, device, run)
                whole = picture if whole is None else whole
                run["worst_difference_in_levels"] = round(255 * float((picture - whole).abs().max()), 3)
            except Exception as error:  # out of memory, mostly: that is a result too
                run["error"] = error_text(error)
            print(run, flush=True)
            arguments.json.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n", "utf-8")


def measure(model: PFTSR, image: Tensor, tile: int, device: torch.device, run: dict[str, Any]) -> Tensor:
    pictures: list[Tensor] = []
    working = peak_memory(lambda: pictures.append(upscale(image, model, tile=tile)), device)
    if working is not None:
        run["peak_bytes"] = working + sum(p.nbytes for p in model.parameters())
    run["seconds"] = round(timed(lambda: upscale(image, model, tile=tile), device), 3)
    return pictures[0]


if __name__ == "__main__":
    main()
