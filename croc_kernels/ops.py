"""Every op's schema, fake kernel and implementation switch; Triton is imported inside the calls.

An op runs a Triton kernel for CUDA tensors (and for CPU tensors under ``TRITON_INTERPRET=1``) and a
PyTorch or C++ implementation of the same mathematics for CPU tensors otherwise. The assignment
solver is compiled: its implementations are registered by ``croc_kernels._C`` for CPU and, if it was
built with nvcc, for CUDA.

Ops are not differentiable by themselves: each operator's ``api.py`` wraps the pair of forward and
backward ops in a ``torch.autograd.Function``, which ``torch.compile(fullgraph=True)`` traces.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from .backend import uses_triton

_LIB = torch.library.Library("croc_kernels", "FRAGMENT")


@functools.cache
def _found(implementation: str) -> Callable:
    module, function = implementation.split(":")
    return getattr(importlib.import_module(module, __package__), function)


def _define(schema: str, triton: str, cpu: str, fake: Callable) -> Callable:
    """Define an op; implementations are ``"module:function"`` names in here. Return its handle."""
    name = schema.split("(", 1)[0]
    _LIB.define(schema)

    def run(first: Tensor, *args: object) -> object:
        return _found(triton if uses_triton(first) else cpu)(first, *args)

    for key in ("CPU", "CUDA"):
        _LIB.impl(name, run, key)
    torch.library.register_fake(f"croc_kernels::{name}", fake, lib=_LIB)
    return getattr(torch.ops.croc_kernels, name).default


# --- attention ---------------------------------------------------------------------------------


def empty_heads_last(like: Tensor) -> Tensor:
    """(B, H, L, D) view of a (B, L, H, D) allocation: model code transposes back to it for free."""
    batch, heads, length, dim = like.shape
    return like.new_empty((batch, length, heads, dim)).transpose(1, 2)


def _mixed_attention_fwd_fake(q, k, v, start, end, visible_until, scale, softcap):
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_heads_last(q), q.new_empty(q.shape[:3], dtype=precision)


def _mixed_attention_bwd_fake(
    grad_out, grad_lse, q, k, v, out, lse, start, end, row_start, row_end, visible_until,
    scale, softcap, deterministic,
):  # fmt: skip
    return tuple(empty_heads_last(x) for x in (q, k, v))


# The second result is the log-sum-exp of each row to base 2; grad_lse is its gradient.
mixed_attention_fwd = _define(
    "mixed_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor start, Tensor end, "
    "Tensor? visible_until, float scale, float softcap) -> (Tensor, Tensor)",
    triton=".attention.forward:mixed_attention_fwd",
    cpu=".attention.cpu:mixed_attention_fwd",
    fake=_mixed_attention_fwd_fake,
)
mixed_attention_bwd = _define(
    "mixed_attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    "Tensor out, Tensor lse, Tensor start, Tensor end, Tensor row_start, Tensor row_end, "
    "Tensor? visible_until, float scale, float softcap, bool deterministic) "
    "-> (Tensor, Tensor, Tensor)",
    triton=".attention.backward:mixed_attention_bwd",
    cpu=".attention.cpu:mixed_attention_bwd",
    fake=_mixed_attention_bwd_fake,
)


def _mask_rows_fake(
    source, kind, attention_mask, document_ids, cu_seqlens, batch, length, sliding_window,
    spans_exceed_window, ignore_index,
):  # fmt: skip
    optional = (attention_mask, document_ids, cu_seqlens)
    plain = kind in ("types", "causal", "full") and all(x is None for x in optional)
    sizes = ((batch, length), (batch, length), (0,) if plain else (batch, length))
    spans = (source.shape[0] if kind == "spans" else 0,)
    return tuple(source.new_empty(size, dtype=torch.int32) for size in (*sizes, spans))


def _mask_columns_fake(start, end, num_keys, visible_until, may_have_holes):
    size = (start.shape[0], num_keys)
    bounded = visible_until is not None or may_have_holes
    return tuple(start.new_empty(s) for s in (size, size, size if bounded else (0,)))


# start, end, token_faults (B, L) and span_faults (S,), int32, of a MixedMask; empty where there are
# none. attention/mask_build.py says what kind and source are.
mask_rows = _define(
    "mask_rows(Tensor source, str kind, Tensor? attention_mask, Tensor? document_ids, "
    "Tensor? cu_seqlens, SymInt batch, SymInt length, int sliding_window, "
    "bool spans_exceed_window, int ignore_index) -> (Tensor, Tensor, Tensor, Tensor)",
    triton=".attention.mask_kernel:mask_rows",
    cpu=".attention.intervals:mask_rows",
    fake=_mask_rows_fake,
)
# row_start, row_end and visible_until, (B, num_keys) int32; the last empty where nothing needs it.
mask_columns = _define(
    "mask_columns(Tensor start, Tensor end, SymInt num_keys, Tensor? visible_until, "
    "bool may_have_holes) -> (Tensor, Tensor, Tensor)",
    triton=".attention.mask_columns:mask_columns",
    cpu=".attention.intervals:mask_columns",
    fake=_mask_columns_fake,
)


# --- cost --------------------------------------------------------------------------------------


def _cost_shape(tokens: Tensor, token_index: Tensor | None) -> tuple[int, ...]:
    return tuple(tokens.shape[:-1]) if token_index is None else tuple(token_index.shape)


def _token_cost_fake(tokens, pool, token_index, num_rows, metric):
    return tokens.new_empty((*_cost_shape(tokens, token_index), pool.shape[0]), dtype=torch.float32)


def _nearest_token_fake(tokens, pool, token_index, num_rows, metric):
    return tokens.new_empty(_cost_shape(tokens, token_index), dtype=torch.int64)


token_cost = _define(
    "token_cost(Tensor tokens, Tensor pool, Tensor? token_index, Tensor? num_rows, "
    "str metric) -> Tensor",
    triton=".cost.kernel:token_cost",
    cpu=".cost.cpu:token_cost",
    fake=_token_cost_fake,
)
nearest_token = _define(
    "nearest_token(Tensor tokens, Tensor pool, Tensor? token_index, Tensor? num_rows, "
    "str metric) -> Tensor",
    triton=".cost.kernel:nearest_token",
    cpu=".cost.cpu:nearest_token",
    fake=_nearest_token_fake,
)


# --- assignment --------------------------------------------------------------------------------


def _linear_assignment_fake(cost, num_rows, maximize):
    batch, n, m = cost.shape
    return (
        cost.new_empty((batch, n), dtype=torch.int64),
        cost.new_empty((batch, n), dtype=torch.float64),
        cost.new_empty((batch, m), dtype=torch.float64),
        cost.new_empty((batch,), dtype=torch.float64),
        cost.new_empty((batch,), dtype=torch.int32),
    )


# Results: index (B, N), row_dual (B, N), column_dual (B, M), gap (B,), status (B,);
# LinearAssignment in assignment/api.py says more. cost is (B, N, M) float32 or float64, num_rows
# (B,) int32 or int64. The first op is implemented in csrc/.
_ASSIGNMENT = (
    "(Tensor cost, Tensor? num_rows, bool maximize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIB.define("linear_assignment" + _ASSIGNMENT)
torch.library.register_fake("croc_kernels::linear_assignment", _linear_assignment_fake, lib=_LIB)
linear_assignment = torch.ops.croc_kernels.linear_assignment.default


def _define_waiting(schema: str, function: str, fake: Callable) -> Callable:
    """An op whose one implementation waits for the device, which graph capture has to know."""
    name = schema.split("(", 1)[0]
    _LIB.define(schema, tags=(torch.Tag.cudagraph_unsafe,))

    def run(*args: object) -> object:
        return _found(function)(*args)

    for key in ("CPU", "CUDA"):
        _LIB.impl(name, run, key)
    torch.library.register_fake(f"croc_kernels::{name}", fake, lib=_LIB)
    return getattr(torch.ops.croc_kernels, name).default


linear_assignment_reference = _define_waiting(
    "linear_assignment_reference" + _ASSIGNMENT,
    ".assignment.reference:linear_assignment",
    _linear_assignment_fake,
)
# A copy of index, or an error that names the first unsolved problem.
linear_assignment_checked = _define_waiting(
    "linear_assignment_checked(Tensor index, Tensor status, Tensor cost, Tensor? num_rows, "
    "bool maximize, str function) -> Tensor",
    ".assignment.failures:checked_index",
    lambda index, status, cost, num_rows, maximize, function: torch.empty_like(index),
)


def _native_missing() -> dict[str, str]:
    """Why there is no compiled assignment solver, for each device type that has none."""
    try:
        importlib.import_module("._C", __package__)
    except ImportError as error:
        reason = f"croc_kernels._C can't be imported: {error}"
        return {"cpu": reason, "cuda": reason}
    built = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        device: f"croc_kernels._C was built without {device.upper()}"
        for device in ("cpu", "cuda")
        if not built("croc_kernels::linear_assignment", device.upper())
    }


# Importing the extension registers its implementations; that it is missing is no error by itself.
ASSIGNMENT_MISSING = _native_missing()


# --- replacement -------------------------------------------------------------------------------


def _replace_tokens_bwd_fake(
    grad_out, where, index, pool_size, pool_dtype, embeddings_grad, pool_grad
):
    embeddings = grad_out.new_empty(grad_out.shape if embeddings_grad else (0,))
    pool_shape = (pool_size if pool_grad else 0, grad_out.shape[-1])
    return embeddings, grad_out.new_empty(pool_shape, dtype=pool_dtype)


def _reconstruction_loss_fwd_fake(prediction, target, where, items, beta, mean):
    double = torch.float64 in (prediction.dtype, target.dtype)
    dtype = torch.float64 if double else torch.float32
    return tuple(prediction.new_empty((), dtype=dtype) for _ in range(2))


def _reconstruction_loss_fwd_foreseen_fake(prediction, target, where, items, beta, mean, history):
    scalars = tuple(prediction.new_empty((), dtype=history.dtype) for _ in range(3))
    return (*scalars, prediction.new_empty(prediction.shape))


# where and index: the shape of embeddings without its last dimension. Rows that the pool does not
# have raise on CPU and become NaN on CUDA.
replace_tokens_fwd = _define(
    "replace_tokens_fwd(Tensor embeddings, Tensor where, Tensor pool, Tensor index) -> Tensor",
    triton=".replacement.kernel:replace_tokens_fwd",
    cpu=".replacement.cpu:replace_tokens_fwd",
    fake=lambda embeddings, where, pool, index: embeddings.new_empty(embeddings.shape),
)
replace_tokens_bwd = _define(
    "replace_tokens_bwd(Tensor grad_out, Tensor where, Tensor index, SymInt pool_size, "
    "ScalarType pool_dtype, bool embeddings_grad, bool pool_grad) -> (Tensor, Tensor)",
    triton=".replacement.kernel:replace_tokens_bwd",
    cpu=".replacement.cpu:replace_tokens_bwd",
    fake=_replace_tokens_bwd_fake,
)
# The loss summed over the selected tokens' components and divided by the divisor, and the divisor:
# 1 unless mean, else components times items, by default the number of selected tokens.
reconstruction_loss_fwd = _define(
    "reconstruction_loss_fwd(Tensor prediction, Tensor target, Tensor? where, Tensor? items, "
    "float beta, bool mean) -> (Tensor, Tensor)",
    triton=".replacement.loss_kernel:reconstruction_loss_fwd",
    cpu=".replacement.cpu:reconstruction_loss_fwd",
    fake=_reconstruction_loss_fwd_fake,
)
reconstruction_loss_bwd = _define(
    "reconstruction_loss_bwd(Tensor prediction, Tensor target, Tensor? where, Tensor divisor, "
    "Tensor grad_loss, float beta) -> Tensor",
    triton=".replacement.loss_kernel:reconstruction_loss_bwd",
    cpu=".replacement.cpu:reconstruction_loss_bwd",
    fake=lambda prediction, *_: prediction.new_empty(prediction.shape),
)
# The same for an upstream gradient that earlier calls let expect (history, see loss_kernel.py): the
# forward returns it and the gradient for it, which the backward corrects if it was another.
reconstruction_loss_fwd_foreseen = _define(
    "reconstruction_loss_fwd_foreseen(Tensor prediction, Tensor target, Tensor? where, "
    "Tensor? items, float beta, bool mean, Tensor history) -> (Tensor, Tensor, Tensor, Tensor)",
    triton=".replacement.loss_kernel:reconstruction_loss_fwd_foreseen",
    cpu=".replacement.cpu:reconstruction_loss_fwd_foreseen",
    fake=_reconstruction_loss_fwd_foreseen_fake,
)
reconstruction_loss_bwd_foreseen = _define(
    "reconstruction_loss_bwd_foreseen(Tensor(a!) gradient, Tensor prediction, Tensor target, "
    "Tensor? where, Tensor divisor, Tensor grad_loss, Tensor expected, Tensor(b!) history, "
    "float beta) -> ()",
    triton=".replacement.loss_kernel:reconstruction_loss_bwd_foreseen",
    cpu=".replacement.cpu:reconstruction_loss_bwd_foreseen",
    fake=lambda *_: None,
)


# --- layer -------------------------------------------------------------------------------------


# (B, width) int64 places in the packed tensor: each image's tokens in a random order. seeds: one
# per micro-batch. table: (4, B) int64 start, length, first place of the micro-batch and number of
# the micro-batch, of each image; None for one micro-batch of images with `longest` tokens each.
draw_order = _define(
    "draw_order(Tensor seeds, Tensor? table, SymInt batch, SymInt longest, SymInt width, "
    "SymInt total, int rank) -> Tensor",
    triton=".layer.kernel:draw_order",
    cpu=".layer.matching:sorted_places",
    fake=lambda seeds, table, batch, longest, width, *_: seeds.new_empty((batch, width)),
)


def _l2_normalize_fwd_fake(x):
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide)


# Rows of norm 1 and their norms before, at least 1e-12; and the gradient of the rows.
l2_normalize_fwd = _define(
    "l2_normalize_fwd(Tensor x) -> (Tensor, Tensor)",
    triton=".layer.kernel:l2_normalize_fwd",
    cpu=".layer.normalization:l2_normalize_fwd",
    fake=_l2_normalize_fwd_fake,
)
l2_normalize_bwd = _define(
    "l2_normalize_bwd(Tensor grad, Tensor y, Tensor norm) -> Tensor",
    triton=".layer.kernel:l2_normalize_bwd",
    cpu=".layer.normalization:l2_normalize_bwd",
    fake=lambda grad, y, norm: y.new_empty(y.shape),
)
