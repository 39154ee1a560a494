"""The data set: errors that name file and index, labels, templates, and images that are never
cut.
"""

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from recipe_case import TOKENS, Case, dataset_of, records, turns, write_case, write_records
from transformers import AutoProcessor

from croc_kernels.recipes.data import IGNORE, Collator, ConversationEncoder
from croc_kernels.recipes.records import (
    BadSampleError,
    LlavaRecords,
    Note,
    SampleReport,
    SampleTooLongError,
    check_record,
)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return write_case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def processor(case: Case):
    return AutoProcessor.from_pretrained(case.model)


def text_of(processor, ids: torch.Tensor) -> str:
    return processor.tokenizer.decode(ids[ids >= 0]).replace("<image>" * TOKENS, "<image>")


# --- records --------------------------------------------------------------------------------------

GOOD = {"image": "0.png", "conversations": turns("<image>\nDescribe.", "A square.")}
MALFORMED = [
    pytest.param([], "a record must be an object, got list", id="list"),
    pytest.param({}, "conversations must be a non-empty list, got None", id="no-conversations"),
    pytest.param(
        {"conversations": []}, "conversations must be a non-empty list, got []", id="empty"
    ),
    pytest.param(
        GOOD | {"image": 3}, "image must be a path or a list of paths, got 3", id="image-number"
    ),
    pytest.param(
        GOOD | {"image": ["0.png", None]},
        "image must be a path or a list of paths",
        id="image-none",
    ),
    pytest.param(
        GOOD | {"image": ["0.png", "1.png"]}, "it has 2 images but 1 <image>", id="too-many-images"
    ),
    pytest.param(
        {"conversations": GOOD["conversations"]}, "it has 0 images but 1 <image>", id="no-image"
    ),
    pytest.param(
        {"conversations": [{"from": "human"}]}, 'turn 0 must have "from" and "value"', id="no-value"
    ),
    pytest.param(
        {"conversations": [{"from": "robot", "value": "Hi."}]},
        "turn 0: role must be one of .*, got 'robot'",
        id="role",
    ),
    pytest.param(
        {"conversations": [{"from": "human", "value": 7}]},
        "turn 0: value must be text, got int",
        id="value-number",
    ),
    pytest.param(
        {"conversations": turns("Hello.")}, "no turn of gpt has text", id="nothing-supervised"
    ),
    pytest.param(
        {"conversations": turns("Hello.", " ")}, "no turn of gpt has text", id="empty-answer"
    ),
]


@pytest.mark.parametrize(("record", "message"), MALFORMED)
def test_records_malformed_names_file_and_index(record, message: str, tmp_path: Path) -> None:
    data = write_records(tmp_path / "data.json", [GOOD, GOOD, record])
    match = f"data.json: record 2: {message}".replace("[]", r"\[\]")
    with pytest.raises(BadSampleError, match=match):
        LlavaRecords(data)


def test_records_skip_bad_keeps_the_rest_and_notes_the_bad(tmp_path: Path) -> None:
    data = write_records(tmp_path / "data.json", [GOOD, {}, GOOD])
    found = LlavaRecords(data, skip_bad=True)
    assert [found[position][0] for position in range(len(found))] == [0, 2]
    assert found[1][1] == check_record(GOOD)
    assert [(note.index, note.kind) for note in found.notes] == [(1, "bad")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[{", "data.json: not valid JSON", id="broken"),
        pytest.param("{}", "data.json: it must hold a list of records, got dict", id="object"),
        pytest.param("[]", "data.json: it must have at least one usable record", id="empty"),
        pytest.param("[3]", "data.json: it must have at least one usable record", id="all-bad"),
    ],
)
def test_records_file_errors(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        LlavaRecords(path, skip_bad=True)


def test_records_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        LlavaRecords(tmp_path / "none.json")


def test_bad_sample_error_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BadSampleError("a.json", 3, "no")))
    assert (str(error), error.index) == ("a.json: record 3: no", 3)


def test_report_counts_each_record_once_and_survives_saving(tmp_path: Path) -> None:
    report = SampleReport("a.json")
    assert report.add(Note(7, "bad", "broken"))
    assert not report.add(Note(7, "bad", "broken"))
    report.add(Note(2, "too long", "it has 900 tokens"))
    report.save(tmp_path / "report.json")
    again = SampleReport("a.json")
    again.load(tmp_path / "report.json")
    assert again.lines() == report.lines()
    assert report.lines() == [
        "a.json: 1 bad and 1 too long samples left out, 0 cut after their last image",
        "  record 2 (too long): it has 900 tokens",
        "  record 7 (bad): broken",
    ]


# --- pictures -------------------------------------------------------------------------------------


