"""Proof that an assignment is optimal, or a bound on how far it is from that."""

import torch
from torch import Tensor

from ..checks import INTEGERS, check_device, check_dtype, check_rank, check_shape, check_tensor

COST_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
LARGEST_INTEGER = 2**53


def exact_float(cost: Tensor) -> Tensor:
    """The same numbers as float32 or float64; NaN for integers that float64 can't hold."""
    if cost.dtype in (torch.float32, torch.float64):
        return cost
    if cost.dtype == torch.int32:
        return cost.double()
    if cost.dtype == torch.int64:
        held = (cost >= -LARGEST_INTEGER) & (cost <= LARGEST_INTEGER)
        return torch.where(held, cost.double(), torch.nan)
    return cost.float()


def check_cost(function: str, cost: Tensor, num_rows: Tensor | None) -> None:
    """Raise unless ``cost`` is ([B,] N, M) of a known dtype and ``num_rows`` is (B,) integers."""
    check_tensor(function, "cost", cost)
    check_dtype(function, "cost", cost, COST_DTYPES)
    check_rank(function, "cost", cost, "([B,] N, M)", (2, 3))
    if num_rows is not None:
        check_tensor(function, "num_rows", num_rows)
        check_dtype(function, "num_rows", num_rows, INTEGERS)
        batch = cost.shape[0] if cost.dim() == 3 else 1
        check_shape(function, "num_rows", num_rows, (batch,), "(B,)")
        check_device(function, "num_rows", num_rows, "cost", cost)


def _is_matching(index: Tensor, used: Tensor, m: int) -> Tensor:
    """(B,) bool: min(rows, M) of the used rows have a column each, all different."""
    batch, n = index.shape
    taken = index >= 0
    rows = torch.arange(n, device=index.device) < used  # (1 | B, N)
    counts = torch.zeros((batch, m + 1), dtype=torch.int32, device=index.device)
    # Column M collects the rows without one.
    column = torch.where(taken, index, m).clamp(0, m)
    counts.scatter_add_(1, column, torch.ones_like(column, dtype=torch.int32))
    inside = (index < m) & (index >= -1) & (rows | ~taken)
    complete = taken.sum(1, keepdim=True) == used.clamp(max=m)
    return inside.all(1) & complete[:, 0] & (counts[:, :m] <= 1).all(1)


def assignment_gap(
    cost: Tensor,
    index: Tensor,
    column_dual: Tensor,
    *,
    maximize: bool = False,
    num_rows: Tensor | None = None,
) -> Tensor:
    r"""Upper bound on (total cost of ``index``) - (the least possible), from column duals alone.

    With :math:`u_i = \min_j (c_{ij} - v_j)` every (u, v) satisfies :math:`u_i + v_j \le c_{ij}`,
    and if duals of rows or columns that may stay unmatched are :math:`\le 0`, then :math:`\sum u +
    \sum v` is at most the least total cost (weak duality). The gap is the difference, as a sum of
    terms that are all at least 0:

    .. math::
        \sum_{i \text{ matched}} (c_{i a(i)} - u_i - v_{a(i)})
        - \sum_{i \text{ free}} u_i - \sum_{j \text{ free}} v_j

    It is 0 for an optimal assignment with optimal duals and positive for any worse assignment,
    whatever the duals: nothing about how they were computed has to be trusted. One pass over the
    costs in float64, on their device, without waiting for it; takes float64 memory for one copy of
    the costs unless it is compiled.

    Args:
        cost: ([B,] N, M), as given to ``linear_assignment``.
        index: ([B,] N) int64, the column of each row, -1 for rows that stay free.
        column_dual: ([B,] M) float64, as in ``linear_assignment_ex(...).column_dual``; any numbers
            are allowed.
        maximize: as given to ``linear_assignment``.
        num_rows: (B,) int32 or int64, or None, as given to ``linear_assignment``.

    Returns:
        (B,) float64 (0-dimensional for a cost of rank 2): the gap, or inf where ``index`` matches
        no min(rows, M) rows with different columns, uses a forbidden pair, or a cost or dual is
        NaN.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes or devices disagree.
    """
    function = "assignment_gap"
    check_cost(function, cost, num_rows)
    check_tensor(function, "index", index)
    check_dtype(function, "index", index, (torch.int64,))
    check_shape(function, "index", index, cost.shape[:-1], "([B,] N)")
    check_tensor(function, "column_dual", column_dual)
    check_dtype(function, "column_dual", column_dual, (torch.float64,))
    shape = (*cost.shape[:-2], cost.shape[-1])
    check_shape(function, "column_dual", column_dual, shape, "([B,] M)")
    for name, tensor in (("index", index), ("column_dual", column_dual)):
        check_device(function, name, tensor, "cost", cost)
    c, v = exact_float(cost), column_dual
    if maximize:
        c, v = -c, -v
    if cost.dim() == 2:
        return _gap(c[None], index[None], v[None], num_rows)[0]
    return _gap(c, index, v, num_rows)


def _gap(c: Tensor, index: Tensor, v: Tensor, num_rows: Tensor | None) -> Tensor:
    """(B,) gap of a batch of minimisations."""
    batch, n, m = c.shape
    # (1 | B, 1) rows that take part; filled, since a number from the host would be waited for.
    everyone = torch.full((1, 1), n, device=c.device)
    used = everyone if num_rows is None else num_rows.clamp(0, n)[:, None]
    if n == 0 or m == 0:
        valid = _is_matching(index, used, m)
        gap = 0.0 - v.clamp(max=0).sum(1) if n == 0 else v.new_zeros(batch)
        return torch.where(valid & ~gap.isnan(), gap, torch.inf)
    few_rows, many_rows = used < m, used > m  # columns, rows stay unmatched
    v = torch.where(few_rows, v.clamp(max=0), v)
    u = (c - v[:, None, :]).amin(2)  # (B, N) float64
    u = torch.where(many_rows, u.clamp(max=0), u)
    column = index.clamp(0, m - 1)
    matched = c.gather(2, column[..., None])[..., 0] - v.gather(1, column) - u
    taken = index >= 0
    row_used = torch.arange(n, device=c.device) < used
    row_terms = torch.where(taken, matched, -u).where(row_used, 0.0)
    free_column = torch.ones_like(v, dtype=torch.bool).scatter(1, column, False)
    # Rows without a column were clamped to column 0: it is free unless another row has it.
    free_column[:, 0] = ~((index == 0) & taken).any(1)
    gap = row_terms.sum(1) - v.where(free_column & few_rows, 0.0).sum(1)
    return torch.where(_is_matching(index, used, m) & ~gap.isnan(), gap, torch.inf)
