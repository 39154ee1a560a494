"""Which tokens of each image are masked, and which pool row takes each one's place. All on the
device.

The draw: one integer comes from the generator; the token's place in its micro-batch and the
distributed rank are mixed into it by an integer hash, and the ceil(ratio * T) smallest hashes of an
image are its masked tokens. So the masks depend on the generator's state alone: a recomputation
under gradient checkpointing and a run that was resumed draw the same ones, a captured CUDA graph
draws new ones at each replay, and no two ranks draw alike.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..assignment.api import linear_assignment_ex
from ..cost.api import nearest_token, token_cost
from .packing import all_equal, device_integers, scatter_back, starts_of

_WORD = 2**32 - 1
MIX_FACTORS = (0x21F0AAAD, 0x735A2D97)


class Matching(NamedTuple):
    """What is masked in a packed batch of images.

    Attributes:
        masked: (S,) bool.
        pool_index: (S,) int64, the pool row that takes the token's place, -1 where the token is
            kept.
        num_masked: number of masked tokens.
        lengths: tokens of each image.
        status: (P,) int32, the solver's word on each image (and round), an
            :class:`AssignmentStatus`; None where nothing was solved. Whatever is not 0 left its
            tokens unmasked.
    """

    masked: Tensor
    pool_index: Tensor
    num_masked: int
    lengths: tuple[int, ...]
    status: Tensor | None = None


class Problems(NamedTuple):
    """The assignment problems of a batch, one per image and round.

    Attributes:
        token_index: (P, W) int64, each problem's tokens in the packed tensor.
        valid: (P, W) bool, or None when every problem has W tokens.
        num_rows: (P,) int64 number of valid tokens, or None likewise.
    """

    token_index: Tensor
    valid: Tensor | None
    num_rows: Tensor | None


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """(1,) int64: the only number that one micro-batch takes from the generator."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


def current_rank() -> int:
    """This process's rank, 0 without torch.distributed."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if running else 0


def rank_offset(rank: int) -> int:
    """What a rank changes in a seed's lower word."""
    return rank * 0x9E3779B9 & _WORD


def hash_places(place: Tensor, seed: Tensor, rank: int) -> Tensor:
    """One 32-bit key per place, as int64; distinct places get distinct keys.

    An affine map with a random odd factor, then a multiply-xorshift finaliser: both are bijections
    of 32-bit words. No product exceeds 2**63, since signed overflow is undefined in compiled code.
    """
    factor = (seed >> 32) | 1
    offset = (seed & _WORD) ^ rank_offset(rank)
    key = (place * factor + offset) & _WORD
    key = ((key ^ (key >> 16)) * MIX_FACTORS[0]) & _WORD
    key = ((key ^ (key >> 15)) * MIX_FACTORS[1]) & _WORD
    return key ^ (key >> 15)


def sorted_places(
    seeds: Tensor,
    table: Tensor | None,
    batch: int,
    longest: int,
    width: int,
    total: int,
    rank: int,
) -> Tensor:
    """``croc_kernels::draw_order`` in PyTorch."""
    slot = torch.arange(longest, device=seeds.device)
    if table is None:
        index = slot + longest * torch.arange(batch, device=seeds.device)[:, None]
        key = hash_places(index, seeds, rank)
    else:
        start, length, first, group = table[..., None]
        # A slot past the image's end repeats its last token.
        near = torch.minimum(slot, (length - 1).clamp_min(0)) + start
        index = near.clamp_max(total - 1)
        key = hash_places(index - first, seeds[group], rank)
        key = torch.where(slot < length, key, _WORD + 1)
    return index.gather(1, key.sort(dim=1, stable=True).indices[:, :width])


def draw_order(
    lengths: Sequence[int],
    images: Sequence[int],
    seeds: Sequence[Tensor],
    rank: int,
    width: int | None = None,
) -> Tensor:
    """(B, width) places in the packed tensor: each image's own in a random order, what lies past
    its end last.

    Args:
        lengths: tokens of each image, of all micro-batches one after another.
        images: number of images of each micro-batch.
        seeds: one (1,) draw per micro-batch.
        rank: of this process.
        width: how many of each image, by default all of the longest.
    """
    longest, table = max(lengths), None
    if len(images) > 1 or not all_equal(lengths):
        # Places count from the micro-batch's own first token, as if it came alone.
        starts = starts_of(lengths)
        firsts = [starts[i] for i in accumulate(images, initial=0) if i < len(starts)]
        pairs = enumerate(zip(firsts, images, strict=False))
        owners = [(first, group) for group, (first, count) in pairs for _ in range(count)]
        columns = (starts, lengths, *zip(*owners, strict=True))
        values = [value for column in columns for value in column]
        table = device_integers(values, seeds[0].device).view(4, -1)
    packed = seeds[0] if len(seeds) == 1 else torch.cat(list(seeds))
    width = longest if width is None else width
    return ops.draw_order(packed, table, len(lengths), longest, width, sum(lengths), rank)


