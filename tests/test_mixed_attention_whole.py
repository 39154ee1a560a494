"""The backward for Hopper where one tile of keys holds all of them: dQ is stored, not added up, and
the loop runs over all tiles of rows, those that see nothing too.
"""

import math
from dataclasses import replace

import pytest
import torch
from mixed_attention_cases import MASKS, as_views, check, gradients, inputs

from croc_kernels.attention import config
from croc_kernels.attention.api import mixed_attention
from croc_kernels.attention.mask import MixedMask

pytestmark = pytest.mark.gpu

DIMS = (64, 128, 256)
LENGTHS = (1, 7, 16, 63, 64, 65, 100, 127, 128)
# The same few everywhere: every other count is compiled apart.
CASES = [(torch.bfloat16, (3, 3)), (torch.float16, (8, 2))]


def lengths(dim):
    """Of keys, up to what one tile holds."""
    return [n for n in LENGTHS if n <= config.HOPPER_BACKWARD[dim][1]]


def longer(batch, num_keys, device):
    """More rows than keys, the first of which see nothing in all samples but one."""
    row = torch.arange(2 * num_keys + 71, device=device).expand(batch, -1)
    first = torch.arange(batch, device=device)[:, None] * 67
    end = (row - first + 1).clamp(0, num_keys)
    return MixedMask.from_rows(torch.zeros_like(end), end, num_keys, may_have_holes=False)


NAMES = ("causal", "full", "spans", "prefix", "left", "right", "packed", "window", "cache")
ALL = {name: MASKS[name] for name in NAMES} | {"longer": longer}


@pytest.fixture
def whole(monkeypatch):
    """``whole(wanted)`` makes the choice; what is returned lists the choices made since."""
    pick, taken = config.pick_hopper_backward, []

    def choose(wanted):
        def picked(*arguments, **options):
            found = pick(*arguments, **options)
            taken.append(found and replace(found, whole=wanted and found.whole))
            return taken[-1]

        monkeypatch.setattr(config, "pick_hopper_backward", picked)
        taken.clear()
        return taken

    return choose


def run(mask, deterministic=False, **options):
    return lambda *x: mixed_attention(
        *x, mask, return_lse=True, deterministic=deterministic, **options
    )


def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("dtype", "heads"), CASES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ALL)
def test_whole_is_within_the_budget(name, dim, dtype, heads, whole):
    for length in lengths(dim):
        mask = ALL[name](3, length, "cuda")
        taken = whole(True)
        check(run(mask), *inputs(mask, *heads, dim, dtype), mask, 1 / math.sqrt(dim))
        assert [x.whole for x in taken] == [True]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ALL)
def test_whole_changes_no_bit(name, dim, whole):
    """In order or not, and added to zeros in float32 instead; with the next longer keys too, which
    more than one tile holds.
    """
    dtype, heads = CASES[0]
    for length in (*lengths(dim), 1 + lengths(dim)[-1]):
        mask = ALL[name](2, length, "cuda")
        tensors = inputs(mask, *heads, dim, dtype)
        taken = whole(False)
        want = gradients(run(mask, True), *tensors, dtype)
        assert not taken[0].whole
        taken = whole(True)
        for deterministic in (True, False, True):
            got = gradients(run(mask, deterministic), *tensors, dtype)
            fits = length <= lengths(dim)[-1]
            assert taken[-1].whole == fits
            assert same(got, want) or not (deterministic or fits)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("with_lse", [True, False])
def test_whole_with_and_without_a_gradient_of_the_log_sum_exp(with_lse, dim, whole):
    mask = MASKS["spans"](2, lengths(dim)[-1] - 3, "cuda")
    dtype, heads = CASES[1]
    tensors = inputs(mask, *heads, dim, dtype)
    taken = whole(True)
    got = gradients(run(mask), *tensors, dtype, with_lse)
    taken += whole(False)
    want = gradients(run(mask), *tensors, dtype, with_lse)
    assert same(got, want)
    without = gradients(run(mask), *tensors, dtype, not with_lse)
    assert not torch.equal(got[2], without[2])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ["left", "right", "cache", "longer"])
def test_whole_keeps_nan_in_unseen_places(name, dim, deterministic, whole):
    """Also in samples of nothing but padding, whose dQ is written all the same."""
    dtype, heads = CASES[0]
    for length in lengths(dim)[1:]:
        mask = ALL[name](3, length, "cuda")
        dense = mask.to_dense()
        sees, seen = dense.any(-1)[..., None], dense.any(-2)[..., None]
        q, k, v = (x.detach() for x in inputs(mask, *heads, dim, dtype))
        weight = torch.randn_like(q)
        taken = whole(True)

        def grads(fill, mask=mask, weight=weight, places=((sees, q), (seen, k), (seen, v))):
            leaves = [torch.where(m, x, fill).requires_grad_() for m, x in places]
            out = mixed_attention(*leaves, mask, deterministic=deterministic)
            return torch.autograd.grad(out, leaves, torch.where(places[0][0], weight, fill))

        got = grads(float("nan"))
        assert same(got, grads(0.0))
        for grad, kept in zip(got, (sees, seen, seen), strict=True):
            assert not torch.where(kept, 0, grad).any()
        # Once for both: the second call is of the kind of the first.
        assert [x.whole for x in taken] == [True]


