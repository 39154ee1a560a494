"""Faults that are looked for in compiled code: registers nobody has set, as ptxas 12.8 makes it,
and data where a barrier lies, as Triton lays them out.
"""

import pytest
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from croc_kernels import aot

GOOD = """
        /*0040*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0050*/                   UIADD3 UR6, UP0, UR4, 0x20, URZ ;
        /*0060*/                   UIADD3.X UR7, UR5, -0x3ffffff0, URZ, UP0, !UPT ;
        /*0070*/              @!P1 UIADD3.64 UR10, UR6, 0x2, URZ ;
        /*0080*/                   UIADD3 UR12, UR11, 0x1, URZ ;
"""
BAD = "        /*0090*/                   UIADD3 UR26, UP0, UR26, 0x20, URZ ;\n"


def test_unset_reads_are_found():
    assert aot.unset_reads(GOOD) == ()
    assert aot.unset_reads(GOOD + BAD + BAD) == ("UIADD3 UR26, UP0, UR26, 0x20, URZ",)
    assert aot.unset_reads(GOOD.replace("UR4, c", "UR8, c")) == (
        "UIADD3 UR6, UP0, UR4, 0x20, URZ", "UIADD3.X UR7, UR5, -0x3ffffff0, URZ, UP0, !UPT",
    )  # fmt: skip


def test_spilled_bytes_are_counted_by_width():
    """Local memory alone, each instruction once."""
    sass = """
        /*0040*/                   STL.128 [R1+0x10], R4 ;
        /*0050*/              @!P1 LDL.LU.64 R8, [R1] ;
        /*0060*/                   LDL R9, [R1+0x8] ;
        /*0070*/                   STL.U8 [R1], R2 ;
        /*0080*/                   STS.128 [R1], R4 ;
"""
    assert aot.spilled(sass) == 16 + 8 + 4 + 1
    assert aot.spilled(GOOD) == 0


OVER = """
        /*0040*/                   SYNCS.EXCH.64 URZ, [UR6+0x34400], UR4 ;
        /*0050*/              @!P1 STS.128 [UR6+0x34400], R4 ;
        /*0060*/                   LDS R8, [R13+0x34404] ;
        /*0070*/                   STS.128 [UR6+0x343f4], R4 ;
"""
BESIDE = """
        /*0080*/                   LDS.64 R8, [R13+0x34408] ;
        /*0090*/                   LDS.128 R8, [R13+0x343f0] ;
        /*00a0*/                   LDS.U8 R8, [R13+0x34400] ;
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR6+0x34400], RZ ;
"""


def test_data_over_barriers_are_found():
    assert aot.over_barriers(OVER + BESIDE) == (
        "STS.128 [UR6+0x34400], R4", "LDS R8, [R13+0x34404]", "STS.128 [UR6+0x343f4], R4",
    )  # fmt: skip
    assert aot.over_barriers(OVER.replace("0x34400], UR4", "0x34500], UR4")) == ()


@gluon.jit
def _sum_kernel(x_ptr, out_ptr, WAITED: gl.constexpr):
    """A barrier that is made, then a sum, which needs shared memory too."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offs = gl.arange(0, 1024, layout)
    x = gl.load(x_ptr + offs)
    kept = gl.allocate_shared_memory(gl.float32, [1024], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kept.store(x)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    total = gl.sum(x, 0)
    if WAITED:
        mbarrier.arrive(bar, count=1)
        mbarrier.wait(bar, 0)
    gl.store(out_ptr + offs, kept.load(layout) - total)


@pytest.mark.parametrize("waited", [False, True])
def test_a_barrier_that_nobody_waits_for_gives_its_memory_away(waited):
    """If this fails for False, Triton keeps such memory now: nothing to guard against."""
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "WAITED": "constexpr"}
    case = aot.CompileCase("sum", _sum_kernel, signature, {"WAITED": waited}, None, 4, 1, False)
    assert bool(aot.compile(case, 90).over_barriers) != waited
