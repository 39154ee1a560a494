"""Rows with the same costs, which bid as one, and price wars: the CUDA solver in the emulation."""

import numpy as np
import pytest
from cuda_emulation import emulator
from test_assignment_cuda import assert_same_bits, check, needs_compiler

SCHEDULES = ((0, 0), (0, 1), (1, 0), (2, 3), (3, 0), (8, 5))  # blocks (0: by one), seed


def solve(
    cost: np.ndarray, num_rows: np.ndarray | None = None, *, maximize: bool = False
) -> list[emulator.Solution]:
    """With few rows and with many, by several schedules: equal bits, and right."""
    solutions = [
        emulator.solve(cost, num_rows, maximize=maximize, blocks=blocks, seed=seed)
        for blocks, seed in SCHEDULES
    ]
    few, many = solutions[:2], solutions[2:]
    for same in (few, many):
        assert_same_bits(*same)
        check(cost, same[0], num_rows, maximize)
    return [few[0], many[0]]


def copies(rng: np.random.Generator, n: int, m: int, kinds: int, distinct: int = 0) -> np.ndarray:
    """(1, n, m) uniform costs of so many kinds of rows; ``distinct``: small integers instead."""
    rows = rng.integers(0, distinct, (kinds, m)) if distinct else rng.random((kinds, m))
    return rows[rng.integers(0, kinds, n)].astype(np.float32)[None]


@needs_compiler
@pytest.mark.parametrize(
    ("n", "m", "kinds"), [(200, 210, 5), (200, 1100, 2), (150, 2100, 3), (96, 96, 1)]
)
def test_copies_bid_as_one(n: int, m: int, kinds: int) -> None:
    """Each for itself one copy wins per round; as one nearly all do in the first rounds."""
    for solution in solve(copies(np.random.default_rng(n), n, m, kinds)):
        assert solution.gap[0] == 0
        counters = solution.counters[0]
        assert counters["rounds"] <= 30
        assert counters["bids"] <= 6 * n
        assert counters["forests"] + counters["reverse_rounds"] <= 2


@needs_compiler
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("distinct", [0, 3, 40], ids=["uniform", "3", "40"])
def test_copies_among_others(distinct: int, dtype: type) -> None:
    """Copies, pairs and rows without a copy; ties; forbidden pairs; every size of num_rows."""
    rng = np.random.default_rng(distinct)
    n, m = 90, 110
    cost = np.concatenate([copies(rng, n, m, kinds, distinct) for kinds in (2, 30, 88)])
    cost[0, rng.random(n) < 0.4] += rng.integers(0, 9, m)
    cost[1:, :, rng.random(m) < 0.1] = np.inf
    for _ in range(2):
        solve(cost.astype(dtype), rng.integers(1, n + 1, len(cost)).astype(np.int32))
    negative = np.where(np.isinf(cost), 0, -cost).astype(dtype)
    solve(negative, maximize=True)
    solve(np.ascontiguousarray(cost.transpose(0, 2, 1)).astype(dtype))  # the columns are alike


@needs_compiler
def test_copies_with_few_columns_to_choose_from() -> None:
    """A kind may have one column more than free rows, as many, or one less: no matching then."""
    rng = np.random.default_rng(0)
    cost = rng.random((3, 40, 64)).astype(np.float32)
    for problem, columns in enumerate((21, 20, 19)):
        cost[problem, :20] = cost[problem, 0]
        cost[problem, :20, columns:] = np.inf
    few, many = solve(cost)
    assert few.status.tolist() == many.status.tolist() == [0, 0, 2]


@needs_compiler
def test_copies_whose_nearest_columns_lie_late() -> None:
    """Beyond the columns that are chosen from at once, and on both sides of their end."""
    cost = copies(np.random.default_rng(1), 60, 4200, 2)
    cost[:, :, 2030:2070] -= 0.5
    cost[:, ::2, 4100:] -= 1.0
    for solution in solve(cost):
        assert solution.counters[0]["rounds"] <= 30


@needs_compiler
@pytest.mark.parametrize("m", [1024, 128])
def test_kinds_whose_costs_are_multiples(m: int) -> None:
    """Twice the costs differ by one bit each: their rows must not count as the first kind's."""
    costs = np.random.default_rng(2).random(m) * np.array([1, 2, 4, 0.5, 3])[:, None]
    cost = costs[np.arange(60) % 5].astype(np.float32)[None]
    for solution in solve(cost):
        assert solution.counters[0]["bids"] <= 180
        assert solution.counters[0]["forests"] == 0


@needs_compiler
def test_copies_in_every_phase() -> None:
    """Kinds of five rows that keep competing, by clusters of any size; the second are auctioned."""
    rng = np.random.default_rng(1)
    even, uneven = np.arange(30)[:, None] + 1.0, rng.random((30, 1))
    costs = even * (np.arange(160) + 1.0), uneven * rng.random((1, 160))
    cost = np.stack([kinds[np.arange(150) % 30].astype(np.float32) for kinds in costs])
    for solution in solve(cost / np.float32(7)):
        first, second = solution.counters
        for phase in ("rounds", "forests", "raise_rounds", "column_scans"):
            assert first[phase] > 0, phase
        assert second["reverse_rounds"] > 0


@needs_compiler
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_larger_epsilons_end_price_wars(seed: int) -> None:
    """More rows than columns of their cluster: all its prices rise to what the next one costs."""
    rng = np.random.default_rng(seed)
    far = rng.random((4, 4))
    np.fill_diagonal(far, 0)
    rows = rng.choice(4, 120, p=rng.dirichlet(np.full(4, 0.7)))
    cost = far[rows][:, np.arange(126) % 4] + 1e-4 * rng.random((120, 126))
    cost = cost.astype(np.float32)[None]
    solution = emulator.solve(cost, blocks=1)
    check(cost, solution, None, False)
    assert solution.counters[0]["bids"] < 70_000  # epsilon as it was: 103 000 to 117 000
    assert_same_bits(solution, emulator.solve(cost, blocks=3, seed=1))
