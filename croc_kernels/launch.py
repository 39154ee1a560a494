"""Launches of Triton kernels that keep the host for less time.

At every launch Triton works out in Python what the arguments are compiled to, and compares the
globals that a kernel uses: longer than a short kernel takes (docs/attention.md). Here the compiled
kernel is looked up by what Triton looks at, and launched as Triton lets one launch what
:meth:`JITFunction.warmup` gives.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from triton import knobs

# By function, device, constants, options and what its arguments are compiled to: the compiled
# kernel and the values of its constants. The function is kept, so its id stays its own.
_COMPILED: dict[tuple, tuple] = {}


def kind_of(descriptor: object) -> str:
    """What a tensor descriptor is compiled to. Whoever makes many alike may keep it in their
    ``kind``.
    """
    dtype, tile, layout = descriptor.base.dtype, descriptor.block_shape, descriptor.layout
    # One and the same of all alike, which is compared fast.
    return sys.intern(f"{type(descriptor).__name__} {dtype} {list(tile)} {layout!r}")


def _specialize(arguments: Sequence[object], found: list[object]) -> list[object]:
    """What Triton compiles arguments to: at least what it tells apart, in tuples too. Whatever
    comes first of an argument tells how it goes on, so no two lists of arguments give the same.
    """
    for x in arguments:
        kind = type(x)
        if kind is int:
            # One is compiled in; of others it matters whether 16 divides them, and their width.
            if -0x80000000 <= x < 0x80000000:
                found.append(1 if x == 1 else 0 if x & 15 else 16)
            else:
                found.append((x & 15 == 0, x < 1 << 63))
        elif kind is float:
            found.append(kind)
        elif kind is tuple:
            found.append(~len(x))
            _specialize(x, found)
        elif isinstance(x, Tensor):
            found.append(x.dtype)
            found.append(x.data_ptr() & 15 == 0)
        elif hasattr(x, "block_shape"):
            known = x.__dict__.get("kind")
            found.append(kind_of(x) if known is None else known)
        else:
            found.append((kind, x))
    return found


def _watched(kernel: object) -> bool:
    """Whether Triton may compile something else than without, or calls something before a launch:
    for debugging, a profiler within kernels, somebody's passes or hooks.
    """
    return bool(
        knobs.runtime.debug
        or knobs.compilation.instrumentation_mode
        or getattr(knobs.runtime, "add_stages_inspection_hook", None)
        or getattr(kernel, "pre_run_hooks", None)
    )


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
        constants: every constexpr; hashable.
        **options: Triton's, such as ``num_warps``; hashable.
    """
    if _watched(kernel):
        kernel[grid](*arguments, **constants, **options)
        return
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    fixed = (*constants.values(), *options.values())
    key = (
        id(kernel), device, *constants, *options, *fixed, *map(type, fixed),
        *_specialize(arguments, []),
    )  # fmt: skip
    known = _COMPILED.get(key)
    if known is not None:
        compiled, values, _kernel = known
        compiled[grid](*arguments, *values)
        return
    compiled = kernel[grid](*arguments, **constants, **options)
    # Within Triton's AsyncCompileMode, something that can't be launched again.
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    # The interpreter compiles nothing.
    if hasattr(compiled, "packed_metadata"):
        names = kernel.arg_names[len(arguments) :]
        _COMPILED[key] = compiled, tuple(constants[name] for name in names), kernel
