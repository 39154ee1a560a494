"""Loss curves of the package against tests/plain_croc.py: 20 steps of each recipe, equal to 1e-5.

Both sides start from the same weights and see the same masks: the drawn mask is handed over as
data, nothing else is.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from plain_croc import IGNORED, IMAGE, PlainConfig, PlainCroc, PlainSample
from torch import Tensor

import croc_kernels as ck
from croc_kernels.integrations import transformers as croc

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = ("croc", "croc-released", "victor")
STEPS = 20
VOCABULARY, VISION, HIDDEN, HEADS, KEY_HEADS, LAYERS, POOL = 20, 12, 32, 4, 2, 2, 24


def plain_names(layer: ck.CrocLayer) -> dict[str, Tensor]:
    """The layer's parameters under the plain implementation's names."""
    names = {"pool": layer.pool}
    if layer.recipe.name != "croc-released":
        return names | {"head.weight": layer.head.weight, "head.bias": layer.head.bias}
    block = layer.head.layer
    names["head.position"] = layer.head.position.weight
    for i, part in enumerate("qkv"):
        rows = slice(i * HIDDEN, (i + 1) * HIDDEN)
        names[f"head.{part}.weight"] = block.self_attn.in_proj_weight[rows]
        names[f"head.{part}.bias"] = block.self_attn.in_proj_bias[rows]
    modules = {
        "o": block.self_attn.out_proj,
        "norm1": block.norm1,
        "up": block.linear1,
        "down": block.linear2,
        "norm2": block.norm2,
        "out": layer.head.output,
    }
    for name, module in modules.items():
        names[f"head.{name}.weight"], names[f"head.{name}.bias"] = module.weight, module.bias
    return names


def as_plain(names: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in names.items()}


def random_weights(generator: torch.Generator) -> dict[str, Tensor]:
    """Projector, embedding and decoder."""
    inner, kv = 3 * HIDDEN, HIDDEN // HEADS * KEY_HEADS
    shapes = {
        "projector.0.weight": (HIDDEN, VISION),
        "projector.0.bias": (HIDDEN,),
        "projector.1.weight": (HIDDEN, HIDDEN),
        "projector.1.bias": (HIDDEN,),
        "embedding": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for n in range(LAYERS):
        shapes |= {
            f"layers.{n}.q.weight": (HIDDEN, HIDDEN),
            f"layers.{n}.k.weight": (kv, HIDDEN),
            f"layers.{n}.v.weight": (kv, HIDDEN),
            f"layers.{n}.o.weight": (HIDDEN, HIDDEN),
            f"layers.{n}.gate.weight": (inner, HIDDEN),
            f"layers.{n}.up.weight": (inner, HIDDEN),
            f"layers.{n}.down.weight": (HIDDEN, inner),
        }
    weights = {n: 0.15 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    for name in ("norm", *(f"layers.{n}.norm{i}" for n in range(LAYERS) for i in (1, 2))):
        weights[name] = torch.ones(HIDDEN)
    return {name: value.requires_grad_() for name, value in weights.items()}


def sample(parts: list[int], answer: int, generator: torch.Generator) -> PlainSample:
    """Text of ``-part`` tokens and images of ``part`` tokens in turn, then a supervised answer."""
    ids, images = [], []
    for part in parts:
        if part < 0:
            ids += torch.randint(VOCABULARY, (-part,), generator=generator).tolist()
        else:
            ids += [IMAGE] * part
            images.append(torch.randn(part, VISION, generator=generator))
    labels = [IGNORED] * len(ids)
    text = torch.randint(VOCABULARY, (answer,), generator=generator).tolist()
    return PlainSample(ids + text, labels + text, images)


def batches(generator: torch.Generator) -> list[list[PlainSample]]:
    """Two images in one sample, a sample without one, images of several sizes, a batch of one."""
    layouts = [
        [([-2, 9, -1], 4), ([-1, 6, -2, 9], 3), ([-5], 3)],
        [([9, -3], 5), ([-1, 5], 2)],
        [([-2, 12, -1, 4], 4)],
    ]
    return [[sample(*layout, generator) for layout in batch] for batch in layouts]


class PackageModel:
    """A Llama whose stage and attention are the package's."""

    def __init__(self, weights: dict[str, Tensor], layer: ck.CrocLayer):
        self.weights, self.layer = weights, layer

    def attention(self, x: Tensor, mask: ck.MixedMask, name: str) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            F.linear(x, self.weights[f"{name}.{part}.weight"])
            .view(batch, length, -1, HIDDEN // HEADS)
            .transpose(1, 2)
            for part in "qkv"
        )
        out = ck.mixed_attention(self.rotate(q), self.rotate(k), v, mask)
        return F.linear(
            out.transpose(1, 2).reshape(batch, length, -1), self.weights[f"{name}.o.weight"]
        )

    @staticmethod
    def rotate(x: Tensor) -> Tensor:
        dim = x.shape[-1]
        frequency = 1.0 / 10000.0 ** (torch.arange(0, dim, 2) / dim)
        angle = torch.outer(torch.arange(x.shape[2]).float(), frequency).repeat(1, 2)
        turned = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), dim=-1)
        return x * angle.cos() + turned * angle.sin()

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (HIDDEN,), self.weights[name], 1e-6)

    def decode(self, x: Tensor, mask: ck.MixedMask) -> Tensor:
        for n in range(LAYERS):
            name = f"layers.{n}"
            x = x + self.attention(self.norm(x, f"{name}.norm1"), mask, name)
            y = self.norm(x, f"{name}.norm2")
            gate = F.silu(F.linear(y, self.weights[f"{name}.gate.weight"]))
            y = gate * F.linear(y, self.weights[f"{name}.up.weight"])
            x = x + F.linear(y, self.weights[f"{name}.down.weight"])
        return self.norm(x, "norm")

    def losses(self, samples: list[PlainSample]) -> tuple[Tensor, Tensor, list[list[bool]]]:
        weights = self.weights
        rows = torch.nn.utils.rnn.pad_sequence
        ids = rows([torch.tensor(s.ids) for s in samples], True, 0)
        labels = rows([torch.tensor(s.labels) for s in samples], True, IGNORED)
        kept = rows([torch.ones(len(s.ids)) for s in samples], True, 0).bool()
        is_visual = ids == IMAGE
        images = [image for s in samples for image in s.images]
        lengths = [len(image) for image in images]
        x = F.gelu(
            F.linear(torch.cat(images), weights["projector.0.weight"], weights["projector.0.bias"])
        )
        features = F.linear(x, weights["projector.1.weight"], weights["projector.1.bias"])
        replacement = self.layer.replace(features, lengths)
        embeddings = F.embedding(ids.clamp(min=0), weights["embedding"])
        embeddings = embeddings.masked_scatter(is_visual[..., None], replacement.embeddings)
        mask = self.layer.mask(is_visual, attention_mask=kept, labels=labels)
        hidden = self.decode(embeddings, mask)
        reconstruction = self.layer.loss(hidden[is_visual], replacement)
        logits = F.linear(hidden, weights["lm_head.weight"])
        caption = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return caption, reconstruction, [m.tolist() for m in replacement.masked.split(lengths)]


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Adam would turn rounding noise in a gradient of 1e-8 into a step of full size."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def assert_same_curves(
    run: Callable[[Any], tuple[Tensor, Tensor, list[list[bool]]]],
    plain: PlainCroc,
    optimizers: list[torch.optim.Optimizer],
    steps: list[Any],
    samples_of: Callable[[Any], list[PlainSample]],
) -> None:
    """Train both sides on ``steps`` in turn; ``run`` does the package's forward and backward."""
    curve = []
    for number in range(STEPS):
        step = steps[number % len(steps)]
        caption, reconstruction, masked = run(step)
        plain_caption, plain_reconstruction = plain.losses(samples_of(step), masked)
        (plain_caption + 10.0 * plain_reconstruction).backward()
        assert abs(caption.item() - plain_caption.item()) < 1e-5, number
        assert abs(reconstruction.item() - plain_reconstruction.item()) < 1e-5, number
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        curve.append((caption.item(), reconstruction.item()))
    first, last = curve[: len(steps)], curve[-len(steps) :]
    for i in range(2):
        assert sum(x[i] for x in last) < 0.9 * sum(x[i] for x in first)


