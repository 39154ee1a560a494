"""The CUDA solver: in the emulation of tests/cuda_emulation, and for real where there is a GPU."""

import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cuda_emulation import emulator
from scipy.optimize import linear_sum_assignment

import croc_kernels as ck
from croc_kernels.testing import clustered_tokens

needs_compiler = pytest.mark.skipif(emulator.compiler() is None, reason="needs g++ (or CXX)")
EPS = 2.0**-52
# State in registers and shared memory, and in the workspace, as for sizes beyond shared memory.
SHARED = [
    pytest.param(emulator.H100_SHARED, id="shared"),
    pytest.param(0, id="workspace"),
]


def distances(n: int, m: int, seed: int, *, trained: int = 0, noise: float = 0.6) -> np.ndarray:
    """Distances of clustered tokens to a pool whose first ``trained`` rows are near tokens."""
    dim = 256
    tokens = clustered_tokens(1, n, dim, clusters=12, noise=noise / dim**0.5 * 4, seed=seed)[0]
    pool = torch.randn(m, dim, generator=torch.Generator().manual_seed(seed + 1))
    near = tokens[torch.arange(trained) % max(n, 1)] + 0.04 * pool[:trained]
    pool[:trained] = near / near.norm(dim=1, keepdim=True)
    return torch.cdist(tokens.double(), pool.double()).float().numpy()


def infinite(n: int, m: int, rng: np.random.Generator) -> np.ndarray:
    cost = np.where(rng.random((n, m)) < 0.5, np.inf, rng.random((n, m)))
    np.fill_diagonal(cost, 2.0)  # one matching that is always allowed
    return cost


