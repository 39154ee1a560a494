"""Faults that are looked for in compiled code: registers nobody has set, as ptxas 12.8 makes it,
data where a barrier lies, as Triton lays them out, and loads that an arrival does not wait for.
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


# As triton 3.7.1 made it: the load sets scoreboard 1, which the PRMT is the first to wait for.
LOAD = """
        /*9ad0*/  LDS.128 R16, [R38+UR10+0x24000] ;  /* 0x0240000a26107984 */
                                                     /* 0x000e620008000c00 */
"""
BARRIER = """
        /*9ae0*/  BAR.SYNC.DEFER_BLOCKING 0x3, 0x80 ;  /* 0x00c2000000007b1d */
                                                       /* 0x000fec0000010000 */
"""
ARRIVAL = """
        /*9af0*/  @!P3 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR34+0x38760], RZ ;  /* 0x038760ffffffb9a7 */
                                                                           /* 0x000fe20008100022 */
"""
USE = """
        /*9b00*/  PRMT R27, R16, 0x7632, R27 ;  /* 0x00007632101b7816 */
                                                /* 0x002fc4000000001b */
"""
STORE = """
        /*0090*/  STS.128 [UR8+0x24000], R4 ;  /* 0x02400004ff007988 */
                                               /* 0x000fe20008000c08 */
"""


def branch(guard: str, label: str) -> str:
    return f"""
        /*9b10*/  {guard} BRA `(.L_x_{label}) ;  /* 0xfffffff8000c2947 */
                                                 /* 0x000fea000383ffff */
"""


@pytest.mark.parametrize(
    ("sass", "found"),
    [
        (LOAD + BARRIER + ARRIVAL + USE, True),
        (LOAD + USE + BARRIER + ARRIVAL, False),
        # The arriving warp has waited, the others perhaps not.
        (LOAD + BARRIER + USE + ARRIVAL, True),
        (LOAD + BARRIER + USE + BARRIER + ARRIVAL, False),
        # Another scoreboard.
        (LOAD + USE.replace("0x002f", "0x004f") + BARRIER + ARRIVAL, True),
        # One way there leaves out what waits; the way back in a loop does.
        (LOAD + branch("@P0", "1") + USE + ".L_x_1:" + BARRIER + ARRIVAL, True),
        (".L_x_1:" + BARRIER + ARRIVAL + USE + LOAD + branch("@P0", "1"), True),
        (LOAD + branch("", "1") + BARRIER + ARRIVAL + ".L_x_1:" + USE, False),
        # An argument, known by the store of it; an arrival that announces bytes.
        (STORE + LOAD.replace("R38+UR10", "R38") + BARRIER + ARRIVAL, False),
        (STORE.replace("UR8", "R8") + LOAD.replace("R38+UR10", "R38") + BARRIER + ARRIVAL, True),
        (STORE + LOAD + BARRIER + ARRIVAL, True),
        (LOAD + BARRIER + ARRIVAL.replace(".A1T0", ""), True),
    ],
)
def test_loads_that_an_arrival_does_not_wait_for_are_found(sass, found):
    assert len(aot.pending_loads(sass)) == found


def test_loads_that_an_arrival_does_not_wait_for_are_named():
    assert aot.pending_loads(LOAD + BARRIER + ARRIVAL) == ("LDS.128 R16, [R38+UR10+0x24000]",)
