"""How long attention keeps the host where nothing is captured: ``python -m benchmarks.host``.

Ours and compiled FlexAttention in turns, call by call, so that what else the machine does reaches
both: microseconds until a call returns with nothing before it on the device (``host``), from a
CUDA event before the call to one after it behind a flush of the L2 (``eager``), and per layer of a
chain of calls, each of which reads the one before (``chain``). One JSON line per case, direction
and provider; medians and fastest fifths.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from . import cases, peers, run, timing
from .test_mixed_attention import CROC, _inputs, _timed

# Short ones, which wait for the host.
CASES = (
    "B1-640", "B4-640", "B4-640-padded", "B32-128", "hd64-B32-128", "hd64-B16-512",
    "hd256-B32-128",
)  # fmt: skip
LAYERS = 12
WARMUPS = 20


def _in_turns(
    calls: dict[str, Callable[[], object]], seconds: Callable[[Callable[[], object]], float],
    rounds: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            times[name].append(1e6 * seconds(calls[name]))
    return {
        name: {"median": round(statistics.median(x), 1), "q20": round(sorted(x)[len(x) // 5], 1)}
        for name, x in times.items()
    }


def _chain(call: Callable, qkv: list[Tensor]) -> Tensor:
    x = qkv[0]
    for _ in range(LAYERS):
        x = call(x, *qkv[1:])
    return x


def _layers(call: Callable, qkv: list[Tensor], direction: str) -> float:
    """Seconds per layer until the chain's calls have returned."""
    out = _chain(call, qkv) if direction == "bwd" else None
    torch.cuda.synchronize()
    start = time.perf_counter()
    if direction == "fwd":
        _chain(call, qkv)
    else:
        torch.autograd.grad(out, qkv, out.detach())
    return (time.perf_counter() - start) / LAYERS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=240)
    args = parser.parse_args()
    device = torch.device("cuda")
    timing.capturable_stream(device)
    print(json.dumps({"machine": run.machine("cuda"), "rounds": args.rounds}))
    both = [CROC, *(peer for peer in peers.ATTENTION if peer.name == "flex")]
    known = {case.name: case for case in (*cases.ATTENTION_GPU, *cases.ATTENTION_LENGTHS)}

    for name in args.cases:
        case = known[name]
        prepared = {peer.name: peer.prepare(case, device) for peer in both}
        qkv, grad = _inputs(case, device)
        for direction in ("fwd", "bwd"):
            calls = {n: _timed(call, qkv, grad, direction) for n, call in prepared.items()}
            chains = {
                n: functools.partial(_layers, call, qkv, direction) for n, call in prepared.items()
            }
            for call in calls.values():
                for _ in range(WARMUPS):
                    call()
            found = {
                "host": _in_turns(
                    calls, lambda call: timing.host_seconds(call, device, 1), args.rounds
                ),
                "eager": _in_turns(
                    calls, lambda call: timing.seconds_of(call, device, 1), args.rounds
                ),
                "chain": _in_turns(chains, lambda call: call(), max(3, args.rounds // 6)),
            }
            for n in prepared:
                row = {"case": name, "direction": direction, "provider": n}
                print(json.dumps(row | {k: x[n] for k, x in found.items()}), flush=True)


if __name__ == "__main__":
    main()
