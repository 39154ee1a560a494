"""The Triton kernels behind the op ``mask_rows``, and their launcher.

A mask is a handful of scans over a few hundred kilobytes: as separate operations it costs tens of
launches. Here a program owns a block of rows and finds out for itself what comes into it from
before and after: the last token that is no padding, the beginning of the document, the end of the
span. It looks block by block and stops at the first answer, so nothing passes between programs and
long rows take no longer than their documents do. ``intervals.py`` has the same functions in PyTorch
and is what they are tested against, bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device
from . import intervals
from .mask_tokens import (
    INSIDE,
    OPENED,
    TWICE,
    begins_before,
    first_valid,
    larger,
    last_valid,
    smaller,
    span_end,
    tokens,
)

_RANGE = tl.constexpr(intervals.RANGE)
_PREFIX = tl.constexpr(intervals.PREFIX)
_CU_SEQLENS = tl.constexpr(intervals.CU_SEQLENS)
BLOCK, ELEMENTS_PER_WARP = 2048, 128


@triton.jit(do_not_specialize=("length", "num_spans"))
def _paint_spans_kernel(
    spans_ptr, opened_ptr, code_ptr, fault_ptr, length, num_spans, BLOCK: tl.constexpr
):
    """Whether BLOCK tokens are in a span, whether one opens there, and whether they are in two;
    grid = (cdiv(L, BLOCK), B). ``opened_ptr`` is room for counting.
    """
    sample, s = tl.program_id(1), tl.program_id(0) * BLOCK
    lane = tl.arange(0, BLOCK)
    position = s + lane
    opened_ptr += sample.to(tl.int64) * length
    code_ptr += sample.to(tl.int64) * length
    zero = tl.zeros((BLOCK,), tl.int32)
    tl.store(opened_ptr + position, zero, mask=position < length)
    tl.store(code_ptr + position, zero, mask=position < length)
    tl.debug_barrier()
    depth = 0
    for i in range(0, num_spans, BLOCK):
        span, mask = i + lane, i + lane < num_spans
        row = tl.load(spans_ptr + 3 * span, mask=mask, other=-1)
        first = tl.load(spans_ptr + 3 * span + 1, mask=mask, other=0)
        past = tl.load(spans_ptr + 3 * span + 2, mask=mask, other=0)
        good = (row >= 0) & (row < tl.num_programs(1))
        good = good & (first >= 0) & (first <= past) & (past <= length)
        if (sample == 0) & (s == 0):
            tl.store(fault_ptr + span, tl.where(good, 0, _RANGE), mask=mask)
        used = mask & good & (past > first) & (row == sample)
        depth += tl.sum((used & (first < s)).to(tl.int32), axis=0)
        depth -= tl.sum((used & (past < s)).to(tl.int32), axis=0)
        one = tl.full((BLOCK,), 1, tl.int32)
        here = used & (first >= s) & (first < s + BLOCK)
        tl.atomic_add(opened_ptr + first, one, mask=here, sem="relaxed")
        here = used & (past >= s) & (past < s + BLOCK) & (past < length)
        tl.atomic_add(code_ptr + past, one, mask=here, sem="relaxed")
    tl.debug_barrier()
    opened = tl.load(opened_ptr + position, mask=position < length, other=0)
    closed = tl.load(code_ptr + position, mask=position < length, other=0)
    level = depth + tl.cumsum(opened - closed, axis=0)
    code = tl.where(level > 0, INSIDE, 0) | tl.where(opened > 0, OPENED, 0)
    code = code | tl.where(level > 1, TWICE, 0)
    tl.debug_barrier()
    tl.store(code_ptr + position, code, mask=position < length)


@triton.jit
def _first_label(labels_ptr, length, ignore_index, BLOCK: tl.constexpr):
    """Position of the first label that is supervised, ``length`` if there is none."""
    prefix, s = length, length - length
    while s < length:
        position = s + tl.arange(0, BLOCK)
        label = tl.load(labels_ptr + position, mask=position < length, other=0)
        supervised = (label != ignore_index) & (position < length)
        prefix = tl.min(tl.where(supervised, position, length), axis=0)
        s = tl.where(prefix < length, length, s + BLOCK)
    return prefix


@triton.jit
def _seqlens_fault(borders_ptr, length, num_borders, BLOCK: tl.constexpr):
    """Code of borders that don't start at 0, decrease or end past the sequence."""
    bad = tl.load(borders_ptr).to(tl.int32) != 0
    bad = bad | (tl.load(borders_ptr + num_borders - 1).to(tl.int32) > length)
    for s in range(0, num_borders, BLOCK):
        border = s + tl.arange(0, BLOCK)
        mask = border + 1 < num_borders
        here = tl.load(borders_ptr + border, mask=mask, other=0).to(tl.int32)
        falls = tl.load(borders_ptr + border + 1, mask=mask, other=0).to(tl.int32) < here
        bad = bad | (tl.max((mask & falls).to(tl.int32), axis=0) > 0)
    return tl.where(bad, _CU_SEQLENS, 0)


