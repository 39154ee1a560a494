"""What the mask kernels know of a block of tokens, and how they ask the blocks around it."""

import triton
import triton.language as tl

from . import intervals

_HOLE = tl.constexpr(intervals.HOLE)
_DECREASING = tl.constexpr(intervals.DECREASING)
_OVERLAP = tl.constexpr(intervals.OVERLAP)
_CROSSING = tl.constexpr(intervals.CROSSING)
# Of each token: it is in a span, one opens there, it is in two.
INSIDE, OPENED, TWICE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)


@triton.jit
def larger(a, b):
    """For scans."""
    return tl.maximum(a, b)


@triton.jit
def smaller(a, b):
    """For scans."""
    return tl.minimum(a, b)


@triton.jit
def _count_up_to(sorted_ptr, limit, size):
    """How many of ``size`` ascending integers are <= ``limit``, for a block of limits."""
    low = tl.zeros_like(limit)
    high = low + size
    left = size
    while left > 0:
        searching = low < high
        middle = low + (high - low) // 2
        below = tl.load(sorted_ptr + middle, mask=searching, other=0) <= limit
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & ~below, middle, high)
        left = left // 2
    return low


@triton.jit
def _is_valid(valid_ptr, position, length, last):
    """Tokens that are in the sequence, before ``last`` and no padding."""
    valid = (position >= 0) & (position < length) & (position < last)
    if valid_ptr is not None:
        valid = valid & (tl.load(valid_ptr + position, mask=valid, other=0) != 0)
    return valid


@triton.jit
def last_valid(valid_ptr, limit, length, last, BLOCK: tl.constexpr):
    """One past the last token before ``limit`` that is no padding, 0 if there is none."""
    past, left = limit - limit, limit
    while left > 0:
        near = left - 1 - tl.arange(0, BLOCK)
        past = tl.max(tl.where(_is_valid(valid_ptr, near, length, last), near + 1, 0), axis=0)
        left = tl.where(past > 0, 0, left - BLOCK)
    return past


@triton.jit
def first_valid(valid_ptr, begin, length, last, BLOCK: tl.constexpr):
    """The first token from ``begin`` on that is no padding, ``length`` if there is none."""
    first, here = length, begin
    while here < length:
        near = here + tl.arange(0, BLOCK)
        first = tl.min(tl.where(_is_valid(valid_ptr, near, length, last), near, length), axis=0)
        here = tl.where(first < length, length, here + BLOCK)
    return first


@triton.jit
def _document(ids_ptr, borders_ptr, position, mask, num_borders):
    """Document of each position: as given, or the number of borders after the first up to it."""
    if ids_ptr is not None:
        return tl.load(ids_ptr + position, mask=mask, other=0)
    else:
        return _count_up_to(borders_ptr + 1, position, num_borders - 1)


@triton.jit
def _in_span(source_ptr, position, length, prefix, KIND: tl.constexpr):
    """Codes of positions, which may lie before the sequence or behind it."""
    mask = (position >= 0) & (position < length)
    if KIND == "spans":
        return tl.load(source_ptr + position, mask=mask, other=0)
    elif KIND == "types":
        return (tl.load(source_ptr + position, mask=mask, other=0) != 0).to(tl.int32)
    else:
        return (position < prefix).to(tl.int32)


