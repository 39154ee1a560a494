"""What only a device can show of mixed attention and its masks: packing, recomputation, tracing,
graphs, memory, and the mask recovered from the backward pass. test_mixed_attention_gpu.py has the
budgets of error.
"""

import math

import pytest
import torch
from mixed_attention_cases import MASKS, check, gradients, inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from croc_kernels import ops
from croc_kernels.attention.api import mixed_attention
from croc_kernels.attention.mask import MixedMask

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def run(mask, **options):
    return lambda *x: mixed_attention(*x, mask, return_lse=True, **options)


def grads_of(mask, tensors, weight, **options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = mixed_attention(*leaves, mask, deterministic=True, **options)
    return out, *torch.autograd.grad(out, leaves, weight)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_device_packed_equals_alone_bit_for_bit_on_tile_borders(dim):
    """Documents that begin where tiles do take the same steps in the same order."""
    lengths = [256, 384, 128, 512]
    borders = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    visual = torch.rand(1, sum(lengths), device=DEVICE) < 0.5
    packed = MixedMask.from_token_types(visual, cu_seqlens=borders)
    tensors = inputs(packed, 4, 2, dim, torch.bfloat16)
    weight = torch.randn_like(tensors[0])
    together = grads_of(packed, tensors, weight)
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        alone = MixedMask.from_token_types(visual[:, rows])
        got = grads_of(alone, [x[:, :, rows] for x in tensors], weight[:, :, rows])
        for value, whole in zip(got, together, strict=True):
            assert torch.equal(value, whole[:, :, rows])
        first += length


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_device_packed_equals_alone_up_to_rounding_anywhere(dim):
    lengths = [5, 331, 1, 640, 200]
    borders = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    visual = torch.rand(1, sum(lengths), device=DEVICE) < 0.5
    packed = MixedMask.from_token_types(visual, cu_seqlens=borders)
    tensors = inputs(packed, 4, 2, dim, torch.float32)
    weight = torch.randn_like(tensors[0])
    together = grads_of(packed, tensors, weight)
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        alone = MixedMask.from_token_types(visual[:, rows])
        got = grads_of(alone, [x[:, :, rows] for x in tensors], weight[:, :, rows])
        for value, whole in zip(got, together, strict=True):
            torch.testing.assert_close(value, whole[:, :, rows], rtol=2e-5, atol=2e-5)
        first += length


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_device_batch_element_does_not_depend_on_the_others(dim):
    mask = MASKS["visual"](3, 700, DEVICE)
    tensors = inputs(mask, 4, 2, dim, torch.bfloat16)
    weight = torch.randn_like(tensors[0])
    together = grads_of(mask, tensors, weight)
    for b in range(3):
        row = slice(b, b + 1)
        alone = MixedMask.from_rows(mask.start[row], mask.end[row], 700, may_have_holes=False)
        got = grads_of(alone, [x[row] for x in tensors], weight[row])
        for value, whole in zip(got, together, strict=True):
            assert torch.equal(value, whole[row])


@pytest.mark.parametrize("dim", [64, 128])
def test_device_recomputation_is_bitwise_equal(dim):
    mask = MASKS["packed"](2, 700, DEVICE)
    q, k, v = inputs(mask, 8, 2, dim, torch.bfloat16)
    attend = run(mask, deterministic=True)
    first = gradients(attend, q, k, v, torch.bfloat16)
    again = gradients(
        lambda *x: checkpoint(attend, *x, use_reentrant=False), q, k, v, torch.bfloat16
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dim", [64, 128])
def test_device_recovers_the_mask_bit_for_bit(name, dim):
    """One-hot values give back the keys of a row, one-hot gradients the rows of a key."""
    length = 333
    mask = MASKS[name](2, length, DEVICE)
    dense = mask.to_dense()
    q = torch.zeros(2, 1, mask.num_queries, dim, dtype=torch.bfloat16, device=DEVICE)
    k = torch.zeros(2, 1, length, dim, dtype=torch.bfloat16, device=DEVICE)
    for first in range(0, length, dim):
        width = min(dim, length - first)
        v = torch.zeros_like(k)
        v[:, :, first : first + width, :width] = torch.eye(width, device=DEVICE)
        out = mixed_attention(q, k, v, mask)[..., :width]
        assert torch.equal(out > 0, dense[..., first : first + width])
    for first in range(0, mask.num_queries, dim):
        width = min(dim, mask.num_queries - first)
        weight = torch.zeros_like(q)
        weight[:, :, first : first + width, :width] = torch.eye(width, device=DEVICE)
        leaf = torch.zeros_like(k).requires_grad_()
        (grad,) = torch.autograd.grad(mixed_attention(q, k, leaf, mask), leaf, weight)
        seen = dense[:, :, first : first + width].transpose(-1, -2)
        assert torch.equal(grad[..., :width] > 0, seen)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
@pytest.mark.parametrize("dim", [80, 128])
def test_device_gradient_of_some_inputs(wanted, dim):
    mask = MASKS["visual"](1, 300, DEVICE)
    tensors = inputs(mask, 2, 2, dim, torch.bfloat16)
    weight = torch.randn_like(tensors[0])
    full = grads_of(mask, tensors, weight)[1:]
    leaves = [x.detach().requires_grad_(bool(w)) for x, w in zip(tensors, wanted, strict=True)]
    mixed_attention(*leaves, mask, deterministic=True).backward(weight)
    for leaf, want, whole in zip(leaves, wanted, full, strict=True):
        assert (leaf.grad is not None) == bool(want)
        assert not want or torch.equal(leaf.grad, whole)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_device_gradient_through_lse_alone(dim):
    mask = MASKS["left"](2, 300, DEVICE)
    q, k, v = inputs(mask, 2, 2, dim, torch.float16)
    lse = run(mask, deterministic=True)(q, k, v)[1]
    finite = lse.isfinite()
    got = torch.autograd.grad(lse[finite].sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    lse = mixed_attention(*exact, mask, return_lse=True, backend="reference")[1]
    want = torch.autograd.grad(lse[finite].sum(), exact[:2])
    for value, truth in zip(got, want, strict=False):
        assert (value - truth).abs().max() <= 2e-3 * truth.abs().max()
    assert bool((got[2] == 0).all())


@pytest.mark.parametrize("kind", ["large", "equal", "outlier", "tiny"])
@pytest.mark.parametrize("dim", [128, 256])
def test_device_hard_numbers(kind, dim):
    mask = MASKS["window"](1, 300, DEVICE)
    q, k, v = (x.detach() for x in inputs(mask, 2, 2, dim, torch.bfloat16))
    if kind == "large":
        q, k = q * 30, k * 30
    elif kind == "equal":
        q, k = torch.ones_like(q), torch.ones_like(k)
    elif kind == "outlier":
        k[:, :, 64] *= 100
    else:
        q, k = q * 1e-20, k * 1e-20
    check(run(mask, scale=1.0), q, k, v, mask, 1.0)


@pytest.mark.parametrize("dim", [64, 128])
def test_device_sums_over_many_keys(dim):
    """A cache of 100003 keys, the last 130 rows."""
    mask = MixedMask.causal(1, 100_003, device=DEVICE, num_queries=130)
    check(run(mask), *inputs(mask, 1, 1, dim, torch.bfloat16), mask, 1 / math.sqrt(dim))


def test_device_takes_last_dimensions_that_are_strided():
    mask = MASKS["visual"](2, 300, DEVICE)
    x = torch.randn(3, 2, 4, 300, 256, device=DEVICE, dtype=torch.bfloat16)[..., ::2]
    want = mixed_attention(*(y.contiguous() for y in x), mask)
    assert torch.equal(mixed_attention(*x, mask), want)


CONSTRUCTORS = {
    "types": lambda t: MixedMask.from_token_types(t["visual"], t["valid"]),
    "window": lambda t: MixedMask.from_token_types(
        t["visual"], t["valid"], sliding_window=100, spans_exceed_window=True
    ),
    "spans": lambda t: MixedMask.from_spans(t["spans"], 2, t["visual"].shape[1]),
    "prefix": lambda t: MixedMask.prefix(t["prefix"], t["visual"].shape[1]),
    "labels": lambda t: MixedMask.from_labels(t["labels"], t["valid"]),
    "parity": lambda t: MixedMask.from_labels(t["labels"], exact_parity=True),
    "ids": lambda t: MixedMask.from_token_types(t["visual"], document_ids=t["ids"]),
}


def values_of(seed, length):
    """Arguments of every constructor, with other values for other seeds."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(length - 1, generator=generator)[:8].sort().values.view(2, 2, 2)
    rows = [[b, *pair] for b in range(2) for pair in cuts[b].tolist()]
    position = torch.arange(length).expand(2, -1)
    prefix = torch.randint(0, length, (2,), generator=generator)
    kept = torch.randint(length // 2, length, (2, 1), generator=generator)
    return {
        "visual": torch.rand(2, length // 4 + 1, generator=generator).repeat_interleave(4, 1)[
            :, :length
        ]
        < 0.5,
        "valid": (position < kept).float(),
        "spans": torch.tensor(rows),
        "prefix": prefix,
        "labels": torch.where(position < prefix[:, None], -100, 7),
        "ids": (torch.rand(2, length, generator=generator) < 0.02).cumsum(1),
    }


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [300, 3200])
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_device_graph_replays_with_changed_values(name, length, dim):
    inside = {n: x.to(DEVICE) for n, x in values_of(0, length).items()}
    shape = MixedMask.causal(2, length, device=DEVICE)
    q, k, v = (x.detach() for x in inputs(shape, 2, 1, dim, torch.bfloat16))
    weight = torch.randn_like(q)

    def step():
        mask = CONSTRUCTORS[name](inside)
        return mask.start, mask.end, *grads_of(mask, (q, k, v), weight)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2, 3):
        for key, value in values_of(seed, length).items():
            inside[key].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_device_constructors_never_wait_and_take_linear_memory(name):
    length = 1 << 16
    tensors = {n: x.to(DEVICE) for n, x in values_of(0, length).items()}
    CONSTRUCTORS[name](tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        CONSTRUCTORS[name](tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # parity is made of PyTorch operations, some in 64 bits.
    limit = 160 if name == "parity" else 40
    assert torch.cuda.max_memory_allocated() - before <= limit * 2 * length + (1 << 16)


def test_device_recompiles_at_most_once_for_new_lengths_and_spans():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, backend=counter)
    def step(q, k, v, visual, valid):
        mask = MixedMask.from_token_types(visual, valid)
        return mixed_attention(q, k, v, mask, deterministic=True)

    for seed, length in enumerate((300, 333, 452, 700, 300, 640)):
        values = {n: x.to(DEVICE) for n, x in values_of(seed, length).items()}
        mask = CONSTRUCTORS["types"](values)
        q, k, v = inputs(mask, 4, 2, 64, torch.bfloat16, seed=seed)
        got = step(q, k, v, values["visual"], values["valid"])
        want = mixed_attention(q, k, v, mask, deterministic=True)
        assert torch.equal(got, want)
        weight = torch.randn_like(want)
        expected = torch.autograd.grad(want, (q, k, v), weight)
        grads = torch.autograd.grad(got, (q, k, v), weight)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_device_ops_pass_opcheck(dim):
    mask = MASKS["visual"](2, 200, DEVICE)
    q, k, v = (x.detach() for x in inputs(mask, 4, 2, dim, torch.bfloat16))
    rows, columns = (mask.start, mask.end), (mask.row_start, mask.row_end)
    out, lse = ops.mixed_attention_fwd(q, k, v, *rows, None, 0.25, 0.0)
    forward, backward = (
        getattr(torch.ops.croc_kernels, f"mixed_attention_{n}").default for n in ("fwd", "bwd")
    )
    torch.library.opcheck(forward, (q, k, v, *rows, None, 0.25, 0.0))
    given = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse)
    torch.library.opcheck(backward, (*given, *rows, *columns, None, 0.25, 0.0, True))


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_device_refused_masks_are_still_in_bounds(dim):
    """Values that break the rules are reported when asked for; until then nothing is read or
    written outside.
    """
    spans = torch.tensor([[0, 0, 200], [0, 100, 300], [0, 250, 900], [5, 0, 9]], device=DEVICE)
    mask = MixedMask.from_spans(spans, 1, 300)
    for low, high in ((mask.start, mask.end), (mask.row_start, mask.row_end)):
        assert bool(((low >= 0) & (low <= high) & (high <= 300)).all())
    tensors = inputs(mask, 2, 1, dim, torch.bfloat16)
    for value in grads_of(mask, tensors, torch.randn_like(tensors[0])):
        assert bool(value.isfinite().all())
    with pytest.raises(ValueError, match="MixedMask: spans must"):
        mask.check()
