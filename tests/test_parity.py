"""Loss curves of the package against tests/plain_croc.py: 20 steps of each recipe, equal to 1e-5.

Both sides start from the same weights and see the same masks: the drawn mask is handed over as
data, nothing else is.
"""

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from plain_croc import IGNORED, IMAGE, PlainConfig, PlainCroc, PlainSample
from torch import Tensor

import croc_kernels as ck

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

    parameters = [*weights.values(), *layer.parameters()]
    optimizers = [sgd(parameters), sgd(plain_weights.values())]
    curve = []
    for step in range(STEPS):
        samples = data[step % len(data)]
        caption, reconstruction, masked = package.losses(samples)
        plain_caption, plain_reconstruction = plain.losses(samples, masked)
        assert abs(caption.item() - plain_caption.item()) < 1e-5, step
        assert abs(reconstruction.item() - plain_reconstruction.item()) < 1e-5, step
        (caption + layer.loss_weight * reconstruction).backward()
        (plain_caption + 10.0 * plain_reconstruction).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        curve.append((caption.item(), reconstruction.item()))
    first, last = curve[: len(data)], curve[-len(data) :]
    for i in range(2):
        assert sum(x[i] for x in last) < 0.9 * sum(x[i] for x in first)
