"""Triton kernels of the reconstruction loss, and their launchers: one pass over the operands
forward, one backward unless the forward has foreseen it, every sum in one order.

Where tokens are selected, a small kernel lists them, so that all programs read equally many; the
large one starts beside it with the rows that do not count, whose gradient is 0.

A training step calls with the same upstream gradient again and again: the weight of the loss over
the number of micro-batches, times the scale of AMP. ``history`` on the device holds the last one,
and the one to expect, NaN unless the last two were equal. With an expected one the forward writes
the gradient as well, and the backward compares and returns. Otherwise the backward computes it. The
formula and its one rounding are the same, so what was expected changes the time and no bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device
from .config import pick_loss
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
def _chosen(where_ptr, row, rows):
    """Which rows count."""
    chosen = row < rows
    if where_ptr is not None:
        chosen = chosen & (tl.load(where_ptr + row, mask=chosen, other=0) != 0)
    return chosen


@triton.jit
def _differences(
    prediction_ptr, target_ptr, chosen, row, first, rows, length, dim, strides,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Prediction minus target from component ``first`` on, what counts, and where it lies.

    Rows that do not count are not read: both operands are 0 there, and so is the loss.
    """
    stride_pb, stride_pl, stride_tb, stride_tl = strides
    col = (first + tl.arange(0, BLOCK_C))[None, :]
    mask = chosen[:, None] & (col < dim)
    p_rows = prediction_ptr + row_offset(row, length, stride_pb, stride_pl)[:, None]
    t_rows = target_ptr + row_offset(row, length, stride_tb, stride_tl)[:, None]
    p = tl.load(p_rows + col, mask=mask, other=0.0).to(ACC)
    d = p - tl.load(t_rows + col, mask=mask, other=0.0).to(ACC)
    place = row.to(tl.int64)[:, None] * dim + col
    return d, mask, place, (row < rows)[:, None] & (col < dim)


@triton.jit
def _gradient(d, mask, scale, BETA: tl.constexpr):
    """Slope of the loss times ``scale``."""
    # The last branch keeps 0 and NaN.
    slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    if BETA > 0:
        slope = tl.where(tl.abs(d) < BETA, d * (1.0 / BETA), slope)
    # An upstream gradient that is infinite must not reach rows that don't count.
    return tl.where(mask, slope * scale, 0.0)


