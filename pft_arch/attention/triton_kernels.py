"""Triton kernels of the attention chain in the log domain (see `chain`); `triton_backend` launches them.

Shapes, as comments beside the arguments name them: B window-heads, that is window * HEADS + head; N tokens of a window;
QK and S the channels of packed queries/keys and of values, multiples of 8 filled up with zeros, so that a row is read
in aligned 16-byte words. Images are (images, H, W, channels) with H = DOWN * WINDOW and W = ACROSS * WINDOW, and are
addressed through the cyclic shift: nothing is ever rolled or cut into windows. All sums are in float32.

Prefixes: i_ index, o_ offsets, p_ pointers, m_ mask, b_ block of values. Capital letters are compile-time constants,
but for DOWN, ACROSS, SHIFT and FLAT, which differ between images.
"""

from __future__ import annotations

import triton
import triton.language as tl

MASK = tl.constexpr(-100.0)  # windows.MASK
PER_IMAGE = ["DOWN", "ACROSS", "SHIFT", "FLAT"]


@triton.jit
def _pixels(i_w, o_i, DOWN, ACROSS, SHIFT, WINDOW: tl.constexpr):
    """Place of token o_i of window i_w in the image, counted in pixels."""
    i_rest = i_w % (DOWN * ACROSS)
    y = (i_rest // ACROSS) * WINDOW + o_i // WINDOW + SHIFT
    x = (i_rest % ACROSS) * WINDOW + o_i % WINDOW + SHIFT
    y = tl.where(y < DOWN * WINDOW, y, y - DOWN * WINDOW)
    x = tl.where(x < ACROSS * WINDOW, x, x - ACROSS * WINDOW)
    return ((i_w // (DOWN * ACROSS)) * (DOWN * WINDOW) + y) * (ACROSS * WINDOW) + x


@triton.jit
def _region(i_w, o_i, DOWN, ACROSS, SHIFT, WINDOW: tl.constexpr):
    """Number of the region of a token, as `windows.regions`."""
    i_rest = i_w % (DOWN * ACROSS)
    below = (i_rest // ACROSS == DOWN - 1) & (o_i // WINDOW >= WINDOW - SHIFT)
    right = (i_rest % ACROSS == ACROSS - 1) & (o_i % WINDOW >= WINDOW - SHIFT)
    return below.to(tl.int32) * 2 + right.to(tl.int32)


@triton.jit
def _relative(o_i, o_j, WINDOW: tl.constexpr):
    """Row of the bias table for queries o_i and keys o_j, which broadcast."""
    SPAN: tl.constexpr = 2 * WINDOW - 1
    base = (o_i // WINDOW + WINDOW - 1) * SPAN + o_i % WINDOW + WINDOW - 1
    return base - ((o_j // WINDOW) * SPAN + o_j % WINDOW)


@triton.jit
def _rows_of(ptr, o_row, o_d, m_row, CHANNELS: tl.constexpr):
    """[rows, channels] of a packed tensor; zero where masked or beyond its channels."""
    p = ptr + (o_row[:, None] * CHANNELS + o_d[None, :])
    return tl.load(p, mask=m_row[:, None] & (o_d < CHANNELS)[None, :], other=0.0)


@triton.jit
def _count(flags):
    """[rows] from [groups, rows, columns]."""
    return tl.sum(tl.sum(flags.to(tl.int32), 2), 0)


@triton.jit
def _select(logits, m_valid, KEEP: tl.constexpr, HALF: tl.constexpr):
    """Which KEEP entries of each row are largest, and the place of each among them, in the order of the row.

    logits [groups, rows, columns], a row going on from group to group, are at most 0. Bisect for the KEEP-th smallest
    magnitude: of bits read as integers, 31 steps, or in fixed point, 19 steps, where the carry will be float16: weights
    a factor of 1 + 2^-14 apart count as equal there, and all below e^-32. (The bits of float16 tell no more than 2^-9
    apart where most cuts fall, and cost an error of 6e-3 of the output.) Ties fall to the first. Exactly KEEP valid
    entries are taken, whatever the logits hold: NaN counts as infinite, since a place left unwritten would become
    somebody's index.
    """
    if HALF:
        INF: tl.constexpr = 0x7FFFF
        STEPS: tl.constexpr = 19
        size = tl.where(logits > -32.0, logits * -16384.0, 524287.0).to(tl.int32)
    else:
        INF: tl.constexpr = 0x7F800000
        STEPS: tl.constexpr = 31
        size = tl.minimum((0.0 - logits).to(tl.int32, bitcast=True) & 0x7FFFFFFF, INF)
    low = _count(size < 0)  # 0, in the layout of a reduction
    high = low + INF
    for _ in range(STEPS):
        middle = low + (high - low) // 2
        enough = _count(size <= middle[None, :, None]) >= KEEP
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    below = (size < high[None, :, None]) & m_valid
    tied = (size == high[None, :, None]) & m_valid
    seen = below.to(tl.int32) + (tied.to(tl.int32) << 16)  # two counts in one scan
    groups = tl.sum(seen, 2)
    seen = tl.cumsum(seen, 2) + (tl.cumsum(groups, 0) - groups)[:, :, None]
    room = (KEEP - _count(below))[None, :, None]
    taken = below | (tied & ((seen >> 16) <= room))
    return taken, (seen & 0xFFFF) + tl.minimum(seen >> 16, room) - 1


@triton.jit
def _bits(flags):
    """Eight flags of the last dimension to a byte."""
    GROUPS: tl.constexpr = flags.shape[0]
    ROWS: tl.constexpr = flags.shape[1]
    BYTES: tl.constexpr = flags.shape[2] // 8
    bits = tl.reshape(flags.to(tl.int32), [GROUPS, ROWS, BYTES, 8]) << tl.arange(0, 8)[None, None, None, :]
    return tl.sum(bits, 3).to(tl.uint8)


@triton.jit(do_not_specialize=PER_IMAGE)
def pack(
    qkv_ptr,  # image, 3 * HEADS * D channels
    q_ptr,  # [B, N, S]
    k_ptr,  # [B, N, S]
    v_ptr,  # [B, N, S]
    DOWN,
    ACROSS,
    SHIFT,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Queries, keys and values of ROWS tokens, all heads, from the image into the packed tensors, or back."""
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    i_w = tl.program_id(0).to(tl.int64) // BLOCKS
    o_i = (tl.program_id(0) % BLOCKS) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, CHANNELS)
    p_image = qkv_ptr + _pixels(i_w, o_i, DOWN, ACROSS, SHIFT, WINDOW)[:, None] * (3 * HEADS * D) + o_d[None, :]
    m_i = (o_i < N)[:, None]
    m_image = m_i & (o_d < D)[None, :]
    m_packed = m_i & (o_d < S)[None, :]
    for i_h in range(HEADS):
        i_base = (i_w * HEADS + i_h) * N * S
        o_packed = o_i[:, None] * S + o_d[None, :]
        for part in tl.static_range(3):
            if part == 0:
                p_packed = q_ptr + i_base + o_packed
            elif part == 1:
                p_packed = k_ptr + i_base + o_packed
            else:
                p_packed = v_ptr + i_base + o_packed
            p_part = p_image + (part * HEADS + i_h) * D
            if INVERSE:
                b = tl.load(p_packed, mask=m_image, other=0.0)
                tl.store(p_part, b.to(qkv_ptr.dtype.element_ty), mask=m_image)
            else:
                tl.store(p_packed, tl.load(p_part, mask=m_image, other=0.0), mask=m_packed)


@triton.jit
def _bias(
    table_ptr, i_b, o_i, o_j, DOWN, ACROSS, SHIFT,
    HEADS: tl.constexpr, BIAS_HEADS: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Relative-position bias and mask between regions for queries o_i and keys o_j, which broadcast.

    Places beyond the window read the last token's: whoever asks masks them.
    """
    SPAN: tl.constexpr = 2 * WINDOW - 1
    o_i = tl.minimum(o_i, WINDOW * WINDOW - 1)
    o_j = tl.minimum(o_j, WINDOW * WINDOW - 1)
    bias = tl.load(table_ptr + (i_b % BIAS_HEADS) * SPAN * SPAN + _relative(o_i, o_j, WINDOW))
    if MASKED:
        own = _region(i_b // HEADS, o_i, DOWN, ACROSS, SHIFT, WINDOW)
        other = _region(i_b // HEADS, o_j, DOWN, ACROSS, SHIFT, WINDOW)
        bias += tl.where(own == other, 0.0, MASK)
    return bias


@triton.jit(do_not_specialize=PER_IMAGE)
def dense(
    q_ptr,  # [B, N, QK]
    k_ptr,  # [B, N, QK]
    v_ptr,  # [B, N, S]
    table_ptr,  # [BIAS_HEADS, (2 WINDOW - 1)^2]
    out_ptr,  # image, HEADS * D channels
    lse_ptr,  # [B, N] logarithm of each row's sum of exponentials
    DOWN,
    ACROSS,
    SHIFT,
    HEADS: tl.constexpr,
    BIAS_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    QK: tl.constexpr,
    S: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """softmax(q k^T + bias) v for ROWS queries, COLUMNS keys at a time, the softmax kept up to date on the way."""
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    i_b = tl.program_id(0).to(tl.int64) // BLOCKS
    o_i = (tl.program_id(0) % BLOCKS) * ROWS + tl.arange(0, ROWS)
    o_w = tl.arange(0, WIDTH)
    o_d = tl.arange(0, CHANNELS)
    m_i = o_i < N
    b_q = _rows_of(q_ptr + i_b * N * QK, o_i, o_w, m_i, QK)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, N, COLUMNS):
        o_j = first + tl.arange(0, COLUMNS)
        m_j = o_j < N
        b_k = _rows_of(k_ptr + i_b * N * QK, o_j, o_w, m_j, QK)
        logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * SCALE
        logits += _bias(
            table_ptr, i_b, o_i[:, None], o_j[None, :], DOWN, ACROSS, SHIFT, HEADS, BIAS_HEADS, WINDOW, MASKED
        )
        logits = tl.where(m_j[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp(logits - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        b_v = _rows_of(v_ptr + i_b * N * S, o_j, o_d, m_j, S)
        b_out = tl.dot(weights.to(b_v.dtype), b_v, b_out * shrink[:, None], input_precision=PRECISION)
        top = new_top
    o_pixel = _pixels(i_b // HEADS, o_i, DOWN, ACROSS, SHIFT, WINDOW)
    p_out = out_ptr + (o_pixel * HEADS + i_b % HEADS)[:, None] * D + o_d[None, :]
    b_out = b_out / total[:, None]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_i[:, None] & (o_d < D)[None, :])
    tl.store(lse_ptr + i_b * N + o_i, top + tl.log(total), mask=m_i)


@triton.jit(do_not_specialize=PER_IMAGE)
def rows(
    q_ptr,  # [B, N, QK]
    k_ptr,  # [B, N, QK]
    v_ptr,  # [B, N, S]
    table_ptr,  # [BIAS_HEADS, (2 WINDOW - 1)^2]
    carry_ptr,  # [B, N, N]
    out_ptr,  # image, HEADS * D channels
    lse_ptr,  # [B, N]
    new_carry_ptr,  # [B, N, KEEP]
    new_index_ptr,  # [B, N, KEEP]
    bits_ptr,  # [B, N, COLUMNS / 8]
    DOWN,
    ACROSS,
    SHIFT,
    HEADS: tl.constexpr,
    BIAS_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    QK: tl.constexpr,
    S: tl.constexpr,
    KEEP: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    SAVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A layer with all keys of the window whose map is carried on, cut or not: ROWS whole rows of it in registers.

    A row is spread over GROUPS, one for each warp, as batches of a product: so both products run on tensor cores
    without any warp needing more than its own share of the row. CHUNK channels at a time bound the shared memory.
    """
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    PART: tl.constexpr = COLUMNS // GROUPS
    HALF: tl.constexpr = new_carry_ptr.dtype.element_ty == tl.float16
    i_b = tl.program_id(0).to(tl.int64) // BLOCKS
    o_i = (tl.program_id(0) % BLOCKS) * ROWS + tl.arange(0, ROWS)
    o_key = tl.arange(0, GROUPS)[:, None] * PART + tl.arange(0, PART)[None, :]
    o_j = o_key[:, None, :]
    o_c = tl.arange(0, CHUNK)
    m_i = o_i < N
    m = m_i[None, :, None] & (o_j < N)

    # [GROUPS, ROWS, PART]
    logits = tl.zeros([GROUPS, ROWS, PART], tl.float32)
    for c in range(0, QK, CHUNK):
        b_q = _rows_of(q_ptr + i_b * N * QK, o_i, c + o_c, m_i, QK)
        b_q = tl.broadcast_to(b_q[None, :, :], (GROUPS, ROWS, CHUNK))
        p_k = k_ptr + i_b * N * QK + (o_key[:, :, None] * QK + (c + o_c)[None, None, :])
        b_k = tl.load(p_k, mask=(o_key < N)[:, :, None] & (c + o_c < QK)[None, None, :], other=0.0)
        logits = tl.dot(b_q, tl.permute(b_k, (0, 2, 1)), logits, input_precision=PRECISION)
    logits = logits * SCALE + _bias(
        table_ptr, i_b, o_i[None, :, None], o_j, DOWN, ACROSS, SHIFT, HEADS, BIAS_HEADS, WINDOW, MASKED
    )
    if HAS_CARRY:
        p_carry = carry_ptr + i_b * N * N + (o_i[None, :, None] * N + o_j)
        logits += tl.load(p_carry, mask=m, other=0.0).to(tl.float32)
    logits = tl.where(o_j < N, logits, float("-inf"))
    top = tl.max(tl.max(logits, 2), 0)
    logits -= top[None, :, None]
    total = tl.sum(tl.sum(tl.exp(logits), 2), 0)
    tl.store(lse_ptr + i_b * N + o_i, top + tl.log(total), mask=m_i)

    o_new = o_i[None, :, None] * KEEP
    if KEEP < N:
        taken, place = _select(logits, o_j < N, KEEP, HALF)
        if SAVE:
            o_byte = (tl.arange(0, GROUPS) * (PART // 8))[:, None, None] + tl.arange(0, PART // 8)[None, None, :]
            p_bits = bits_ptr + i_b * N * (COLUMNS // 8) + (o_i[None, :, None] * (COLUMNS // 8) + o_byte)
            tl.store(p_bits, _bits(taken), mask=m_i[None, :, None])
        m = taken & m_i[None, :, None]
        o_new += place
        o_index = tl.broadcast_to(o_j, (GROUPS, ROWS, PART))
        tl.store(new_index_ptr + i_b * N * KEEP + o_new, o_index.to(tl.int16), mask=m)
    else:
        o_new += o_j
    tl.store(new_carry_ptr + i_b * N * KEEP + o_new, logits.to(new_carry_ptr.dtype.element_ty), mask=m)

    weights = tl.where(m, tl.exp(logits), 0.0).to(v_ptr.dtype.element_ty)
    o_pixel = _pixels(i_b // HEADS, o_i, DOWN, ACROSS, SHIFT, WINDOW)
    p_out = out_ptr + (o_pixel * HEADS + i_b % HEADS)[:, None] * D
    for c in range(0, S, 16):
        o_d = c + tl.arange(0, 16)
        p_v = v_ptr + i_b * N * S + (o_key[:, :, None] * S + o_d[None, None, :])
        b_v = tl.load(p_v, mask=(o_key < N)[:, :, None] & (o_d < S)[None, None, :], other=0.0)
        b_out = tl.sum(tl.dot(weights, b_v, input_precision=PRECISION), 0) / total[:, None]
        m_out = m_i[:, None] & (o_d < D)[None, :]
        tl.store(p_out + o_d[None, :], b_out.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def _gathered(ptr, o_j, o_c, S: tl.constexpr):
    """[rows, columns, channels] in float32: for every kept entry some channels of its key or value."""
    return tl.load(ptr + (o_j[:, :, None] * S + o_c[None, None, :])).to(tl.float32)


@triton.jit
def _kept_logits(
    q_ptr, k_ptr, table_ptr, carry_ptr, o_kept, m, o_i, o_j, m_i,
    S: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """[rows, columns] logits of kept entries, carry included; -inf where masked."""
    o_c = tl.arange(0, CHUNK)
    logits = tl.load(table_ptr + _relative(o_i[:, None], o_j, WINDOW), mask=m, other=0.0)
    logits += tl.load(carry_ptr + o_kept, mask=m, other=0.0).to(tl.float32)
    for c in tl.static_range(0, S, CHUNK):
        b_q = _rows_of(q_ptr, o_i, c + o_c, m_i, S).to(tl.float32) * SCALE
        b_k = _gathered(k_ptr, o_j, c + o_c, S)
        logits += tl.sum(b_q[:, None, :] * b_k, 2)
    return tl.where(m, logits, float("-inf"))


@triton.jit(do_not_specialize=PER_IMAGE)
def sparse(
    q_ptr,  # [B, N, S]
    k_ptr,  # [B, N, S]
    v_ptr,  # [B, N, S]
    table_ptr,  # [BIAS_HEADS, (2 WINDOW - 1)^2]
    carry_ptr,  # [B, N, KEPT]
    index_ptr,  # [B, N, KEPT]
    out_ptr,  # image, HEADS * D channels
    lse_ptr,  # [B, N]
    new_carry_ptr,  # [B, N, KEEP]
    new_index_ptr,  # [B, N, KEEP]
    bits_ptr,  # [B, N, COLUMNS / 8]
    DOWN,
    ACROSS,
    SHIFT,
    HEADS: tl.constexpr,
    BIAS_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    KEPT: tl.constexpr,
    KEEP: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SAVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A layer of kept entries. CHUNK channels of a key or value are one 16-byte word, read by one thread."""
    SPAN: tl.constexpr = 2 * WINDOW - 1
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    HALF: tl.constexpr = new_carry_ptr.dtype.element_ty == tl.float16
    i_b = tl.program_id(0).to(tl.int64) // BLOCKS
    o_i = (tl.program_id(0) % BLOCKS) * ROWS + tl.arange(0, ROWS)
    o_t = tl.arange(0, COLUMNS)
    m_i = o_i < N
    m = m_i[:, None] & (o_t < KEPT)[None, :]
    o_kept = o_i[:, None] * KEPT + o_t[None, :]
    o_j = tl.load(index_ptr + i_b * N * KEPT + o_kept, mask=m, other=0).to(tl.int32)

    logits = _kept_logits(
        q_ptr + i_b * N * S, k_ptr + i_b * N * S, table_ptr + (i_b % BIAS_HEADS) * SPAN * SPAN,
        carry_ptr + i_b * N * KEPT, o_kept, m, o_i, o_j, m_i, S, WINDOW, SCALE, CHUNK,
    )  # fmt: skip
    logits = tl.where(m_i[:, None], logits, 0.0)
    top = tl.max(logits, 1)
    logits -= top[:, None]
    weights = tl.exp(logits)
    total = tl.sum(weights, 1)
    tl.store(lse_ptr + i_b * N + o_i, top + tl.log(total), mask=m_i)

    o_new = o_kept
    if KEEP < KEPT:
        taken, place = _select(logits[None, :, :], (o_t < KEPT)[None, None, :], KEEP, HALF)
        if SAVE:
            o_byte = (tl.arange(0, COLUMNS // 8))[None, None, :]
            p_bits = bits_ptr + i_b * N * (COLUMNS // 8) + (o_i[None, :, None] * (COLUMNS // 8) + o_byte)
            tl.store(p_bits, _bits(taken), mask=m_i[None, :, None])
        m = tl.reshape(taken, [ROWS, COLUMNS]) & m_i[:, None]
        o_new = o_i[:, None] * KEEP + tl.reshape(place, [ROWS, COLUMNS])
        tl.store(new_index_ptr + i_b * N * KEEP + o_new, o_j.to(tl.int16), mask=m)
        o_j = tl.where(m, o_j, 0)  # values that were cut are not read
    tl.store(new_carry_ptr + i_b * N * KEEP + o_new, logits.to(new_carry_ptr.dtype.element_ty), mask=m)

    weights = tl.where(m, weights, 0.0) / total[:, None]
    o_pixel = _pixels(i_b // HEADS, o_i, DOWN, ACROSS, SHIFT, WINDOW)
    p_out = out_ptr + (o_pixel * HEADS + i_b % HEADS)[:, None] * D
    for c in tl.static_range(0, S, CHUNK):
        o_c = c + tl.arange(0, CHUNK)
        b_out = tl.sum(weights[:, :, None] * _gathered(v_ptr + i_b * N * S, o_j, o_c, S), 1)
        m_out = m_i[:, None] & (o_c < D)[None, :]
        tl.store(p_out + o_c[None, :], b_out.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=PER_IMAGE)
def sparse_backward(
    q_ptr,  # [B, N, S]
    k_ptr,  # [B, N, S]
    v_ptr,  # [B, N, S]
    table_ptr,  # [BIAS_HEADS, (2 WINDOW - 1)^2]
    carry_ptr,  # [B, N, KEPT]
    index_ptr,  # [B, N, KEPT]
    lse_ptr,  # [B, N]
    delta_ptr,  # image, HEADS channels: product of the output with its gradient
    bits_ptr,  # [B, N, COLUMNS / 8]
    d_out_ptr,  # image, HEADS * D channels
    d_new_ptr,  # [B, N, KEEP]
    d_q_ptr,  # [B, N, S]
    d_k_ptr,  # [B, N, S] zero before
    d_v_ptr,  # [B, N, S] zero before
    d_table_ptr,  # [COPIES, BIAS_HEADS, (2 WINDOW - 1)^2] zero before
    d_carry_ptr,  # [B, N, KEPT]
    DOWN,
    ACROSS,
    SHIFT,
    HEADS: tl.constexpr,
    BIAS_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    KEPT: tl.constexpr,
    KEEP: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_NEW: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradients of `sparse`. Keys, values and the table get theirs from many queries, by atomic additions."""
    SPAN: tl.constexpr = 2 * WINDOW - 1
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    i_b = tl.program_id(0).to(tl.int64) // BLOCKS
    o_i = (tl.program_id(0) % BLOCKS) * ROWS + tl.arange(0, ROWS)
    o_t = tl.arange(0, COLUMNS)
    m_i = o_i < N
    m = m_i[:, None] & (o_t < KEPT)[None, :]
    o_kept = o_i[:, None] * KEPT + o_t[None, :]
    o_j = tl.load(index_ptr + i_b * N * KEPT + o_kept, mask=m, other=0).to(tl.int32)
    o_pixel = _pixels(i_b // HEADS, o_i, DOWN, ACROSS, SHIFT, WINDOW) * HEADS + i_b % HEADS
    q_ptr += i_b * N * S
    k_ptr += i_b * N * S
    v_ptr += i_b * N * S

    logits = _kept_logits(
        q_ptr, k_ptr, table_ptr + (i_b % BIAS_HEADS) * SPAN * SPAN, carry_ptr + i_b * N * KEPT, o_kept, m, o_i, o_j,
        m_i, S, WINDOW, SCALE, CHUNK,
    )  # fmt: skip
    lse = tl.load(lse_ptr + i_b * N + o_i, mask=m_i, other=0.0)
    delta = tl.load(delta_ptr + o_pixel, mask=m_i, other=0.0)
    weights = tl.exp(logits - lse[:, None])
    m_new = m
    o_new = o_kept
    if KEEP < KEPT:
        o_bits = o_i[:, None] * (COLUMNS // 8) + (o_t // 8)[None, :]
        byte = tl.load(bits_ptr + i_b * N * (COLUMNS // 8) + o_bits, mask=m, other=0)
        bit = (byte.to(tl.int32) >> (o_t % 8)[None, :]) & 1
        m_new = m & (bit > 0)
        o_new = o_i[:, None] * KEEP + tl.cumsum(bit, 1) - 1

    # gradient of the attention weights, then of the logits
    d_weights = tl.zeros([ROWS, COLUMNS], tl.float32)
    for c in tl.static_range(0, S, CHUNK):
        o_c = c + tl.arange(0, CHUNK)
        b_d_out = _rows_of(d_out_ptr, o_pixel, o_c, m_i, D).to(tl.float32)
        d_weights += tl.sum(b_d_out[:, None, :] * _gathered(v_ptr, o_j, o_c, S), 2)
    d_logits = weights * (tl.where(m_new, d_weights, 0.0) - delta[:, None])
    if HAS_NEW:
        d_logits += tl.load(d_new_ptr + i_b * N * KEEP + o_new, mask=m_new, other=0.0)
    tl.store(d_carry_ptr + i_b * N * KEPT + o_kept, d_logits, mask=m)
    i_table = (tl.program_id(0) % COPIES) * BIAS_HEADS + (i_b % BIAS_HEADS).to(tl.int32)
    o_table = _relative(o_i[:, None], o_j, WINDOW)
    tl.atomic_add(d_table_ptr + i_table * SPAN * SPAN + o_table, d_logits, mask=m, sem="relaxed")

    weights = tl.where(m_new, weights, 0.0)
    d_logits = tl.where(m, d_logits * SCALE, 0.0)
    d_q_ptr += i_b * N * S
    d_k_ptr += i_b * N * S
    d_v_ptr += i_b * N * S
    for c in tl.static_range(0, S, CHUNK):
        o_c = c + tl.arange(0, CHUNK)
        m_c = (o_c < D)[None, None, :]
        o_key = o_j[:, :, None] * S + o_c[None, None, :]
        b_q = _rows_of(q_ptr, o_i, o_c, m_i, S).to(tl.float32)
        b_d_out = _rows_of(d_out_ptr, o_pixel, o_c, m_i, D).to(tl.float32)
        b_d_q = tl.sum(d_logits[:, :, None] * _gathered(k_ptr, o_j, o_c, S), 1)
        tl.store(d_q_ptr + (o_i[:, None] * S + o_c[None, :]), b_d_q, mask=m_i[:, None])
        d_key = d_logits[:, :, None] * b_q[:, None, :]
        tl.atomic_add(d_k_ptr + o_key, d_key, mask=m[:, :, None] & m_c, sem="relaxed")
        d_value = weights[:, :, None] * b_d_out[:, None, :]
        tl.atomic_add(d_v_ptr + o_key, d_value, mask=m_new[:, :, None] & m_c, sem="relaxed")


@triton.jit
def _gradients(
    b_q, b_k, b_v, b_d_out, table_ptr, carry_ptr, lse_ptr, delta_ptr, bits_ptr, d_new_ptr, before,
    i_b, o_i, m_i, o_j, o_pixel, DOWN, ACROSS, SHIFT,
    HEADS: tl.constexpr, BIAS_HEADS: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr, WINDOW: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, HAS_CARRY: tl.constexpr,
    HAS_NEW: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One tile [queries, keys] of a layer with all keys: weights after the cut, gradient of the logits.

    before: [queries] entries taken among the keys before this tile; returned for the tile after it.
    """
    m = m_i[:, None] & (o_j < N)[None, :]
    logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * SCALE
    logits += _bias(table_ptr, i_b, o_i[:, None], o_j[None, :], DOWN, ACROSS, SHIFT, HEADS, BIAS_HEADS, WINDOW, MASKED)
    if HAS_CARRY:
        p_carry = carry_ptr + i_b * N * N + (o_i[:, None] * N + o_j[None, :])
        logits += tl.load(p_carry, mask=m, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + i_b * N + o_i, mask=m_i, other=0.0)
    delta = tl.load(delta_ptr + o_pixel, mask=m_i, other=0.0)
    weights = tl.where(m, tl.exp(logits - lse[:, None]), 0.0)
    d_weights = tl.dot(b_d_out, tl.trans(b_v), input_precision=PRECISION)
    m_new = m
    o_new = o_i[:, None] * KEEP + o_j[None, :]
    if KEEP < N:
        p_bits = bits_ptr + i_b * N * BYTES + (o_i[:, None] * BYTES + (o_j // 8)[None, :])
        bit = (tl.load(p_bits, mask=m, other=0).to(tl.int32) >> (o_j % 8)[None, :]) & 1
        m_new = bit > 0
        o_new = o_i[:, None] * KEEP + before[:, None] + tl.cumsum(bit, 1) - 1
        before += tl.sum(bit, 1)
        d_weights = tl.where(m_new, d_weights, 0.0)
    d_logits = weights * (d_weights - delta[:, None])
    if HAS_NEW:
        d_logits += tl.load(d_new_ptr + i_b * N * KEEP + o_new, mask=m_new, other=0.0)
    return tl.where(m_new, weights, 0.0), d_logits, before


@triton.jit(do_not_specialize=PER_IMAGE)
def rows_backward(
    q_ptr,  # [B, N, QK]
    k_ptr,  # [B, N, QK]
    v_ptr,  # [B, N, S]
    table_ptr,  # [BIAS_HEADS, (2 WINDOW - 1)^2]
    carry_ptr,  # [B, N, N]
    lse_ptr,  # [B, N]
    delta_ptr,  # image, HEADS channels
    bits_ptr,  # [B, N, BYTES]
    d_out_ptr,  # image, HEADS * D channels
    d_new_ptr,  # [B, N, KEEP]
    before_ptr,  # [B, N, tiles of keys] entries taken before each tile: written here, read by the other two kernels
    d_q_ptr,  # [B, N, QK]
    d_carry_ptr,  # [B, N, N]
    DOWN,
    ACROSS,
    SHIFT,
    HEADS: tl.constexpr,
    BIAS_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    QK: tl.constexpr,
    S: tl.constexpr,
    KEEP: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    HAS_NEW: tl.constexpr,
    BYTES: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of `dense` and `rows` for TILE queries: of q and of the carry."""
    BLOCKS: tl.constexpr = (N + TILE - 1) // TILE
    i_b = tl.program_id(0).to(tl.int64) // BLOCKS
    o_i = (tl.program_id(0) % BLOCKS) * TILE + tl.arange(0, TILE)
    o_w = tl.arange(0, WIDTH)
    o_d = tl.arange(0, CHANNELS)
    m_i = o_i < N
    o_pixel = _pixels(i_b // HEADS, o_i, DOWN, ACROSS, SHIFT, WINDOW) * HEADS + i_b % HEADS
    b_q = _rows_of(q_ptr + i_b * N * QK, o_i, o_w, m_i, QK)
    b_d_out = _rows_of(d_out_ptr, o_pixel, o_d, m_i, D)
    before = tl.zeros([TILE], tl.int32)
    b_d_q = tl.zeros([TILE, WIDTH], tl.float32)
    for i_tile in range(BLOCKS):
        o_j = i_tile * TILE + tl.arange(0, TILE)
        b_k = _rows_of(k_ptr + i_b * N * QK, o_j, o_w, o_j < N, QK)
        b_v = _rows_of(v_ptr + i_b * N * S, o_j, o_d, o_j < N, S)
        if KEEP < N:
            tl.store(before_ptr + i_b * N * BLOCKS + (o_i * BLOCKS + i_tile), before, mask=m_i)
        _, d_logits, before = _gradients(
            b_q, b_k, b_v, b_d_out, table_ptr, carry_ptr, lse_ptr, delta_ptr, bits_ptr, d_new_ptr, before,
            i_b, o_i, m_i, o_j, o_pixel, DOWN, ACROSS, SHIFT, HEADS, BIAS_HEADS, N, KEEP, WINDOW, SCALE, PRECISION,
            MASKED, HAS_CARRY, HAS_NEW, BYTES,
        )  # fmt: skip
        if HAS_CARRY:
            p_carry = d_carry_ptr + i_b * N * N + (o_i[:, None] * N + o_j[None, :])
            tl.store(p_carry, d_logits, mask=m_i[:, None] & (o_j < N)[None, :])
        b_d_q = tl.dot((d_logits * SCALE).to(b_k.dtype), b_k, b_d_q, input_precision=PRECISION)
    p_d_q = d_q_ptr + i_b * N * QK + (o_i[:, None] * QK + o_w[None, :])
    tl.store(p_d_q, b_d_q.to(d_q_ptr.dtype.element_ty), mask=m_i[:, None] & (o_w < QK)[None, :])


@triton.jit(do_not_specialize=PER_IMAGE)
def keys_backward(
    q_ptr,  # as in rows_backward, up to before_ptr
    k_ptr,
    v_ptr,
    table_ptr,
    carry_ptr,
    lse_ptr,
    delta_ptr,
    bits_ptr,
    d_out_ptr,
    d_new_ptr,
    before_ptr,
    d_k_ptr,  # [B, N, QK]
    d_v_ptr,  # [B, N, S]
    DOWN,
    ACROSS,
    SHIFT,
    HEADS: tl.constexpr,
    BIAS_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    QK: tl.constexpr,
    S: tl.constexpr,
    KEEP: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    HAS_NEW: tl.constexpr,
    BYTES: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of `dense` and `rows` for TILE keys and values."""
    BLOCKS: tl.constexpr = (N + TILE - 1) // TILE
    i_b = tl.program_id(0).to(tl.int64) // BLOCKS
    i_tile = tl.program_id(0) % BLOCKS
    o_j = i_tile * TILE + tl.arange(0, TILE)
    o_w = tl.arange(0, WIDTH)
    o_d = tl.arange(0, CHANNELS)
    m_j = o_j < N
    b_k = _rows_of(k_ptr + i_b * N * QK, o_j, o_w, m_j, QK)
    b_v = _rows_of(v_ptr + i_b * N * S, o_j, o_d, m_j, S)
    b_d_k = tl.zeros([TILE, WIDTH], tl.float32)
    b_d_v = tl.zeros([TILE, CHANNELS], tl.float32)
    for first in range(0, N, TILE):
        o_i = first + tl.arange(0, TILE)
        m_i = o_i < N
        o_pixel = _pixels(i_b // HEADS, o_i, DOWN, ACROSS, SHIFT, WINDOW) * HEADS + i_b % HEADS
        b_q = _rows_of(q_ptr + i_b * N * QK, o_i, o_w, m_i, QK)
        b_d_out = _rows_of(d_out_ptr, o_pixel, o_d, m_i, D)
        before = tl.zeros([TILE], tl.int32)
        if KEEP < N:
            before = tl.load(before_ptr + i_b * N * BLOCKS + (o_i * BLOCKS + i_tile), mask=m_i, other=0)
        weights, d_logits, _ = _gradients(
            b_q, b_k, b_v, b_d_out, table_ptr, carry_ptr, lse_ptr, delta_ptr, bits_ptr, d_new_ptr, before,
            i_b, o_i, m_i, o_j, o_pixel, DOWN, ACROSS, SHIFT, HEADS, BIAS_HEADS, N, KEEP, WINDOW, SCALE, PRECISION,
            MASKED, HAS_CARRY, HAS_NEW, BYTES,
        )  # fmt: skip
        b_d_k = tl.dot(tl.trans((d_logits * SCALE).to(b_q.dtype)), b_q, b_d_k, input_precision=PRECISION)
        b_d_v = tl.dot(tl.trans(weights.to(b_d_out.dtype)), b_d_out, b_d_v, input_precision=PRECISION)
    p_d_k = d_k_ptr + i_b * N * QK + (o_j[:, None] * QK + o_w[None, :])
    p_d_v = d_v_ptr + i_b * N * S + (o_j[:, None] * S + o_d[None, :])
    tl.store(p_d_k, b_d_k.to(d_k_ptr.dtype.element_ty), mask=m_j[:, None] & (o_w < QK)[None, :])
    tl.store(p_d_v, b_d_v.to(d_v_ptr.dtype.element_ty), mask=m_j[:, None] & (o_d < S)[None, :])


@triton.jit(do_not_specialize=PER_IMAGE)
def table_backward(
    q_ptr,  # as in rows_backward, up to before_ptr
    k_ptr,
    v_ptr,
    table_ptr,
    carry_ptr,
    lse_ptr,
    delta_ptr,
    bits_ptr,
    d_out_ptr,
    d_new_ptr,
    before_ptr,
    d_table_ptr,  # [BIAS_HEADS, (2 WINDOW - 1)^2] zero before
    FLAT,  # B
    DOWN,
    ACROSS,
    SHIFT,
    HEADS: tl.constexpr,
    BIAS_HEADS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    QK: tl.constexpr,
    S: tl.constexpr,
    KEEP: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    HAS_NEW: tl.constexpr,
    BYTES: tl.constexpr,
    ROUNDS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradient of the table by `dense` and `rows`: one tile of the map summed over windows first, then by offset."""
    SPAN: tl.constexpr = 2 * WINDOW - 1
    BLOCKS: tl.constexpr = (N + TILE - 1) // TILE
    i_tile = tl.program_id(0) % BLOCKS
    i_rows = (tl.program_id(0) // BLOCKS) % BLOCKS
    i_part = tl.program_id(0) // (BLOCKS * BLOCKS)  # which bias head, and which ROUNDS of its window-heads
    o_i = i_rows * TILE + tl.arange(0, TILE)
    o_j = i_tile * TILE + tl.arange(0, TILE)
    o_w = tl.arange(0, WIDTH)
    o_d = tl.arange(0, CHANNELS)
    total = tl.zeros([TILE, TILE], tl.float32)
    for i_round in range(ROUNDS):
        i_b = (((i_part // BIAS_HEADS) * ROUNDS + i_round) * BIAS_HEADS + i_part % BIAS_HEADS).to(tl.int64)
        left = FLAT - i_b + tl.zeros([TILE], tl.int64)  # a tensor: Triton 3.9's interpreter has no scalar truth values
        m_i = (o_i < N) & (left > 0)
        m_j = (o_j < N) & (left > 0)
        o_pixel = _pixels(i_b // HEADS, o_i, DOWN, ACROSS, SHIFT, WINDOW) * HEADS + i_b % HEADS
        b_q = _rows_of(q_ptr + i_b * N * QK, o_i, o_w, m_i, QK)
        b_k = _rows_of(k_ptr + i_b * N * QK, o_j, o_w, m_j, QK)
        b_v = _rows_of(v_ptr + i_b * N * S, o_j, o_d, m_j, S)
        b_d_out = _rows_of(d_out_ptr, o_pixel, o_d, m_i, D)
        before = tl.zeros([TILE], tl.int32)
        if KEEP < N:
            before = tl.load(before_ptr + i_b * N * BLOCKS + (o_i * BLOCKS + i_tile), mask=m_i, other=0)
        _, d_logits, _ = _gradients(
            b_q, b_k, b_v, b_d_out, table_ptr, carry_ptr, lse_ptr, delta_ptr, bits_ptr, d_new_ptr, before,
            i_b, o_i, m_i, o_j, o_pixel, DOWN, ACROSS, SHIFT, HEADS, BIAS_HEADS, N, KEEP, WINDOW, SCALE, PRECISION,
            MASKED, HAS_CARRY, HAS_NEW, BYTES,
        )  # fmt: skip
        total += d_logits
    p_table = d_table_ptr + (i_part % BIAS_HEADS) * SPAN * SPAN + _relative(o_i[:, None], o_j[None, :], WINDOW)
    tl.atomic_add(p_table, total, mask=(o_i < N)[:, None] & (o_j < N)[None, :], sem="relaxed")
