"""MATLAB's bicubic: facts that can be checked by hand, the formula written out, and MATLAB's own files."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pft_arch.data import Picture, read_rgb
from pft_arch.metrics import luma, psnr_y, to_8_bit
from pft_arch.resize import crop_to_multiple, imresize, shrink

SIZES = [(12, 18), (8, 12), (6, 9), (24, 36), (48, 72), (17, 25), (1, 1)]


def keys(x: float) -> float:
    """Keys 1981, equation 4, a = -0.5."""
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    if x <= 2:
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return 0


def formula(line: list[int], size: int) -> list[int]:
    """The formula as it is written, pixel by pixel: every source pixel within reach, mirrored beyond the ends."""
    factor = size / len(line)
    stretch = min(1.0, factor)
    result = []
    for target in range(size):
        centre = (target + 0.5) / factor - 0.5
        value = weights = 0.0
        for place in range(math.floor(centre - 2 / stretch) - 1, math.ceil(centre + 2 / stretch) + 2):
            mirrored = place
            while not 0 <= mirrored < len(line):
                mirrored = -1 - mirrored if mirrored < 0 else 2 * len(line) - 1 - mirrored
            weight = keys((centre - place) * stretch)
            value += weight * line[mirrored]
            weights += weight
        result.append(min(255, max(0, math.floor(value / weights + 0.5))))
    return result


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_one_colour_stays_that_colour(size: tuple[int, int], value: int) -> None:
    assert (imresize(np.full((12, 18, 3), value, np.uint8), *size) == value).all()


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_ramp_stays_a_ramp_inside(scale: int) -> None:
    ramp = np.tile(np.arange(48, dtype=np.uint8)[:, None, None] * 5, (1, 48, 1))
    # the middle of target pixel i lies at (i + 0.5) * scale - 0.5 of the source
    expected = np.floor(5 * ((np.arange(48 // scale) + 0.5) * scale - 0.5) + 0.5)
    small = shrink(ramp, scale)
    assert (small[2:-2] == expected[2:-2, None, None]).all()
    assert (shrink(ramp.transpose(1, 0, 2), scale) == small.transpose(1, 0, 2)).all()

    large = imresize(ramp, 48 * scale, 48)
    expected = np.floor(5 * ((np.arange(48 * scale) + 0.5) / scale - 0.5) + 0.5)
    assert (large[2 * scale : -2 * scale] == expected[2 * scale : -2 * scale, None, None]).all()


def test_tiny_cases_by_hand() -> None:
    """The kernel is 111, 29, -9, -3 of 128 at distances of 1/4, 3/4, 5/4 and 7/4."""

    def resized(line: list[int], size: int) -> list[int]:
        return imresize(np.array(line, np.uint8)[None, :, None], 1, size)[0, :, 0].tolist()

    # Doubled, a step overshoots by 9 and 3 of 128 on either side, below 0 cut off.
    assert resized([0, 0, 0, 0, 128, 128, 128, 128], 16) == [0] * 7 + [26, 102, 137, 131] + [128] * 5
    # Halved, the kernel is twice as wide, and a pixel of 255 brings 29 and 111 of 256 to its nearest two.
    assert resized([0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0], 6) == [0, 29, 111, 0, 0, 0]
    # At the end it counts together with its mirror image: 111 and 29, on 100 less -9 and -3 of 256 of 155.
    assert resized([255, 100, 100, 100, 100, 100, 100, 100], 4) == [185, 93, 100, 100]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 12, 18, 24, 36, 48])
def test_the_formula_written_out(size: int) -> None:
    random = np.random.default_rng(size)
    for _ in range(5):
        line = random.integers(0, 256, 12, dtype=np.uint8)
        expected = formula(line.tolist(), size)
        assert imresize(line[None, :, None], 1, size)[0, :, 0].tolist() == expected
        assert imresize(line[:, None, None], size, 1)[:, 0, 0].tolist() == expected


def test_height_then_width_each_rounded() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    rows = np.stack([[formula(image[:, x, c].tolist(), 6) for x in range(16)] for c in range(3)]).transpose(2, 1, 0)
    both = np.stack([[formula(rows[y, :, c].tolist(), 8) for y in range(6)] for c in range(3)]).transpose(1, 2, 0)
    assert (shrink(image, 2) == both).all()


def test_an_image_of_the_same_size_is_the_same() -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    assert (imresize(image, 7, 9) == image).all()


def test_cropping_keeps_the_top_left() -> None:
    image = np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    assert (crop_to_multiple(image, 4) == image[:8, :12]).all()
    assert (crop_to_multiple(image, 1) == image).all()
    assert crop_to_multiple(image, 12).shape == (0, 12, 3)


# ---------------------------------------------------------------------------------- published files


def set5(scale: int) -> list[tuple[str, Picture, Picture]]:
    """Name, LR as MATLAB made it, HR."""
    folder = Path(os.environ.get("PFT_BENCHMARKS", "nowhere")) / "Set5"
    if not folder.is_dir():
        pytest.skip("PFT_BENCHMARKS names no folder with Set5/HR/*.webp and Set5/LRbicx*/*.png")
    files = sorted(folder.glob("HR/*.webp"))
    assert len(files) == 5
    return [
        (path.stem, read_rgb(folder / f"LRbicx{scale}" / f"{path.stem}.png"), crop_to_multiple(read_rgb(path), scale))
        for path in files
    ]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_matlab_files_bit_for_bit(scale: int) -> None:
    wrong = [name for name, low, high in set5(scale) if not np.array_equal(shrink(high, scale), low)]
    assert not wrong


@pytest.mark.parametrize(("scale", "python", "matlab"), [(2, 33.67, 33.64), (3, 30.40, 30.39), (4, 28.43, 28.42)])
def test_bicubic_has_the_known_psnr(scale: int, python: float, matlab: float) -> None:
    """With luma as BasicSR has it; and rounded to 8 bits, as MATLAB has it."""
    ours, rounded = [], []
    for _, low, high in set5(scale):
        bicubic, truth = (torch.tensor(image).float() / 255 for image in (imresize(low, *high.shape[:2]), high))
        ours.append(psnr_y(bicubic, truth, scale))
        rounded.append(_psnr_of_rounded_luma(bicubic, truth, scale))
    assert np.mean(ours) == pytest.approx(python, abs=0.005)
    assert np.mean(rounded) == pytest.approx(matlab, abs=0.005)


def _psnr_of_rounded_luma(a: Tensor, b: Tensor, border: int) -> float:
    difference = luma(to_8_bit(a)).round() - luma(to_8_bit(b)).round()
    return 10 * math.log10(255**2 / float((difference[border:-border, border:-border] ** 2).mean()))
