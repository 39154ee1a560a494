"""``croc-kernels info``: versions, and per operator the backend in use and why not a better one."""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import _versions, backend, ops

PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy", "scipy")
TRITON_OPS = (
    "mixed_attention",
    "token_cost",
    "nearest_token",
    "replace_tokens",
    "reconstruction_loss",
)
# Oldest GPUs the kernels are compiled for: bf16 products need it.
MIN_CAPABILITY = (8, 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="the same content as JSON")


def version_of(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Version of the NVIDIA driver as nvidia-smi says it, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def devices() -> list[dict[str, Any]]:
    """The CPU and every CUDA device."""
    found: list[dict[str, Any]] = [
        {"name": "cpu", "model": platform.processor() or platform.machine(),
         "threads": torch.get_num_threads()}
    ]  # fmt: skip
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        found.append(
            {"name": f"cuda:{i}", "model": about.name, "capability": [about.major, about.minor],
             "memory_gib": round(about.total_memory / 2**30, 1)}
        )  # fmt: skip
    return found


def extension() -> dict[str, Any]:
    """The compiled module: where it is, and for which devices it solves assignments."""
    spec = importlib.util.find_spec("croc_kernels._C")
    return {
        "file": spec.origin if spec else None,
        "cpu": ops.ASSIGNMENT_MISSING.get("cpu") is None,
        "cuda": ops.ASSIGNMENT_MISSING.get("cuda") is None,
    }


def triton_choice(device: dict[str, Any]) -> tuple[str, str]:
    """Backend of an operator with a Triton kernel, and why it is not a faster one."""
    missing = backend.triton_missing()
    if device["name"] == "cpu":
        if not backend.interpreted():
            return "cpu", "CPU tensors: PyTorch; the Triton kernel runs on CUDA tensors"
        if missing is None:
            return "triton", "TRITON_INTERPRET is set: Triton's interpreter, for checking only"
    if missing is not None:
        return "unavailable", missing
    if tuple(device["capability"]) < MIN_CAPABILITY:
        have, want = (".".join(map(str, c)) for c in (device["capability"], MIN_CAPABILITY))
        return (
            "unavailable",
            f'compute capability must be >= {want}, got {have}; backend="reference"',
        )
    return "triton", ""


def assignment_choice(device: dict[str, Any]) -> tuple[str, str]:
    """Backend of the assignment solver, and why it is not a faster one."""
    kind = device["name"].split(":")[0]
    missing = ops.ASSIGNMENT_MISSING.get(kind)
    if missing is None:
        return "native", "C++ on the CPU" if kind == "cpu" else ""
    rebuild = f"{missing}; build it with: pip install --no-build-isolation -e ."
    return ("reference", f"SciPy: {rebuild}") if kind == "cpu" else ("unavailable", rebuild)


def transformers_faults() -> list[str]:
    """Known faults of the installed transformers that bear on this package; first, if it is out of
    range.
    """
    version = version_of("transformers")
    if version is None:
        return []
    from .integrations.faults import known_faults

    try:
        _versions.check("transformers", version, _versions.TRANSFORMERS_RANGE)
    except ImportError as error:
        return [str(error), *known_faults(version)]
    return known_faults(version)


def collect() -> dict[str, Any]:
    """Everything that ``croc-kernels info`` prints."""
    found = devices()
    operators = {
        op: {
            d["name"]: dict(zip(("backend", "reason"), triton_choice(d), strict=True))
            for d in found
        }
        for op in TRITON_OPS
    }
    operators["linear_assignment"] = {
        d["name"]: dict(zip(("backend", "reason"), assignment_choice(d), strict=True))
        for d in found
    }
    return {
        "croc_kernels": {
            "version": _versions.PACKAGE,
            "path": str(Path(__file__).resolve().parent),
        },
        "versions": {
            "python": platform.python_version(),
            **{p: version_of(p) for p in PACKAGES},
            "cuda": torch.version.cuda,
            "driver": driver_version(),
        },
        "devices": found,
        "extension": extension(),
        "operators": operators,
        "transformers_faults": transformers_faults(),
    }


def render(about: dict[str, Any]) -> str:
    """The same content for reading."""
    lines = [f"croc_kernels {about['croc_kernels']['version']}  {about['croc_kernels']['path']}"]
    lines += [f"  {name:13} {value or 'absent'}" for name, value in about["versions"].items()]
    lines.append("devices")
    for device in about["devices"]:
        rest = ", ".join(f"{k} {v}" for k, v in device.items() if k not in ("name", "model"))
        lines.append(f"  {device['name']:13} {device['model']} ({rest})")
    built = about["extension"]
    kinds = [kind.upper() for kind in ("cpu", "cuda") if built[kind]]
    lines.append(f"extension       {built['file'] or 'not built'}")
    lines.append(f"  solves on     {', '.join(kinds) or 'nothing'}")
    lines.append('operators: what backend="auto" takes')
    for op, choices in about["operators"].items():
        for name, choice in choices.items():
            reason = f"  ({choice['reason']})" if choice["reason"] else ""
            lines.append(f"  {op:20} {name:8} {choice['backend']}{reason}")
    if about["transformers_faults"]:
        lines.append("known faults of this transformers")
        lines += [f"  - {fault}" for fault in about["transformers_faults"]]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Print; 0."""
    about = collect()
    print(json.dumps(about, indent=2) if args.json else render(about))
    return 0
