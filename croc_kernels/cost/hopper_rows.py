"""Rows of the sm_90 kernel: where tokens lie and which count.

``pointers``: tokens, index, row counts, pool, pool norms, result, state, squares. ``sizes``: rows,
columns, components, rows per image, sources, strides of images, tokens and pool rows. ``state``,
``squares``: see hopper_norms.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def tile_place(tile, rows, m, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """Row and column tile: GROUP_M row tiles share a column tile in the L2."""
    tiles_m, tiles_n = gl.cdiv(rows, BLOCK_M), gl.cdiv(m, BLOCK_N)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = gl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first + within % height, within // height


@gluon.jit
def tile_sharers(
    tile, tile_m, sizes, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr
):
    """Tiles of this tile's row that programs reach in the first round of that row.

    And whether this tile is one of them.
    """
    tiles_m, tiles_n = gl.cdiv(sizes[0], BLOCK_M), gl.cdiv(sizes[1], BLOCK_N)
    top = tile_m // GROUP_M * GROUP_M
    height = gl.minimum(tiles_m - top, GROUP_M)
    first = top * tiles_n + tile_m - top
    end = (first // gl.num_programs(0) + 1) * gl.num_programs(0)
    return gl.minimum(gl.cdiv(end - first, height), tiles_n), tile < end


@gluon.jit
def row_state(row, pointers, sizes):
    """Where a row's token starts (0 if nowhere), whether the row counts, whether it exists."""
    _, index_ptr, num_rows_ptr, _, _, _, _, _ = pointers
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
