"""An attached model under DeepSpeed's ZeRO-3 on two processes, one of which gets no image."""

import copy
import importlib.util
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers_zoo as zoo
from ranks import RANKS, join_zero3, run_ranks
from test_transformers_fsdp2 import batch_of_rank
from transformers_stage import RECIPES, attached

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformers_stage"])
STEPS, RATE = 3, 0.05
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs deepspeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
)


def initialize(model: torch.nn.Module) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    return deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]


def run_rank(rank: int, name: str, recipe: str, store: Path) -> None:
    torch.set_num_threads(1)
    case = zoo.CASES[name]
    # With every token masked there is nothing left to draw: ranks may be compared.
    model = attached(case, recipe, mask_ratio=1.0)
    inputs = zoo.batch(case, case.model())
    batches = [batch_of_rank(inputs, other) for other in range(RANKS)]
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), RATE)
    expected = []
    for _ in range(STEPS):
        losses = []
        for batch in batches:
            plain.model.rope_deltas = None  # as in test_transformers_fsdp2.py
            losses.append(plain(**batch).loss)
        optimizer.zero_grad()
        (sum(losses) / RANKS).backward()
        optimizer.step()
        expected.append(losses[rank].item())
    join_zero3(rank, store)
    engine = initialize(model)
    assert model.croc.pool.numel() == 0
    for step in range(STEPS):
        loss = engine(**batches[rank]).loss
        assert abs(loss.item() - expected[step]) <= 1e-5 * abs(expected[step]), (step, loss)
        engine.backward(loss)
        engine.step()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_under_zero3(recipe: str, tmp_path: Path) -> None:
    run_ranks(CONTEXT, run_rank, "llava", recipe, tmp_path / "store")


@pytest.mark.parametrize("case", zoo.cases("gemma3"))
def test_families_under_zero3(case: zoo.Case, tmp_path: Path) -> None:
    zoo.needs(case)
    run_ranks(CONTEXT, run_rank, case.name, "croc", tmp_path / "store")
