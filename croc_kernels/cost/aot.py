"""What CI compiles of the cost kernels, per chip: 32 images against a pool of 2048 x 4096."""

import torch

from ..aot import CompileCase
from . import kernel
from .config import CostConfig, pick_config

ROWS, POOL, DIM = 32 * 432, 2048, 4096
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _signature(fn: object, types: dict[str, str]) -> dict[str, str]:
    """Types of the kernel's arguments by name; constexpr for those that have none."""
    return {name: types.get(name, "constexpr") for name in fn.arg_names}


def _attrs(fn: object, signature: dict[str, str], odd: tuple[str, ...] = ()) -> dict:
    """Every argument is a multiple of 16, but those named."""
    return {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(fn.arg_names)
        if signature[name] != "constexpr" and name not in odd
    }


def product_case(
    fn: object,
    arch: int,
    dtype: str,
    metric: str,
    *,
    rows: int = ROWS,
    dim: int = DIM,
    picked: CostConfig | None = None,
) -> CompileCase:
    """A product kernel as launched on ``arch``; ``picked`` tries another tile."""
    picked = picked or pick_config(arch, DTYPES[dtype], rows, POOL, dim)
    types = {"tokens_ptr": f"*{dtype}", "pool_ptr": f"*{dtype}", "offset_ptr": "*i64"}
    types |= dict.fromkeys(("x_norm_ptr", "p_norm_ptr", "out_ptr", "score_ptr"), "*fp32")
    types |= {"index_ptr": "*i32"} | dict.fromkeys(("rows", "m", "dim", "stride_pm"), "i32")
    signature = _signature(fn, types)
    constants = kernel.tile_constants(picked, DTYPES[dtype], dim, dim) | {"METRIC": metric}
    odd = ("dim", "stride_pm") if dim % 16 else ()
    name = fn.__name__.strip("_").removesuffix("_kernel")
    return CompileCase(
        f"{name}-{dtype}-N{rows}-C{dim}-{metric}", fn, signature, constants,
        _attrs(fn, signature, odd), picked.num_warps, picked.num_stages, has_dot=True,
    )  # fmt: skip


def _prepass_case(dtype: str, norm: str, gathered: bool) -> CompileCase:
    fn = kernel._row_prepass_kernel
    types = {"x_ptr": f"*{dtype}", "offset_ptr": "*i64", "norm_ptr": "*fp32"}
    types |= {"index_ptr": "*i64", "num_rows_ptr": "*i32"} if gathered else {}
    sizes = ("rows", "length", "num_sources", "dim", "stride_b", "stride_n")
    signature = _signature(fn, types | dict.fromkeys(sizes, "i32"))
    constants = kernel.PREPASS | {"NORM": norm}
    constants |= {} if gathered else {"index_ptr": None, "num_rows_ptr": None}
    name = f"row_prepass-{dtype}-{norm}" + "-gathered" * gathered
    return CompileCase(
        name, fn, signature, constants, _attrs(fn, signature), 4, 3, has_dot=False
    )  # fmt: skip


def _reduce_case() -> CompileCase:
    fn = kernel._nearest_reduce_kernel
    types = {"score_ptr": "*fp32", "index_ptr": "*i32", "out_ptr": "*i64"}
    signature = _signature(fn, types | {"rows": "i32", "tiles": "i32"})
    constants = {"BLOCK_R": kernel.REDUCE_ROWS}
    attrs = _attrs(fn, signature, ("tiles",))
    return CompileCase("nearest_reduce", fn, signature, constants, attrs, 4, 3, has_dot=False)


def compile_cases(arch: int) -> list[CompileCase]:
    """One case per kernel, dtype and tile shape that calls at real sizes use on ``arch``."""
    cost, nearest = kernel._token_cost_kernel, kernel._nearest_token_kernel
    cases = [product_case(fn, arch, dtype, "l2") for fn in (cost, nearest) for dtype in DTYPES]
    cases += [product_case(fn, arch, "bf16", "cosine") for fn in (cost, nearest)]
    cases.append(product_case(cost, arch, "bf16", "l2", rows=432))
    # A ragged last step, and rows that start at any multiple of two bytes.
    cases.append(product_case(cost, arch, "bf16", "l2", dim=DIM - 1))
    cases += [_prepass_case(dtype, "square", gathered=True) for dtype in DTYPES]
    cases.append(_prepass_case("bf16", "inverse", gathered=False))
    cases.append(_prepass_case("bf16", "none", gathered=True))
    return [*cases, _reduce_case()]
