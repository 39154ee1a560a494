"""The recipe's attention for a transformers language model: from token places to what its layers
take.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.mask import MixedMask
from ..layer.packing import all_equal, device_integers, starts_of
from .attention_interface import is_packed, pack_mask


def image_spans(positions: Tensor, lengths: Sequence[int], length: int) -> Tensor:
    """(S, 3) spans of images whose tokens lie at ``positions`` of the flattened batch; empty images
    are left out.

    Two images with nothing between them stay two.
    """
    lengths = [n for n in lengths if n]
    if all_equal(lengths) and lengths:
        first = torch.arange(len(lengths), device=positions.device) * lengths[0]
        last = first + (lengths[0] - 1)
    else:
        starts = starts_of(lengths)
        ends = [start + n - 1 for start, n in zip(starts, lengths, strict=True)]
        first, last = device_integers([*starts, *ends], positions.device).view(2, -1)
    begin, end = positions[first], positions[last]
    return torch.stack([begin // length, begin % length, end % length + 1], dim=-1)


def padding_of(attention_mask: Any, length: int) -> Tensor | None:
    """The 2-D padding mask behind what a model was called with: itself, or read off a prepared
    mask.

    Raises:
        ValueError: a dense mask.
    """
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask is None:
        return None
    if is_packed(attention_mask):
        return attention_mask[:, 0, 0, :length] < attention_mask[:, 0, 1, :length]
    if attention_mask.dim() != 2:
        raise ValueError(
            "attach: attention_mask must be (B, L), the recipe makes the rest, got "
            f"{tuple(attention_mask.shape)}"
        )
    return attention_mask[:, :length] != 0


def documents_of(position_ids: Tensor | None, batch: int) -> Tensor | None:
    """(B, L) document ids of packed rows, whose positions restart; None where positions can't
    tell.
    """
    if position_ids is None:
        return None
    if position_ids.dim() == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]
    if position_ids.dim() != 2:
        return None
    restarts = torch.diff(position_ids, dim=-1, prepend=position_ids[:, :1] - 1) != 1
    return restarts.cumsum(-1).expand(batch, -1)


def prefix_lengths(labels: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """(B,) positions before the first supervised label; the whole row where there is none, or no
    labels.
    """
    if labels is None:
        return torch.full((batch,), length, dtype=torch.int64, device=device)
    place = torch.arange(length, device=labels.device)
    return torch.where(labels != -100, place, length).amin(1)


def packed_prefix(labels: Tensor | None, documents: Tensor, window: int | None) -> MixedMask:
    """The prefix mask of packed rows: in each document, what precedes its first supervised label is
    visible to all of it; a document without one is all prefix.

    Args:
        labels: (B, L), or None.
        documents: (B, L) ids, 1 to L, that never decrease along a row.
        window: rows see at most so many keys up to their own.
    """
    batch, length = documents.shape
    place = torch.arange(length, device=documents.device).expand(batch, length)
    supervised = place.new_full((batch, length), length)
    if labels is not None:
        supervised = torch.where(labels != -100, place, length)

    def of_document(values: Tensor, reduce: str) -> Tensor:
        per_document = values.new_full((batch, length + 1), length if reduce == "amin" else 0)
        return per_document.scatter_reduce(1, documents, values, reduce).gather(1, documents)

    start, last = of_document(place, "amin"), of_document(place + 1, "amax")
    end = torch.maximum(place + 1, torch.minimum(of_document(supervised, "amin"), last))
    if window is not None:
        start = torch.maximum(start, place - window + 1)
    start, end = start.to(torch.int32), end.to(torch.int32)
    return MixedMask.from_rows(start, end, length, may_have_holes=False)


def key_length(incoming: Any, cache: Any, length: int) -> int:
    """How many keys the layers will have: more than the rows only where a static cache is
    filled.
    """
    if isinstance(incoming, dict):
        return max(key_length(mask, cache, length) for mask in incoming.values())
    if is_packed(incoming):
        return incoming.shape[3] - length
    if cache is not None and getattr(cache, "is_compileable", False):
        read = getattr(cache, "get_max_length", None) or cache.get_max_cache_shape
        return int(read())
    return length


def packed_for(mask: MixedMask, num_keys: int) -> Tensor:
    """The mask in the layers' form; keys that a static cache has not filled yet are seen by no
    row.
    """
    if mask.num_keys != num_keys:
        mask = MixedMask.from_rows(mask.start, mask.end, num_keys, may_have_holes=False)
    return pack_mask(mask)


def check_first(cache: Any) -> None:
    """Refuse images that arrive behind a filled cache, and caches that are not transformers'.

    Raises:
        TypeError: the cache is no :class:`transformers.Cache`.
        ValueError: the cache already holds tokens.
    """
    if cache is None:
        return
    from transformers import Cache

    if not isinstance(cache, Cache):
        raise TypeError(
            f"attach: past_key_values must be a transformers.Cache, got {type(cache).__name__}; "
            "use DynamicCache or StaticCache"
        )
    # A static cache counts on the device; asking it would wait.
    if not cache.is_compileable and cache.get_seq_length() > 0:
        raise ValueError(
            "attach: images must come with the first tokens of a sequence, got pixel values and a "
            "cache of "
            f"{cache.get_seq_length()} tokens; pass the whole conversation again"
        )


def window_of(config: Any) -> tuple[int | None, tuple[str, ...]]:
    """The text config's sliding window, and the layer types it distinguishes (none: all layers
    alike).
    """
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = tuple(sorted(set(getattr(config, "layer_types", None) or ())))
    return window, types if "sliding_attention" in types else ()
