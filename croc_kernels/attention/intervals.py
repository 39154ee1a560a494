"""From tokens to intervals: the device scans behind
:class:`~croc_kernels.attention.mask.MixedMask`.

Row ``i`` sees keys ``start[i] <= j < end[i]``. Both vectors never decrease along a row of the
batch, also over rows that see nothing (there ``start[i] == end[i]``), so four scalars classify a
tile of the score matrix and the rows that see key ``j`` are an interval too. Every function here is
a handful of scans: no host synchronisation, nothing of size L², and values are only ever reported
through fault codes that :meth:`MixedMask.check` reads.
"""

import torch
from torch import Tensor

from .. import checks

# Fault codes, one bit each, with the rule that was broken.
FAULTS = {
    1: "attention_mask must be one run of ones per document "
    "(one interval per row can't express a hole)",
    2: "document_ids must not decrease along a row "
    "(one interval per row can't express a split document)",
    4: "spans must have 0 <= sample < batch and 0 <= first <= past <= length",
    8: "spans must not overlap",
    16: "spans must lie inside one document and outside padding",
    32: "start and end must satisfy 0 <= start <= end <= num_keys and never decrease along a row",
    64: "dense must be one interval of keys per row with bounds that never decrease "
    "(anything else can't be expressed; a bound per key goes into visible_until)",
    128: "labels must not supervise left padding with exact_parity",
    256: "prefix_length must be between 0 and length",
    512: "cu_seqlens must start at 0, never decrease and end at or before length",
}
HOLE, DECREASING, RANGE, OVERLAP, CROSSING, ROWS, DENSE, PARITY, PREFIX, CU_SEQLENS = FAULTS


def positions(like: Tensor) -> Tensor:
    """(1, L) int32 positions for a (B, L) tensor."""
    return torch.arange(like.shape[1], dtype=torch.int32, device=like.device)[None]


def shift_right(x: Tensor, fill: int) -> Tensor:
    """(B, L): every row moved one place to the right, ``fill`` first."""
    return torch.cat([torch.full_like(x[:, :1], fill), x[:, :-1]], dim=1)


def running_max(x: Tensor) -> Tensor:
    """Inclusive running maximum along dim 1."""
    return torch.cummax(x, dim=1).values if x.shape[1] else x


def next_position(where: Tensor) -> Tensor:
    """(B, L) int32: the smallest j > i with ``where[j]``, L if there is none."""
    length = where.shape[1]
    position = torch.where(where, positions(where), length)
    following = torch.cat([position[:, 1:], torch.full_like(position[:, :1], length)], dim=1)
    return torch.cummin(following.flip(1), dim=1).values.flip(1) if length else following


def empty_bound(some: Tensor, first: Tensor, past: Tensor, limit: int) -> Tensor:
    """(B, L) int32: what empty intervals are set to, so that bounds stay monotone and tight.

    The end of the last interval before, or the beginning of the first one if there is none before:
    a tile that is partly padding must not reach further than its other rows (or keys) do.
    """
    before = running_max(torch.where(some, past, 0))
    if not some.shape[1]:
        return before
    ahead = torch.where(some, first, limit).amin(1, keepdim=True)
    return torch.where(before > 0, before, ahead).int()


