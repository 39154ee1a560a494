"""What CI compiles of the kernels that are written for sm_90."""

import torch
from triton.experimental.gluon.language import NVMMASharedLayout

from ..aot import CompileCase
from . import config, hopper_backward, hopper_forward
from .hopper_backward import PIECE, SUMS

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_ALIGNED = [["tt.divisibility", 16]]
# A vector of the mask: see hopper.of_sample.
_VECTOR = ("*i32", "i32")
# Accepted spills, in bytes: values that the loop over rows does not touch (triton 3.6.0 and 3.7.1;
# 3.9 spills less, 3.8 up to 828). The first two were timed with and without: docs/attention.md.
SPILLS = {
    "mixed_attention_fwd_hopper-D256-bf16-L128": 128,
    "mixed_attention_fwd_hopper-D256-bf16-L1025": 140,
    "mixed_attention_fwd_hopper-D256-bf16-L3072": 72,
    "mixed_attention_bwd_hopper-D128-bf16": 12,
    "mixed_attention_bwd_hopper-D128-bf16-ordered": 12,
    "mixed_attention_bwd_hopper-D128-fp16": 12,
    "mixed_attention_bwd_hopper-D128-bf16-L256": 36,
    "mixed_attention_bwd_hopper-D128-bf16-group4": 24,
    "mixed_attention_bwd_hopper-D128-bf16-group4-L256": 36,
    "mixed_attention_bwd_hopper-D128-bf16-group4-few": 16,
    "mixed_attention_bwd_hopper-D128-bf16-group4-ordered": 56,
    "mixed_attention_bwd_hopper-D128-bf16-few": 24,
    "mixed_attention_bwd_hopper-D128-bf16-few-ordered": 48,
    "mixed_attention_bwd_hopper-D128-bf16-lse": 28,
    "mixed_attention_bwd_hopper-D128-bf16-ordered-lse": 28,
    "mixed_attention_bwd_hopper-D128-bf16-group4-ordered-lse": 72,
    "mixed_attention_bwd_hopper-D128-bf16-L128": 48,
    "mixed_attention_bwd_hopper-D128-bf16-group4-L128": 120,
    "mixed_attention_bwd_hopper-D256-bf16": 80,
    "mixed_attention_bwd_hopper-D256-bf16-L256": 132,
    "mixed_attention_bwd_hopper-D256-bf16-group2-L1024": 148,
    "mixed_attention_bwd_hopper-D256-bf16-ordered": 72,
    "mixed_attention_bwd_hopper-D256-bf16-L64": 8,
    "mixed_attention_bwd_hopper-D256-bf16-group4-L64": 48,
}


def _descriptor(name: str, rows: int, dim: int) -> str:
    return f"tensordesc<{name}{[1, 1, rows, dim]},{NVMMASharedLayout(128, 16, 4)!r}>"


def _suffix(group: int, num_keys: int) -> str:
    """Of a name: what differs from 4096 keys that no heads share."""
    return f"-group{group}" * (group > 1) + f"-L{num_keys}" * (num_keys != 4096)


def forward_case(
    dim: int, dtype: torch.dtype, *, length: int = 4096, group: int = 1
) -> CompileCase:
    """The warp-specialised forward kernel as launched for so many rows."""
    picked = config.pick_hopper_forward(90, dim, dtype, length, plain_scores=True, aligned=True)
    fn, name = hopper_forward._mixed_attention_fwd_hopper_kernel, _NAMES[dtype]
    rows = picked.block_m // picked.groups
    row, key = _descriptor(name, rows, dim), _descriptor(name, picked.block_n, dim)
    out = _descriptor(name, rows, min(dim, 128))
    constants = {"HEADS": 32, "GROUP": group, "D": dim} | picked.constants()
    signature = {
        "q_desc": row, "k_desc": key, "v_desc": key, "o_desc": out, "lse_ptr": "*fp32",
        "counter_ptr": "*i32" if picked.dynamic else "*fp32",
        "start": _VECTOR, "end": _VECTOR, "outer": "fp32", "num_queries": "i32",
        "items": "i32",
    } | dict.fromkeys(constants, "constexpr")  # fmt: skip
    attrs = {(fn.arg_names.index("lse_ptr"),): _ALIGNED}
    name = f"mixed_attention_fwd_hopper-D{dim}-{name}-L{length}" + f"-group{group}" * (group > 1)
    return CompileCase(
        name, fn, signature, constants, attrs, 4, 1, True, SPILLS.get(name, 0)
    )  # fmt: skip


