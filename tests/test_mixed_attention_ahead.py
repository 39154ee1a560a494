"""What the backward for Hopper prepares before it multiplies: a kernel before does, or spare warps
for a later section of heads. Who does changes no bit of what these tests give it (strides that are
multiples of 16 elements).
"""

from dataclasses import replace

import pytest
import torch
from mixed_attention_cases import MASKS, inputs

from croc_kernels.attention import config
from croc_kernels.attention.api import mixed_attention

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# Sections ahead of one's own, whether statistics are too, and whether the copy engine adds up.
LATER = [
    (0, False, False), (0, False, True), (1, False, True), (2, False, True), (1, True, True),
    (3, True, False), (3, True, True),
]  # fmt: skip


def gradients(mask, qkv, weight, weight_lse=None):
    leaves = [x.detach().requires_grad_() for x in qkv]
    out, lse = mixed_attention(*leaves, mask, return_lse=True, deterministic=True)
    outs, weights = ([out], [weight]) if weight_lse is None else ([out, lse], [weight, weight_lse])
    return torch.autograd.grad(outs, leaves, weights)


@pytest.fixture
def force(monkeypatch):
    """Have sections of so many heads prepared so many sections ahead."""
    pick = config.pick_hopper_backward

    def to(section, ahead, statistics, staged=True):
        def forced(*arguments, **options):
            picked = pick(*arguments, **options)
            return replace(
                picked, section=section, ahead=ahead, statistics=statistics, early=True,
                whole=False, staged=staged,
            )  # fmt: skip

        monkeypatch.setattr(config, "pick_hopper_backward", forced)

    return to


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "key_heads", "length"), [(7, 7, 700), (12, 3, 1025)])
@pytest.mark.parametrize("name", ["left", "packed", "prefix", "cache"])
def test_ahead_changes_no_bit(name, heads, key_heads, length, dim, force):
    """Rows that see nothing hold NaN, samples have no other rows, sections are not full, and the
    log-sum-exp has a gradient that is not contiguous, or none.
    """
    mask = MASKS[name](3, length, DEVICE)
    qkv = [x.detach() for x in inputs(mask, heads, key_heads, dim, torch.bfloat16)]
    weight = torch.randn_like(qkv[0])
    blind = ~mask.to_dense().any(-1)  # (B, 1, L)
    weight = torch.where(blind[..., None], float("nan"), weight)
    weight_lse = None
    if heads == key_heads:
        weight_lse = torch.randn(3, weight.shape[2], heads, device=DEVICE).transpose(1, 2)
        weight_lse = weight_lse.masked_fill(blind, 0.0)
    want = None
    for later in LATER:
        force(2, *later)
        got = gradients(mask, qkv, weight, weight_lse)
        want = want or got
        assert all(x.isfinite().all() for x in got)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_ahead_of_heads_without_a_row(force):
    """Programs that have nothing to add are done at once: not before what they would add to is
    zero.
    """
    mask = MASKS["left"](6, 640, DEVICE)
    qkv = [x.detach() for x in inputs(mask, 32, 32, 128, torch.bfloat16)]
    empty = ~mask.to_dense().any((-1, -2))[:, 0]
    assert empty.any()
    force(8, 2, True)
    for _ in range(50):
        # What the gradients' sums lie in next.
        torch.full((6 * 32 * 640 * 128,), float("nan"), device=DEVICE)
        got = gradients(mask, qkv, torch.ones_like(qkv[0]))
        assert not any(x[empty].any() for x in got)
