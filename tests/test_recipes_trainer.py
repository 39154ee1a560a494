"""The stage: loss scaling, batches with and without images, what learns, what is reported."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from recipe_case import (
    POOL_SIZE,
    Case,
    losses_of,
    make_stage,
    records,
    run_case,
    turns,
    write_case,
    write_records,
)
from transformers import TrainerCallback

from croc_kernels.integrations import transformers as integration
from croc_kernels.recipes.command import run
from croc_kernels.recipes.options import OptionError
from croc_kernels.recipes.pretrain import first_and_last
from croc_kernels.recipes.records import BadSampleError

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = ("croc", "croc-released", "victor")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return write_case(tmp_path_factory.mktemp("case"))


class Gradients(TrainerCallback):
    """Keeps the gradients of the last optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_step(case: Case, data: Path, output: Path, **options) -> tuple[dict, tuple]:
    """Gradients and losses of one optimizer step on four samples."""
    explicit = case.options(output, max_steps=1, max_grad_norm=0.0, save_strategy="no", **options)
    explicit["data"] = str(data)
    stage = make_stage(explicit)
    # The released head drops out at random, in another order for another batch size.
    for module in stage.layer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    gradients = Gradients()
    stage.trainer.add_callback(gradients)
    stage.trainer.train()
    return gradients.kept, losses_of(stage.trainer.state.log_history)[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_batch_of_four_equals_four_micro_batches(recipe: str, case: Case, tmp_path) -> None:
    """One, two, no and one image, and answers of different lengths: a mean of means differs."""
    made = records()
    # See the test of the prefix below.
    third = made[1] if recipe == "croc-released" else made[7]
    data = write_records(tmp_path / "data.json", [made[0], made[6], third, made[3]])
    # With every token masked there is nothing left to draw.
    common = {"recipe": recipe, "mask_ratio": 1.0}
    whole, losses = one_step(case, data, tmp_path / "a", per_device_train_batch_size=4, **common)
    parts, other = one_step(
        case, data, tmp_path / "b", per_device_train_batch_size=1,
        gradient_accumulation_steps=4, **common,
    )  # fmt: skip
    assert losses[1:] == pytest.approx(other[1:], rel=1e-6)
    # transformers 4 rounds the sum to four digits.
    assert losses[0] == pytest.approx(other[0], abs=1.01e-4)
    assert losses[0] == pytest.approx(losses[1] + 10.0 * losses[2], abs=1e-4)
    assert whole.keys() == parts.keys()
    assert "croc.pool" in whole
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_text_only_sample_has_the_same_attention_in_every_batch(case: Case, tmp_path) -> None:
    data = write_records(tmp_path / "data.json", [records()[0], records()[7]])
    common = {"recipe": "croc-released", "mask_ratio": 1.0}
    _, losses = one_step(case, data, tmp_path / "a", per_device_train_batch_size=2, **common)
    _, other = one_step(
        case, data, tmp_path / "b", per_device_train_batch_size=1,
        gradient_accumulation_steps=2, **common,
    )  # fmt: skip
    assert losses[1:] == pytest.approx(other[1:], rel=1e-6)


def test_reconstruction_loss_is_the_mean_over_the_masked_tokens(case: Case, tmp_path) -> None:
    """Against a sum written out here, from what the layer was given in each micro-batch."""
    stage = make_stage(
        case.options(tmp_path, max_steps=1, save_strategy="no", gradient_accumulation_steps=3)
    )
    layer, seen = stage.layer, []
    original = layer.loss

    def loss(hidden, replacement, **kwargs):
        seen.append((layer.head(hidden).detach(), replacement))
        return original(hidden, replacement, **kwargs)

    layer.loss = loss
    stage.trainer.train()
    errors = [(p - r.target).abs()[r.masked] for p, r in seen]
    smooth = [torch.where(e < 0.01, e * e / 0.02, e - 0.005) for e in errors]
    tokens = torch.cat(smooth).mean(-1)
    logged = losses_of(stage.trainer.state.log_history)[1][2]
    assert len(tokens) == sum(r.num_masked for _, r in seen)
    assert logged == pytest.approx(tokens.mean().item(), abs=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run_and_losses_fall(recipe: str, case: Case, tmp_path) -> None:
    stage = run_case(
        case.options(
            tmp_path, recipe=recipe, max_steps=12, save_strategy="no", learning_rate=3e-3,
            per_device_train_batch_size=4,
        )
    )  # fmt: skip
    for first, last in first_and_last(stage.trainer.state.log_history).values():
        assert last < first
    loaded = integration.from_pretrained(tmp_path / "model")
    assert loaded.config.croc["recipe"] == recipe
    for name, value in stage.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_batches_without_images_train_the_caption_only(case: Case, tmp_path) -> None:
    data = write_records(tmp_path / "data.json", [records()[7]] * 4)
    gradients, losses = one_step(case, data, tmp_path / "out", gradient_accumulation_steps=2)
    assert losses[2] == 0.0
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert not gradients["croc.pool"].any()
    assert gradients["lm_head.weight"].any()


def parts_with_gradient(case: Case, output: Path, **options) -> set[str]:
    """Which parts of the model move in a step."""
    stage = make_stage(case.options(output, max_steps=1, save_strategy="no", **options))
    parts = ("croc", "vision_tower", "projector", "lm_head", "language_model")
    return {
        next(part for part in parts if part in name)
        for name, parameter in stage.model.named_parameters()
        if parameter.requires_grad
    }


def test_freezing_follows_the_options(case: Case, tmp_path) -> None:
    language = {"lm_head", "language_model"}
    assert parts_with_gradient(case, tmp_path / "a") == {"croc", "projector"} | language
    options = {"train_vision_tower": True, "freeze_projector": True, "freeze_language_model": True}
    assert parts_with_gradient(case, tmp_path / "b", **options) == {"croc", "vision_tower"}


def test_learning_rates_of_pool_and_vision_tower(case: Case, tmp_path) -> None:
    stage = make_stage(
        case.options(
            tmp_path, pool_learning_rate=0.5, train_vision_tower=True, vision_learning_rate=0.25
        )
    )
    optimizer = stage.trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = dict(stage.model.named_parameters())
    assert len(rates) == len(trained) == sum(len(g["params"]) for g in optimizer.param_groups)
    for name, parameter in trained.items():
        special = {"croc.pool": 0.5}.get(name, 0.25 if "vision_tower" in name else 1e-3)
        assert rates[id(parameter)] == special, name


def bad_data(case: Case, folder: Path) -> Path:
    """Good samples, a malformed record, a missing picture, one too long, one to be cut."""
    made = [*records()[:4], {"conversations": []}]
    made.append({"image": "gone.png", "conversations": turns("<image>\nWhat?", "Gone.")})
    made.append({"image": ["0.png"] * 6, "conversations": turns("<image>" * 6, "Six.")})
    made.append({"conversations": turns("Hello?", "Word " * 80)})
    return write_records(folder / "data.json", made)


def test_bad_samples_raise_with_file_and_index(case: Case, tmp_path) -> None:
    data = bad_data(case, tmp_path)
    with pytest.raises(BadSampleError, match=r"data\.json: record 4: conversations must"):
        run_case(case.options(tmp_path / "out") | {"data": str(data)})
    made = json.loads(data.read_text())
    del made[4]
    write_records(data, made)
    with pytest.raises(BadSampleError, match=r"data\.json: record 4: picture .*gone\.png does not"):
        run_case(case.options(tmp_path / "out", save_strategy="no") | {"data": str(data)})


def test_skip_bad_samples_counts_and_lists_them(case: Case, tmp_path, capsys, caplog) -> None:
    data = bad_data(case, tmp_path)
    options = case.options(
        tmp_path / "out", skip_bad_samples=True, max_length=100, save_steps=4, num_train_epochs=2
    )
    run(argparse.Namespace(**options | {"data": str(data)}))
    printed = capsys.readouterr().out.splitlines()
    start = printed.index(
        f"{data}: 2 bad and 1 too long samples left out, 1 cut after their last image"
    )
    listed = printed[start + 1 :]
    assert listed[0] == "  record 4 (bad): conversations must be a non-empty list, got []"
    assert listed[1].startswith("  record 5 (bad): picture ")
    assert listed[2].startswith("  record 6 (too long): its images end at token ")
    assert listed[3].startswith("  record 7 (cut): text cut from ")
    # Once per record, however often it is drawn.
    assert sum("record 6 (too long)" in message for message in caplog.messages) == 1
    saved = tmp_path / "out" / "checkpoint-4" / "samples_report.json"
    assert {note["index"] for note in json.loads(saved.read_text())["notes"]} <= {4, 5, 6, 7}


def test_saved_layer_is_taken_up_and_its_recipe_kept(case: Case, tmp_path) -> None:
    run_case(case.options(tmp_path / "a", recipe="victor", max_steps=1, save_strategy="no"))
    again = case.options(tmp_path / "b", recipe="victor") | {"model": str(tmp_path / "a" / "model")}
    stage = make_stage(again)
    saved = integration.from_pretrained(tmp_path / "a" / "model")
    assert torch.equal(stage.layer.pool, saved.croc.pool)
    assert stage.layer.pool.shape[0] == POOL_SIZE
    with pytest.raises(OptionError, match=r"recipe must be 'victor', with which .* got 'croc'"):
        make_stage(again | {"recipe": "croc"})


def test_gradient_checkpointing_changes_nothing(case: Case, tmp_path) -> None:
    data = write_records(tmp_path / "data.json", records()[:4])
    plain = one_step(case, data, tmp_path / "a", per_device_train_batch_size=4)
    again = one_step(
        case, data, tmp_path / "b", per_device_train_batch_size=4, gradient_checkpointing=True
    )
    assert plain[1] == pytest.approx(again[1], abs=1e-6)
    for name, gradient in plain[0].items():
        torch.testing.assert_close(again[0][name], gradient, rtol=0, atol=1e-6, msg=name)
