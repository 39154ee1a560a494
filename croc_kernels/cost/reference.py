r"""The definition of the matching costs, in PyTorch and float64.

.. math:: C_{ij} = \lVert x_i - p_j \rVert_2, \quad C_{ij} = \lVert x_i - p_j \rVert_2^2, \quad
          C_{ij} = 1 - \frac{x_i \cdot p_j}{\lVert x_i \rVert \lVert p_j \rVert}
                 = \tfrac12 \left\lVert \frac{x_i}{\lVert x_i \rVert}
                   - \frac{p_j}{\lVert p_j \rVert} \right\rVert_2^2

Differences are taken before they are squared. The expansion |x|² + |p|² - 2 x·p, which the kernels
use, loses what the terms have in common: with sums good to a relative error e it is off by e (|x|²
+ |p|²), so the distance of equal rows comes out as up to sqrt(2 e) |x| in place of 0. The right
form of the cosine has no cancellation either; a row of norm 0 has no direction and costs 1.
Gradients flow through these functions; the public ones detach.
"""

import torch
from torch import Tensor

# Cost entries per chunk of nearest_token: 32 MiB of float64.
_CHUNK_ENTRIES = 2**22


def _distance(x: Tensor, pool: Tensor, metric: str) -> Tensor:
    """(rows, C), (M, C) float64 -> (rows, M) float64."""
    if metric == "cosine":
        x_norm, p_norm = x.norm(dim=-1, keepdim=True), pool.norm(dim=-1, keepdim=True)
        directionless = (x_norm == 0) | (p_norm == 0).T
        x = x / torch.where(x_norm == 0, 1.0, x_norm)
        pool = pool / torch.where(p_norm == 0, 1.0, p_norm)
    cost = torch.cdist(x, pool, compute_mode="donot_use_mm_for_euclid_dist")
    if metric == "l2":
        return cost
    cost = cost * cost
    if metric == "l2sq":
        return cost
    return torch.where(directionless & ~cost.isnan(), 1.0, 0.5 * cost)


def _live(shape: tuple[int, ...], num_rows: Tensor | None) -> Tensor | None:
    """(rows,) bool: the rows below their image's count."""
    if num_rows is None:
        return None
    place = torch.arange(shape[-1], device=num_rows.device)
    return (place < num_rows.reshape(-1, 1)).reshape(-1)


def _gather(
    function: str, tokens: Tensor, token_index: Tensor | None, live: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The rows of the result, (rows, C), and which of them have an index in range."""
    if token_index is None:
        return tokens.reshape(-1, tokens.shape[-1]), None
    index = token_index.reshape(-1)
    valid = (index >= 0) & (index < tokens.shape[0])
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = index[~valid if live is None else ~valid & live]
        if bad.numel() > 0:
            raise ValueError(
                f"{function}: token_index must be in [0, {tokens.shape[0]}), got {bad[0].item()}"
            )
    return tokens.index_select(0, torch.where(valid, index, 0)), valid


def token_cost(
    tokens: Tensor,
    pool: Tensor,
    token_index: Tensor | None = None,
    num_rows: Tensor | None = None,
    metric: str = "l2",
) -> Tensor:
    """Costs by the definition, float32 (float64 for float64 tokens). A bad index gives NaN."""
    shape = tuple(tokens.shape[:-1] if token_index is None else token_index.shape)
    live = _live(shape, num_rows)
    x, valid = _gather("token_cost", tokens, token_index, live)
    cost = _distance(x.double(), pool.double(), metric)
    if valid is not None:
        cost = torch.where(valid[:, None], cost, torch.nan)
    if live is not None:
        cost = torch.where(live[:, None], cost, 0.0)
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    return cost.to(dtype).reshape(*shape, pool.shape[0])


def nearest_token(
    tokens: Tensor,
    pool: Tensor,
    token_index: Tensor | None = None,
    num_rows: Tensor | None = None,
    metric: str = "l2",
) -> Tensor:
    """Lowest column of the lowest cost; -1 where no cost is finite and in rows past the count."""
    shape = tuple(tokens.shape[:-1] if token_index is None else token_index.shape)
    live = _live(shape, num_rows)
    x, valid = _gather("nearest_token", tokens, token_index, live)
    pool = pool.double()
    m = pool.shape[0]
    column = torch.arange(m, device=pool.device)
    index = torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)
    for rows in torch.arange(x.shape[0], device=x.device).split(max(1, _CHUNK_ENTRIES // m)):
        cost = _distance(x[rows].double(), pool, metric).nan_to_num(nan=torch.inf)
        best = cost.min(dim=-1, keepdim=True).values
        chosen = (cost == best) & (cost < torch.inf)
        winner = torch.where(chosen, column, m).min(dim=-1).values
        index[rows] = torch.where(winner < m, winner, -1)
    for keep in (valid, live):
        if keep is not None:
            index = torch.where(keep, index, -1)
    return index.reshape(shape)
