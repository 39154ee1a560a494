"""Where the Croc stage enters a transformers model: no forward is copied, no class is touched.

An :class:`Attachment` wraps two bound methods of the instance (``forward`` of the root,
``get_image_features`` of the model inside) and hooks its language model. ``forward`` is wrapped and
not hooked because PEFT calls it directly, and because accelerate's autocast then covers it. The
reconstruction loss is computed in the language model's forward hook: inside the root's forward,
where FSDP and ZeRO have the parameters whole, and inside autocast.
"""

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layer import CrocLayer, Replacement
from . import attention_interface, dummy, families, outputs, recipe_mask, touch, wiring

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
    stand_in: Replacement | None = None


class Attachment:
    """The seams between one model and its :class:`CrocLayer`; made by :func:`attach`."""

    def __init__(self, model: nn.Module, family: families.Family) -> None:
        self.model = model
        self.family = family
        self.undo = wiring.Undo()
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
        return getattr(self.model, wiring.MODULE)

    # --- the root's forward ---------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The root's forward between :meth:`_begin` and :meth:`_finish`."""
        kwargs = self._begin(args, kwargs)
        try:
            return self._finish(self.undo.original(self.model, "forward")(*args, **kwargs))
        finally:
            self.step = None

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keep what the seams need of the root's inputs; return those that the root understands."""
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        if given.get("pixel_values_videos") is not None:
            raise ValueError(
                "attach: pixel_values_videos must be None, the recipes are defined for images; "
                "detach(model) first"
            )
        encoded = given.get("mm_encoder_outputs") or {}
        if encoded and "mm_encoder_outputs" not in self.parameters:
            raise ValueError(
                "attach: mm_encoder_outputs must have transformers >= 5.18, older ones ignore it; "
                "pass pixel_values"
            )
        images = encoded.get("image") is not None or given.get("pixel_values") is not None
        if images and given.get("input_ids") is None:
            raise ValueError(
                "attach: input_ids must be given with images, they tell where the images are; got "
                "None"
            )
        inputs = {name: given.get(name) for name in _CAPTURED}
        if inputs["past_key_values"] is None:  # renamed in transformers 5.24
            inputs["past_key_values"] = given.get("cache")
        self.step = _Step(inputs, kwargs.get("num_masked_in_batch"))
        kept = {name: value for name, value in kwargs.items() if name not in _RECIPE_INPUTS}
        if isinstance(kept.get("image_sizes"), Tensor):
            # transformers reads them image by image, behind the projector too: once, before any
            # kernel of this step.
            kept["image_sizes"] = kept["image_sizes"].cpu()
        if self.model.training and given.get("labels") is not None:
            # No step needs a cache, and with one transformers does not look for packed documents.
            kept.setdefault("use_cache", False)
        if encoded.get("image") is not None:
            changed = self._replace(copy.copy(encoded["image"]))
            kept["mm_encoder_outputs"] = {**encoded, "image": changed}
        return kept

    def _finish(self, output: Any) -> Any:
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
        if self.model.training:
            loss = touch.in_step(loss, touch.image_path(self.inner, self.language_model))
        if plain:
            return (loss, *output[1:])
        return outputs.with_losses(output, loss, caption, reconstruction)

    # --- features -------------------------------------------------------------------------------

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """Image features: inside a forward those of the stage, else the projector's own."""
        output = self.undo.original(self.inner, "get_image_features")(*args, **kwargs)
        # generate() may encode images beforehand and hand them to forward, which comes by here.
        if self.step is None:
            return output
        joined = self.family.joined and isinstance(getattr(output, "pooler_output", None), Tensor)
        lengths = families.joined_lengths(self.inner, args, kwargs) if joined else ()
        return self._replace(output, lengths)

    def _replace(self, output: Any, lengths: Sequence[int] = ()) -> Any:
        """Normalise the features and, in training with labels, mask and replace them."""
        step = self.step
        held, images, deepstack = families.read_features(self.family, output, lengths)
        rows = torch.cat(images) if len(images) != 1 else images[0]
        step.row_lengths = tuple(image.shape[0] for image in images)
        active = self.model.training and step.inputs["labels"] is not None
        if self.family.newline and step.newlines is None:
            changed = self._normalize_packed(rows, active)
        else:
            changed = self._replace_rows(rows, active)
        if active:
            shown = ~step.replacement.masked[:, None]
            deepstack = [families.hide(feature, shown) for feature in deepstack]
        parts = list(changed.split(list(step.row_lengths)))
        return families.write_features(self.family, output, held, parts, deepstack)

    def _replace_rows(self, rows: Tensor, active: bool) -> Tensor:
        """The layer's work on all rows that are visual tokens."""
        step, lengths, keep = self.step, self.step.row_lengths, None
        if step.newlines is not None:
            lengths = tuple(step.newlines.lengths)
            keep = families.visual_positions(~step.newlines.is_newline, sum(lengths))
        tokens = rows if keep is None else rows.index_select(0, keep)
        step.replacement = self.layer.replace(tokens, lengths, active=active)
        tokens = step.replacement.embeddings.to(rows.dtype)
        if self.scale != 1.0:
            tokens = tokens / self.scale
        return tokens if keep is None else rows.index_copy(0, keep, tokens)

    def _normalize_packed(self, rows: Tensor, active: bool) -> Tensor:
        """Features that were encoded outside of forward: newline rows are told by their value."""
        if active:
            raise ValueError(
                "attach: mm_encoder_outputs must not be used in training with this model, its "
                "newline rows can't be "
                "counted; pass pixel_values"
            )
        newline = (rows == self.inner.image_newline.to(rows.dtype)).all(-1, keepdim=True)
        return torch.where(newline, rows, self.layer.normalize(rows))

    def pack_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """``pack_image_features`` of the model inside, remembering which rows are newlines."""
        pack = self.undo.original(self.inner, "pack_image_features")
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

    def before_inner(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Refuse a call that did not come through :meth:`forward`: the stage would silently be
        left out of it.
        """
        if self.step is not None:
            return
        if self.model.training or kwargs.get("pixel_values") is not None:
            raise RuntimeError(
                f"attach: {type(module).__name__} must be called by the forward that attach "
                "wrapped, or features stay raw and no image is reconstructed; either something "
                "replaced model.forward since (Liger's fused loss: apply it first, then attach) or "
                "calls model.model itself (TRL's SFTTrainer): docs/integrations.md, neighbours"
            )

    # --- the language model -----------------------------------------------------------------------

    def before_language_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand the recipe's mask to the language model, wherever it differs from the model's own:
        with images, and with labels where they end a prefix, whatever else is in the batch.
        """
        step, changed = self.step, {}
        if step is None:
            return None
        if not step.row_lengths and step.inputs["labels"] is not None:
            changed |= self._keep_step(kwargs["inputs_embeds"])
        mask = self._recipe_mask(module, kwargs.get("attention_mask"))
        changed |= {} if mask is None else {"attention_mask": mask}
        return (args, kwargs | changed) if changed else None

    def _keep_step(self, embeds: Tensor) -> dict[str, Any]:
        """Without images: do the same to an image of zeros, where other ranks would wait else."""
        if not dummy.is_needed(self.inner, self.language_model):
            return {}
        step, self.step = self.step, None
        try:
            inputs = dummy.inputs_of(self.family, self.inner, embeds)
            output = self.inner.get_image_features(**inputs)
        finally:
            self.step = step
        lengths = families.joined_lengths(self.inner, (), inputs) if self.family.joined else ()
        _, images, deepstack = families.read_features(self.family, output, lengths)
        rows = torch.cat(images)
        step.stand_in = self.layer.replace(rows, (len(rows),), active=self.model.training)
        features = [step.stand_in.embeddings, *dummy.tensors_of(deepstack)]
        return {"inputs_embeds": touch.with_zero_gradients(embeds, features)}

    def _recipe_mask(self, module: nn.Module, incoming: Any) -> Any:
        """What the layers get as their mask, or None to leave the model's own."""
        step, attention = self.step, self.layer.recipe.attention
        if attention == "causal":
            return None
        if not step.row_lengths and (attention != "prefix" or step.inputs["labels"] is None):
            return None
        if module.config._attn_implementation != attention_interface.NAME:
            raise RuntimeError(
                f'attach: attn_implementation of the text config must stay "croc" for recipe '
                f"{self.layer.recipe.name!r}, got {module.config._attn_implementation!r}"
            )
        cache = step.inputs["past_key_values"]
        recipe_mask.check_first(cache)
        length = self._ids().shape[1]
        window, layer_types = recipe_mask.window_of(module.config)
        keys = functools.partial(recipe_mask.key_length, cache=cache, length=length)
        if layer_types:
            masks = {}
            for kind in layer_types:
                own = incoming.get(kind) if isinstance(incoming, dict) else incoming
                mask = self._mask(window if kind == "sliding_attention" else None)
                masks[kind] = recipe_mask.packed_for(mask, keys(own))
            return masks
        has_types = getattr(module.config, "layer_types", None) is not None
        mask = self._mask(None if has_types else window)
        return recipe_mask.packed_for(mask, keys(incoming))

    def _ids(self) -> Tensor:
        """The token ids; the labels in their place where a batch without images has embeddings."""
        ids = self.step.inputs["input_ids"]
        return self.step.inputs["labels"] if ids is None else ids

    def _mask(self, window: int | None) -> attention_interface.MixedMask:
        """The recipe's attention over this forward's tokens."""
        inputs, ids = self.step.inputs, self._ids()
        batch, length = ids.shape
        padding = recipe_mask.padding_of(inputs["attention_mask"], length)
        documents = None
        if padding is None and inputs["past_key_values"] is None:
            documents = recipe_mask.documents_of(inputs["position_ids"], batch)
        mask, options = attention_interface.MixedMask, {"sliding_window": window}
        if self.layer.recipe.attention == "prefix" and documents is not None:
            return recipe_mask.packed_prefix(inputs["labels"], documents, window)
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
        if step is None or step.inputs["labels"] is None or not self.model.training:
            return
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if step.stand_in is not None:
            nothing = self.layer.loss(torch.zeros_like(step.stand_in.target), step.stand_in)
            step.reconstruction = touch.with_zero_gradients(torch.zeros_like(nothing), [nothing])
        if step.replacement is None:
            return
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
