"""The Croc stage on one transformers model: attach, detach, report. No forward is copied, no class
is touched.

An :class:`Attachment` wraps two bound methods of the instance (``forward`` of the root,
``get_image_features`` of the model inside) and hooks its language model. ``forward`` is wrapped and
not hooked because PEFT calls it directly, and because accelerate's autocast then covers it. The
reconstruction loss is computed in the language model's forward hook: inside the root's forward,
where FSDP and ZeRO have the parameters whole, and inside autocast.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..layer import CrocLayer, Replacement
from . import attention_interface, families, recipe_mask
from .faults import check_transformers

ATTRIBUTE = "_croc_attachment"
MODULE = "croc"
CONFIG_ENTRY = "croc"
_RECIPE_INPUTS = ("num_masked_in_batch",)
_CAPTURED = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "pixel_values",
    "pixel_values_videos", "past_key_values", "num_items_in_batch",
)  # fmt: skip


@dataclass
class _Step:
    """What one forward needs to remember between its seams."""

    inputs: dict[str, Any]
    num_items: Any = None
    replacement: Replacement | None = None
    newlines: families.Newlines | None = None
    row_lengths: tuple[int, ...] = ()
    reconstruction: Tensor | None = None


@dataclass
class _Undo:
    """What :func:`detach` puts back."""

    hooks: list[Any] = field(default_factory=list)
    configs: list[tuple[Any, Any]] = field(default_factory=list)
    methods: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    config_entry: Any = None
    changes: list[str] = field(default_factory=list)


class Attachment:
    """The seams between one model and its :class:`CrocLayer`; made by :func:`attach`."""

    def __init__(self, model: nn.Module, family: families.Family) -> None:
        self.model = model
        self.family = family
        self.undo = _Undo()
        self.step: _Step | None = None
        self.image_token = families.image_token_id(model.config)
        self.parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        hidden_size = model.config.get_text_config().hidden_size
        self.scale = families.feature_scale(family, self.language_model, hidden_size)

    @property
    def inner(self) -> nn.Module:
        """The model without its head."""
        return self.model.model

    @property
    def language_model(self) -> nn.Module:
        """The text model inside."""
        return self.model.model.language_model

    @property
    def layer(self) -> CrocLayer:
        """Read from the module tree at every use: ZeRO and FSDP swap what is registered there."""
        return getattr(self.model, MODULE)

    # --- the root's forward -----------------------------------------------------------------------

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the seams need of the root's inputs, and take out what only we understand."""
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        if given.get("pixel_values_videos") is not None:
            raise ValueError(
                "attach: pixel_values_videos must be None, the recipes are defined for images; "
                "detach(model) first"
            )
        if given.get("pixel_values") is not None and given.get("input_ids") is None:
            raise ValueError(
                "attach: input_ids must be given with pixel_values, they tell where the images "
                "are; got None"
            )
        self.step = _Step(
            {name: given.get(name) for name in _CAPTURED}, kwargs.get("num_masked_in_batch")
        )

    def finish(self, output: Any) -> Any:
        """Add the weighted reconstruction loss to the caption loss."""
        step, labels = self.step, self.step.inputs["labels"]
        if labels is None:
            return output
        plain = isinstance(output, tuple)
        caption = output[0] if plain else output.loss
        reconstruction = step.reconstruction
        if reconstruction is None:
            reconstruction = self.layer.touch() if self.model.training else caption.new_zeros(())
        loss = caption + self.layer.loss_weight * reconstruction.to(caption.dtype)
        if plain:
            return (loss, *output[1:])
        output["loss"] = loss
        output["caption_loss"] = caption.detach()
        output["reconstruction_loss"] = reconstruction.detach()
        return output

    # --- features ---------------------------------------------------------------------------------

    def image_features(self, *args: Any, **kwargs: Any) -> Any:
        """``get_image_features`` of the model inside: normalised and, in training with labels,
        masked.
        """
        output = self._original(self.inner, "get_image_features")(*args, **kwargs)
        if self.step is None:
            return output
        held, images, deepstack = families.read_features(self.family, output)
        step = self.step
        rows = torch.cat(images) if len(images) != 1 else images[0]
        step.row_lengths = tuple(image.shape[0] for image in images)
        lengths, keep = step.row_lengths, None
        if step.newlines is not None:
            lengths = tuple(step.newlines.lengths)
            keep = families.visual_positions(~step.newlines.is_newline, sum(lengths))
        tokens = rows if keep is None else rows.index_select(0, keep)
        active = self.model.training and step.inputs["labels"] is not None
        replacement = self.layer.replace(tokens * self.scale, lengths, active=active)
        step.replacement = replacement
        tokens = replacement.embeddings.to(rows.dtype) / self.scale
        changed = tokens if keep is None else rows.index_copy(0, keep, tokens)
        if active:
            shown = ~replacement.masked[:, None]
            deepstack = [feature * shown for feature in deepstack]
        parts = list(changed.split(list(step.row_lengths)))
        return families.write_features(self.family, output, held, parts, deepstack)

    def pack_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """``pack_image_features`` of the model inside, remembering which rows are newlines."""
        pack = self._original(self.inner, "pack_image_features")
        if self.step is None:
            return pack(*args, **kwargs)
        arguments = dict(inspect.signature(pack).bind(*args, **kwargs).arguments)
        arguments["image_sizes"] = families.host_sizes(arguments["image_sizes"])
        self.step.newlines = families.find_newlines(pack, arguments)
        return pack(**arguments)

    def _places(self) -> Tensor:
        """Where the images' rows lie in the flattened batch, newlines included."""
        is_visual = self.step.inputs["input_ids"] == self.image_token
        return families.visual_positions(is_visual, sum(self.step.row_lengths))

    # --- the language model -----------------------------------------------------------------------

    def before_language_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand the recipe's mask to the language model, wherever this forward brings images."""
        step, attention = self.step, self.layer.recipe.attention
        if step is None or step.replacement is None or attention == "causal":
            return None
        if module.config._attn_implementation != attention_interface.NAME:
            raise RuntimeError(
                f'attach: attn_implementation of the text config must stay "croc" for recipe '
                f"{self.layer.recipe.name!r}, got {module.config._attn_implementation!r}"
            )
        cache = step.inputs["past_key_values"]
        recipe_mask.check_first(cache)
        incoming = kwargs.get("attention_mask")
        length = step.inputs["input_ids"].shape[1]
        window, layer_types = recipe_mask.window_of(module.config)
        keys = functools.partial(recipe_mask.key_length, cache=cache, length=length)
        if layer_types:
            masks = {}
            for kind in layer_types:
                own = incoming.get(kind) if isinstance(incoming, dict) else incoming
                mask = self._mask(window if kind == "sliding_attention" else None)
                masks[kind] = recipe_mask.packed_for(mask, keys(own))
            return args, kwargs | {"attention_mask": masks}
        has_types = getattr(module.config, "layer_types", None) is not None
        mask = self._mask(None if has_types else window)
        return args, kwargs | {"attention_mask": recipe_mask.packed_for(mask, keys(incoming))}

    def _mask(self, window: int | None) -> attention_interface.MixedMask:
        """The recipe's attention over this forward's tokens."""
        inputs = self.step.inputs
        ids = inputs["input_ids"]
        batch, length = ids.shape
        padding = recipe_mask.padding_of(inputs["attention_mask"], length)
        documents = None
        if padding is None and inputs["past_key_values"] is None:
            documents = recipe_mask.documents_of(inputs["position_ids"], batch)
        mask, options = attention_interface.MixedMask, {"sliding_window": window}
        if self.layer.recipe.attention == "prefix":
            prefix = recipe_mask.prefix_lengths(inputs["labels"], batch, length, ids.device)
            return mask.prefix(prefix, length, padding, **options)
        if self.family.spans == "runs":
            return mask.from_token_types(ids == self.image_token, padding, documents, **options)
        spans = recipe_mask.image_spans(self._places(), self.step.row_lengths, length)
        return mask.from_spans(spans, batch, length, padding, documents, **options)

    def after_language_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Reconstruct the images from the last hidden states."""
        step = self.step
        if step is None or step.replacement is None or step.inputs["labels"] is None:
            return
        if not self.model.training:
            return
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        places = self._places()
        if step.newlines is not None:
            keep = families.visual_positions(~step.newlines.is_newline, sum(step.newlines.lengths))
            places = places.index_select(0, keep)
        hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, places.to(hidden.device))
        step.reconstruction = self._scaled(hidden, step)

    def _scaled(self, hidden: Tensor, step: _Step) -> Tensor:
        """The reconstruction loss so that the micro-batches of an optimizer step add up to one
        mean.
        """
        if step.num_items is not None:
            return self.layer.loss(hidden, step.replacement, num_items=step.num_items)
        loss = self.layer.loss(hidden, step.replacement)
        total = step.inputs["num_items_in_batch"]
        if total is None:
            return loss
        # Trainer counts the labels that are predicted: all but the first of each row.
        return loss * (step.inputs["labels"][:, 1:] != -100).sum() / total

    # --- the seams --------------------------------------------------------------------------------

    def _original(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """The method as it was before :meth:`wrap`."""
        for owner, method, saved in self.undo.methods:
            if owner is module and method == name and saved is not None:
                return saved
        return functools.partial(getattr(type(module), name), module)

    def wrap(self, module: nn.Module, name: str, replacement: Any) -> None:
        """Put ``replacement`` in the instance's place of a method."""
        self.undo.methods.append((module, name, module.__dict__.get(name)))
        setattr(module, name, replacement)

    def connect(self) -> None:
        """Wrap and hook everything, and note it down."""
        model, inner, text = self.model, self.inner, self.language_model
        self.wrap(model, "forward", MethodType(_forward_of(type(model)), model))
        self.wrap(inner, "get_image_features", self.image_features)
        note = self.undo.changes.append
        root = type(model).__name__
        note(f"{root}.forward (this instance): adds the reconstruction loss to output.loss")
        note(
            f"{type(inner).__name__}.get_image_features (this instance): normalises, masks and "
            "replaces"
        )
        if self.family.newline:
            self.wrap(inner, "pack_image_features", self.pack_image_features)
            note(f"{type(inner).__name__}.pack_image_features (this instance): finds newline rows")
        self.undo.hooks = [
            text.register_forward_pre_hook(self.before_language_model, with_kwargs=True),
            text.register_forward_hook(self.after_language_model),
        ]
        name = type(text).__name__
        note(f"{name}: forward pre-hook (the recipe's mask)")
        note(f"{name}: forward hook (reconstruction from the last hidden states)")

    def switch_attention(self) -> None:
        """Let the text config, wherever it is shared, ask for ``"croc"``."""
        attention_interface.register()
        seen: dict[int, Any] = {}
        for config in [self.model.config.get_text_config(), *(
            getattr(module, "config", None) for module in self.language_model.modules()
        )]:  # fmt: skip
            if config is not None and hasattr(config, "_attn_implementation"):
                seen.setdefault(id(config), config)
        for config in seen.values():
            self.undo.configs.append((config, config._attn_implementation))
            config._attn_implementation = attention_interface.NAME
        before = self.undo.configs[0][1]
        self.undo.changes.append(f'text config: attn_implementation "{before}" -> "croc"')
        self.undo.changes.append(
            'global: transformers knows attn_implementation "croc" (register())'
        )

    def restore(self) -> None:
        """Undo everything."""
        for hook in self.undo.hooks:
            hook.remove()
        for module, name, saved in reversed(self.undo.methods):
            if saved is None:
                delattr(module, name)
            else:
                setattr(module, name, saved)
        for config, implementation in self.undo.configs:
            config._attn_implementation = implementation
        delattr(self.model, MODULE)
        delattr(self.model.config, CONFIG_ENTRY)
        if self.undo.config_entry is not None:
            setattr(self.model.config, CONFIG_ENTRY, self.undo.config_entry)
        delattr(self.model, ATTRIBUTE)


