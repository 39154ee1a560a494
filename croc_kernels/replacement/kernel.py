"""Triton kernels of replacement and reconstruction loss, and their launchers.

All of them move memory and do little else, so the tiles are a few rows by up to 1024 components:
every thread has several 16-byte loads under way. Rows are addressed by two strides, so a slice of a
sequence needs no copy. No kernel adds floats atomically: every sum has one order, so results repeat
bitwise.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import KEEP

_KEEP = tl.constexpr(KEEP)


@triton.jit
def _row_offset(row, length, stride_b, stride_l):
    """Element offset of flat row ``row`` of a (B, length, C) tensor."""
    return (row // length).to(tl.int64) * stride_b + (row % length).to(tl.int64) * stride_l


@triton.jit
def _replace_kernel(
    embeddings_ptr, pool_ptr, source_ptr, out_ptr,
    rows, length, dim, pool_size, stride_eb, stride_el, stride_pm,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows by BLOCK_C components; grid = (cdiv(rows, BLOCK_R), cdiv(C, BLOCK_C))."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (col < dim)[None, :]
    source = tl.load(source_ptr + row, mask=row < rows, other=_KEEP)
    keep = (source == _KEEP)[:, None]
    known = ((source >= 0) & (source < pool_size))[:, None]
    # Each row is read from one of the two: lanes that are masked off cause no traffic.
    kept = tl.load(
        embeddings_ptr + _row_offset(row, length, stride_eb, stride_el)[:, None] + col[None, :],
        mask=inside & keep,
        other=0.0,
    )
    # An index that the pool does not have must not pass unseen, and can't raise from here: NaN.
    drawn = tl.load(
        pool_ptr + source[:, None] * stride_pm + col[None, :],
        mask=inside & known,
        other=float("nan"),
    ).to(out_ptr.dtype.element_ty)
    place = row.to(tl.int64)[:, None] * dim + col[None, :]
    tl.store(out_ptr + place, tl.where(keep, kept, drawn), mask=inside)


@triton.jit
def _keep_gradient_kernel(
    grad_ptr, source_ptr, out_ptr, rows, length, dim, stride_gb, stride_gl,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of kept rows, 0 elsewhere; grid = (cdiv(rows, BLOCK_R), cdiv(C, BLOCK_C))."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (col < dim)[None, :]
    keep = tl.load(source_ptr + row, mask=row < rows, other=0) == _KEEP
    offset = _row_offset(row, length, stride_gb, stride_gl)[:, None] + col[None, :]
    value = tl.load(grad_ptr + offset, mask=inside & keep[:, None], other=0.0)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * dim + col[None, :], value, mask=inside)


@triton.jit
def _pool_gradient_kernel(
    grad_ptr, order_ptr, bounds_ptr, out_ptr, length, dim, stride_gb, stride_gl,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum of the gradient rows that drew one pool row; grid = (pool rows, cdiv(C, BLOCK_C)).

    ``order`` lists the flat rows sorted by the pool row they drew, and pool row m owns its entries
    bounds[m] to bounds[m + 1], in ascending order: the order of summation is a function of the
    indices.
    """
    m = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = tl.load(bounds_ptr + m), tl.load(bounds_ptr + m + 1)
    acc = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for start in range(first, last, BLOCK_R):
        entry = start + tl.arange(0, BLOCK_R)
        row = tl.load(order_ptr + entry, mask=entry < last, other=0)
        offset = _row_offset(row, length, stride_gb, stride_gl)[:, None] + col[None, :]
        mask = (entry < last)[:, None] & (col < dim)[None, :]
        acc += tl.load(grad_ptr + offset, mask=mask, other=0.0).to(ACC)
    total = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m.to(tl.int64) * dim + col, total, mask=col < dim)


