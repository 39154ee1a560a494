"""Rows of the sm_90 kernel: where tokens lie, which count, and the norms beside the products.

``pointers``: tokens, index, row counts, pool, pool norms, result, state. ``sizes``: rows, columns,
components, rows per image, sources, strides of images, tokens and pool rows. ``state``: shares of
the pool that are claimed, shares that are done, then tickets; see hopper.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

group_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def tile_place(tile, rows, m, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """Row and column tile: GROUP_M row tiles share a column tile in the L2."""
    tiles_m, tiles_n = gl.cdiv(rows, BLOCK_M), gl.cdiv(m, BLOCK_N)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = gl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first + within % height, within // height


@gluon.jit
def row_state(row, pointers, sizes):
    """Where a row's token starts (0 if nowhere), whether the row counts, whether it exists."""
    _, index_ptr, num_rows_ptr, _, _, _, _ = pointers
    rows, _, _, length, sources, stride_b, stride_n, _ = sizes
    live = row < rows
    batch, place = row // length, row % length
    if num_rows_ptr is not None:
        live = live & (place < gl.load(num_rows_ptr + batch, mask=live, other=0))
    if index_ptr is not None:
        source = gl.load(index_ptr + row, mask=live, other=0)
        valid = (source >= 0) & (source < sources)
        offset = gl.where(valid, source, 0) * stride_n
    else:
        valid = live
        offset = batch.to(gl.int64) * stride_b + place.to(gl.int64) * stride_n
        offset = gl.where(live, offset, 0)
    return offset, live, valid


@gluon.jit
def tile_depth(tile_m, pointers, sizes, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr):
    """Components to multiply: one step where no row counts, so that all groups keep step."""
    depth = sizes[2]
    if pointers[2] is not None:
        row = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [4], [0]))
        counts = gl.load(pointers[2] + row // sizes[3], mask=row < sizes[0], other=0)
        live = row % sizes[3] < counts
        depth = gl.where(gl.max(live.to(gl.int32), axis=0) > 0, depth, BLOCK_K)
    return depth


@gluon.jit
def _norm_term(square, METRIC: gl.constexpr):
    """|x|², or 1 / |x| for the cosine, 0 for 0."""
    if METRIC == "cosine":
        square = gl.where(square == 0.0, 0.0, 1.0 / gl.sqrt(gl.where(square == 0.0, 1.0, square)))
    return square


@gluon.jit
def token_norms(
    pointers, buffers, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, TOKEN_SLOTS: gl.constexpr,
    GROUP_M: gl.constexpr, METRIC: gl.constexpr,
):  # fmt: skip
    """Norms of every tile's tokens; -1 where a row does not count, NaN where it does not exist."""
    x_smem, x_full, x_empty, norm_smem = buffers[0], buffers[2], buffers[3], buffers[6]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    line: gl.constexpr = gl.SliceLayout(1, layout)
    step, count = 0, 0
    tiles = gl.cdiv(sizes[0], BLOCK_M) * gl.cdiv(sizes[1], BLOCK_N)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, _tile_n = tile_place(tile, sizes[0], sizes[1], BLOCK_M, BLOCK_N, GROUP_M)
        total = gl.zeros([BLOCK_M], gl.float32, layout=line)
        lost = gl.zeros([BLOCK_M], gl.float32, layout=line)
        for _ in range(0, tile_depth(tile_m, pointers, sizes, BLOCK_M, BLOCK_K), BLOCK_K):
            slot = step % TOKEN_SLOTS
            mbarrier.wait(x_full.index(slot), step // TOKEN_SLOTS & 1)
            acc = gl.zeros([BLOCK_M, 8], gl.float32, layout=layout)
            for i in gl.static_range(BLOCK_K // 8):
                x = x_smem.index(slot).slice(8 * i, 8, dim=1).load(layout).to(gl.float32)
                acc = gl.fma(x, x, acc)
            mbarrier.arrive(x_empty.index(slot))
            # Compensated: 32 rounded additions would cost a third of the accuracy that is left.
            part = gl.sum(acc, axis=1) - lost
            after = total + part
            lost = (after - total) - part
            total = after
            step += 1
        row = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=line)
        _offset, live, valid = row_state(row, pointers, sizes)
        norm = gl.where(valid, _norm_term(total, METRIC), float("nan"))
        norm_smem.index(count & 1).store(gl.where(live, norm, -1.0))
        mbarrier.arrive(buffers[7].index(count & 1))
        count += 1


@gluon.jit
def pool_norms(pointers, sizes, SHARE: gl.constexpr, METRIC: gl.constexpr):
    """Norms of the pool, SHARE rows at a time, as long as there are shares that nobody claimed."""
    _, _, _, pool_ptr, p_norm_ptr, _, state_ptr = pointers
    _, m, dim, _, _, _, _, stride_pm = sizes
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    share = gl.atomic_add(state_ptr, 1, sem="relaxed")
    while share * SHARE < m:
        row = share * SHARE + gl.arange(0, SHARE, layout=gl.SliceLayout(1, layout))
        start = gl.multiple_of(gl.minimum(row, m - 1).to(gl.int64) * stride_pm, 8)
        acc = gl.zeros([SHARE, 64], gl.float32, layout=layout)
        for k in range(0, dim, 128):
            offs_k = k + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
            for i in gl.static_range(2):
                x = gl.load(pool_ptr + start[:, None] + offs_k[None, :] + 64 * i).to(gl.float32)
                acc = gl.fma(x, x, acc)
        gl.store(p_norm_ptr + row, _norm_term(gl.sum(acc, axis=1), METRIC), mask=row < m)
        group_barrier()
        gl.atomic_add(state_ptr + 1, 1, sem="release")
        share = gl.atomic_add(state_ptr, 1, sem="relaxed")


@gluon.jit
def pool_norm_of(pointers, col, m, EVEN: gl.constexpr):
    """Norms of pool rows, past the L1: another program may have just written them.

    Infinite where there is no row, so that it is never the nearest: its products are 0 or NaN.
    """
    if EVEN:
        return gl.load(pointers[4] + col, cache_modifier=".cg")
    else:
        return gl.load(pointers[4] + col, mask=col < m, other=float("inf"), cache_modifier=".cg")


@gluon.jit
def wait_for_pool_norms(pointers, sizes, SHARE: gl.constexpr):
    """Until all shares are done; those that are not have been claimed by programs that run."""
    state_ptr, shares = pointers[6], gl.cdiv(sizes[1], SHARE)
    done = gl.atomic_add(state_ptr + 1, 0, sem="acquire")
    while done < shares:
        done = gl.atomic_add(state_ptr + 1, 0, sem="acquire")
