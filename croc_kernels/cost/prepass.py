"""What runs before a product: norms, where rows lie, and results that nothing has claimed."""

import triton
import triton.language as tl


@triton.jit
def _norm_term(square, NORM: tl.constexpr):
    """Norm term: NORM is "square" for |x|², "inverse" for 1 / |x|, 0 for 0."""
    if NORM == "inverse":
        square = tl.where(square == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(square == 0.0, 1.0, square)))
    return square


@triton.jit
def _row_norm(
    x_ptr, offset, live, dim, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr
):
    """Norm term of BLOCK_R rows."""
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for k in range(0, dim, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask = live[:, None] & (offs_k < dim)[None, :]
        x = tl.load(x_ptr + offset[:, None] + offs_k[None, :], mask=mask, other=0.0)
        acc += x.to(tl.float32) * x.to(tl.float32)
    return _norm_term(tl.sum(acc, axis=1), NORM)


@triton.jit
def _row_prepass_kernel(
    tokens_ptr, pool_ptr, index_ptr, num_rows_ptr, offset_ptr, x_norm_ptr, p_norm_ptr,
    sizes, strides,
    TOKEN_R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Source offsets (-1: none) and norms of TOKEN_R token rows, or norms of BLOCK_R pool rows.

    sizes: rows, rows per image, sources, m, components. Without ``x_norm_ptr`` tokens get offsets
    only. grid = (cdiv(rows, TOKEN_R) + cdiv(m, BLOCK_R),).
    """
    rows, length, num_sources, m, dim = sizes
    stride_b, stride_n, stride_pm = strides
    program, token_programs = tl.program_id(0), tl.cdiv(rows, TOKEN_R)
    if program < token_programs:
        row = program * TOKEN_R + tl.arange(0, TOKEN_R)
        inside = row < rows
        batch, place = row // length, row % length
        live = inside
        if num_rows_ptr is not None:
            live = live & (place < tl.load(num_rows_ptr + batch, mask=inside, other=0))
        if index_ptr is not None:
            source = tl.load(index_ptr + row, mask=live, other=0).to(tl.int64)
            valid = (source >= 0) & (source < num_sources)
            offset = tl.where(valid, source, 0) * stride_n
        else:
            valid = inside
            offset = batch.to(tl.int64) * stride_b + place.to(tl.int64) * stride_n
        # Without norms there is nothing to poison: an index out of range is then a row without a
        # result.
        kept = live if x_norm_ptr is not None else live & valid
        tl.store(offset_ptr + row, tl.where(kept, offset, -1), mask=inside)
        if x_norm_ptr is not None:
            norm = _row_norm(tokens_ptr, offset, live, dim, TOKEN_R, BLOCK_K, NORM)
            tl.store(x_norm_ptr + row, tl.where(valid, norm, float("nan")), mask=inside)
    else:
        pool_row = (program - token_programs) * BLOCK_R + tl.arange(0, BLOCK_R)
        start = pool_row.to(tl.int64) * stride_pm
        p_norm = _row_norm(pool_ptr, start, pool_row < m, dim, BLOCK_R, BLOCK_K, NORM)
        tl.store(p_norm_ptr + pool_row, p_norm, mask=pool_row < m)


@triton.jit
def _hopper_start_kernel(key_ptr, state_ptr, rows, states, BLOCK: tl.constexpr):
    """A state of 0 and, with ``key_ptr``, keys that nothing has lowered.

    grid = (cdiv(max(rows, states), BLOCK),).
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if key_ptr is not None:
        tl.store(key_ptr + place, tl.full((BLOCK,), 2**63 - 1, tl.int64), mask=place < rows)
    tl.store(state_ptr + place, tl.zeros((BLOCK,), tl.int32), mask=place < states)


PREPASS = {"BLOCK_R": 4, "BLOCK_K": 512}
OFFSET_ROWS = 128
CLEAR = 1024
NORMS = {"l2": "square", "l2sq": "square", "cosine": "inverse"}
