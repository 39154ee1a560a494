"""The forward's softmax for sm_90, on registers as wgmma leaves them.

Masks and rescaling cost instructions only where they change something: long rows run at the chip's
power limit, where time is energy.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# A row's weights are relative to a score of its own that no later one exceeds by more than this, to
# base 2: they stay below 2 ** 8, which float16 holds as well as 1, and sums below 2 ** 8 times L.
SLACK = gl.constexpr(8.0)


@gluon.jit
def cut(scores, n, row_low, row_high, full_low, full_high):
    """-inf for keys outside a row's interval; a bound that every row of the tile keeps is not
    looked at, the others are compared with constants: within a thread only ``fixed`` differs.
    """
    width: gl.constexpr = scores.shape[1]
    cols = gl.arange(0, width, gl.SliceLayout(0, scores.type.layout))
    lane, fixed = (cols & 6)[None, :] + n, (cols & (width - 7))[None, :]
    if n + width > full_high:
        scores = gl.where(fixed < row_high[:, None] - lane, scores, float("-inf"))
    if n < full_low:
        scores = gl.where(fixed >= row_low[:, None] - lane, scores, float("-inf"))
    return scores


@gluon.jit
def lane_sums(weights):
    """(ROWS, 8) sums over the columns that one thread holds: no shuffles until the last tile."""
    rows: gl.constexpr = weights.shape[0]
    return gl.sum(weights.reshape([rows, weights.shape[1] // 8, 8]), 1)


@gluon.jit
def weigh(scores, top, outer):
    """Weights of a tile of scores, what earlier weights are worth beside them, and the new ``top``,
    to which weights are relative: a row's largest score when one last exceeded it by more than
    SLACK. Until then earlier weights are worth exactly 1.
    """
    new_top = gl.maximum(top, gl.max(scores, 1) * outer)
    new_top = gl.where(new_top - top <= SLACK, top, new_top)
    # A row that has seen nothing yet has no maximum: shift by 0, not by -inf.
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    return gl.exp2(scores * outer - shift[:, None]), gl.exp2(top - shift), new_top


@gluon.constexpr_function
def _scaling(count):
    """PTX that multiplies ``count`` values of a thread by their factors, and its operands.

    wgmma leaves two rows in a thread, values 0 and 1, 4 and 5, ... of one and 2 and 3, ... of the
    other; the branch is taken by whole warps.
    """
    factors = 2 * count
    products = "\n".join(f"mul.f32 ${i}, ${i}, ${factors + i};" for i in range(count))
    code = f"""
{{
    .reg .pred one, other;
    setp.neu.f32 one, ${factors}, 0f3F800000;
    setp.neu.f32 other, ${factors + 2}, 0f3F800000;
    or.pred one, one, other;
    vote.sync.any.pred one, one, 0xffffffff;
    @!one bra.uni done;
    {products}
    done:
}}
"""
    tied = [str(i) for i in range(count)]
    return code, ",".join(["=f"] * count + tied + ["f"] * count)


@gluon.jit
def rescale(acc, decay):
    """Multiply rows by their decay; a warp whose rows all have 1 leaves the products out."""
    count: gl.constexpr = acc.shape[0] * acc.shape[1] // (32 * gl.num_warps())
    code: gl.constexpr = _scaling(count)
    factors = decay[:, None].broadcast_to(acc.shape)
    return gl.inline_asm_elementwise(
        code[0], code[1], [acc, factors], dtype=gl.float32, is_pure=True, pack=count
    )
