"""The random masks: what they depend on, what they don't, and how random they are."""

import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from test_layer import C, M, features_of, per_image
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import croc_kernels as ck
from croc_kernels.layer.matching import draw_order, draw_seed, hash_places

LENGTHS = (12, 5, 30)


def masked_by(layer: ck.CrocLayer, seed: int | None = None) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return layer.replace(features_of(LENGTHS), LENGTHS, generator=generator).masked


def test_draw_repeats_with_the_generator_and_differs_between_draws() -> None:
    layer = ck.CrocLayer(C, M)
    assert torch.equal(masked_by(layer, 3), masked_by(layer, 3))
    assert not torch.equal(masked_by(layer, 3), masked_by(layer, 4))
    generator = torch.Generator().manual_seed(3)
    first, second = (
        layer.replace(features_of(LENGTHS), LENGTHS, generator=generator).masked for _ in range(2)
    )
    assert not torch.equal(first, second)


def test_draw_does_not_depend_on_the_features() -> None:
    layer = ck.CrocLayer(C, M)
    masks = [
        layer.replace(
            features_of(LENGTHS, seed), LENGTHS, generator=torch.Generator().manual_seed(0)
        ).masked
        for seed in (1, 2)
    ]
    assert torch.equal(*masks)


def test_draw_resumes_from_the_default_generator_s_state() -> None:
    layer = ck.CrocLayer(C, M)
    masked_by(layer)
    state = torch.get_rng_state()
    expected = [masked_by(layer) for _ in range(3)]
    torch.manual_seed(99)
    torch.set_rng_state(state)
    assert all(torch.equal(masked_by(layer), mask) for mask in expected)


_RESTARTED = """
import sys

sys.path.insert(0, sys.argv[1])
import torch
from test_layer import C, M
from test_layer_draw import masked_by

import croc_kernels as ck

torch.manual_seed(21)
layer = ck.CrocLayer(C, M)
print(*(int(x) for _ in range(2) for x in masked_by(layer)), sep="")
"""


