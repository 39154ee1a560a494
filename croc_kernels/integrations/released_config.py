"""``config.json`` of a released checkpoint as a ``LlavaConfig``, and back."""

import re
from collections.abc import Mapping
from typing import Any

from .names import RELEASES, Names

# Where the source's own config is kept, so that converting back gives it again.
SOURCE = "croc_source"
_MULTIMODAL = re.compile(
    r"^(mm_|image_|tune_|freeze_|use_mm_proj|croc_|vision_|tokenizer_|unfreeze_)"
)
# 72-wide heads of SigLIP so400m; CLIP and the smaller SigLIP towers have 64.
_HEADS = {1152: 16}


def release_of(config: Mapping[str, Any]) -> Names:
    """The code base that wrote ``config``.

    Raises:
        ValueError: its ``model_type`` is none of theirs.
    """
    for names in RELEASES.values():
        if config.get("model_type") == names.model_type:
            return names
    known = [names.model_type for names in RELEASES.values()]
    raise ValueError(
        f"convert: config.json must have model_type in {known}, got {config.get('model_type')!r}"
    )


def vision_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """CLIP's or SigLIP's config from the shapes of the tower's parameters.

    Args:
        shapes: of the names below ``vision_tower.vision_model.``.

    Raises:
        ValueError: the parameters are those of neither.
    """
    patch = shapes.get("embeddings.patch_embedding.weight")
    position = shapes.get("embeddings.position_embedding.weight")
    if patch is None or position is None:
        raise ValueError(
            "convert: the vision tower must be CLIP's or SigLIP's, or vision_config given, got "
            f"parameters such as {sorted(shapes)[:3]}"
        )
    clip = "embeddings.class_embedding" in shapes
    hidden, size = patch[0], patch[2]
    side = round((position[0] - clip) ** 0.5)
    layers = {m[1] for name in shapes if (m := re.match(r"encoder\.layers\.(\d+)\.", name))}
    return {
        "model_type": "clip_vision_model" if clip else "siglip_vision_model",
        "hidden_size": hidden,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": _HEADS.get(hidden, max(hidden // 64, 1)),
        "patch_size": size,
        "image_size": side * size,
        **({} if clip else {"vision_use_head": False}),
    }


def llava_config(
    config: Mapping[str, Any],
    names: Names,
    vision: Mapping[str, Any],
    vocab_size: int,
    image_token_index: int,
) -> dict[str, Any]:
    """The ``LlavaConfig`` of a released config, as a dictionary."""
    text = {
        name: value
        for name, value in config.items()
        if not _MULTIMODAL.match(name)
        and name not in ("architectures", "model_type", "_name_or_path", "auto_map", "torch_dtype")
    }
    text |= {"model_type": names.text_type, "vocab_size": vocab_size}
    clip = vision["model_type"].startswith("clip")
    # SigLIP towers were saved without the layers behind the features; CLIP's are whole.
    layer = config.get("mm_vision_select_layer", -2) if clip else -1
    patches = config.get("mm_vision_select_feature", "patch") == "patch"
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": dict(vision),
        "image_token_index": image_token_index,
        "image_seq_length": tokens + (0 if patches or not clip else 1),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default" if clip and patches else "full",
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "torch_dtype": config.get("torch_dtype", "float32"),
        SOURCE: dict(config),
    }


def released_config(config: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """The released config of a ``LlavaConfig``: the kept one, or one made from its fields."""
    kept = config.get(SOURCE)
    if kept is not None and kept.get("model_type") == names.model_type:
        return dict(kept)
    text = dict(config["text_config"])
    if text.get("model_type") != names.text_type:
        raise ValueError(
            f"convert: the language model must be {names.text_type} for {names.model_type}, "
            f"got {text.get('model_type')}"
        )
    architecture = {
        "croc_llama": "CrocLlamaForCausalLM",
        "llava_qwen": "LlavaQwenForCausalLM",
        "llava_llama": "LlavaLlamaForCausalLM",
    }[names.model_type]
    vision = config["vision_config"]
    return text | {
        "architectures": [architecture],
        "model_type": names.model_type,
        "torch_dtype": config.get("torch_dtype", config.get("dtype", "float32")),
        "use_mm_proj": True,
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        **({"croc_stage": False} if names.model_type == "croc_llama" else {}),
    }
