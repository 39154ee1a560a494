"""Tile shapes of the attention kernels: pure functions of chip, head dimension and dtype.

Those of sm_90's forward pass were timed on an H200, the others chosen by compiling without running
(registers, spills, shared memory): docs/attention.md, what was timed docs/attention_trials.md.
"""

import math
from dataclasses import dataclass

import torch

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

# Each is a power of two, or the sum of two.
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 160, 192, 256)

DELTA_BLOCK_M = 64
DELTA_NUM_WARPS = 4


@dataclass(frozen=True)
class ForwardConfig:
    """Tiles of the forward kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, object]:
        """Constexpr arguments of the kernel."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}


@dataclass(frozen=True)
class BackwardConfig:
    """Tiles of the backward kernel: (M, N) of the programs for keys and of those for queries."""

    keys_block_m: int
    keys_block_n: int
    queries_block_m: int
    queries_block_n: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, object]:
        """Constexpr arguments of the kernel."""
        return {
            "KEYS_BLOCK_M": self.keys_block_m, "KEYS_BLOCK_N": self.keys_block_n,
            "QUERIES_BLOCK_M": self.queries_block_m, "QUERIES_BLOCK_N": self.queries_block_n,
        }  # fmt: skip


@dataclass(frozen=True)
class HopperForwardConfig:
    """Tiles of the warp-specialised forward kernel, and how many heads share a stretch of turns.

    ``dynamic``: programs draw their tiles from a counter. ``skip``: a warp group leaves out tiles
    of keys that only the others' rows see. ``registers``: of a thread that multiplies. ``keep_q``:
    these hold the tile of queries, instead of reading it from shared memory for every product.
    ``trust``: the largest score of a row is looked for in its first tile of keys, and in later ones
    only where sums of weights are too large without.
    """

    block_n: int
    stages: int
    section: int
    groups: int
    dynamic: bool = False
    skip: bool = False
    registers: int = 232
    keep_q: bool = False
    trust: bool = False

    @property
    def block_m(self) -> int:
        """Rows of a tile: 64 for each warp group."""
        return 64 * self.groups

    def constants(self) -> dict[str, object]:
        """Constexpr arguments of the kernel."""
        # Of 65536, 128 threads per warp group take these, as many beside the loading warp the rest.
        rest = {2: 504, 3: 512}[self.groups] - self.groups * self.registers
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "STAGES": self.stages,
            "SECTION": self.section, "GROUPS": self.groups, "DYNAMIC": self.dynamic,
            "SKIP": self.skip, "KEEP_Q": self.keep_q, "CONSUMER_REGISTERS": self.registers,
            "PRODUCER_REGISTERS": rest, "TRUST": self.trust,
        }  # fmt: skip


@dataclass(frozen=True)
class HopperBackwardConfig:
    """Tiles of the warp-specialised backward kernel, and how many heads' tiles of keys take turns,
    those with most rows first.

    ``ahead``: spare warps prepare the section so many after theirs: zero what its tiles add to, and
    with ``statistics`` compute those of its rows, which else the kernel before does. Without it is
    at most the next. ``early``: the kernel after begins with heads that are done while others are
    not. ``late``: each product for dK runs into the next tile of rows (D = 64 alone). ``whole``:
    one tile holds all keys, so dQ is not added up; without any of the others, ordered or not.
    ``staged``: the copy engine adds dQ up, from shared memory, else the multiplying warps do.
    """

    block_m: int
    block_n: int
    stages: int
    section: int
    ahead: int = 0
    early: bool = False
    late: bool = False
    statistics: bool = False
    whole: bool = False
    staged: bool = False

    def constants(self) -> dict[str, object]:
        """Constexpr arguments of the kernel."""
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "STAGES": self.stages,
            "SECTION": self.section, "AHEAD": int(self.ahead), "EARLY": self.early,
            "LATE": self.late, "STATISTICS": self.statistics, "WHOLE": self.whole,
            "STAGED": self.staged,
        }  # fmt: skip


def split_head(dim: int) -> tuple[int, int]:
    """D as a sum of two powers of two, the second possibly 0: 80 = 64 + 16, 128 = 128 + 0."""
    first = 1 << (dim.bit_length() - 1)
    return first, dim - first