def test_draw_is_the_same_in_another_process() -> None:
    torch.manual_seed(21)
    layer = ck.CrocLayer(C, M)
    masks = torch.cat([masked_by(layer) for _ in range(2)])
    command = [sys.executable, "-c", _RESTARTED, str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.stdout.strip() == "".join(str(int(x)) for x in masks), result.stderr[-2000:]


def test_draw_takes_one_number_from_the_generator() -> None:
    layer, generator = ck.CrocLayer(C, M), torch.Generator().manual_seed(5)
    layer.replace(features_of(LENGTHS), LENGTHS, generator=generator)
    other = torch.Generator().manual_seed(5)
    torch.randint(2**63 - 1, (1,), generator=other)
    assert torch.equal(generator.get_state(), other.get_state())


@pytest.mark.parametrize("reentrant", [True, False])
def test_draw_is_the_same_on_recomputation(reentrant: bool) -> None:
    layer, seen = ck.CrocLayer(C, M), []

    def forward(features: Tensor) -> Tensor:
        replacement = layer.replace(features, LENGTHS)
        seen.append(replacement.masked)
        return replacement.embeddings

    features = features_of(LENGTHS).requires_grad_()
    # Stopping early would end the recomputation inside replace, before the mask is noted.
    with set_checkpoint_early_stop(False):
        out = checkpoint(forward, features, use_reentrant=reentrant)
    torch.rand(7)
    out.sum().backward()
    assert len(seen) == 2
    assert torch.equal(*seen)
    assert torch.equal(features.grad.any(1), ~seen[0])


def test_draw_differs_across_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ck.CrocLayer(C, M)
    alone = masked_by(layer, 3)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    masks = []
    for rank in range(8):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        masks.append(masked_by(layer, 3))
    assert torch.equal(masks[0], alone)
    assert len({tuple(mask.tolist()) for mask in masks}) == 8
    # Tensor-parallel ranks share their images, so they must share the mask.
    layer.mask_rank = 2
    assert torch.equal(masked_by(layer, 3), masks[2])


def test_draw_masks_tokens_evenly_and_independently() -> None:
    draws, length = 4000, 8
    generator = torch.Generator().manual_seed(1)
    seeds = [draw_seed(torch.device("cpu"), generator) for _ in range(draws)]
    order = draw_order([length] * (2 * draws), [2] * draws, seeds, 0)[:, :6]
    masks = torch.zeros(draws * 2 * length).index_fill_(0, order.reshape(-1), 1.0)
    masks = masks.view(draws, 2, length)
    deviation = math.sqrt(0.75 * 0.25 / draws)
    assert ((masks.mean(0) - 0.75).abs() < 4.5 * deviation).all()
    # Two tokens of one image: both masked in 6/8 * 5/7 of the draws; of different images: 9/16.
    flat = masks.view(draws, 16)
    together = flat.T @ flat / draws
    for i, j in product(range(16), repeat=2):
        if i != j:
            expected = 0.75 * 5 / 7 if i // 8 == j // 8 else 0.75**2
            limit = 5 * math.sqrt(expected * (1 - expected) / draws)
            assert abs(together[i, j].item() - expected) < limit
    # All 28 choices of the two kept tokens occur about equally often.
    code = ((1 - masks[:, 0]) * 2.0 ** torch.arange(length)).sum(1).long()
    counts = code.bincount(minlength=256)
    counts = counts[counts > 0].double()
    chi_square = ((counts - draws / 28) ** 2 / (draws / 28)).sum().item()
    assert len(counts) == 28
    assert chi_square < 60.0  # 27 degrees of freedom: exceeded with probability 3e-4


def test_hash_gives_distinct_keys_of_32_bits() -> None:
    place = torch.arange(1 << 16)
    for seed, rank in ((0, 0), (2**63 - 2, 0), (123456789, 3), (1 << 40, 2**20)):
        key = hash_places(place, torch.tensor([seed]), rank)
        assert key.unique().numel() == place.numel()
        assert key.min() >= 0
        assert key.max() < 2**32


def micro_batches() -> list[tuple[Tensor, tuple[int, ...]]]:
    groups = ((12, 5), (), (30,), (9, 9, 9), (0,))
    return [(features_of(lengths, seed), lengths) for seed, lengths in enumerate(groups)]


@pytest.mark.parametrize("recipe", ["croc", "croc-released"])
@pytest.mark.parametrize("rows", [pytest.param(M, id="distinct"), pytest.param(10, id="rounds")])
def test_match_ahead_equals_one_by_one(recipe: str, rows: int) -> None:
    layer = ck.CrocLayer(C, rows, recipe, allow_reuse=True)
    generator = torch.Generator().manual_seed(8)
    single = [layer.replace(x, n, generator=generator) for x, n in micro_batches()]
    generator.manual_seed(8)
    ahead = layer.match_ahead(micro_batches(), generator=generator)
    for (features, lengths), one, matching in zip(micro_batches(), single, ahead, strict=True):
        state = torch.get_rng_state()
        replacement = layer.replace(features, lengths, matching=matching)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(replacement.masked, one.masked)
        assert torch.equal(replacement.embeddings, one.embeddings)
        assert replacement.num_masked == one.num_masked
        assert replacement.lengths == lengths
        if rows >= 23:
            assert torch.equal(replacement.pool_index, one.pool_index)
        if one.status is not None:
            assert not replacement.status.any()


def test_match_ahead_of_nothing() -> None:
    assert ck.CrocLayer(C, M).match_ahead([]) == []


def test_match_ahead_refuses_other_images_and_too_many_tokens() -> None:
    layer = ck.CrocLayer(C, M)
    (matching,) = layer.match_ahead([(features_of((12,)), (12,))])
    message = r"matching must be of images with lengths \(6, 6\), got \(12,\)"
    with pytest.raises(ValueError, match=message):
        layer.replace(features_of((6, 6)), (6, 6), matching=matching)
    message = "CrocLayer.match_ahead: an image must have at most pool_size = 40 masked tokens"
    with pytest.raises(ValueError, match=message):
        layer.match_ahead([(features_of((12,)), (12,)), (features_of((80,)), (80,))])


def test_layer_draws_each_image_of_equal_ones_anew() -> None:
    masks = per_image(
        ck.CrocLayer(C, M).replace(features_of((30,) * 4), (30,) * 4).masked, (30,) * 4
    )
    assert len({tuple(mask.tolist()) for mask in masks}) == 4
