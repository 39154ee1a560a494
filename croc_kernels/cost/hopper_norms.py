"""Norms of the sm_90 kernel, and what ends a tile of nearest rows.

Norms go to the multiplying groups through shared memory, written ahead by a warp group of their
own: the multiplying groups have no registers to keep those of the columns in, and a load from the
L2 in the middle of their results stops both. For costs that group sums the squares of the tile's
tokens out of the copies that the products read, for the nearest row it ends the tiles.

Those reads of shared memory slow the products down, so the tiles of a row of tiles that programs
reach in the same round share them: a row's squares are summed in PARTS parts, each by one program,
which leaves them in ``squares`` (row tiles, PARTS, BLOCK_M).

Norms of the pool are summed beside the products of the first tile, by shares of rows. For costs two
more warps do it where there are registers for them, that is, where TMA copies the tokens; else a
kernel before. Every way sums in the same order.

Programs claim shares, of tokens and of the pool: whoever waits for a share waits for a program that
runs, and sums itself what no program has claimed. So programs need not be on the chip together.

``state``: shares of the pool that are claimed, that are done; then for each row tile, for costs
those of its tokens, claimed and done, else its tiles that are done. All 0 at the start.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .config import PARTS
from .hopper_rows import row_state, tile_depth, tile_place, tile_sharers

group_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_NO_KEY = gl.constexpr(2**63 - 1)
# Components of a pool row that a warp loads at a time.
_PIECE = gl.constexpr(256)
_PARTS = gl.constexpr(PARTS)
# Steps whose squares every program sums itself: while the last share is on its way, and while all
# are added up.
_OWN = gl.constexpr(3)
# A store that only one NaN asks for: see _hold.
_HOLD = gl.constexpr(
    "{.reg .pred p; setp.eq.s32 p, $1, -1; @p st.volatile.shared.b32 [$1], $1; mov.b32 $0, $1;}"
)
# A thread sums a row.
_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0]))


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
def _pool_norm_kernel(pool_ptr, p_norm_ptr, state_ptr, states, sizes, METRIC: gl.constexpr):
    """Norm of one pool row and 32 states of 0; grid = (max(m, cdiv(states, 32)),), one warp each.

    sizes: see hopper_rows.py.
    """
    place = 32 * gl.program_id(0) + gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    gl.store(state_ptr + place, gl.full_like(place, 0), mask=place < states)
    if gl.program_id(0) < sizes[1]:
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
def _add_part(part, total, lost):
    """Compensated: 32 rounded additions would cost a third of the accuracy that is left."""
    part = part - lost
    after = total + part
    return after, (after - total) - part


@gluon.jit
def _hold(part):
    """Keep the group's arrival behind the loads whose squares ``part`` is the sum of.

    An arrival does not wait for loads on their way, and the copy engine waits for nothing but the
    arrival. Triton 3.7.1 moved what uses the last load behind it. A store cannot move over the
    barrier of an arrival, and whether to store, each thread knows from its sum alone. Nobody does:
    -1 is a NaN that no addition yields (and an address that faults). Not a trap: it is a branch,
    for which the compiler gives up uniform registers and spills.
    """
    gl.inline_asm_elementwise(
        _HOLD, "=r,r", [part.to(gl.int32, bitcast=True)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _sum_steps(
    buffers, step, count, total, lost, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr,
    TOKEN_SLOTS: gl.constexpr,
):  # fmt: skip
    """Add the squares of ``count`` steps of the tile's tokens; ``lost``: what rounding has lost."""
    x_smem, x_full, x_empty = buffers[0], buffers[2], buffers[3]
    for i in range(count):
        # Not range(step, ...): triton 3.6 and 3.7 then take a step that a loop carries for its
        # first value.
        slot = (step + i) % TOKEN_SLOTS
        mbarrier.wait(x_full.index(slot), (step + i) // TOKEN_SLOTS & 1)
        acc = gl.zeros([BLOCK_M, 8], gl.float32, layout=_ROWS)
        for piece in gl.static_range(BLOCK_K // 8):
            acc = _add_squares(x_smem.index(slot).slice(8 * piece, 8, dim=1).load(_ROWS), acc)
        part = gl.sum(acc, axis=1)
        _hold(part)
        mbarrier.arrive(x_empty.index(slot))
        total, lost = _add_part(part, total, lost)
    return total, lost


@gluon.jit
def _pass_steps(buffers, step, count, TOKEN_SLOTS: gl.constexpr):
    """Give back the slots of steps that another program sums."""
    x_full, x_empty = buffers[2], buffers[3]
    for i in range(count):
        slot = (step + i) % TOKEN_SLOTS
        mbarrier.wait(x_full.index(slot), (step + i) // TOKEN_SLOTS & 1)
        mbarrier.arrive(x_empty.index(slot))


@gluon.jit
def _part_places(squares_ptr, tile_m, part, BLOCK_M: gl.constexpr):
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, _ROWS))
    return squares_ptr + (tile_m.to(gl.int64) * _PARTS + part) * BLOCK_M + row


@gluon.jit
def _share_done(pointers, tile_m):
    # All warps' sums come before the count.
    group_barrier()
    gl.atomic_add(pointers[6] + 3 + 2 * tile_m, 1, sem="release")


@gluon.jit
def _sum_abandoned(
    pointers, sizes, tile_m, share, shares, common, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr
):
    """Sum a share from the tokens in memory, in the order of ``_tile_squares``.

    Whose share it is has not begun its tile and may be waiting for this program to end.
    """
    row = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, _ROWS))
    offset, _live, _valid = row_state(row, pointers, sizes)
    offs_k = gl.arange(0, 8, layout=gl.SliceLayout(0, _ROWS))
    places = pointers[0] + gl.multiple_of(offset, 8)[:, None] + offs_k[None, :]
    for part in range(share, _PARTS, shares):
        total = gl.zeros([BLOCK_M], gl.float32, layout=gl.SliceLayout(1, _ROWS))
        lost = total
        for i in range(part * common // _PARTS, (part + 1) * common // _PARTS):
            acc = gl.zeros([BLOCK_M, 8], gl.float32, layout=_ROWS)
            for k in range(i * BLOCK_K, (i + 1) * BLOCK_K, 8):
                acc = _add_squares(gl.load(places + k), acc)
            total, lost = _add_part(gl.sum(acc, axis=1), total, lost)
        gl.store(_part_places(pointers[7], tile_m, part, BLOCK_M), total)
    _share_done(pointers, tile_m)


@gluon.jit
def _load_part(squares_ptr, tile_m, part, BLOCK_M: gl.constexpr):
    # Past the L1: another program may have just written it.
    return gl.load(_part_places(squares_ptr, tile_m, part, BLOCK_M), cache_modifier=".cg")


@gluon.jit
def _add_shared(
    pointers, sizes, tile_m, shares, common, total, lost,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Add the squares of the common steps, as soon as every share is done."""
    claims = pointers[6] + 2 + 2 * tile_m
    share = gl.atomic_add(claims, 1, sem="relaxed")
    while share < shares:
        _sum_abandoned(pointers, sizes, tile_m, share, shares, common, BLOCK_M, BLOCK_K)
        share = gl.atomic_add(claims, 1, sem="relaxed")
    done = gl.atomic_add(claims + 1, 0, sem="acquire")
    while done < shares:
        done = gl.atomic_add(claims + 1, 0, sem="acquire")
    for part in gl.static_range(0, _PARTS, 4):
        # Four loads under way together.
        a = _load_part(pointers[7], tile_m, part, BLOCK_M)
        b = _load_part(pointers[7], tile_m, part + 1, BLOCK_M)
        c = _load_part(pointers[7], tile_m, part + 2, BLOCK_M)
        d = _load_part(pointers[7], tile_m, part + 3, BLOCK_M)
        total, lost = _add_part(a, total, lost)
        total, lost = _add_part(b, total, lost)
        total, lost = _add_part(c, total, lost)
        total, lost = _add_part(d, total, lost)
    return total, lost


@gluon.jit
def _tile_squares(
    pointers, buffers, sizes, tile, tile_m, step,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, TOKEN_SLOTS: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """Squared norms of the tile's tokens, summed in the same order by whatever programs.

    The first steps are common: of their parts this program sums every shares-th. Returns the norms
    and the step after the tile.
    """
    steps = tile_depth(tile_m, pointers, sizes, BLOCK_M, BLOCK_K) // BLOCK_K
    common = gl.maximum(steps - _OWN, 0)
    shares, first_round = tile_sharers(tile, tile_m, sizes, BLOCK_M, BLOCK_N, GROUP_M)
    shares = gl.minimum(shares, _PARTS)
    share = shares
    if first_round & (common > 0):
        share = gl.atomic_add(pointers[6] + 2 + 2 * tile_m, 1, sem="relaxed")
    zero = gl.zeros([BLOCK_M], gl.float32, layout=gl.SliceLayout(1, _ROWS))
    total, lost = zero, zero
    for part in range(_PARTS + 2):
        own = part >= _PARTS
        begin = gl.where(own, common + part - _PARTS, part * common // _PARTS)
        end = gl.where(own, common + 1, (part + 1) * common // _PARTS)
        if part == _PARTS + 1:
            end = steps
            if common > 0:
                total, lost = _add_shared(
                    pointers, sizes, tile_m, shares, common, total, lost, BLOCK_M, BLOCK_K
                )
        if own | (part % shares == share):
            square, rest = gl.where(own, total, zero), gl.where(own, lost, zero)
            square, rest = _sum_steps(
                buffers, step, end - begin, square, rest, BLOCK_M, BLOCK_K, TOKEN_SLOTS
            )
            if own:
                total, lost = square, rest
            else:
                gl.store(_part_places(pointers[7], tile_m, part, BLOCK_M), square)
                if part + shares >= _PARTS:
                    _share_done(pointers, tile_m)
        else:
            _pass_steps(buffers, step, end - begin, TOKEN_SLOTS)
        step += end - begin
    return total, step


@gluon.jit
def cost_norms(
    pointers, buffers, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, TOKEN_SLOTS: gl.constexpr,
    GROUP_M: gl.constexpr, METRIC: gl.constexpr, DENSE: gl.constexpr, EVEN: gl.constexpr,
    SHARE: gl.constexpr,
):  # fmt: skip
    """The group for costs: norms of every tile; of tokens that do not count -1, NaN of bad ones."""
    x_line, p_line, full, empty = buffers[6], buffers[7], buffers[8], buffers[9]
    step, count = 0, 0
    tiles = gl.cdiv(sizes[0], BLOCK_M) * gl.cdiv(sizes[1], BLOCK_N)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = tile_place(tile, sizes[0], sizes[1], BLOCK_M, BLOCK_N, GROUP_M)
        total, step = _tile_squares(
            pointers, buffers, sizes, tile, tile_m, step, BLOCK_M, BLOCK_N, BLOCK_K, TOKEN_SLOTS,
            GROUP_M,
        )  # fmt: skip
        row = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, _ROWS))
        _offset, live, valid = row_state(row, pointers, sizes)
        norm = gl.where(valid, _norm_term(total, METRIC), float("nan"))
        if DENSE:
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