# Largest head dimension first matched: (dim, block_m, block_n, num_warps, num_stages).
_FORWARD = {
    "hopper": (
        (64, 64, 64, 4, 3),
        (128, 128, 128, 8, 3),
        (192, 128, 64, 8, 3),
        (256, 128, 64, 8, 2),
    ),
    "ampere": (
        (64, 128, 64, 4, 2),
        (128, 128, 64, 8, 2),
        (192, 64, 32, 4, 1),
        (256, 128, 32, 8, 2),
    ),
    "small": ((64, 128, 64, 4, 2), (128, 64, 64, 4, 2), (192, 64, 32, 4, 1), (256, 64, 32, 8, 1)),
}
# (dim, keys' block_m and block_n, queries' block_m and block_n, num_warps, num_stages).
_BACKWARD = {
    # Measured on an H200: D = 64, 128 and 256 (docs/attention.md).
    "hopper": (
        (64, 64, 64, 64, 64, 4, 3),
        (80, 64, 128, 128, 64, 8, 2),
        (96, 64, 64, 128, 64, 8, 2),
        (128, 64, 128, 128, 64, 8, 2),
        (192, 32, 64, 64, 64, 8, 2),
        (256, 64, 64, 64, 64, 8, 1),
    ),
    "ampere": (
        (64, 32, 64, 64, 64, 8, 2),
        (96, 16, 64, 64, 16, 8, 1),
        (128, 64, 64, 64, 64, 8, 2),
        (160, 16, 32, 32, 16, 8, 1),
        (192, 32, 32, 64, 32, 8, 1),
        (256, 32, 64, 64, 32, 8, 1),
    ),
    "small": (
        (64, 32, 64, 64, 64, 8, 2),
        (80, 32, 64, 64, 32, 8, 1),
        (96, 16, 64, 64, 16, 8, 1),
        (128, 32, 64, 64, 32, 8, 1),
        (256, 16, 32, 32, 16, 4, 1),
    ),
}


def family(arch: int) -> str:
    """Chips that share tiles: large shared memory with wgmma or tcgen05, large without, small."""
    if arch in (90, 100, 103):
        return "hopper"
    return "ampere" if arch in (80, 87) else "small"


def _row(table: tuple[tuple[int, ...], ...], dim: int) -> tuple[int, ...] | None:
    return next((row[1:] for row in table if dim <= row[0]), None)


def pick_forward(arch: int, dim: int, dtype: torch.dtype, length: int) -> ForwardConfig:
    """Tiles for compute capability ``arch`` (90 for 9.0, 0 for the interpreter)."""
    if arch == 0:
        return ForwardConfig(32, 32, 4, 1)
    if dtype == torch.float32:
        return ForwardConfig(64, 32, 4, 2) if dim <= 128 else ForwardConfig(32, 32, 4, 1)
    return ForwardConfig(*_row(_FORWARD[family(arch)], dim))


def pick_backward(arch: int, dim: int, dtype: torch.dtype, length: int) -> BackwardConfig:
    """As :func:`pick_forward`."""
    if arch == 0:
        return BackwardConfig(32, 32, 32, 32, 4, 1)
    if dtype == torch.float32:
        return BackwardConfig(*(4 * (32 if dim <= 64 else 16,)), 8, 1)
    return BackwardConfig(*_row(_BACKWARD[family(arch)], dim))


HOPPER_LONG = (1536, 3072)
# (block_n, stages, section, groups, dynamic, skip, registers, keep_q, trust) per head dimension,
# from so many rows on. Measured on H100 and H200, docs/attention_trials.md.
HOPPER_FORWARD = {
    64: (
        (0, 64, 4, 4, 2, False, False, 232, True, True),
        (HOPPER_LONG[0], 128, 3, 12, 2, False, False, 232, True, True),
        (HOPPER_LONG[1], 128, 3, 4, 3, True, False, 160, False, True),
    ),
    128: (
        (0, 64, 4, 4, 2, False, True, 232, True, True),
        (HOPPER_LONG[0], 128, 2, 12, 2, False, False, 232, True, True),
        (HOPPER_LONG[1], 128, 2, 4, 2, True, False, 232, True, True),
    ),
    256: (
        (0, 64, 2, 12, 2, False, True, 216), (1025, 64, 2, 16, 2, True, True, 216),
        (HOPPER_LONG[1], 64, 2, 4, 2, True, False, 216),
    ),
}  # fmt: skip
# Fewer rows than a tile has, as with a cache: the plain kernel has smaller ones.
HOPPER_SHORTEST = 128


def pick_hopper_forward(
    arch: int, dim: int, dtype: torch.dtype, length: int, plain_scores: bool, aligned: bool
) -> HopperForwardConfig | None:
    """Tiles of the warp-specialised forward for ``length`` rows, or None where the plain kernel has
    to do. ``plain_scores`` and ``aligned``: see :func:`pick_hopper_backward`.
    """
    tiles = HOPPER_FORWARD.get(dim)
    fits = plain_scores and aligned and length >= HOPPER_SHORTEST
    if arch != 90 or dtype == torch.float32 or not (fits and tiles):
        return None
    return HopperForwardConfig(*[row[1:] for row in tiles if length >= row[0]][-1])


