"""Training data: folders of images to pairs of LR and HR patches, the n-th pair a function of seed and n alone."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .resize import crop_to_multiple, shrink

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
Picture = NDArray[np.uint8]


def find_images(folder: Path) -> list[Path]:
    """Image files directly in the folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def read_rgb(path: Path) -> Picture:
    """(H, W, 3) 8-bit."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """Random patches of LR and HR: item n is the same on every run and every machine, so a resumed run goes on exactly.

    All images are decoded once and kept as 8-bit in memory; an image that cannot be read, or is smaller than a patch,
    is reported and left out.

    Args:
        hr: folder of HR images.
        lr: folder of their LR under the same names, any suffix; None makes them with MATLAB's bicubic.
        scale: factor between them. patch: side of an LR patch in pixels.
        length: number of items. seed: chooses the patches.
        names: only these files of the folder, None for all.

    Raises:
        ValueError: no usable image.
    """

    def __init__(
        self,
        hr: Path,
        lr: Path | None,
        scale: int,
        patch: int,
        length: int,
        seed: int = 0,
        names: Sequence[str] | None = None,
    ) -> None:
        self.scale, self.patch, self.length, self.seed = scale, patch, length, seed
        files = find_images(hr) if names is None else [hr / name for name in names]
        partners = {path.stem: path for path in find_images(lr)} if lr else {}

        def load(path: Path) -> tuple[Picture, Picture] | None:
            try:
                high = crop_to_multiple(read_rgb(path), scale)
                low = read_rgb(partners[path.stem]) if lr else shrink(high, scale)
            except KeyError:
                log.warning("%s: no LR image of that name in %s; left out", path.name, lr)
                return None
            except Exception as error:  # whatever a damaged file makes the decoder raise
                log.warning("%s: cannot be read (%s); left out", path.name, error)
                return None
            if low.shape[0] * scale > high.shape[0] or low.shape[1] * scale > high.shape[1]:
                log.warning("%s: HR %s is not %d times LR %s; left out", path.name, high.shape, scale, low.shape)
                return None
            if min(low.shape[:2]) < patch:
                log.warning("%s: LR of %d x %d is smaller than a patch; left out", path.name, *low.shape[:2])
                return None
            return low, high

        with ThreadPoolExecutor(2) as pool:
            loaded = zip(files, pool.map(load, files), strict=True)
            kept = [(path, pair) for path, pair in loaded if pair]
        if not kept:
            raise ValueError(f"{hr}: no image to train on (suffixes {', '.join(SUFFIXES)}; {len(files)} found)")
        self.pairs = [pair for _, pair in kept]
        digest = hashlib.sha256()
        for path, (_, high) in kept:
            digest.update(f"{path.name} {high.shape}\n".encode())
            digest.update(np.ascontiguousarray(high[::16, ::16]).tobytes())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """LR (3, patch, patch) and HR (3, patch * scale, patch * scale) in [0, 1]; one of 8 flips and rotations."""
        random = np.random.default_rng((self.seed, index))
        low, high = self.pairs[random.integers(len(self.pairs))]
        p, s = self.patch, self.scale
        top, left = (random.integers(side - p + 1) for side in low.shape[:2])
        turns, mirror = int(random.integers(4)), bool(random.integers(2))
        patches = (
            low[top : top + p, left : left + p],
            high[top * s : (top + p) * s, left * s : (left + p) * s],
        )
        turned = (np.rot90(patch[:, ::-1] if mirror else patch, turns) for patch in patches)
        lr, hr = (torch.from_numpy(np.ascontiguousarray(patch.transpose(2, 0, 1))).float() / 255 for patch in turned)
        return lr, hr
