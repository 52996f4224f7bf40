"""Where the network looks: facts about the attention of one pixel, and the pictures of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pft_arch import PFTSR
from pft_arch.attention_map import CONTEXT, attention_at, draw_batch, draw_sheet

TOP_K = (64, 64, 24, 24, 9, 9)
PIXEL = 70, 93
WINDOW = 8


@pytest.fixture(scope="module")
def model() -> PFTSR:
    torch.manual_seed(0)
    return PFTSR(
        embed_dim=12, num_blocks=(2, 4), num_heads=2, window_size=WINDOW, top_k=TOP_K, upsampler="pixelshuffledirect"
    ).eval()


def test_attention_focuses_layer_by_layer(model: PFTSR, photo: Tensor) -> None:
    layers = attention_at(photo[0], model, *PIXEL)
    assert [layer.kept for layer in layers] == list(TOP_K)
    assert [layer.shifted for layer in layers] == [False, True] * 3
    for layer in layers:
        assert layer.weights.shape == (2, WINDOW, WINDOW)
        assert ((layer.weights > 0).sum((1, 2)) == layer.kept).all()
        sums = layer.weights.sum((1, 2))
        if layer.kept == WINDOW**2:
            assert torch.allclose(sums, torch.ones(2), atol=1e-5)
        else:  # what was cut away is missing
            assert (sums < 1).all() and (sums > layer.kept / WINDOW**2).all()
    for before, after in zip(layers, layers[2:], strict=False):  # of one chain: places are only given up
        assert not ((after.weights > 0) & (before.weights == 0)).any()


def test_each_layer_looks_at_its_own_window(model: PFTSR, photo: Tensor) -> None:
    unshifted, shifted = attention_at(photo[0], model, *PIXEL)[:2]
    assert (unshifted.top, unshifted.left) == (64, 88)
    assert (shifted.top, shifted.left) == (68, 92)


def test_only_the_window_matters_to_the_first_layer(model: PFTSR, photo: Tensor) -> None:
    """What lies outside reaches it by the first convolution alone, so from one pixel away."""
    layer = attention_at(photo[0], model, *PIXEL)[0]
    changed = torch.rand_like(photo[0])
    changed[63:73, 87:97] = photo[0, 63:73, 87:97]
    assert torch.allclose(attention_at(changed, model, *PIXEL)[0].weights, layer.weights, atol=1e-6)
    changed[66, 90] = 1 - changed[66, 90]
    assert not torch.allclose(attention_at(changed, model, *PIXEL)[0].weights, layer.weights, atol=1e-6)


def test_the_surroundings_stand_for_the_whole_image(model: PFTSR, photo: Tensor) -> None:
    """The same pixel in a crop on the window grid; the image is larger than what is looked at."""
    assert max(photo.shape[1:3]) > CONTEXT
    whole = attention_at(photo[0], model, *PIXEL)
    crop = attention_at(photo[0, 32:112, 48:144], model, PIXEL[0] - 32, PIXEL[1] - 48)
    for a, b in zip(whole, crop, strict=True):
        assert (a.top, a.left) == (b.top + 32, b.left + 48)
        assert torch.allclose(a.weights, b.weights, atol=1e-4)


@pytest.mark.parametrize("pixel", [(0, 0), (143, 191), (1, 100), (140, 3)])
def test_nothing_beyond_the_border_is_looked_at(model: PFTSR, photo: Tensor, pixel: tuple[int, int]) -> None:
    for layer in attention_at(photo[0], model, *pixel):
        rows = layer.top + torch.arange(WINDOW)[:, None]
        columns = layer.left + torch.arange(WINDOW)
        outside = (rows < 0) | (rows >= 144) | (columns < 0) | (columns >= 192)
        assert layer.weights[:, outside].sum() < 1e-6
        assert layer.top <= pixel[0] < layer.top + WINDOW and layer.left <= pixel[1] < layer.left + WINDOW


def test_the_model_is_left_as_it_is(model: PFTSR, photo: Tensor) -> None:
    half = PFTSR(embed_dim=8, num_blocks=(2,), num_heads=2, window_size=4).eval().half()
    image = photo[:, :16, :16].permute(0, 3, 1, 2).contiguous()
    before = half(image)
    layers = attention_at(photo[0], half, 5, 5)
    assert layers[0].weights.dtype == torch.float32 and layers[0].weights.isfinite().all()
    assert next(half.parameters()).dtype == torch.float16
    assert torch.equal(half(image), before)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("size", [(3, 5), (40, 20)])
def test_pictures_are_made_of_any_image(model: PFTSR, channels: int, size: tuple[int, int]) -> None:
    image = torch.rand(*size, channels)
    layers = attention_at(image, model, size[0] - 1, 0)
    sheet = draw_sheet(image, layers, size[0] - 1, 0)
    assert sheet.shape[0] == 1 and sheet.shape[-1] == 3
    assert sheet.min() >= 0 and sheet.max() <= 1
    batch = draw_batch(image, layers, size[0] - 1, 0, head=2)
    assert batch.shape[0] == len(TOP_K)
    assert not torch.equal(batch, draw_batch(image, layers, size[0] - 1, 0, head=1))


def test_the_picture_is_bright_where_the_attention_is(model: PFTSR) -> None:
    image = torch.full((64, 64, 3), 0.5)
    pictures = draw_batch(image, attention_at(image, model, 20, 20), 20, 20)
    dark = pictures[0, 0, 0]
    first, last = (float(((picture - dark).abs().amax(-1) > 0.1).float().mean()) for picture in pictures[[0, -2]])
    assert 0 < last < first  # of one chain


def test_what_is_not_there_is_named(model: PFTSR, photo: Tensor) -> None:
    with pytest.raises(ValueError, match="no pixel in row 144, column 0"):
        attention_at(photo[0], model, 144, 0)
    with pytest.raises(ValueError, match="2 channels"):
        attention_at(photo[0, ..., :2], model, 0, 0)
    with pytest.raises(ValueError, match="head must be from 1 to 2"):
        draw_batch(photo[0], attention_at(photo[0], model, 9, 9), 9, 9, head=3)
