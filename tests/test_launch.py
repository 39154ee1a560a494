"""Launches that look up what Triton compiled: told apart wherever Triton may compile something
else.
"""

import itertools
import math
import threading
import weakref

import pytest
import torch
from mixed_attention_cases import MASKS, check, inputs

from croc_kernels import launch as launching
from croc_kernels.attention.api import mixed_attention


class Compiled:
    """What Triton gives back of a launch."""

    packed_metadata = ()

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *values: self.log.append(("again", grid, values))


class Kernel:
    """A function with parameters a, b, ONE and TWO that notes how it is launched."""

    arg_names = ("a", "b", "ONE", "TWO")

    def __init__(self, compiles=True):
        self.log, self.compiles = [], compiles

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.log.append(("first", grid, arguments, options))
            return Compiled(self.log) if self.compiles else None

        return run


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(launching, "_COMPILED", {})


def launched(kernel, *arguments, grid=(1, 1, 1), constants=None, **options):
    """How the kernel was launched: first or again."""
    constants = {"TWO": 2, "ONE": 1} if constants is None else constants
    launching.launch(kernel, grid, arguments, constants, **options)
    return kernel.log[-1]


ALIGNED = torch.zeros(64)
HALF = torch.zeros(64, dtype=torch.float16)
ALIKE = [
    (3, 5), (32, 48), (0.5, 7.0), (-3, -5), (ALIGNED, torch.ones(7)),
    ((3, ALIGNED), (7, torch.ones(3))), (2**40 + 1, 2**41 + 3), (None, None),
]  # fmt: skip
DIFFERENT = [
    (1, 3), (16, 3), (1, 16), (0, 1), (2**31, 16), (2**31 + 1, 3), (2**64 - 1, 2**40 + 1),
    (ALIGNED, ALIGNED[1:]), (ALIGNED, HALF), (1.0, 1), ((3, 5), 3), ((3, 5), (3, 16)),
    ((3, (5,)), ((3,), 5)), ((3, 5), (3, 5, 7)), (ALIGNED, None), (True, False), (True, 1),
]  # fmt: skip


@pytest.mark.parametrize("pair", ALIKE)
def test_launch_takes_what_was_compiled_for_arguments_alike(pair):
    kernel = Kernel()
    for how, x in zip(("first", "again"), pair, strict=True):
        assert launched(kernel, x, 9.0)[0] == how


@pytest.mark.parametrize("pair", DIFFERENT)
def test_launch_lets_triton_compile_for_other_arguments(pair):
    for order in (pair, pair[::-1]):
        kernel = Kernel()
        assert [launched(kernel, x, 9.0)[0] for x in order] == ["first", "first"]
        assert [launched(kernel, x, 9.0)[0] for x in order] == ["again", "again"]


def test_launch_hands_over_grid_arguments_and_constants_in_the_kernels_order():
    kernel = Kernel()
    first = launched(kernel, 3, ALIGNED, grid=(7, 1, 1), num_warps=4)
    assert first[1] == (7, 1, 1)
    assert first[2][0] == 3
    assert first[2][1] is ALIGNED
    assert first[3] == {"TWO": 2, "ONE": 1, "num_warps": 4}
    how, grid, values = launched(kernel, 5, HALF.float(), grid=(9, 2, 1), num_warps=4)
    assert (how, grid) == ("again", (9, 2, 1))
    assert values[0] == 5
    assert values[2:] == (1, 2)


def test_launch_tells_constants_options_kernels_and_devices_apart(monkeypatch):
    kernel, other = Kernel(), Kernel()
    assert launched(kernel, 3, 3)[0] == "first"
    assert launched(kernel, 3, 3, constants={"TWO": 1, "ONE": 2})[0] == "first"
    assert launched(kernel, 3, 3, num_warps=4)[0] == "first"
    assert launched(kernel, 3, 3, num_warps=8)[0] == "first"
    assert launched(kernel, 3, 3, num_stages=8)[0] == "first"
    assert launched(other, 3, 3)[0] == "first"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for device in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        assert launched(kernel, 3, 3)[0] == "first"
    assert launched(kernel, 3, 3)[0] == "again"


def test_launch_keeps_nothing_of_what_was_not_compiled():
    kernel = Kernel(compiles=False)
    assert [launched(kernel, 3, 3)[0] for _ in range(3)] == ["first"] * 3


