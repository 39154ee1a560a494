"""Calls that are recorded once and replayed with other tensors alike."""

import math
import weakref

import pytest
import torch
from launch_stub import CONSTANTS, Compiled, Kernel, doubled, tensors
from mixed_attention_cases import MASKS, check, inputs

from croc_kernels import launch as launching
from croc_kernels import ops
from croc_kernels.attention import backward, forward, hopper_backward, hopper_forward
from croc_kernels.attention.api import mixed_attention
from croc_kernels.launch import launch, replayed


def test_launch_again_with_the_tensors_of_the_call():
    kernel = Kernel()
    function = doubled(kernel)
    for how in ("first", "again", "again"):
        x, y = tensors(4, 8)
        made, given = function(x, y, 5)
        assert given is x
        assert (made.shape, made.stride(), made.dtype) == ((2, 3), (1, 2), torch.float16)
        ((way, grid, arguments, *options),) = kernel.log
        kernel.log.clear()
        assert (way, grid) == (how, (5, 1, 1))
        assert arguments[0] is x
        assert arguments[1][0] is y
        assert arguments[1][1] == 5
        assert arguments[1][2].data_ptr() == made.data_ptr()
        if how == "first":
            assert options == [{"TWO": 2, "ONE": 1, "num_warps": 4}]
        else:
            assert arguments[2:] == (1, 2)  # the constants, in the kernel's order


def test_launch_allocates_anew_each_time():
    """In the package's name, so that conftest.py poisons it."""
    kernel = Kernel()
    zeros = []

    @replayed(kernel)
    def function(x):
        made, sums = torch.empty(7, dtype=torch.int64), torch.zeros(2, 5)
        zeros.append(sums)
        launch(kernel, (1, 1, 1), (x, made), CONSTANTS)
        return made, sums

    results = [function(torch.ones(3)) for _ in range(4)]
    assert kernel.ways == ["first"] + ["again"] * 3
    assert len(zeros) == 1
    places = {made.data_ptr() for pair in results for made in pair}
    assert len(places) == 8
    for made, sums in results:
        assert (made.shape, made.dtype) == ((7,), torch.int64)
        assert made is results[0][0] or bool((made == torch.iinfo(torch.int64).min).all())
        assert torch.equal(sums, torch.zeros(2, 5))
        sums += 1


ODD = torch.zeros(65)[1:].view(8, 8)
DIFFERENT = {
    "shape": (torch.zeros(8, 8), torch.zeros(8, 9)),
    "strides": (torch.zeros(8, 8), torch.zeros(8, 8).T),
    "dtype": (torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.int32)),
    "address": (torch.zeros(8, 8), ODD),
    "device": (torch.zeros(8, 8), torch.zeros(8, 8, device="meta")),
    "none": (torch.zeros(8, 8), None),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_launch_tells_tensors_apart(what):
    for pair in (DIFFERENT[what], DIFFERENT[what][::-1]):
        kernel = Kernel()
        function = doubled(kernel)
        for x in pair * 2:
            function(torch.zeros(2), x)
        assert kernel.ways == ["first", "first", "again", "again"]


@pytest.mark.parametrize("pair", [(3, 4), (1, True), (1, 1.0), (0.1, 0.2), ("a", "b"), (3, None)])
def test_launch_tells_numbers_apart(pair):
    kernel = Kernel()

    @replayed(kernel)
    def function(x, number):
        launch(kernel, (1, 1, 1), (x, number), CONSTANTS)
        return x

    for number in pair * 2:
        function(torch.zeros(3), number)
    assert [arguments[1] for *_, arguments in [x[:3] for x in kernel.log]] == [*pair * 2]
    assert kernel.ways == ["first", "first", "again", "again"]


def test_launch_tells_one_tensor_given_twice_from_two():
    kernel = Kernel()
    function = doubled(kernel)
    for _ in range(2):
        x, y = tensors(8, 8)
        for first, second in ((x, x), (x, y)):
            function(first, second)
            _, _, arguments, *_ = kernel.log[-1]
            assert arguments[0] is first
            assert arguments[1][0] is second
    assert kernel.ways == ["first", "first", "again", "again"]


