"""Forward and backward of a LLaVA with the Croc stage, against the same stage of stock parts."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from croc_kernels.integrations import heads
from croc_kernels.layer import croc_layer, matching

from . import cases, peers
from .timing import Ceiling, Work, measure

IMAGE_TOKEN = 1


@functools.lru_cache(maxsize=1)
def _model(case: cases.Training, device: torch.device) -> nn.Module:
    """Random weights drawn on the device; the vision tower is small, for it is no part of this."""
    transformers = pytest.importorskip("transformers")
    from croc_kernels.integrations import transformers as croc

    side = 14 * round(case.image_tokens**0.5)
    vision = transformers.CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        image_size=side, patch_size=14,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        hidden_size=case.dim, intermediate_size=case.dim * 43 // 16, num_hidden_layers=case.layers,
        num_attention_heads=case.dim // 128, vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN,
        image_seq_length=case.image_tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = transformers.LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(previous)
    model.model.vision_tower.requires_grad_(False)
    croc.attach(model, pool_size=case.pool_size)
    return model.train()


def _batch(case: cases.Training, device: torch.device) -> dict[str, Tensor]:
    """A prompt, the image, and a caption to be learnt, in every sample."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 32000, (case.batch, case.length), generator=generator)
    image = slice(cases.FIRST_IMAGE, cases.FIRST_IMAGE + case.image_tokens)
    ids[:, image] = IMAGE_TOKEN
    labels = ids.clone()
    labels[:, : image.stop] = -100
    side = 14 * round(case.image_tokens**0.5)
    pixels = torch.randn(case.batch, 3, side, side, generator=generator)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {
        "input_ids": ids.to(device),
        "labels": labels.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels.to(device, dtype),
    }


def _stock_cost(tokens: Tensor, pool: Tensor, *, token_index: Tensor, **_: object) -> Tensor:
    """One cdist per image, of float32 copies."""
    return torch.stack([torch.cdist(tokens[i].float(), pool.float()) for i in token_index])


def _stock_assignment(cost: Tensor, **_: object) -> SimpleNamespace:
    index = torch.stack([peers.scipy_rows(c) for c in cost.cpu()]).to(cost.device)
    return SimpleNamespace(index=index, status=None)


def _stock_loss(
    prediction: Tensor, target: Tensor, where: Tensor, beta: float, **_: object
) -> Tensor:
    return F.smooth_l1_loss(prediction[where].float(), target[where].float(), beta=beta)


class _DenseAttention:
    """SDPA under the dense mask, which is built once per step and kept for all layers."""

    def __init__(self) -> None:
        self.start, self.dense = None, None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: object, **options: object) -> Tensor:
        # Every layer gets views of one tensor. It is kept, so that no later one has its address.
        if self.start is None or self.start.data_ptr() != mask.start.data_ptr():
            self.start, self.dense = mask.start, mask.to_dense()
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.dense, scale=options["scale"], enable_gqa=gqa
        )


@contextlib.contextmanager
def _stock_parts() -> Iterator[None]:
    """The stage with what one would write without this package, the released code's loops."""
    with contextlib.ExitStack() as stack:
        for module, name, part in (
            (matching, "token_cost", _stock_cost),
            (matching, "linear_assignment_ex", _stock_assignment),
            (croc_layer, "replace_tokens", peers.eager_replace),
            (croc_layer, "reconstruction_loss", _stock_loss),
            (heads, "mixed_attention", _DenseAttention()),
        ):
            stack.enter_context(mock.patch.object(module, name, part))
        yield


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.zero_grad(set_to_none=True)
    # The same masks in every call, and for both providers.
    torch.manual_seed(2)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


CROC = peers.Peer("croc", lambda: contextlib.nullcontext())
STOCK = peers.Peer("stock-parts", _stock_parts)


@pytest.mark.cases(cuda=cases.TRAINING_GPU, cpu=cases.TRAINING_CPU)
@pytest.mark.parametrize("peer", [CROC, STOCK], ids=lambda peer: peer.name)
def test_training_step(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Training,
    peer: peers.Peer,
) -> None:
    model, batch = _model(case, device), _batch(case, device)
    call: Callable[[], Tensor] = functools.partial(_step, model, batch)
    with _stock_parts():
        expected = call()
    with peer.prepare():
        error = ((call() - expected).abs() / expected).item()
        # Both compute in bf16 with other orders of summation, through all layers.
        assert peer is not CROC or error <= 1e-2, f"loss differs by {error:.1e} of itself"
        measure(
            benchmark, call, device, ceiling, Work(flops=case.flops()),
            op="training_step", case=case.name, provider=peer.name, direction="fwd+bwd",
            relative_difference=error,
        )  # fmt: skip
    model.zero_grad(set_to_none=True)
