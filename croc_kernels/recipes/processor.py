"""The model's processor and its conversation template: what turns pictures and turns of text into
model inputs.
"""

from pathlib import Path

from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    LlavaProcessor,
    PreTrainedConfig,
    ProcessorMixin,
)

# Used where neither the processor nor its tokenizer brings a chat template. It renders
#   USER: <image>\nDescribe the picture. ASSISTANT: A cat sleeps on a sofa.</s>USER: ...
# in the order of the file, every picture followed by a line break so that two pictures never touch.
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{ {'user': 'USER:', 'assistant': 'ASSISTANT:', 'system': 'SYSTEM:'}[message['role']] }}
{%- for part in message['content'] -%}
{{ ' ' if loop.first or loop.previtem['type'] != 'image' }}
{{- 'IMAGE_TOKEN\\n' if part['type'] == 'image' else part['text'] }}
{%- endfor -%}
{{ 'EOS_TOKEN' if message['role'] == 'assistant' else ' ' }}
{%- endfor -%}
{{ 'ASSISTANT:' if add_generation_prompt else '' }}"""


def plain_template(image_token: str, eos_token: str | None) -> str:
    """The documented template for a tokenizer with these special tokens."""
    return PLAIN_TEMPLATE.replace("IMAGE_TOKEN", image_token).replace("EOS_TOKEN", eos_token or "")


def chat_template(processor: ProcessorMixin) -> str:
    """The template of the processor, else of its tokenizer, else the plain one."""
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or plain_template(processor.image_token, processor.tokenizer.eos_token)


def _assemble(model: str | Path, config: PreTrainedConfig) -> ProcessorMixin:
    """A LlavaProcessor from a tokenizer and an image processor that were saved without one."""
    vision = config.vision_config
    # CLIP puts one class token before the patches, SigLIP none; "default" drops the first token
    # again.
    has_class_token = "clip" in vision.model_type and "siglip" not in vision.model_type
    tokenizer = AutoTokenizer.from_pretrained(model)
    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(model),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
        num_additional_image_tokens=int(has_class_token),
    )


def load_processor(model: str | Path, config: PreTrainedConfig) -> ProcessorMixin:
    """Load the processor saved with a model, or assemble one for a LLaVA saved without.

    Args:
        model: directory or name.
        config: the model's.

    Raises:
        RuntimeError: there is none and the model is no LLaVA, or its tokenizer is not a fast one.
    """
    try:
        processor = AutoProcessor.from_pretrained(model)
    except (OSError, ValueError):
        processor = None
    if not hasattr(processor, "image_processor"):
        if config.model_type != "llava":
            raise RuntimeError(
                f"load_processor: {model} must have a processor with an image processor, got "
                f"{type(processor).__name__}; save one with AutoProcessor.save_pretrained"
            )
        processor = _assemble(model, config)
    if not processor.tokenizer.is_fast:
        raise RuntimeError(
            f"load_processor: the tokenizer of {model} must be a fast one, which tells where in "
            f"the text a token is, got {type(processor.tokenizer).__name__}"
        )
    return processor
