"""From a status to the sentence that says which problem is wrong. Waits for the device."""

import torch
from torch import Tensor

from .certificate import LARGEST_INTEGER


def _invalid_value(cost: Tensor, b: int, rows: int, maximize: bool) -> str:
    """What is not a cost in problem ``b``, and where."""
    problem = cost[b, :rows]
    if cost.dtype == torch.int64:
        wrong = (problem < -LARGEST_INTEGER) | (problem > LARGEST_INTEGER)
        rule = "lie within 2^53 of 0, so that float64 holds it"
    else:
        wrong = problem.isnan() | (problem.isposinf() if maximize else problem.isneginf())
        rule = f"not hold NaN or {'+inf' if maximize else '-inf'}"
    row, column = wrong.nonzero()[0].tolist()
    return f"{rule}, got {problem[row, column].item()} in problem {b} at row {row}, column {column}"


def checked_index(
    index: Tensor,
    status: Tensor,
    cost: Tensor,
    num_rows: Tensor | None,
    maximize: bool,
    function: str,
) -> Tensor:
    """Implementation of ``croc_kernels::linear_assignment_checked``.

    Args:
        index: (B, N) int64, copied into the result: an op returns no alias of its input.
        status: (B,) int32.
        cost: (B, N, M) as the caller gave it, read only for the message.
        num_rows: (B,) or None.
        maximize: turns around which infinity forbids a pair.
        function: named in the message.

    Raises:
        ValueError: a cost, ``num_rows`` or a whole problem is wrong.
        RuntimeError: the solver gave up.
    """
    n = cost.shape[1]
    failed = status != 0
    if num_rows is not None:
        failed = failed | (num_rows < 0) | (num_rows > n)
    if not failed.any():
        return index.clone()
    b = int(failed.nonzero()[0])
    rows = n if num_rows is None else int(num_rows[b])
    if not 0 <= rows <= n:
        raise ValueError(
            f"{function}: num_rows must lie between 0 and N = {n}, got {rows} for problem {b}"
        )
    code = int(status[b])
    if code == 1:
        raise ValueError(f"{function}: cost must {_invalid_value(cost, b, rows, maximize)}")
    if code == 2:
        forbids = "-inf" if maximize else "+inf"
        raise ValueError(
            f"{function}: cost must allow min(rows, M) pairs without {forbids}, "
            f"got no such matching in problem {b}"
        )
    raise RuntimeError(
        f"{function}: the solver must end within its iteration limit, got status {code} for "
        f'problem {b}; use backend="reference"'
    )
