"""The forward's softmax for sm_90, on registers as wgmma leaves them.

Instructions are spent only where they change something: long rows run at the chip's power limit,
where time is energy. Weights are relative to a score of their row that need not be its largest:
what counts is that nothing overflows, since output and log-sum-exp are the same for any.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper import barrier

# How far a row's scores may exceed, to base 2, what its weights are relative to (``weigh``).
SLACK = gl.constexpr(8.0)
# In the place of -inf, which no score may be relative to.
LOWEST = gl.constexpr(-3.0e38)

# A word of shared memory of a warp group's own; a whole KB, as what follows must be aligned to it.
_MAKE = gl.constexpr("""
{
    .shared .align 1024 .b32 raised[256];
    mov.b32 $0, raised;
    st.volatile.shared.b32 [$0], $1;
}
""")
_READ = gl.constexpr("ld.volatile.shared.b32 $0, [$1];")
_LOWER = gl.constexpr("""
{
    st.volatile.shared.b32 [$1], 0;
    mov.b32 $0, 0;
}
""")


@gluon.jit
def cut(scores, n, seen):
    """-inf for keys outside a row's interval; a bound that every row of the tile keeps is not
    looked at, the others are compared with constants: within a thread only ``fixed`` differs.
    """
    row_low, row_high, full_low, full_high = seen
    width: gl.constexpr = scores.shape[1]
    # Around both: without, D = 64 spills (triton 3.6.0).
    if (n < full_low) | (n + width > full_high):
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
def decayed(total, decay):
    """Lane sums multiplied by the decay of their rows."""
    return total * gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout))[:, None]


@gluon.jit
def weigh(scores, top, outer):
    """Weights of a tile of scores, what earlier weights are worth beside them, and the new ``top``,
    to which weights are relative: a row's largest score when one last exceeded it by more than
    SLACK. Until then earlier weights are worth exactly 1.
    """
    new_top = gl.maximum(top, gl.max(scores, 1) * outer)
    new_top = gl.where(new_top - top <= SLACK, top, new_top)
    return gl.exp2(scores * outer - new_top[:, None]), gl.exp2(top - new_top), new_top


@gluon.jit
def weigh_again(scores, sums, top, outer, EXPONENT: gl.constexpr):
    """The same where ``sums``, of weights relative to ``top``, are too large: rows whose sums are
    not keep their ``top``, so that what other rows hold has no influence on them.
    """
    large = gl.convert_layout(gl.max(sums, 1), top.type.layout) > 2.0**EXPONENT
    new_top = gl.where(large, gl.maximum(top, gl.max(scores, 1) * outer), top)
    return gl.exp2(scores * outer - new_top[:, None]), gl.exp2(top - new_top), new_top


@gluon.constexpr_function
def sum_exponent(dtype):
    """Base-2 logarithm of what a lane's sum of weights may be: each weight must be finite in
    ``dtype``, and products with values in float32. Few exceed the largest of a row's first tile by
    as much.
    """
    return 15 if dtype == gl.float16 else 32


@gluon.constexpr_function
def _raising(exponent):
    """PTX that writes 1 to the word at $8 if one of four sums exceeds 2 ** exponent or is NaN."""
    limit = f"0f{(127 + exponent) << 23:08X}"
    tests = "\n".join([f"setp.gtu.or.f32 large, ${i}, {limit}, large;" for i in (5, 6, 7)])
    return f"""
{{
    .reg .pred large;
    setp.gtu.f32 large, $4, {limit};
    {tests}
    @large st.volatile.shared.b32 [$8], 1;
    mov.b32 $0, 0;
    mov.b32 $1, 0;
    mov.b32 $2, 0;
    mov.b32 $3, 0;
}}
"""


@gluon.jit
def make_flag():
    """Address of a flag that a warp group shares. Others see it raised or lowered after a barrier.

    In assembly, since Gluon has no conditional store of one thread to shared memory.
    """
    return gl.inline_asm_elementwise(
        _MAKE, "=&r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def raise_where_large(flag, sums, EXPONENT: gl.constexpr):
    """Raise the flag if a sum exceeds 2 ** EXPONENT or is NaN."""
    code: gl.constexpr = _raising(EXPONENT)
    where = gl.full(sums.shape, 0, gl.int32, sums.type.layout) + flag
    gl.inline_asm_elementwise(
        code, "=r,=r,=r,=r,f,f,f,f,r,r,r,r", [sums, where], dtype=gl.int32, is_pure=False, pack=4
    )


@gluon.jit
def is_raised(flag):
    """Whether it is, the same for all threads."""
    return gl.inline_asm_elementwise(_READ, "=r,r", [flag], gl.int32, is_pure=False, pack=1) != 0


@gluon.jit
def lower(flag):
    """Lower it, once all have seen it."""
    barrier()
    gl.inline_asm_elementwise(_LOWER, "=r,r", [flag], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _scaling(count):
    """PTX that multiplies ``count`` values of a thread by their factors, and its operands.

    wgmma leaves two rows in a thread, values 0 and 1, 4 and 5, ... of one and 2 and 3, ... of the
    other; the branch is taken by whole warps.
    """
    factors = 2 * count
    products = "\n".join([f"mul.f32 ${i}, ${i}, ${factors + i};" for i in range(count)])
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
