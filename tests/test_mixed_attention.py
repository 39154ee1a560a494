"""Mixed attention on the CPU: values, gradients, tracing, errors. The kernels' own tests run the
same checks."""

import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from mixed_attention_cases import MASKS, check, gradients, inputs
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from croc_kernels import ops
from croc_kernels.attention.api import mixed_attention
from croc_kernels.attention.mask import MixedMask
from croc_kernels.attention.reference import mixed_attention as reference

ROOT = pathlib.Path(__file__).parents[1]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def run(mask, **options):
    return lambda *x: mixed_attention(*x, mask, return_lse=True, **options)


@pytest.mark.parametrize("name", MASKS)
def test_mixed_attention_is_within_budget_for_every_mask(name):
    mask, dtype = MASKS[name](2, 100, "cpu"), torch.float32
    check(run(mask), *inputs(mask, 4, 2, 16, dtype), mask, 0.25)


@pytest.mark.parametrize("length", [1, 2, 15, 31, 33, 64, 193])
def test_mixed_attention_is_within_budget_for_every_length(length):
    batch = 1 + 64 // length  # a maximum over a few rows would be a matter of luck
    mask = MASKS["visual"](batch, length, "cpu")
    check(run(mask), *inputs(mask, 4, 4, 32, torch.float32), mask, 1 / math.sqrt(32))


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (7, 1), (6, 2), (8, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_attention_shares_key_heads(heads, key_heads, dtype):
    mask = MASKS["holes"](2, 70, "cpu")
    check(run(mask), *inputs(mask, heads, key_heads, 24, dtype), mask, 1 / math.sqrt(24))


@pytest.mark.parametrize("softcap", [0.5, 20.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_attention_soft_cap_and_scale(softcap, dtype):
    mask = MASKS["left"](2, 90, "cpu")
    q, k, v = inputs(mask, 4, 2, 16, dtype)
    check(run(mask, scale=0.7, softcap=softcap), q, k, v, mask, 0.7, softcap)


@pytest.mark.parametrize("kind", ["large", "equal", "outlier", "tiny"])
def test_mixed_attention_hard_numbers(kind):
    mask = MASKS["window"](1, 140, "cpu")
    q, k, v = (x.detach() for x in inputs(mask, 2, 2, 16, torch.float32))
    if kind == "large":
        q, k = q * 100, k * 100  # logits around 1e4
    elif kind == "equal":
        q, k = torch.ones_like(q), torch.ones_like(k)
    elif kind == "outlier":
        k[:, :, 64] *= 1000
    else:
        q, k, v = q * 1e-20, k * 1e-20, v * 1e-20
    check(run(mask, scale=1.0), q, k, v, mask, 1.0)


@pytest.mark.parametrize(("name", "softcap"), [("left", 0.0), ("cache-holes", 3.0)])
def test_mixed_attention_reference_passes_gradcheck(name, softcap):
    mask = MASKS[name](2, 4, "cpu")
    dense = mask.to_dense()
    q, k, v = inputs(mask, 2, 1, 2, torch.float64)

    def finite(*x):
        out, lse = reference(*x, dense, 0.6, softcap)
        return out, torch.where(lse == float("-inf"), 0, lse)

    assert torch.autograd.gradcheck(finite, (q, k, v))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", MASKS)
def test_mixed_attention_recovers_the_mask_bit_for_bit(name, backend):
    mask = MASKS[name](2, 64, "cpu")
    q = torch.zeros(2, 1, mask.num_queries, 64)
    k = torch.zeros(2, 1, 64, 64)
    v = torch.eye(64).expand(2, 1, 64, 64)
    out = mixed_attention(q, k, v, mask, backend=backend)
    assert torch.equal(out > 0, mask.to_dense())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["left", "right", "holes", "cache-holes", "until"])
def test_mixed_attention_nan_in_unseen_places_reaches_nothing(name, backend):
    mask = MASKS[name](2, 90, "cpu")
    dense = mask.to_dense()
    q, k, v = inputs(mask, 2, 2, 16, torch.float32)
    clean = gradients(run(mask, backend=backend), q, k, v, torch.float32)
    sees, seen = dense.any(-1)[..., None], dense.any(-2)[..., None]
    bad = float("nan")
    with torch.no_grad():
        poisoned = torch.where(sees, q, bad), torch.where(seen, k, bad), torch.where(seen, v, -bad)
    leaves = [x.requires_grad_() for x in poisoned]
    out, lse = mixed_attention(*leaves, mask, return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator)
    lse_weight = torch.randn(lse.shape, generator=generator)
    weight, lse_weight = torch.where(sees, weight, bad), torch.where(sees[..., 0], lse_weight, bad)
    grads = torch.autograd.grad((out, lse), leaves, (weight, lse_weight))
    assert torch.equal(out, clean[0])
    assert bool((out[~sees.expand_as(out)] == 0).all())
    assert bool((lse[~sees[..., 0].expand_as(lse)] == float("-inf")).all())
    for got, want in zip(grads, clean[2:], strict=True):
        assert torch.equal(got, want)


def test_mixed_attention_packed_equals_alone():
    lengths = [5, 131, 1, 64]
    borders = torch.tensor([0, *lengths]).cumsum(0)
    visual = torch.rand(1, sum(lengths)) < 0.5
    packed = MixedMask.from_token_types(visual, cu_seqlens=borders)
    q, k, v = inputs(packed, 4, 2, 16, torch.float64)
    together = mixed_attention(q, k, v, packed)
    for first, past in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        alone = MixedMask.from_token_types(visual[:, first:past])
        part = (x[:, :, first:past] for x in (q, k, v))
        torch.testing.assert_close(
            mixed_attention(*part, alone), together[:, :, first:past], rtol=0, atol=1e-14
        )


def test_mixed_attention_decoding_equals_training():
    visual = torch.rand(2, 40) < 0.5
    mask = MixedMask.from_token_types(visual)
    q, k, v = inputs(mask, 2, 1, 16, torch.float64)
    whole = mixed_attention(q, k, v, mask)
    step = MixedMask.from_token_types(visual, num_queries=1)
    got = mixed_attention(q[:, :, -1:], k, v, step)
    torch.testing.assert_close(got, whole[:, :, -1:], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, True), (False, False, True)]
)
def test_mixed_attention_gradient_of_some_inputs(wanted):
    mask = MASKS["visual"](1, 30, "cpu")
    tensors = inputs(mask, 2, 2, 16, torch.float64)
    leaves = [x.detach().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
    everything = [x.detach().requires_grad_() for x in leaves]
    mixed_attention(*leaves, mask).sum().backward()
    mixed_attention(*everything, mask).sum().backward()
    for leaf, full, want in zip(leaves, everything, wanted, strict=True):
        assert (leaf.grad is not None) == want
        assert not want or torch.equal(leaf.grad, full.grad)


def test_mixed_attention_gradient_through_lse_alone():
    mask = MASKS["visual"](1, 30, "cpu")
    q, k, v = inputs(mask, 2, 2, 16, torch.float64)
    lse = mixed_attention(q, k, v, mask, return_lse=True)[1]
    got = torch.autograd.grad(lse.sum(), (q, k, v))
    exact = reference(q, k, v, mask.to_dense(), 0.25, 0.0)[1]
    want = torch.autograd.grad(exact.sum(), (q, k), allow_unused=True)
    torch.testing.assert_close(got[:2], want, rtol=1e-12, atol=1e-14)
    assert bool((got[2] == 0).all())


@pytest.mark.parametrize("grad", [True, False])
def test_mixed_attention_refuses_forward_mode(grad):
    """Also where no gradient is wanted and autograd is left out, which would drop the tangent."""
    mask = MASKS["visual"](1, 30, "cpu")
    q, k, v = (x.detach() for x in inputs(mask, 2, 2, 16, torch.float64))
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            mixed_attention(dual, k, v, mask)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("how", ["vmap", "grad of vmap", "outer grad"])
def test_mixed_attention_refuses_transforms_of_functions(how, grad):
    """Not a gradient of zeros where requires_grad is False within the innermost."""
    mask = MASKS["visual"](1, 30, "cpu")
    q, k, v = (x.detach() for x in inputs(mask, 2, 2, 16, torch.float64))

    def attend(x):
        with torch.set_grad_enabled(grad):
            return mixed_attention(x, k, v, mask)

    def inner(x):
        return torch.func.grad(lambda y: (y * attend(x)).sum())(q).sum()

    call = {
        "vmap": torch.vmap(attend),
        "grad of vmap": torch.func.grad(lambda x: torch.vmap(attend)(x).sum()),
        "outer grad": lambda x: torch.func.grad(inner)(x[0]),
    }[how]
    with pytest.raises(RuntimeError, match="functorch transforms"):
        call(torch.stack([q, q]))


def test_mixed_attention_refuses_compiled_transforms_and_the_reference_takes_them():
    mask = MASKS["visual"](1, 30, "cpu")
    q, k, v = (x.detach() for x in inputs(mask, 2, 2, 16, torch.float64))

    def gradient(backend):
        return torch.func.grad(lambda x: mixed_attention(x, k, v, mask, backend=backend).sum())

    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.compile(gradient("auto"), backend="eager")(q)
    leaf = q.clone().requires_grad_()
    mixed_attention(leaf, k, v, mask).sum().backward()
    torch.testing.assert_close(gradient("reference")(q), leaf.grad, rtol=1e-12, atol=1e-14)


def test_mixed_attention_without_a_gradient_is_the_same():
    mask = MASKS["visual"](1, 30, "cpu")
    leaves = inputs(mask, 2, 2, 16, torch.float32)
    want = mixed_attention(*leaves, mask, return_lse=True)
    detached = mixed_attention(*(x.detach() for x in leaves), mask, return_lse=True)
    with torch.no_grad():
        without = mixed_attention(*leaves, mask, return_lse=True)
    for results in (detached, without):
        assert all(torch.equal(x, y) for x, y in zip(results, want, strict=True))
        assert not any(x.requires_grad for x in results)
    assert all(x.requires_grad for x in want)


def test_mixed_attention_takes_any_strides():
    mask = MASKS["visual"](2, 40, "cpu")
    packed = torch.randn(2, 40, 8, 2 * 16)
    q, k, v = (packed[:, :, a:b].transpose(1, 2)[..., :16] for a, b in ((0, 4), (4, 6), (6, 8)))
    want = mixed_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask)
    assert torch.equal(mixed_attention(q, k, v, mask), want)
    stepped = (packed[:, :, a:b].transpose(1, 2)[..., ::2] for a, b in ((0, 4), (4, 6), (6, 8)))
    stepped = [*stepped]
    want = mixed_attention(*(x.contiguous() for x in stepped), mask)
    assert torch.equal(mixed_attention(*stepped, mask), want)
    assert want.transpose(1, 2).is_contiguous()


