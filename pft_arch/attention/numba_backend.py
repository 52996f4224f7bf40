"""The attention chain on a CPU as one compiled kernel per layer, in the log domain (see `chain`). Needs numba.

The kernel reads queries, keys and values where they lie in the image and writes its output there, so windows, shifts
and heads cost no copies; the keys and values of one window and head fit in the second-level cache. Scores of kept
entries are gathered dot products; before the first cut, those of four queries at a time are products of matrices whose
rows stay in the first-level cache. The bias needs no n x n table: query i and key j find it at start[i] + offset[j].
The cut is a search for the smallest logit kept: no sorting. A chain keeps one buffer from its first cut to its end.

For inference in float32; everything else (gradients, other dtypes and devices, dropout) is the torch backend's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from . import torch_backend
from .chain import USED_UP, DenseCarry, concatenate, dense_attention, dense_pays, join, split
from .fastmath import LANES, add, bits_to_float, exp_negative, float_to_bits, load, multiply_add, store, total, zeros

F, I = np.float32, np.int32  # noqa: E741
ROWS = 4  # queries that share a pass over the keys
PARTS_PER_THREAD = 4  # so that threads end at about the same time


@dataclass
class RowCarry:
    """Logits minus their row's maximum, and int16 indices, None where nothing is cut: (B * windows * heads * n, room),
    of which the first `kept` entries of a row hold. The next layer writes into the same memory, and sets `kept` to 0.
    """

    logits: Tensor
    indices: Tensor | None
    kept: int


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
    options: dict[str, Any] = {"heads": heads, "window": window, "shift": shift, "keep": keep, "dropout": dropout}
    fits = serves(qkv.device, qkv.dtype) and not dropout
    if not fits or (torch.is_grad_enabled() and (qkv.requires_grad or table.requires_grad)):
        return torch_backend.attend(qkv, table, carry, **options)
    if isinstance(carry, RowCarry):
        if not carry.kept:
            raise ValueError(USED_UP)
        return _layer(qkv, None, table, carry, heads, window, shift, keep)
    height, width = qkv.shape[1:3]
    q, k, v = split(qkv, heads, window, shift)
    dense = concatenate(q, k, table, carry, height, width, window, shift)
    if dense_pays(dense.q.shape[-1], window * window, keep):
        return join(dense_attention(dense, v, window, dropout), window, shift, height, width), dense
    del q, k, v  # read from the image
    return _layer(qkv, dense, dense.table, None, heads, window, shift, keep)


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs there."""
    return device.type == "cpu" and dtype == torch.float32


