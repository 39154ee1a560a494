"""Images of different sizes, packed one after another in one (S, C) tensor: indices made without
the host waiting.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Padding(NamedTuple):
    """Where token j of image b lies in the packed tensor.

    Attributes:
        index: (B, T) int64, T the longest image; a slot past an image's end repeats a token near
            its end.
        valid: (B, T) bool, False past an image's end; None when all images have T tokens.
    """

    index: Tensor
    valid: Tensor | None


def device_integers(values: Sequence[int], device: torch.device) -> Tensor:
    """(n,) int64 on ``device`` from host integers.

    ``torch.tensor(values, device="cuda")`` copies from pageable memory, which the host waits for
    and a CUDA graph can't capture. Here the integers travel as kernel arguments: one fused launch
    for all of them.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64, device=device)
    return as_kernel_arguments(values, device)


def as_kernel_arguments(values: Sequence[int], device: torch.device) -> Tensor:
    """:func:`device_integers` for devices that run behind the host."""
    result = torch.zeros(len(values), dtype=torch.int64, device=device)
    if values:
        torch._foreach_add_(list(result.split(1)), list(values))
    return result


def starts_of(lengths: Sequence[int]) -> list[int]:
    """Each image's first place in the packed tensor."""
    return list(accumulate(lengths, initial=0))[:-1]


def all_equal(values: Sequence[int]) -> bool:
    """Whether all values are the same."""
    return all(value == values[0] for value in values)


def padding(lengths: Sequence[int], device: torch.device) -> Padding:
    """The (B, T) view of packed images; at least one image with at least one token."""
    longest = max(lengths)
    place = torch.arange(longest, device=device)
    if all_equal(lengths):
        count = len(lengths) * longest
        return Padding(torch.arange(count, device=device).view(len(lengths), longest), None)
    table = device_integers([*starts_of(lengths), *lengths], device).view(2, -1, 1)
    valid = place < table[1]
    # Repeating the image's own end, not one token of the batch, spreads what the backward of a
    # gather adds up.
    near = torch.minimum(place, (table[1] - 1).clamp_min(0)) + table[0]
    return Padding(near.clamp_max(sum(lengths) - 1), valid)


def scatter_back(
    index: Tensor, valid: Tensor | None, values: Tensor, size: int, fill: int
) -> Tensor:
    """(size,) tensor with ``values`` at the valid places of ``index`` and ``fill`` elsewhere."""
    if valid is not None:
        # One place past the end takes what is not valid.
        index = torch.where(valid, index, size)
    result = torch.full((size + 1,), fill, dtype=values.dtype, device=values.device)
    return result.scatter_(0, index.reshape(-1), values.reshape(-1))[:size]
