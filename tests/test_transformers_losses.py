"""Losses under gradient accumulation, checkpointing, compile and autocast; generation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import transformers_zoo as zoo
from transformers_stage import RECIPES, Record, attached

from croc_kernels.integrations.attention_interface import unpack_mask


def split(inputs, rows, images):
    part = {k: v[rows] for k, v in inputs.items() if k != "pixel_values"}
    return part | ({"pixel_values": inputs["pixel_values"][images]} if images else {})


def micro_batches(inputs):
    """Rows 0 | 1 | 2 of the batch: two images, one, none."""
    parts = [(slice(0, 1), slice(0, 2)), (slice(1, 2), slice(2, 3)), (slice(2, 3), None)]
    return [split(inputs, rows, images) for rows, images in parts]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def fixed_masks(model):
    """The first three quarters of each image's tokens: a draw depends on the batch it is part
    of.
    """
    layer = model.croc
    replace = layer.replace

    def fixed(features, lengths, *, active=True):
        drawn = replace(features, lengths, active=active)
        places = [i < -(-3 * n // 4) for n in lengths for i in range(n)]
        order = [i if i < -(-3 * n // 4) else -1 for n in lengths for i in range(n)]
        masked, index = torch.tensor(places), torch.tensor(order)
        shown = torch.where(
            masked[:, None], layer.pool[index.clamp_min(0)], layer.normalize(features)
        )
        return drawn._replace(masked=masked, pool_index=index, embeddings=shown)

    layer.replace = fixed


@pytest.mark.parametrize("recipe", ["croc", pytest.param("victor", marks=pytest.mark.slow)])
def test_gradient_accumulation_changes_nothing(recipe):
    """Three micro-batches, one without images, against one batch: not three times the loss."""
    case = zoo.CASES["llava"]
    model = attached(case, recipe)
    fixed_masks(model)
    inputs = zoo.batch(case, model)
    whole = model(**inputs)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    num_items = (inputs["labels"][:, 1:] != -100).sum()
    num_masked = model.croc.num_loss_tokens([4, 4, 4])
    total = 0.0
    for part in micro_batches(inputs):
        out = model(**part, num_items_in_batch=num_items, num_masked_in_batch=num_masked)
        out.loss.backward()
        total += out.loss.detach()
    torch.testing.assert_close(total, whole.loss.detach())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_without_num_masked_a_micro_batch_weighs_as_its_labels():
    case = zoo.CASES["llava"]
    model = attached(case)
    fixed_masks(model)
    parts = micro_batches(zoo.batch(case, model))[:2]
    counts = [(part["labels"][:, 1:] != -100).sum() for part in parts]
    means = [model(**part)["reconstruction_loss"] for part in parts]
    for part, count, mean in zip(parts, counts, means, strict=True):
        out = model(**part, num_items_in_batch=sum(counts))
        torch.testing.assert_close(out["reconstruction_loss"], mean * count / sum(counts))


def test_a_batch_without_images_touches_the_layer():
    case = zoo.CASES["llava"]
    model = attached(case)
    ids = torch.randint(3, 80, (2, 7))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert out.loss == out["caption_loss"]
    assert out["reconstruction_loss"] == 0
    for name, parameter in model.croc.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0


def test_no_labels_no_loss():
    case = zoo.CASES["llava"]
    model = attached(case)
    inputs = zoo.batch(case, model)
    del inputs["labels"]
    record = Record(model)
    out = model(**inputs)
    assert out.loss is None
    assert not record.replacements[-1].masked.any()


def test_evaluation_masks_nothing_and_reports_the_caption_loss():
    case = zoo.CASES["llava"]
    model = attached(case).eval()
    record = Record(model)
    out = model(**zoo.batch(case, model))
    assert not record.replacements[-1].masked.any()
    assert out.loss == out["caption_loss"]


def test_tuple_outputs():
    case = zoo.CASES["llava"]
    model = attached(case)
    fixed_masks(model)
    inputs = zoo.batch(case, model)
    named = model(**inputs)
    plain = model(**inputs, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], named.loss)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_checkpointing_draws_the_same_mask(reentrant):
    case = zoo.CASES["llava"]
    model = attached(case)
    inputs = zoo.batch(case, model)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(5)
        out = model(**inputs)
        out.loss.backward()
        results.append((out.loss.detach(), gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    for name in ("croc.pool", "croc.head.weight", "model.multi_modal_projector.linear_1.weight"):
        assert torch.equal(results[0][1][name], results[1][1][name]), name


def test_checkpointing_the_whole_model_draws_the_same_mask():
    case = zoo.CASES["llava"]
    model = attached(case)
    inputs = zoo.batch(case, model)
    results = []
    for checkpointed in (False, True):
        model.zero_grad()
        torch.manual_seed(5)

        def run(ids):
            return model(**(inputs | {"input_ids": ids})).loss

        if checkpointed:
            loss = torch.utils.checkpoint.checkpoint(run, inputs["input_ids"], use_reentrant=False)
        else:
            loss = run(inputs["input_ids"])
        loss.backward()
        results.append(gradients(model))
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


@pytest.mark.slow
@pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="transformers 4.57 itself asks the device how many image tokens there are",
)
def test_fullgraph_compile():
    """In a fresh process: Dynamo remembers what other tests patched."""
    program = (
        "import torch, transformers_zoo as zoo\n"
        "from transformers_stage import attached\n"
        "case = zoo.CASES['llava']\n"
        "model = attached(case)\n"
        "inputs = zoo.batch(case, model)\n"
        "compiled = torch.compile(model, fullgraph=True, backend='aot_eager')\n"
        "losses = []\n"
        "for run in (compiled, model):\n"
        "    torch.manual_seed(5)\n"
        "    losses.append(run(**inputs).loss)\n"
        "torch.testing.assert_close(*losses)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    if done.returncode and zoo.UNTRACEABLE in done.stderr:
        pytest.skip(zoo.UNTRACEABLE_REASON)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps its settings per process: whatever ran before, and after, has its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_bf16_autocast_and_accelerate():
    """accelerate wraps forward in autocast after attach; the loss must be computed inside it."""
    from accelerate import Accelerator

    case = zoo.CASES["llava"]
    model = attached(case)
    inputs = zoo.batch(case, model)
    torch.manual_seed(5)
    exact = model(**inputs).loss
    wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    torch.manual_seed(5)
    out = wrapped(**inputs)
    out.loss.backward()
    assert abs(out.loss - exact) < 0.05 * exact


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", zoo.cases("llava"))
def test_generation_equals_recomputing_without_a_cache(case, recipe):
    model = attached(case, recipe).eval()
    prompt = zoo.prompts_only(zoo.batch(case, model))
    pixels = zoo.first_pixels(case, 2)
    special = [0, 2, zoo.IMAGE, zoo.VIDEO, zoo.VISION_START, zoo.VISION_END]
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": special}
    cached = model.generate(**prompt, **pixels, **options)
    if recipe != "croc-released":
        # Its prefix is the prompt: a longer prompt is another prefix.
        if "token_type_ids" in prompt or "mm_token_type_ids" in prompt:
            return
        ids = prompt["input_ids"]
        for _ in range(4):
            # Without a padding mask, 4.57 takes Qwen3-VL's positions for packed documents.
            padding = torch.ones_like(ids)
            logits = model(input_ids=ids, attention_mask=padding, **pixels, use_cache=False).logits
            logits[..., special] = -torch.inf
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(ids, cached)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", zoo.cases("llava"))
def test_static_cache_generates_what_a_dynamic_one_does(case, recipe):
    model = attached(case, recipe).eval()
    prompt = zoo.prompts_only(zoo.batch(case, model)) | zoo.first_pixels(case, 2)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    static = {"cache_implementation": "static", "disable_compile": True}
    cached = model.generate(**prompt, **options)
    try:
        found = model.generate(**prompt, **options, **static)
    except (AttributeError, IndexError, RuntimeError, ValueError) as error:
        if transformers.__version__.startswith("4."):
            pytest.skip(f"transformers 4.57 makes a dense mask for this model: {error}")
        with pytest.raises(type(error)):
            case.model().generate(**prompt, **options, **static)
        pytest.skip(f"the plain model fails likewise: {error}")
    assert torch.equal(found, cached)


def test_the_prompt_is_read_with_the_recipes_mask():
    case = zoo.CASES["llava"]
    model = attached(case).eval()
    record = Record(model)
    prompt = zoo.prompts_only(zoo.batch(case, model))
    model.generate(**prompt, **zoo.first_pixels(case, 2), max_new_tokens=3, do_sample=False)
    first = unpack_mask(record.masks[0], prompt["input_ids"].shape[1]).to_dense()[0, 0]
    image = (prompt["input_ids"][0] == zoo.IMAGE).nonzero()[:4, 0]
    assert first[image][:, image].all()