def _layer(
    qkv: Tensor,
    dense: DenseCarry | None,
    table: Tensor,
    carry: RowCarry | None,
    heads: int,
    window: int,
    shift: int,
    keep: int,
) -> tuple[Tensor, RowCarry]:
    """One layer with a map: of the chain so far, either `dense` with this layer's queries and keys, or a carry."""
    batch, height, width, channels = qkv.shape
    n = window * window
    parts = batch * height * width // n * heads
    tokens = qkv.view(-1, 3, heads, channels // (3 * heads))
    out = torch.empty_like(tokens[:, 0])
    logits = carry.logits if carry else torch.empty(parts * n, keep)
    indices = carry.indices if carry else None
    has_index, kept = indices is not None, carry.kept if carry else n
    if indices is None and keep < n:
        indices = torch.empty(parts * n, keep, dtype=torch.int16)

    # a kernel's arguments have one type whether they are there or not
    nothing = torch.empty(0, 0)
    tensors = (
        tokens,
        dense.q.flatten(0, 2) if dense else nothing,
        dense.k.flatten(0, 2) if dense else nothing,
        _bias_rows(table, window),
        out,
        logits,
        nothing.short() if indices is None else indices,
    )
    if carry:
        carry.kept = 0
    arrays = [x.detach().contiguous().numpy() for x in tensors]
    options = (height, width, window, shift, kept, keep, carry is not None, has_index)
    in_threads(lambda first, last: _kernel(*arrays, *options, first, last), parts)
    return out.view(batch, height, width, channels // 3), RowCarry(logits, indices, keep)


def in_threads(work: Callable[[int, int], None], count: int) -> None:
    """Run work(first, last) until all of range(count) is done, on as many threads as torch has.

    The kernels release the GIL.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        work(0, count)
        return
    parts = min(count, threads * PARTS_PER_THREAD)
    edges = [count * part // parts for part in range(parts + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))


def _bias_rows(table: Tensor, window: int) -> Tensor:
    """((2w-1)^2, columns) table -> (columns, w, (2w-1) * w): the bias of query (y, x) with all keys is the n numbers of
    row x from (w-1-y) * w on."""
    square = table.T.reshape(-1, 2 * window - 1, 2 * window - 1).flip(1, 2)
    return square.unfold(2, window, 1).permute(0, 2, 1, 3).flip(1).flatten(2)


def _compiled(function: Callable[..., None]) -> Any:
    """As njit, kept on disk for the next process: beside this file, else in the user's cache, else nowhere."""
    options = {"fastmath": True, "nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder to write to
        return njit(**options)(function)


@_compiled
def _kernel(  # type: ignore[no-untyped-def]
    qkv, dense_q, dense_k, biases, out, carry, index,
    height, width, window, shift, kept, keep, has_carry, has_index, first, last,
):  # fmt: skip
    """Windows and heads `first` to `last` of one layer; row r of a map is query r % n of window and head r // n.

    qkv (B * H * W, 3, heads, d); dense_q, dense_k (rows, depth), or empty: then the image's own queries and keys are
    taken; biases as of `_bias_rows`. Writes out (B * H * W, heads, d) and, in place, carry and index (rows, ..), of
    which `kept` entries a row hold before and `keep` after.
    """
    _, _, heads, d = qkv.shape
    n = window * window
    depth, wide = dense_q.shape[1], _padded(d)
    dense = depth > 0
    if not dense:
        depth = wide if has_index else d
    scale = F(1 / np.sqrt(d))

    pixel = np.empty(n, np.int64)
    query, key, value = np.zeros((n + ROWS) * depth, F), np.zeros(_padded(n) * depth, F), np.zeros(n * wide, F)
    scores = np.empty((ROWS, _padded(n)), F)
    logit, weight, size = np.empty(kept, F), np.empty(kept, F), np.empty(kept, I)
    place, chosen = np.arange(n).astype(np.int16), np.empty(kept + 1, np.int16)
    share, target = weight, place
    if keep < kept:
        share, target = np.empty(keep, F), np.empty(keep, np.int16)
    product = np.empty(wide, F)
    for b in range(first, last):
        head = b % heads
        if b == first or head == 0:
            _find_pixels(b // heads, height, width, window, shift, pixel)
        for t in range(n):
            p = pixel[t]
            for c in range(d):
                value[t * wide + c] = qkv[p, 2, head, c]
            panel = t // LANES * LANES * depth + t % LANES  # keys lie as (n / LANES, depth, LANES) for _score
            if has_index:
                for c in range(d):
                    query[t * depth + c] = qkv[p, 0, head, c] * scale
                    key[t * depth + c] = qkv[p, 1, head, c]
            elif dense:
                for c in range(depth):
                    query[t * depth + c] = dense_q[b * n + t, c]
                    key[panel + c * LANES] = dense_k[b * n + t, c]
            else:
                for c in range(d):
                    query[t * depth + c] = qkv[p, 0, head, c] * scale
                    key[panel + c * LANES] = qkv[p, 1, head, c]

        for i in range(n):
            r = b * n + i
            bias = biases[head % biases.shape[0], i % window, (window - 1 - i // window) * window :]

            # logits of the entries still kept
            if has_index:
                for t in range(kept):
                    j = np.int64(index[r, t])
                    place[t] = j
                    dot = multiply_add(load(query, i * depth), load(key, j * depth), zeros())
                    for c in range(LANES, depth, LANES):
                        dot = multiply_add(load(query, i * depth + c), load(key, j * depth + c), dot)
                    logit[t] = carry[r, t] + total(dot) + bias[j]
            else:
                if i % ROWS == 0:
                    _score(query, key, i, depth, scores)
                for t in range(n):
                    logit[t] = scores[i % ROWS, t] + bias[t]
                if has_carry:
                    for t in range(n):
                        logit[t] += carry[r, t]

            # softmax, not yet divided
            top = logit[0]
            for t in range(kept):
                top = max(top, logit[t])
            norm = F(0)
            for t in range(kept):
                logit[t] -= top
                weight[t] = exp_negative(logit[t])
                norm += weight[t]

            # cut
            if keep < kept:
                _choose_largest(logit, size, keep, chosen)
                for t in range(keep):
                    c = np.int64(chosen[t])
                    share[t], target[t] = weight[c], place[c]
                    carry[r, t], index[r, t] = logit[c], place[c]
            else:
                for t in range(keep):
                    carry[r, t] = logit[t]

            # product with v, two entries at a time so that additions do not wait for each other
            for c in range(0, wide, LANES):
                even, odd = zeros(), zeros()
                for t in range(0, keep - 1, 2):
                    even = multiply_add(load(value, np.int64(target[t]) * wide + c), share[t], even)
                    odd = multiply_add(load(value, np.int64(target[t + 1]) * wide + c), share[t + 1], odd)
                if keep % 2:
                    even = multiply_add(load(value, np.int64(target[keep - 1]) * wide + c), share[keep - 1], even)
                store(product, c, add(even, odd))
            for c in range(d):
                out[pixel[i], head, c] = product[c] / norm


@njit(error_model="numpy")
def _padded(count):  # type: ignore[no-untyped-def]
    return -(-count // LANES) * LANES


@njit(error_model="numpy")
def _find_pixels(number, height, width, window, shift, pixel):  # type: ignore[no-untyped-def]
    """pixel (n,): of each token of a window the row in (B * H * W), the image rolled up and left by `shift`."""
    row = number // (width // window) * window
    top, column = row // height * height, number % (width // window) * window
    for t in range(window * window):
        y, x = top + (row - top + t // window + shift) % height, (column + t % window + shift) % width
        pixel[t] = y * width + x


@njit(fastmath=True, error_model="numpy")
def _score(query, key, i, depth, scores):  # type: ignore[no-untyped-def]
    """scores (ROWS, n padded) of queries i to i + ROWS (rows of depth) and keys (n padded / LANES, depth, LANES)."""
    padded = scores.shape[1]
    flat = scores.reshape(-1)
    for j in range(0, padded, LANES):
        s0, s1, s2, s3 = zeros(), zeros(), zeros(), zeros()
        for c in range(depth):
            keys, q = load(key, j * depth + c * LANES), i * depth + c
            s0 = multiply_add(keys, query[q], s0)
            s1 = multiply_add(keys, query[q + depth], s1)
            s2 = multiply_add(keys, query[q + 2 * depth], s2)
            s3 = multiply_add(keys, query[q + 3 * depth], s3)
        store(flat, j, s0)
        store(flat, padded + j, s1)
        store(flat, 2 * padded + j, s2)
        store(flat, 3 * padded + j, s3)


@njit(fastmath=True, error_model="numpy")
def _choose_largest(logit, size, keep, chosen):  # type: ignore[no-untyped-def]
    """Places of the `keep` largest logits, all <= 0, into `chosen`.

    The bits of their magnitudes, read as integers, order them. The search for a bound that `keep` of them stay within
    interpolates twice, then bisects once, so that no distribution takes it long.
    """
    k = logit.size
    high = I(0)
    for t in range(k):
        size[t] = float_to_bits(max(F(0), -logit[t]))
        high = max(high, size[t])
    low, below, within = I(0), I(0), I(k)  # sizes less than low, sizes up to high
    step = 0
    while low < high and within > keep:
        step += 1
        middle = I(low + ((high - low) >> I(1)))
        if step % 3:
            smallest, largest = bits_to_float(low), bits_to_float(high)
            part = F(keep - below) / F(within - below)
            middle = min(max(float_to_bits(smallest + (largest - smallest) * part), low), I(high - I(1)))
        count = I(0)
        for t in range(k):
            count += I(size[t] <= middle)
        if count >= keep:
            high, within = middle, count
        else:
            low, below = I(middle + I(1)), count

    # sizes less than high, and of those equal to it as many as there is room for
    bound = I(high + I(within == keep))
    o = 0
    for t in range(k):
        chosen[o] = t
        o += size[t] < bound
    for t in range(k):
        if o == keep:
            break
        if size[t] == bound:
            chosen[o] = t
            o += 1