# (block_m, block_n, stages) per head dimension. Measured on an H200 for D = 64 (424 TFLOP/s at 8k;
# three stages 418, 128 rows per tile 367) and D = 128 (three stages: 2 % slower at 1k to 4k).
HOPPER_BACKWARD = {64: (64, 128, 2), 128: (64, 128, 2), 256: (64, 64, 2)}
# Where there is shared memory for a tile of dQ in float32, and it gained. Measured on an H100, in
# order with shared heads on an H200.
HOPPER_STAGED = (128,)
# From how many keys on ``ahead`` with ``early`` gained, or ``early`` alone, by dimension and
# whether heads share keys. Measured on an H100, D = 256 on an H200, docs/attention_trials.md.
HOPPER_AHEAD = {(128, False): 512, (128, True): 1024}
HOPPER_EARLY = HOPPER_AHEAD | {(64, False): 1024, (256, False): 512, (256, True): 512}
# The same for ``late``, and from how many keys on in order. Measured on an H200.
HOPPER_LATE = {(64, False): (1024, 2 * HOPPER_LONG[1])}
# Statistics ahead at D = 128, by whether in order and whether heads share keys: from how many keys
# on, with how many programs at least, how many sections ahead, key heads of a section. Measured on
# an H100, the last on an H200.
HOPPER_STATISTICS = {
    (False, False): (
        (576, 512, 3, 8), (768, 320, 4, 4), (1024, 320, 2, 8), (1536, 320, 2, 4),
        (HOPPER_LONG[1], 320, 2, 2),
    ),
    (False, True): (
        (1024, 320, 2, 8), (HOPPER_LONG[1], 320, 2, 4), (2 * HOPPER_LONG[1], 320, 2, 2),
    ),
    (True, False): (
        (512, 512, 4, 8), (576, 512, 3, 8), (1024, 512, 2, 8), (HOPPER_LONG[1], 512, 2, 4),
        (2 * HOPPER_LONG[1], 512, 2, 2),
    ),
    (True, True): (
        (512, 160, 4, 8), (576, 160, 3, 8), (1024, 160, 4, 4), (HOPPER_LONG[1], 160, 3, 1),
    ),
}  # fmt: skip
# So many programs of two tiles of keys each have zeros ahead.
HOPPER_MANY_PROGRAMS = 2048


def _statistics(
    dim: int, num_keys: int, programs: int, group: int, ordered: bool
) -> tuple[int, int] | None:
    """Sections that are prepared ahead and key heads of each, None to leave it."""
    found = [row for row in HOPPER_STATISTICS[ordered, group > 1] if num_keys >= row[0]]
    if dim != 128 or not found or programs < found[-1][1]:
        return None
    return found[-1][2:]


def _backward_section(dim: int, num_keys: int, group: int, ordered: bool, ahead: bool) -> int:
    """Key heads whose tiles are dealt out together. Measured on an H100, docs/attention_trials.md.
    In order, more heads at a time also wait for more: 4 lost 4 % at 8192 keys with shared heads, 2
    lost 4 % with D = 256. Zeroing ahead, 16 lost 1 to 4 % against 8, but 8 lose where a head has
    fewer than 4 tiles: there is no time to zero the next section in. With D = 256 16 lost 2 to 6 %
    on an H200.
    """
    if ordered and dim == 256:
        return 1
    if num_keys < HOPPER_LONG[1]:
        return 8 if (ahead and num_keys >= 512) or (dim == 256 and num_keys >= 576) else 16
    if ordered and group > 1:
        return 2
    return 8 if ordered and num_keys < 2 * HOPPER_LONG[1] else 4


def pick_hopper_backward(
    arch: int, dim: int, dtype: torch.dtype, num_keys: int, plain_scores: bool, aligned: bool,
    *, planes: int = 128, group: int = 1, ordered: bool = False,
) -> HopperBackwardConfig | None:  # fmt: skip
    """Tiles of the warp-specialised backward, or None where the plain kernel has to do.

    ``plain_scores``: neither a soft cap nor ``visible_until``; ``aligned``: the copy engine can
    read all tensors (operands.py); ``planes``: key heads of all samples; ``group``: query heads per
    key head; ``ordered``: bitwise repeatable.
    """
    tiles = HOPPER_BACKWARD.get(dim)
    if arch != 90 or dtype == torch.float32 or not (plain_scores and aligned and tiles):
        return None
    if num_keys <= tiles[1]:
        return HopperBackwardConfig(*tiles, 1, whole=True)
    programs = planes * math.ceil(num_keys / tiles[1])
    staged = dim in HOPPER_STAGED
    statistics = _statistics(dim, num_keys, programs, group, ordered)
    if statistics is not None:
        ahead, section = statistics
        return HopperBackwardConfig(
            *tiles, section, ahead, early=True, statistics=True, staged=staged
        )
    ahead, early = (
        not ordered and num_keys >= gained.get((dim, group > 1), math.inf)
        for gained in (HOPPER_AHEAD, HOPPER_EARLY)
    )
    # Many short rows, of two tiles of keys.
    if (dim, group, ordered) == (128, 1, False) and programs >= HOPPER_MANY_PROGRAMS:
        ahead = early = num_keys >= 256
    late = num_keys >= HOPPER_LATE.get((dim, group > 1), (math.inf,) * 2)[ordered]
    section = _backward_section(dim, num_keys, group, ordered, ahead)
    return HopperBackwardConfig(*tiles, section, int(ahead), early, late, staged=staged)
