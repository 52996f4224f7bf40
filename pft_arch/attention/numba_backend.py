"""The attention chain on a CPU as one compiled kernel per layer, in the log domain (see `chain`). Needs numba.

A query's whole row of scores stays in the first-level cache: computing all of it is cheaper than gathering keys for
every k down to 32. The bias needs no n x n table: its row for query i and key j is base[i] - offset[j]. The cut bisects
on the bits of the logits, which for values of one sign order like integers, instead of sorting them.

For inference in float32; everything else (gradients, other dtypes and devices, dropout) is the torch backend's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from numba import njit
from torch import Tensor

from . import torch_backend
from .chain import FlatCarry, attend_by
from .fastmath import exp_negative, float_to_bits

F, I = np.float32, np.int32  # noqa: E741
LANES = 16  # channels of v are padded to a multiple: the inner product loop then runs in whole vectors
CHANNELS = 4  # of queries and keys in one pass over the score row, padded likewise


def attend(
    qkv: Tensor,
    table: Tensor,
    carry: Any,
    *,
    heads: int,
    window: int,
    shift: int,
    keep: int,
    dropout: float = 0.0,
) -> tuple[Tensor, Any]:
    """See the package's docstring for arguments and result."""
    options: dict[str, Any] = {
        "heads": heads,
        "window": window,
        "shift": shift,
        "keep": keep,
        "dropout": dropout,
    }
    fits = qkv.device.type == "cpu" and qkv.dtype == torch.float32 and not dropout
    if not fits or (torch.is_grad_enabled() and (qkv.requires_grad or table.requires_grad)):
        return torch_backend.attend(qkv, table, carry, **options)
    return attend_by(_layer, qkv, table, carry, **options)


