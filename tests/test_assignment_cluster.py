"""Problems with many rows, for which the blocks of a cluster bid together: in the emulation."""

import numpy as np
import pytest
import torch
from cuda_emulation import emulator
from test_assignment_cuda import FAMILIES, assert_same_bits, check, make, needs_compiler

import croc_kernels as ck

SCHEDULES = ((1, 0), (2, 0), (2, 5), (3, 1), (4, 2), (8, 0), (8, 3))  # blocks, seed


def solve_with_all_sizes(cost: np.ndarray) -> emulator.Solution:
    """Every number of blocks and every schedule gives the same bits by the same work."""
    first, *others = (emulator.solve(cost, blocks=blocks, seed=seed) for blocks, seed in SCHEDULES)
    assert_same_bits(first, *others)
    for other in others:
        for a, b in zip(first.counters, other.counters, strict=True):
            assert {k: x for k, x in a.items() if "time" not in k} == {
                k: x for k, x in b.items() if "time" not in k
            }
    check(cost, first, None, False)
    return first


@needs_compiler
@pytest.mark.parametrize(
    ("family", "n", "m", "swapped"),
    [
        pytest.param("product", 150, 210, False, id="product"),
        pytest.param("two_scales", 70, 100, False, id="two_scales"),
        pytest.param("two_scales", 70, 100, True, id="swapped"),
        pytest.param("product", 140, 1030, False, id="lists"),
    ],
)
def test_emulated_cluster_same_bits(family: str, n: int, m: int, swapped: bool) -> None:
    """In runs with bids, auction, offers of columns and the reverse pass."""
    cost = make(family, n, m, 0)
    solution = solve_with_all_sizes((cost.T if swapped else cost)[None])
    for phase in ("rounds", "reverse_rounds", "raise_rounds", "column_scans"):
        assert solution.counters[0][phase] > 0, phase


@needs_compiler
@pytest.mark.parametrize("family", FAMILIES)
def test_emulated_cluster_families(family: str) -> None:
    cost = np.stack([make(family, 70, 100, seed) for seed in range(2)])
    for costs in (cost, cost.astype(np.float64) * (1 + 2.0**-40), cost.transpose(0, 2, 1)):
        check(costs, emulator.solve(costs, blocks=3, seed=1), None, False)


@needs_compiler
def test_emulated_cluster_ragged_status() -> None:
    """Problems that end early, have no rows, or are read through swapped strides."""
    cost = np.random.default_rng(5).random((5, 60, 40), dtype=np.float32)
    cost[3, 0, 0] = np.nan
    num_rows = np.array([0, 30, 60, 60, 41])
    first, *others = (emulator.solve(cost, num_rows, blocks=b, seed=b) for b in (1, 2, 8))
    assert first.status.tolist() == [0, 0, 0, 1, 0]
    check(cost, first, num_rows, False)
    assert_same_bits(first, *others)


@needs_compiler
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_levels_enclose_costs(family: str, dtype: type) -> None:
    cost = make(family, 37, 70, 0, dtype)
    if family == "denormal":
        cost = cost * dtype(1e-280 if dtype is np.float64 else 1.0)
    lower, upper, levels = emulator.level_ends(cost)
    assert (lower <= cost).all()
    finite = np.isfinite(cost)
    assert (levels[finite] < 255).all()
    assert (levels[~finite] == 255).all()
    assert (cost[finite] <= upper[finite]).all()
    if family != "denormal":  # whose costs are few steps apart
        high = np.where(finite, cost, -np.inf).max(0)
        width = (high - np.where(finite, cost, np.inf).min(0)) / 250
        assert (
            (upper - lower)[finite] <= (width + np.spacing(np.abs(cost)) * finite)[finite]
        ).all()


@needs_compiler
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("rows", [1, 37, 2100])
@pytest.mark.parametrize("family", FAMILIES)
def test_offers_by_levels_are_exact(family: str, rows: int, dtype: type) -> None:
    """Levels only dismiss: what a column offers is what all of its costs give."""
    cost = make(family, rows, 9, 0, dtype)
    rng = np.random.default_rng(1)
    least = np.where(np.isfinite(cost), cost, np.inf).min(1).astype(np.float64)
    least = np.where(np.isfinite(least), least, 0.0)
    spread = np.ptp(least) + 2.0**-10 * np.abs(least).max()
    for dual in (
        least + spread * rng.standard_normal(rows),  # within the costs' range
        least + 2.0**-30 * spread * rng.standard_normal(rows),  # and nearly all alike
        np.where(rng.random(rows) < 0.5, 0.0, 2.0**-149 * rng.random(rows)),
        -100.0 * spread * rng.random(rows),
    ):
        found = emulator.offers(cost, np.ascontiguousarray(dual))
        reduced = cost.astype(np.float64) - dual[:, None]
        two = np.sort(np.vstack([reduced, np.full((1, 9), np.inf)]), 0)[:2]
        np.testing.assert_array_equal(found[:, 0], two[0])
        np.testing.assert_array_equal(found[:, 1], two[1])
        finite = np.isfinite(two[0])
        np.testing.assert_array_equal(found[finite, 2], reduced.argmin(0)[finite])


@needs_compiler
def test_plan_of_blocks() -> None:
    """At most as many blocks as an H100 has, for large problems whose state fits into a block."""
    blocks = {b: emulator.blocks(b, 2016, 2048) for b in (1, 16, 17, 32, 33, 64, 65, 200)}
    assert blocks == {1: 8, 16: 8, 17: 7, 32: 4, 33: 3, 64: 2, 65: 1, 200: 1}
    assert [emulator.blocks(4, n, 2048) for n in (432, 1023, 1024)] == [1, 1, 8]
    assert emulator.blocks(4, 2016, 2048, most=1) == 1
    assert emulator.blocks(4, 8192, 8192) == 1


def large_costs(batch: int) -> torch.Tensor:
    """Problems whose rows keep competing: half of the pool is far away."""
    rows = torch.rand(batch, 1100, 3, generator=torch.Generator().manual_seed(3))
    columns = torch.rand(batch, 3, 1200, generator=torch.Generator().manual_seed(4))
    return rows @ columns


@pytest.mark.gpu
def test_device_large_whatever_the_batch() -> None:
    """Clusters of 8, 4, 2 blocks and none give the same bits."""
    cost = large_costs(70).cuda()
    together = ck.linear_assignment_ex(cost)
    assert (together.status == 0).all()
    for batch in (1, 20, 40):
        some = ck.linear_assignment_ex(cost[:batch])
        for a, b in zip(
            (some.index, some.row_dual, some.column_dual, some.gap),
            (together.index, together.row_dual, together.column_dual, together.gap),
            strict=True,
        ):
            assert torch.equal(a, b[:batch])
    first = emulator.Solution(
        *(x[:1].cpu().numpy() for x in (together.index, together.row_dual, together.column_dual)),
        *(x[:1].cpu().numpy() for x in (together.gap, together.status)),
        counters=[],
    )
    check(cost[:1].cpu().numpy(), first, None, False)


@pytest.mark.gpu
def test_device_large_in_a_graph() -> None:
    costs = large_costs(3).cuda()
    buffer = costs[:1].clone()
    ck.linear_assignment_ex(buffer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ck.linear_assignment_ex(buffer)
    for b in range(3):
        buffer.copy_(costs[b : b + 1])
        graph.replay()
        assert torch.equal(captured.index, ck.linear_assignment_ex(costs[b : b + 1]).index)