@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_curves_equal_the_plain_implementation(recipe: str) -> None:
    generator = torch.Generator().manual_seed(7)
    data, weights = batches(generator), random_weights(generator)
    torch.manual_seed(11)
    layer = ck.CrocLayer(HIDDEN, POOL, recipe, num_positions=16)
    # Dropout of the released head can't be shared; everything else of training mode stays.
    layer.head.eval()
    package = PackageModel(weights, layer)
    plain_weights = as_plain(weights | plain_names(layer))
    plain = PlainCroc(PlainConfig(recipe, HIDDEN, HEADS, KEY_HEADS, LAYERS), plain_weights)

    def run(samples: list[PlainSample]) -> tuple[Tensor, Tensor, list[list[bool]]]:
        caption, reconstruction, masked = package.losses(samples)
        (caption + layer.loss_weight * reconstruction).backward()
        return caption, reconstruction, masked

    optimizers = [sgd([*weights.values(), *layer.parameters()]), sgd(plain_weights.values())]
    assert_same_curves(run, plain, optimizers, data, samples_of=lambda samples: samples)


# --- the same through transformers ---------------------------------------------------------------

IMAGE_ID = VOCABULARY
PATCHES = 9


def tiny_llava() -> transformers.LlavaForConditionalGeneration:
    vision = transformers.CLIPVisionConfig(
        hidden_size=VISION,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )
    text = transformers.LlamaConfig(
        vocab_size=VOCABULARY + 1,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        initializer_range=0.15,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=PATCHES
    )
    return transformers.LlavaForConditionalGeneration(config)


