"""``mixed_attention``: the public function, its checks and its gradient."""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backend as backends
from .. import checks, ops
from . import reference
from .config import HEAD_DIMS, LN_2
from .mask import MixedMask

_NAME = "mixed_attention"


class _MixedAttention(torch.autograd.Function):
    """The forward and backward ops, joined."""

    @staticmethod
    def forward(
        ctx, q, k, v, start, end, row_start, row_end, visible_until, scale, softcap, deterministic
    ):
        out, lse = ops.mixed_attention_fwd(q, k, v, start, end, visible_until, scale, softcap)
        ctx.save_for_backward(q, k, v, out, lse, start, end, row_start, row_end, visible_until)
        ctx.options = (scale, softcap, deterministic)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, *bounds = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 11
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = ops.mixed_attention_bwd(
            grad_out, grad_lse, q, k, v, out, lse, *bounds, *ctx.options
        )
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        return (*(g if need else None for g, need in wanted), *(None,) * 8)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: MixedMask) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(_NAME, name, tensor)
    checks.check_dtype(_NAME, "q", q, checks.FLOATS)
    checks.check_rank(_NAME, "q", q, "(B, H, Lq, D)", (4,))
    checks.check_rank(_NAME, "k", k, "(B, Hkv, Lk, D)", (4,))
    checks.check_same(_NAME, "k", k, "q", q)
    checks.check_same(_NAME, "v", v, "q", q)
    (batch, heads, length, dim), (_, key_heads, num_keys, _) = q.shape, k.shape
    layout = (batch, key_heads, num_keys, dim)
    checks.check_shape(_NAME, "k", k, layout, "(B, Hkv, Lk, D)")
    checks.check_shape(_NAME, "v", v, layout, "(B, Hkv, Lk, D)")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"{_NAME}: H must be a multiple of Hkv, got H = {heads} and Hkv = {key_heads}"
        )
    if dim == 0:
        raise ValueError(f"{_NAME}: D must be at least 1, got 0")
    if not isinstance(mask, MixedMask):
        raise TypeError(f"{_NAME}: mask must be a MixedMask, got {type(mask).__name__}")
    for name, got, want in (
        ("B", mask.batch, batch), ("Lq", mask.num_queries, length), ("Lk", mask.num_keys, num_keys),
    ):  # fmt: skip
        if got != want:
            raise ValueError(f"{_NAME}: mask must be made for {name} = {want}, got {got}")
    checks.check_device(_NAME, "mask", mask.start, "q", q)


def _unsupported(q: Tensor) -> str | None:
    """Why the Triton kernels can't take these inputs, or None."""
    if q.dtype == torch.float64:
        return "dtype must be float16, bfloat16 or float32 for the Triton kernels, got float64"
    if q.shape[3] not in HEAD_DIMS:
        return f"D must be one of {HEAD_DIMS}, got {q.shape[3]}; pad the head"
    return None


def _wants_autograd(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a gradient is wanted, or tangents, which autograd refuses. Where not, autograd would
    keep the host longer than all else of a forward.
    """
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return wanted or forward_ad._current_level >= 0


def mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MixedMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention in which images are bidirectional and text is causal, as ``mask`` says.

    .. math:: o_i = \sum_{j \in V_i} \mathrm{softmax}_j(\mathrm{scale}\; q_i \cdot k_j)\, v_j

    over the keys :math:`V_i` that row :math:`i` sees; with a soft cap :math:`c` the scores become
    :math:`c \tanh(s / c)`. Memory grows with L. Differentiable once in q, k and v, also through the
    log-sum-exp.

    A row that sees nothing gives zeros, a log-sum-exp of -inf and zero gradients. What padding and
    keys that no row sees hold, NaN and inf included, never reaches a result. Products are
    accumulated in float32 (float64 for float64 on CPU); float32 products on CUDA use tf32 if
    ``torch.backends.cuda.matmul`` allows it. Under autocast q, k and v are cast to its
    dtype, as for ``scaled_dot_product_attention``. A document packed with others gives the result
    it gives alone, up to the order of float32 sums; the forward is bitwise repeatable.

    Args:
        q: (B, H, Lq, D), float16, bfloat16, float32 (float64 on CPU and in the reference). Any
            strides; a copy is made only if the last dimension is strided, and of v on sm_90 where D
            is 80, 96 or 160 and address or strides are no multiples of 16 (a fault of ptxas).
        k: (B, Hkv, Lk, D), dtype and device of q; H a multiple of Hkv, head h of q uses head h //
            (H / Hkv).
        v: (B, Hkv, Lk, D), likewise.
        mask: made once per step and shared by all layers.
        scale: positive factor of the scores, by default ``1 / sqrt(D)``.
        softcap: positive bound of the scores, or None.
        return_lse: return the natural log-sum-exp of each row too.
        deterministic: True: the backward is bitwise repeatable. False: on sm_90 dQ may be added up
            atomically in any order (docs/attention.md). None follows
            ``torch.are_deterministic_algorithms_enabled()``. CPU and reference always repeat
            bitwise.
        backend: ``"auto"``, ``"triton"`` or ``"reference"`` (dense, L² memory). The Triton kernels
            take D of 16, 32, 64, 80, 96, 128, 160, 192 and 256; CPU and reference any D.

    Returns:
        (B, H, Lq, D) in the dtype of q, laid out in memory as (B, Lq, H, D); with ``return_lse``
        also (B, H, Lq) float32 (float64 for float64 inputs).

    Raises:
        TypeError: dtypes differ or are not supported; ``mask`` is not a :class:`MixedMask`.
        ValueError: shapes or devices disagree, the mask was made for other lengths, the kernels
            don't have this D, ``scale`` or ``softcap`` is not positive, ``backend`` is unknown.
        RuntimeError: ``backend="triton"`` where Triton can't run; called within a transform of
            ``torch.func``, which the reference alone allows.

    Source: Croc, arXiv 2410.14332 (mixed attention); tiling after FlashAttention, arXiv 2205.14135.
    """
    _check(q, k, v, mask)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"{_NAME}: scale must be positive and finite, got {scale}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{_NAME}: softcap must be positive and finite, got {softcap}")
    softcap = 0.0 if softcap is None else float(softcap)
    device = q.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    chosen = backends.resolve(_NAME, backend, q, _unsupported(q))
    if chosen == "reference":
        with torch.autocast(device, enabled=False):
            out, lse = reference.mixed_attention(q, k, v, mask.to_dense(), scale, softcap)
    else:
        # Within them requires_grad tells of the innermost alone, and Dynamo takes autograd's
        # function apart instead of refusing: gradients would be zeros.
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{_NAME}: functorch transforms (vmap, grad, jvp, ...) must not be active, got one;"
                ' use backend="reference"'
            )
        backends.log_choice(_NAME, chosen, f"{device} tensors")
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        q, k, v = [x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v)]
        if _wants_autograd(q, k, v):
            out, lse = _MixedAttention.apply(
                q, k, v, mask.start, mask.end, mask.row_start, mask.row_end, mask.visible_until,
                scale, softcap, deterministic,
            )  # fmt: skip
        else:
            out, lse = ops.mixed_attention_fwd(
                q, k, v, mask.start, mask.end, mask.visible_until, scale, softcap
            )
        # The ops keep it to base 2, as the kernels exponentiate: a change of base in between would
        # round away what large logits need.
        lse = lse * LN_2 if return_lse else lse
    return (out, lse) if return_lse else out
