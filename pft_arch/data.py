"""Training data: folders of images to pairs of LR and HR patches, the n-th pair a function of seed and n alone."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
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
    """Image files directly in the folder, by name. Hidden files are no pictures (macOS writes "._name.png")."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    return sorted(found, key=lambda path: path.name)  # Windows compares paths without case, and so in another order


def read_rgb(path: Path) -> Picture:
    """(H, W, 3) 8-bit; grey is repeated, 16-bit grey rounded, transparency left out.

    Raises:
        ValueError: the file cannot be read; the text names it.
    """
    try:
        with Image.open(path) as image:
            if not image.mode.startswith("I"):
                return np.asarray(image.convert("RGB"))
            grey = np.asarray(image) / 257  # 16 bits, which Pillow's conversion would cut off at 255
            return np.repeat(grey.round().clip(0, 255).astype(np.uint8)[..., None], 3, 2)
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ValueError(f"{path}: cannot be read ({error})") from error


def files_by_name(folder: Path | None) -> dict[str, Path] | None:
    """The LR files for `read_pair`: images of a folder under their names without suffix; None without a folder."""
    return {path.stem: path for path in find_images(folder)} if folder else None


def read_pair(path: Path, lr: Mapping[str, Path] | None, scale: int) -> tuple[Picture, Picture]:
    """LR and HR of an HR file, which is cropped to a multiple of the scale.

    Args:
        lr: LR files by name (`files_by_name`), which may end in the scale ("babyx2" is the LR of "baby"); None makes
            LR with MATLAB's bicubic.

    Raises:
        ValueError: a file cannot be read, the LR file is missing, or the sizes do not fit; the text names the file.
    """
    high = crop_to_multiple(read_rgb(path), scale)
    if 0 in high.shape:
        raise ValueError(f"{path}: smaller than {scale} x {scale} pixels")
    if lr is None:
        return shrink(high, scale), high
    partner = lr.get(path.stem) or lr.get(f"{path.stem}x{scale}")
    if partner is None:
        raise ValueError(f"{path}: there is no LR image of that name")
    low = read_rgb(partner)
    if (low.shape[0] * scale, low.shape[1] * scale) != high.shape[:2]:
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (low, high)]
        raise ValueError(f"{partner}: {sizes[0]} pixels, and the HR image is {sizes[1]}, not {scale} times that")
    return low, high


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """Random patches of LR and HR: item n is the same on every run and every machine, so a resumed run goes on exactly.

    All images are decoded once and kept as 8-bit in memory; an image that cannot be read, does not fit its LR, or is
    smaller than a patch is reported and left out.

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
        lows = files_by_name(lr)

        def load(path: Path) -> tuple[Picture, Picture] | None:
            try:
                low, high = read_pair(path, lows, scale)
            except ValueError as error:
                log.warning("%s; left out", error)
                return None
            if min(low.shape[:2]) < patch:
                log.warning("%s: LR of %dx%d is smaller than a patch; left out", path, low.shape[1], low.shape[0])
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
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")  # ends a plain loop over the items
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
