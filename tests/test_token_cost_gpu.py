"""Costs, replacement and loss on a GPU: real sizes, no host synchronisation, CUDA graphs."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from test_token_cost_fresh import COMPILE
from torch import Tensor

from croc_kernels import nearest_token, reconstruction_loss, replace_tokens, token_cost
from croc_kernels.testing import clustered_tokens

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
M, C = 2048, 4096


def need_memory(gibibytes: int) -> None:
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    if total < gibibytes:
        pytest.skip(f"needs a GPU with {gibibytes} GiB, has {total:.0f}")


def exact_square(tokens: Tensor, pool: Tensor) -> Tensor:
    """Squared distances in float64: at these sizes by a product, which float64 can afford."""
    x, p = tokens.double(), pool.double()
    square = x.square().sum(-1, keepdim=True) + p.square().sum(-1) - 2 * (x @ p.T)
    return square.clamp(min=0)


def trained(dtype: torch.dtype, near: float) -> tuple[Tensor, Tensor]:
    """Tokens of norm 1 and a pool near them: the case in which squares cancel."""
    tokens = clustered_tokens(4, 432, C, device="cuda")
    rows = tokens.reshape(-1, C)[torch.randint(4 * 432, (M,), device="cuda")]
    noise = torch.randn(M, C, device="cuda") * C**-0.5
    return tokens.to(dtype), (rows + near * noise).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("near", [64.0, 1.0, 0.1], ids=["init", "trained", "close"])
def test_token_cost_on_a_gpu_at_real_size(near: float, dtype: torch.dtype) -> None:
    tokens, pool = trained(dtype, near)
    pool[7] = tokens[2, 3]
    square = exact_square(tokens, pool)
    terms = tokens.double().square().sum(-1)[..., None] + pool.double().square().sum(-1)
    cost = token_cost(tokens, pool).double()
    assert ((cost.square() - square).abs() <= 1e-6 * terms).all()
    far = square >= 0.5 * terms
    assert ((cost - square.sqrt()).abs()[far] <= 1e-6 * square.sqrt()[far]).all()
    assert cost[2, 3, 7] <= 1e-3 * tokens[2, 3].double().norm()
    index = nearest_token(tokens, pool)
    chosen = square.gather(-1, index[..., None])[..., 0]
    assert (chosen <= square.min(-1).values + 1e-6 * terms.max()).all()
    exact, found = square[0].sqrt().cpu().numpy(), cost[0].cpu().numpy()
    best = exact[linear_sum_assignment(exact)].sum()
    assert exact[linear_sum_assignment(found)].sum() <= best * (1 + 1e-6)


def test_token_cost_on_a_gpu_past_two_to_the_31_entries() -> None:
    need_memory(16)
    rows = 2**31 // M + 200
    tokens = torch.randn(rows, 16, device="cuda").half()
    pool = torch.randn(M, 16, device="cuda").half()
    cost = token_cost(tokens, pool)
    for part in (slice(0, 200), slice(rows - 200, rows)):
        expected = exact_square(tokens[part], pool).sqrt()
        torch.testing.assert_close(cost[part].double(), expected, rtol=1e-6, atol=1e-3)


def test_replace_tokens_on_a_gpu_past_two_to_the_31_entries() -> None:
    need_memory(70)
    rows = 2**31 // C + 200
    embeddings = torch.zeros(rows, C, device="cuda", dtype=torch.float16).requires_grad_()
    pool = torch.randn(M, C, device="cuda", dtype=torch.float16).requires_grad_()
    where = torch.zeros(rows, dtype=torch.bool, device="cuda")
    where[-200::2] = True
    index = torch.arange(rows, device="cuda") % M
    out = replace_tokens(embeddings, where, pool, index)
    assert torch.equal(out[-200::2], pool[index[-200::2]])
    assert (out[-199::2] == 0).all()
    loss = reconstruction_loss(out, embeddings.detach(), where)
    loss.backward()
    assert pool.grad[index[-200::2]].count_nonzero() > 0
    assert (embeddings.grad[-200::2] == 0).all()


def step(dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """Everything from tokens to gradients, on operands made once."""
    tokens = clustered_tokens(3, 576, 256, device="cuda").to(dtype)
    pool = torch.randn(600, 256, device="cuda", dtype=dtype).requires_grad_()
    rows = torch.stack([torch.randperm(576)[:432] + 576 * b for b in range(3)]).cuda()
    counts = torch.tensor([432, 100, 0], device="cuda", dtype=torch.int32)
    where = torch.rand(3, 576, device="cuda") < 0.75
    target = tokens.float()

    def run() -> tuple[Tensor, ...]:
        packed = tokens.view(-1, 256)
        cost = token_cost(packed, pool, token_index=rows, num_rows=counts)
        matched = nearest_token(packed, pool, token_index=rows)
        leaf = tokens.detach().requires_grad_()
        out = replace_tokens(leaf, where, pool, matched.view(-1)[:1].expand(3, 576))
        loss = reconstruction_loss(out, target, where, num_items=counts[0])
        return cost, matched, loss.detach(), *torch.autograd.grad(loss, (leaf, pool))

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_cost_to_loss_on_a_gpu_never_waits_and_repeats_in_a_graph(
    dtype: torch.dtype,
) -> None:
    run = step(dtype)
    expected = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for one, two, three in zip(expected, again, captured, strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one, three)


def test_token_cost_and_others_on_a_gpu_compile_by_inductor() -> None:
    code = COMPILE.replace("import torch\n", "import torch\n\ntorch.set_default_device('cuda')\n")
    result = subprocess.run(
        [sys.executable, "-c", code, "inductor"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_token_cost_on_a_gpu_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    tokens, pool = torch.randn(70, 40, device="cuda:1"), torch.randn(33, 40, device="cuda:1")
    torch.testing.assert_close(token_cost(tokens, pool), torch.cdist(tokens, pool))
    assert nearest_token(tokens, pool).device == tokens.device
