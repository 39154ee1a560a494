"""What CI compiles of the replacement and loss kernels, per chip: rows of 4096 components."""

from ..aot import CompileCase
from . import kernel

DIM = 4096
DTYPES = ("fp16", "bf16", "fp32")


def _case(
    name: str, fn: object, types: dict[str, str], sizes: tuple[str, ...], constants: dict
) -> CompileCase:
    """A case in which every pointer and size is a multiple of 16, the length of an image apart."""
    types = types | dict.fromkeys(sizes, "i32")
    signature = {argument: types.get(argument, "constexpr") for argument in fn.arg_names}
    attrs = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(fn.arg_names)
        if argument in types and argument not in ("length", "programs", "numel")
    }
    return CompileCase(name, fn, signature, constants, attrs, 4, 3, has_dot=False)


def _replacement_cases(dtype: str) -> list[CompileCase]:
    accumulator = {"ACC": kernel.tl.float32}
    block = {"BLOCK_R": kernel.ROWS, "BLOCK_C": kernel.column_block(DIM)}
    rows = {"embeddings_ptr": f"*{dtype}", "pool_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    strides = ("stride_gb", "stride_gl")
    return [
        _case(
            f"replace_tokens_fwd-{dtype}", kernel._replace_kernel, rows | {"source_ptr": "*i64"},
            ("rows", "length", "dim", "pool_size", "stride_eb", "stride_el", "stride_pm"), block,
        ),
        _case(
            f"replace_tokens_bwd-embeddings-{dtype}", kernel._keep_gradient_kernel,
            {"grad_ptr": f"*{dtype}", "source_ptr": "*i64", "out_ptr": f"*{dtype}"},
            ("rows", "length", "dim", *strides), block,
        ),
        _case(
            f"replace_tokens_bwd-pool-{dtype}", kernel._pool_gradient_kernel,
            {
                "grad_ptr": f"*{dtype}", "order_ptr": "*i64", "bounds_ptr": "*i32",
                "out_ptr": f"*{dtype}",
            },
            ("length", "dim", *strides),
            {"BLOCK_R": kernel.SUM_ROWS, "BLOCK_C": kernel.column_block(DIM, 512), **accumulator},
        ),
    ]  # fmt: skip


def _loss_cases(dtype: str, target: str, selected: bool) -> list[CompileCase]:
    types = {"prediction_ptr": f"*{dtype}", "target_ptr": f"*{target}", "partial_ptr": "*fp32"}
    types |= {"gradient_ptr": f"*{dtype}"} | ({"where_ptr": "*i1"} if selected else {})
    constants = {"BETA": 0.01, "ACC": kernel.tl.float32, "BLOCK_R": kernel.ROWS}
    constants |= {"BLOCK_C": kernel.column_block(DIM)} | ({} if selected else {"where_ptr": None})
    sizes = ("rows", "length", "dim", "stride_pb", "stride_pl", "stride_tb", "stride_tl")
    label = f"{dtype}-{target}" + "-selected" * selected
    return [_case(f"reconstruction_loss_fwd-{label}", kernel._loss_kernel, types, sizes, constants)]


def compile_cases(arch: int) -> list[CompileCase]:
    """One case per kernel and dtype; nothing here depends on ``arch``."""
    cases = [case for dtype in DTYPES for case in _replacement_cases(dtype)]
    cases += _loss_cases("bf16", "bf16", True) + _loss_cases("bf16", "fp32", True)
    cases += _loss_cases("fp16", "fp16", False) + _loss_cases("fp32", "fp32", False)
    scalars = dict.fromkeys(("partial_ptr", "total_ptr", "count_ptr"), "*fp32")
    constants = {"BLOCK": kernel.REDUCE_BLOCK}
    cases.append(
        _case(
            "reconstruction_loss_reduce", kernel._loss_reduce_kernel, scalars, ("programs",),
            constants,
        )
    )  # fmt: skip
    for dtype in DTYPES:
        types = {"gradient_ptr": f"*{dtype}", "scale_ptr": "*fp32", "out_ptr": f"*{dtype}"}
        fn, constants = kernel._scale_kernel, {"BLOCK": kernel.SCALE_BLOCK}
        cases.append(_case(f"reconstruction_loss_bwd-{dtype}", fn, types, ("numel",), constants))
    return cases
