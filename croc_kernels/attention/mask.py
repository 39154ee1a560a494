"""``MixedMask``: which keys every query sees, as a few int32 per token on the device."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .. import checks
from . import intervals, mask_build

_NAME = "MixedMask"


@dataclass(frozen=True, eq=False, repr=False)
class MixedMask:
    """Mask of an attention in which images are bidirectional and text is causal.

    Row ``i`` sees key ``j`` if ``start[i] <= j < end[i]`` and, where ``visible_until`` is given,
    ``i < visible_until[j]``. ``start`` and ``end`` never decrease along a row of the batch. Build
    one per step with a constructor below and share it between all layers; nothing here waits for
    the device.

    Values that break a constructor's rules (overlapping spans, holes in a document) raise
    ValueError at once for CPU tensors. On other devices reading them would mean waiting, so they
    are recorded in the mask and :meth:`check` raises them when it is called; kernels never read or
    write out of bounds in the meantime, but their result is then undefined.

    Attributes:
        start: (B, Lq) int32, first key of each row.
        end: (B, Lq) int32, one past the last key of each row; equal to ``start`` for a row that
            sees nothing.
        row_start: (B, Lk) int32, first row that sees each key.
        row_end: (B, Lk) int32, one past the last row that sees each key.
        visible_until: (B, Lk) int32 or None, first row that no longer sees a key (0: no row sees
            it).
        token_faults: (B, L) int32 or None, codes read by :meth:`check`.
        span_faults: (S,) int32 or None, likewise.
    """

    start: Tensor
    end: Tensor
    row_start: Tensor
    row_end: Tensor
    visible_until: Tensor | None = None
    token_faults: Tensor | None = None
    span_faults: Tensor | None = None

    @property
    def batch(self) -> int:
        """B."""
        return self.start.shape[0]

    @property
    def num_queries(self) -> int:
        """Lq."""
        return self.start.shape[1]

    @property
    def num_keys(self) -> int:
        """Lk."""
        return self.row_start.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.start.device

    def __repr__(self) -> str:
        return (
            f"MixedMask(batch={self.batch}, num_queries={self.num_queries}, "
            f"num_keys={self.num_keys}, device={self.device})"
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MixedMask:
        """The same mask on another device."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return MixedMask(
            **{n: x if x is None else x.to(device, non_blocking=non_blocking) for n, x in values}
        )

    def to_dense(self) -> Tensor:
        """(B, 1, Lq, Lk) bool, True where a query sees a key. For tests and for looking: it has L²
        elements.
        """
        key = torch.arange(self.num_keys, dtype=torch.int32, device=self.device)
        dense = (self.start[..., None] <= key) & (key < self.end[..., None])
        if self.visible_until is not None:
            row = torch.arange(self.num_queries, dtype=torch.int32, device=self.device)
            dense = dense & (row[None, :, None] < self.visible_until[:, None, :])
        return dense[:, None]

    def check(self) -> MixedMask:
        """Wait for the device and raise ValueError if the constructor was given values that break
        its rules.

        Returns:
            The mask itself.
        """
        for faults, place in ((self.span_faults, "span"), (self.token_faults, "sample, token")):
            if faults is None or faults.numel() == 0:
                continue
            bad = (faults != 0).nonzero()
            if bad.shape[0] == 0:
                continue
            where = tuple(bad[0].tolist())
            code = int(faults[where])
            rule = intervals.FAULTS[code & -code]
            at = where[0] if len(where) == 1 else where
            raise ValueError(f"{_NAME}: {rule}, got a violation at {place} {at}")
        return self

    @classmethod
    def _checked(cls, vectors: dict[str, Tensor | None]) -> MixedMask:
        """The mask; values are checked at once where that costs no wait and is no part of a traced
        graph.
        """
        mask = cls(**vectors)
        eager = not torch.compiler.is_compiling() and type(mask.start) is Tensor
        return mask.check() if eager and mask.device.type == "cpu" else mask

    @classmethod
    def from_token_types(
        cls,
        is_visual: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        sliding_window: int | None = None,
        spans_exceed_window: bool = False,
        visible_until: Tensor | None = None,
        num_queries: int | None = None,
        first_query: int | Tensor | None = None,
    ) -> MixedMask:
        """Each run of visual tokens sees itself wholly; everything else is causal.

        Args:
            is_visual: (B, L) bool; each run of True is one image. A run is cut at padding and at
                the border of a document. Images with no token between them need :meth:`from_spans`,
                which does not merge them.
            attention_mask: (B, L), zero at padding, left or right of the tokens of each document.
                Padding sees nothing and is seen by nothing.
            document_ids: (B, L) integers that never decrease over the tokens of a row: packed
                documents, which don't see each other. Ids of padding are ignored.
            cu_seqlens: (D + 1,) integers, the same for a packed batch of one row: document d is
                ``cu_seqlens[d]:cu_seqlens[d + 1]``. Tokens after the last entry are padding.
                Instead of ``document_ids``.
            sliding_window: row ``i`` sees no key before ``i - sliding_window + 1``.
            spans_exceed_window: how window and images compose. False, as transformers does today:
                window AND (causal OR image). True, its older order: (causal AND window) OR image.
            visible_until: (B, L) integers: key ``j`` is hidden from position ``visible_until[j]``
                on, however the rest of the mask is (BAGEL's noised images, answers that share one
                question).
            num_queries: Lq, the last positions of the sequence are the queries; default L.
            first_query: position of the first query, an int or a device tensor () or (B,), for
                caches longer than what is filled; default ``L - num_queries``.

        Raises:
            TypeError: ``is_visual`` is not bool, or another argument not integral.
            ValueError: shapes disagree; both ``document_ids`` and ``cu_seqlens``; on CPU, a broken
                rule above.
        """
        function = f"{_NAME}.from_token_types"
        checks.check_tensor(function, "is_visual", is_visual)
        checks.check_dtype(function, "is_visual", is_visual, (torch.bool,))
        checks.check_rank(function, "is_visual", is_visual, "(B, L)", (2,))
        return cls._checked(mask_build.assemble(
            function, is_visual, "types", is_visual.shape, attention_mask, document_ids,
            cu_seqlens=cu_seqlens, sliding_window=sliding_window,
            spans_exceed_window=spans_exceed_window, visible_until=visible_until,
            num_queries=num_queries, first_query=first_query,
        ))  # fmt: skip

    @classmethod
    def from_spans(
        cls,
        spans: Tensor,
        batch: int,
        length: int,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        **options: object,
    ) -> MixedMask:
        """Each span sees itself wholly; everything else is causal.

        Args:
            spans: (S, 3) integers: sample, first token, one past the last token. Any order.
                Adjacent spans stay apart. A span with past == first is ignored, which pads a list
                of spans to a fixed size.
            batch: B.
            length: L.
            attention_mask: see :meth:`from_token_types`; a span must not contain padding.
            document_ids: see :meth:`from_token_types`; a span must lie inside one document.
            **options: ``cu_seqlens``, ``sliding_window``, ``spans_exceed_window``,
                ``visible_until``, ``num_queries`` and ``first_query`` of :meth:`from_token_types`.

        Raises:
            TypeError: ``spans`` is not integral.
            ValueError: wrong shape; on CPU, spans that overlap, leave the sequence or cross a
                border.
        """
        function = f"{_NAME}.from_spans"
        checks.check_tensor(function, "spans", spans)
        checks.check_dtype(function, "spans", spans, checks.INTEGERS)
        if spans.dim() != 2 or spans.shape[1] != 3:
            raise ValueError(f"{function}: spans must be (S, 3), got {tuple(spans.shape)}")
        return cls._checked(mask_build.assemble(
            function, spans, "spans", (batch, length), attention_mask, document_ids, **options
        ))  # fmt: skip

    @classmethod
    def prefix(
        cls,
        prefix_length: Tensor,
        length: int,
        attention_mask: Tensor | None = None,
        **options: object,
    ) -> MixedMask:
        """Positions below ``prefix_length`` are seen by every row, the rest is causal (PaliGemma,
        prefix-LM).

        Args:
            prefix_length: (B,) integers from 0 to ``length``, counted from position 0, left padding
                included.
            length: L.
            attention_mask: (B, L), zero at padding.
            **options: ``sliding_window``, ``num_queries``, ``first_query`` of
                :meth:`from_token_types`.

        Raises:
            TypeError: ``prefix_length`` is not integral.
            ValueError: wrong shape; on CPU, a length out of range.
        """
        function = f"{_NAME}.prefix"
        checks.check_tensor(function, "prefix_length", prefix_length)
        checks.check_dtype(function, "prefix_length", prefix_length, checks.INTEGERS)
        checks.check_rank(function, "prefix_length", prefix_length, "(B,)", (1,))
        shape = (prefix_length.shape[0], length)
        return cls._checked(mask_build.assemble(
            function, prefix_length, "prefix", shape, attention_mask, **options
        ))  # fmt: skip

    @classmethod
    def from_labels(
        cls,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        ignore_index: int = -100,
        exact_parity: bool = False,
    ) -> MixedMask:
        """The released Croc's mask: every position before the first supervised label is seen by
        every row.

        Args:
            labels: (B, L) integers, after images were expanded. A row without any supervised label
                is one prefix.
            attention_mask: (B, L), zero at padding.
            ignore_index: label of a token without supervision.
            exact_parity: reproduce what the released code computes for padding: positions of left
                padding inside the prefix are visible, padding rows see what a token in their place
                would see, and a row without any supervised label sees everything, padding included.
                (The released code applies its mask only to batches in which at least one sample has
                masked patches, and is causal otherwise: that choice is the caller's.)

        Raises:
            TypeError: ``labels`` is not integral.
            ValueError: wrong shape; on CPU, with ``exact_parity``, labels that supervise left
                padding.
        """
        function = f"{_NAME}.from_labels"
        checks.check_tensor(function, "labels", labels)
        checks.check_dtype(function, "labels", labels, checks.INTEGERS)
        checks.check_rank(function, "labels", labels, "(B, L)", (2,))
        if not exact_parity:
            return cls._checked(mask_build.assemble(
                function, labels, "labels", labels.shape, attention_mask, ignore_index=ignore_index
            ))  # fmt: skip
        length = labels.shape[1]
        position = intervals.positions(labels)
        supervised = torch.where(labels != ignore_index, position, length)
        prefix = supervised.amin(1) if length else labels.new_zeros(labels.shape[0])
        last = torch.full_like(prefix, length)
        faults = None
        if attention_mask is not None:
            mask_build.check_valid(function, attention_mask, labels.shape)
            valid = attention_mask != 0
            last = torch.where(valid, position + 1, 0).amax(1)
            first = torch.where(valid, position, length).amin(1)
            bad = (prefix < first) & (first > 0)
            faults = torch.where(bad, intervals.PARITY, 0).int()[:, None].expand_as(labels)
        end = torch.maximum(prefix[:, None], torch.minimum(position + 1, last[:, None]))
        start, end = torch.zeros_like(end, dtype=torch.int32), end.int()
        return cls._checked(mask_build.finish(start, end, length, faults=faults))

    @classmethod
    def causal(
        cls, batch: int, length: int, *, device: torch.device | str = "cpu", **options: object
    ) -> MixedMask:
        """Row ``i`` sees keys up to ``i``.

        Args:
            batch: B.
            length: L (keys).
            device: where the vectors are made.
            **options: everything :meth:`from_token_types` takes after ``is_visual``.
        """
        return cls._alike("causal", batch, length, device, options)

    @classmethod
    def full(
        cls, batch: int, length: int, *, device: torch.device | str = "cpu", **options: object
    ) -> MixedMask:
        """Every row sees every key (of its document, outside padding). Arguments as
        :meth:`causal`.
        """
        return cls._alike("full", batch, length, device, options)

    @classmethod
    def _alike(
        cls, kind: str, batch: int, length: int, device: torch.device | str, options: dict
    ) -> MixedMask:
        """The mask whose tokens are all in one span, or none in any."""
        nothing, shape = torch.zeros(0, dtype=torch.bool, device=device), (batch, length)
        return cls._checked(mask_build.assemble(f"{_NAME}.{kind}", nothing, kind, shape, **options))

    @classmethod
    def from_rows(
        cls,
        start: Tensor,
        end: Tensor,
        num_keys: int,
        visible_until: Tensor | None = None,
        *,
        may_have_holes: bool = True,
    ) -> MixedMask:
        """From the intervals themselves.

        Args:
            start: (B, Lq) integers.
            end: (B, Lq) integers; ``0 <= start <= end <= num_keys``, neither decreases along a row
                of the batch.
            num_keys: Lk.
            visible_until: (B, Lk) integers, first **row** that no longer sees a key, or None.
            may_have_holes: False promises that rows that see nothing, and keys that no row sees,
                lie only at the ends of a row of the batch; the kernels then need not look for them.

        Raises:
            ValueError: shapes disagree; on CPU, bounds that break the rules.
        """
        function = f"{_NAME}.from_rows"
        checks.check_tensor(function, "start", start)
        checks.check_rank(function, "start", start, "(B, Lq)", (2,))
        checks.check_shape(function, "end", end, start.shape, "(B, Lq)")
        falls = (start < intervals.shift_right(start, 0)) | (end < intervals.shift_right(end, 0))
        bad = falls | (start < 0) | (start > end) | (end > num_keys)
        faults = torch.where(bad, intervals.ROWS, 0).int()
        start, end = (x.clamp(0, num_keys).int().contiguous() for x in (start, end))
        if visible_until is not None:
            layout = (start.shape[0], num_keys)
            checks.check_shape(function, "visible_until", visible_until, layout, "(B, Lk)")
        return cls._checked(mask_build.finish(
            start, end, num_keys, visible_until=visible_until, may_have_holes=may_have_holes,
            faults=faults,
        ))  # fmt: skip

    @classmethod
    def from_dense(cls, dense: Tensor) -> MixedMask:
        """From a boolean matrix, refusing what one interval per row can't express.

        Args:
            dense: (B, Lq, Lk) or (B, 1, Lq, Lk) bool, True where a query sees a key.

        Raises:
            TypeError: ``dense`` is not bool.
            ValueError: wrong shape; on CPU, a mask that can't be expressed.
        """
        function = f"{_NAME}.from_dense"
        checks.check_tensor(function, "dense", dense)
        checks.check_dtype(function, "dense", dense, (torch.bool,))
        if dense.dim() == 4 and dense.shape[1] == 1:
            dense = dense[:, 0]
        checks.check_rank(function, "dense", dense, "(B, Lq, Lk) or (B, 1, Lq, Lk)", (3,))
        num_keys = dense.shape[2]
        key = torch.arange(num_keys, dtype=torch.int32, device=dense.device)
        start = torch.where(dense, key, num_keys).amin(2).int()
        end = torch.where(dense, key + 1, 0).amax(2).int()
        some = end > 0
        broken = some & (dense.sum(2) != end - start)
        empty_at = intervals.running_max(torch.where(some, end, 0))
        start, end = torch.where(some, start, empty_at), torch.where(some, end, empty_at)
        falls = (start < intervals.shift_right(start, 0)) | (end < intervals.shift_right(end, 0))
        faults = torch.where(broken | falls, intervals.DENSE, 0).int()
        return cls._checked(
            mask_build.finish(start, end, num_keys, may_have_holes=True, faults=faults)
        )
