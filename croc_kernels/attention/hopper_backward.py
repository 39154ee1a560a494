"""The backward for sm_90 around its kernel: what it needs before, its launch, dQ in its dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import launch
from ..ops import empty_heads_last
from .config import LOG2_E, HopperBackwardConfig
from .hopper import TensorDescriptor, tile_descriptor
from .hopper_backward_kernel import _mixed_attention_bwd_hopper_kernel
from .operands import by_sample, tma_aligned

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)
# Of statistics, and of dQ's sums.
_STATISTICS = gl.NVMMASharedLayout(0, 32, 2)
# Rows of O, and of dO, in a piece that spare warps bring.
PIECE = 16
# Numbers in a row of a tile of dQ's sums, for the copy engine.
SUMS = 128


@triton.jit(do_not_specialize=["num_queries", "heads", "first_heads"])
def _prepare_kernel(
    out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, stats_ptr, dirty_ptr, counts_ptr, dq_ptr,
    strides, num_queries, heads, first_heads,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    ORDERED: tl.constexpr, PART: tl.constexpr, LAUNCH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (inf for rows that see nothing), delta and zeros for dQ of BLOCK_M rows, last
    tiles first: what the next kernel begins with is then still in the L2. grid = (tiles * B * H,).

    Only the ``first_heads`` of all samples' ``heads`` get zeros, and with PART statistics: then
    grid = (tiles * (first_heads + B),), the last to look for rows that see nothing, which else are
    looked for in each sample's first head. Counts (see the next kernel) are zeroed here. LAUNCH:
    the next kernel may start, and waits where it first reads what this one wrote. WHOLE: it does
    not add or count, so there is nothing to zero.
    """
    if LAUNCH:
        gdc_launch_dependents()
    o_b, o_h, o_l, g_b, g_h, g_l = strides
    tiles = tl.cdiv(num_queries, BLOCK_M)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tile = program % tiles
    plane = program // tiles
    if PART:
        looks = plane >= first_heads
        plane = tl.where(looks, (plane - first_heads) * HEADS, plane)
    batch, head = tl.cast(plane // HEADS, tl.int64), tl.cast(plane % HEADS, tl.int64)
    first = tl.cast(tile * BLOCK_M, tl.int64)
    offs, cols = tl.arange(0, BLOCK_M), tl.arange(0, D)
    inside = tile * BLOCK_M + offs < num_queries
    rows = tl.cast(plane, tl.int64) * num_queries + first + offs
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("-inf"))
    sees = lse != float("-inf")
    if head == 0:
        tl.store(dirty_ptr + batch * tiles + tile, tl.sum((inside & ~sees).to(tl.int32), 0))
    if PART:
        if looks:
            return
    o = out_ptr + batch * o_b + head * o_h + first * o_l + offs[:, None] * o_l + cols[None, :]
    g = grad_out_ptr + batch * g_b + head * g_h + first * g_l + offs[:, None] * g_l + cols[None, :]
    o = tl.load(o, mask=inside[:, None], other=0.0, eviction_policy="evict_first")
    g = tl.load(g, mask=inside[:, None], other=0.0)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + rows, mask=inside, other=0.0) * _LOG2_E
    place = tl.cast(program, tl.int64) * (2 * BLOCK_M) + offs
    tl.store(stats_ptr + place, tl.where(sees, lse, float("inf")))
    tl.store(stats_ptr + place + BLOCK_M, tl.where(sees, delta, 0.0))
    if WHOLE:
        return
    if plane < first_heads:
        sums = tl.cast(program, tl.int64) * (BLOCK_M * D) + tl.arange(0, BLOCK_M * D)
        tl.store(dq_ptr + sums, tl.zeros([BLOCK_M * D], tl.float32))
        if ORDERED:
            tl.store(counts_ptr + 1 + 2 * heads + program, 0)
    # No more sections, and no more key heads, than heads.
    if program == 0:
        for i in range(0, 1 + 2 * heads, 1024):
            places = i + tl.arange(0, 1024)
            tl.store(counts_ptr + places, 0 * places, mask=places < 1 + 2 * heads)


