"""Code that reads registers nobody has set, as ptxas 12.8 makes it."""

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
