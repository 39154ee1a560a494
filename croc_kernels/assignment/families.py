"""Families of cost matrices: what training gives, and what solvers find hard. For tests and timing.

The first group are distances between visual tokens and pool rows. At the start of training every
pool row is a random vector of norm about sqrt(C) and every token has norm 1: a cost is the norm of
the pool row plus little, so all rows want the same columns. Later the pool is near the tokens.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CLUSTERS = 40
"""Directions that the tokens of one image gather around."""


@dataclass(frozen=True)
class Case:
    """What a family makes costs for."""

    rng: np.random.Generator
    """Of this problem alone: a problem is the same whatever the batch around it."""
    pool_seed: tuple[int, int]
    """The same for all problems: they share a pool, as the images of a training step do."""
    n: int
    m: int
    dim: int
    device: torch.device


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _distances(tokens: np.ndarray, pool: np.ndarray, device: torch.device) -> Tensor:
    """(N, M) float32 distances, computed in float64 on ``device``."""
    x, p = (torch.from_numpy(a).to(device).double() for a in (tokens, pool))
    squares = x.square().sum(1)[:, None] + p.square().sum(1) - 2 * x @ p.T
    return squares.clamp(min=0).sqrt().float()


def _near(
    rng: np.random.Generator, centres: np.ndarray, pick: np.ndarray, noise: float
) -> np.ndarray:
    return _unit(centres[pick] + noise * _unit(_normal(rng, len(pick), centres.shape[1])))


def _tokens(case: Case, noise: float) -> np.ndarray:
    """(N, C) unit tokens in clusters of uneven sizes; the clusters are shared, as the world is."""
    centres = _unit(_normal(np.random.default_rng(17), CLUSTERS, case.dim))
    share = case.rng.dirichlet(np.full(CLUSTERS, 0.7))
    return _near(case.rng, centres, case.rng.choice(CLUSTERS, case.n, p=share), noise)


def _trained_rows(
    rng: np.random.Generator, count: int, dim: int, noise: float, norm_noise: float
) -> np.ndarray:
    """Pool rows that have come near the clusters, with norms about 1."""
    centres = _unit(_normal(np.random.default_rng(17), CLUSTERS, dim))
    pick = rng.integers(0, CLUSTERS, count)
    norms = 1 + norm_noise * _normal(rng, count, 1)
    return _near(rng, centres, pick, noise) * norms


# A pool takes longer to draw than the tokens of many problems.
@functools.lru_cache(maxsize=1)
def _random_pool(seed: tuple[int, int], m: int, dim: int) -> np.ndarray:
    return _normal(np.random.default_rng(seed), m, dim)


@functools.lru_cache(maxsize=1)
def _trained_pool(
    seed: tuple[int, int], m: int, dim: int, noise: float, norm_noise: float
) -> np.ndarray:
    return _trained_rows(np.random.default_rng(seed), m, dim, noise, norm_noise)


@functools.lru_cache(maxsize=1)
def _skew_pool(seed: tuple[int, int], m: int, dim: int) -> np.ndarray:
    """A quarter of the pool has been trained, the rest is as it was: two scales."""
    rng = np.random.default_rng(seed)
    pool = _normal(rng, m, dim)
    quarter = m // 4
    pool[:quarter] = _trained_rows(rng, quarter, dim, 0.6, 0.05)
    return pool


def _init(noise: float) -> Callable[[Case], Tensor]:
    def make(case: Case) -> Tensor:
        pool = _random_pool(case.pool_seed, case.m, case.dim)
        return _distances(_tokens(case, noise), pool, case.device)

    return make


def _trained(noise: float, norm_noise: float) -> Callable[[Case], Tensor]:
    def make(case: Case) -> Tensor:
        pool = _trained_pool(case.pool_seed, case.m, case.dim, noise, norm_noise)
        return _distances(_tokens(case, noise), pool, case.device)

    return make


def _trained_skew(case: Case) -> Tensor:
    pool = _skew_pool(case.pool_seed, case.m, case.dim)
    return _distances(_tokens(case, 0.6), pool, case.device)


PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left", "retina", "ihc")
PATCH = 14


def _photograph(name: str) -> np.ndarray:
    """(H, W, 3) float32 in 0 to 1, from the files inside the scikit-image package."""
    try:
        from skimage import data, io
    except ImportError as error:
        raise RuntimeError(
            "make_costs: family 'pictures' must find scikit-image, got none; "
            "install it with: pip install scikit-image"
        ) from error
    from pathlib import Path

    folder = Path(data.__file__).parent
    file = next((p for p in sorted(folder.glob(f"{name}.*")) if p.suffix in (".png", ".jpg")), None)
    if file is None:
        raise RuntimeError(
            f"make_costs: family 'pictures' must find {name}.png or .jpg in {folder}, got neither"
        )
    return io.imread(file)[..., :3].astype(np.float32) / 255


def _pictures(case: Case) -> Tensor:
    """Patches of a photograph, on a grid fine enough for N, randomly projected to unit tokens."""
    image = _photograph(PHOTOGRAPHS[int(case.rng.integers(len(PHOTOGRAPHS)))])
    side = int(np.ceil(np.sqrt(case.n / 0.75)))
    rows, columns = (np.linspace(0, s - PATCH, side).astype(int) for s in image.shape[:2])
    patches = np.stack(
        [image[y : y + PATCH, x : x + PATCH].reshape(-1) for y in rows for x in columns]
    )
    chosen = case.rng.permutation(len(patches))[: case.n]
    projection = _normal(np.random.default_rng(23), patches.shape[1], case.dim)
    tokens = _unit((patches[np.sort(chosen)] - 0.5) @ projection + 1e-3)
    return _distances(tokens, _random_pool(case.pool_seed, case.m, case.dim), case.device)


def _plain(make: Callable[[np.random.Generator, int, int], np.ndarray]) -> Callable[[Case], Tensor]:
    def make_tensor(case: Case) -> Tensor:
        values = make(case.rng, case.n, case.m).astype(np.float32)
        return torch.from_numpy(np.ascontiguousarray(values)).to(case.device)

    return make_tensor


def _dup_rows(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    return rng.random((min(8, n), m))[rng.integers(0, min(8, n), n)]


def _dup_columns(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    few = max(1, m // 16)
    return rng.random((n, few))[:, rng.integers(0, few, m)]


def _product(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    return np.outer(np.arange(1, n + 1), np.arange(1, m + 1)) / n


def _geom(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    a, b = rng.random((n, 1, 2)), rng.random((1, m, 2))
    return np.sqrt(((a - b) ** 2).sum(-1))


FAMILIES: dict[str, Callable[[Case], Tensor]] = {
    "uniform": _plain(lambda rng, n, m: rng.random((n, m))),
    "init": _init(0.6),
    "init_tight": _init(0.15),
    "trained": _trained(0.6, 0.05),
    "trained_tight": _trained(0.15, 0.02),
    "trained_skew": _trained_skew,
    "pictures": _pictures,
    "lowrank": _plain(lambda rng, n, m: rng.random((n, 3)) @ rng.random((3, m))),
    "product": _plain(_product),
    "coloff": _plain(lambda rng, n, m: rng.random((1, m)) + 1e-3 * rng.random((n, m))),
    "dup_rows": _plain(_dup_rows),
    "dup_columns": _plain(_dup_columns),
    "ints": _plain(lambda rng, n, m: rng.integers(0, 100, (n, m))),
    "const": _plain(lambda rng, n, m: np.full((n, m), 3.25)),
    "offset": _plain(lambda rng, n, m: rng.random((n, m)) + 1e4),
    "geom": _plain(_geom),
}
"""Name of a family to the maker of one problem's costs."""


