"""What users would pick instead. A peer that can't run here is listed with the reason."""

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Attention

NO_CUDA = "needs a CUDA device"


@dataclass(frozen=True)
class Peer:
    """One alternative.

    Attributes:
        name: in the results.
        prepare: called with what the op's test passes, returns the call to be timed; set-up such as
            building a block mask is not timed.
        absent: why it can't run on a device type, or None.
        largest_batch: not run beyond it; a second peer covers the larger ones.
        same_problem: False for a kernel that solves an easier problem, listed for scale only.
    """

    name: str
    prepare: Callable[..., Callable]
    absent: Callable[[str], str | None] = lambda device: None
    largest_batch: int | None = None
    same_problem: bool = True

    def require(self, device: torch.device, batch: int) -> None:
        """Skip the row, with the reason that the results list, where this peer can't run."""
        reason = self.absent(device.type)
        if reason is None and self.largest_batch is not None and batch > self.largest_batch:
            reason = f"takes too long beyond a batch of {self.largest_batch}"
        if reason is not None:
            pytest.skip(f"{self.name}: {reason}")


def needs_cuda(device: str) -> str | None:
    """Reason for peers that are CUDA only."""
    return None if device == "cuda" else NO_CUDA


def needs(module: str, *, cuda: bool) -> Callable[[str], str | None]:
    """Reason for peers from an optional package."""

    def absent(device: str) -> str | None:
        if cuda and device != "cuda":
            return NO_CUDA
        root = module.split(".")[0]
        if importlib.util.find_spec(root) is None or importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        return None

    return absent


# --- attention: prepare(case, device) -> call(q, k, v) --------------------------------------------


