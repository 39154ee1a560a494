"""Which backend an operator runs on: one rule for all, and the reason when not the fastest."""

import contextlib
import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

logger = logging.getLogger("croc_kernels")

BACKENDS = ("auto", "triton", "reference")


def interpreted() -> bool:
    """True when Triton kernels run in Triton's interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


# Looked up at import: torch.compile traces resolve(), and torch 2.11 can't trace find_spec.
_TRITON_MISSING = (
    "triton is not installed (pip install triton)"
    if importlib.util.find_spec("triton") is None
    else None
)


def triton_missing() -> str | None:
    """Why Triton can't be used at all, or None."""
    return _TRITON_MISSING


def uses_triton(tensor: Tensor) -> bool:
    """Whether an op launches a Triton kernel for ``tensor`` (else its PyTorch code for CPUs)."""
    return tensor.device.type == "cuda" or interpreted()


@functools.cache
def capability(index: int) -> int:
    """Compute capability of a CUDA device, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def multiprocessors(index: int) -> int:
    """Of a CUDA device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def resolve(function: str, backend: str, tensor: Tensor, unsupported: str | None = None) -> str:
    """Turn ``backend`` into ``"triton"``, ``"cpu"`` or ``"reference"``.

    Args:
        function: public name, for messages.
        backend: the caller's word, one of :data:`BACKENDS`.
        tensor: decides by its device.
        unsupported: why the Triton kernel can't take these inputs, or None.

    Raises:
        ValueError: ``backend`` is unknown, or the kernel can't take the inputs.
        RuntimeError: Triton was asked for by name where it can't run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{function}: backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "reference":
        return "reference"
    if not uses_triton(tensor):
        if backend == "triton":
            raise RuntimeError(
                f'{function}: backend="triton" must have CUDA tensors, got {tensor.device.type}; '
                "set TRITON_INTERPRET=1 before the first import to run it in Triton's interpreter"
            )
        return "cpu"
    missing = triton_missing()
    if missing is not None:
        raise RuntimeError(f"{function}: {missing}")
    if unsupported is not None:
        raise ValueError(f'{function}: {unsupported}, or use backend="reference"')
    return "triton"


@functools.cache
def log_choice(function: str, backend: str, reason: str) -> None:
    """Log once per process what ``auto`` took and why."""
    if not torch.compiler.is_compiling():
        logger.info("%s: backend %s (%s)", function, backend, reason)
