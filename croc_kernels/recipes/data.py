"""LLaVA-format JSON and an image folder in, batches for a transformers model out.

Two promises: an image's tokens are never cut, and nothing is left out silently. A sample that is
longer than ``max_length`` is cut after its last image if a supervised token remains; else it is
left out and noted. A sample that is left out is replaced by the next usable one of the file, so
that the order of the data, and with it ``--resume``, depends on the index alone.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from jinja2 import TemplateError
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import ProcessorMixin

from .processor import chat_template
from .records import BadSampleError, LlavaRecords, Note, Record, SampleTooLongError

logger = logging.getLogger("croc_kernels")
IGNORE = -100

# Kept on the host, beside the tensors of a batch: the trainer takes them out before the model sees
# it.
IMAGE_LENGTHS = "image_lengths"
NOTES = "notes"


def read_picture(path: Path) -> Image.Image:
    """Read a picture as RGB; ValueError if that fails, naming the path."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"picture {path} does not exist") from None
    except UnidentifiedImageError:
        raise ValueError(f"picture {path} can't be read: not an image format PIL knows") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"picture {path} can't be read: {error}") from None


def messages_of(record: Record) -> list[dict]:
    """The turns as the messages a chat template takes."""
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "image"} if part is None else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in record.turns
    ]


