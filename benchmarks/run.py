"""Run the benchmarks that fit this machine and store them: ``python -m benchmarks.run``.

Results go to ``<output>/<gpu or cpu>/<date>-<commit>.json``: the machine, every row with its
median, quantiles, count, TFLOP/s or GB/s and share of the measured roofline, and what was absent or
failed, with the reason.
"""

import argparse
import collections
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from croc_kernels import bench

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "triton", "transformers", "numpy", "scipy", "flash-attn", "flash-attn-4",
            "torch-linear-assignment", "lapx", "pytest-benchmark")  # fmt: skip
GPU_QUERY = (
    "name,driver_version,vbios_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "power.limit,power.draw,temperature.gpu,memory.total"
)


def output_of(*command: str) -> str:
    """Stdout of a command, empty if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def version_of(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def gpu_state() -> dict[str, str]:
    """What nvidia-smi says about the GPU in use: name, driver, clocks, power."""
    used = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    line = output_of("nvidia-smi", "-i", used, f"--query-gpu={GPU_QUERY}", "--format=csv,noheader")
    values = [v.strip() for v in line.split(",")]
    return dict(zip(GPU_QUERY.split(","), values, strict=True)) if line else {}


def machine(device: str) -> dict[str, Any]:
    """Everything a reader needs to judge the numbers."""
    # Named from outside where the history that lies here is another one.
    named = os.environ.get("CROC_COMMIT")
    commit = None if named else output_of("git", "rev-parse", "HEAD")
    return {
        "device": device,
        "gpu": gpu_state() if device == "cuda" else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": {p: version_of(p) for p in PACKAGES},
        "commit": commit or named or None,
        "dirty": bool(output_of("git", "status", "--porcelain")) if commit else None,
    }


def run_rows(device: str, select: str, seconds: int | None, path: Path) -> int:
    """Run pytest-benchmark, which adds to ``path`` row by row; its exit status."""
    options = "-q --no-header -p no:cacheprovider -W ignore --benchmark-columns=median,iqr,rounds"
    command = [sys.executable, "-m", "pytest", str(HERE), *options.split()]
    command += [f"--device={device}", f"--results={path}"]
    if seconds is not None:
        command.append(f"--seconds={seconds}")
    if select:
        command += ["-k", select]
    process = subprocess.Popen(command, cwd=HERE.parent)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        print("benchmarks.run: stopped; what was measured is stored", file=sys.stderr)
        return 130


def read_results(path: Path) -> dict[str, Any]:
    """Ceiling, rows, and what is absent or failed, from the lines that conftest.py wrote."""
    result: dict[str, Any] = {"ceiling": None, "rows": [], "absent": [], "failed": []}
    for line in path.read_text().splitlines() if path.is_file() else ():
        ((kind, value),) = json.loads(line).items()
        if kind == "ceiling":
            result["ceiling"] = value
        else:
            result["rows" if kind == "row" else kind].append(value)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """A short table: per op, case and direction the time of each provider, ours first."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["case"], row["direction"]), []).append(row)
    lines = []
    for (op, case, direction), members in groups.items():
        members.sort(key=lambda r: (not r["provider"].startswith("croc"), r["median_ms"]))
        times = "  ".join(f"{m['provider']} {m['median_ms']:.3f}" for m in members)
        lines.append(f"{op:20} {case:18} {direction:8} ms: {times}")
    return "\n".join(lines)


def main() -> int:
    """Run, store, print; 1 if a row failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0])
    bench.add_arguments(parser)
    args = parser.parse_args()
    if importlib.util.find_spec("pytest_benchmark") is None:
        parser.error("pytest-benchmark must be installed: pip install pytest-benchmark")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    about = machine(device)
    # Stopped from outside, as by `timeout`, counts as interrupted by hand.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        status = run_rows(device, args.select, args.seconds, Path(folder) / "results.jsonl")
        measured = read_results(Path(folder) / "results.jsonl")
    about["gpu_after"] = gpu_state() if device == "cuda" else None
    rows, failed = measured["rows"], measured["failed"]
    name = about["gpu"].get("name", "gpu") if about["gpu"] else "cpu"
    folder = (args.output or HERE / "results") / re.sub(r"[^a-z0-9]+", "-", name.lower())
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d-%H%M")
    path = folder / f"{date}-{(about['commit'] or 'unknown')[:10]}.json"
    path.write_text(json.dumps({"machine": about, **measured}, indent=1) + "\n")
    print(table(rows))
    absent = collections.Counter(row["reason"] for row in measured["absent"])
    for reason, count in absent.items():
        print(f"absent: {reason} ({count} rows)")
    for row in failed:
        print(f"failed: {row['row']}: {row['reason']}")
    print(f"{len(rows)} rows, {len(failed)} failed; written to {path}")
    return 1 if failed or status not in (0, 5) else 0


if __name__ == "__main__":
    sys.exit(main())
