"""Two warps beside the multiplying ones in the backward for sm_90: one brings tiles, one knows when
dQ may be added to.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper import barrier, of_sample, tma_load, tma_store

_AWAIT: tl.constexpr = tl.constexpr("""
{
    .reg .b32 seen;
    .reg .pred other;
again:
    ld.acquire.gpu.global.b32 seen, [$1];
    setp.ne.b32 other, seen, $2;
    @other bra again;
    mov.b32 $0, 0;
}
""")
_FENCE: tl.constexpr = tl.constexpr("{ fence.proxy.async.global; mov.b32 $0, $1; }")
_RELEASE: tl.constexpr = tl.constexpr("""
{
    .reg .b32 lane;
    .reg .pred first;
    mov.u32 lane, %laneid;
    setp.eq.u32 first, lane, 0;
    @first st.release.gpu.global.b32 [$1], $2;
    mov.b32 $0, 0;
}
""")


@gluon.jit
def _await(pointer, value):
    """Wait until a word is ``value``, and for what was written before it."""
    lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0])) * 0
    word = pointer.to(gl.int64) + lanes.to(gl.int64)
    gl.inline_asm_elementwise(
        _AWAIT, "=r,l,r", [word, lanes + value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def fence_async():
    """Between what threads write and read in global memory and what the copy engine reads there."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    lanes = gl.arange(0, 32 * gl.num_warps(), layout)
    gl.inline_asm_elementwise(_FENCE, "=r,r", [lanes], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _await_section(ready_ptr, before):
    """Wait until all ``before`` programs have prepared their shares of a section, for what threads
    read of it and what the copy engine does. They have drawn their tickets before.
    """
    if before > 0:
        _await(ready_ptr, before)
        fence_async()


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, g_desc, stats_desc, smem, bars, kv_full, ready_ptr, before, where,
    num_tiles,
    HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr, STATISTICS: gl.constexpr,
):  # fmt: skip
    """Bring K and V once, then Q, dO and their statistics tile by tile."""
    batch, key_head, key, first, _full, _end_full, past = where
    q_smem, k_smem, v_smem, g_smem, stats_smem, _p_smem, _ds_smem = smem
    q_full, g_full, empty, _ready = bars
    mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma_load(k_desc, [batch, key_head, key, 0], kv_full, k_smem)
    tma_load(v_desc, [batch, key_head, key, 0], kv_full, v_smem)
    step = 0
    for member in range(GROUP):
        head = key_head * GROUP + member
        tile = (batch * HEADS + head) * num_tiles + first // BLOCK_M
        for m in range(first, past, BLOCK_M):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            bar = q_full.index(slot)
            if STATISTICS:
                # Long written, but asking takes as long as the first tiles do. What arrives at the
                # barriers from here on tells the multiplying warps, too.
                tma_load(q_desc, [batch, head, m, 0], bar, q_smem.index(slot))
                if step == 0:
                    _await_section(ready_ptr - AHEAD, before)
            mbarrier.expect(bar, q_desc.block_type.nbytes + stats_desc.block_type.nbytes)
            if not STATISTICS:
                tma_load(q_desc, [batch, head, m, 0], bar, q_smem.index(slot))
            tma_load(stats_desc, [tile, 0], bar, stats_smem.index(slot))
            bar = g_full.index(slot)
            mbarrier.expect(bar, g_desc.block_type.nbytes)
            tma_load(g_desc, [batch, head, m, 0], bar, g_smem.index(slot))
            step += 1
            tile += 1


@gluon.jit
def _zero_ahead(ready, ready_ptr, before, ahead):
    """Let the consumer add once the sums of its section are zero, then zero a share of the next
    section's. Those waited for have drawn their tickets before.
    """
    next_ptr, share, shares, pieces = ahead
    if before > 0:
        _await(ready_ptr - 1, before)
    mbarrier.arrive(ready, count=1)
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    offs = gl.arange(0, 512, layout)
    zero = gl.zeros([512], gl.float32, layout)
    chunk = (pieces + shares - 1) // shares
    for i in range(share * chunk, gl.minimum((share + 1) * chunk, pieces)):
        gl.store(next_ptr + i.to(gl.int64) * 512 + offs, zero)
    # Of all lanes' stores.
    barrier()
    gl.atomic_add(ready_ptr, 1, sem="release")


@gluon.jit
def _turnstile(
    row_start, turn_ptr, ready_ptr, before, ahead, done_ptr, bars, where, num_tiles,
    dk_desc, dv_desc, smem, out_full,
    HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, ORDERED: gl.constexpr, AHEAD: gl.constexpr, STATISTICS: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """Let the consumer add to a tile of dQ once the next tile of keys has; then pass the turn on.

    In a warp of its own, so that the consumer never waits for its own additions to arrive. Nothing
    to do unless ORDERED, AHEAD or EARLY. EARLY, it also stores dK and dV and says that this program
    is done: stores and counts at the consumer's end cost it registers in its loop.
    """
    batch, key_head, key, first, _full, _end_full, past = where
    _q_full, _g_full, empty, ready = bars
    num_keys = dk_desc.shape[2]
    if STATISTICS:
        # A program without rows, too: the kernel after reads zeros when it is done.
        _await_section(ready_ptr - AHEAD, before)
    elif AHEAD:
        _zero_ahead(ready, ready_ptr, before, ahead)
    if ORDERED:
        turn = key // BLOCK_N + 1
        next_first = past
        if key + BLOCK_N < num_keys:
            next_first = gl.load(of_sample(row_start, batch) + key + BLOCK_N) // BLOCK_M * BLOCK_M
        lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0])) * 0
        step = 0
        for member in range(GROUP):
            tile = (batch * HEADS + key_head * GROUP + member) * num_tiles + first // BLOCK_M
            for m in range(first, past, BLOCK_M):
                _await(turn_ptr + tile, gl.where(m < next_first, 0, turn + 1))
                mbarrier.arrive(ready, count=1)
                mbarrier.wait(empty.index(step % STAGES), (step // STAGES) & 1)
                word = (turn_ptr + tile).to(gl.int64) + lanes.to(gl.int64)
                gl.inline_asm_elementwise(
                    _RELEASE, "=r,l,r", [word, lanes + turn], dtype=gl.int32, is_pure=False, pack=1
                )
                step += 1
                tile += 1
    if EARLY:
        mbarrier.wait(out_full, 0)
        tma_store(dk_desc, [batch, key_head, key, 0], smem[1])
        tma_store(dv_desc, [batch, key_head, key, 0], smem[2])
        # After all of this program's additions.
        gl.atomic_add(done_ptr, 1, sem="release")
        tma.store_wait(0)
