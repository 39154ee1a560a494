"""Builds csrc/assignment/*.cuh for the host and calls them: the CUDA solver, run without a GPU."""

import ctypes
import functools
import os
import pathlib
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
DEVICE_CODE = HERE.parent.parent / "csrc" / "assignment"
EMULATION = ("threads", "launches")  # .cpp
H100_SHARED = 227 * 1024  # bytes a block may have
COUNTERS = (
    "anneal_steps rounds bids reverse_rounds reverse_bids forests forest_scans forest_steps "
    "free_rows row_scans row_steps raise_rounds raise_bids released column_scans column_steps "
    "bid_time forest_time auction_time path_time raise_time release_time"
).split()
MISTAKES = (
    "divergent_barrier missing_threads missing_lanes partial_mask shared_overrun "
    "divergent_cluster missing_block late_word race cluster_race missing_wait"
).split()


@dataclass(frozen=True)
class Solution:
    """What the op returns, and how much work each phase did."""

    index: np.ndarray
    row_dual: np.ndarray
    column_dual: np.ndarray
    gap: np.ndarray
    status: np.ndarray
    counters: list[dict[str, int]]

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.index, self.row_dual, self.column_dual, self.gap, self.status


def compiler() -> str | None:
    """The host compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


# Some distributions fortify by default; a fortified longjmp refuses to jump into another stack,
# which is how fibers resume.
_FLAGS = [
    *("-std=c++17", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DCROC_EMULATION"),
    *(f"-I{HERE}", f"-I{DEVICE_CODE}"),
]


def _run_compiler(*arguments: str | pathlib.Path) -> None:
    subprocess.run([compiler() or "g++", *map(str, arguments)], check=True)


def _build(folder: pathlib.Path, sources: dict[str, list[str]], target: str, *link: str) -> None:
    """Compile ``sources``, each with flags of its own, beside each other; link them."""
    objects = [folder / f"{source}.o" for source in sources]
    with ThreadPoolExecutor() as pool:
        for done in [
            pool.submit(_run_compiler, *_FLAGS, *flags, "-c", HERE / f"{source}.cpp", "-o", out)
            for (source, flags), out in zip(sources.items(), objects, strict=True)
        ]:
            done.result()
    _run_compiler(*link, "-pthread", *objects, "-o", folder / target)


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated solver, compiled once per process."""
    strict = ["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-pthread"]
    with tempfile.TemporaryDirectory(prefix="croc-emulation-") as folder:
        sources = dict.fromkeys(("entry", *EMULATION), strict)
        _build(pathlib.Path(folder), sources, "libemulation.so", "-shared")
        loaded = ctypes.CDLL(f"{folder}/libemulation.so")
    loaded.emulate.restype = ctypes.c_char_p
    loaded.run_mistake.restype = loaded.level_ends.restype = ctypes.c_char_p
    loaded.offers.restype = ctypes.c_char_p
    loaded.workspace_bytes.restype = ctypes.c_int64
    return loaded


def _pointer(array: np.ndarray | None) -> ctypes.c_void_p | None:
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def solve(
    cost: np.ndarray,
    num_rows: np.ndarray | None = None,
    *,
    maximize: bool = False,
    seed: int = 0,
    shared_limit: int = H100_SHARED,
    blocks: int = 0,
) -> Solution:
    """Solve (B, N, M) float32 or float64 costs; ``seed`` shuffles the schedule, 0 does not.

    ``blocks`` bid for a problem as a cluster, as if it had many rows; 0: what the size asks for;
    below 0: the same where a cluster has at most ``-blocks``.

    Raises:
        RuntimeError: the emulation met something a GPU leaves undefined.
    """
    cost = np.ascontiguousarray(cost)
    batch, rows, columns = cost.shape
    # Filled with what no result contains: every entry must be written.
    index = np.full((batch, rows), 10**9, np.int64)
    row_dual, column_dual = np.full((batch, rows), 7e77), np.full((batch, columns), 7e77)
    gap, status = np.full(batch, 7e77), np.full(batch, 77, np.int32)
    counters = np.zeros((batch, len(COUNTERS)), np.int32)
    outputs = [index, row_dual, column_dual, gap, status, counters]
    error = library().emulate(
        _pointer(cost),
        int(cost.dtype == np.float64),
        batch,
        rows,
        columns,
        _pointer(num_rows),
        int(num_rows is not None and num_rows.dtype == np.int64),
        int(maximize),
        *map(_pointer, outputs),
        ctypes.c_uint64(seed),
        ctypes.c_int64(shared_limit),
        blocks,
    )
    if error:
        raise RuntimeError(error.decode())
    named = [dict(zip(COUNTERS, row, strict=True)) for row in counters.tolist()]
    return Solution(index, row_dual, column_dual, gap, status, named)


