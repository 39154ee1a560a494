"""Masks, inputs and comparisons that every test of mixed attention shares."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from croc_kernels.attention.mask import MixedMask
from croc_kernels.attention.reference import mixed_attention as reference
from croc_kernels.testing import assert_within_budget


def _visual(batch: int, length: int, device: str) -> Tensor:
    """Runs of visual tokens of several lengths, one across most tile borders."""
    position = torch.arange(length, device=device)
    rows = [((position + 5 * b) % 41 > 11) & (position % 29 != 3) for b in range(batch)]
    return torch.stack(rows)


def _padding(batch: int, length: int, device: str, side: str) -> Tensor:
    """(B, L) attention mask: less padding from sample to sample, the first sample nothing but
    padding."""
    position = torch.arange(length, device=device)
    rows = []
    for b in range(batch):
        pad = length if b == 0 and batch > 1 else length * 2 // (5 + 3 * b)
        rows.append(position >= pad if side == "left" else position < length - pad)
    return torch.stack(rows).long()


def _documents(batch: int, length: int, device: str) -> Tensor:
    position = torch.arange(length, device=device)
    return torch.stack([(position + 7 * b) // 37 for b in range(batch)])


def _spans(batch: int, length: int, device: str) -> Tensor:
    """Adjacent spans, spans of one token, at both ends, and a padded list."""
    third = length // 3
    rows = [[0, 0, 0]]
    for b in range(batch):
        rows += [[b, third, 2 * third], [b, 2 * third, length - 1], [b, length - 1, length]]
        rows += [[b, 0, 1]] if third else []
    kept = [r for r in rows if r[1] <= r[2] <= length]
    unique = {(r[0], r[1], r[2]) for r in kept if r[2] > r[1]}
    return torch.tensor([[0, 0, 0], *sorted(unique)], device=device)


def _holes(batch: int, length: int, device: str, **options: object) -> MixedMask:
    """Packed documents with padding inside the row."""
    documents = _documents(batch, length, device)
    position = torch.arange(length, device=device)
    mask = torch.stack([(position + 7 * b) % 37 < 30 for b in range(batch)])
    return MixedMask.from_token_types(
        _visual(batch, length, device), mask, document_ids=documents, **options
    )


def _until(batch: int, length: int, device: str) -> MixedMask:
    """A prefix and answers that share it: keys of one answer end where it ends."""
    position = torch.arange(length, device=device)
    answer = length // 3 + (position - length // 3) // 20 * 20 + 20
    until = torch.where(position < length // 3, length, answer).expand(batch, length)
    return MixedMask.from_token_types(_visual(batch, length, device), visible_until=until)


MASKS: dict[str, Callable[[int, int, str], MixedMask]] = {
    "causal": lambda b, n, d: MixedMask.causal(b, n, device=d),
    "full": lambda b, n, d: MixedMask.full(b, n, device=d),
    "visual": lambda b, n, d: MixedMask.from_token_types(_visual(b, n, d)),
    "spans": lambda b, n, d: MixedMask.from_spans(_spans(b, n, d), b, n),
    "one-span": lambda b, n, d: MixedMask.from_spans(torch.tensor([[0, 0, n]], device=d), b, n),
    "prefix": lambda b, n, d: MixedMask.prefix(torch.arange(b, device=d) * n // b, n),
    "left": lambda b, n, d: MixedMask.from_token_types(
        _visual(b, n, d), _padding(b, n, d, "left")
    ),
    "right": lambda b, n, d: MixedMask.from_token_types(
        _visual(b, n, d), _padding(b, n, d, "right")
    ),
    "packed": lambda b, n, d: MixedMask.from_token_types(
        _visual(b, n, d), document_ids=_documents(b, n, d)
    ),
    "holes": _holes,
    "window": lambda b, n, d: MixedMask.from_token_types(_visual(b, n, d), sliding_window=9),
    "window-old": lambda b, n, d: MixedMask.from_token_types(
        _visual(b, n, d), sliding_window=9, spans_exceed_window=True
    ),
    "until": _until,
    "cache": lambda b, n, d: MixedMask.from_token_types(
        _visual(b, n, d), _padding(b, n, d, "left"), num_queries=max(n // 4, 1)
    ),
    "cache-holes": lambda b, n, d: _holes(b, n, d, num_queries=max(n // 2, 1)),
}  # fmt: skip


# The vectors of a mask that kernels read.
VECTORS = ("start", "end", "row_start", "row_end", "visible_until")


def as_views(mask: MixedMask, names: tuple[str, ...] = VECTORS) -> MixedMask:
    """The same mask, its vectors ``names`` rows of one tensor, as transformers' layers get them."""
    vectors = {n: getattr(mask, n) for n in names if getattr(mask, n) is not None}
    width = max(x.shape[1] for x in vectors.values()) + 5
    packed = mask.start.new_zeros((mask.batch, len(vectors), width))
    for i, x in enumerate(vectors.values()):
        packed[:, i, : x.shape[1]] = x
    views = {n: packed[:, i, : x.shape[1]] for i, (n, x) in enumerate(vectors.items())}
    return replace(mask, **views)


