"""The plots: both losses over the steps, and what was masked, matched and reconstructed in some
pictures.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .probe import Probe

# Blue and vermilion of Okabe and Ito: told apart with every kind of colour vision, and in grey.
_BLUE, _VERMILION = "#0072B2", "#D55E00"
_KEPT = (0.90, 0.90, 0.90)


def _save(figure: Figure, path: Path) -> None:
    # Without pyplot: no global state, no display needed.
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over ``window`` values to each side, fewer at the ends."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    here = np.arange(len(values))
    starts, ends = np.maximum(here - window, 0), np.minimum(here + window + 1, len(values))
    return (total[ends] - total[starts]) / (ends - starts)


def plot_losses(history: Sequence[dict], path: Path) -> None:
    """Write a PNG with the curves of both losses.

    Args:
        history: Trainer's log history; entries without both losses are passed over.
        path: where the PNG goes.
    """
    logged = [entry for entry in history if "reconstruction_loss" in entry]
    steps = np.array([entry["step"] for entry in logged])
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = (
        ("caption_loss", "Caption: cross-entropy per supervised token", _BLUE),
        ("reconstruction_loss", "Reconstruction: SmoothL1 per component", _VERMILION),
    )
    for axes, (name, title, colour) in zip(figure.subplots(1, 2), panels, strict=True):
        values = np.array([entry[name] for entry in logged])
        window = len(values) // 40
        faint = {"alpha": 0.35, "linewidth": 1} if window else {"linewidth": 2}
        axes.plot(steps, values, color=colour, label="as logged", **faint)
        if window:
            label = f"mean of {2 * window + 1} logs"
            axes.plot(steps, _smooth(values, window), color=colour, linewidth=2, label=label)
        axes.set(title=title, xlabel="optimizer step", ylabel="loss")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    _save(figure, path)


def _grid(values: Tensor) -> np.ndarray:
    """(T, ...) tokens of a square image as a (side, side, ...) array, row by row."""
    array = values.numpy()
    side = int(len(array) ** 0.5)
    return array.reshape(side, side, *array.shape[1:])


def _show_masked(axes: Axes, probe: Probe) -> None:
    pixels = probe.pixels.numpy()
    masked = _grid(probe.masked)
    rows = np.arange(pixels.shape[0]) * masked.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * masked.shape[1] // pixels.shape[1]
    hidden = masked[rows][:, columns]
    axes.imshow(np.where(hidden[..., None], 0.35, pixels))


def _show_matches(axes: Axes, probe: Probe, colour_of: np.ndarray) -> None:
    """Each masked patch in its pool row's colour, with the row's number."""
    index = _grid(probe.pool_index)
    colours = matplotlib.colormaps["viridis"](colour_of[np.maximum(index, 0)])[..., :3]
    axes.imshow(np.where((index >= 0)[..., None], colours, _KEPT))
    if index.shape[0] > 12:
        return
    for (row, column), number in np.ndenumerate(index):
        if number >= 0:
            ink = "white" if colour_of[number] < 0.6 else "black"
            axes.text(column, row, str(number), ha="center", va="center", fontsize=6, color=ink)


def _show_error(axes: Axes, probe: Probe, top: float) -> object:
    error = np.ma.masked_array(_grid(probe.error), ~_grid(probe.masked))
    axes.set_facecolor(_KEPT)
    # The square root keeps small errors apart: training shrinks them by an order of magnitude.
    return axes.imshow(error, cmap="cividis", norm=PowerNorm(0.5, vmin=0, vmax=top))


def pool_colours(pool: Tensor) -> np.ndarray:
    """A number in [0, 1] per pool row, by rank along the pool's main direction: near rows get near
    colours.
    """
    rows = pool.detach().float().cpu().numpy()
    centred = rows - rows.mean(0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    ranks = np.argsort(np.argsort(centred @ direction))
    return ranks / max(1, len(ranks) - 1)


def plot_pictures(
    names: Sequence[str],
    before: Sequence[Probe],
    after: Sequence[Probe],
    pool: Tensor,
    path: Path,
) -> None:
    """Write a PNG with one row per picture: what was masked, matched, and how well it is
    reconstructed.

    Args:
        names: one per picture.
        before: probes of the untrained model, images of square token grids.
        after: probes of the trained model, with the same masks.
        pool: (M, C), the trained pool.
        path: where the PNG goes.
    """
    colour_of = pool_colours(pool)
    figure = Figure(figsize=(13, 2.75 * len(names) + 0.6), layout="constrained")
    grid = figure.subplots(len(names), 5, squeeze=False)
    titles = (
        "picture",
        "what was masked (grey)",
        "matched pool rows\n(number, and colour by similarity)",
        "error per patch\nbefore training",
        "error per patch\nafter training",
    )
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=11)
    for axes, name, old, new in zip(grid, names, before, after, strict=True):
        top = max(float(p.error[p.masked].max()) for p in (old, new))
        axes[0].imshow(old.pixels.numpy())
        axes[0].set_ylabel(name.replace("_", " "), fontsize=11)
        _show_masked(axes[1], new)
        _show_matches(axes[2], new, colour_of)
        for panel, probe in zip(axes[3:], (old, new), strict=True):
            shown = _show_error(panel, probe, top)
            panel.set_xlabel(f"mean {float(probe.error[probe.masked].mean()):.4f}", fontsize=10)
        figure.colorbar(shown, ax=axes[4], shrink=0.85, label="mean |difference|")
        for panel in axes:
            panel.set(xticks=[], yticks=[])
    _save(figure, path)
