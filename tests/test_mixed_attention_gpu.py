"""The Triton kernels on a GPU: the same checks in all dtypes and head dimensions, and what only a
device has."""

import math

import pytest
import torch
from mixed_attention_cases import (
    MASKS,
    VECTORS,
    as_views,
    check,
    every_second,
    expanded,
    gradients,
    inputs,
)

from croc_kernels.attention import config, operands
from croc_kernels.attention.api import mixed_attention
from croc_kernels.attention.mask import MixedMask
from croc_kernels.testing import assert_within_budget, max_error

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HALVES = [torch.bfloat16, torch.float16]


def run(mask, **options):
    return lambda *x: mixed_attention(*x, mask, return_lse=True, backend="triton", **options)


@pytest.fixture(autouse=True)
def _ieee():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", config.HEAD_DIMS)
def test_gpu_every_head_dimension(dim, dtype, deterministic):
    mask = MASKS["visual"](2, 389, "cuda")
    q, k, v = inputs(mask, 4, 2, dim, dtype)
    check(run(mask, deterministic=deterministic), q, k, v, mask, 1 / math.sqrt(dim))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", MASKS)
def test_gpu_every_mask(name, dtype, deterministic):
    mask = MASKS[name](3, 517, "cuda")
    q, k, v = inputs(mask, 4, 2, 64, dtype)
    check(run(mask, deterministic=deterministic), q, k, v, mask, 0.125)


@pytest.mark.parametrize(
    "length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 2049]
)
@pytest.mark.parametrize("name", ["visual", "spans", "cache"])
def test_gpu_every_length(name, length):
    mask = MASKS[name](1 + 64 // length, length, "cuda")
    check(run(mask), *inputs(mask, 4, 4, 128, torch.bfloat16), mask, 1 / math.sqrt(128))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("name", MASKS)
def test_gpu_every_mask_of_256_columns(name, heads, dtype):
    mask = MASKS[name](3, 517, "cuda")
    check(run(mask), *inputs(mask, *heads, 256, dtype), mask, 0.0625)


@pytest.mark.parametrize("length", [128, 129, 1000, 1681, 3100])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gpu_every_forward_of_hopper(dim, length):
    for name in ("spans", "left", "window"):
        mask = MASKS[name](2 if length < 1024 else 1, length, "cuda")
        check(run(mask), *inputs(mask, 4, 2, dim, torch.float16), mask, 1 / math.sqrt(dim))


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (12, 4), (16, 1)])
def test_gpu_shared_key_heads(heads):
    mask = MASKS["packed"](2, 300, "cuda")
    check(run(mask), *inputs(mask, *heads, 128, torch.bfloat16), mask, 1 / math.sqrt(128))


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", HALVES)
def test_gpu_soft_cap(dim, dtype):
    mask = MASKS["window"](2, 300, "cuda")
    q, k, v = inputs(mask, 4, 2, dim, dtype)
    check(run(mask, scale=0.1, softcap=5.0), q, k, v, mask, 0.1, 5.0)


@pytest.mark.parametrize("kind", ["large", "equal", "outlier"])
@pytest.mark.parametrize("dtype", HALVES)
def test_gpu_hard_numbers(kind, dtype):
    mask = MASKS["window"](1, 300, "cuda")
    q, k, v = (x.detach() for x in inputs(mask, 2, 2, 64, dtype))
    if kind == "large":
        q, k = q * 30, k * 30
    elif kind == "equal":
        q, k = torch.ones_like(q), torch.ones_like(k)
    else:
        k[:, :, 64] *= 100
    check(run(mask, scale=1.0), q, k, v, mask, 1.0)


