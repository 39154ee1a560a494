import copy

import pytest
import torch
from llava_standins import IGNORE, IMAGE, build, plain_stage
from model_snapshot import snapshot
from torch import nn

from croc_kernels.integrations import llava

RECIPES = ["croc", "croc-released", "victor"]


def batch():
    """Two images in one sample (side by side), none in another, padding, and supervised answers."""
    torch.manual_seed(1)
    input_ids = torch.randint(1, 60, (3, 9))
    input_ids[0, 1] = input_ids[0, 2] = input_ids[2, 4] = IMAGE
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 7:] = False
    labels = input_ids.clone()
    labels[:, :5] = IGNORE
    labels[~mask] = IGNORE
    return input_ids, mask, labels, torch.randn(4, 3, 8, 8), [2, 0, 1]


def attach(model, recipe, **options):
    options = {"pool_size": 12, "num_positions": 8 if recipe == "croc-released" else None} | options
    layer = llava.attach(model, recipe, **options)
    if recipe == "croc-released":
        layer.head.layer.dropout1.p = layer.head.layer.dropout2.p = 0.0
        layer.head.layer.self_attn.dropout = 0.0
    return layer


def run(model, input_ids, mask, labels, images, shown):
    drawn = {}
    replace = model.croc.replace

    def remember(*args, **kwargs):
        drawn["replacement"] = replace(*args, **kwargs)
        return drawn["replacement"]

    model.croc.replace = remember
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        labels=labels,
        images=images,
        images_per_sample=shown,
    )
    model.croc.__dict__.pop("replace")
    return output, drawn["replacement"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_llava_attach_equals_plain_loops(recipe):
    model = build(recipe).train()
    plain = copy.deepcopy(model)
    layer = attach(model, recipe)
    input_ids, mask, labels, images, shown = batch()
    output, replacement = run(model, input_ids, mask, labels, images, shown)
    masked = replacement.masked.view(4, 4)
    assert masked.sum(1).tolist() == [3, 3, 3, 3]
    caption, reconstruction = plain_stage(
        plain, layer, recipe, input_ids, mask, labels, images, masked, shown
    )
    assert output["caption_loss"].item() == pytest.approx(caption.item(), rel=1e-5)
    assert output["reconstruction_loss"].item() == pytest.approx(reconstruction.item(), rel=1e-4)
    expected = caption + 10.0 * reconstruction
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    output.loss.backward()
    for name in ("model.embed_tokens.weight", "model.mm_projector.0.weight", "lm_head.weight"):
        ours, theirs = model.get_parameter(name).grad, plain.get_parameter(name).grad
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_llava_attach_generates_and_detach_restores(recipe):
    model = build(recipe).eval()
    before = snapshot(model)[:2]
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    layer = attach(model, recipe)
    if recipe != "croc":
        with torch.no_grad():
            layer.pool.add_(1.0)
    prompt = torch.tensor([[1, IMAGE, 5, 6]])
    out = model.generate(prompt, images=torch.randn(1, 3, 8, 8), max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 1
    assert 1 <= out.shape[1] <= 3
    with pytest.raises(RuntimeError, match="must not be attached yet"):
        llava.attach(model, recipe)
    llava.detach(model)
    assert snapshot(model)[:2] == before
    assert model.config._attn_implementation == "eager"
    pools = [name for name in parameters if "mask_token" in name or "token_pool" in name]
    for name, value in model.state_dict().items():
        expected = parameters[name] + 1.0 if name in pools else parameters[name]
        assert torch.equal(value, expected), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="must be attached"):
        llava.detach(model)


def test_llava_first_generated_token_equals_a_plain_forward():
    model = build("croc").eval()
    plain = copy.deepcopy(model)
    layer = attach(model, "croc")
    image, prompt = torch.randn(1, 3, 8, 8), torch.tensor([[1, IMAGE, 5, 6]])
    out = model.generate(
        prompt, images=image, max_new_tokens=1, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    features = nn.functional.normalize(
        plain.model.mm_projector(plain.get_vision_tower()(image)), dim=-1
    )
    text = plain.model.embed_tokens(prompt.clamp(min=0))
    embeds = torch.cat([text[:, :1], features, text[:, 2:]], 1)
    seen = torch.ones(7, 7).tril().bool()
    seen[1:5, 1:5] = True
    bias = torch.zeros(7, 7).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    logits = plain(inputs_embeds=embeds, attention_mask=bias).logits[0, -1]
    assert layer.recipe.name == "croc"
    assert torch.allclose(out.logits[0][0], logits, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_llava_prepare_gives_what_the_code_base_gives(recipe):
    model = build(recipe).train()
    attach(model, recipe)
    input_ids, mask, labels, images, shown = batch()
    results = model.prepare_inputs_labels_for_multimodal(
        input_ids, None, mask, None, labels, images, images_per_sample=shown
    )
    assert len(results) == (6 if recipe == "croc" else 9)
    ids, _, new_mask, _, embeds, new_labels = results[:6]
    assert ids is None
    assert embeds.shape[:2] == new_mask.shape == new_labels.shape
    assert new_mask.sum(1).tolist() == [7 + 8, 7, 8 + 4]
    assert (new_labels != IGNORE).sum() == (labels != IGNORE).sum()
    if recipe != "croc":
        targets, select, places = results[6:]
        assert places.sum(1).tolist() == [8, 0, 4]
        assert select.sum(1).tolist() == [6, 0, 3]
        assert not (select & ~places).any()
        norms = targets[places].norm(dim=-1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


def published_hidden(model, input_ids, mask, labels, images, shown):
    """Last hidden states of the released Croc: rows padded with zeros on the right, causal over
    valid keys, and then everything before the first label open to all rows, or, without a label,
    everything. Nothing is masked out.
    """
    tower = model.get_vision_tower()(images)
    features = nn.functional.normalize(model.model.mm_projector(tower), dim=-1)
    rows, targets, image = [], [], 0
    for b, ids in enumerate(input_ids):
        row, target, first = [], [], image
        image += max(shown[b], 1)
        for t in mask[b].nonzero().flatten().tolist():
            if ids[t] == IMAGE:
                row += list(features[first])
                target += [IGNORE] * features.shape[1]
                first += 1
            else:
                row.append(model.model.embed_tokens(ids[t]))
                target.append(int(labels[b, t]))
        rows.append(torch.stack(row))
        targets.append(target)
    length = max(map(len, rows))
    seen = torch.zeros(len(rows), length, length, dtype=torch.bool)
    for b, target in enumerate(targets):
        supervised = [i for i, y in enumerate(target) if y != IGNORE]
        prefix = supervised[0] if supervised else length
        for i in range(length):
            for j in range(length):
                seen[b, i, j] = (j <= i and j < len(target)) or j < prefix
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return model.model(inputs_embeds=padded, attention_mask=bias)[0], [len(t) for t in targets]


@pytest.mark.parametrize("exact", [False, True])
def test_llava_exact_parity_reproduces_the_published_mask(exact):
    """Padding included, which a sample without a label sees; by default it does not."""
    model = build("croc-released").train()
    input_ids, mask, labels, images, shown = batch()
    labels[1] = IGNORE
    expected, lengths = published_hidden(model, input_ids, mask, labels, images, shown)
    attach(model, "croc-released", exact_parity=exact, mask_ratio=0.0)
    hidden = {}
    model.model.norm.register_forward_hook(lambda m, a, out: hidden.update(out=out))
    model(
        input_ids=input_ids, attention_mask=mask, labels=labels, images=images,
        images_per_sample=shown,
    )  # fmt: skip
    found = hidden["out"][:, : expected.shape[1]]
    for b, length in enumerate(lengths):
        same = torch.allclose(found[b, :length], expected[b, :length], atol=1e-5)
        assert same == (exact or b != 1), b
    if exact:
        assert torch.allclose(found, expected, atol=1e-5)


def test_llava_text_only_batch_touches_every_parameter():
    model = build("croc").train()
    layer = attach(model, "croc")
    ids = torch.randint(1, 60, (2, 5))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert all((p.grad == 0).all() for p in layer.parameters())


def test_llava_never_cuts_an_image():
    model = build("croc").train()
    attach(model, "croc")
    input_ids, mask, labels, images, shown = batch()
    model.config.tokenizer_model_max_length = 8
    with pytest.raises(ValueError, match=r"tokenizer_model_max_length = 8, got samples \[0\]"):
        model(
            input_ids=input_ids, attention_mask=mask, labels=labels, images=images[:4],
            images_per_sample=shown,
        )  # fmt: skip
    model.config.tokenizer_model_max_length = 12
    model(
        input_ids=input_ids, attention_mask=mask, labels=labels, images=images,
        images_per_sample=shown,
    )  # fmt: skip


def test_llava_refusals():
    with pytest.raises(TypeError, match="of the LLaVA code bases, got Linear"):
        llava.attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="exact_parity must go with 'croc-released'"):
        llava.attach(build("croc"), "croc", exact_parity=True)
    model = build("croc")
    attach(model, "croc")
    model.config.mm_patch_merge_type = "spatial_unpad"
    with pytest.raises(ValueError, match="mm_patch_merge_type must be 'flat'"):
        model(input_ids=torch.tensor([[1, IMAGE]]), images=torch.randn(1, 3, 8, 8))
