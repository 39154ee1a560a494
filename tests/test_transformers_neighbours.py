"""The attached stage under transformers' own Trainer, PEFT, Liger, TRL and lmms-engine's registry.

Those that are not installed are skipped. To run them without touching the environment::

    pip install --target build/neighbours --no-deps peft liger-kernel trl lmms-engine loguru \
        datasets dill multiprocess xxhash pyarrow pandas aiohttp
    PYTHONPATH=build/neighbours python -m pytest tests/test_transformers_neighbours.py
"""

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
import transformers
import transformers_zoo as zoo

from croc_kernels.integrations import transformers as croc


def make():
    case = zoo.CASES["llava"]
    model = case.model()
    croc.attach(model, pool_size=24)
    return model.train(), zoo.batch(case, model)


def arguments(folder, make=transformers.TrainingArguments, **more):
    return make(
        str(folder), per_device_train_batch_size=1, max_steps=2, logging_steps=1, report_to=[],
        use_cpu=True, save_strategy="no", remove_unused_columns=False, disable_tqdm=True, **more,
    )  # fmt: skip


def logged_losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_stock_trainer_logs_the_mean_over_four_micro_batches(tmp_path):
    """Not four times the reconstruction loss: each micro-batch is the same batch here."""
    model, inputs = make()
    trainer = transformers.Trainer(
        model,
        arguments(tmp_path, gradient_accumulation_steps=4, learning_rate=0.0),
        train_dataset=list(range(8)),
        data_collator=lambda rows: dict(inputs),
    )
    logged = logged_losses(trainer)
    expected = torch.stack([model(**inputs).loss for _ in range(4)]).mean().item()
    # The masks are drawn anew, so the reconstruction part varies a little; the factor would not.
    assert logged == pytest.approx([expected] * 2, rel=0.05)


def test_lora_trains_the_layer_beside_its_adapters():
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    model, inputs = make()
    config = peft.LoraConfig(
        r=2, target_modules=r".*language_model.*\.[qv]_proj", modules_to_save=["croc"]
    )
    wrapped = peft.get_peft_model(model, config).train()
    out = wrapped(**inputs)
    out.loss.backward()
    expected = out["caption_loss"] + 10 * out["reconstruction_loss"]
    torch.testing.assert_close(out.loss.detach(), expected)
    trained = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    assert any("croc" in name and name.endswith("pool") for name in trained)
    assert any("lora_A" in name for name in trained)


# --- Liger ----------------------------------------------------------------------------------------

# Its other kernels replace modules inside the language model; all of them are Triton.
ONLY_FORWARD = {"rope": False, "rms_norm": False, "swiglu": False}


def plain_loss(hidden_states, lm_head_weight, labels, num_items_in_batch=None, **ignored):
    """What Liger's fused loss computes: a Triton kernel, and its interpreter lacks parts of it."""
    logits = (hidden_states @ lm_head_weight.T)[:, :-1].flatten(0, 1)
    labels = labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


@pytest.fixture
def liger(monkeypatch):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    from liger_kernel import transformers as liger_transformers
    from liger_kernel.transformers.model import llava

    monkeypatch.setattr(llava, "LigerForCausalLMLoss", plain_loss)
    model = zoo.CASES["llava"].model()
    liger_transformers.apply_liger_kernel_to_llava(model=model, **ONLY_FORWARD)
    try:
        model(**zoo.batch(zoo.CASES["llava"], zoo.CASES["llava"].model()))
    except TypeError as error:  # 0.8.5 with transformers 5.24
        pytest.skip(f"liger-kernel's own forward fails without us: {error}")
    return liger_transformers


def step(model, inputs):
    """Losses and gradients of one step with fixed masks."""
    torch.manual_seed(5)
    out = model(**inputs)
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: out[name] for name in ("loss", "caption_loss", "reconstruction_loss")}, gradients


@pytest.mark.parametrize("recipe", ["croc", "croc-released", "victor"])
def test_liger_before_attach_changes_nothing(liger, recipe):
    """Its forward, which never makes the logits, with the stage around it."""
    results = []
    for patched in (False, True):
        model = zoo.CASES["llava"].model()
        if patched:
            liger.apply_liger_kernel_to_llava(model=model, **ONLY_FORWARD)
        croc.attach(model, recipe, pool_size=24)
        inputs = zoo.batch(zoo.CASES["llava"], model)
        results.append(step(model.train(), inputs))
        assert (model(**inputs).get("logits") is None) == patched
    torch.testing.assert_close(*(losses for losses, _ in results))
    torch.testing.assert_close(*(gradients for _, gradients in results))


