"""``croc-kernels convert``: released Croc, ViCToR and LLaVA checkpoints to Llava, and back.

Tensors stream from shard to shard, so a 7B model needs no more memory than one shard. All names are
checked before anything is written.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layer import CrocLayer
from .names import RELEASES, is_ignored, split_part, to_llava, to_released
from .released_config import SOURCE, llava_config, release_of, released_config, vision_config
from .shards import ShardWriter, iterate_tensors

TARGETS = ("transformers", *RELEASES)
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
_VISION = "vision_tower.vision_model."
_EMBEDDINGS = "language_model.model.embed_tokens.weight"
_LM_HEAD = "language_model.lm_head.weight"


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        written: tensors in the target.
        dropped: source names that carry nothing any code uses.
        unknown: source names without a place in the target.
        missing: target names that the source has nothing for.
        notes: what a person should know.
    """

    written: int = 0
    dropped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "transformers",
    allow_unknown: bool = False,
    allow_missing: bool = False,
    vision: dict[str, Any] | None = None,
    max_shard_bytes: int = 2 * 10**9,
) -> Report:
    """Convert a checkpoint directory.

    Args:
        source: directory with ``config.json`` and safetensors or ``.bin`` weights.
        target: directory to make; it must not exist and appears only when complete.
        to: ``"transformers"`` (from Croc, ViCToR or LLaVA), or ``"croc"``, ``"victor"``,
            ``"llava"`` (from transformers' Llava).
        allow_unknown: leave out source parameters that have no place in the target.
        allow_missing: write a target without the parameters that the source lacks.
        vision: ``vision_config`` of the target, where shapes do not tell.
        max_shard_bytes: of one weights file.

    Returns:
        The :class:`Report`.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: the target exists.
        ValueError: unknown or missing parameters, listed, or a config of another model.
    """
    source, target = Path(source), Path(target)
    if to not in TARGETS:
        raise ValueError(f"convert: to must be one of {TARGETS}, got {to!r}")
    if not (source / "config.json").exists():
        raise FileNotFoundError(f"convert: source must hold config.json, got {source}")
    try:
        config = json.loads((source / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"convert: {source / 'config.json'} must be JSON: {error}") from None
    plan = _to_transformers if to == "transformers" else _to_release
    return plan(source, target, config, to, allow_unknown, allow_missing, vision, max_shard_bytes)


def _shapes(source: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(load().shape) for name, load in iterate_tensors(source)}


def _expected(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llava checkpoint of this config, with the layer's if it has one."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    known = {k: v for k, v in config.items() if k not in ("croc", SOURCE)}
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(**known))
        found = {_hub_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
        if "croc" in config:
            layer = CrocLayer(config["text_config"]["hidden_size"], **config["croc"])
            found |= {"croc." + name: tuple(v.shape) for name, v in layer.state_dict().items()}
    if config["tie_word_embeddings"]:
        found.pop(_LM_HEAD, None)
    return found


def _check_shapes(
    renamed: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
) -> None:
    """Refuse parameters that would not fit into the target."""
    wrong = []
    for old, new in renamed.items():
        joined, _, parts = split_part(new)
        if joined not in expected:
            continue
        rows, *rest = expected[joined] or (0,)
        # A released vocabulary has no row for <image> yet, and may leave room for it.
        longer = {rows, rows - 1} if new in (_EMBEDDINGS, _LM_HEAD) else {rows // parts}
        found = shapes[old]
        if list(found[1:]) != rest or (found[:1] and found[0] not in longer):
            wrong.append(f"{old}: {found}, and {joined} must be {expected[joined]}")
    if wrong:
        listed = "\n  ".join(sorted(wrong))
        raise ValueError(
            f"convert: shapes must fit config.json, got {len(wrong)} others:\n  {listed}"
        )


def _hub_name(name: str) -> str:
    """The name that every transformers version loads, of a module's name in this one."""
    name = name.removeprefix("model.")
    if name.startswith(("language_model.model.", "language_model.lm_head.")):
        return name
    if name.startswith("language_model."):
        return "language_model.model." + name.removeprefix("language_model.")
    if name.startswith("lm_head."):
        return "language_model." + name
    if name.startswith("vision_tower.") and not name.startswith(_VISION):
        return _VISION + name.removeprefix("vision_tower.")
    return name


def _refuse(report: Report, allow_unknown: bool, allow_missing: bool) -> None:
    """Raise on unknown or missing names unless told otherwise."""
    for names, allowed, flag in (
        (report.unknown, allow_unknown, "--allow-unknown"),
        (report.missing, allow_missing, "--allow-missing"),
    ):
        if names and not allowed:
            kind = flag.removeprefix("--allow-")
            listed = "\n  ".join(sorted(names))
            raise ValueError(
                f"convert: source must match the target, got {len(names)} {kind} parameters "
                f"({flag} goes on without them):\n  {listed}"
            )


def _to_transformers(
    source: Path, target: Path, config: dict[str, Any], to: str, allow_unknown: bool,
    allow_missing: bool, vision: dict[str, Any] | None, max_shard_bytes: int,
) -> Report:  # fmt: skip
    names = release_of(config)
    report, shapes = Report(), _shapes(source)
    renamed: dict[str, str] = {}
    for name in shapes:
        new = None if is_ignored(name, names) else to_llava(name, names)
        if is_ignored(name, names):
            report.dropped.append(name)
        elif new is None:
            report.unknown.append(name)
        else:
            renamed[name] = new
    tower = {
        n.removeprefix(_VISION): shapes[o] for o, n in renamed.items() if n.startswith(_VISION)
    }
    vision = vision_config(tower) if vision is None else vision
    vocab = shapes.get("model.embed_tokens.weight", (config["vocab_size"],))[0]
    tokenizer = _tokenizer(source, report)
    image_token = vocab if tokenizer is None else min(len(tokenizer), vocab)
    new_config = llava_config(config, names, vision, max(vocab, image_token + 1), image_token)
    pool = next((shapes[o][0] for o, n in renamed.items() if n == "croc.pool"), None)
    if pool is not None:
        new_config["croc"] = {"recipe": names.recipe, "pool_size": pool}
        positions = shapes.get("transform_block.position_embeddings.weight")
        if positions is not None:
            new_config["croc"]["num_positions"] = positions[0]
    expected = _expected(new_config)
    given = {split_part(new)[0] for new in renamed.values()}
    report.unknown += [old for old, new in renamed.items() if split_part(new)[0] not in expected]
    report.missing = sorted(expected.keys() - given)
    _refuse(report, allow_unknown, allow_missing)
    _check_shapes(renamed, shapes, expected)

    def rename(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        new = renamed.get(name)
        if new is None or split_part(new)[0] not in expected:
            return []
        if new in (_EMBEDDINGS, _LM_HEAD) and tensor.shape[0] <= image_token:
            tensor = _with_mean_row(tensor)
        return [(new, tensor)]

    _stream(source, target, rename, new_config, max_shard_bytes, report, tokenizer)
    return report


def _with_mean_row(tensor: Tensor) -> Tensor:
    """One more row, for ``<image>``: never looked up, and in the head like an average token.

    Summed block by block: the largest matrix of a checkpoint is not made in float32.
    """
    total = sum(block.float().sum(0) for block in tensor.split(512))
    longer = tensor.new_empty(tensor.shape[0] + 1, *tensor.shape[1:])
    longer[:-1] = tensor
    longer[-1] = total / tensor.shape[0]
    return longer


def _to_release(
    source: Path, target: Path, config: dict[str, Any], to: str, allow_unknown: bool,
    allow_missing: bool, vision: dict[str, Any] | None, max_shard_bytes: int,
) -> Report:  # fmt: skip
    if config.get("model_type") != "llava":
        raise ValueError(f"convert: source must be a llava model, got {config.get('model_type')!r}")
    names = RELEASES[to]
    new_config = released_config(config, names)
    report, shapes = Report(), _shapes(source)
    plan = {name: to_released(_hub_name(name), names) for name in shapes}
    report.unknown = [name for name, new in plan.items() if not new]
    wanted = {prefix for prefix, ours in names.pairs if ours.startswith("croc.")}
    written = [new for group in plan.values() for new in group]
    report.missing = [p for p in sorted(wanted) if not any(n.startswith(p) for n in written)]
    _refuse(report, allow_unknown, allow_missing)
    vocab = new_config["vocab_size"]
    if names.unused:
        report.notes.append(f"not written, unused by the code: {', '.join(names.unused)}")

    def rename(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        new = plan[name]
        if _hub_name(name) in (_EMBEDDINGS, _LM_HEAD):
            tensor = tensor[:vocab]
        return list(zip(new, tensor.chunk(len(new)), strict=True)) if new else []

    _stream(source, target, rename, new_config, max_shard_bytes, report, None)
    return report


def _stream(
    source: Path,
    target: Path,
    rename: Callable[[str, Tensor], list[tuple[str, Tensor]]],
    config: dict[str, Any],
    max_shard_bytes: int,
    report: Report,
    tokenizer: Any,
) -> None:
    """Write all renamed tensors, a matrix of parts joined, then the config and the tokenizer."""
    parts: dict[str, dict[int, Tensor]] = {}
    with ShardWriter(target, max_shard_bytes) as writer:
        for name, load in iterate_tensors(source):
            read = load()
            # Before a longer copy of it is made, or it lies beside a whole shard.
            writer.make_room(read.numel() * read.element_size())
            for new, tensor in rename(name, read):
                joined, part, count = split_part(new)
                if count == 1:
                    writer.add(joined, tensor)
                    continue
                parts.setdefault(joined, {})[part] = tensor
                if len(parts[joined]) == count:
                    pieces = parts.pop(joined)
                    writer.add(joined, torch.cat([pieces[i] for i in range(count)]))
        report.written = writer.count
        (writer.partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
        for file in _TOKENIZER_FILES:
            if (source / file).exists():
                shutil.copy(source / file, writer.partial / file)
        if tokenizer is not None:
            _write_processor(writer.partial, tokenizer, config)


def _tokenizer(source: Path, report: Report) -> Any:
    """The source's tokenizer, or None with a note if it has no files."""
    if not any((source / file).exists() for file in ("tokenizer.json", "tokenizer.model")):
        report.notes.append("no tokenizer in the source: the target has no processor")
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


def _write_processor(directory: Path, tokenizer: Any, config: dict[str, Any]) -> None:
    """A LlavaProcessor whose ``<image>`` has the config's id."""
    from transformers import LlavaImageProcessor, LlavaProcessor

    tokenizer.add_tokens(["<image>"], special_tokens=True)
    side = config["vision_config"]["image_size"]
    pad = config[SOURCE].get("image_aspect_ratio") == "pad"
    LlavaProcessor(
        image_processor=LlavaImageProcessor(
            do_pad=pad,
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
        ),
        tokenizer=tokenizer,
        patch_size=config["vision_config"]["patch_size"],
        vision_feature_select_strategy=config["vision_feature_select_strategy"],
        image_token="<image>",
        num_additional_image_tokens=int(config["vision_config"]["model_type"].startswith("clip")),
    ).save_pretrained(directory)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``croc-kernels convert``."""
    parser.add_argument("source", type=Path, help="directory with config.json and weights")
    parser.add_argument("target", type=Path, help="directory to make")
    parser.add_argument("--to", choices=TARGETS, default="transformers", help="what to make")
    parser.add_argument("--allow-unknown", action="store_true", help="leave out unknown parameters")
    parser.add_argument("--allow-missing", action="store_true", help="go on without missing ones")
    parser.add_argument("--vision-config", type=Path, help="JSON file, where shapes do not tell")
    parser.add_argument("--max-shard-size", type=float, default=2.0, help="GB per file")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print what was done; 1 if the source was refused."""
    vision = arguments.vision_config
    try:
        report = convert(
            arguments.source, arguments.target, to=arguments.to,
            allow_unknown=arguments.allow_unknown, allow_missing=arguments.allow_missing,
            vision=None if vision is None else json.loads(vision.read_text()),
            max_shard_bytes=int(arguments.max_shard_size * 1e9),
        )  # fmt: skip
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(error)
        return 1
    print(f"{arguments.target}: {report.written} tensors")
    for title in ("dropped", "unknown", "missing", "notes"):
        for line in getattr(report, title):
            print(f"  {title}: {line}")
    return 0
