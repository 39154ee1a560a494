"""Pieces of both attention kernels: which tiles to visit, loading, masking and scoring a tile."""

import triton
import triton.language as tl


@triton.jit
def tile_range(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Tiles to visit: [first, past), of which [full, end_full) are seen wholly.

    ``low`` and ``high`` bound what any row of the tile sees, ``full_low`` and ``full_high`` what
    all of them see.
    """
    first = low // BLOCK * BLOCK
    past = tl.maximum(first, tl.cdiv(high, BLOCK) * BLOCK)
    full = tl.minimum(tl.maximum(first, tl.cdiv(full_low, BLOCK) * BLOCK), past)
    end_full = tl.maximum(full, tl.minimum(full_high // BLOCK * BLOCK, past))
    return first, full, end_full, past


@triton.jit
def load_tile(base, row, offs, cols, stride, keep):
    """(BLOCK, D) tile: rows ``row + offs`` of one head, zero where not ``keep``."""
    pointers = base + tl.cast(row, tl.int64) * stride + (offs[:, None] * stride + cols[None, :])
    return tl.load(pointers, mask=keep[:, None], other=0.0)


@triton.jit
def store_tile(base, row, offs, cols, stride, keep, value):
    """Inverse of :func:`load_tile`."""
    pointers = base + tl.cast(row, tl.int64) * stride + (offs[:, None] * stride + cols[None, :])
    tl.store(pointers, value.to(base.dtype.element_ty), mask=keep[:, None])


@triton.jit
def products(a1, a2, b1, b2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """(M, N) float32 ``a @ b^T``; heads are cut into D1 + D2 columns (80 = 64 + 16), not padded."""
    result = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if D2 > 0:
        result = tl.dot(a2, tl.trans(b2), result, input_precision=PRECISION)
    return result


@triton.jit
def tanh(x):
    """Hyperbolic tangent from exp2; a series near 0, where the quotient cancels."""
    t = tl.exp2(-2.8853900817779268 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    s = x * x
    near = 1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835))))
    return tl.where(s < 0.04, x * near, tl.where(x < 0, -far, far))


@triton.jit
def bounded(scores, inner, HAS_SOFTCAP: tl.constexpr):
    """Scores that only a factor separates from base-2 logits; a soft cap makes them a tanh."""
    if HAS_SOFTCAP:
        scores = tanh(scores * inner)
    return scores


@triton.jit
def hide(scores, position, low, high, until, row, HAS_UNTIL: tl.constexpr):
    """-inf where ``position`` is outside [low, high) or, for keys with an own bound, ``row`` is at
    or past it.

    All index arguments broadcast to the shape of ``scores``.
    """
    seen = (position >= low) & (position < high)
    if HAS_UNTIL:
        seen = seen & (row < until)
    return tl.where(seen, scores, float("-inf"))
