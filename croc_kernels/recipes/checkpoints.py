"""Directories that are complete or absent: written beside their place, flushed to disk, then
renamed into it.

A rename is atomic, a write of a directory is not: a process killed inside
``Trainer._save_checkpoint`` leaves a ``checkpoint-N`` that ``get_last_checkpoint`` would pick and
that can't be loaded. Unfinished and unwanted directories have names that start with a dot;
:func:`clean` removes what a killed process left of them.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

_UNFINISHED = ".unfinished-"
_UNWANTED = ".unwanted-"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def staging_path(final: Path) -> Path:
    """Where ``final`` is written before it is renamed: on the same file system, or a rename would
    copy.
    """
    return final.parent / f"{_UNFINISHED}{final.name}"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(staged: Path, final: Path) -> None:
    """Flush the directory ``staged`` to disk and rename it to ``final``, in the place of an older
    one if any.
    """
    for path in (*sorted(staged.rglob("*")), staged):
        _flush(path)
    if final.exists():
        remove(final)
    os.rename(staged, final)
    _flush(final.parent)


def remove(directory: Path) -> None:
    """Delete a directory so that no half of it is ever seen under its name."""
    doomed = directory.parent / f"{_UNWANTED}{directory.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed)


def write_directory(final: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a new directory, then publish it as ``final``."""
    staged = staging_path(final)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    write(staged)
    publish(staged, final)


def clean(output: Path) -> list[Path]:
    """Delete what a killed process left unfinished below ``output``; return what was deleted."""
    if not output.is_dir():
        return []
    left = [p for p in output.iterdir() if p.name.startswith((_UNFINISHED, _UNWANTED))]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints below ``output``, oldest step first."""
    if not output.is_dir():
        return []
    found = [p for p in output.iterdir() if p.is_dir() and _CHECKPOINT.fullmatch(p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name.

    Raises:
        ValueError: the name is not ``checkpoint-N``.
    """
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"pretrain: resume must name a checkpoint-N directory, got {checkpoint}")
    return int(match[1])


def rotate(output: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond ``limit``; None or 0 keeps all."""
    for checkpoint in checkpoints(output)[: -limit if limit else 0]:
        remove(checkpoint)


def find_resume(output: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from, or None to start.

    Args:
        output: the run's directory.
        resume: None: start; ``"last"``: go on from the last complete checkpoint, or start if there
            is none yet (the same command line works before and after a kill); else a checkpoint's
            path.

    Raises:
        FileExistsError: starting, or going on from an older checkpoint, would write over complete
            checkpoints.
        FileNotFoundError: the named checkpoint does not exist.
        ValueError: the name is not ``checkpoint-N``.
    """
    present = checkpoints(output)
    if resume == "last":
        return present[-1] if present else None
    if resume is None:
        if present:
            raise FileExistsError(
                f"pretrain: output must hold no checkpoint, got {present[-1]}; go on from it with "
                "--resume, or choose another --output"
            )
        return None
    checkpoint = Path(resume)
    if not (checkpoint / "trainer_state.json").is_file():
        raise FileNotFoundError(f"pretrain: resume must be a complete checkpoint, got {checkpoint}")
    newer = [p for p in present if step_of(p) > step_of(checkpoint)]
    if newer:
        raise FileExistsError(
            f"pretrain: resume must be the newest checkpoint of output, got {checkpoint.name} but "
            f"{newer[-1]} is there; move it away or choose another --output"
        )
    return checkpoint