def backward_case(
    dim: int, dtype: torch.dtype, *, group: int = 1, ordered: bool = False, num_keys: int = 4096,
    few: bool = False, grad_lse: bool = False,
) -> CompileCase:  # fmt: skip
    """The warp-specialised backward kernel as launched for so many keys, of few heads or many."""
    picked = config.pick_hopper_backward(
        90, dim, dtype, num_keys, plain_scores=True, aligned=True, planes=1 if few else 128,
        group=group, ordered=ordered,
    )  # fmt: skip
    fn, name = hopper_backward._mixed_attention_bwd_hopper_kernel, _NAMES[dtype]
    row, key = _descriptor(name, picked.block_m, dim), _descriptor(name, picked.block_n, dim)
    plain = NVMMASharedLayout(0, 32, 2)
    stats = f"tensordesc<fp32{[1, 2 * picked.block_m]},{plain!r}>"
    sums = f"tensordesc<fp32{[picked.block_m * dim // SUMS, SUMS]},{plain!r}>"
    constants = {"HEADS": 32, "GROUP": group, "D": dim, "ORDERED": ordered and not picked.whole}
    constants |= {"HAS_GRAD_LSE": grad_lse} | picked.constants()
    signature = {
        "q_desc": row, "k_desc": key, "v_desc": key, "g_desc": row, "stats_desc": stats,
        "dk_desc": key, "dv_desc": key,
        "bounds": (_VECTOR, _VECTOR, "*i32", "*i32"), "inputs": (*("*fp32",) * 4, "fp32", "fp32"),
    }  # fmt: skip
    if picked.statistics:
        signature |= dict.fromkeys(("o_desc", "go_desc"), _descriptor(name, PIECE, dim))
    if picked.staged or picked.whole:
        signature["dq_desc"] = sums if picked.staged else row
    # What is not there.
    constants |= dict.fromkeys({"dq_desc", "o_desc", "go_desc"} - set(signature))
    signature |= dict.fromkeys(constants, "constexpr")
    attrs = {(fn.arg_names.index("inputs"), 3): _ALIGNED}
    name = f"mixed_attention_bwd_hopper-D{dim}-{name}" + _suffix(group, num_keys)
    name += "-few" * few + "-ordered" * ordered + "-lse" * grad_lse
    return CompileCase(
        name, fn, signature, constants, attrs, 8, 1, True, SPILLS.get(name, 0)
    )  # fmt: skip


def prepare_case(
    dim: int, dtype: torch.dtype, *, group: int = 1, num_keys: int = 4096, aligned: bool = True
) -> CompileCase:
    """The kernel before it; rows are ``aligned`` where strides are multiples of 16 elements."""
    picked = config.pick_hopper_backward(
        90, dim, dtype, num_keys, plain_scores=True, aligned=True, group=group
    )
    fn, pointer = hopper_backward._prepare_kernel, "*" + _NAMES[dtype]
    constants = {
        "HEADS": 32, "D": dim, "BLOCK_M": picked.block_m, "HAS_GRAD_LSE": True, "ORDERED": False,
        "PART": picked.statistics, "LAUNCH": True, "WHOLE": picked.whole,
    }  # fmt: skip
    signature = {
        "out_ptr": pointer, "grad_out_ptr": pointer, "lse_ptr": "*fp32", "grad_lse_ptr": "*fp32",
        "stats_ptr": "*fp32", "dirty_ptr": "*i32", "counts_ptr": "*i32",
        "dq_ptr": "*fp32", "strides": ("i32",) * 6,
        "num_queries": "i32", "heads": "i32", "first_heads": "i32",
    } | dict.fromkeys(constants, "constexpr")  # fmt: skip
    attrs = {(fn.arg_names.index(n),): _ALIGNED for n in ("out_ptr", "grad_out_ptr", "dq_ptr")}
    if aligned:
        attrs |= {(fn.arg_names.index("strides"), i): _ALIGNED for i in range(6)}
    name = f"mixed_attention_bwd_prepare-D{dim}" + _suffix(group, num_keys)
    name += "-unaligned" * (not aligned)
    return CompileCase(name, fn, signature, constants, attrs, 8, 3, False)


