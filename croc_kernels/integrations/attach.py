"""Put the Croc stage into one transformers model, take it out again, and say what was changed."""

from typing import Any

from torch import nn

from ..layer import CrocLayer
from . import outputs
from .families import family_of
from .faults import check_transformers
from .seams import Attachment
from .wiring import ATTRIBUTE, CONFIG_ENTRY, MODULE, connect, restore, switch_attention


def attachment_of(function: str, model: nn.Module) -> Attachment:
    """The model's attachment, or a RuntimeError that names ``function``."""
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
        model: one of :data:`croc_kernels.integrations.families.FAMILIES`, not wrapped.
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
    family = family_of(model)
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
    attachment.undo.changes = [
        f"{type(model).__name__}.{MODULE}: new sub-module CrocLayer({layer.extra_repr()})",
        f"config.{CONFIG_ENTRY}: {entry}",
    ]
    outputs.declare(model)
    connect(attachment)
    if not causal:
        switch_attention(attachment)
    return layer


def detach(model: nn.Module) -> CrocLayer:
    """Undo :func:`attach`: the instance is as before. Features are then no longer normalised.

    Returns:
        The layer that was attached.

    Raises:
        RuntimeError: nothing is attached.
    """
    attachment = attachment_of("detach", model)
    layer = attachment.layer
    restore(attachment)
    return layer


def report(model: nn.Module) -> list[str]:
    """Every change that :func:`attach` made to this model, one line each.

    Raises:
        RuntimeError: nothing is attached.
    """
    return list(attachment_of("report", model).undo.changes)
