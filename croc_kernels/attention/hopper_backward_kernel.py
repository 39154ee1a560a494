"""Backward kernel of mixed attention for sm_90: TMA loads by one warp, wgmma by two warp groups."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .hopper import barriers, of_sample, tma_store
from .hopper_backward_beside import _prepare_share
from .hopper_backward_roles import _producer, _turnstile
from .hopper_backward_step import _step, _zero_rows


@gluon.jit
def _consumer(
    dk_desc, dv_desc, dq_ptr, dq_desc, bounds, tiles, bars, kv_full, out_full, where, factors,
    num_tiles,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr, EARLY: gl.constexpr,
    LATE: gl.constexpr, STATISTICS: gl.constexpr, WHOLE: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """Products of one tile of keys with every tile of rows that sees some of it."""
    WR: gl.constexpr = 4 if D == 256 else 8
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WR, 8 // WR], [16, BLOCK_M * WR // 8, 16]
    )
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WR, 8 // WR], [16, D * WR // 8, 16])
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [8, 1], [1, 0])
    q_smem, k_smem, v_smem, g_smem, stats_smem, p_smem, ds_smem, dq_smem = tiles
    dtype: gl.constexpr = q_smem.dtype

    batch, key_head, key, first, full, end_full, past = where
    outer, scale = factors
    num_keys = dk_desc.shape[2]
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
    _q_full, _g_full, empty, _ready, _dq_full, _dq_empty = bars
    if LATE:
        gl.static_assert(D == 64)
        # The loop is then a pipeline of its own for ptxas, which else waits for every product.
        dk, dv = hopper.warpgroup_mma_wait(
            0, [hopper.warpgroup_mma_init(dk), hopper.warpgroup_mma_init(dv)]
        )
        dk = hopper.warpgroup_mma_init(dk)
    work = (q_smem, k_tile, v_tile, g_smem, stats_smem, p_smem, ds_smem, dq_smem)
    limits = (full, end_full, bounds[2] + batch * num_tiles)
    step = 0
    for member in range(GROUP):
        tile = (batch * HEADS + key_head * GROUP + member) * num_tiles + first // BLOCK_M
        out = (dq_desc, batch, key_head * GROUP + member, scale)
        for m in range(first, past, BLOCK_M):
            dk, dv, ds16 = _step(
                dk, dv, ds16, (step, m, tile), dq_ptr, out, work, bars,
                limits, key_low, key_high, outer,
                D, BLOCK_M, BLOCK_N, STAGES, ORDERED, LATE, D != 256 or WHOLE, WHOLE,
                STAGED,
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


@gluon.jit
def _place(
    program, bounds, num_keys, num_tiles,
    HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    SECTION: gl.constexpr, ORDERED: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """A program's section, its number in there, how many key heads that has, and its tile of keys:
    sample, key head and its number among all, first key; rows that some key of it is seen by, from
    ``first`` to ``past``, WHOLE all rows, and those that see all of it.
    """
    tiles = (num_keys + BLOCK_N - 1) // BLOCK_N
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
    if WHOLE:
        first, past = 0 * low, num_tiles * BLOCK_M
    full = gl.minimum(gl.maximum(first, (full_low + BLOCK_M - 1) // BLOCK_M * BLOCK_M), past)
    end_full = gl.maximum(full, gl.minimum(full_high // BLOCK_M * BLOCK_M, past))
    # Zeros beyond the last key would else have weights, which overflow where scores are low.
    end_full = gl.where(key + BLOCK_N > num_keys, full, end_full)
    return part, within, size, plane, (batch, key_head, key, first, full, end_full, past)


@gluon.jit
def _mixed_attention_bwd_hopper_kernel(
    q_desc, k_desc, v_desc, g_desc, stats_desc, dk_desc, dv_desc, dq_desc, o_desc, go_desc,
    bounds, inputs,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SECTION: gl.constexpr, ORDERED: gl.constexpr,
    AHEAD: gl.constexpr, EARLY: gl.constexpr, LATE: gl.constexpr, STATISTICS: gl.constexpr,
    HAS_GRAD_LSE: gl.constexpr, WHOLE: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """One (BLOCK_N, D) tile of dK and dV per program; dQ is added up in float32.

    ``bounds``: row_start and row_end as in ``of_sample``, then what the kernel before wrote: tiles
    with rows that see nothing, and zeros to count in: tickets drawn, programs that have prepared
    their share of a section, programs of each key head that are done, whose turn it is at each tile
    of rows. ``inputs``: statistics of rows, what they are made of, dQ, factors of scores
    before exp2 and of dK. ``dq_desc``: tiles of dQ, STAGED of its sums in float32. ``o_desc`` and
    ``go_desc``: with STATISTICS pieces of O and dO.

    With ORDERED tile n of the keys waits at each tile of dQ for tile n + 1, which with a causal
    mask is ahead anyway. With AHEAD the kernel before prepared as many sections of heads; each
    program prepares a share of the section that many after its own, whose programs wait until all
    have: zeros, with STATISTICS those of rows too. Who is waited for has drawn a ticket before, so
    it is running or done. With EARLY the kernel after counts the programs that are done. WHOLE: one
    tile holds all keys, so each tile of dQ is done once it is computed and leaves in its dtype.
    STAGED: a warp beside the multiplying ones lets the copy engine add dQ up.
    """
    if WHOLE:
        gl.static_assert(not (ORDERED or AHEAD or EARLY or LATE or STAGED))
    # Zeros of a section alone are waited for by the warp that adds to them.
    gl.static_assert(STAGED or STATISTICS if AHEAD else not STATISTICS)
    num_keys = k_desc.shape[2]
    num_tiles = (q_desc.shape[2] + BLOCK_M - 1) // BLOCK_M
    tiles = (num_keys + BLOCK_N - 1) // BLOCK_N
    heads = gl.num_programs(0) // tiles
    counts_ptr = bounds[3]
    stats_ptr, lse_ptr, grad_lse_ptr, dq_ptr, outer, scale = inputs
    factors, rows = (outer, scale), (stats_ptr, lse_ptr, grad_lse_ptr, dq_ptr)
    if ORDERED or AHEAD:
        # Tickets are counted from what the kernel before wrote.
        gdc_wait()
    program = gl.atomic_add(counts_ptr, 1) if ORDERED or AHEAD else gl.program_id(0)
    if not (ORDERED or EARLY or WHOLE):
        gdc_launch_dependents()
    part, within, size, plane, where = _place(
        program, bounds, num_keys, num_tiles, HEADS, GROUP, BLOCK_M, BLOCK_N, SECTION, ORDERED,
        WHOLE,
    )  # fmt: skip

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
    q_full, g_full, empty = barriers(STAGES), barriers(STAGES), barriers(STAGES)
    kv_full = barriers(1).index(0)
    ready = barriers(1).index(0) if ORDERED and not STAGED else kv_full
    out_full = barriers(1).index(0) if EARLY else kv_full
    dq_smem, dq_full, dq_empty = ds_smem, kv_full, kv_full
    if STAGED:
        dq_smem = gl.allocate_shared_memory(gl.float32, dq_desc.block_type.shape, dq_desc.layout)
        dq_full, dq_empty = barriers(1).index(0), barriers(1).index(0)
    pieces, come = q_smem, q_full
    if STATISTICS:
        SLOTS: gl.constexpr = 256 // D
        shape: gl.constexpr = [2 * SLOTS, 1, 1, o_desc.block_type.shape[2], D]
        pieces = gl.allocate_shared_memory(dtype, shape, o_desc.layout)
        come = barriers(SLOTS)
    hopper.fence_async_shared()

    if not (ORDERED or AHEAD):
        # The kernel before is done only now: nothing it wrote was read above.
        gdc_wait()
    if EARLY:
        # Now that all counts are zero.
        gdc_launch_dependents()
    ready_ptr = counts_ptr + 1 + part
    done_ptr = counts_ptr + 1 + heads * GROUP + plane
    turn_ptr = counts_ptr + 1 + 2 * heads * GROUP
    # So many programs prepare this section; what the kernel before prepared is there.
    before = gl.where(part >= AHEAD, tiles * SECTION, 0)
    smem = (q_smem, k_smem, v_smem, g_smem, stats_smem, p_smem, ds_smem, dq_smem)
    bars = (q_full, g_full, empty, ready, dq_full, dq_empty)
    # Constexprs are written out: a name for them would make them values of the kernel.
    if AHEAD:
        gl.warp_specialize(
            [
                (_consumer, (
                    dk_desc, dv_desc, dq_ptr, dq_desc, bounds, smem, bars, kv_full, out_full,
                    where, factors, num_tiles, HEADS, GROUP, D, BLOCK_M, BLOCK_N, STAGES, ORDERED,
                    EARLY, LATE, STATISTICS, WHOLE, STAGED,
                )),
                (_producer, (
                    q_desc, k_desc, v_desc, g_desc, stats_desc, smem, bars, kv_full, ready_ptr,
                    before, where, num_tiles, HEADS, GROUP, BLOCK_M, STAGES, AHEAD, STATISTICS,
                )),
                (_turnstile, (
                    bounds[0], turn_ptr, ready_ptr, before, done_ptr, bars, where, num_tiles,
                    dk_desc, dv_desc, dq_desc, smem, out_full, HEADS, GROUP, BLOCK_M, BLOCK_N,
                    STAGES, ORDERED, AHEAD, EARLY, STAGED,
                )),
                (_prepare_share, (
                    o_desc, go_desc, pieces, come, rows, ready_ptr, turn_ptr, part, within,
                    size * tiles, heads, num_tiles,
                    HEADS, GROUP, D, BLOCK_M, SECTION, ORDERED, AHEAD, STATISTICS, HAS_GRAD_LSE,
                )),
            ],
            [1, 1, 2], [24, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (
                    dk_desc, dv_desc, dq_ptr, dq_desc, bounds, smem, bars, kv_full, out_full,
                    where, factors, num_tiles, HEADS, GROUP, D, BLOCK_M, BLOCK_N, STAGES, ORDERED,
                    EARLY, LATE, STATISTICS, WHOLE, STAGED,
                )),
                (_producer, (
                    q_desc, k_desc, v_desc, g_desc, stats_desc, smem, bars, kv_full, ready_ptr,
                    before, where, num_tiles, HEADS, GROUP, BLOCK_M, STAGES, AHEAD, STATISTICS,
                )),
                (_turnstile, (
                    bounds[0], turn_ptr, ready_ptr, before, done_ptr, bars, where, num_tiles,
                    dk_desc, dv_desc, dq_desc, smem, out_full, HEADS, GROUP, BLOCK_M, BLOCK_N,
                    STAGES, ORDERED, AHEAD, EARLY, STAGED,
                )),
            ],
            [1, 1], [24, 24],
        )  # fmt: skip
