"""Backward of mixed attention for Hopper: TMA loads by one warp, wgmma by two warp groups."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .config import LOG2_E, HopperBackwardConfig

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)

# Renamed after triton 3.6.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

_ADD: tl.constexpr = tl.constexpr("""
{
    .reg .b64 where;
    cvta.to.global.u64 where, $1;
    red.relaxed.gpu.global.add.v4.f32 [where], {$5, $6, $7, $8};
    mov.b32 $0, 0;
}
""")


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, g_desc, stats_desc, q_smem, k_smem, v_smem, g_smem, stats_smem,
    q_full, g_full, empty, kv_full, batch, key_head, key, first, past, num_tiles,
    HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Bring K and V once, then Q, dO and their statistics tile by tile."""
    mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [batch, key_head, key, 0], kv_full, k_smem)
    tma.async_copy_global_to_shared(v_desc, [batch, key_head, key, 0], kv_full, v_smem)
    step = 0
    for member in range(GROUP):
        head = key_head * GROUP + member
        tile = (batch * HEADS + head) * num_tiles + first // BLOCK_M
        for m in range(first, past, BLOCK_M):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            bar = q_full.index(slot)
            mbarrier.expect(bar, q_desc.block_type.nbytes + stats_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, [batch, head, m, 0], bar, q_smem.index(slot))
            tma.async_copy_global_to_shared(stats_desc, [tile, 0], bar, stats_smem.index(slot))
            bar = g_full.index(slot)
            mbarrier.expect(bar, g_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(g_desc, [batch, head, m, 0], bar, g_smem.index(slot))
            step += 1
            tile += 1


@gluon.jit
def _zero_rows(tile1, tile2, keep, layout: gl.constexpr):
    """Zero the rows of two tiles in shared memory that are not kept, whatever they hold."""
    value = tile1.load(layout)
    tile1.store(gl.where(keep[:, None], value, 0.0).to(value.dtype))
    value = tile2.load(layout)
    tile2.store(gl.where(keep[:, None], value, 0.0).to(value.dtype))
    # In this order: what a thread wrote must be visible to wgmma before others may issue one.
    hopper.fence_async_shared()
    _barrier()


@gluon.jit
def _consumer(
    dk_desc, dv_desc, dq_ptr, bounds, q_smem, k_smem, v_smem, g_smem, stats_smem, ds_smem,
    q_full, g_full, empty, kv_full, batch, key_head, key, first, full, end_full, past,
    outer, scale, num_keys, num_tiles,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Products of one tile of keys with every tile of rows that sees some of it."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    key_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    row_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [8, 1], [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = q_smem.dtype

    row_start_ptr = bounds[0] + batch.to(gl.int64) * num_keys
    row_end_ptr = bounds[1] + batch.to(gl.int64) * num_keys
    dirty_ptr = bounds[2] + batch * num_tiles
    keys = key + gl.arange(0, BLOCK_N, key_layout)
    key_low = gl.load(row_start_ptr + keys, mask=keys < num_keys, other=0)
    key_high = gl.load(row_end_ptr + keys, mask=keys < num_keys, other=0)

    k_tile, v_tile = k_smem.reshape([BLOCK_N, D]), v_smem.reshape([BLOCK_N, D])
    mbarrier.wait(kv_full, 0)
    offs = key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, copy))
    low = gl.load(row_start_ptr + offs, mask=offs < num_keys, other=0)
    high = gl.load(row_end_ptr + offs, mask=offs < num_keys, other=1)
    seen = low < high
    if gl.min(seen.to(gl.int32), 0) == 0:
        _zero_rows(k_tile, v_tile, seen, copy)

    # Fragments of dQ in the order of the registers: 16 consecutive bytes per thread.
    if D == 128:
        dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
        R: gl.constexpr = D
        C: gl.constexpr = BLOCK_M
    else:
        dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
        R: gl.constexpr = BLOCK_M
        C: gl.constexpr = D
    r = gl.arange(0, R, gl.SliceLayout(1, dq_layout))
    c = gl.arange(0, C, gl.SliceLayout(0, dq_layout))
    quads_r = (r >> 7) * (C * 128) + ((r >> 4) & 7) * 128 + (r & 7) * 16
    quads_c = (c >> 3) * 1024 + ((c >> 1) & 3) * 4
    quads = (quads_r[:, None] + quads_c[None, :]).to(gl.int64) * 4

    dk = gl.zeros([BLOCK_N, D], gl.float32, d_layout)
    dv = gl.zeros([BLOCK_N, D], gl.float32, d_layout)
    zero_s = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros([R, C], gl.float32, dq_layout)
    step = 0
    for member in range(GROUP):
        head = key_head * GROUP + member
        tile = (batch * HEADS + head) * num_tiles + first // BLOCK_M
        dq_base = dq_ptr + tile.to(gl.int64) * (BLOCK_M * D)
        for m in range(first, past, BLOCK_M):
            slot = step % STAGES
            phase = (step // STAGES) & 1
            q = q_smem.index(slot).reshape([BLOCK_M, D])
            g = g_smem.index(slot).reshape([BLOCK_M, D])
            stats = stats_smem.index(slot)._reinterpret(gl.float32, [2, BLOCK_M], flat)
            partly = (m < full) | (m >= end_full)
            mbarrier.wait(q_full.index(slot), phase)
            if partly:
                if gl.load(dirty_ptr + m // BLOCK_M) != 0:
                    keep = stats.index(0).load(gl.SliceLayout(1, copy)) < float("inf")
                    mbarrier.wait(g_full.index(slot), phase)
                    _zero_rows(q, g, keep, copy)
            s = hopper.warpgroup_mma(
                k_tile, q.permute((1, 0)), zero_s, use_acc=False, is_async=True
            )
            mbarrier.wait(g_full.index(slot), phase)
            gw = hopper.warpgroup_mma(
                v_tile, g.permute((1, 0)), zero_s, use_acc=False, is_async=True
            )
            lse = stats.index(0).load(row_layout)
            s = hopper.warpgroup_mma_wait(1, [s])
            if partly:
                rows = m + gl.arange(0, BLOCK_M, row_layout)
                see = (rows[None, :] >= key_low[:, None]) & (rows[None, :] < key_high[:, None])
                s = gl.where(see, s, float("-inf"))
            p = gl.exp2(s * outer - lse[None, :])
            p16 = gl.convert_layout(p.to(dtype), a_layout)
            delta = stats.index(1).load(row_layout)
            gw = hopper.warpgroup_mma_wait(0, [gw])
            dv = hopper.warpgroup_mma(p16, g, dv, is_async=True)
            ds = (p * (gw - delta[None, :])).to(dtype)
            ds_smem.store(ds)
            hopper.fence_async_shared()
            if D == 128:
                dq = hopper.warpgroup_mma(
                    k_tile.permute((1, 0)), ds_smem, zero_q, use_acc=False, is_async=True
                )
            else:
                dq = hopper.warpgroup_mma(
                    ds_smem.permute((1, 0)), k_tile, zero_q, use_acc=False, is_async=True
                )
            ds16 = gl.convert_layout(ds, a_layout)
            dk = hopper.warpgroup_mma(ds16, q, dk, is_async=True)
            dq, dv, p16 = hopper.warpgroup_mma_wait(1, [dq, dv, p16])
            gl.inline_asm_elementwise(
                _ADD,
                "=r,l,l,l,l,f,f,f,f",
                [dq_base.to(gl.int64) + quads, dq],
                dtype=gl.int8,
                is_pure=False,
                pack=4,
            )
            dk, ds16 = hopper.warpgroup_mma_wait(0, [dk, ds16])
            mbarrier.arrive(empty.index(slot), count=1)
            dq_base += BLOCK_M * D
            step += 1

    k_tile.store((dk * scale).to(dtype))
    v_tile.store(dv.to(dtype))
    hopper.fence_async_shared()
    tma.async_copy_shared_to_global(dk_desc, [batch, key_head, key, 0], k_smem)
    tma.async_copy_shared_to_global(dv_desc, [batch, key_head, key, 0], v_smem)
    tma.store_wait(0)


@gluon.jit
def _mixed_attention_bwd_hopper_kernel(
    q_desc, k_desc, v_desc, g_desc, stats_desc, dk_desc, dv_desc, dq_ptr, bounds, factors,
    num_keys, num_tiles,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One (BLOCK_N, D) tile of dK and dV per program; dQ is added up in float32."""
    outer, scale = factors
    tiles = (num_keys + BLOCK_N - 1) // BLOCK_N
    key = gl.program_id(0) % tiles * BLOCK_N
    plane = gl.program_id(0) // tiles
    batch, key_head = plane // (HEADS // GROUP), plane % (HEADS // GROUP)
    row_start_ptr = bounds[0] + batch.to(gl.int64) * num_keys
    row_end_ptr = bounds[1] + batch.to(gl.int64) * num_keys
    last_key = gl.minimum(key + BLOCK_N, num_keys) - 1
    low, high = gl.load(row_start_ptr + key), gl.load(row_end_ptr + last_key)
    full_low, full_high = gl.load(row_start_ptr + last_key), gl.load(row_end_ptr + key)
    first = low // BLOCK_M * BLOCK_M
    past = gl.maximum(first, (high + BLOCK_M - 1) // BLOCK_M * BLOCK_M)
    full = gl.minimum(gl.maximum(first, (full_low + BLOCK_M - 1) // BLOCK_M * BLOCK_M), past)
    end_full = gl.maximum(full, gl.minimum(full_high // BLOCK_M * BLOCK_M, past))

    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    g_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], g_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_N, D], v_desc.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    ds_smem = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_M], ds_layout)
    stats_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2 * BLOCK_M], stats_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    g_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(g_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(kv_full, count=1)
    hopper.fence_async_shared()

    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    dk_desc, dv_desc, dq_ptr, bounds, q_smem, k_smem, v_smem, g_smem, stats_smem,
                    ds_smem, q_full, g_full, empty, kv_full, batch, key_head, key, first, full,
                    end_full, past, outer, scale, num_keys, num_tiles,
                    HEADS, GROUP, D, BLOCK_M, BLOCK_N, STAGES,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, v_desc, g_desc, stats_desc, q_smem, k_smem, v_smem, g_smem,
                    stats_smem, q_full, g_full, empty, kv_full, batch, key_head, key, first, past,
                    num_tiles, HEADS, GROUP, BLOCK_M, STAGES,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_queries"])
def _prepare_kernel(
    out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, stats_ptr, dirty_ptr, dq_ptr, strides,
    num_queries,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (inf for rows that see nothing), delta and zeros for dQ of BLOCK_M rows.

    grid = (tiles * B * H,).
    """
    o_b, o_h, o_l, g_b, g_h, g_l, l_b, l_h, l_l = strides
    tiles = tl.cdiv(num_queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    batch, head = tl.cast(plane // HEADS, tl.int64), tl.cast(plane % HEADS, tl.int64)
    first = tl.cast(tile * BLOCK_M, tl.int64)
    offs, cols = tl.arange(0, BLOCK_M), tl.arange(0, D)
    inside = tile * BLOCK_M + offs < num_queries
    o = out_ptr + batch * o_b + head * o_h + first * o_l + offs[:, None] * o_l + cols[None, :]
    g = grad_out_ptr + batch * g_b + head * g_h + first * g_l + offs[:, None] * g_l + cols[None, :]
    o = tl.load(o, mask=inside[:, None], other=0.0)
    g = tl.load(g, mask=inside[:, None], other=0.0)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        pointers = grad_lse_ptr + batch * l_b + head * l_h + first * l_l + offs * l_l
        delta -= tl.load(pointers, mask=inside, other=0.0) * _LOG2_E
    pointers = lse_ptr + tl.cast(plane, tl.int64) * num_queries + first + offs
    lse = tl.load(pointers, mask=inside, other=float("-inf"))
    sees = lse != float("-inf")
    place = tl.cast(tl.program_id(0), tl.int64) * (2 * BLOCK_M) + offs
    tl.store(stats_ptr + place, tl.where(sees, lse, float("inf")))
    tl.store(stats_ptr + place + BLOCK_M, tl.where(sees, delta, 0.0))
    if head == 0:
        blind = tl.sum((inside & (lse == float("-inf"))).to(tl.int32), 0)
        tl.store(dirty_ptr + batch * tiles + tile, blind)
    place = tl.cast(tl.program_id(0), tl.int64) * (BLOCK_M * D) + tl.arange(0, BLOCK_M * D)
    tl.store(dq_ptr + place, tl.zeros([BLOCK_M * D], tl.float32))


@triton.jit(do_not_specialize=["num_queries"])
def _finish_kernel(
    sums_ptr, dq_ptr, strides, scale, num_queries,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, D) tile of dQ from fragments in float32; grid = (tiles * B * H,)."""
    dq_b, dq_h, dq_l = strides
    tiles = tl.cdiv(num_queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    batch, head = tl.cast(plane // HEADS, tl.int64), tl.cast(plane % HEADS, tl.int64)
    rows: tl.constexpr = D if TRANSPOSED else BLOCK_M
    cols: tl.constexpr = BLOCK_M if TRANSPOSED else D
    place = tl.cast(tl.program_id(0), tl.int64) * (BLOCK_M * D) + tl.arange(0, BLOCK_M * D)
    x = tl.load(sums_ptr + place) * scale
    # (repetition, 8 columns, warp, 8 rows, 2 columns, rows 8 apart, column)
    x = tl.reshape(x, [rows // 128, cols // 8, 8, 8, 4, 2, 2])
    x = tl.reshape(tl.permute(x, [0, 2, 5, 3, 1, 4, 6]), [rows, cols])
    if TRANSPOSED:
        x = tl.trans(x)
    offs = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    base = dq_ptr + batch * dq_b + head * dq_h
    pointers = base + tl.cast(offs, tl.int64)[:, None] * dq_l + tl.arange(0, D)[None, :]
    tl.store(pointers, x.to(dq_ptr.dtype.element_ty), mask=(offs < num_queries)[:, None])


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """(1, 1, block, D) tiles of a (B, H, L, D) tensor; rows past the end read as zeros."""
    layout = gl.NVMMASharedLayout(128, 16, 4)
    # The stride of a dimension of one element may be anything, and is never used.
    strides = [s if n > 1 else 8 for n, s in zip(x.shape[:3], x.stride(), strict=False)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, block, x.shape[3]], layout)


def hopper_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, row_start: Tensor, row_end: Tensor,
    scale: float, grads: list[Tensor], picked: HopperBackwardConfig,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v to ``grads``."""
    (batch, heads, length, dim), (_, key_heads, num_keys, _) = q.shape, k.shape
    block_m, block_n = picked.block_m, picked.block_n
    tiles = triton.cdiv(length, block_m)
    planes = batch * heads
    stats = torch.empty((planes * tiles, 2 * block_m), dtype=torch.float32, device=q.device)
    dirty = torch.empty((batch, tiles), dtype=torch.int32, device=q.device)
    sums = torch.empty((planes * tiles, block_m * dim), dtype=torch.float32, device=q.device)
    lse_strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    _prepare_kernel[(planes * tiles,)](
        out, grad_out, lse, lse if grad_lse is None else grad_lse, stats, dirty, sums,
        (*out.stride()[:3], *grad_out.stride()[:3], *lse_strides), length,
        HEADS=heads, D=dim, BLOCK_M=block_m, HAS_GRAD_LSE=grad_lse is not None, num_warps=8,
    )  # fmt: skip
    stats_desc = TensorDescriptor(
        stats, list(stats.shape), [2 * block_m, 1], [1, 2 * block_m], gl.NVMMASharedLayout(0, 32, 2)
    )
    _mixed_attention_bwd_hopper_kernel[(triton.cdiv(num_keys, block_n) * batch * key_heads,)](
        _descriptor(q, block_m), _descriptor(k, block_n), _descriptor(v, block_n),
        _descriptor(grad_out, block_m), stats_desc, _descriptor(grads[1], block_n),
        _descriptor(grads[2], block_n), sums, (row_start, row_end, dirty),
        (scale * LOG2_E, scale), num_keys, tiles,
        HEADS=heads, GROUP=heads // key_heads, D=dim, num_warps=8, **picked.constants(),
    )  # fmt: skip
    _finish_kernel[(planes * tiles,)](
        sums, grads[0], grads[0].stride()[:3], scale, length,
        HEADS=heads, D=dim, BLOCK_M=block_m, TRANSPOSED=dim == 128, num_warps=8,
    )  # fmt: skip
