"""Tiled against untiled: how far apart the pictures are, everywhere and along the seams. Writes benchmarks/seams.json.

python benchmarks/seams.py [--model light_x2] [--image docs/photo.jpg]
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pft_arch import PFTSR, load_model, upscale
from pft_arch.images import read_image
from pft_arch.upscale import _spans

HERE = Path(__file__).parent
TILES = ((64, 8), (64, 16), (64, 32), (128, 8), (128, 16), (128, 32), (128, 64), (256, 32))  # side and overlap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="light_x2")
    parser.add_argument("--image", type=Path, default=HERE.parent / "docs" / "photo.jpg")
    arguments = parser.parse_args()

    model = load_model(arguments.model)
    image = read_image(arguments.image).pixels[None]
    whole = upscale(image, model, tile=max(image.shape))
    rows = []
    for tile, overlap in TILES:
        rows.append(measure(image, whole, model, tile, overlap))
        print(rows[-1])
    result = {
        "model": arguments.model,
        "image": arguments.image.name,
        "size": list(image.shape[1:3]),
        "unit": "levels of 8 bits (1/255)",
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "tiles": rows,
    }
    (HERE / "seams.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def measure(image: Tensor, whole: Tensor, model: PFTSR, tile: int, overlap: int) -> dict[str, Any]:
    """Differences in 8-bit levels: over the picture, and over two rows and columns amid each overlap."""
    c = model.config
    difference = 255 * (upscale(image, model, tile=tile, overlap=overlap) - whole).abs()[0]
    on_seam = torch.zeros(difference.shape[:2], dtype=torch.bool)
    for axis, length in enumerate(image.shape[1:3]):
        for start, _ in _spans(length, tile, overlap, c.window_size, c.scale)[1:]:
            middle = (start + overlap // 2) * c.scale
            on_seam.narrow(axis, middle - 1, 2)[:] = True
    return {
        "tile": tile,
        "overlap": overlap,
        "worst": round(float(difference.max()), 3),
        "mean": round(float(difference.mean()), 5),
        "mean_on_seams": round(float(difference[on_seam].mean()), 5),
    }


if __name__ == "__main__":
    main()