PAST = "LlavaModel must be called by the forward that attach wrapped"


def test_liger_after_attach_is_refused(liger):
    model, inputs = make()
    liger.apply_liger_kernel_to_llava(model=model, **ONLY_FORWARD)
    with pytest.raises(RuntimeError, match=PAST):
        model(**inputs)
    with pytest.raises(RuntimeError, match=PAST):
        model.eval()(**inputs)


def test_calls_past_the_forward_are_refused():
    """Not left without the stage: by whoever calls the model inside, in training or with images."""
    model, inputs = make()
    del inputs["labels"]
    with pytest.raises(RuntimeError, match=PAST):
        model.model(**inputs)
    model.eval()
    with pytest.raises(RuntimeError, match=PAST):
        model.model(**inputs)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.isfinite(model.model(input_ids=ids).last_hidden_state).all()
    croc.detach(model)
    assert torch.isfinite(model.model(**inputs).last_hidden_state).all()


# --- TRL ------------------------------------------------------------------------------------------


def sft_trainer(trl, trainer_class, model, inputs, folder):
    import datasets
    import pyarrow
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "<end>": 2}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>"
    )
    # A fingerprint of its own: hashing a table needs dill and pyarrow to fit each other.
    table = pyarrow.table({"input_ids": [[3, 4]] * 8, "labels": [[3, 4]] * 8})
    rows = datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="eight-rows")
    options = {"max_length": None, "gradient_checkpointing": False, "bf16": False}
    return trainer_class(
        model,
        arguments(folder, trl.SFTConfig, learning_rate=1e-3, **options),
        train_dataset=rows,
        data_collator=lambda samples: dict(inputs),
        processing_class=tokenizer,
    )


@pytest.fixture
def trl():
    pytest.importorskip("datasets", reason="datasets is not installed (TRL needs it)")
    return pytest.importorskip("trl", reason="trl is not installed (pip install trl)")


def test_sft_trainer_with_the_losses_of_the_model(trl, tmp_path):
    """Two steps, logged losses equal to those of transformers' Trainer."""

    class CrocSFTTrainer(trl.SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return transformers.Trainer.compute_loss(self, *args, **kwargs)

    model, inputs = make()
    stock = transformers.Trainer(
        model,
        arguments(tmp_path, learning_rate=1e-3),
        train_dataset=list(range(8)),
        data_collator=lambda rows: dict(inputs),
    )
    expected = logged_losses(stock)
    model, inputs = make()
    logged = logged_losses(sft_trainer(trl, CrocSFTTrainer, model, inputs, tmp_path))
    assert logged == pytest.approx(expected, rel=1e-5)
    assert logged[0] > logged[1]


def test_sft_trainer_past_the_stage_is_refused(trl, tmp_path):
    """TRL takes the loss from its own head on model.model, which would leave the stage out."""
    if "fused_lm_head" not in inspect.getsource(trl.SFTTrainer.compute_loss):
        pytest.skip("this TRL takes the model's own loss")
    model, inputs = make()
    trainer = sft_trainer(trl, trl.SFTTrainer, model, inputs, tmp_path)
    with pytest.raises(RuntimeError, match=PAST):
        trainer.train()


# --- lmms-engine ----------------------------------------------------------------------------------


@pytest.fixture
def monkey_patcher():
    """Its registry, read from its file: importing the package needs DeepSpeed, decord and more."""
    found = importlib.util.find_spec("lmms_engine")
    if found is None:
        pytest.skip("lmms-engine is not installed (pip install --no-deps lmms-engine)")
    pytest.importorskip("loguru", reason="loguru is not installed (lmms-engine needs it)")
    file = Path(found.submodule_search_locations[0], "models", "monkey_patch.py")
    spec = importlib.util.spec_from_file_location("lmms_engine_monkey_patch", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MONKEY_PATCHER


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_attach_is_a_patch_of_lmms_engine(monkey_patcher, name):
    """Registered as it is; its keyword arguments come from the YAML file."""
    monkey_patcher.register(name, "croc")(croc.attach)
    case = zoo.CASES[name]
    model = case.model()
    kwargs = {"use_rmpad": False, "recipe": "victor", "pool_size": 24}
    monkey_patcher.apply_monkey_patch_to_instance(model, patch_type=["croc"], **kwargs)
    assert model.config.croc["recipe"] == "victor"
    out = model.train()(**zoo.batch(case, model))
    out.loss.backward()
    assert out["reconstruction_loss"] > 0
    assert model.croc.pool.grad.abs().max() > 0
