"""Scores that grow along a row: weights relative to an earlier, smaller score would overflow."""

import math

import pytest
import torch
from mixed_attention_cases import MASKS, inputs, plain, reference

from croc_kernels.attention.api import mixed_attention
from croc_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpu

# Rows of each class of config.HOPPER_FORWARD.
LENGTHS = [400, 1664, 3200]


def forward(q, k, v, mask):
    with torch.no_grad():
        return mixed_attention(q, k, v, mask, return_lse=True, backend="triton")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("growth", [3.0, 12.0, 200.0])
@pytest.mark.parametrize("name", ["causal", "packed"])
def test_growth_along_a_row_within_budget(name, growth, dim, dtype, length):
    """By less than a sum may be, by more, and by more than float32 holds as a power of two."""
    mask = MASKS[name](2, length, "cuda")
    q, k, v = (x.detach() for x in inputs(mask, 2, 1, dim, dtype))
    k = (k * torch.linspace(0.01, growth, length, device="cuda")[:, None]).to(dtype)
    scale = 1 / math.sqrt(dim)
    exact = reference(*(x.double() for x in (q, k, v)), mask.to_dense(), scale, 0.0)
    own = plain(q, k, v, mask, scale, 0.0)
    got = forward(q, k, v, mask)
    for what, value, truth, yardstick in zip(("out", "lse"), got, exact, own, strict=True):
        floor = torch.float32 if what == "lse" else dtype
        assert bool(value.isfinite().all())
        assert_within_budget(value, truth, yardstick, floor, what)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_growth_of_other_rows_changes_no_bit(dim, length):
    """A warp group looks at scores again if one of its rows must; the others may not notice."""
    mask = MASKS["visual"](2, length, "cuda")
    q, k, v = (x.detach() for x in inputs(mask, 4, 2, dim, torch.bfloat16))
    grown = torch.arange(length, device="cuda") % 5 == 2
    before = forward(q, k, v, mask)
    after = forward(torch.where(grown[:, None], 100 * q, q), k, v, mask)
    for left, right in zip(before, after, strict=True):
        assert torch.equal(left[:, :, ~grown], right[:, :, ~grown])
        assert not torch.equal(left[:, :, grown], right[:, :, grown])
