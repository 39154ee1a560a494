"""Launches of Triton kernels that keep the host for less time.

Between its arguments and its launches a function works out grids, descriptors and constants from
shapes and strides, and Triton what it compiled for them: the same each time, and longer in Python
than a short kernel runs (docs/attention.md). So the first call of a kind is watched, and written
down as a function of its tensors that does only what reached the device: allocate, and launch what
was compiled, as :meth:`JITFunction.run` does in the end.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode
from triton import knobs
from triton.runtime import driver

from .backend import logger, on_device

# Where Inductor's code has its allocations from: on the current device, without the dispatcher, and
# without the filling of uninitialised memory that deterministic algorithms ask for.
_guards = torch._C._dynamo.guards
# Of one function. Each new length is one.
_MOST_PLANS = 1024
# How often a call of a kind is recorded that does more than can be replayed: something else may
# have happened meanwhile, a finaliser or somebody's hook.
_MOST_TRIES = 3
_PLAIN = (bool, int, float, str, type(None))
_EMPTY = (
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
)  # fmt: skip
_ZEROS = torch.ops.aten.zeros.default


class _Notes(threading.local):
    """Where a thread notes its launches: the compiled kernel (None where it can't be launched
    again), grid, arguments and values of the constants.
    """

    launches: list[tuple] | None = None


_NOTES = _Notes()


def launch(
    kernel: object,
    grid: tuple[int, int, int],
    arguments: Sequence[object],
    constants: dict[str, object],
    **options: object,
) -> None:
    """``kernel[grid](*arguments, **constants, **options)``, on the current device and stream.

    Args:
        kernel: a Triton or Gluon function, whose first parameters are ``arguments`` and whose
            others are named in ``constants``.
        grid: programs in each of three dimensions.
        arguments: tensors, numbers, tensor descriptors, tuples of these.
        constants: every constexpr.
        **options: Triton's, such as ``num_warps``.
    """
    compiled, values = kernel[grid](*arguments, **constants, **options), ()
    if _NOTES.launches is None:
        return
    # Within Triton's AsyncCompileMode, something that can't be launched again.
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    if hasattr(compiled, "packed_metadata"):
        values = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    else:
        # The interpreter compiles nothing.
        compiled = None
    _NOTES.launches.append((compiled, grid, arguments, values))


class _Recording(TorchDispatchMode):
    """What a call allocates and launches, and whether it does something else to a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[object, Tensor]] = []
        self.launches: list[tuple] = []
        self.complete = True

    def __enter__(self) -> "_Recording":
        # Not TorchDispatchMode's own, which says so to the whole process: threads that record at
        # the same time would leave it said, and Dynamo would compile no more.
        _push_mode(self)
        _NOTES.launches = self.launches
        return self

    def __exit__(self, *raised: object) -> None:
        _NOTES.launches = None
        _pop_mode()

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if (func in _EMPTY or func is _ZEROS) and not (kwargs or {}).get("pin_memory"):
            self.made.append((func, result))
        elif self._is_last_made(func, args[0] if args else None):
            self.made[-1] = (self.made[-1][0], result)
        else:
            self.complete = False
        return result

    def _is_last_made(self, func: Callable, x: object) -> bool:
        """Whether this gives the last allocation under another name, and another layout if empty:
        PyTorch hands out an alias of what somebody else, this list, holds too.
        """
        if not self.made or x is not self.made[-1][1]:
            return False
        turned = func is torch.ops.aten.transpose.int and self.made[-1][0] is not _ZEROS
        return turned or func is torch.ops.aten.detach.default


