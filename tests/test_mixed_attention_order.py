"""Who computes a tile, and when, changes no result: tiles drawn from a counter, tiles of several
heads in turns, kernels that start before the one before them ends.
"""

import math
from dataclasses import replace

import pytest
import torch
from mixed_attention_cases import MASKS, check, inputs
from torch.utils.checkpoint import checkpoint

from croc_kernels.attention import config
from croc_kernels.attention.api import mixed_attention

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# Rows from which on tiles are drawn from a counter; with 16 heads there are more than programs.
LONG, HEADS = config.HOPPER_LONG[1] + 131, 16


def tensors(name, dim, length=LONG, heads=HEADS, key_heads=4, batch=1):
    mask = MASKS[name](batch, length, DEVICE)
    return mask, [x.detach() for x in inputs(mask, heads, key_heads, dim, torch.bfloat16)]


def forward(mask, qkv):
    return mixed_attention(*qkv, mask, return_lse=True)


def step(mask, qkv, weight, deterministic):
    leaves = [x.requires_grad_() for x in qkv]
    out = mixed_attention(*leaves, mask, deterministic=deterministic)
    return out.detach(), *torch.autograd.grad(out, leaves, weight)


def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("name", "heads"), [("spans", (16, 4)), ("packed", (7, 7))])
def test_order_long_rows_are_within_the_budget(name, heads, dim, deterministic):
    """Heads that no section divides, and more tiles than programs."""
    mask, qkv = tensors(name, dim, heads=heads[0], key_heads=heads[1])
    check(
        lambda *x: mixed_attention(*x, mask, return_lse=True, deterministic=deterministic),
        *qkv, mask, 1 / math.sqrt(dim),
    )  # fmt: skip


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("batch", "heads"), [(5, (7, 7)), (3, (12, 3))])
def test_order_heads_that_no_section_divides(batch, heads, dim, deterministic):
    mask, qkv = tensors("visual", dim, 700, *heads, batch)
    check(
        lambda *x: mixed_attention(*x, mask, return_lse=True, deterministic=deterministic),
        *qkv, mask, 1 / math.sqrt(dim),
    )  # fmt: skip


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["spans", "packed", "left"])
def test_order_of_drawing_changes_no_bit(name, dim):
    mask, qkv = tensors(name, dim)
    want = forward(mask, qkv)
    for _ in range(20):
        assert same(forward(mask, qkv), want)