@triton.jit
def _loss_start_kernel(
    where_ptr, items_ptr, history_ptr, divisor_ptr, expected_ptr, state_ptr, rows, dim,
    MEAN: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The divisor, the upstream gradient to expect, and the state; grid = (1,).

    state: tickets drawn (0), number of selected rows, then those rows in their order. No items
    count as one: the sum is 0 then.
    """
    if OVERLAP:
        gdc_launch_dependents()
    tl.store(state_ptr, 0)
    if history_ptr is not None:
        # One copy for all programs: a backward of another stream may be writing the history.
        tl.store(expected_ptr, tl.load(history_ptr + 1))
    count = tl.full((), 0, tl.int32)
    if where_ptr is None:
        count += rows
    else:
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            chosen = tl.load(where_ptr + row, mask=row < rows, other=0) != 0
            place = count + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            tl.store(state_ptr + 2 + place, row, mask=chosen)
            count += tl.sum(chosen.to(tl.int32), axis=0)
        tl.store(state_ptr + 1, count)
    divisor = tl.full((), 1.0, tl.float64)
    if MEAN:
        items = count.to(tl.float64)
        if items_ptr is not None:
            items = tl.load(items_ptr).to(tl.float64)
        divisor = tl.where(items > 0, items, 1.0) * dim
    tl.store(divisor_ptr, divisor.to(divisor_ptr.dtype.element_ty))


@triton.jit
def _clear_skipped(
    where_ptr, gradient_ptr, rows, dim, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """No gradient in every so many-th block of rows, where they do not count."""
    zero = tl.zeros((BLOCK_R, BLOCK_C), gradient_ptr.dtype.element_ty)
    for first in range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        skipped = (row < rows) & ~_chosen(where_ptr, row, rows)
        for c in range(0, dim, BLOCK_C):
            col = (c + tl.arange(0, BLOCK_C))[None, :]
            place = row.to(tl.int64)[:, None] * dim + col
            tl.store(gradient_ptr + place, zero, mask=skipped[:, None] & (col < dim))


@triton.jit
def _loss_kernel(
    prediction_ptr, target_ptr, where_ptr, partial_ptr, divisor_ptr, loss_ptr, expected_ptr,
    gradient_ptr, state_ptr, sizes, strides,
    BETA: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Loss and, where its scale is expected, gradient of every so many-th block of rows.

    sizes: rows, rows per image, components. grid = (programs,). The program that ends last adds up
    the partial sums, in float64 and in their order.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    rows, length, dim = sizes
    if gradient_ptr is not None:
        if where_ptr is not None:
            _clear_skipped(where_ptr, gradient_ptr, rows, dim, BLOCK_R, BLOCK_C)
    if OVERLAP:
        gdc_wait()
    divisor = tl.load(divisor_ptr)
    if gradient_ptr is not None:
        expected = tl.load(expected_ptr)
        scale = expected / divisor
    count = rows
    if where_ptr is not None:
        count = tl.load(state_ptr + 1)
    acc = tl.zeros((BLOCK_C,), ACC)
    for first in range(program * BLOCK_R, count, programs * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        chosen = row < count
        if where_ptr is not None:
            row = tl.load(state_ptr + 2 + row, mask=chosen, other=0)
        for c in range(0, dim, BLOCK_C):
            d, mask, place, _ = _differences(
                prediction_ptr, target_ptr, chosen, row, c, rows, length, dim, strides,
                ACC, BLOCK_C,
            )  # fmt: skip
            size = tl.abs(d)
            if BETA > 0:
                size = tl.where(size < BETA, d * d * (0.5 / BETA), size - 0.5 * BETA)
            acc += tl.sum(size, axis=0)
            if gradient_ptr is not None:
                if expected == expected:
                    gradient = _gradient(d, mask, scale, BETA).to(gradient_ptr.dtype.element_ty)
                    tl.store(gradient_ptr + place, gradient, mask=mask)
    tl.store(partial_ptr + program, tl.sum(acc, axis=0))
    # All of this program's writes come before its ticket, all tickets before the last one's reads.
    tl.debug_barrier()
    ticket = tl.atomic_add(state_ptr, 1)
    if ticket == programs - 1:
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, programs, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            total += tl.load(
                partial_ptr + entry, mask=entry < programs, other=0.0, cache_modifier=".cg"
            )
        loss = tl.sum(total, axis=0) / divisor
        tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))


@triton.jit
def _loss_gradient_kernel(
    prediction_ptr, target_ptr, where_ptr, divisor_ptr, grad_ptr, out_ptr, expected_ptr,
    history_ptr, rows, length, dim, strides,
    BETA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of every so many-th tile, 0 in rows that don't count; grid = (programs,).

    With ``expected``, nothing is left to do if the forward wrote the gradient for this scale, and
    nothing in rows that don't count if not.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_R) * tl.cdiv(dim, BLOCK_C)
    divisor, grad = tl.load(divisor_ptr), tl.load(grad_ptr)
    scale = grad / divisor
    if expected_ptr is not None:
        # Zeros may differ in their sign.
        if (grad == tl.load(expected_ptr)) & (grad != 0):
            tiles = 0
        if program == 0:
            again = tl.load(history_ptr) == grad
            tl.store(history_ptr + 1, tl.where(again, grad, float("nan")))
            tl.store(history_ptr, grad)
    columns = tl.cdiv(dim, BLOCK_C)
    for tile in range(program, tiles, tl.num_programs(0)):
        row = tile // columns * BLOCK_R + tl.arange(0, BLOCK_R)
        d, mask, place, inside = _differences(
            prediction_ptr, target_ptr, _chosen(where_ptr, row, rows), row,
            tile % columns * BLOCK_C, rows, length, dim, strides, scale.dtype, BLOCK_C,
        )  # fmt: skip
        if expected_ptr is not None:
            inside = mask
        gradient = _gradient(d, mask, scale, BETA).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, gradient, mask=inside)


# Rows that a forward program reads at a time, and rows of the backward kernel's tiles.
ROWS, GRADIENT_ROWS = 2, 4
# Programs and warps of the backward kernel where most calls have nothing to do. H100, a trial in
# docs/matching.md: 1 us less at 16 x 1024 than 2112 programs of 4 warps.
CHECK_PROGRAMS, CHECK_WARPS = 264, 16
# Partial sums and selections read at a time.
REDUCE_BLOCK, COUNT_BLOCK, COUNT_WARPS = 1024, 8192, 32


def _forward(
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    beta: float,
    mean: bool,
    history: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch ``_loss_start_kernel`` and ``_loss_kernel``; without history no gradient is stored."""
    prediction, target, where, items = operands
    acc = accumulator(prediction.dtype, target.dtype)
    dtype = torch.float64 if acc == tl.float64 else torch.float32
    rows, dim = prediction.shape[:-1].numel(), prediction.shape[-1]
    gradient = prediction.new_empty((0,) if history is None else prediction.shape)
    if rows * dim == 0:
        zero, one = prediction.new_zeros((), dtype=dtype), prediction.new_ones((), dtype=dtype)
        return zero, one, torch.full_like(zero, torch.nan), gradient
    loss, divisor, expected = (prediction.new_empty((), dtype=dtype) for _ in range(3))
    picked = pick_loss(selected=where is not None)
    programs = min(triton.cdiv(rows, ROWS), picked.programs)
    partial = prediction.new_empty((programs,), dtype=dtype)
    state = prediction.new_empty((2 + (0 if where is None else rows),), dtype=torch.int32)
    p, t = as_rows(prediction), as_rows(target)
    where = None if where is None else where.contiguous()
    overlap = launches_overlap(p)
    with on_device(p):
        _loss_start_kernel[(1,)](
            where, items, history, divisor, expected, state, rows, dim,
            MEAN=mean, BLOCK=COUNT_BLOCK, OVERLAP=overlap,
            num_warps=4 if where is None else COUNT_WARPS,
        )  # fmt: skip
        _loss_kernel[(programs,)](
            p, t, where, partial, divisor, loss, expected, None if history is None else gradient,
            state, (rows, p.shape[1], dim), (*p.stride()[:2], *t.stride()[:2]),
            BETA=beta, ACC=acc, BLOCK_R=ROWS, BLOCK_C=column_block(dim, picked.columns),
            BLOCK=REDUCE_BLOCK, OVERLAP=overlap, num_warps=picked.warps,
            **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return loss, divisor, expected, gradient


def reconstruction_loss_fwd(
    prediction: Tensor,
    target: Tensor,
    where: Tensor | None,
    items: Tensor | None,
    beta: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """The loss and its divisor."""
    return _forward((prediction, target, where, items), beta, mean, None)[:2]


def reconstruction_loss_fwd_foreseen(
    prediction: Tensor,
    target: Tensor,
    where: Tensor | None,
    items: Tensor | None,
    beta: float,
    mean: bool,
    history: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, its divisor, the upstream gradient expected and the gradient for it."""
    return _forward((prediction, target, where, items), beta, mean, history)


def _backward(
    out: Tensor,
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor],
    beta: float,
    expected: Tensor | None = None,
    history: Tensor | None = None,
) -> None:
    """Launch ``_loss_gradient_kernel``."""
    prediction, target, where, divisor, grad_loss = operands
    if out.numel() == 0:
        return
    p, t = as_rows(prediction), as_rows(target)
    rows, dim, block = p.shape[0] * p.shape[1], p.shape[2], column_block(p.shape[2])
    where = None if where is None else where.contiguous()
    programs = triton.cdiv(rows, GRADIENT_ROWS) * triton.cdiv(dim, block)
    warps = 4
    if expected is not None:
        programs, warps = min(programs, CHECK_PROGRAMS), CHECK_WARPS
    with on_device(p):
        _loss_gradient_kernel[(programs,)](
            p, t, where, divisor, grad_loss, out, expected, history,
            rows, p.shape[1], dim, (*p.stride()[:2], *t.stride()[:2]),
            BETA=beta, BLOCK_R=GRADIENT_ROWS, BLOCK_C=block, num_warps=warps,
        )  # fmt: skip


def reconstruction_loss_bwd(
    prediction: Tensor,
    target: Tensor,
    where: Tensor | None,
    divisor: Tensor,
    grad_loss: Tensor,
    beta: float,
) -> Tensor:
    """The gradient of the prediction."""
    out = prediction.new_empty(prediction.shape)
    _backward(out, (prediction, target, where, divisor, grad_loss), beta)
    return out


def reconstruction_loss_bwd_foreseen(
    gradient: Tensor,
    prediction: Tensor,
    target: Tensor,
    where: Tensor | None,
    divisor: Tensor,
    grad_loss: Tensor,
    expected: Tensor,
    history: Tensor,
    beta: float,
) -> None:
    """Make ``gradient``, which is 0 where no row counts and written for ``expected`` elsewhere, the
    one for ``grad_loss``.
    """
    _backward(gradient, (prediction, target, where, divisor, grad_loss), beta, expected, history)
