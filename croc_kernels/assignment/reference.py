r"""The definition of ``linear_assignment``: SciPy's solution, and duals from nothing but that.

The problem, for n <= m (transposed otherwise), is :math:`\min \sum_{ij} c_{ij} x_{ij}` with every
row matched once and every column at most once. Its dual is :math:`\max \sum u_i + \sum v_j` with
:math:`u_i + v_j \le c_{ij}`, :math:`v \le 0`. Given an optimal matching a, complementary slackness
asks for tight matched pairs, :math:`u_i = c_{i a(i)} - v_{a(i)}`, and v = 0 on unmatched columns.
Put into the constraints:

.. math:: v_j \le v_{a(i)} + (c_{ij} - c_{i a(i)}), \qquad v_j \le 0,

so the largest such v are shortest path lengths between columns, from a source that reaches every
column at length 0. Bellman and Ford's iteration gives them; a matching is optimal if and only if
there is no negative cycle (rows could swap) and no unmatched column is reached at a negative length
(a row could move).
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def _column_duals(cost: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Largest duals (m) that are tight on the optimal ``column`` (n) of ``cost`` (n, m)."""
    n, m = cost.shape
    dual = np.zeros(m)
    length = cost - cost[np.arange(n), column][:, None]
    # A shortest path visits a row at most once; what still moves after n rounds is rounding.
    for _ in range(n):
        shorter = np.minimum(dual, (length + dual[column][:, None]).min(0))
        if np.array_equal(shorter, dual):
            break
        dual = shorter
    return dual


def _solve(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, int]:
    """Index (rows), row and column duals, gap and status of one minimisation in float64."""
    rows, columns = cost.shape
    index, u, v = np.full(rows, -1), np.zeros(rows), np.zeros(columns)
    if rows == 0 or columns == 0:
        return index, u, v, 0.0, 0
    if np.isnan(cost).any() or np.isneginf(cost).any():
        return index, u, v, np.nan, 1
    if rows > columns:
        by_column, v, u, gap, status = _solve(np.ascontiguousarray(cost.T))
        if status == 0:
            index[by_column] = np.arange(columns)
        return index, u, v, gap, status
    try:
        index = linear_sum_assignment(cost)[1]
    except ValueError:
        return index, u, v, np.nan, 2
    v = _column_duals(cost, index)
    u = (cost - v).min(1)
    free = np.ones(columns, dtype=bool)
    free[index] = False
    gap = (cost[np.arange(rows), index] - v[index] - u).sum() - v[free].sum()
    return index, u, v, float(gap), 0


def linear_assignment(
    cost: Tensor, num_rows: Tensor | None, maximize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implementation of ``linear_assignment_reference``: problem by problem, on the CPU."""
    batch, n, m = cost.shape
    index = torch.full((batch, n), -1, dtype=torch.int64)
    row_dual = torch.zeros((batch, n), dtype=torch.float64)
    column_dual = torch.zeros((batch, m), dtype=torch.float64)
    gap = torch.zeros((batch,), dtype=torch.float64)
    status = torch.zeros((batch,), dtype=torch.int32)
    costs = cost.detach().cpu().double().numpy()
    rows = [n] * batch if num_rows is None else num_rows.clamp(0, n).tolist()
    for b, used in enumerate(rows):
        problem = -costs[b, :used] if maximize else costs[b, :used]
        solution, u, v, gap[b], status[b] = _solve(problem)
        sign = -1.0 if maximize else 1.0
        index[b, :used] = torch.from_numpy(solution)
        # 0.0 + x: no negative zeros.
        row_dual[b, :used] = torch.from_numpy(0.0 + sign * u)
        column_dual[b] = torch.from_numpy(0.0 + sign * v)
    return tuple(x.to(cost.device) for x in (index, row_dual, column_dual, gap, status))
