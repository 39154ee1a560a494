"""Replacing tokens by pool rows, and the loss of reconstructing them."""

import math

import torch
from torch import Tensor

from .. import ops
from ..backend import log_choice, resolve
from ..checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_device,
    check_dtype,
    check_rank,
    check_shape,
    check_tensor,
)
from . import reference

_REDUCTIONS = ("mean", "sum")


class _ReplaceTokens(torch.autograd.Function):
    """The forward and backward ops, joined."""

    @staticmethod
    def forward(ctx, embeddings, where, pool, index):
        ctx.save_for_backward(where, index)
        ctx.pool_size, ctx.pool_dtype = pool.shape[0], pool.dtype
        return ops.replace_tokens_fwd(embeddings, where, pool, index)

    @staticmethod
    def backward(ctx, grad_out):
        where, index = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        embeddings, pool = ops.replace_tokens_bwd(
            grad_out, where, index, ctx.pool_size, ctx.pool_dtype, *wanted
        )
        return embeddings if wanted[0] else None, None, pool if wanted[1] else None, None


class _ReconstructionLoss(torch.autograd.Function):
    """The forward and backward ops, joined."""

    @staticmethod
    def forward(ctx, prediction, target, where, items, beta, mean):
        loss, divisor = ops.reconstruction_loss_fwd(prediction, target, where, items, beta, mean)
        ctx.save_for_backward(prediction, target, where, divisor)
        ctx.beta = beta
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        gradient = ops.reconstruction_loss_bwd(*ctx.saved_tensors, grad_loss, ctx.beta)
        return gradient, None, None, None, None, None


class _ForeseenLoss(torch.autograd.Function):
    """The same with a forward that writes the gradient for the upstream gradient it expects."""

    @staticmethod
    def forward(ctx, prediction, target, where, items, beta, mean, history):
        loss, divisor, expected, ctx.gradient = ops.reconstruction_loss_fwd_foreseen(
            prediction, target, where, items, beta, mean, history
        )
        ctx.save_for_backward(prediction, target, where, divisor)
        ctx.beta, ctx.foresight = beta, (expected, history)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        operands = (*ctx.saved_tensors, grad_loss)
        # Given away once: with retain_graph, the next backward must not write what this returned.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            gradient = ops.reconstruction_loss_bwd(*operands, ctx.beta)
        else:
            ops.reconstruction_loss_bwd_foreseen(gradient, *operands, *ctx.foresight, ctx.beta)
        return gradient, None, None, None, None, None, None


_HISTORIES: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _loss_history(prediction: Tensor, target: Tensor) -> Tensor | None:
    """The last upstream gradient on this device and the one to expect, or None to do without.

    Traced code and tensor subclasses (fake ones among them) do without.
    """
    if torch.compiler.is_compiling() or type(prediction) not in (Tensor, torch.nn.Parameter):
        return None
    double = torch.float64 in (prediction.dtype, target.dtype)
    key = prediction.device, torch.float64 if double else torch.float32
    if key not in _HISTORIES:
        # Memory of a CUDA graph ends with the graph.
        if prediction.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        _HISTORIES[key] = torch.full((2,), torch.nan, device=key[0], dtype=key[1])
    return _HISTORIES[key]


def _check_where(function: str, where: object, like: Tensor, name: str) -> None:
    check_tensor(function, "where", where)
    check_dtype(function, "where", where, (torch.bool,))
    check_shape(function, "where", where, like.shape[:-1], f"{name}.shape[:-1]")
    check_device(function, "where", where, name, like)


def _check_replace(embeddings: Tensor, where: Tensor, pool: Tensor, index: Tensor) -> None:
    function = "replace_tokens"
    for name, tensor in (("embeddings", embeddings), ("pool", pool), ("index", index)):
        check_tensor(function, name, tensor)
    check_dtype(function, "embeddings", embeddings, FLOATS)
    check_dtype(function, "pool", pool, FLOATS)
    check_dtype(function, "index", index, INTEGERS)
    if embeddings.dim() == 0:
        raise ValueError(f"{function}: embeddings must be (..., C), got ()")
    _check_where(function, where, embeddings, "embeddings")
    check_shape(function, "index", index, where.shape, "where.shape")
    check_rank(function, "pool", pool, "(M, C)", (2,))
    check_shape(function, "pool", pool, (pool.shape[0], embeddings.shape[-1]), "(M, C)")
    check_device(function, "pool", pool, "embeddings", embeddings)
    check_device(function, "index", index, "embeddings", embeddings)


def replace_tokens(
    embeddings: Tensor, where: Tensor, pool: Tensor, index: Tensor, *, backend: str = "auto"
) -> Tensor:
    r"""Put pool rows in the place of the selected tokens, in one pass.

    .. math:: y_t = p_{k_t} \text{ if } w_t \text{ else } x_t

    Differentiable once in ``embeddings`` and ``pool``: kept tokens pass their gradient on, replaced
    ones get 0, and each pool row gets the sum over the tokens that drew it, accumulated in float32
    (float64 for float64) in a fixed order, so gradients repeat bitwise. Inputs are taken as they
    come, autocast or not.

    Args:
        embeddings: (..., C), any float dtype, any strides.
        where: (...) bool, True where a pool row goes.
        pool: (M, C), any float dtype; its rows are rounded to the dtype of ``embeddings``, its
            gradient has the dtype of the pool.
        index: (...) int32 or int64, the pool row of each selected token; ignored elsewhere. A
            selected token whose index is out of range raises for CPU tensors. On CUDA, where
            nothing waits for the host, it becomes NaN, so that it can't pass unseen, and gives no
            gradient.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        (..., C) in the dtype of ``embeddings``, contiguous.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes or devices disagree, or (CPU) an index is out of range.

    Source: Croc, arXiv 2410.14332, section 3 (replacement by pool tokens).
    """
    _check_replace(embeddings, where, pool, index)
    choice = resolve("replace_tokens", backend, embeddings)
    if choice == "reference":
        return reference.replace_tokens(embeddings, where, pool, index)
    if backend == "auto" and not torch.compiler.is_compiling():
        log_choice("replace_tokens", choice, f"{embeddings.device.type} tensors")
    if torch.is_grad_enabled() and (embeddings.requires_grad or pool.requires_grad):
        return _ReplaceTokens.apply(embeddings, where, pool, index)
    return ops.replace_tokens_fwd(embeddings, where, pool, index)


