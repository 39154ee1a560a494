"""Tiles are a pure function of the chip and the inputs, and fit the chip's shared memory."""

import math

import pytest
import torch

from croc_kernels.attention import config, operands

# Bytes one program may use: CUDA C++ programming guide, table of compute capabilities.
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}


@pytest.mark.parametrize("dim", config.HEAD_DIMS)
def test_config_splits_heads_into_powers_of_two(dim):
    first, second = config.split_head(dim)
    assert first + second == dim
    assert first & (first - 1) == 0
    assert second & (second - 1) == 0
    assert second == 0 or second >= 16


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("dim", config.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_config_tiles_are_powers_of_two_that_fit(arch, dim, dtype):
    picked = config.pick_forward(arch, dim, dtype, 4096)
    assert picked == config.pick_forward(arch, dim, dtype, 4096)
    sizes = [picked.block_m, picked.block_n]
    sizes += config.pick_backward(arch, dim, dtype, 4096).constants().values()
    assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    # Pipelined K and V tiles; the compiler's own figure is checked by the offline compilation.
    buffered = 2 * picked.num_stages * picked.block_n * dim * dtype.itemsize
    assert buffered <= SHARED[arch] * 1024


def test_config_takes_the_hopper_backward_only_where_it_can():
    fits = {"num_keys": 4096, "plain_scores": True, "aligned": True}
    for dim in config.HEAD_DIMS:
        for dtype in (torch.float16, torch.bfloat16):
            picked = config.pick_hopper_backward(90, dim, dtype, **fits)
            assert (picked is not None) == (dim in config.HOPPER_BACKWARD)
            for change in ({"plain_scores": False}, {"aligned": False}):
                assert config.pick_hopper_backward(90, dim, dtype, **fits | change) is None
    for arch in (*SHARED, 0):
        picked = config.pick_hopper_backward(arch, 128, torch.bfloat16, **fits)
        assert (picked is not None) == (arch == 90)
    assert config.pick_hopper_backward(90, 128, torch.float32, **fits) is None


def test_config_takes_the_hopper_forward_only_where_it_can():
    fits = {"length": 4096, "plain_scores": True, "aligned": True}
    for dim in config.HEAD_DIMS:
        for dtype in (torch.float16, torch.bfloat16):
            picked = config.pick_hopper_forward(90, dim, dtype, **fits)
            assert (picked is not None) == (dim in config.HOPPER_FORWARD)
            for change in ({"plain_scores": False}, {"aligned": False}, {"length": 127}):
                assert config.pick_hopper_forward(90, dim, dtype, **fits | change) is None
    for arch in (*SHARED, 0):
        picked = config.pick_hopper_forward(arch, 128, torch.bfloat16, **fits)
        assert (picked is not None) == (arch == 90)
    assert config.pick_hopper_forward(90, 128, torch.float32, **fits) is None
    short = config.pick_hopper_forward(90, 128, torch.bfloat16, **fits | {"length": 1024})
    assert short.block_n < config.pick_hopper_forward(90, 128, torch.bfloat16, **fits).block_n


@pytest.mark.parametrize(
    ("dim", "length", "tiles"),
    [(64, 512, (64, 4, 4, 2, False, False, 232, True, True)),
     (64, 2048, (128, 3, 12, 2, False, False, 232, True, True)),
     (64, 8192, (128, 3, 4, 3, True, False, 160, False, True)),
     (128, 1024, (64, 4, 4, 2, False, True, 232, True, True)),
     (128, 1535, (64, 4, 4, 2, False, True, 232, True, True)),
     (128, 1536, (128, 2, 12, 2, False, False, 232, True, True)),
     (128, 2048, (128, 2, 12, 2, False, False, 232, True, True)),
     (128, 4096, (128, 2, 4, 2, True, False, 232, True, True)),
     (128, 8192, (128, 2, 4, 2, True, False, 232, True, True)),
     (256, 128, (64, 2, 12, 2, False, True, 216)), (256, 1024, (64, 2, 12, 2, False, True, 216)),
     (256, 1025, (64, 2, 16, 2, True, True, 216)), (256, 3071, (64, 2, 16, 2, True, True, 216)),
     (256, 4096, (64, 2, 4, 2, True, False, 216))],
)  # fmt: skip
def test_config_hopper_forward_is_what_was_measured(dim, length, tiles):
    picked = config.pick_hopper_forward(90, dim, torch.bfloat16, length, True, True)
    assert picked == config.HopperForwardConfig(*tiles)
    assert picked.constants()["DYNAMIC"] == picked.dynamic
    assert picked.constants()["SKIP"] == picked.skip
    assert picked.constants()["KEEP_Q"] == picked.keep_q
    assert picked.constants()["TRUST"] == picked.trust


@pytest.mark.parametrize(
    ("num_keys", "group", "unordered", "ordered"),
    [(129, 1, 16, 16), (511, 1, 16, 16), (512, 1, 16, 16), (512, 4, 16, 16), (575, 2, 16, 16),
     (576, 2, 16, 16), (1023, 2, 16, 16),
     (1024, 1, 16, 16), (1024, 4, 16, 16), (1535, 1, 16, 16), (1535, 2, 16, 16), (1536, 1, 16, 16),
     (1536, 2, 16, 16), (2048, 1, 16, 16), (3071, 4, 16, 16), (3072, 1, 4, 8), (4096, 1, 4, 8),
     (4096, 2, 4, 2), (6143, 1, 4, 8), (6144, 1, 4, 4), (8192, 1, 4, 4), (8192, 4, 4, 2)],
)  # fmt: skip
def test_config_hopper_backward_is_what_was_measured(num_keys, group, unordered, ordered):
    """With too few programs for statistics ahead."""
    for dim, tiles in config.HOPPER_BACKWARD.items():
        for repeatable, section in ((False, unordered), (True, ordered)):
            picked = config.pick_hopper_backward(
                90, dim, torch.bfloat16, num_keys, True, True, planes=1, group=group,
                ordered=repeatable,
            )  # fmt: skip
            alone = repeatable and dim == 256
            ahead = not repeatable and dim == 128 and num_keys >= (512 if group == 1 else 1024)
            early = ahead or (not repeatable and dim == 256 and num_keys >= 512)
            early |= not repeatable and dim == 64 and group == 1 and num_keys >= 1024
            eight = ahead or (dim == 256 and num_keys >= 576)
            dealt = 1 if alone else 8 if eight and section == 16 else section
            late = dim == 64 and group == 1 and num_keys >= (6144 if repeatable else 1024)
            assert picked == config.HopperBackwardConfig(
                *tiles, dealt, ahead, early, late, staged=dim == 128
            )  # fmt: skip
            assert picked.constants()["LATE"] == late


@pytest.mark.parametrize(
    ("num_keys", "planes", "group", "unordered", "ordered"),
    [(511, 4096, 1, None, None), (512, 512, 1, None, (4, 8)), (575, 512, 1, None, (4, 8)),
     (640, 32, 1, None, None), (640, 128, 1, (3, 8), (3, 8)), (640, 512, 1, (3, 8), (3, 8)),
     (767, 128, 1, (3, 8), (3, 8)), (800, 128, 1, (4, 4), (3, 8)), (1024, 128, 1, (2, 8), (2, 8)),
     (640, 31, 4, None, None), (640, 32, 4, None, (3, 8)), (1024, 128, 4, (2, 8), (4, 4)),
     (1200, 31, 1, None, None), (1200, 32, 1, (2, 8), None), (1200, 128, 1, (2, 8), (2, 8)),
     (1535, 128, 1, (2, 8), (2, 8)), (2048, 128, 1, (2, 4), (2, 8)), (2048, 32, 4, (2, 8), (4, 4)),
     (3071, 32, 4, (2, 8), (4, 4)), (3072, 128, 1, (2, 2), (2, 4)), (4096, 128, 1, (2, 2), (2, 4)),
     (4096, 32, 4, (2, 4), (3, 1)), (8192, 64, 1, (2, 2), (2, 2)), (8192, 16, 4, (2, 2), (3, 1)),
     (10240, 32, 1, (2, 2), (2, 2)), (16384, 32, 1, (2, 2), (2, 2))],
)  # fmt: skip
def test_config_prepares_statistics_ahead_where_that_gained(
    num_keys, planes, group, unordered, ordered
):
    """Sections ahead, and key heads of each."""
    for dim in config.HOPPER_BACKWARD:
        for repeatable, wanted in ((False, unordered), (True, ordered)):
            picked = config.pick_hopper_backward(
                90, dim, torch.bfloat16, num_keys, True, True, planes=planes, group=group,
                ordered=repeatable,
            )  # fmt: skip
            assert picked.statistics == (dim == 128 and wanted is not None)
            if picked.statistics:
                assert (picked.ahead, picked.section) == wanted
                assert picked.early
                assert not picked.late
            assert picked.ahead <= 1 or picked.statistics
            assert picked.staged or picked.statistics or not picked.ahead
            assert not (picked.ahead and repeatable) or picked.statistics


@pytest.mark.parametrize("dim", config.HOPPER_BACKWARD)
def test_config_adds_nothing_up_where_one_tile_holds_all_keys(dim):
    """However many heads share it, in order or not: the same kernel."""
    tiles = config.HOPPER_BACKWARD[dim]
    assert tiles[1] == (64 if dim == 256 else 128)
    shared = ((1, False, 1), (4, False, 4096), (1, True, 4096), (4, True, 1))
    for num_keys in (1, 63, 64, 65, 100, 127, 128, 129, 4096):
        for group, ordered, planes in shared:
            picked = config.pick_hopper_backward(
                90, dim, torch.float16, num_keys, True, True, planes=planes, group=group,
                ordered=ordered,
            )  # fmt: skip
            assert picked.whole == picked.constants()["WHOLE"] == (num_keys <= tiles[1])
            if picked.whole:
                assert picked == config.HopperBackwardConfig(*tiles, 1, whole=True)


def test_config_lets_the_copy_engine_add_where_there_is_room_for_a_tile():
    for dim, (block_m, block_n, stages) in config.HOPPER_BACKWARD.items():
        for ordered in (False, True):
            picked = config.pick_hopper_backward(
                90, dim, torch.bfloat16, 4096, True, True, ordered=ordered
            )
            assert picked.staged == picked.constants()["STAGED"] == (dim == 128)
        # Q, dO, K, V, dS and sums; what the spare warps bring; Hopper has 227 KB.
        tiles = 2 * dim * (2 * stages * block_m + 2 * block_n) + 2 * block_m * block_n
        assert (dim in config.HOPPER_STAGED) <= (tiles + 4 * dim * block_m + 20000 < 227 * 1024)


def test_config_hands_kernels_a_number_of_sections():
    """True would count as -1 in a kernel, which then waits forever."""
    picked = config.HopperBackwardConfig(64, 128, 2, 8, True, True, staged=True)
    assert type(picked.constants()["AHEAD"]) is int


def test_config_zeroes_ahead_for_many_rows_of_two_tiles():
    for num_keys, planes, ahead in ((255, 1024, 0), (256, 1024, 1), (256, 1023, 0)):
        picked = config.pick_hopper_backward(
            90, 128, torch.bfloat16, num_keys, True, True, planes=planes
        )
        assert (picked.ahead, picked.early, picked.section) == (ahead, bool(ahead), 16)


def test_config_tma_takes_what_is_aligned_to_sixteen_bytes():
    packed = torch.empty(2, 300, 12, 64, dtype=torch.bfloat16)
    assert operands.tma_aligned(packed[:, :, 4:8].transpose(1, 2))
    assert operands.tma_aligned(packed[:1, :1, :1].transpose(1, 2))
    odd = torch.empty(2, 300, 4, 65, dtype=torch.bfloat16)
    assert not operands.tma_aligned(odd[..., 1:].transpose(1, 2))
    assert not operands.tma_aligned(packed.flatten()[4:-60].reshape(-1, 64)[None, None])
    assert not operands.tma_aligned(packed[:1].expand(2, -1, -1, -1))
    assert not operands.tma_aligned(torch.empty(1, 1, 64, 300, dtype=torch.bfloat16).mT)


@pytest.mark.parametrize(("scale", "softcap"), [(0.125, 0.0), (0.5, 30.0)])
def test_config_factors_give_base_two_logits(scale, softcap):
    inner, outer = operands.factors(scale, softcap)
    score = 7.0
    natural, base_two = scale * score, outer * score
    if softcap:
        natural = softcap * math.tanh(scale * score / softcap)
        base_two = outer * math.tanh(inner * score)
    assert base_two == pytest.approx(natural / math.log(2))


def test_config_tf32_follows_torch():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert operands.precision(torch.float32) == setting
            assert operands.precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dim", config.HEAD_DIMS)
def test_config_copies_values_only_where_the_compiler_fails(dim):
    """Sixteen or thirty-two components beside a larger part, in half precision, on sm_90."""
    split = dim in (80, 96, 160)
    rows = torch.empty(1, 2, 40, dim + 16, dtype=torch.bfloat16)
    for first, aligned in ((0, True), (8, True), (1, False), (4, False)):
        v = rows[..., first : first + dim]
        assert operands.known_to_be_aligned(v) == aligned
        assert operands.must_copy_values(90, dim, v) == (split and not aligned)
        assert not operands.must_copy_values(90, dim, v.float()[..., 1:])
        assert not operands.must_copy_values(80, dim, v)
    odd = torch.empty(1, 2, 40, dim + 8, dtype=torch.float16)[..., :dim]
    assert operands.tma_aligned(odd)  # its rows begin at multiples of 16 bytes, but of 8 elements
    assert operands.must_copy_values(90, dim, odd) == split
