"""Small models with the interface of the LLaVA, Croc and ViCToR code, and their stage in loops.

Written from the contract: ids with -200 for an image, a dummy image for a sample without one, and
``prepare_inputs_labels_for_multimodal`` that gives six results (LLaVA) or nine (Croc, ViCToR).
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

IMAGE, IGNORE = -200, -100


class Tower(nn.Module):
    """Patches through one convolution: (n, 3, 8, 8) -> (n, 4, 16)."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)

    def forward(self, images):
        return self.patches(images).flatten(2).transpose(1, 2)


class ListTower(Tower):
    """ViCToR's towers give one tensor per image and take a grid."""

    def forward(self, images, grid=None):
        return list(super().forward(images))


class BertSelf(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))


class BertOutput(nn.Module):
    def __init__(self, inner, width):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)


class BertAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.self = BertSelf(width)
        self.output = BertOutput(width, width)


class BertBlock(nn.Module):
    """One BERT layer with the names of transformers' BertLayer and one head."""

    def __init__(self, width):
        super().__init__()
        self.attention = BertAttention(width)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(width, 4 * width)
        self.output = BertOutput(4 * width, width)

    def forward(self, x):
        own = self.attention.self
        scores = own.query(x) @ own.key(x).transpose(-1, -2) / x.shape[-1] ** 0.5
        attended = scores.softmax(-1) @ own.value(x)
        out = self.attention.output
        x = out.LayerNorm(out.dense(attended) + x)
        between = nn.functional.gelu(self.intermediate.dense(x))
        return self.output.LayerNorm(self.output.dense(between) + x)


class TransformBlock(nn.Module):
    def __init__(self, width, positions):
        super().__init__()
        self.position_embeddings = nn.Embedding(positions, width)
        self.layers = nn.ModuleList([BertBlock(width)])
        self.resize = nn.Linear(width, width)

    def forward(self, x):
        return self.resize(self.layers[0](x + self.position_embeddings.weight[: x.shape[1]]))


class LlavaStandIn(LlamaForCausalLM):
    """The contract alone; its prepare gives six results."""

    def __init__(self, config):
        super().__init__(config)
        self.model.vision_tower = Tower()
        self.model.mm_projector = nn.Sequential(
            nn.Linear(16, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return self.model.vision_tower

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        image_sizes=None,
    ):
        raise NotImplementedError("replaced by attach")


class CrocStandIn(LlavaStandIn):
    def __init__(self, config):
        super().__init__(config)
        self.model.mask_token = nn.Parameter(torch.randn(12, config.hidden_size))
        self.transform_block = TransformBlock(config.hidden_size, 8)


class VictorStandIn(LlavaStandIn):
    def __init__(self, config):
        super().__init__(config)
        self.model.vision_tower = ListTower()
        self.model.token_pool = nn.Parameter(torch.randn(12, config.hidden_size))
        self.model.pool_weight = nn.Linear(config.hidden_size, config.hidden_size)
        self.img_head = nn.Linear(config.hidden_size, config.hidden_size)

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images,
        modalities=("image",), image_sizes=None, grid_thw=None, victor_stage=False,
    ):  # fmt: skip
        raise NotImplementedError("replaced by attach")


STAND_INS = {"croc": LlavaStandIn, "croc-released": CrocStandIn, "victor": VictorStandIn}


def build(recipe):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=60, attn_implementation="eager",
    )  # fmt: skip
    return STAND_INS[recipe](config)


def plain_stage(model, layer, recipe, input_ids, mask, labels, images, masked, shown):
    """Caption and reconstruction loss of one batch, sample by sample.

    ``masked`` holds the tokens that were drawn; ``shown`` the images (not dummies) of each sample.
    """
    raw = [
        model.model.mm_projector(torch.stack(list(model.get_vision_tower()(i[None])))[0])
        for i in images
    ]
    features = [nn.functional.normalize(f.squeeze(0), dim=-1) for f in raw]
    count = features[0].shape[0]
    caption, captions, differences = 0.0, 0, []
    next_image = 0
    for b, ids in enumerate(input_ids):
        own = list(range(next_image, next_image + max(shown[b], 1)))
        next_image += len(own)
        rows, targets, where, spans = [], [], [], []
        for t, token in enumerate(ids.tolist()):
            if not mask[b, t]:
                continue
            if token != IMAGE:
                rows.append(model.model.embed_tokens(ids[t]))
                targets.append(int(labels[b, t]))
                continue
            image = own[len(spans)]
            spans.append((len(rows), image))
            where.append(image)
            rows += list(plain_replace(features[image], layer.pool, masked[image], recipe))
            targets += [IGNORE] * count
        length = len(rows)
        seen = torch.ones(length, length).tril().bool()
        if recipe == "croc":
            for first, _ in spans:
                seen[first : first + count, first : first + count] = True
        if recipe == "croc-released":
            first_label = next((i for i, y in enumerate(targets) if y != IGNORE), length)
            seen[:, :first_label] = True
        bias = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
        hidden = model.model(
            inputs_embeds=torch.stack(rows)[None], attention_mask=bias[None, None],
            position_ids=torch.arange(length)[None],
        )[0][0]  # fmt: skip
        logits = model.lm_head(hidden)
        for i in range(length - 1):
            if targets[i + 1] != IGNORE:
                wanted = torch.tensor([targets[i + 1]])
                caption = caption + nn.functional.cross_entropy(logits[i : i + 1], wanted)
                captions += 1
        for first, image in spans:
            at = hidden[first : first + count]
            guess = (
                model.transform_block(at[None])[0] if recipe == "croc-released" else layer.head(at)
            )
            keep = masked[image] if recipe == "croc" else torch.ones(count, dtype=torch.bool)
            differences.append((guess - features[image].detach())[keep])
    difference = torch.cat(differences)
    zeros = torch.zeros_like(difference)
    return caption / captions, nn.functional.smooth_l1_loss(difference, zeros, beta=0.01)


def plain_replace(feature, pool, masked, recipe):
    cost = torch.cdist(feature[masked].double(), pool.double()).detach()
    chosen = cost.argmin(1)
    if recipe != "croc-released":
        chosen = torch.from_numpy(linear_sum_assignment(cost.numpy())[1])
    rows, k = [], 0
    for t in range(feature.shape[0]):
        rows.append(pool[chosen[k]] if masked[t] else feature[t])
        k += int(masked[t])
    return torch.stack(rows)
