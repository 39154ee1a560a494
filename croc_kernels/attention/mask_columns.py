"""The Triton kernel behind the op ``mask_columns``, and its launcher: the rows that see each key.

No running value passes from block to block, so the keys spread over the device.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device
from .mask_kernel import contiguous
from .mask_tokens import larger

# Keys per program of the column view, which is bound by its gathers: 8 us, 15 with 1024 keys.
KEYS = 256


@triton.jit
def _count_both(first_ptr, second_ptr, limit, size):
    """``_count_up_to`` of two lists at once: half as many loads wait for the one before."""
    low = tl.zeros_like(limit)
    high = low + size
    other_low, other_high = low, high
    left = size
    while left > 0:
        searching, other_searching = low < high, other_low < other_high
        middle = low + (high - low) // 2
        other_middle = other_low + (other_high - other_low) // 2
        value = tl.load(first_ptr + middle, mask=searching, other=0)
        other_value = tl.load(second_ptr + other_middle, mask=other_searching, other=0)
        below, other_below = value <= limit, other_value <= limit
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & ~below, middle, high)
        other_low = tl.where(other_searching & other_below, other_middle + 1, other_low)
        other_high = tl.where(other_searching & ~other_below, other_middle, other_high)
        left = left // 2
    return low, other_low


@triton.jit
def _rows_of_empty_keys(start_ptr, end_ptr, row, num_queries, wanted, BLOCK: tl.constexpr):
    """One past the last row before ``row`` that sees anything (0 if there is none), and the first
    such row if that is 0. Neither is looked for unless ``wanted``.
    """
    lane = tl.arange(0, BLOCK)
    past, left = row - row, tl.where(wanted, row, 0)
    while left > 0:
        near = left - 1 - lane
        low = tl.load(start_ptr + near, mask=near >= 0, other=0)
        high = tl.load(end_ptr + near, mask=near >= 0, other=0)
        past = tl.max(tl.where(low < high, near + 1, 0), axis=0)
        left = tl.where(past > 0, 0, left - BLOCK)
    first, here = row - row + num_queries, tl.where(wanted & (past == 0), row, num_queries)
    while here < num_queries:
        near = here + lane
        low = tl.load(start_ptr + near, mask=near < num_queries, other=0)
        high = tl.load(end_ptr + near, mask=near < num_queries, other=0)
        first = tl.min(tl.where(low < high, near, num_queries), axis=0)
        here = tl.where(first < num_queries, num_queries, here + BLOCK)
    return past, first


@triton.jit(do_not_specialize=("num_queries", "num_keys"))
def _mask_columns_kernel(
    start_ptr, end_ptr, until_ptr, row_start_ptr, row_end_ptr, visible_ptr, num_queries, num_keys,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows that see each of BLOCK keys; grid = (cdiv(Lk, BLOCK), B)."""
    sample = tl.program_id(1).to(tl.int64)
    start_ptr += sample * num_queries
    end_ptr += sample * num_queries
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_start, row_end = _count_both(end_ptr, start_ptr, key, num_queries)
    seen = (row_start < row_end) & (key < num_keys)
    # A key that no row sees gets the end of the last key before it that one sees: one past the last
    # row that sees anything, of those that end before it.
    some = tl.max((~seen & (key < num_keys)).to(tl.int32), axis=0) > 0
    past, first = _rows_of_empty_keys(
        start_ptr, end_ptr, tl.min(row_start, axis=0), num_queries, some, BLOCK
    )
    reached = tl.where(seen, row_end, 0)
    before = tl.maximum(tl.associative_scan(reached, 0, larger), past)
    empty = tl.where(before > 0, before, first)
    place = sample * num_keys + key
    tl.store(row_start_ptr + place, tl.where(seen, row_start, empty), mask=key < num_keys)
    tl.store(row_end_ptr + place, tl.where(seen, row_end, empty), mask=key < num_keys)
    if visible_ptr is not None:
        until = tl.zeros((BLOCK,), tl.int32) + num_queries
        if until_ptr is not None:
            given = tl.load(until_ptr + place, mask=key < num_keys, other=0)
            until = tl.minimum(tl.maximum(given, 0), num_queries).to(tl.int32)
        until = tl.where(seen & (row_start < until), until, 0)
        tl.store(visible_ptr + place, until, mask=key < num_keys)


def mask_columns(
    start: Tensor,
    end: Tensor,
    num_keys: int,
    visible_until: Tensor | None,
    may_have_holes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch ``_mask_columns_kernel``."""
    batch, num_queries = start.shape
    row_start, row_end = (start.new_empty((batch, num_keys)) for _ in range(2))
    bounded = visible_until is not None or may_have_holes
    visible = start.new_empty((batch, num_keys) if bounded else (0,))
    if batch * num_keys > 0:
        with on_device(start):
            _mask_columns_kernel[(triton.cdiv(num_keys, KEYS), batch)](
                start.contiguous(), end.contiguous(), contiguous(visible_until),
                row_start, row_end, visible if bounded else None, num_queries, num_keys,
                BLOCK=KEYS,
            )  # fmt: skip
    return row_start, row_end, visible
