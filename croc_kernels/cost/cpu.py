"""The matching costs on CPU tensors: matrix products in float64, a chunk of rows at a time.

In float64 the expansion |x|² + |p|² - 2 x·p is good to 1e-8 of the norm even where all of it
cancels, at half the speed of float32 products and a tenth of the cost of the differences that
define it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK_ROWS = 256
# Of the size of the terms: above the rounding of any order of summation, far below float32.
_TIE = 2.0**-44


def _row_chunks(
    function: str, tokens: Tensor, token_index: Tensor | None, num_rows: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Places in the flat result and float64 token rows, for the rows that are to be computed."""
    shape = tokens.shape[:-1] if token_index is None else token_index.shape
    places = torch.arange(shape.numel())
    if num_rows is not None:
        places = places[places % shape[-1] < num_rows.repeat_interleave(shape[-1])]
    if token_index is not None:
        index = token_index.reshape(-1)[places]
        bad = index[(index < 0) | (index >= tokens.shape[0])]
        if bad.numel() > 0:
            raise ValueError(
                f"{function}: token_index must be in [0, {tokens.shape[0]}), got {bad[0].item()}"
            )
    for chunk in places.split(_CHUNK_ROWS):
        if token_index is not None:
            rows = tokens[token_index.reshape(-1)[chunk]]
        elif tokens.dim() == 2:
            rows = tokens[chunk]
        else:
            rows = tokens[chunk // shape[-1], chunk % shape[-1]]
        yield chunk, rows.double()


def _inverse_norm(square: Tensor) -> Tensor:
    return torch.where(square == 0, 0.0, square.rsqrt())


def token_cost(
    tokens: Tensor, pool: Tensor, token_index: Tensor | None, num_rows: Tensor | None, metric: str
) -> Tensor:
    """``croc_kernels::token_cost`` for CPU tensors."""
    shape = tuple(tokens.shape[:-1] if token_index is None else token_index.shape)
    out = torch.zeros((*shape, pool.shape[0]), dtype=torch.float32)
    flat = out.view(-1, pool.shape[0]) if out.numel() else out
    pool = pool.double()
    p_square = pool.square().sum(-1)
    for places, x in _row_chunks("token_cost", tokens, token_index, num_rows):
        product, x_square = x @ pool.T, x.square().sum(-1, keepdim=True)
        if metric == "cosine":
            cost = 1.0 - product * _inverse_norm(x_square) * _inverse_norm(p_square)
        else:
            cost = x_square + p_square - 2.0 * product
        cost = cost.clamp(min=0.0)  # keeps NaN
        if out.numel():
            flat[places] = (cost.sqrt() if metric == "l2" else cost).float()
    return out


def nearest_token(
    tokens: Tensor, pool: Tensor, token_index: Tensor | None, num_rows: Tensor | None, metric: str
) -> Tensor:
    """``croc_kernels::nearest_token`` for CPU tensors."""
    shape = tuple(tokens.shape[:-1] if token_index is None else token_index.shape)
    out = torch.full(shape, -1, dtype=torch.int64)
    m = pool.shape[0]
    pool, column = pool.double(), torch.arange(m)
    p_square = pool.square().sum(-1)
    for places, x in _row_chunks("nearest_token", tokens, token_index, num_rows):
        product, x_norm = x @ pool.T, x.norm(dim=-1, keepdim=True)
        if metric == "cosine":
            score, scale = -product * _inverse_norm(p_square), x_norm
        else:
            score, scale = p_square - 2.0 * product, p_square + x_norm * p_square.sqrt()
        score = score.nan_to_num(nan=torch.inf)
        # BLAS may sum equal pool rows in different orders, and they have to tie.
        tie = score.min(dim=-1, keepdim=True).values + _TIE * scale
        winner = torch.where((score <= tie) & (score < torch.inf), column, m).min(dim=-1).values
        out.view(-1)[places] = torch.where(winner < m, winner, -1)
    return out
