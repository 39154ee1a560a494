"""Save a trained model so that transformers loads it without this package, features still
normalised.
"""

import inspect
import json
from pathlib import Path
from typing import Any

from torch import nn

from .attach import attachment_of
from .wiring import CONFIG_ENTRY, MODULE

_FILE = "modeling_normalized.py"

# Normalisation is no weight, so no stock class can hold it: this code goes along with the
# checkpoint.
_CODE = '''"""{root} with L2-normalised image features, as it was trained."""

import functools

import torch
from torch.nn import functional
from transformers import {root}
from {module} import {inner}

# What the language model multiplies its inputs by.
SCALE = {scale}


def normalize(features, newline):
    """One image, or a batch of images: rows of norm 1; newline rows stay."""
    if not isinstance(features, torch.Tensor):
        return type(features)(normalize(image, newline) for image in features)
    unit = functional.normalize(features.float(), dim=-1).to(features.dtype) / SCALE
    if newline is None:
        return unit
    is_newline = (features == newline.to(features.dtype)).all(-1, keepdim=True)
    return torch.where(is_newline, features, unit)


class Normalized{inner}({inner}):
    @functools.wraps({inner}.get_image_features)
    def get_image_features(self, *args, **kwargs):
        output = super().get_image_features(*args, **kwargs)
        newline = getattr(self, "image_newline", None)
        if hasattr(output, "pooler_output"):
            output.pooler_output = normalize(output.pooler_output, newline)
            return output
        if {deepstack}:
            return (normalize(output[0], newline), *output[1:])
        return normalize(output, newline)


class Normalized{root}({root}):
    def __init__(self, config):
        super().__init__(config)
        self.model.__class__ = Normalized{inner}
'''


def export(model: nn.Module, directory: str | Path, **options: Any) -> None:
    """Write what the stage trained as a checkpoint for transformers alone.

    The layer is left out: pool and head have no part in inference. The recipes train on normalised
    features, and those the exported model has too, through a small model file that goes with the
    weights: load it with ``AutoModelForImageTextToText.from_pretrained(directory,
    trust_remote_code=True)``. Loaded without that flag, or by its plain class, the weights are the
    same and the features are not normalised. The attention is the model's own, causal for LLaVA.

    Args:
        model: with an attached layer; it stays attached.
        directory: is made if missing.
        **options: of ``save_pretrained``.

    Raises:
        RuntimeError: nothing is attached.
    """
    attachment = attachment_of("export", model)
    directory = Path(directory)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(f"{MODULE}.")}
    if "save_original_format" in inspect.signature(model.save_pretrained).parameters:
        # Old names are translated on loading for stock classes only.
        options = {"save_original_format": False} | options
    model.save_pretrained(directory, state_dict=weights, **options)
    root, inner = type(model), type(attachment.inner)
    code = _CODE.format(
        root=root.__name__,
        inner=inner.__name__,
        module=inner.__module__,
        scale=attachment.scale,
        deepstack=attachment.family.deepstack,
    )
    (directory / _FILE).write_text(code)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config.pop(CONFIG_ENTRY, None)
    name = f"{_FILE.removesuffix('.py')}.Normalized{root.__name__}"
    config["auto_map"] = {"AutoModelForImageTextToText": name}
    file.write_text(json.dumps(config, indent=2) + "\n")
