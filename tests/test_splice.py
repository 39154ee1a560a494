import random

import pytest
import torch

from croc_kernels.integrations.splice import splice_images


def plain_splice(input_ids, embeds, features, lengths, mask, labels, length, side):
    """Loops over samples and tokens; the lists say what stands at every new position."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows, image = [], 0
    where = {}
    for b in range(len(input_ids)):
        row, shown = [], False
        for t in range(len(input_ids[b])):
            if not mask[b][t]:
                continue
            if input_ids[b][t] == -200:
                shown = True
                for k in range(lengths[image]):
                    row.append((features[starts[image] + k], -100, image))
                    where[starts[image] + k] = (b, len(row) - 1)
                image += 1
            else:
                row.append((embeds[b][t], int(labels[b][t]), -1))
        image += 0 if shown else 1
        pad = [(torch.zeros_like(embeds[0][0]), -100, -1)] * (length - len(row))
        if side == "left":
            for key, (sample, at) in where.items():
                if sample == b:
                    where[key] = (b, at + len(pad))
        valid = [1] * len(row)
        row = row + pad if side == "right" else pad + row
        valid = valid + [0] * len(pad) if side == "right" else [0] * len(pad) + valid
        rows.append((row, valid))
    return rows, where


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("seed", range(25))
def test_splice_images_equals_plain_loops(seed, side):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, text, dim = rng.randint(1, 4), rng.randint(1, 7), 3
    input_ids = torch.randint(1, 50, (batch, text))
    mask = torch.rand(batch, text) < 0.8
    counts = []
    for b in range(batch):
        places = rng.sample(range(text), rng.randint(0, min(2, text)))
        input_ids[b, places] = -200
        counts.append(int(((input_ids[b] == -200) & mask[b]).sum()))
    lengths = [rng.randint(1, 5) for c in counts for _ in range(max(c, 1))]
    embeds = torch.randn(batch, text, dim, requires_grad=True)
    features = torch.randn(sum(lengths), dim, requires_grad=True)
    labels = torch.randint(0, 50, (batch, text))
    out = splice_images(
        input_ids, embeds, features, lengths, attention_mask=mask, labels=labels,
        images_per_sample=counts, padding_side=side,
    )  # fmt: skip
    length = out.inputs_embeds.shape[1]
    rows, where = plain_splice(input_ids, embeds, features, lengths, mask, labels, length, side)
    for b, (row, valid) in enumerate(rows):
        assert torch.equal(out.inputs_embeds[b], torch.stack([r[0] for r in row]))
        assert out.labels[b].tolist() == [r[1] for r in row]
        assert out.image_id[b].tolist() == [r[2] for r in row]
        assert out.attention_mask[b].tolist() == [bool(v) for v in valid]
        positions = [i for i, v in enumerate(valid) if v]
        assert out.position_ids[b, positions].tolist() == list(range(len(positions)))
    expected = [
        where[s][0] * length + where[s][1] if s in where else -1 for s in range(len(features))
    ]
    assert out.visual_index.tolist() == expected
    out.inputs_embeds.sum().backward()
    shown = torch.tensor([float(e >= 0) for e in expected])
    assert torch.equal(features.grad, shown[:, None].expand(-1, dim))


def test_splice_images_one_image_per_sample_needs_no_counts():
    input_ids = torch.tensor([[1, -200, 2], [3, 4, 5]])
    out = splice_images(input_ids, torch.zeros(2, 3, 2), torch.ones(8, 2), [4, 4])
    assert out.attention_mask.sum(1).tolist() == [6, 3]
    assert out.visual_index.tolist() == [1, 2, 3, 4, -1, -1, -1, -1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        pytest.param(
            {"lengths": [3]}, "lengths must sum to the rows of features, 4, got 3", id="sum"
        ),
        pytest.param({"lengths": [2, 2]}, "images_per_sample must be given unless", id="counts"),
        pytest.param(
            {"lengths": [2, 2], "images_per_sample": [1]},
            "images_per_sample must have one count per sample",
            id="wrong-counts",
        ),
        pytest.param({"lengths": [4], "padding_side": "top"}, "padding_side must be", id="side"),
        pytest.param(
            {"lengths": [2, 2], "images_per_sample": [2]},
            "input_ids must show 2 images",
            id="fewer",
        ),
    ],
)
def test_splice_images_refuses(kwargs, message):
    lengths = kwargs.pop("lengths")
    with pytest.raises(ValueError, match=message):
        splice_images(
            torch.tensor([[1, -200]]), torch.zeros(1, 2, 2), torch.zeros(4, 2), lengths, **kwargs
        )
