r"""Mixed attention by its definition: dense, plain, differentiable PyTorch. Every other path is
measured against it.

With :math:`s_{ij} = \mathrm{scale}\; q_i \cdot k_j`, or :math:`c \tanh(s_{ij} / c)` under a soft
cap :math:`c`, and :math:`V_i` the keys that row :math:`i` sees,

.. math::
    \mathrm{lse}_i = \log \sum_{j \in V_i} e^{s_{ij}}, \qquad
    o_i = \sum_{j \in V_i} e^{s_{ij} - \mathrm{lse}_i} v_j .

A row that sees nothing has :math:`o_i = 0` and :math:`\mathrm{lse}_i = -\infty` and passes no
gradient. Keys that no row sees and rows that see nothing take no part at all: whatever they hold,
NaN included, reaches no result and no gradient.

The backward pass that the kernels implement, with :math:`p_{ij} = e^{s_{ij} - \mathrm{lse}_i}`,
:math:`\bar x` the gradient of :math:`x` and :math:`\delta_i = o_i \cdot \bar o_i -
\overline{\mathrm{lse}}_i`:

.. math::
    \bar v_j = \sum_i p_{ij} \bar o_i, \quad
    \bar s_{ij} = p_{ij} (\bar o_i \cdot v_j - \delta_i), \quad
    \bar q_i = \mathrm{scale} \sum_j \bar s_{ij} k_j, \quad
    \bar k_j = \mathrm{scale} \sum_i \bar s_{ij} q_i ,

where a soft cap multiplies :math:`\bar s_{ij}` by :math:`1 - (s_{ij} / c)^2`.
"""

import torch
from torch import Tensor


def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, dense: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, from a dense mask.

    Args:
        q: (B, H, Lq, D), any floating dtype; float64 for the exact result.
        k: (B, Hkv, Lk, D) with H a multiple of Hkv.
        v: (B, Hkv, Lk, Dv).
        dense: (B, 1, Lq, Lk) bool, True where a query sees a key.
        scale: factor of the scores.
        softcap: bound of the scores, 0 for none.

    Returns:
        (B, H, Lq, Dv) in q's dtype, and (B, H, Lq) natural log-sum-exp in float32 (float64 for
        float64).
    """
    row_sees = dense.any(-1)[..., None]  # (B, 1, Lq, 1)
    key_seen = dense.any(-2)[..., None]  # (B, 1, Lk, 1)
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    queries = torch.where(row_sees, q, 0).to(precision)
    keys = torch.where(key_seen, k, 0).to(precision).repeat_interleave(group, dim=1)
    values = torch.where(key_seen, v, 0).to(precision).repeat_interleave(group, dim=1)

    scores = scale * (queries @ keys.transpose(-1, -2))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    # Rows that see nothing are computed as if they saw everything, then dropped: no NaN to take
    # back.
    scores = scores.masked_fill(~dense & row_sees, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.exp(scores - lse[..., None]) @ values
    out = torch.where(row_sees, out, 0).to(q.dtype)
    return out, torch.where(row_sees[..., 0], lse, float("-inf"))