class ConversationEncoder:
    """Turns a record and its pictures into ``input_ids``, ``labels`` and ``pixel_values``.

    Args:
        processor: of the model, with a fast tokenizer.
        max_length: longest sequence, image tokens included; None: no limit.

    Labels are the tokens of the assistant's turns with what ends them, -100 elsewhere. A
    conversation whose template does not end it with the end-of-sequence token gets one, supervised:
    the model has to learn to stop.
    """

    def __init__(self, processor: ProcessorMixin, max_length: int | None = None) -> None:
        self.processor, self.max_length = processor, max_length
        self.tokenizer = processor.tokenizer
        self.template = chat_template(processor)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)

    def _render(self, messages: list[dict], prompt: bool = False) -> str:
        return self.processor.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
        )

    def render(self, record: Record) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text, one image token per picture, and the supervised [start, end) of
        its characters.

        Raises:
            ValueError: the template refuses the conversation, or renders a turn differently once
                others follow.
        """
        messages = messages_of(record)
        try:
            text = self._render(messages)
            spans = []
            for number, message in enumerate(messages):
                if message["role"] == "assistant" and message["content"]:
                    prompt = self._render(messages[:number], prompt=True) if number else ""
                    answered = self._render(messages[: number + 1])
                    if not (text.startswith(answered) and answered.startswith(prompt)):
                        raise ValueError(
                            f"the chat template renders turn {number} differently once more follow"
                        )
                    spans.append((len(prompt), len(answered)))
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None
        eos = self.tokenizer.eos_token
        if eos and spans[-1][1] == len(text) and not text.rstrip().endswith(eos):
            text = text.rstrip() + eos
            spans[-1] = (spans[-1][0], len(text))
        return text, spans

    def _short(self, text: str, spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Tokens and labels with one token per picture."""
        encoded = self.tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=self._adds_special_tokens(text)
        )
        ids = torch.tensor(encoded["input_ids"])
        offsets = torch.tensor(encoded["offset_mapping"]).reshape(-1, 2)
        supervised = torch.zeros(len(ids), dtype=torch.bool)
        for start, end in spans:
            # A token counts if it reaches into the span: " A" after "ASSISTANT:" may be one token.
            supervised |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        supervised &= (offsets[:, 1] > offsets[:, 0]) & (ids != self.image_token_id)
        return ids, ids.masked_fill(~supervised, IGNORE)

    def _adds_special_tokens(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def _image_lengths(self, short: Tensor, ids: Tensor, count: int) -> tuple[int, ...]:
        """Tokens of each image, from the runs of image tokens; pictures must not touch each
        other.
        """
        if not count:
            return ()
        if bool(((short[1:] == self.image_token_id) & (short[:-1] == self.image_token_id)).any()):
            raise ValueError("two pictures touch: the chat template must put text between them")
        is_image = (ids == self.image_token_id).int()
        edges = torch.diff(torch.nn.functional.pad(is_image, (1, 1)))
        starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
        if len(starts) != count:
            raise ValueError(f"it has {count} images but {len(starts)} runs of image tokens")
        return tuple((ends - starts).tolist())

    def __call__(self, record: Record, pictures: Sequence[Image.Image]) -> tuple[dict, str | None]:
        """Encode one sample.

        Args:
            record: a checked record.
            pictures: its pictures, RGB, in order.

        Returns:
            The sample: ``input_ids``, ``labels``, ``attention_mask`` (L,), the image processor's
            tensors with one row per picture, and ``image_lengths``, a tuple. Then what was cut, in
            words, or None.

        Raises:
            ValueError: the conversation can't be encoded.
            OverflowError: it can't be made to fit ``max_length``.
        """
        text, spans = self.render(record)
        short, labels = self._short(text, spans)
        if int((short == self.image_token_id).sum()) != len(pictures):
            raise ValueError(f"the chat template must render {len(pictures)} images once each")
        encoded = self.processor(
            images=list(pictures) or None,
            text=text,
            add_special_tokens=self._adds_special_tokens(text),
            return_tensors="pt",
        )
        ids = encoded.pop("input_ids")[0]
        text_only = ids != self.image_token_id
        if not torch.equal(ids[text_only], short[short != self.image_token_id]):
            raise ValueError("the processor must keep the text around a picture as it is")
        # Some models take a type per token too; a processor gives it the shape of the tokens.
        sample = {
            key: value[0] if value.shape == (1, len(ids)) else value
            for key, value in encoded.items()
        }
        sample["input_ids"] = ids
        sample["labels"] = torch.full_like(ids, IGNORE)
        sample["labels"][text_only] = labels[short != self.image_token_id]
        sample["attention_mask"] = torch.ones_like(ids)
        sample[IMAGE_LENGTHS] = self._image_lengths(short, ids, len(pictures))
        if not bool((sample["labels"][1:] != IGNORE).any()):
            raise ValueError("no token is supervised")
        return sample, self._fit(sample)

    def _fit(self, sample: dict) -> str | None:
        """Cut the sample to ``max_length`` in place; what was cut, or None if it fits."""
        length, limit = len(sample["input_ids"]), self.max_length
        if limit is None or length <= limit:
            return None
        is_image = sample["input_ids"] == self.image_token_id
        first_free = int(is_image.nonzero().max()) + 1 if bool(is_image.any()) else 0
        if first_free > limit:
            raise OverflowError(f"its images end at token {first_free}, max_length is {limit}")
        if not bool((sample["labels"][1:limit] != IGNORE).any()):
            raise OverflowError(
                f"it has {length} tokens, and none of the first {limit} is supervised"
            )
        for key, value in sample.items():
            if isinstance(value, Tensor) and value.dim() == 1:
                sample[key] = value[:limit]
        return f"text cut from {length} to {limit} tokens"


class LlavaDataset(torch.utils.data.Dataset):
    """The samples of a LLaVA-format JSON file and an image folder, encoded when they are read.

    Args:
        data_file: the JSON file.
        image_folder: what the records' image paths are relative to.
        processor: the model's.
        max_length: longest sequence, or None.
        skip_bad: note malformed records and unreadable pictures and go on, instead of raising.

    ``dataset[i]`` is a sample of :class:`ConversationEncoder` with ``notes``: what was found on the
    way, one :class:`~.records.Note` per record that was left out or cut.

    Raises:
        BadSampleError: a record is malformed (now) or a picture can't be read (when its sample is),
            unless ``skip_bad``. Both name the file and the record's index.
    """

    def __init__(
        self,
        data_file: str | Path,
        image_folder: str | Path,
        processor: ProcessorMixin,
        *,
        max_length: int | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.records = LlavaRecords(data_file, skip_bad=skip_bad)
        self.image_folder = Path(image_folder)
        self.encoder = ConversationEncoder(processor, max_length)
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.records)

    def encode(self, position: int) -> tuple[dict, Note | None]:
        """Encode the record at ``position``; a note if it was cut.

        Raises:
            BadSampleError: a picture can't be read, or the conversation can't be encoded.
            SampleTooLongError: it doesn't fit.
        """
        index, record = self.records[position]
        try:
            pictures = [read_picture(self.image_folder / path) for path in record.images]
            sample, cut = self.encoder(record, pictures)
        except OverflowError as error:
            raise SampleTooLongError(self.records.data_file, index, str(error)) from None
        except ValueError as error:
            raise BadSampleError(self.records.data_file, index, str(error)) from error
        return sample, None if cut is None else Note(index, "cut", cut)

    def __getitem__(self, position: int) -> dict:
        """The sample at ``position``, or the next usable one of the file."""
        notes: list[Note] = []
        for step in range(len(self)):
            try:
                sample, note = self.encode((position + step) % len(self))
            except SampleTooLongError as error:
                notes.append(Note(error.index, "too long", error.reason))
            except BadSampleError as error:
                if not self.skip_bad:
                    raise
                notes.append(Note(error.index, "bad", error.reason))
            else:
                sample[NOTES] = (*notes, *([note] if note else []))
                return sample
        raise RuntimeError(
            f"{self.records.data_file}: no usable sample in the file; the last one, record "
            f"{notes[-1].index}: {notes[-1].reason}"
        )


class Collator:
    """Pads samples on the right and stacks their pictures.

    Args:
        pad_token_id: fills ``input_ids``; ``labels`` are filled with -100 and ``attention_mask``
            with 0.

    The batch has ``image_lengths`` (tokens of each image, in order) and ``notes`` as tuples on the
    host. A batch without a picture has no ``pixel_values``.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.fill = {"input_ids": pad_token_id, "labels": IGNORE, "attention_mask": 0}

    def __call__(self, samples: Sequence[dict]) -> dict:
        """One batch of these samples."""
        host = {
            key: tuple(item for sample in samples for item in sample[key])
            for key in (IMAGE_LENGTHS, NOTES)
        }
        batch: dict[str, Tensor] = {}
        for key in sorted({key for sample in samples for key in sample} - set(host)):
            tensors = [sample[key] for sample in samples if key in sample]
            if tensors[0].dim() == 1:
                batch[key] = torch.nn.utils.rnn.pad_sequence(
                    tensors, batch_first=True, padding_value=self.fill.get(key, 0)
                )
            else:
                batch[key] = torch.cat(tensors)
        return {**batch, **host}
