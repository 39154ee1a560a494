"""Every Triton kernel compiled without a GPU: no spills, shared memory that fits, tensor cores.

In the plain suite one case per kernel for sm_90; the rest is marked slow and a gate of CI.
"""

import importlib
import importlib.util
import inspect

import pytest

from croc_kernels import aot

PACKAGES = ("attention", "cost", "layer", "replacement")
# Bytes of shared memory that one program may use: CUDA C++ programming guide, compute capabilities.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


def cases_of(package: str, arch: int) -> list[aot.CompileCase]:
    return importlib.import_module(f"croc_kernels.{package}.aot").compile_cases(arch)


def parameters() -> list:
    found = []
    for arch in aot.ARCHS:
        for package in PACKAGES:
            seen = set()
            for case in cases_of(package, arch):
                first = arch == 90 and case.fn not in seen
                seen.add(case.fn)
                marks = () if first else pytest.mark.slow
                found.append(pytest.param(case, arch, marks=marks, id=f"sm{arch}-{case.name}"))
    return found


@pytest.mark.parametrize(("case", "arch"), parameters())
def test_kernel_compiles(case, arch):
    report = aot.compile(case, arch)
    assert report.spill_bytes <= case.spill_allowance
    assert report.shared_bytes <= SHARED_LIMIT[arch]
    assert not report.unset
    assert not report.over_barriers
    assert not report.pending
    if case.has_dot:
        assert report.has_mma
        assert report.has_wgmma or arch != 90


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_every_kernel_has_a_case(package, arch):
    names = [case.name for case in cases_of(package, arch)]
    assert len(names) == len(set(names))
    compiled = {case.fn.__name__ for case in cases_of(package, arch)}
    folder = importlib.import_module(f"croc_kernels.{package}").__path__[0]
    kernels = set()
    modules = ["forward", "backward", "kernel", "mask_kernel", "mask_columns"]
    modules += ["loss_kernel", "loss_list"]
    modules += ["hopper_forward", "hopper_backward", "hopper"] * (arch == 90)
    for module in modules:
        if importlib.util.find_spec(f"croc_kernels.{package}.{module}") is None:
            continue
        loaded = importlib.import_module(f"croc_kernels.{package}.{module}")
        kernels |= {
            name
            for name, value in vars(loaded).items()
            if name.endswith("_kernel") and hasattr(value, "arg_names")
            and inspect.getsourcefile(value.fn).startswith(folder)
        }  # fmt: skip
    assert kernels == compiled