def make_costs(
    family: str,
    batch: int,
    n: int,
    m: int,
    *,
    seed: int = 0,
    dim: int = 4096,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Costs of a family, the same on every machine up to rounding of the distances.

    Args:
        family: a key of :data:`FAMILIES`.
        batch: number of problems B. Problem b depends on ``seed`` and b only.
        n: rows.
        m: columns.
        seed: another seed gives other costs.
        dim: C of the tokens and the pool, where the family has them.
        device: where distances are computed and the result lies.

    Returns:
        (B, N, M) float32.

    Raises:
        ValueError: the family is unknown.
        RuntimeError: ``pictures`` without scikit-image.
    """
    if family not in FAMILIES:
        raise ValueError(f"make_costs: family must be one of {tuple(FAMILIES)}, got {family!r}")
    where = torch.device(device)
    costs = torch.empty((batch, n, m), device=where)
    stream = torch.cuda.current_stream(where) if where.type == "cuda" else None

    def make(b: int) -> None:
        case = Case(np.random.default_rng((seed, 1, b)), (seed, 0), n, m, dim, where)
        with torch.cuda.stream(stream):
            costs[b] = FAMILIES[family](case)

    for b in range(min(batch, 1)):
        make(b)  # alone: it draws the pool, which the others share
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(make, range(1, batch)))
    return costs
