"""attention in Triton, on any vendor's GPU: kernels that read packed qkv by its strides and write each number once.

Needs the package triton, so nothing imports this file but triton_host.py, when it first runs. Scores are kept in units
of log2 (`factor` is scale * log2(e)); sums, softmax and accumulators are float32, and so are float32 products.
`length` stands for the length of all sequences, or, with cu_seqlens, the most tokens that a sequence may have.
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
def _scores(
    a,  # [A, D]: queries, or keys
    b,  # [B, D]: the others
    factor,
    there,  # [A, B], or what can be broadcast to it: whether the sequence has such a key
):  # [A, B]
    """Scores in units of log2, -inf where there is no key."""
    return tl.where(there, _dot(a, tl.trans(b)) * factor, float("-inf"))


@triton.jit(do_not_specialize=["length", "tokens", "heads"])
def forward(
    qkv,  # [B, L, 3, H, D] or [T, 3, H, D], by strides
    cu_seqlens,  # [S + 1] int32, or None: equal lengths
    out,  # [T, H * D]
    lse,  # [H, T] float32
    factor,
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
        p = tl.exp2(s - most[:, None])
        total = tl.sum(p, 1)
        mixed = _dot(p.to(q.dtype), _read(at + part_stride, token_stride, 0, length, STEP, D))
    else:
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        mixed = tl.zeros([BLOCK, D], tl.float32)
        for key in range(0, length, STEP):
            s = _scores(q, _read(at, token_stride, key, length, STEP, D), factor, (key + keys < length)[None, :])
            before, most = most, tl.maximum(most, tl.max(s, 1))
            shrink = tl.exp2(before - most)
            p = tl.exp2(s - most[:, None])
            total = total * shrink + tl.sum(p, 1)
            v = _read(at + part_stride, token_stride, key, length, STEP, D)
            mixed = mixed * shrink[:, None] + _dot(p.to(q.dtype), v)
    row = heads * D
    _write(out + first * row + head * D, row, begin, length, mixed / total[:, None], BLOCK, D)
    rows = begin + tl.arange(0, BLOCK)
    log_sum = (most + tl.log2(total)) * LN_2
    tl.store(lse + head.to(tl.int64) * tokens + first + rows, log_sum, mask=rows < length)


@triton.jit
def _queries(
    q_at,  # of the sequence and head, like the others
    grad_at,
    out_at,
    lse_at,
    token_stride,
    grad_token_stride,
    row,
    begin,
    length,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """What the backward needs of a block of queries: q, the output's gradient, its product with the output, the
    log-sum-exp in units of log2."""
    q = _read(q_at, token_stride, begin, length, BLOCK, D)
    grad = _read(grad_at, grad_token_stride, begin, length, BLOCK, D)
    out = _read(out_at, row, begin, length, BLOCK, D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    rows = begin + tl.arange(0, BLOCK)
    return q, grad, delta, tl.load(lse_at + rows, mask=rows < length, other=0.0) * LOG2_E


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
    factor,
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

    A program that has all keys at hand makes the queries' gradients in the same pass, from five products; else it needs
    a second pass, over the keys, and seven products.
    """
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
        q, grad, delta, log_sum = _queries(
            q_at, grad_at, out_at, lse_at, token_stride, grad_token_stride, row, query, length, STEP, D
        )
        # keys down, queries across: what is summed over queries then needs no transposition
        p = tl.exp2(_scores(k, q, factor, there) - log_sum[None, :])
        grad_v += _dot(p.to(q.dtype), grad)
        grad_s = (p * (_dot(v, tl.trans(grad)) - delta[None, :])).to(q.dtype)
        grad_k += _dot(grad_s, q)
        if ONE:
            _write(to, 3 * row, query, length, _dot(tl.trans(grad_s), k) * scale, STEP, D)
    _write(to + row, 3 * row, begin, length, grad_k * scale, BLOCK, D)
    _write(to + 2 * row, 3 * row, begin, length, grad_v, BLOCK, D)

    if not ONE:
        own_q, own_grad, own_delta, own_log_sum = _queries(
            q_at, grad_at, out_at, lse_at, token_stride, grad_token_stride, row, begin, length, BLOCK, D
        )
        grad_q = tl.zeros([BLOCK, D], tl.float32)
        for key in range(0, length, STEP):
            keys = _read(k_at, token_stride, key, length, STEP, D)
            values = _read(v_at, token_stride, key, length, STEP, D)
            present = (key + tl.arange(0, STEP) < length)[None, :]
            weights = tl.exp2(_scores(own_q, keys, factor, present) - own_log_sum[:, None])
            grad_scores = weights * (_dot(own_grad, tl.trans(values)) - own_delta[:, None])
            grad_q += _dot(grad_scores.to(own_q.dtype), keys)
        _write(to, 3 * row, begin, length, grad_q * scale, BLOCK, D)
