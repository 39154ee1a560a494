"""Forward kernel of mixed attention. Mathematics in reference.py, tiles in docs/attention.md."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, replayed
from ..ops import empty_heads_last
from . import config, operands
from .hopper_forward import KERNELS, hopper_fwd
from .tiles import bounded, hide, load_tile, products, store_tile, tile_range


@triton.jit
def _visit(
    acc1, acc2, top, total, q1, q2, row_low, row_high, rows, k_base, v_base, until_base, stride_k,
    stride_v, first, full, end_full, past, low, high, inner, outer,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_UNTIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold key tiles [first, past) in; those in [full, end_full) are seen wholly, if no key has its
    own bound.
    """
    offs = tl.arange(0, BLOCK_N)
    cols1, cols2 = tl.arange(0, D1), D1 + tl.arange(0, D2 if D2 > 0 else 16)
    for n in tl.range(first, past, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        keys = n + offs
        keep = (keys >= low) & (keys < high)
        until = keys
        if HAS_UNTIL:
            until = tl.load(until_base + keys, mask=keep, other=0)
            keep = keep & (until > 0)
        k1 = load_tile(k_base, n, offs, cols1, stride_k, keep)
        k2 = load_tile(k_base, n, offs, cols2, stride_k, keep) if D2 > 0 else k1
        scores = bounded(products(q1, q2, k1, k2, D2, PRECISION), inner, HAS_SOFTCAP)
        if HAS_UNTIL or ((n < full) | (n >= end_full)):
            scores = hide(
                scores, keys[None, :], row_low[:, None], row_high[:, None],
                until[None, :], rows[:, None], HAS_UNTIL,
            )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1) * outer)
        # A row that has seen nothing yet has no maximum: shift by 0, not by -inf.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * outer - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        v1 = load_tile(v_base, n, offs, cols1, stride_v, keep)
        weights = weights.to(v1.dtype)
        acc1 = tl.dot(weights, v1, acc1 * decay[:, None], input_precision=PRECISION)
        if D2 > 0:
            v2 = load_tile(v_base, n, offs, cols2, stride_v, keep)
            acc2 = tl.dot(weights, v2, acc2 * decay[:, None], input_precision=PRECISION)
    return acc1, acc2, top, total


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def _mixed_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bounds, strides, inner, outer, num_queries, num_keys,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_UNTIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, D) tile of the output per program, last first; grid = (tiles * B * H,)."""
    start_ptr, end_ptr, until_ptr = bounds
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, start_b, end_b, until_b = strides
    tiles = tl.cdiv(num_queries, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    batch, head = tl.cast(plane // HEADS, tl.int64), tl.cast(plane % HEADS, tl.int64)
    start_ptr += batch * start_b
    end_ptr += batch * end_b

    row = tile * BLOCK_M
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

    cols1, cols2 = tl.arange(0, D1), D1 + tl.arange(0, D2 if D2 > 0 else 16)
    q_base = q_ptr + batch * q_b + head * q_h
    q1 = load_tile(q_base, row, offs, cols1, q_l, inside)
    q2 = load_tile(q_base, row, offs, cols2, q_l, inside) if D2 > 0 else q1
    k_base = k_ptr + batch * k_b + head // GROUP * k_h
    v_base = v_ptr + batch * v_b + head // GROUP * v_h
    until_base = until_ptr + batch * until_b

    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 16], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc1, acc2, top, total = _visit(
        acc1, acc2, top, total, q1, q2, row_low, row_high, rows, k_base, v_base, until_base,
        k_l, v_l, first, full, end_full, past, low, high, inner, outer,
        D1, D2, BLOCK_N, HAS_SOFTCAP, HAS_UNTIL, PRECISION,
    )  # fmt: skip

    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    out_base = out_ptr + batch * o_b + head * o_h
    store_tile(out_base, row, offs, cols1, o_l, inside, acc1 * share[:, None])
    if D2 > 0:
        store_tile(out_base, row, offs, cols2, o_l, inside, acc2 * share[:, None])
    lse = top + tl.log2(total)
    tl.store(lse_ptr + tl.cast(plane, tl.int64) * num_queries + rows, lse, mask=inside)


def _plain_fwd(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, visible_until: Tensor | None,
    scale: float, softcap: float, precision: str, picked: config.ForwardConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and base-2 log-sum-exp, by the kernel that runs on all chips."""
    batch, heads, length, _ = q.shape
    out = empty_heads_last(q)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    until = end if visible_until is None else visible_until
    bounds, between = operands.by_sample(start, end, until)
    launch(
        _mixed_attention_fwd_kernel, (triton.cdiv(length, picked.block_m) * batch * heads, 1, 1),
        (q, k, v, out, lse, bounds,
         (*(s for x in (q, k, v, out) for s in x.stride()[:3]), *between),
         *operands.factors(scale, softcap), length, k.shape[2]),
        {"HAS_UNTIL": visible_until is not None, "HAS_SOFTCAP": softcap != 0.0,
         "PRECISION": precision, **operands.shape_constants(q, k), **picked.constants()},
        num_warps=picked.num_warps, num_stages=picked.num_stages,
    )  # fmt: skip
    return out, lse


@replayed(_mixed_attention_fwd_kernel, *KERNELS)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, visible_until: Tensor | None,
    scale: float, softcap: float, precision: str, pick_hopper: Callable,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op. What it depends on besides tensors is handed over: see ``replayed``."""
    length, dim = q.shape[2:]
    if q.numel() == 0:
        return empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    arch = operands.arch_of(q)
    aligned = k.numel() > 0 and all(operands.tma_aligned(x) for x in (q, k, v))
    plain_scores = visible_until is None and softcap == 0.0
    hopper = pick_hopper(arch, dim, q.dtype, length, plain_scores, aligned)
    if hopper is not None:
        return hopper_fwd(q, k, v, start, end, scale, hopper)
    if operands.must_copy_values(arch, dim, v):
        v = v.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    picked = config.pick_forward(arch, dim, q.dtype, length)
    return _plain_fwd(q, k, v, start, end, visible_until, scale, softcap, precision, picked)


def mixed_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, visible_until: Tensor | None,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Op ``mixed_attention_fwd`` on CUDA: (B, H, Lq, D) output, (B, H, Lq) base-2 log-sum-exp."""
    return _forward(
        q, k, v, start, end, visible_until, scale, softcap, operands.precision(q.dtype),
        config.pick_hopper_forward,
    )  # fmt: skip
