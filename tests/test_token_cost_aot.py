"""Properties of the compiled product kernels that no other test sees without a GPU."""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

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


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "gathered"])
@pytest.mark.parametrize("nearest", [False, True], ids=["costs", "nearest"])
def test_token_cost_on_hopper_sums_leave_the_tensor_core(nearest: bool, dense: bool) -> None:
    case = aot.hopper_case("bf16", "l2", nearest, dense)
    source = GluonASTSource(case.fn, case.signature, case.constexprs, case.attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    # Each thread of the two multiplying groups adds its part of its rows' sums once per step, in
    # each of two compiled copies of the group. The factor is the addition's second operand.
    wgmma = len(re.findall(r"wgmma\.mma_async", ptx))
    assert wgmma == 2 * 2 * case.constexprs["BLOCK_K"] // 16
    factor = f"{int(torch.tensor(case.constexprs['CORRECTION']).view(torch.int32)):08X}"
    name = re.search(rf"mov\.b32\s+(%r\d+), 0f{factor}", ptx)
    adds = re.findall(rf"fma\.rn\.f32.*(?:0f{factor}|{name[1] if name else 'none'}\b)", ptx)
    tile = case.constexprs["BLOCK_M"] * case.constexprs["BLOCK_N"]
    assert len(adds) == 2 * tile // 256
    # TMA for what lies at one stride; else 16-byte copies straight to shared memory.
    assert bool(re.search(r"cp\.async\.cg\.shared\.global.*0x10", ptx)) != dense
    assert "cp.async.ca.shared.global" not in ptx
    assert "cp.async.bulk.tensor" in ptx


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "gathered"])
def test_token_cost_on_hopper_stores_four_costs_at_a_time(dense: bool) -> None:
    case = aot.hopper_case("bf16", "l2", nearest=False, dense=dense)
    source = GluonASTSource(case.fn, case.signature, case.constexprs, case.attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    # In each of two compiled copies of a group of 128 threads, which has half of the tile's rows.
    tile = case.constexprs["BLOCK_M"] * case.constexprs["BLOCK_N"]
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == 2 * (tile // 2) // (128 * 4)
    assert "st.global.v2.b32" not in ptx
    assert "cp.async.bulk.tensor.5d" in ptx
