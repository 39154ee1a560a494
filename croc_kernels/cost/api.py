"""Distances of visual tokens to the rows of the prompt-token pool."""

import torch
from torch import Tensor

from .. import ops
from ..backend import log_choice, resolve
from ..checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_device,
    check_dtype,
    check_rank,
    check_same,
    check_shape,
    check_tensor,
)
from . import reference

METRICS = ("l2", "l2sq", "cosine")
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _check_rows(
    function: str, tokens: Tensor, token_index: Tensor | None, num_rows: Tensor | None
) -> None:
    """Checks of what says which rows the result has."""
    if token_index is None:
        check_rank(function, "tokens", tokens, "([B,] N, C)", (2, 3))
        shape = tokens.shape[:-1]
    else:
        check_rank(function, "tokens", tokens, "(S, C) with token_index", (2,))
        check_tensor(function, "token_index", token_index)
        check_dtype(function, "token_index", token_index, (torch.int64,))
        check_rank(function, "token_index", token_index, "([B,] N)", (1, 2))
        check_device(function, "token_index", token_index, "tokens", tokens)
        shape = token_index.shape
        if tokens.shape[0] == 0 and shape.numel() > 0:
            raise ValueError(f"{function}: tokens must have rows for token_index to name, got none")
    if num_rows is not None:
        check_tensor(function, "num_rows", num_rows)
        check_dtype(function, "num_rows", num_rows, INTEGERS)
        check_shape(function, "num_rows", num_rows, (shape[0] if len(shape) == 2 else 1,), "(B,)")
        check_device(function, "num_rows", num_rows, "tokens", tokens)


def _prepare(
    function: str,
    tokens: Tensor,
    pool: Tensor,
    metric: str,
    token_index: Tensor | None,
    num_rows: Tensor | None,
    backend: str,
) -> str:
    """All checks; returns what ``resolve`` says."""
    check_tensor(function, "tokens", tokens)
    check_tensor(function, "pool", pool)
    choice = resolve(function, backend, tokens)
    allowed = FLOATS if choice == "reference" else _KERNEL_DTYPES
    check_dtype(function, "tokens", tokens, allowed)
    check_rank(function, "pool", pool, "(M, C)", (2,))
    check_same(function, "pool", pool, "tokens", tokens)
    _check_rows(function, tokens, token_index, num_rows)
    check_shape(function, "pool", pool, (pool.shape[0], tokens.shape[-1]), "(M, C)")
    check_choice(function, "metric", metric, METRICS)
    if backend == "auto" and not torch.compiler.is_compiling():
        log_choice(function, choice, f"{tokens.device.type} tensors")
    return choice


def token_cost(
    tokens: Tensor,
    pool: Tensor,
    metric: str = "l2",
    *,
    token_index: Tensor | None = None,
    num_rows: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Distance of every visual token to every row of the prompt-token pool.

    .. math:: C_{ij} = \lVert x_i - p_j \rVert_2

    for ``"l2"``, its square for ``"l2sq"``, and :math:`1 - \cos(x_i, p_j)` for ``"cosine"``, where
    a row of norm 0 costs 1. Products and norms are accumulated in float32 or better whatever the
    input dtype: a bf16 distance near 64 moves in steps of 0.25 and would leave the matching nothing
    to decide on. Inputs are taken as they come, autocast or not. The kernels expand the square, so
    a squared distance is good to about 1e-6 (|x|² + |p|²): a relative error of 1e-6 unless the
    distance is small against the norms, and at worst 1e-3 of the norm, for equal rows, where the
    result may be a little above 0 but is never NaN. A NaN in a row makes that row's (column's)
    costs NaN; so does a row whose squared norm overflows float32.

    The result carries no gradient: a matching has none.

    Args:
        tokens: ([B,] N, C), float16, bfloat16 or float32 (float64 too with
            ``backend="reference"``), any strides. With ``token_index``: (S, C), rows of all images
            packed.
        pool: (M, C), same dtype and device as ``tokens``.
        metric: ``"l2"``, ``"l2sq"`` or ``"cosine"``.
        token_index: ([B,] N) int64; row (b, i) of the result uses ``tokens[token_index[b, i]]``,
            read in place. An index out of range raises for CPU tensors and makes the row NaN on
            CUDA, where nothing waits for the host.
        num_rows: (B,) int32 or int64 on the device; rows i >= num_rows[b] are not computed, and are
            0.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``. Only ``"auto"`` chooses, and never by
            changing the result.

    Returns:
        ([B,] N, M) float32, contiguous (float64 for float64 tokens).

    Raises:
        TypeError: a dtype is not supported.
        ValueError: the shapes or devices disagree, the metric is unknown, or (CPU) an index is out
            of range.

    Source: Croc, arXiv 2410.14332, section 3 (matching cost).
    """
    choice = _prepare("token_cost", tokens, pool, metric, token_index, num_rows, backend)
    tokens, pool = tokens.detach(), pool.detach()
    run = reference.token_cost if choice == "reference" else ops.token_cost
    return run(tokens, pool, token_index, num_rows, metric)


def nearest_token(
    tokens: Tensor,
    pool: Tensor,
    metric: str = "l2",
    *,
    token_index: Tensor | None = None,
    num_rows: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Index of the pool row nearest to every visual token, with nothing of size N x M in memory.

    .. math:: k_i = \min \arg\min_j C_{ij}

    with the costs of :func:`token_cost`. Equal costs go to the lowest index on every backend. Costs
    that differ by less than their accuracy may go either way, and the same way in every run. A NaN
    cost is never chosen.

    Args:
        tokens: as in :func:`token_cost`.
        pool: (M, C) with M >= 1, same dtype and device as ``tokens``.
        metric: ``"l2"``, ``"l2sq"`` (the same indices) or ``"cosine"``.
        token_index: as in :func:`token_cost`; an index out of range raises on CPU and gives -1 on
            CUDA.
        num_rows: as in :func:`token_cost`.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ([B,] N) int64; -1 in rows i >= num_rows[b] and where no cost is finite.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: the shapes or devices disagree, the metric is unknown, the pool is empty, or
            (CPU) an index is out of range.

    Source: the released Croc matches so: deepglint/Croc, ``prepare_inputs_labels_for_multimodal``.
    """
    choice = _prepare("nearest_token", tokens, pool, metric, token_index, num_rows, backend)
    if pool.shape[0] == 0:
        raise ValueError("nearest_token: pool must have at least one row, got (0, C)")
    tokens, pool = tokens.detach(), pool.detach()
    run = reference.nearest_token if choice == "reference" else ops.nearest_token
    return run(tokens, pool, token_index, num_rows, metric)
