"""What :class:`CrocLayer` asks of its arguments."""

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import FLOATS, check_dtype, check_rank, check_shape, check_tensor


def check_size(argument: str, value: object) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"CrocLayer: {argument} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"CrocLayer: {argument} must be at least 1, got {value}")


def check_packed(
    function: str, features: Tensor, lengths: Sequence[int], width: int
) -> tuple[int, ...]:
    """Check packed (S, C) features and their images' lengths; return the lengths as a tuple."""
    check_tensor(function, "features", features)
    check_dtype(function, "features", features, FLOATS)
    check_rank(function, "features", features, "(S, C)", (2,))
    if features.shape[1] != width:
        raise ValueError(
            f"{function}: features must be (S, C) with C = {width}, got {tuple(features.shape)}"
        )
    if isinstance(lengths, Tensor) or not hasattr(lengths, "__iter__"):
        raise TypeError(
            f"{function}: lengths must be a sequence of host integers, got {type(lengths).__name__}"
        )
    lengths = tuple(lengths)
    # A tensor among them would be read from the device, one by one.
    wrong = [type(length).__name__ for length in lengths if isinstance(length, (float, Tensor))]
    if wrong:
        raise TypeError(
            f"{function}: lengths must be a sequence of host integers, got one with {wrong[0]}"
        )
    if sum(lengths) != features.shape[0] or any(length < 0 for length in lengths):
        raise ValueError(
            f"{function}: lengths must be at least 0 and add up to S = {features.shape[0]}, "
            f"got {lengths}"
        )
    return lengths


def check_loss(hidden: Tensor, target: Tensor, visible: Tensor | None) -> None:
    """Check what the loss is taken of: (S, C) hidden states, and (S,) bool or None."""
    function = "CrocLayer.loss"
    check_tensor(function, "hidden", hidden)
    check_shape(function, "hidden", hidden, target.shape, "(S, C)")
    if visible is not None:
        check_tensor(function, "visible", visible)
        check_dtype(function, "visible", visible, (torch.bool,))
        check_shape(function, "visible", visible, target.shape[:1], "(S,)")


def check_mask(is_visual: Tensor, labels: Tensor | None) -> None:
    """Check the (B, L) tensors that a mask is made of."""
    function = "CrocLayer.mask"
    check_tensor(function, "is_visual", is_visual)
    check_dtype(function, "is_visual", is_visual, (torch.bool,))
    check_rank(function, "is_visual", is_visual, "(B, L)", (2,))
    if labels is not None:
        check_tensor(function, "labels", labels)
        check_shape(function, "labels", labels, is_visual.shape, "(B, L)")
