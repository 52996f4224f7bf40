"""What holds for every image, tile and scale, sought for by hypothesis.

PFT_PROPERTIES=1000 tries so many examples of each instead of the few that a test run has time for.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pft_arch import PFTSR, upscale
from pft_arch.config import SCALES
from pft_arch.upscale import upscale_ensemble

WINDOW = 4
# How far an output pixel can see, in LR pixels: four convolutions of 3 x 3 (first, group, body, head), and in each of
# two layers a window and the depthwise convolution of the feed-forward. (LePE's runs beside the attention.)
REACH = 4 + 2 * (WINDOW - 1 + 1)
# Float32 sums of some hundred terms of order 1: where the mathematics is equal, so much may be left of rounding.
ROUNDING = 2e-5

EXAMPLES = int(os.environ.get("PFT_PROPERTIES", 0))
properties = settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
seeds = st.integers(0, 2**31 - 1)


@cache
def network(scale: int = 2, *, mirrored: bool = False) -> PFTSR:
    """Random and tiny, with one layer of either shift; `mirrored`: its own mirror image from left to right."""
    torch.manual_seed(scale)
    model = PFTSR(
        scale=scale,
        embed_dim=8,
        num_blocks=(2,),
        num_heads=2,
        window_size=WINDOW,
        upsampler="pixelshuffledirect",
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # biases and tables start at nought
        head = model.get_submodule("upsample.0")
        head.weight *= 0.1  # type: ignore[operator, union-attr]  # clear of the clamp
        if mirrored:
            _mirror(model, head.weight)  # type: ignore[arg-type, union-attr]
    return model


def _mirror(model: PFTSR, head: Tensor) -> None:
    """Average every weight with that of the mirrored network."""
    for name, weight in model.named_parameters():
        if weight is head:  # (3 * scale * scale, ...): the columns inside a pixel change places as well
            s = model.config.scale
            inner = weight.view(3, s, s, *weight.shape[1:])
            weight.copy_((inner + inner.flip(2, -1)).view_as(weight) / 2)
        elif name == "upsample.0.bias":
            s = model.config.scale
            weight.copy_((weight.view(3, s, s) + weight.view(3, s, s).flip(2)).flatten() / 2)
        elif weight.dim() == 4:
            weight.copy_((weight + weight.flip(-1)) / 2)
        elif name.endswith("relative_position_bias_table"):
            table = weight.view(2 * WINDOW - 1, 2 * WINDOW - 1, -1)
            weight.copy_(((table + table.flip(1)) / 2).view_as(weight))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def whole(image: Tensor, model: PFTSR) -> Tensor:
    """(H, W, 3) in one pass."""
    return upscale(image[None], model, tile=max(image.shape))[0]


@properties
@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 45), st.integers(1, 45), st.sampled_from([1, 3, 4])),
    scale=st.sampled_from(SCALES),
    tile=st.integers(0, 60),
    overlap=st.integers(0, 30),
    spoilt=st.sampled_from([None, float("nan"), float("inf"), -float("inf"), 1e30, -7.0]),
)
def test_any_image_becomes_a_picture_of_the_promised_size(
    seed: int, shape: tuple[int, int, int, int], scale: int, tile: int, overlap: int, spoilt: float | None
) -> None:
    image = noise(seed, *shape)
    if spoilt is not None:
        image.flatten()[seed % image.numel()] = spoilt
    before = image.clone()
    out = upscale(image, network(scale), tile=tile, overlap=overlap)
    batch, height, width, channels = shape
    assert out.shape == (batch, height * scale, width * scale, channels)
    assert out.dtype == torch.float32
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    assert torch.equal(image.nan_to_num(), before.nan_to_num())  # the caller's image is as it was


@properties
@given(seed=seeds, height=st.integers(40, 110), width=st.integers(40, 110), more=st.integers(0, 12))
def test_tiles_that_share_what_a_pixel_sees_leave_the_picture_as_it_is(
    seed: int, height: int, width: int, more: int
) -> None:
    image, overlap = noise(seed, height, width, 3), 4 * REACH  # a quarter of it is dropped: REACH is left
    tiled = upscale(image[None], network(), tile=overlap + WINDOW + more, overlap=overlap)[0]
    assert (tiled - whole(image, network())).abs().max() < ROUNDING


@properties
@given(
    seed=seeds,
    height=st.integers(40, 70),
    width=st.integers(40, 70),
    rows=st.integers(0, 3),
    columns=st.integers(0, 3),
    scale=st.sampled_from(SCALES),
)
def test_moving_the_image_by_windows_moves_the_picture(
    seed: int, height: int, width: int, rows: int, columns: int, scale: int
) -> None:
    image, model = noise(seed, height, width, 3), network(scale)
    down, right = rows * WINDOW, columns * WINDOW
    there = whole(image, model)[down * scale :, right * scale :]
    here = whole(image[down:, right:], model)
    inner = (slice(REACH * scale if down else 0, None), slice(REACH * scale if right else 0, None))
    assert (there[inner] - here[inner]).abs().max() < ROUNDING


@properties
@given(seed=seeds, height=st.integers(1, 40), windows=st.integers(1, 10), scale=st.sampled_from(SCALES))
def test_a_network_that_is_its_own_mirror_image_mirrors(seed: int, height: int, windows: int, scale: int) -> None:
    """True of whole windows only: the image is padded at one side."""
    image, model = noise(seed, height, windows * WINDOW, 3), network(scale, mirrored=True)
    assert (whole(image.flip(1), model) - whole(image, model).flip(1)).abs().max() < ROUNDING


@properties
@given(
    seed=seeds,
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    channels=st.sampled_from([1, 3, 4]),
    turns=st.integers(0, 3),
    mirror=st.booleans(),
)
def test_the_ensemble_turns_and_mirrors_with_the_image(
    seed: int, height: int, width: int, channels: int, turns: int, mirror: bool
) -> None:
    """Of any network and any size, because all eight positions are in the mean."""
    image = noise(seed, 1, height, width, channels)

    def moved(x: Tensor) -> Tensor:
        return torch.rot90(x.flip(2) if mirror else x, turns, (1, 2))

    moved_first = upscale_ensemble(moved(image), network())
    assert (moved_first - moved(upscale_ensemble(image, network()))).abs().max() < ROUNDING
