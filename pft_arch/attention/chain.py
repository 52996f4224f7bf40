"""What backends in the log domain share: the sum of logits of dense layers as one product, and layouts.

Every softmax divides its row by a constant, and the normalisation after the next product cancels that constant. So the
chain of products of probabilities is a sum of logits:

    L_l = L_(l-2)[kept] + q_l k_l^T / sqrt(d) + B_l        A_l = softmax(L_l)        kept = top-k of L_l

While nothing has been cut, the sum over layers is one product of concatenated queries and keys, so a dense layer is
ordinary attention and its carry holds q and k, not a map. The mask between regions is such a product too, over four
extra channels, one per region: a query holds MASK / 10 in its own region's channel, a key 10 in all but its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .windows import MASK, from_windows, regions, to_windows

USED_UP = "an attention map serves one layer only, unless gradients are recorded: it is large, and its memory reused"
TOKENS_PER_CHANNEL = 8  # below that, the map of a dense chain is smaller and quicker than its queries and keys


@dataclass(frozen=True)
class DenseCarry:
    """Nothing cut yet: logits are q k^T + bias(table).

    q, k: (B * windows, heads, n, channels of all layers so far), q scaled; table: sum of the layers' tables.
    """

    q: Tensor
    k: Tensor
    table: Tensor


def split(qkv: Tensor, heads: int, window: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, W, 3C) -> q, scaled, and k, v, each (B * windows, heads, n, d)."""
    q, k, v = rearrange(to_windows(qkv, window, shift), "b n (three h d) -> three b h n d", three=3, h=heads)
    return q * q.shape[-1] ** -0.5, k, v


def join(out: Tensor, window: int, shift: int, height: int, width: int) -> Tensor:
    """(B * windows, heads, n, d) -> (B, H, W, C)."""
    return from_windows(rearrange(out, "b h n d -> b n (h d)"), window, shift, height, width)


def concatenate(
    q: Tensor, k: Tensor, table: Tensor, carry: DenseCarry | None, height: int, width: int, window: int, shift: int
) -> DenseCarry:
    """Queries, keys and table of this layer together with those of the dense layers before, and the regions' mask."""
    windows, heads = q.shape[:2]
    parts_q, parts_k = [q], [k]
    if shift:
        region = regions(height, width, window, shift, q.device)
        own = F.one_hot(region, 4).to(q.dtype).repeat(windows // len(region), 1, 1)[:, None].expand(-1, heads, -1, -1)
        parts_q.append(own * (MASK / 10))
        parts_k.append((1 - own) * 10)
    if carry is not None:
        parts_q.append(carry.q)
        parts_k.append(carry.k)
        table = table + carry.table
    return DenseCarry(torch.cat(parts_q, -1), torch.cat(parts_k, -1), table)


def dense_pays(width: int, tokens: int, keep: int) -> bool:
    """Whether a layer of a chain that is dense so far is dense too: it cuts nothing, and queries and keys of all layers
    so far, `width` channels of a head, are smaller and quicker than the map that they make."""
    return keep == tokens and width <= tokens // TOKENS_PER_CHANNEL
