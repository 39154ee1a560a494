"""Triton kernels of the reconstruction loss, and their launchers: one pass over the operands
forward, one backward unless the forward has foreseen it, every sum in one order.

Where tokens are selected, a small kernel lists the rows that count and those that do not, whose
gradient is 0. Programs are short and take a few rows of one kind each, those that count first: the
chip deals them out, so that no part of it waits for another, and ends with the shortest. While the
list is made, the first of them clear the first rows.

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
    gdc_wait,
    launches_overlap,
    row_offset,
)
from .loss_list import aligned_words, launch_start


@triton.jit
def _chosen(where_ptr, row, rows):
    """Which rows count."""
    chosen = row < rows
    if where_ptr is not None:
        chosen = chosen & (tl.load(where_ptr + row, mask=chosen, other=0) != 0)
    return chosen


@triton.jit
def _slope(d, BETA: tl.constexpr):
    """Slope of the loss of one component; NaN stays NaN."""
    if BETA > 0:
        slope = d * (1.0 / BETA)
        if d.dtype == tl.float64:
            # tl.clamp takes no float64 (triton 3.6, 3.7).
            slope = tl.minimum(slope, 1.0, propagate_nan=tl.PropagateNan.ALL)
            slope = tl.maximum(slope, -1.0, propagate_nan=tl.PropagateNan.ALL)
        else:
            slope = tl.clamp(slope, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    return slope


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
    # An upstream gradient that is infinite must not reach rows that don't count.
    return tl.where(mask, _slope(d, BETA) * scale, 0.0)


@triton.jit
def _listed(list_ptr, where_ptr, entry, valid):
    """The row listed there; without a selection all rows count."""
    if where_ptr is None:
        return entry
    else:
        return tl.load(list_ptr + entry, mask=valid, other=0)


@triton.jit
def _tile(rows_ptr, row, first, length, dim, stride_b, stride_l, valid, BLOCK_C: tl.constexpr):
    """Components from ``first`` on of one row, 0 behind the last one."""
    col = first + tl.arange(0, BLOCK_C)
    offset = row_offset(row, length, stride_b, stride_l)
    return tl.load(rows_ptr + offset + col, mask=valid & (col < dim), other=0.0)


@triton.jit
def _clear(gradient_ptr, row, skipped, dim, BLOCK_C: tl.constexpr):
    """No gradient in the skipped ones of these rows."""
    zero = tl.zeros((row.shape[0], BLOCK_C), gradient_ptr.dtype.element_ty)
    for c in range(0, dim, BLOCK_C):
        col = (c + tl.arange(0, BLOCK_C))[None, :]
        place = row.to(tl.int64)[:, None] * dim + col
        tl.store(gradient_ptr + place, zero, mask=skipped[:, None] & (col < dim))


@triton.jit
def _sum_losses(
    prediction_ptr, target_ptr, where_ptr, divisor_ptr, expected_ptr, gradient_ptr, list_ptr,
    row, first, last, sizes, strides,
    BETA: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sum of the losses of the listed rows first to last, and their gradient where its scale is
    expected. Each tile is on its way while the one before is used. ``row``: what is listed first.
    """
    length, dim, columns = sizes[1], sizes[2], tl.cdiv(sizes[2], BLOCK_C)
    # Never negative; said aloud it saves 8 registers (triton 3.6), and so a program more fits in.
    steps = tl.maximum(last - first, 0) * columns
    p = _tile(prediction_ptr, row, 0, length, dim, strides[0], strides[1], first < last, BLOCK_C)
    t = _tile(target_ptr, row, 0, length, dim, strides[2], strides[3], first < last, BLOCK_C)
    if OVERLAP:
        if where_ptr is None:
            gdc_wait()
    scale, written = 1.0, dim
    if gradient_ptr is not None:
        expected = tl.load(expected_ptr)
        scale = expected / tl.load(divisor_ptr)
        written = tl.where(expected == expected, dim, 0)
    acc = tl.zeros((BLOCK_C,), ACC)
    c = 0
    for step in range(1, steps + 1):
        following = tl.where(c + BLOCK_C < dim, c + BLOCK_C, 0)
        entry, more = first + step // columns, step < steps
        next_row = _listed(list_ptr, where_ptr, entry, more)
        next_p = _tile(
            prediction_ptr, next_row, following, length, dim, strides[0], strides[1], more, BLOCK_C
        )  # fmt: skip
        next_t = _tile(
            target_ptr, next_row, following, length, dim, strides[2], strides[3], more, BLOCK_C
        )  # fmt: skip
        d = p.to(ACC) - t.to(ACC)
        slope = _slope(d, BETA)
        # d^2 / 2 beta inside the parabola, |d| - beta / 2 outside.
        acc += slope * (d - (0.5 * BETA) * slope)
        if gradient_ptr is not None:
            col = c + tl.arange(0, BLOCK_C)
            gradient = (slope * scale).to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + row.to(tl.int64) * dim + col, gradient, mask=col < written)
        p, t, row, c = next_p, next_t, next_row, following
    return tl.sum(acc, axis=0)


