"""The model's processor and its conversation template: what turns pictures and turns of text into
model inputs.
"""

from pathlib import Path

from transformers import AutoProcessor, LlavaProcessor, PretrainedConfig, ProcessorMixin

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


def _complete(processor: LlavaProcessor, config: PretrainedConfig) -> LlavaProcessor:
    """A LlavaProcessor of the same parts that knows how many tokens an image of this model has."""
    vision = config.vision_config
    # CLIP puts one class token before the patches, SigLIP none; "default" drops the first token.
    has_class_token = "clip" in vision.model_type and "siglip" not in vision.model_type
    return LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=processor.chat_template,
        image_token=processor.tokenizer.convert_ids_to_tokens(config.image_token_id),
        num_additional_image_tokens=int(has_class_token),
    )


def load_processor(model: str | Path, config: PretrainedConfig) -> ProcessorMixin:
    """Load a model's processor; complete it for a LLaVA saved with a tokenizer and an image
    processor only, as its older releases are.

    Args:
        model: directory or name.
        config: the model's.

    Raises:
        RuntimeError: there is none, or its tokenizer is not a fast one.
    """
    try:
        processor = AutoProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"load_processor: {model} must have a processor; save one with "
            f"AutoProcessor.save_pretrained ({error})"
        ) from None
    if not hasattr(processor, "image_processor"):
        raise RuntimeError(
            f"load_processor: the processor of {model} must have an image processor, got "
            f"{type(processor).__name__}"
        )
    # Where no processor was saved, transformers makes a LlavaProcessor that knows no patch size.
    if isinstance(processor, LlavaProcessor) and processor.patch_size is None:
        processor = _complete(processor, config)
    if not processor.tokenizer.is_fast:
        raise RuntimeError(
            f"load_processor: the tokenizer of {model} must be a fast one, which tells where in "
            f"the text a token is, got {type(processor.tokenizer).__name__}"
        )
    return processor
