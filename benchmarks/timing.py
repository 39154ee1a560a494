"""Times inside pytest-benchmark: CUDA events with a cold L2, or wall time on a CPU.

A call of a few launches waits for Python, not for the device. So each call, ours and the peers', is
captured into a CUDA graph where it can be and the replay is timed; the row says which (``timing``),
why a call was not captured (``uncaptured``), what it takes as it is called (``eager_ms``), and how
long it keeps the host (``host_us``).
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARMUPS = 10
MIN_ROUNDS, MAX_ROUNDS = 20, 100
TARGET_SECONDS = 0.15  # of timed rounds per row
SLOW_SECONDS = 0.1  # calls above it are warmed up SLOW_WARMUPS times, and run SLOW_ROUNDS times
SLOW_WARMUPS, SLOW_ROUNDS = 0, 3
ENDLESS_SECONDS = 2.0  # calls above it are run once more, and their count says so
FLUSH_BYTES = 256 << 20  # several times the largest L2 (H200: 60 MB)
# Longer calls hide their launches, and a graph would keep all their memory.
CAPTURE_SECONDS = 20e-3
HOST_SECONDS = 0.02  # of rounds in which a call's time on the host is measured
MIN_HOST_ROUNDS = 10


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


def capturable_stream(device: torch.device) -> None:
    """Leave the default stream, which can't be captured, for the rest of the process: a backward
    pass runs on the stream of its forward pass.
    """
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))


def capture(call: Callable[[], object]) -> tuple[Callable[[], object], str | None]:
    """What replays ``call``, or ``call`` itself and the reason. It has run before, so that nothing
    is compiled or loaded now.
    """
    graph, reason = torch.cuda.CUDAGraph(), None
    torch.cuda.synchronize()
    graph.capture_begin()
    try:
        # Results stay alive until the capture has ended, or their memory would be used again.
        results = call()
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    try:
        graph.capture_end()
    except Exception as error:
        reason = reason or f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    if reason is None:
        del results
        return graph.replay, None
    torch.cuda.synchronize()
    return call, reason


def host_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds until a call returns, with nothing before it on the device."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return statistics.median(times)


def milliseconds_of_parts(
    parts: dict[str, Callable[[], object]], device: torch.device
) -> dict[str, float]:
    """Milliseconds of each call by itself, captured where it can be."""
    found = {}
    for name, call in parts.items():
        call()
        timed = capture(call)[0] if device.type == "cuda" else call
        found[name] = 1e3 * seconds_of(timed, device, MIN_ROUNDS)
    return found


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


def _on_cuda(
    call: Callable[[], object], device: torch.device, estimate: float, info: dict[str, object]
) -> tuple[Callable[[], object], dict[str, object]]:
    """The call to be timed, and its row with what is measured beside the time."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    peak = torch.cuda.max_memory_allocated(device) - before
    rounds = min(MAX_ROUNDS, max(MIN_HOST_ROUNDS, math.ceil(HOST_SECONDS / max(estimate, 1e-6))))
    rounds = rounds if estimate <= SLOW_SECONDS else 1
    host = host_seconds(call, device, rounds)
    row = {"peak_bytes": peak, "host_us": host * 1e6, "timing": "eager", "uncaptured": None}
    if estimate > CAPTURE_SECONDS:
        row["uncaptured"] = f"takes more than {CAPTURE_SECONDS * 1e3:.0f} ms"
    else:
        row["eager_ms"] = seconds_of(call, device, rounds) * 1e3
        call, row["uncaptured"] = capture(call)
        row["timing"] = "eager" if row["uncaptured"] else "graph"
    return call, info | row


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
    if benchmark.disabled:
        benchmark.pedantic(call)
        return
    estimate = seconds_of(call, device, 1)
    if cuda and estimate <= SLOW_SECONDS:
        estimate = seconds_of(call, device, 3)
    warmups, rounds = plan(estimate)
    if cuda:
        call, info = _on_cuda(call, device, estimate, info)
    benchmark.pedantic(call, setup=flusher(device), rounds=rounds, warmup_rounds=warmups)
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
