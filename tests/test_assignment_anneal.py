"""The second start of problems whose first one sends many rows to the same columns, emulated."""

import numpy as np
import pytest
from cuda_emulation import emulator
from test_assignment_cuda import assert_same_bits, check, distances, make, needs_compiler

SCHEDULES = ((-1, 0), (-2, 5), (-3, 1), (-8, 3))  # at most so many blocks of a cluster, and a seed


def solve_with_all_sizes(cost: np.ndarray) -> emulator.Solution:
    """Every number of blocks and every schedule gives the same bits, and they are right."""
    first, *others = (emulator.solve(cost, blocks=blocks, seed=seed) for blocks, seed in SCHEDULES)
    assert_same_bits(first, *others)
    check(cost, first, None, False)
    return first


@needs_compiler
@pytest.mark.parametrize(
    ("family", "n", "m", "dtype"),
    [
        pytest.param("product", 272, 300, np.float32, id="product"),
        pytest.param("low_rank", 272, 272, np.float64, id="square"),
        pytest.param("low_rank", 275, 331, np.float32, id="unaligned"),
        pytest.param("two_scales", 272, 420, np.float64, id="fp64"),
    ],
)
def test_emulated_anneal_same_bits(family: str, n: int, m: int, dtype: type) -> None:
    solution = solve_with_all_sizes(make(family, n, m, 0, dtype)[None])
    assert solution.counters[0]["anneal_steps"] > 0


@needs_compiler
@pytest.mark.parametrize("m", [pytest.param(512, id="vectors"), pytest.param(301, id="unaligned")])
def test_emulated_anneal_same_bits_however_far_ahead(m: int) -> None:
    """Costs of one, two or three times a row per warp are on their way."""
    cost = make("product", 272, m, 0)[None]
    limits = (emulator.H100_SHARED, 163 * 1024, 99 * 1024)
    first, *others = (emulator.solve(cost, shared_limit=limit, seed=2) for limit in limits)
    assert_same_bits(first, *others)
    assert first.counters[0]["anneal_steps"] > 0


@needs_compiler
@pytest.mark.parametrize(
    ("m", "dtype"),
    [
        pytest.param(2100, np.float32, id="fp32"),
        pytest.param(2051, np.float64, id="unaligned-fp64"),
    ],
)
def test_emulated_anneal_wide(m: int, dtype: type) -> None:
    """More columns than a warp keeps: costs are read twice in a step."""
    cost = make("product", 272, m, 0, dtype)[None]
    first, other = (emulator.solve(cost, blocks=b, seed=s) for b, s in ((-1, 0), (-5, 2)))
    assert_same_bits(first, other)
    check(cost, first, None, False)
    assert first.counters[0]["anneal_steps"] > 0
    assert first.counters[0]["reverse_rounds"] == 0


@needs_compiler
def test_emulated_anneal_swapped_ragged() -> None:
    """Read through swapped strides, and with rows that are not looked at."""
    cost = make("product", 272, 290, 0)
    swapped = solve_with_all_sizes(cost.T[None].copy())
    assert swapped.counters[0]["anneal_steps"] > 0
    batch = np.full((2, 280, 290), np.nan, np.float32)
    batch[:, :272] = cost
    rows = np.array([272, 60], np.int64)
    ragged = emulator.solve(batch, rows, seed=1)
    check(batch, ragged, rows, False)
    alone = emulator.solve(cost[None])
    np.testing.assert_array_equal(ragged.index[0, :272], alone.index[0])
    assert [c["anneal_steps"] > 0 for c in ragged.counters] == [True, False]


@needs_compiler
@pytest.mark.parametrize("family", ["uniform", "column_offsets", "constant", "infinite"])
def test_emulated_anneal_not_for_rows_that_are_served(family: str) -> None:
    solution = emulator.solve(make(family, 280, 500, 0)[None], seed=1)
    assert solution.counters[0]["anneal_steps"] == 0


@needs_compiler
@pytest.mark.parametrize(
    "cost",
    [
        pytest.param(make("init_tight", 280, 512, 0), id="many-near-columns"),
        pytest.param(distances(280, 512, 3, trained=16), id="few-near-columns"),
    ],
)
def test_emulated_anneal_not_for_rows_that_wait_among_equals(cost: np.ndarray) -> None:
    """Half of the rows and more want columns that others want, but the next are about as near."""
    solution = emulator.solve(cost[None], seed=1)
    check(cost[None], solution, None, False)
    assert solution.counters[0]["anneal_steps"] == 0


@needs_compiler
def test_emulated_anneal_shortens_the_rest() -> None:
    """Without it these took an auction of 1 600 rounds by rows and by columns."""
    cost = make("product", 432, 2048, 0)[None]
    solution = emulator.solve(cost)
    check(cost, solution, None, False)
    counters = solution.counters[0]
    assert solution.gap[0] == 0.0
    assert counters["rounds"] < 100
    assert counters["reverse_rounds"] == 0
    assert counters["row_steps"] + counters["column_steps"] < 1500


@needs_compiler
def test_emulated_anneal_of_many_rows() -> None:
    """Where more than five ninths of them want columns that others want."""
    rng = np.random.default_rng(2)
    cost = np.outer(rng.random(280), rng.random(310)).astype(np.float32)[None]
    first, *others = (emulator.solve(cost, blocks=b, seed=s) for b, s in ((1, 0), (2, 5), (3, 1)))
    assert_same_bits(first, *others)
    check(cost, first, None, False)
    assert first.counters[0]["anneal_steps"] > 0


@needs_compiler
def test_emulated_anneal_not_for_many_rows() -> None:
    """Where fewer crowd an auction is faster; few rows in the same batch are annealed as alone."""
    cost = make("product", 272, 280, 0)[None]
    assert emulator.solve(cost, blocks=1).counters[0]["anneal_steps"] == 0
    wide = np.full((2, 1030, 1030), np.nan, np.float32)
    wide[0, :272] = make("product", 272, 1030, 0)
    wide[1] = 1.0
    rows = np.array([272, 1030])
    solution = emulator.solve(wide, rows, seed=1)
    check(wide, solution, rows, False)
    assert [c["anneal_steps"] > 0 for c in solution.counters] == [True, False]
    alone = emulator.solve(wide[:1, :272].copy())
    np.testing.assert_array_equal(solution.index[0, :272], alone.index[0])
