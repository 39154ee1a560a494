"""Two warps beside the multiplying ones in the backward for sm_90: one brings tiles, one adds dQ
up, or knows when it may be added to.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper import of_sample, tma_add, tma_load, tma_store

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
_LANDED: tl.constexpr = tl.constexpr("{ cp.async.bulk.wait_group 0; mov.b32 $0, $1; }")
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
def _at_word(code: gl.constexpr, pointer, value):
    """All lanes of a warp do the same at one word."""
    lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0])) * 0
    word = pointer.to(gl.int64) + lanes.to(gl.int64)
    gl.inline_asm_elementwise(
        code, "=r,l,r", [word, lanes + value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _await(pointer, value):
    """Wait until a word is ``value``, and for what was written before it."""
    _at_word(_AWAIT, pointer, value)


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
    q_smem, k_smem, v_smem, g_smem, stats_smem, _p_smem, _ds_smem, _dq_smem = smem
    q_full, g_full, empty, _ready, _dq_full, _dq_empty = bars
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
def _release(pointer, value):
    """Set a word, after what was written before."""
    _at_word(_RELEASE, pointer, value)


@gluon.jit
def _landed():
    """Wait until all that this warp has given the copy engine is in global memory, for whoever is
    told afterwards; ``store_wait`` waits only until it has been read.
    """
    lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(_LANDED, "=r,r", [lanes], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _turnstile(
    row_start, turn_ptr, ready_ptr, before, done_ptr, bars, where, num_tiles,
    dk_desc, dv_desc, dq_desc, smem, out_full,
    HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, ORDERED: gl.constexpr, AHEAD: gl.constexpr, EARLY: gl.constexpr,
    STAGED: gl.constexpr,
):  # fmt: skip
    """STAGED, add the tiles of dQ that the consumer hands over. ORDERED, each once the next tile of
    keys has been added to it, and then pass the turn on; else say when the consumer may add.

    In a warp of its own, so that the consumer never waits for its own additions to arrive. EARLY,
    it also stores dK and dV and says that this program is done: stores and counts at the consumer's
    end cost it registers in its loop.
    """
    batch, key_head, key, first, _full, _end_full, past = where
    _q_full, _g_full, empty, ready, dq_full, dq_empty = bars
    num_keys, dq_smem = dk_desc.shape[2], smem[7]
    if AHEAD:
        # A program without rows, too: the kernel after reads zeros when it is done.
        _await_section(ready_ptr - AHEAD, before)
    if ORDERED or STAGED:
        turn = key // BLOCK_N + 1
        next_first = past
        if ORDERED and key + BLOCK_N < num_keys:
            next_first = gl.load(of_sample(row_start, batch) + key + BLOCK_N) // BLOCK_M * BLOCK_M
        step = 0
        for member in range(GROUP):
            tile = (batch * HEADS + key_head * GROUP + member) * num_tiles + first // BLOCK_M
            for m in range(first, past, BLOCK_M):
                if ORDERED:
                    _await(turn_ptr + tile, gl.where(m < next_first, 0, turn + 1))
                if STAGED:
                    if ORDERED:
                        fence_async()
                    mbarrier.wait(dq_full, step & 1)
                    tma_add(dq_desc, [tile * dq_smem.shape[0], 0], dq_smem)
                    tma.store_wait(0)
                    mbarrier.arrive(dq_empty, count=1)
                    if ORDERED:
                        _landed()
                else:
                    mbarrier.arrive(ready, count=1)
                    mbarrier.wait(empty.index(step % STAGES), (step // STAGES) & 1)
                if ORDERED:
                    _release(turn_ptr + tile, turn)
                step += 1
                tile += 1
    if STAGED:
        _landed()
    if EARLY:
        mbarrier.wait(out_full, 0)
        tma_store(dk_desc, [batch, key_head, key, 0], smem[1])
        tma_store(dv_desc, [batch, key_head, key, 0], smem[2])
        # After all of this program's additions.
        gl.atomic_add(done_ptr, 1, sem="release")
        tma.store_wait(0)
