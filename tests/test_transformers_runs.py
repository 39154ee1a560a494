"""attn_implementation="croc" in generation, under checkpointing, compiled, and in bfloat16, against
eager; every model of the zoo.
"""

import pytest
import torch
import transformers
import transformers_zoo as zoo

from croc_kernels.integrations import transformers as croc

TOLERANCE = 5e-6
VISION = ("vision_tower", "vision_model", "visual")


@pytest.fixture(autouse=True)
def registered():
    croc.register()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", zoo.cases("llava", "gemma3", text=True))
def test_generation_matches_eager(case, cache):
    zoo.needs(case)
    model = case.model(attn_implementation="eager")
    inputs = zoo.prompts_only(zoo.batch(case, model)) | zoo.first_pixels(case, 2)
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    if cache == "static":
        options["cache_implementation"] = "static"
    try:
        expected = model.generate(**inputs, **options)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"eager itself fails with a {cache} cache: {error}")
    old = transformers.__version__ < "5"
    if old and case.name.startswith("qwen3_vl") and cache == "static":
        pytest.skip("transformers 4.57 takes the diagonal of a prepared mask: dense ones only")
    model.set_attn_implementation("croc")
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_left_padded_batch_generates_what_single_rows_do():
    model = transformers.LlamaForCausalLM(zoo.llama()).eval()
    model.set_attn_implementation("croc")
    ids = torch.randint(3, 90, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    both = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[:1, 4:], **options)
    assert torch.equal(both[0, 9:], alone[0, 5:])


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", zoo.cases("gemma3", text=True))
def test_gradient_checkpointing_changes_nothing(case, reentrant):
    zoo.needs(case)
    model = case.model(attn_implementation="croc").train()
    inputs = zoo.batch(case, model)
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    checkpointed = gradients(model, inputs)
    for name, gradient in plain.items():
        # Reentrant checkpoints of the tower have no input that requires a gradient, so give none.
        if reentrant and any(part in name for part in VISION):
            continue
        assert torch.equal(gradient, checkpointed[name]), name


def compiled_logits(model, inputs, implementation):
    torch._dynamo.reset()
    model.set_attn_implementation(implementation)
    return torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits


@pytest.mark.parametrize("case", zoo.cases("llava", text=True))
def test_fullgraph_compile(case):
    """As one graph, wherever stock attention can be compiled as one."""
    zoo.needs(case)
    model = case.model(attn_implementation="croc")
    inputs = zoo.batch(case, model)
    plain = model(**inputs).logits
    try:
        found = compiled_logits(model, inputs, "croc")
    except Exception as ours:
        try:
            compiled_logits(model, inputs, "eager")
        except Exception as stock:
            reason = next(line for line in str(stock).splitlines() if line.strip())
            pytest.skip(f"stock attention can't be compiled either: {reason[:150]}")
        raise ours
    torch.testing.assert_close(found, plain, rtol=0, atol=TOLERANCE)


def test_one_graph_serves_many_lengths():
    """Dynamo makes lengths symbolic at the second batch; nothing of ours ties them down again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = transformers.LlamaForCausalLM(zoo.llama())
    model.set_attn_implementation("croc")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (40, 57, 64, 90):
        ids = torch.randint(3, 90, (2, length))
        padding = torch.ones_like(ids)
        padding[0, : length // 8] = 0
        inputs = {"input_ids": ids, "attention_mask": padding}
        found = compiled(**inputs).logits[padding.bool()]
        torch.testing.assert_close(found, model(**inputs).logits[padding.bool()])
    assert counter.frame_count == 2


@pytest.mark.parametrize("case", zoo.cases("gemma3", text=True))
def test_bf16_autocast(case):
    zoo.needs(case)
    model = case.model()
    inputs = zoo.batch(case, model)
    valid = inputs["attention_mask"].bool()
    model.set_attn_implementation("eager")
    exact = model(**inputs).logits[valid]
    errors = {}
    for implementation in ("eager", "croc"):
        model.set_attn_implementation(implementation)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                errors[implementation] = (model(**inputs).logits[valid] - exact).abs().max()
        except RuntimeError as error:
            if implementation != "eager":
                raise
            pytest.skip(f"eager itself fails under autocast: {error}")
    assert errors["croc"] <= 2 * errors["eager"]
