"""The tests that touch transformers, on every version of it that the package promises: one command.

::

    python tests/matrix.py                  # all versions, one after the other, 25 minutes
    python tests/matrix.py 5.3.0 -- -k gemma3

Each version goes into a folder of its own under ``build/matrix``, with ``huggingface_hub`` and
``tokenizers`` beside it where the installed ones are out of its range; the environment stays as it
is. The last lines are the table of docs/integrations.md.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("4.57.6", "5.0.0", "5.3.0", "5.8.1", "5.17.0", "5.23.0", "5.24.0")
TESTS = ("test_transformers_*.py", "test_llava.py", "test_checkpoints.py", "test_docs_examples.py")


def install(folder: Path, *packages: str) -> None:
    """Put packages, and nothing that they need, into ``folder``."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    subprocess.run([*command, "--no-deps", "--target", str(folder), *packages], check=True)


def unmet(folder: Path) -> set[str]:
    """What the packages in ``folder`` need and neither it nor the environment has in range."""
    inside = {canonical(found.name): found for found in distributions(path=[str(folder)])}
    missing = set()
    for package in inside.values():
        for need in map(Requirement, package.requires or ()):
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            try:
                found = inside.get(canonical(need.name)) or distribution(need.name)
            except PackageNotFoundError:
                missing.add(f"{need.name}{need.specifier}")
                continue
            if not need.specifier.contains(found.version, prereleases=True):
                missing.add(f"{need.name}{need.specifier}")
    return missing


def prepare(release: str) -> Path:
    """A folder with that release and what it needs beside it, made once."""
    folder = ROOT / "build" / "matrix" / release
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        install(folder, f"transformers=={release}")
        while needs := unmet(folder):
            install(folder, *sorted(needs))
        (folder / ".ready").touch()
    return folder


def run(folder: Path, options: list[str]) -> tuple[int, str]:
    """Exit status and last line of the tests, against the transformers in ``folder``."""
    path = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    files = [str(file) for pattern in TESTS for file in sorted((ROOT / "tests").glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *files]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, text=True)
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return process.wait(), last


def row(release: str, status: int, summary: str) -> str:
    """One line of the table: counts as pytest gives them."""
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", summary)
    told = ", ".join(f"{count} {kind}" for count, kind in counts) or summary
    return f"| {release} | {'yes' if status == 0 else 'NO'} | {told} |"


def main() -> int:
    """Run the matrix; 0 if every version passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    own, options = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, options = own[:cut], own[cut + 1 :]
    rows, failed = [], False
    for release in parser.parse_args(own).versions or VERSIONS:
        print(f"\n=== transformers {release}", flush=True)
        status, summary = run(prepare(release), options or ["-m", "slow or not slow"])
        failed = failed or status != 0
        rows.append(row(release, status, summary))
    print("\n| transformers | passes | tests |\n|---|---|---|", *rows, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
