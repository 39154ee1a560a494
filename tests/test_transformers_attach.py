"""attach, detach, report on tiny random models; the wide matrix is marked slow."""

import copy
import os
import subprocess
import sys

import pytest
import scipy.optimize
import torch
import transformers
import transformers_zoo as zoo
from torch.nn import functional

from croc_kernels import CrocLayer
from croc_kernels.integrations import transformers as croc
from croc_kernels.integrations.attention_interface import unpack_mask
from croc_kernels.integrations.families import visual_positions
from croc_kernels.integrations.recipe_mask import image_spans

RECIPES = ("croc", "croc-released", "victor")
FAST = ("llava",)


def cases(*fast):
    return [
        pytest.param(case, id=name, marks=() if name in fast else pytest.mark.slow)
        for name, case in zoo.CASES.items()
    ]


def attached(case, recipe="croc", **options):
    if case.missing:
        pytest.skip(case.missing)
    model = case.model()
    if recipe == "croc-released":
        options.setdefault("num_heads", 2)
    croc.attach(model, recipe, **{"pool_size": 24, **options})
    if recipe == "croc-released":
        model.croc.head.layer.dropout1.p = model.croc.head.layer.dropout2.p = 0.0
        model.croc.head.layer.self_attn.dropout = 0.0
    return model.train()


class Record:
    """What the layer replaced, and what mask and embeddings the language model got."""

    def __init__(self, model):
        self.replacements, self.masks, self.embeddings = [], [], []
        self.layer = model.croc
        replace = self.layer.replace

        def recorded(*args, **kwargs):
            self.replacements.append(replace(*args, **kwargs))
            return self.replacements[-1]

        self.layer.replace = recorded
        model.model.language_model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module, args, kwargs):
        self.masks.append(kwargs["attention_mask"])
        self.embeddings.append(kwargs["inputs_embeds"])

    def dense(self, kind=None):
        mask = self.masks[-1] if kind is None else self.masks[-1][kind]
        return unpack_mask(mask, self.embeddings[-1].shape[1]).to_dense()[:, 0]


# --- the whole stage against a plain rendition -------------------------------------------------


def visible(recipe, ids, labels, padding, lengths):
    """The recipe's mask by loops over one row; two images side by side stay two."""
    length = len(ids)
    image_of, remaining, number = [-1] * length, 0, -1
    for i, token in enumerate(ids):
        if token == zoo.IMAGE:
            if remaining == 0:
                number, remaining = number + 1, lengths.pop(0)
            image_of[i] = number
            remaining -= 1
    supervised = [i for i, label in enumerate(labels) if label != -100]
    prefix = supervised[0] if supervised else length
    dense = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            seen = j <= i
            if recipe == "croc":
                seen |= image_of[i] >= 0 and image_of[i] == image_of[j]
            elif recipe == "croc-released":
                seen |= j < prefix
            dense[i, j] = seen and padding[i] and padding[j]
    return dense


def plain_stage(model, layer, record, inputs, recipe):
    """Caption and reconstruction loss of a plain Llava, written with loops and a dense mask."""
    output = model.model.get_image_features(
        pixel_values=inputs["pixel_values"],
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    )
    images = list(getattr(output, "pooler_output", output))
    lengths = [image.shape[0] for image in images]
    tokens = torch.cat(images)
    tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    replacement = record.replacements[-1]
    shown = [
        layer.pool[row] if hidden else token
        for token, hidden, row in zip(
            tokens, replacement.masked, replacement.pool_index, strict=True
        )
    ]
    queue, sizes = list(shown), list(lengths)
    embedding, masks, rows = model.get_input_embeddings(), [], []
    for ids, labels, padding in zip(
        *(inputs[n].tolist() for n in ("input_ids", "labels", "attention_mask")), strict=True
    ):
        rows.append(
            torch.stack([queue.pop(0) if i == zoo.IMAGE else embedding.weight[i] for i in ids])
        )
        masks.append(visible(recipe, ids, labels, padding, sizes))
    dense = torch.stack(masks)[:, None]
    if recipe == "victor":
        record_dense = None
    else:
        record_dense = record.dense()
        assert torch.equal(record_dense, dense[:, 0])
    # A row that sees nothing has no softmax; its output is not looked at.
    open_rows = dense | (~dense.any(-1, keepdim=True))
    bias = torch.zeros(dense.shape).masked_fill(~open_rows, torch.finfo(torch.float32).min)
    hidden = model.model.language_model(
        inputs_embeds=torch.stack(rows), attention_mask=bias, use_cache=False
    )[0]
    logits = model.lm_head(hidden)
    caption = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100
    )
    at_images = hidden[inputs["input_ids"] == zoo.IMAGE]
    if recipe == "croc-released":
        prediction = torch.cat(
            [layer.head(part, (part.shape[0],)) for part in at_images.split(lengths)]
        )
    else:
        prediction = layer.head(at_images)
    where = replacement.masked if recipe == "croc" else torch.ones_like(replacement.masked)
    reconstruction = functional.smooth_l1_loss(prediction[where], tokens.detach()[where], beta=0.01)
    return caption, reconstruction


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_stage_equals_a_plain_rendition(recipe, side):
    case = zoo.CASES["llava"]
    model = attached(case, recipe)
    plain = case.model(attn_implementation="eager").train()
    inputs = zoo.batch(case, model, side=side, adjacent=True)
    record = Record(model)
    out = model(**inputs)
    out.loss.backward()
    plain.load_state_dict(model.state_dict(), strict=False)
    layer = copy.deepcopy(record.layer)
    layer.zero_grad()
    caption, reconstruction = plain_stage(plain, layer, record, inputs, recipe)
    (caption + 10 * reconstruction).backward()
    close = {"rtol": 1e-4, "atol": 2e-6}
    torch.testing.assert_close(out["caption_loss"], caption.detach(), **close)
    torch.testing.assert_close(out["reconstruction_loss"], reconstruction.detach(), **close)
    torch.testing.assert_close(out.loss, caption + 10 * reconstruction, **close)
    for name, parameter in plain.named_parameters():
        ours = model.get_parameter(name).grad
        assert (ours is None) == (parameter.grad is None), name
        if ours is not None:
            torch.testing.assert_close(ours, parameter.grad, **close, msg=name)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(
            model.croc.get_parameter(name).grad, parameter.grad, **close, msg=name
        )


