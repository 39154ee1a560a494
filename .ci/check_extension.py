"""Load the extension of an unpacked wheel, the current directory: which kernels are in it?"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, ".")
from croc_kernels import _C, ops

variant = sys.argv[1]
assert Path(_C.__file__).is_relative_to(Path.cwd()), f"loaded {_C.__file__}, not the wheel's"
has = {
    key: torch._C._dispatch_has_kernel_for_dispatch_key(ops.linear_assignment.name(), key)
    for key in ("CPU", "CUDA")
}
assert has == {"CPU": True, "CUDA": variant == "ON"}, f"CROC_CUDA={variant} registered {has}"
print(f"CROC_CUDA={variant}: {has}")
