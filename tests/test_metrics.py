"""PSNR and SSIM: known values, and agreement with scikit-image, which computes them on its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pft_arch.metrics import compare, luma, psnr_y, ssim_y, to_8_bit

Measure = Callable[[Tensor, Tensor, int], float]


@pytest.fixture(scope="module")
def pair(photo: Tensor) -> tuple[Tensor, Tensor]:
    """A picture with noise in it, and what it should be."""
    noise = torch.randn(photo[0].shape, generator=torch.Generator().manual_seed(0)) * 0.05
    return photo[0] + noise, photo[0]


def full(*rgb: float, height: int = 16, width: int = 20) -> Tensor:
    return torch.tensor(rgb).expand(height, width, 3) / 255


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [((0, 0, 0), 16), ((255, 255, 255), 235), ((255, 0, 0), 81.481), ((0, 255, 0), 144.553), ((0, 0, 255), 40.966)],
)
def test_luma_is_that_of_the_standard(rgb: tuple[int, ...], expected: float) -> None:
    assert float(luma(torch.tensor(rgb))) == pytest.approx(expected, abs=1e-12)


def test_values_are_clamped_and_rounded_to_8_bits() -> None:
    assert to_8_bit(torch.tensor([-1.0, 0.0, 99.6 / 255, 100.4 / 255, 1.0, 2.0])).tolist() == [0, 0, 100, 100, 255, 255]


def test_psnr_of_a_known_difference() -> None:
    # one step of 8 bits in each colour is 219 / 255 steps of luma
    expected = 20 * math.log10(255 / (219 / 255))
    assert psnr_y(full(101, 101, 101), full(100, 100, 100), 0) == pytest.approx(expected, abs=1e-9)
    # less than half a step is none
    assert psnr_y(full(100.4, 100.4, 100.4), full(100, 100, 100), 0) == math.inf


def test_ssim_of_a_known_difference() -> None:
    # without structure the luminance term is left
    a, b = (float(luma(torch.tensor([v, v, v]))) for v in (120, 100))
    c1 = (0.01 * 255) ** 2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim_y(full(120, 120, 120), full(100, 100, 100), 0) == pytest.approx(expected, abs=1e-9)


def test_equal_pictures(pair: tuple[Tensor, Tensor]) -> None:
    assert psnr_y(pair[1], pair[1], 2) == math.inf
    assert ssim_y(pair[1], pair[1], 2) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("border", [0, 2, 3, 4])
def test_agreement_with_scikit_image(pair: tuple[Tensor, Tensor], border: int) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    inside = slice(border, -border or None)
    a, b = (luma(to_8_bit(picture))[inside, inside].numpy() for picture in pair)
    assert psnr_y(*pair, border) == pytest.approx(metrics.peak_signal_noise_ratio(b, a, data_range=255), abs=1e-9)

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "full": True}
    _, similarity = metrics.structural_similarity(a, b, **options)
    # scikit-image mirrors the picture at its edges; windows that lie inside it are 5 pixels from them
    assert ssim_y(*pair, border) == pytest.approx(similarity[5:-5, 5:-5].mean(), abs=1e-9)


@pytest.mark.parametrize("measure", [psnr_y, ssim_y])
def test_the_border_does_not_count(measure: Measure, pair: tuple[Tensor, Tensor]) -> None:
    picture, truth = pair
    spoilt = picture.clone()
    spoilt[:3] = spoilt[-3:] = 0
    spoilt[:, :3] = spoilt[:, -3:] = 0
    assert measure(spoilt, truth, 3) == measure(picture, truth, 3)
    assert measure(spoilt, truth, 2) < measure(picture, truth, 2)
    assert measure(picture[3:-3, 3:-3], truth[3:-3, 3:-3], 0) == measure(picture, truth, 3)


def test_pictures_too_small_are_refused_with_both_numbers() -> None:
    assert ssim_y(full(9, 9, 9, height=15), full(9, 9, 9, height=15), 2) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"20x14 pixels without a border of 2 .* at least 15"):
        ssim_y(full(9, 9, 9, height=14), full(9, 9, 9, height=14), 2)
    with pytest.raises(ValueError, match=r"4x4 pixels without a border of 2 .* at least 5"):
        psnr_y(full(9, 9, 9, height=4, width=4), full(9, 9, 9, height=4, width=4), 2)


@pytest.mark.parametrize("measure", [psnr_y, ssim_y])
@pytest.mark.parametrize("shape", [(16, 21, 3), (20, 16, 3), (16, 20, 1), (1, 16, 20, 3)])
def test_pictures_of_another_shape_are_refused(measure: Measure, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one shape \(H, W, 3\)"):
        measure(torch.zeros(shape), full(0, 0, 0), 0)
    if shape[-1] != 3 or len(shape) != 3:
        with pytest.raises(ValueError, match=r"one shape \(H, W, 3\)"):
            measure(torch.zeros(shape), torch.zeros(shape), 0)


def test_a_batch_is_compared_picture_by_picture(photo: Tensor) -> None:
    noisy = (photo + 0.02 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    report, difference = compare(torch.cat([photo, noisy]), photo, border=2, gain=4.0)
    lines = report.splitlines()
    assert lines[0] == "1: PSNR inf dB, SSIM 1.0000"
    assert lines[1] == f"2: PSNR {psnr_y(noisy[0], photo[0], 2):.2f} dB, SSIM {ssim_y(noisy[0], photo[0], 2):.4f}"
    assert lines[2].startswith("mean: ")
    assert difference[0].max() == 0
    assert torch.allclose(difference[1], (4 * (noisy - photo).abs()).clamp(0, 1)[0])
    assert compare(noisy, photo)[0].count("\n") == 0


def test_grey_and_transparent_pictures_are_compared_by_their_colours(photo: Tensor) -> None:
    grey, alpha = photo[..., :1], torch.rand_like(photo[..., :1])
    assert compare(grey, grey.expand(-1, -1, -1, 3))[0].startswith("PSNR inf")
    assert compare(torch.cat([photo, alpha], -1), photo)[0].startswith("PSNR inf")


def test_what_cannot_be_compared_says_what_to_do(photo: Tensor) -> None:
    with pytest.raises(ValueError, match="image has 192 x 144 pixels and reference 192 x 100"):
        compare(photo, photo[:, :100])
    with pytest.raises(ValueError, match="2 images and 3 references"):
        compare(photo.expand(2, -1, -1, -1), photo.expand(3, -1, -1, -1))
