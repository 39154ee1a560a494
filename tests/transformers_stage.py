"""What the tests of attach share: an attached tiny model, a record of its seams, masks by loops."""

import torch
import transformers_zoo as zoo

from croc_kernels.integrations import transformers as croc
from croc_kernels.integrations.attention_interface import unpack_mask

RECIPES = ("croc", "croc-released", "victor")


def attached(case, recipe="croc", **options):
    zoo.needs(case)
    model = case.model()
    if recipe == "croc-released":
        options.setdefault("num_heads", 2)
    croc.attach(model, recipe, **{"pool_size": 24, **options})
    if recipe == "croc-released":
        model.croc.head.layer.dropout1.p = model.croc.head.layer.dropout2.p = 0.0
        model.croc.head.layer.self_attn.dropout = 0.0
    return model.train()


class Record:
    """What the layer replaced, and what mask and embeddings the language model got."""

    def __init__(self, model):
        self.replacements, self.masks, self.embeddings = [], [], []
        self.layer = model.croc
        replace = self.layer.replace

        def recorded(*args, **kwargs):
            self.replacements.append(replace(*args, **kwargs))
            return self.replacements[-1]

        self.layer.replace = recorded
        model.model.language_model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module, args, kwargs):
        self.masks.append(kwargs["attention_mask"])
        self.embeddings.append(kwargs["inputs_embeds"])

    def dense(self, kind=None):
        mask = self.masks[-1] if kind is None else self.masks[-1][kind]
        return unpack_mask(mask, self.embeddings[-1].shape[1]).to_dense()[:, 0]


def visible(recipe, ids, labels, padding, lengths):
    """The recipe's mask by loops over one row; two images side by side stay two."""
    length = len(ids)
    image_of, remaining, number = [-1] * length, 0, -1
    for i, token in enumerate(ids):
        if token == zoo.IMAGE:
            if remaining == 0:
                number, remaining = number + 1, lengths.pop(0)
            image_of[i] = number
            remaining -= 1
    supervised = [i for i, label in enumerate(labels) if label != -100]
    prefix = supervised[0] if supervised else length
    dense = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            seen = j <= i
            if recipe == "croc":
                seen |= image_of[i] >= 0 and image_of[i] == image_of[j]
            elif recipe == "croc-released":
                seen |= j < prefix
            dense[i, j] = seen and padding[i] and padding[j]
    return dense
