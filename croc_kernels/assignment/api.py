"""Exact assignment of rows to columns: a batch of rectangular problems at once."""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..backend import log_choice
from ..checks import check_choice
from .certificate import check_cost, exact_float

BACKENDS = ("auto", "native", "reference")
REBUILD = "pip install --no-build-isolation -e ."


class AssignmentStatus(IntEnum):
    """How the search for one problem's assignment ended."""

    OK = 0
    """The assignment is optimal."""
    INVALID = 1
    """A cost is NaN, -inf (+inf with ``maximize``), or an int64 beyond 2^53."""
    INFEASIBLE = 2
    """Every matching of min(rows, M) pairs uses a forbidden pair."""
    ITERATION_LIMIT = 3
    """The solver gave up; the CPU solver and the reference never do."""


class LinearAssignment(NamedTuple):
    """Result of :func:`linear_assignment_ex`; without the leading B for a cost of rank 2.

    The duals are those of the problem as stated. They satisfy row_dual[i] + column_dual[j] <=
    cost[i, j] (>= with ``maximize``), equality holds on matched pairs, rows and columns that stay
    unmatched have dual 0, and the duals sum to the total cost. Where ``status`` is not 0, every
    index is -1, the duals are 0 and the gap is NaN.
    """

    index: Tensor
    """(B, N) int64: each row's column; -1: the row stays free or lies beyond ``num_rows``."""
    row_dual: Tensor
    """(B, N) float64, 0 beyond ``num_rows``."""
    column_dual: Tensor
    """(B, M) float64: all that ``assignment_gap`` needs besides cost and index."""
    gap: Tensor
    """(B,) float64: bound on (total - optimum); 0, or rounding error."""
    status: Tensor
    """(B,) int32, see :class:`AssignmentStatus`."""


def _choose(function: str, backend: str, cost: Tensor) -> str:
    """``"native"`` or ``"reference"``; RuntimeError if the compiled solver is needed, missing."""
    check_choice(function, "backend", backend, BACKENDS)
    if cost.device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"{function}: cost must be on cpu or cuda, got {cost.device}")
    if backend == "reference":
        return backend
    missing = ops.ASSIGNMENT_MISSING.get(cost.device.type)
    if missing is None:
        return "native"
    if backend == "auto" and cost.device.type == "cpu":
        if not torch.compiler.is_compiling():
            log_choice(function, "reference", f"{missing}; build it with: {REBUILD}")
        return "reference"
    raise RuntimeError(
        f"{function}: the compiled solver must be built for {cost.device.type}, got none "
        f"({missing}); build it with: {REBUILD}"
    )


def _solve(
    function: str,
    cost: Tensor,
    maximize: bool,
    num_rows: Tensor | None,
    check_errors: bool,
    backend: str,
) -> LinearAssignment:
    """Checks, conversion, dispatch."""
    check_cost(function, cost, num_rows)
    choice = _choose(function, backend, cost)
    given = cost.detach() if cost.dim() == 3 else cost.detach()[None]
    op = ops.linear_assignment if choice == "native" else ops.linear_assignment_reference
    index, row_dual, column_dual, gap, status = op(exact_float(given), num_rows, maximize)
    if check_errors:
        index = ops.linear_assignment_checked(index, status, given, num_rows, maximize, function)
    results = (index, row_dual, column_dual, gap, status)
    return LinearAssignment(*(results if cost.dim() == 3 else (x[0] for x in results)))


def linear_assignment(
    cost: Tensor,
    *,
    maximize: bool = False,
    num_rows: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Match rows with different columns so that the total cost is the least possible.

    .. math:: \min_a \sum_i c_{i\,a(i)}, \quad a(i) \ne a(k) \text{ for } i \ne k

    With N <= M every row is matched, with N > M every column is, and the rows left over get -1. The
    result is optimal for exactly the numbers given, not up to a tolerance; of several optimal
    assignments it is any, but the same one on every call with the same backend and device, whatever
    else is in the batch.

    Raises on bad costs, and so waits for the device once; :func:`linear_assignment_ex` never does.
    Not differentiable: the indices are constants. Usable inside ``torch.compile(fullgraph=True)``.

    Args:
        cost: ([B,] N, M) float16, bfloat16, float32, float64, uint8, int8, int16, int32, or int64
            up to 2^53 in size, any strides. Every value is converted exactly. +inf forbids a pair
            (-inf with ``maximize``).
        maximize: find the largest total instead.
        num_rows: (B,) int32 or int64 on the device of ``cost``: rows of problem b from num_rows[b]
            on are ignored, whatever they hold, and get -1. None: all N rows.
        backend: ``"auto"``, ``"native"`` (the compiled solver) or ``"reference"`` (SciPy, on the
            CPU). ``"auto"`` is the compiled solver, and the reference, with a logged line, for CPU
            tensors where it was not built.

    Returns:
        ([B,] N) int64. An empty batch, no rows or no columns are allowed: nothing is matched then.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape or device is wrong, a cost is NaN or -inf, no assignment avoids the
            forbidden pairs, or ``num_rows`` is out of range: the message names the first such
            problem of the batch.
        RuntimeError: the compiled solver is needed and missing.

    Source: Croc, arXiv 2410.14332, section 3 (Hungarian matching). Algorithm: docs/assignment.md.
    """
    function = "linear_assignment"
    return _solve(function, cost, maximize, num_rows, True, backend).index


def linear_assignment_ex(
    cost: Tensor,
    *,
    maximize: bool = False,
    num_rows: Tensor | None = None,
    check_errors: bool = False,
    backend: str = "auto",
) -> LinearAssignment:
    """:func:`linear_assignment` that reports instead of raising, with duals and a certificate.

    Never waits for the device unless ``check_errors`` is set (or the reference runs): a bad problem
    shows in ``status``, and the others of its batch are solved. Values of ``num_rows`` outside 0 to
    N are clamped.

    Args:
        cost: as in :func:`linear_assignment`.
        maximize: as in :func:`linear_assignment`.
        num_rows: as in :func:`linear_assignment`.
        check_errors: raise as :func:`linear_assignment` does.
        backend: as in :func:`linear_assignment`.

    Returns:
        :class:`LinearAssignment`: index, row_dual, column_dual, gap, status.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape or device is wrong; with ``check_errors`` also what
            :func:`linear_assignment` names.
        RuntimeError: the compiled solver is needed and missing.
    """
    function = "linear_assignment_ex"
    return _solve(function, cost, maximize, num_rows, check_errors, backend)
