"""attention in Triton, on any vendor's GPU: kernels that read packed qkv by its strides and write each number once.

Needs the package triton, so triton_host.py imports this file when it first runs. Sums, softmax and accumulators are
float32, and so are float32 products. Scores are kept in units of ln 2, so that a power of 2 is all that softmax takes;
those of float32 tensors are kept as they are, which is more exact. `length` is that of all sequences, or, with
cu_seqlens, the most tokens that a sequence may have.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sequence(
    cu_seqlens,  # [S + 1] int32 or None
    sequence,
    length,
):
    """The first token of a sequence, as a 64-bit number, and how many it has."""
    if cu_seqlens is None:
        return sequence.to(tl.int64) * length, length
    else:
        first = tl.load(cu_seqlens + sequence)
        return first.to(tl.int64), tl.load(cu_seqlens + sequence + 1) - first


@triton.jit
def _read(
    start,  # of the sequence and head
    token_stride,
    begin,  # first row
    length,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):  # [BLOCK, D]
    """Rows begin.. of a sequence, zeros where it ends."""
    rows = begin + tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    at = start + rows.to(tl.int64)[:, None] * token_stride + columns[None, :]
    return tl.load(at, mask=(rows < length)[:, None], other=0.0)


@triton.jit
def _write(
    start,
    token_stride,
    begin,
    length,
    x,  # [BLOCK, D] float32
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """Rows begin.. of a sequence, those that it has."""
    rows = begin + tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    at = start + rows.to(tl.int64)[:, None] * token_stride + columns[None, :]
    tl.store(at, x.to(start.dtype.element_ty), mask=(rows < length)[:, None])


@triton.jit
def _dot(a, b):
    """The product in float32, of float32 inputs too (not tf32)."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _exp(
    x,  # scores
    UNIT: tl.constexpr,
):
    return tl.exp2(x * (UNIT * LOG2_E))


@triton.jit
def _scores(
    a,  # [A, D]: queries, or keys
    b,  # [B, D]: the others
    factor,
    there,  # [A, B], or what can be broadcast to it: whether the sequence has such a key
):  # [A, B]
    """Scores, -inf where there is no key."""
    return tl.where(there, _dot(a, tl.trans(b)) * factor, float("-inf"))


@triton.jit(do_not_specialize=["length", "tokens", "heads"])
def forward(
    qkv,  # [B, L, 3, H, D] or [T, 3, H, D], by strides
    cu_seqlens,  # [S + 1] int32, or None: equal lengths
    out,  # [T, H * D]
    lse,  # [H, T] float32
    scale,
    length,
    tokens,  # T
    heads,  # H
    sequence_stride,  # of qkv, in elements, like the others; 0 with cu_seqlens
    token_stride,
    part_stride,
    head_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # queries of a program
    STEP: tl.constexpr,  # keys at a time
    ONE: tl.constexpr,  # one step holds all keys
):
    """Program (sequence, head, block of queries): the output and the log-sum-exp of its queries."""
    UNIT: tl.constexpr = 1.0 if qkv.dtype.element_ty == tl.float32 else LN_2
    factor = scale * (1.0 / UNIT)
    blocks = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    begin = program % blocks * BLOCK
    head = program // blocks % heads
    sequence = program // blocks // heads
    first, length = _sequence(cu_seqlens, sequence, length)
    if begin >= length:
        return
    at = qkv + sequence.to(tl.int64) * sequence_stride + head.to(tl.int64) * head_stride
    if cu_seqlens is not None:
        at += first * token_stride
    q = _read(at, token_stride, begin, length, BLOCK, D)
    at += part_stride
    keys = tl.arange(0, STEP)
    if ONE:
        s = _scores(q, _read(at, token_stride, 0, length, STEP, D), factor, (keys < length)[None, :])
        most = tl.max(s, 1)
        p = _exp(s - most[:, None], UNIT)
        total = tl.sum(p, 1)
        mixed = _dot(p.to(q.dtype), _read(at + part_stride, token_stride, 0, length, STEP, D))
    else:
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        mixed = tl.zeros([BLOCK, D], tl.float32)
        for key in range(0, length, STEP):
            s = _scores(q, _read(at, token_stride, key, length, STEP, D), factor, (key + keys < length)[None, :])
            before, most = most, tl.maximum(most, tl.max(s, 1))
            shrink = _exp(before - most, UNIT)
            p = _exp(s - most[:, None], UNIT)
            total = total * shrink + tl.sum(p, 1)
            v = _read(at + part_stride, token_stride, key, length, STEP, D)
            mixed = mixed * shrink[:, None] + _dot(p.to(q.dtype), v)
    row = heads * D
    _write(out + first * row + head * D, row, begin, length, mixed / total[:, None], BLOCK, D)
    rows = begin + tl.arange(0, BLOCK)
    log_sum = most * UNIT + tl.log2(total) * LN_2
    tl.store(lse + head.to(tl.int64) * tokens + first + rows, log_sum, mask=rows < length)


@triton.jit
def _delta(
    grad,  # [BLOCK, D] of the output
    out_at,  # of the sequence and head
    row,
    begin,
    length,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):  # [BLOCK] float32
    """The sum of weights times their gradients of each query: the output times its gradient."""
    out = _read(out_at, row, begin, length, BLOCK, D)
    return tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)


