"""The tensors and numbers that attention kernels are handed: how they are laid out, whether the
copy engine can read them, and what follows from them alone.
"""

import torch
from torch import Tensor

from ..backend import capability, interpreted
from .config import LOG2_E, split_head


def tma_aligned(x: Tensor) -> bool:
    """Whether a (B, H, L, D) tensor can be read through a TMA descriptor."""
    size, strides = x.element_size(), x.stride()
    # Of a dimension of one element it may be anything.
    for n, s in zip(x.shape, strides[:3], strict=False):
        if n > 1 and (s <= 0 or s * size % 16):
            return False
    return strides[3] == 1 and x.data_ptr() % 16 == 0


def known_to_be_aligned(x: Tensor) -> bool:
    """Whether Triton knows that all rows of a (B, H, L, D) tensor begin at multiples of 16 bytes:
    it asks whether address and strides are multiples of 16.
    """
    return x.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in x.stride()[:3])


def must_copy_values(arch: int, dim: int, v: Tensor) -> bool:
    """Whether the plain forward needs v in rows that :func:`known_to_be_aligned`.

    Other rows are loaded without a pipeline, into one place in shared memory. For the second part
    of a head, of 16 or 32 half-precision components, ptxas 12.8 then adds to a register that it has
    not set (:func:`croc_kernels.aot.unset_reads`), and wgmma reads elsewhere.
    """
    small = split_head(dim)[1] in (16, 32) and v.element_size() == 2
    return arch == 90 and small and not known_to_be_aligned(v)


def arch_of(tensor: Tensor) -> int:
    """Compute capability of the tensor's device, 0 in the interpreter."""
    return 0 if interpreted() else capability(tensor.device.index)


def by_sample(*vectors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """(B, L) vectors of a mask as kernels read them, neighbours side by side, and the distance from
    sample to sample: views into one tensor, and one row expanded to all samples, are not copied.
    """
    vectors = tuple(x if x.stride(1) == 1 else x.contiguous() for x in vectors)
    return vectors, tuple(x.stride(0) if x.shape[0] > 1 else 0 for x in vectors)


def factors(scale: float, softcap: float) -> tuple[float, float]:
    """(inner, outer): base-2 logits are outer * s without a soft cap, outer * tanh(inner * s) with
    one.
    """
    return (scale / softcap, softcap * LOG2_E) if softcap else (0.0, scale * LOG2_E)


def precision(dtype: torch.dtype) -> str:
    """Of float32 products: tf32 only where torch allows it."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def shape_constants(q: Tensor, k: Tensor) -> dict[str, object]:
    """Constexpr arguments that depend on the shapes alone."""
    first, second = split_head(q.shape[3])
    return {"HEADS": q.shape[1], "GROUP": q.shape[1] // k.shape[1], "D1": first, "D2": second}
