"""The attention ops for CPU tensors: matrix products over blocks of rows, so memory grows with L,
not L².

Values of the mask are read freely here: on a CPU that waits for nothing.
"""

import torch
from torch import Tensor

from .config import LOG2_E


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows_per_block(length: int, group: int) -> int:
    """Large enough for the matrix products, small enough that sums over rows stay accurate.

    Scores of (H, rows, L) should stay in cache; and gradients of keys are sums over
    ``group * rows`` float32 terms per block, whose error grows with their number.
    """
    total = 32 if length < 192 else 64 if length < 768 else 128
    return max(8, total // group)


def _blocks(start: Tensor, end: Tensor, group: int) -> list[tuple[int, int, int, int]]:
    """(first row, past row, first key, past key) of every block in which some row sees some key."""
    blocks = []
    rows = _rows_per_block(start.shape[1], group)
    for row in range(0, start.shape[1], rows):
        past = min(row + rows, start.shape[1])
        low, high = start[:, row:past], end[:, row:past]
        sees = low < high
        if bool(sees.any()):
            blocks.append((row, past, int(low[sees].min()), int(high[sees].max())))
    return blocks


def _visible(
    block: tuple[int, int, int, int], start: Tensor, end: Tensor, until: Tensor | None
) -> Tensor:
    """(B, rows, keys) bool of one block."""
    row, past, low, high = block
    key = torch.arange(low, high, dtype=torch.int32)
    visible = (start[:, row:past, None] <= key) & (key < end[:, row:past, None])
    if until is not None:
        rows = torch.arange(row, past, dtype=torch.int32)
        visible &= rows[:, None] < until[:, None, low:high]
    return visible


def _grouped(x: Tensor, row: int, past: int, heads: int) -> Tensor:
    """Rows of (B, H, L, D) as (B, Hkv, G * rows, D): one product for heads that share keys."""
    block = x[:, :, row:past].to(_precision(x))
    return block.reshape(x.shape[0], heads, -1, x.shape[3])


def _keys(x: Tensor, visible: Tensor, low: int, high: int) -> Tensor:
    """Keys or values of one block, zero where none of its rows sees them, whatever they hold."""
    block = x[:, :, low:high].to(_precision(x))
    seen = visible.any(1)
    return block if bool(seen.all()) else block.masked_fill(~seen[:, None, :, None], 0)


def _scores(
    queries: Tensor, keys: Tensor, visible: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """(B, Hkv, G, rows, keys) scores, -inf where masked, and the soft cap's derivative."""
    batch, heads = queries.shape[:2]
    scores = (queries @ keys.transpose(-1, -2)).mul_(scale)
    derivative = None
    if softcap:
        bounded = torch.tanh(scores / softcap)
        derivative = 1 - bounded * bounded
        scores = bounded.mul_(softcap)
    scores = scores.view(batch, heads, -1, *visible.shape[1:])
    return scores.masked_fill_(~visible[:, None, None], float("-inf")), derivative


def _heads_last(like: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(B, H, L, D) zeros laid out as (B, L, H, D)."""
    batch, heads, _, dim = like.shape
    return torch.zeros(batch, length, heads, dim, dtype=dtype).transpose(1, 2)


@torch.autocast("cpu", enabled=False)
def mixed_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, visible_until: Tensor | None,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Op ``mixed_attention_fwd``: (B, H, Lq, D) output, (B, H, Lq) base-2 log-sum-exp."""
    out = _heads_last(q, q.shape[2], q.dtype)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=_precision(q))
    heads = k.shape[1]
    for block in _blocks(start, end, q.shape[1] // heads):
        row, past, low, high = block
        visible = _visible(block, start, end, visible_until)
        queries, keys = _grouped(q, row, past, heads), _keys(k, visible, low, high)
        scores, _ = _scores(queries, keys, visible, scale, softcap)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(torch.where(top == float("-inf"), 0, top)).exp_()
        total = weights.sum(-1, keepdim=True)
        product = weights.view(*queries.shape[:3], -1) @ _keys(v, visible, low, high)
        sees = visible.any(-1)[:, None, None, :, None]
        result = product.view(*weights.shape[:4], -1) / total
        out[:, :, row:past] = torch.where(sees, result, 0).flatten(1, 2)
        block_lse = torch.where(sees, (top + total.log()) * LOG2_E, float("-inf"))
        lse[:, :, row:past] = block_lse.flatten(1, 2)[..., 0]
    return out, lse


@torch.autocast("cpu", enabled=False)
def mixed_attention_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, start: Tensor, end: Tensor,
    row_start: Tensor, row_end: Tensor, visible_until: Tensor | None,
    scale: float, softcap: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Op ``mixed_attention_bwd``: gradients of q, k and v. Always deterministic."""
    precision = _precision(q)
    grad_q = _heads_last(q, q.shape[2], q.dtype)
    grad_k, grad_v = (_heads_last(x, x.shape[2], precision) for x in (k, v))
    heads = k.shape[1]
    for block in _blocks(start, end, q.shape[1] // heads):
        row, past, low, high = block
        visible = _visible(block, start, end, visible_until)
        sees = visible.any(-1)[:, None, :, None]
        queries = _grouped(torch.where(sees, q[:, :, row:past], 0), 0, past - row, heads)
        grads = torch.where(sees, grad_out[:, :, row:past], 0).to(precision)
        grads = _grouped(grads, 0, past - row, heads)
        keys, values = _keys(k, visible, low, high), _keys(v, visible, low, high)

        scores, derivative = _scores(queries, keys, visible, scale, softcap)
        # Weight 0 times a NaN of a key that only other rows see would be NaN: such products are
        # taken out, not trusted to vanish.
        hidden = ~visible[:, None].repeat(1, 1, q.shape[1] // heads, 1)
        # All keys of the row are here, so the softmax and sum(weights * grad_s), which equals
        # out * grad_out, need neither lse nor out, and cancel better than with their rounding.
        weights = torch.where(sees[:, None], scores.softmax(-1), 0).view(*queries.shape[:3], -1)
        grad_v[:, :, low:high] += weights.transpose(-1, -2) @ grads
        grad_s = grads @ values.transpose(-1, -2)
        delta = (weights * grad_s).masked_fill_(hidden, 0).sum(-1, keepdim=True)
        grad_s = grad_s.sub_(delta)
        if grad_lse is not None:
            grad_rows = torch.where(sees[..., 0], grad_lse[:, :, row:past], 0)
            grad_s = grad_s.add_(grad_rows.to(precision).reshape(delta.shape), alpha=LOG2_E)
        grad_s = grad_s.mul_(weights)
        if derivative is not None:
            grad_s = grad_s.mul_(derivative)
        grad_s = grad_s.masked_fill_(hidden, 0)
        grad_q[:, :, row:past] = (
            (grad_s @ keys).mul_(scale).view(q.shape[0], -1, past - row, q.shape[3])
        )
        grad_k[:, :, low:high] += (grad_s.transpose(-1, -2) @ queries).mul_(scale)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
