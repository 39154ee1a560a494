"""An attached model, sharded by FSDP2 over two processes, one of which gets no image."""

import copy
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers_zoo as zoo
from ranks import RANKS, run_ranks
from transformers_stage import RECIPES, attached

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformers_stage"])
OF_TEXT = ("input_ids", "attention_mask", "labels", "token_type_ids")


def batch_of_rank(inputs: dict[str, Any], rank: int) -> dict[str, Any]:
    """All three samples on the first rank, the last one, which is text alone, on the second."""
    if rank == 0:
        return inputs
    return {name: inputs[name][2:] for name in OF_TEXT if name in inputs}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def units(model: torch.nn.Module, everywhere: bool) -> list[torch.nn.Module]:
    """What becomes a unit of its own below the root: the language model's layers, or all that
    accelerate takes by default, in its order.
    """
    if not everywhere:
        return list(model.model.language_model.layers)
    whole = [m for m in model.modules() if type(m).__name__ in set(model._no_split_modules)]
    embedding = model.get_input_embeddings()
    tied = embedding.weight is model.get_output_embeddings().weight
    return [*reversed(whole), *([] if tied else [embedding])]


def run_rank(rank: int, name: str, recipe: str, everywhere: bool, store: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    case = zoo.CASES[name]
    # With every token masked there is nothing left to draw: ranks may be compared.
    model = attached(case, recipe, mask_ratio=1.0)
    inputs = zoo.batch(case, case.model())
    assert not (batch_of_rank(inputs, 1)["input_ids"] == zoo.IMAGE).any()
    plain = copy.deepcopy(model)
    expected: dict[str, torch.Tensor] = {}
    for other in range(RANKS):
        plain.zero_grad()
        # Qwen's of 5.3 take these along into a batch without images, whatever its size.
        plain.model.rope_deltas = None
        loss = plain(**batch_of_rank(inputs, other)).loss
        loss.backward()
        if other == rank:
            own_loss = loss.item()
        for name, gradient in gradients(plain).items():
            expected[name] = expected.get(name, 0.0) + gradient.clone() / RANKS
    assert any("croc" in name and g.abs().sum() > 0 for name, g in expected.items())

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    for unit in units(model, everywhere):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = model(**batch_of_rank(inputs, rank)).loss
    assert abs(loss.item() - own_loss) <= 1e-6 * abs(own_loss)
    loss.backward()
    found = gradients(model)
    assert found.keys() >= expected.keys()
    for name, gradient in found.items():
        # What no rank uses, such as the tower's last layer, has a gradient of zeros.
        exact = expected.get(name, torch.zeros(gradient.shape))
        torch.testing.assert_close(gradient.full_tensor(), exact, atol=1e-6, rtol=1e-4)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_sharded_ranks_have_the_gradients_of_one(recipe: str, tmp_path: Path) -> None:
    """A rank without an image must join every collective, or the other waits for ever."""
    run_ranks(CONTEXT, run_rank, "llava", recipe, False, tmp_path / "store")


@pytest.mark.parametrize("case", zoo.cases("llava"))
def test_units_inside_the_vision_tower(case: zoo.Case, tmp_path: Path) -> None:
    """accelerate's default: there a rank without an image runs the tower on one of zeros."""
    zoo.needs(case)
    run_ranks(CONTEXT, run_rank, case.name, "croc", True, tmp_path / "store")
