"""Rules for the whole suite: no network, few threads, reasons on GPU skips, poisoned memory."""

import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from croc_kernels import _versions

# Workers of pytest-xdist share the cores among them.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
NO_GPU = "needs a CUDA device; torch.cuda.is_available() is False"


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)


def interpreter_fault() -> str | None:
    """Why Triton's interpreter can't run here, or None: triton-lang/triton#9171, fixed in 3.7."""
    try:
        triton, numpy = (_versions.parse(version(name)) for name in ("triton", "numpy"))
    except PackageNotFoundError as missing:
        return f"needs {missing.name}, which is not installed"
    if triton < (3, 7) and numpy >= (2, 4):
        return f"the interpreter of triton < 3.7 breaks with numpy >= 2.4, got {triton}, {numpy}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, and tests called ``*in_the_interpreter*``, where they can't run."""
    fault, has_gpu = interpreter_fault(), torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        if fault is not None and "in_the_interpreter" in item.name:
            item.add_marker(pytest.mark.skip(reason=fault))


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with what no correct result contains: NaN, or the smallest integer."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)


def poisoned(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap an allocator: what croc_kernels itself allocates comes poisoned."""

    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        # Tracers see the allocation as it is in production.
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "croc_kernels":
            # Nor does a recording of a call (launch.py).
            with _disable_current_modes():
                poison(tensor)
        return tensor

    return allocate


def new_empty(tensor: torch.Tensor, *size: Any, **kwargs: Any) -> torch.Tensor:
    """``Tensor.new_empty`` as an op: Dynamo can't trace the method once it is wrapped."""
    shape = size[0] if isinstance(size[0], list | tuple) else size
    return torch.ops.aten.new_empty.default(tensor, list(shape), **kwargs)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten turns up as NaN instead of as yesterday's value."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    # What Inductor allocates with, and launch.py.
    guards = torch._C._dynamo.guards
    for name in ("_empty_strided_cpu", "_empty_strided_cuda"):
        if hasattr(guards, name):
            monkeypatch.setattr(guards, name, poisoned(getattr(guards, name)))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring on matrices as small as those of a tiny model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
