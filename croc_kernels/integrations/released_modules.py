"""The pool and the head that the released Croc and ViCToR models own, copied to ours and back."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layer import CrocLayer


def own_pool(model: nn.Module) -> nn.Parameter | None:
    """The pool of the released Croc (``mask_token``) or ViCToR (``token_pool``)."""
    inner = model.get_model()
    return getattr(inner, "mask_token", getattr(inner, "token_pool", None))


def own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the released stage, which the attached layer replaces."""
    inner = model.get_model()
    owners = [inner.__dict__.get("_modules", {}).get(n) for n in ("cross_attention", "pool_weight")]
    owners += [getattr(model, name, None) for name in ("transform_block", "img_head")]
    found = [parameter for owner in owners if owner is not None for parameter in owner.parameters()]
    pool = own_pool(model)
    return found if pool is None else [pool, *found]


@torch.no_grad()
def copy_parameters(model: nn.Module, layer: CrocLayer, *, back: bool) -> None:
    """Copy the model's own pool and head to the layer, or back, where their shapes agree."""
    pairs = [(own_pool(model), layer.pool)]
    head = getattr(model, "img_head", None)
    if head is not None and layer.recipe.head == "linear":
        pairs += [(head.weight, layer.head.weight), (head.bias, layer.head.bias)]
    if hasattr(model, "transform_block") and layer.recipe.head == "bert":
        pairs += list(_bert_pairs(model.transform_block, layer.head))
    for own, ours in pairs:
        if own is not None and own.shape == ours.shape:
            (own if back else ours).copy_(ours if back else own)


def _bert_pairs(block: nn.Module, head: nn.Module) -> Sequence[tuple[Tensor, Tensor]]:
    """(released, ours) parameters of the released Croc's head; ours has q, k, v in one matrix."""
    layer, ours = block.layers[0], head.layer
    attention = layer.attention
    projections = (attention.self.query, attention.self.key, attention.self.value)
    pairs = []
    for i, projection in enumerate(projections):
        pairs.append((projection.weight, ours.self_attn.in_proj_weight.chunk(3)[i]))
        pairs.append((projection.bias, ours.self_attn.in_proj_bias.chunk(3)[i]))
    modules = (
        (attention.output.dense, ours.self_attn.out_proj),
        (attention.output.LayerNorm, ours.norm1),
        (layer.intermediate.dense, ours.linear1),
        (layer.output.dense, ours.linear2),
        (layer.output.LayerNorm, ours.norm2),
        (block.resize, head.output),
    )
    pairs += [(a.weight, b.weight) for a, b in modules] + [(a.bias, b.bias) for a, b in modules]
    return [*pairs, (block.position_embeddings.weight, head.position.weight)]
