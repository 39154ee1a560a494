"""Times inside pytest-benchmark: CUDA events with a cold L2, or wall time on a CPU."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARMUPS = 25
MIN_ROUNDS, MAX_ROUNDS = 20, 100
TARGET_SECONDS = 0.3  # of timed rounds per row
SLOW_SECONDS = 0.1  # calls above it are warmed up SLOW_WARMUPS times, and run SLOW_ROUNDS times
SLOW_WARMUPS, SLOW_ROUNDS = 1, 5
ENDLESS_SECONDS = 2.0  # calls above it are run once more, and their count says so
FLUSH_BYTES = 256 << 20  # several times the largest L2 (H200: 60 MB)


class CudaMark:
    """An instant on the current stream; subtracting one waits and gives seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "CudaMark") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock(device: torch.device) -> Callable[[], Any]:
    """What pytest-benchmark calls before and after each round."""
    return CudaMark if device.type == "cuda" else time.perf_counter


def flusher(device: torch.device) -> Callable[[], None] | None:
    """A call that evicts the L2 before every round; it also hides the next launch's latency."""
    if device.type != "cuda":
        return None
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def flush() -> None:
        buffer.zero_()

    return flush


@dataclass(frozen=True)
class Work:
    """What one call has to do at least, for TFLOP/s, GB/s and the share of the roofline."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Ceiling:
    """What this machine reached in this run: a large product, and a device-to-device copy."""

    flops_per_s: float
    bytes_per_s: float

    def share(self, work: Work, seconds: float) -> float:
        """Fraction of the roofline: the time the ceilings allow over the time taken."""
        return max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s) / seconds


def seconds_of(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds of a call, cold L2."""
    mark, flush = clock(device), flusher(device)
    times = []
    for _ in range(rounds):
        if flush:
            flush()
        start = mark()
        call()
        times.append(mark() - start)
    return statistics.median(times)


def measure_ceiling(device: torch.device) -> Ceiling:
    """A bf16 (CPU: float32) matrix product, and a copy counting bytes read and written."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.empty(1 << (32 if cuda else 27), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        torch.mm(a, b)
        target.copy_(source)
    return Ceiling(
        flops_per_s=2.0 * size**3 / seconds_of(lambda: torch.mm(a, b), device, 20),
        bytes_per_s=2.0 * source.numel() / seconds_of(lambda: target.copy_(source), device, 20),
    )


def plan(estimate: float) -> tuple[int, int]:
    """Warm-ups and timed rounds for a call of so many seconds."""
    if estimate > ENDLESS_SECONDS:
        return 0, 1
    if estimate > SLOW_SECONDS:
        return SLOW_WARMUPS, SLOW_ROUNDS
    rounds = math.ceil(TARGET_SECONDS / max(estimate, 1e-6))
    return WARMUPS, min(MAX_ROUNDS, max(MIN_ROUNDS, rounds))


def measure(
    benchmark: Any,
    call: Callable[[], object],
    device: torch.device,
    ceiling: Ceiling,
    work: Work,
    **info: object,
) -> None:
    """Time ``call`` with the benchmark fixture and attach the row that run.py stores.

    Args:
        benchmark: pytest-benchmark's fixture, its timer set to :func:`clock` by conftest.py.
        call: does the work once, on the current stream.
        device: where it runs.
        ceiling: of this run.
        work: FLOP and bytes of one call.
        **info: op, case, provider, direction, dtype, error.
    """
    cuda = device.type == "cuda"
    call()
    estimate = seconds_of(call, device, 3 if cuda else 1)
    warmups, rounds = plan(estimate)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        info["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    benchmark.pedantic(
        call,
        setup=flusher(device),
        rounds=rounds,
        warmup_rounds=warmups,
    )
    if benchmark.disabled:
        return
    times = sorted(benchmark.stats.stats.data)
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times
    median = statistics.median(times)
    benchmark.extra_info.update(
        info,
        median_ms=median * 1e3,
        q20_ms=fifths[0] * 1e3,
        q80_ms=fifths[-1] * 1e3,
        count=len(times),
        warmups=warmups,
        tflops=work.flops / median / 1e12 if work.flops else None,
        gbytes_per_s=work.bytes / median / 1e9 if work.bytes else None,
        roofline_percent=100.0 * ceiling.share(work, median) if work.flops or work.bytes else None,
    )
