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
    ``pending``: loads that an arrival does not wait for (:func:`pending_loads`).
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
    pending: tuple[str, ...]


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
        pending=pending_loads(sass),
    )  # fmt: skip


def _disassemble(cubin: bytes) -> tuple[int, str]:
    """Registers per thread, SASS with its encodings."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout
            for command in (
                (knobs.nvidia.cuobjdump.path, "--dump-resource-usage"),
                (knobs.nvidia.nvdisasm.path, "-c", "-hex"),
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
    barriers as such, and data there come back changed (H200, docs/attention_trials.md). Addresses
    are compared by their constants alone; one that is invalidated anywhere counts as invalidated.
    Bytes are left out: by them Triton wakes warps, and their addresses count from the first warp
    that may sleep.
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


# A label, or an instruction and the upper half of its encoding.
_CODE = re.compile(
    r"^\s*(\.L\w+):|/\*[0-9a-f]{4,}\*/\s+(\S.*?)\s*;\s*/\* 0x\w+ \*/\s+/\* 0x(\w+) \*/", re.M
)
_GUARD = r"^(?:@!?U?P\w+\s+)?"
# A store of one value by all threads, at one address; a load at the beginning of memory + a place.
_ARGUMENT = re.compile(r"\bSTS\S* \[UR\d+(\+0x[0-9a-f]+)\]")
_ARGUMENT_LOAD = re.compile(_GUARD + r"LDS\b\S* \S+ \[U?R\d+(\+0x[0-9a-f]+)\]")
_LEAVES = re.compile(_GUARD + r"(BRA|BRX|JMP|JMX|CALL|RET|EXIT|BREAK)\b")


def pending_loads(sass: str) -> tuple[str, ...]:
    """Loads from shared memory that may be on their way when an mbarrier is arrived at.

    Whoever waits for the mbarrier may overwrite what they read; the copy engine does (it made 14 of
    672 attention forwards wrong, docs/attention_trials.md). An arrival waits for no load, and one
    thread arrives for a warp group: before the barrier of threads that comes first, each load's
    scoreboard must have been waited for, by the wait mask of an instruction, on all ways there.

    Not counted are loads of the arguments of warp groups, to which nothing is copied: loads at a
    register and a constant, where some store writes at a uniform register and the same constant.
    Of a tile each thread writes and reads its own part.

    ``sass``: with encodings (``nvdisasm -c -hex``).
    """
    if re.search(r"\bSYNCS\.ARRIVE", sass) is None:
        return ()
    arguments = set(_ARGUMENT.findall(sass))
    blocks, labels = _basic_blocks(sass)
    entered: list[set[tuple[int, str]]] = [set() for _ in blocks]
    found: set[str] = set()
    todo = set(range(len(blocks)))
    while todo:
        place = todo.pop()
        left, late = _follow(blocks[place], entered[place], arguments)
        found |= late
        for after in _successors(blocks, labels, place):
            if not left <= entered[after]:
                entered[after] |= left
                todo.add(after)
    return tuple(sorted(found))


def _basic_blocks(sass: str) -> tuple[list[list[tuple[str, int]]], dict[str, int]]:
    """Blocks of instructions with their control bits, and the block that a label begins."""
    blocks: list[list[tuple[str, int]]] = [[]]
    labels = {}
    for label, text, upper in _CODE.findall(sass):
        if blocks[-1] and (label or _LEAVES.match(blocks[-1][-1][0])):
            blocks.append([])
        if label:
            labels[label] = len(blocks) - 1
        else:
            blocks[-1].append((text, int(upper, 16) >> 41))
    return blocks, labels


def _successors(
    blocks: list[list[tuple[str, int]]], labels: dict[str, int], place: int
) -> list[int]:
    last = blocks[place][-1][0] if blocks[place] else ""
    leaves = _LEAVES.match(last) is not None
    after = [labels[name] for name in re.findall(r"\.L_\w+", last) if leaves]
    always = re.match(r"(BRA `|BRX|JMP|JMX|RET|EXIT)", last)
    return after + [place + 1] * (always is None and place + 1 < len(blocks))


def _follow(
    block: list[tuple[str, int]], pending: set[tuple[int, str]], arguments: set[str]
) -> tuple[set[tuple[int, str]], set[str]]:
    """(scoreboard, load) on their way after ``block``, and loads that were at an arrival in it.

    Scoreboard -1: on its way at the last barrier of threads, so perhaps still in another warp.
    """
    late = set()
    for text, control in block:
        waited, board = control >> 11 & 63, control >> 5 & 7
        pending = {(b, load) for b, load in pending if b < 0 or not waited >> b & 1}
        if re.match(_GUARD + r"BAR\.SYNC\b", text):
            now = {(b, load) for b, load in pending if b >= 0}
            pending = now | {(-1, load) for _, load in now}
        if re.search(r"\bSYNCS\.ARRIVE\b", text):
            late |= {load for _, load in pending}
        argument = _ARGUMENT_LOAD.match(text)
        if argument is not None and argument[1] in arguments:
            continue
        if re.match(_GUARD + r"LDSM?\b", text) and board < 7:
            pending.add((board, text))
    return pending, late
