"""CrocLayer where its parameters are not whole: FSDP2, ZeRO-3, and what both rely on."""

import copy
import importlib.util
import multiprocessing
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from ranks import RANKS, join_zero3, run_ranks
from test_layer import C, M, features_of
from test_layer_module import LENGTHS, RECIPES, _Model, run_stage
from torch import Tensor, nn

import croc_kernels as ck

CONTEXT = multiprocessing.get_context("spawn")
STEPS, RATE = 3, 0.1


class _Partitioned(OrderedDict):
    """Parameters that hold data only after they were looked up by name, as in ZeRO-3."""

    def __init__(self, parameters: dict[str, nn.Parameter], seen: list[str]):
        super().__init__(parameters)
        self.seen, self.whole = seen, {n: p.data for n, p in parameters.items() if p is not None}

    def __getitem__(self, name: str) -> nn.Parameter | None:
        parameter = super().__getitem__(name)
        if parameter is not None and parameter.numel() == 0:
            self.seen.append(name)
            parameter.data = self.whole[name]
        return parameter

    def partition(self) -> None:
        for parameter in self.values():
            if parameter is not None:
                parameter.data = torch.empty(0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_layer_looks_its_parameters_up_at_each_step(recipe: str) -> None:
    layer, seen = ck.CrocLayer(C, M, recipe).eval(), []
    plain = copy.deepcopy(layer)
    modules = [m for m in layer.modules() if m._parameters]
    for module in modules:
        module._parameters = _Partitioned(module._parameters, seen)
        module._parameters.partition()
    for step in range(STEPS):
        features, seed = features_of(LENGTHS, step), 7 + step
        torch.manual_seed(seed)
        expected = run_stage(plain, features, LENGTHS)
        expected.backward()
        seen.clear()
        torch.manual_seed(seed)
        loss = run_stage(layer, features, LENGTHS)
        assert "pool" in seen
        assert torch.equal(loss, expected)
        loss.backward()
        assert torch.equal(layer.pool.grad, plain.pool.grad)
        # An optimizer step elsewhere: nothing of the old rows may be used again.
        others = [m for m in plain.modules() if m._parameters]
        for module, other in zip(modules, others, strict=True):
            module._parameters.partition()
            for name, parameter in other._parameters.items():
                if parameter is None or parameter.grad is None:
                    continue
                parameter.data = parameter.data - RATE * parameter.grad
                module._parameters.whole[name] = parameter.data.clone()
        plain.zero_grad()
        layer.zero_grad()


@pytest.mark.parametrize("recipe", RECIPES)
def test_layer_pool_is_sharded_outside_an_fsdp2_root_and_whole_inside(
    recipe: str, tmp_path: Path
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model, inside = _Model(recipe).eval(), []
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
        match = model.croc._match

        def noting(*arguments: object) -> object:
            inside.append(model.croc.pool)
            return match(*arguments)

        model.croc._match = noting
        for _ in range(2):
            assert isinstance(model.croc.pool, DTensor)
            model(features_of(LENGTHS), LENGTHS).backward()
        assert isinstance(model.croc.pool.grad, DTensor)
        assert len(inside) == 2
        assert not any(isinstance(pool, DTensor) for pool in inside)
        assert all(pool.shape == (M, C) for pool in inside)
    finally:
        torch.distributed.destroy_process_group()


def _zero3_batch(rank: int, step: int) -> tuple[Tensor, tuple[int, ...]]:
    """The second rank has no image at the second step, neither has one at the third."""
    lengths = () if step == 2 or (rank, step) == (1, 1) else LENGTHS
    return features_of(lengths, 10 * rank + step), lengths


def _zero3_rank(rank: int, recipe: str, store: Path) -> None:
    torch.set_num_threads(1)
    join_zero3(rank, store)
    import deepspeed

    torch.manual_seed(0)
    model = _Model(recipe).eval()
    # With every token masked there is nothing left to draw: one process can be the reference.
    model.croc._ratio = (1, 1)
    plain = copy.deepcopy(model)
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), RATE)
    )
    optimizer = torch.optim.SGD(plain.parameters(), RATE)
    assert model.croc.pool.numel() == 0
    for step in range(STEPS + 1):
        losses = [plain(*_zero3_batch(other, step)) for other in range(RANKS)]
        optimizer.zero_grad()
        (sum(losses) / RANKS).backward()
        optimizer.step()
        loss = engine(*_zero3_batch(rank, step))
        assert abs(loss.item() - losses[rank].item()) <= 1e-6, (step, loss, losses)
        engine.backward(loss)
        engine.step()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs deepspeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_layer_under_zero3_of_deepspeed(recipe: str, tmp_path: Path) -> None:
    run_ranks(CONTEXT, _zero3_rank, recipe, tmp_path / "store")