def test_the_matching_is_optimal_per_image():
    case = zoo.CASES["llava"]
    model = attached(case)
    record = Record(model)
    model(**zoo.batch(case, model))
    replacement = record.replacements[-1]
    begin = 0
    for length in replacement.lengths:
        rows = slice(begin, begin + length)
        begin += length
        masked, index = replacement.masked[rows], replacement.pool_index[rows]
        assert int(masked.sum()) == -(-3 * length // 4)
        cost = torch.cdist(replacement.target[rows][masked].double(), model.croc.pool.double())
        best = cost[scipy.optimize.linear_sum_assignment(cost.detach())].sum()
        chosen = cost.gather(1, index[masked, None]).sum()
        assert len(set(index[masked].tolist())) == int(masked.sum())
        torch.testing.assert_close(chosen, best, rtol=1e-6, atol=0)


# --- every family --------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", cases())
def test_every_family_trains(case, recipe):
    model = attached(case, recipe)
    inputs = zoo.batch(case, model, side="left", adjacent=not case.wrap)
    out = model(**inputs)
    expected = out["caption_loss"] + 10 * out["reconstruction_loss"]
    torch.testing.assert_close(out.loss.detach(), expected)
    out.loss.backward()
    assert model.croc.pool.grad.norm() > 0
    trained = [p for n, p in model.named_parameters() if "projector" in n or "merger" in n]
    trained = trained or list(model.model.parameters())
    assert any(p.grad is not None and p.grad.norm() > 0 for p in trained)


@pytest.mark.parametrize("case", cases("llava", "qwen3_vl"))
def test_nothing_of_a_masked_image_leaks(case):
    """All tokens masked and all pool rows alike: the images can't matter any more."""
    model = attached(case, mask_ratio=1.0)
    with torch.no_grad():
        model.croc.pool.copy_(model.croc.pool[:1].expand_as(model.croc.pool))
    inputs = zoo.batch(case, model)
    other = inputs | {"pixel_values": torch.rand_like(inputs["pixel_values"])}
    valid = inputs["attention_mask"].bool()
    first, second = (model(**x) for x in (inputs, other))
    if case.name in ("llava_next", "llava_onevision"):
        assert (inputs["input_ids"] == zoo.IMAGE).any()
    torch.testing.assert_close(first.logits[valid], second.logits[valid], rtol=0, atol=1e-6)
    model.eval()
    first, second = (model(**x) for x in (inputs, other))
    assert (first.logits - second.logits)[valid].abs().max() > 1e-3


@pytest.mark.parametrize(
    "name", ["llava_next", pytest.param("llava_onevision", marks=pytest.mark.slow)]
)
def test_newline_rows_are_left_out(name):
    case = zoo.CASES[name]
    model = attached(case, mask_ratio=1.0)
    inputs = zoo.batch(case, model)
    record = Record(model)
    out = model(**inputs)
    newline = model.model.image_newline.detach()
    at_images = record.embeddings[-1][inputs["input_ids"] == zoo.IMAGE]
    kept = (at_images == newline).all(-1)
    replacement = record.replacements[-1]
    assert 0 < int(kept.sum()) == at_images.shape[0] - sum(replacement.lengths)
    assert not (at_images[~kept] == newline).all(-1).any()
    torch.testing.assert_close(at_images[~kept], replacement.embeddings)
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("case", cases("paligemma"))
def test_language_model_sees_features_of_norm_one(case):
    """Whatever the family multiplies its inputs by: the pool and the features are on one scale."""
    model = attached(case).eval()
    inputs = zoo.batch(case, model)
    record = Record(model)
    model(**inputs)
    at_images = record.embeddings[-1][inputs["input_ids"] == zoo.IMAGE]
    norms = at_images.norm(dim=-1) * model._croc_attachment.scale
    if case.name in ("llava_next", "llava_onevision"):
        newline = (at_images == model.model.image_newline).all(-1)
        norms = norms[~newline]
    torch.testing.assert_close(norms, torch.ones_like(norms))


def by_loops(recipe, case, inputs, lengths, window):
    sizes = list(lengths)
    dense = torch.stack(
        [
            visible(recipe, ids, labels, padding, sizes)
            for ids, labels, padding in zip(
                *(inputs[n].tolist() for n in ("input_ids", "labels", "attention_mask")),
                strict=True,
            )
        ]
    )
    if window is not None:
        place = torch.arange(dense.shape[1])
        dense &= place[None, :] > place[:, None] - window
    return dense


@pytest.mark.parametrize("recipe", ["croc", "croc-released"])
@pytest.mark.parametrize("case", cases("gemma3"))
def test_masks_of_full_and_sliding_layers(case, recipe):
    model = attached(case, recipe)
    # In InternVL tiles side by side are one image: there two images need something between them.
    adjacent = not case.wrap and case.name != "internvl"
    inputs = zoo.batch(case, model, side="left", adjacent=adjacent)
    record = Record(model)
    model(**inputs)
    lengths = zoo.image_lengths(model, case.pixels(3))
    if isinstance(record.masks[-1], dict):
        assert set(record.masks[-1]) == {"full_attention", "sliding_attention"}
        window = model.config.get_text_config().sliding_window
        windows = {"full_attention": None, "sliding_attention": window}
    else:
        windows = {None: None}
    for kind, window in windows.items():
        expected = by_loops(recipe, case, inputs, lengths, window)
        assert torch.equal(record.dense(kind), expected)


def test_tiles_side_by_side_are_one_image():
    case = zoo.CASES["internvl"]
    model = attached(case)
    inputs = zoo.batch(case, model, adjacent=True)
    record = Record(model)
    model(**inputs)
    image = (inputs["input_ids"][0] == zoo.IMAGE).nonzero()[:, 0]
    assert image.numel() == 8
    assert record.dense()[0][image][:, image].all()


def test_image_spans_of_equal_and_ragged_lengths():
    ids = torch.tensor([[1, 9, 9, 9, 9, 2], [9, 9, 1, 1, 9, 9]]) == 9
    assert visual_positions(ids, 8).tolist() == [1, 2, 3, 4, 6, 7, 10, 11]
    spans = image_spans(visual_positions(ids, 8), [2, 2, 2, 2], 6)
    assert spans.tolist() == [[0, 1, 3], [0, 3, 5], [1, 0, 2], [1, 4, 6]]
    spans = image_spans(visual_positions(ids, 8), [1, 3, 0, 2, 2], 6)
    assert spans.tolist() == [[0, 1, 2], [0, 2, 5], [1, 0, 2], [1, 4, 6]]


def test_packed_rows():
    case = zoo.CASES["llava"]
    model = attached(case)
    image = [zoo.IMAGE] * 4
    ids = torch.tensor([[3, *image, 5, 6, 7, *image, *image, 8]])
    labels = torch.where(ids == zoo.IMAGE, -100, ids)
    position = torch.cat([torch.arange(7), torch.arange(10)])[None]
    record = Record(model)
    model(input_ids=ids, labels=labels, position_ids=position, **case.pixels(3))
    dense = record.dense()[0]
    assert not dense[7:, :7].any()
    assert not dense[:7, 7:].any()
    assert dense[8:12, 8:12].all()
    assert not dense[8:12, 12:].any()
    assert dense[12:16, 7:16].all()


# --- losses ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("recipe", ["croc", "victor"])
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


@pytest.mark.parametrize("reentrant", [False, True])
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
    torch._dynamo.reset()
    case = zoo.CASES["llava"]
    model = attached(case)
    inputs = zoo.batch(case, model)
    torch.manual_seed(5)
    plain = model(**inputs).loss
    torch.manual_seed(5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss
    torch.testing.assert_close(compiled, plain)


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


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", cases("llava"))
def test_generation_equals_recomputing_without_a_cache(case, recipe):
    model = attached(case, recipe).eval()
    prompt = zoo.prompts_only(zoo.batch(case, model))
    pixels = zoo.first_pixels(case, 2)
    special = [0, 2, zoo.IMAGE, zoo.VIDEO, zoo.VISION_START, zoo.VISION_END]
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": special}
    cached = model.generate(**prompt, **pixels, **options)
    if case.name == "llava":
        static = model.generate(**prompt, **pixels, **options, cache_implementation="static")
        assert torch.equal(static, cached)
    if recipe != "croc-released":
        # Its prefix is the prompt: a longer prompt is another prefix.
        if "token_type_ids" in prompt or "mm_token_type_ids" in prompt:
            return
        ids = prompt["input_ids"]
        for _ in range(4):
            logits = model(input_ids=ids, **pixels, use_cache=False).logits
            logits[..., special] = -torch.inf
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(ids, cached)


def test_the_prompt_is_read_with_the_recipes_mask():
    case = zoo.CASES["llava"]
    model = attached(case).eval()
    record = Record(model)
    prompt = zoo.prompts_only(zoo.batch(case, model))
    model.generate(**prompt, **zoo.first_pixels(case, 2), max_new_tokens=3, do_sample=False)
    first = unpack_mask(record.masks[0], prompt["input_ids"].shape[1]).to_dense()[0, 0]
    image = (prompt["input_ids"][0] == zoo.IMAGE).nonzero()[:4, 0]
    assert first[image][:, image].all()


# --- undoing, copying, saving ---------------------------------------------------------------------


def snapshot(model):
    """Everything detach has to restore."""
    modules = {}
    for name, module in model.named_modules():
        hooks = [len(getattr(module, k)) for k in module.__dict__ if k.endswith("_hooks")]
        plain = {k for k in module.__dict__ if not k.startswith("_previous")}
        modules[name] = (type(module), id(module), plain, hooks)
    configs = {
        name: (module.config.to_dict(), module.config._attn_implementation)
        for name, module in model.named_modules()
        if hasattr(module, "config")
    }
    state = {k: (id(v), v.clone()) for k, v in model.named_parameters()}
    return modules, configs, state


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", cases("llava", "llava_next"))
def test_detach_restores_the_instance(case, recipe):
    if case.missing:
        pytest.skip(case.missing)
    model = case.model()
    inputs = zoo.batch(case, model)
    before, expected = snapshot(model), model(**inputs)
    methods = {k: v for k, v in vars(type(model.model)).items() if callable(v)}
    layer = croc.attach(model, recipe, pool_size=24, num_heads=2)
    model.train()
    model(**inputs)
    assert croc.detach(model.eval()) is layer
    after = snapshot(model)
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert after[2].keys() == before[2].keys()
    assert {k: v for k, v in vars(type(model.model)).items() if callable(v)} == methods
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
    import inspect

    case = zoo.CASES["llava"]
    plain, model = case.model(), attached(case)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", cases("llava"))
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


@pytest.mark.slow
@pytest.mark.parametrize("case", cases())
def test_export_needs_transformers_only(case, tmp_path):
    model = attached(case, "victor").eval()
    inputs = zoo.batch(case, model)
    del inputs["labels"]
    model.config.get_text_config()._attn_implementation = "sdpa"
    croc.export(model, tmp_path / "model")
    torch.save((inputs, model(**inputs).logits), tmp_path / "expected.pt")
    program = (
        "import sys, torch\n"
        "from transformers import AutoModelForImageTextToText as Auto\n"
        "inputs, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "model = Auto.from_pretrained(sys.argv[1] + '/model', trust_remote_code=True)\n"
        "assert type(model).__name__.startswith('Normalized')\n"
        "with torch.no_grad():\n"
        "    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)\n"
        "assert not any(m.split('.')[0] == 'croc_kernels' for m in sys.modules)\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, check=True, env=environment)
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


# --- refusals -------------------------------------------------------------------------------------


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


def test_images_behind_a_filled_cache():
    case = zoo.CASES["llava"]
    model = attached(case).eval()
    inputs = zoo.batch(case, model)
    cache = model(input_ids=inputs["input_ids"][:, :2] * 0 + 3, use_cache=True).past_key_values
    del inputs["attention_mask"]
    with pytest.raises(ValueError, match="images must come with the first tokens"):
        model(**inputs, past_key_values=cache)


def test_foreign_cache():
    case = zoo.CASES["llava"]
    model = attached(case).eval()
    with pytest.raises(
        TypeError, match=r"past_key_values must be a transformers\.Cache, got tuple"
    ):
        model(**zoo.batch(case, model), past_key_values=((torch.zeros(1),),))


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
