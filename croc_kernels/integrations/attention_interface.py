"""``attn_implementation="croc"``: the mask function and the attention function that transformers
calls.

transformers hands whatever the mask function returns to every layer, but only lets 4-D tensors
through the models that build their mask twice. So a :class:`MixedMask` travels as one int32 tensor
(B, 1, 2, Lq + Lk): row 0 holds the starts of the query rows followed by the first rows of the keys,
row 1 the ends likewise, and a third row, if there is one, ``visible_until``. Layers slice views out
of it; nothing is recomputed per layer and nothing of size Lq x Lk exists.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attention.mask import MixedMask
from ..backend import log_choice
from .closures import repair_packing
from .faults import check_transformers
from .heads import attend
from .mask_probe import REFUSAL, intervals

NAME = "croc"

# Their masks need more than one run of keys per row: a check by name costs nothing and always
# tells.
_INEXPRESSIBLE = {
    "molmo2": "an image sees later images but not the text between them",
}


PACKED = (
    'attn_implementation="croc": position_ids restart within a row, but the mask that transformers '
    "made lets documents see each other; packed rows need use_cache=False and no attention_mask, "
    "and PaliGemma transformers >= 5"
)


def pack_mask(mask: MixedMask) -> Tensor:
    """One int32 tensor (B, 1, 2 or 3, Lq + Lk) with the vectors of ``mask``; the third row has
    ``visible_until``.
    """
    rows = [
        torch.cat([mask.start, mask.row_start], dim=-1),
        torch.cat([mask.end, mask.row_end], dim=-1),
    ]
    if mask.visible_until is not None:
        rows.append(torch.cat([torch.zeros_like(mask.start), mask.visible_until], dim=-1))
    return torch.stack(rows, dim=1)[:, None]


def is_packed(mask: object) -> bool:
    """Whether ``mask`` is what :func:`pack_mask` returns."""
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.int32
        and mask.dim() == 4
        and mask.shape[1] == 1
        and mask.shape[2] in (2, 3)
    )


def unpack_mask(packed: Tensor, num_queries: int) -> MixedMask:
    """The mask that :func:`pack_mask` packed, as views."""
    first, last = packed[:, 0, 0], packed[:, 0, 1]
    return MixedMask(
        start=first[:, :num_queries],
        end=last[:, :num_queries],
        row_start=first[:, num_queries:],
        row_end=last[:, num_queries:],
        visible_until=packed[:, 0, 2, num_queries:] if packed.shape[2] == 3 else None,
    )


def croc_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    *,
    cache_position: Tensor | None = None,
    config: Any = None,
    device: torch.device | str | None = None,
    **ignored: Any,
) -> Tensor:
    """What transformers calls to make a mask: the intervals of its closure, packed.

    Both contracts are taken: ``q_length`` and ``q_offset`` (transformers 5.4 and newer) and
    ``cache_position`` (before).

    Args:
        batch_size: B.
        q_length: number of query rows.
        kv_length: number of keys.
        q_offset: absolute index of the first row.
        kv_offset: absolute index of the first key.
        mask_function: closure over (batch, head, query, key) indices; causal if None.
        attention_mask: (B, n) padding mask over absolute indices, or None.
        cache_position: (L,) absolute indices of the rows.
        config: the model's; names the model types that are refused.
        device: where to build the mask.
        ignored: hints to transformers' own mask functions.

    Returns:
        (B, 1, 2, Lq + Lk) int32, see the module.

    Raises:
        ValueError: the model's mask is known not to be one interval per row.
        RuntimeError: the closure turns out not to be one (on CUDA: a device-side assertion).
    """
    model_type = getattr(config, "model_type", "")
    for name, reason in _INEXPRESSIBLE.items():
        if str(model_type).startswith(name):
            raise ValueError(
                f'attn_implementation="croc": {model_type} must run with "sdpa" or "eager": '
                f"{reason}, which is no "
                "single run of keys per row"
            )
    if cache_position is not None or isinstance(q_length, Tensor):
        position = q_length if cache_position is None else cache_position
        q_length, q_offset = position.shape[0], position[0]
    if device is None:
        source = attention_mask if attention_mask is not None else q_offset
        device = source.device if isinstance(source, Tensor) else "cpu"
    padding = attention_mask
    if padding is not None:
        padding = padding.to(device=device, dtype=torch.bool)
        missing = kv_length + kv_offset - padding.shape[-1]
        if missing > 0:
            padding = torch.nn.functional.pad(padding, (0, missing))
    function = _causal if mask_function is None else repair_packing(mask_function)
    start, end = intervals(
        function,
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        padding,
        torch.device(device),
    )
    mask = MixedMask.from_rows(start, end, kv_length, may_have_holes=False)
    if mask.token_faults is not None:
        torch._assert_async((mask.token_faults == 0).all(), REFUSAL)
    return pack_mask(mask)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def _common_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, rotary embeddings leave queries and keys in float32 while values are already
    low: one dtype.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


def _check_arguments(dropout: float, unsupported: dict[str, Any]) -> None:
    if dropout > 0:
        raise ValueError(
            f'attn_implementation="croc": attention dropout must be 0, got {dropout}; set '
            "attention_dropout=0 in "
            "the model's config"
        )
    for name in ("position_bias", "s_aux"):
        if unsupported.get(name) is not None:
            raise ValueError(f'attn_implementation="croc": {name} must be None; use "eager"')


def croc_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer.

    Without a mask, a layer that is not causal (a vision tower) is plain full attention and goes to
    PyTorch's ``scaled_dot_product_attention``: no mask is lost there, and any head size works.

    Args:
        module: the attention layer; its ``is_causal`` counts where no mask is given.
        query: (B, Hq, Lq, D).
        key: (B, Hkv, Lk, D).
        value: (B, Hkv, Lk, Dv).
        attention_mask: what :func:`croc_mask` returned, a dense mask of one run of keys per row, or
            None.
        scaling: factor of the scores; 1 / sqrt(D) if None.
        dropout: must be 0.
        is_causal: overrides the module's.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        kwargs: whatever else the model passes; the mask already has its sliding window.

    Returns:
        The output (B, Lq, Hq, D), and None for the weights.

    Raises:
        ValueError: dropout, a position bias, attention sinks, or a mask that can't be expressed.
    """
    _check_arguments(dropout, kwargs)
    query, key, value = _common_dtype(query, key, value)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not causal and softcap is None:
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
            )
            return out.transpose(1, 2).contiguous(), None
        mask = _mask_of_none(causal, query.shape[0], num_queries, num_keys, query.device)
    elif is_packed(attention_mask) and attention_mask.shape[3] == num_queries + num_keys:
        mask = unpack_mask(attention_mask, num_queries)
    else:
        mask = _mask_of_dense(attention_mask, query.shape[0], num_queries, num_keys)
    if attention_mask is not None and num_queries == num_keys and _is_first_of_kind(module):
        _check_documents(mask, kwargs.get("position_ids"))
    out = attend(query, key, value, mask, scaling, softcap)
    return out.transpose(1, 2).contiguous(), None


