"""What is known to be wrong with masks in the installed transformers, and the range of versions
that was run.
"""

from .._versions import TRANSFORMERS_RANGE, check


def _release(version: str) -> tuple[int, ...]:
    """(5, 23, 0) of ``5.23.0.dev0``."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits or not part[0].isdigit():
            break
        numbers.append(int(digits))
    return (*numbers, 0, 0, 0)[:3]


# (first version with the fault, first without or None, what happens). The sources are release
# comparisons that were run; docs/integrations.md says how to repeat them.
_FAULTS: tuple[tuple[tuple[int, ...], tuple[int, ...] | None, str], ...] = (
    (
        (4, 57, 0),
        None,
        "flash_attention_2/3/4 drop the image-bidirectional part of the mask without a warning "
        '(Gemma 3, Gemma 4, PaliGemma, Molmo2): use attn_implementation="croc", or "sdpa"',
    ),
    (
        (4, 57, 0),
        None,
        "a 4-D float mask of ones and zeros is added to the scores, not inverted as 4.37 did: the "
        "released Croc code leaks later answer tokens without an error",
    ),
    (
        (5, 23, 0),
        None,
        "packed rows (position_ids that restart) lose the image block in sliding layers with "
        'eager, sdpa and flex_attention (Gemma 3, Gemma 4): attn_implementation="croc" repairs the '
        "mask",
    ),
    (
        (4, 57, 0),
        (5, 0, 0),
        "packed rows of PaliGemma: the prefixes of all documents see each other; "
        'attn_implementation="croc" refuses them',
    ),
    (
        (5, 9, 0),
        (5, 24, 0),
        "packed rows of PaliGemma: the prefixes of all documents see each other; "
        'attn_implementation="croc" repairs the mask',
    ),
    (
        (5, 0, 0),
        (5, 18, 0),
        "mm_encoder_outputs= is swallowed and the image ignored: pass pixel_values",
    ),
)


def known_faults(transformers_version: str | None = None) -> list[str]:
    """Faults of a transformers version that change masks or images without an error.

    Args:
        transformers_version: such as ``"5.17.0"``; by default the installed one.

    Returns:
        One sentence per fault, with what to do.

    Raises:
        ImportError: no version given and transformers is not installed.
    """
    if transformers_version is None:
        import transformers

        transformers_version = transformers.__version__
    release = _release(transformers_version)
    return [
        text
        for first, fixed, text in _FAULTS
        if release >= first and (fixed is None or release < fixed)
    ]


def check_transformers() -> None:
    """Raise ImportError, with the range, unless the installed transformers was run with this
    package.
    """
    import transformers

    check("transformers", transformers.__version__, TRANSFORMERS_RANGE)
