"""The attached stage under transformers' own Trainer and under PEFT."""

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


def test_stock_trainer_logs_the_mean_over_four_micro_batches(tmp_path):
    """Not four times the reconstruction loss: each micro-batch is the same batch here."""
    model, inputs = make()
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2,
        learning_rate=0.0, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=list(range(8)), data_collator=lambda rows: dict(inputs)
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
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