@pytest.mark.parametrize(("dtype", "heads"), CASES)
@pytest.mark.parametrize("dim", DIMS)
def test_whole_gives_keys_that_are_not_there_no_weight(dim, dtype, heads, whole):
    """All scores are so low that a score of 0, which zeros behind the last key have, would weigh
    infinitely much.
    """
    for length in (1, 37, lengths(dim)[-1] - 1):
        for name in ("full", "spans", "longer"):
            mask = ALL[name](2, length, "cuda")
            q, k, v = (x.detach() for x in inputs(mask, *heads, dim, dtype))
            q, k = q / 8 + 4, k / 8 - 4
            taken = whole(True)
            check(run(mask, scale=0.25), q, k, v, mask, 0.25)
            assert [x.whole for x in taken] == [True]


@pytest.mark.parametrize(("dtype", "heads"), CASES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("ordered", [False, True])
def test_last_tile_of_keys_gives_those_that_are_not_there_no_weight(ordered, dim, dtype, heads):
    """As above, where more than one tile holds the keys."""
    for length in (200, 300, 1100):
        for name in ("full", "spans"):
            mask = ALL[name](2, length, "cuda")
            q, k, v = (x.detach() for x in inputs(mask, *heads, dim, dtype))
            q, k = q / 8 + 4, k / 8 - 4
            check(run(mask, scale=0.25, deterministic=ordered), q, k, v, mask, 0.25)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ["packed", "left", "cache"])
def test_whole_of_views_of_a_projection_and_of_a_mask(name, dim, whole):
    length, (dtype, (heads, key_heads)) = lengths(dim)[-2], CASES[1]
    mask = as_views(MASKS[name](3, length, "cuda"))
    total = heads + 2 * key_heads
    packed = torch.randn(3, length, total, dim, device="cuda", dtype=dtype).transpose(1, 2)
    q, k, v = packed.split([heads, key_heads, key_heads], 1)
    q = q[:, :, length - mask.num_queries :]
    taken = whole(True)
    check(run(mask), q, k, v, mask, 1 / math.sqrt(dim))
    leaf = packed.detach().requires_grad_()
    parts = leaf.split([heads, key_heads, key_heads], 1)
    q = parts[0][:, :, length - mask.num_queries :]
    out, _ = run(mask)(q, *parts[1:])
    weight = torch.randn_like(out)
    wants = torch.autograd.grad(out, (q, *parts[1:]), weight, retain_graph=True)
    for i, want in enumerate(wants):
        (got,) = torch.autograd.grad(out, (q, *parts[1:])[i], weight, retain_graph=True)
        assert torch.equal(got, want)
    (grad,) = torch.autograd.grad(out, leaf, weight)
    ours = grad.split([heads, key_heads, key_heads], 1)
    assert torch.equal(ours[0][:, :, length - mask.num_queries :], wants[0])
    assert same(ours[1:], wants[1:])
    assert all(x.whole for x in taken)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("heads", [(32, 32), (32, 8)])
def test_whole_many_heads_again_and_again(heads, dim, whole):
    """More programs than multiprocessors, many tiles of rows each; graphs on two streams beside
    launches. Each reuses the memory of the one before.
    """
    cases, streams, graphs, kept = [], [], [], []
    for length in (lengths(dim)[-1], lengths(dim)[-1] - 28):
        mask = longer(7, length, "cuda")
        tensors = [x.detach().requires_grad_() for x in inputs(mask, *heads, dim, torch.bfloat16)]
        weight = torch.randn_like(tensors[0])

        def step(mask=mask, tensors=tensors, weight=weight):
            out = mixed_attention(*tensors, mask)
            return torch.autograd.grad(out, tensors, weight)

        taken = whole(False)
        wants = step()
        assert not taken[0].whole
        whole(True)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept.append([step() for _ in range(3)])
        cases.append((step, wants))
        streams.append(stream)
        graphs.append(graph)
    for _ in range(5):
        for values in kept:
            for x in sum(values, ()):
                x.fill_(float("nan"))
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                graph.replay()
        beside = cases[0][0]()
        torch.cuda.synchronize()
        assert same(beside, cases[0][1])
        for values, (_, want) in zip(kept, cases, strict=True):
            assert all(same(got, want) for got in values)
