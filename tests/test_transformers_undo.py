"""Detach, report, copies, saving and loading; what is refused."""

import copy
import inspect
import os
import subprocess
import sys

import pytest
import torch
import transformers
import transformers_zoo as zoo
from model_snapshot import snapshot
from transformers_stage import RECIPES, attached

from croc_kernels import CrocLayer
from croc_kernels.integrations import transformers as croc


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", zoo.cases("llava", "llava_next"))
def test_detach_restores_the_instance(case, recipe):
    zoo.needs(case)
    model = case.model()
    inputs = zoo.batch(case, model)
    expected = model(**inputs)
    before = snapshot(model)
    for _ in range(2):
        layer = croc.attach(model, recipe, pool_size=24, num_heads=2)
        model.train()
        model(**inputs)
        with pytest.raises(ValueError, match="pixel_values_videos"):
            model(**inputs, pixel_values_videos=torch.zeros(1))
        assert croc.detach(model.eval()) is layer
    after = snapshot(model)
    for name, attributes in before[0].items():
        assert after[0][name] == attributes, name
    assert after[:2] == before[:2]
    assert after[2].keys() == before[2].keys()
    assert all(torch.equal(after[2][name], value) for name, value in before[2].items())
    assert torch.equal(model(**inputs).logits, expected.logits)


def test_report_names_every_change():
    case = zoo.CASES["llava"]
    model = case.model()
    before = set(model.__dict__), set(model.model.__dict__)
    croc.attach(model, pool_size=24)
    text = "\n".join(croc.report(model))
    changed = (set(model.__dict__) - before[0]) | (set(model.model.__dict__) - before[1])
    assert changed == {"forward", "get_image_features", "_croc_attachment"}
    for word in (
        "LlavaForConditionalGeneration.croc", "LlavaForConditionalGeneration.forward",
        "LlavaModel.get_image_features", "LlamaModel: forward pre-hook",
        "LlamaModel: forward hook", 'attn_implementation "sdpa" -> "croc"', "config.croc",
        "register()",
    ):  # fmt: skip
        assert word in text, word


def test_other_instances_are_not_touched():
    case = zoo.CASES["llava"]
    other = case.model()
    before = snapshot(other)
    attached(case)
    assert snapshot(other)[:2] == before[:2]


def test_a_deep_copy_has_its_own_layer():
    case = zoo.CASES["llava"]
    model = attached(case)
    clone = copy.deepcopy(model)
    inputs = zoo.batch(case, model)
    with torch.no_grad():
        clone.croc.pool.zero_()
    clone(**inputs).loss.backward()
    assert model.croc.pool.grad is None
    assert model.model.multi_modal_projector.linear_1.weight.grad is None
    assert clone.croc.pool.grad is not None
    croc.detach(clone)
    assert torch.isfinite(model(**inputs).loss)


def test_signatures_stay():
    case = zoo.CASES["llava"]
    plain, model = case.model(), attached(case)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", zoo.cases("llava"))
def test_save_and_load(case, recipe, tmp_path):
    model = attached(case, recipe, loss_weight=3.0).eval()
    inputs = zoo.batch(case, model)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = croc.from_pretrained(tmp_path)
    assert loaded.croc.recipe == model.croc.recipe
    assert loaded.croc.loss_weight == 3.0
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=1e-6)
    croc.detach(loaded)
    loaded.save_pretrained(tmp_path / "plain")
    plain, info = type(loaded).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not hasattr(plain.config, "croc")
    assert torch.isfinite(plain(**inputs).logits).all()


