"""The attention chain in the log domain, in plain torch: any device, any dtype, forward and backward.

Every softmax divides its row by a constant, and the normalisation after the next product cancels that constant. So the
chain of products of probabilities is a sum of logits:

    L_l = L_(l-2)[kept] + q_l k_l^T / sqrt(d) + B_l        A_l = softmax(L_l)        kept = top-k of L_l

While nothing has been cut, the sum over layers is one product of concatenated queries and keys, so a dense layer is
ordinary attention and its carry holds q and k, not a map. The mask between regions is such a product too, over four
extra channels, one per region: a query holds MASK / 10 in its own region's channel, a key 10 in all but its own. After
a cut, the carry holds logits relative to their row's maximum, and indices.

Maps exist for one group of windows and heads at a time: small enough for a CPU's cache, bounded on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .windows import MASK, from_windows, regions, relative_position_bias, to_windows

# Scores alive at once. A CPU works on one 1024 x 1024 map (4 MiB) at a time; a GPU needs enough to fill it.
CPU_GROUP = 2**20
GPU_GROUP = 2**26


@dataclass(frozen=True)
class DenseCarry:
    """Nothing cut yet: logits are q k^T + bias(table).

    q, k: (B * windows, heads, n, channels of all layers so far), q scaled; table: sum of the layers' tables.
    """

    q: Tensor
    k: Tensor
    table: Tensor


@dataclass(frozen=True)
class MapCarry:
    """Per group, logits (windows, heads, n, k) minus their row's maximum, and int16 indices or None where k = n."""

    groups: list[tuple[Tensor, Tensor | None]]


def attend(
    qkv: Tensor,
    table: Tensor,
    carry: DenseCarry | MapCarry | None,
    *,
    heads: int,
    window: int,
    shift: int,
    keep: int,
    dropout: float = 0.0,
) -> tuple[Tensor, DenseCarry | MapCarry]:
    """See the package's docstring for arguments and result."""
    batch, height, width, _ = qkv.shape
    n = window * window
    q, k, v = rearrange(to_windows(qkv, window, shift), "b n (three h d) -> three b h n d", three=3, h=heads)
    q = q * q.shape[-1] ** -0.5

    # still dense on the way in: the sum of logits is one product of concatenated queries and keys
    if not isinstance(carry, MapCarry):
        parts_q, parts_k = [q], [k]
        if shift:
            region_q, region_k = _region_features(regions(height, width, window, shift, qkv.device), q.dtype)
            parts_q.append(region_q.repeat(batch, 1, 1)[:, None].expand(-1, heads, -1, -1))
            parts_k.append(region_k.repeat(batch, 1, 1)[:, None].expand(-1, heads, -1, -1))
        if carry is not None:
            parts_q.append(carry.q)
            parts_k.append(carry.k)
            table = table + carry.table
        q, k = torch.cat(parts_q, -1), torch.cat(parts_k, -1)
        # wider than this, a map is smaller and quicker than the queries and keys that make it
        if keep == n and q.shape[-1] <= n // 8:
            bias = relative_position_bias(table, window).to(q.dtype)
            # torch's fused kernels want one width; without them every map of the image is alive at once
            padded = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
            out = F.scaled_dot_product_attention(q, k, padded, attn_mask=bias[None], dropout_p=dropout, scale=1.0)
            out = out[..., : v.shape[-1]]
            return _join(out, window, shift, height, width), DenseCarry(q, k, table)
        carry = None

    bias = relative_position_bias(table, window)
    outs: list[Tensor] = []
    groups: list[tuple[Tensor, Tensor | None]] = []
    for g, (some, these) in enumerate(_groups(q.shape[0], heads, n, qkv.device)):
        logits, indices = carry.groups[g] if carry else (None, None)
        shared = bias if bias.shape[0] == 1 else bias[these]
        out, group = _attend_group(
            q[some, these], k[some, these], v[some, these], shared, logits, indices, keep, dropout
        )
        outs.append(out)
        groups.append(group)
    out = torch.cat([out.flatten(0, 1) for out in outs]).unflatten(0, (q.shape[0], heads))
    return _join(out, window, shift, height, width), MapCarry(groups)


def _attend_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    logits: Tensor | None,
    indices: Tensor | None,
    keep: int,
    dropout: float,
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """One group of windows and heads. q, k, v: (windows, heads, n, d) -> out like v, and the group's carry."""
    precise = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(precise) @ k.to(precise).mT).to(precise)  # the second cast is for autocast, which undoes the first
    scores += bias.to(precise)
    if indices is not None:
        scores = scores.gather(-1, indices.long())
    if logits is not None:
        scores += logits
    scores -= scores.detach().amax(-1, keepdim=True)
    weights = scores.softmax(-1)

    if keep < scores.shape[-1]:
        scores, chosen = scores.topk(keep, sorted=False)
        weights = weights.gather(-1, chosen)
        indices = chosen.short() if indices is None else indices.gather(-1, chosen)

    dropped = F.dropout(weights, dropout) if dropout else weights
    if indices is None:
        out = dropped.to(v.dtype) @ v
    else:
        out = _sparse_product(dropped, indices, v.to(precise)).to(v.dtype)
    half = q.dtype in (torch.float16, torch.bfloat16) and not torch.is_grad_enabled()
    return out, (scores.half() if half else scores, indices)


def _sparse_product(weights: Tensor, indices: Tensor, v: Tensor) -> Tensor:
    """sum over k of weights[..., i, k] * v[..., indices[..., i, k], :], as an embedding bag over the group's tokens."""
    groups, heads, n, d = v.shape
    first = torch.arange(groups * heads, device=v.device).view(groups, heads, 1, 1) * n
    bags = F.embedding_bag(
        (indices.long() + first).flatten(0, 2), v.reshape(-1, d), per_sample_weights=weights.flatten(0, 2), mode="sum"
    )
    return bags.view(groups, heads, n, d)


def _region_features(region: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Channels (windows, n, 4) of queries and keys whose product is MASK between regions and exactly 0 within one."""
    own = F.one_hot(region, 4).to(dtype)
    return own * (MASK / 10), (1 - own) * 10


def _groups(windows: int, heads: int, n: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of windows and of heads such that no group's maps hold more scores than the device's limit."""
    limit = max(1, (CPU_GROUP if device.type == "cpu" else GPU_GROUP) // (n * n))
    some, these = max(1, limit // heads), min(heads, limit)
    for first in range(0, windows, some):
        for head in range(0, heads, these):
            yield slice(first, first + some), slice(head, min(heads, head + these))


def _join(out: Tensor, window: int, shift: int, height: int, width: int) -> Tensor:
    """(B * windows, heads, n, d) -> (B, H, W, C)."""
    return from_windows(rearrange(out, "b h n d -> b n (h d)"), window, shift, height, width)
