"""The versions this package was written for; anything else is refused on import, with the range."""

import torch

PACKAGE = "0.1.0"
# The stable ABI of the extension starts at 2.11; the upper end is the newest release that was run.
TORCH_RANGE = ((2, 11), (2, 16))
TRANSFORMERS_RANGE = ((4, 57), (5, 25))


def parse(version: str) -> tuple[int, int]:
    """Major and minor of a version string such as ``2.13.0+cpu``."""
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)


def check(name: str, version: str, allowed: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Raise ImportError unless ``allowed[0] <= version < allowed[1]``."""
    low, high = allowed
    if not low <= parse(version) < high:
        wanted = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        raise ImportError(
            f"croc_kernels: {name} must be {wanted}, got {version}; "
            f'install one with: pip install "{name}{wanted}"'
        )


check("torch", torch.__version__, TORCH_RANGE)
