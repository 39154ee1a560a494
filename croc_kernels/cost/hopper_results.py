"""Results of the sm_90 kernel: costs, and keys of nearest rows.

The tensor core leaves a thread two neighbouring columns of every eight. Written like that, costs
leave in pieces of 32 bytes, of eight rows at a time, and both multiplying groups wait for them. So
where the pool fills whole tiles, ``spread_pool`` has TMA lay 16 of its rows into shared memory as 0
1 4 5 8 9 12 13, 2 3 6 7 10 11 14 15: the same thread then has four neighbours, and a row's piece is
64 bytes.
"""

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .config import HopperCostConfig
from .hopper_rows import row_state

_KEEP_NAN = gl.constexpr(tl.PropagateNan.ALL)
_NO_INDEX = gl.constexpr(2**31 - 1)
SPREAD = gl.NVMMASharedLayout(128, 16, rank=5)


def spread_box(picked: HopperCostConfig) -> list[int]:
    """What ``spread_pool`` copies at a time: half a tile."""
    return [picked.block_n // 32, 2, 4, 2, picked.block_k]


def spread_pool(pool: Tensor, picked: HopperCostConfig) -> TensorDescriptor:
    """Row 16 i + 4 q + 2 h + e of the pool as [i, h, q, e]; a multiple of 16 rows."""
    (m, dim), stride = pool.shape, pool.stride(0)
    strides = [16 * stride, 2 * stride, 4 * stride, stride, 1]
    return TensorDescriptor(pool, [m // 16, 2, 4, 2, dim], strides, spread_box(picked), SPREAD)


@gluon.jit
def _halves(acc, COLS: gl.constexpr):
    """COLS columns and COLS more: little beside the products is in registers at a time."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    low, high = acc.reshape([64, 2, COLS]).permute((0, 2, 1)).split()
    low = gl.convert_layout(low, layout, assert_trivial=True)
    return low, gl.convert_layout(high, layout, assert_trivial=True)


@gluon.jit
def _in_order(acc, COLS: gl.constexpr):
    """Columns that were multiplied in the order of ``spread_pool``: what a thread has of a row are
    4 neighbours, and no value moves.
    """
    gl.static_assert(COLS == 32)
    layout: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, 32],
    )  # fmt: skip
    acc = acc.reshape([64, 2, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([64, 32])
    return gl.convert_layout(acc, layout, assert_trivial=True)


@gluon.jit
def store_costs(
    pointers, sizes, acc, row, x_norm, p_line, first_n, AT: gl.constexpr,
    COLS: gl.constexpr, METRIC: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Turn products of COLS columns, from column AT of the tile on, into costs and write them."""
    if COLS > 32:
        HALF: gl.constexpr = COLS // 2
        low, high = _halves(acc, HALF)
        store_costs(pointers, sizes, low, row, x_norm, p_line, first_n, AT, HALF, METRIC, EVEN)
        store_costs(
            pointers, sizes, high, row, x_norm, p_line, first_n, AT + HALF, HALF, METRIC, EVEN
        )
    else:
        if EVEN:
            acc = _in_order(acc, COLS)
        LAYOUT: gl.constexpr = acc.type.layout
        row = gl.convert_layout(row, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
        x_norm = gl.convert_layout(x_norm, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
        rows, m = sizes[0], sizes[1]
        col = first_n + AT + gl.arange(0, COLS, layout=gl.SliceLayout(0, LAYOUT))
        p_norm = p_line.slice(AT, COLS).load(gl.SliceLayout(0, LAYOUT))
        if METRIC == "cosine":
            cost = 1.0 - acc * x_norm[:, None] * p_norm[None, :]
        else:
            cost = gl.fma(acc, gl.full_like(acc, -2.0), x_norm[:, None] + p_norm[None, :])
        # The NaN of a bad input stays: it would become a perfect match.
        cost = gl.maximum(cost, gl.zeros_like(cost), propagate_nan=_KEEP_NAN)
        if METRIC == "l2":
            cost = gl.sqrt(cost)
        if pointers[2] is not None:
            cost = gl.where((x_norm < 0.0)[:, None], 0.0, cost)
        places = pointers[5] + row.to(gl.int64)[:, None] * m + col[None, :]
        mask = (row < rows)[:, None]
        if not EVEN:
            mask = mask & (col < m)[None, :]
        gl.store(places, cost, mask=mask)


@gluon.jit
def best_columns(
    acc, p_line, AT: gl.constexpr,
    COLS: gl.constexpr, LAYOUT: gl.constexpr, METRIC: gl.constexpr,
):  # fmt: skip
    """Lowest score of each row and the lowest of the tile's columns that has it, from column AT on.

    NaN never wins.
    """
    if COLS > 64:
        low, high = _halves(acc, COLS // 2)
        best, index = best_columns(low, p_line, AT, COLS // 2, LAYOUT, METRIC)
        other, column = best_columns(high, p_line, AT + COLS // 2, COLS // 2, LAYOUT, METRIC)
        return better(best, index, other, column)
    else:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
        col = AT + gl.arange(0, COLS, layout=gl.SliceLayout(0, layout))
        p_norm = p_line.slice(AT, COLS).load(gl.SliceLayout(0, layout))
        # The token's own norm is the same for all columns, so it is left out.
        score = -acc * p_norm[None, :] if METRIC == "cosine" else p_norm[None, :] - 2.0 * acc
        # Of a number and NaN min() takes the number.
        best = gl.min(score, axis=1)
        index = gl.min(gl.where(score == best[:, None], col[None, :], _NO_INDEX), axis=1)
        finite = best < float("inf")
        best, index = gl.where(finite, best, float("inf")), gl.where(finite, index, _NO_INDEX)
        best = gl.convert_layout(best, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
        return best, gl.convert_layout(index, gl.SliceLayout(1, LAYOUT), assert_trivial=True)


@gluon.jit
def better(best, index, other, column):
    """The better of two results, the first if they are equal: its columns are lower."""
    later = other < best
    return gl.where(later, other, best), gl.where(later, column, index)


@gluon.jit
def lower_keys(pointers, sizes, best, index, row, first_n):
    """Lower each row's key: the score, then the column."""
    _, live, valid = row_state(row, pointers, sizes)
    # Integers in the order of the floats; 0 is added so that -0 is 0.
    bits = (best + 0.0).to(gl.int32, bitcast=True)
    bits = gl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (bits.to(gl.int64) << 32) | (first_n + index).to(gl.int64)
    found = live & valid & (index != _NO_INDEX)
    gl.atomic_min(pointers[5] + row, key, mask=found, sem="relaxed")
