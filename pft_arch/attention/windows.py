"""Windows: cutting an image into them, putting it together again, and what depends on the place within one."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

MASK = -100.0  # logit between tokens that the cyclic shift brought together from opposite borders (published code)


def to_windows(image: Tensor, window: int, shift: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, w * w, C), the image first rolled up and left by `shift`."""
    if shift:
        image = image.roll((-shift, -shift), (1, 2))
    return rearrange(image, "b (y p) (x q) c -> (b y x) (p q) c", p=window, q=window)


def from_windows(windows: Tensor, window: int, shift: int, height: int, width: int) -> Tensor:
    """(B * windows, w * w, C) -> (B, H, W, C): the inverse of `to_windows`."""
    image = rearrange(
        windows, "(b y x) (p q) c -> b (y p) (x q) c", y=height // window, x=width // window, p=window, q=window
    )
    return image.roll((shift, shift), (1, 2)) if shift else image


def regions(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(windows, w * w) numbers 0 to 3: tokens of one window with different numbers do not attend to each other.

    After the roll, the last `shift` rows and columns come from the opposite border.
    """
    wrapped_y = torch.arange(height, device=device) >= height - shift
    wrapped_x = torch.arange(width, device=device) >= width - shift
    image = 2 * wrapped_y[:, None].long() + wrapped_x.long()
    return to_windows(image[None, :, :, None], window, 0)[..., 0]


def relative_position_index(window: int) -> Tensor:
    """(n, n) row of the bias table for query i and key j, n = w * w: the published buffer of the state dict."""
    y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
    span = 2 * window - 1
    return (y[:, None] - y + window - 1) * span + x[:, None] - x + window - 1


def relative_position_bias(table: Tensor, window: int) -> Tensor:
    """((2w-1)^2, heads or 1) table -> (heads or 1, n, n), as `table[relative_position_index]` but without an index.

    The offset of key from query selects the row, so every query's bias is a w x w view of the table, mirrored.
    """
    square = table.view(2 * window - 1, 2 * window - 1, -1)
    views = square.unfold(0, window, 1).unfold(1, window, 1)  # (w, w, heads, w, w)
    return rearrange(rearrange(views, "p q h r s -> h p q r s").flip(-2, -1), "h p q r s -> h (p q) (r s)")
