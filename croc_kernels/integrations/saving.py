"""Load a model that was saved with its layer. ``save_pretrained`` needs no help: ``croc.*`` are
weights of the model.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attach import attach
from .wiring import CONFIG_ENTRY, MODULE

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def _files(directory: Path) -> list[Path]:
    """The safetensors files that hold the layer.

    Raises:
        FileNotFoundError: there are none.
    """
    index = directory / _INDEX
    if index.is_file():
        shards = json.loads(index.read_text())["weight_map"]
        names = {shard for key, shard in shards.items() if key.startswith(f"{MODULE}.")}
        return [directory / name for name in sorted(names)]
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    raise FileNotFoundError(
        f"from_pretrained: directory must hold {_SINGLE} or {_INDEX}, got {directory}"
    )


def _layer_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The layer's tensors, one at a time, without reading the rest of the checkpoint."""
    from safetensors import safe_open

    for file in _files(directory):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():
                if key.startswith(f"{MODULE}."):
                    yield key.removeprefix(f"{MODULE}."), opened.get_tensor(key)


def _plain_model(directory: Path, config: Any, options: dict[str, Any]) -> nn.Module:
    """The model without the layer; the layer's weights are no surprise, any other mismatch is."""
    import transformers

    cls = getattr(transformers, config.architectures[0])
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        model, info = cls.from_pretrained(
            directory, config=config, output_loading_info=True, **options
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    unexpected = sorted(k for k in info["unexpected_keys"] if not k.startswith(f"{MODULE}."))
    if missing or unexpected:
        raise ValueError(
            f"from_pretrained: {directory} must fit {cls.__name__}, got missing weights {missing} "
            "and unexpected "
            f"weights {unexpected}"
        )
    return model


def from_pretrained(directory: str | Path, **options: Any) -> nn.Module:
    """Load a model saved by ``save_pretrained`` while a layer was attached, and attach the layer
    again.

    Args:
        directory: local, with safetensors.
        **options: of transformers' ``from_pretrained``.

    Returns:
        The model in eval mode, as transformers returns it; its layer is ``model.croc``.

    Raises:
        ValueError: the directory has no layer, or its weights don't fit.
        FileNotFoundError: no safetensors file.
    """
    from transformers import AutoConfig

    directory = Path(directory)
    config = AutoConfig.from_pretrained(directory)
    entry = getattr(config, CONFIG_ENTRY, None)
    if entry is None:
        raise ValueError(
            f"from_pretrained: config.json must have an entry {CONFIG_ENTRY!r}, got none in "
            f"{directory}; load it with "
            "transformers and call attach(model)"
        )
    delattr(config, CONFIG_ENTRY)
    model = _plain_model(directory, config, options)
    layer = attach(model, **entry)
    weights = dict(_layer_weights(directory))
    expected = set(layer.state_dict())
    if set(weights) != expected:
        raise ValueError(
            f"from_pretrained: {directory} must hold {sorted(expected)} of the layer, got "
            f"{sorted(weights)}"
        )
    with torch.no_grad():
        layer.load_state_dict(weights)
    return model
