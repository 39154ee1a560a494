"""Calls that are recorded once: replayed with other tensors alike, and made as they are wherever
something else may happen.
"""

import collections
import math
import threading
import weakref

import pytest
import torch
from mixed_attention_cases import MASKS, check, inputs
from torch.utils import _python_dispatch

from croc_kernels import launch as launching
from croc_kernels import ops
from croc_kernels.attention import backward, forward, hopper_backward, hopper_forward
from croc_kernels.attention.api import mixed_attention
from croc_kernels.launch import launch, replayed


class Compiled:
    """What Triton gives back of a launch."""

    packed_metadata, function = (4, 1), 7

    def __init__(self, log):
        self.log = log

    def run(self, x, y, z, stream, function, metadata, known, enter, leave, *values):
        assert (stream, function, metadata) == (0, self.function, self.packed_metadata)
        assert known is enter is leave is None
        self.log.append(("again", (x, y, z), values))


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

    @property
    def ways(self):
        """First or again, for each launch since this was asked."""
        found = [how for how, *_ in self.log]
        self.log.clear()
        return found


CONSTANTS = {"TWO": 2, "ONE": 1}
Pair = collections.namedtuple("Pair", "first second")


def doubled(kernel, body=None):
    """A function of two tensors and a number that launches once, and what it made."""

    @replayed(kernel)
    def function(x, y, number=3):
        if body is not None:
            body(x)
        made = torch.empty_strided((2, 3), (1, 2), dtype=torch.float16)
        launch(kernel, (number, 1, 1), (x, (y, number, made)), CONSTANTS, num_warps=4)
        return made, x

    return function


def tensors(*shape, count=2, **options):
    return [torch.zeros(*shape, **options) for _ in range(count)]


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


ELSEWHERE = torch.zeros(3)
MORE = {
    "writes": lambda x: x.zero_(),
    "copies": lambda x: x.clone(),
    "views": lambda x: x[1:],
    "waits": lambda x: x.sum().item(),
    "moves": lambda x: x.to(torch.float64),
    "random": lambda x: torch.rand(3),
}


@pytest.mark.parametrize("what", MORE)
def test_launch_repeats_a_call_that_does_more(what):
    kernel, calls = Kernel(), []
    function = doubled(kernel, lambda x: (calls.append(1), MORE[what](x)))
    for _ in range(5):
        function(*tensors(8, 8))
    assert kernel.ways == ["first"] * 5
    assert len(calls) == 5


def test_launch_records_once_more_what_something_else_disturbed():
    kernel, disturbed = Kernel(), [True, True]
    function = doubled(kernel, lambda x: disturbed and disturbed.pop() and x.clone())
    for _ in range(5):
        function(*tensors(8, 8))
    assert kernel.ways == ["first"] * 3 + ["again"] * 2


