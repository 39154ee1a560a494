"""Triton kernels of replacement, and their launchers.

All of them move memory and do little else, so the tiles are a few rows by up to 1024 components:
every thread has several 16-byte loads under way. Rows are addressed by two strides, so a slice of a
sequence needs no copy. No kernel adds floats atomically: every sum has one order, so results repeat
bitwise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device
from .config import place_sums
from .layout import (
    accumulator,
    as_rows,
    column_block,
    gdc_launch_dependents,
    gdc_wait,
    launches_overlap,
    row_offset,
)


@triton.jit
def _replace_kernel(
    embeddings_ptr, pool_ptr, where_ptr, index_ptr, out_ptr,
    rows, length, dim, pool_size, stride_eb, stride_el, stride_pm,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows by BLOCK_C components; grid = (cdiv(rows, BLOCK_R), cdiv(C, BLOCK_C))."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (col < dim)[None, :]
    replaced = tl.load(where_ptr + row, mask=row < rows, other=0) != 0
    index = tl.load(index_ptr + row, mask=replaced, other=-1).to(tl.int64)
    known = ((index >= 0) & (index < pool_size))[:, None]
    # Each row is read from one of the two: lanes that are masked off cause no traffic.
    kept = tl.load(
        embeddings_ptr + row_offset(row, length, stride_eb, stride_el)[:, None] + col[None, :],
        mask=inside & ~replaced[:, None],
        other=0.0,
    )
    # An index that the pool does not have must not pass unseen, and can't raise from here: NaN.
    drawn = tl.load(
        pool_ptr + index[:, None] * stride_pm + col[None, :],
        mask=inside & known,
        other=float("nan"),
    ).to(out_ptr.dtype.element_ty)
    place = row.to(tl.int64)[:, None] * dim + col[None, :]
    tl.store(out_ptr + place, tl.where(replaced[:, None], drawn, kept), mask=inside)


@triton.jit
def _drawn_rows(where_ptr, index_ptr, row, rows, pool_size):
    """The pool row that each row drew, ``pool_size`` where it drew none."""
    replaced = tl.load(where_ptr + row, mask=row < rows, other=0) != 0
    index = tl.load(index_ptr + row, mask=replaced, other=-1)
    return tl.where((index >= 0) & (index < pool_size), index, pool_size).to(tl.int32)


@triton.jit
def _order_group(
    where_ptr, index_ptr, work_ptr, rows, pool_size, group,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Sort the rows that drew one of GROUP pool rows, stably.

    ``work`` is ``order`` (rows,), a list of the same size, and ``bounds`` (pool_size + 1,): pool
    row m was drawn by order[bounds[m]:bounds[m + 1]], in ascending order.
    """
    first = group * GROUP
    list_ptr, bounds_ptr = work_ptr + rows, work_ptr + 2 * rows
    lane, entries, member = tl.arange(0, BLOCK), tl.arange(0, LIST), tl.arange(0, GROUP)
    below = tl.zeros((BLOCK,), tl.int32)
    for s in range(0, rows, BLOCK):
        drawn = _drawn_rows(where_ptr, index_ptr, s + lane, rows, pool_size)
        below += (drawn < first).to(tl.int32)
    base = tl.sum(below, axis=0)
    list_ptr += base
    count = base - base
    for s in range(0, rows, BLOCK):
        drawn = _drawn_rows(where_ptr, index_ptr, s + lane, rows, pool_size)
        own = (drawn >= first) & (drawn < first + GROUP) & (drawn < pool_size)
        place = count + tl.cumsum(own.to(tl.int32), axis=0) - 1
        tl.store(list_ptr + place, s + lane, mask=own)
        count += tl.sum(own.to(tl.int32), axis=0)
    # The rest reads what other threads listed.
    tl.debug_barrier()
    sizes = tl.zeros((GROUP,), tl.int32)
    for s in range(0, count, LIST):
        row = tl.load(list_ptr + s + entries, mask=s + entries < count, other=0)
        drawn = tl.load(index_ptr + row, mask=s + entries < count, other=-1).to(tl.int32) - first
        sizes += tl.sum((drawn[None, :] == member[:, None]).to(tl.int32), axis=1)
    begin = base + tl.cumsum(sizes, axis=0) - sizes
    tl.store(bounds_ptr + first + member, begin, mask=first + member < pool_size)
    tl.store(bounds_ptr + pool_size, base + count, mask=first + GROUP >= pool_size)
    for s in range(0, count, LIST):
        row = tl.load(list_ptr + s + entries, mask=s + entries < count, other=0)
        drawn = tl.load(index_ptr + row, mask=s + entries < count, other=-1).to(tl.int32) - first
        hit = (drawn[None, :] == member[:, None]).to(tl.int32)
        place = begin[:, None] + tl.cumsum(hit, axis=1) - 1
        place = tl.sum(place * hit, axis=0)
        tl.store(work_ptr + place, row, mask=s + entries < count)
        begin += tl.sum(hit, axis=1)


