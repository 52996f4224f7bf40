"""The attention chain in plain torch, in the log domain (see `chain`): any device, any dtype, forward and backward.

After a cut, the carry holds logits relative to their row's maximum, and indices. Maps exist for one group of windows
and heads at a time: small enough for a CPU's cache, bounded on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .chain import USED_UP, DenseCarry, concatenate, dense_pays, join, split
from .windows import relative_position_bias

# Scores alive at once. A CPU works on one 1024 x 1024 map (4 MiB) at a time; a GPU needs enough to fill it.
CPU_GROUP = 2**20
GPU_GROUP = 2**26


@dataclass(frozen=True)
class MapCarry:
    """Per group, logits (windows, heads, n, k) minus their row's maximum, and int16 indices or None where k = n."""

    groups: list[tuple[Tensor, Tensor | None]]

    def take(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The groups one by one, each let go by the time of the next: a map and the one before it are large.

        Raises:
            ValueError: they were taken before.
        """
        if not self.groups:
            raise ValueError(USED_UP)
        self.groups.reverse()
        while self.groups:
            yield self.groups.pop()


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
    height, width = qkv.shape[1:3]
    q, k, v = split(qkv, heads, window, shift)
    if carry is None or isinstance(carry, DenseCarry):
        dense = concatenate(q, k, table, carry, height, width, window, shift)
        if dense_pays(dense.q.shape[-1], window * window, keep):
            return join(_dense_layer(dense, v, window, dropout), window, shift, height, width), dense
        q, k, table, carry = dense.q, dense.k, dense.table, None
    out, maps = _map_layer(q, k, v, table, carry, window, keep, dropout)
    return join(out, window, shift, height, width), maps


def _dense_layer(layer: DenseCarry, v: Tensor, window: int, dropout: float) -> Tensor:
    """softmax(q k^T + bias) v, (B * windows, heads, n, d), without a map where torch has a fused kernel."""
    bias = relative_position_bias(layer.table, window).to(v.dtype)
    # the fused kernels want one width; without them every map of the image is alive at once
    padded = F.pad(v, (0, layer.q.shape[-1] - v.shape[-1]))
    out = F.scaled_dot_product_attention(layer.q, layer.k, padded, attn_mask=bias[None], dropout_p=dropout, scale=1.0)
    return out[..., : v.shape[-1]]


def _map_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    carry: MapCarry | None,
    window: int,
    keep: int,
    dropout: float,
) -> tuple[Tensor, MapCarry]:
    """A layer with a map. q, k: (windows, heads, n, any width), v: (windows, heads, n, d) -> out like v, carry."""
    windows, heads, n, _ = v.shape
    bias = relative_position_bias(table, window)
    outs: list[Tensor] = []
    groups: list[tuple[Tensor, Tensor | None]] = []
    old = iter(()) if carry is None else iter(carry.groups) if torch.is_grad_enabled() else carry.take()
    biases = cycle(bias.expand(heads, n, n).split(group_size(q)[1]))
    for some_q, some_k, some_v, some_bias in zip(parts(q), parts(k), parts(v), biases, strict=False):
        logits, indices = next(old, (None, None))
        out, group = _attend_group(some_q, some_k, some_v, some_bias, logits, indices, keep, dropout)
        outs.append(out)
        groups.append(group)
    out = torch.cat([out.flatten(0, 1) for out in outs]).unflatten(0, (windows, heads))
    return out, MapCarry(groups)


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
        chosen = _largest(scores, keep)
        scores = scores.gather(-1, chosen)
        weights = weights.gather(-1, chosen)
        indices = chosen.short() if indices is None else indices.gather(-1, chosen)

    dropped = F.dropout(weights, dropout) if dropout else weights
    if indices is None:
        out = dropped.to(v.dtype) @ v
    else:
        out = _sparse_product(dropped, indices, v.to(precise)).to(v.dtype)
    half = q.dtype in (torch.float16, torch.bfloat16) and not torch.is_grad_enabled()
    return out, (scores.half() if half else scores, indices)


def _largest(scores: Tensor, keep: int) -> Tensor:
    """Indices (..., keep) of the largest entries of each row, in any order."""
    # numpy's selection has one thread only, and is as quick as topk on one (rows of 1,024) to three (rows of 128)
    threads = 1 if scores.shape[-1] > 512 else 3
    if torch.compiler.is_compiling() or scores.device.type != "cpu" or torch.get_num_threads() > threads:
        return scores.topk(keep, sorted=False).indices
    first = scores.shape[-1] - keep
    return torch.from_numpy(np.argpartition(scores.detach().numpy(), first)[..., first:])


def _sparse_product(weights: Tensor, indices: Tensor, v: Tensor) -> Tensor:
    """sum over k of weights[..., i, k] * v[..., indices[..., i, k], :], as an embedding bag over the group's tokens."""
    groups, heads, n, d = v.shape
    first = torch.arange(groups * heads, device=v.device).view(groups, heads, 1, 1) * n
    bags = F.embedding_bag(
        (indices.long() + first).flatten(0, 2), v.reshape(-1, d), per_sample_weights=weights.flatten(0, 2), mode="sum"
    )
    return bags.view(groups, heads, n, d)


def parts(x: Tensor) -> Iterator[Tensor]:
    """Of (windows, heads, n, any), by groups; not slices: the gradient of each would be as large as the whole."""
    some, these = group_size(x)
    return (part for block in x.split(some) for part in block.split(these, 1))


def group_size(x: Tensor) -> tuple[int, int]:
    """Windows and heads of a group of (windows, heads, n, any), whose maps hold no more scores than the limit."""
    heads, n = x.shape[1:3]
    limit = max(1, (CPU_GROUP if x.device.type == "cpu" else GPU_GROUP) // (n * n))
    return max(1, limit // heads), min(heads, limit)