FAMILIES: dict[str, Callable[[int, int, np.random.Generator], np.ndarray]] = {
    "uniform": lambda n, m, rng: rng.random((n, m)),
    "init": lambda n, m, rng: distances(n, m, int(rng.integers(99))),
    "init_tight": lambda n, m, rng: distances(n, m, int(rng.integers(99)), noise=0.1),
    "trained": lambda n, m, rng: distances(n, m, int(rng.integers(99)), trained=m),
    "two_scales": lambda n, m, rng: distances(n, m, int(rng.integers(99)), trained=m // 4),
    "few_integers": lambda n, m, rng: rng.integers(0, 4, (n, m)),
    "constant": lambda n, m, rng: np.full((n, m), 3.25),
    "equal_rows": lambda n, m, rng: rng.random((4, m))[rng.integers(0, 4, n)],
    "equal_columns": lambda n, m, rng: rng.random((n, 4))[:, rng.integers(0, 4, m)],
    "column_offsets": lambda n, m, rng: rng.random((1, m)) + 1e-3 * rng.random((n, m)),
    "low_rank": lambda n, m, rng: rng.random((n, 3)) @ rng.random((3, m)),
    "product": lambda n, m, rng: np.outer(np.arange(1.0, n + 1), np.arange(1.0, m + 1)) / 7,
    "offset_1e6": lambda n, m, rng: rng.random((n, m)) + 1e6,
    "negative": lambda n, m, rng: -100 * rng.random((n, m)) - 1000 * rng.random((1, m)),
    "wide_range": lambda n, m, rng: np.exp(8 * rng.standard_normal((n, m))),
    "denormal": lambda n, m, rng: 1e-42 * rng.random((n, m)),
    "huge": lambda n, m, rng: 1e37 * rng.random((n, m)),
    "infinite": infinite,
}


def make(family: str, n: int, m: int, seed: int, dtype: type = np.float32) -> np.ndarray:
    return np.ascontiguousarray(
        FAMILIES[family](n, m, np.random.default_rng(seed)), dtype=np.float32
    ).astype(dtype)


def check_one(
    cost: np.ndarray, index: np.ndarray, u: np.ndarray, v: np.ndarray, gap: float, status: int
) -> None:
    """One minimisation against SciPy: same total, feasible duals that prove it, full size."""
    if np.isnan(cost).any() or np.isneginf(cost).any():
        expected = 1
    else:
        try:
            rows, columns = linear_sum_assignment(cost)
            expected = 0
        except ValueError:
            expected = 2
    assert status == expected
    if status != 0:
        assert np.isnan(gap)
        assert (index == -1).all()
        return
    finite = np.abs(cost[np.isfinite(cost)])
    tolerance = 4 * max(cost.shape) * EPS * (finite.max() if finite.size else 0.0)
    used = np.flatnonzero(index >= 0)
    assert len(used) == min(cost.shape) == len(set(index[used]))
    total, best = cost[used, index[used]].sum(), cost[rows, columns].sum()
    assert abs(total - best) <= tolerance
    assert 0.0 <= gap <= tolerance
    assert (u[:, None] + v[None] <= cost + tolerance).all()
    assert abs(u.sum() + v.sum() - best) <= tolerance


def check(
    cost: np.ndarray, solution: emulator.Solution, num_rows: np.ndarray | None, maximize: bool
) -> None:
    sign = -1.0 if maximize else 1.0
    for b, problem in enumerate(cost.astype(np.float64)):
        used = len(problem) if num_rows is None else min(max(int(num_rows[b]), 0), len(problem))
        assert (solution.index[b, used:] == -1).all()
        assert (solution.row_dual[b, used:] == 0).all()
        if min(used, cost.shape[2]) == 0:
            assert solution.status[b] == 0
            assert solution.gap[b] == 0
            continue
        check_one(
            sign * problem[:used],
            solution.index[b, :used],
            sign * solution.row_dual[b, :used],
            sign * solution.column_dual[b],
            float(solution.gap[b]),
            int(solution.status[b]),
        )


def assert_same_bits(first: emulator.Solution, *others: emulator.Solution) -> None:
    for other in others:
        for a, b in zip(first.arrays(), other.arrays(), strict=True):
            np.testing.assert_array_equal(a, b)


def solve_and_check(
    cost: np.ndarray,
    num_rows: np.ndarray | None = None,
    *,
    maximize: bool = False,
    seeds: tuple[int, ...] = (0, 1),
    shared_limit: int = emulator.H100_SHARED,
) -> emulator.Solution:
    """Every schedule of threads gives the same bits, and they are right."""
    first, *others = (
        emulator.solve(cost, num_rows, maximize=maximize, seed=seed, shared_limit=shared_limit)
        for seed in seeds
    )
    assert_same_bits(first, *others)
    check(cost, first, num_rows, maximize)
    return first


@needs_compiler
@pytest.mark.parametrize("shared_limit", SHARED)
@pytest.mark.parametrize("family", FAMILIES)
def test_emulated_families(family: str, shared_limit: int) -> None:
    cost = np.stack([make(family, 40, 68, seed) for seed in range(2)])
    solve_and_check(cost, shared_limit=shared_limit)
    solve_and_check(
        cost[:1].astype(np.float64) * (1 + 2.0**-40), shared_limit=shared_limit, seeds=(2,)
    )


@needs_compiler
@pytest.mark.parametrize("shared_limit", SHARED)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 7), (7, 1), (2, 2), (5, 5), (33, 33), (32, 33), (33, 32), (70, 31), (3, 130),
     (130, 3), (0, 5), (5, 0), (0, 0)],
)  # fmt: skip
def test_emulated_shapes(shape: tuple[int, int], shared_limit: int) -> None:
    cost = np.random.default_rng(3).random((2, *shape), dtype=np.float32)
    solve_and_check(cost, shared_limit=shared_limit)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "shared_limit"),
    [((60, 3001), emulator.H100_SHARED), ((60, 3000), 0), ((20, 8300), emulator.H100_SHARED)],
    ids=["registers", "registers-workspace", "all-in-workspace"],
)
def test_emulated_many_columns(shape: tuple[int, int], shared_limit: int) -> None:
    """Every way of keeping a search's nodes; offsets make the paths and the reverse pass work."""
    cost = make("column_offsets", *shape, 5)[None]
    solution = solve_and_check(cost, seeds=(0, 3), shared_limit=shared_limit)
    assert solution.counters[0]["row_scans"] > 0
    solve_and_check(cost.astype(np.float64) * (1 + 2.0**-40), seeds=(1,), shared_limit=shared_limit)


