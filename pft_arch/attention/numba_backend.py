"""The attention chain on a CPU as one compiled kernel per layer, in the log domain (see `chain`). Needs numba.

The kernel reads queries, keys and values where they lie in the image and writes its output there, so windows, shifts
and heads cost no copies; the keys and values of one window and head fit in the second-level cache. Scores of kept
entries are gathered dot products; before the first cut, those of four queries at a time are products of matrices whose
rows stay in the first-level cache. The bias needs no n x n table: query i and key j find it at start[i] + offset[j].
The cut is a search for the smallest logit kept: no sorting. A chain keeps one buffer from its first cut to its end.

The backward kernel makes every row's logits again from the carry, and the gradients of one window and head from them in
one go, so that a training holds no map but the carries, and none while nothing is cut.

For float32; everything else (other dtypes and devices, dropout) is the torch backend's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import torch_backend
from .chain import USED_UP, concatenate, dense_pays, split
from .fastmath import LANES, add, bits_to_float, exp_negative, float_to_bits, load, multiply_add, store, total, zeros

F, I, U = np.float32, np.int32, np.uint64  # noqa: E741
ROWS = 4  # queries that share a pass over the keys
PARTS_PER_THREAD = 4  # so that threads end at about the same time


@dataclass
class RowCarry:
    """Logits minus their row's maximum, and int16 indices, None where nothing is cut: (B * windows * heads * n, room).
    `kept` entries of each row hold, those of one window and head side by side where its share of the memory begins.
    Where no gradients are recorded, the next layer writes into the same memory, and sets `kept` to 0.
    """

    logits: Tensor
    indices: Tensor | None
    kept: int


@dataclass(frozen=True)
class Shape:
    """What a kernel knows of a layer beside its arrays. kept, keep: entries of a row before and after."""

    heads: int
    window: int
    shift: int
    height: int
    width: int
    kept: int
    keep: int

    @property
    def place(self) -> tuple[int, int, int, int]:
        return self.height, self.width, self.window, self.shift


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
    if dropout or not serves(qkv.device, qkv.dtype):
        return torch_backend.attend(
            qkv, table, carry, heads=heads, window=window, shift=shift, keep=keep, dropout=dropout
        )
    training, n = torch.is_grad_enabled(), window * window
    height, width = qkv.shape[1:3]
    kept = carry.kept if isinstance(carry, RowCarry) else n
    shape = Shape(heads, window, shift, height, width, kept, keep)
    if isinstance(carry, RowCarry):
        if not kept:
            raise ValueError(USED_UP)
        out, logits, indices = _Layer.apply(
            qkv, None, None, table, carry.logits, carry.indices, shape, True, not training
        )
        carry.kept = kept if training else 0
        return out, RowCarry(logits, indices, keep)
    q, k = split(qkv, heads, window, shift)[:2]
    dense = concatenate(q, k, table, carry, height, width, window, shift)
    del q, k  # read from the image
    mapped = not dense_pays(dense.q.shape[-1], n, keep)
    out, logits, indices = _Layer.apply(
        qkv, _rows(dense.q), _rows(dense.k), dense.table, None, None, shape, mapped, False
    )
    return out, RowCarry(logits, indices, keep) if mapped else dense


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there."""
    return device.type == "cpu" and dtype == torch.float32


