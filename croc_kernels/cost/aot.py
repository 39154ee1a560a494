"""What CI compiles of the cost kernels, per chip: 32 images against a pool of 2048 x 4096."""

import torch
from triton.experimental.gluon.language import NVMMASharedLayout

from ..aot import CompileCase
from . import kernel, prepass
from .config import CostConfig, HopperCostConfig, pick_config, pick_hopper

ROWS, POOL, DIM = 32 * 432, 2048, 4096
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_ALIGNED = [["tt.divisibility", 16]]
# Bytes, all between tiles: up to 64 with dense rows, up to 136 with others (triton 3.6.0, 3.7.1).
HOPPER_SPILLS = 136


def _signature(fn: object, types: dict[str, str]) -> dict[str, str]:
    """Types of the kernel's arguments by name; constexpr for those that have none."""
    return {name: types.get(name, "constexpr") for name in fn.arg_names}


def _attrs(fn: object, signature: dict[str, str], odd: tuple[str, ...] = ()) -> dict:
    """Every argument is a multiple of 16, but those named."""
    return {
        (place,): _ALIGNED
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


def _prepass_case(dtype: str, metric: str, gathered: bool, token_norms: bool) -> CompileCase:
    fn = prepass._row_prepass_kernel
    types = dict.fromkeys(("tokens_ptr", "pool_ptr"), f"*{dtype}") | {"offset_ptr": "*i64"}
    types |= {"index_ptr": "*i64", "num_rows_ptr": "*i32"} if gathered else {}
    types |= {"x_norm_ptr": "*fp32"} if token_norms else {}
    types |= {"p_norm_ptr": "*fp32", "sizes": ("i32",) * 5, "strides": ("i32",) * 3}
    signature = _signature(fn, types)
    constants = prepass.PREPASS | {"NORM": prepass.NORMS[metric]}
    constants["TOKEN_R"] = prepass.PREPASS["BLOCK_R"] if token_norms else prepass.OFFSET_ROWS
    constants |= {n: None for n in fn.arg_names if n.endswith("_ptr") and n not in types}
    attrs = _attrs(fn, signature, ("sizes", "strides"))
    name = f"row_prepass-{dtype}-{metric}" + "-gathered" * gathered + "-norms" * token_norms
    return CompileCase(name, fn, signature, constants, attrs, 4, 3, has_dot=False)


def hopper_case(
    dtype: str,
    metric: str,
    nearest: bool,
    dense: bool,
    *,
    even: bool = True,
    picked: HopperCostConfig | None = None,
) -> CompileCase:
    """The kernel for sm_90 as launched, with gathered and counted rows if not ``dense``, and with a
    pool that fills no whole tiles if not ``even``.
    """
    from . import hopper, hopper_results

    picked = picked or pick_hopper(90, DTYPES[dtype], ROWS, POOL, DIM, aligned=True)
    pointers = [f"*{dtype}", "*i64", "*i32", f"*{dtype}", "*fp32", "*fp32", "*i32", "*fp32"]
    pointers[5] = "*i64" if nearest else "*fp32"
    missing = [1, 2] * dense + [7] * nearest
    pointers = ["constexpr" if i in missing else pointers[i] for i in range(8)]
    constants = picked.constants(nearest) | {"METRIC": metric, "NEAREST": nearest, "EVEN": even}
    constants |= {"DENSE": dense}
    rows = [f"tensordesc<{dtype}{[n, picked.block_k]},{NVMMASharedLayout(128, 16, rank=2)!r}>"
            for n in (picked.block_n // 2, picked.block_m)]  # fmt: skip
    if even and not nearest:
        box = hopper_results.spread_box(picked)
        rows[0] = f"tensordesc<{dtype}{box},{hopper_results.SPREAD!r}>"
    signature = {
        "pool_desc": rows[0], "token_desc": rows[1] if dense else "constexpr",
        "pointers": tuple(pointers), "sizes": ("i32",) * 8,
    } | dict.fromkeys(constants, "constexpr")  # fmt: skip
    attrs = {(2, i): _ALIGNED for i in range(8) if i not in missing}
    attrs |= {(3, i): _ALIGNED for i in (0, 2, 3, 4, 6, 7) + (1,) * even}
    constants |= {(2, i): None for i in missing} | ({} if dense else {"token_desc": None})
    name = (
        f"token_cost_hopper-{dtype}-{metric}"
        + "-nearest" * nearest
        + "-dense" * dense
        + "-odd" * (not even)
    )
    return CompileCase(
        name, hopper._token_cost_hopper_kernel, signature, constants, attrs, 4, 1, True,
        HOPPER_SPILLS,
    )  # fmt: skip


def _start_case() -> CompileCase:
    """What sets the state of the kernel for sm_90."""
    fn = prepass._hopper_start_kernel
    types = {"key_ptr": "*i64", "state_ptr": "*i32", "rows": "i32", "states": "i32"}
    signature = _signature(fn, types)
    attrs, constants = _attrs(fn, signature, ("states",)), {"BLOCK": prepass.CLEAR}
    return CompileCase("hopper_start", fn, signature, constants, attrs, 4, 3, has_dot=False)


def _pool_norm_case() -> CompileCase:
    """Norms of the pool before costs of gathered rows."""
    from . import hopper_norms

    fn = hopper_norms._pool_norm_kernel
    types = {"pool_ptr": "*bf16", "p_norm_ptr": "*fp32", "state_ptr": "*i32", "states": "i32"}
    signature = _signature(fn, types | {"sizes": ("i32",) * 8})
    attrs = {(place,): _ALIGNED for place in range(3)} | {(4, i): _ALIGNED for i in (0, 1, 2, 7)}
    return CompileCase("pool_norm-bf16", fn, signature, {"METRIC": "l2"}, attrs, 1, 1, False)


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
    cases += [_prepass_case(dtype, "l2", gathered=True, token_norms=True) for dtype in DTYPES]
    cases.append(_prepass_case("bf16", "cosine", gathered=False, token_norms=True))
    cases.append(_prepass_case("bf16", "l2", gathered=True, token_norms=False))
    if arch == 90:
        for nearest in (False, True):
            cases += [hopper_case("bf16", "l2", nearest, dense) for dense in (False, True)]
            cases.append(hopper_case("fp16", "cosine", nearest, dense=False))
            cases.append(hopper_case("bf16", "l2", nearest, dense=False, even=False))
        cases.append(_pool_norm_case())
    return [*cases, _start_case(), _reduce_case()]
