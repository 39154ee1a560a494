"""The stage: a model directory, a LLaVA-format JSON and an image folder in; a trained model,
safetensors, out.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import gather_object
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    ProcessorMixin,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from ..integrations import transformers as integration
from ..layer import CrocLayer
from .checkpoints import clean, find_resume, step_of
from .data import Collator, LlavaDataset
from .options import OptionError, StageArguments
from .pictures import plot_losses
from .processor import load_processor
from .records import SampleReport
from .trainer import LOSSES, StageTrainer

logger = logging.getLogger("croc_kernels")
FINAL = "model"

# The parts of a model of transformers by the names of its sub-modules.
_PARTS = {
    "vision tower": ("vision_tower", "vision_model", "visual"),
    "projector": ("multi_modal_projector",),
    "language model": ("language_model", "lm_head"),
}


@dataclass
class Stage:
    """Everything that is set up before the first step."""

    model: PreTrainedModel
    layer: CrocLayer
    processor: ProcessorMixin
    dataset: LlavaDataset
    trainer: StageTrainer
    resume: Path | None


def parameters_of(model: PreTrainedModel, part: str) -> list[nn.Parameter]:
    """The parameters of the vision tower, the projector or the language model.

    Raises:
        OptionError: the model has no such part.
    """
    names = _PARTS[part]
    found = [
        parameter
        for name, parameter in model.named_parameters()
        if any(piece in names for piece in name.split("."))
    ]
    if not found:
        raise OptionError(f"pretrain: model must have a {part}, got {type(model).__name__}")
    return found


def freeze(model: PreTrainedModel, stage: StageArguments) -> None:
    """Let those parts learn that shall: pool and head always, the vision tower only if asked
    for.
    """
    frozen = {
        "vision tower": not stage.train_vision_tower,
        "projector": stage.freeze_projector,
        "language model": stage.freeze_language_model,
    }
    for part, is_frozen in frozen.items():
        if is_frozen:
            for parameter in parameters_of(model, part):
                parameter.requires_grad_(False)


def learning_rates(
    model: PreTrainedModel, layer: CrocLayer, stage: StageArguments
) -> dict[nn.Parameter, float]:
    """The parameters with a learning rate of their own."""
    rates: dict[nn.Parameter, float] = {}
    if stage.vision_learning_rate is not None:
        rates |= dict.fromkeys(parameters_of(model, "vision tower"), stage.vision_learning_rate)
    if stage.pool_learning_rate is not None:
        rates[layer.pool] = stage.pool_learning_rate
    return rates


def longest_sequence(model: PreTrainedModel, processor: ProcessorMixin) -> int:
    """What the model's positions and its tokenizer allow."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # A tokenizer that was saved without a limit says 10^30.
    return min(processor.tokenizer.model_max_length, positions or 10**9)


def load_model(stage: StageArguments, seed: int) -> tuple[PreTrainedModel, CrocLayer]:
    """The untrained model with its layer: as saved if it was saved with one, else a new one.

    Raises:
        OptionError: there is no such model, or the saved layer is of another recipe.
    """
    try:
        saved = getattr(AutoConfig.from_pretrained(stage.model), "croc", None)
    except (OSError, ValueError) as error:
        raise OptionError(
            "pretrain: --model must be a directory that transformers saved, or a name that it "
            f"finds, got {stage.model} ({str(error).splitlines()[0]})"
        ) from None
    if saved is not None:
        if saved["recipe"] != stage.recipe:
            raise OptionError(
                f"pretrain: recipe must be {saved['recipe']!r}, with which {stage.model} was "
                f"trained, got {stage.recipe!r}"
            )
        model = integration.from_pretrained(stage.model, dtype=stage.model_dtype)
        return model, model.croc
    model = AutoModelForImageTextToText.from_pretrained(stage.model, dtype=stage.model_dtype)
    # After loading, which draws a varying amount of random numbers: the pool is drawn now.
    set_seed(seed)
    layer = integration.attach(
        model,
        stage.recipe,
        pool_size=stage.pool_size,
        mask_ratio=stage.mask_ratio,
        pool_init=stage.pool_init,
        loss_weight=stage.loss_weight,
    )
    return model, layer


