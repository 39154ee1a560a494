"""Compile Triton kernels for a chip that is not there: registers, spills, instructions."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one set of compile-time values.

    Attributes:
        name: unique, for reports.
        fn: the ``@triton.jit`` function.
        signature: argument name to Triton type (``"*bf16"``, ``"i32"``, ``"constexpr"``), a tuple
            of types for a tuple.
        constexprs: argument name to value.
        attrs: path of an argument, ``(index,)`` or ``(index, element)``, to attributes such as
            ``[["tt.divisibility", 16]]``; None for none.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
        has_dot: the kernel multiplies matrices, so sm_90 code must contain wgmma.
        spill_allowance: bytes of register spills that are accepted.
    """

    name: str
    fn: Callable
    signature: dict[str, object]
    constexprs: dict[str, object]
    attrs: dict[tuple[int, ...], list] | None
    num_warps: int
    num_stages: int
    has_dot: bool
    spill_allowance: int = 0


@dataclass(frozen=True)
class CompileReport:
    """What the compiler made of a case.

    ``unset``: instructions that read a register which nothing has written (:func:`unset_reads`).
    ``over_barriers``: instructions that keep data where a barrier lies (:func:`over_barriers`).
    On sm_100 a kernel that wants more than 512 columns of tensor memory compiles to a trap, without
    an error: its ``has_mma`` is False.
    """

    name: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    has_wgmma: bool
    has_mma: bool
    tensor_memory_columns: int
    unset: tuple[str, ...]
    over_barriers: tuple[str, ...]


def compile(case: CompileCase, arch: int) -> CompileReport:
    """Compile ``case`` for compute capability ``arch`` (90 for 9.0) and read the code that is run.

    Raises:
        RuntimeError: cuobjdump does not report on the kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kind = GluonASTSource if case.fn.is_gluon() else ASTSource
    source = kind(
        fn=case.fn, signature=case.signature, constexprs=case.constexprs, attrs=case.attrs
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, sass = _disassemble(compiled.asm["cubin"])
    return CompileReport(
        case.name, arch, registers, spilled(sass), compiled.metadata.shared,
        has_wgmma="wgmma.mma_async" in ptx,
        has_mma=re.search(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx) is not None,
        tensor_memory_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
        unset=unset_reads(sass), over_barriers=over_barriers(sass),
    )  # fmt: skip


def _disassemble(cubin: bytes) -> tuple[int, str]:
    """Registers per thread, SASS."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout
            for command in (
                (knobs.nvidia.cuobjdump.path, "--dump-resource-usage"),
                (knobs.nvidia.nvdisasm.path, "-c"),
            )
        )
    registers = re.search(r"\bREG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"aot.compile: cuobjdump must report registers, got {usage!r}")
    return int(registers.group(1)), sass


def spilled(sass: str) -> int:
    """Bytes that instructions store to and load from local memory, each counted once."""
    widths = re.findall(r"\b(?:STL|LDL)((?:\.\w+)*) ", sass)
    sizes = {"8": 1, "16": 2, "64": 8, "128": 16}
    return sum(sizes.get("".join(re.findall(r"\d+", width)), 4) for width in widths)


def unset_reads(sass: str) -> tuple[str, ...]:
    """Instructions that read a uniform register which no instruction above them has written.

    ptxas 12.8 makes such code: where the address of a matrix in shared memory does not change in a
    loop, it may add to a register that it forgot to set, and the tensor cores read elsewhere.
    Results are then wrong, or the kernel faults. Only integer additions are looked at: they are
    what descriptors are made of, and their operands are as wide as they say.
    """
    written: set[str] = set()
    found = []
    for instruction in re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S.*?)\s*;", sass):
        name, _, operands = instruction.partition(" ")
        target, _, sources = operands.partition(",")
        if name.startswith("UIADD3") and set(re.findall(r"\bUR\d+", sources)) - written:
            found.append(instruction)
        for first in re.findall(r"^\s*UR(\d+)$", target):
            width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
            written |= {f"UR{int(first) + k}" for k in range(width)}
    return tuple(found)


def over_barriers(sass: str) -> tuple[str, ...]:
    """Instructions that keep data in shared memory where an mbarrier was made.

    Triton gives the memory of a barrier that nobody waits for to whatever comes next. That is right
    only once the barrier is invalidated: a GPU that processes take turns on saves and restores
    barriers as such, and data there come back changed (H200, docs/attention.md). Addresses are
    compared by their constants alone; one that is invalidated anywhere counts as invalidated. Bytes
    are left out: by them Triton wakes warps, and their addresses count from the first warp that may
    sleep.
    """
    made, ended = (
        {int(place, 16) for place in re.findall(rf"{name} \[[^\]]*\+0x([0-9a-f]+)\]", sass)}
        for name in (r"SYNCS\.EXCH\.64 URZ,", r"SYNCS\.CCTL\.IV")
    )
    places = made - ended
    found = []
    for text, width, place in re.findall(
        r"\b((?:LDS|STS|ATOMS)((?:\.\w+)*) [^;]*?\[[^\]]*\+0x([0-9a-f]+)\][^;]*?)\s*;", sass
    ):
        first = int(place, 16)
        size = 16 if ".128" in width else 8 if ".64" in width else 4
        if ".U8" not in width and places & set(range(first - 7, first + size)):
            found.append(text)
    return tuple(found)
