"""What needs a process of its own: the interpreter, and torch.compile as the very first call."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Each function in a fork taken before anything has run: fresh, without the seconds of the imports.
COMPILE = """
import os
import sys

import torch

from croc_kernels import nearest_token, reconstruction_loss, replace_tokens, token_cost

FUNCTIONS = ("token_cost", "nearest_token", "replace_tokens", "reconstruction_loss")


def calls():
    where = torch.rand(2, 9) < 0.5
    index, rows = torch.randint(12, (2, 9)), torch.randint(9, (2, 5))
    counts = torch.tensor([3, 5])
    return {
        "token_cost": lambda x, p: token_cost(x[0], p, token_index=rows, num_rows=counts),
        "nearest_token": lambda x, p: nearest_token(x, p, "cosine"),
        "replace_tokens": lambda x, p: replace_tokens(x, where, p, index),
        "reconstruction_loss": lambda x, p: reconstruction_loss(
            x, x + 1, where, num_items=counts[0]
        ),
    }


def check(name, backend):
    call = calls()[name]
    for dynamic, dim in ((False, 16), (True, 24)):
        torch._dynamo.reset()
        x, p = (torch.randn(*shape, dim, requires_grad=True) for shape in ((2, 9), (12,)))
        got = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=backend)(x, p)
        expected = call(x, p)
        assert torch.equal(got, expected), (name, dynamic)
        if not expected.requires_grad:
            continue
        results = [
            torch.autograd.grad(y, (x, p), torch.ones_like(y), allow_unused=True)
            for y in (got, expected)
        ]
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None), (name, dynamic)
            assert a is None or torch.equal(a, b), (name, dynamic)


children = {}
for name in FUNCTIONS:
    pid = os.fork()
    if pid == 0:
        try:
            check(name, sys.argv[1])
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children[name] = os.waitpid(pid, 0)[1]
failed = [name for name in FUNCTIONS if children[name] != 0]
sys.exit(f"failed: {failed}" if failed else 0)
"""

# As for CUDA tensors: TRITON_INTERPRET makes CPU tensors take Triton too.
RESOLVE = """
import warnings

import torch

from croc_kernels.backend import resolve


def step(x):
    return x + (resolve("step", "auto", x) == "triton")


warnings.simplefilter("error")
assert torch.compile(step, fullgraph=True, backend="eager")(torch.zeros(1)) == 1
"""


def run(*command: str, **environment: str) -> None:
    """Run Python in a fresh process; show its output if it fails."""
    result = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_token_cost_and_others_compile_as_the_first_call() -> None:
    # aot_eager traces as inductor does, and compiles no C++.
    run("-c", COMPILE, "aot_eager")


def test_triton_is_chosen_inside_a_compiled_function() -> None:
    # torch 2.11 can't trace importlib's find_spec; later versions warn of a cache they ignore.
    run("-c", RESOLVE, TRITON_INTERPRET="1")


KERNEL_TESTS = ("token_cost_kernels", "replace_tokens_kernels", "reconstruction_loss_kernels")
KERNEL_TESTS += ("mask_kernel", "layer_kernels")


@pytest.mark.parametrize("file", [f"test_{name}.py" for name in KERNEL_TESTS])
def test_token_cost_and_other_kernels_in_the_interpreter(file: str) -> None:
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file), TRITON_INTERPRET="1")
