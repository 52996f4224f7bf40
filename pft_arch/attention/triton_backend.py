"""The attention chain on a GPU: fused Triton kernels, forward and backward, in the log domain (see `chain`).

Needs triton 3.3 or newer. Three kinds of layer, each one kernel forward:

    dense    nothing cut and no map kept: the carry is queries and keys of all layers so far, side by side
    rows     all keys of the window, from queries and keys so far or on a dense map, cut or not
    sparse   kept entries only: float16 or float32 logits and int16 indices

In half precision the carry is float16 for inference; in training, and in float32, it is float32. Backward recomputes
the map from the row's logarithm of the sum of exponentials; what a cut took is remembered as one bit per entry.

What the kernels do not serve goes to the torch backend: other devices, GPUs older than Ampere, float64, dropout,
windows above 32. So does everything after a kernel failed to compile or to start, or computed something else than
torch in a check before a GPU's first use, with one line of log.
`TRITON_INTERPRET=1` runs the same source on a CPU. See docs/kernels.md.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import is_out_of_memory
from . import chain, torch_backend, triton_kernels

if [int(x) for x in triton.__version__.split(".")[:2]] < [3, 3]:
    raise ImportError(f"triton 3.3, which comes with torch 2.7, or newer: {triton.__version__} ends the whole process")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OLDEST = (8, 0)  # compute capability: before, Triton has no tensor cores, and whole rows do not fit in shared memory
MAX_WINDOW = 32  # `rows` holds whole rows of a map in registers
SPARSE_TILE = 256  # kept entries of one program of `sparse`, which is one warp: reductions then need no barrier
BACKWARD_TILE = 256
COPIES = 16  # of the table's gradient, so that fewer programs add to one address
WRONG = 0.05  # relative error that no rounding makes: in bfloat16, borderline cuts included, it is below 0.01
ROUNDS = 16  # window-heads that a program of `table_backward` sums before it adds to the table's gradient

log = logging.getLogger("pft_sr")


class KernelError(RuntimeError):
    """A kernel could not be compiled or started; its cause says why."""


@dataclass(frozen=True)
class DenseCarry:
    """Nothing cut yet: logits are q k^T / sqrt(d) + bias(table) and the mask between regions.

    q, k: (B * windows * heads, n, channels of all layers so far, each padded to 8); table: sum of the layers' tables.
    """

    q: Tensor
    k: Tensor
    table: Tensor


@dataclass
class MapCarry:
    """Logits (B * windows * heads, n, k) minus their row's maximum, and int16 indices likewise, ascending, None where
    k = n. Where no gradients are recorded, the next layer writes over it or lets it go, and sets `logits` to None.
    """

    logits: Tensor | None
    indices: Tensor | None


@dataclass(frozen=True)
class Geometry:
    """One layer's shapes. down, across: windows of the image; width: channels of a head, d."""

    heads: int
    width: int
    window: int
    shift: int
    down: int
    across: int

    @property
    def tokens(self) -> int:
        return self.window**2

    @property
    def stride(self) -> int:
        """Channels of a packed token: aligned words of 16 bytes in every dtype."""
        return -(-self.width // 8) * 8

    def image(self, like: Tensor, flat: int, channels: int) -> Tensor:
        """An unwritten image (images, H, W, channels) of `flat` window-heads."""
        images = flat // (self.heads * self.down * self.across)
        return like.new_empty(images, self.down * self.window, self.across * self.window, channels)

    def constants(self, table: Tensor) -> dict[str, Any]:
        """Arguments that every attention kernel takes."""
        return {
            "DOWN": self.down,
            "ACROSS": self.across,
            "SHIFT": self.shift,
            "HEADS": self.heads,
            "BIAS_HEADS": table.shape[0],
            "N": self.tokens,
            "D": self.width,
            "S": self.stride,
            "WINDOW": self.window,
            "SCALE": self.width**-0.5,
        }


failure = ""  # why the kernels are out of use in this process; empty while they serve


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
    height, width, channels = qkv.shape[1:]
    geometry = Geometry(heads, channels // (3 * heads), window, shift, height // window, width // window)
    fits = not dropout and window <= MAX_WINDOW and serves(qkv.device, qkv.dtype)
    if fits and (not qkv.is_cuda or torch.compiler.is_compiling() or agrees(qkv.device, qkv.dtype)):
        try:
            return layer(qkv, table, carry, geometry, keep)
        except KernelError:
            pass  # told where it happened
    carry = _for_torch(carry, geometry)
    return torch_backend.attend(qkv, table, carry, heads=heads, window=window, shift=shift, keep=keep, dropout=dropout)


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels run there, none having failed. The interpreter multiplies bfloat16's bits as numbers."""
    if failure:
        return False
    if INTERPRETED:
        return dtype in (torch.float32, torch.float16)
    fits = device.type == "cuda" and dtype in (torch.float32, torch.float16, torch.bfloat16)
    return fits and torch.cuda.get_device_capability(device) >= OLDEST


@lru_cache
@torch.no_grad()
def agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether what was compiled for a device computes what torch does there, in a small chain of every kind of layer.

    Asked before the first use of a device: the kernels were written without a GPU, and compilers err. If it does not,
    all are out of use.
    """
    options: dict[str, Any] = {"heads": 2, "window": 8, "shift": 4}
    geometry = Geometry(2, 8, 8, 4, 1, 2)
    random = torch.Generator().manual_seed(0)
    carry = expected_carry = None
    for keep in (64, 64, 64, 20, 20, 7):  # dense, the first map, one on a map, the first cut, sparse, a cut
        qkv = torch.randn(1, 8, 16, 48, generator=random, dtype=torch.float32).to(device, dtype)
        table = torch.randn(225, 1, generator=random, dtype=torch.float32).to(device, dtype)
        try:
            out, carry = layer(qkv, table, carry, geometry, keep)
        except KernelError:
            return False
        expected, expected_carry = torch_backend.attend(qkv, table, expected_carry, keep=keep, **options)
        error = float((out - expected).float().norm() / expected.float().norm())
        indices = carry.indices if isinstance(carry, MapCarry) else None
        if indices is not None and not bool(((indices >= 0) & (indices < geometry.tokens)).all()):
            error = math.inf  # the next layer would read wherever they point
        if not error < WRONG:
            text = f"the Triton kernels compute on {device} in {dtype} something else than torch"
            _give_up(text, f"a layer that keeps {keep} entries is off by {error:.1%}")
            return False
    return True


def layer(qkv: Tensor, table: Tensor, carry: Any, geometry: Geometry, keep: int) -> tuple[Tensor, Any]:
    """`attend` by kernels, whatever the device.

    Raises:
        KernelError: one could not be compiled or started.
    """
    qkv = qkv.contiguous()
    half = qkv.dtype != torch.float32 and not torch.is_grad_enabled()
    dtype = torch.float16 if half else torch.float32
    if isinstance(carry, MapCarry):
        if carry.logits is None:
            raise ValueError(chain.USED_UP)
        if carry.indices is None:
            q, k, v = _Pack.apply(qkv, geometry)
            out, logits, indices = _Rows.apply(q, k, v, table, carry.logits, geometry, keep, dtype)
        else:
            out, logits, indices = _Sparse.apply(
                qkv, table, carry.logits, carry.indices, geometry, keep, dtype, not torch.is_grad_enabled()
            )
        if not torch.is_grad_enabled():
            carry.logits = carry.indices = None
        return out, MapCarry(logits, indices)
    q, k, v = _Pack.apply(qkv, geometry)
    if carry is not None:
        q, k = torch.cat([carry.q, q], -1), torch.cat([carry.k, k], -1)
        table = table.float() + carry.table  # the sum of two in half precision would be rounded to it
    if chain.dense_pays(q.shape[-1], geometry.tokens, keep):
        out, _, _ = _Rows.apply(q, k, v, table, None, geometry, keep, None)
        return out, DenseCarry(q, k, table)
    out, logits, indices = _Rows.apply(q, k, v, table, None, geometry, keep, dtype)
    return out, MapCarry(logits, indices)


def _for_torch(carry: Any, geometry: Geometry) -> Any:
    """The carry of a layer by kernels as the torch backend's own; any other unchanged."""
    windows = (-1, geometry.heads)
    if isinstance(carry, DenseCarry):
        q, k = (x.unflatten(0, windows) for x in (carry.q * geometry.width**-0.5, carry.k))
        size = (geometry.down * geometry.window, geometry.across * geometry.window)
        return chain.concatenate(q, k, carry.table, None, *size, geometry.window, geometry.shift)
    if isinstance(carry, MapCarry):
        if carry.logits is None:
            raise ValueError(chain.USED_UP)
        logits = torch_backend.parts(carry.logits.unflatten(0, windows))
        indices = repeat(None) if carry.indices is None else torch_backend.parts(carry.indices.unflatten(0, windows))
        return torch_backend.MapCarry(list(zip(logits, indices, strict=False)))
    return carry


def _launch(kernel: Any, programs: int, *arguments: Tensor, **constants: Any) -> None:
    """Starts a kernel on the device of its first argument. One that does not start puts all out of use."""
    try:
        with torch.cuda.device(arguments[0].get_device()):
            kernel[(programs,)](*arguments, **constants)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = f"the Triton kernel {kernel.__name__!r} does not run here"
        _give_up(text, str(error) or repr(error))
        raise KernelError(text) from error


def _give_up(what: str, why: str) -> None:
    """Put all kernels out of use in this process, and say so."""
    global failure
    failure = why
    log.warning("%s; attention goes on in plain torch, which is slower: %s", what, why.splitlines()[0])


def _precision(dtype: torch.dtype) -> str:
    """How products multiply float32: in one pass of tf32 where torch's own may, else in three, which lose nothing that
    counts: the plain alternative, "ieee", leaves the tensor cores and spills registers."""
    if dtype != torch.float32:
        return "ieee"  # of no effect
    matmul = torch.backends.cuda.matmul
    # from torch 2.9 on, asking for the older name may raise
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "tf32x3"


def _power(x: int, least: int) -> int:
    return max(least, triton.next_power_of_2(x))


def _pack(qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Geometry, inverse: bool = False) -> None:
    rows = min(64, _power(g.tokens, 1))
    _launch(
        triton_kernels.pack, q.shape[0] // g.heads * triton.cdiv(g.tokens, rows), qkv, q, k, v,
        DOWN=g.down, ACROSS=g.across, SHIFT=g.shift, HEADS=g.heads, N=g.tokens, D=g.width, S=g.stride,
        WINDOW=g.window, ROWS=rows, CHANNELS=_power(g.stride, 8), INVERSE=inverse,
    )  # fmt: skip


def _packed(qkv: Tensor, g: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values, each (B * windows * heads, n, stride)."""
    flat = qkv.shape[0] * g.down * g.across * g.heads
    q, k, v = (qkv.new_empty(flat, g.tokens, g.stride) for _ in range(3))
    _pack(qkv, q, k, v, g)
    return q, k, v


def _unpacked(like: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Geometry) -> Tensor:
    """Gradients of queries, keys, values as one of the image."""
    qkv = torch.empty_like(like)
    _pack(qkv, q, k, v, g, inverse=True)
    return qkv


def _by_head(table: Tensor) -> Tensor:
    return table.float().T.contiguous()


def _delta(out: Tensor, d_out: Tensor, g: Geometry) -> Tensor:
    """(images, H, W, heads): what the softmax's gradient subtracts from every entry of a row."""
    return (out.float() * d_out.float()).unflatten(-1, (g.heads, g.width)).sum(-1)


class _Pack(torch.autograd.Function):
    """The image's queries, keys and values as packed windows."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, g: Geometry) -> tuple[Tensor, Tensor, Tensor]:
        ctx.geometry, ctx.like = g, qkv.new_empty(()).expand(qkv.shape)
        return _packed(qkv, g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        like = torch.empty(ctx.like.shape, dtype=ctx.like.dtype, device=ctx.like.device)
        q, k, v = (x.contiguous() for x in gradients)
        return _unpacked(like, q, k, v, ctx.geometry), None


class _Rows(torch.autograd.Function):
    """A layer with all keys of the window. dtype: of the new carry's logits; None if no map is to be handed on."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, logits: Tensor | None, g: Geometry, keep: int,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.geometry, ctx.keep = g, keep
        flat, n, width = q.shape
        by_head = _by_head(table)
        out = g.image(v, flat, g.heads * g.width)
        lse = torch.empty(flat, n, dtype=torch.float32, device=q.device)
        new_logits = new_indices = bits = None
        constants = {
            **g.constants(by_head),
            "QK": width,
            "PRECISION": _precision(q.dtype),
            "MASKED": g.shift > 0 and logits is None,
        }
        if dtype is None:
            rows, columns = min(64, _power(n, 16)), min(64, _power(n, 16))
            if q.dtype == torch.float32:
                rows, columns = min(32, rows), min(32, columns)
            _launch(
                triton_kernels.dense, flat * triton.cdiv(n, rows), q, k, v, by_head, out, lse, **constants,
                ROWS=rows, COLUMNS=columns, WIDTH=_power(width, 16), CHANNELS=_power(g.stride, 16), num_stages=2,
            )  # fmt: skip
        else:
            columns = _power(n, 16)
            new_logits = torch.empty(flat, n, keep, dtype=dtype, device=q.device)
            save = keep < n and any(ctx.needs_input_grad)
            if keep < n:
                new_indices = torch.empty(flat, n, keep, dtype=torch.int16, device=q.device)
                ctx.mark_non_differentiable(new_indices)
            if save:
                bits = torch.empty(flat, n, columns // 8, dtype=torch.uint8, device=q.device)
            warps = 16 if columns >= 512 else min(4, columns // 16)
            rows = 16 if columns >= 256 else min(64, columns)
            _launch(
                triton_kernels.rows, flat * triton.cdiv(n, rows), q, k, v, by_head,
                *(q if x is None else x for x in (logits, out, lse, new_logits, new_indices, bits)), **constants,
                KEEP=keep, HAS_CARRY=logits is not None, SAVE=save, ROWS=rows, COLUMNS=columns, GROUPS=warps, CHUNK=16,
                num_warps=warps, num_stages=1,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, table, logits, out, lse, bits)
        return out, new_logits, new_indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_new: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        q, k, v, table, logits, out, lse, bits = ctx.saved_tensors
        g: Geometry = ctx.geometry
        flat, n, width = q.shape
        by_head = _by_head(table)
        d_out = torch.zeros_like(out) if d_out is None else d_out.to(v.dtype).contiguous()
        # where more values are alive at once, tiles are smaller
        small = q.dtype == torch.float32 or ctx.keep < n or logits is not None or width > 64
        tile = min(32 if small else 64, _power(n, 16))
        blocks = triton.cdiv(n, tile)
        before = torch.empty(flat, n, blocks, dtype=torch.int32, device=q.device) if ctx.keep < n else None
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_logits = None if logits is None else torch.empty_like(logits)
        d_table = torch.zeros_like(by_head)
        shared = (q, k, v, by_head, logits, lse, _delta(out, d_out, g), bits, d_out, d_new, before)
        constants = {
            **g.constants(by_head),
            "QK": width,
            "KEEP": ctx.keep,
            "PRECISION": _precision(q.dtype),
            "MASKED": g.shift > 0 and logits is None,
            "HAS_CARRY": logits is not None,
            "HAS_NEW": d_new is not None,
            "BYTES": 0 if bits is None else bits.shape[-1],
            "TILE": tile,
            "WIDTH": _power(width, 16),
            "CHANNELS": _power(g.stride, 16),
        }
        for kernel, programs, results, more in (
            (triton_kernels.rows_backward, flat * blocks, (d_q, d_logits), {}),
            (triton_kernels.keys_backward, flat * blocks, (d_k, d_v), {}),
            (
                triton_kernels.table_backward,
                by_head.shape[0] * triton.cdiv(flat // by_head.shape[0], ROUNDS) * blocks**2,
                (d_table,),
                {"FLAT": flat, "ROUNDS": ROUNDS},
            ),
        ):
            tensors = [q if x is None else x.contiguous() for x in (*shared, *results)]
            _launch(kernel, programs, *tensors, **constants, **more, num_stages=1)
        return d_q, d_k, d_v, d_table.T.to(table.dtype), d_logits, None, None, None


class _Sparse(torch.autograd.Function):
    """A layer of kept entries, from the image: packed windows are made again for the backward, not kept.

    in_place: whether the new map may lie where the old one does.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, table: Tensor, logits: Tensor, indices: Tensor, g: Geometry, keep: int,
        dtype: torch.dtype, in_place: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.geometry, ctx.keep = g, keep
        flat, n, kept = logits.shape
        q, k, v = _packed(qkv, g)
        by_head = _by_head(table)
        out = g.image(qkv, flat, g.heads * g.width)
        lse = torch.empty(flat, n, dtype=torch.float32, device=qkv.device)
        new_logits = logits if in_place and keep == kept else torch.empty(flat, n, keep, dtype=dtype, device=qkv.device)
        new_indices = torch.empty_like(new_logits, dtype=torch.int16) if keep < kept else indices
        columns = _power(kept, 8)
        save = keep < kept and any(ctx.needs_input_grad)
        bits = torch.empty(flat, n, columns // 8, dtype=torch.uint8, device=qkv.device) if save else None
        rows = max(1, min(_power(n, 1), SPARSE_TILE // columns))
        _launch(
            triton_kernels.sparse, flat * triton.cdiv(n, rows), q, k, v, by_head, logits, indices, out, lse,
            new_logits, new_indices, q if bits is None else bits, **g.constants(by_head), KEPT=kept, KEEP=keep,
            SAVE=save, ROWS=rows, COLUMNS=columns, CHUNK=16 // qkv.element_size(), num_warps=1,
        )  # fmt: skip
        ctx.mark_non_differentiable(new_indices)
        ctx.save_for_backward(qkv, table, logits, indices, out, lse, bits)
        return out, new_logits, new_indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_new: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        qkv, table, logits, indices, out, lse, bits = ctx.saved_tensors
        g: Geometry = ctx.geometry
        flat, n, kept = logits.shape
        q, k, v = _packed(qkv, g)
        by_head = _by_head(table)
        d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
        d_q, d_k, d_v = (torch.zeros_like(q, dtype=torch.float32) for _ in range(3))
        d_table = by_head.new_zeros(COPIES, *by_head.shape)
        d_logits = torch.empty_like(logits)
        columns = _power(kept, 8)
        rows = max(1, min(_power(n, 1), BACKWARD_TILE // columns))
        optional = (q if x is None else x.contiguous() for x in (bits, d_out, d_new))
        _launch(
            triton_kernels.sparse_backward, flat * triton.cdiv(n, rows), q, k, v, by_head, logits, indices, lse,
            _delta(out, d_out, g), *optional, d_q, d_k, d_v, d_table, d_logits, **g.constants(by_head), KEPT=kept,
            KEEP=ctx.keep, HAS_NEW=d_new is not None, COPIES=COPIES, ROWS=rows, COLUMNS=columns,
            CHUNK=16 // qkv.element_size(), num_warps=2,
        )  # fmt: skip
        d_qkv = _unpacked(qkv, d_q, d_k, d_v, g)
        return d_qkv, d_table.sum(0).T.to(table.dtype), d_logits, None, None, None, None, None
