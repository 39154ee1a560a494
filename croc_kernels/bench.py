"""``croc-kernels bench``: runs benchmarks/, which lives beside the package in a source checkout."""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``croc-kernels bench`` and of ``python -m benchmarks.run``."""
    parser.add_argument("-k", dest="select", default="", help="rows to run, a pytest expression")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument(
        "--seconds", type=int, help="start no row after so many; the rest is listed"
    )
    parser.add_argument("--output", type=Path, help="folder of results; default benchmarks/results")


def run(args: argparse.Namespace) -> int:
    """Run the benchmarks in the checkout; 2 where there is none."""
    if not (ROOT / "benchmarks" / "run.py").is_file():
        print(
            "croc-kernels bench: benchmarks/ must be beside the package, got an installed one; "
            "clone the repository and run: make bench",
            file=sys.stderr,
        )
        return 2
    command = [sys.executable, "-m", "benchmarks.run"]
    if args.select:
        command += ["-k", args.select]
    if args.device:
        command += ["--device", args.device]
    if args.seconds is not None:
        command += ["--seconds", str(args.seconds)]
    if args.output:
        command += ["--output", str(args.output.resolve())]
    return subprocess.run(command, cwd=ROOT, check=False).returncode
