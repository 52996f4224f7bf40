"""PSNR and SSIM as super-resolution papers report them: on luma, border left out, on pictures rounded to 8 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11  # side of the window that SSIM looks through


def to_8_bit(image: Tensor) -> Tensor:
    """Values in [0, 1] as whole numbers 0 to 255, float64, rounded half to even."""
    return (image.double().clamp(0, 1) * 255).round()


def luma(image: Tensor) -> Tensor:
    """(..., 3) RGB of 0 to 255 -> (...) luma of 16 to 235: BT.601 studio range, as MATLAB's rgb2ycbcr.

    Not rounded, as in BasicSR. MATLAB rounds the luma of 8-bit images: bicubic on Set5 x2 is then 33.64 dB, not 33.67.
    """
    return 16 + image.double() @ torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64) / 255


def psnr_y(picture: Tensor, truth: Tensor, border: int) -> float:
    """Peak signal-to-noise ratio in dB of two (H, W, 3) images in [0, 1], `border` pixels left out on every side.

    Infinite for equal pictures. Published code: BasicSR `calculate_psnr` with `test_y_channel`.

    Raises:
        ValueError: the pictures differ in shape, are not RGB, or nothing is left inside the border.
    """
    a, b = _prepare(picture, truth, border, least=1)
    return float(10 * torch.log10(255**2 / ((a - b) ** 2).mean()))


def ssim_y(picture: Tensor, truth: Tensor, border: int) -> float:
    """Structural similarity (Wang et al. 2004) of two (H, W, 3) images in [0, 1]: 11 x 11 Gaussian window, sigma 1.5.

    Only windows that lie inside the picture count, as in BasicSR `calculate_ssim`.

    Raises:
        ValueError: the pictures differ in shape, are not RGB, or have less than a window inside the border.
    """
    a, b = _prepare(picture, truth, border, least=WINDOW)
    place = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    gauss = torch.exp(-(place**2) / (2 * 1.5**2))
    gauss /= gauss.sum()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x[None, None], gauss.view(1, 1, -1, 1)), gauss.view(1, 1, 1, -1))

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def compare(pictures: Tensor, references: Tensor, border: int = 0, gain: float = 1.0) -> tuple[str, Tensor]:
    """PSNR-Y and SSIM-Y of a batch as text, and the absolute difference as pictures.

    Args:
        pictures, references: (B, H, W, C) in [0, 1], C of 1, 3, or 4, of which alpha is left out; one may be a single
            picture for all of the other's.
        border: pixels left out of the measures on every side.
        gain: by which the difference is multiplied, before it is clamped to [0, 1].

    Returns:
        A line for each picture, and their mean if there are several; (B, H, W, 3) float32 on the CPU.

    Raises:
        ValueError: the sizes or counts differ, or too few pixels lie inside the border.
    """
    if pictures.shape[1:3] != references.shape[1:3]:
        sizes = [f"{batch.shape[2]} x {batch.shape[1]}" for batch in (pictures, references)]
        raise ValueError(
            f"image has {sizes[0]} pixels and reference {sizes[1]}; only pictures of one size can be compared. Resize "
            "one of them first"
        )
    if len(pictures) != len(references) and 1 not in (len(pictures), len(references)):
        raise ValueError(f"there are {len(pictures)} images and {len(references)} references; give as many, or one")

    count = max(len(pictures), len(references))
    a, b = (_rgb(batch).expand(count, -1, -1, -1) for batch in (pictures, references))
    scores = [(psnr_y(x, y, border), ssim_y(x, y, border)) for x, y in zip(a, b, strict=True)]
    lines = [f"PSNR {psnr:.2f} dB, SSIM {ssim:.4f}" for psnr, ssim in scores]
    if count > 1:
        psnr, ssim = (sum(values) / count for values in zip(*scores, strict=True))
        lines = [f"{number}: {line}" for number, line in enumerate(lines, 1)]
        lines.append(f"mean: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}")
    return "\n".join(lines), ((a - b).abs() * gain).clamp(0, 1)


def _rgb(batch: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, 3) float32 on the CPU, since others lack float64: grey repeated, alpha left out."""
    colours = batch[..., :3] if batch.shape[-1] >= 3 else batch[..., :1].expand(-1, -1, -1, 3)
    return colours.float().cpu()


def _prepare(picture: Tensor, truth: Tensor, border: int, least: int) -> tuple[Tensor, Tensor]:
    """Luma inside the border, at least `least` pixels high and wide."""
    if picture.shape != truth.shape or picture.dim() != 3 or picture.shape[2] != 3:
        raise ValueError(
            f"expected two pictures of one shape (H, W, 3), got {tuple(picture.shape)} and {tuple(truth.shape)}"
        )
    height, width, _ = truth.shape
    if min(height, width) < least + 2 * border:
        raise ValueError(
            f"{width}x{height} pixels without a border of {border} are too few to compare; "
            f"expected at least {least + 2 * border} on either side"
        )
    inside = slice(border, -border if border else None)
    return luma(to_8_bit(picture))[inside, inside], luma(to_8_bit(truth))[inside, inside]
