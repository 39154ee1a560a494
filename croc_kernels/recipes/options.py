"""The options of ``croc-kernels pretrain``: the stage's own, transformers' TrainingArguments, and a
config file.

A config file is turned into the same flags and parsed by the same parser, so a key means what the
flag means.
"""

import argparse
import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..layer import RECIPES


def _option(text: str, default: Any = None, **extra: Any) -> Any:
    return field(default=default, metadata={"help": text, **extra})


@dataclass
class StageArguments:
    """What the stage itself needs to know; everything about training in general is a
    TrainingArguments.
    """

    config: str | None = _option("YAML or JSON file with any of these options; flags win over it.")
    model: str | None = _option("Model directory or name.")
    data: str | None = _option("LLaVA-format JSON file.")
    image_folder: str | None = _option("Folder that the image paths in the data are relative to.")
    output: str | None = _option("Directory for checkpoints, the final model and the plots.")
    recipe: str = _option(f"One of {', '.join(RECIPES)}.", "croc")
    demo: bool = _option("Train a small model on the pictures that come with scikit-image.", False)
    resume: str | None = _option(
        "Go on from the last checkpoint in the output, if any, or from the one named.",
        nargs="?",
        const="last",
    )
    skip_bad_samples: bool = _option(
        "Leave malformed records and unreadable pictures out, count them and list them at the end.",
        False,
    )
    max_length: int | None = _option(
        "Longest sequence, image tokens included. Default: what the model's positions allow."
    )
    pool_size: int = _option("Rows of the prompt-token pool.", 2048)
    pool_init: str = _option("randn as published, or unit.", "randn")
    mask_ratio: float = _option("Part of each image's tokens that is masked.", 0.75)
    loss_weight: float = _option("Weight of the reconstruction loss.", 10.0)
    pool_learning_rate: float | None = _option("Of the pool; default: --learning_rate.")
    vision_learning_rate: float | None = _option("Of the vision tower; default: --learning_rate.")
    train_vision_tower: bool = _option("Train the vision tower too; it is frozen otherwise.", False)
    freeze_projector: bool = _option("Don't train the projector.", False)
    freeze_language_model: bool = _option("Don't train the language model.", False)
    model_dtype: str = _option("Of the weights: float32, bfloat16 or auto (as saved).", "float32")


# The published stage 1.5 where it differs from TrainingArguments' defaults; any flag or key
# overrides it.
STAGE_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1.0,
    "logging_steps": 10,
    # Its check reads the loss on the host in every micro-batch, and it hides a NaN.
    "logging_nan_inf_filter": False,
    "report_to": "none",
}
WARMUP = 0.03


# Where the demo goes if nothing else is said.
DEMO_OUTPUT = "croc-demo"
# The demo where it differs from the real stage; overridden in the same way.
DEMO_DEFAULTS: dict[str, Any] = {
    "pool_size": 256,
    "max_steps": 240,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "save_steps": 60,
    "save_total_limit": 2,
}


class OptionError(ValueError):
    """The user's options are wrong; the message says which one."""


def make_parser() -> HfArgumentParser:
    """A parser of all options that puts only those into its namespace which were given."""
    parser = HfArgumentParser(
        (StageArguments, TrainingArguments), add_help=False, exit_on_error=False
    )
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of the stage to ``parser``."""
    # What argparse does for parents=[...], which has to be given before the parser exists.
    parser._add_container_actions(make_parser())


def _flags(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{key}={str(value).lower()}"]
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file of options into the values the same flags would have.

    Raises:
        OptionError: the file can't be read, or a key is unknown or has a wrong value; the message
            names the key.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"pretrain: config {path} can't be read: {error}") from None
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise OptionError(f"pretrain: config {path} must hold keys and values, got {kind}")
    parser = make_parser()
    known = {action.dest for action in parser._actions} - {"config"}
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise OptionError(f"pretrain: config {path}: unknown key {key!r}{hint}")
        try:
            result |= vars(parser.parse_args(_flags(name, value)))
        except (argparse.ArgumentError, SystemExit) as error:
            raise OptionError(f"pretrain: config {path}: key {key!r}: {error}") from None
    return result


def _split(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = {f.name for f in dataclasses.fields(StageArguments)}
    trainer = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    stage = {key: value for key, value in values.items() if key in own}
    return stage, {key: value for key, value in values.items() if key in trainer}


def _check(stage: StageArguments) -> None:
    if stage.recipe not in RECIPES:
        raise OptionError(f"pretrain: recipe must be one of {tuple(RECIPES)}, got {stage.recipe!r}")
    if stage.model_dtype not in ("float32", "bfloat16", "auto"):
        raise OptionError(
            f"pretrain: model_dtype must be float32, bfloat16 or auto, got {stage.model_dtype!r}"
        )
    if stage.vision_learning_rate is not None and not stage.train_vision_tower:
        raise OptionError("pretrain: vision_learning_rate must go with --train_vision_tower")
    needed = ("model", "data", "image_folder")
    given = [name for name in needed if getattr(stage, name)]
    if stage.demo and given:
        raise OptionError(f"pretrain: demo must go without --{given[0]}, it brings its own")
    if not stage.demo and len(given) < 3:
        missing = next(name for name in needed if name not in given)
        raise OptionError(f"pretrain: --{missing.replace('_', '-')} must be given, or --demo")


def resolve(explicit: dict[str, Any]) -> tuple[StageArguments, TrainingArguments]:
    """Put options together: defaults, then the config file, then what was given on the command
    line.

    Args:
        explicit: the given flags, by name, with ``config`` if there is a file.

    Raises:
        OptionError: options are missing, unknown or contradict each other.
    """
    config = explicit.get("config")
    values = (read_config(config) if config else {}) | explicit
    output = values.get("output", values.get("output_dir"))
    if output is None and values.get("demo"):
        output = DEMO_OUTPUT
    if output is None:
        raise OptionError("pretrain: --output must be given")
    if values.get("output_dir", output) != output:
        raise OptionError(
            f"pretrain: output must equal output_dir, got {output} and {values['output_dir']}"
        )
    own_defaults, trainer_defaults = _split(DEMO_DEFAULTS if values.get("demo") else {})
    own, given = _split(values)
    stage = StageArguments(**{**own_defaults, **own, "output": output})
    _check(stage)
    trainer_defaults = {**STAGE_DEFAULTS, **trainer_defaults}
    if not given.keys() & {"warmup_steps", "warmup_ratio"}:
        trainer_defaults |= _warmup()
    on_gpu = torch.cuda.is_available() and not given.get("use_cpu")
    trainer_defaults["dataloader_pin_memory"] = on_gpu
    if on_gpu and not given.keys() & {"bf16", "fp16"}:
        trainer_defaults["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    if given.get("label_smoothing_factor"):
        raise OptionError(
            "pretrain: label_smoothing_factor must be 0, Trainer would keep the labels from the "
            f"model; got {given['label_smoothing_factor']}"
        )
    # The batches carry what the model's forward does not name.
    fixed = {"output_dir": output, "remove_unused_columns": False}
    return stage, TrainingArguments(**{**trainer_defaults, **given, **fixed})


def _warmup() -> dict[str, float]:
    """3 % of the steps; TrainingArguments 5 takes a fraction as warmup_steps, earlier ones as
    warmup_ratio.
    """
    names = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    old = "warmup_ratio" in names and names["warmup_steps"].type in (int, "int")
    return {"warmup_ratio" if old else "warmup_steps": WARMUP}
