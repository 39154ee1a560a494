"""What CI compiles of the layer's kernels: rows of 4096 components, images of any size."""

from ..aot import CompileCase
from . import kernel

_ALIGNED = [["tt.divisibility", 16]]


def _case(
    name: str, fn: object, types: dict[str, str], sizes: tuple[str, ...], constants: dict
) -> CompileCase:
    types = types | dict.fromkeys(sizes, "i32")
    signature = {argument: types.get(argument, "constexpr") for argument in fn.arg_names}
    attrs = {
        (place,): _ALIGNED
        for place, argument in enumerate(fn.arg_names)
        if (argument.endswith("_ptr") and argument in types) or argument in ("dim", "stride")
    }
    warps = constants.pop("num_warps", 4)
    return CompileCase(name, fn, signature, constants, attrs, warps, 3, has_dot=False)


def compile_cases(arch: int) -> list[CompileCase]:
    """The draw with and without a table, normalisation in each dtype; nothing depends on
    ``arch``.
    """
    cases = []
    blocks = dict(zip(("BLOCK_I", "BLOCK_J"), kernel.DRAW_BLOCKS, strict=True))
    sizes = ("batch", "longest", "width", "total")
    pointers = {"seeds_ptr": "*i64", "out_ptr": "*i64", "mix": "i64"}
    for name, types, absent in (
        ("equal", {}, {"table_ptr": None}),
        ("table", {"table_ptr": "*i64"}, {}),
    ):
        fn, types = kernel._draw_order_kernel, pointers | types
        cases.append(_case(f"draw_order-{name}", fn, types, sizes, blocks | absent))
    for dtype in ("fp16", "bf16", "fp32"):
        tile = kernel._tile(4096, kernel.torch.float32)
        rows = {"y_ptr": f"*{dtype}", "norm_ptr": "*fp32"}
        fn, types = kernel._normalize_kernel, rows | {"x_ptr": f"*{dtype}"}
        cases.append(_case(f"l2_normalize_fwd-{dtype}", fn, types, ("dim", "stride"), dict(tile)))
        fn = kernel._normalize_gradient_kernel
        types = rows | {"grad_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
        cases.append(_case(f"l2_normalize_bwd-{dtype}", fn, types, ("dim", "stride"), dict(tile)))
    return cases
