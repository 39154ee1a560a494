"""nearest_token on CPU tensors, its ties and its errors."""

import pytest
import torch
from torch import Tensor

from croc_kernels import nearest_token, token_cost
from croc_kernels.cost import reference
from croc_kernels.testing import clustered_tokens

METRICS = ("l2", "l2sq", "cosine")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BACKENDS = ("auto", "reference")


def lowest(cost: Tensor) -> Tensor:
    """The first column of each row's minimum, by a loop."""
    rows = cost.reshape(-1, cost.shape[-1]).tolist()
    return torch.tensor([row.index(min(row)) for row in rows]).reshape(cost.shape[:-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("shape", "m"),
    [
        pytest.param((64, 128), 64, id="N64-M64-C128"),
        pytest.param((2, 63, 257), 131, id="B2-N63-M131-C257"),
        pytest.param((1, 1, 1), 1, id="B1-N1-M1-C1"),
        pytest.param((600, 48), 17, id="N600-M17-C48"),
    ],
)
def test_nearest_token_is_the_lowest_cost(
    shape: tuple[int, ...], m: int, metric: str, dtype: torch.dtype
) -> None:
    tokens = torch.randn(shape).to(dtype)
    pool = torch.randn(m, shape[-1]).to(dtype)
    cost = reference.token_cost(tokens.double(), pool.double(), metric=metric)
    for backend in BACKENDS:
        index = nearest_token(tokens, pool, metric, backend=backend)
        assert index.dtype == torch.int64
        assert torch.equal(index, lowest(cost))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_nearest_token_breaks_ties_by_the_lowest_index(metric: str, backend: str) -> None:
    rows = torch.randn(7, 131)
    # Every row five times, in another order each time; BLAS may treat the columns of edges apart.
    pool = torch.cat([rows[torch.randperm(7)] for _ in range(5)])
    index = nearest_token(rows + 0.01 * torch.randn(7, 131), pool, metric, backend=backend)
    first = torch.stack([(pool == row).all(-1).int().argmax() for row in rows])
    assert torch.equal(index, first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_token_breaks_ties_of_different_rows(backend: str) -> None:
    pool = torch.tensor([[5.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [-1.0, 0.0]])
    tokens = torch.tensor([[0.0, 0.0], [2.0, -2.0], [-2.0, 0.0]])
    index = nearest_token(tokens, pool, backend=backend)
    assert index.tolist() == [1, 2, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_token_of_long_pool_rows_is_the_shortest_one(backend: str) -> None:
    # Norm 16 against norm 1, as at the published start: lengths decide, not angles.
    tokens, pool = clustered_tokens(2, 50, 256), torch.randn(64, 256)
    pool[17] *= 0.5
    assert (nearest_token(tokens, pool, backend=backend) == 17).all()
    by_angle = nearest_token(tokens, pool, "cosine", backend=backend)
    assert torch.equal(by_angle, lowest(token_cost(tokens, pool, "cosine")))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_nearest_token_is_minus_one_past_the_count(integer: torch.dtype, backend: str) -> None:
    tokens, pool = torch.randn(3, 7, 10), torch.randn(6, 10)
    num_rows = torch.tensor([0, 5, 9], dtype=integer)
    index = nearest_token(tokens, pool, num_rows=num_rows, backend=backend)
    live = torch.arange(7) < num_rows[:, None]
    expected = lowest(token_cost(tokens, pool))
    assert torch.equal(index, torch.where(live, expected, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_token_gathers_rows(backend: str) -> None:
    tokens, pool = torch.randn(23, 9), torch.randn(4, 9)
    rows = torch.randint(23, (2, 6))
    index = nearest_token(tokens, pool, token_index=rows, backend=backend)
    assert torch.equal(index, nearest_token(tokens, pool, backend=backend)[rows])
    with pytest.raises(ValueError, match=r"^nearest_token: token_index must be in \[0, 23\), got"):
        nearest_token(tokens, pool, token_index=rows + 23, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_nearest_token_never_chooses_nan(metric: str, backend: str) -> None:
    tokens, pool = torch.randn(4, 8), torch.randn(5, 8)
    expected = nearest_token(tokens, pool[1:], metric, backend=backend) + 1
    pool[0, 3] = tokens[2, 1] = float("nan")
    expected[2] = -1
    assert torch.equal(nearest_token(tokens, pool, metric, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0, 5, 4)], ids=str)
def test_nearest_token_of_nothing(shape: tuple[int, ...], backend: str) -> None:
    index = nearest_token(torch.randn(shape), torch.randn(3, 4), backend=backend)
    assert index.shape == shape[:-1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_token_holds_no_cost_matrix(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK_ENTRIES", 100)
    tokens, pool = torch.randn(700, 3), torch.randn(11, 3)
    # More rows than one chunk of either implementation.
    index = nearest_token(tokens, pool, backend=backend)
    assert torch.equal(index, lowest(token_cost(tokens, pool)))


def test_nearest_token_errors() -> None:
    with pytest.raises(ValueError, match=r"^nearest_token: pool must have at least one row, got"):
        nearest_token(torch.zeros(3, 4), torch.zeros(0, 4))
    with pytest.raises(ValueError, match=r"^nearest_token: metric must be one of .*, got 'dot'$"):
        nearest_token(torch.zeros(3, 4), torch.zeros(2, 4), "dot")
    with pytest.raises(RuntimeError, match=r'^nearest_token: backend="triton" must have CUDA'):
        nearest_token(torch.zeros(3, 4), torch.zeros(2, 4), backend="triton")
