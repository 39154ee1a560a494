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


def image_path(inner: nn.Module, language_model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters outside the language model: vision tower, projector, newlines.

    Not those that FSDP2 shards in a unit of their own: its collectives are joined by the unit's
    forward alone, which a batch without images does not run.
    """
    children = [child for child in inner.children() if child is not language_model]
    parameters = [p for child in children for p in child.parameters()]
    parameters += inner.parameters(recurse=False)
    return [p for p in parameters if p.requires_grad and not hasattr(p, "full_tensor")]


def in_step(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """``loss``, which now also gives zero gradients to ``parameters`` if there are several ranks.

    FSDP2 reduces the gradients of a unit in one collective whose size is that of the gradients
    there are, and DDP waits for every parameter. A rank without images has none for the vision
    tower; a rank with images none for the tower's last layers, where the model takes its features
    from an earlier one.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1 or not torch.is_grad_enabled():
        return loss
    return _Touch.apply(loss, *parameters)