@triton.jit
def _log_sums(
    lse_at,  # of the sequence and head
    begin,
    length,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # [BLOCK]
    """The log-sum-exp of queries, in units of scores."""
    rows = begin + tl.arange(0, BLOCK)
    return tl.load(lse_at + rows, mask=rows < length, other=0.0) * (1.0 / UNIT)


@triton.jit(do_not_specialize=["length", "tokens", "heads"])
def backward(
    qkv,  # [B, L, 3, H, D] or [T, 3, H, D], by strides
    cu_seqlens,  # [S + 1] int32, or None: equal lengths
    out,  # [T, H * D]
    lse,  # [H, T] float32
    grad_out,  # [B, L, H * D] or [T, H * D], by strides
    grad_qkv,  # [T, 3, H, D]
    grad_sequence_stride,  # of grad_out, in elements, like the others; 0 with cu_seqlens
    grad_token_stride,
    scale,
    length,
    tokens,  # T
    heads,  # H
    sequence_stride,  # of qkv; 0 with cu_seqlens
    token_stride,
    part_stride,
    head_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # keys, and queries, of a program
    STEP: tl.constexpr,  # queries, or keys, at a time
    ONE: tl.constexpr,  # a block holds all keys
):
    """Program (sequence, head, block): the gradients of the block's keys and values, and of its queries.

    A program that has all keys at hand makes the queries' gradients in the same pass, from five products, and does not
    read the output; else it needs a second pass, over the keys, and seven products.
    """
    UNIT: tl.constexpr = 1.0 if qkv.dtype.element_ty == tl.float32 else LN_2
    factor = scale * (1.0 / UNIT)
    blocks = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    begin = program % blocks * BLOCK
    head = program // blocks % heads
    sequence = program // blocks // heads
    first, length = _sequence(cu_seqlens, sequence, length)
    if begin >= length:
        return
    row = heads * D
    q_at = qkv + sequence.to(tl.int64) * sequence_stride + head.to(tl.int64) * head_stride
    grad_at = grad_out + sequence.to(tl.int64) * grad_sequence_stride + head * D
    if cu_seqlens is not None:
        q_at += first * token_stride
        grad_at += first * grad_token_stride
    k_at = q_at + part_stride
    v_at = k_at + part_stride
    out_at = out + first * row + head * D
    lse_at = lse + head.to(tl.int64) * tokens + first
    to = grad_qkv + first * (3 * row) + head * D

    k = _read(k_at, token_stride, begin, length, BLOCK, D)
    v = _read(v_at, token_stride, begin, length, BLOCK, D)
    there = (begin + tl.arange(0, BLOCK) < length)[:, None]
    grad_k = tl.zeros([BLOCK, D], tl.float32)
    grad_v = tl.zeros([BLOCK, D], tl.float32)
    for query in range(0, STEP if ONE and STEP == BLOCK else length, STEP):
        q = _read(q_at, token_stride, query, length, STEP, D)
        grad = _read(grad_at, grad_token_stride, query, length, STEP, D)
        # keys down, queries across: what is summed over queries then needs no transposition
        log_sum = _log_sums(lse_at, query, length, UNIT, STEP)
        p = _exp(_scores(k, q, factor, there) - log_sum[None, :], UNIT)
        if ONE:
            p /= tl.sum(p, 0)[None, :]  # rid of what rounding the log-sum-exp cost: a lone key weighs 1
        grad_v += _dot(p.to(q.dtype), grad)
        grad_p = _dot(v, tl.trans(grad))
        delta = tl.sum(p * grad_p, 0) if ONE else _delta(grad, out_at, row, query, length, STEP, D)
        grad_s = (p * (grad_p - delta[None, :])).to(q.dtype)
        grad_k += _dot(grad_s, q)
        if ONE:
            _write(to, 3 * row, query, length, _dot(tl.trans(grad_s), k) * scale, STEP, D)
    _write(to + row, 3 * row, begin, length, grad_k * scale, BLOCK, D)
    _write(to + 2 * row, 3 * row, begin, length, grad_v, BLOCK, D)

    if not ONE:
        own_q = _read(q_at, token_stride, begin, length, BLOCK, D)
        own_grad = _read(grad_at, grad_token_stride, begin, length, BLOCK, D)
        own_delta = _delta(own_grad, out_at, row, begin, length, BLOCK, D)
        own_log_sum = _log_sums(lse_at, begin, length, UNIT, BLOCK)
        grad_q = tl.zeros([BLOCK, D], tl.float32)
        for key in range(0, length, STEP):
            keys = _read(k_at, token_stride, key, length, STEP, D)
            values = _read(v_at, token_stride, key, length, STEP, D)
            present = (key + tl.arange(0, STEP) < length)[None, :]
            weights = _exp(_scores(own_q, keys, factor, present) - own_log_sum[:, None], UNIT)
            grad_weights = _dot(own_grad, tl.trans(values))
            grad_q += _dot((weights * (grad_weights - own_delta[:, None])).to(own_q.dtype), keys)
        _write(to, 3 * row, begin, length, grad_q * scale, BLOCK, D)
