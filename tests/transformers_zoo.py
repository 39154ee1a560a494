"""Tiny random models of every supported family, and batches for them: two images, a text-only
sample, padding.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 96
IMAGE, VIDEO, VISION_START, VISION_END = 90, 91, 92, 93
HIDDEN = 32
# The function at the bottom of the trace where transformers (5.0 to 5.8 with torch 2.13) can't be
# compiled as one graph, whatever the attention: it counts image tokens.
UNTRACEABLE = "in torch_compilable_check"
UNTRACEABLE_REASON = "transformers' own count of image tokens can't be traced in this version"


def text_options(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def vision_options(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        **more,
    }


def llama(**more: Any) -> Any:
    return transformers.LlamaConfig(**text_options(**more))


def qwen2(**more: Any) -> Any:
    return transformers.Qwen2Config(**text_options(**more))


def gemma3_text(**more: Any) -> Any:
    kinds = ["sliding_attention", "full_attention"]
    return transformers.Gemma3TextConfig(
        **text_options(head_dim=8, sliding_window=3, layer_types=kinds, **more)
    )


def clip() -> Any:
    return transformers.CLIPVisionConfig(**vision_options(projection_dim=16))


def siglip(**more: Any) -> Any:
    return transformers.SiglipVisionConfig(**vision_options(vision_use_head=False, **more))


def llava_config() -> Any:
    return transformers.LlavaConfig(
        vision_config=clip(), text_config=llama(), image_token_index=IMAGE
    )


def llava_next_config() -> Any:
    return transformers.LlavaNextConfig(
        vision_config=clip(), text_config=llama(), image_token_index=IMAGE,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )  # fmt: skip


def llava_onevision_config() -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=siglip(), text_config=qwen2(), image_token_index=IMAGE,
        video_token_index=VIDEO, image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )  # fmt: skip


def internvl_config() -> Any:
    return transformers.InternVLConfig(
        vision_config=vision_options(image_size=[16, 16], patch_size=[4, 4]),
        text_config=qwen2(tie_word_embeddings=True).to_dict(), image_token_id=IMAGE,
        image_seq_length=4,
    )  # fmt: skip


def qwen_vision(**more: Any) -> dict[str, Any]:
    return {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": HIDDEN, **more,
    }  # fmt: skip


def qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }  # fmt: skip


def qwen_text(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    return text_options(rope_parameters=rope, rope_scaling=rope | {"type": "default"}, **more)


def qwen2_vl_config() -> Any:
    vision = qwen_vision(embed_dim=16, hidden_size=HIDDEN, mlp_ratio=2)
    return transformers.Qwen2VLConfig(vision_config=vision, text_config=qwen_text(), **qwen_ids())


def qwen2_5_vl_config() -> Any:
    vision = qwen_vision(window_size=16, fullatt_block_indexes=[1])
    return transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=qwen_text(), **qwen_ids()
    )


def qwen3_vl_config() -> Any:
    vision = qwen_vision(num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    return transformers.Qwen3VLConfig(
        vision_config=vision, text_config=qwen_text(head_dim=8), **qwen_ids()
    )


def qwen3_vl_moe_config() -> Any:
    vision = qwen_vision(num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    text = qwen_text(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    return transformers.Qwen3VLMoeConfig(vision_config=vision, text_config=text, **qwen_ids())


def smolvlm_config(kind: str = "SmolVLM") -> Any:
    return getattr(transformers, f"{kind}Config")(
        vision_config=vision_options(image_size=16), text_config=llama(), image_token_id=IMAGE,
        scale_factor=2,
    )  # fmt: skip


def mistral3_config() -> Any:
    return transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**vision_options(image_size=16)),
        text_config=transformers.MistralConfig(**text_options(head_dim=8)), image_token_index=IMAGE,
        spatial_merge_size=2,
    )  # fmt: skip


def gemma3_config() -> Any:
    return transformers.Gemma3Config(
        vision_config=siglip(image_size=16), text_config=gemma3_text(), mm_tokens_per_image=4,
        image_token_index=IMAGE,
    )  # fmt: skip


def paligemma_config(text: Any = None) -> Any:
    text = text or transformers.GemmaConfig(**text_options(head_dim=8))
    return transformers.PaliGemmaConfig(
        vision_config=siglip(projection_dim=HIDDEN), text_config=text, projection_dim=HIDDEN,
        image_token_index=IMAGE, hidden_size=HIDDEN,
    )  # fmt: skip


def paligemma2_config() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    return paligemma_config(
        transformers.Gemma2Config(
            **text_options(head_dim=8, sliding_window=6, layer_types=kinds, query_pre_attn_scalar=8)
        )
    )


def gemma4_config(global_head_dim: int = 8) -> Any:
    kinds = ["sliding_attention", "full_attention"]
    text = text_options(
        head_dim=8, global_head_dim=global_head_dim, sliding_window=3, layer_types=kinds,
        use_bidirectional_attention="vision", hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCABULARY,
    )  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4,
        "pooling_kernel_size": 2, "position_embedding_size": 16,
    }  # fmt: skip
    return transformers.Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=IMAGE,
        video_token_id=VIDEO, audio_token_id=94, boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
    )  # fmt: skip


def positioned(n: int) -> dict[str, Any]:
    place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
    return {
        "pixel_values": torch.rand(n, 16, 48),
        "image_position_ids": place.reshape(1, 16, 2).expand(n, -1, -1).contiguous(),
    }


@dataclass
class Case:
    """One family: its configuration, model class, and the extra inputs of its images."""

    name: str
    config: Callable[[], Any]
    model_class: str
    pixels: Callable[[int], dict[str, Any]] | None = lambda n: {
        "pixel_values": torch.randn(n, 3, 8, 8)
    }
    token_types: str | None = None
    wrap: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> str | None:
        """Why the installed transformers can't run this case."""
        if not hasattr(transformers, self.model_class):
            return f"transformers {transformers.__version__} has no {self.model_class}"
        return None

    def model(self, seed: int = 0, **options: Any) -> nn.Module:
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)._from_config(self.config(), **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Newlines, norms' offsets and position tables start at zero in some families.
                if parameter.dim() >= 1 and not name.endswith("norm.weight"):
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()


def patches(grids: list[list[int]]) -> dict[str, Any]:
    rows = sum(t * h * w for t, h, w in grids)
    return {
        "pixel_values": torch.randn(rows, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor(grids),
    }


def anyres(n: int) -> dict[str, Any]:
    sizes = [[8, 14], [16, 16], [15, 8]]
    return {
        "pixel_values": torch.randn(n, 5, 3, 8, 8),
        "image_sizes": torch.tensor([sizes[i % 3] for i in range(n)]),
    }


def square(n: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(n, 3, 16, 16)}


def single_tiles(n: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(n, 1, 3, 16, 16)}


def sized(n: int) -> dict[str, Any]:
    return square(n) | {"image_sizes": torch.tensor([[16, 16]] * n)}


def grids(n: int) -> dict[str, Any]:
    return patches([[[1, 4, 4], [1, 4, 8], [1, 8, 4]][i % 3] for i in range(n)])


def qwen(name: str, config: Callable[[], Any], kind: str) -> Case:
    model_class = f"{kind}ForConditionalGeneration"
    return Case(
        name, config, model_class, grids, "mm_token_type_ids", wrap=(VISION_START, VISION_END)
    )


CASES = {
    case.name: case
    for case in (
        Case("llava", llava_config, "LlavaForConditionalGeneration"),
        Case("llava_next", llava_next_config, "LlavaNextForConditionalGeneration", anyres),
        Case(
            "llava_onevision",
            llava_onevision_config,
            "LlavaOnevisionForConditionalGeneration",
            anyres,
        ),
        Case("internvl", internvl_config, "InternVLForConditionalGeneration", square),
        qwen("qwen2_vl", qwen2_vl_config, "Qwen2VL"),
        qwen("qwen2_5_vl", qwen2_5_vl_config, "Qwen2_5_VL"),
        qwen("qwen3_vl", qwen3_vl_config, "Qwen3VL"),
        qwen("qwen3_vl_moe", qwen3_vl_moe_config, "Qwen3VLMoe"),
        Case("gemma3", gemma3_config, "Gemma3ForConditionalGeneration", square, "token_type_ids"),
        Case(
            "gemma4",
            gemma4_config,
            "Gemma4ForConditionalGeneration",
            positioned,
            "mm_token_type_ids",
        ),
        Case(
            "paligemma",
            paligemma_config,
            "PaliGemmaForConditionalGeneration",
            token_types="prefix",
        ),
        Case(
            "paligemma2",
            paligemma2_config,
            "PaliGemmaForConditionalGeneration",
            token_types="prefix",
        ),
    )
}


# Image models that attach() does not know: their attention alone.
STAGELESS_CASES = {
    case.name: case
    for case in (
        Case("smolvlm", smolvlm_config, "SmolVLMForConditionalGeneration", single_tiles),
        Case(
            "idefics3",
            lambda: smolvlm_config("Idefics3"),
            "Idefics3ForConditionalGeneration",
            single_tiles,
        ),
        Case("mistral3", mistral3_config, "Mistral3ForConditionalGeneration", sized),
    )
}

# Models of text alone: batch() gives them the same samples without images.
TEXT_CASES = {
    "llama": Case("llama", llama, "LlamaForCausalLM", None),
    "qwen2": Case("qwen2", qwen2, "Qwen2ForCausalLM", None),
}


def cases(*fast: str, text: bool = False) -> list:
    """Parameters of a test: all families, with ``text`` those of text alone too; those that are not
    named are slow.
    """
    return [
        pytest.param(case, id=name, marks=() if name in fast else pytest.mark.slow)
        for name, case in (CASES | (TEXT_CASES if text else {})).items()
    ]


def needs(case: Case) -> None:
    """Skip the test where the installed transformers has no such model."""
    if case.missing:
        pytest.skip(case.missing)


def image_lengths(model: nn.Module, pixels: dict[str, Any]) -> list[int]:
    """Rows of each image as the plain model makes them."""
    inner = model.model
    given = dict(pixels)
    options = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")
    given |= {name: getattr(model.config, name) for name in options if hasattr(model.config, name)}
    with torch.no_grad():
        output = inner.get_image_features(**given)
    features = getattr(output, "pooler_output", output)
    if isinstance(features, tuple) and not isinstance(features[0], Tensor):
        features = features[0]
    if isinstance(features, Tensor) and features.dim() == 2:  # the tokens of all images, joined
        count = pixels["pixel_values"].shape[0]
        return [features.shape[0] // count] * count
    return [feature.shape[0] for feature in features]


def batch(
    case: Case, model: nn.Module, *, side: str = "right", seed: int = 1, adjacent: bool = False
) -> dict[str, Any]:
    """Two images in the first sample, one in the second, none in the third; text after all of
    them.
    """
    torch.manual_seed(seed)
    pixels = case.pixels(3) if case.pixels else {}
    lengths = image_lengths(model, pixels) if pixels else [0, 0, 0]

    def image(i: int) -> list[int]:
        return [*case.wrap[:1], *[IMAGE] * lengths[i], *case.wrap[1:]]

    def text(n: int) -> list[int]:
        return torch.randint(3, 80, (n,)).tolist()

    between = [] if adjacent else text(2)
    prompts = [text(2) + image(0) + between + image(1) + text(2), text(1) + image(2), text(7)]
    samples = [(prompt, text(n)) for prompt, n in zip(prompts, (4, 3, 5), strict=True)]
    longest = max(len(p) + len(a) for p, a in samples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    types = []
    for prompt, answer in samples:
        pad = longest - len(prompt) - len(answer)
        left, right = (pad, 0) if side == "left" else (0, pad)
        ids = prompt + answer
        rows["input_ids"].append([0] * left + ids + [0] * right)
        rows["attention_mask"].append([0] * left + [1] * len(ids) + [0] * right)
        rows["labels"].append([-100] * (left + len(prompt)) + answer + [-100] * right)
        if case.token_types == "prefix":
            kind = [0] * len(prompt) + [1] * len(answer)
        else:
            kind = [int(token == IMAGE) for token in ids]
        types.append(
            [1] * left + kind + [1] * right
            if case.token_types == "prefix"
            else [0] * left + kind + [0] * right
        )
    result: dict[str, Any] = {name: torch.tensor(value) for name, value in rows.items()}
    accepted = inspect.signature(type(model).forward).parameters
    if case.token_types is not None and (
        case.token_types != "mm_token_type_ids" or case.token_types in accepted
    ):
        name = "token_type_ids" if case.token_types == "prefix" else case.token_types
        result[name] = torch.tensor(types)
    return result | pixels


def prompts_only(inputs: dict[str, Any], row: int = 0) -> dict[str, Any]:
    """The first sample without its answer, to generate from."""
    length = int((inputs["labels"][row] != -100).nonzero()[0])
    cut = {
        name: value[row : row + 1, :length]
        for name, value in inputs.items()
        if name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    }
    return cut


def first_pixels(case: Case, n: int) -> dict[str, Any]:
    """Pixels of ``n`` images of the geometry that :func:`batch` starts with."""
    torch.manual_seed(7)
    return case.pixels(n) if case.pixels else {}
