r"""LLaVA-format JSON: reading it, checking every record, naming the file and the index of one that
is wrong.

A data file is a JSON list of records::

    [{"id": "17", "image": "17.jpg",
      "conversations": [{"from": "human", "value": "<image>\nDescribe the picture."},
                        {"from": "gpt", "value": "A cat sleeps on a sofa."}]}, ...]

``image`` is a path below the image folder, a list of them, or absent. Every picture has one
``<image>`` in the conversation, in order.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

PLACEHOLDER = "<image>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class BadSampleError(ValueError):
    """A record or picture that can't be used; the message names the JSON file and the record's
    index.
    """

    def __init__(self, data_file: str | Path, index: int, reason: str) -> None:
        super().__init__(f"{data_file}: record {index}: {reason}")
        self.data_file, self.index, self.reason = str(data_file), index, reason

    def __reduce__(self) -> tuple:
        """Rebuild from its three parts: a data-loader worker pickles the error to send it to the
        main process.
        """
        return type(self), (self.data_file, self.index, self.reason)


class SampleTooLongError(BadSampleError):
    """A sample that can't be made to fit without cutting an image or every supervised token."""


@dataclass(frozen=True)
class Note:
    """What happened to one record: ``kind`` is ``"bad"``, ``"too long"`` (both left out) or
    ``"cut"``.
    """

    index: int
    kind: str
    reason: str


class SampleReport:
    """The records that were left out or cut so far, by index; each counts once however often it is
    drawn.
    """

    def __init__(self, data_file: str | Path) -> None:
        self.data_file = str(data_file)
        self.notes: dict[int, Note] = {}

    def add(self, note: Note) -> bool:
        """Add a note; False if this record was known already."""
        new = note.index not in self.notes
        self.notes[note.index] = note
        return new

    def count(self, kind: str) -> int:
        """How many records have a note of this kind."""
        return sum(note.kind == kind for note in self.notes.values())

    def lines(self) -> list[str]:
        """A line with the counts, then one line per record, in the order of the file."""
        if not self.notes:
            return [f"{self.data_file}: no sample was left out or cut"]
        counts = (
            f"{self.count('bad')} bad and {self.count('too long')} too long samples left out, "
            f"{self.count('cut')} cut after their last image"
        )
        ordered = sorted(self.notes.values(), key=lambda note: note.index)
        return [f"{self.data_file}: {counts}"] + [
            f"  record {note.index} ({note.kind}): {note.reason}" for note in ordered
        ]

    def save(self, path: Path) -> None:
        """Write the notes as JSON."""
        notes = [asdict(note) for note in self.notes.values()]
        path.write_text(json.dumps({"data_file": self.data_file, "notes": notes}, indent=1))

    def load(self, path: Path) -> None:
        """Add the notes of an earlier :meth:`save`."""
        for note in json.loads(path.read_text())["notes"]:
            self.add(Note(**note))


@dataclass(frozen=True)
class Turn:
    """One turn: ``role`` is user, assistant or system; ``parts`` are texts, and None where a
    picture stands.
    """

    role: str
    parts: tuple[str | None, ...]


@dataclass(frozen=True)
class Record:
    """A checked record: the paths of its pictures and its turns."""

    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def _image_paths(record: Mapping) -> tuple[str, ...]:
    image = record.get("image")
    paths = [] if image is None else image if isinstance(image, list) else [image]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise ValueError(f"image must be a path or a list of paths, got {image!r}")
    return tuple(paths)


def _turn(position: int, turn: object) -> Turn:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise ValueError(f'turn {position} must have "from" and "value", got {turn!r}')
    role, value = turn["from"], turn["value"]
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"turn {position}: role must be one of {tuple(ROLES)}, got {role!r}")
    if not isinstance(value, str):
        raise ValueError(f"turn {position}: value must be text, got {type(value).__name__}")
    texts = value.split(PLACEHOLDER)
    parts: list[str | None] = []
    for number, text in enumerate(texts):
        parts += [None] if number else []
        parts += [text.strip()] if text.strip() else []
    return Turn(ROLES[role], tuple(parts))


def check_record(record: object) -> Record:
    """Check one record of a LLaVA-format file.

    Raises:
        ValueError: it is malformed; the message says how.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object, got {type(record).__name__}")
    conversation = record.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise ValueError(f"conversations must be a non-empty list, got {conversation!r}")
    images = _image_paths(record)
    turns = tuple(_turn(position, turn) for position, turn in enumerate(conversation))
    placeholders = sum(part is None for turn in turns for part in turn.parts)
    if placeholders != len(images):
        raise ValueError(f"it has {len(images)} images but {placeholders} {PLACEHOLDER}")
    if not any(turn.role == "assistant" and any(turn.parts) for turn in turns):
        raise ValueError("no turn of gpt has text, so nothing would be supervised")
    return Record(images, turns)


class LlavaRecords:
    """The usable records of a LLaVA-format JSON file, each parsed again when it is read.

    They are kept as one block of bytes: a list of a million dictionaries would be copied page by
    page into every data-loader worker, because reading a Python object writes its reference count.

    Args:
        data_file: the JSON file.
        skip_bad: leave malformed records out and note them in ``notes``, instead of raising.

    Raises:
        FileNotFoundError: there is no such file.
        BadSampleError: a record is malformed and ``skip_bad`` is off.
        ValueError: the file is no JSON list, or has no usable record.
    """

    def __init__(self, data_file: str | Path, *, skip_bad: bool = False) -> None:
        self.data_file = str(data_file)
        self.notes: list[Note] = []
        blocks, indices = [], []
        for index, record in enumerate(self._read()):
            try:
                check_record(record)
            except ValueError as error:
                if not skip_bad:
                    raise BadSampleError(data_file, index, str(error)) from None
                self.notes.append(Note(index, "bad", str(error)))
                continue
            blocks.append(json.dumps(record).encode())
            indices.append(index)
        if not indices:
            raise ValueError(f"{data_file}: it must have at least one usable record, got none")
        self._bytes = b"".join(blocks)
        self._ends = np.cumsum([len(block) for block in blocks])
        self.indices = np.array(indices)

    def _read(self) -> list:
        try:
            records = json.loads(Path(self.data_file).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.data_file}: not valid JSON: {error}") from None
        if not isinstance(records, list):
            kind = type(records).__name__
            raise ValueError(f"{self.data_file}: it must hold a list of records, got {kind}")
        return records

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, position: int) -> tuple[int, Record]:
        """The record's index in the file, and the record."""
        start = int(self._ends[position - 1]) if position else 0
        block = self._bytes[start : int(self._ends[position])]
        return int(self.indices[position]), check_record(json.loads(block))