@pytest.mark.parametrize("dim", [64, 128])
def test_order_every_launch_has_its_own_counter(dim):
    """Graphs replayed one after the other and on two streams at once, beside launches."""
    mask, qkv = tensors("spans", dim)
    others = [x.flip(1).contiguous() for x in qkv]
    wants = [forward(mask, x) for x in (qkv, others)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    graphs, kept = [], []
    for stream, x in zip(streams, (qkv, others), strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward(mask, x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept.append([forward(mask, x) for _ in range(3)])
        graphs.append(graph)
    for _ in range(5):
        for outputs in kept:
            for value in outputs:
                value[0].zero_()
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        beside = forward(mask, qkv)
        torch.cuda.synchronize()
        assert same(beside, wants[0])
        for outputs, want in zip(kept, wants, strict=True):
            assert all(same(value, want) for value in outputs)


@pytest.mark.parametrize("dim", [64, 128])
def test_order_recomputation_is_bitwise_equal(dim):
    mask, qkv = tensors("packed", dim)
    weight = torch.randn_like(qkv[0])
    want = step(mask, qkv, weight, True)
    leaves = [x.requires_grad_() for x in qkv]
    out = checkpoint(
        lambda *x: mixed_attention(*x, mask, deterministic=True), *leaves, use_reentrant=False
    )
    assert same((out.detach(), *torch.autograd.grad(out, leaves, weight)), want)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("length", [700, LONG])
def test_order_backwards_in_a_row_do_not_overtake_each_other(length, dim, deterministic):
    """Each reuses the memory of the one before; dK and dV repeat bitwise even where dQ may not."""
    mask, qkv = tensors("spans", dim, length)
    cases = [[x * factor for x in qkv] for factor in (1.0, 0.5, 0.25)]
    weight = torch.randn_like(qkv[0])
    wants = []
    for case in cases:
        wants.append(step(mask, case, weight, deterministic))
        torch.cuda.synchronize()
    for _ in range(5):
        found = [step(mask, case, weight, deterministic) for case in cases]
        for got, want in zip(found, wants, strict=True):
            assert same(got[2:], want[2:])
            if deterministic:
                assert torch.equal(got[1], want[1])
            else:
                assert (got[1] - want[1]).norm() <= 2e-3 * want[1].norm()


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_order_graph_of_the_unordered_backward_replays(dim):
    mask, qkv = tensors("spans", dim, 700)
    weight = torch.randn_like(qkv[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(mask, qkv, weight, False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [step(mask, qkv, weight, False) for _ in range(2)]
    for seed in range(3):
        torch.manual_seed(seed)
        weight.copy_(torch.randn_like(weight))
        graph.replay()
        torch.cuda.synchronize()
        want = step(mask, qkv, weight, False)
        for got in captured:
            assert same(got[2:], want[2:])
            assert (got[1] - want[1]).norm() <= 2e-3 * want[1].norm()


# What keeps the kernels around the backward out of its time, and for D = 64 products that run into
# the next step; "picked": what gains most.
OVERLAPS = [(d, how) for d in (64, 128, 256) for how in ("early", "picked")]
OVERLAPS += [(d, how) for d in (64, 128) for how in ("zeros", "staged", "statistics")]
OVERLAPS.append((64, "late"))
overlapping = pytest.mark.parametrize(("dim", "overlap"), OVERLAPS, indirect=["overlap"])


@pytest.fixture
def overlap(request, monkeypatch):
    how = request.param
    if how == "picked":
        return
    pick = config.pick_hopper_backward

    def forced(*arguments, ordered=False, **options):
        picked = pick(*arguments, ordered=ordered, **options)
        statistics = how == "statistics"
        ahead = 2 if statistics else int(how == "zeros")
        return replace(
            picked, ahead=ahead, statistics=statistics, early=bool(ahead) or not ordered,
            late=how == "late", whole=False, staged=how in ("zeros", "staged"),
        )  # fmt: skip

    monkeypatch.setattr(config, "pick_hopper_backward", forced)


def within_rounding(got, want):
    """dK and dV are equal bit by bit, dQ but for the order of its sums."""
    assert same(got[2:], want[2:])
    assert (got[1] - want[1]).norm() <= 2e-3 * want[1].norm()


@pytest.mark.usefixtures("overlap")
@overlapping
@pytest.mark.parametrize(("batch", "heads", "key_heads"), [(1, 1, 1), (2, 6, 3), (3, 20, 20)])
def test_order_of_adding_changes_no_bit_of_keys_and_values(batch, heads, key_heads, dim):
    """Fewer and more items than programs, one section and several, the last one smaller."""
    for length in (1, 65, 700, 1601, LONG):
        name = "spans" if length > 65 else "visual"
        mask, qkv = tensors(name, dim, length, heads, key_heads, batch)
        weight = torch.randn_like(qkv[0])
        want = step(mask, qkv, weight, True)
        for _ in range(3):
            within_rounding(step(mask, qkv, weight, False), want)


@pytest.mark.usefixtures("overlap")
@overlapping
@pytest.mark.parametrize("key_heads", [32, 8])
def test_order_samples_of_nothing_but_padding(key_heads, dim):
    """Their programs add nothing, and are waited for all the same."""
    mask, qkv = tensors("left", dim, 700, 32, key_heads, 3)
    weight = torch.randn_like(qkv[0])
    want = step(mask, qkv, weight, True)
    got = step(mask, qkv, weight, False)
    within_rounding(got, want)
    assert not any(x[0].any() for x in got[1:])


@pytest.mark.usefixtures("overlap")
@overlapping
def test_order_backwards_on_two_streams_at_once(dim):
    """Programs wait for each other's work in a launch, never for another launch."""
    cases = []
    for length, heads in ((1000, 32), (LONG, 7)):
        mask, qkv = tensors("spans", dim, length, heads, heads)
        weight = torch.randn_like(qkv[0])
        cases.append((mask, qkv, weight, step(mask, qkv, weight, True)))
    streams, graphs, kept = [torch.cuda.Stream() for _ in cases], [], []
    for stream, (mask, qkv, weight, _want) in zip(streams, cases, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(mask, qkv, weight, False)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept.append([step(mask, qkv, weight, False) for _ in range(3)])
        graphs.append(graph)
    for _ in range(5):
        for outputs in kept:
            for value in outputs:
                for x in value:
                    x.fill_(float("nan"))
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                graph.replay()
        beside = step(*cases[0][:3], False)
        torch.cuda.synchronize()
        within_rounding(beside, cases[0][3])
        for outputs, case in zip(kept, cases, strict=True):
            for got in outputs:
                within_rounding(got, case[3])
