"""Gradients for parameters that a step does not use, so that data-parallel ranks keep step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class _Touch(torch.autograd.Function):
    """A copy of its first argument (Trainer scales losses in place); zero gradients for the
    others.
    """

    @staticmethod
    def forward(ctx, value, *parameters):
        ctx.save_for_backward(*parameters)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether this rank holds a part of it only, at this moment: FSDP2's, or ZeRO-3's."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


def image_path(inner: nn.Module, language_model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters outside the language model: vision tower, projector, newlines.

    Not those that are gathered by a unit of their own: :mod:`.dummy` has that run.
    """
    children = [child for child in inner.children() if child is not language_model]
    parameters = [p for child in children for p in child.parameters()]
    parameters += inner.parameters(recurse=False)
    return [p for p in parameters if p.requires_grad and not is_sharded(p)]


def several_ranks() -> bool:
    """Whether this process is one of several."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1


def with_zero_gradients(value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """``value``, which now also gives zero gradients to ``tensors``."""
    return _Touch.apply(value, *tensors)


def in_step(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """``loss``, which now also gives zero gradients to ``parameters`` if there are several ranks.

    FSDP2 reduces the gradients of a unit in one collective whose size is that of the gradients
    there are, and DDP waits for every parameter. A rank without images has none for the vision
    tower; a rank with images none for the tower's last layers, where the model takes its features
    from an earlier one.
    """
    if not several_ranks() or not torch.is_grad_enabled():
        return loss
    return with_zero_gradients(loss, parameters)
