"""Draw the newest results of each machine beside them: ``python -m benchmarks.plot [FILE ...]``."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"


def newest() -> list[Path]:
    """The last results file of each machine's folder."""
    folders = [f for f in RESULTS.iterdir() if f.is_dir()] if RESULTS.is_dir() else []
    files = [sorted(f.glob("*.json")) for f in folders]
    return [f[-1] for f in files if f]


def measure(rows: list[dict[str, Any]]) -> tuple[str, Callable[[dict[str, Any], float], float]]:
    """What is drawn of a row and a time in ms of it: speed where all rows have one, else time."""
    for key, unit in (("tflops", "TFLOP/s"), ("gbytes_per_s", "GB/s")):
        if all(row[key] for row in rows):
            return unit, lambda row, ms, key=key: row[key] * row["median_ms"] / ms
    return "ms", lambda _row, ms: ms


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A line of dots for each case, one per provider: the median, and from q20 to q80 a stroke.
    Hollow: a provider that solves an easier problem.
    """
    cases = list(dict.fromkeys(r["case"] for r in rows))
    providers = sorted({r["provider"] for r in rows}, key=lambda p: (not p.startswith("croc"), p))
    unit, value = measure(rows)
    figure, axes = plt.subplots(figsize=(9.0, 1.6 + 0.27 * len(cases)))
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    for i, provider in enumerate(providers):
        mine = [r for r in rows if r["provider"] == provider]
        color, ours = f"C{i % 10}", provider.startswith("croc")
        for row in mine:
            place, span = (
                cases.index(row["case"]),
                [value(row, row[q]) for q in ("q20_ms", "q80_ms")],
            )
            axes.plot(span, [place, place], color=color, linewidth=1.5, alpha=0.5, zorder=1)
        hollow = not all(row.get("same_problem", True) for row in mine)
        axes.scatter(
            [value(row, row["median_ms"]) for row in mine],
            [cases.index(row["case"]) for row in mine],
            s=46 if ours else 22, marker="D" if ours else "o", edgecolors=color,
            facecolors="none" if hollow else color, label=provider, zorder=3 if ours else 2,
        )  # fmt: skip
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    if unit == "ms":
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel(f"median, {unit}")
    axes.set_title(title)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(files: list[str]) -> int:
    """One PNG per op and direction of every file; 1 if there is nothing to draw."""
    paths = [Path(f) for f in files] or newest()
    if not paths:
        print(f"benchmarks.plot: no results in {RESULTS}; run: make bench", file=sys.stderr)
        return 1
    for path in paths:
        result = json.loads(path.read_text())
        about = result["machine"]
        where = about["gpu"]["name"] if about["gpu"] else about["cpu"]
        for op, direction in dict.fromkeys((r["op"], r["direction"]) for r in result["rows"]):
            rows = [r for r in result["rows"] if (r["op"], r["direction"]) == (op, direction)]
            commit = (about["commit"] or "unknown")[:10]
            target = path.with_name(f"{path.stem}-{op}-{direction.replace('+', '-')}.png")
            draw(rows, f"{op} {direction}, {where}, {commit}", target)
            print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
