"""In what order the backward for Hopper does what only another multiprocessor, or the copy engine,
would notice: fences, waits and what is told, in the code that is compiled. A GPU seldom shows it.
"""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from croc_kernels.attention import hopper_aot

# What is looked for; whatever is between them may stand there.
KINDS = {
    "acquire": r"ld\.acquire\.gpu\.global",
    "release": r"st\.release\.gpu\.global",
    "count": r"(?:atom|red)\.global\.gpu\.release\.add",
    "fence": r"fence\.proxy\.async\.global",
    "fence shared": r"fence\.proxy\.async\.shared::cta",
    "add": r"cp\.reduce\.async\.bulk\.tensor\.2d\.global\.shared::cta\.add\.bulk_group",
    "store": r"cp\.async\.bulk\.tensor\.4d\.global\.shared::cta\.bulk_group",
    "commit": r"cp\.async\.bulk\.commit_group",
    "read": r"cp\.async\.bulk\.wait_group\.read\s+0",
    "landed": r"cp\.async\.bulk\.wait_group\s+0",
    "wait": r"mbarrier\.try_wait",
    "arrive": r"mbarrier\.arrive\.shared",
    "threads": r"bar\.sync",
    "write": r"st\.shared\.v4\.b32",
    "matrix": r"stmatrix\.sync\S*\.trans",
    "product": r"wgmma\.wait_group",
    "thread add": r"red\.relaxed\.gpu\.global\.add\.v4\.f32",
}


def blocks(**options):
    """What each basic block of the kernel does, in order."""
    case = hopper_aot.backward_case(128, torch.bfloat16, **options)
    source = GluonASTSource(
        fn=case.fn, signature=case.signature, constexprs=case.constexprs, attrs=case.attrs
    )
    chosen = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=chosen)
    one = re.compile("|".join(f"({pattern})" for pattern in KINDS.values()))
    names = list(KINDS)
    return [
        [names[match.lastindex - 1] for match in one.finditer(block)]
        for block in re.split(r"^\$L__BB\w+:", compiled.asm["ptx"], flags=re.MULTILINE)
    ]


def follow(block, *wanted):
    """Whether these stand in a block, each after the one before."""
    rest = iter(block)
    return all(name in rest for name in wanted)


def only(found, name):
    """The one block that does it."""
    (block,) = (b for b in found if name in b)
    return block


@pytest.fixture(scope="module")
def in_order():
    return blocks(ordered=True)


def test_emitted_turn_is_passed_once_the_addition_is_in_memory(in_order):
    block = only(in_order, "add")
    assert block.count("add") == block.count("release") == 1
    # The turn before is seen, also by the copy engine, and the tile is there.
    assert follow(block, "acquire", "fence", "add", "commit", "landed", "release")
    assert follow(block, "wait", "add", "commit", "read", "arrive")
    assert not follow(block, "release", "landed")


def test_emitted_tile_is_handed_over_once_all_threads_have_written_it(in_order):
    block = next(b for b in in_order if follow(b, "product", "wait", "write"))
    after = block[block.index("write") :]
    assert follow(after, "write", "fence shared", "threads", "arrive")
    assert after.index("arrive") > len(after) - 1 - after[::-1].index("write")
    assert not any("thread add" in b for b in in_order)


def test_emitted_counts_follow_what_they_count(in_order):
    prepared, done = sorted((b for b in in_order if "count" in b), key=lambda b: "landed" in b)
    assert follow(prepared, "fence", "threads", "count")
    assert follow(done, "landed", "count")
    assert "add" not in done[done.index("landed") :]
    # And is read: once for statistics, once for zeros, beside each turn.
    waits = [b for b in in_order if "acquire" in b]
    assert len(waits) == 3
    assert all(follow(b, "acquire", "fence") for b in waits)


def test_emitted_additions_without_turns():
    found = blocks()
    block = only(found, "add")
    assert follow(block, "wait", "add", "commit", "read", "arrive")
    assert not any("release" in b for b in found)
    done = next(b for b in found if "landed" in b)
    assert follow(done, "landed", "count")
    assert sum(b.count("acquire") for b in found) == 2


def test_emitted_whole_tile_is_stored_and_its_slot_given_back_once_read():
    found = blocks(num_keys=128)
    block = next(b for b in found if "matrix" in b)
    first, last = block.index("matrix"), len(block) - 1 - block[::-1].index("matrix")
    # Both warp groups have read the slot, and written it.
    before = block[:first][::-1]
    assert before.index("threads") < before.index("product")
    assert follow(block[last:], "fence shared", "threads", "store", "commit")
    given = next(b for b in found if follow(b, "read", "arrive"))
    assert follow(given, "read", "threads", "arrive")
    assert not any("add" in b or "thread add" in b for b in found)