@triton.jit
def _loss_kernel(
    prediction_ptr, target_ptr, where_ptr, gradient_ptr, partial_ptr,
    rows, length, dim, stride_pb, stride_pl, stride_tb, stride_tl,
    BETA: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Loss sum, token count and gradient of BLOCK_R rows; grid = (cdiv(rows, BLOCK_R),)."""
    program = tl.program_id(0)
    row = program * BLOCK_R + tl.arange(0, BLOCK_R)
    chosen = row < rows
    if where_ptr is not None:
        chosen = chosen & (tl.load(where_ptr + row, mask=chosen, other=0) != 0)
    p_rows = prediction_ptr + _row_offset(row, length, stride_pb, stride_pl)[:, None]
    t_rows = target_ptr + _row_offset(row, length, stride_tb, stride_tl)[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for c in range(0, dim, BLOCK_C):
        col = (c + tl.arange(0, BLOCK_C))[None, :]
        mask = chosen[:, None] & (col < dim)
        # Rows that are not chosen are not read: both operands are 0 there, and so are loss and
        # gradient.
        p = tl.load(p_rows + col, mask=mask, other=0.0).to(ACC)
        d = p - tl.load(t_rows + col, mask=mask, other=0.0).to(ACC)
        size = tl.abs(d)
        # The last branch keeps 0 and NaN.
        slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
        if BETA > 0:
            acc += tl.where(size < BETA, d * d * (0.5 / BETA), size - 0.5 * BETA)
            slope = tl.where(size < BETA, d * (1.0 / BETA), slope)
        else:
            acc += size
        if gradient_ptr is not None:
            place = row.to(tl.int64)[:, None] * dim + col
            slope = slope.to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + place, slope, mask=(row < rows)[:, None] & (col < dim))
    tl.store(partial_ptr + program, tl.sum(tl.sum(acc, axis=1), axis=0))
    count = tl.sum(chosen.to(tl.int32), axis=0).to(ACC)
    tl.store(partial_ptr + tl.num_programs(0) + program, count)


@triton.jit
def _loss_reduce_kernel(partial_ptr, total_ptr, count_ptr, programs, BLOCK: tl.constexpr):
    """Sums of the programs' two partial results, in float64; grid = (1,)."""
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        mask = entry < programs
        total += tl.load(partial_ptr + entry, mask=mask, other=0.0)
        count += tl.load(partial_ptr + programs + entry, mask=mask, other=0.0)
    tl.store(total_ptr, tl.sum(total, axis=0).to(total_ptr.dtype.element_ty))
    tl.store(count_ptr, tl.sum(count, axis=0).to(count_ptr.dtype.element_ty))


@triton.jit
def _scale_kernel(gradient_ptr, scale_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    """BLOCK elements of gradient * scale per program; grid = (cdiv(numel, BLOCK),)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr)
    value = tl.load(gradient_ptr + place, mask=place < numel, other=0.0).to(scale.dtype) * scale
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=place < numel)


ROWS = 4
SUM_ROWS = 8
REDUCE_BLOCK = 1024
SCALE_BLOCK = 2048


def column_block(dim: int, largest: int = 1024) -> int:
    """Components per tile."""
    return min(largest, max(16, triton.next_power_of_2(dim)))


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _rows(tensor: Tensor) -> Tensor:
    """The tensor as (B, L, C) with unit stride inside rows; a view unless its strides forbid it."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    while tensor.dim() < 3:
        tensor = tensor.unsqueeze(0)
    return tensor if tensor.dim() == 3 else tensor.reshape(-1, *tensor.shape[-2:])


def _accumulator(*dtypes: torch.dtype) -> object:
    return tl.float64 if torch.float64 in dtypes else tl.float32


def replace_tokens_fwd(embeddings: Tensor, pool: Tensor, source: Tensor) -> Tensor:
    """Launch ``_replace_kernel``."""
    out = embeddings.new_empty(embeddings.shape)
    if out.numel() == 0:
        return out
    x = _rows(embeddings)
    pool = pool if pool.stride(-1) == 1 else pool.contiguous()
    rows, dim = source.numel(), x.shape[2]
    block = column_block(dim)
    with _on(x):
        _replace_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(dim, block))](
            x, pool, source, out,
            rows, x.shape[1], dim, pool.shape[0], x.stride(0), x.stride(1), pool.stride(0),
            BLOCK_R=ROWS, BLOCK_C=block,
        )  # fmt: skip
    return out


