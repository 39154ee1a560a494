"""attn_implementation="croc" against eager, on tiny random models from transformers' own
configurations.

The wide matrix is marked slow: ``pytest tests/test_transformers_attention.py -m slow``.
"""

import pytest
import torch
import transformers
import transformers_zoo as zoo
from transformers_packed import packed

from croc_kernels.integrations import attention_interface
from croc_kernels.integrations import transformers as croc
from croc_kernels.integrations.attention_interface import croc_mask
from croc_kernels.testing import assert_attention_matches_eager

FAST = ("llava", "gemma3")
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def registered():
    croc.register()


def logits_and_gradients(model, inputs, implementation):
    model.set_attn_implementation(implementation)
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), gradients


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", zoo.cases(*FAST, text=True))
def test_logits_and_gradients_match_eager(case, side):
    zoo.needs(case)
    model = case.model(attn_implementation="eager")
    inputs = zoo.batch(case, model, side=side)
    valid = inputs["attention_mask"].bool()
    exact, exact_gradients = logits_and_gradients(model, inputs, "eager")
    parts = [{"text_config": "croc", "vision_config": "eager"}] if case.pixels else []
    for implementation in ("croc", *parts):
        logits, gradients = logits_and_gradients(model, inputs, implementation)
        torch.testing.assert_close(logits[valid], exact[valid], rtol=0, atol=TOLERANCE)
        assert gradients.keys() == exact_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, exact_gradients[name], rtol=1e-4, atol=TOLERANCE, msg=name
            )


def test_image_tokens_really_see_later_ones():
    """The comparison above would tell: without the image block the logits differ."""
    case = zoo.CASES["gemma3"]
    model = case.model(attn_implementation="croc")
    inputs = zoo.batch(case, model)
    del inputs["labels"]
    valid = inputs["attention_mask"].bool()
    with_block = model(**inputs).logits[valid]
    without = model(**(inputs | {"token_type_ids": torch.zeros_like(inputs["token_type_ids"])}))
    assert (with_block - without.logits[valid]).abs().max() > 1e-3


def text_models():
    window = {"sliding_window": 4}
    yield "llama", transformers.LlamaConfig(**zoo.text_options())
    yield "qwen2", transformers.Qwen2Config(**zoo.text_options())
    yield "mistral-window", transformers.MistralConfig(**zoo.text_options(**window))
    yield "gemma2-softcap", transformers.Gemma2Config(**zoo.text_options(head_dim=8, **window))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("name", "config"), list(text_models()))
def test_text_models_match_eager(name, config, side):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.randint(3, 90, (3, 13))
    mask = torch.ones_like(ids)
    mask[0, slice(0, 4) if side == "left" else slice(9, 13)] = 0
    assert assert_attention_matches_eager(model, {"input_ids": ids, "attention_mask": mask}) < 1e-5


@pytest.mark.parametrize("case", zoo.cases("qwen3_vl", "gemma3", text=True))
def test_assert_attention_matches_eager_on_every_model(case):
    zoo.needs(case)
    model = case.model()
    assert assert_attention_matches_eager(model, zoo.batch(case, model)) < TOLERANCE


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in zoo.STAGELESS_CASES.items()]
)
def test_models_without_the_stage_match_eager(case, side):
    zoo.needs(case)
    model = case.model()
    assert assert_attention_matches_eager(model, zoo.batch(case, model, side=side)) < TOLERANCE
    with pytest.raises(TypeError, match=f"attach: model must be one of .*, got {case.model_class}"):
        croc.attach(model)


def test_assert_attention_matches_eager_tells_a_wrong_mask(monkeypatch):
    model = transformers.LlamaForCausalLM(zoo.llama())
    ids = torch.randint(3, 90, (2, 9))
    before = model.config._attn_implementation

    def sees_everything(*args, mask_function=None, **kwargs):
        return croc_mask(*args, mask_function=lambda b, h, q, k: k >= 0, **kwargs)

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    monkeypatch.setattr(attention_interface, "croc_mask", sees_everything)
    with pytest.raises(AssertionError, match="LlamaForCausalLM: logits differ"):
        assert_attention_matches_eager(model, {"input_ids": ids})
    assert model.config._attn_implementation == before
    monkeypatch.undo()
    croc.register()
    assert MASKS["croc"] is croc_mask


def test_assert_attention_matches_eager_wants_float32():
    model = transformers.LlamaForCausalLM(zoo.llama()).bfloat16()
    with pytest.raises(TypeError, match=r"must be float32 or float64, got torch\.bfloat16"):
        assert_attention_matches_eager(model, {"input_ids": torch.randint(3, 90, (1, 5))})


