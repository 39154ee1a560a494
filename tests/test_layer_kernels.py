"""The Triton kernels of the layer: on a GPU, else interpreted.

test_token_cost_fresh.py runs this file with TRITON_INTERPRET=1.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, DTYPES, needs_kernels
from torch import Tensor

from croc_kernels import ops
from croc_kernels.layer import kernel
from croc_kernels.layer.matching import draw_order, draw_seed, hash_places, sorted_places
from croc_kernels.layer.normalization import EPSILON, l2_normalize
from croc_kernels.testing import assert_within_budget

pytestmark = needs_kernels


@pytest.mark.parametrize("rank", [0, 1, 7, 1000])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("longest", [1, 31, 32, 200, 576])
def test_draw_kernel_sorts_as_torch_does(longest: int, batch: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(longest)
    seeds = draw_seed(torch.device("cpu"), generator)
    for width in (longest, -(-3 * longest // 4)):
        arguments = (batch, longest, width, batch * longest, rank)
        want = sorted_places(seeds, None, *arguments)
        assert torch.equal(ops.draw_order(seeds.to(DEVICE), None, *arguments).cpu(), want)


@pytest.mark.parametrize("groups", [1, 3])
def test_draw_kernel_sorts_images_of_any_length(groups: int) -> None:
    rng, generator = random.Random(groups), torch.Generator().manual_seed(groups)
    for _ in range(3):
        images = [rng.randint(1, 3) for _ in range(groups)]
        lengths = [rng.choice([0, 1, 5, 33, 130]) for _ in range(sum(images))]
        lengths[0] += 1
        seeds = [draw_seed(torch.device("cpu"), generator) for _ in images]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        group = [g for g, count in enumerate(images) for _ in range(count)]
        first = [starts[group.index(g)] for g in group]
        table = torch.tensor([starts, lengths, first, group])
        longest, total = max(lengths), sum(lengths)
        for width in (longest, max(longest // 2, 1)):
            want = sorted_places(
                torch.cat(seeds), table, len(lengths), longest, width, total, rank=2
            )
            got = draw_order(lengths, images, [s.to(DEVICE) for s in seeds], 2, width)
            assert torch.equal(got.cpu(), want)


def test_draw_kernel_hashes_as_torch_does_at_the_ends_of_the_words() -> None:
    # The order of two tokens of an image shows which key is smaller.
    for seed in (0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 2):
        seeds = torch.tensor([seed])
        want = hash_places(torch.arange(64).view(-1, 2), seeds, 3).argsort(1)
        got = ops.draw_order(seeds.to(DEVICE), None, 32, 2, 2, 64, 3).cpu()
        assert torch.equal(got - torch.arange(0, 64, 2)[:, None], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 64), (3, 5, 131), (2, 1), (4, 5000), (33,)], ids=str)
def test_normalize_kernel(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "LARGEST_BLOCK", 1024)
    x, grad = (torch.randn(shape).to(dtype).to(DEVICE) for _ in range(2))

    def results(function: object, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        y = function(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, grad.to(dtype))[0]

    def plain(y: Tensor) -> Tensor:
        return F.normalize(y, dim=-1)

    exact = results(plain, torch.float64)
    names = ("result", "gradient")
    for own, e, p, name in zip(
        results(l2_normalize, dtype), exact, results(plain, dtype), names, strict=True
    ):
        assert own.dtype == dtype
        if dtype == torch.float64:
            # The reference is no more exact than the kernel.
            torch.testing.assert_close(own, e, rtol=1e-13, atol=1e-14)
        else:
            assert_within_budget(own, e, p, dtype, name)


def test_normalize_kernel_strides_zeros_and_nan() -> None:
    wide, grad = torch.randn(6, 40, device=DEVICE), torch.randn(8, 6, device=DEVICE).T
    for x in (wide[:, 3:11], wide.T[:8].T, wide[:, ::5], wide[:1, :8].expand(6, 8)):
        leaf = x.detach().requires_grad_()
        y = l2_normalize(leaf)
        assert y.is_contiguous()
        own = torch.autograd.grad(y, leaf, grad)[0]
        other = x.contiguous().requires_grad_()
        assert torch.equal(y, l2_normalize(other))
        assert torch.equal(own, torch.autograd.grad(l2_normalize(other), other, grad)[0])
    x = torch.randn(3, 8, device=DEVICE)
    x[0], x[1, 2] = 0.0, float("nan")
    y, norm = ops.l2_normalize_fwd(x)
    assert y[1].isnan().all()
    assert y[2].isfinite().all()
    assert not y[0].any()
    assert norm[0].item() == torch.tensor(EPSILON).item()
    gradient = ops.l2_normalize_bwd(torch.ones_like(x), y, norm)
    assert torch.equal(gradient[0], torch.ones(8, device=DEVICE) / norm[0])
    assert l2_normalize(x[:0]).shape == (0, 8)