def test_gpu_tf32_where_torch_allows_it():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    mask = MASKS["visual"](2, 300, "cuda")
    q, k, v = inputs(mask, 2, 2, 64, torch.float32)
    got = mixed_attention(q, k, v, mask)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    exact = mixed_attention(*(x.double() for x in (q, k, v)), mask, backend="reference")
    error, ieee = ((x - exact).abs().max() for x in (got, mixed_attention(q, k, v, mask)))
    assert ieee < error < 5e-3


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", HALVES)
def test_gpu_recovers_the_mask_bit_for_bit(name, dtype):
    mask = MASKS[name](2, 256, "cuda")
    q = torch.zeros(2, 1, mask.num_queries, 256, dtype=dtype, device="cuda")
    k = torch.zeros(2, 1, 256, 256, dtype=dtype, device="cuda")
    v = torch.eye(256, dtype=dtype, device="cuda").expand(2, 1, 256, 256)
    assert torch.equal(mixed_attention(q, k, v, mask) > 0, mask.to_dense())


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("name", ["left", "right", "holes", "cache-holes", "until"])
def test_gpu_nan_in_unseen_places_reaches_nothing(name, dim, deterministic):
    mask = MASKS[name](3, 300, "cuda")
    dense = mask.to_dense()
    q, k, v = inputs(mask, 2, 2, dim, torch.bfloat16)
    sees, seen = dense.any(-1)[..., None], dense.any(-2)[..., None]
    function = run(mask, deterministic=deterministic)
    weight = torch.randn_like(q)

    def grads(fill):
        with torch.no_grad():
            leaves = [torch.where(m, x, fill) for m, x in ((sees, q), (seen, k), (seen, v))]
        leaves = [x.requires_grad_() for x in leaves]
        out, _ = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, torch.where(sees, weight, fill))

    for got, want in zip(grads(float("nan")), grads(0.0), strict=True):
        if deterministic:
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("name", "length"), [("packed", 700), ("spans", 2049)])
def test_gpu_repeats_bitwise(name, length, dim):
    mask = MASKS[name](2, length, "cuda")
    q, k, v = inputs(mask, 8, 2, dim, torch.bfloat16)
    first = gradients(run(mask, deterministic=True), q, k, v, torch.bfloat16)
    for _ in range(5):
        again = gradients(run(mask, deterministic=True), q, k, v, torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gpu_deterministic_follows_torch():
    mask = MASKS["visual"](1, 700, "cuda")
    q, k, v = inputs(mask, 8, 8, 128, torch.bfloat16)
    want = gradients(run(mask, deterministic=True), q, k, v, torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        got = gradients(run(mask), q, k, v, torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gpu_takes_strides_without_a_copy():
    mask = MASKS["visual"](2, 300, "cuda")
    packed = torch.randn(2, 300, 8, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = (packed[:, :, a:b].transpose(1, 2) for a, b in ((0, 4), (4, 6), (6, 8)))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = mixed_attention(q, k, v, mask)
    grown = torch.cuda.max_memory_allocated() - before
    assert grown <= got.numel() * 2 + 4 * 2 * 4 * 300 + 4096
    want = mixed_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("first", "gap"), [(1, 1), (0, 8), (4, 16)])
@pytest.mark.parametrize("name", ["visual", "until"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 160, 192, 256])
def test_gpu_unaligned_rows(dim, name, first, gap):
    """Rows at odd addresses, at multiples of 16 bytes that Triton takes for odd ones, and their
    copies: other kernels, or the same compiled apart, so all are held to the reference.
    """
    mask = MASKS[name](1, 200, "cuda")
    flat = torch.randn(3, 200, 3, dim + gap, device="cuda", dtype=torch.bfloat16)
    views = [x[None, :, :, first : first + dim].transpose(1, 2) for x in flat]
    copies = [x.contiguous() for x in views]
    assert not any(operands.known_to_be_aligned(x) for x in views)
    for rows in (views, copies, [*copies[:2], views[2]]):
        check(run(mask, deterministic=True), *rows, mask, 1 / math.sqrt(dim))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("make", [as_views, every_second, expanded])
@pytest.mark.parametrize("name", ["left", "packed", "cache", "until"])
def test_gpu_masks_that_are_views(name, make, dim, deterministic):
    """Vectors whose samples are not next to each other, as transformers' layers get them."""
    mask = make(MASKS[name](3, 700, "cuda"))
    assert not mask.start.is_contiguous()
    q, k, v = inputs(mask, 4, 2, dim, torch.bfloat16)
    check(run(mask, deterministic=deterministic), q, k, v, mask, 1 / math.sqrt(dim))


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("vector", VECTORS)
def test_gpu_steps_by_the_stride_of_each_vector_of_the_mask(vector, dim):
    mask = MASKS["holes" if vector == "visible_until" else "right"](3, 700, "cuda")
    q, k, v = inputs(mask, 4, 2, dim, torch.bfloat16)
    want = gradients(run(mask, deterministic=True), q, k, v, torch.bfloat16)
    views = as_views(mask, (vector,))
    assert getattr(views, vector).stride(0) != getattr(mask, vector).stride(0)
    got = gradients(run(views, deterministic=True), q, k, v, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_gpu_llama_with_padding_equals_eager(size, side):
    """A batch of three through ``attn_implementation="croc"``: logits and gradients."""
    transformers = pytest.importorskip("transformers")
    import transformers_zoo as zoo

    from croc_kernels.integrations.attention_interface import register

    register()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(zoo.llama(head_dim=size)).to(DEVICE)
    ids = torch.randint(3, 90, (3, 150), device=DEVICE)
    valid = torch.ones_like(ids)
    for row, padding in ((0, 31), (2, 7)):
        valid[row, slice(0, padding) if side == "left" else slice(150 - padding, 150)] = 0

    def step(attention, halves):
        model.set_attn_implementation(attention)
        model.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=halves):
            logits = model(input_ids=ids, attention_mask=valid).logits
        logits = logits[valid.bool()].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[valid.bool()])
        loss.backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    exact = step("eager", False)
    for halves in (False, True):
        got, plain = step("croc", halves), step("eager", halves)
        for value, truth, yardstick in zip(got, exact, plain, strict=True):
            if halves:
                assert_within_budget(value, truth, yardstick, torch.bfloat16, "autocast")
            else:
                assert max_error(value, truth) <= 64 * 2.0**-23 * truth.abs().max()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gpu_gradients_of_strided_and_unaligned_views(dim, deterministic):
    """Views of one projection go through TMA; rows that start off 16 bytes can't."""
    mask = MASKS["visual"](2, 300, "cuda")
    packed = torch.randn(2, 300, 8, dim + 1, device="cuda", dtype=torch.bfloat16)
    for x, aligned in ((packed[..., :dim].contiguous(), True), (packed[..., 1:], False)):
        q, k, v = (x[:, :, a:b].transpose(1, 2) for a, b in ((0, 4), (4, 6), (6, 8)))
        assert all(operands.tma_aligned(y) == aligned for y in (q, k, v))
        check(run(mask, deterministic=deterministic), q, k, v, mask, 1 / math.sqrt(dim))


def test_gpu_never_waits_for_the_device():
    visual = torch.rand(2, 300, device="cuda") < 0.5
    padding = torch.ones(2, 300, device="cuda")
    q, k, v = inputs(MASKS["causal"](2, 300, "cuda"), 4, 2, 64, torch.bfloat16)

    def step():
        mask = MixedMask.from_token_types(visual, padding)
        mixed_attention(q, k, v, mask).sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gpu_graph_replays_with_changed_spans():
    length = 300
    visual = torch.rand(2, length, device="cuda") < 0.5
    shape = MixedMask.causal(2, length, device="cuda")
    q, k, v = (x.detach() for x in inputs(shape, 4, 2, 64, torch.bfloat16))
    weight = torch.randn_like(q)

    def step():
        leaves = [x.requires_grad_() for x in (q, k, v)]
        mask = MixedMask.from_token_types(visual)
        out = mixed_attention(*leaves, mask, deterministic=True)
        return out, *torch.autograd.grad(out, leaves, weight)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        torch.manual_seed(seed)
        visual.copy_(torch.rand(2, length, device="cuda") < 0.5)
        q.data.copy_(torch.randn_like(q))
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)


def test_gpu_second_stream():
    mask = MASKS["visual"](2, 300, "cuda")
    q, k, v = inputs(mask, 4, 2, 64, torch.bfloat16)
    want = gradients(run(mask, deterministic=True), q, k, v, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = gradients(run(mask, deterministic=True), q, k, v, torch.bfloat16)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_gpu_second_device():
    mask = MASKS["visual"](2, 300, "cuda:1")
    check(run(mask), *inputs(mask, 4, 2, 64, torch.bfloat16), mask, 0.125)


def test_gpu_autocast_and_compile():
    torch._dynamo.reset()
    compiled = torch.compile(mixed_attention, fullgraph=True)
    for length in (130, 257, 300):
        mask = MASKS["visual"](2, length, "cuda")
        q, k, v = inputs(mask, 4, 2, 64, torch.float32)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            got = compiled(q, k, v, mask, deterministic=True)
        halves = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
        want = mixed_attention(*halves, mask, deterministic=True)
        assert torch.equal(got, want)
        weight = torch.randn_like(want)
        grads = torch.autograd.grad(got, (q, k, v), weight)
        expected = torch.autograd.grad(want, halves, weight)
        assert all(torch.equal(a, b.float()) for a, b in zip(grads, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 50.0], ids=["hopper", "plain"])
def test_gpu_offsets_beyond_32_bits(softcap):
    """The last heads of one tensor lie more than 2**31 elements behind its beginning."""
    heads, length, dim = 136, 131072, 128
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of device memory")
    assert heads * length * dim > 2**31
    mask = MixedMask.causal(1, length, device="cuda", sliding_window=64)
    x = torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    x.requires_grad_()
    out = mixed_attention(x, x, x, mask, softcap=softcap, deterministic=True)
    tail = x[:, -2:, -1000:].detach().requires_grad_()
    short = MixedMask.causal(1, 1000, device="cuda", sliding_window=64)
    want = mixed_attention(tail, tail, tail, short, softcap=softcap, deterministic=True)
    torch.testing.assert_close(out[:, -2:, -900:], want[:, :, -900:])
    (grad,) = torch.autograd.grad(out[:, -2:, -100:].sum(), x)
    (expected,) = torch.autograd.grad(want[:, :, -100:].sum(), tail)
    torch.testing.assert_close(grad[:, -2:, -1000:], expected)
