"""What the layer does to single pictures, caught during a forward pass: the material of the demo's
second plot.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layer import CrocLayer, Replacement
from .data import IMAGE_LENGTHS, NOTES, Collator, LlavaDataset


@dataclass(frozen=True)
class Probe:
    """One picture, T tokens, on the CPU.

    Attributes:
        pixels: (H, W, 3) in [0, 1], as the vision tower sees it.
        masked: (T,) bool.
        pool_index: (T,) int64, -1 where the token is kept.
        error: (T,) float32, mean absolute difference of prediction and target over the components.
        loss: the reconstruction loss of the picture.
    """

    pixels: Tensor
    masked: Tensor
    pool_index: Tensor
    error: Tensor
    loss: float


@contextmanager
def _caught(layer: CrocLayer) -> Iterator[dict]:
    """Keep the arguments and the result of the layer's next call of ``loss``."""
    caught: dict = {}
    original = layer.loss

    def loss(hidden: Tensor, replacement: Replacement, *args: object, **kwargs: object) -> Tensor:
        caught.update(hidden=hidden, replacement=replacement)
        return original(hidden, replacement, *args, **kwargs)

    layer.loss = loss
    try:
        yield caught
    finally:
        del layer.loss


def _predict(layer: CrocLayer, hidden: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return layer.head(hidden) if isinstance(layer.head, nn.Linear) else layer.head(hidden, lengths)


@torch.no_grad()
def probe_picture(
    model: PreTrainedModel, layer: CrocLayer, dataset: LlavaDataset, position: int, seed: int
) -> Probe:
    """Mask, match and reconstruct the (one) picture of a sample; the same seed masks the same
    tokens.

    The model keeps its mode and its generators their state.
    """
    sample = dataset[position]
    batch = Collator(0)([sample])
    for key in (IMAGE_LENGTHS, NOTES):
        del batch[key]
    device = layer.pool.device
    batch = {key: value.to(device) for key, value in batch.items()}
    was_training = model.training
    model.train()
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda), _caught(layer) as caught:
            torch.manual_seed(seed)
            loss = model(**batch)["reconstruction_loss"]
            replacement: Replacement = caught["replacement"]
            prediction = _predict(layer, caught["hidden"], replacement.lengths)
    finally:
        model.train(was_training)
    error = (prediction.float() - replacement.target.float()).abs().mean(-1)
    return Probe(
        pixels=_to_rgb(sample["pixel_values"][0], dataset.encoder.processor.image_processor),
        masked=replacement.masked.cpu(),
        pool_index=replacement.pool_index.cpu(),
        error=error.cpu(),
        loss=loss.item(),
    )


def _to_rgb(pixels: Tensor, image_processor: object) -> Tensor:
    mean, std = (torch.tensor(getattr(image_processor, f"image_{n}")) for n in ("mean", "std"))
    return (pixels * std[:, None, None] + mean[:, None, None]).clamp(0, 1).permute(1, 2, 0)
