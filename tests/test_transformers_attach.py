"""The stage on every family: it trains, nothing leaks, the masks are the recipe's."""

import pytest
import torch
import transformers
import transformers_zoo as zoo
from transformers_packed import packed
from transformers_stage import RECIPES, Record, attached, visible

from croc_kernels.integrations.families import visual_positions
from croc_kernels.integrations.recipe_mask import image_spans


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", zoo.cases())
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


@pytest.mark.parametrize("case", zoo.cases("llava", "qwen3_vl"))
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


@pytest.mark.parametrize("case", zoo.cases("paligemma"))
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


@pytest.mark.parametrize("recipe", ["croc", "croc-released"])
@pytest.mark.parametrize("name", ["gemma3", "gemma4", "paligemma", "paligemma2"])
def test_token_types_are_not_needed(name, recipe):
    """The recipe's masks follow from where the images are."""
    model = attached(zoo.CASES[name], recipe, mask_ratio=1.0)
    inputs = zoo.batch(zoo.CASES[name], model)
    without = {n: value for n, value in inputs.items() if not n.endswith("token_type_ids")}
    assert len(without) < len(inputs)
    try:
        loss = model(**without).loss
    except ValueError as error:  # Gemma 3 and PaliGemma of some versions, in training
        if "token_type_ids` is required" not in str(error):
            raise
        pytest.skip(f"transformers itself wants them: {error}")
    assert torch.equal(model(**inputs).loss, loss)


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
@pytest.mark.parametrize("case", zoo.cases("gemma3"))
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


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", zoo.cases("llava"))
def test_packed_rows_equal_separate_rows(case, recipe):
    """With labels, which end the prefix of each document in croc-released."""
    model = attached(case, recipe).eval()
    if recipe == "victor":  # the model's own attention; stock has its faults
        if case.name.startswith("paligemma") and transformers.__version__.startswith("4."):
            pytest.skip("transformers 4.57 makes PaliGemma's mask without documents")
        model.set_attn_implementation({"text_config": "croc"})
    joined, rows = packed(case, model)
    together = model(**joined, use_cache=False).logits[0]
    apart = torch.cat([model(**row).logits[0] for row in rows])
    torch.testing.assert_close(together, apart, rtol=0, atol=5e-6)


def test_packed_rows_need_no_use_cache():
    """In training there is none unless asked for, so the model's own mask (victor) has documents
    too: the second document's loss is that of the document by itself.
    """
    model = attached(zoo.CASES["llava"], "victor")
    text = torch.randint(3, 80, (1, 20))
    position = torch.cat([torch.arange(8), torch.arange(12)])[None]
    labels = text.masked_fill(torch.arange(20) <= 8, -100)
    together = model(input_ids=text, labels=labels, position_ids=position)
    apart = model(input_ids=text[:, 8:], labels=text[:, 8:])
    torch.testing.assert_close(together.loss, apart.loss)
    joined = model(input_ids=text, labels=labels, position_ids=position, use_cache=True)
    assert (joined.loss - apart.loss).abs() > 1e-4


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