def make_problems(order: Tensor, counts: Sequence[int], rows_per_round: int) -> Problems:
    """Cut the first ``counts[b]`` tokens of each image's random order into problems.

    An image with more tokens than ``rows_per_round`` is cut into as few rounds of (nearly) equal
    size as will do.
    """
    most = max(counts)
    if most <= rows_per_round:
        index = order[:, :most].contiguous()
        if all_equal(counts):
            return Problems(index, None, None)
        rows = device_integers(counts, order.device)
        return Problems(index, torch.arange(most, device=order.device) < rows[:, None], rows)
    sizes = [-(-count // max(1, -(-count // rows_per_round))) for count in counts]
    width, rounds = max(sizes), -(-most // rows_per_round)
    table = device_integers([*counts, *sizes], order.device).view(2, -1, 1)
    first = torch.arange(rounds, device=order.device) * table[1]  # (B, R)
    rows = torch.minimum((table[0] - first).clamp_min(0), table[1]).view(-1)
    within = torch.arange(width, device=order.device)
    rank = (first[..., None] + within).clamp_max(order.shape[1] - 1)  # (B, R, W)
    index = order.gather(1, rank.view(order.shape[0], -1)).view(-1, width)
    return Problems(index, within < rows[:, None], rows)


def match_tokens(
    tokens: Tensor, pool: Tensor, problems: Problems, *, nearest: bool, metric: str
) -> tuple[Tensor, Tensor | None]:
    """The pool row of each masked token of the packed (S, C) tokens, (S,) int64 with -1 for the
    others; and the solver's status of each problem, (P,) int32.
    """
    status = None
    arguments = {"metric": metric, "token_index": problems.token_index}
    if nearest:
        index = nearest_token(tokens, pool, num_rows=problems.num_rows, **arguments)
    else:
        cost = token_cost(tokens, pool, num_rows=problems.num_rows, **arguments)
        solved = linear_assignment_ex(cost, num_rows=problems.num_rows)
        index, status = solved.index, solved.status
    return scatter_back(problems.token_index, problems.valid, index, tokens.shape[0], -1), status


def keep_all(features: Tensor, lengths: tuple[int, ...]) -> Matching:
    """The matching in which every token is kept."""
    index = torch.full(features.shape[:1], -1, dtype=torch.int64, device=features.device)
    return Matching(index >= 0, index, 0, lengths)


def _split(
    tokens: Sequence[Tensor],
    lengths: Sequence[tuple[int, ...]],
    counts: Sequence[tuple[int, ...]],
    some: Sequence[int],
    index: Tensor,
    status: Tensor | None,
) -> list[Matching]:
    """One Matching per micro-batch out of the joint result for those in ``some``."""
    sizes = [tokens[i].shape[0] for i in some]
    parts = dict(zip(some, index.split(sizes), strict=True))
    states = dict.fromkeys(some)
    if status is not None:
        rounds = status.shape[0] // sum(len(lengths[i]) for i in some)
        sizes = [rounds * len(lengths[i]) for i in some]
        states = dict(zip(some, status.split(sizes), strict=True))
    return [
        Matching(parts[i] >= 0, parts[i], sum(counts[i]), group, states[i])
        if i in parts
        else keep_all(tokens[i], group)
        for i, group in enumerate(lengths)
    ]


@torch.no_grad()
def match_micro_batches(
    tokens: Sequence[Tensor],
    pool: Tensor,
    lengths: Sequence[tuple[int, ...]],
    counts: Sequence[tuple[int, ...]],
    *,
    nearest: bool,
    metric: str,
    rank: int,
    generator: torch.Generator | None,
) -> list[Matching]:
    """Draw and match micro-batches in one call, each with the result that it gets alone.

    Args:
        tokens: (S, C) normalised tokens of each micro-batch.
        pool: (M, C).
        lengths: tokens of each image, by micro-batch.
        counts: how many of them to mask, likewise.
        nearest: match by nearest row, else by the assignment of smallest total.
        metric: of the distances.
        rank: mixed into the draw.
        generator: None for the device's own.

    Raises:
        ValueError: the generator is of another device.
    """
    # A micro-batch without masked tokens draws nothing, alone or among others.
    some = [i for i, group in enumerate(counts) if sum(group)]
    if not some:
        return [keep_all(x, group) for x, group in zip(tokens, lengths, strict=True)]
    packed = tokens[some[0]] if len(some) == 1 else torch.cat([tokens[i] for i in some])
    if generator is not None and generator.device.type != packed.device.type:
        raise ValueError(
            f"CrocLayer: generator must be on the features' device, {packed.device}, "
            f"got {generator.device}"
        )
    seeds = [draw_seed(packed.device, generator) for _ in some]
    flat_lengths = [length for i in some for length in lengths[i]]
    flat_counts = [count for i in some for count in counts[i]]
    most = max(flat_counts)
    rows_per_round = most if nearest else pool.shape[0]
    images = [len(lengths[i]) for i in some]
    width = most if most <= rows_per_round else None
    order = draw_order(flat_lengths, images, seeds, rank, width)
    problems = make_problems(order, flat_counts, rows_per_round)
    # Costs are float32 whatever the tokens are; the operators take no wider input.
    packed = packed.float() if packed.dtype == torch.float64 else packed
    pool = pool.to(packed.dtype)
    index, status = match_tokens(packed, pool, problems, nearest=nearest, metric=metric)
    return _split(tokens, lengths, counts, some, index, status)
