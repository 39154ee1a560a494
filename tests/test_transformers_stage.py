"""The attached stage of Llava against a plain rendition with loops and a dense mask."""

import copy

import pytest
import scipy.optimize
import torch
import transformers_zoo as zoo
from torch.nn import functional
from transformers_stage import RECIPES, Record, attached, visible


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


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
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
