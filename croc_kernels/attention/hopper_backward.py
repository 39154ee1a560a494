"""The backward for sm_90 around its kernel: what it needs before, its launch, dQ in its dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .config import LOG2_E, HopperBackwardConfig, by_sample
from .hopper import tile_descriptor
from .hopper_backward_kernel import _mixed_attention_bwd_hopper_kernel

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)
# Made once: a launch is short enough for the host to notice.
_STATISTICS = gl.NVMMASharedLayout(0, 32, 2)


@triton.jit(do_not_specialize=["num_queries"])
def _prepare_kernel(
    out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, stats_ptr, dirty_ptr, counts_ptr, dq_ptr,
    strides, num_queries,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    ORDERED: tl.constexpr, ZEROED: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (inf for rows that see nothing), delta and zeros for dQ of BLOCK_M rows, last
    tiles first: what the next kernel begins with is then still in the L2. grid = (tiles * B * H,).

    ZEROED: heads of all samples whose dQ is zeroed here, 0 for all. Counts, zeroed: tickets drawn,
    then with ORDERED whose turn it is at each tile of rows, with COUNTED programs that have zeroed
    their share of the next section, for each section, and that are done, for each key head.
    """
    if not ORDERED:
        gdc_launch_dependents()
    o_b, o_h, o_l, g_b, g_h, g_l, l_b, l_h, l_l = strides
    tiles = tl.cdiv(num_queries, BLOCK_M)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tile = program % tiles
    plane = program // tiles
    batch, head = tl.cast(plane // HEADS, tl.int64), tl.cast(plane % HEADS, tl.int64)
    first = tl.cast(tile * BLOCK_M, tl.int64)
    offs, cols = tl.arange(0, BLOCK_M), tl.arange(0, D)
    inside = tile * BLOCK_M + offs < num_queries
    o = out_ptr + batch * o_b + head * o_h + first * o_l + offs[:, None] * o_l + cols[None, :]
    g = grad_out_ptr + batch * g_b + head * g_h + first * g_l + offs[:, None] * g_l + cols[None, :]
    o = tl.load(o, mask=inside[:, None], other=0.0, eviction_policy="evict_first")
    g = tl.load(g, mask=inside[:, None], other=0.0)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        pointers = grad_lse_ptr + batch * l_b + head * l_h + first * l_l + offs * l_l
        delta -= tl.load(pointers, mask=inside, other=0.0) * _LOG2_E
    pointers = lse_ptr + tl.cast(plane, tl.int64) * num_queries + first + offs
    lse = tl.load(pointers, mask=inside, other=float("-inf"))
    sees = lse != float("-inf")
    place = tl.cast(program, tl.int64) * (2 * BLOCK_M) + offs
    tl.store(stats_ptr + place, tl.where(sees, lse, float("inf")))
    tl.store(stats_ptr + place + BLOCK_M, tl.where(sees, delta, 0.0))
    if head == 0:
        blind = tl.sum((inside & (lse == float("-inf"))).to(tl.int32), 0)
        tl.store(dirty_ptr + batch * tiles + tile, blind)
    if ZEROED == 0 or plane < ZEROED:
        sums = tl.cast(program, tl.int64) * (BLOCK_M * D) + tl.arange(0, BLOCK_M * D)
        tl.store(dq_ptr + sums, tl.zeros([BLOCK_M * D], tl.float32))
    if COUNTED and tile == 0:
        # No more sections, and no more key heads, than heads.
        planes = tl.num_programs(0) // tiles
        tl.store(counts_ptr + 1 + plane, 0)
        tl.store(counts_ptr + 1 + planes + plane, 0)
        if plane == 0:
            tl.store(counts_ptr, 0)
    if ORDERED:
        tl.store(counts_ptr + 1 + program, 0)
        if program == 0:
            tl.store(counts_ptr, 0)


@triton.jit(do_not_specialize=["num_queries", "key_tiles"])
def _finish_kernel(
    sums_ptr, dq_ptr, strides, scale, num_queries, counts_ptr, key_tiles,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    TRANSPOSED: tl.constexpr, ORDERED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, D) tile of dQ from fragments in float32; grid = (tiles * B * H,).

    Last added to first. With EARLY first added to first, each waiting for its head alone, which all
    ``key_tiles`` programs of the kernel before have added to then.
    """
    dq_b, dq_h, dq_l = strides
    tiles = tl.cdiv(num_queries, BLOCK_M)
    program = tl.program_id(0)
    if not EARLY:
        program = tl.num_programs(0) - 1 - program
    tile = program % tiles
    plane = program // tiles
    batch, head = tl.cast(plane // HEADS, tl.int64), tl.cast(plane % HEADS, tl.int64)
    rows: tl.constexpr = D if TRANSPOSED else BLOCK_M
    cols: tl.constexpr = BLOCK_M if TRANSPOSED else D
    place = tl.cast(program, tl.int64) * (BLOCK_M * D) + tl.arange(0, BLOCK_M * D)
    if EARLY:
        # All programs of the kernel before are running or done when one of these starts: waiting
        # keeps none of them from starting. One waits for their end, so that this kernel does not
        # end before that one.
        if program == tl.num_programs(0) - 1:
            gdc_wait()
        done_ptr = counts_ptr + 1 + tl.num_programs(0) // tiles + plane // GROUP
        done = tl.atomic_add(done_ptr, 0, sem="acquire")
        while done < key_tiles:
            done = tl.atomic_add(done_ptr, 0, sem="acquire")
    elif not ORDERED:
        gdc_wait()
    x = tl.load(sums_ptr + place, eviction_policy="evict_first") * scale
    # (repetition, 8 columns, warps along columns, along rows, 8 rows, 2 columns, rows 8 apart,
    # column), as ``_add`` counts them.
    warps: tl.constexpr = 4 if rows == 64 else 8
    x = tl.reshape(x, [rows // (16 * warps), cols * warps // 64, 8 // warps, warps, 8, 4, 2, 2])
    x = tl.reshape(tl.permute(x, [0, 3, 6, 4, 2, 1, 5, 7]), [rows, cols])
    if TRANSPOSED:
        x = tl.trans(x)
    offs = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    base = dq_ptr + batch * dq_b + head * dq_h
    pointers = base + tl.cast(offs, tl.int64)[:, None] * dq_l + tl.arange(0, D)[None, :]
    tl.store(pointers, x.to(dq_ptr.dtype.element_ty), mask=(offs < num_queries)[:, None])


def hopper_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, row_start: Tensor, row_end: Tensor,
    scale: float, grads: list[Tensor], picked: HopperBackwardConfig, ordered: bool,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v to ``grads``."""
    (batch, heads, length, dim), (_, key_heads, num_keys, _) = q.shape, k.shape
    block_m, block_n = picked.block_m, picked.block_n
    tiles, key_tiles = triton.cdiv(length, block_m), triton.cdiv(num_keys, block_n)
    planes, group = batch * heads, heads // key_heads
    stats = torch.empty((planes * tiles, 2 * block_m), dtype=torch.float32, device=q.device)
    dirty = torch.empty((batch, tiles), dtype=torch.int32, device=q.device)
    # The kernel before zeroes them, on the stream and for this launch alone.
    counted = picked.ahead or picked.early
    size = 1 + planes * tiles if ordered else (1 + 2 * planes) * counted
    counts = torch.empty(size, dtype=torch.int32, device=q.device) if size else dirty
    sums = torch.empty((planes * tiles, block_m * dim), dtype=torch.float32, device=q.device)
    lse_strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    # Unless in order, the next two are launched before the one before them ends; each waits for it
    # where it first reads what that wrote (griddepcontrol).
    _prepare_kernel[(planes * tiles,)](
        out, grad_out, lse, lse if grad_lse is None else grad_lse, stats, dirty, counts, sums,
        (*out.stride()[:3], *grad_out.stride()[:3], *lse_strides), length,
        HEADS=heads, D=dim, BLOCK_M=block_m, HAS_GRAD_LSE=grad_lse is not None, ORDERED=ordered,
        ZEROED=picked.section * group * picked.ahead, COUNTED=counted, num_warps=8,
    )  # fmt: skip
    bounds = (*zip(*by_sample(row_start, row_end), strict=True), dirty, counts)
    stats_desc = TensorDescriptor(
        stats, list(stats.shape), [2 * block_m, 1], [1, 2 * block_m], _STATISTICS
    )
    _mixed_attention_bwd_hopper_kernel[(key_tiles * batch * key_heads,)](
        tile_descriptor(q, block_m), tile_descriptor(k, block_n), tile_descriptor(v, block_n),
        tile_descriptor(grad_out, block_m), stats_desc, tile_descriptor(grads[1], block_n),
        tile_descriptor(grads[2], block_n), sums, bounds,
        (scale * LOG2_E, scale), num_keys, tiles,
        HEADS=heads, GROUP=group, D=dim, ORDERED=ordered, num_warps=8,
        **picked.constants(), launch_pdl=not ordered,
    )  # fmt: skip
    _finish_kernel[(planes * tiles,)](
        sums, grads[0], grads[0].stride()[:3], scale, length, counts, key_tiles,
        HEADS=heads, GROUP=group, D=dim, BLOCK_M=block_m, TRANSPOSED=dim >= 128, ORDERED=ordered,
        EARLY=picked.early, num_warps=8, launch_pdl=not ordered,
    )  # fmt: skip
