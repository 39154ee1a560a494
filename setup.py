"""Builds ``croc_kernels._C`` with CMake; everything else about the package is in pyproject.toml.

Only torch's headers and two of its libraries are needed, and torch is never imported. They are
taken from, in this order: the environment variable ``TORCH_ROOT`` (torch's package directory), the
torch of the running interpreter, and the torch of the environment that pip isolates a build from:
installing an sdist next to a present torch fetches no second one. Where none is found, torch itself
becomes a build requirement.

``CROC_CUDA=ON|OFF`` in the environment decides about the CUDA kernels; without it they are built if
nvcc is there. ``CROC_CUDA_ARCHS`` names the chips as CMake does, ``"90-real;100-virtual"`` for an
H100 and PTX. Without it they are those of the GPUs that nvidia-smi lists, and PTX for later ones;
where it lists none or one that nvcc does not know, and with an empty one, all that a wheel serves.
A wheel for others is therefore built with an empty one (``make wheel``).
"""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
TORCH = "torch>=2.11,<2.16"
OLDEST_ARCH = 80  # the kernels use instructions that older chips lack
CLUSTER_ARCH = 90  # the first with clusters


def torch_root() -> Path | None:
    """Directory of an installed torch with headers, or None."""
    found = importlib.util.find_spec("torch")
    candidates = [
        os.environ.get("TORCH_ROOT"),
        *(found.submodule_search_locations if found else []),
    ]
    candidates.append(os.path.join(sysconfig.get_path("platlib"), "torch"))
    roots = [Path(c) for c in candidates if c]
    return next((r for r in roots if (r / "include/torch/csrc/stable/library.h").is_file()), None)


def tool(name: str, directory: str) -> str | None:
    """Path of ``cmake`` or ``ninja``: the Python package's own binary before what PATH holds."""
    try:
        return shutil.which(name, path=getattr(importlib.import_module(name), directory))
    except ImportError:
        return shutil.which(name)


def listed_by(program: str, *arguments: str) -> str:
    """What a program on PATH prints; "" where it is missing, fails to start or hangs."""
    try:
        run = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout


def gpu_archs() -> str:
    """Chips of this machine's GPUs for CMake, and PTX for later ones; "" where none is of use, or
    nvcc does not know one of them.
    """
    listed = listed_by("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    found = {int(a + b) for a, b in re.findall(r"^(\d+)\.(\d)$", listed, re.MULTILINE)}
    found = {arch for arch in found if arch >= OLDEST_ARCH}
    known = re.findall(r"^compute_(\d+)$", listed_by("nvcc", "--list-gpu-arch"), re.MULTILINE)
    if not found or not found <= {int(arch) for arch in known}:
        return ""
    # Clusters of blocks are in the code for sm_90 and later alone.
    newest = max(found | {CLUSTER_ARCH})
    return ";".join([*(f"{arch}-real" for arch in sorted(found)), f"{newest}-virtual"])


def chosen_archs(cuda: str) -> str:
    """What CROC_CUDA_ARCHS says; without it this machine's; "": all that a wheel serves."""
    given = os.environ.get("CROC_CUDA_ARCHS")
    return given if given is not None else gpu_archs() if cuda == "ON" else ""


class CMakeBuild(build_ext):
    """Runs CMake per interpreter and variant in a directory that stays: rebuilds are short."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build, and leave the library where setuptools expects it."""
        root, cmake, ninja = torch_root(), tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
        if root is None:
            raise RuntimeError(f'setup.py: torch must be installed first: pip install "{TORCH}"')
        if cmake is None:
            raise RuntimeError("setup.py: cmake must be installed: pip install cmake ninja")
        cuda = os.environ.get("CROC_CUDA") or ("ON" if shutil.which("nvcc") else "OFF")
        build = HERE / "build" / f"cmake-{sys.implementation.cache_tag}-cuda-{cuda.lower()}"
        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={root}",
            f"-DCROC_CUDA={cuda}",
            # Empty as well, or CMake remembers those of the build before.
            f"-DCROC_CUDA_ARCHS={chosen_archs(cuda)}",
        ]
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run([cmake, "-S", str(HERE), "-B", str(build), *configure], check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)
        # Not linked there: the variants share this path, and ninja would take one for the other.
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "_C.abi3.so", output)


def main() -> None:
    """Run setuptools; everything static is in pyproject.toml."""
    files = sorted(HERE.glob("csrc/**/*"))
    depends = [str(p.relative_to(HERE)) for p in files if p.suffix in {".cpp", ".cu", ".cuh", ".h"}]
    # pip asks for build requirements through egg_info; a later command must not fetch anything.
    missing_torch = "egg_info" in sys.argv and torch_root() is None
    extension = Extension(
        "croc_kernels._C", sources=[], depends=["CMakeLists.txt", *depends], py_limited_api=True
    )
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": CMakeBuild},
        setup_requires=[TORCH] if missing_torch else [],
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
