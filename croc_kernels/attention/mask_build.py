"""Arguments of the constructors of :class:`~croc_kernels.attention.mask.MixedMask`: checked, and
handed to the two ops that make its vectors.
"""

import torch
from torch import Tensor

from .. import checks, ops
from . import intervals


def check_valid(function: str, attention_mask: Tensor, shape: tuple[int, int]) -> None:
    """Raise unless an attention mask, of any dtype, is (B, L)."""
    checks.check_tensor(function, "attention_mask", attention_mask)
    checks.check_shape(function, "attention_mask", attention_mask, shape, "(B, L)")


def _check_documents(
    function: str, document_ids: Tensor | None, cu_seqlens: Tensor | None, shape: tuple[int, int]
) -> None:
    if document_ids is not None:
        if cu_seqlens is not None:
            raise ValueError(f"{function}: document_ids must be None when cu_seqlens is given")
        checks.check_tensor(function, "document_ids", document_ids)
        checks.check_dtype(function, "document_ids", document_ids, checks.INTEGERS)
        checks.check_shape(function, "document_ids", document_ids, shape, "(B, L)")
    if cu_seqlens is not None:
        checks.check_tensor(function, "cu_seqlens", cu_seqlens)
        checks.check_dtype(function, "cu_seqlens", cu_seqlens, checks.INTEGERS)
        checks.check_rank(function, "cu_seqlens", cu_seqlens, "(D + 1,)", (1,))
        if shape[0] != 1:
            raise ValueError(
                f"{function}: cu_seqlens must go with a batch of one row, got B = {shape[0]}"
            )


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
    source: Tensor,
    kind: str,
    shape: tuple[int, int],
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    sliding_window: int | None = None,
    spans_exceed_window: bool = False,
    visible_until: Tensor | None = None,
    num_queries: int | None = None,
    first_query: int | Tensor | None = None,
    ignore_index: int = 0,
) -> dict[str, Tensor | None]:
    """Everything a mask of ``shape`` (B, L) holds; options as ``MixedMask.from_token_types``.

    ``kind`` says how ``source`` says which tokens are in spans. ``"types"``: (B, L) bool.
    ``"spans"``: (S, 3). ``"prefix"``: (B,) lengths. ``"labels"``: (B, L), the prefix ends at the
    first that is not ``ignore_index``. ``"causal"``: none is. ``"full"``: all are.
    """
    if attention_mask is not None:
        check_valid(function, attention_mask, shape)
    _check_documents(function, document_ids, cu_seqlens, shape)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"{function}: sliding_window must be at least 1, got {sliding_window}")
    if visible_until is not None:
        checks.check_dtype(function, "visible_until", visible_until, checks.INTEGERS)
        checks.check_shape(function, "visible_until", visible_until, shape, "(B, L)")
    documents = document_ids is not None or cu_seqlens is not None
    optional = (attention_mask, document_ids, cu_seqlens)
    start, end, faults, span_faults = ops.mask_rows(
        source, kind, *optional, *shape, sliding_window or 0, spans_exceed_window, ignore_index
    )  # fmt: skip
    (start, end), first = _select_queries(function, (start, end), num_queries, first_query)
    if visible_until is not None and not (isinstance(first, int) and first == 0):
        visible_until = visible_until - first
    return finish(
        start, end, shape[1], visible_until=visible_until,
        may_have_holes=attention_mask is not None and documents,
        faults=faults if intervals.has_faults(kind, *optional) else None,
        span_faults=span_faults if kind == "spans" else None,
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
    row_start, row_end, until = ops.mask_columns(
        start, end, num_keys, visible_until, may_have_holes
    )
    return {
        "start": start, "end": end, "row_start": row_start, "row_end": row_end,
        "visible_until": until if visible_until is not None or may_have_holes else None,
        "token_faults": faults, "span_faults": span_faults,
    }  # fmt: skip