def expanded(mask: MixedMask) -> MixedMask:
    """Its second sample for a batch of one sample less: vectors with a stride of 0."""
    vectors = {n: getattr(mask, n) for n in VECTORS if getattr(mask, n) is not None}
    return replace(
        mask,
        token_faults=None,
        **{n: x[1:2].expand(mask.batch - 1, -1) for n, x in vectors.items()},
    )


def every_second(mask: MixedMask) -> MixedMask:
    """The same mask, its vectors strided: what kernels are not made for."""
    vectors = {n: getattr(mask, n) for n in VECTORS if getattr(mask, n) is not None}
    return replace(mask, **{n: x.repeat_interleave(2, 1)[:, ::2] for n, x in vectors.items()})


def inputs(
    mask: MixedMask, heads: int, key_heads: int, dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v that require grad."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, mask.num_queries), (key_heads, mask.num_keys), (key_heads, mask.num_keys)]
    tensors = (torch.randn(mask.batch, *s, dim, generator=generator) for s in shapes)
    return tuple(t.to(mask.device, dtype).requires_grad_() for t in tensors)


def plain(
    q: Tensor, k: Tensor, v: Tensor, mask: MixedMask, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention in the dtype of its inputs; rows that see nothing give zeros and
    -inf."""
    dense = mask.to_dense()
    sees = dense.any(-1, keepdim=True)
    seen = dense.any(-2)[..., None]
    q, k, v = torch.where(sees, q, 0), torch.where(seen, k, 0), torch.where(seen, v, 0)
    dense = dense | ~sees
    group = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(group, 1)
    scores = scale * (q @ keys.transpose(-1, -2))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~dense, float("-inf"))
    if softcap:
        out = scores.softmax(-1).to(q.dtype) @ v.repeat_interleave(group, 1)
    else:
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=dense, scale=scale, enable_gqa=group > 1
        )
    lse = torch.where(sees[..., 0], scores.logsumexp(-1), float("-inf"))
    return torch.where(sees, out, 0), lse


def gradients(
    function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, with_lse: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Output, log-sum-exp (0 where it is -inf) and gradients of a fixed random sum of both,
    computed in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves)
    lse = torch.where(lse == float("-inf"), 0, lse)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator).to(q.dtype).to(out)
    lse_weight = torch.randn(lse.shape, generator=generator).to(lse)
    loss = (out * weight).sum()
    if with_lse:
        loss = loss + (lse * lse_weight).sum()
    return (out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves))


def check(
    function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    q: Tensor, k: Tensor, v: Tensor, mask: MixedMask, scale: float, softcap: float = 0.0,
    plain_device: str | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Assert that output, log-sum-exp and gradients are within the error budget; return them."""
    dtype = q.dtype
    got = gradients(function, q, k, v, dtype)
    exact = gradients(
        lambda *x: reference(*x, mask.to_dense(), scale, softcap), q, k, v, torch.float64
    )
    own = gradients(lambda *x: plain(*x, mask, scale, softcap), q, k, v, dtype)
    names = ("out", "lse", "grad_q", "grad_k", "grad_v")
    for name, value, truth, yardstick in zip(names, got, exact, own, strict=True):
        floor = torch.float32 if name == "lse" else dtype
        assert_within_budget(value, truth, yardstick, floor, name)
    return got
