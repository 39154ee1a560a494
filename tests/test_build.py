"""The build: one binary for every torch, versions stated once, torch found without fetching it."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

from croc_kernels import _versions

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup_module():
    spec = importlib.util.spec_from_file_location("croc_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def binary() -> bytes:
    return (ROOT / "croc_kernels" / "_C.abi3.so").read_bytes()


def requirement(package: str, text: str) -> str:
    return re.search(rf'"{package}([^";]*)', text).group(1).strip()


def as_requirement(allowed: tuple[tuple[int, int], tuple[int, int]]) -> str:
    (low, low_minor), (high, high_minor) = allowed
    return f">={low}.{low_minor},<{high}.{high_minor}"


def test_ranges_are_the_same_everywhere(setup_module):
    text = (ROOT / "pyproject.toml").read_text()
    assert requirement("torch", text) == as_requirement(_versions.TORCH_RANGE)
    assert requirement("transformers", text) == as_requirement(_versions.TRANSFORMERS_RANGE)
    assert setup_module.TORCH == "torch" + as_requirement(_versions.TORCH_RANGE)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_constraints_lie_in_the_ranges(package):
    pinned = re.search(rf"^{package}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    low, high = getattr(_versions, f"{package.upper()}_RANGE")
    assert low <= _versions.parse(pinned.group(1)) < high


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0", "3.0.0a0+git1234"])
def test_versions_out_of_range_are_refused_with_the_range(version):
    message = (
        f"croc_kernels: torch must be >=2.11,<2.16, got {re.escape(version)}; install one with"
    )
    with pytest.raises(ImportError, match=message):
        _versions.check("torch", version, _versions.TORCH_RANGE)


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.13.0+cpu", "2.15.1", "2.12.0a0+git1234"])
def test_versions_in_range_are_accepted(version):
    _versions.check("torch", version, _versions.TORCH_RANGE)


@pytest.mark.parametrize(
    "library", ["libtorch_cuda.so", "libcudart.so", "libtorch_python.so", "libc10"]
)
def test_binary_needs_no_library_that_ties_it(binary, library):
    assert library.encode() not in binary


def test_binary_is_linked_to_torch(binary):
    assert b"libtorch.so" in binary
    assert b"libtorch_cpu.so" in binary


def test_binary_holds_no_path_of_the_build_machine(binary):
    assert str(ROOT).encode() not in binary


def test_torch_is_found_where_it_is_imported_from(setup_module, monkeypatch):
    monkeypatch.delenv("TORCH_ROOT", raising=False)
    assert setup_module.torch_root() == Path(torch.__file__).parent


def test_torch_root_can_be_given(setup_module, monkeypatch, tmp_path):
    header = tmp_path / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    monkeypatch.setenv("TORCH_ROOT", str(tmp_path))
    assert setup_module.torch_root() == tmp_path


def test_torch_is_found_from_an_isolated_build(setup_module, monkeypatch, tmp_path):
    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    monkeypatch.delenv("TORCH_ROOT", raising=False)
    monkeypatch.setattr(setup_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_module.sysconfig, "get_path", lambda name: str(tmp_path))
    assert setup_module.torch_root() == tmp_path / "torch"


@pytest.mark.parametrize(("command", "wanted"), [("egg_info", True), ("bdist_wheel", False)])
def test_torch_is_required_only_where_there_is_none(setup_module, monkeypatch, command, wanted):
    asked = {}
    monkeypatch.setattr(setup_module, "setup", asked.update)
    monkeypatch.setattr(setup_module, "torch_root", lambda: None)
    monkeypatch.setattr(setup_module.sys, "argv", ["setup.py", command])
    monkeypatch.setattr(setup_module, "setup", lambda **options: asked.update(options))
    setup_module.main()
    assert asked["setup_requires"] == ([setup_module.TORCH] if wanted else [])


def test_build_without_torch_says_what_to_install(setup_module, monkeypatch):
    monkeypatch.setattr(setup_module, "torch_root", lambda: None)
    command = setup_module.CMakeBuild(Distribution())
    with pytest.raises(
        RuntimeError, match=r'torch must be installed first: pip install "torch>=2.11'
    ):
        command.build_extension(setup_module.Extension("croc_kernels._C", sources=[]))


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """A function that puts an nvidia-smi first on PATH that lists GPUs with such capabilities;
    beside it is an nvcc that knows chips up to sm_121.
    """
    nvcc = "".join(f"echo compute_{arch}\n" for arch in (75, 80, 86, 89, 90, 100, 103, 120, 121))
    (tmp_path / "nvcc").write_text(f'#!/bin/sh\n[ "$*" = --list-gpu-arch ] || exit 9\n{nvcc}')
    (tmp_path / "nvcc").chmod(0o755)

    def put(*listed: str, exit_code: int = 0) -> None:
        lines = "".join(f"echo '{line}'\n" for line in listed)
        asked = "--query-gpu=compute_cap --format=csv,noheader"
        script = f'#!/bin/sh\n[ "$*" = "{asked}" ] || exit 9\n{lines}exit {exit_code}\n'
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return put


@pytest.mark.parametrize(
    ("listed", "archs"),
    [
        pytest.param(["9.0"], "90-real;90-virtual", id="one"),
        pytest.param(["9.0", "8.0", "9.0"], "80-real;90-real;90-virtual", id="two-kinds"),
        pytest.param(
            ["12.0", "8.6", "10.0"], "86-real;100-real;120-real;120-virtual", id="by-number"
        ),
        # PTX for later chips is not of one without clusters.
        pytest.param(["7.5", "8.9"], "89-real;90-virtual", id="one-too-old"),
        pytest.param(["9.0", "13.0"], "", id="nvcc-too-old"),
        pytest.param(["7.5"], "", id="too-old"),
        pytest.param(["[N/A]", "Field 'compute_cap' is not valid"], "", id="not-known"),
    ],
)
def test_machine_code_is_for_the_gpus_that_are_there(setup_module, nvidia_smi, listed, archs):
    nvidia_smi(*listed)
    assert setup_module.gpu_archs() == archs


def test_no_gpu_is_found_without_driver(setup_module, nvidia_smi, monkeypatch, tmp_path):
    nvidia_smi("NVIDIA-SMI has failed", exit_code=9)
    assert setup_module.gpu_archs() == ""
    (tmp_path / "nvidia-smi").chmod(0o644)
    assert setup_module.gpu_archs() == ""
    (tmp_path / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_module.gpu_archs() == ""


def test_no_gpu_is_found_by_a_driver_that_hangs(setup_module, nvidia_smi, monkeypatch):
    nvidia_smi("9.0")

    def hang(command, *, timeout, **_options):
        raise subprocess.TimeoutExpired(command, timeout)

    assert setup_module.gpu_archs() != ""
    monkeypatch.setattr(subprocess, "run", hang)
    assert setup_module.gpu_archs() == ""


@pytest.mark.parametrize(
    ("cuda", "given", "archs"),
    [
        pytest.param("ON", None, "86-real;90-real;90-virtual", id="gpus"),
        pytest.param("ON", "", "", id="all"),
        pytest.param("ON", "80-virtual;100-real", "80-virtual;100-real", id="given"),
        pytest.param("OFF", None, "", id="no-cuda"),
    ],
)
def test_given_chips_come_before_the_gpus(
    setup_module, nvidia_smi, monkeypatch, cuda, given, archs
):
    nvidia_smi("9.0", "8.6")
    if given is None:
        monkeypatch.delenv("CROC_CUDA_ARCHS", raising=False)
    else:
        monkeypatch.setenv("CROC_CUDA_ARCHS", given)
    assert setup_module.chosen_archs(cuda) == archs
