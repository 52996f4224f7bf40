"""The published attention steps, transcribed: for reading, and for other backends to be measured against.

After CVL-UESTC/PFT-SR `basicsr/archs/pft_arch.py`, class WindowAttention: a chain of probability maps, each multiplied
by the softmax of the next layer, normalised, and cut to its largest entries. The sparse products are dense here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .windows import MASK, from_windows, regions, relative_position_bias, to_windows

EPS = 1e-20


class AttentionMap(NamedTuple):
    """Carry of the reference backend.

    values: (B * windows, heads, n, k) attention after the cut. Rows add up to 1 before it and are not rescaled.
    indices: (B * windows, heads, n, k) key of each value within the window; None while the map is dense (k = n).
    """

    values: Tensor
    indices: Tensor | None


def attend(
    qkv: Tensor,
    table: Tensor,
    carry: AttentionMap | None,
    *,
    heads: int,
    window: int,
    shift: int,
    keep: int,
    dropout: float = 0.0,
) -> tuple[Tensor, AttentionMap]:
    """See the package's docstring for arguments and result."""
    batch, height, width, _ = qkv.shape
    n = window * window
    windows = to_windows(qkv, window, shift)
    q, k, v = rearrange(windows, "b n (three h d) -> three b h n d", three=3, h=heads)
    indices = carry.indices if carry else None

    scores = (q * q.shape[-1] ** -0.5) @ k.mT + relative_position_bias(table, window)  # (B * windows, heads, n, n)
    if indices is not None:
        scores = scores.gather(-1, indices)
    elif shift:
        region = regions(height, width, window, shift, qkv.device)
        mask = MASK * (region[:, :, None] != region[:, None, :]).to(scores.dtype)
        scores = scores + mask.repeat(batch, 1, 1)[:, None]
    attention = scores.softmax(-1)

    # focus: multiply by the chain's map and normalise again
    if carry is not None:
        attention = attention * carry.values + EPS
        attention = attention / (attention.sum(-1, keepdim=True) + EPS)

    # cut: keep the largest
    if keep < attention.shape[-1]:
        attention, chosen = attention.topk(keep, sorted=False)
        indices = chosen if indices is None else indices.gather(-1, chosen)

    weights = F.dropout(attention, dropout) if dropout else attention
    if indices is not None:
        weights = torch.zeros(*weights.shape[:-1], n, dtype=weights.dtype, device=weights.device).scatter(
            -1, indices, weights
        )
    out = rearrange(weights @ v, "b h n d -> b n (h d)")
    return from_windows(out, window, shift, height, width), AttentionMap(attention, indices)
