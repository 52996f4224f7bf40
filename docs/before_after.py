"""Makes docs/before_after.png: parts of docs/photo.jpg shrunk by the model's factor and enlarged again.

python docs/before_after.py [light_x2]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from pft_arch import load_model, upscale
from pft_arch.resize import crop_to_multiple, imresize, shrink

HERE = Path(__file__).parent
PARTS = ((112, 30, 312, 150), (80, 235, 280, 355))  # left, top, right, bottom in the photograph
ENLARGE = 2  # so that single pixels can be seen


def main() -> None:
    model = load_model(sys.argv[1] if len(sys.argv) > 1 else "light_x2")
    scale = model.config.scale
    with Image.open(HERE / "photo.jpg") as photo:
        high = crop_to_multiple(np.asarray(photo.convert("RGB")), scale)
    low = shrink(high, scale)
    sr = upscale(torch.tensor(low)[None].float() / 255, model)[0]
    columns = {
        f"bicubic x{scale}": imresize(low, *high.shape[:2]),
        f"PFT-SR x{scale}": (sr * 255).round().byte().numpy(),
        "original": high,
    }

    width, height = (ENLARGE * side for side in (PARTS[0][2] - PARTS[0][0], PARTS[0][3] - PARTS[0][1]))
    sheet = Image.new("RGB", (len(columns) * width, len(PARTS) * height + 20), "white")
    draw = ImageDraw.Draw(sheet)
    for x, (name, picture) in enumerate(columns.items()):
        draw.text((x * width + 6, 4), name, fill="black")
        for y, part in enumerate(PARTS):
            crop = Image.fromarray(picture).crop(part).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(crop, (x * width, y * height + 20))
    sheet.save(HERE / "before_after.png", optimize=True)


if __name__ == "__main__":
    main()