@needs_compiler
def test_emulated_small_random() -> None:
    rng = np.random.default_rng(11)
    for _ in range(25):
        n, m, batch = rng.integers(1, 9), rng.integers(1, 9), rng.integers(1, 9)
        cost = rng.integers(-3, 4, (batch, n, m)).astype(rng.choice([np.float32, np.float64]))
        cost[rng.random(cost.shape) < 0.1] = rng.choice([np.inf, 0.5])
        num_rows = rng.integers(-1, n + 2, batch).astype(rng.choice([np.int32, np.int64]))
        solve_and_check(cost, num_rows, seeds=(int(rng.integers(1, 1 << 40)),))


@needs_compiler
@pytest.mark.parametrize("columns", [24, 9], ids=["wide", "narrow"])
def test_emulated_ragged_maximize(columns: int) -> None:
    rng = np.random.default_rng(5)
    cost = rng.standard_normal((6, 17, columns)).astype(np.float32)
    cost[:, 12:] = np.nan  # rows beyond num_rows are not looked at
    num_rows = np.array([0, 1, 5, 9, 10, 12], np.int64)
    ragged = solve_and_check(cost, num_rows, maximize=True)
    alone = emulator.solve(cost[3:4, :9], maximize=True)
    np.testing.assert_array_equal(ragged.index[3, :9], alone.index[0])
    np.testing.assert_array_equal(ragged.column_dual[3], alone.column_dual[0])


@needs_compiler
def test_emulated_status() -> None:
    rng = np.random.default_rng(7)
    cost = rng.random((6, 20, 30)).astype(np.float32)
    cost[0, 3, 4] = np.nan
    cost[1, 3, 4] = -np.inf
    cost[2, 3] = np.inf  # a row without a column
    cost[3, :, 7:] = np.inf  # 20 rows for 7 columns
    cost[4, 3, 4] = np.inf  # harmless
    solution = solve_and_check(cost)
    assert solution.status.tolist() == [1, 1, 2, 2, 0, 0]
    assert emulator.solve(cost, maximize=True).status.tolist() == [1, 0, 1, 1, 1, 0]


@needs_compiler
def test_emulated_no_overflow() -> None:
    """Differences of these costs are beyond float64; their optimum is not."""
    rng = np.random.default_rng(9)
    cost = np.clip(rng.standard_normal((2, 20, 30)) * 1e308, -1.5e308, 1.5e308)
    solution = emulator.solve(cost)
    assert solution.status.tolist() == [0, 0]
    for problem, index in zip(cost / 2**10, solution.index, strict=True):
        rows, columns = linear_sum_assignment(problem)
        assert problem[rows, index].sum() == pytest.approx(problem[rows, columns].sum(), rel=1e-14)


@needs_compiler
def test_emulated_batch_does_not_matter() -> None:
    cost = np.stack([make(f, 40, 72, 1) for f in ("init", "uniform", "equal_rows", "trained")])
    together = emulator.solve(cost)
    for b in range(len(cost)):
        alone = emulator.solve(cost[b : b + 1], seed=b)
        for x, y in zip(together.arrays(), alone.arrays(), strict=True):
            np.testing.assert_array_equal(x[b], y[0])


@needs_compiler
@pytest.mark.parametrize(
    ("family", "phase"), [("two_scales", "forests"), ("product", "reverse_rounds")]
)
def test_emulated_rows_that_keep_competing(family: str, phase: str) -> None:
    """Families that bids alone do not match reach forests, then the auction, and come out exact."""
    solution = solve_and_check(make(family, 200, 400, 0)[None], seeds=(0, 3))
    assert solution.counters[0]["forests"] > 0
    assert solution.counters[0][phase] > 0


