"""The CPU solver for every instruction set that this processor has, and how much it searches.

The wheel chooses at run time, so that the slower variants run on other machines than this one.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from croc_kernels.assignment.certificate import assignment_gap
from croc_kernels.assignment.families import FAMILIES, make_costs

ROOT = Path(__file__).resolve().parent.parent
COUNTS = ("free_rows", "bids", "free_after_bids", "row_scans", "column_scans", "auction_bids")
NO_AUCTION = 1 << 30

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler: c++")

Solve = Callable[..., tuple[torch.Tensor, torch.Tensor, float, int, dict[str, int]]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("levels") / "levels.so"
    source = ROOT / "tests" / "assignment_levels.cpp"
    include = f"-I{ROOT / 'csrc' / 'assignment'}"
    flags = ["-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror"]
    subprocess.run(["c++", *flags, include, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture
def solve(library: ctypes.CDLL) -> Solve:
    def run(
        cost: torch.Tensor, level: int, rows_for_auction: int = 64
    ) -> tuple[torch.Tensor, torch.Tensor, float, int, dict[str, int]]:
        assert cost.is_contiguous()
        n, m = cost.shape
        index = torch.full((n,), -7, dtype=torch.int64)
        row_dual, column_dual = (torch.full((k,), np.nan, dtype=torch.float64) for k in (n, m))
        gap, counts = ctypes.c_double(), (ctypes.c_int64 * len(COUNTS))()
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (index, row_dual, column_dual))
        status = library.solve(
            ctypes.c_void_p(cost.data_ptr()), n, m, level, rows_for_auction, *pointers,
            ctypes.byref(gap), counts,
        )  # fmt: skip
        return index, column_dual, gap.value, status, dict(zip(COUNTS, counts, strict=True))

    return run


@pytest.mark.parametrize("level", [0, 1, 2], ids=["baseline", "avx2", "avx512"])
def test_linear_assignment_levels(library: ctypes.CDLL, solve: Solve, level: int) -> None:
    best = library.best_level()
    if level > best:
        pytest.skip(f"the processor has level {best} only")
    for family in FAMILIES:
        # 333 columns: blocks of 64, whole vectors, and a rest for every vector length.
        cost = make_costs(family, 1, 90, 333, dim=64)[0]
        for rows_for_auction in (0, NO_AUCTION):
            index, dual, gap, status, _ = solve(cost, level, rows_for_auction)
            assert status == 0
            assert gap == 0
            assert assignment_gap(cost, index, dual) == 0, family


def test_linear_assignment_auction_on_small_and_infeasible(solve: Solve) -> None:
    rng = np.random.default_rng(0)
    for seed in range(200):
        n = int(rng.integers(2, 12))
        m = n + int(rng.integers(0, 4))
        cost = rng.integers(0, 40, (n, m)).astype(np.float32)
        cost[rng.random((n, m)) < 0.4] = np.inf
        results = [solve(torch.from_numpy(cost), 2, rows) for rows in (0, NO_AUCTION)]
        assert results[0][3] == results[1][3], seed
        for index, dual, gap, status, _ in results:
            assert status in (0, 2)
            if status == 0:
                assert gap == 0
                assert assignment_gap(torch.from_numpy(cost), index, dual) == 0, seed


# What the warm start and the auction are for: shortest paths from scratch read about 80 000 rows
# for `init` and 93 000 for `product` at this shape.
LIMITS = {"init": 1500, "init_tight": 5000, "trained": 1500, "pictures": 6000, "product": 3000}


@pytest.mark.parametrize("family", LIMITS)
def test_linear_assignment_searches_little(solve: Solve, family: str) -> None:
    cost = make_costs(family, 1, 432, 2048, dim=512)[0]
    *_, status, counts = solve(cost, 2)
    assert status == 0
    assert counts["row_scans"] <= LIMITS[family], counts
    assert counts["column_scans"] <= 10 * LIMITS[family], counts
