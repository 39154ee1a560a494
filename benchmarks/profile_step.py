"""PyTorch profiler on one matching step: every kernel in order, its duration, the gap before it.

python -m benchmarks.profile_step [--images 32] [--kind trained] [--output FILE.md] [--trace FILE]
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from croc_kernels import CrocLayer

from . import cases
from .timing import capturable_stream, capture

WARMUPS = 5


class Kernel(NamedTuple):
    """One launch on the device; microseconds."""

    name: str
    start: float
    end: float


def short(name: str) -> str:
    """A kernel's name without its namespaces, template arguments and parameters."""
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    name = re.sub(r"^(void|static) ", "", name)
    base = re.split(r"[<(]", name, maxsplit=1)[0].split("::")[-1]
    detail = re.search(r"(\w+(?:Functor|_kernel_cuda|Op|Impl))\b", name[len(base) :])
    return f"{base} {detail[1]}" if detail and "elementwise" in base else base


def kernels_of(run: object, trace: str | None) -> list[Kernel]:
    """What the device did during one call of ``run``, in order of time."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    if trace:
        found.export_chrome_trace(trace)
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = {(e.time_range.start, e.time_range.end, e.name) for e in events}
    return [Kernel(short(name), start, end) for start, end, name in sorted(spans)]


def table(kernels: list[Kernel]) -> str:
    """Markdown: runs of one kernel in one line each, and what they add up to."""
    lines = ["| kernel | launches | µs | longest gap before, µs |", "|---|---|---|---|"]
    groups: list[list[tuple[Kernel, float]]] = []
    before = kernels[0].start
    for kernel in kernels:
        gap = max(0.0, kernel.start - before)
        before = max(before, kernel.end)
        if groups and groups[-1][0][0].name == kernel.name:
            groups[-1].append((kernel, gap))
        else:
            groups.append([(kernel, gap)])
    for group in groups:
        busy = sum(kernel.end - kernel.start for kernel, _ in group)
        longest = max(gap for _, gap in group)
        lines.append(f"| `{group[0][0].name}` | {len(group)} | {busy:.1f} | {longest:.1f} |")
    busy = sum(kernel.end - kernel.start for kernel in kernels)
    whole = before - kernels[0].start
    lines.append(f"| all | {len(kernels)} | {busy:.1f} of {whole:.1f} | |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    """Profile ``CrocLayer.replace``, captured and as called."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--kind", default="trained", choices=("init", "trained"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--trace", help="write a Chrome trace of the captured step")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    capturable_stream(device)
    case = cases.Matching("profile", arguments.images, cases.IMAGE_TOKENS, kind=arguments.kind)
    layer = CrocLayer(case.dim, case.pool_size, device=device, dtype=torch.bfloat16)
    layer.pool.copy_(case.pool(device, torch.bfloat16))
    features = 3.0 * case.tokens(device, torch.bfloat16).flatten(0, 1)
    lengths = (case.num_tokens,) * case.batch
    for _ in range(WARMUPS):
        layer.replace(features, lengths)
    replay, reason = capture(lambda: layer.replace(features, lengths))
    replay()
    parts = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: `CrocLayer.replace`, "
        f"{case.batch} images of {case.num_tokens} tokens, pool {case.pool_size} x {case.dim}, "
        f"{arguments.kind}, bfloat16."
    ]
    for title, run in (
        ("As one CUDA graph" + (f" (not captured: {reason})" if reason else ""), replay),
        ("As called", lambda: layer.replace(features, lengths)),
    ):
        kernels_of(run, None)
        found = kernels_of(run, arguments.trace if run is replay else None)
        parts.append(f"{title}:\n\n{table(found)}")
    text = "\n\n".join(parts) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
