"""The public functions around the solver: errors, tracing, batches, threads, missing extension."""

import logging
import math
import subprocess
import sys
import textwrap

import pytest
import torch

from croc_kernels import backend as backend_module
from croc_kernels import linear_assignment, linear_assignment_ex, ops
from croc_kernels.assignment.families import make_costs

MISSING = ops.ASSIGNMENT_MISSING.get("cpu")
needs_native = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

COST = torch.rand((2, 3, 5), generator=torch.manual_seed(0))


def with_value(value: float, *, batch: int = 2) -> torch.Tensor:
    cost = torch.rand((batch, 3, 5))
    cost[1, 2, 4] = value
    return cost


def long_rows(*rows: int) -> torch.Tensor:
    return torch.tensor(rows)


ERRORS = {
    "not-a-tensor": ([[1.0]], {}, TypeError, "cost must be a torch.Tensor, got list"),
    "dtype": (
        COST.to(torch.complex64), {}, TypeError,
        "cost must have dtype float16, bfloat16, float32, float64, uint8, int8, int16, int32, "
        "int64, got complex64",
    ),
    "bool": (
        COST > 0, {}, TypeError,
        "cost must have dtype float16, bfloat16, float32, float64, uint8, int8, int16, int32, "
        "int64, got bool",
    ),
    "rank-1": (COST[0, 0], {}, ValueError, "cost must be ([B,] N, M), got (5,)"),
    "rank-4": (COST[None], {}, ValueError, "cost must be ([B,] N, M), got (1, 2, 3, 5)"),
    "backend": (
        COST, {"backend": "triton"}, ValueError,
        "backend must be one of ('auto', 'native', 'reference'), got 'triton'",
    ),
    "rows-shape": (
        COST, {"num_rows": long_rows(1, 2, 3)}, ValueError,
        "num_rows must be (B,) = (2,), got (3,)",
    ),
    "rows-rank-2": (
        COST[0], {"num_rows": long_rows(1, 2)}, ValueError,
        "num_rows must be (B,) = (1,), got (2,)",
    ),
    "rows-dtype": (
        COST, {"num_rows": torch.ones(2)}, TypeError,
        "num_rows must have dtype int32, int64, got float32",
    ),
    "rows-list": (
        COST, {"num_rows": [1, 2]}, TypeError, "num_rows must be a torch.Tensor, got list",
    ),
    "rows-device": (
        COST, {"num_rows": torch.ones(2, dtype=torch.int64, device="meta")}, ValueError,
        "num_rows must be on the device of cost, cpu, got meta",
    ),
    "rows-too-many": (
        COST, {"num_rows": long_rows(3, 4)}, ValueError,
        "num_rows must lie between 0 and N = 3, got 4 for problem 1",
    ),
    "rows-negative": (
        COST, {"num_rows": long_rows(-1, 3)}, ValueError,
        "num_rows must lie between 0 and N = 3, got -1 for problem 0",
    ),
    "nan": (
        with_value(math.nan), {}, ValueError,
        "cost must not hold NaN or -inf, got nan in problem 1 at row 2, column 4",
    ),
    "minus-inf": (
        with_value(-math.inf), {}, ValueError,
        "cost must not hold NaN or -inf, got -inf in problem 1 at row 2, column 4",
    ),
    "plus-inf-maximize": (
        with_value(math.inf), {"maximize": True}, ValueError,
        "cost must not hold NaN or +inf, got inf in problem 1 at row 2, column 4",
    ),
    "int64-beyond": (
        torch.tensor([[0, -(2**53) - 1]]), {}, ValueError,
        "cost must lie within 2^53 of 0, so that float64 holds it, got -9007199254740993 in "
        "problem 0 at row 0, column 1",
    ),
    "infeasible": (
        torch.stack([COST[0], COST[1].masked_fill(torch.arange(5) > 1, math.inf)]), {}, ValueError,
        "cost must allow min(rows, M) pairs without +inf, got no such matching in problem 1",
    ),
    "infeasible-maximize": (
        torch.full((1, 2), -math.inf), {"maximize": True}, ValueError,
        "cost must allow min(rows, M) pairs without -inf, got no such matching in problem 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_linear_assignment_errors(case: str) -> None:
    cost, options, error, message = ERRORS[case]
    with pytest.raises(error) as raised:
        linear_assignment(cost, **options)
    assert str(raised.value) == f"linear_assignment: {message}"


def test_linear_assignment_ex_errors() -> None:
    bad = with_value(math.nan)
    assert linear_assignment_ex(bad).status.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"^linear_assignment_ex: cost must not hold NaN or -inf"):
        linear_assignment_ex(bad, check_errors=True)
    with pytest.raises(ValueError, match=r"^linear_assignment_ex: cost must be"):
        linear_assignment_ex(bad[None])


def test_linear_assignment_ignored_rows_may_be_bad() -> None:
    bad = with_value(math.nan)
    index = linear_assignment(bad, num_rows=torch.tensor([3, 2], dtype=torch.int32))
    assert index[1].tolist()[2] == -1


def test_linear_assignment_solver_gave_up() -> None:
    status = torch.tensor([0, 3], dtype=torch.int32)
    index = torch.zeros((2, 3), dtype=torch.int64)
    with pytest.raises(RuntimeError) as raised:
        ops.linear_assignment_checked(index, status, COST, None, False, "linear_assignment")
    assert str(raised.value) == (
        "linear_assignment: the solver must end within its iteration limit, got status 3 for "
        'problem 1; use backend="reference"'
    )


def test_linear_assignment_missing_extension(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reason = "croc_kernels._C can't be imported: No module named 'croc_kernels._C'"
    monkeypatch.setitem(ops.ASSIGNMENT_MISSING, "cpu", reason)
    expected = linear_assignment(COST, backend="reference")
    backend_module.log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="croc_kernels"):
        assert torch.equal(linear_assignment(COST), expected)
    assert "linear_assignment: backend reference" in caplog.text
    assert reason in caplog.text
    with pytest.raises(RuntimeError) as raised:
        linear_assignment(COST, backend="native")
    assert str(raised.value) == (
        f"linear_assignment: the compiled solver must be built for cpu, got none ({reason}); "
        "build it with: pip install --no-build-isolation -e ."
    )


@needs_native
def test_linear_assignment_batch_and_threads_change_nothing() -> None:
    cost = make_costs("init", 6, 40, 150, dim=128)
    cost[1] = make_costs("ints", 1, 40, 150)
    cost[4] = math.nan
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [linear_assignment_ex(c) for c in cost]
        one = linear_assignment_ex(cost)
        torch.set_num_threads(2)
        two = linear_assignment_ex(cost)
    finally:
        torch.set_num_threads(threads)
    reversed_batch = linear_assignment_ex(cost.flip(0))
    for name, single in zip(one._fields, zip(*alone, strict=True), strict=True):
        expected = torch.stack(single)
        assert torch.equal(expected.nan_to_num(), getattr(one, name).nan_to_num()), name
        assert torch.equal(expected.nan_to_num(), getattr(two, name).nan_to_num()), name
        turned = getattr(reversed_batch, name).flip(0)
        assert torch.equal(expected.nan_to_num(), turned.nan_to_num()), name


@needs_native
def test_linear_assignment_leaves_nothing_unwritten() -> None:
    cost = with_value(math.nan)
    rows = torch.tensor([2, 3])
    clean = linear_assignment_ex(cost, num_rows=rows)
    was = torch.are_deterministic_algorithms_enabled()
    try:
        # torch then fills what any kernel allocates, in C++ too, with NaN and the largest integer.
        torch.use_deterministic_algorithms(True)
        assert torch.utils.deterministic.fill_uninitialized_memory
        filled = linear_assignment_ex(cost, num_rows=rows)
    finally:
        torch.use_deterministic_algorithms(was)
    for a, b in zip(clean, filled, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_linear_assignment_leaves_input_alone() -> None:
    cost = torch.rand((2, 6, 4), requires_grad=True)
    before = cost.detach().clone()
    result = linear_assignment_ex(cost, maximize=True)
    assert torch.equal(cost.detach(), before)
    assert not any(x.requires_grad for x in result)


SAMPLES = {
    "wide": (torch.rand((2, 3, 5)), None, False),
    "tall-ragged": (torch.rand((2, 5, 3)).double(), torch.tensor([5, 2]), True),
    "strided": (torch.rand((2, 5, 3)).mT, torch.tensor([1, 3], dtype=torch.int32), False),
    "empty": (torch.rand((0, 5, 3)), None, False),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", ["linear_assignment", "linear_assignment_reference"])
def test_linear_assignment_opcheck(name: str, sample: str) -> None:
    if name == "linear_assignment" and MISSING is not None:
        pytest.skip(MISSING)
    torch.library.opcheck(getattr(torch.ops.croc_kernels, name).default, SAMPLES[sample])


def test_linear_assignment_checked_opcheck() -> None:
    index, status = torch.zeros((2, 3), dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    arguments = (index, status, COST, torch.tensor([3, 1]), False, "linear_assignment")
    torch.library.opcheck(torch.ops.croc_kernels.linear_assignment_checked.default, arguments)


def test_linear_assignment_fake_tensors() -> None:
    with torch._subclasses.FakeTensorMode():
        result = linear_assignment_ex(torch.empty((4, 6, 9), dtype=torch.bfloat16))
        index = linear_assignment(torch.empty((6, 9)))
    shapes = [(4, 6), (4, 6), (4, 9), (4,), (4,)]
    dtypes = [torch.int64, torch.float64, torch.float64, torch.float64, torch.int32]
    assert [tuple(x.shape) for x in result] == shapes
    assert [x.dtype for x in result] == dtypes
    assert tuple(index.shape) == (6,)


def test_linear_assignment_compiles_first_thing() -> None:
    """As the first call of a fresh process, static and dynamic; errors come through."""
    script = """
        import torch, croc_kernels as ck
        compiled = torch.compile(ck.linear_assignment, fullgraph=True)
        cost = torch.rand(3, 5, 8)
        assert torch.equal(compiled(cost), ck.linear_assignment(cost))
        both = torch.compile(
            lambda c, r: ck.linear_assignment_ex(c, num_rows=r), fullgraph=True, dynamic=True
        )
        for n, m in ((4, 7), (9, 6), (5, 5)):
            cost, rows = torch.rand(2, n, m), torch.tensor([n, n - 1])
            for a, b in zip(both(cost, rows), ck.linear_assignment_ex(cost, num_rows=rows)):
                assert torch.equal(a, b)
        try:
            compiled(torch.full((3, 5, 8), float("nan")))
        except ValueError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "linear_assignment: cost must not hold NaN or -inf, got nan in problem 0 at row 0, column 0"
    )