@needs_compiler
def test_emulated_overfull_cluster() -> None:
    """Far more rows than near columns: one forest prices the columns, 80 rounds of bids do not."""
    rng = np.random.default_rng(8)
    centres = np.eye(8)
    rows = centres[rng.choice(8, 200, p=[0.65] + [0.05] * 7)] + 0.1 * rng.standard_normal((200, 8))
    columns = centres[rng.integers(0, 8, 400)] + 0.1 * rng.standard_normal((400, 8))
    cost = np.linalg.norm(rows[:, None] - columns, axis=-1).astype(np.float32)
    solution = solve_and_check(cost[None], seeds=(0, 3))
    assert 0 < solution.counters[0]["forests"] < 10
    assert solution.counters[0]["row_scans"] < 1000
    solve_and_check(cost[None], shared_limit=0, seeds=(1,))
    solve_and_check(cost.T[None].copy(), seeds=(2,))


@needs_compiler
def test_emulated_training_size() -> None:
    """All rows want the same columns: a solver without a warm start scans 80 000 rows here."""
    solution = solve_and_check(make("init", 432, 2048, 0)[None], seeds=(4,))
    assert solution.gap[0] == 0.0
    assert solution.counters[0]["row_scans"] < 4000
    equal = solve_and_check(make("equal_rows", 432, 2048, 0)[None], seeds=(0,))
    assert equal.counters[0]["row_scans"] < 4000


@needs_compiler
def test_emulated_certificate_sees_worse_matching() -> None:
    cost = make("uniform", 20, 40, 0).astype(np.float64)
    solution = emulator.solve(cost[None])
    index, v = solution.index[0].copy(), solution.column_dual[0]
    index[[0, 1]] = index[[1, 0]]
    u = (cost - v).min(1)
    free = np.setdiff1d(np.arange(40), index)
    assert (cost[np.arange(20), index] - v[index] - u).sum() - v[free].sum() > 1e-6


@needs_compiler
def test_workspace_is_below_half_of_the_costs() -> None:
    for rows, columns in [(432, 2048), (2016, 2048), (547, 2048), (8192, 8192), (2048, 8192)]:
        size, _ = emulator.workspace(4, rows, columns)
        assert size < 4 * rows * columns * 4 / 2
    assert [emulator.workspace(1, 432, m)[1] for m in (2048, 4096, 8192, 16384)] == [1, 4, 4, 0]


@needs_compiler
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("divergent_barrier", "divergent threads"),
        ("missing_threads", "threads wait"),
        ("missing_lanes", "threads wait"),
        ("partial_mask", "all lanes"),
        ("shared_overrun", "shared memory"),
        ("divergent_cluster", "divergent blocks"),
        ("missing_block", "blocks wait"),
        ("late_word", "has ended"),
        ("missing_wait", "nobody has waited for"),
    ],
)
def test_emulation_notices(mistake: str, message: str) -> None:
    for seed in (0, 1, 2):
        assert message in (emulator.run_mistake(mistake, seed)[0] or "")


@needs_compiler
def test_emulation_shows_a_race() -> None:
    for mistake in ("race", "cluster_race"):
        outcomes = {emulator.run_mistake(mistake, seed)[1].tobytes() for seed in range(8)}
        assert len(outcomes) > 1


@needs_compiler
def test_emulated_racecheck(tmp_path: pathlib.Path) -> None:
    """No two threads of a block touch one address without a barrier in between."""
    for which in ("race", "cluster_race"):
        mistake = emulator.racecheck(tmp_path, which)
        if "FATAL: ThreadSanitizer" in mistake.stderr:
            pytest.skip(f"ThreadSanitizer does not run here: {mistake.stderr.strip()[:200]}")
        assert "data race" in mistake.stderr
    result = emulator.racecheck(tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


@functools.cache
def device_families() -> torch.Tensor:
    return torch.stack([torch.from_numpy(make(f, 90, 256, 0)) for f in FAMILIES])


def device_check(
    cost: torch.Tensor, num_rows: torch.Tensor | None = None, maximize: bool = False
) -> None:
    result = ck.linear_assignment_ex(cost, num_rows=num_rows, maximize=maximize)
    arrays = (result.index, result.row_dual, result.column_dual, result.gap, result.status)
    solution = emulator.Solution(*(x.cpu().numpy() for x in arrays), counters=[])
    rows = None if num_rows is None else num_rows.cpu().numpy()
    check(cost.cpu().numpy(), solution, rows, maximize)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("maximize", [False, True], ids=["min", "max"])
def test_device_families(dtype: torch.dtype, maximize: bool) -> None:
    cost = device_families().to("cuda", dtype)
    device_check(-cost if maximize else cost, maximize=maximize)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [(0, 4, 6), (1, 1, 1), (133, 20, 33), (3, 1, 257), (3, 257, 1), (2, 65, 65), (2, 300, 90),
     (2, 0, 5), (2, 5, 0), (1, 432, 2048), (1, 300, 5000), (1, 50, 8192), (1, 64, 20000)],
)  # fmt: skip
def test_device_shapes(shape: tuple[int, ...]) -> None:
    device_check(torch.rand(shape, generator=torch.Generator().manual_seed(1)).cuda())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "family", ["init", "init_tight", "trained", "two_scales", "product", "equal_rows"]
)
def test_device_training_size(family: str) -> None:
    cost = torch.from_numpy(np.stack([make(family, 432, 2048, seed) for seed in range(2)])).cuda()
    device_check(cost)
    if family == "init":
        assert (ck.linear_assignment_ex(cost).gap == 0).all()


