"""Backward kernel of mixed attention for sm_90: TMA loads by one warp, wgmma by two warp groups."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .hopper import barrier, of_sample, tma_store
from .hopper_backward_roles import _producer, _turnstile

# Its name since triton 3.9.
_PUBLIC: tl.constexpr = tl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

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
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    if _PUBLIC:
        return smem.reinterpret(gl.float32, [2, BLOCK_M], flat)
    else:
        return smem._reinterpret(gl.float32, [2, BLOCK_M], flat)


@gluon.jit
def _scores(
    tiles, bars, step, m, limits,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    s_layout: gl.constexpr,
):  # fmt: skip
    """Wait for a tile of Q and start K Q^T; rows that see nothing are zeroed before."""
    q_smem, k_tile, _v_tile, g_smem, stats_smem, _p_smem, _ds_smem = tiles
    q_full, g_full, _empty, _ready = bars
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
def _step(
    dk, dv, ds16, state, dq_ptr, tiles, bars, limits, key_low, key_high, outer,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    ORDERED: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """One tile of rows: its part of dV, dK and dQ. With LATE dV's product is issued before dP is
    waited for, and dK's, with ``ds16`` on its left, runs into the next step, which then gives the
    slot back.
    """
    step, m, tile = state
    q_smem, k_tile, v_tile, g_smem, stats_smem, p_smem, ds_smem = tiles
    _q_full, g_full, empty, ready = bars
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
        lse = stats.index(0).load(row_layout)
        s = hopper.warpgroup_mma_wait(1, [s])
    if (m < full) | (m >= end_full):
        rows = gl.arange(0, BLOCK_M, row_layout)
        if LATE:
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
    if ORDERED:
        mbarrier.wait(ready, step & 1)
    elif LATE:
        # K and V came long before, but without a wait here the loop is slower.
        mbarrier.wait(ready, 0)
    if SHARED:
        dq = hopper.warpgroup_mma_wait(2, [dq])
    else:
        dq, dv, p16 = hopper.warpgroup_mma_wait(1, [dq, dv, p16])
    _add(dq, dq_ptr + tile.to(gl.int64) * (BLOCK_M * D), TRANSPOSED, BLOCK_M, D, LATE)
    if SHARED:
        dk, dv = hopper.warpgroup_mma_wait(0, [dk, dv])
    elif not LATE:
        dk, ds16 = hopper.warpgroup_mma_wait(0, [dk, ds16])
    if not LATE:
        mbarrier.arrive(empty.index(slot), count=1)
    return dk, dv, ds16


@gluon.jit
def _consumer(
    dk_desc, dv_desc, dq_ptr, bounds, tiles, bars, kv_full, out_full, batch, key_head, key, first,
    full, end_full, past, outer, scale, num_keys, num_tiles,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr, AHEAD: gl.constexpr,
    EARLY: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """Products of one tile of keys with every tile of rows that sees some of it."""
    WR: gl.constexpr = 4 if D == 256 else 8
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WR, 8 // WR], [16, BLOCK_M * WR // 8, 16]
    )
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WR, 8 // WR], [16, D * WR // 8, 16])
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [8, 1], [1, 0])
    q_smem, k_smem, v_smem, g_smem, stats_smem, p_smem, ds_smem = tiles
    dtype: gl.constexpr = q_smem.dtype

    row_start_ptr, row_end_ptr = of_sample(bounds[0], batch), of_sample(bounds[1], batch)
    keys = key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, s_layout))
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

    dk = gl.zeros([BLOCK_N, D], gl.float32, d_layout)
    dv = gl.zeros([BLOCK_N, D], gl.float32, d_layout)
    ds16 = gl.zeros([BLOCK_N, BLOCK_M], dtype, gl.DotOperandLayout(0, d_layout, 2))
    _q_full, _g_full, empty, ready = bars
    if LATE:
        gl.static_assert(D == 64)
        # The loop is then a pipeline of its own for ptxas, which else waits for every product.
        dk, dv = hopper.warpgroup_mma_wait(
            0, [hopper.warpgroup_mma_init(dk), hopper.warpgroup_mma_init(dv)]
        )
        dk = hopper.warpgroup_mma_init(dk)
    work = (q_smem, k_tile, v_tile, g_smem, stats_smem, p_smem, ds_smem)
    limits = (full, end_full, bounds[2] + batch * num_tiles)
    step = 0
    if AHEAD:
        # Its warp said so long before, but where a section begins.
        mbarrier.wait(ready, 0)
    for member in range(GROUP):
        tile = (batch * HEADS + key_head * GROUP + member) * num_tiles + first // BLOCK_M
        for m in range(first, past, BLOCK_M):
            dk, dv, ds16 = _step(
                dk, dv, ds16, (step, m, tile), dq_ptr, work, bars, limits, key_low, key_high, outer,
                D, BLOCK_M, BLOCK_N, STAGES, ORDERED, LATE,
            )  # fmt: skip
            step += 1
            tile += 1
    if LATE:
        dk, ds16 = hopper.warpgroup_mma_wait(0, [dk, ds16])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)

    k_tile.store((dk * scale).to(dtype))
    v_tile.store(dv.to(dtype))
    hopper.fence_async_shared()
    if EARLY:
        mbarrier.arrive(out_full, count=1)
    else:
        tma_store(dk_desc, [batch, key_head, key, 0], k_smem)
        tma_store(dv_desc, [batch, key_head, key, 0], v_smem)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_keys", "num_tiles"])
def _mixed_attention_bwd_hopper_kernel(
    q_desc, k_desc, v_desc, g_desc, stats_desc, dk_desc, dv_desc, dq_ptr, bounds, factors,
    num_keys, num_tiles,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SECTION: gl.constexpr, ORDERED: gl.constexpr,
    AHEAD: gl.constexpr, EARLY: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """One (BLOCK_N, D) tile of dK and dV per program; dQ is added up in float32.

    ``bounds``: row_start and row_end as in ``of_sample``, then what the kernel before wrote: tiles
    with rows that see nothing, and zeros to count in (see ``_prepare_kernel``).

    With ORDERED tile n of the keys waits at each tile of dQ for tile n + 1, which with a causal
    mask is ahead anyway. With AHEAD the kernel before zeroed dQ of the first section alone, and
    each program waits until those of the section before have zeroed its own. Who is waited for has
    drawn a ticket before, so it is running or done. With EARLY the kernel after counts the programs
    that are done.
    """
    outer, scale = factors
    tiles = (num_keys + BLOCK_N - 1) // BLOCK_N
    program = gl.program_id(0)
    if AHEAD:
        gdc_wait()
    if ORDERED or AHEAD:
        program = gl.atomic_add(bounds[3], 1)
    if not (ORDERED or EARLY):
        gdc_launch_dependents()
    # SECTION heads take turns, those tiles first that most rows see under a causal mask.
    part = program // (tiles * SECTION)
    within = program % (tiles * SECTION)
    size = gl.minimum(SECTION, gl.num_programs(0) // tiles - part * SECTION)
    plane = part * SECTION + within % size
    key = within // size * BLOCK_N
    if ORDERED:
        key = (tiles - 1 - within // size) * BLOCK_N
    batch, key_head = plane // (HEADS // GROUP), plane % (HEADS // GROUP)
    row_start_ptr, row_end_ptr = of_sample(bounds[0], batch), of_sample(bounds[1], batch)
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
    p_smem = ds_smem
    if D == 256:
        p_smem = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_M], ds_layout)
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
    # No barrier may be made that nobody waits for: its memory goes to data, over which a GPU that
    # processes take turns on writes the barrier back (aot.over_barriers).
    ready, out_full = kv_full, kv_full
    if ORDERED or AHEAD:
        ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(ready, count=1)
    if EARLY:
        out_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(out_full, count=1)
    hopper.fence_async_shared()

    if not (ORDERED or AHEAD):
        # The kernel before is done only now: nothing it wrote was read above.
        gdc_wait()
    if EARLY:
        # Now that all counts are zero.
        gdc_launch_dependents()
    done = bounds[3]
    if EARLY:
        done += 1 + gl.num_programs(0) // tiles * GROUP + plane
    ahead = (dq_ptr, bounds[3], 0, 0, 1, 0)
    if AHEAD:
        heads = gl.minimum(gl.num_programs(0) // tiles - (part + 1) * SECTION, SECTION)
        ahead = (
            dq_ptr + ((part + 1) * (SECTION * GROUP)).to(gl.int64) * num_tiles * (BLOCK_M * D),
            bounds[3] + 1 + part, gl.where(part > 0, tiles * SECTION, 0), within, size * tiles,
            gl.maximum(heads, 0) * (GROUP * num_tiles * (BLOCK_M * D // 512)),
        )  # fmt: skip
    # The arguments are written out where they are used: a name for them would make the constexprs
    # values of the kernel.
    gl.warp_specialize(
        [
            (_consumer, (
                dk_desc, dv_desc, dq_ptr, bounds,
                (q_smem, k_smem, v_smem, g_smem, stats_smem, p_smem, ds_smem),
                (q_full, g_full, empty, ready), kv_full, out_full, batch, key_head, key, first,
                full, end_full, past, outer, scale, num_keys, num_tiles,
                HEADS, GROUP, D, BLOCK_M, BLOCK_N, STAGES, ORDERED, AHEAD, EARLY, LATE,
            )),
            (_producer, (
                q_desc, k_desc, v_desc, g_desc, stats_desc, q_smem, k_smem, v_smem, g_smem,
                stats_smem, q_full, g_full, empty, kv_full, batch, key_head, key, first, past,
                num_tiles, HEADS, GROUP, BLOCK_M, STAGES,
            )),
            (_turnstile, (
                bounds[3] + 1, bounds[0], empty, ready, batch, key_head, key, first, past, num_keys,
                num_tiles, HEADS, GROUP, BLOCK_M, BLOCK_N, STAGES, ORDERED, AHEAD, EARLY, ahead,
                dk_desc, dv_desc, k_smem, v_smem, out_full, done,
            )),
        ],
        [1, 1], [24, 24],
    )  # fmt: skip