@triton.jit
def _loss_kernel(
    prediction_ptr, target_ptr, where_ptr, partial_ptr, divisor_ptr, loss_ptr, expected_ptr,
    gradient_ptr, state_ptr, sizes, strides,
    BETA: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    CLEAR_C: tl.constexpr, HEAD: tl.constexpr, CLEARING: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of ROWS rows that count, or no gradient in an equal share of the others.

    sizes: rows, rows per image, components. grid = (programs,), at least one per ROWS rows and one
    more. The program that ends last adds up the partial sums, in float64 and in their order.
    """
    program, rows, dim = tl.program_id(0), sizes[0], sizes[2]
    count, skipped = rows, 0
    if where_ptr is not None:
        if gradient_ptr is not None:
            if program < CLEARING:
                for at in range(program * ROWS, tl.minimum(rows, HEAD), CLEARING * ROWS):
                    head = at + tl.arange(0, ROWS)
                    skip = (head < HEAD) & (head < rows) & ~_chosen(where_ptr, head, rows)
                    _clear(gradient_ptr, head, skip, dim, CLEAR_C)
        if OVERLAP:
            gdc_wait()
        count, skipped = tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    # Looked up beside the counts; wasted if the row is not one that counts.
    first = program * ROWS
    row = _listed(state_ptr + 3, where_ptr, first, first < rows)
    programs = tl.maximum(tl.cdiv(count, ROWS), 1)
    if program < programs:
        total = _sum_losses(
            prediction_ptr, target_ptr, where_ptr, divisor_ptr, expected_ptr, gradient_ptr,
            state_ptr + 3, row, first, tl.minimum(first + ROWS, count), sizes, strides,
            BETA, ACC, BLOCK_C, OVERLAP,
        )  # fmt: skip
        tl.store(partial_ptr + program, total)
        # All of this program's writes come before its ticket, all tickets before the last reads.
        tl.debug_barrier()
        ticket = tl.atomic_add(state_ptr, 1)
        if ticket == programs - 1:
            loss = tl.full((), 0.0, tl.float64)
            for start in range(0, programs, BLOCK):
                entry = start + tl.arange(0, BLOCK)
                part = tl.load(
                    partial_ptr + entry, mask=entry < programs, other=0.0, cache_modifier=".cg"
                )
                loss += tl.sum(part.to(tl.float64), axis=0)
            tl.store(loss_ptr, (loss / tl.load(divisor_ptr)).to(loss_ptr.dtype.element_ty))
    elif gradient_ptr is not None:
        # Equal shares, of ROWS at most. With ROWS each the last programs would be left without a
        # row, since the head has been cleared, but launched and waited for.
        left, others = rows - count - skipped, tl.num_programs(0) - programs
        share, each = program - programs, left // others
        begin = skipped + share * each + tl.minimum(share, left % others)
        end = begin + each + (share < left % others).to(tl.int32)
        entry = begin + tl.arange(0, ROWS)
        cleared = tl.load(state_ptr + 3 + rows - 1 - entry, mask=entry < end, other=0)
        _clear(gradient_ptr, cleared, entry < end, dim, CLEAR_C)


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


# Rows of the backward kernel's tiles.
GRADIENT_ROWS = 4
# Programs and warps of the backward kernel where most calls have nothing to do. H100, a trial in
# docs/matching_trials.md: 1 us less at 16 x 1024 than 2112 programs of 4 warps.
CHECK_PROGRAMS, CHECK_WARPS = 264, 16
# Partial sums read at a time. H200, docs/matching_trials.md: 1.6 us less at 16 x 1024 than 1024.
# Half of them before sm_90, where so many registers spill.
REDUCE_BLOCK = 4096


def reduce_block(overlap: bool) -> int:
    """Partial sums read at a time; from sm_90 on launches overlap."""
    return REDUCE_BLOCK if overlap else REDUCE_BLOCK // 2


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
    picked = pick_loss(max(prediction.element_size(), target.element_size()))
    blocks = triton.cdiv(rows, picked.rows)
    partial = prediction.new_empty((blocks,), dtype=dtype)
    state = prediction.new_empty((3 + (0 if where is None else rows),), dtype=torch.int32)
    p, t = as_rows(prediction), as_rows(target)
    where = None if where is None else aligned_words(where)
    overlap = launches_overlap(p)
    with on_device(p):
        launch_start(
            where, items, history, (divisor, expected, state), (rows, dim), mean, picked.head,
            overlap,
        )  # fmt: skip
        # Of the rows of either kind one block may not be full.
        _loss_kernel[(blocks + (where is not None and history is not None),)](
            p, t, where, partial, divisor, loss, expected, None if history is None else gradient,
            state, (rows, p.shape[1], dim), (*p.stride()[:2], *t.stride()[:2]),
            BETA=beta, ACC=acc, ROWS=picked.rows, BLOCK_C=column_block(dim, picked.columns),
            CLEAR_C=column_block(dim), HEAD=picked.head, CLEARING=picked.clearing,
            BLOCK=reduce_block(overlap), OVERLAP=overlap, num_warps=picked.warps,
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
