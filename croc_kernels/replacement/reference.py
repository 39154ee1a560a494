r"""The definitions of replacement and reconstruction loss, in differentiable PyTorch.

.. math:: y_t = p_{k_t} \text{ if } w_t \text{ else } x_t, \qquad
          L = \frac{1}{|S|\,C} \sum_{t \in S} \sum_c h_\beta(a_{tc} - b_{tc}), \qquad
          h_\beta(d) = \begin{cases} d^2 / 2\beta & |d| < \beta \\ |d| - \beta / 2 \end{cases}

They compute in float32, or in float64 as soon as one operand is float64. Pool rows are converted
before they are drawn, so that their gradients add up in that precision too.
"""

import torch
from torch import Tensor


def replace_tokens(embeddings: Tensor, where: Tensor, pool: Tensor, index: Tensor) -> Tensor:
    """Pool rows where ``where``, else the embeddings; NaN for an index out of range (CUDA)."""
    index = index.long()
    valid = (index >= 0) & (index < pool.shape[0])
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = index[where & ~valid]
        if bad.numel() > 0:
            raise ValueError(
                f"replace_tokens: index must be in [0, {pool.shape[0]}) where selected, "
                f"got {bad[0].item()}"
            )
    if pool.shape[0] == 0:
        return torch.where(where[..., None], torch.nan, embeddings)
    rows = torch.where(where & valid, index, 0)
    double = torch.float64 in (embeddings.dtype, pool.dtype)
    drawn = pool.to(torch.float64 if double else torch.float32)[rows]
    drawn = torch.where(valid[..., None], drawn, torch.nan).to(embeddings.dtype)
    return torch.where(where[..., None], drawn, embeddings)


def reconstruction_loss(
    prediction: Tensor,
    target: Tensor,
    where: Tensor | None,
    beta: float,
    reduction: str,
    num_items: Tensor | float | None,
) -> Tensor:
    """SmoothL1 over the selected tokens, differentiable in ``prediction``."""
    double = torch.float64 in (prediction.dtype, target.dtype)
    dtype = torch.float64 if double else torch.float32
    difference = prediction.to(dtype) - target.detach().to(dtype)
    if where is not None:
        difference = torch.where(where[..., None], difference, 0.0)
    size = difference.abs()
    if beta > 0:
        size = torch.where(size < beta, difference.square() / (2 * beta), size - beta / 2)
    total = size.sum()
    if reduction == "sum":
        return total
    if num_items is None:
        tokens = prediction.shape[:-1].numel()
        num_items = tokens if where is None else where.sum()
    if isinstance(num_items, Tensor):
        items = torch.where(num_items > 0, num_items, 1).to(dtype)
    else:
        items = num_items if num_items > 0 else 1
    return total / (items * max(prediction.shape[-1], 1))