def _check_loss(prediction: Tensor, target: Tensor, where: Tensor | None, beta: float) -> None:
    function = "reconstruction_loss"
    check_tensor(function, "prediction", prediction)
    check_tensor(function, "target", target)
    check_dtype(function, "prediction", prediction, FLOATS)
    check_dtype(function, "target", target, FLOATS)
    if prediction.dim() == 0:
        raise ValueError(f"{function}: prediction must be (..., C), got ()")
    check_shape(function, "target", target, prediction.shape, "prediction.shape")
    check_device(function, "target", target, "prediction", prediction)
    if where is not None:
        _check_where(function, where, prediction, "prediction")
    if not 0.0 <= beta < math.inf:
        raise ValueError(f"{function}: beta must be finite and not negative, got {beta}")


def _check_items(num_items: Tensor | float | None, reduction: str) -> None:
    function = "reconstruction_loss"
    check_choice(function, "reduction", reduction, _REDUCTIONS)
    if num_items is None:
        return
    if reduction == "sum":
        raise ValueError(f'{function}: num_items must be None with reduction="sum", got one')
    if isinstance(num_items, Tensor):
        check_rank(function, "num_items", num_items, "a 0-d tensor", (0,))
    elif num_items < 0:
        raise ValueError(f"{function}: num_items must not be negative, got {num_items}")


def reconstruction_loss(
    prediction: Tensor,
    target: Tensor,
    where: Tensor | None = None,
    beta: float = 0.01,
    *,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Smooth-L1 distance between predicted and original visual tokens.

    .. math:: L = \frac{1}{|S|\,C} \sum_{t \in S} \sum_c h_\beta(a_{tc} - b_{tc}), \qquad
              h_\beta(d) = \begin{cases} d^2 / 2\beta & |d| < \beta \\ |d| - \beta / 2 \end{cases}

    over the selected tokens S; with ``beta = 0`` the L1 distance. Computed in float32 (float64 if
    an operand is float64) from operands of any two float dtypes without a copy of either. Tokens
    that are not selected are not read: a NaN there does no harm. With no selected token the loss is
    0 and so is its gradient.

    Differentiable once in ``prediction``. The target is detached: it never gets a gradient, even if
    it requires one. Sums have a fixed order, so losses and gradients repeat bitwise.

    On CUDA, outside of ``torch.compile``, a forward after two backwards with equal upstream
    gradients expects a third and computes the gradient of ``prediction`` in its one pass over the
    operands; it is computed in the backward if it turns out otherwise. Values do not depend on it.

    Args:
        prediction: (..., C), any float dtype, any strides.
        target: same shape and device as ``prediction``.
        where: (...) bool, True for the tokens that count, or None for all.
        beta: where the parabola meets the straight line, >= 0.
        reduction: ``"mean"`` over the components of the selected tokens, or ``"sum"``.
        num_items: number of tokens to divide by in place of the number selected in this call: over
            all micro-batches of an optimizer step, it makes gradient accumulation exact. A number
            or a 0-d tensor (it stays on its device); 0 counts as 1.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        0-d float32, or float64 if an operand is float64.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes or devices disagree, ``beta`` or ``num_items`` is negative, ``reduction``
            is unknown, or ``num_items`` comes with ``reduction="sum"``.

    Source: the released Croc trains with 10 x SmoothL1(beta = 0.01): deepglint/Croc,
    ``croc_llama.py``.
    """
    _check_loss(prediction, target, where, beta)
    _check_items(num_items, reduction)
    choice = resolve("reconstruction_loss", backend, prediction)
    if choice == "reference":
        return reference.reconstruction_loss(prediction, target, where, beta, reduction, num_items)
    if backend == "auto" and not torch.compiler.is_compiling():
        log_choice("reconstruction_loss", choice, f"{prediction.device.type} tensors")
    if num_items is not None and not isinstance(num_items, Tensor):
        # Filled on the device from a kernel argument: nothing waits.
        num_items = torch.full((), num_items, dtype=torch.float64, device=prediction.device)
    if num_items is not None and num_items.device != prediction.device:
        num_items = num_items.to(prediction.device, non_blocking=True)
    arguments = (prediction, target.detach(), where, num_items, float(beta), reduction == "mean")
    if prediction.requires_grad and torch.is_grad_enabled():
        history = _loss_history(prediction, target) if choice == "triton" else None
        if history is not None:
            return _ForeseenLoss.apply(*arguments, history)
        return _ReconstructionLoss.apply(*arguments)
    return ops.reconstruction_loss_fwd(*arguments)[0]
