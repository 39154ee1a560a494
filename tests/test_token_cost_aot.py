"""Properties of the compiled product kernels that no other test sees without a GPU."""

import re

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from croc_kernels.cost import aot, kernel


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_token_cost_sums_leave_the_tensor_core(dtype: str) -> None:
    # Each thread adds its part of both halves outside the tensor core once per step, as one fused
    # multiplication and addition. Were that folded into the dot, sums would be truncated: see the
    # docstring of kernel.py.
    case = aot.product_case(kernel._token_cost_kernel, 90, dtype, "l2")
    source = ASTSource(case.fn, case.signature, case.constexprs, case.attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    loop = re.search(r"wgmma\.mma_async.*?bra\s+\$L\w+", ptx, re.DOTALL)[0]
    tile = case.constexprs["BLOCK_M"] * 2 * case.constexprs["HALF_N"]
    assert len(re.findall(r"fma\.rn\.f32", loop)) == tile // (32 * case.num_warps)
    # 16-byte copies straight to shared memory: the offsets' alignment reached the compiler.
    assert len(re.findall(r"cp\.async\.cg\.shared\.global.*0x10", ptx)) > 0
    assert "cp.async.ca.shared.global" not in ptx
