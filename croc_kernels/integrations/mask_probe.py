"""From transformers' mask closures to one interval of keys per row, without a mask of length times
length.

transformers describes a mask by a closure over four indices, ``(batch, head, query, key) -> bool``.
Every mask this package can run lets a row see one contiguous run of keys around its own token. So
the two ends of that run are searched, for all rows at once: a round evaluates the closure at
``FAN_OUT`` keys to the left and to the right of what is known to be visible and keeps the section
where the answer changes. Three rounds reach 32 768 keys.

A closure can hide anything, so the result is checked where it was not searched: ``SAMPLES`` keys
per row, spread so that neighbouring rows look at different keys, and every padded key by a prefix
sum. The check stays on the device (``torch._assert_async``); it never waits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

FAN_OUT = 32
SAMPLES = 32

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

REFUSAL = (
    'attn_implementation="croc": the mask must let every row see one contiguous run of keys '
    "around its own token, "
    "and this one does not (holes in the attention mask, or blocks that see each other across a "
    'gap); use "sdpa"'
)


def _leading(visible: Tensor) -> Tensor:
    """How many of the last dimension's flags are True before the first False."""
    return visible.to(torch.int64).cumprod(-1).sum(-1)


def rounds(num_keys: int) -> int:
    """Rounds that find any end among so many keys.

    Compared, not computed by a logarithm: under ``torch.compile`` that would tie the graph to one
    length.
    """
    count, reach = 1, FAN_OUT + 1
    while reach < num_keys + 1:
        count, reach = count + 1, reach * (FAN_OUT + 1)
    return count


def search_intervals(visible: Callable[[Tensor], Tensor], own: Tensor, num_keys: int) -> Tensor:
    """First and past-the-last visible key around each row's own key, (2, B, L) int64.

    Args:
        visible: maps keys (B, L, n) to flags of the same shape.
        own: (B, L) int64, a key known to be visible in each row.
        num_keys: keys are 0 to ``num_keys`` - 1.
    """
    # Distances from the own key: `reached` is visible, `reached + room` is not (or past the end).
    reached = torch.zeros((2, *own.shape), dtype=torch.int64, device=own.device)
    room = torch.stack([own + 1, num_keys - own])
    fan = torch.arange(1, FAN_OUT + 1, device=own.device)
    for _ in range(rounds(num_keys)):
        stride = (room + FAN_OUT) // (FAN_OUT + 1)
        steps = stride[..., None] * fan
        inside = steps < room[..., None]
        distance = reached[..., None] + steps
        keys = torch.cat([own[..., None] - distance[0], own[..., None] + distance[1]], dim=-1)
        seen = visible(keys.clamp(0, num_keys - 1)).unflatten(-1, (2, FAN_OUT)).movedim(-2, 0)
        taken = _leading(seen & inside) * stride
        reached = reached + taken
        room = torch.minimum(room - taken, stride)
    return torch.stack([own - reached[0], own + reached[1] + 1])


def _check(
    visible: Callable[[Tensor], Tensor], own: Tensor, interval: Tensor, valid: Tensor, keys: int
) -> None:
    """Assert on the device that no sampled key contradicts the interval of a row in use."""
    stride = (keys + SAMPLES - 1) // SAMPLES
    sampled = (own[..., None] + stride * torch.arange(SAMPLES, device=own.device)) % keys
    inside = (sampled >= interval[0, ..., None]) & (sampled < interval[1, ..., None])
    torch._assert_async(((visible(sampled) == inside) | ~valid[..., None]).all(), REFUSAL)


def _check_padding(padding: Tensor, offset: int, interval: Tensor, valid: Tensor) -> None:
    """Assert on the device that no key inside the interval of a row in use is padding."""
    before = torch.nn.functional.pad(padding.to(torch.int64).cumsum(-1), (1, 0))
    first, last = (before.gather(-1, x + offset) for x in interval)
    torch._assert_async(((last - first == interval[1] - interval[0]) | ~valid).all(), REFUSAL)


def intervals(
    mask_function: MaskFunction,
    batch: int,
    num_queries: int,
    num_keys: int,
    query_offset: int | Tensor,
    key_offset: int,
    padding: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The keys that each row sees under a closure of transformers.

    Rows of padding see nothing: their interval is empty, placed so that starts and ends stay
    non-decreasing.

    Args:
        mask_function: index closure, ``True`` where the query sees the key. Indices are absolute.
        batch: B.
        num_queries: L, the rows.
        num_keys: the keys; key ``j`` has the absolute index ``j + key_offset``.
        query_offset: absolute index of the first row; a 0-dimensional tensor under a static cache.
        key_offset: absolute index of the first key, above zero in a sliding cache.
        padding: (B, at least ``num_keys + key_offset``) bool, True where a token is valid, or None.
        device: where the vectors are built.

    Returns:
        start and end, (B, L) int32 each, as positions among the keys.

    Raises:
        RuntimeError: some row's keys are no single run (on CUDA: a device-side assertion).
    """
    rows = torch.arange(batch, device=device)[:, None, None]
    queries = (torch.arange(num_queries, device=device) + query_offset)[None, :, None]
    head = torch.zeros((), dtype=torch.int64, device=device)

    def unpadded(keys: Tensor) -> Tensor:
        return mask_function(rows, head, queries, keys + key_offset).expand(keys.shape)

    def visible(keys: Tensor) -> Tensor:
        return (
            unpadded(keys) if padding is None else unpadded(keys) & padding[rows, keys + key_offset]
        )

    own = (queries[..., 0] - key_offset).expand(batch, num_queries).clamp(0, num_keys - 1)
    if padding is None:
        valid = torch.ones_like(own, dtype=torch.bool)
    else:
        valid = padding.gather(-1, own + key_offset)
    interval = search_intervals(visible, own, num_keys)
    torch._assert_async(unpadded(own[..., None]).all(), REFUSAL)
    # A decoded token is of the kind that was checked when its prompt was read.
    if num_queries > 1:
        _check(visible, own, interval, valid, num_keys)
    if padding is not None:
        _check_padding(padding, key_offset, interval, valid)
    end = torch.where(valid, interval[1], 0).cummax(-1).values
    start = torch.where(valid, interval[0], end)
    return start.to(torch.int32), end.to(torch.int32)
