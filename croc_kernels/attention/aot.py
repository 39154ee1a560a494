"""What CI compiles of the attention kernels, per chip."""

import torch

from ..aot import CompileCase
from . import backward, config, forward, hopper_aot, mask_aot

_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_ALIGNED = [["tt.divisibility", 16]]

# Accepted spills, in bytes; everything else must not spill. Triton 3.7.1 spills as much or less
# (560 at D = 256 on sm_90: measured, faster than tiles without spills); D = 128 there is for triton
# 3.6.0. No kernel has run on sm_100.
SPILLS = {
    ("mixed_attention_bwd-D128-bf16-until", 90): 320,
    ("mixed_attention_bwd-D128-bf16-until", 100): 364,
    ("mixed_attention_fwd-D128-fp32", 100): 148,
    ("mixed_attention_fwd-D128-bf16-until", 100): 208,
    ("mixed_attention_fwd-D256-bf16", 100): 184,
    ("mixed_attention_fwd-D256-bf16-softcap", 100): 184,
    ("mixed_attention_bwd-D256-bf16", 100): 136,
    ("mixed_attention_bwd-D256-bf16-softcap", 100): 144,
    ("mixed_attention_bwd-D160-bf16", 80): 192,
    ("mixed_attention_bwd-D256-bf16-softcap", 80): 128,
    ("mixed_attention_bwd-D256-bf16", 90): 640,
    ("mixed_attention_bwd-D256-bf16-softcap", 90): 640,
    ("mixed_attention_bwd-D128-bf16", 90): 192,
}


def _aligned(fn: object, names: dict[str, int]) -> dict[tuple[int, ...], list]:
    """Attributes of arguments that are multiples of 16; names map to tuple lengths, or 0."""
    attrs = {}
    for name, elements in names.items():
        index = fn.arg_names.index(name)
        paths = [(index, i) for i in range(elements)] if elements else [(index,)]
        attrs.update(dict.fromkeys(paths, _ALIGNED))
    return attrs


def _shape_constants(dim: int, softcap: bool, until: bool, group: int, precision: str) -> dict:
    first, second = config.split_head(dim)
    return {
        "HEADS": 32, "GROUP": group, "D1": first, "D2": second, "HAS_SOFTCAP": softcap,
        "HAS_UNTIL": until, "PRECISION": precision,
    }  # fmt: skip


def forward_case(
    arch: int, dim: int, dtype: torch.dtype, *, softcap: bool = False, until: bool = False,
    group: int = 1, precision: str = "ieee", picked: config.ForwardConfig | None = None,
) -> CompileCase:  # fmt: skip
    """The forward kernel as launched on ``arch``; ``picked`` tries other tiles."""
    picked = picked or config.pick_forward(arch, dim, dtype, 4096)
    fn, pointer = forward._mixed_attention_fwd_kernel, _POINTERS[dtype]
    constants = _shape_constants(dim, softcap, until, group, precision) | picked.constants()
    signature = {
        "q_ptr": pointer, "k_ptr": pointer, "v_ptr": pointer, "out_ptr": pointer,
        "lse_ptr": "*fp32", "bounds": ("*i32",) * 3, "strides": ("i32",) * 15,
        "inner": "fp32", "outer": "fp32",
        "num_queries": "i32", "num_keys": "i32",
    } | dict.fromkeys(constants, "constexpr")  # fmt: skip
    attrs = _aligned(
        fn,
        dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr"), 0)
        | {"bounds": 3, "strides": 12},
    )  # fmt: skip
    name = f"mixed_attention_fwd-D{dim}-{pointer[1:]}"
    name += "-softcap" * softcap + "-until" * until + "-tf32" * (precision == "tf32")
    return CompileCase(
        name, fn, signature, constants, attrs, picked.num_warps, picked.num_stages,
        dtype != torch.float32 or precision == "tf32", SPILLS.get((name, arch), 0),
    )  # fmt: skip


def backward_case(
    arch: int, dim: int, dtype: torch.dtype, *, softcap: bool = False, until: bool = False,
    group: int = 1, precision: str = "ieee",
    picked: config.BackwardConfig | None = None,
) -> CompileCase:  # fmt: skip
    """The backward kernel as launched on ``arch``; ``picked`` tries other tiles."""
    picked = picked or config.pick_backward(arch, dim, dtype, 4096)
    fn, pointer = backward._mixed_attention_bwd_kernel, _POINTERS[dtype]
    constants = _shape_constants(dim, softcap, until, group, precision) | picked.constants()
    signature = {
        "tensors": (pointer,) * 4, "stats": ("*fp32",) * 2,
        "grads": (pointer,) * 3,
        "bounds": ("*i32",) * 5, "strides": ("i32",) * 26,
        "inner": "fp32", "outer": "fp32", "scale": "fp32",
        "num_queries": "i32", "num_keys": "i32", "key_programs": "i32",
    } | dict.fromkeys(constants, "constexpr")  # fmt: skip
    attrs = _aligned(fn, {"tensors": 4, "stats": 2, "grads": 3, "bounds": 5, "strides": 21})
    name = f"mixed_attention_bwd-D{dim}-{pointer[1:]}"
    name += "-softcap" * softcap + "-until" * until + "-tf32" * (precision == "tf32")
    return CompileCase(
        name, fn, signature, constants, attrs, picked.num_warps, picked.num_stages,
        dtype != torch.float32 or precision == "tf32", SPILLS.get((name, arch), 0),
    )  # fmt: skip


def delta_case(dim: int, dtype: torch.dtype) -> CompileCase:
    """The small kernel before the backward pass."""
    fn, pointer = backward._delta_kernel, _POINTERS[dtype]
    constants = {
        "HEADS": 32, "D": dim, "BLOCK_D": 1 << (dim - 1).bit_length(),
        "BLOCK_M": config.DELTA_BLOCK_M, "HAS_GRAD_LSE": True,
    }  # fmt: skip
    signature = {
        "out_ptr": pointer, "grad_out_ptr": pointer, "grad_lse_ptr": "*fp32",
        "delta_ptr": "*fp32", "strides": ("i32",) * 9, "num_queries": "i32",
    } | dict.fromkeys(constants, "constexpr")  # fmt: skip
    attrs = _aligned(fn, {"out_ptr": 0, "grad_out_ptr": 0, "strides": 6})
    return CompileCase(
        f"mixed_attention_delta-D{dim}-{pointer[1:]}", fn, signature, constants, attrs,
        config.DELTA_NUM_WARPS, 2, False,
    )  # fmt: skip


def compile_cases(arch: int) -> list[CompileCase]:
    """Every head dimension in bf16, and each option once.

    Args:
        arch: compute capability, 80, 90 or 100.
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = []
    for dim in config.HEAD_DIMS:
        cases.append(forward_case(arch, dim, bf16))
        cases.append(backward_case(arch, dim, bf16))
    cases += [
        forward_case(arch, 128, torch.float16), forward_case(arch, 128, fp32),
        forward_case(arch, 64, fp32, precision="tf32"),
        forward_case(arch, 256, bf16, softcap=True), forward_case(arch, 128, bf16, until=True),
        backward_case(arch, 64, fp32),
        backward_case(arch, 128, bf16, until=True, group=4),
        backward_case(arch, 256, bf16, softcap=True), delta_case(256, bf16),
    ]  # fmt: skip
    return cases + mask_aot.compile_cases() + hopper_aot.compile_cases(arch)
