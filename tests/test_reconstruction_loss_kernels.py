"""The Triton kernels of reconstruction_loss: see kernel_device.py."""

import pytest
import torch
from kernel_device import DEVICE, DTYPES, INTERPRETED, PAIRS, draw, needs_kernels
from torch import Tensor

from croc_kernels import ops, reconstruction_loss
from croc_kernels.replacement import api, loss_kernel, loss_list
from croc_kernels.replacement.config import LossConfig
from croc_kernels.testing import assert_within_budget

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def _large_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter is paid by the program, not by the row.
    if INTERPRETED:
        monkeypatch.setattr(loss_kernel, "GRADIENT_ROWS", 16)
        monkeypatch.setattr(loss_kernel, "pick_loss", lambda _: LossConfig(1024, 4, 16, 1024, 2))


def loss_and_gradient(
    prediction: Tensor, *operands: object, backend: str, **options: object
) -> tuple[Tensor, Tensor]:
    leaf = prediction.detach().clone().requires_grad_()
    loss = reconstruction_loss(leaf, *operands, backend=backend, **options)
    return loss, torch.autograd.grad(1.7 * loss, leaf)[0]


@pytest.mark.parametrize(("dtype", "target_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("selected", [True, False], ids=["where", "all"])
def test_reconstruction_loss_kernel(
    selected: bool, beta: float, target_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    prediction = draw(3, 7, 131, dtype=dtype)
    target = prediction.float() + (beta or 1.0) * draw(3, 7, 131)
    target = target.to(target_dtype)
    where = (torch.rand(3, 7) < 0.6).to(DEVICE) if selected else None
    loss, grad = loss_and_gradient(prediction, target, where, beta, backend="triton")
    exact = loss_and_gradient(
        prediction.double(), target.double(), where, beta, backend="reference"
    )
    plain = loss_and_gradient(prediction, target, where, beta, backend="reference")
    assert loss.dtype == plain[0].dtype
    assert abs(loss.item() - exact[0].item()) <= 3e-7 * exact[0].item()
    assert grad.dtype == dtype
    assert_within_budget(grad, exact[1], plain[1], dtype, "gradient")


@pytest.mark.parametrize(
    "options",
    [{"reduction": "sum"}, {"num_items": 7}, {"num_items": torch.tensor(7)}, {"num_items": 0.5}],
    ids=["sum", "int", "tensor", "float"],
)
def test_reconstruction_loss_kernel_averages(options: dict) -> None:
    prediction, target, where = draw(40, 24), draw(40, 24), (torch.rand(40) < 0.5).to(DEVICE)
    got = loss_and_gradient(prediction, target, where, backend="triton", **options)
    expected = loss_and_gradient(prediction, target, where, backend="reference", **options)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("head", "expected"), [(16, True), (64, True), (256, True), (16, False)], ids=str
)
@pytest.mark.parametrize("part", [0.0, 0.05, 0.5, 1.0])
def test_reconstruction_loss_kernel_lists_what_is_selected(
    part: float, head: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several programs list, of places for rows that count none, some or all are taken; the head is
    # cleared ahead of the list and is some of the rows or all; more programs than they fill.
    monkeypatch.setattr(loss_list, "LIST_ROWS", 16)
    monkeypatch.setattr(loss_list, "LIST_BLOCK", 8)
    monkeypatch.setattr(loss_kernel, "REDUCE_BLOCK", 8)
    monkeypatch.setattr(loss_kernel, "pick_loss", lambda _: LossConfig(16, 4, 4, head, 3))
    where = (torch.rand(3, 29) < part).to(DEVICE)
    prediction, target = draw(3, 29, 24), draw(3, 29, 24)
    prediction[~where] = target[~where] = float("nan")
    history = torch.full((2,), 0.5 if expected else float("nan"), device=DEVICE)
    loss, divisor, scale, gradient = ops.reconstruction_loss_fwd_foreseen(
        prediction, target, where, None, 0.3, True, history
    )
    value, slope = loss_and_gradient(prediction, target, where, 0.3, backend="reference")
    torch.testing.assert_close(loss, value)
    assert divisor == 24 * max(1, where.sum())
    assert (gradient[~where] == 0).all()
    if expected:
        assert scale == 0.5
        torch.testing.assert_close(gradient, slope * (0.5 / 1.7))
    alone = ops.reconstruction_loss_fwd(prediction, target, where, None, 0.3, True)
    assert torch.equal(alone[0], loss)


@pytest.mark.parametrize("first", range(5))
def test_reconstruction_loss_kernel_counts_selections_anywhere_in_memory(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A selection is counted by words of four: it may begin between them, and True may be any byte.
    monkeypatch.setattr(loss_list, "LIST_ROWS", 16)
    monkeypatch.setattr(loss_list, "LIST_BLOCK", 8)
    bytes_ = torch.where(torch.rand(75) < 0.5, torch.randint(1, 256, (75,)), 0).to(torch.uint8)
    where = bytes_.to(DEVICE).view(torch.bool)[first : first + 70]
    prediction, target = draw(70, 16), draw(70, 16)
    got = loss_and_gradient(prediction, target, where, backend="triton")
    plain = where.view(torch.uint8) != 0
    expected = loss_and_gradient(prediction, target, plain, backend="reference")
    torch.testing.assert_close(got, expected)


def test_reconstruction_loss_kernel_reads_only_what_is_selected() -> None:
    prediction, target = draw(11, 40), draw(11, 40)
    prediction[4], target[6] = float("nan"), float("inf")
    where = torch.ones(11, dtype=torch.bool, device=DEVICE)
    where[4] = where[6] = False
    loss, grad = loss_and_gradient(prediction, target, where, backend="triton")
    assert loss.isfinite()
    assert (grad[~where] == 0).all()
    where[:] = False
    loss, grad = loss_and_gradient(prediction, target, where, backend="triton")
    assert loss.item() == 0.0
    assert (grad == 0).all()
    where[4] = True
    loss, grad = loss_and_gradient(prediction, target, where, backend="triton")
    assert loss.isnan()
    assert grad[4].isnan().all()


def test_reconstruction_loss_kernel_strides_and_repeats() -> None:
    wide, where = draw(3, 20, 48), (torch.rand(8, 3) < 0.5).T.to(DEVICE)
    target = draw(24, 8, 3).permute(2, 1, 0)
    for prediction in (wide[:, 4:12, 5:29], wide[:, :8, ::2], wide[:1, :8, :24].expand(3, 8, 24)):
        leaf = prediction.detach().requires_grad_()
        results = []
        for operands in ((leaf, target), (leaf.contiguous(), target.contiguous())):
            loss = reconstruction_loss(*operands, where, backend="triton")
            results.append((loss, *torch.autograd.grad(loss, leaf)))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 0)], ids=str)
def test_reconstruction_loss_kernel_of_nothing(shape: tuple[int, ...]) -> None:
    loss, grad = loss_and_gradient(draw(*shape), draw(*shape), backend="triton")
    assert loss.item() == 0.0
    assert grad.shape == shape


def gradients(leaf: Tensor, operands: tuple, scales: list[float]) -> list[Tensor]:
    """One forward and backward per upstream gradient, in this order."""
    found = []
    for scale in scales:
        loss = reconstruction_loss(leaf, *operands, backend="triton")
        found.append(torch.autograd.grad(loss * scale, leaf)[0])
    return found


# Two equal ones let the third expect another: met, missed (AMP), met again, zeros, NaN, inf.
_AGAIN = [1.0] * 3 + [65536.0] * 3 + [-0.3] * 3 + [0.0, -0.0] * 2 + [0.0] * 3
_AGAIN += [float("nan")] * 3 + [float("inf")] * 3 + [1.7, 0.125] * 2


@pytest.mark.parametrize("selected", [True, False], ids=["where", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reconstruction_loss_kernel_gradient_does_not_depend_on_what_was_expected(
    dtype: torch.dtype, selected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf, target = draw(23, 40, dtype=dtype).requires_grad_(), draw(23, 40, dtype=dtype)
    operands = target, (torch.rand(23) < 0.6).to(DEVICE) if selected else None
    found = gradients(leaf, operands, _AGAIN)
    monkeypatch.setattr(api, "_loss_history", lambda *_: None)
    plain = gradients(leaf, operands, _AGAIN)
    for scale, grad, expected in zip(_AGAIN, found, plain, strict=True):
        assert torch.equal(grad.isnan(), expected.isnan()), scale
        same = (grad == expected) & (grad.signbit() == expected.signbit())
        assert (same | grad.isnan()).all(), scale


def test_reconstruction_loss_kernel_writes_what_it_expects_in_the_forward() -> None:
    leaf, target = draw(9, 24).requires_grad_(), draw(9, 24)
    expected = gradients(leaf, (target,), [0.7] * 3)[0]
    loss = reconstruction_loss(leaf, target, backend="triton")
    assert torch.equal(loss.grad_fn.gradient, expected)
    gradients(leaf, (target,), [0.2])
    loss = reconstruction_loss(leaf, target, backend="triton")
    assert loss.grad_fn.foresight[0].isnan()


def test_reconstruction_loss_kernel_backward_twice_returns_two_tensors() -> None:
    leaf, target = draw(9, 24).requires_grad_(), draw(9, 24)
    expected = gradients(leaf, (target,), [1.0] * 3)[0]
    loss = reconstruction_loss(leaf, target, backend="triton")
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    first.zero_()
    second = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    third = torch.autograd.grad(loss * 0.3, leaf)[0]
    assert torch.equal(second, expected)
    assert torch.equal(third, gradients(leaf, (target,), [0.3])[0])
    assert (first == 0).all()


def test_reconstruction_loss_kernel_foreseen_opcheck() -> None:
    prediction, target = draw(6, 24), draw(6, 24)
    one = torch.ones((), device=DEVICE)
    history, divisor = one.expand(2).clone(), 6.0 * one
    operands = prediction, target, None
    torch.library.opcheck(
        ops.reconstruction_loss_fwd_foreseen, (*operands, None, 0.01, True, history)
    )
    torch.library.opcheck(
        ops.reconstruction_loss_bwd_foreseen,
        (torch.zeros_like(prediction), *operands, divisor, one, 2.0 * one, history, 0.01),
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_reconstruction_loss_kernel_in_a_graph() -> None:
    leaf, target = draw(70, 1040).requires_grad_(), draw(70, 1040)
    where = (torch.rand(70) < 0.6).to(DEVICE)
    scale = torch.ones((), device=DEVICE)
    gradients(leaf, (target, where), [1.0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = reconstruction_loss(leaf, target, where)
        grad = torch.autograd.grad(loss * scale, leaf)[0]
    for value in (1.0, 1.0, 1.0, 0.3, 0.3, 0.3, 0.3):
        scale.fill_(value)
        grad.fill_(float("nan"))
        graph.replay()
        replayed, total = grad.clone(), loss.clone()
        assert torch.equal(replayed, gradients(leaf, (target, where), [value])[0])
        assert torch.equal(total, reconstruction_loss(leaf, target, where))
