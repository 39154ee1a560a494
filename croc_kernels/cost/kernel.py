r"""Triton kernels of the matching costs, and their launchers.

A small pass over the rows (prepass.py) writes where each row of the result reads its token (so
batches with any strides, gathered rows and row counts are one case) and its squared norm; the large
kernel is a matrix product with the distance in its epilogue. On sm_90 most calls run the kernel of
hopper.py instead, which needs no pass over the tokens.

Why the product is summed twice. Tensor cores add to their float32 accumulator with truncation
(Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 7:e330,
2021). In a sum that grows steadily, such as the product of a token with a nearby pool row, every
step loses half a unit in the last place on average, always in the same direction: about 5e-6 of the
norm over C = 4096, so 3e-3 of the norm as the distance of two equal rows. Each step along C
therefore starts from zero and is added outside the tensor core, rounded to nearest, which leaves
1e-7 and less. ``max_num_imprecise_acc`` is what keeps Triton from folding that addition back into
the dot. What a step loses is proportional to its sum on average, and CORRECTION, a factor of 1 plus
a few units in the last place, gives it back where it was measured (sm_90).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import capability, interpreted, on_device
from .config import PARTS, CostConfig, one_matrix, pick_config, pick_hopper
from .prepass import (
    CLEAR,
    NORMS,
    OFFSET_ROWS,
    PREPASS,
    _hopper_start_kernel,
    _row_prepass_kernel,
)

_NO_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def _tile_place(rows, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column tile of this program: GROUP_M row tiles share a column tile in the L2."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(m, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def _half_product(x, pool_ptrs, mask, EVEN_K: tl.constexpr, PRECISION: tl.constexpr):
    """Product of a token block with a pool block, summed from zero: see the module docstring."""
    if EVEN_K:
        p = tl.load(pool_ptrs)
    else:
        p = tl.load(pool_ptrs, mask=mask, other=0.0)
    return tl.dot(x, p, input_precision=PRECISION, max_num_imprecise_acc=x.shape[1])


@triton.jit
def _tile_products(
    tokens_ptr, pool_ptr, offset, first_n, m, dim, stride_pm,
    HALF_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, CORRECTION: tl.constexpr,
):  # fmt: skip
    """Products of the token rows at ``offset`` with 2 HALF_N pool rows from first_n, in halves."""
    offs_k = tl.arange(0, BLOCK_K)
    # A row that does not exist reads row 0 and its result is dropped: cheaper than a mask on every
    # load.
    start = tl.multiple_of(tl.maximum(offset, 0), ALIGN)
    x_ptrs = tokens_ptr + start[:, None] + offs_k[None, :]
    row0 = tl.minimum(first_n + tl.arange(0, HALF_N), m - 1).to(tl.int64)
    row1 = tl.minimum(first_n + HALF_N + tl.arange(0, HALF_N), m - 1).to(tl.int64)
    p0_ptrs = pool_ptr + row0[None, :] * stride_pm + offs_k[:, None]
    p1_ptrs = pool_ptr + row1[None, :] * stride_pm + offs_k[:, None]
    acc0 = tl.zeros((offset.shape[0], HALF_N), tl.float32)
    acc1 = tl.zeros((offset.shape[0], HALF_N), tl.float32)
    depth = tl.where(tl.max(offset, axis=0) >= 0, dim, 0)
    for k in range(0, depth, BLOCK_K):
        mask = offs_k < dim - k
        if EVEN_K:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=mask[None, :], other=0.0)
        part = _half_product(x, p0_ptrs, mask[:, None], EVEN_K, PRECISION)
        acc0 = tl.fma(part, CORRECTION, acc0)
        part = _half_product(x, p1_ptrs, mask[:, None], EVEN_K, PRECISION)
        acc1 = tl.fma(part, CORRECTION, acc1)
        x_ptrs += BLOCK_K
        p0_ptrs += BLOCK_K
        p1_ptrs += BLOCK_K
    return acc0, acc1


@triton.jit
def _store_half(
    out_ptr, acc, x_norm, p_norm_ptr, live, row, rows, first_n, m, METRIC: tl.constexpr
):
    """Turn products into costs and write them: the whole epilogue of one half of a tile."""
    col = first_n + tl.arange(0, acc.shape[1])
    p_norm = tl.load(p_norm_ptr + col, mask=col < m, other=0.0)
    if METRIC == "cosine":
        cost = 1.0 - acc * x_norm[:, None] * p_norm[None, :]
    else:
        cost = (x_norm[:, None] + p_norm[None, :]) - 2.0 * acc
    # Not tl.maximum: it would turn the NaN of a bad input into a perfect match.
    cost = tl.where(cost < 0.0, 0.0, cost)
    if METRIC == "l2":
        cost = tl.sqrt(cost)
    cost = tl.where(live[:, None], cost, 0.0)
    pointers = out_ptr + row.to(tl.int64)[:, None] * m + col[None, :]
    tl.store(pointers, cost, mask=(row < rows)[:, None] & (col < m)[None, :])


@triton.jit
def _token_cost_kernel(
    tokens_ptr, pool_ptr, offset_ptr, x_norm_ptr, p_norm_ptr, out_ptr, rows, m, dim, stride_pm,
    BLOCK_M: tl.constexpr, HALF_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, METRIC: tl.constexpr,
    CORRECTION: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, 2 HALF_N) tile of costs per program; grid = (row tiles * column tiles,)."""
    tile_m, tile_n = _tile_place(rows, m, BLOCK_M, 2 * HALF_N, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = tile_n * 2 * HALF_N
    offset = tl.load(offset_ptr + row, mask=row < rows, other=-1)
    acc0, acc1 = _tile_products(
        tokens_ptr, pool_ptr, offset, first_n, m, dim, stride_pm,
        HALF_N, BLOCK_K, EVEN_K, ALIGN, PRECISION, CORRECTION,
    )  # fmt: skip
    live = offset >= 0
    x_norm = tl.load(x_norm_ptr + row, mask=live, other=0.0)
    _store_half(out_ptr, acc0, x_norm, p_norm_ptr, live, row, rows, first_n, m, METRIC)
    _store_half(out_ptr, acc1, x_norm, p_norm_ptr, live, row, rows, first_n + HALF_N, m, METRIC)


@triton.jit
def _half_best(acc, p_norm_ptr, first_n, m, METRIC: tl.constexpr):
    """Lowest score of each row in one half and the lowest column that has it. NaN never wins."""
    col = first_n + tl.arange(0, acc.shape[1])
    p_norm = tl.load(p_norm_ptr + col, mask=col < m, other=0.0)
    # The token's own norm is the same for all columns, so it is left out.
    score = -acc * p_norm[None, :] if METRIC == "cosine" else p_norm[None, :] - 2.0 * acc
    score = tl.where((col < m)[None, :] & (score == score), score, float("inf"))
    best = tl.min(score, axis=1)
    chosen = (score == best[:, None]) & (score < float("inf"))
    return best, tl.min(tl.where(chosen, col[None, :], _NO_INDEX), axis=1)


@triton.jit
def _nearest_token_kernel(
    tokens_ptr, pool_ptr, offset_ptr, p_norm_ptr, score_ptr, index_ptr, rows, m, dim, stride_pm,
    BLOCK_M: tl.constexpr, HALF_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, METRIC: tl.constexpr,
    CORRECTION: tl.constexpr,
):  # fmt: skip
    """Best score and column of BLOCK_M rows in one tile; grid = (row tiles * column tiles,)."""
    tile_m, tile_n = _tile_place(rows, m, BLOCK_M, 2 * HALF_N, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = tile_n * 2 * HALF_N
    offset = tl.load(offset_ptr + row, mask=row < rows, other=-1)
    acc0, acc1 = _tile_products(
        tokens_ptr, pool_ptr, offset, first_n, m, dim, stride_pm,
        HALF_N, BLOCK_K, EVEN_K, ALIGN, PRECISION, CORRECTION,
    )  # fmt: skip
    best0, index0 = _half_best(acc0, p_norm_ptr, first_n, m, METRIC)
    best1, index1 = _half_best(acc1, p_norm_ptr, first_n + HALF_N, m, METRIC)
    later = best1 < best0
    place = tile_n.to(tl.int64) * rows + row
    tl.store(score_ptr + place, tl.where(later, best1, best0), mask=row < rows)
    index = tl.where(offset >= 0, tl.where(later, index1, index0), _NO_INDEX)
    tl.store(index_ptr + place, index, mask=row < rows)


@triton.jit
def _nearest_reduce_kernel(score_ptr, index_ptr, out_ptr, rows, tiles, BLOCK_R: tl.constexpr):
    """Winner among the column tiles for BLOCK_R rows; grid = (cdiv(rows, BLOCK_R),)."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    best = tl.full((BLOCK_R,), float("inf"), tl.float32)
    winner = tl.full((BLOCK_R,), _NO_INDEX, tl.int32)
    score_ptrs, index_ptrs = score_ptr + row, index_ptr + row
    for _ in range(tiles):
        index = tl.load(index_ptrs, mask=inside, other=_NO_INDEX)
        score = tl.load(score_ptrs, mask=inside, other=0.0)
        # Strictly better only: an equal score in a later tile has a higher index.
        better = (index != _NO_INDEX) & (score < best)
        best, winner = tl.where(better, score, best), tl.where(better, index, winner)
        score_ptrs += rows
        index_ptrs += rows
    tl.store(out_ptr + row, tl.where(winner == _NO_INDEX, -1, winner).to(tl.int64), mask=inside)


REDUCE_ROWS = 128


def tile_constants(
    config: CostConfig, dtype: torch.dtype, dim: int, stride: int
) -> dict[str, object]:
    """Compile-time constants of the product kernels, METRIC apart."""
    return {
        "BLOCK_M": config.block_m,
        "HALF_N": config.half_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "EVEN_K": dim % config.block_k == 0,
        # Offsets come from memory, where the compiler can't see that 16-byte loads are aligned.
        "ALIGN": 8 if stride % 8 == 0 else 1,
        # One tf32 product keeps 11 bits of a float32; three keep 22. For 16-bit inputs every
        # product is exact.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
        "CORRECTION": 1.0 + config.correction * 2.0**-23,
    }


def _arch(tensor: Tensor) -> int:
    return 90 if interpreted() else capability(tensor.device.index)


def _readable(rows: Tensor) -> Tensor:
    """The same rows; only a stride inside a row is copied away: no GEMM reads those at speed."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


class _Problem:
    """One call's operands as the kernels take them, and the kernel that takes them."""

    def __init__(
        self,
        tokens: Tensor,
        pool: Tensor,
        token_index: Tensor | None,
        num_rows: Tensor | None,
        metric: str,
    ) -> None:
        tokens, self.pool, self.metric = _readable(tokens), _readable(pool), metric
        self.tokens = tokens.unsqueeze(0) if tokens.dim() == 2 else tokens
        shape = tuple(tokens.shape[:-1] if token_index is None else token_index.shape)
        self.length = shape[-1]
        self.rows = self.length * (shape[0] if len(shape) == 2 else 1)
        self.m, self.dim = pool.shape
        self.index = None if token_index is None else token_index.contiguous()
        self.num_rows = None if num_rows is None else num_rows.contiguous()
        stride_b, stride_n, _ = self.tokens.stride()
        self.strides = (stride_b if token_index is None else 0, stride_n, self.pool.stride(0))
        arch, shared = _arch(tokens), self.strides[0] | self.strides[1] | self.strides[2]
        aligned = shared % 8 == 0 and (tokens.data_ptr() | self.pool.data_ptr()) % 16 == 0
        # TMA reads no rows that overlap; the interpreter knows no Gluon.
        aligned = aligned and self.strides[2] >= self.dim and not interpreted()
        problem = arch, tokens.dtype, self.rows, self.m, self.dim
        self.hopper = pick_hopper(*problem, aligned)
        self.config = pick_config(*problem)
        self.constants = tile_constants(self.config, tokens.dtype, self.dim, shared)
        self.p_norm = tokens.new_empty((self.m,), dtype=torch.float32)

    def prepare(self, token_norms: bool) -> tuple[Tensor, ...]:
        """Launch the prepass of the plain kernels; returns offsets and, if asked for, norms."""
        tokens, token_rows = self.tokens, PREPASS["BLOCK_R"] if token_norms else OFFSET_ROWS
        offset = tokens.new_empty((self.rows,), dtype=torch.int64)
        x_norm = tokens.new_empty((self.rows,), dtype=torch.float32) if token_norms else None
        programs = triton.cdiv(self.rows, token_rows) + triton.cdiv(self.m, PREPASS["BLOCK_R"])
        _row_prepass_kernel[(programs,)](
            tokens, self.pool, self.index, self.num_rows, offset, x_norm, self.p_norm,
            (self.rows, self.length, tokens.shape[1], self.m, self.dim), self.strides,
            TOKEN_R=token_rows, NORM=NORMS[self.metric], **PREPASS,
        )  # fmt: skip
        return (offset,) if x_norm is None else (offset, x_norm)

    def launch(self, kernel: triton.JITFunction, operands: tuple[Tensor, ...]) -> None:
        """Run a plain kernel; ``operands`` are its pointers after those of the inputs."""
        tiles = triton.cdiv(self.rows, self.config.block_m) * self.tiles_n()
        kernel[(tiles,)](
            self.tokens, self.pool, *operands, self.rows, self.m, self.dim, self.strides[2],
            METRIC=self.metric, num_warps=self.config.num_warps, num_stages=self.config.num_stages,
            **self.constants,
        )  # fmt: skip

    def tiles_n(self) -> int:
        """Column tiles of the plain kernels."""
        return triton.cdiv(self.m, 2 * self.config.half_n)

    def launch_hopper(self, out: Tensor) -> None:
        """Run the kernel for sm_90, after what has to come before it."""
        from . import hopper

        dense = self.index is None and self.num_rows is None
        dense = dense and one_matrix(tuple(self.tokens.shape), self.strides[:2])
        nearest, squares = out.dtype == torch.int64, None
        sizes = (self.rows, self.m, self.dim, self.length, self.tokens.shape[1], *self.strides)
        tiles_m = triton.cdiv(self.rows, self.hopper.block_m)
        states = 2 + (1 if nearest else 2) * tiles_m
        state = out.new_empty((states,), dtype=torch.int32)
        if not nearest:
            shape = tiles_m, PARTS, self.hopper.block_m
            squares = out.new_empty(shape, dtype=torch.float32)
        if nearest or dense:
            rows = self.rows if nearest else 0
            _hopper_start_kernel[(triton.cdiv(max(rows, states), CLEAR),)](
                out if nearest else None, state, rows, states, BLOCK=CLEAR
            )
        else:
            hopper.sum_pool(self.pool, self.p_norm, state, sizes, self.metric)
        operands = self.tokens, self.index, self.num_rows, self.pool, self.p_norm, out
        operands += state, squares
        hopper.launch(operands, sizes, self.hopper, self.metric, dense)


def token_cost(
    tokens: Tensor, pool: Tensor, token_index: Tensor | None, num_rows: Tensor | None, metric: str
) -> Tensor:
    """Launch ``_token_cost_kernel``, or the kernel for sm_90."""
    shape = tuple(tokens.shape[:-1] if token_index is None else token_index.shape)
    out = tokens.new_empty((*shape, pool.shape[0]), dtype=torch.float32)
    if out.numel() == 0:
        return out
    with on_device(tokens):
        problem = _Problem(tokens, pool, token_index, num_rows, metric)
        if problem.hopper is not None:
            problem.launch_hopper(out)
        else:
            rows = problem.prepare(token_norms=True)
            problem.launch(_token_cost_kernel, (*rows, problem.p_norm, out))
    return out


def nearest_token(
    tokens: Tensor, pool: Tensor, token_index: Tensor | None, num_rows: Tensor | None, metric: str
) -> Tensor:
    """Launch ``_nearest_token_kernel`` and reduce its winners, or the kernel for sm_90."""
    shape = tuple(tokens.shape[:-1] if token_index is None else token_index.shape)
    out = tokens.new_empty(shape, dtype=torch.int64)
    if out.numel() == 0:
        return out
    with on_device(tokens):
        problem = _Problem(tokens, pool, token_index, num_rows, metric)
        if problem.hopper is not None:
            problem.launch_hopper(out)
            return out
        (offset,) = problem.prepare(token_norms=False)
        tiles = problem.tiles_n()
        score = tokens.new_empty((tiles, problem.rows), dtype=torch.float32)
        index = tokens.new_empty((tiles, problem.rows), dtype=torch.int32)
        problem.launch(_nearest_token_kernel, (offset, problem.p_norm, score, index))
        _nearest_reduce_kernel[(triton.cdiv(problem.rows, REDUCE_ROWS),)](
            score, index, out, problem.rows, tiles, BLOCK_R=REDUCE_ROWS
        )
    return out
