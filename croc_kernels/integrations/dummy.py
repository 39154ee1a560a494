"""The smallest image of a family, for a rank whose batch has none.

FSDP2 gathers and reduces the parameters of a unit in the unit's own forward and backward. Where the
vision tower is cut into such units, a rank without an image would leave the others waiting for
ever: it does at the same points of its forward what it would do to an image, on one of zeros, and
gives the result zero gradients. ZeRO-3 gathers per module, so there it is always like that.
"""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .families import Family
from .touch import is_sharded, several_ranks


def is_needed(inner: nn.Module, language_model: nn.Module) -> bool:
    """Whether some of the image path is gathered by its own modules, among several ranks."""
    if not several_ranks():
        return False
    children = (child for child in inner.children() if child is not language_model)
    return any(is_sharded(p) for child in children for p in child.parameters())


def _square(vision: Any) -> tuple[int, ...]:
    size = vision.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return 1, getattr(vision, "num_channels", 3), height, width


def inputs_of(family: Family, inner: nn.Module, like: Tensor) -> dict[str, Any]:
    """Arguments of ``get_image_features`` for one image, in dtype and device of ``like``."""
    config, vision, more = inner.config, inner.config.vision_config, {}
    if family.pixels == "patches":
        merge = vision.spatial_merge_size
        channels = getattr(vision, "in_channels", 3)
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        shape: tuple[int, ...] = (merge * merge, width)
        more["image_grid_thw"] = torch.tensor([[1, merge, merge]], device=like.device)
    elif family.pixels == "positions":
        side = vision.pooling_kernel_size
        shape = (1, side * side, 3 * vision.patch_size**2)
        axis = torch.arange(side, device=like.device)
        place = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
        more["image_position_ids"] = place.reshape(1, side * side, 2)
    else:
        shape = _square(vision)
    if family.pixels == "tiles":
        size = shape[-1]
        count = sys.modules[_module_of_tiles(inner)].image_size_to_num_patches
        tiles = count([size, size], config.image_grid_pinpoints, size)
        shape = (1, tiles, *shape[1:])
        more["image_sizes"] = torch.tensor([[size, size]], device=like.device)
    for name in (
        "vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio",
    ):  # fmt: skip
        if name in inspect.signature(type(inner).get_image_features).parameters:
            more[name] = getattr(config, name)
    return {"pixel_values": like.new_zeros(shape), **more}


def _module_of_tiles(inner: nn.Module) -> str:
    """Where the family's ``image_size_to_num_patches`` lives."""
    for cls in type(inner).__mro__:
        if hasattr(sys.modules.get(cls.__module__), "image_size_to_num_patches"):
            return cls.__module__
    raise RuntimeError(f"attach: {type(inner).__name__} must have image_size_to_num_patches")


def tensors_of(features: Any) -> list[Tensor]:
    """All tensors in lists of lists of them."""
    if isinstance(features, Tensor):
        return [features]
    return [tensor for part in features for tensor in tensors_of(part)]