# A fork of a process that has imported transformers and nothing else, for every folder it is told.
STOCK = """
import os, sys, traceback

import torch
from transformers import AutoModelForImageTextToText


def check(folder):
    inputs, expected = torch.load(folder + "/expected.pt")
    model = AutoModelForImageTextToText.from_pretrained(
        folder + "/model", trust_remote_code=True, attn_implementation="eager"
    )
    assert type(model).__name__.startswith("Normalized")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert not any(m.split(".")[0] == "croc_kernels" for m in sys.modules)


for folder in map(str.strip, sys.stdin):
    child = os.fork()
    if child == 0:
        try:
            check(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print("status", os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", STOCK], env=environment, **pipes) as process:
        yield process


@pytest.mark.slow
@pytest.mark.parametrize("case", zoo.cases())
def test_export_needs_transformers_only(case, tmp_path, stock):
    model = attached(case, "victor").eval()
    inputs = zoo.batch(case, model)
    del inputs["labels"]
    # Newer transformers refuse "sdpa" for soft-capped models.
    model.config.get_text_config()._attn_implementation = "eager"
    croc.export(model, tmp_path / "model")
    torch.save((inputs, model(**inputs).logits), tmp_path / "expected.pt")
    print(tmp_path, file=stock.stdin, flush=True)
    assert stock.stdout.readline() == "status 0\n"
    assert torch.isfinite(model.train()(**zoo.batch(case, model)).loss)


def test_save_in_shards(tmp_path):
    model = attached(zoo.CASES["llava"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(croc.from_pretrained(tmp_path).croc.pool, model.croc.pool)


def test_loading_what_has_no_layer(tmp_path):
    zoo.CASES["llava"].model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have an entry 'croc'"):
        croc.from_pretrained(tmp_path)


def test_attaching_twice():
    model = attached(zoo.CASES["llava"])
    with pytest.raises(RuntimeError, match=r"must have no CrocLayer yet, got one; detach\(model\)"):
        croc.attach(model)


@pytest.mark.parametrize("function", [croc.detach, croc.report])
def test_nothing_to_detach(function):
    with pytest.raises(RuntimeError, match="must have a CrocLayer attached, got a plain one"):
        function(zoo.CASES["llava"].model())


def test_unknown_model_class():
    model = transformers.LlamaForCausalLM(zoo.llama())
    with pytest.raises(TypeError, match=r"must be one of Llava.*, got LlamaForCausalLM"):
        croc.attach(model)


def test_unknown_recipe_leaves_the_model_alone():
    model = zoo.CASES["llava"].model()
    before = snapshot(model)[:2]
    with pytest.raises(ValueError, match="recipe must be one of"):
        croc.attach(model, "croque")
    assert snapshot(model)[:2] == before


def test_attention_dropout():
    config = zoo.llava_config()
    config.text_config.attention_dropout = 0.1
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"attention_dropout of the text config must be 0.*0\.1"):
        croc.attach(model)
    assert isinstance(croc.attach(model, "victor", pool_size=24), CrocLayer)


def test_attention_switched_away():
    case = zoo.CASES["llava"]
    model = attached(case)
    inputs = zoo.batch(case, model)
    model.model.language_model.config._attn_implementation = "sdpa"
    with pytest.raises(
        RuntimeError, match='attn_implementation of the text config must stay "croc"'
    ):
        model(**inputs)
    model.model.language_model.config._attn_implementation = "croc"
    assert torch.isfinite(model(**inputs).loss)


def test_images_without_input_ids():
    case = zoo.CASES["llava"]
    model = attached(case)
    inputs = zoo.batch(case, model)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="input_ids must be given with images"):
        model(**inputs, inputs_embeds=embeddings)


def cache_names():
    """transformers 5.24 calls the argument ``cache``, and takes the old name too."""
    forward = transformers.LlavaForConditionalGeneration.forward
    new = ["cache"] if "cache" in inspect.signature(forward).parameters else []
    return ["past_key_values", *new]


@pytest.mark.parametrize("name", cache_names())
def test_images_behind_a_filled_cache(name):
    case = zoo.CASES["llava"]
    model = attached(case).eval()
    inputs = zoo.batch(case, model)
    cache = model(input_ids=inputs["input_ids"][:, :2] * 0 + 3, use_cache=True).past_key_values
    del inputs["attention_mask"]
    with pytest.raises(ValueError, match="images must come with the first tokens"):
        model(**inputs, **{name: cache})


@pytest.mark.parametrize("name", cache_names())
def test_foreign_cache(name):
    case = zoo.CASES["llava"]
    model = attached(case).eval()
    with pytest.raises(
        TypeError, match=r"past_key_values must be a transformers\.Cache, got tuple"
    ):
        model(**zoo.batch(case, model), **{name: ((torch.zeros(1),),)})


def test_dense_mask():
    case = zoo.CASES["llava"]
    model = attached(case)
    inputs = zoo.batch(case, model)
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(3, 1, length, length).tril().bool()
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, L\)"):
        model(**inputs)


def test_videos():
    case = zoo.CASES["llava_onevision"]
    model = attached(case)
    with pytest.raises(ValueError, match="pixel_values_videos must be None"):
        model(**zoo.batch(case, model), pixel_values_videos=torch.zeros(1))