def workspace(
    batch: int, rows: int, columns: int, shared_limit: int = H100_SHARED
) -> tuple[int, int]:
    """Bytes of workspace, and the plan: groups of columns per thread, 0 without shared memory."""
    groups = ctypes.c_int()
    size = library().workspace_bytes(
        batch, rows, columns, ctypes.c_int64(shared_limit), ctypes.byref(groups)
    )
    return size, groups.value


def blocks(
    batch: int, rows: int, columns: int, shared_limit: int = H100_SHARED, most: int = 8
) -> int:
    """Blocks that bid for one problem together."""
    return library().bid_blocks(batch, rows, columns, ctypes.c_int64(shared_limit), most)


def run_mistake(name: str, seed: int = 0) -> tuple[str | None, np.ndarray]:
    """Run a kernel with a mistake in it; what the emulation says, and the kernel's output (128)."""
    out = np.zeros(128, np.int32)
    error = library().run_mistake(MISTAKES.index(name), ctypes.c_uint64(seed), _pointer(out))
    return (error.decode() if error else None), out


def level_ends(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every cost the two ends that its level gives, and the level (255: no upper end)."""
    cost = np.ascontiguousarray(cost)
    lower, upper = np.full(cost.shape, np.nan), np.full(cost.shape, np.nan)
    levels = np.zeros(cost.shape, np.int32)
    error = library().level_ends(
        _pointer(cost), int(cost.dtype == np.float64), *cost.shape,
        *map(_pointer, (lower, upper, levels)),
    )  # fmt: skip
    if error:
        raise RuntimeError(error.decode())
    return lower, upper, levels


def offers(cost: np.ndarray, row_dual: np.ndarray) -> np.ndarray:
    """By the levels of each column: least and second least reduced cost, row of the least."""
    cost = np.ascontiguousarray(cost)
    out = np.full((cost.shape[1], 3), np.nan)
    error = library().offers(
        _pointer(cost), int(cost.dtype == np.float64), *cost.shape,
        _pointer(row_dual), _pointer(out),
    )  # fmt: skip
    if error:
        raise RuntimeError(error.decode())
    return out


def racecheck(folder: pathlib.Path, mistake: str = "") -> subprocess.CompletedProcess[str]:
    """Run the solver with every device thread a thread to ThreadSanitizer, built in ``folder``.

    With ``mistake`` that kernel instead.

    Only barriers order threads, so two accesses to one address without a barrier in between are
    reported whatever the schedule. Returns the finished process; its stderr holds the reports.
    """
    program = folder / "racecheck"
    if not program.exists():
        flags = ["-O1", "-g"]
        # The emulation itself must stay invisible to the sanitizer.
        sources = {"entry": [*flags, "-fsanitize=thread"], "racecheck": flags}
        sources |= {source: [*flags, "-DCROC_RACECHECK"] for source in EMULATION}
        _build(folder, sources, program.name, "-fsanitize=thread")
    # The sanitizer's fixed addresses collide with random ones on newer kernels.
    fixed = [setarch, "-R"] if (setarch := shutil.which("setarch")) else []
    which = [str(MISTAKES.index(mistake))] if mistake else []
    command = [*fixed, str(program), *which]
    return subprocess.run(command, capture_output=True, text=True, check=False)