def test_dataset_missing_picture_names_file_and_index(case, processor, tmp_path) -> None:
    made = [GOOD, GOOD | {"image": "nowhere.png"}]
    dataset = dataset_of(case, processor, made, tmp_path)
    with pytest.raises(
        BadSampleError, match=r"data\.json: record 1: picture .*nowhere\.png does not exist"
    ):
        dataset[1]


@pytest.mark.parametrize("kind", ["text", "cut"])
def test_dataset_unreadable_picture_names_file_and_index(
    kind: str, case, processor, tmp_path
) -> None:
    whole = (case.images / "0.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(
        b"no picture" if kind == "text" else whole[: len(whole) // 2]
    )
    made = [GOOD | {"image": str(tmp_path / "bad.png")}]
    dataset = dataset_of(case, processor, made, tmp_path)
    with pytest.raises(
        BadSampleError, match=r"data\.json: record 0: picture .*bad\.png can't be read"
    ):
        dataset[0]


def test_dataset_skip_bad_takes_the_next_sample_and_notes_the_bad_one(
    case, processor, tmp_path
) -> None:
    made = [GOOD | {"image": "nowhere.png"}, GOOD]
    dataset = dataset_of(case, processor, made, tmp_path, skip_bad=True)
    sample, other = dataset[0], dataset[1]
    assert torch.equal(sample["input_ids"], other["input_ids"])
    assert [(note.index, note.kind) for note in sample["notes"]] == [(0, "bad")]
    assert other["notes"] == ()


def test_dataset_notes_come_out_of_a_worker(case, processor, tmp_path) -> None:
    made = [GOOD | {"image": "nowhere.png"}, GOOD]
    dataset = dataset_of(case, processor, made, tmp_path, skip_bad=True)
    pad = processor.tokenizer.pad_token_id
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=1, collate_fn=Collator(pad)
    )
    (batch,) = loader
    assert [note.index for note in batch["notes"]] == [0]


def test_dataset_without_a_usable_sample_says_why(case, processor, tmp_path) -> None:
    dataset = dataset_of(case, processor, [GOOD], tmp_path, max_length=8)
    with pytest.raises(RuntimeError, match="no usable sample"):
        dataset[0]


# --- tokens and labels ----------------------------------------------------------------------------


def test_sample_has_the_documented_text_and_labels(case, processor, tmp_path) -> None:
    made = [{"image": "2.png", "conversations": turns("<image>\nWhat?", "A.", "Sure?", "Yes.")}]
    sample = dataset_of(case, processor, made, tmp_path)[0]
    text = "<s>USER: <image>\nWhat? ASSISTANT: A.</s>USER: Sure? ASSISTANT: Yes.</s>"
    assert text_of(processor, sample["input_ids"]) == text
    assert text_of(processor, sample["labels"]) == " A.</s> Yes.</s>"
    supervised = sample["labels"] != IGNORE
    assert torch.equal(sample["labels"][supervised], sample["input_ids"][supervised])
    assert sample["image_lengths"] == (TOKENS,)
    assert sample["pixel_values"].shape == (1, 3, 32, 32)
    assert sample["attention_mask"].tolist() == [1] * len(sample["input_ids"])


def test_sample_keeps_images_where_they_stand_and_apart(case, processor, tmp_path) -> None:
    conversation = turns("First <image> then <image><image> what?", "Three.")
    made = [{"image": ["0.png", "1.png", "0.png"], "conversations": conversation}]
    sample = dataset_of(case, processor, made, tmp_path)[0]
    expected = "USER: First <image>\nthen <image>\n<image>\nwhat? ASSISTANT:"
    text = text_of(processor, sample["input_ids"])
    assert " ".join(text.split()).startswith("<s>" + " ".join(expected.split()))
    assert sample["image_lengths"] == (TOKENS,) * 3
    assert torch.equal(sample["pixel_values"][0], sample["pixel_values"][2])
    assert not torch.equal(sample["pixel_values"][0], sample["pixel_values"][1])


def test_sample_without_an_image_has_no_pixels(case, processor, tmp_path) -> None:
    made = [{"conversations": turns("Hello.", "Hi.")}]
    sample = dataset_of(case, processor, made, tmp_path)[0]
    assert "pixel_values" not in sample
    assert sample["image_lengths"] == ()
    assert text_of(processor, sample["labels"]) == " Hi.</s>"


def test_sample_system_turn_is_not_supervised(case, processor, tmp_path) -> None:
    conversation = [{"from": "system", "value": "Be brief."}, *turns("Hello.", "Hi.")]
    sample = dataset_of(case, processor, [{"conversations": conversation}], tmp_path)[0]
    text = "<s>SYSTEM: Be brief. USER: Hello. ASSISTANT: Hi.</s>"
    assert text_of(processor, sample["input_ids"]) == text
    assert text_of(processor, sample["labels"]) == " Hi.</s>"


