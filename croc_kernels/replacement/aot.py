"""What CI compiles of the replacement and loss kernels, per chip: rows of 4096 components."""

from ..aot import CompileCase
from . import kernel, loss_kernel, loss_list
from .config import pick_loss
from .layout import column_block

DIM = 4096
DTYPES = ("fp16", "bf16", "fp32")
_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
# Not a multiple of 16, or a tuple.
_ODD = ("length", "columns", "sizes", "strides")


def _case(
    name: str, fn: object, types: dict[str, str], sizes: tuple[str, ...], constants: dict,
    warps: int = 4,
) -> CompileCase:  # fmt: skip
    """A case in which every pointer and size is a multiple of 16, the length of an image apart."""
    types = types | dict.fromkeys(sizes, "i32")
    signature = {argument: types.get(argument, "constexpr") for argument in fn.arg_names}
    attrs = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(fn.arg_names)
        if argument in types and argument not in _ODD
    }
    if "strides" in types:
        place = fn.arg_names.index("strides")
        attrs |= {(place, i): [["tt.divisibility", 16]] for i in range(len(types["strides"]))}
    if "sizes" in types:
        place = fn.arg_names.index("sizes")
        # Rows, components, pool rows.
        attrs |= {(place, i): [["tt.divisibility", 16]] for i in (0, 2, 3)[: len(types["sizes"])]}
    return CompileCase(name, fn, signature, constants, attrs, warps, 3, has_dot=False)


def _replacement_cases(dtype: str, arch: int) -> list[CompileCase]:
    overlap = {"OVERLAP": arch >= 90}
    block = {"BLOCK_R": kernel.ROWS, "BLOCK_C": column_block(DIM)}
    sort = {"GROUP": kernel.GROUP, "BLOCK": kernel.SORT_BLOCK, "LIST": kernel.SORT_LIST}
    operands = {"where_ptr": "*i1", "index_ptr": "*i64"}
    rows = {"embeddings_ptr": f"*{dtype}", "pool_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    gradient = {"grad_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "pool_ptr": f"*{dtype}"}
    gradient |= {"work_ptr": "*i32", "part_ptr": "*fp32", "sizes": ("i32",) * 4}
    gradient |= {"plan": ("i32",) * 5, "strides": ("i32",) * 2}
    sums = {"SUM_R": kernel.SUM_ROWS, "CHUNK": kernel.CHUNK, "ACC": kernel.tl.float32}
    sums |= {"SUM_C": column_block(DIM, kernel.SUM_BYTES // _BYTES[dtype])}
    columns = {"COLUMNS": DIM // column_block(DIM)}
    return [
        _case(
            f"replace_tokens_fwd-{dtype}", kernel._replace_kernel, rows | operands,
            ("rows", "length", "dim", "pool_size", "stride_eb", "stride_el", "stride_pm"), block,
        ),
        _case(
            f"replace_tokens_bwd-{dtype}", kernel._replace_gradient_kernel,
            gradient | operands, (),
            block | {"BLOCK_R": kernel.GRADIENT_ROWS} | sums | overlap,
        ),
        _case(
            f"replace_tokens_bwd-sort-{dtype}", kernel._sort_kernel,
            operands | {"work_ptr": "*i32"}, ("rows", "pool_size", "columns"),
            sort | columns | overlap, kernel.SORT_WARPS,
        ),
    ]  # fmt: skip


def _loss_cases(dtype: str, target: str, selected: bool, arch: int) -> list[CompileCase]:
    types = {"prediction_ptr": f"*{dtype}", "target_ptr": f"*{target}", "strides": ("i32",) * 4}
    types |= {"where_ptr": "*i1"} if selected else {}
    constants = {"BETA": 0.01}
    constants |= {} if selected else {"where_ptr": None}
    double = "fp64" in (dtype, target)
    acc, ACC = ("fp64", kernel.tl.float64) if double else ("fp32", kernel.tl.float32)
    sizes, label = ("rows", "length", "dim"), f"{dtype}-{target}" + "-selected" * selected
    overlap = {"OVERLAP": arch >= 90}
    picked = pick_loss(max(_BYTES[dtype], _BYTES[target]))
    forward = {"ACC": ACC, "ROWS": picked.rows, "HEAD": picked.head}
    forward |= {"BLOCK_C": column_block(DIM, picked.columns), "CLEAR_C": column_block(DIM)}
    forward |= {"CLEARING": picked.clearing, "BLOCK": loss_kernel.reduce_block(arch >= 90)}
    backward = {"BLOCK_R": loss_kernel.GRADIENT_ROWS, "BLOCK_C": column_block(DIM)}
    scalars = dict.fromkeys(("divisor_ptr", "expected_ptr"), f"*{acc}")
    result = (
        types | scalars | {"partial_ptr": f"*{acc}", "loss_ptr": f"*{acc}", "state_ptr": "*i32"}
    )
    result |= {"sizes": ("i32",) * 3}
    gradient = scalars | {"grad_ptr": f"*{acc}", "history_ptr": f"*{acc}", "out_ptr": f"*{dtype}"}
    return [
        _case(
            f"reconstruction_loss_fwd-{label}", loss_kernel._loss_kernel,
            result, (), constants | forward | overlap | {"gradient_ptr": None}, picked.warps,
        ),
        _case(
            f"reconstruction_loss_fwd_foreseen-{label}", loss_kernel._loss_kernel,
            result | {"gradient_ptr": f"*{dtype}"}, (), constants | forward | overlap, picked.warps,
        ),
        _case(
            f"reconstruction_loss_bwd_foreseen-{label}", loss_kernel._loss_gradient_kernel,
            types | gradient, sizes, constants | backward, loss_kernel.CHECK_WARPS,
        ),
    ]  # fmt: skip


def compile_cases(arch: int) -> list[CompileCase]:
    """One case per kernel and dtype."""
    cases = [case for dtype in DTYPES for case in _replacement_cases(dtype, arch)]
    for types in (("bf16", "bf16", True), ("bf16", "fp32", True)):
        cases += _loss_cases(*types, arch)
    for types in (("fp16", "fp16", False), ("fp32", "fp32", False), ("fp64", "fp64", False)):
        cases += _loss_cases(*types, arch)
    names = ("items_ptr", "history_ptr", "divisor_ptr", "expected_ptr")
    scalars = dict.fromkeys(names, "*fp32") | {"where_ptr": "*i1", "state_ptr": "*i32"}
    constants = {"SPAN": loss_list.LIST_ROWS, "BLOCK": loss_list.LIST_BLOCK, "MEAN": True}
    constants |= {"HEAD": pick_loss(2).head, "OVERLAP": arch >= 90}
    start = loss_list._loss_start_kernel
    warps = loss_list.LIST_WARPS
    name = "reconstruction_loss_start"
    return [*cases, _case(name, start, scalars, ("rows", "dim"), constants, warps)]
