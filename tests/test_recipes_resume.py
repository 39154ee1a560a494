"""Checkpoints are whole whenever the process is killed, and a resumed run has the same losses."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from recipe_case import Case, losses_of, make_stage, run_case, write_case
from safetensors.torch import load_file
from transformers import TrainerCallback

from croc_kernels.recipes import checkpoints
from croc_kernels.recipes.checkpoints import clean, find_resume, publish, remove, rotate
from croc_kernels.recipes.trainer import StageTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 10
# Importing torch and transformers takes longer than these runs: one server does it for all.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["croc_kernels.recipes.pretrain"])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return write_case(tmp_path_factory.mktemp("case"))


def options_of(case: Case, output: Path, **more) -> dict:
    """Two epochs' worth of steps with accumulation: resuming skips batches inside an epoch."""
    return case.options(
        output, max_steps=STEPS, save_steps=1, save_total_limit=2, resume="last",
        per_device_train_batch_size=1, gradient_accumulation_steps=2, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict:
    torch.set_num_threads(1)
    stage = run_case(options_of(case, tmp_path_factory.mktemp("uninterrupted")))
    return losses_of(stage.trainer.state.log_history)


def assert_complete(checkpoint: Path) -> None:
    """Every file of a checkpoint can be read."""
    assert "croc.pool" in load_file(checkpoint / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.load(checkpoint / name, weights_only=False)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert f"checkpoint-{state['global_step']}" == checkpoint.name
    json.loads((checkpoint / "samples_report.json").read_text())


def assert_same_losses(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, abs=1e-6), step


def die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_way(folder: Path, **kwargs: object) -> None:
    """In the place of ``rmtree``: delete one file, then be killed."""
    if Path(folder).is_dir():
        next(path for path in Path(folder).iterdir() if path.is_file()).unlink()
        die()


def child(options: dict, moment: str, step: int) -> None:
    """Train and be killed at a moment of the saving of a step, or not at all."""
    torch.set_num_threads(1)
    original_save = StageTrainer._save_checkpoint

    def save(self: StageTrainer, *args: object) -> None:
        if self.state.global_step == step:
            if moment == "after the weights":
                StageTrainer._save_optimizer_and_scheduler = die
            elif moment == "before the rename":
                checkpoints.os.rename = die
            elif moment == "while rotating":
                checkpoints.shutil.rmtree = die_half_way
        original_save(self, *args)

    StageTrainer._save_checkpoint = save
    run_case(options)


def start(options: dict, moment: str = "", step: int = 0) -> multiprocessing.Process:
    process = CONTEXT.Process(target=recipe_child, args=(options, moment, step))
    process.start()
    return process


def recipe_child(options: dict, moment: str, step: int) -> None:
    """What the forked server runs: its standard output would mix with pytest's."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        child(options, moment, step)


@pytest.mark.parametrize("moment", ["after the weights", "before the rename", "while rotating"])
def test_kill_while_saving_leaves_whole_checkpoints(
    moment: str, case: Case, uninterrupted: dict, tmp_path: Path
) -> None:
    options = options_of(case, tmp_path)
    process = start(options, moment, 4)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = checkpoints.checkpoints(tmp_path)
    assert left[-1].name == ("checkpoint-4" if moment == "while rotating" else "checkpoint-3")
    for checkpoint in left:
        assert_complete(checkpoint)
    assert any(path.name.startswith(".un") for path in tmp_path.iterdir())
    stage = run_case(options)
    assert stage.resume == left[-1]
    assert_same_losses(losses_of(stage.trainer.state.log_history), uninterrupted)
    assert not any(path.name.startswith(".un") for path in tmp_path.iterdir())


def test_kills_at_random_moments_change_no_loss(
    case: Case, uninterrupted: dict, tmp_path: Path
) -> None:
    options = options_of(case, tmp_path)
    moments = random.Random(0)
    kills = 0
    for _ in range(5):
        before = {path.name for path in tmp_path.iterdir()}
        process = start(options)
        # From the first thing it writes on, so that the kill falls into steps and savings.
        while process.is_alive() and {path.name for path in tmp_path.iterdir()} == before:
            time.sleep(0.005)
        process.join(moments.uniform(0.0, 0.5))
        # Unlike os.kill it bears that the process has just ended by itself.
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        for checkpoint in checkpoints.checkpoints(tmp_path):
            assert_complete(checkpoint)
    assert kills > 0
    stage = run_case(options)
    assert_same_losses(losses_of(stage.trainer.state.log_history), uninterrupted)


def test_resume_logs_the_same_means_when_logging_is_rare(case: Case, tmp_path: Path) -> None:
    """A log interval that a checkpoint would cut in two is closed at the checkpoint."""
    common = {"logging_steps": 3, "save_steps": 4}
    whole = run_case(options_of(case, tmp_path / "whole") | common)
    parts = tmp_path / "parts"
    stage = make_stage(options_of(case, parts) | common)
    # The schedule is that of all steps: a kill, not a shorter run.
    stage.trainer.add_callback(StopAfter(6))
    stage.trainer.train()
    resumed = run_case(options_of(case, parts) | common)
    assert resumed.resume.name == "checkpoint-4"
    expected = losses_of(whole.trainer.state.log_history)
    assert sorted(expected) == [3, 4, 6, 8, 9, 10]
    assert_same_losses(losses_of(resumed.trainer.state.log_history), expected)


class StopAfter(TrainerCallback):
    """Ends training after a step without saving, as a kill does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


# --- directories ------------------------------------------------------------------------------


def make_checkpoint(output: Path, step: int) -> Path:
    checkpoint = output / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    return checkpoint


def test_publish_replaces_and_remove_leaves_nothing(tmp_path: Path) -> None:
    for text in ("old", "new"):
        staged = tmp_path / ".unfinished-model"
        (staged / "deep").mkdir(parents=True)
        (staged / "deep" / "file").write_text(text)
        publish(staged, tmp_path / "model")
    assert (tmp_path / "model" / "deep" / "file").read_text() == "new"
    remove(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_clean_deletes_only_what_is_unfinished(tmp_path: Path) -> None:
    kept = make_checkpoint(tmp_path, 1)
    for name in (".unfinished-checkpoint-2", ".unwanted-checkpoint-0"):
        (tmp_path / name).mkdir()
    assert len(clean(tmp_path)) == 2
    assert list(tmp_path.iterdir()) == [kept]
    assert clean(tmp_path / "nowhere") == []


def test_rotate_keeps_the_newest_by_step(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        make_checkpoint(tmp_path, step)
    rotate(tmp_path, None)
    rotate(tmp_path, 0)
    assert len(checkpoints.checkpoints(tmp_path)) == 3
    rotate(tmp_path, 2)
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-100",
    ]


def test_find_resume(tmp_path: Path) -> None:
    assert find_resume(tmp_path / "new", None) is None
    assert find_resume(tmp_path / "new", "last") is None
    old, new = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 20)
    assert find_resume(tmp_path, "last") == new
    assert find_resume(tmp_path, str(new)) == new
    with pytest.raises(
        FileExistsError, match=r"output must hold no checkpoint, got .*checkpoint-20"
    ):
        find_resume(tmp_path, None)
    with pytest.raises(FileExistsError, match=r"must be the newest .* got checkpoint-5 but"):
        find_resume(tmp_path, str(old))
    with pytest.raises(
        FileNotFoundError, match=r"must be a complete checkpoint, got .*checkpoint-7"
    ):
        find_resume(tmp_path, str(tmp_path / "checkpoint-7"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must name a checkpoint-N directory, got .*model"):
        find_resume(tmp_path, str(tmp_path / "model"))