@functools.cache
def _forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    """The wrapper of a class's forward; its signature stays, for Trainer, generate and PEFT look at
    it.
    """

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        attachment = getattr(self, ATTRIBUTE)
        attachment.begin(args, kwargs)
        for name in _RECIPE_INPUTS:
            kwargs.pop(name, None)
        try:
            return attachment.finish(attachment._original(self, "forward")(*args, **kwargs))
        finally:
            attachment.step = None

    return forward


def _attachment(function: str, model: nn.Module) -> Attachment:
    attachment = model.__dict__.get(ATTRIBUTE)
    if attachment is None:
        raise RuntimeError(f"{function}: model must have a CrocLayer attached, got a plain one")
    return attachment


def _check_dropout(model: nn.Module) -> None:
    dropout = getattr(model.config.get_text_config(), "attention_dropout", 0.0) or 0.0
    if dropout > 0:
        raise ValueError(
            "attach: attention_dropout of the text config must be 0 for this recipe, got "
            f"{dropout}; set "
            "model.config.get_text_config().attention_dropout = 0.0 before building the model"
        )


def attach(
    model: nn.Module,
    recipe: str = "croc",
    *,
    pool_size: int = 2048,
    mask_ratio: float = 0.75,
    **layer_options: Any,
) -> CrocLayer:
    """Put the Croc stage into a transformers model, this instance only.

    In training with labels, image features are normalised, masked and replaced, the language model
    runs with the recipe's attention, and ``output.loss`` becomes caption loss + ``loss_weight``
    times reconstruction loss; both parts are in ``output["caption_loss"]`` and
    ``output["reconstruction_loss"]``, detached. Otherwise (eval, generate, no labels) features are
    normalised, nothing is masked, the attention stays, and no reconstruction loss is added. An
    evaluation thus reports the caption loss.

    Under gradient accumulation pass ``num_masked_in_batch`` to the model, the number of tokens
    (:meth:`CrocLayer.num_loss_tokens`) over all micro-batches of the optimizer step. Where only
    ``num_items_in_batch`` is given, as by Trainer, a micro-batch weighs as much as its share of the
    labels.

    Args:
        model: one of :data:`families.FAMILIES`, not wrapped.
        recipe: ``"croc"``, ``"croc-released"`` or ``"victor"``.
        pool_size: rows of the pool.
        mask_ratio: part of each image's tokens that is masked.
        **layer_options: of :class:`CrocLayer`; device and dtype default to those of the language
            model.

    Returns:
        The layer, also at ``model.croc``: its parameters are the model's.

    Raises:
        RuntimeError: the model already has a layer.
        TypeError: the model class is not supported.
        ValueError: attention dropout with a recipe whose attention runs on our kernel; bad layer
            options.
        ImportError: transformers is out of range.
    """
    check_transformers()
    family = families.family_of(model)
    if ATTRIBUTE in model.__dict__:
        raise RuntimeError("attach: model must have no CrocLayer yet, got one; detach(model) first")
    weight = model.model.language_model.get_input_embeddings().weight
    options = {"device": weight.device, "dtype": weight.dtype} | layer_options
    layer = CrocLayer(
        model.config.get_text_config().hidden_size,
        pool_size,
        recipe,
        mask_ratio=mask_ratio,
        **options,
    )
    causal = layer.recipe.attention == "causal"
    if not causal:
        _check_dropout(model)
    attachment = Attachment(model, family)
    model.add_module(MODULE, layer)
    layer.train(model.training)
    attachment.undo.config_entry = getattr(model.config, CONFIG_ENTRY, None)
    saved = {k: v for k, v in layer_options.items() if k not in ("device", "dtype")}
    entry = {"recipe": layer.recipe.name, "pool_size": pool_size, "mask_ratio": mask_ratio, **saved}
    setattr(model.config, CONFIG_ENTRY, entry)
    setattr(model, ATTRIBUTE, attachment)
    attachment.undo.changes = [
        f"{type(model).__name__}.{MODULE}: new sub-module CrocLayer({layer.extra_repr()})",
        f"config.{CONFIG_ENTRY}: {entry}",
    ]
    attachment.connect()
    if not causal:
        attachment.switch_attention()
    return layer


def detach(model: nn.Module) -> CrocLayer:
    """Undo :func:`attach`: the instance is as before. Features are then no longer normalised.

    Returns:
        The layer that was attached.

    Raises:
        RuntimeError: nothing is attached.
    """
    attachment = _attachment("detach", model)
    layer = attachment.layer
    attachment.restore()
    return layer


def report(model: nn.Module) -> list[str]:
    """Every change that :func:`attach` made to this model, one line each.

    Raises:
        RuntimeError: nothing is attached.
    """
    return list(_attachment("report", model).undo.changes)