@triton.jit
def _keep_gradient(
    grad_ptr, where_ptr, out_ptr, program, rows, length, dim, stride_gb, stride_gl,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of kept rows, 0 elsewhere, for one tile of BLOCK_R rows by BLOCK_C components."""
    columns = tl.cdiv(dim, BLOCK_C)
    row = program // columns * BLOCK_R + tl.arange(0, BLOCK_R)
    col = program % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (col < dim)[None, :]
    keep = tl.load(where_ptr + row, mask=row < rows, other=1) == 0
    offset = row_offset(row, length, stride_gb, stride_gl)[:, None] + col[None, :]
    value = tl.load(grad_ptr + offset, mask=inside & keep[:, None], other=0.0)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * dim + col[None, :], value, mask=inside)


@triton.jit
def _sort_kernel(
    where_ptr, index_ptr, work_ptr, rows, pool_size, columns,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, LIST: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sort what drew GROUP pool rows, and no ticket drawn for them; grid = (cdiv(M, GROUP),).

    The tickets, (pool_size, columns), lie behind what ``_order_group`` writes.
    """
    if OVERLAP:
        gdc_launch_dependents()
    _order_group(
        where_ptr, index_ptr, work_ptr, rows, pool_size, tl.program_id(0), GROUP, BLOCK, LIST
    )  # fmt: skip
    first = tl.program_id(0) * GROUP * columns
    lane = tl.arange(0, GROUP * COLUMNS)
    inside = (lane < GROUP * columns) & (first + lane < pool_size * columns)
    tickets = work_ptr + 2 * rows + pool_size + 1
    tl.store(tickets + first + lane, tl.zeros((GROUP * COLUMNS,), tl.int32), mask=inside)


@triton.jit
def _add_rows(
    acc, grad_ptr, work_ptr, first, last, col, length, dim, strides, BLOCK_R: tl.constexpr
):
    """``acc`` plus the gradient rows order[first:last], BLOCK_R at a time."""
    for start in range(first, last, BLOCK_R):
        entry = start + tl.arange(0, BLOCK_R)
        row = tl.load(work_ptr + entry, mask=entry < last, other=0)
        offset = row_offset(row, length, strides[0], strides[1])
        acc += tl.sum(_rows(grad_ptr, offset, entry < last, col, dim).to(acc.dtype), axis=0)
    return acc


@triton.jit
def _rows(grad_ptr, offset, mask, col, dim):
    """Components ``col`` of the rows that begin at ``offset``."""
    inside = mask[:, None] & (col < dim)[None, :]
    return tl.load(grad_ptr + offset[:, None] + col[None, :], mask=inside, other=0.0)


@triton.jit
def _sum_segment(
    grad_ptr, work_ptr, pool_ptr, m, sizes, strides,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of pool row m, if no more than CHUNK tokens drew it.

    Mostly these are few, so the first BLOCK_R are looked up once for all components.
    """
    length, dim, bounds_ptr = sizes[1], sizes[2], work_ptr + 2 * sizes[0]
    first, last = tl.load(bounds_ptr + m), tl.load(bounds_ptr + m + 1)
    if last - first <= CHUNK:
        entry = first + tl.arange(0, BLOCK_R)
        row = tl.load(work_ptr + entry, mask=entry < last, other=0)
        offset = row_offset(row, length, strides[0], strides[1])
        for c in range(0, dim, BLOCK_C):
            col = c + tl.arange(0, BLOCK_C)
            total = tl.sum(_rows(grad_ptr, offset, entry < last, col, dim).to(ACC), axis=0)
            total = _add_rows(
                total, grad_ptr, work_ptr, first + BLOCK_R, last, col, length, dim, strides, BLOCK_R
            )
            whole = total.to(pool_ptr.dtype.element_ty)
            tl.store(pool_ptr + m.to(tl.int64) * dim + col, whole, mask=col < dim)


@triton.jit
def _sum_part(
    grad_ptr, work_ptr, pool_ptr, part_ptr, m, chunk, total, column, sizes, strides,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What lies in one chunk of positions of pool row m's segment, if that is longer than CHUNK.

    At most two such segments meet a chunk: one covers its first position, one begins behind it. So
    there are two places for sums per chunk. Whoever draws the segment's last ticket adds up its
    sums, in their order.
    """
    rows, length, dim, pool_size = sizes[0], sizes[1], sizes[2], sizes[3]
    bounds_ptr = work_ptr + 2 * rows
    col = column * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = tl.load(bounds_ptr + m), tl.load(bounds_ptr + m + 1)
    if last - first > CHUNK:
        low, high = chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, total)
        part = _add_rows(
            tl.zeros((BLOCK_C,), ACC), grad_ptr, work_ptr, tl.maximum(first, low),
            tl.minimum(last, high), col, length, dim, strides, BLOCK_R,
        )  # fmt: skip
        place = (2 * chunk + (first > low).to(tl.int32)).to(tl.int64)
        tl.store(part_ptr + place * dim + col, part, mask=col < dim)
        # All of this program's writes come before its ticket, all tickets before the last reads.
        tl.debug_barrier()
        ticket_ptr = bounds_ptr + pool_size + 1 + m * tl.cdiv(dim, BLOCK_C) + column
        ticket = tl.atomic_add(ticket_ptr, 1)
        begin, end = first // CHUNK, (last - 1) // CHUNK
        if ticket == end - begin:
            acc = tl.zeros((BLOCK_C,), ACC)
            for start in range(begin, end + 1, BLOCK_R):
                other = start + tl.arange(0, BLOCK_R)
                places = (2 * other + (first > other * CHUNK).to(tl.int32)).to(tl.int64)
                mask = (other <= end)[:, None] & (col < dim)[None, :]
                part_ptrs = part_ptr + places[:, None] * dim + col[None, :]
                found = tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
                acc += tl.sum(found, axis=0)
            whole = acc.to(pool_ptr.dtype.element_ty)
            tl.store(pool_ptr + m.to(tl.int64) * dim + col, whole, mask=col < dim)


@triton.jit
def _sum_chunk(
    grad_ptr, where_ptr, index_ptr, work_ptr, pool_ptr, part_ptr, chunk, column, sizes, strides,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The long segments that meet CHUNK positions: of the first position and of the last."""
    rows, pool_size = sizes[0], sizes[3]
    total = tl.load(work_ptr + 2 * rows + pool_size)
    low = chunk * CHUNK
    if low < total:
        high = tl.minimum(low + CHUNK, total)
        one = tl.load(index_ptr + tl.load(work_ptr + low)).to(tl.int32)
        two = tl.load(index_ptr + tl.load(work_ptr + high - 1)).to(tl.int32)
        _sum_part(
            grad_ptr, work_ptr, pool_ptr, part_ptr, one, chunk, total, column, sizes, strides,
            BLOCK_R, BLOCK_C, CHUNK, ACC,
        )  # fmt: skip
        if two != one:
            _sum_part(
                grad_ptr, work_ptr, pool_ptr, part_ptr, two, chunk, total, column, sizes, strides,
                BLOCK_R, BLOCK_C, CHUNK, ACC,
            )  # fmt: skip


@triton.jit
def _tile_or_sum(program, sums, lead, ratio):
    """Which tile a program computes, or which sum; -1 is none.

    ``lead`` tiles, then by turns ``ratio`` tiles and a sum, then the tiles that are left.
    """
    turn, place = (program - lead) // (ratio + 1), (program - lead) % (ratio + 1)
    mixed = (program >= lead) & (turn < sums)
    tile = tl.where(mixed, lead + turn * ratio + place, program - tl.where(program < lead, 0, sums))
    return tile, tl.where(mixed & (place == ratio), turn, -1)


@triton.jit
def _replace_gradient_kernel(
    grad_ptr, where_ptr, index_ptr, out_ptr, work_ptr, pool_ptr, part_ptr, sizes, plan, strides,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SUM_R: tl.constexpr, SUM_C: tl.constexpr,
    CHUNK: tl.constexpr, ACC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Tiles of the embeddings' gradient, and sums of the gradient rows that drew one pool row.

    sizes: rows, rows per image, components, pool rows. plan: tiles, chunks, sums, and where these
    lie among the tiles, as in ``_tile_or_sum``. The tiles need nothing of the sort and run beside
    it where kernels may overlap; sums, which wait for one address after the other, run beside
    tiles. Segments longer than CHUNK are summed in chunks, as when all tokens drew one row. The
    order of summation is a function of the indices.
    """
    rows, length, dim, columns = sizes[0], sizes[1], sizes[2], tl.cdiv(sizes[2], BLOCK_C)
    tile, item = _tile_or_sum(tl.program_id(0), plan[2], plan[3], plan[4])
    if item < 0:
        if tile < plan[0]:
            _keep_gradient(
                grad_ptr, where_ptr, out_ptr, tile, rows, length, dim, strides[0], strides[1],
                BLOCK_R, BLOCK_C,
            )  # fmt: skip
    else:
        if OVERLAP:
            gdc_wait()
        if item < plan[1] * columns:
            _sum_chunk(
                grad_ptr, where_ptr, index_ptr, work_ptr, pool_ptr, part_ptr, item // columns,
                item % columns, sizes, strides, SUM_R, BLOCK_C, CHUNK, ACC,
            )  # fmt: skip
        else:
            _sum_segment(
                grad_ptr, work_ptr, pool_ptr, item - plan[1] * columns, sizes, strides,
                SUM_R, SUM_C, CHUNK, ACC,
            )  # fmt: skip


ROWS = 4
# Rows per tile of the embeddings' gradient. H200, 32 x 2048 tokens: 295 us with 8, 316 with 4, 320
# with 16.
GRADIENT_ROWS = 8
# Gradient rows that a sum reads at a time, bytes of each of them, and positions that it reads at
# most. H200, a trial in docs/matching_trials.md: 76.3 us with 4 KiB at 16 x 1024, 79.7 with 2.
SUM_ROWS, SUM_BYTES, CHUNK = 4, 4096, 256
# Pool rows that one program sorts for, tokens that it reads at a time, and drawn tokens likewise.
# H100, all tokens of 16 x 1024 drew one row: 266 us, 303 with 2048, 128 and 4 warps.
GROUP, SORT_BLOCK, SORT_LIST, SORT_WARPS = 32, 8192, 256, 16


def _dense(where: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return where.contiguous(), index.contiguous()


def replace_tokens_fwd(embeddings: Tensor, where: Tensor, pool: Tensor, index: Tensor) -> Tensor:
    """Launch ``_replace_kernel``."""
    out = embeddings.new_empty(embeddings.shape)
    if out.numel() == 0:
        return out
    x = as_rows(embeddings)
    pool = pool if pool.stride(-1) == 1 else pool.contiguous()
    rows, dim = where.numel(), x.shape[2]
    block = column_block(dim)
    with on_device(x):
        _replace_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(dim, block))](
            x, pool, *_dense(where, index), out,
            rows, x.shape[1], dim, pool.shape[0], x.stride(0), x.stride(1), pool.stride(0),
            BLOCK_R=ROWS, BLOCK_C=block,
        )  # fmt: skip
    return out


def replace_tokens_bwd(
    grad_out: Tensor,
    where: Tensor,
    index: Tensor,
    pool_size: int,
    pool_dtype: torch.dtype,
    embeddings_grad: bool,
    pool_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Launch ``_sort_kernel`` and ``_replace_gradient_kernel``, as wanted."""
    embeddings = grad_out.new_empty(grad_out.shape if embeddings_grad else (0,))
    shape = (pool_size if pool_grad else 0, grad_out.shape[-1])
    if grad_out.numel() == 0:
        return embeddings, grad_out.new_zeros(shape, dtype=pool_dtype)
    pool = grad_out.new_empty(shape, dtype=pool_dtype)
    x = as_rows(grad_out)
    rows, length, dim = where.numel(), x.shape[1], x.shape[2]
    block, acc = column_block(dim), accumulator(x.dtype, pool_dtype)
    columns = triton.cdiv(dim, block)
    tiles = triton.cdiv(rows, GRADIENT_ROWS) * columns if embeddings_grad else 0
    chunks = triton.cdiv(rows, CHUNK) if shape[0] else 0
    sums = columns * chunks + shape[0]
    if tiles + sums == 0:
        return embeddings, pool
    programs, *among = place_sums(tiles, sums)
    where, index = _dense(where, index)
    overlap = launches_overlap(x) and sums > 0
    work = index.new_empty(
        (2 * rows + pool_size * (1 + columns) + 1,) if sums else (0,), dtype=torch.int32
    )
    parts = x.new_empty(
        (2 * chunks, dim), dtype=torch.float64 if acc == tl.float64 else torch.float32
    )
    with on_device(x):
        if sums:
            _sort_kernel[(triton.cdiv(pool_size, GROUP),)](
                where, index, work, rows, pool_size, columns, GROUP=GROUP, BLOCK=SORT_BLOCK,
                LIST=SORT_LIST, COLUMNS=triton.next_power_of_2(columns), OVERLAP=overlap,
                num_warps=SORT_WARPS,
            )  # fmt: skip
        _replace_gradient_kernel[(programs,)](
            x, where, index, embeddings, work, pool, parts, (rows, length, dim, pool_size),
            (tiles, chunks, sums, *among), (x.stride(0), x.stride(1)),
            BLOCK_R=GRADIENT_ROWS, BLOCK_C=block, SUM_R=SUM_ROWS,
            SUM_C=column_block(dim, SUM_BYTES // x.element_size()), CHUNK=CHUNK, ACC=acc,
            OVERLAP=overlap, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return embeddings, pool