@triton.jit(do_not_specialize=("length", "num_borders", "ignore_index"))
def _mask_rows_kernel(
    source_ptr, valid_ptr, ids_ptr, borders_ptr, start_ptr, end_ptr, fault_ptr, length,
    num_borders, ignore_index,
    KIND: tl.constexpr, WINDOW: tl.constexpr, EXCEED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``start``, ``end`` and faults of BLOCK rows; grid = (cdiv(L, BLOCK), B)."""
    sample, s = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK
    start_ptr += sample * length
    end_ptr += sample * length
    HAS_VALID: tl.constexpr = (valid_ptr is not None) or (borders_ptr is not None)
    HAS_DOCUMENTS: tl.constexpr = (ids_ptr is not None) or (borders_ptr is not None)
    if valid_ptr is not None:
        valid_ptr += sample * length
    if ids_ptr is not None:
        ids_ptr += sample * length
    row_fault = 0
    last = length
    if borders_ptr is not None:
        row_fault = _seqlens_fault(borders_ptr, length, num_borders, BLOCK)
        last = tl.load(borders_ptr + num_borders - 1).to(tl.int32)
    prefix = length
    if (KIND == "types") or (KIND == "spans"):
        source_ptr += sample * length
    elif KIND == "labels":
        prefix = _first_label(source_ptr + sample * length, length, ignore_index, BLOCK)
    elif KIND == "prefix":
        wanted = tl.load(source_ptr + sample)
        row_fault = row_fault | tl.where((wanted < 0) | (wanted > length), _PREFIX, 0)
        prefix = tl.minimum(tl.maximum(wanted, 0), length).to(tl.int32)
    elif KIND == "causal":
        prefix = 0
    pointers = (source_ptr, valid_ptr, ids_ptr, borders_ptr)
    sizes = (length, last, prefix, num_borders)

    past, first = s, length
    if HAS_VALID:
        past = last_valid(valid_ptr, s, length, last, BLOCK)
        first = first_valid(valid_ptr, tl.where(past == 0, s, length), length, last, BLOCK)
    document, begins, inside, valid, before, fault, next_past = tokens(
        pointers, sizes, s, past, KIND, BLOCK
    )
    position = s + tl.arange(0, BLOCK)
    mask = position < length
    # The first document's token may come late; every scan below counts from there.
    start = tl.zeros((BLOCK,), tl.int32)
    SPANS: tl.constexpr = (WINDOW > 0) and EXCEED
    opened, reached = 0, 0
    if HAS_VALID or HAS_DOCUMENTS or SPANS:
        continues = tl.max((inside & ~begins & (position == s)).to(tl.int32), axis=0) > 0
        opened, reached = begins_before(
            pointers, sizes, s, past, continues, SPANS, KIND, BLOCK
        )  # fmt: skip
        opens = tl.where(document, position, 0)
        start = tl.maximum(tl.associative_scan(opens, 0, larger), opened)
    if WINDOW > 0:
        near = tl.maximum(start, position - (WINDOW - 1))
        if EXCEED:
            opens = tl.where(begins, position, 0)
            span_first = tl.maximum(tl.associative_scan(opens, 0, larger), reached)
            near = tl.where(inside, tl.minimum(near, span_first), near)
        start = near
    ends_inside = tl.max((inside & (position == s + BLOCK - 1)).to(tl.int32), axis=0) > 0
    ahead = span_end(pointers, sizes, s + BLOCK, next_past, ends_inside, KIND, BLOCK)
    stop = tl.where(begins | ~inside, position, length)
    stop = tl.minimum(tl.associative_scan(stop, 0, smaller, reverse=True), ahead)
    # Each token needs its neighbour's.
    tl.store(end_ptr + position, stop, mask=mask)
    tl.debug_barrier()
    neighbour = (position + 1 < s + BLOCK) & (position + 1 < length)
    stop = tl.load(end_ptr + position + 1, mask=neighbour, other=0)
    tl.debug_barrier()
    stop = tl.where(neighbour, stop, ahead)
    end = tl.where(inside, stop, position + 1)
    # A tile that is partly padding must not reach further than its other rows do.
    empty = tl.where(before > 0, before, first)
    tl.store(start_ptr + position, tl.where(valid, start, empty), mask=mask)
    tl.store(end_ptr + position, tl.where(valid, end, empty), mask=mask)
    if fault_ptr is not None:
        tl.store(fault_ptr + sample * length + position, fault | row_fault, mask=mask)


def _tile(length: int) -> dict[str, int]:
    block = min(BLOCK, max(ELEMENTS_PER_WARP, triton.next_power_of_2(length)))
    return {"BLOCK": block, "num_warps": max(1, block // ELEMENTS_PER_WARP)}


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """What a kernel without strides takes."""
    return None if tensor is None else tensor.contiguous()


def mask_rows(
    source: Tensor,
    kind: str,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    batch: int,
    length: int,
    sliding_window: int,
    spans_exceed_window: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels."""
    integers = {"dtype": torch.int32, "device": source.device}
    start, end = (torch.empty((batch, length), **integers) for _ in range(2))
    with_faults = intervals.has_faults(kind, attention_mask, document_ids, cu_seqlens)
    faults = torch.empty((batch, length) if with_faults else (0,), **integers)
    num_spans = source.shape[0] if kind == "spans" else 0
    span_faults = torch.empty((num_spans,), **integers)
    if batch * length == 0:
        if num_spans:
            span_faults.copy_(intervals.span_codes(source, batch, length))
        return start, end, faults, span_faults
    source, tile = source.contiguous(), _tile(length)
    grid = (triton.cdiv(length, tile["BLOCK"]), batch)
    with on_device(source):
        if kind == "spans":
            codes = torch.empty((batch, length), **integers)
            _paint_spans_kernel[grid](source, start, codes, span_faults, length, num_spans, **tile)
            source = codes
        _mask_rows_kernel[grid](
            source, contiguous(attention_mask), contiguous(document_ids), contiguous(cu_seqlens),
            start, end, faults if with_faults else None, length,
            0 if cu_seqlens is None else cu_seqlens.shape[0],
            ignore_index, KIND=kind, WINDOW=sliding_window, EXCEED=spans_exceed_window, **tile,
        )  # fmt: skip
    return start, end, faults, span_faults
