"""The compiled CPU solver against SciPy (and lapx) on one core, and over threads.

    python -m benchmarks.assignment_cpu --output benchmarks/results/cpu/assignment.json

Times on one core are the process's own CPU time, so that other programs on the machine count less;
times over threads are wall time. Every result is checked against SciPy's total before it is timed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from croc_kernels import linear_assignment_ex
from croc_kernels.assignment.certificate import assignment_gap
from croc_kernels.assignment.families import FAMILIES, make_costs

SHAPES = {"432x2048": (432, 2048), "2016x2048": (2016, 2048)}
ROUNDS = 9
SLOW_SECONDS = 0.5  # calls above it are timed once
LARGEST_FOR_LAPX = 1024  # rows; beyond it takes longer than all the rest together


def times(call: Callable[[], object], now: Callable[[], float], rounds: int) -> list[float]:
    """Seconds of each round, after one to warm up; a slow call is timed once."""
    measured = []
    for _ in range(rounds + 1):
        start = now()
        call()
        measured.append(now() - start)
        if measured[0] > SLOW_SECONDS:
            return measured
    return measured[1:]


def row(name: str, provider: str, seconds: list[float], **info: object) -> dict[str, object]:
    fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds
    return {
        "case": name,
        "provider": provider,
        "median_ms": 1e3 * statistics.median(seconds),
        "q20_ms": 1e3 * fifths[0],
        "q80_ms": 1e3 * fifths[-1],
        "count": len(seconds),
        **info,
    }


def one_problem(family: str, shape: str, with_lapx: bool) -> list[dict[str, object]]:
    """Rows of one family and shape: ours, SciPy, lapx; one core."""
    n, m = SHAPES[shape]
    cost = make_costs(family, 1, n, m)
    array = cost[0].numpy()
    result = linear_assignment_ex(cost, backend="native")
    gap = assignment_gap(cost, result.index, result.column_dual).item()
    start = time.process_time()
    rows, columns = linear_sum_assignment(array)
    first = time.process_time() - start
    exact = array.astype(np.float64)
    excess = exact[np.arange(n), result.index[0].numpy()].sum() - exact[rows, columns].sum()
    if result.status.item() != 0 or abs(excess) > 1e-12 * np.abs(exact).max() * n:
        raise RuntimeError(f"assignment_cpu: {family} {shape} must be optimal, got {excess:+.1e}")
    name = f"{family}-{shape}"
    peers: dict[str, Callable[[], object]] = {
        "croc": lambda: linear_assignment_ex(cost, backend="native"),
        "scipy": lambda: linear_sum_assignment(array),
    }
    if with_lapx and n <= LARGEST_FOR_LAPX:
        import lap

        peers["lapx lapjv"] = lambda: lap.lapjv(array, extend_cost=True)
        peers["lapx lapjvr"] = lambda: lap.lapjvr(array, extend_cost=True)
    # The check of a slow case has timed SciPy already.
    seconds = {"scipy": [first]} if first > SLOW_SECONDS else {}
    for who, call in peers.items():
        if who not in seconds:
            seconds[who] = times(call, time.process_time, ROUNDS)
    ratio = statistics.median(seconds["scipy"]) / statistics.median(seconds["croc"])
    info = {"certificate_gap": gap, "cost_minus_scipy": excess, "scipy_over_croc": ratio}
    print(
        name,
        f"x{ratio:.1f}",
        {who: f"{1e3 * min(s):.2f} ms" for who, s in seconds.items()},
        flush=True,
    )
    return [row(name, who, s, **(info if who == "croc" else {})) for who, s in seconds.items()]


def over_threads(batch: int) -> list[dict[str, object]]:
    """A batch at the start of training on 1, 2, 4 … cores and all of them: wall time, and the
    threads' own CPU time.

    On a machine with other work the wall time says little; CPU time shows whether more threads do
    more work in sum, which is what would keep the speed-up from being the number of threads.
    """
    cost = make_costs("init", batch, 432, 2048)
    rows = []
    cores = os.cpu_count() or 1
    for threads in sorted({cores, *(2**k for k in range(cores.bit_length()))}):
        torch.set_num_threads(threads)

        def call() -> object:
            return linear_assignment_ex(cost, backend="native")

        name = f"init-432x2048-B{batch}"
        cpu = statistics.median(times(call, time.process_time, ROUNDS))
        seconds = times(call, time.perf_counter, ROUNDS)
        rows.append(row(name, f"croc, {threads} threads", seconds, cpu_ms=1e3 * cpu))
        wall = 1e3 * min(seconds)
        print(f"B={batch}, {threads} threads: {wall:.1f} ms, CPU {1e3 * cpu:.1f} ms", flush=True)
    torch.set_num_threads(1)
    return rows


def environment() -> dict[str, object]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    versions = {p: importlib.metadata.version(p) for p in ("torch", "scipy", "numpy")}
    if importlib.util.find_spec("lap"):
        versions["lapx"] = importlib.metadata.version("lapx")
    return {
        "machine": f"{os.cpu_count()}-core {platform.machine()} CPU",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": versions,
        "absent": [] if "lapx" in versions else ["lapx"],
        "commit": os.environ.get("CROC_COMMIT") or git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "csrc", "croc_kernels/assignment")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=16, help="problems for the runs over threads")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = environment()
    results: list[dict[str, object]] = []

    def store(rows: list[dict[str, object]]) -> None:
        # After every family: slow peers take minutes, and an interrupted run keeps its rows.
        results.extend(rows)
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"environment": about, "rows": results}, indent=1)
            arguments.output.write_text(text + "\n")

    for shape in arguments.shapes:
        for family in arguments.families:
            store(one_problem(family, shape, "lapx" in about["versions"]))
    if arguments.batch:
        store(over_threads(arguments.batch))


if __name__ == "__main__":
    main()