def specialized(x):
    """What Triton compiles an argument to."""
    native = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    backend = pytest.importorskip("triton.backends.nvidia.compiler").CUDABackend
    return native(backend, x, False, True, True)


def told_apart(arguments):
    """Of lists of arguments, none that Triton tells apart from another has its key."""
    found = {}
    for x in arguments:
        given = [specialized(y) for y in x]
        assert found.setdefault(tuple(launching._specialize(x, [])), given) == given
    return len(found)


EDGES = [sign * (1 << bits) + more for sign in (1, -1) for bits in (0, 4, 31, 32, 63)
         for more in (-16, -1, 0, 1, 16)]  # fmt: skip
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.int8,
    torch.uint8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip


def test_launch_tells_apart_whatever_triton_does():
    hopper = pytest.importorskip("croc_kernels.attention.hopper")
    numbers = [x for x in (0, *EDGES, 2**64 - 16, 2**64 - 1) if x >= -(2**63)]
    tensors = [torch.zeros(64, dtype=dtype)[i:] for dtype in DTYPES for i in (0, 1, 2, 4, 8, 16)]
    plane = torch.zeros(2, 3, 64, 128, dtype=torch.bfloat16)
    descriptors = [
        hopper.tile_descriptor(x, *tile)
        for x in (plane, plane.half()) for tile in ((64,), (32,), (64, 64), (1,), (2,))
    ]  # fmt: skip
    others = [True, False, None, 0.0, 1.0, 16.0, 1e300, math.inf, math.nan, (), torch.zeros(0)]
    single = [*numbers, *tensors, *descriptors, *others, torch.nn.Parameter(torch.zeros(3))]
    told_apart([(x,) for x in single] + [((x,),) for x in single])
    # Where one argument ends and the next begins.
    few = (
        0,
        1,
        3,
        2**40,
        (),
        (1,),
        (3,),
        ((1,), 3),
        (1, (3,)),
        ((),),
        None,
        True,
        *descriptors[:3],
    )
    assert told_apart(itertools.product(few, repeat=3)) > len(few) ** 2


