"""Chat templates and processors: which are used, completed or refused, and with which words."""

import json

import pytest
import torch
from PIL import Image
from recipe_case import Case, dataset_of, records, turns, write_case
from transformers import AutoConfig, AutoProcessor

from croc_kernels.recipes.data import ConversationEncoder
from croc_kernels.recipes.processor import load_processor
from croc_kernels.recipes.records import BadSampleError, check_record

GOOD = {"image": "0.png", "conversations": turns("<image>\nDescribe.", "A square.")}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return write_case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def processor(case: Case):
    return AutoProcessor.from_pretrained(case.model)


HEAD = "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
BODY = "{{ '<image> ' if c['type'] == 'image' else c['text'] }}{% endfor %} {% endfor %}"
PROMPT = "{{ 'assistant:' if add_generation_prompt }}"


def encoder_with(case: Case, template: str) -> ConversationEncoder:
    own = AutoProcessor.from_pretrained(case.model)
    own.chat_template = template
    return ConversationEncoder(own)


def test_template_of_the_model_is_used_and_gets_an_end(case) -> None:
    encoder = encoder_with(case, HEAD + BODY + PROMPT)
    text, spans = encoder.render(check_record({"conversations": turns("Hello.", "Hi.")}))
    assert text == "user: Hello. assistant: Hi.</s>"
    assert [text[start:end] for start, end in spans] == [" Hi.</s>"]


def test_template_that_touches_images_is_refused(case, tmp_path) -> None:
    encoder = encoder_with(case, (HEAD + BODY + PROMPT).replace("<image> ", "<image>"))
    record = check_record(
        {"image": ["a", "b"], "conversations": turns("<image><image> And?", "Two.")}
    )
    pictures = [Image.new("RGB", (32, 32))] * 2
    with pytest.raises(ValueError, match="two pictures touch"):
        encoder(record, pictures)


def test_template_that_drops_images_is_refused(case) -> None:
    encoder = encoder_with(case, (HEAD + BODY + PROMPT).replace("<image> ", ""))
    record = check_record(GOOD)
    with pytest.raises(ValueError, match="must render 1 images once each"):
        encoder(record, [Image.new("RGB", (32, 32))])


def test_template_that_rewrites_earlier_turns_is_refused(case) -> None:
    encoder = encoder_with(case, "{{ messages | length }}" + HEAD + BODY + PROMPT)
    record = check_record({"conversations": turns("Hello.", "Hi.", "Bye.", "Bye.")})
    with pytest.raises(ValueError, match="renders turn 1 differently once more follow"):
        encoder.render(record)


def test_template_that_refuses_a_conversation_names_the_record(case, tmp_path) -> None:
    own = AutoProcessor.from_pretrained(case.model)
    own.chat_template = "{{ raise_exception('roles must alternate') }}"
    dataset = dataset_of(case, own, [GOOD], tmp_path)
    with pytest.raises(BadSampleError, match=r"record 0: the chat template refuses .* alternate"):
        dataset[0]


def test_processor_is_assembled_where_none_was_saved(case, processor, tmp_path) -> None:
    """A model directory with a tokenizer and an image processor, as older LLaVA releases have
    it.
    """
    bare = tmp_path / "bare"
    processor.tokenizer.save_pretrained(bare)
    processor.image_processor.save_pretrained(bare)
    config = AutoConfig.from_pretrained(case.model)
    config.save_pretrained(bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    made = records()[6:7]
    assembled = load_processor(bare, config)
    one = dataset_of(case, processor, made, tmp_path)[0]
    other = dataset_of(case, assembled, made, tmp_path)[0]
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(one["labels"], other["labels"])
    assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_processor_missing_is_an_error(case, processor, tmp_path) -> None:
    bare = tmp_path / "bare"
    processor.tokenizer.save_pretrained(bare)
    config = AutoConfig.from_pretrained(case.model)
    with pytest.raises(RuntimeError, match=r"load_processor: .*bare must have a processor; save"):
        load_processor(bare, config)


def test_processor_without_an_image_processor_is_an_error(case, processor, tmp_path) -> None:
    """transformers then hands out the tokenizer alone."""
    bare = tmp_path / "bare"
    processor.tokenizer.save_pretrained(bare)
    config = AutoConfig.from_pretrained(case.model)
    config.text_config.save_pretrained(bare)
    settings_file = bare / "tokenizer_config.json"
    own = json.loads(settings_file.read_text())
    own.pop("processor_class", None)
    settings_file.write_text(json.dumps(own))
    with pytest.raises(RuntimeError, match="must have an image processor, got"):
        load_processor(bare, config)