def _is_first_of_kind(module: torch.nn.Module) -> bool:
    """Whether this layer is the first with its mask: full layers share one, sliding layers another,
    and transformers can have found documents for one of them only.
    """
    index = getattr(module, "layer_idx", None)
    if index is None:
        return False
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    return index == (kinds.index(kinds[index]) if kinds else 0)


def _check_documents(mask: MixedMask, position_ids: Tensor | None) -> None:
    """Assert on the device that a row whose position restarts sees nothing before itself, unless it
    follows padding or is padding (positions that don't go on counting; released Croc's mask shows
    it). transformers looks for documents only without a cache and without padding.
    """
    if position_ids is None or position_ids.dim() != 2:
        return
    place = torch.arange(1, mask.start.shape[1], device=mask.start.device)
    step = position_ids[:, 1:] - position_ids[:, :-1]
    restarts = (step < 0) & torch.nn.functional.pad(step[:, 1:] == 1, (0, 1))
    follows = mask.end[:, :-1] > mask.start[:, :-1]
    crosses = (mask.start[:, 1:] < place) & (mask.end[:, 1:] > place)
    if mask.visible_until is not None:
        crosses &= place < mask.visible_until[:, :-1]
    torch._assert_async(~(restarts & follows & crosses).any(), PACKED)


def _mask_of_none(
    causal: bool, batch: int, queries: int, keys: int, device: torch.device
) -> MixedMask:
    """The mask of a layer that got none: causal aligned to the last key, or everything."""
    end = torch.full((queries,), keys, dtype=torch.int32, device=device)
    if causal:
        end = torch.arange(1, queries + 1, dtype=torch.int32, device=device) + (keys - queries)
    end = end.expand(batch, queries)
    return MixedMask.from_rows(torch.zeros_like(end), end, keys, may_have_holes=False)


def _mask_of_dense(dense: Tensor, batch: int, queries: int, keys: int) -> MixedMask:
    """The mask of a layer that got a dense one: some models, and some users, build it themselves.

    It is read once per layer, and said so once: the memory for it is already spent.
    """
    kind = dense.dtype == torch.bool or dense.is_floating_point()
    if not kind or dense.dim() != 4 or dense.shape[1] != 1 or dense.shape[2] != queries:
        raise ValueError(
            'attn_implementation="croc": attention_mask must be 2-D padding, what the registered '
            f"mask function made, or dense (B, 1, {queries}, {keys}), got {dense.dtype} "
            f"{tuple(dense.shape)}"
        )
    log_choice("attn_implementation", "croc", "a dense mask is read in every layer")
    dense = dense[..., :keys].expand(batch, -1, -1, -1)
    visible = dense
    if dense.is_floating_point():
        visible = dense > torch.finfo(dense.dtype).min / 2
        torch._assert_async(((dense == 0) | ~visible).all(), REFUSAL)
    mask = MixedMask.from_dense(visible)
    if mask.token_faults is not None:
        torch._assert_async((mask.token_faults == 0).all(), REFUSAL)
    return mask


def register() -> None:
    """Make ``attn_implementation="croc"`` known to transformers, for every model of this process.

    The one global change of this module; calling it again changes nothing. Both of transformers'
    interfaces are filled: with the attention function alone, models would get no mask at all,
    padding included.

    Raises:
        ImportError: transformers is missing or out of the supported range.
    """
    check_transformers()
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, croc_attention)
    AttentionMaskInterface.register(NAME, croc_mask)


def is_registered() -> bool:
    """Whether :func:`register` was called in this process."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return (
        ALL_ATTENTION_FUNCTIONS.get(NAME) is croc_attention
        and ALL_MASK_ATTENTION_FUNCTIONS.get(NAME) is croc_mask
    )