def check_paths(stage: StageArguments) -> None:
    """Refuse what is not there, before anything is loaded."""
    for option, path, kind in (
        ("data", Path(stage.data), "file"), ("image-folder", Path(stage.image_folder), "directory"),
    ):  # fmt: skip
        if not (path.is_file() if kind == "file" else path.is_dir()):
            raise OptionError(f"pretrain: --{option} must be a {kind} that exists, got {path}")


def set_up(stage: StageArguments, training: TrainingArguments) -> Stage:
    """Load model, processor and data, attach the layer, and make the trainer.

    Raises:
        OptionError: a path is wrong, or the options don't fit the model.
        BadSampleError: a record is malformed.
        FileExistsError: the output holds checkpoints and ``resume`` is off.
    """
    check_paths(stage)
    output = Path(training.output_dir)
    if training.process_index == 0:
        clean(output)
    resume = find_resume(output, stage.resume)
    if resume is not None and training.save_only_model:
        raise OptionError(
            "pretrain: resume must go without save_only_model, it needs the optimizer"
        )
    if resume is None:
        model, layer = load_model(stage, training.seed)
    else:
        model = integration.from_pretrained(resume, dtype=stage.model_dtype)
        layer = model.croc
    freeze(model, stage)
    processor = load_processor(stage.model, AutoConfig.from_pretrained(stage.model))
    dataset = LlavaDataset(
        stage.data,
        stage.image_folder,
        processor,
        max_length=stage.max_length or longest_sequence(model, processor),
        skip_bad=stage.skip_bad_samples,
    )
    report = SampleReport(stage.data)
    for note in dataset.records.notes:
        report.add(note)
    pad = processor.tokenizer.pad_token_id
    trainer = StageTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        data_collator=Collator(processor.tokenizer.eos_token_id if pad is None else pad),
        processing_class=processor,
        layer=layer,
        report=report,
        lr_of=learning_rates(model, layer, stage),
    )
    if resume is not None:
        trainer.resume_report(resume)
    return Stage(model, layer, processor, dataset, trainer, resume)


def train(stage: Stage) -> None:
    """Train to the end, save the final model and the loss curves; print both losses and which
    samples were left out.
    """
    trainer = stage.trainer
    if stage.resume is not None:
        logger.info("going on from %s", stage.resume)
    if stage.resume is not None and step_of(stage.resume) == trainer.args.max_steps:
        # Trainer would train one step too many.
        trainer.state = TrainerState.load_from_json(str(stage.resume / TRAINER_STATE_NAME))
    else:
        trainer.train(resume_from_checkpoint=str(stage.resume) if stage.resume else None)
    output = Path(trainer.args.output_dir)
    trainer.save_final(output / FINAL)
    for note in gather_object(list(trainer.report.notes.values())):
        trainer.report.add(note)
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, output / "losses.png")
        print(*trainer.report.lines(), sep="\n")
        for name, (first, last) in first_and_last(trainer.state.log_history).items():
            print(f"{name.replace('_', ' ')}: first {first:.4f}, last {last:.4f}")


def first_and_last(history: list[dict]) -> dict[str, tuple[float, float]]:
    """Both losses at the start and at the end: means of up to five logged values, since samples
    differ in difficulty. Empty if nothing was logged.
    """
    logged = [entry for entry in history if all(name in entry for name in LOSSES)]
    if not logged:
        return {}
    count = max(1, min(5, len(logged) // 2))

    def mean(entries: list[dict], name: str) -> float:
        return sum(entry[name] for entry in entries) / len(entries)

    return {name: (mean(logged[:count], name), mean(logged[-count:], name)) for name in LOSSES}