def test_launch_keeps_what_was_compiled():
    """Also where Triton's cache drops it: its code would be unloaded, from Triton 3.8 on."""
    made = []

    class Counted(Compiled):
        def __init__(self, log):
            super().__init__(log)
            made.append(weakref.ref(self))

        @property
        def run(self):
            log = self.log
            return lambda *_: log.append(("again", None, ()))

    class Dropped(Kernel):
        def __getitem__(self, grid):
            return lambda *_, **__: Counted(self.log)

    function = doubled(Dropped())
    function(*tensors(3))
    assert made[0]() is not None
    function(*tensors(3))
    assert len(made) == 1


def test_launch_keeps_no_tensor():
    hopper = pytest.importorskip("croc_kernels.attention.hopper")
    kernel = Kernel()

    @replayed(kernel)
    def function(x, y):
        made = torch.empty(3)
        launch(kernel, (1, 1, 1), (hopper.tile_descriptor(x, 64), (y, made)), CONSTANTS)
        return made

    x, y = tensors(2, 3, 64, 128, dtype=torch.bfloat16)
    kept = [weakref.ref(z) for z in (x, y, function(x, y), function(x, y))]
    assert kernel.ways == ["first", "again"]
    del x, y
    assert [z() for z in kept] == [None] * 4


def test_launch_again_with_descriptors_of_the_tensors_of_the_call():
    hopper = pytest.importorskip("croc_kernels.attention.hopper")
    kernel = Kernel()

    @replayed(kernel)
    def function(x):
        made = torch.empty(x.shape, dtype=x.dtype)
        tiles = hopper.tile_descriptor(x, 64), hopper.tile_descriptor(made, 32, 64)
        launch(kernel, (1, 1, 1), (*tiles, tiles[0], None), CONSTANTS)
        return made

    seen = []
    for _ in range(3):
        x = torch.zeros(2, 3, 64, 128, dtype=torch.bfloat16)
        made = function(x)
        first, second, third, nothing = kernel.log[-1][2][:4]
        assert first.base is x
        assert third is first
        assert nothing is None
        assert second.base.data_ptr() == made.data_ptr()
        seen.append([{**vars(d), "base": None} for d in (first, second)])
        assert type(first) is type(hopper.tile_descriptor(x, 64))
    assert kernel.ways == ["first", "again", "again"]
    assert seen[0] == seen[1] == seen[2]


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
    function = doubled(kernel)
    for _ in range(3):
        function(*tensors(3))
    assert kernel.ways == ["first", "again", "again"]


def test_launch_again_with_an_allocation_that_was_turned():
    """Laid out as it was handed over; what lies in zeros must stay in order, so these are not."""
    kernel = Kernel()

    def made_by(allocate):
        @replayed(kernel)
        def function(x):
            made = allocate(x)
            launch(kernel, (1, 1, 1), (x, made), CONSTANTS)
            return made

        results = [function(torch.zeros(2, 3, 4, 5)) for _ in range(2)]
        assert len({(x.shape, x.stride(), x.dtype) for x in results}) == 1
        return kernel.ways

    assert made_by(ops.empty_heads_last) == ["first", "again"]
    assert made_by(lambda x: torch.zeros(3, 4).T) == ["first", "first"]


def test_launch_of_ever_new_lengths_keeps_a_bounded_number(monkeypatch):
    monkeypatch.setattr(launching, "_MOST_PLANS", 5)
    kernel = Kernel()
    function = doubled(kernel)
    kept = []
    for length in range(1, 21):
        kept.append(length)
        for _ in range(2):
            function(*tensors(length))
        assert kernel.ways == ["first", "again"]
    function(*tensors(1))
    assert kernel.ways == ["first"]


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("length", [100, 300, 1100])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_launch_on_a_gpu_is_not_worked_out_twice(monkeypatch, dim, length, deterministic):
    """The second call gets on without ``launch``, with other values in other places."""

    def call(*x):
        return mixed_attention(*x, mask, return_lse=True, deterministic=deterministic)

    mask = MASKS["spans"](2, length, "cuda")
    given = [x.detach() for x in inputs(mask, 4, 2, dim, torch.bfloat16)]
    check(call, *given, mask, 1 / math.sqrt(dim))
    for module in (forward, backward, hopper_forward, hopper_backward):
        monkeypatch.setattr(module, "launch", None)
    others = [x.flip(1).contiguous() for x in given]
    assert [x.stride() for x in others] == [x.stride() for x in given]
    check(call, *others, mask, 1 / math.sqrt(dim))


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