def _pool_gradient(x: Tensor, source: Tensor, out: Tensor) -> None:
    """Sort the rows by what they drew (stable), then add up each pool row's segment."""
    pool_size, dim = out.shape
    key = torch.where((source >= 0) & (source < pool_size), source, pool_size).to(torch.int32)
    drawn, order = torch.sort(key, stable=True)
    edges = torch.arange(pool_size + 1, dtype=torch.int32, device=x.device)
    bounds = torch.searchsorted(drawn, edges, out_int32=True)
    block = column_block(dim, 512)
    _pool_gradient_kernel[(pool_size, triton.cdiv(dim, block))](
        x, order, bounds, out, x.shape[1], dim, x.stride(0), x.stride(1),
        BLOCK_R=SUM_ROWS, BLOCK_C=block, ACC=_accumulator(x.dtype, out.dtype),
    )  # fmt: skip


def replace_tokens_bwd(
    grad_out: Tensor,
    source: Tensor,
    pool_size: int,
    pool_dtype: torch.dtype,
    embeddings_grad: bool,
    pool_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Launch ``_keep_gradient_kernel`` and ``_pool_gradient_kernel``, as wanted."""
    embeddings = grad_out.new_empty(grad_out.shape if embeddings_grad else (0,))
    shape = (pool_size if pool_grad else 0, grad_out.shape[-1])
    if grad_out.numel() == 0:
        return embeddings, grad_out.new_zeros(shape, dtype=pool_dtype)
    pool = grad_out.new_empty(shape, dtype=pool_dtype)
    x = _rows(grad_out)
    rows, dim = source.numel(), x.shape[2]
    block = column_block(dim)
    with _on(x):
        if embeddings_grad:
            _keep_gradient_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(dim, block))](
                x, source, embeddings, rows, x.shape[1], dim, x.stride(0), x.stride(1),
                BLOCK_R=ROWS, BLOCK_C=block,
            )  # fmt: skip
        if pool.numel() > 0:
            _pool_gradient(x, source, pool)
    return embeddings, pool


def reconstruction_loss_fwd(
    prediction: Tensor, target: Tensor, where: Tensor | None, beta: float, prediction_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch ``_loss_kernel`` and ``_loss_reduce_kernel``."""
    acc = _accumulator(prediction.dtype, target.dtype)
    dtype = torch.float64 if acc == tl.float64 else torch.float32
    gradient = prediction.new_empty(prediction.shape if prediction_grad else (0,))
    rows, dim = prediction.shape[:-1].numel(), prediction.shape[-1]
    if rows * dim == 0:
        total = prediction.new_zeros((), dtype=dtype)
        chosen = torch.full_like(total, rows) if where is None else where.sum(dtype=dtype)
        return total, chosen, gradient
    total, count = (prediction.new_empty((), dtype=dtype) for _ in range(2))
    programs = triton.cdiv(rows, ROWS)
    partial = prediction.new_empty((2 * programs,), dtype=dtype)
    p, t = _rows(prediction), _rows(target)
    with _on(p):
        _loss_kernel[(programs,)](
            p, t, None if where is None else where.contiguous(),
            gradient if prediction_grad else None, partial,
            rows, p.shape[1], dim, p.stride(0), p.stride(1), t.stride(0), t.stride(1),
            BETA=beta, ACC=acc, BLOCK_R=ROWS, BLOCK_C=column_block(dim),
        )  # fmt: skip
        _loss_reduce_kernel[(1,)](partial, total, count, programs, BLOCK=REDUCE_BLOCK)
    return total, count, gradient


def reconstruction_loss_bwd(gradient: Tensor, scale: Tensor) -> Tensor:
    """Launch ``_scale_kernel``."""
    out = gradient.new_empty(gradient.shape)
    if out.numel() == 0:
        return out
    gradient = gradient.contiguous()
    with _on(gradient):
        _scale_kernel[(triton.cdiv(gradient.numel(), SCALE_BLOCK),)](
            gradient, scale, out, gradient.numel(), BLOCK=SCALE_BLOCK
        )
    return out