class _Writer:
    """A recording as the source of a function: each tensor by its place, all else by a name."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.names: dict[str, object] = {
            "__name__": __name__, "torch": torch, "new": object.__new__
        }  # fmt: skip
        # Of tensors and descriptors, all of which the recording holds.
        self.places = {id(x): f"given[{i}]" for i, x in enumerate(given)}
        device = given[0].device
        stream_of = driver.active.get_current_stream if device.type == "cuda" else lambda _: 0
        self.lines = [f"stream = {self.name(stream_of)}({self.name(device.index)})"]

    def name(self, x: object) -> str:
        found = f"x{len(self.names)}"
        self.names[found] = x
        return found

    def expression(self, x: object) -> str:
        """KeyError for a tensor that was neither given nor allocated, or what may hold one."""
        if isinstance(x, Tensor):
            return self.places[id(x)]
        if type(x) in (tuple, list):
            return f"({''.join(self.expression(y) + ', ' for y in x)})"
        if hasattr(x, "block_shape"):
            return self.places.get(id(x)) or self.describe(x)
        if type(x) in _PLAIN:
            return self.name(x)
        raise KeyError(type(x))

    def describe(self, x: object) -> str:
        """A descriptor of another tensor, without its checks."""
        base = self.places[id(x.base)]
        alike = [f.name for f in dataclasses.fields(x) if f.name != "base"]
        listed = "".join(f", {name!r}: {self.name(getattr(x, name))}" for name in alike)
        self.places[id(x)] = place = f"tiles{len(self.lines)}"
        self.lines += [
            f"{place} = new({self.name(type(x))})", f'{place}.__dict__ = {{"base": {base}{listed}}}'
        ]  # fmt: skip
        return place

    def allocate(self, func: object, x: Tensor) -> None:
        if x.requires_grad:
            raise KeyError("requires_grad")
        shape, strides, dtype = (self.name(y) for y in (tuple(x.shape), x.stride(), x.dtype))
        device = self.name(x.device)
        self.places[id(x)] = place = f"made{len(self.lines)}"
        quick = getattr(_guards, f"_empty_strided_{x.device.type}", None)
        if func is _ZEROS:
            made = f"torch.zeros({shape}, dtype={dtype}, device={device})"
        elif quick is not None:
            made = f"{self.name(quick)}({shape}, {strides}, {dtype})"
        else:
            made = f"torch.empty_strided({shape}, {strides}, dtype={dtype}, device={device})"
        self.lines.append(f"{place} = {made}")

    def launch(
        self, compiled: object, grid: tuple, arguments: Sequence[object], values: tuple
    ) -> None:
        run, grid, values = self.name(compiled.run), self.name(grid), self.name(values)
        known = self.name(compiled.function), self.name(compiled.packed_metadata)
        # Kept: from Triton 3.8 on it unloads its code when it goes.
        self.name(compiled)
        listed = "".join(self.expression(x) + ", " for x in arguments)
        # No hooks and nothing for them: see _watched.
        self.lines.append(
            f"{run}(*{grid}, stream, {', '.join(known)}, None, None, None, {listed}*{values})"
        )

    def function(self, result: object) -> Callable[[list[Tensor]], object]:
        body = [*self.lines, f"return {self.expression(result)}"]
        source = "def replay(given):\n" + "".join(f"    {line}\n" for line in body)
        exec(_code(source), self.names)
        return self.names["replay"]


@functools.lru_cache(maxsize=256)
def _code(source: str) -> object:
    """The same for all lengths, whose numbers have names in it."""
    return compile(source, f"<{__name__}>", "exec")


def _written(
    seen: _Recording, given: list[Tensor], result: object
) -> Callable[[list[Tensor]], object] | None:
    """The recording as a function, None if it is not all that the call did."""
    compiled = [launched[0] for launched in seen.launches]
    if not seen.complete or not compiled or None in compiled:
        return None
    writer = _Writer(given)
    try:
        for made in seen.made:
            writer.allocate(*made)
        for launched in seen.launches:
            writer.launch(*launched)
        return writer.function(result)
    except KeyError:
        return None


def _key(arguments: Sequence[object]) -> tuple[tuple, list[Tensor]]:
    """All that a call may depend on besides what its tensors hold and where they are; the tensors.
    Which of them are one and the same is part of it.
    """
    found, given, places = [], [], {}
    for x in arguments:
        if isinstance(x, Tensor):
            place = places.setdefault(id(x), len(given))
            found += (place, x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)
            given.append(x)
        else:
            found += (type(x), x)
    return tuple(found), given


def _watched(kernels: tuple[object, ...]) -> bool:
    """Whether Triton may compile something else than without, or calls something before a launch:
    for debugging, a profiler within kernels, somebody's passes or hooks.
    """
    return bool(
        knobs.runtime.debug
        or knobs.compilation.instrumentation_mode
        or getattr(knobs.runtime, "add_stages_inspection_hook", None)
        or getattr(knobs.runtime.launch_enter_hook, "calls", knobs.runtime.launch_enter_hook)
        or getattr(knobs.runtime.launch_exit_hook, "calls", knobs.runtime.launch_exit_hook)
        or any([getattr(kernel, "pre_run_hooks", None) for kernel in kernels])
    )


def replayed(*kernels: object) -> Callable[[Callable], Callable]:
    """Decorator: from the second call of a kind on, only what the first one allocated and launched.

    The function takes tensors of one device, first one of them, and hashable arguments, on which
    all that it does depends, and returns tensors. It is called with that device as the current one.
    Where it does more than allocate and launch through :func:`launch`, a copy for example, every
    call of that kind is made as without this.

    Args:
        *kernels: those it launches.
    """

    def decorate(function: Callable) -> Callable:
        # By key: what replays it, or how many of its recordings could not be.
        plans: dict[tuple, Callable | int] = {}

        def record(key: tuple, given: list[Tensor], arguments: tuple, tries: int) -> object:
            with _Recording() as seen:
                result = function(*arguments)
            if len(plans) >= _MOST_PLANS:
                plans.clear()
            plans[key] = plan = _written(seen, given, result) or tries + 1
            if plan == _MOST_TRIES:
                logger.debug("%s is not replayed for calls as %s", function.__name__, key)
            return result

        @functools.wraps(function)
        def call(*arguments: object) -> object:
            with on_device(arguments[0]):
                if _watched(kernels) or _NOTES.launches is not None:
                    return function(*arguments)
                key, given = _key(arguments)
                plan = plans.get(key, 0)
                if callable(plan):
                    return plan(given)
                if plan == _MOST_TRIES:
                    return function(*arguments)
                return record(key, given, arguments, plan)

        return call

    return decorate
