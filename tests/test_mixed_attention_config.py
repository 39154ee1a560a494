"""Tiles are a pure function of the chip and the inputs, and fit the chip's shared memory."""

import math

import pytest
import torch

from croc_kernels.attention import config

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


@pytest.mark.parametrize(("scale", "softcap"), [(0.125, 0.0), (0.5, 30.0)])
def test_config_factors_give_base_two_logits(scale, softcap):
    inner, outer = config.factors(scale, softcap)
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
            assert config.precision(torch.float32) == setting
            assert config.precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
