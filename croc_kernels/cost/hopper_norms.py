"""Norms of the sm_90 kernel, and what ends a tile of nearest rows.

Norms go to the multiplying groups through shared memory, written ahead by a warp group of their
own: the multiplying groups have no registers to keep those of the columns in, and a load from the
L2 in the middle of their results stops both. For costs that group sums the squares of the tile's
tokens out of the copies that the products read, for the nearest row it ends the tiles.

Norms of the pool are summed beside the products of the first tile, by shares of rows that programs
claim: whoever waits for a share waits for a program that runs, so the programs need not be on the
chip together. For costs two more warps do it where there are registers for them, that is, where TMA
copies the tokens; else a kernel before. Every way sums in the same order.

``state``: shares that are claimed, shares that are done, then tiles of each row tile that are done,
all 0 at the start.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper_rows import row_state, tile_depth, tile_place

group_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_NO_KEY = gl.constexpr(2**63 - 1)
# Components of a pool row that a warp loads at a time.
_PIECE = gl.constexpr(256)


@gluon.jit
def _norm_term(square, METRIC: gl.constexpr):
    """|x|², or 1 / |x| for the cosine, 0 for 0."""
    if METRIC == "cosine":
        square = gl.where(square == 0.0, 0.0, 1.0 / gl.sqrt(gl.where(square == 0.0, 1.0, square)))
    return square


@gluon.jit
def _load_piece(places, offs_k, k, dim):
    return gl.load(places + k, mask=(k + offs_k < dim)[None, :], other=0.0)


@gluon.jit
def _add_squares(x, acc):
    x = x.to(gl.float32)
    return gl.fma(x, x, acc)


@gluon.jit
def _add_pieces(places, offs_k, k, dim, acc):
    """Add the squares of four pieces, whose loads are under way together."""
    a = _load_piece(places, offs_k, k, dim)
    b = _load_piece(places, offs_k, k + _PIECE, dim)
    c = _load_piece(places, offs_k, k + 2 * _PIECE, dim)
    d = _load_piece(places, offs_k, k + 3 * _PIECE, dim)
    acc = _add_squares(b, _add_squares(a, acc))
    return _add_squares(d, _add_squares(c, acc))


@gluon.jit
def _row_norms(
    pool_ptr, p_norm_ptr, first, sizes,
    METRIC: gl.constexpr, WARPS: gl.constexpr, UNROLL: gl.constexpr,
):  # fmt: skip
    """Norms of pool rows from ``first`` on, one per warp."""
    m, dim, stride_pm = sizes[1], sizes[2], sizes[7]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    row = first + gl.arange(0, WARPS, layout=gl.SliceLayout(1, layout))
    offs_k = gl.arange(0, _PIECE, layout=gl.SliceLayout(0, layout))
    start = gl.multiple_of(gl.minimum(row, m - 1).to(gl.int64) * stride_pm, 8)
    places = pool_ptr + start[:, None] + offs_k[None, :]
    acc = gl.zeros([WARPS, _PIECE], gl.float32, layout=layout)
    for k in range(0, dim, 4 * _PIECE * UNROLL):
        for i in gl.static_range(UNROLL):
            acc = _add_pieces(places, offs_k, k + 4 * _PIECE * i, dim, acc)
    gl.store(p_norm_ptr + row, _norm_term(gl.sum(acc, axis=1), METRIC), mask=row < m)


@gluon.jit
def _pool_norm_kernel(pool_ptr, p_norm_ptr, sizes, METRIC: gl.constexpr):
    """Norm of one pool row; grid = (m,), one warp each. sizes: see hopper_rows.py."""
    _row_norms(pool_ptr, p_norm_ptr, gl.program_id(0), sizes, METRIC, 1, 2)


@gluon.jit
def pool_norms(pointers, sizes, SHARE: gl.constexpr, METRIC: gl.constexpr, WARPS: gl.constexpr):
    """Norms of the pool, SHARE rows at a time, as long as there are shares that nobody claimed."""
    state_ptr = pointers[6]
    share = gl.atomic_add(state_ptr, 1, sem="relaxed")
    while share * SHARE < sizes[1]:
        for i in range(0, SHARE, WARPS):
            _row_norms(pointers[3], pointers[4], share * SHARE + i, sizes, METRIC, WARPS, 1)
        # All warps' norms come before the count.
        group_barrier()
        gl.atomic_add(state_ptr + 1, 1, sem="release")
        share = gl.atomic_add(state_ptr, 1, sem="relaxed")


@gluon.jit
def _wait_for_pool_norms(pointers, sizes, SHARE: gl.constexpr):
    """Until all shares are done; those that are not have been claimed by programs that run."""
    shares = gl.cdiv(sizes[1], SHARE)
    done = gl.atomic_add(pointers[6] + 1, 0, sem="acquire")
    while done < shares:
        done = gl.atomic_add(pointers[6] + 1, 0, sem="acquire")


@gluon.jit
def _column_norms(pointers, sizes, tile_n, BLOCK_N: gl.constexpr, EVEN: gl.constexpr):
    """Norms of a tile's pool rows, past the L1: another program may have just written them.

    Infinite where there is no row, so that it is never the nearest: its products are 0 or NaN.
    """
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    col = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=line)
    if EVEN:
        return gl.load(pointers[4] + col, cache_modifier=".cg")
    else:
        inside = col < sizes[1]
        return gl.load(pointers[4] + col, mask=inside, other=float("inf"), cache_modifier=".cg")


@gluon.jit
def _end_tile(pointers, sizes, tile_m, tiles_n, BLOCK_M: gl.constexpr):
    """Count a tile of nearest rows; the last of a row tile turns keys into columns."""
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ticket = gl.atomic_add(pointers[6] + 2 + tile_m, 1, sem="acq_rel")
    if ticket == tiles_n - 1:
        row = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=line)
        inside = row < sizes[0]
        key = gl.load(pointers[5] + row, mask=inside, other=0, volatile=True)
        column = gl.where(key == _NO_KEY, -1, key & 0xFFFFFFFF)
        gl.store(pointers[5] + row, column, mask=inside)


@gluon.jit
def nearest_norms(
    pointers, buffers, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, METRIC: gl.constexpr,
    EVEN: gl.constexpr, SHARE: gl.constexpr,
):  # fmt: skip
    """The group for nearest rows: shares of the pool, then norms and the end of every tile."""
    p_line, full, empty = buffers[7], buffers[8], buffers[9]
    pool_norms(pointers, sizes, SHARE, METRIC, 4)
    _wait_for_pool_norms(pointers, sizes, SHARE)
    count = 0
    tiles_n = gl.cdiv(sizes[1], BLOCK_N)
    tiles = gl.cdiv(sizes[0], BLOCK_M) * tiles_n
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = tile_place(tile, sizes[0], sizes[1], BLOCK_M, BLOCK_N, GROUP_M)
        p_line.store(_column_norms(pointers, sizes, tile_n, BLOCK_N, EVEN))
        mbarrier.arrive(full)
        # Both groups have read the norms and lowered their rows' keys.
        mbarrier.wait(empty, count & 1)
        group_barrier()
        _end_tile(pointers, sizes, tile_m, tiles_n, BLOCK_M)
        count += 1


@gluon.jit
def _token_squares(
    buffers, step, total, lost, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr,
    TOKEN_SLOTS: gl.constexpr,
):  # fmt: skip
    """Add the squares of a step of the tile's tokens; ``lost`` is what rounding has lost."""
    x_smem, x_full, x_empty = buffers[0], buffers[2], buffers[3]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    slot = step % TOKEN_SLOTS
    mbarrier.wait(x_full.index(slot), step // TOKEN_SLOTS & 1)
    acc = gl.zeros([BLOCK_M, 8], gl.float32, layout=layout)
    for i in gl.static_range(BLOCK_K // 8):
        acc = _add_squares(x_smem.index(slot).slice(8 * i, 8, dim=1).load(layout), acc)
    mbarrier.arrive(x_empty.index(slot))
    # Compensated: 32 rounded additions would cost a third of the accuracy that is left.
    part = gl.sum(acc, axis=1) - lost
    after = total + part
    return after, (after - total) - part


@gluon.jit
def cost_norms(
    pointers, buffers, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, TOKEN_SLOTS: gl.constexpr,
    GROUP_M: gl.constexpr, METRIC: gl.constexpr, EVEN: gl.constexpr, SHARE: gl.constexpr,
):  # fmt: skip
    """The group for costs: norms of every tile; of tokens that do not count -1, NaN of bad ones."""
    x_line, p_line, full, empty = buffers[6], buffers[7], buffers[8], buffers[9]
    line: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0]))
    step, count = 0, 0
    tiles = gl.cdiv(sizes[0], BLOCK_M) * gl.cdiv(sizes[1], BLOCK_N)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = tile_place(tile, sizes[0], sizes[1], BLOCK_M, BLOCK_N, GROUP_M)
        total = gl.zeros([BLOCK_M], gl.float32, layout=line)
        lost = gl.zeros([BLOCK_M], gl.float32, layout=line)
        for _ in range(0, tile_depth(tile_m, pointers, sizes, BLOCK_M, BLOCK_K), BLOCK_K):
            total, lost = _token_squares(buffers, step, total, lost, BLOCK_M, BLOCK_K, TOKEN_SLOTS)
            step += 1
        row = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=line)
        _offset, live, valid = row_state(row, pointers, sizes)
        norm = gl.where(valid, _norm_term(total, METRIC), float("nan"))
        if pointers[6] is not None:
            if count == 0:
                _wait_for_pool_norms(pointers, sizes, SHARE)
        p_norm = _column_norms(pointers, sizes, tile_n, BLOCK_N, EVEN)
        if count > 0:
            # Both groups have read the norms of the tile before.
            mbarrier.wait(empty, (count - 1) & 1)
        x_line.store(gl.where(live, norm, -1.0))
        p_line.store(p_norm)
        mbarrier.arrive(full)
        count += 1
