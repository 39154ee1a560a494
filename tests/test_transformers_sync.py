"""Nothing that the integration adds to a step reads a value back from the device.

On fake tensors, which have no values, any such read raises; on a GPU the driver is asked to raise.
transformers' own forward counts image tokens on the host and is left out.
"""

import contextlib

import pytest
import torch
import transformers_zoo as zoo
from torch._subclasses.fake_tensor import FakeTensorMode

from croc_kernels.integrations import transformers as croc
from croc_kernels.integrations.attention_interface import croc_mask

DEVICES = ["fake", pytest.param("cuda", marks=pytest.mark.gpu)]


@contextlib.contextmanager
def nothing_is_read(device):
    """Raise where a value is read; on CUDA after a first run, which may compile kernels."""
    if device == "fake":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on(device):
    """Where tensors are made: a fake mode, or the GPU. Real parameters turn fake when used: some
    families' initialisation reads values, so they are made before.
    """
    return FakeTensorMode(allow_non_fake_inputs=True) if device == "fake" else torch.device("cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_the_mask_function(device):
    from transformers import masking_utils as stock

    with on(device):
        where = "cpu" if device == "fake" else "cuda"
        padding = torch.ones(2, 300, dtype=torch.bool, device=where)
        function = stock.and_masks(stock.causal_mask_function, stock.sliding_window_overlay(50))
        arguments = {
            "q_length": 300, "kv_length": 300, "mask_function": function,
            "attention_mask": padding, "device": where,
        }  # fmt: skip
        for _ in range(2):
            with nothing_is_read(device):
                packed = croc_mask(2, **arguments)
    assert packed.shape == (2, 1, 2, 600)


def stage(attachment, inputs, output, hidden):
    """All that happens between the seams of one training forward, transformers left out."""
    text = attachment.language_model
    attachment._begin((), dict(inputs))
    try:
        attachment._replace(output)
        _, given = attachment.before_language_model(
            text, (), {"attention_mask": inputs["attention_mask"]}
        ) or ((), {})
        attachment.after_language_model(text, (), (hidden,))
        return attachment.step.reconstruction, given.get("attention_mask")
    finally:
        attachment.step = None


@pytest.mark.parametrize("given", [FakeTensorMode, pytest.param(None, marks=pytest.mark.gpu)])
def test_image_sizes_are_on_the_host_before_the_first_kernel(given):
    case = zoo.CASES["llava_next"]
    model = case.model().train()
    croc.attach(model, "croc", pool_size=24)
    attachment = model._croc_attachment
    with given() if given else contextlib.nullcontext():
        sizes = torch.ones(2, 2, dtype=torch.int64, device="cuda")
        kept = attachment._begin(
            (), {"pixel_values": sizes, "input_ids": sizes, "image_sizes": sizes}
        )
    attachment.step = None
    assert sizes.device.type == "cuda"
    assert kept["image_sizes"].device.type == "cpu"
    assert kept["pixel_values"] is sizes


@pytest.mark.parametrize("recipe", ["croc", "croc-released", "victor"])
@pytest.mark.parametrize("name", ["llava", pytest.param("gemma3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", DEVICES)
def test_the_stage(device, name, recipe):
    case = zoo.CASES[name]
    model = case.model().to("cpu" if device == "fake" else device)
    inputs = zoo.batch(case, case.model())
    options = {"num_heads": 2} if recipe == "croc-released" else {}
    with on(device) as fake:
        croc.attach(model, recipe, pool_size=24, **options)
        move = fake.from_tensor if device == "fake" else torch.Tensor.cuda
        inputs = {key: move(value) for key, value in inputs.items()}
        hidden = torch.randn(*inputs["input_ids"].shape, zoo.HIDDEN)
        for _ in range(2):
            output = [torch.randn(4, zoo.HIDDEN) for _ in range(3)]
            with nothing_is_read(device):
                loss, mask = stage(model.train()._croc_attachment, inputs, output, hidden)
                loss.backward()
    assert loss.shape == ()
    assert (mask is None) == (recipe == "victor")
    assert model.croc.pool.grad is None
    assert model.croc.head.parameters().__next__().grad is not None