def _sdpa_dense(case: Attention, device: torch.device) -> Callable:
    mask = case.mask(device).to_dense()
    gqa = case.heads != case.kv_heads
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def _cudnn_dense(case: Attention, device: torch.device) -> Callable:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    call = _sdpa_dense(case, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return call(q, k, v)

    return run


def _causal(backend: str) -> Callable[[Attention, torch.device], Callable]:
    def prepare(case: Attention, device: torch.device) -> Callable:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        gqa = case.heads != case.kv_heads

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

        return run

    return prepare


def flex_block_mask(
    case: Attention, device: torch.device, block_size: tuple[int, int] = (128, 128)
) -> object:
    """FlexAttention's mask of the case, one for all samples and heads."""
    from torch.nn.attention.flex_attention import create_block_mask

    starts, ends = (x.to(device) for x in case.row_bounds())
    length = case.length
    options = {"device": device, "BLOCK_SIZE": block_size}
    if not starts.any():
        return create_block_mask(
            lambda b, h, i, j: j < ends[i], None, None, length, length, **options
        )
    return create_block_mask(
        lambda b, h, i, j: (j >= starts[i]) & (j < ends[i]), None, None, length, length, **options
    )


def _flex(**options: object) -> Callable[[Attention, torch.device], Callable]:
    def prepare(case: Attention, device: torch.device) -> Callable:
        from torch._functorch import config
        from torch.nn.attention.flex_attention import flex_attention

        # Each case has a compilation of its own: past the limit of recompilations torch would run
        # it unfused and say nothing. Donated buffers would not allow a backward twice.
        torch._dynamo.reset()
        config.donated_buffer = False
        block_mask = flex_block_mask(case, device)
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        gqa = case.heads != case.kv_heads
        return lambda q, k, v: compiled(
            q, k, v, block_mask=block_mask, enable_gqa=gqa, kernel_options=options or None
        )

    return prepare


def _two_calls(case: Attention, device: torch.device) -> Callable:
    """A visible prefix as two flash calls: its rows see all of it, the later rows are causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    past, length = case.prefix, case.length
    if not past:
        pytest.skip("fa2-two-calls: only a single prefix is two calls")
    bias, gqa = causal_lower_right(length - past, length), case.heads != case.kv_heads

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            head = F.scaled_dot_product_attention(
                q[:, :, :past], k[:, :, :past], v[:, :, :past], enable_gqa=gqa
            )
            tail = F.scaled_dot_product_attention(
                q[:, :, past:], k, v, attn_mask=bias, enable_gqa=gqa
            )
        return torch.cat([head, tail], dim=2)

    return run


def _flash4(**options: object) -> Callable:
    """FlashAttention-4 on (B, L, H, D) views of (B, H, L, D) tensors."""
    from flash_attn.cute import flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def _flash4_mask(case: Attention, device: torch.device) -> Callable:
    """The mask as a function of FlashAttention-4's own, with block sparsity in both directions."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    @cute.jit
    def visible(batch, head, row, key, seqlen_info, aux_tensors):
        start, end = (cute.make_rmem_tensor(1, cutlass.Int32) for _ in range(2))
        start[0] = aux_tensors[0][row[0]]
        end[0] = aux_tensors[1][row[0]]
        return (key >= start.load()) & (key < end.load())

    @cute.jit
    def visible_from_the_first(batch, head, row, key, seqlen_info, aux_tensors):
        end = cute.make_rmem_tensor(1, cutlass.Int32)
        end[0] = aux_tensors[0][row[0]]
        return key < end.load()

    starts, ends = case.row_bounds()
    packed = bool(starts.any())
    bounds = [starts, ends] if packed else [ends]
    # Blocks that its tiles on sm_90 divide, the largest it would choose by itself.
    dim = case.head_dim
    rows, keys = 192 if dim <= 96 else 128, 80 if dim > 192 else 128
    forward = flex_block_mask(case, device, (rows, keys))
    backward = flex_block_mask(case, device, (128, 64 if dim > 128 else 128))
    return _flash4(
        mask_mod=visible if packed else visible_from_the_first,
        aux_tensors=[x.to(device, torch.int32) for x in bounds],
        block_sparse_tensors=BlockSparseTensorsTorch(
            forward.kv_num_blocks, forward.kv_indices,
            forward.full_kv_num_blocks, forward.full_kv_indices,
            block_size=forward.BLOCK_SIZE,
        ),
        block_sparse_tensors_bwd=BlockSparseTensorsTorch(
            backward.q_num_blocks, backward.q_indices,
            backward.full_q_num_blocks, backward.full_q_indices,
            block_size=backward.BLOCK_SIZE,
        ),
    )  # fmt: skip


ATTENTION = (
    Peer("sdpa-dense", _sdpa_dense),
    Peer("flex", _flex(), needs_cuda),
    Peer("flex-flash", _flex(BACKEND="FLASH"), needs("flash_attn.cute", cuda=True)),
    Peer("fa4-mask-mod", _flash4_mask, needs("flash_attn.cute", cuda=True)),
    Peer("fa2-two-calls", _two_calls, needs_cuda),
    Peer("cudnn-dense", _cudnn_dense, needs_cuda),
    Peer("fa2-causal", _causal("FLASH_ATTENTION"), needs_cuda, same_problem=False),
    Peer("cudnn-causal", _causal("CUDNN_ATTENTION"), needs_cuda, same_problem=False),
    Peer(
        "fa4-causal",
        lambda case, device: _flash4(causal=True),
        needs("flash_attn.cute", cuda=True),
        same_problem=False,
    ),
)


SWEEP = tuple(p for p in ATTENTION if p.name in ("flex", "fa4-mask-mod", "cudnn-causal"))


# --- costs: prepare() -> call(tokens (B, N, C), pool (M, C)) --------------------------------------


def _cdist_loop() -> Callable:
    return lambda tokens, pool: torch.stack([torch.cdist(t, pool) for t in tokens])


def _cdist() -> Callable:
    return lambda tokens, pool: torch.cdist(tokens, pool[None])


def gemm_cost(tokens: Tensor, pool: Tensor) -> Tensor:
    """L2 costs from one product with float32 output, norms and square root in eager."""
    rows = tokens.flatten(0, 1)
    if rows.is_cuda and rows.dtype != torch.float32:
        product = torch.mm(rows, pool.T, out_dtype=torch.float32)
    else:
        product = rows.float() @ pool.float().T
    squares = rows.float().square().sum(-1, keepdim=True) + pool.float().square().sum(-1)
    return (squares - 2.0 * product).clamp_min_(0).sqrt_().view(*tokens.shape[:2], -1)


COST = (
    Peer("cdist-loop", _cdist_loop),
    Peer("cdist", _cdist),
    Peer("gemm-eager", lambda: gemm_cost),
    Peer("gemm-compiled", lambda: torch.compile(gemm_cost), needs_cuda),
)
NEAREST = (
    Peer("cdist-argmin", lambda: lambda tokens, pool: _cdist()(tokens, pool).argmin(-1)),
    Peer("gemm-eager-argmin", lambda: lambda tokens, pool: gemm_cost(tokens, pool).argmin(-1)),
)


# --- assignment: prepare() -> call(cost (B, N, M)) -> (B, N), host copies included ------------


def scipy_rows(cost: Tensor) -> Tensor:
    """One problem (N, M), N <= M, on the host, by SciPy."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def _scipy_loop() -> Callable:
    return lambda cost: torch.stack([scipy_rows(c) for c in cost.cpu()]).to(cost.device)


def _scipy_threads() -> Callable:
    pool = ThreadPoolExecutor(os.cpu_count())
    return lambda cost: torch.stack(list(pool.map(scipy_rows, cost.cpu()))).to(cost.device)


def _lapx() -> Callable:
    import lap

    def rows(cost: Tensor) -> Tensor:
        _, columns, _ = lap.lapjv(cost.numpy(), extend_cost=True)
        return torch.from_numpy(columns).long()

    return lambda cost: torch.stack([rows(c) for c in cost.cpu()]).to(cost.device)


def _torch_linear_assignment() -> Callable:
    from torch_linear_assignment import batch_linear_assignment

    return batch_linear_assignment


ASSIGNMENT = (
    Peer("scipy", _scipy_loop, largest_batch=4),
    Peer("scipy-threads", _scipy_threads),
    Peer("lapx", _lapx, needs("lap", cuda=False), largest_batch=4),
    Peer(
        "torch-linear-assignment",
        _torch_linear_assignment,
        needs("torch_linear_assignment", cuda=True),
    ),
)


# --- replacement and loss -------------------------------------------------------------------------


def eager_replace(embeddings: Tensor, where: Tensor, pool: Tensor, index: Tensor) -> Tensor:
    """Gather and select as separate eager operations."""
    return torch.where(where[..., None], pool[index], embeddings)


def eager_loss(prediction: Tensor, target: Tensor, where: Tensor, beta: float) -> Tensor:
    """Mean SmoothL1 over the selected tokens, selected by a weight: an index would wait."""
    losses = F.smooth_l1_loss(prediction.float(), target.float(), beta=beta, reduction="none")
    return (losses.mean(-1) * where).sum() / where.sum()


REPLACE = (
    Peer("eager", lambda: eager_replace),
    Peer("compiled", lambda: torch.compile(eager_replace), needs_cuda),
)
LOSS = (
    Peer("eager", lambda: eager_loss),
    Peer("compiled", lambda: torch.compile(eager_loss), needs_cuda),
)


# --- the whole matching step: prepare() -> call(tokens, pool) -> (B, N) ---------------------------


def _released_croc() -> Callable:
    """As the released code bases match: one cdist and one SciPy call per image."""
    scipy = _scipy_loop()
    return lambda tokens, pool: scipy(_cdist_loop()(tokens, pool).float())


STEP = (Peer("cdist+scipy", _released_croc, largest_batch=4),)
