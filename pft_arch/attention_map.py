"""Where the network looks from one pixel: the attention of every layer, and pictures of it.

The chain of attention is multiplied from layer to layer and cut to its largest entries, so it narrows down to what the
pixel has use for (paper, arXiv 2503.20337, figure 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .attention.reference import AttentionMap
from .network import PFTSR, PFTBlock
from .upscale import in_dtype

CONTEXT = 96  # side in LR pixels, and at least three windows, of what the network sees; maps take much memory
PANEL, LINE, GAP = 240, 20, 8  # pixels of a picture's longer side, of the line of text below it, between pictures
COLOURS = ((60, 10, 110), (190, 40, 80), (250, 140, 20), (255, 255, 180))  # from the least attention to the most
MARK = (0, 255, 255)  # around the pixel


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one pixel in one layer.

    weights: (heads, w, w) on every pixel of the window, 0 for what was cut. Each head's add up to 1 before the layer's
        own cut; what remains is not rescaled.
    top, left: the window's first row and column in the image. The window of a shifted layer at the image's border
        reaches beyond it: there lies the opposite border, masked, and padding.
    kept: entries per head that the layer leaves to the next one of its chain.
    """

    weights: Tensor
    top: int
    left: int
    shifted: bool
    kept: int


@torch.inference_mode()
def attention_at(
    image: Tensor, model: PFTSR, row: int, column: int, progress: Callable[[int, int], None] | None = None
) -> list[LayerAttention]:
    """Attention of a pixel of an image, layer by layer, in float32 and on the model's device.

    Only the pixel's surroundings pass the network (`CONTEXT`), on the same grid of windows.

    Args:
        image: (H, W, C) floating point in [0, 1]; C as the model takes, or 1, or more, of which the rest is left out.
        model: a PFTSR; it is left as it is.
        row, column: the pixel, counted from 0.
        progress: called as progress(done, total) in layers; what it raises stops the work and passes through.

    Raises:
        ValueError: the pixel is not in the image, or the image has no channel count that the model takes.
    """
    height, width, channels = image.shape
    c = model.config
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"there is no pixel in row {row}, column {column}; the image is {height} high, {width} wide")
    if channels < c.in_channels and channels != 1:
        raise ValueError(f"the image has {channels} channels; this model takes {c.in_channels}")

    rows, columns = _context(row, height, c.window_size), _context(column, width, c.window_size)
    crop = image[rows, columns, : c.in_channels].float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
    crop = crop.permute(2, 0, 1).expand(c.in_channels, -1, -1)[None].to(next(model.parameters()).device)
    reference = in_dtype(model, torch.float32)
    reference.set_attention_backend("reference")

    layers: list[LayerAttention] = []
    place = row - rows.start, column - columns.start
    padded = [-(-side // c.window_size) * c.window_size for side in crop.shape[2:]]

    def look(block: Any, _: Any, output: Any) -> None:
        _, (unshifted, shifted) = output
        shift, window = block.shift_size, block.window_size
        # rolled up and left by the shift, the windows are a plain grid
        (y, in_y), (x, in_x) = (divmod((at - shift) % side, window) for at, side in zip(place, padded, strict=True))
        index = y * (padded[1] // window) + x, in_y * window + in_x
        layers.append(
            LayerAttention(
                _dense(shifted if shift else unshifted, *index, window),
                top=row - in_y,
                left=column - in_x,
                shifted=shift > 0,
                kept=block.top_k,
            )
        )
        if progress:
            progress(len(layers), sum(c.num_blocks))

    for block in reference.modules():
        if isinstance(block, PFTBlock):
            block.register_forward_hook(look)
    reference(crop)
    return layers


def bytes_needed(model: PFTSR) -> int:
    """Peak memory of `attention_at` on the device: a few maps of all windows at once, in float32."""
    c = model.config
    tokens = c.window_size**2
    return 6 * 4 * c.num_heads * tokens * _context_side(c.window_size) ** 2


def draw_batch(image: Tensor, layers: list[LayerAttention], row: int, column: int, head: int = 0) -> Tensor:
    """One picture for each layer: what lies around the pixel, darker, under the attention, the brighter the more.

    The window is framed in white, the pixel in light blue. Each picture has its own scale of brightness.

    Args:
        image, row, column: as `attention_at`, which gave the layers.
        head: from 1; 0 is the mean over heads.

    Returns:
        (layers, height, width, 3) float32 in [0, 1] on the CPU.

    Raises:
        ValueError: there is no such head.
    """
    return torch.stack([_to_tensor(panel) for panel in _panels(image, layers, row, column, head)])


def draw_sheet(image: Tensor, layers: list[LayerAttention], row: int, column: int, head: int = 0) -> Tensor:
    """All pictures of `draw_batch` on one sheet, (1, height, width, 3), beside one of the whole image with the place.

    Layers lie in an even number of columns, row by row, so that each column shows one of the two chains.
    """
    panels = _panels(image, layers, row, column, head)
    across = 2 * max(1, round(len(panels) ** 0.5 / 2))
    width, height = (side + GAP for side in panels[0].size)
    size = (across + 1) * width + GAP, -(-len(panels) // across) * height + GAP
    sheet = Image.new("RGB", size, "white")
    sheet.paste(_overview(image, layers, row, column), (GAP, GAP))
    for number, panel in enumerate(panels):
        down, right = divmod(number, across)
        sheet.paste(panel, (GAP + (1 + right) * width, GAP + down * height))
    return _to_tensor(sheet)[None]


def _context(at: int, length: int, window: int) -> slice:
    """Whole windows around a place, as far as the image goes."""
    side = _context_side(window)
    last = -(-max(0, length - side) // window) * window
    start = min(max(0, at // window * window - side // (2 * window) * window), last)
    return slice(start, min(start + side, length))


def _context_side(window: int) -> int:
    return max(3, -(-CONTEXT // window)) * window


def _dense(attention: AttentionMap, window: int, token: int, side: int) -> Tensor:
    """(heads, side, side) of one token of one window, on the CPU."""
    weights = attention.values[window, :, token]
    if attention.indices is not None:
        weights = weights.new_zeros(len(weights), side * side).scatter(-1, attention.indices[window, :, token], weights)
    return weights.unflatten(-1, (side, side)).cpu()


def _view(image: Tensor, layers: list[LayerAttention]) -> tuple[slice, slice]:
    """Rows and columns that hold every layer's window, and half a window more, as far as the image goes."""
    window = layers[0].weights.shape[-1]
    spans = []
    for length, starts in zip(image.shape, ([x.top for x in layers], [x.left for x in layers]), strict=False):
        spans.append(slice(max(0, min(starts) - window // 2), min(length, max(starts) + window + window // 2)))
    return spans[0], spans[1]


def _panels(image: Tensor, layers: list[LayerAttention], row: int, column: int, head: int) -> list[Image.Image]:
    heads, window, _ = layers[0].weights.shape
    if not 0 <= head <= heads:
        raise ValueError(f"head must be from 1 to {heads}, or 0 for their mean; got {head}")
    rows, columns = _view(image, layers)
    picture = _to_8_bit(image[rows, columns])
    scale = max(1, PANEL // max(picture.shape[:2]))
    panels = []
    for number, layer in enumerate(layers, 1):
        weights = layer.weights[head - 1] if head else layer.weights.mean(0)
        # the square root lets the eye tell small weights apart; the margin takes what lies beyond the image
        heat = np.zeros([side + 2 * window for side in picture.shape[:2]])
        top, left = layer.top - rows.start + window, layer.left - columns.start + window
        heat[top : top + window, left : left + window] = (weights / weights.max()).sqrt().numpy()
        heat = heat[window:-window, window:-window]
        steps = np.linspace(0, 1, len(COLOURS))
        shade = np.stack([np.interp(heat, steps, channel) for channel in zip(*COLOURS, strict=True)], -1)
        mixed = np.where(heat[..., None] > 0, 0.3 * picture + 0.7 * shade, 0.5 * picture)
        panel = Image.fromarray(mixed.astype(np.uint8)).resize(
            (picture.shape[1] * scale, picture.shape[0] * scale), Image.Resampling.NEAREST
        )
        draw = ImageDraw.Draw(panel)
        _frame(draw, layer.left - columns.start, layer.top - rows.start, window, scale, "white")
        _frame(draw, column - columns.start, row - rows.start, 1, scale, MARK)
        kind = "shifted" if layer.shifted else "unshifted"
        panels.append(_labelled(panel, f"layer {number}, {kind}: {layer.kept} of {window * window}"))
    return panels


def _overview(image: Tensor, layers: list[LayerAttention], row: int, column: int) -> Image.Image:
    """The whole image, and on it the part that the other pictures show; of their size."""
    rows, columns = _view(image, layers)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    scale = max(1, PANEL // max(height, width))
    panel = Image.new("RGB", (width * scale, height * scale), "white")
    picture = Image.fromarray(_to_8_bit(image))
    shrink = min(panel.width / picture.width, panel.height / picture.height)
    panel.paste(picture.resize((max(1, round(picture.width * shrink)), max(1, round(picture.height * shrink)))))
    box = [columns.start * shrink, rows.start * shrink, columns.stop * shrink - 1, rows.stop * shrink - 1]
    ImageDraw.Draw(panel).rectangle(box, outline=MARK, width=2)
    return _labelled(panel, f"column {column}, row {row}")


def _frame(draw: ImageDraw.ImageDraw, left: int, top: int, side: int, scale: int, colour: Any) -> None:
    box = [left * scale, top * scale, (left + side) * scale - 1, (top + side) * scale - 1]
    draw.rectangle(box, outline=colour, width=max(1, scale // 6))


def _labelled(panel: Image.Image, text: str) -> Image.Image:
    """The picture with a line of text below."""
    whole = Image.new("RGB", (panel.width, panel.height + LINE), "white")
    whole.paste(panel)
    ImageDraw.Draw(whole).text((2, panel.height + 3), text, "black", ImageFont.load_default(13))
    return whole


def _to_8_bit(image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(H, W, C) in [0, 1] -> (H, W, 3) of 0 to 255."""
    colours = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(-1, -1, 3)
    return (colours.float().nan_to_num(0.0).clamp(0, 1) * 255).round().byte().cpu().numpy()


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.tensor(np.asarray(picture)).float() / 255
