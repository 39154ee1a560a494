"""A tiny multimodal LLM with the token-reconstruction stage, written as plainly as it can be said.

The other side of the parity tests: loops over samples, heads and tokens, dense masks, SciPy's
assignment, torch's SmoothL1. Written from DESIGN.md and the published recipes; it shares no code
with the package and must not import it. The language model is a Llama (RMSNorm, rotary positions,
grouped keys, SwiGLU); the vision tower is frozen, so its output is data.
"""

import math
from dataclasses import dataclass

import scipy.optimize
import torch
from torch import Tensor

IGNORED = -100
IMAGE = -1


@dataclass
class PlainConfig:
    recipe: str
    hidden: int
    heads: int
    key_heads: int
    layers: int
    rms_eps: float = 1e-6
    rope_base: float = 10000.0


@dataclass
class PlainSample:
    """One conversation: ``ids`` holds IMAGE once per visual token; ``images`` their (T, V) tower
    output.
    """

    ids: list[int]
    labels: list[int]
    images: list[Tensor]


class PlainCroc:
    """``weights`` maps names to leaf tensors, as listed where they are used."""

    def __init__(self, config: PlainConfig, weights: dict[str, Tensor]):
        self.config = config
        self.weights = weights

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.weights[name + ".weight"].T
        return out + self.weights[name + ".bias"] if name + ".bias" in self.weights else out

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        return (
            self.weights[name]
            * x
            / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config.rms_eps)
        )

    def project(self, image: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.linear(image, "projector.0"))
        return self.linear(hidden, "projector.1")

    # --- the stage
    # -------------------------------------------------------------------------------------------

    def match(self, tokens: Tensor, masked: list[bool]) -> dict[int, int]:
        """Pool row of each masked token of one image."""
        pool = self.weights["pool"].detach()
        places = [t for t in range(len(masked)) if masked[t]]
        assert len(places) == math.ceil(0.75 * len(masked))
        cost = [[float(torch.dist(tokens[t].detach(), row)) for row in pool] for t in places]
        if self.config.recipe == "croc-released":
            return {t: row.index(min(row)) for t, row in zip(places, cost, strict=True)}
        rows, columns = scipy.optimize.linear_sum_assignment(cost)
        return {places[r]: int(c) for r, c in zip(rows, columns, strict=True)}

    def visible(self, sample: PlainSample) -> Tensor:
        """Dense (L, L) mask of one sample."""
        length = len(sample.ids)
        mask = torch.zeros(length, length, dtype=torch.bool)
        prefix = next((i for i, label in enumerate(sample.labels) if label != IGNORED), length)
        image_of = []
        current = 0
        for i, token in enumerate(sample.ids):
            if token == IMAGE and i > 0 and sample.ids[i - 1] != IMAGE:
                current += 1
            image_of.append(current if token == IMAGE else None)
        for i in range(length):
            for j in range(length):
                mask[i, j] = j <= i
                if self.config.recipe == "croc" and image_of[i] is not None:
                    mask[i, j] = mask[i, j] or image_of[i] == image_of[j]
                if self.config.recipe == "croc-released":
                    mask[i, j] = mask[i, j] or j < prefix
        return mask

    # --- the language model
    # ----------------------------------------------------------------------------------

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions of one head, (L, D)."""
        length, dim = x.shape
        half = dim // 2
        frequency = self.config.rope_base ** (-torch.arange(half, dtype=torch.float32) * 2 / dim)
        angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
        first, second = x[:, :half], x[:, half:]
        return torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ],
            dim=1,
        )

    def attention(self, x: Tensor, mask: Tensor, name: str) -> Tensor:
        heads, key_heads = self.config.heads, self.config.key_heads
        q, k, v = (self.linear(x, f"{name}.{part}") for part in "qkv")
        dim = q.shape[1] // heads
        out = []
        for h in range(heads):
            group = h // (heads // key_heads)
            query = self.rotate(q[:, h * dim : (h + 1) * dim])
            key = self.rotate(k[:, group * dim : (group + 1) * dim])
            score = query @ key.T / math.sqrt(dim)
            weight = score.masked_fill(~mask, -math.inf).softmax(-1)
            out.append(weight @ v[:, group * dim : (group + 1) * dim])
        return self.linear(torch.cat(out, dim=1), f"{name}.o")

    def decode(self, x: Tensor, mask: Tensor) -> Tensor:
        for n in range(self.config.layers):
            x = x + self.attention(self.rms_norm(x, f"layers.{n}.norm1"), mask, f"layers.{n}")
            y = self.rms_norm(x, f"layers.{n}.norm2")
            gate = torch.nn.functional.silu(self.linear(y, f"layers.{n}.gate"))
            x = x + self.linear(gate * self.linear(y, f"layers.{n}.up"), f"layers.{n}.down")
        return self.rms_norm(x, "norm")

    # --- the head
    # --------------------------------------------------------------------------------------------

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-12)
        return centred / spread * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def predict(self, hidden: Tensor) -> Tensor:
        """The head on one image's (T, C) hidden states."""
        if self.config.recipe != "croc-released":
            return self.linear(hidden, "head")
        x = hidden + self.weights["head.position"][: hidden.shape[0]]
        q, k, v = (self.linear(x, f"head.{part}") for part in "qkv")
        heads = max(1, self.config.hidden // 64)
        dim = self.config.hidden // heads
        mixed = []
        for h in range(heads):
            part = slice(h * dim, (h + 1) * dim)
            weight = (q[:, part] @ k[:, part].T / math.sqrt(dim)).softmax(-1)
            mixed.append(weight @ v[:, part])
        x = self.layer_norm(x + self.linear(torch.cat(mixed, dim=1), "head.o"), "head.norm1")
        inner = torch.nn.functional.gelu(self.linear(x, "head.up"))
        x = self.layer_norm(x + self.linear(inner, "head.down"), "head.norm2")
        return self.linear(x, "head.out")

    # --- one micro-batch
    # -------------------------------------------------------------------------------------

    def losses(self, samples: list[PlainSample], masked: list[list[bool]]) -> tuple[Tensor, Tensor]:
        """Caption and reconstruction loss; ``masked`` has one list of flags per image of the
        batch.
        """
        flags = iter(masked)
        logits, wanted, predicted, original = [], [], [], []
        for sample in samples:
            rows = [None if i == IMAGE else self.weights["embedding"][i] for i in sample.ids]
            free = iter([place for place, token in enumerate(sample.ids) if token == IMAGE])
            images = []
            for image in sample.images:
                chosen = next(flags)
                tokens = self.project(image)
                tokens = tokens / torch.sqrt((tokens * tokens).sum(-1, keepdim=True))
                matched = self.match(tokens, chosen)
                places = [next(free) for _ in chosen]
                for t, place in enumerate(places):
                    rows[place] = self.weights["pool"][matched[t]] if t in matched else tokens[t]
                images.append((places, chosen, tokens.detach()))
            hidden = self.decode(torch.stack(rows), self.visible(sample))
            for i in range(len(sample.ids) - 1):
                if sample.labels[i + 1] != IGNORED:
                    logits.append(self.linear(hidden[i], "lm_head"))
                    wanted.append(sample.labels[i + 1])
            for places, chosen, tokens in images:
                prediction = self.predict(hidden[places])
                for t in range(len(places)):
                    if chosen[t] or self.config.recipe != "croc":
                        predicted.append(prediction[t])
                        original.append(tokens[t])
        caption = torch.nn.functional.cross_entropy(torch.stack(logits), torch.tensor(wanted))
        reconstruction = torch.nn.functional.smooth_l1_loss(
            torch.stack(predicted), torch.stack(original), beta=0.01
        )
        return caption, reconstruction