def documents(
    like: Tensor, valid: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Where documents begin.

    Args:
        like: any (B, L) tensor, for shape and device.
        valid: (B, L) bool, False at padding, or None.
        ids: (B, L) int, the document of each token, or None for one document per row.

    Returns:
        ``begins`` (B, L) bool, first token of a document; ``first`` (B, L) int32, the first
        position of the document of each token that is not padding; ``empty_at`` (B, L) int32, a
        bound that keeps padding rows monotone (None without padding); fault codes (B, L) int32 or
        None.
    """
    position = positions(like)
    if valid is None:
        begins = (position == 0).expand(like.shape)
        if ids is None:
            return begins, torch.zeros_like(position).expand(like.shape), None, None
        begins = begins | (ids != shift_right(ids, 0))
        faults = torch.where(~(position == 0) & (ids < shift_right(ids, 0)), DECREASING, 0).int()
        return begins, running_max(torch.where(begins, position, 0)), None, faults

    valid_end = running_max(torch.where(valid, position + 1, 0))
    before = shift_right(valid_end, 0)  # one past the last valid token before i, 0 if none
    empty_at = empty_bound(valid, position, position + 1, like.shape[1])
    begins = valid & (before == 0)
    same = valid & (before > 0)
    faults = torch.zeros_like(before)
    if ids is not None:
        previous = ids.gather(1, (before - 1).clamp(min=0).long())
        faults = torch.where(same & (ids < previous), DECREASING, faults)
        begins, same = begins | (same & (ids != previous)), same & (ids == previous)
    faults = torch.where(same & (before != position), faults | HOLE, faults)
    return begins, running_max(torch.where(begins, position, 0)), empty_at, faults


def row_bounds(
    inside: Tensor,
    span_begins: Tensor | None,
    valid: Tensor | None,
    ids: Tensor | None,
    sliding_window: int | None,
    spans_exceed_window: bool,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, L) int32 ``start`` and ``end`` of every row of a self-attention, and fault codes.

    Args:
        inside: (B, L) bool, tokens of bidirectional spans.
        span_begins: (B, L) bool, extra cuts between adjacent spans, or None.
        valid: (B, L) bool or None, see :func:`documents`.
        ids: (B, L) int or None, see :func:`documents`.
        sliding_window: row ``i`` sees no key before ``i - sliding_window + 1``; None for no window.
        spans_exceed_window: a row inside a span sees the whole span whatever the window.
        strict: report spans that cross a document's border or contain padding instead of cutting
            them there.
    """
    position = positions(inside)
    doc_begins, first, empty_at, faults = documents(inside, valid, ids)
    if strict:
        cut = span_begins if span_begins is not None else torch.zeros_like(inside)
        crossing = inside & doc_begins & ~cut & (position > 0)
        if valid is not None:
            crossing = crossing | (inside & ~valid)
        code = torch.where(crossing, CROSSING, 0).int()
        faults = code if faults is None else faults | code
    if valid is not None:
        inside = inside & valid
    begins = inside & (doc_begins | ~shift_right(inside, 0))
    if span_begins is not None:
        begins = begins | (inside & span_begins)
    end = torch.where(inside, next_position(begins | ~inside), position + 1)
    start = first
    if sliding_window is not None:
        start = torch.maximum(first, position - (sliding_window - 1))
        if spans_exceed_window:
            span_first = running_max(torch.where(begins, position, 0))
            start = torch.where(inside, torch.minimum(start, span_first), start)
    if valid is not None:
        start, end = torch.where(valid, start, empty_at), torch.where(valid, end, empty_at)
    return start.int().contiguous(), end.int().contiguous(), faults


def column_view(start: Tensor, end: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """(B, Lk) int32 ``row_start`` and ``row_end``: key ``j`` is seen by rows ``row_start[j] <= i <
    row_end[j]``.

    Rows with ``end > j`` are a suffix and rows with ``start <= j`` a prefix, because both vectors
    never decrease.
    """
    key = torch.arange(num_keys, dtype=torch.int32, device=start.device)
    key = key.expand(start.shape[0], num_keys).contiguous()
    row_start = torch.searchsorted(end, key, right=True, out_int32=True)
    row_end = torch.searchsorted(start, key, right=True, out_int32=True)
    seen = row_start < row_end
    empty_at = empty_bound(seen, row_start, row_end, start.shape[1])
    return torch.where(seen, row_start, empty_at), torch.where(seen, row_end, empty_at)


def mark_spans(spans: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Paint (S, 3) spans: (B, L) ``inside`` and ``begins``, token fault codes (B, L), span fault
    codes (S,).
    """
    sample, first, past = spans.long().unbind(1)
    good = (sample >= 0) & (sample < batch) & (first >= 0) & (first <= past) & (past <= length)
    span_faults = torch.where(good, 0, RANGE).int()
    used = good & (past > first)  # an empty span pads a list of spans to a fixed size
    row = sample * (length + 1)
    trash = batch * (length + 1)
    edges = torch.zeros(trash + 1, dtype=torch.int32, device=spans.device)
    one = torch.ones_like(span_faults)
    opened = edges.scatter_add(0, torch.where(used, row + first, trash), one)
    closed = edges.scatter_add(0, torch.where(used, row + past, trash), one)
    opened = opened[:trash].view(batch, length + 1)[:, :length]
    closed = closed[:trash].view(batch, length + 1)[:, :length]
    depth = torch.cumsum(opened - closed, dim=1, dtype=torch.int32)
    faults = torch.where(depth > 1, OVERLAP, 0).int()
    return depth > 0, opened > 0, faults, span_faults


def valid_tokens(function: str, attention_mask: Tensor, like: Tensor) -> Tensor:
    """(B, L) bool from an attention mask of any dtype, checked against ``like``."""
    checks.check_tensor(function, "attention_mask", attention_mask)
    checks.check_shape(function, "attention_mask", attention_mask, like.shape, "(B, L)")
    return attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0


def _packed(
    function: str, cu_seqlens: Tensor, like: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Document ids, valid tokens and fault codes of one packed row."""
    checks.check_tensor(function, "cu_seqlens", cu_seqlens)
    checks.check_dtype(function, "cu_seqlens", cu_seqlens, checks.INTEGERS)
    checks.check_rank(function, "cu_seqlens", cu_seqlens, "(D + 1,)", (1,))
    if like.shape[0] != 1:
        raise ValueError(
            f"{function}: cu_seqlens must go with a batch of one row, got B = {like.shape[0]}"
        )
    position = positions(like)
    borders = cu_seqlens.int().contiguous()
    ids = torch.searchsorted(borders[1:], position[0], right=True, out_int32=True)[None]
    inside = position < borders[-1:]
    bad = (borders[:1] != 0) | (borders[-1:] > like.shape[1]) | (borders.diff() < 0).any()
    faults = torch.where(bad, CU_SEQLENS, 0).int()[:, None].expand_as(like)
    return ids, inside if valid is None else inside & valid, faults


def _select_queries(
    function: str,
    bounds: tuple[Tensor, Tensor],
    num_queries: int | None,
    first: int | Tensor | None,
) -> tuple[tuple[Tensor, Tensor], int | Tensor]:
    """The rows of ``bounds`` that are queries, and the position of the first of them."""
    length = bounds[0].shape[1]
    num_queries = length if num_queries is None else num_queries
    if not 0 <= num_queries <= length:
        raise ValueError(
            f"{function}: num_queries must be between 0 and {length}, got {num_queries}"
        )
    if first is None:
        first = length - num_queries
    if isinstance(first, Tensor):
        checks.check_dtype(function, "first_query", first, checks.INTEGERS)
        first = first.reshape(-1, 1)
        row = torch.arange(num_queries, device=first.device) + first
        row = row.expand(bounds[0].shape[0], num_queries).clamp(0, max(length - 1, 0))
        return tuple(x.gather(1, row) for x in bounds), first
    if not 0 <= first <= length - num_queries:
        raise ValueError(
            f"{function}: first_query must be between 0 and {length - num_queries}, got {first}"
        )
    if num_queries == length:
        return bounds, 0
    return tuple(x[:, first : first + num_queries].contiguous() for x in bounds), first


def assemble(
    function: str,
    inside: Tensor,
    span_begins: Tensor | None,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    faults: Tensor | None = None,
    span_faults: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sliding_window: int | None = None,
    spans_exceed_window: bool = False,
    visible_until: Tensor | None = None,
    num_queries: int | None = None,
    first_query: int | Tensor | None = None,
) -> dict[str, Tensor | None]:
    """Everything a mask holds, from spans given per token; arguments as
    ``MixedMask.from_token_types``.
    """
    valid = None if attention_mask is None else valid_tokens(function, attention_mask, inside)
    may_have_holes = attention_mask is not None and (
        document_ids is not None or cu_seqlens is not None
    )
    found = [faults]
    if document_ids is not None:
        if cu_seqlens is not None:
            raise ValueError(f"{function}: document_ids must be None when cu_seqlens is given")
        checks.check_tensor(function, "document_ids", document_ids)
        checks.check_dtype(function, "document_ids", document_ids, checks.INTEGERS)
        checks.check_shape(function, "document_ids", document_ids, inside.shape, "(B, L)")
    if cu_seqlens is not None:
        document_ids, valid, packed_faults = _packed(function, cu_seqlens, inside, valid)
        found.append(packed_faults)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"{function}: sliding_window must be at least 1, got {sliding_window}")
    if visible_until is not None:
        checks.check_dtype(function, "visible_until", visible_until, checks.INTEGERS)
        checks.check_shape(function, "visible_until", visible_until, inside.shape, "(B, L)")
    start, end, row_faults = row_bounds(
        inside, span_begins, valid, document_ids, sliding_window, spans_exceed_window,
        strict=span_faults is not None,
    )  # fmt: skip
    found.append(row_faults)
    codes = None
    for code in found:
        if code is not None:
            codes = code if codes is None else codes | code
    (start, end), first = _select_queries(function, (start, end), num_queries, first_query)
    if visible_until is not None:
        visible_until = visible_until - first
    return finish(
        start, end, inside.shape[1], visible_until=visible_until, may_have_holes=may_have_holes,
        faults=codes, span_faults=span_faults,
    )  # fmt: skip


def finish(
    start: Tensor,
    end: Tensor,
    num_keys: int,
    *,
    visible_until: Tensor | None = None,
    may_have_holes: bool = False,
    faults: Tensor | None = None,
    span_faults: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """Add the column view and mark keys that no row sees.

    Padding in the middle of a packed row can lie inside a tile of keys that some row sees. Kernels
    must not even multiply such keys by zero (they may hold NaN), so they are marked by
    ``visible_until == 0``. Padding at the ends needs no mark: the bounds of the tile's rows exclude
    it.
    """
    row_start, row_end = column_view(start, end, num_keys)
    if visible_until is not None or may_have_holes:
        num_queries = start.shape[1]
        if visible_until is None:
            visible_until = torch.full_like(row_start, num_queries)
        visible_until = visible_until.clamp(0, num_queries).int()
        seen = (row_start < row_end) & (row_start < visible_until)
        visible_until = torch.where(seen, visible_until, 0).contiguous()
    return {
        "start": start, "end": end, "row_start": row_start, "row_end": row_end,
        "visible_until": visible_until, "token_faults": faults, "span_faults": span_faults,
    }  # fmt: skip