@triton.jit(do_not_specialize=["num_queries", "key_tiles"])
def _finish_kernel(
    sums_ptr, dq_ptr, strides, scale, num_queries, counts_ptr, key_tiles,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    TRANSPOSED: tl.constexpr, WAIT: tl.constexpr, EARLY: tl.constexpr,
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
    elif WAIT:
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


# All that ``hopper_bwd`` launches.
KERNELS = (_prepare_kernel, _mixed_attention_bwd_hopper_kernel, _finish_kernel)


def _workspace(
    q: Tensor, planes: int, tiles: int, picked: HopperBackwardConfig, ordered: bool
) -> list[Tensor]:
    """Statistics of rows, tiles with rows that see nothing, counts, dQ added up in float32; the
    last two are not used where one tile holds all keys.
    """
    shapes = [
        ((planes * tiles, 2 * picked.block_m), torch.float32), ((q.shape[0] * tiles,), torch.int32)
    ]  # fmt: skip
    if not picked.whole:
        shapes += [
            ((1 + 2 * planes + planes * tiles * ordered,), torch.int32),
            ((planes * tiles, picked.block_m * q.shape[3]), torch.float32),
        ]
    found = [torch.empty(shape, dtype=dtype, device=q.device) for shape, dtype in shapes]
    return found if len(found) == 4 else [*found, found[1], found[0]]


def _dq_descriptor(dq: Tensor, sums: Tensor, picked: HopperBackwardConfig) -> object | None:
    """Tiles of dQ that the copy engine stores, or of its sums in float32, as they lie in registers,
    that it adds to; None where it does neither.
    """
    if picked.whole:
        return tile_descriptor(dq, picked.block_m)
    if not picked.staged:
        return None
    rows = sums.shape[1] // SUMS
    shape = [sums.shape[0] * rows, SUMS]
    return TensorDescriptor(sums, shape, [SUMS, 1], [rows, SUMS], _STATISTICS)


def hopper_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, row_start: Tensor, row_end: Tensor,
    scale: float, picked: HopperBackwardConfig, ordered: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    grads = tuple(empty_heads_last(x) for x in (q, k, v))
    (batch, heads, length, dim), (_, key_heads, num_keys, _) = q.shape, k.shape
    block_m, block_n, group = picked.block_m, picked.block_n, heads // key_heads
    tiles, key_tiles = triton.cdiv(length, block_m), triton.cdiv(num_keys, block_n)
    planes, has_grad_lse = batch * heads, grad_lse is not None
    ordered = ordered and not picked.whole
    # Copies before the first launch: the next kernel is launched early behind that one, and reads
    # the bounds before it waits. O is where the forward put it, unless somebody moved it.
    bounds = tuple(zip(*by_sample(row_start, row_end), strict=True))
    if not tma_aligned(out):
        out = out.clone(memory_format=torch.contiguous_format)
    stats, dirty, counts, sums = _workspace(q, planes, tiles, picked, ordered)
    grad_lse = grad_lse.contiguous() if has_grad_lse else lse
    # With ``overlap`` the next two are launched before the one before them ends; each waits for it
    # where it first reads what that wrote (griddepcontrol).
    overlap, part = picked.early or not ordered, picked.statistics
    common = {
        "HEADS": heads, "D": dim, "BLOCK_M": block_m, "ORDERED": ordered,
        "HAS_GRAD_LSE": has_grad_lse,
    }  # fmt: skip
    first = min(planes, picked.section * group * picked.ahead) if picked.ahead else planes
    launch(
        _prepare_kernel, ((first + batch if part else planes) * tiles, 1, 1),
        (out, grad_out, lse, grad_lse, stats, dirty, counts, sums,
         (*out.stride()[:3], *grad_out.stride()[:3]), length, planes, first),
        {"PART": part, "LAUNCH": overlap, "WHOLE": picked.whole, **common}, num_warps=8,
    )  # fmt: skip
    stats_desc = TensorDescriptor(
        stats, list(stats.shape), list(stats.stride()), [1, 2 * block_m], _STATISTICS
    )
    # What only some kernels read: the host takes longer for each than for a launch's numbers.
    pieces = (tile_descriptor(x, PIECE) if part else None for x in (out, grad_out))
    launch(
        _mixed_attention_bwd_hopper_kernel, (key_tiles * batch * key_heads, 1, 1),
        (tile_descriptor(q, block_m), tile_descriptor(k, block_n), tile_descriptor(v, block_n),
         tile_descriptor(grad_out, block_m), stats_desc,
         *(tile_descriptor(x, block_n) for x in grads[1:]),
         _dq_descriptor(grads[0], sums, picked), *pieces,
         (*bounds, dirty, counts), (stats, lse, grad_lse, sums, scale * LOG2_E, scale)),
        {"GROUP": group, **common, **picked.constants()}, num_warps=8, launch_pdl=overlap,
    )  # fmt: skip
    if picked.whole:
        return grads
    launch(
        _finish_kernel, (planes * tiles, 1, 1),
        (sums, grads[0], grads[0].stride()[:3], scale, length, counts, key_tiles),
        {"HEADS": heads, "GROUP": group, "D": dim, "BLOCK_M": block_m, "TRANSPOSED": dim >= 128,
         "WAIT": overlap, "EARLY": picked.early},
        num_warps=8, launch_pdl=overlap,
    )  # fmt: skip
    return grads
