"""Launches of Triton kernels that keep the host for less time.

At every launch Triton works out what the arguments are compiled to and compares the globals that a
kernel uses: 20 us of Python, where a kernel may take 30. Here the compiled kernel is looked up by
what Triton looks at, and launched as Triton lets one launch what :meth:`JITFunction.warmup` gives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# By function, device, constants, options and what its arguments are compiled to: the compiled
# kernel and the values of its constants. The function is kept, so its id stays its own.
_COMPILED: dict[tuple, tuple] = {}
# A number for every kind of tensor descriptor: cheaper to compare than what it consists of.
_KINDS: dict[tuple, int] = {}


def kind_of(descriptor: object) -> int:
    """A number for what a tensor descriptor is compiled to. Whoever makes many alike may keep it in
    their ``kind``.
    """
    kind = (descriptor.base.dtype, tuple(descriptor.block_shape), repr(descriptor.layout))
    return _KINDS.setdefault(kind, len(_KINDS))


def _specialize(arguments: Sequence[object], found: list[object]) -> list[object]:
    """What Triton compiles arguments to: at least what it tells apart, in tuples too."""
    for x in arguments:
        kind = type(x)
        if kind is int:
            # One is compiled in; of others it matters whether 16 divides them, and their width.
            found.append(1 if x == 1 else (x & 15 == 0, x.bit_length() // 32, x < 0))
        elif kind is float:
            found.append(kind)
        elif kind is tuple:
            found.append(len(x))
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
    # The interpreter compiles nothing.
    if hasattr(compiled, "packed_metadata"):
        names = kernel.arg_names[len(arguments) :]
        _COMPILED[key] = compiled, tuple(constants[name] for name in names), kernel
