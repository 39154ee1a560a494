"""What CI compiles of the mask kernels: the largest blocks, each kind of span, every option."""

from ..aot import CompileCase
from . import mask_columns, mask_kernel

_SOURCES = {"types": "*i1", "spans": "*i32", "prefix": "*i64", "labels": "*i64", "causal": "*i1"}

# Accepted spills, in bytes: the first on sm_80, the second on sm_100, with triton 3.7.1.
SPILLS = {"mask_rows-causal-plain": 8, "mask_rows-causal-packed": 112}


def _case(
    name: str, fn: object, pointers: dict[str, str], constants: dict, block: int, warps: int
) -> CompileCase:
    sizes = ("length", "num_spans", "num_borders", "ignore_index")
    types = pointers | dict.fromkeys((*sizes, "num_queries", "num_keys"), "i32")
    types = {name: types.get(name, "constexpr") for name in fn.arg_names}
    absent = [n for n, kind in types.items() if kind == "constexpr" and n.endswith("_ptr")]
    constants = dict.fromkeys(absent) | constants | {"BLOCK": block}
    attrs = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(fn.arg_names)
        if argument in pointers
    }
    return CompileCase(
        name,
        fn,
        types,
        constants,
        attrs,
        warps,
        3,
        has_dot=False,
        spill_allowance=SPILLS.get(name, 0),
    )


def compile_cases() -> list[CompileCase]:
    """One case per kind without options, and with all of them."""
    cases = []
    tile = mask_kernel.BLOCK, mask_kernel.BLOCK // mask_kernel.ELEMENTS_PER_WARP
    out = dict.fromkeys(("start_ptr", "end_ptr", "fault_ptr"), "*i32")
    options = {"plain": {}, "padded": {"valid_ptr": "*i64", "ids_ptr": "*i64"}}
    options["packed"] = {"valid_ptr": "*i1", "borders_ptr": "*i32"}
    for kind, source in _SOURCES.items():
        for name, pointers in options.items():
            constants = {"KIND": kind, "WINDOW": 0 if name == "plain" else 512}
            constants |= {"EXCEED": name == "packed"}
            types = out | {"source_ptr": source} | pointers
            fn = mask_kernel._mask_rows_kernel
            cases.append(_case(f"mask_rows-{kind}-{name}", fn, types, constants, *tile))
    paint = {"spans_ptr": "*i64"} | dict.fromkeys(("opened_ptr", "code_ptr", "fault_ptr"), "*i32")
    cases.append(_case("mask_spans", mask_kernel._paint_spans_kernel, paint, {}, *tile))
    columns = ("start_ptr", "end_ptr", "row_start_ptr", "row_end_ptr")
    for name, pointers in (("plain", ()), ("until", ("until_ptr", "visible_ptr"))):
        types = dict.fromkeys((*columns, *pointers), "*i32")
        fn = mask_columns._mask_columns_kernel
        cases.append(_case(f"mask_columns-{name}", fn, types, {}, mask_columns.KEYS, 4))
    return cases