class _Layer(torch.autograd.Function):
    """A layer by kernels. dense_q, dense_k: of all layers so far, as by `_rows`; without them, the image's own on top
    of a carry.

    mapped: whether a carry is handed on; in_place: whether it lies where the old one does.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, dense_q: Tensor | None, dense_k: Tensor | None, table: Tensor, logits: Tensor | None,
        indices: Tensor | None, shape: Shape, mapped: bool, in_place: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.shape = shape
        tokens, keep = _tokens(qkv, shape), shape.keep
        parts = len(tokens) * shape.heads // shape.window**2
        rows = parts * shape.window**2
        out = torch.empty_like(tokens[:, :1])
        new_logits, new_indices = logits, indices
        if not in_place:
            new_logits = qkv.new_empty(rows, keep) if mapped else None
        if keep < shape.kept and not (in_place and indices is not None):
            new_indices = torch.empty(rows, keep, dtype=torch.int16)
            ctx.mark_non_differentiable(new_indices)
        arrays = [
            *(_array(x, 4) for x in (tokens, out, dense_q, dense_k)),
            _array(_bias_rows(table, shape.window), 3),
            *(_array(x, 2) for x in (logits, new_logits)),
            *(_array(x, 2, torch.int16) for x in (indices, new_indices)),
        ]
        present = (logits is not None, indices is not None, mapped)
        in_threads(lambda first, last: _forward(*arrays, *shape.place, shape.kept, keep, *present, first, last), parts)
        ctx.save_for_backward(qkv, dense_q, dense_k, table, logits, indices, new_indices)
        return out.view(*qkv.shape[:3], -1), new_logits, new_indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_new: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        qkv, dense_q, dense_k, table, logits, indices, new_indices = ctx.saved_tensors
        shape: Shape = ctx.shape
        tokens = _tokens(qkv, shape)
        d_tokens = torch.zeros_like(tokens)
        d_out = torch.zeros_like(tokens[:, :1]) if d_out is None else d_out.reshape(tokens[:, :1].shape)
        d_q, d_k, d_logits = (None if x is None else qkv.new_empty(x.shape) for x in (dense_q, dense_k, logits))
        parts = len(tokens) * shape.heads // shape.window**2
        d_table = qkv.new_zeros(parts, (2 * shape.window - 1) ** 2)
        arrays = [
            *(_array(x, 4) for x in (tokens, d_out, d_tokens, dense_q, dense_k, d_q, d_k)),
            _array(_bias_rows(table, shape.window), 3),
            *(_array(x, 2) for x in (logits, d_logits, d_new, d_table)),
            *(_array(x, 2, torch.int16) for x in (indices, new_indices)),
        ]
        kernel = _dense_backward if indices is None else _sparse_backward
        present = (logits is not None, d_new is not None)
        in_threads(lambda first, last: kernel(*arrays, *shape.place, shape.keep, *present, first, last), parts)
        by_column = d_table.view(-1, shape.heads // table.shape[1], table.shape[1], d_table.shape[1]).sum((0, 1))
        return d_tokens.view(qkv.shape), d_q, d_k, by_column.flip(1).T, d_logits, None, None, None, None


def _tokens(qkv: Tensor, shape: Shape) -> Tensor:
    """(B, H, W, 3C) -> (B * H * W, 3, heads, d)."""
    return qkv.contiguous().view(qkv.shape[:3].numel(), 3, shape.heads, -1)


def _rows(x: Tensor) -> Tensor:
    """(B * windows, heads, n, depth) -> (B * windows * heads * n, 1, 1, depth), the axes of `_tokens`."""
    return x.reshape(-1, 1, 1, x.shape[-1])


def _array(x: Tensor | None, axes: int, dtype: torch.dtype = torch.float32) -> NDArray[Any]:
    """For kernels, whose arguments have one type whether they are there or not."""
    array: NDArray[Any] = (torch.empty([0] * axes, dtype=dtype) if x is None else x.detach().contiguous()).numpy()
    return array


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
def _forward(  # type: ignore[no-untyped-def]
    qkv, out, dense_q, dense_k, biases, carry, new_carry, index, new_index,
    height, width, window, shift, kept, keep, has_carry, has_index, has_new, first, last,
):  # fmt: skip
    """Windows and heads `first` to `last` of one layer; row r of a map is query r % n of window and head r // n.

    qkv (B * H * W, 3, heads, d); dense_q, dense_k (rows, 1, 1, depth), or empty: then the image's own queries and keys
    are taken; biases as of `_bias_rows`. Reads carry and index, of which `kept` entries a row hold; writes
    out (B * H * W, 1, heads, d), and new_carry and new_index, `keep` entries a row, which may lie in the same memory:
    no row then ends behind where it was read.
    """
    _, _, heads, d = qkv.shape
    n = window * window
    depth, wide = dense_q.shape[3], _padded(d)
    whole = keep == n
    if not depth:
        depth = wide if has_index else d

    pixel = np.empty(n, np.int64)
    query, key, value = np.zeros((n + ROWS) * depth, F), np.zeros(_padded(n) * depth, F), np.zeros(_padded(n) * wide, F)
    scores = np.empty((ROWS, _padded(n)), F)
    logit, weight, size = np.empty(kept, F), np.empty(kept, F), np.empty(kept, I)
    place, chosen = np.arange(n).astype(np.int16), np.empty(kept + 1, np.int16)
    share, target = weight, place
    if keep < kept:
        share, target = np.empty(keep, F), np.empty(keep, np.int16)
    product = np.empty(ROWS * wide, F)
    old_carry, old_index = carry.reshape(-1), index.reshape(-1)
    carries, indices = new_carry.reshape(-1), new_index.reshape(-1)
    for b in range(first, last):
        head = b % heads
        if b == first or head == 0:
            _find_pixels(b // heads, height, width, window, shift, pixel)
        _read(qkv, 2, head, pixel, F(1), value, d if whole else wide, whole)
        _read_queries_and_keys(qkv, dense_q, dense_k, b, pixel, query, key, depth, not has_index)

        for i in range(n):
            row = i % ROWS
            bias = biases[head % biases.shape[0], i % window, (window - 1 - i // window) * window :]
            # unsigned: numba looks at other sums whether they count from an array's end, and then makes no vectors
            at_carry, at_index = U(b * n * carry.shape[1] + i * kept), U(b * n * index.shape[1] + i * kept)
            to_carry, to_index = U(b * n * new_carry.shape[1] + i * keep), U(b * n * new_index.shape[1] + i * keep)

            # logits of the entries still kept
            if has_index:
                for t in range(kept):
                    j = np.int64(old_index[at_index + U(t)])
                    place[t] = j
                    logit[t] = old_carry[at_carry + U(t)] + _dot(query, i * depth, key, j * depth, depth) + bias[j]
            else:
                if row == 0:
                    _score(query, key, i, depth, scores)
                if has_carry:
                    for t in range(n):
                        logit[t] = scores[row, t] + bias[t] + old_carry[at_carry + U(t)]
                else:
                    for t in range(n):
                        logit[t] = scores[row, t] + bias[t]

            norm = _softmax(logit, weight)

            # cut
            if keep < kept:
                _choose_largest(logit, size, keep, chosen)
                for t in range(keep):
                    c = np.int64(chosen[t])
                    share[t], target[t] = weight[c], place[c]
                    carries[to_carry + U(t)], indices[to_index + U(t)] = logit[c], place[c]
            elif has_new:
                for t in range(keep):
                    carries[to_carry + U(t)] = logit[t]

            # product with v: of all keys for four queries at once, else two entries at a time so that additions do not
            # wait for each other
            if whole:
                for t in range(n):
                    scores[row, t] = weight[t] / norm
                if row == ROWS - 1 or i == n - 1:
                    _sum_keys(scores, value, 0, d, product)
                    for back in range(row + 1):
                        for c in range(d):
                            out[pixel[i - row + back], 0, head, c] = product[back * d + c]
                continue
            for c in range(0, wide, LANES):
                even, odd = zeros(), zeros()
                for t in range(0, keep - 1, 2):
                    even = multiply_add(load(value, np.int64(target[t]) * wide + c), share[t], even)
                    odd = multiply_add(load(value, np.int64(target[t + 1]) * wide + c), share[t + 1], odd)
                if keep % 2:
                    even = multiply_add(load(value, np.int64(target[keep - 1]) * wide + c), share[keep - 1], even)
                store(product, c, add(even, odd))
            for c in range(d):
                out[pixel[i], 0, head, c] = product[c] / norm


@_compiled
def _sparse_backward(  # type: ignore[no-untyped-def]
    qkv, d_out, d_qkv, dense_q, dense_k, d_dense_q, d_dense_k, biases, carry, d_carry, d_new, d_table, index, new_index,
    height, width, window, shift, keep, _, has_new, first, last,
):  # fmt: skip
    """Gradients of a layer with an index, from those of its output and, if has_new, its carry.

    d_qkv, d_carry: like qkv, carry; d_table (windows * heads, (2w-1)^2): of each window and head, by the offset of the
    key from the query, so the other way round than the table.
    """
    _, _, heads, d = qkv.shape
    n, kept = window * window, carry.shape[1]
    wide = _padded(d)

    pixel, offset = np.empty(n, np.int64), np.arange(n) // window * (2 * window - 1) + np.arange(n) % window
    query, key, value, slope = (
        np.zeros(n * wide, F),
        np.zeros(n * wide, F),
        np.zeros(n * wide, F),
        np.zeros(n * wide, F),
    )
    d_query, d_key, d_value = np.empty(n * wide, F), np.empty(n * wide, F), np.empty(n * wide, F)
    logit, weight, d_weight, d_logit = np.empty(kept, F), np.empty(kept, F), np.zeros(kept, F), np.zeros(kept, F)
    column = np.empty(n, np.int64)
    for b in range(first, last):
        head = b % heads
        _find_pixels(b // heads, height, width, window, shift, pixel)
        _read_queries_and_keys(qkv, dense_q, dense_k, b, pixel, query, key, wide, False)
        _read(qkv, 2, head, pixel, F(1), value, wide, False)
        _read(d_out, 0, head, pixel, F(1), slope, wide, False)
        d_key[:] = 0
        d_value[:] = 0
        for i in range(n):
            r = b * n + i
            bias = biases[head % biases.shape[0], i % window, (window - 1 - i // window) * window :]
            for t in range(kept):
                j = np.int64(index[r, t])
                column[j] = t
                logit[t] = carry[r, t] + _dot(query, i * wide, key, j * wide, wide) + bias[j]
            norm = _softmax(logit, weight)

            # of weights and values; what was cut has none of its own
            mean = F(0)
            d_weight[:] = 0
            d_logit[:] = 0
            for u in range(keep):
                j = np.int64(new_index[r, u])
                t = column[j]
                share = weight[t] / norm
                d_weight[t] = _dot(slope, i * wide, value, j * wide, wide)
                mean += share * d_weight[t]
                for c in range(0, wide, LANES):
                    store(
                        d_value,
                        j * wide + c,
                        multiply_add(load(slope, i * wide + c), share, load(d_value, j * wide + c)),
                    )
                if has_new:
                    d_logit[t] = d_new[r, u]

            # of logits, then of what makes them
            for t in range(kept):
                d_logit[t] += weight[t] / norm * (d_weight[t] - mean)
                d_carry[r, t] = d_logit[t]
            start = (window - 1 - i // window) * (2 * window - 1) + window - 1 - i % window
            for t in range(kept):
                d_table[b, start + offset[index[r, t]]] += d_logit[t]
            for c in range(0, wide, LANES):
                q, dot = load(query, i * wide + c), zeros()
                for t in range(kept):
                    j = np.int64(index[r, t]) * wide + c
                    dot = multiply_add(load(key, j), d_logit[t], dot)
                    store(d_key, j, multiply_add(q, d_logit[t], load(d_key, j)))
                store(d_query, i * wide + c, dot)
        _write_queries_and_keys(d_qkv, d_dense_q, d_dense_k, b, pixel, d_query, d_key, wide, False)
        _write(d_qkv, 2, head, pixel, F(1), d_value, wide, False)


@_compiled
def _dense_backward(  # type: ignore[no-untyped-def]
    qkv, d_out, d_qkv, dense_q, dense_k, d_dense_q, d_dense_k, biases, carry, d_carry, d_new, d_table, _, new_index,
    height, width, window, shift, keep, has_carry, has_new, first, last,
):  # fmt: skip
    """Gradients of a layer of all keys; like `_sparse_backward`. Those of dense_q and dense_k, if any, instead of the
    image's own queries and keys."""
    _, _, heads, d = qkv.shape
    n, span = window * window, 2 * window - 1
    depth = dense_q.shape[3] if dense_q.size else d

    pixel, padded = np.empty(n, np.int64), _padded(n)
    query, key, d_query, d_key = (
        np.zeros((n + ROWS) * depth, F),
        np.zeros(padded * depth, F),
        np.empty((n + ROWS) * depth, F),
        np.empty(padded * depth, F),
    )
    slope, value, d_value = np.zeros((n + ROWS) * d, F), np.zeros(padded * d, F), np.empty(padded * d, F)
    # of four queries: weights, and gradients of weights, then of logits
    weights, slopes = np.empty((ROWS, padded), F), np.empty((ROWS, padded), F)
    logit, weight, stays = np.empty(n, F), np.empty(n, F), np.ones(n, F)
    for b in range(first, last):
        head = b % heads
        _find_pixels(b // heads, height, width, window, shift, pixel)
        _read_queries_and_keys(qkv, dense_q, dense_k, b, pixel, query, key, depth, True)
        _read(qkv, 2, head, pixel, F(1), value, d, True)
        _read(d_out, 0, head, pixel, F(1), slope, d, False)
        d_key[:] = 0
        d_value[:] = 0
        for i in range(0, n, ROWS):
            _score(query, key, i, depth, weights)
            _score(slope, value, i, d, slopes)
            for row in range(ROWS):
                if i + row >= n:
                    weights[row] = 0
                    slopes[row] = 0
                    continue
                y, x, r = (i + row) // window, (i + row) % window, b * n + i + row
                bias = biases[head % biases.shape[0], x, (window - 1 - y) * window :]
                for t in range(n):
                    logit[t] = weights[row, t] + bias[t]
                if has_carry:
                    for t in range(n):
                        logit[t] += carry[r, t]
                norm = _softmax(logit, weight)
                if keep < n:
                    stays[:] = 0
                    for u in range(keep):
                        stays[new_index[r, u]] = 1
                mean = F(0)
                for t in range(n):
                    weight[t] /= norm
                    weights[row, t] = weight[t] * stays[t]
                    mean += weights[row, t] * slopes[row, t]
                for t in range(n):
                    slopes[row, t] = weight[t] * (slopes[row, t] * stays[t] - mean)
                if has_new and keep < n:
                    for u in range(keep):
                        slopes[row, new_index[r, u]] += d_new[r, u]
                elif has_new:
                    for t in range(n):
                        slopes[row, t] += d_new[r, t]
                weights[row, n:] = 0
                slopes[row, n:] = 0
                if has_carry:
                    for t in range(n):
                        d_carry[r, t] = slopes[row, t]
                for line in range(window):
                    start = (window - 1 - y + line) * span + window - 1 - x
                    for t in range(window):
                        d_table[b, start + t] += slopes[row, line * window + t]
            _sum_keys(slopes, key, i, depth, d_query)
            _add_queries(slopes, query, i, depth, d_key)
            _add_queries(weights, slope, i, d, d_value)
        _write_queries_and_keys(d_qkv, d_dense_q, d_dense_k, b, pixel, d_query, d_key, depth, True)
        _write(d_qkv, 2, head, pixel, F(1), d_value, d, True)


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


@njit(error_model="numpy")
def _place_of(t, c, depth, panels):  # type: ignore[no-untyped-def]
    """Of channel c of token t, in rows of `depth` or in panels (n padded / LANES, depth, LANES)."""
    return t // LANES * LANES * depth + t % LANES + c * LANES if panels else t * depth + c


@njit(error_model="numpy")
def _read(image, part, head, token, factor, numbers, depth, panels):  # type: ignore[no-untyped-def]
    """One head's channels of the tokens (n,) of an image (rows, parts, heads, d) into `numbers`."""
    for t in range(token.size):
        for c in range(image.shape[3]):
            numbers[_place_of(t, c, depth, panels)] = image[token[t], part, head, c] * factor


@njit(error_model="numpy")
def _write(image, part, head, token, factor, numbers, depth, panels):  # type: ignore[no-untyped-def]
    """The way back."""
    for t in range(token.size):
        for c in range(image.shape[3]):
            image[token[t], part, head, c] = numbers[_place_of(t, c, depth, panels)] * factor


@njit(error_model="numpy")
def _read_queries_and_keys(qkv, dense_q, dense_k, b, pixel, query, key, depth, panels):  # type: ignore[no-untyped-def]
    """Of window-head b: of all layers so far, if given, else the image's own, queries scaled. panels: of the keys."""
    if dense_q.size:
        own = np.arange(pixel.size) + b * pixel.size
        _read(dense_q, 0, 0, own, F(1), query, depth, False)
        _read(dense_k, 0, 0, own, F(1), key, depth, panels)
    else:
        head = b % qkv.shape[2]
        _read(qkv, 0, head, pixel, F(1 / np.sqrt(qkv.shape[3])), query, depth, False)
        _read(qkv, 1, head, pixel, F(1), key, depth, panels)


@njit(error_model="numpy")
def _write_queries_and_keys(qkv, dense_q, dense_k, b, pixel, query, key, depth, panels):  # type: ignore[no-untyped-def]
    """The way back, of their gradients."""
    if dense_q.size:
        own = np.arange(pixel.size) + b * pixel.size
        _write(dense_q, 0, 0, own, F(1), query, depth, False)
        _write(dense_k, 0, 0, own, F(1), key, depth, panels)
    else:
        head = b % qkv.shape[2]
        _write(qkv, 0, head, pixel, F(1 / np.sqrt(qkv.shape[3])), query, depth, False)
        _write(qkv, 1, head, pixel, F(1), key, depth, panels)


@njit(fastmath=True, error_model="numpy")
def _dot(a, i, b, j, wide):  # type: ignore[no-untyped-def]
    """Of `wide` numbers, a multiple of LANES, of a from i on and of b from j on."""
    sums = multiply_add(load(a, i), load(b, j), zeros())
    for c in range(LANES, wide, LANES):
        sums = multiply_add(load(a, i + c), load(b, j + c), sums)
    return total(sums)


@njit(fastmath=True, error_model="numpy")
def _softmax(logit, weight):  # type: ignore[no-untyped-def]
    """Subtracts the largest from the logits; their exponentials, not yet divided, into weight. Returns the divisor."""
    top = logit[0]
    for t in range(logit.size):
        top = max(top, logit[t])
    norm = F(0)
    for t in range(logit.size):
        logit[t] -= top
        weight[t] = exp_negative(logit[t])
        norm += weight[t]
    return norm


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
def _sum_keys(scores, key, i, depth, query):  # type: ignore[no-untyped-def]
    """query, rows i to i + ROWS, of sums of all keys by their scores: the gradient of `_score` for its queries."""
    padded = scores.shape[1]
    flat = scores.reshape(-1)
    for c in range(depth):
        q0, q1, q2, q3 = zeros(), zeros(), zeros(), zeros()
        for j in range(0, padded, LANES):
            keys = load(key, j * depth + c * LANES)
            q0 = multiply_add(keys, load(flat, j), q0)
            q1 = multiply_add(keys, load(flat, padded + j), q1)
            q2 = multiply_add(keys, load(flat, 2 * padded + j), q2)
            q3 = multiply_add(keys, load(flat, 3 * padded + j), q3)
        q = i * depth + c
        query[q], query[q + depth], query[q + 2 * depth], query[q + 3 * depth] = (
            total(q0),
            total(q1),
            total(q2),
            total(q3),
        )


@njit(fastmath=True, error_model="numpy")
def _add_queries(scores, query, i, depth, key):  # type: ignore[no-untyped-def]
    """Adds rows i to i + ROWS of query to all keys, by their scores: the gradient of `_score` for its keys."""
    padded = scores.shape[1]
    flat = scores.reshape(-1)
    for j in range(0, padded, LANES):
        s0, s1 = load(flat, j), load(flat, padded + j)
        s2, s3 = load(flat, 2 * padded + j), load(flat, 3 * padded + j)
        for c in range(depth):
            k, q = j * depth + c * LANES, i * depth + c
            keys = multiply_add(s0, query[q], load(key, k))
            keys = multiply_add(s1, query[q + depth], keys)
            keys = multiply_add(s2, query[q + 2 * depth], keys)
            store(key, k, multiply_add(s3, query[q + 3 * depth], keys))


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