def test_launch_tells_descriptors_from_numbers_and_from_each_other():
    """Whichever was met first, by whatever thread."""
    hopper = pytest.importorskip("croc_kernels.attention.hopper")
    x = torch.zeros(1, 1, 256, 128, dtype=torch.bfloat16)
    tiles = [
        (rows, columns) for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256) for columns in (64, 128)
    ]
    kinds = {tile: set() for tile in tiles}

    def make(order):
        for tile in order:
            kinds[tile].add(launching.kind_of(hopper.tile_descriptor(x, *tile)))

    threads = [threading.Thread(target=make, args=(tiles[i:] + tiles[:i],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(found) == 1 for found in kinds.values())
    assert len(set.union(*kinds.values())) == len(tiles)
    kernel = Kernel()
    for y in (*(hopper.tile_descriptor(x, *tile) for tile in tiles), *range(len(tiles)), ()):
        launched(kernel, y, 3)
    assert [how for how, *_ in kernel.log].count("first") == len(tiles) + 4


def test_launch_keeps_no_tensor():
    hopper = pytest.importorskip("croc_kernels.attention.hopper")
    kernel, x = Kernel(), torch.zeros(2, 3, 64, 128, dtype=torch.bfloat16)
    kept = weakref.ref(x)
    for _ in range(2):
        launched(kernel, (hopper.tile_descriptor(x, 64), x, 3), x[..., :64])
        kernel.log.clear()
    del x
    assert kept() is None


@pytest.mark.parametrize("dim", [64, 128])
def test_launch_of_ever_new_lengths_keeps_little(monkeypatch, dim):
    """As many entries as kinds of lengths, not one for each."""
    hopper = pytest.importorskip("croc_kernels.attention.hopper")
    monkeypatch.setattr(hopper, "_MOST_ALIKE", 30)
    monkeypatch.setattr(hopper, "_ALIKE", {})
    kernel, counts = Kernel(), []
    for length in range(128, 428):
        x = torch.empty(1, length, 2, dim, dtype=torch.bfloat16).transpose(1, 2)
        lse = torch.empty(1, 2, length)
        bounds = (lse, length)
        tiles = (hopper.tile_descriptor(x, 64), lse, bounds, x.stride(), length, length // 64)
        launched(kernel, tiles, 0.1)
        assert len(hopper._ALIKE) <= 30
        counts.append(len(launching._COMPILED))
    assert counts[-1] <= 4
    assert counts[-1] == counts[50]


@pytest.mark.parametrize("what", ["debug", "instrumentation", "passes", "before"])
def test_launch_asks_triton_whenever_it_is_watched(monkeypatch, what):
    """Nothing that was compiled without is launched with it, and the other way round."""
    knobs = pytest.importorskip("triton").knobs
    kernel = Kernel()
    assert [launched(kernel, 3, 3)[0] for _ in range(2)] == ["first", "again"]
    assert launched(kernel, 16, 3)[0] == "first"
    with monkeypatch.context() as watched:
        if what == "debug":
            watched.setattr(knobs.runtime, "debug", True)
        elif what == "instrumentation":
            watched.setattr(knobs.compilation, "instrumentation_mode", "consan")
        elif what == "passes":
            hook = ("add_stages_inspection_hook", lambda: ("key", "hash"))
            watched.setattr(knobs.runtime, *hook, raising=False)
        else:
            watched.setattr(kernel, "pre_run_hooks", [print], raising=False)
        assert [launched(kernel, x, 3)[0] for x in (3, 3, 16, 3, 1, 1)] == ["first"] * 6
    assert [launched(kernel, x, 3)[0] for x in (3, 16, 1, 1)] == [
        "again",
        "again",
        "first",
        "again",
    ]


def test_launch_again_of_what_was_compiled_beside():
    """As in Triton's AsyncCompileMode, whose kernels give the compiled one when asked."""

    class Future:
        def __init__(self, compiled):
            self.result = lambda: compiled

        def __getattr__(self, name):
            return getattr(self.result(), name)

    class Beside(Kernel):
        def __getitem__(self, grid):
            run = super().__getitem__(grid)
            return lambda *arguments, **options: Future(run(*arguments, **options))

    kernel = Beside()
    assert [launched(kernel, 3, 3)[0] for _ in range(3)] == ["first", "again", "again"]


def test_launch_tells_descriptors_apart_and_checks_them():
    hopper = pytest.importorskip("croc_kernels.attention.hopper")
    kernel, x = Kernel(), torch.zeros(2, 3, 64, 128, dtype=torch.bfloat16)
    assert launched(kernel, hopper.tile_descriptor(x, 64), 3)[0] == "first"
    again = hopper.tile_descriptor(x.clone(), 64)
    assert launched(kernel, again, 3)[0] == "again"
    assert launched(kernel, hopper.tile_descriptor(x.transpose(1, 2), 64), 3)[0] == "again"
    assert launched(kernel, hopper.tile_descriptor(x, 32), 3)[0] == "first"
    assert launched(kernel, hopper.tile_descriptor(x.half(), 64), 3)[0] == "first"
    assert launched(kernel, hopper.tile_descriptor(x, 64, 64), 3)[0] == "first"
    made = hopper.tile_descriptor(x, 64)
    assert made.base is x
    assert (made.shape, made.strides, made.block_shape) == (
        [2, 3, 64, 128], [24576, 8192, 128, 1], [1, 1, 64, 128],
    )  # fmt: skip
    assert made.layout == again.layout
    # Checked by Triton, each by itself, although many like it are known.
    odd = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    with pytest.raises(AssertionError):
        hopper.tile_descriptor(odd, 64)
    assert hopper._ALIKE
    assert all(fields["base"] is None for fields in hopper._ALIKE.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_launch_on_a_gpu_alternates_between_what_is_compiled_differently(dim):
    """Lengths and strides that 16 divides or not, one sample or more, addresses odd or even."""
    for _ in range(2):
        for length in (128, 129, 144, 200):
            for batch in (1, 2):
                mask = MASKS["spans"](batch, length, "cuda")
                q, k, v = (x.detach() for x in inputs(mask, 4, 2, dim, torch.bfloat16))
                padded = [torch.nn.functional.pad(x, (0, 8))[..., :dim] for x in (q, k, v)]
                odd = [torch.nn.functional.pad(x, (1, 0))[..., 1:] for x in (q, k, v)]
                for x in ((q, k, v), padded, odd):
                    check(
                        lambda *y, mask=mask: mixed_attention(*y, mask, return_lse=True),
                        *x, mask, 1 / math.sqrt(dim),
                    )  # fmt: skip
