"""Two processes have the losses and checkpoints of one process with a batch of the same samples."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from recipe_case import Case, losses_of, records, run_case, write_case, write_records
from transformers.trainer_callback import TrainerState

from croc_kernels.recipes.checkpoints import checkpoints

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["croc_kernels.recipes.pretrain"])
STEPS = 2


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = records()
    case = write_case(tmp_path_factory.mktemp("case"))
    write_records(case.data, [made[0], made[6], made[5], made[3], made[1], made[8], *made[2:5]])
    return case


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_rank(rank: int, options: dict, port: int) -> None:
    """What torchrun would start."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    run_case(options)


def run_two_ranks(options: dict) -> None:
    run_ranks(CONTEXT, run_rank, options, free_port())


def losses_saved_in(output: Path) -> dict:
    last = checkpoints(output)[-1]
    return losses_of(TrainerState.load_from_json(str(last / "trainer_state.json")).log_history)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"ddp_find_unused_parameters": False}, id="all-parameters-used"),
        pytest.param({}, id="default"),
    ],
)
def test_two_ranks_have_the_losses_of_one(more: dict, case: Case, tmp_path: Path) -> None:
    """Samples with one and two images and answers of different lengths on either rank."""
    # With every token masked there is nothing left to draw.
    common = {"max_steps": STEPS, "save_steps": STEPS, "mask_ratio": 1.0, "max_grad_norm": 0.0}
    one = case.options(tmp_path / "one", **common) | {"per_device_train_batch_size": 4}
    run_case(one)
    two = case.options(tmp_path / "two", **common, **more) | {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    }
    run_two_ranks(two)
    expected, found = losses_saved_in(tmp_path / "one"), losses_saved_in(tmp_path / "two")
    assert found.keys() == expected.keys() == {1, 2}
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-6, abs=1.01e-4)
        assert found[step][1:] == pytest.approx(expected[step][1:], rel=1e-6)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        f"checkpoint-{STEPS}", "losses.png", "model",
    ]  # fmt: skip


ZERO3 = {
    "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs deepspeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
)
def test_zero3_has_the_losses_of_one_rank_and_goes_on(case: Case, tmp_path: Path) -> None:
    """DeepSpeed's configuration as the published runs had it; one sample has no image."""
    write_records(case.data.with_name("mixed.json"), [records()[i] for i in (0, 7, 6, 5) * 2])
    config = tmp_path / "zero3.json"
    config.write_text(json.dumps(ZERO3))
    options = case.options(
        tmp_path / "one", data=str(case.data.with_name("mixed.json")), max_steps=STEPS,
        save_steps=1, mask_ratio=1.0, max_grad_norm=0.0, per_device_train_batch_size=4,
    )  # fmt: skip
    run_case(options)
    two = options | {
        "output": str(tmp_path / "two"), "deepspeed": str(config),
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    run_two_ranks(two)
    expected, found = losses_saved_in(tmp_path / "one"), losses_saved_in(tmp_path / "two")
    assert found.keys() == expected.keys() == {1, 2}
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "two" / "checkpoint-1", resumed / "checkpoint-1")
    run_two_ranks(two | {"output": str(resumed), "resume": "last"})
    assert losses_saved_in(resumed)[2] == pytest.approx(found[2], abs=1e-6)


def test_two_ranks_go_on_from_a_checkpoint(case: Case, tmp_path: Path) -> None:
    """Masks are drawn here: each rank's random state is part of a checkpoint."""
    options = {"max_steps": STEPS, "save_steps": 1, "per_device_train_batch_size": 1}
    run_two_ranks(case.options(tmp_path / "whole", **options))
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", resumed / "checkpoint-1")
    run_two_ranks(case.options(resumed, resume="last", **options))
    expected, found = losses_saved_in(tmp_path / "whole"), losses_saved_in(resumed)
    assert found.keys() == expected.keys() == {1, 2}
    assert found[2] == pytest.approx(expected[2], abs=1e-6)