def test_collator_pads_and_stacks(case, processor, tmp_path) -> None:
    dataset = dataset_of(case, processor, records(), tmp_path)
    samples = [dataset[position] for position in (0, 6, 7)]
    batch = Collator(processor.tokenizer.pad_token_id)(samples)
    longest = max(len(sample["input_ids"]) for sample in samples)
    assert batch["input_ids"].shape == (3, longest)
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["image_lengths"] == (TOKENS,) * 3
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        assert torch.equal(batch["labels"][row, :length], sample["labels"])
        assert (batch["labels"][row, length:] == IGNORE).all()
        assert (batch["input_ids"][row, length:] == processor.tokenizer.pad_token_id).all()
        assert int(batch["attention_mask"][row].sum()) == length


def test_collator_without_any_image_has_no_pixels(case, processor, tmp_path) -> None:
    dataset = dataset_of(case, processor, records(), tmp_path)
    assert "pixel_values" not in Collator(0)([dataset[7], dataset[7]])


# --- length ---------------------------------------------------------------------------------------


def test_text_is_cut_after_the_last_image_and_noted(case, processor, tmp_path) -> None:
    made = [{"image": "0.png", "conversations": turns("<image>\nWhat?", "Word " * 60)}]
    sample = dataset_of(case, processor, made, tmp_path, max_length=60)[0]
    assert len(sample["input_ids"]) == len(sample["labels"]) == len(sample["attention_mask"]) == 60
    (note,) = sample["notes"]
    assert (note.index, note.kind) == (0, "cut")
    assert note.reason.startswith("text cut from ")


def test_sample_whose_images_do_not_fit_is_left_out_and_noted(case, processor, tmp_path) -> None:
    images = ["0.png"] * 4
    made = [{"image": images, "conversations": turns("<image>" * 4, "Four.")}, GOOD]
    dataset = dataset_of(case, processor, made, tmp_path, max_length=60)
    with pytest.raises(SampleTooLongError, match=r"data\.json: record 0: its images end at token"):
        dataset.encode(0)
    sample = dataset[0]
    assert [(note.index, note.kind) for note in sample["notes"]] == [(0, "too long")]
    assert sample["image_lengths"] == (TOKENS,)


def test_sample_that_would_lose_every_label_is_left_out(case, processor, tmp_path) -> None:
    made = [{"conversations": turns("Word " * 60, "Yes.")}, GOOD]
    dataset = dataset_of(case, processor, made, tmp_path, max_length=50)
    with pytest.raises(SampleTooLongError, match="none of the first 50 is supervised"):
        dataset.encode(0)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pieces=st.lists(st.sampled_from(["<image>", "word ", "a longer piece of text "]), max_size=8),
    answers=st.lists(st.integers(1, 30), min_size=1, max_size=2),
    max_length=st.integers(4, 150),
)
def test_no_image_is_ever_cut_and_no_sample_unsupervised(
    case, processor, pieces: list[str], answers: list[int], max_length: int
) -> None:
    images = pieces.count("<image>")
    texts = ["".join(pieces) or "Hello."]
    for length in answers:
        texts += ["yes " * length, "More."]
    record = check_record({"image": ["0.png"] * images, "conversations": turns(*texts[:-1])})
    encoder = ConversationEncoder(processor, max_length)
    whole, _ = ConversationEncoder(processor)(record, [Image.new("RGB", (32, 32))] * images)
    image_tokens = whole["input_ids"] == encoder.image_token_id
    try:
        sample, cut = encoder(record, [Image.new("RGB", (32, 32))] * images)
    except OverflowError:
        last = int(image_tokens.nonzero().max()) if images else -1
        assert last >= max_length or bool((whole["labels"][1:max_length] == IGNORE).all())
        return
    kept = len(sample["input_ids"])
    assert kept <= max_length
    assert (cut is not None) == (kept < len(whole["input_ids"]))
    for key in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(sample[key], whole[key][:kept])
    assert int((sample["input_ids"] == encoder.image_token_id).sum()) == TOKENS * images
    assert bool((sample["labels"][1:] != IGNORE).any())


def test_records_are_read_as_written(tmp_path: Path) -> None:
    made = records()
    found = LlavaRecords(write_records(tmp_path / "data.json", json.loads(json.dumps(made))))
    assert [found[i][1] for i in range(len(found))] == [check_record(record) for record in made]


def test_types_per_token_are_cut_and_padded_like_the_tokens(case, tmp_path) -> None:
    """Gemma and Qwen processors add them, and so do some tokenizers."""
    own = AutoProcessor.from_pretrained(case.model)
    own.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    made = [GOOD, {"conversations": turns("Hello?", "Word " * 60)}]
    dataset = dataset_of(case, own, made, tmp_path, max_length=60)
    samples = [dataset[0], dataset[1]]
    assert [len(sample["token_type_ids"]) for sample in samples] == [
        len(sample["input_ids"]) for sample in samples
    ]
    assert Collator(0)(samples)["token_type_ids"].shape == (2, 60)