def llava_names(model: transformers.LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """Projector, embedding and decoder under the plain implementation's names."""
    projector, text = model.model.multi_modal_projector, model.model.language_model
    names = {
        "projector.0.weight": projector.linear_1.weight,
        "projector.0.bias": projector.linear_1.bias,
        "projector.1.weight": projector.linear_2.weight,
        "projector.1.bias": projector.linear_2.bias,
        "embedding": text.embed_tokens.weight,
        "lm_head.weight": model.lm_head.weight,
        "norm": text.norm.weight,
    }
    for n, layer in enumerate(text.layers):
        for part in "qkvo":
            names[f"layers.{n}.{part}.weight"] = getattr(layer.self_attn, f"{part}_proj").weight
        for part in ("gate", "up", "down"):
            names[f"layers.{n}.{part}.weight"] = getattr(layer.mlp, f"{part}_proj").weight
        names[f"layers.{n}.norm1"] = layer.input_layernorm.weight
        names[f"layers.{n}.norm2"] = layer.post_attention_layernorm.weight
    return names


def llava_batch(
    model: transformers.LlavaForConditionalGeneration,
    layouts: list[tuple[list[int], int]],
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], list[PlainSample]]:
    """One micro-batch as the model takes it, and as the plain implementation does."""
    samples = [sample(*layout, generator) for layout in layouts]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(s.ids) for s in samples], True, 0)
    inputs = {
        "input_ids": ids.masked_fill(ids == IMAGE, IMAGE_ID),
        "labels": pad([torch.tensor(s.labels) for s in samples], True, IGNORED),
        "attention_mask": pad([torch.ones(len(s.ids), dtype=torch.long) for s in samples], True, 0),
    }
    count = sum(len(s.images) for s in samples)
    if count:
        pixels = torch.randn(count, 3, 12, 12, generator=generator)
        with torch.no_grad():
            tower = model.model.vision_tower(pixels, output_hidden_states=True)
        # LLaVA takes the layer before the last, without the class token.
        seen = iter(tower.hidden_states[-2][:, 1:])
        samples = [PlainSample(s.ids, s.labels, [next(seen) for _ in s.images]) for s in samples]
        inputs["pixel_values"] = pixels
    return inputs, samples


@pytest.mark.parametrize("recipe", RECIPES)
def test_llava_loss_curves_equal_the_plain_implementation(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(11)
    model = tiny_llava()
    model.model.vision_tower.requires_grad_(False)
    layer = croc.attach(model, recipe, pool_size=POOL, num_positions=16)
    model.train()
    # Dropout of the released head can't be shared; everything else of training mode stays.
    layer.head.eval()
    generator = torch.Generator().manual_seed(7)
    layouts = [
        [[([-2, 9, -1], 4), ([-1, 9, -2, 9], 3), ([-5], 3)]],
        # An optimizer step of three micro-batches, one without images: the losses are means over
        # the step.
        [[([9, -3], 5), ([-1, 9], 2)], [([-4], 2)], [([-3, 9, -1, 9, -1], 6)]],
    ]
    steps = [[llava_batch(model, batch, generator) for batch in step] for step in layouts]
    plain_weights = as_plain(llava_names(model) | plain_names(layer))
    plain = PlainCroc(PlainConfig(recipe, HIDDEN, HEADS, KEY_HEADS, LAYERS), plain_weights)
    drawn = []
    replace = layer.replace

    def recording(*args: Any, **kwargs: Any) -> Any:
        replacement = replace(*args, **kwargs)
        drawn.extend(m.tolist() for m in replacement.masked.split(list(replacement.lengths)))
        return replacement

    monkeypatch.setattr(layer, "replace", recording)

    def run(step: list[Any]) -> tuple[Tensor, Tensor, list[list[bool]]]:
        drawn.clear()
        labels = sum(int((inputs["labels"][:, 1:] != IGNORED).sum()) for inputs, _ in step)
        images = [PATCHES for _, samples in step for s in samples for _ in s.images]
        totals = {
            "num_items_in_batch": torch.tensor(labels),
            "num_masked_in_batch": layer.num_loss_tokens(images),
        }
        caption, reconstruction = torch.zeros(()), torch.zeros(())
        for inputs, _ in step:
            output = model(**inputs, **totals)
            output.loss.backward()
            caption += output["caption_loss"]
            reconstruction += output["reconstruction_loss"]
        return caption, reconstruction, list(drawn)

    optimizers = [
        sgd(p for p in model.parameters() if p.requires_grad),
        sgd(plain_weights.values()),
    ]
    assert_same_curves(
        run, plain, optimizers, steps, lambda step: [s for _, samples in step for s in samples]
    )
