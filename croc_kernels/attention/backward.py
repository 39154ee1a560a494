"""Backward kernels of mixed attention. The mathematics is in reference.py."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, replayed
from ..ops import empty_heads_last
from . import config, operands
from .config import LOG2_E
from .hopper_backward import KERNELS, hopper_bwd
from .tiles import bounded, hide, load_tile, products, store_tile, tile_range

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=["num_queries"])
def _delta_kernel(
    out_ptr, grad_out_ptr, grad_lse_ptr, delta_ptr, strides, num_queries,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of delta, sum(out * grad_out) - grad_lse * log2(e); grid = (tiles * B * H,).

    The log-sum-exp is to base 2, so its derivative in the natural scores carries a log2(e).
    """
    o_b, o_h, o_l, g_b, g_h, g_l, l_b, l_h, l_l = strides
    tiles = tl.cdiv(num_queries, BLOCK_M)
    row = tl.program_id(0) % tiles * BLOCK_M
    plane = tl.program_id(0) // tiles
    batch, head = tl.cast(plane // HEADS, tl.int64), tl.cast(plane % HEADS, tl.int64)
    offs, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    rows = row + offs
    inside = rows < num_queries
    keep = inside[:, None] & (cols < D)[None, :]
    first = tl.cast(row, tl.int64)
    o = out_ptr + batch * o_b + head * o_h + first * o_l + offs[:, None] * o_l + cols[None, :]
    g = grad_out_ptr + batch * g_b + head * g_h + first * g_l + offs[:, None] * g_l + cols[None, :]
    o, g = tl.load(o, mask=keep, other=0.0), tl.load(g, mask=keep, other=0.0)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        pointers = grad_lse_ptr + batch * l_b + head * l_h + first * l_l + offs * l_l
        delta -= tl.load(pointers, mask=inside, other=0.0) * _LOG2_E
    tl.store(delta_ptr + tl.cast(plane, tl.int64) * num_queries + rows, delta, mask=inside)


@triton.jit
def _score_gradient(scores, grad_weights, lse, delta, outer, HAS_SOFTCAP: tl.constexpr):
    """Softmax weights and the gradient of the raw scores, without the factor ``scale``."""
    weights = tl.exp2(scores * outer - lse)
    gradient = weights * (grad_weights - delta)
    if HAS_SOFTCAP:
        # A hidden score is -inf here, not a tanh: its weight is 0, and 0 * inf must stay 0.
        gradient = tl.where(weights > 0.0, gradient * (1.0 - scores * scores), 0.0)
    return weights, gradient


@triton.jit
def _row_statistics(lse_base, delta_base, rows, keep):
    """Log-sum-exp and delta of some rows; both 0 for a row that sees nothing."""
    lse = tl.load(lse_base + rows, mask=keep, other=0.0)
    delta = tl.load(delta_base + rows, mask=keep, other=0.0)
    sees = lse > float("-inf")
    return tl.where(sees, lse, 0.0), tl.where(sees, delta, 0.0), sees


@triton.jit
def _key_gradients(
    dk1, dk2, dv1, dv2, k1, k2, v1, v2, key_low, key_high, q_base, g_base, lse_base, delta_base,
    q_l, g_l, first, full, end_full, past, low, high, inner, outer,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, ALL_MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the row tiles [first, past) of one query head give to a tile of keys and values."""
    offs = tl.arange(0, BLOCK_M)
    cols1, cols2 = tl.arange(0, D1), D1 + tl.arange(0, D2 if D2 > 0 else 16)
    for m in tl.range(first, past, BLOCK_M):
        m = tl.multiple_of(m, BLOCK_M)
        rows = m + offs
        keep = (rows >= low) & (rows < high)
        lse, delta, sees = _row_statistics(lse_base, delta_base, rows, keep)
        if ALL_MASKED:
            keep = keep & sees
        q1 = load_tile(q_base, m, offs, cols1, q_l, keep)
        q2 = load_tile(q_base, m, offs, cols2, q_l, keep) if D2 > 0 else q1
        scores = bounded(products(k1, k2, q1, q2, D2, PRECISION), inner, HAS_SOFTCAP)
        if ALL_MASKED or ((m < full) | (m >= end_full)):
            scores = hide(
                scores, rows[None, :], key_low[:, None], key_high[:, None],
                rows[None, :], rows[None, :], False,
            )  # fmt: skip
        g1 = load_tile(g_base, m, offs, cols1, g_l, keep)
        g2 = load_tile(g_base, m, offs, cols2, g_l, keep) if D2 > 0 else g1
        weights, grad_s = _score_gradient(
            scores, products(v1, v2, g1, g2, D2, PRECISION), lse[None, :], delta[None, :],
            outer, HAS_SOFTCAP,
        )  # fmt: skip
        weights, grad_s = weights.to(g1.dtype), grad_s.to(q1.dtype)
        dv1 = tl.dot(weights, g1, dv1, input_precision=PRECISION)
        dk1 = tl.dot(grad_s, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dv2 = tl.dot(weights, g2, dv2, input_precision=PRECISION)
            dk2 = tl.dot(grad_s, q2, dk2, input_precision=PRECISION)
    return dk1, dk2, dv1, dv2


@triton.jit
def _dkdv_program(
    program, tensors, stats, grads, bounds, strides, inner, outer, scale, num_queries, num_keys,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_UNTIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one (BLOCK_N, D) tile of keys and values, over all query heads that share it."""
    q_ptr, k_ptr, v_ptr, g_ptr = tensors
    lse_ptr, delta_ptr = stats
    dk_ptr, dv_ptr = grads[1], grads[2]
    row_start_ptr, row_end_ptr, until_ptr = bounds[2], bounds[3], bounds[4]
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l = strides[:12]
    dk_b, dk_h, dk_l, dv_b, dv_h, dv_l = strides[15:21]
    tiles = tl.cdiv(num_keys, BLOCK_N)
    key = program % tiles * BLOCK_N
    plane = program // tiles
    batch = tl.cast(plane // (HEADS // GROUP), tl.int64)
    key_head = tl.cast(plane % (HEADS // GROUP), tl.int64)
    row_start_ptr += batch * strides[23]
    row_end_ptr += batch * strides[24]
    last_key = tl.minimum(key + BLOCK_N, num_keys) - 1
    offs = tl.arange(0, BLOCK_N)
    keys = key + offs
    inside = keys < num_keys
    key_low = tl.load(row_start_ptr + keys, mask=inside, other=0)
    key_high = tl.load(row_end_ptr + keys, mask=inside, other=0)
    low, high = tl.load(row_start_ptr + key), tl.load(row_end_ptr + last_key)
    first, full, end_full, past = tile_range(
        low, high, tl.load(row_start_ptr + last_key), tl.load(row_end_ptr + key), BLOCK_M
    )
    if HAS_UNTIL:
        until = tl.load(until_ptr + batch * strides[25] + keys, mask=inside, other=0)
        key_high = tl.minimum(key_high, until)
    keep = key_low < key_high

    cols1, cols2 = tl.arange(0, D1), D1 + tl.arange(0, D2 if D2 > 0 else 16)
    k_base = k_ptr + batch * k_b + key_head * k_h
    v_base = v_ptr + batch * v_b + key_head * v_h
    k1 = load_tile(k_base, key, offs, cols1, k_l, keep)
    k2 = load_tile(k_base, key, offs, cols2, k_l, keep) if D2 > 0 else k1
    v1 = load_tile(v_base, key, offs, cols1, v_l, keep)
    v2 = load_tile(v_base, key, offs, cols2, v_l, keep) if D2 > 0 else v1
    dk1, dv1 = tl.zeros([BLOCK_N, D1], tl.float32), tl.zeros([BLOCK_N, D1], tl.float32)
    dk2 = tl.zeros([BLOCK_N, D2 if D2 > 0 else 16], tl.float32)
    dv2 = tl.zeros([BLOCK_N, D2 if D2 > 0 else 16], tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        statistics = (batch * HEADS + head) * num_queries
        dk1, dk2, dv1, dv2 = _key_gradients(
            dk1, dk2, dv1, dv2, k1, k2, v1, v2, key_low, key_high,
            q_ptr + batch * q_b + head * q_h, g_ptr + batch * g_b + head * g_h,
            lse_ptr + statistics, delta_ptr + statistics, q_l, g_l,
            first, full, end_full, past, low, high, inner, outer,
            D1, D2, BLOCK_M, HAS_UNTIL, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    dk_base = dk_ptr + batch * dk_b + key_head * dk_h
    dv_base = dv_ptr + batch * dv_b + key_head * dv_h
    store_tile(dk_base, key, offs, cols1, dk_l, inside, dk1 * scale)
    store_tile(dv_base, key, offs, cols1, dv_l, inside, dv1)
    if D2 > 0:
        store_tile(dk_base, key, offs, cols2, dk_l, inside, dk2 * scale)
        store_tile(dv_base, key, offs, cols2, dv_l, inside, dv2)


@triton.jit
def _dq_program(
    program, tensors, stats, grads, bounds, strides, inner, outer, scale, num_queries, num_keys,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_UNTIL:
    tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one (BLOCK_M, D) tile of queries, last tiles of a head first."""
    q_ptr, k_ptr, v_ptr, g_ptr = tensors
    start_ptr, end_ptr, until_ptr = bounds[0], bounds[1], bounds[4]
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, dq_b, dq_h, dq_l = strides[:15]
    tiles = tl.cdiv(num_queries, BLOCK_M)
    row = (tiles - 1 - program % tiles) * BLOCK_M
    plane = program // tiles
    batch, head = tl.cast(plane // HEADS, tl.int64), tl.cast(plane % HEADS, tl.int64)
    start_ptr += batch * strides[21]
    end_ptr += batch * strides[22]
    until_ptr += batch * strides[25]
    last_row = tl.minimum(row + BLOCK_M, num_queries) - 1
    offs = tl.arange(0, BLOCK_M)
    rows = row + offs
    inside = rows < num_queries
    row_low = tl.load(start_ptr + rows, mask=inside, other=0)
    row_high = tl.load(end_ptr + rows, mask=inside, other=0)
    low, high = tl.load(start_ptr + row), tl.load(end_ptr + last_row)
    first, full, end_full, past = tile_range(
        low, high, tl.load(start_ptr + last_row), tl.load(end_ptr + row), BLOCK_N
    )
    statistics = tl.cast(plane, tl.int64) * num_queries
    lse, delta, sees = _row_statistics(stats[0] + statistics, stats[1] + statistics, rows, inside)
    keep_rows = inside & sees

    cols1, cols2 = tl.arange(0, D1), D1 + tl.arange(0, D2 if D2 > 0 else 16)
    q_base, g_base = q_ptr + batch * q_b + head * q_h, g_ptr + batch * g_b + head * g_h
    k_base = k_ptr + batch * k_b + head // GROUP * k_h
    v_base = v_ptr + batch * v_b + head // GROUP * v_h
    q1 = load_tile(q_base, row, offs, cols1, q_l, keep_rows)
    q2 = load_tile(q_base, row, offs, cols2, q_l, keep_rows) if D2 > 0 else q1
    g1 = load_tile(g_base, row, offs, cols1, g_l, keep_rows)
    g2 = load_tile(g_base, row, offs, cols2, g_l, keep_rows) if D2 > 0 else g1
    dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    dq2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 16], tl.float32)
    offs_n = tl.arange(0, BLOCK_N)
    for n in tl.range(first, past, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        keys = n + offs_n
        keep = (keys >= low) & (keys < high)
        until = keys
        if HAS_UNTIL:
            until = tl.load(until_ptr + keys, mask=keep, other=0)
            keep = keep & (until > 0)
        k1 = load_tile(k_base, n, offs_n, cols1, k_l, keep)
        k2 = load_tile(k_base, n, offs_n, cols2, k_l, keep) if D2 > 0 else k1
        scores = bounded(products(q1, q2, k1, k2, D2, PRECISION), inner, HAS_SOFTCAP)
        if HAS_UNTIL or ((n < full) | (n >= end_full)):
            scores = hide(
                scores, keys[None, :], row_low[:, None], row_high[:, None],
                until[None, :], rows[:, None], HAS_UNTIL,
            )  # fmt: skip
        v1 = load_tile(v_base, n, offs_n, cols1, v_l, keep)
        v2 = load_tile(v_base, n, offs_n, cols2, v_l, keep) if D2 > 0 else v1
        _weights, grad_s = _score_gradient(
            scores, products(g1, g2, v1, v2, D2, PRECISION), lse[:, None], delta[:, None],
            outer, HAS_SOFTCAP,
        )  # fmt: skip
        grad_s = grad_s.to(k1.dtype)
        dq1 = tl.dot(grad_s, k1, dq1, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(grad_s, k2, dq2, input_precision=PRECISION)
    dq_base = grads[0] + batch * dq_b + head * dq_h
    store_tile(dq_base, row, offs, cols1, dq_l, inside, dq1 * scale)
    if D2 > 0:
        store_tile(dq_base, row, offs, cols2, dq_l, inside, dq2 * scale)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "key_programs"])
def _mixed_attention_bwd_kernel(
    tensors, stats, grads, bounds, strides, inner, outer, scale,
    num_queries, num_keys, key_programs,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KEYS_BLOCK_M: tl.constexpr, KEYS_BLOCK_N: tl.constexpr,
    QUERIES_BLOCK_M: tl.constexpr, QUERIES_BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_UNTIL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """First ``key_programs`` programs: one tile of dK and dV each; others: one tile of dQ each."""
    program = tl.program_id(0)
    if program < key_programs:
        _dkdv_program(
            program, tensors, stats, grads, bounds, strides, inner, outer, scale, num_queries,
            num_keys, HEADS, GROUP, D1, D2, KEYS_BLOCK_M, KEYS_BLOCK_N, HAS_SOFTCAP, HAS_UNTIL,
            PRECISION,
        )  # fmt: skip
    else:
        _dq_program(
            program - key_programs, tensors, stats, grads, bounds, strides, inner, outer, scale,
            num_queries, num_keys, HEADS, GROUP, D1, D2, QUERIES_BLOCK_M, QUERIES_BLOCK_N,
            HAS_SOFTCAP, HAS_UNTIL, PRECISION,
        )  # fmt: skip


def _delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """(B, H, Lq) float32."""
    batch, heads, length, dim = out.shape
    delta = torch.empty((batch, heads, length), dtype=torch.float32, device=out.device)
    block_m = config.DELTA_BLOCK_M
    lse_strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    launch(
        _delta_kernel, (triton.cdiv(length, block_m) * batch * heads, 1, 1),
        (out, grad_out, delta if grad_lse is None else grad_lse, delta,
         (*out.stride()[:3], *grad_out.stride()[:3], *lse_strides), length),
        {"HEADS": heads, "D": dim, "BLOCK_D": triton.next_power_of_2(dim), "BLOCK_M": block_m,
         "HAS_GRAD_LSE": grad_lse is not None},
        num_warps=config.DELTA_NUM_WARPS,
    )  # fmt: skip
    return delta


def _plain_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, start: Tensor, end: Tensor,
    row_start: Tensor, row_end: Tensor, visible_until: Tensor | None,
    scale: float, softcap: float, precision: str, picked: config.BackwardConfig,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, by the kernel that runs on all chips."""
    grads = tuple(empty_heads_last(x) for x in (q, k, v))
    bounds, between = operands.by_sample(
        start, end, row_start, row_end, end if visible_until is None else visible_until
    )
    (batch, heads, length, _), (_, key_heads, num_keys, _) = q.shape, k.shape
    key_programs = triton.cdiv(num_keys, picked.keys_block_n) * batch * key_heads
    query_programs = triton.cdiv(length, picked.queries_block_m) * batch * heads
    delta = _delta(out, grad_out, grad_lse)
    launch(
        _mixed_attention_bwd_kernel, (key_programs + query_programs, 1, 1),
        ((q, k, v, grad_out), (lse, delta), grads, bounds,
         (*(s for x in (q, k, v, grad_out, *grads) for s in x.stride()[:3]), *between),
         *operands.factors(scale, softcap), scale, length, num_keys, key_programs),
        {"HAS_UNTIL": visible_until is not None, "HAS_SOFTCAP": softcap != 0.0,
         "PRECISION": precision, **operands.shape_constants(q, k), **picked.constants()},
        num_warps=picked.num_warps, num_stages=picked.num_stages,
    )  # fmt: skip
    return grads


@replayed(_delta_kernel, _mixed_attention_bwd_kernel, *KERNELS)
def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, start: Tensor, end: Tensor,
    row_start: Tensor, row_end: Tensor, visible_until: Tensor | None,
    scale: float, softcap: float, deterministic: bool, precision: str, pick_hopper: Callable,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op. What it depends on besides tensors is handed over: see ``replayed``."""
    if k.numel() == 0 or q.numel() == 0:
        return tuple(empty_heads_last(x).zero_() for x in (q, k, v))
    arch, dim = operands.arch_of(q), q.shape[3]
    aligned = all(operands.tma_aligned(x) for x in (q, k, v, grad_out))
    plain_scores = visible_until is None and softcap == 0.0
    hopper = pick_hopper(
        arch, dim, q.dtype, k.shape[2], plain_scores, aligned,
        planes=k.shape[0] * k.shape[1], group=q.shape[1] // k.shape[1], ordered=deterministic,
    )  # fmt: skip
    if hopper is not None:
        return hopper_bwd(
            grad_out, grad_lse, q, k, v, out, lse, row_start, row_end, scale, hopper, deterministic
        )
    picked = config.pick_backward(arch, dim, q.dtype, q.shape[2])
    return _plain_bwd(
        grad_out, grad_lse, q, k, v, out, lse, start, end, row_start, row_end, visible_until,
        scale, softcap, precision, picked,
    )  # fmt: skip


def mixed_attention_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, start: Tensor, end: Tensor,
    row_start: Tensor, row_end: Tensor, visible_until: Tensor | None,
    scale: float, softcap: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Op ``mixed_attention_bwd`` on CUDA: gradients of q, k and v."""
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    return _backward(
        grad_out, grad_lse, q, k, v, out, lse, start, end, row_start, row_end, visible_until,
        scale, softcap, deterministic, operands.precision(q.dtype), config.pick_hopper_backward,
    )  # fmt: skip
