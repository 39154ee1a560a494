"""One tile of rows in the backward for sm_90: its part of dV, dK and dQ."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper import barrier, reinterpret, tma_store

# Four consecutive registers of an accumulator to 16 consecutive bytes.
_ADD: tl.constexpr = tl.constexpr("""
{
    .reg .b64 where;
    cvta.to.global.u64 where, $1;
    red.relaxed.gpu.global.add.v4.f32 [where], {$5, $6, $7, $8};
    mov.b32 $0, 0;
}
""")
# Without the conversion ptxas keeps one address for all additions of a thread. For LATE alone.
_ADD_NEAR: tl.constexpr = tl.constexpr("""
{
    red.relaxed.gpu.global.add.v4.f32 [$1], {$5, $6, $7, $8};
    mov.b32 $0, 0;
}
""")


@gluon.jit
def _zero_rows(tile1, tile2, keep, layout: gl.constexpr):
    """Zero the rows of two tiles in shared memory that are not kept, whatever they hold."""
    value = tile1.load(layout)
    tile1.store(gl.where(keep[:, None], value, 0.0).to(value.dtype))
    value = tile2.load(layout)
    tile2.store(gl.where(keep[:, None], value, 0.0).to(value.dtype))
    # In this order: what a thread wrote must be visible to wgmma before others may issue one.
    hopper.fence_async_shared()
    barrier()


@gluon.jit
def _two_rows(smem, BLOCK_M: gl.constexpr):
    """Log-sum-exp and delta of a tile of rows, which came as one row."""
    shape: gl.constexpr = [2, BLOCK_M]
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return reinterpret(smem, gl.float32, shape, flat)


@gluon.jit
def _scores(
    tiles, bars, step, m, limits,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    s_layout: gl.constexpr,
):  # fmt: skip
    """Wait for a tile of Q and start K Q^T; rows that see nothing are zeroed before."""
    q_smem, k_tile, _v_tile, g_smem, stats_smem, _p_smem, _ds_smem, _dq_smem = tiles
    q_full, g_full, _empty, _ready, _dq_full, _dq_empty = bars
    full, end_full, dirty_ptr = limits
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [8, 1], [1, 0])
    slot, phase = step % STAGES, (step // STAGES) & 1
    q = q_smem.index(slot).reshape([BLOCK_M, D])
    mbarrier.wait(q_full.index(slot), phase)
    if (m < full) | (m >= end_full):
        if gl.load(dirty_ptr + m // BLOCK_M) != 0:
            stats = _two_rows(stats_smem.index(slot), BLOCK_M)
            keep = stats.index(0).load(gl.SliceLayout(1, copy)) < float("inf")
            mbarrier.wait(g_full.index(slot), phase)
            _zero_rows(q, g_smem.index(slot).reshape([BLOCK_M, D]), keep, copy)
    zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, s_layout)
    return hopper.warpgroup_mma(k_tile, q.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _add(
    dq, where, TRANSPOSED: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr, LATE: gl.constexpr
):
    """Add a tile of dQ in the order of its registers: 16 consecutive bytes per thread."""
    R: gl.constexpr = D if TRANSPOSED else BLOCK_M
    C: gl.constexpr = BLOCK_M if TRANSPOSED else D
    WR: gl.constexpr = 4 if R == 64 else 8
    WIDTH: gl.constexpr = C * WR // 8
    r = gl.arange(0, R, gl.SliceLayout(1, dq.type.layout))
    c = gl.arange(0, C, gl.SliceLayout(0, dq.type.layout))
    quads_r = r // (16 * WR) * (WIDTH * 128) + ((r >> 4) % WR) * 128 + (r & 7) * 16
    if LATE:
        # What differs within a thread is added last, as a constant.
        lane = quads_r[:, None] + ((c // WIDTH) * (WR * 128) + ((c >> 1) & 3) * 4)[None, :]
        fixed = (((c % WIDTH) >> 3) * 4096).to(gl.int64)
        place = where.to(gl.int64) + lane.to(gl.int64) * 4 + fixed[None, :]
    else:
        quads_c = (c // WIDTH) * (WR * 128) + ((c % WIDTH) >> 3) * 1024 + ((c >> 1) & 3) * 4
        place = where.to(gl.int64) + (quads_r[:, None] + quads_c[None, :]).to(gl.int64) * 4
    gl.inline_asm_elementwise(
        _ADD_NEAR if LATE else _ADD, "=r,l,l,l,l,f,f,f,f", [place, dq], dtype=gl.int8,
        is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def _hand_over(
    dq, dq_smem, dq_full, dq_empty, step,
    TRANSPOSED: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Leave a tile of dQ in shared memory, in the order of ``_add``, for the warp that adds it."""
    R: gl.constexpr = D if TRANSPOSED else BLOCK_M
    C: gl.constexpr = BLOCK_M if TRANSPOSED else D
    WR: gl.constexpr = 4 if R == 64 else 8
    mbarrier.wait(dq_empty, (step & 1) ^ 1)
    x = gl.reshape(dq, [R // (16 * WR), WR, 2, 8, 8 // WR, C * WR // 64, 4, 2])
    x = gl.permute(x, (0, 5, 4, 1, 3, 6, 2, 7))
    dq_smem.store(gl.reshape(x, dq_smem.shape))
    hopper.fence_async_shared()
    mbarrier.arrive(dq_full, count=1)


@gluon.jit
def _leave(dq, out, m, q_tile, TRANSPOSED: gl.constexpr):
    """Store a tile of dQ, which all of its head's keys are in, from where its rows of Q lay: all
    their products are done. The slot is given back once the copy engine has read it.
    """
    dq_desc, batch, head, scale = out
    # Of both warp groups' products.
    barrier()
    rows = q_tile.reshape([q_tile.shape[2], q_tile.shape[3]])
    if TRANSPOSED:
        rows = rows.permute((1, 0))
    rows.store((dq * scale).to(q_tile.dtype))
    hopper.fence_async_shared()
    tma_store(dq_desc, [batch, head, m, 0], q_tile)


@gluon.jit
def _step(
    dk, dv, ds16, state, dq_ptr, out, tiles, bars, limits, key_low, key_high, outer,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    ORDERED: gl.constexpr, LATE: gl.constexpr, FIXED: gl.constexpr, WHOLE: gl.constexpr,
    STAGED: gl.constexpr,
):  # fmt: skip
    """One tile of rows: its part of dV, dK and dQ. With LATE dV's product is issued before dP is
    waited for, and dK's, with ``ds16`` on its left, runs into the next step, which then gives the
    slot back. FIXED: masks are compared with constants; ptxas else may pack what was compared into
    registers, 264 instructions in a partly seen tile. WHOLE: dQ is not added but
    stored, from the slot, which the next step gives back. STAGED: another warp adds it.
    """
    step, m, tile = state
    q_smem, k_tile, v_tile, g_smem, stats_smem, p_smem, ds_smem, dq_smem = tiles
    _q_full, g_full, empty, ready, dq_full, dq_empty = bars
    full, end_full, _dirty_ptr = limits
    s_layout: gl.constexpr = key_low.type.layout.parent
    d_layout: gl.constexpr = dv.type.layout
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = q_smem.dtype
    SHARED: gl.constexpr = D == 256
    TRANSPOSED: gl.constexpr = D >= 128

    slot, phase = step % STAGES, (step // STAGES) & 1
    q = q_smem.index(slot).reshape([BLOCK_M, D])
    g = g_smem.index(slot).reshape([BLOCK_M, D])
    stats = _two_rows(stats_smem.index(slot), BLOCK_M)
    s = _scores(tiles, bars, step, m, limits, D, BLOCK_M, BLOCK_N, STAGES, s_layout)
    mbarrier.wait(g_full.index(slot), phase)
    zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, s_layout)
    gw = hopper.warpgroup_mma(v_tile, g.permute((1, 0)), zero, use_acc=False, is_async=True)
    if LATE:
        s, dk, ds16 = hopper.warpgroup_mma_wait(1, [s, dk, ds16])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
        lse = stats.index(0).load(row_layout)
    else:
        if WHOLE:
            tma.store_wait(0)
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
        lse = stats.index(0).load(row_layout)
        s = hopper.warpgroup_mma_wait(1, [s])
    if (m < full) | (m >= end_full):
        rows = gl.arange(0, BLOCK_M, row_layout)
        if FIXED:
            # Compared with constants: in a thread only ``fixed`` differs from row to row.
            lane, fixed = (rows & 6)[None, :] + m, (rows & (BLOCK_M - 7))[None, :]
            see = (fixed >= key_low[:, None] - lane) & (fixed < key_high[:, None] - lane)
        else:
            rows = m + rows
            see = (rows[None, :] >= key_low[:, None]) & (rows[None, :] < key_high[:, None])
        s = gl.where(see, s, float("-inf"))
    p = gl.exp2(s * outer - lse[None, :])
    if not LATE:
        delta = stats.index(1).load(row_layout)
    if SHARED:
        p_smem.store(p.to(dtype))
        gw = hopper.warpgroup_mma_wait(0, [gw])
    elif LATE:
        p16 = gl.convert_layout(p.to(dtype), a_layout)
        dv = hopper.warpgroup_mma(p16, g, dv, is_async=True)
        gw = hopper.warpgroup_mma_wait(1, [gw])
        delta = stats.index(1).load(row_layout)
    else:
        p16 = gl.convert_layout(p.to(dtype), a_layout)
        gw = hopper.warpgroup_mma_wait(0, [gw])
        dv = hopper.warpgroup_mma(p16, g, dv, is_async=True)
    ds = (p * (gw - delta[None, :])).to(dtype)
    ds_smem.store(ds)
    hopper.fence_async_shared()
    if TRANSPOSED:
        dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
        zero_q = gl.zeros([D, BLOCK_M], gl.float32, dq_layout)
        dq = hopper.warpgroup_mma(
            k_tile.permute((1, 0)), ds_smem, zero_q, use_acc=False, is_async=True
        )
    else:
        WR: gl.constexpr = 4 if BLOCK_M == 64 else 8
        dq_layout: gl.constexpr = gl.NVMMADistributedLayout(
            [3, 0], [WR, 8 // WR], [16, D * WR // 8, 16]
        )
        zero_q = gl.zeros([BLOCK_M, D], gl.float32, dq_layout)
        dq = hopper.warpgroup_mma(
            ds_smem.permute((1, 0)), k_tile, zero_q, use_acc=False, is_async=True
        )
    if SHARED:
        dv = hopper.warpgroup_mma(p_smem, g, dv, is_async=True)
        dk = hopper.warpgroup_mma(ds_smem, q, dk, is_async=True)
    else:
        ds16 = gl.convert_layout(ds, a_layout)
        dk = hopper.warpgroup_mma(ds16, q, dk, is_async=True)
    if ORDERED and not STAGED:
        mbarrier.wait(ready, step & 1)
    elif LATE:
        # K and V came long before, but without a wait here the loop is slower.
        mbarrier.wait(ready, 0)
    if SHARED:
        dq = hopper.warpgroup_mma_wait(2, [dq])
    else:
        dq, dv, p16 = hopper.warpgroup_mma_wait(1, [dq, dv, p16])
    if STAGED:
        _hand_over(dq, dq_smem, dq_full, dq_empty, step, TRANSPOSED, BLOCK_M, D)
    elif not WHOLE:
        _add(dq, dq_ptr + tile.to(gl.int64) * (BLOCK_M * D), TRANSPOSED, BLOCK_M, D, LATE)
    if SHARED:
        dk, dv = hopper.warpgroup_mma_wait(0, [dk, dv])
    elif not LATE:
        dk, ds16 = hopper.warpgroup_mma_wait(0, [dk, ds16])
    if WHOLE:
        _leave(dq, out, m, q_smem.index(slot), TRANSPOSED)
    elif not LATE:
        mbarrier.arrive(empty.index(slot), count=1)
    return dk, dv, ds16
