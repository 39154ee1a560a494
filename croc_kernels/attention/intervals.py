"""From tokens to intervals: the scans behind :class:`~croc_kernels.attention.mask.MixedMask`.

Row ``i`` sees keys ``start[i] <= j < end[i]``. Both vectors never decrease along a row of the
batch, also over rows that see nothing (there ``start[i] == end[i]``), so four scalars classify a
tile of the score matrix and the rows that see key ``j`` are an interval too. Every function here is
a handful of scans: no host synchronisation, nothing of size L², and values are only ever reported
through fault codes that :meth:`MixedMask.check` reads.
"""

import torch
from torch import Tensor

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
    span_faults = span_codes(spans, batch, length)
    used = (span_faults == 0) & (past > first)  # an empty span pads a list of spans to a fixed size
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


def span_codes(spans: Tensor, batch: int, length: int) -> Tensor:
    """(S,) int32 fault code of each span."""
    sample, first, past = spans.unbind(1)
    good = (sample >= 0) & (sample < batch) & (first >= 0) & (first <= past) & (past <= length)
    return torch.where(good, 0, RANGE).int()


def has_faults(kind: str, *optional: Tensor | None) -> bool:
    """Whether values can break a rule: padding, documents and borders can, runs of tokens can't."""
    return kind in ("spans", "prefix", "labels") or any(x is not None for x in optional)


def _packed(
    cu_seqlens: Tensor, like: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Document ids, valid tokens and fault codes of one packed row."""
    position = positions(like)
    borders = cu_seqlens.int().contiguous()
    ids = torch.searchsorted(borders[1:], position[0], right=True, out_int32=True)[None]
    inside = position < borders[-1:]
    bad = (borders[:1] != 0) | (borders[-1:] > like.shape[1]) | (borders.diff() < 0).any()
    faults = torch.where(bad, CU_SEQLENS, 0).int()[:, None].expand_as(like)
    return ids, inside if valid is None else inside & valid, faults


def _prefix(
    source: Tensor, kind: str, batch: int, length: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """``inside`` and fault codes, (B, L) each, of a prefix that is given or ends at a label."""
    position = torch.arange(length, dtype=torch.int32, device=source.device)
    if kind == "causal":
        return (position < 0).expand(batch, length), torch.zeros_like(position)
    if kind == "full":
        return (position >= 0).expand(batch, length), torch.zeros_like(position)
    if kind == "labels":
        supervised = torch.where(source != ignore_index, position, length)
        source = supervised.amin(1) if length else source.new_zeros(batch)
    bad = (source < 0) | (source > length)
    return position < source[:, None], torch.where(bad, PREFIX, 0).int()[:, None]


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
    """``croc_kernels::mask_rows`` in PyTorch."""
    begins, span_faults = None, source.new_zeros(0, dtype=torch.int32)
    if kind == "types":
        inside, faults = source, torch.zeros_like(positions(source))
    elif kind == "spans":
        inside, begins, faults, span_faults = mark_spans(source, batch, length)
    else:
        inside, faults = _prefix(source, kind, batch, length, ignore_index)
    valid = None if attention_mask is None else attention_mask != 0
    if cu_seqlens is not None:
        document_ids, valid, packed_faults = _packed(cu_seqlens, inside, valid)
        faults = faults | packed_faults
    start, end, row_faults = row_bounds(
        inside, begins, valid, document_ids, sliding_window or None, spans_exceed_window,
        strict=kind == "spans",
    )  # fmt: skip
    if not has_faults(kind, attention_mask, document_ids, cu_seqlens):
        return start, end, span_faults.clone(), span_faults
    faults = faults if row_faults is None else faults | row_faults
    return start, end, faults.expand(batch, length).contiguous(), span_faults


def mask_columns(
    start: Tensor,
    end: Tensor,
    num_keys: int,
    visible_until: Tensor | None,
    may_have_holes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``croc_kernels::mask_columns`` in PyTorch."""
    row_start, row_end = column_view(start, end, num_keys)
    if visible_until is None and not may_have_holes:
        return row_start, row_end, start.new_zeros(0)
    num_queries = start.shape[1]
    if visible_until is None:
        visible_until = torch.full_like(row_start, num_queries)
    visible_until = visible_until.clamp(0, num_queries).int()
    seen = (row_start < row_end) & (row_start < visible_until)
    return row_start, row_end, torch.where(seen, visible_until, 0).contiguous()