@pytest.mark.gpu
def test_device_ragged_strided_status() -> None:
    cost = torch.rand(5, 40, 60, generator=torch.Generator().manual_seed(2)).cuda()
    num_rows = torch.tensor([0, 1, 17, 39, 40], device="cuda")
    device_check(cost.transpose(1, 2).contiguous().transpose(1, 2), num_rows)
    device_check(cost.transpose(1, 2), num_rows)
    device_check(cost[:1, :, 1:].expand(5, -1, -1), num_rows.int())
    cost[0, 0, 0], cost[1, 0], cost[2, 0, 0] = torch.nan, torch.inf, -torch.inf
    assert ck.linear_assignment_ex(cost).status.tolist() == [1, 2, 1, 0, 0]


@pytest.mark.gpu
def test_device_equals_emulation(tmp_path: pathlib.Path) -> None:
    """Same phases, same ties: what the emulation proves holds for the device."""
    cost = np.stack(
        [make(f, 60, 96, 0) for f in ("uniform", "few_integers", "equal_rows", "product")]
    )
    result = ck.linear_assignment_ex(torch.from_numpy(cost).cuda())
    # In a process of its own: fibers in one that runs CUDA ended it without a word.
    code = (
        "import faulthandler, json, sys; faulthandler.enable(); import numpy as np; "
        "from cuda_emulation import emulator; cost = np.load(sys.argv[1]); "
        "print(json.dumps(emulator.solve(cost).index.tolist()))"
    )
    np.save(tmp_path / "cost.npy", cost)
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cost.npy")],
        cwd=pathlib.Path(__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert result.index.tolist() == json.loads(run.stdout)


@pytest.mark.gpu
def test_device_deterministic_whatever_the_batch() -> None:
    cost = device_families().cuda()
    together = ck.linear_assignment_ex(cost)
    again = ck.linear_assignment_ex(cost)
    assert torch.equal(together.index, again.index)
    for b in range(0, len(cost), 5):
        alone = ck.linear_assignment_ex(cost[b : b + 1])
        assert torch.equal(together.index[b], alone.index[0])
        assert torch.equal(together.column_dual[b], alone.column_dual[0])


@pytest.mark.gpu
def test_device_graph_replay_side_stream_no_sync() -> None:
    costs = [torch.from_numpy(make("init", 100, 300, s))[None].cuda() for s in range(3)]
    buffer = costs[0].clone()
    ck.linear_assignment_ex(buffer)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            on_stream = ck.linear_assignment_ex(costs[1]).index
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ck.linear_assignment_ex(buffer)
    for cost in costs:
        buffer.copy_(cost)
        graph.replay()
        assert torch.equal(captured.index, ck.linear_assignment_ex(cost).index)
        assert (captured.status == 0).all()
    stream.synchronize()
    assert torch.equal(on_stream, ck.linear_assignment_ex(costs[1]).index)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_second_device() -> None:
    device_check(device_families().to("cuda:1"))
    assert torch.cuda.current_device() == 0