def finish_case(
    dim: int, dtype: torch.dtype, *, group: int = 1, num_keys: int = 4096
) -> CompileCase:
    """The kernel after it."""
    picked = config.pick_hopper_backward(
        90, dim, dtype, num_keys, plain_scores=True, aligned=True, group=group
    )
    fn = hopper_backward._finish_kernel
    constants = {
        "HEADS": 32, "GROUP": group, "D": dim, "BLOCK_M": picked.block_m, "TRANSPOSED": dim >= 128,
        "WAIT": True, "EARLY": picked.early,
    }  # fmt: skip
    signature = {
        "sums_ptr": "*fp32", "dq_ptr": "*" + _NAMES[dtype], "strides": ("i32",) * 3,
        "scale": "fp32", "num_queries": "i32", "counts_ptr": "*i32", "key_tiles": "i32",
    } | dict.fromkeys(constants, "constexpr")  # fmt: skip
    attrs = {(fn.arg_names.index(n),): _ALIGNED for n in ("sums_ptr", "dq_ptr")}
    name = f"mixed_attention_bwd_finish-D{dim}" + _suffix(group, num_keys)
    return CompileCase(name, fn, signature, constants, attrs, 8, 3, False)


def compile_cases(arch: int) -> list[CompileCase]:
    """Every head dimension that has such a kernel; nothing for other chips than sm_90."""
    if arch != 90:
        return []
    bf16, dims = torch.bfloat16, config.HOPPER_BACKWARD
    cases = [backward_case(dim, bf16, ordered=o) for dim in dims for o in (False, True)]
    cases += [
        backward_case(128, torch.float16),
        backward_case(64, bf16, ordered=True, num_keys=8192),
    ]
    for ordered in (False, True):
        cases.append(backward_case(128, bf16, group=4, ordered=ordered))
        cases.append(backward_case(128, bf16, few=True, ordered=ordered))
        # Only where statistics are prepared ahead does this kernel ask for it.
        cases.append(backward_case(128, bf16, ordered=ordered, grad_lse=True))
    cases.append(backward_case(128, bf16, group=4, ordered=True, grad_lse=True))
    # Zeros ahead with shared heads.
    cases.append(backward_case(128, bf16, group=4, few=True))
    cases += [case(dim, bf16) for dim in dims for case in (prepare_case, finish_case)]
    cases += [prepare_case(dim, bf16, aligned=False) for dim in dims]
    # With and without statistics or zeros ahead, an early end and late products: of the cases above
    # D = 128 has the first two, but for few programs in order, D = 64 the last.
    short = ((64, 1, 256), (128, 1, 256), (128, 4, 256), (256, 1, 256), (256, 2, 1024))
    for dim, group, num_keys in short:
        for case in (backward_case, prepare_case, finish_case):
            cases.append(case(dim, bf16, group=group, num_keys=num_keys))
    # One tile holds all keys: no kernel after it.
    for dim, (_, most, _) in config.HOPPER_BACKWARD.items():
        cases += [backward_case(dim, bf16, group=g, num_keys=most) for g in (1, 4)]
        cases.append(prepare_case(dim, bf16, num_keys=most))
    forward = [(d, max(row[0], 128)) for d, tiles in config.HOPPER_FORWARD.items() for row in tiles]
    cases += [forward_case(dim, bf16, length=n) for dim, n in forward]
    cases += [forward_case(128, torch.float16), forward_case(128, bf16, group=4)]
    return cases
