"""The start of the reconstruction loss: its divisor, and a list of the rows that count and of those
that do not, by programs that wait for no other.
"""

import triton
import triton.language as tl
from torch import Tensor

from .layout import gdc_launch_dependents


@triton.jit
def _selected_before(where_ptr, first, BLOCK: tl.constexpr):
    """Number of selected rows before ``first``, a multiple of 4, by BLOCK words of 4 at a time."""
    words_ptr = where_ptr.to(tl.pointer_type(tl.uint32))
    before = tl.zeros((BLOCK,), tl.uint32)
    for start in range(0, first // 4, BLOCK):
        word = start + tl.arange(0, BLOCK)
        chosen = tl.load(words_ptr + word, mask=word < first // 4, other=0)
        # 1 for every byte that is not 0, then their sum in the highest byte.
        chosen = ((chosen & 0x7F7F7F7F) + 0x7F7F7F7F) | chosen
        before += ((chosen >> 7) & 0x01010101) * 0x01010101 >> 24
    return tl.sum(before, axis=0).to(tl.int32)


@triton.jit
def _list_rows(
    where_ptr, state_ptr, rows, SPAN: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr
):
    """List SPAN rows and return the number of selected rows up to their end.

    state: tickets drawn, number of selected rows, of rows not selected among the first HEAD, a
    multiple of SPAN; then the selected rows in their order, and from the end on the others.
    """
    first = tl.program_id(0) * SPAN
    own = first + tl.arange(0, SPAN)
    chosen = (tl.load(where_ptr + own, mask=own < rows, other=0) != 0).to(tl.int32)
    before = _selected_before(where_ptr, first, BLOCK)
    upto = before + tl.cumsum(chosen, axis=0)
    place = tl.where(chosen != 0, upto - 1, rows - 1 - (own - upto))
    tl.store(state_ptr + 3 + place, own, mask=own < rows)
    count, end = before + tl.sum(chosen, axis=0), tl.minimum(first + SPAN, rows)
    if end == tl.minimum(HEAD, rows):
        tl.store(state_ptr + 2, end - count)
    return count


@triton.jit
def _loss_start_kernel(
    where_ptr, items_ptr, history_ptr, divisor_ptr, expected_ptr, state_ptr, rows, dim,
    MEAN: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The divisor, the upstream gradient to expect, and the state; grid = (cdiv(rows, SPAN),), or
    (1,) if all rows count.

    No items count as one: the sum is 0 then.
    """
    if OVERLAP:
        gdc_launch_dependents()
    count = rows
    if where_ptr is not None:
        count = _list_rows(where_ptr, state_ptr, rows, SPAN, BLOCK, HEAD)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(state_ptr, 0)
        tl.store(state_ptr + 1, count)
        if history_ptr is not None:
            # One copy for all programs: a backward of another stream may be writing the history.
            tl.store(expected_ptr, tl.load(history_ptr + 1))
        divisor = tl.full((), 1.0, tl.float64)
        if MEAN:
            items = count.to(tl.float64)
            if items_ptr is not None:
                items = tl.load(items_ptr).to(tl.float64)
            divisor = tl.where(items > 0, items, 1.0) * dim
        tl.store(divisor_ptr, divisor.to(divisor_ptr.dtype.element_ty))


# Rows that a program lists, words of 4 selections that it reads at a time ahead of them, its warps.
LIST_ROWS, LIST_BLOCK, LIST_WARPS = 1024, 4096, 8


def aligned_words(where: Tensor) -> Tensor:
    """Contiguous, from a multiple of 4 bytes on: selections are counted by words."""
    where = where.contiguous()
    return where if where.data_ptr() % 4 == 0 else where.clone()


def launch_start(
    where: Tensor | None,
    items: Tensor | None,
    history: Tensor | None,
    results: tuple[Tensor, Tensor, Tensor],
    sizes: tuple[int, int],
    mean: bool,
    head: int,
    overlap: bool,
) -> None:
    """Launch ``_loss_start_kernel``."""
    divisor, expected, state = results
    rows, dim = sizes
    _loss_start_kernel[(1 if where is None else triton.cdiv(rows, LIST_ROWS),)](
        where, items, history, divisor, expected, state, rows, dim,
        MEAN=mean, SPAN=LIST_ROWS, BLOCK=LIST_BLOCK, HEAD=head, OVERLAP=overlap,
        num_warps=4 if where is None else LIST_WARPS,
    )  # fmt: skip