def test_assert_attention_matches_eager_wants_logits():
    model = transformers.LlamaModel(zoo.llama())
    wanted = r"must return logits, got BaseModelOutputWithPast of LlamaModel"
    with pytest.raises(TypeError, match=wanted):
        assert_attention_matches_eager(model, {"input_ids": torch.randint(3, 90, (1, 5))})


def test_assert_attention_matches_eager_wants_a_plain_model():
    case = zoo.CASES["llava"]
    model = case.model()
    croc.attach(model, pool_size=24)
    with pytest.raises(RuntimeError, match=r"must have no CrocLayer, got one; detach\(model\)"):
        assert_attention_matches_eager(model, zoo.batch(case, model))


def test_assert_attention_matches_eager_compares_something(monkeypatch):
    """A model whose code never asks for an attention by name would match itself."""
    model = transformers.LlamaForCausalLM(zoo.llama())
    layer = type(model.model.layers[0].self_attn)
    own = {"forward": lambda self, hidden_states, **kwargs: (hidden_states, None)}
    for block in model.model.layers:
        block.self_attn.__class__ = type("OwnAttention", (layer,), own)
    with pytest.raises(AssertionError, match="no layer handed a mask to"):
        assert_attention_matches_eager(model, {"input_ids": torch.randint(3, 90, (1, 5))})
    assert croc.is_registered()


# --- packed rows ----------------------------------------------------------------------------------


# transformers 4.57 builds PaliGemma's mask itself, without documents.
PALIGEMMA_JOINS = transformers.__version__.startswith("4.")


@pytest.mark.parametrize("case", zoo.cases(*FAST, text=True))
def test_packed_rows_equal_separate_rows(case):
    """Also where stock attention does not: Gemma 3 and 4 from 5.23.0 on, where documents but the
    first lose their image block, and PaliGemma up to there, where all prefixes see each other.
    """
    zoo.needs(case)
    model = case.model(attn_implementation="croc")
    joined, rows = packed(case, model)
    if PALIGEMMA_JOINS and case.name.startswith("paligemma"):
        with pytest.raises(RuntimeError, match=r"packed rows need .* PaliGemma transformers >= 5"):
            model(**joined, use_cache=False)
        return
    # With a cache, and by default there is one, transformers does not look for documents: below.
    together = model(**joined, use_cache=False).logits[0]
    apart = torch.cat([model(**row).logits[0] for row in rows])
    torch.testing.assert_close(together, apart, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_known_faults_of_packed_rows_are_real(name):
    """Stock eager joins or cuts documents exactly where ``known_faults`` says so."""
    model = zoo.CASES[name].model(attn_implementation="eager")
    joined, rows = packed(zoo.CASES[name], model)
    together = model(**joined, use_cache=False).logits[0]
    apart = torch.cat([model(**row).logits[0] for row in rows])
    wrong = bool((together - apart).abs().max() > 1e-2)
    word = {"gemma3": "Gemma 3", "paligemma": "PaliGemma"}[name]
    told = any("packed rows" in fault and word in fault for fault in croc.known_faults())
    assert wrong == told


@pytest.mark.parametrize("name", [*dict(text_models()), "llava", "gemma3"])
@pytest.mark.parametrize("how", ["a cache", "a padding mask"])
def test_packed_rows_that_transformers_joins_are_refused(name, how):
    """By default there is a cache, and then it does not look for documents: no silent mixing."""
    if name in zoo.CASES:
        model = zoo.CASES[name].model()
        joined, _ = packed(zoo.CASES[name], model)
    else:
        model = transformers.AutoModelForCausalLM.from_config(dict(text_models())[name]).eval()
        position = torch.cat([torch.arange(8), torch.arange(12)])[None]
        joined = {"input_ids": torch.randint(3, 90, (1, 20)), "position_ids": position}
    model.set_attn_implementation("croc")
    options = {"use_cache": True}
    if (name, how) == ("gemma3", "a cache"):  # its mask is made before its cache
        apart = model(**joined, use_cache=False).logits
        torch.testing.assert_close(model(**joined, **options).logits, apart, rtol=0, atol=0)
        return
    if how == "a padding mask":
        options = {"use_cache": False, "attention_mask": torch.ones_like(joined["input_ids"])}
    with pytest.raises(RuntimeError, match="packed rows need use_cache=False"):
        model(**joined, **options)