def _layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    carry: FlatCarry | None,
    window: int,
    keep: int,
    dropout: float,  # always 0 here
) -> tuple[Tensor, FlatCarry]:
    """See `chain.attend_by`."""
    windows, heads, n, d = v.shape
    flat = windows * heads
    padded = torch.zeros(flat, n, -(-d // LANES) * LANES)
    padded[..., :d] = v.reshape(flat, n, d)
    out = torch.empty_like(padded)
    new = FlatCarry(torch.empty(flat, n, keep), torch.empty(flat, n, keep, dtype=torch.int16) if keep < n else None)
    old = carry or FlatCarry(torch.empty(0, 0, 0), None)
    no_indices = torch.empty(0, 0, 0, dtype=torch.int16)  # a kernel's arguments have one type
    base, offset = _offsets(window)
    q, k = (nnf.pad(x, (0, -x.shape[-1] % CHANNELS)).flatten(0, 1) for x in (q, k))
    arrays = [
        x.detach().contiguous().numpy()
        for x in (q, k.mT, padded, old.logits, no_indices if old.indices is None else old.indices, table.T)
    ]
    results = [x.numpy() for x in (out, new.logits, no_indices if new.indices is None else new.indices)]

    def work(part: int, parts: int) -> None:
        first, last = flat * part // parts, flat * (part + 1) // parts
        _kernel(*arrays, base, offset, keep, first, last, *results)

    in_threads(work)
    return out[..., :d].unflatten(0, (windows, heads)), new


def in_threads(work: Callable[[int, int], None]) -> None:
    """Run work(part, parts) for every part, as many as torch has threads. The kernels release the GIL."""
    parts = torch.get_num_threads()
    if parts == 1:
        work(0, 1)
        return
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(work, range(parts), [parts] * parts))


@lru_cache(maxsize=4)
def _offsets(window: int) -> tuple[Any, Any]:
    """base of queries and offset of keys, each (n,), whose difference is the row in the bias table."""
    y, x = np.divmod(np.arange(window * window), window)
    span = 2 * window - 1
    return (y + window - 1) * span + x + window - 1, y * span + x


@njit(fastmath=True, cache=True, nogil=True)
def _kernel(q, k_t, v, carry, index, table, base, offset, keep, first, last, out, new_carry, new_index):  # type: ignore[no-untyped-def]
    """Window-heads first to last of one layer.

    q (B, n, d) scaled; k_t (B, d, n); v (B, n, lanes); carry, index (B, n, k), empty where the chain is dense;
    table (heads or 1, (2w-1)^2). Writes out like v, new_carry and new_index (B, n, keep), the latter unless dense.
    """
    _, n, d = q.shape
    heads = table.shape[0]
    lanes = v.shape[2]
    has_carry, has_index = carry.shape[0] > 0, index.shape[0] > 0
    k = carry.shape[2] if has_carry else n
    score = np.empty(n, F)
    logit, weight = np.empty(k, F), np.empty(k, F)
    size = np.empty(k, I)
    chosen = np.empty(k, np.int16)
    even, odd = np.empty(lanes, F), np.empty(lanes, F)
    for b in range(first, last):
        bias = table[b % heads]
        for i in range(n):
            for j in range(n):
                score[j] = F(0)
            for c in range(0, d, CHANNELS):
                q0, q1, q2, q3 = q[b, i, c], q[b, i, c + 1], q[b, i, c + 2], q[b, i, c + 3]
                for j in range(n):
                    score[j] += (
                        q0 * k_t[b, c, j] + q1 * k_t[b, c + 1, j] + q2 * k_t[b, c + 2, j] + q3 * k_t[b, c + 3, j]
                    )

            # logits of the entries still kept
            if has_index:
                for t in range(k):
                    j = np.int64(index[b, i, t])
                    logit[t] = carry[b, i, t] + score[j] + bias[base[i] - offset[j]]
            else:
                for j in range(n):
                    logit[j] = score[j] + bias[base[i] - offset[j]]
                if has_carry:
                    for j in range(n):
                        logit[j] += carry[b, i, j]

            # softmax, not yet divided
            top = logit[0]
            for t in range(k):
                top = max(top, logit[t])
            total = F(0)
            for t in range(k):
                logit[t] -= top
                weight[t] = exp_negative(logit[t])
                total += weight[t]

            # cut
            count = _keep_largest(logit, weight, size, chosen, keep) if keep < k else k
            for t in range(count):
                new_carry[b, i, t] = logit[t]
            if has_index:
                for t in range(count):
                    new_index[b, i, t] = index[b, i, chosen[t]] if keep < k else index[b, i, t]
            elif keep < k:
                for t in range(count):
                    new_index[b, i, t] = chosen[t]

            # product with v, two entries at a time so that additions do not wait for each other
            even[:] = F(0)
            odd[:] = F(0)
            for t in range(0, count - 1, 2):
                j0, j1 = t, t + 1
                if has_index or keep < k:
                    j0, j1 = np.int64(new_index[b, i, t]), np.int64(new_index[b, i, t + 1])
                w0, w1 = weight[t], weight[t + 1]
                for c in range(lanes):
                    even[c] += w0 * v[b, j0, c]
                    odd[c] += w1 * v[b, j1, c]
            if count % 2:
                j0 = count - 1
                if has_index or keep < k:
                    j0 = np.int64(new_index[b, i, count - 1])
                for c in range(lanes):
                    even[c] += weight[count - 1] * v[b, j0, c]
            for c in range(lanes):
                out[b, i, c] = (even[c] + odd[c]) / total


@njit(fastmath=True, inline="always")
def _keep_largest(logit, weight, size, chosen, keep):  # type: ignore[no-untyped-def]
    """Move the `keep` largest logits (all <= 0), their weights and places to the front; returns keep.

    The bits of their magnitude, read as integers, order them: bisect for the keep-th smallest.
    """
    k = logit.shape[0]
    for t in range(k):
        size[t] = float_to_bits(max(F(0), -logit[t]))
    low, high = I(0), I(0x7F7FFFFF)
    while low < high:
        middle = I(low + ((high - low) >> I(1)))
        count = I(0)
        for t in range(k):
            count += I(size[t] <= middle)
        if count >= keep:
            high = middle
        else:
            low = I(middle + I(1))
    below = I(0)
    for t in range(k):
        below += I(size[t] < low)
    ties = keep - below
    o = np.int64(0)
    for t in range(k):
        taken = size[t] < low
        if size[t] == low and ties > 0:
            ties -= 1
            taken = True
        if taken:
            logit[o], weight[o], chosen[o] = logit[t], weight[t], t
            o += 1
    return o
