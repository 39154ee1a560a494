"""A GPU that several processes take turns on stops programs anywhere and goes on later, which must
change no result. Alone on a GPU nothing of this is exercised.
"""

import multiprocessing
import time

import pytest
import torch
from mixed_attention_cases import MASKS, inputs

from croc_kernels.attention.api import mixed_attention

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

DIMS = 4 * (64, 128, 256)  # of one process each
SECONDS = 10.0
# Backwards of milliseconds, so that most are interrupted.
LENGTH, HEADS = 6200, 20
CONTEXT = multiprocessing.get_context("spawn")


def _count(dim, alone, together, results):
    """Put (D, steps, wrong steps) into ``results``, or what went wrong."""
    try:
        mask = MASKS["spans"](1, LENGTH, "cuda")
        leaves = [x.requires_grad_() for x in inputs(mask, HEADS, HEADS, dim, torch.bfloat16)]
        weight = torch.ones_like(leaves[0])

        def step(deterministic):
            out = mixed_attention(*leaves, mask, deterministic=deterministic)
            _dq, dk, dv = torch.autograd.grad(out, leaves, weight)
            return out.detach(), dk, dv

        # Compiled beside the others.
        step(True), step(False)
        together.wait()
        with alone:
            want = step(True)
            torch.cuda.synchronize()
        together.wait()
        steps = wrong = 0
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            got = step(False)
            wrong += not all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            steps += 1
        results.put((dim, steps, wrong))
    except Exception as error:
        together.abort()
        results.put((dim, 0, repr(error)))


def test_shared_gpu_changes_no_bit_of_the_gradients():
    alone, together, results = CONTEXT.Lock(), CONTEXT.Barrier(len(DIMS)), CONTEXT.Queue()
    arguments = (alone, together, results)
    workers = [CONTEXT.Process(target=_count, args=(dim, *arguments)) for dim in DIMS]
    for worker in workers:
        worker.start()
    counts = [results.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    assert all(steps > 0 for _, steps, _ in counts), counts
    assert all(wrong == 0 for *_, wrong in counts), counts
