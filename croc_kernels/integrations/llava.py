"""The original LLaVA, Croc and ViCToR code, at ``prepare_inputs_labels_for_multimodal``.

Their model classes mix a vision tower and a projector into one of transformers' causal LMs. One
call of :func:`attach` on an instance replaces the three methods that carry the stage (``forward``,
``generate`` and ``prepare_inputs_labels_for_multimodal``) by versions that splice without loops,
run transformers' own forward of the LM, and add the reconstruction loss. Classes stay untouched.
"""

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.mask import MixedMask
from ..layer import CrocLayer, Replacement
from .attention_interface import NAME, pack_mask, register
from .outputs import with_losses
from .released_modules import copy_parameters, own_parameters, own_pool
from .splice import SplicedBatch, splice_images

_METHODS = ("forward", "generate", "prepare_inputs_labels_for_multimodal")
_PREPARE_OPTIONS = ("modalities", "grid_thw", "victor_stage", "images_per_sample", "dpo_forward")
_STATE = "_croc_llava"


class _Stage:
    """What one attached instance keeps between its methods; no tensor outlives the step."""

    def __init__(self, model: nn.Module, exact_parity: bool) -> None:
        self.base = _language_model_class(model)
        # Renamed in transformers 5.24.
        names = inspect.signature(self.base.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.exact_parity = exact_parity
        self.attention = getattr(model.config, "_attn_implementation", None)
        self.frozen: list[nn.Parameter] = []
        self.batch: SplicedBatch | None = None
        self.replacement: Replacement | None = None
        self.mask: MixedMask | None = None
        self.hidden: Tensor | None = None
        self.hook: Any = None

    def holds(self, inputs_embeds: Tensor) -> bool:
        """Whether these embeddings have the shape of the batch that was prepared last."""
        return self.batch is not None and inputs_embeds.shape == self.batch.inputs_embeds.shape

    def forget(self) -> None:
        """Let go of the step's tensors."""
        self.batch = self.replacement = self.mask = self.hidden = None


def attach(
    model: nn.Module, recipe: str = "croc", *, exact_parity: bool = False, **layer_options: Any
) -> CrocLayer:
    """Train an instance of the LLaVA, Croc or ViCToR model classes with the Croc stage.

    The pool and head that the model already owns (``mask_token``, ``token_pool``, ``img_head``,
    ``transform_block``) are copied into ``model.croc`` where they fit the recipe, frozen while
    attached, and written back by :func:`detach`.

    Args:
        model: has ``get_model``, ``get_vision_tower`` and ``prepare_inputs_labels_for_multimodal``,
            and derives from a causal LM of transformers.
        recipe: ``"croc"``, ``"croc-released"`` or ``"victor"``.
        exact_parity: for ``"croc-released"``, reproduce what its mask does with padding and with
            samples without a label, instead of the valid tokens only.
        **layer_options: of :class:`croc_kernels.CrocLayer`; ``pool_size`` defaults to the model's.

    Returns:
        The layer, also at ``model.croc``.

    Raises:
        TypeError: the model is not of these code bases.
        RuntimeError: it is attached already.
        ValueError: ``exact_parity`` with another recipe.
    """
    if hasattr(model, _STATE):
        raise RuntimeError("attach: model must not be attached yet; call detach(model) first")
    missing = [n for n in ("get_model", "get_vision_tower", _METHODS[2]) if not hasattr(model, n)]
    if missing:
        raise TypeError(
            f"attach: model must be of the LLaVA code bases, got {type(model).__name__} without "
            f"{missing}; for models of transformers use croc_kernels.integrations.transformers"
        )
    if exact_parity and recipe != "croc-released":
        raise ValueError(f"attach: exact_parity must go with 'croc-released', got {recipe!r}")
    stage = _Stage(model, exact_parity)
    pool = own_pool(model)
    if pool is not None:
        layer_options.setdefault("pool_size", pool.shape[0])
    weight = model.get_input_embeddings().weight
    layer = CrocLayer(
        weight.shape[1],
        recipe=recipe,
        **{"device": weight.device, "dtype": weight.dtype} | layer_options,
    )
    copy_parameters(model, layer, back=False)
    if layer.recipe.attention != "causal":
        register()
        model.config._attn_implementation = NAME
    for parameter in own_parameters(model):
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            stage.frozen.append(parameter)
    model.croc = layer
    object.__setattr__(model, _STATE, stage)
    for name, function in zip(_METHODS, (_forward, _generate, _prepare), strict=True):
        method = functools.wraps(getattr(type(model), name))(function)
        object.__setattr__(model, name, types.MethodType(method, model))
    stage.hook = model.get_model().register_forward_hook(functools.partial(_keep_hidden, stage))
    return layer


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`, with the trained pool and head written back to the model's own.

    Raises:
        RuntimeError: the model is not attached.
    """
    stage = getattr(model, _STATE, None)
    if stage is None:
        raise RuntimeError("detach: model must be attached, got one that is not")
    copy_parameters(model, model.croc, back=True)
    stage.hook.remove()
    for parameter in stage.frozen:
        parameter.requires_grad_(True)
    if model.croc.recipe.attention != "causal":
        model.config._attn_implementation = stage.attention
    for name in (*_METHODS, _STATE):
        object.__delattr__(model, name)
    del model.croc


def _language_model_class(model: nn.Module) -> type:
    """The causal LM of transformers that the model class derives from."""
    for kind in type(model).__mro__:
        if kind.__module__.split(".")[0] == "transformers":
            return kind
    raise TypeError(
        f"attach: model must derive from a causal LM of transformers, got {type(model).__name__}"
    )


def _keep_hidden(stage: _Stage, module: nn.Module, args: tuple, output: Any) -> None:
    if stage.batch is not None:
        stage.hidden = output[0]


def _image_features(model: nn.Module, images: Any, extra: tuple) -> tuple[Tensor, list[int]]:
    """Projected features of all images, packed, and each image's number of tokens."""
    merge = getattr(model.config, "mm_patch_merge_type", "flat")
    if merge != "flat":
        raise ValueError(
            f"attach: config.mm_patch_merge_type must be 'flat', got {merge!r}; its newline rows "
            "and unpadding have no place in the stage"
        )
    tiles = None
    if isinstance(images, (list, tuple)) or images.ndim == 5:
        images = [image[None] if image.ndim == 3 else image for image in images]
        tiles = [image.shape[0] for image in images]
        images = torch.cat(images)
    inner = model.get_model()
    features = model.get_vision_tower()(images, *extra)
    lengths = [feature.shape[0] for feature in features]
    packed = features.flatten(0, 1) if isinstance(features, Tensor) else torch.cat(features)
    packed = inner.mm_projector(packed)
    if tiles is not None and len(lengths) == sum(tiles):
        ends = [sum(tiles[: i + 1]) for i in range(len(tiles))]
        lengths = [sum(lengths[e - n : e]) for e, n in zip(ends, tiles, strict=True)]
    return packed, lengths


def _active(model: nn.Module, options: dict[str, Any]) -> bool:
    """Whether this call masks: ViCToR's code may say that it is not in its stage."""
    return model.training and options.get("victor_stage", True)


def _splice(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    images: Any,
    options: dict[str, Any],
    *,
    active: bool,
) -> SplicedBatch:
    """Encode, replace and splice; the stage keeps what the loss needs, of this batch alone."""
    stage, layer = getattr(model, _STATE), model.croc
    stage.forget()
    kinds = options.get("modalities") or ["image"]
    if any(kind != "image" for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        raise ValueError(f"attach: modalities must all be 'image', got {kinds}")
    grid = options.get("grid_thw")
    features, lengths = _image_features(model, images, () if grid is None else (grid,))
    replacement = layer.replace(features, lengths, active=active)
    ids = input_ids.clamp(min=0)
    batch = splice_images(
        input_ids, model.get_model().embed_tokens(ids), replacement.embeddings, lengths,
        attention_mask=attention_mask, labels=labels,
        images_per_sample=options.get("images_per_sample"),
        padding_side=options.get("padding_side")
        or getattr(model.config, "tokenizer_padding_side", "right"),
    )  # fmt: skip
    limit = getattr(model.config, "tokenizer_model_max_length", None)
    if limit is not None and batch.inputs_embeds.shape[1] > limit:
        batch = _cut(batch, limit)
    stage.batch, stage.replacement = batch, replacement
    stage.mask = _mask(layer, batch, None if labels is None else batch.labels, stage.exact_parity)
    return batch


def _cut(batch: SplicedBatch, limit: int) -> SplicedBatch:
    """Cut text behind ``limit``; never an image. The one place that waits for the device."""
    lost = batch.image_id[:, limit:].ge(0).any(1)
    if bool(lost.any()):
        samples = lost.nonzero().flatten().tolist()
        raise ValueError(
            "prepare_inputs_labels_for_multimodal: images must end before "
            f"config.tokenizer_model_max_length = {limit}, got samples {samples} of the batch that "
            "would be cut inside an image; leave such samples out of the data"
        )
    length = batch.inputs_embeds.shape[1]
    index = batch.visual_index
    moved = torch.where(index >= 0, index // length * limit + index % length, -1)
    return SplicedBatch(*(field[:, :limit] for field in batch[:5]), moved, batch.spans)


def _mask(
    layer: CrocLayer, batch: SplicedBatch, labels: Tensor | None, exact_parity: bool
) -> MixedMask | None:
    """The recipe's mask, or None where plain causal attention is right."""
    if layer.recipe.attention == "visual":
        return MixedMask.from_spans(
            batch.spans, *batch.image_id.shape, attention_mask=batch.attention_mask
        )
    if layer.recipe.attention == "prefix" and labels is not None:
        return MixedMask.from_labels(
            labels, attention_mask=batch.attention_mask, exact_parity=exact_parity
        )
    return None


def _prepare(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    past_key_values: Any,
    labels: Tensor | None,
    images: Any,
    *args: Any,
    **options: Any,
) -> tuple:
    """Splice; as many results as the code base gives, select_patch and image_pos among them."""
    stage = getattr(model, _STATE)
    stage.forget()
    extended = own_pool(model) is not None
    if images is None or input_ids.shape[1] == 1:
        result = (input_ids, position_ids, attention_mask, past_key_values, None, labels)
        return (*result, None, None, None) if extended else result
    if args and isinstance(args[0], (str, list)):  # ViCToR and LLaVA-NeXT put modalities first
        options["modalities"] = args[0]
    batch = _splice(
        model, input_ids, attention_mask, labels, images, options, active=_active(model, options)
    )
    result = (
        None,
        None if position_ids is None else batch.position_ids,
        None if attention_mask is None else batch.attention_mask.to(attention_mask.dtype),
        past_key_values,
        batch.inputs_embeds,
        None if labels is None else batch.labels,
    )
    if not extended:
        return result
    length = batch.inputs_embeds.shape[:2]
    slots = torch.where(batch.visual_index >= 0, batch.visual_index, length.numel())
    targets = batch.inputs_embeds.new_zeros(length.numel() + 1, batch.inputs_embeds.shape[2])
    targets = targets.index_copy(0, slots, stage.replacement.target.to(targets.dtype))[:-1]
    select = slots.new_zeros(length.numel() + 1, dtype=torch.bool)
    select = select.index_copy(0, slots, stage.replacement.masked)[:-1]
    return (*result, targets.view(*length, -1), select.view(length), batch.image_id >= 0)


def _forward(
    model: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    images: Any = None,
    image_sizes: Any = None,
    **options: Any,
) -> Any:
    """The LM's own forward on the spliced batch, plus the weighted reconstruction loss."""
    stage, layer = getattr(model, _STATE), model.croc
    own = {name: options.pop(name, None) for name in _PREPARE_OPTIONS}
    cache = options.pop("cache", past_key_values)
    options |= {"return_dict": True, stage.cache_name: cache}
    if inputs_embeds is None and images is not None and input_ids.shape[1] > 1:
        own = {name: value for name, value in own.items() if value is not None}
        batch = _splice(
            model, input_ids, attention_mask, labels, images, own, active=_active(model, own)
        )
        mask, inputs_embeds, input_ids = stage.mask, batch.inputs_embeds, None
        attention_mask = batch.attention_mask if mask is None else pack_mask(mask)
        labels = None if labels is None else batch.labels
        # The released code leaves positions to the LM, which counts padding too.
        if position_ids is not None or not stage.exact_parity:
            position_ids = batch.position_ids
    elif inputs_embeds is None or not stage.holds(inputs_embeds):
        stage.forget()
        if layer.recipe.attention == "prefix" and labels is not None and not stage.exact_parity:
            # Text alone has its prefix too; the released code leaves such a batch causal.
            keep = None if attention_mask is None else attention_mask.bool()
            attention_mask = pack_mask(MixedMask.from_labels(labels, attention_mask=keep))
    elif stage.mask is not None:
        # What generate() or the caller prepared.
        attention_mask = pack_mask(stage.mask)
    output = stage.base.forward(
        model, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
        inputs_embeds=inputs_embeds, labels=labels, **options,
    )  # fmt: skip
    if output.loss is not None:
        reconstruction = _reconstruction(layer, stage)
        loss = output.loss + layer.loss_weight * reconstruction
        output = with_losses(output, loss, output.loss, reconstruction)
    stage.forget()
    return output


def _reconstruction(layer: CrocLayer, stage: _Stage) -> Tensor:
    """Loss over what is shown of the batch; zero that touches every parameter without images."""
    if stage.batch is None or stage.hidden is None or stage.replacement.num_masked == 0:
        return layer.touch()
    index = stage.batch.visual_index
    hidden = stage.hidden.flatten(0, 1).index_select(0, index.clamp(min=0))
    return layer.loss(hidden, stage.replacement, visible=index >= 0)


@torch.no_grad()
def _generate(
    model: nn.Module,
    inputs: Tensor | None = None,
    images: Any = None,
    image_sizes: Any = None,
    **options: Any,
) -> Any:
    """Splice the prompt, then transformers' generate on its embeddings."""
    stage = getattr(model, _STATE)
    if "inputs_embeds" in options:
        raise ValueError("generate: inputs_embeds must not be given with the Croc stage, got one")
    if images is None:
        stage.forget()
        return stage.base.generate(model, inputs, **options)
    own = {name: options.pop(name) for name in _PREPARE_OPTIONS if name in options}
    mask = options.pop("attention_mask", None)
    options.pop("position_ids", None)
    # A prompt is continued at its right end.
    batch = _splice(model, inputs, mask, None, images, own | {"padding_side": "left"}, active=False)
    try:
        return stage.base.generate(
            model, inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask.long(),
            **options,
        )  # fmt: skip
    finally:
        stage.forget()