def test_launch_recorded_by_threads_at_once_leaves_dynamo_alone():
    """PyTorch says for the whole process that a dispatch mode is active, and threads that take
    turns in saying so would leave it said.
    """
    names = [name for name in vars(_python_dispatch) if name.startswith("_is_in_")]
    before = [getattr(_python_dispatch, name) for name in names]
    both, during = threading.Barrier(2, timeout=60), []

    def body(_x):
        both.wait()
        during.append([getattr(_python_dispatch, name) for name in names])
        both.wait()

    functions = [doubled(Kernel(), body) for _ in range(2)]
    threads = [threading.Thread(target=f, args=tensors(8, 8)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert during == [before] * 2
    assert [getattr(_python_dispatch, name) for name in names] == before
    assert any("torch_dispatch_mode" in name for name in names)


def test_launch_repeats_a_call_with_a_tensor_from_elsewhere():
    """Or that returns one, launches nothing, or launches what can't be launched again."""
    kernel, strange = Kernel(), Kernel(compiles=False)

    def made_of(body):
        calls = []

        @replayed(kernel, strange)
        def function(x):
            calls.append(1)
            return body(x)

        for _ in range(5):
            function(torch.zeros(3))
        assert len(calls) == 5

    made_of(lambda x: launch(kernel, (1, 1, 1), (x, ELSEWHERE), CONSTANTS))
    made_of(lambda x: (launch(kernel, (1, 1, 1), (x, 3), CONSTANTS), ELSEWHERE))
    made_of(lambda x: x)
    made_of(lambda x: launch(strange, (1, 1, 1), (x, 3), CONSTANTS))
    # Its elements could be tensors of that call.
    made_of(lambda x: launch(kernel, (1, 1, 1), (Pair(x, 3), 3), CONSTANTS))
    made_of(lambda x: (launch(kernel, (1, 1, 1), (x, 3), CONSTANTS), {"x": x}))
    made_of(lambda x: launch(kernel, (1, 1, 1), (x, torch.empty(3, requires_grad=True)), CONSTANTS))


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


@pytest.mark.parametrize(
    "what", ["debug", "instrumentation", "passes", "before", "enter", "exit", "chain"]
)
def test_launch_asks_triton_whenever_it_is_watched(monkeypatch, what):
    """Nothing that was compiled without is launched with it, and the other way round."""
    knobs = pytest.importorskip("triton").knobs
    kernel = Kernel()
    function = doubled(kernel)
    x = torch.zeros(3)
    for number in (3, 3, 16):
        function(x, x, number)
    assert kernel.ways == ["first", "again", "first"]
    with monkeypatch.context() as watched:
        if what == "debug":
            watched.setattr(knobs.runtime, "debug", True)
        elif what == "instrumentation":
            watched.setattr(knobs.compilation, "instrumentation_mode", "consan")
        elif what == "passes":
            hook = ("add_stages_inspection_hook", lambda: ("key", "hash"))
            watched.setattr(knobs.runtime, *hook, raising=False)
        elif what == "before":
            watched.setattr(kernel, "pre_run_hooks", [print], raising=False)
        elif what == "chain":
            watched.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
        else:
            watched.setattr(knobs.runtime, f"launch_{what}_hook", print)
        for number in (3, 16, 1, 1):
            function(x, x, number)
        assert kernel.ways == ["first"] * 4
    for number in (3, 16, 1, 1):
        function(x, x, number)
    assert kernel.ways == ["again", "again", "first", "again"]


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


def test_launch_forgets_a_call_that_failed():
    kernel, fails = Kernel(), [True]

    def body(_x):
        if fails:
            fails.pop()
            raise OverflowError

    function = doubled(kernel, body)
    with pytest.raises(OverflowError):
        function(*tensors(3))
    assert launching._NOTES.launches is None
    for _ in range(3):
        function(*tensors(3))
    assert kernel.ways == ["first", "again", "again"]


def test_launch_records_what_its_own_thread_launches_and_all_of_it():
    """Also what a function that it calls would have replayed."""
    kernel = Kernel()
    inner = doubled(kernel)
    inner(*tensors(3))
    inner(*tensors(3))

    def beside():
        launch(kernel, (9, 1, 1), (3, 4), CONSTANTS)

    @replayed(kernel)
    def outer(x, y):
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
        return inner(x, y)

    outer(*tensors(3))
    assert kernel.ways == ["first", "again", "first", "first"]
    x, y = tensors(3)
    outer(x, y)
    ((how, grid, arguments),) = kernel.log
    assert (how, grid) == ("again", (3, 1, 1))
    assert arguments[0] is x
    assert arguments[1][0] is y


@pytest.mark.parametrize(
    ("first", "after"), [("whole", ["first", "again", "again"]), ("more", ["again"] * 3)]
)
def test_launch_recorded_by_two_threads_at_once(first, after):
    """One of the recordings can be replayed; whichever ends last, calls go on."""
    kernel = Kernel()
    within, done = threading.Barrier(2), threading.Event()

    def body(x):
        name = threading.current_thread().name
        if name not in ("whole", "more"):
            return
        within.wait(10)
        if name == "more":
            x.add_(1)
        if name != first:
            assert done.wait(10)

    function = doubled(kernel, body)
    failed = []

    def call():
        try:
            function(*tensors(3))
        except Exception as error:
            failed.append(error)
        if threading.current_thread().name == first:
            done.set()

    threads = [threading.Thread(target=call, name=name) for name in ("whole", "more")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for _ in range(3):
        function(*tensors(3))
    assert kernel.ways[2:] == after


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


@pytest.mark.parametrize("more", [False, True])
def test_launch_sees_all_of_a_call_within_an_op(more):
    """Where PyTorch has dealt with gradients already, as in the package's ops."""
    library = torch.library.Library(f"croc_kernels_test_launch_{more}", "DEF")
    library.define("double(Tensor x, Tensor y) -> (Tensor, Tensor)")
    kernel = Kernel()
    function = doubled(kernel, lambda x: more and x.contiguous().add_(1))
    library.impl("double", lambda x, y: (function(x, y)[0], torch.empty(1)), "CPU")
    op = getattr(torch.ops, library.ns).double.default
    for _ in range(3):
        op(torch.zeros(3), torch.zeros(3))
    assert kernel.ways == ["first"] * 3 if more else ["first", "again", "again"]


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
