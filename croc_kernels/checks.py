"""Checks of arguments, one sentence each: ``<function>: <argument> must <rule>, got <value>``.

They read shapes, dtypes and devices only, so they work on fake tensors and never wait for a device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def name_of(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def check_tensor(function: str, argument: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}: {argument} must be a torch.Tensor, got {type(value).__name__}"
        )


def check_dtype(
    function: str, argument: str, tensor: Tensor, allowed: Sequence[torch.dtype]
) -> None:
    """Raise TypeError unless the tensor's dtype is one of ``allowed``."""
    if tensor.dtype not in allowed:
        names = ", ".join(name_of(d) for d in allowed)
        raise TypeError(
            f"{function}: {argument} must have dtype {names}, got {name_of(tensor.dtype)}"
        )


def check_rank(
    function: str, argument: str, tensor: Tensor, layout: str, ranks: Sequence[int]
) -> None:
    """Raise ValueError unless the tensor's rank is allowed; ``layout`` reads like ``(B, N, M)``."""
    if tensor.dim() not in ranks:
        raise ValueError(f"{function}: {argument} must be {layout}, got {tuple(tensor.shape)}")


def check_shape(
    function: str, argument: str, tensor: Tensor, shape: Sequence[int], layout: str
) -> None:
    """Raise ValueError unless the tensor has exactly ``shape``."""
    if tensor.shape != tuple(shape):
        raise ValueError(
            f"{function}: {argument} must be {layout} = {tuple(shape)}, got {tuple(tensor.shape)}"
        )


def check_same(
    function: str, argument: str, tensor: Tensor, other_name: str, other: Tensor
) -> None:
    """Raise unless dtype (TypeError) and device (ValueError) equal those of ``other``."""
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{function}: {argument} must have the dtype of {other_name}, {name_of(other.dtype)}, "
            f"got {name_of(tensor.dtype)}"
        )
    check_device(function, argument, tensor, other_name, other)


def check_device(
    function: str, argument: str, tensor: Tensor, other_name: str, other: Tensor
) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{function}: {argument} must be on the device of {other_name}, {other.device}, "
            f"got {tensor.device}"
        )


def check_choice(function: str, argument: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{function}: {argument} must be one of {tuple(allowed)}, got {value!r}")
