"""The attention chain on a GPU: one fused Triton kernel per layer, in the log domain (see `chain`). Needs triton.

A program takes some rows of queries of one window and head. It gathers the kept keys (of which a window's all fit in
the first-level cache), adds carry and bias, takes the softmax, bisects on the bits of the logits for the cut, writes
the new carry, and multiplies with v: no map ever leaves the registers.

For inference; gradients and dropout are the torch backend's. `TRITON_INTERPRET=1` runs the same source on a CPU.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import torch_backend
from .chain import FlatCarry, attend_by

TILE = 4096  # logits that one program holds
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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
    fits = (qkv.is_cuda or INTERPRETED) and qkv.dtype != torch.float64 and not dropout
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
    half = v.dtype in (torch.float16, torch.bfloat16)
    kept = carry.logits.shape[-1] if carry else n
    indices = carry.indices if carry else None
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))
    out = torch.empty_like(v)
    new = FlatCarry(
        torch.empty(flat, n, keep, dtype=torch.float16 if half else torch.float32, device=v.device),
        torch.empty(flat, n, keep, dtype=torch.int16, device=v.device) if keep < n else None,
    )
    columns = triton.next_power_of_2(kept)
    rows = max(1, min(triton.next_power_of_2(n), TILE // columns))
    _kernel[(flat, triton.cdiv(n, rows))](
        q,
        k,
        v,
        carry.logits if carry else q,
        indices if indices is not None else q,
        table.float().T.contiguous(),
        out,
        new.logits,
        new.indices if new.indices is not None else q,
        BIAS_HEADS=table.shape[1],
        N=n,
        D=q.shape[-1],
        DV=d,
        WINDOW=window,
        KEPT=kept,
        KEEP=keep,
        ROWS=rows,
        COLUMNS=columns,
        HAS_CARRY=carry is not None,
        HAS_INDEX=indices is not None,
    )
    return out.unflatten(0, (windows, heads)), new


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # [B, N, D] scaled
    k_ptr,  # [B, N, D]
    v_ptr,  # [B, N, DV]
    carry_ptr,  # [B, N, KEPT]
    index_ptr,  # [B, N, KEPT]
    table_ptr,  # [BIAS_HEADS, (2 WINDOW - 1)^2]
    out_ptr,  # [B, N, DV]
    new_carry_ptr,  # [B, N, KEEP]
    new_index_ptr,  # [B, N, KEEP]
    BIAS_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WINDOW: tl.constexpr,
    KEPT: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    HAS_INDEX: tl.constexpr,
):
    SPAN: tl.constexpr = 2 * WINDOW - 1
    i_b = tl.program_id(0).to(tl.int64)
    o_i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o_t = tl.arange(0, COLUMNS)
    m_i = o_i < N
    mask = m_i[:, None] & (o_t < KEPT)[None, :]
    p_kept = (i_b * N + o_i[:, None]) * KEPT + o_t[None, :]

    # [ROWS, COLUMNS] keys still kept
    if HAS_INDEX:
        o_j = tl.load(index_ptr + p_kept, mask=mask, other=0).to(tl.int32)
    else:
        o_j = tl.broadcast_to(o_t[None, :], (ROWS, COLUMNS))
    m_j = mask & (o_j < N)

    # logits: product of queries and keys, bias, carry
    base = (o_i // WINDOW + WINDOW - 1) * SPAN + o_i % WINDOW + WINDOW - 1
    offset = (o_j // WINDOW) * SPAN + o_j % WINDOW
    p_bias = table_ptr + (i_b % BIAS_HEADS) * SPAN * SPAN + base[:, None] - offset
    logits = tl.load(p_bias, mask=m_j, other=0.0)
    p_q = q_ptr + (i_b * N + o_i) * D
    p_k = k_ptr + (i_b * N + o_j) * D
    for c in range(D):
        b_q = tl.load(p_q + c, mask=m_i, other=0.0).to(tl.float32)
        logits += b_q[:, None] * tl.load(p_k + c, mask=m_j, other=0.0).to(tl.float32)
    if HAS_CARRY:
        logits += tl.load(carry_ptr + p_kept, mask=mask, other=0.0).to(tl.float32)
    logits = tl.where(m_j, logits, float("-inf"))
    logits = tl.where(m_i[:, None], logits, 0.0)

    # softmax, not yet divided
    logits -= tl.max(logits, 1)[:, None]
    weights = tl.exp(logits)
    total = tl.sum(weights, 1)

    # cut: the bits of magnitudes, read as integers, order them; bisect for the KEEP-th smallest
    if KEEP < KEPT:
        size = (0.0 - logits).to(tl.int32, bitcast=True)
        low = tl.zeros([ROWS], tl.int32)
        high = tl.full([ROWS], 0x7F7FFFFF, tl.int32)
        for _ in range(31):
            middle = low + (high - low) // 2
            enough = tl.sum((size <= middle[:, None]).to(tl.int32), 1) >= KEEP
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
        below = size < high[:, None]
        tied = (size == high[:, None]).to(tl.int32)
        room = KEEP - tl.sum(below.to(tl.int32), 1)
        taken = below | ((tied > 0) & (tl.cumsum(tied, 1) <= room[:, None]))
        place = tl.cumsum(taken.to(tl.int32), 1) - 1
    else:
        taken = m_j
        place = tl.broadcast_to(o_t[None, :], (ROWS, COLUMNS))
    m_new = taken & m_i[:, None]
    p_new = (i_b * N + o_i[:, None]) * KEEP + place
    tl.store(new_carry_ptr + p_new, logits.to(new_carry_ptr.dtype.element_ty), mask=m_new)
    if KEEP < N:
        tl.store(new_index_ptr + p_new, o_j.to(tl.int16), mask=m_new)

    # product with v
    weights = tl.where(m_new, weights, 0.0) / total[:, None]
    p_v = v_ptr + (i_b * N + o_j) * DV
    p_out = out_ptr + (i_b * N + o_i) * DV
    for c in range(DV):
        b_v = tl.load(p_v + c, mask=m_new, other=0.0).to(tl.float32)
        tl.store(p_out + c, tl.sum(weights * b_v, 1).to(out_ptr.dtype.element_ty), mask=m_i)
