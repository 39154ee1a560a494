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

from .layout import accumulator, as_rows, column_block, on_device, row_offset


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
def _replace_gradient_kernel(
    grad_ptr, where_ptr, index_ptr, out_ptr, work_ptr, rows, length, dim, pool_size, groups,
    stride_gb, stride_gl, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Sort what drew each group of pool rows, and the embeddings' gradient beside it.

    grid = (groups + tiles of the gradient,). The sort waits for memory where the tiles wait for
    bandwidth: H200, 32 x 2048 tokens, 98 us and 235 us alone, 256 together. The sums lose by the
    same trick. Without groups it is left out.
    """
    program = tl.program_id(0)
    if program < groups:
        _order_group(
            where_ptr, index_ptr, work_ptr, rows, pool_size, program, GROUP, BLOCK, LIST
        )  # fmt: skip
    else:
        _keep_gradient(
            grad_ptr, where_ptr, out_ptr, program - groups, rows, length, dim,
            stride_gb, stride_gl, BLOCK_R, BLOCK_C,
        )  # fmt: skip


@triton.jit
def _pool_gradient_kernel(
    grad_ptr, work_ptr, out_ptr, rows, length, dim, stride_gb, stride_gl,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum of the gradient rows that drew one pool row; grid = (pool rows, cdiv(C, BLOCK_C)).

    ``work`` is what ``_order_group`` wrote: the order of summation is a function of the indices.
    """
    m = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    bounds_ptr = work_ptr + 2 * rows
    first, last = tl.load(bounds_ptr + m), tl.load(bounds_ptr + m + 1)
    acc = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for start in range(first, last, BLOCK_R):
        entry = start + tl.arange(0, BLOCK_R)
        row = tl.load(work_ptr + entry, mask=entry < last, other=0)
        offset = row_offset(row, length, stride_gb, stride_gl)[:, None] + col[None, :]
        mask = (entry < last)[:, None] & (col < dim)[None, :]
        acc += tl.load(grad_ptr + offset, mask=mask, other=0.0).to(ACC)
    total = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m.to(tl.int64) * dim + col, total, mask=col < dim)


ROWS = 4
# Rows per tile of the embeddings' gradient. H200, 32 x 2048 tokens: 295 us with 8, 316 with 4, 320
# with 16.
GRADIENT_ROWS = 8
# Tile of the sums. 16 x 1024 tokens: 91 us, 99 with 8 x 1024, 149 with 4 x 512. 2 x 1024 takes 89
# there, but twice as many steps where all tokens drew one pool row.
SUM_ROWS, SUM_COLUMNS = 4, 1024
# Pool rows that one program sorts for, tokens that it reads at a time, and drawn tokens likewise.
GROUP, SORT_BLOCK, SORT_LIST = 16, 2048, 128


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
    """Launch ``_replace_gradient_kernel`` and ``_pool_gradient_kernel``, as wanted."""
    embeddings = grad_out.new_empty(grad_out.shape if embeddings_grad else (0,))
    shape = (pool_size if pool_grad else 0, grad_out.shape[-1])
    if grad_out.numel() == 0:
        return embeddings, grad_out.new_zeros(shape, dtype=pool_dtype)
    pool = grad_out.new_empty(shape, dtype=pool_dtype)
    x = as_rows(grad_out)
    rows, length, dim = where.numel(), x.shape[1], x.shape[2]
    strides, block = (x.stride(0), x.stride(1)), column_block(dim)
    groups = triton.cdiv(shape[0], GROUP)
    tiles = triton.cdiv(rows, GRADIENT_ROWS) * triton.cdiv(dim, block) if embeddings_grad else 0
    if groups + tiles == 0:
        return embeddings, pool
    work = index.new_empty((2 * rows + pool_size + 1,) if groups else (0,), dtype=torch.int32)
    with on_device(x):
        _replace_gradient_kernel[(groups + tiles,)](
            x, *_dense(where, index), embeddings, work, rows, length, dim, pool_size, groups,
            *strides, BLOCK_R=GRADIENT_ROWS, BLOCK_C=block,
            GROUP=GROUP, BLOCK=SORT_BLOCK, LIST=SORT_LIST,
        )  # fmt: skip
        if groups:
            block = column_block(dim, SUM_COLUMNS)
            _pool_gradient_kernel[(pool_size, triton.cdiv(dim, block))](
                x, work, pool, rows, length, dim, *strides,
                BLOCK_R=SUM_ROWS, BLOCK_C=block, ACC=accumulator(x.dtype, pool_dtype),
            )  # fmt: skip
    return embeddings, pool
