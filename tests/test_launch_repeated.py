"""Calls that are made as they are, wherever something else may happen, and what records them."""

import threading

import pytest
import torch
from launch_stub import CONSTANTS, Kernel, Pair, doubled, tensors
from torch.utils import _python_dispatch

from croc_kernels import launch as launching
from croc_kernels.launch import launch, replayed

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
