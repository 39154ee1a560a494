"""The model classes that :func:`attach` knows, and how each hands out its image features."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """What differs between the supported model classes.

    Attributes:
        class_name: of the root model.
        newline: features come through ``pack_image_features``, which adds ``image_newline`` rows.
        spans: an image's place in the text follows from the ``"lengths"`` of its features, or,
            where several features make one image (tiles), from the ``"runs"`` of image tokens.
        deepstack: visual features are added again inside the language model and have to be masked
            there too.
        divided: up to 4.57 the features leave the model divided by sqrt(C), because the language
            model multiplies all its inputs by it.
        pixels: how an image is handed in: a ``"square"``, ``"tiles"`` of it, Qwen's ``"patches"``,
            or patches with their ``"positions"``.
        joined: in some versions (5.8 is one) the tokens of all images come as one matrix, and
            ``image_position_ids`` tell where each image ends.
    """

    class_name: str
    newline: bool = False
    spans: str = "lengths"
    deepstack: bool = False
    divided: bool = False
    joined: bool = False
    pixels: str = "square"


FAMILIES = {
    family.class_name: family
    for family in (
        Family("LlavaForConditionalGeneration"),
        Family("LlavaNextForConditionalGeneration", newline=True, pixels="tiles"),
        Family("LlavaOnevisionForConditionalGeneration", newline=True, pixels="tiles"),
        Family("InternVLForConditionalGeneration", spans="runs"),
        Family("Qwen2VLForConditionalGeneration", pixels="patches"),
        Family("Qwen2_5_VLForConditionalGeneration", pixels="patches"),
        Family("Qwen3VLForConditionalGeneration", deepstack=True, pixels="patches"),
        Family("Qwen3VLMoeForConditionalGeneration", deepstack=True, pixels="patches"),
        Family("Gemma3ForConditionalGeneration"),
        Family("Gemma4ForConditionalGeneration", joined=True, pixels="positions"),
        Family("PaliGemmaForConditionalGeneration", divided=True),
    )
}


def family_of(model: nn.Module) -> Family:
    """The family of a root model, subclasses (FSDP makes them) included.

    Raises:
        TypeError: the class is not supported.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise TypeError(
        f"attach: model must be one of {', '.join(FAMILIES)}, got {type(model).__name__}; unwrap "
        "PEFT, DDP or a "
        "compiled module first, and for other models call CrocLayer in your own forward"
    )


def image_token_id(config: Any) -> int:
    """The id of the placeholder, under either of its names."""
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise ValueError("attach: model.config must have image_token_id, got none")


def feature_scale(family: Family, language_model: nn.Module, hidden_size: int) -> float:
    """What the language model multiplies its inputs by, so that what it sees has the layer's
    scale.
    """
    embedding = language_model.get_input_embeddings()
    # Since 5.0 the embedding multiplies its own output and leaves the features alone.
    if family.divided and not hasattr(embedding, "embed_scale"):
        return float(hidden_size) ** 0.5
    return 1.0


def visual_positions(is_visual: Tensor, count: int) -> Tensor:
    """(count,) int64, where a bool tensor is True, in row-major order, without asking the device
    how many.

    Surplus places are dropped; missing ones read 0. transformers itself refuses a wrong number of
    image tokens.
    """
    flat = is_visual.reshape(-1)
    rank = flat.cumsum(0) - 1
    slot = torch.where(flat & (rank < count), rank, count)
    place = torch.arange(flat.shape[0], device=flat.device)
    return torch.zeros(count + 1, dtype=torch.int64, device=flat.device).scatter_(0, slot, place)[
        :count
    ]


@dataclass
class Newlines:
    """Which rows of packed features are ``image_newline``.

    Attributes:
        lengths: visual tokens of each image, newline rows not counted.
        is_newline: (S,) bool over all rows of all images.
    """

    lengths: list[int]
    is_newline: Tensor


def host_sizes(image_sizes: Any) -> list[list[int]]:
    """Image sizes as integers. They are on the host by now, unless somebody packs features outside
    of forward or names them by position: then it is one transfer, where transformers makes several
    per image.
    """
    if isinstance(image_sizes, Tensor):
        return image_sizes.tolist()
    return [size.tolist() if isinstance(size, Tensor) else list(size) for size in image_sizes]


def find_newlines(
    pack: Callable[..., tuple[Sequence[Tensor], Any]], arguments: dict[str, Any]
) -> Newlines:
    """Run ``pack_image_features`` on zeros with a newline of ones: the ones are the newline
    rows.
    """
    features = arguments["image_features"]
    zeros = [feature.new_zeros((*feature.shape[:2], 1)) for feature in features]
    bare, _ = pack(**(arguments | {"image_features": zeros, "image_newline": None}))
    lengths = [image.shape[0] for image in bare]
    newline = arguments.get("image_newline")
    if newline is None:
        marks = torch.cat(list(bare))[:, 0] > 0.5
    else:
        marked, _ = pack(
            **(arguments | {"image_features": zeros, "image_newline": zeros[0].new_ones(1)})
        )
        marks = torch.cat(list(marked))[:, 0] > 0.5
    return Newlines(lengths, marks)


def joined_lengths(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Tokens of each image, from what ``get_image_features`` of a joined family was called with."""
    bound = inspect.signature(type(module).get_image_features).bind(module, *args, **kwargs)
    positions = bound.arguments["image_position_ids"]
    patches = module.config.vision_config.pooling_kernel_size**2
    # The vision tower itself waits for the device here: it leaves out padding by a mask.
    return ((positions != -1).all(-1).sum(-1) // patches).tolist()


def read_features(
    family: Family, output: Any, lengths: Sequence[int] = ()
) -> tuple[Any, list[Tensor], list[Any]]:
    """What ``get_image_features`` returned, taken apart; ``lengths`` cut a matrix of all images.

    Returns:
        The features as they came (a list, tuple or tensor), one (T, C) tensor per image, and the
        deepstack features.
    """
    deepstack: list[Any] = []
    features = output
    if hasattr(output, "pooler_output"):
        features = output.pooler_output
        if family.deepstack:
            deepstack = list(output.deepstack_features)
    elif family.deepstack:
        features, deepstack = output[0], list(output[1])
    if isinstance(features, Tensor):
        images = list(features.unbind(0) if features.dim() == 3 else features.split(list(lengths)))
    else:
        images = list(features)
    return features, images, deepstack


def hide(feature: Any, shown: Tensor) -> Any:
    """A deepstack feature, zero where ``shown`` (S, 1) is False; one tensor, or one per image."""
    if isinstance(feature, Tensor):
        return feature * shown
    parts = shown.split([image.shape[0] for image in feature])
    return type(feature)(image * part for image, part in zip(feature, parts, strict=True))


def write_features(
    family: Family, output: Any, features: Any, images: list[Tensor], deepstack: list[Any]
) -> Any:
    """The inverse of :func:`read_features`."""
    if isinstance(features, Tensor):
        changed: Any = torch.stack(images) if features.dim() == 3 else torch.cat(images)
    else:
        changed = type(features)(images)
    if hasattr(output, "pooler_output"):
        output.pooler_output = changed
        if family.deepstack:
            output.deepstack_features = deepstack
        return output
    return (changed, deepstack) if family.deepstack else changed
