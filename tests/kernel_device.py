"""Where the tests of the Triton kernels run: on a GPU, else interpreted in a process that
test_token_cost_fresh.py starts with TRITON_INTERPRET=1; skipped in any other. And on what.
"""

import os

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter truncates to bf16 where the hardware rounds.
BF16 = (torch.bfloat16,) if DEVICE == "cuda" else ()
DTYPES = (torch.float16, torch.float32, torch.float64, *BF16)
# A dtype and one that is added up in another.
PAIRS = [*((dtype, dtype) for dtype in DTYPES), ((*BF16, torch.float16)[0], torch.float32)]
needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="needs a CUDA device or TRITON_INTERPRET=1 (test_token_cost_fresh.py sets it)",
)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)
