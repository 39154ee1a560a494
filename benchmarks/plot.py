"""Draw the newest results of each machine beside them: ``python -m benchmarks.plot [FILE ...]``."""

import json
import sys
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


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Grouped bars: cases along x, one bar per provider, median with the span of q20 to q80."""
    cases = list(dict.fromkeys(r["case"] for r in rows))
    providers = sorted({r["provider"] for r in rows}, key=lambda p: (not p.startswith("croc"), p))
    width = 0.8 / len(providers)
    figure, axes = plt.subplots(figsize=(max(6.0, 1.3 * len(cases) + 2), 4.0))
    for i, provider in enumerate(providers):
        mine = {r["case"]: r for r in rows if r["provider"] == provider}
        shown = [(x, mine[c]) for x, c in enumerate(cases) if c in mine]
        medians = [r["median_ms"] for _, r in shown]
        below = [r["median_ms"] - r["q20_ms"] for _, r in shown]
        above = [r["q80_ms"] - r["median_ms"] for _, r in shown]
        axes.bar(
            [x + (i - (len(providers) - 1) / 2) * width for x, _ in shown],
            medians,
            width,
            yerr=[below, above],
            label=provider,
            capsize=2,
        )
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right")
    axes.set_yscale("log")
    axes.set_ylabel("median time, ms (log)")
    axes.set_title(title)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
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
