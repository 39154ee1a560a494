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
from croc_kernels.cost import config, kernel, reference
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


def squares(cost: Tensor, metric: str) -> Tensor:
    return cost.square() if metric == "l2" else cost


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("metric", ["l2", "l2sq", "cosine"])
@pytest.mark.parametrize("m", [301, 512])
def test_token_cost_on_a_gpu_by_the_hopper_kernel(
    m: int, metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    # Ragged tiles, one or both ways, tiles without a row, rows and a pool row that are bad, twins.
    picked = []
    monkeypatch.setattr(kernel, "pick_hopper", lambda *_: picked.append(1) or config.HOPPER)
    tokens = torch.randn(900, 384, device="cuda").to(dtype)
    pool = torch.randn(m, 400, device="cuda").to(dtype)[:, 8:392]
    tokens[0], pool[299], pool[300] = 0, pool[5], pool[5]
    tokens[7, 3] = pool[11, 0] = float("nan")
    tokens[1], tokens[2] = pool[5], pool[6]
    rows = torch.randint(900, (5, 300), device="cuda")
    rows[0, :5] = torch.tensor([0, 7, 1, 2, -1])
    rows[1, 4] = 900
    counts = torch.tensor([300, 37, 0, 0, 900], device="cuda")
    options = {"token_index": rows, "num_rows": counts}
    cost = token_cost(tokens, pool, metric, **options).double()
    exact = reference.token_cost(tokens.double(), pool.double(), rows, counts, metric)
    assert torch.equal(cost.isnan(), exact.isnan())
    assert torch.equal(cost[1, 37:], torch.zeros_like(cost[1, 37:]))
    limit = 1e-6 if metric == "cosine" else 1e-6 * 2 * tokens.double().square().sum(-1).nanmean()
    difference = squares(cost, metric) - squares(exact, metric)
    assert difference.abs().nan_to_num().max() <= limit
    index = nearest_token(tokens, pool, metric, **options)
    expected = reference.nearest_token(tokens, pool, rows, counts, metric)
    assert torch.equal(index == -1, expected == -1)
    assert index[0, :5].tolist() == [expected[0, 0], -1, 5, 6, -1]
    chosen = squares(exact, metric).gather(-1, index.clamp(min=0)[..., None])[..., 0]
    best = squares(exact, metric).nan_to_num(nan=torch.inf).min(-1).values
    assert ((chosen - best)[index >= 0] <= limit).all()
    assert len(picked) == 2
    # Images apart and together: read by copies and by TMA, as are rows that all count or not.
    apart = tokens.as_strided((3, 200, 384), (384 * 250, 384, 1), 384 * 8)
    together, counts = apart.contiguous(), torch.tensor([200, 64, 0], device="cuda")
    cost, index = token_cost(together, pool, metric), nearest_token(together, pool, metric)
    assert torch.equal(token_cost(apart, pool, metric).nan_to_num(), cost.nan_to_num())
    assert torch.equal(nearest_token(apart, pool, metric), index)
    exact = reference.token_cost(together.double(), pool.double(), None, None, metric)
    assert torch.equal(cost.isnan(), exact.isnan())
    difference = squares(cost.double(), metric) - squares(exact, metric)
    assert difference.abs().nan_to_num().max() <= limit
    some = token_cost(together, pool, metric, num_rows=counts)
    live = torch.arange(200, device="cuda") < counts[:, None]
    assert torch.equal(some[live].nan_to_num(), cost[live].nan_to_num())
    assert (some[~live] == 0).all()
    some = nearest_token(together, pool, metric, num_rows=counts)
    assert torch.equal(some, torch.where(live, index, -1))
    assert len(picked) == 8


@pytest.mark.parametrize("operator", [nearest_token, token_cost])
def test_token_cost_and_nearest_token_on_a_gpu_beside_themselves(
    operator: Callable[..., Tensor],
) -> None:
    # Calls of several streams at a time, graphs among them: each has norms and counts of its own.
    pools = [torch.randn(M, 1024, device="cuda").bfloat16() for _ in range(3)]
    tokens = [torch.randn(32, 432, 1024, device="cuda").bfloat16() for _ in range(3)]
    expected = [operator(x, p) for x, p in zip(tokens, pools, strict=True)]
    streams = [torch.cuda.Stream(priority=-(i % 2)) for i in range(3)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=streams[2]):
        captured = operator(tokens[2], pools[2])
    for _ in range(20):
        found = []
        for i in range(2):
            with torch.cuda.stream(streams[i]):
                found.append(operator(tokens[i], pools[i]))
        with torch.cuda.stream(streams[2]):
            graph.replay()
        torch.cuda.synchronize()
        for got, want in zip([*found, captured], expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("gathered", [False, True], ids=["dense", "gathered"])
def test_token_cost_on_a_gpu_by_any_number_of_programs(
    gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    from croc_kernels.cost import hopper

    # Tiles share norms. Of 5 times as many programs as can run, most have not begun when others
    # look for their shares.
    monkeypatch.setattr(kernel, "pick_hopper", lambda *_: config.HOPPER)
    rows, pool = 9 * 432, torch.randn(2100, 1024, device="cuda").bfloat16()
    tokens = torch.randn(rows, 1024, device="cuda").bfloat16()
    order = torch.randperm(rows, device="cuda").view(9, 432)

    def costs(first: int = 0) -> Tensor:
        if gathered:
            return token_cost(tokens, pool, token_index=order[first:])
        return token_cost(tokens[order[first:]], pool)

    cost = costs()
    terms = tokens.double().square().sum(-1)[:, None] + pool.double().square().sum(-1)
    off = cost.double().square() - exact_square(tokens, pool)[order]
    assert (off.abs() <= 1e-6 * terms[order]).all()
    assert torch.equal(costs(4), cost[4:])
    resident = torch.cuda.get_device_properties(0).multi_processor_count
    for programs in (1, 5, 17, resident - 1, 2 * resident, 5 * resident):
        monkeypatch.setattr(hopper, "_multiprocessors", lambda _, n=programs: n)
        assert torch.equal(costs(), cost)


def test_token_cost_on_a_gpu_of_equal_rows_by_either_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = torch.randn(M, C, device="cuda").bfloat16()
    norm = pool.double().norm(dim=-1)
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(kernel, "pick_hopper", lambda *_: None)
        for tokens in (pool, pool.half()):
            itself = token_cost(tokens, pool.to(tokens.dtype)).diagonal()
            assert (itself <= 1e-3 * norm).all()


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
