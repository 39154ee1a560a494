"""What two warps beside the multiplying ones do in the backward for sm_90: they prepare a later
section of heads as ``_prepare_kernel`` does the first ones, zeros alone or statistics too.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .config import LOG2_E
from .hopper import barrier, tma_load
from .hopper_backward_roles import fence_async

_LOG2_E: gl.constexpr = gl.constexpr(LOG2_E)


@gluon.jit
def _bring(o_desc, g_desc, pieces, come, n, plane, row, rows, HEADS: gl.constexpr):
    """Piece n of O and dO, which begins at ``row`` of one head; then where the next one begins."""
    PIECE: gl.constexpr = o_desc.block_type.shape[2]
    SLOTS: gl.constexpr = come.shape[0]
    slot, batch, head = n % SLOTS, plane // HEADS, plane % HEADS
    mbarrier.expect(come.index(slot), o_desc.block_type.nbytes + g_desc.block_type.nbytes)
    tma_load(o_desc, [batch, head, row, 0], come.index(slot), pieces.index(slot))
    tma_load(g_desc, [batch, head, row, 0], come.index(slot), pieces.index(SLOTS + slot))
    return _after(plane, row, rows, PIECE)


@gluon.jit
def _after(plane, row, rows, PIECE: gl.constexpr):
    """Head and row so many rows on; a head has ``rows``."""
    ends = row + PIECE >= rows
    return gl.where(ends, plane + 1, plane), gl.where(ends, 0, row + PIECE)


@gluon.jit
def _row_sums(o_tile, g_tile, D: gl.constexpr, layout: gl.constexpr):
    """Sums of the products of rows of two tiles, in the order of additions of ``_prepare_kernel``
    where Triton knows that rows begin at multiples of 16 elements. Four lanes share a row, 64
    columns at a time: what there are registers for.
    """
    gl.static_assert(D <= 128)
    ROWS: gl.constexpr = o_tile.shape[0]
    for k in gl.static_range(0, D, 64):
        o = o_tile.slice(k, 64, 1).load(layout).to(gl.float32)
        x = o * g_tile.slice(k, 64, 1).load(layout).to(gl.float32)
        part = gl.sum(x.reshape([ROWS, 2, 4, 8]), 3)
        if k == 0:
            eighths = part
        else:
            eighths += part
    return gl.convert_layout(gl.sum(gl.sum(eighths, 1), 1), gl.SliceLayout(1, layout))


@gluon.jit
def _zero_tiles(sums_ptr, turn_ptr, base, past, SIZE: gl.constexpr, ORDERED: gl.constexpr):
    """Zeros for dQ and, ORDERED, for turns, of the tiles of rows from ``base`` to ``past``."""
    if ORDERED:
        for tile in range(base, past):
            gl.store(turn_ptr + tile, 0)
    WIDTH: gl.constexpr = 512 * gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    zeros = gl.zeros([WIDTH], gl.float32, layout)
    places = sums_ptr + base.to(gl.int64) * SIZE + gl.arange(0, WIDTH, layout)
    for _ in range((past - base) * (SIZE // WIDTH)):
        gl.store(places, zeros)
        places += WIDTH


@gluon.jit
def _prepare_tiles(
    o_desc, g_desc, pieces, come, inputs, turn_ptr, base, past, num_tiles,
    HEADS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, ORDERED: gl.constexpr,
    HAS_GRAD_LSE: gl.constexpr,
):  # fmt: skip
    """Log-sum-exp (inf for rows that see nothing), delta and zeros of the tiles of rows from
    ``base`` to ``past``.
    """
    stats_ptr, lse_ptr, grad_lse_ptr, sums_ptr = inputs
    num_queries = o_desc.shape[2]
    rows = num_tiles * BLOCK_M
    PIECE: gl.constexpr = o_desc.block_type.shape[2]
    SLOTS: gl.constexpr = come.shape[0]
    total = (past - base) * (BLOCK_M // PIECE)
    plane = base // num_tiles
    row = (base - plane * num_tiles) * BLOCK_M
    next_plane, next_row = plane, row
    for n in range(gl.minimum(total, SLOTS)):
        next_plane, next_row = _bring(
            o_desc, g_desc, pieces, come, n, next_plane, next_row, rows, HEADS
        )
    _zero_tiles(sums_ptr, turn_ptr, base, past, BLOCK_M * D, ORDERED)
    # Eight lanes side by side read 16 bytes of eight rows: no two from the same banks.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [gl.num_warps(), 1], [0, 1])
    offs = gl.arange(0, PIECE, gl.SliceLayout(1, layout))
    for n in range(total):
        inside = offs < num_queries - row
        place = plane.to(gl.int64) * num_queries + row
        lse = gl.load(lse_ptr + place + offs, mask=inside, other=float("-inf"))
        less = gl.zeros_like(lse)
        if HAS_GRAD_LSE:
            less = gl.load(grad_lse_ptr + place + offs, mask=inside, other=0.0) * _LOG2_E
        slot = n % SLOTS
        mbarrier.wait(come.index(slot), (n // SLOTS) & 1)
        o_tile = pieces.index(slot).reshape([PIECE, D])
        g_tile = pieces.index(SLOTS + slot).reshape([PIECE, D])
        delta = _row_sums(o_tile, g_tile, D, layout) - less
        sees = lse != float("-inf")
        tile = base + n // (BLOCK_M // PIECE)
        places = stats_ptr + tile.to(gl.int64) * (2 * BLOCK_M) + row % BLOCK_M + offs
        gl.store(places, gl.where(sees, lse, float("inf")))
        gl.store(places + BLOCK_M, gl.where(sees, delta, 0.0))
        plane, row = _after(plane, row, rows, PIECE)
        # All have stored sums of what they read: no load is on its way.
        barrier()
        if n + SLOTS < total:
            next_plane, next_row = _bring(
                o_desc, g_desc, pieces, come, n + SLOTS, next_plane, next_row, rows, HEADS
            )


@gluon.jit
def _prepare_share(
    o_desc, g_desc, pieces, come, inputs, ready_ptr, turn_ptr, part, within, shares, key_planes,
    num_tiles,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    SECTION: gl.constexpr, ORDERED: gl.constexpr, AHEAD: gl.constexpr, STATISTICS: gl.constexpr,
    HAS_GRAD_LSE: gl.constexpr,
):  # fmt: skip
    """Prepare share ``within`` of the section AHEAD after ``part``, then count it."""
    heads = gl.minimum(key_planes - (part + AHEAD) * SECTION, SECTION)
    if heads > 0:
        count = heads * (GROUP * num_tiles)
        share = (count + shares - 1) // shares
        begin = (part + AHEAD) * (SECTION * GROUP) * num_tiles
        base = begin + gl.minimum(within * share, count)
        past = begin + gl.minimum((within + 1) * share, count)
        if STATISTICS:
            _prepare_tiles(
                o_desc, g_desc, pieces, come, inputs, turn_ptr, base, past, num_tiles,
                HEADS, D, BLOCK_M, ORDERED, HAS_GRAD_LSE,
            )  # fmt: skip
        else:
            _zero_tiles(inputs[3], turn_ptr, base, past, BLOCK_M * D, ORDERED)
        # What threads wrote, for the copy engine of who reads the count, and fences again.
        fence_async()
        barrier()
        gl.atomic_add(ready_ptr, 1, sem="release")
