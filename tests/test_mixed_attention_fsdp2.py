"""Mixed attention in modules that FSDP2 shards: two processes on a CPU, one process on a GPU."""

import copy
import multiprocessing
from pathlib import Path

import pytest
import torch
from ranks import RANKS, run_ranks
from torch import Tensor, nn

from croc_kernels.attention.api import mixed_attention
from croc_kernels.attention.mask import MixedMask

CONTEXT = multiprocessing.get_context("forkserver")
HEADS, DIM = 4, 64


class Block(nn.Module):
    """Projections around mixed attention, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.out = nn.Linear(HEADS * DIM, HEADS * DIM)

    def forward(self, x: Tensor, mask: MixedMask) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        out = mixed_attention(q, k, v, mask, deterministic=True)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two blocks that share the mask of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, visual: Tensor) -> Tensor:
        mask = MixedMask.from_token_types(visual)
        for block in self.blocks:
            x = block(x, mask)
        return x.float().square().mean()


def batch_of(rank: int, device: str) -> tuple[Tensor, Tensor]:
    """Another length on each rank."""
    generator = torch.Generator().manual_seed(rank)
    length = 130 + 71 * rank
    x = torch.randn(2, length, HEADS * DIM, generator=generator)
    visual = torch.rand(2, length, generator=generator) < 0.5
    return x.to(device), visual.to(device)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def expected_of(plain: Model, device: str) -> dict[str, Tensor]:
    """The mean of the gradients of all ranks, without sharding."""
    found: dict[str, Tensor] = {}
    for rank in range(RANKS):
        plain.zero_grad()
        plain(*batch_of(rank, device)).backward()
        for name, grad in gradients(plain).items():
            found[name] = found.get(name, 0.0) + grad / RANKS
    return found


def run_rank(rank: int, store: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Model()
    expected = expected_of(copy.deepcopy(model), "cpu")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(*batch_of(rank, "cpu")).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad.full_tensor(), expected[name])
    torch.distributed.destroy_process_group()


def test_mixed_attention_under_fsdp2(tmp_path: Path) -> None:
    run_ranks(CONTEXT, run_rank, tmp_path / "store")


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_gpu_mixed_attention_under_fsdp2(recompute: bool, tmp_path: Path) -> None:
    """Parameters gathered in bf16 on streams of FSDP2's own, reused and freed between steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = Model().cuda()
    plain = copy.deepcopy(model).bfloat16()
    if recompute:
        for block in model.blocks:
            block.forward = lambda *x, f=block.forward: checkpoint(f, *x, use_reentrant=False)
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cuda", (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for rank in (0, 1, 0):
            x, visual = batch_of(rank, "cuda")
            model.zero_grad()
            plain.zero_grad()
            loss, want = model(x, visual), plain(x.bfloat16(), visual)
            assert torch.equal(loss, want)
            loss.backward()
            want.backward()
            for name, grad in gradients(model).items():
                assert torch.equal(grad.full_tensor(), gradients(plain)[name].float())
    finally:
        torch.distributed.destroy_process_group()