def test_mixed_attention_repeats_bitwise_also_recomputed():
    mask = MASKS["packed"](2, 200, "cpu")
    q, k, v = inputs(mask, 4, 2, 16, torch.bfloat16)
    first = gradients(run(mask), q, k, v, torch.bfloat16)
    again = gradients(run(mask), q, k, v, torch.bfloat16)
    recomputed = gradients(
        lambda *x: checkpoint(run(mask), *x, use_reentrant=False), q, k, v, torch.bfloat16
    )
    for a, b, c in zip(first, again, recomputed, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_mixed_attention_batch_element_does_not_depend_on_the_others():
    mask = MASKS["visual"](3, 70, "cpu")
    q, k, v = inputs(mask, 4, 2, 16, torch.float32)
    rows = slice(1, 2)
    alone = MixedMask.from_rows(mask.start[rows], mask.end[rows], 70)
    torch.testing.assert_close(
        mixed_attention(q, k, v, mask)[rows], mixed_attention(q[rows], k[rows], v[rows], alone)
    )


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_mixed_attention_of_nothing(shape):
    mask = MixedMask.causal(*shape)
    q, k, v = inputs(mask, 4, 2, 16, torch.float32)
    out, lse = mixed_attention(q, k, v, mask, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    out.sum().backward()
    assert q.grad.shape == q.shape
    assert v.grad.shape == v.shape


def test_mixed_attention_on_meta_tensors():
    mask = MASKS["holes"](2, 40, "cpu").to("meta")
    q = torch.empty(2, 4, 40, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    kv = torch.empty(2, 2, 40, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out, lse = mixed_attention(q, kv, kv, mask, return_lse=True)
    assert (out.shape, out.dtype, lse.dtype) == (q.shape, torch.bfloat16, torch.float32)
    out.sum().backward()
    assert kv.grad.shape == kv.shape


def test_mixed_attention_follows_autocast():
    mask = MASKS["visual"](1, 20, "cpu")
    q, k, v = inputs(mask, 2, 2, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixed_attention(q, k, v, mask)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, mixed_attention(*(x.bfloat16() for x in (q, k, v)), mask))
    out.sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize(("name", "dtype"), [("visual", torch.float32), ("holes", torch.bfloat16)])
def test_mixed_attention_ops_pass_opcheck(name, dtype):
    mask = MASKS[name](2, 20, "cpu")
    q, k, v = (x.detach() for x in inputs(mask, 4, 2, 16, dtype))
    rows = (mask.start, mask.end)
    columns = (mask.row_start, mask.row_end, mask.visible_until)
    out, lse = ops.mixed_attention_fwd(q, k, v, *rows, mask.visible_until, 0.25, 0.0)
    torch.library.opcheck(
        torch.ops.croc_kernels.mixed_attention_fwd.default,
        (q, k, v, *rows, mask.visible_until, 0.25, 0.0),
    )
    grad_lse = None if name == "visual" else torch.randn_like(lse)
    torch.library.opcheck(
        torch.ops.croc_kernels.mixed_attention_bwd.default,
        (torch.randn_like(out), grad_lse, q, k, v, out, lse, *rows, *columns, 0.25, 2.0, True),
    )


COMPILED = """
import torch
from croc_kernels.attention.api import mixed_attention
from croc_kernels.attention.mask import MixedMask

@torch.compile(fullgraph=True, backend="aot_eager")
def step(q, k, v, mask):
    out, lse = mixed_attention(q, k, v, mask, return_lse=True, softcap=5.0)
    return out.sum() + lse.sum()

visual = torch.rand(2, 21) < 0.5
mask = MixedMask.from_token_types(visual)
q, k, v = (torch.randn(2, h, 21, 16, requires_grad=True) for h in (4, 2, 2))
loss = step(q, k, v, mask)
got = torch.autograd.grad(loss, (q, k, v))
out, lse = mixed_attention(q, k, v, mask, return_lse=True, softcap=5.0)
want = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
assert all(torch.equal(a, b) for a, b in zip(got, want)), "gradients differ"
assert torch.equal(loss, out.sum() + lse.sum()), "values differ"
print("equal")
"""


def in_subprocess(*command, **environment):
    """Run Python in the repository, with this process's environment and more."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_mixed_attention_compiles_first_thing_in_a_process():
    code, log = in_subprocess("-c", COMPILED)
    assert code == 0, log
    assert "equal" in log


def test_mixed_attention_recompiles_at_most_once_for_new_lengths_and_spans():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(mixed_attention, fullgraph=True, backend=counter)
    for length in (20, 33, 47, 52, 60):
        mask = MixedMask.from_token_types(torch.rand(2, length) < 0.5)
        q, k, v = (x.detach() for x in inputs(mask, 4, 2, 16, torch.float32))
        assert torch.equal(compiled(q, k, v, mask), mixed_attention(q, k, v, mask))
    assert counter.frame_count <= 2


def test_mixed_attention_kernels_in_the_interpreter():
    """Triton reads TRITON_INTERPRET at import, so the kernels' tests run in their own process."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        pytest.skip("already inside the interpreter")
    pytest.importorskip("triton", reason="needs triton")
    path = "tests/test_mixed_attention_interpreter.py"
    code, log = in_subprocess(
        "-m", "pytest", path, "-q", "-x", "-p", "no:cacheprovider", TRITON_INTERPRET="1"
    )
    assert code == 0, log[-5000:]
    assert " passed" in log
    assert "skipped" not in log.splitlines()[-1]


Q = torch.zeros(2, 4, 6, 16)
K = torch.zeros(2, 2, 6, 16)
MASK = MixedMask.causal(2, 6)
ERRORS = [
    ((Q.int(), K, K, MASK), {}, TypeError,
     "mixed_attention: q must have dtype float16, bfloat16, float32, float64, got int32"),
    ((Q, K.double(), K, MASK), {}, TypeError,
     "mixed_attention: k must have the dtype of q, float32, got float64"),
    ((Q[0], K, K, MASK), {}, ValueError,
     "mixed_attention: q must be (B, H, Lq, D), got (4, 6, 16)"),
    ((Q, K, K[..., :8], MASK), {}, ValueError,
     "mixed_attention: v must be (B, Hkv, Lk, D) = (2, 2, 6, 16), got (2, 2, 6, 8)"),
    ((Q, K[:1], K[:1], MASK), {}, ValueError,
     "mixed_attention: k must be (B, Hkv, Lk, D) = (2, 2, 6, 16), got (1, 2, 6, 16)"),
    ((Q[:, :3], K, K, MASK), {}, ValueError,
     "mixed_attention: H must be a multiple of Hkv, got H = 3 and Hkv = 2"),
    ((Q[..., :0], K[..., :0], K[..., :0], MASK), {}, ValueError,
     "mixed_attention: D must be at least 1, got 0"),
    ((Q, K, K, MASK.to_dense()), {}, TypeError,
     "mixed_attention: mask must be a MixedMask, got Tensor"),
    ((Q, K, K, MixedMask.causal(1, 6)), {}, ValueError,
     "mixed_attention: mask must be made for B = 2, got 1"),
    ((Q, K, K, MixedMask.causal(2, 6, num_queries=3)), {}, ValueError,
     "mixed_attention: mask must be made for Lq = 6, got 3"),
    ((Q, K, K, MixedMask.causal(2, 7, num_queries=6)), {}, ValueError,
     "mixed_attention: mask must be made for Lk = 6, got 7"),
    ((Q, K, K, MASK.to("meta")), {}, ValueError,
     "mixed_attention: mask must be on the device of q, cpu, got meta"),
    ((Q, K, K, MASK), {"scale": -1.0}, ValueError,
     "mixed_attention: scale must be positive and finite, got -1.0"),
    ((Q, K, K, MASK), {"softcap": 0.0}, ValueError,
     "mixed_attention: softcap must be positive and finite, got 0.0"),
    ((Q, K, K, MASK), {"backend": "fast"}, ValueError,
     "mixed_attention: backend must be one of ('auto', 'triton', 'reference'), got 'fast'"),
    ((Q, K, K, MASK), {"backend": "triton"}, RuntimeError,
     'mixed_attention: backend="triton" must have CUDA tensors, got cpu; set TRITON_INTERPRET=1 '
     "before the first import to run it in Triton's interpreter"),
]  # fmt: skip


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="CPU tensors take the kernels there"
)
@pytest.mark.parametrize(("arguments", "options", "error", "message"), ERRORS)
def test_mixed_attention_refuses_bad_arguments(arguments, options, error, message):
    with pytest.raises(error) as caught:
        mixed_attention(*arguments, **options)
    assert str(caught.value) == message
