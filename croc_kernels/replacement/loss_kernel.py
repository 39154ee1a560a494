"""Triton kernels of the reconstruction loss, and their launchers: one pass over the operands
forward, one backward, every sum in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import accumulator, as_rows, column_block, on_device, row_offset


@triton.jit
def _operands(prediction_ptr, target_ptr, where_ptr, row, rows, length, strides):
    """Which rows count, and where their two operands begin."""
    stride_pb, stride_pl, stride_tb, stride_tl = strides
    chosen = row < rows
    if where_ptr is not None:
        chosen = chosen & (tl.load(where_ptr + row, mask=chosen, other=0) != 0)
    p_rows = prediction_ptr + row_offset(row, length, stride_pb, stride_pl)[:, None]
    t_rows = target_ptr + row_offset(row, length, stride_tb, stride_tl)[:, None]
    return chosen, p_rows, t_rows


@triton.jit
def _loss_kernel(
    prediction_ptr, target_ptr, where_ptr, partial_ptr,
    rows, length, dim, strides,
    BETA: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Loss sum and token count of every so many-th block of BLOCK_R rows; grid = (programs,)."""
    program, step = tl.program_id(0), tl.num_programs(0) * BLOCK_R
    acc = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    count = tl.zeros((BLOCK_R,), tl.int32)
    for first in range(program * BLOCK_R, rows, step):
        row = first + tl.arange(0, BLOCK_R)
        chosen, p_rows, t_rows = _operands(
            prediction_ptr, target_ptr, where_ptr, row, rows, length, strides
        )
        count += chosen.to(tl.int32)
        for c in range(0, dim, BLOCK_C):
            col = (c + tl.arange(0, BLOCK_C))[None, :]
            # Rows that are not chosen are not read: both operands are 0 there, and so is the loss.
            mask = chosen[:, None] & (col < dim)
            p = tl.load(p_rows + col, mask=mask, other=0.0).to(ACC)
            d = p - tl.load(t_rows + col, mask=mask, other=0.0).to(ACC)
            size = tl.abs(d)
            if BETA > 0:
                acc += tl.where(size < BETA, d * d * (0.5 / BETA), size - 0.5 * BETA)
            else:
                acc += size
    tl.store(partial_ptr + program, tl.sum(tl.sum(acc, axis=1), axis=0))
    tl.store(partial_ptr + tl.num_programs(0) + program, tl.sum(count, axis=0).to(ACC))


@triton.jit
def _loss_reduce_kernel(
    partial_ptr, items_ptr, loss_ptr, divisor_ptr, programs, dim,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the programs' two partial results in float64, the mean and its divisor; grid = (1,).

    No items count as one: the sum is 0 then.
    """
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        mask = entry < programs
        total += tl.load(partial_ptr + entry, mask=mask, other=0.0)
        count += tl.load(partial_ptr + programs + entry, mask=mask, other=0.0)
    loss = tl.sum(total, axis=0)
    divisor = tl.sum(count, axis=0) * 0.0 + 1.0
    if MEAN:
        items = tl.sum(count, axis=0)
        if items_ptr is not None:
            items = tl.load(items_ptr).to(tl.float64)
        divisor = tl.where(items > 0, items, 1.0) * dim
    tl.store(loss_ptr, (loss / divisor).to(loss_ptr.dtype.element_ty))
    tl.store(divisor_ptr, divisor.to(divisor_ptr.dtype.element_ty))


@triton.jit
def _loss_gradient_kernel(
    prediction_ptr, target_ptr, where_ptr, divisor_ptr, grad_ptr, out_ptr,
    rows, length, dim, strides,
    BETA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_R rows by BLOCK_C components, 0 in rows that don't count.

    grid = (cdiv(rows, BLOCK_R), cdiv(C, BLOCK_C)).
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    chosen, p_rows, t_rows = _operands(
        prediction_ptr, target_ptr, where_ptr, row, rows, length, strides
    )
    scale = tl.load(grad_ptr) / tl.load(divisor_ptr)
    mask = chosen[:, None] & (col < dim)
    p = tl.load(p_rows + col, mask=mask, other=0.0).to(scale.dtype)
    d = p - tl.load(t_rows + col, mask=mask, other=0.0).to(scale.dtype)
    # The last branch keeps 0 and NaN.
    slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    if BETA > 0:
        slope = tl.where(tl.abs(d) < BETA, d * (1.0 / BETA), slope)
    # An upstream gradient that is infinite must not reach rows that don't count.
    gradient = tl.where(mask, slope * scale, 0.0).to(out_ptr.dtype.element_ty)
    place = row.to(tl.int64)[:, None] * dim + col
    tl.store(out_ptr + place, gradient, mask=(row < rows)[:, None] & (col < dim))


# Tile and number of programs of the forward kernel, rows per program of the backward kernel, and
# partial sums read at a time.
ROWS, COLUMNS, PROGRAMS = 8, 256, 2112
GRADIENT_ROWS = 4
REDUCE_BLOCK = 1024


def reconstruction_loss_fwd(
    prediction: Tensor,
    target: Tensor,
    where: Tensor | None,
    items: Tensor | None,
    beta: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """Launch ``_loss_kernel`` and ``_loss_reduce_kernel``."""
    acc = accumulator(prediction.dtype, target.dtype)
    dtype = torch.float64 if acc == tl.float64 else torch.float32
    rows, dim = prediction.shape[:-1].numel(), prediction.shape[-1]
    if rows * dim == 0:
        return prediction.new_zeros((), dtype=dtype), prediction.new_ones((), dtype=dtype)
    loss, divisor = (prediction.new_empty((), dtype=dtype) for _ in range(2))
    programs = min(triton.cdiv(rows, ROWS), PROGRAMS)
    partial = prediction.new_empty((2 * programs,), dtype=dtype)
    p, t = as_rows(prediction), as_rows(target)
    with on_device(p):
        _loss_kernel[(programs,)](
            p, t, None if where is None else where.contiguous(), partial,
            rows, p.shape[1], dim, (*p.stride()[:2], *t.stride()[:2]),
            BETA=beta, ACC=acc, BLOCK_R=ROWS, BLOCK_C=column_block(dim, COLUMNS),
        )  # fmt: skip
        _loss_reduce_kernel[(1,)](
            partial, items, loss, divisor, programs, dim, MEAN=mean, BLOCK=REDUCE_BLOCK
        )
    return loss, divisor


def reconstruction_loss_bwd(
    prediction: Tensor,
    target: Tensor,
    where: Tensor | None,
    divisor: Tensor,
    grad_loss: Tensor,
    beta: float,
) -> Tensor:
    """Launch ``_loss_gradient_kernel``."""
    out = prediction.new_empty(prediction.shape)
    if out.numel() == 0:
        return out
    p, t = as_rows(prediction), as_rows(target)
    rows, dim, block = p.shape[0] * p.shape[1], p.shape[2], column_block(p.shape[2])
    where = None if where is None else where.contiguous()
    with on_device(p):
        _loss_gradient_kernel[(triton.cdiv(rows, GRADIENT_ROWS), triton.cdiv(dim, block))](
            p, t, where, divisor, grad_loss, out,
            rows, p.shape[1], dim, (*p.stride()[:2], *t.stride()[:2]),
            BETA=beta, BLOCK_R=GRADIENT_ROWS, BLOCK_C=block,
        )  # fmt: skip
    return out