@triton.jit
def tokens(pointers, sizes, s, past, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """What is known of BLOCK tokens from ``s`` on without those before them, but for ``past``, one
    past the last of those that is no padding.

    Returns whether they begin a document, whether they begin a span, whether they are in one; which
    are no padding; one past the last such token before each; faults; ``past`` of the next block.
    """
    source_ptr, valid_ptr, ids_ptr, borders_ptr = pointers
    length, last, prefix, num_borders = sizes
    position = s + tl.arange(0, BLOCK)
    mask = position < length
    code = _in_span(source_ptr, position, length, prefix, KIND)
    was_inside = (_in_span(source_ptr, position - 1, length, prefix, KIND) & INSIDE) != 0
    inside, opened = (code & INSIDE) != 0, (code & OPENED) != 0
    fault = tl.where((code & TWICE) != 0, _OVERLAP, 0)
    valid = _is_valid(valid_ptr, position, length, last)
    document = position == 0
    # One past the last token before this one that is no padding, 0 if there is none.
    before = position
    same = (position > 0) & mask
    if (valid_ptr is not None) or (borders_ptr is not None):
        was_valid = _is_valid(valid_ptr, position - 1, length, last)
        was_inside = was_inside & was_valid
        counted = tl.where(was_valid, position, 0)
        before = tl.maximum(tl.associative_scan(counted, 0, larger), past)
        here = tl.where(valid, position + 1, 0)
        past = tl.maximum(past, tl.max(here, axis=0))
        document = valid & (before == 0)
        same = valid & (before > 0)
    if (ids_ptr is not None) or (borders_ptr is not None):
        own = _document(ids_ptr, borders_ptr, position, mask, num_borders)
        previous = tl.maximum(before - 1, 0)
        previous = _document(ids_ptr, borders_ptr, previous, mask, num_borders)
        fault = fault | tl.where(same & (own < previous), _DECREASING, 0)
        document = document | (same & (own != previous))
        same = same & (own == previous)
    if (valid_ptr is not None) or (borders_ptr is not None):
        fault = fault | tl.where(same & (before != position), _HOLE, 0)
    if KIND == "spans":
        crossing = inside & document & ~opened & (position > 0)
        fault = fault | tl.where(crossing | (inside & ~valid), _CROSSING, 0)
    inside = inside & valid
    span = inside & (document | ~was_inside | opened | (position == 0))
    return document, span, inside, valid, before, fault, past


@triton.jit
def begins_before(
    pointers, sizes, s, past, in_span,
    SPANS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the document, and with SPANS the span, began that the token before ``s`` is in; 0 if
    none did. The span matters only if ``in_span``: the token at ``s`` continues it.
    """
    _source_ptr, valid_ptr, ids_ptr, borders_ptr = pointers
    length, last, _prefix, _num_borders = sizes
    HAS_DOCUMENTS: tl.constexpr = (ids_ptr is not None) or (borders_ptr is not None)
    document, span, left = s - s, s - s, s
    if not HAS_DOCUMENTS:
        # One document per row, which begins with the first token that is no padding.
        if valid_ptr is not None:
            first = first_valid(valid_ptr, tl.where(past > 0, 0, length), length, last, BLOCK)
            document = tl.where(past > 0, first, 0)
        left = tl.where(in_span, s, 0) if SPANS else s - s
    while left > 0:
        left -= BLOCK
        before = left
        if (valid_ptr is not None) or (borders_ptr is not None):
            before = last_valid(valid_ptr, left, length, last, BLOCK)
        opens, begins, _, _, _, _, _ = tokens(pointers, sizes, left, before, KIND, BLOCK)
        position = left + tl.arange(0, BLOCK)
        # Later blocks were asked first: what they found is larger.
        found = left >= 0
        if HAS_DOCUMENTS:
            document = tl.maximum(document, tl.max(tl.where(opens, position, 0), axis=0))
            found = document > 0
        if SPANS:
            span = tl.maximum(span, tl.max(tl.where(begins, position, 0), axis=0))
            found = found & ((span > 0) | ~in_span)
        left = tl.where(found, 0, left)
    return document, span


@triton.jit
def span_end(pointers, sizes, s, past, wanted, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The first token from ``s`` on that is in no span or begins one; looked for if ``wanted``."""
    length, _last, _prefix, _num_borders = sizes
    end, here = length, tl.where(wanted, s, length)
    while here < length:
        _, begins, inside, _, _, _, past = tokens(pointers, sizes, here, past, KIND, BLOCK)
        position = here + tl.arange(0, BLOCK)
        stops = (begins | ~inside) & (position < length)
        end = tl.min(tl.where(stops, position, length), axis=0)
        here = tl.where(end < length, length, here + BLOCK)
    return end
