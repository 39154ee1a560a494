"""The whole stage on the pictures that come with scikit-image, scikit-learn and matplotlib; no hub,
no network.
"""

import logging
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging as transformers_logging

from ..integrations import transformers as integration
from ..layer import CrocLayer
from .checkpoints import clean, write_directory
from .data import IMAGE_LENGTHS, NOTES, LlavaDataset
from .demo_data import write_demo_data
from .demo_model import write_demo_model
from .options import StageArguments
from .pictures import plot_pictures
from .pretrain import FINAL, Stage, first_and_last, load_model, set_up, train
from .probe import Probe, probe_picture
from .trainer import LOSSES

logger = logging.getLogger("croc_kernels")
PICTURES = ("chelsea", "astronaut", "coffee", "china")
CAPTIONED = "rocket"
# The model after the short tuning; FINAL is the stage's own.
TUNED = "tuned"
QUESTION = "What is this?"


def prepare(stage: StageArguments, seed: int) -> None:
    """Write data and model below ``output/demo`` unless they are there, and point the options at
    them.
    """
    folder = Path(stage.output) / "demo"
    clean(Path(stage.output))
    if not folder.is_dir():

        def write(staged: Path) -> None:
            data_file, _ = write_demo_data(staged)
            write_demo_model(data_file, staged / "model", seed)

        write_directory(folder, write)
    stage.data, stage.image_folder = str(folder / "data.json"), str(folder / "images")
    stage.model = str(folder / "model")


def _probes(
    model: PreTrainedModel, layer: CrocLayer, dataset: LlavaDataset, names: tuple[str, ...]
) -> list[Probe]:
    positions = {}
    for position in range(len(dataset)):
        images = dataset.records[position][1].images
        if len(images) == 1:
            positions.setdefault(Path(images[0]).stem, position)
    return [
        probe_picture(model, layer, dataset, positions[name], seed=number)
        for number, name in enumerate(names)
    ]


def _answer(dataset: LlavaDataset, file: str) -> str | None:
    """What the data says to the demo's question about a picture."""
    for position in range(len(dataset)):
        record = dataset.records[position][1]
        if record.images == (file,) and QUESTION in record.turns[0].parts:
            return record.turns[1].parts[0]
    return None


@torch.no_grad()
def caption(directory: Path, picture: Path) -> str:
    """Load a saved model and have it answer the demo's question about a picture."""
    from transformers import AutoProcessor

    model = integration.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    with Image.open(picture) as image:
        inputs = processor(images=[image.convert("RGB")], text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    answer = ids[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


def tune(stage: Stage, directory: Path, seed: int) -> tuple[float, float]:
    """What follows the stage in a real run, in small: the same samples without masks, a quarter of
    the steps.

    ``eval()`` is what leaves the masks out: features are normalised, and the loss is the caption's.

    Returns:
        The caption loss, first and last: means over up to five steps.
    """
    arguments, model, dataset = stage.trainer.args, stage.model.eval(), stage.dataset
    steps, size = max(2, arguments.max_steps // 4), arguments.per_device_train_batch_size
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=arguments.learning_rate / 2, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(dataset), generator=generator).tolist()
        batch = stage.trainer.data_collator([dataset[order.pop()] for _ in range(size)])
        for key in (IMAGE_LENGTHS, NOTES):
            del batch[key]
        loss = model(**{key: value.to(model.device) for key, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        losses.append(loss.item())
    model.save_pretrained(directory)
    stage.processor.save_pretrained(directory)
    count = max(1, min(5, steps // 2))
    return sum(losses[:count]) / count, sum(losses[-count:]) / count


def run_demo(stage_arguments: StageArguments, training: TrainingArguments) -> int:
    """Train, plot, tune without masks, load what was saved, caption a picture; 0 if both losses
    have fallen, else 1.
    """
    # The demo's output is its own few lines, not the library's notices about optional back ends.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    prepare(stage_arguments, training.seed)
    output = Path(stage_arguments.output)
    stage = set_up(stage_arguments, training)
    # A resumed run has a trained model by now; the seed makes the untrained one again.
    untrained, layer = load_model(stage_arguments, training.seed)
    before = _probes(untrained.to(training.device), layer, stage.dataset, PICTURES)
    train(stage)
    after = _probes(stage.model, stage.layer, stage.dataset, PICTURES)
    plot_pictures(PICTURES, before, after, stage.layer.pool, output / "pictures.png")
    losses = first_and_last(stage.trainer.state.log_history)
    picture = Path(stage_arguments.image_folder) / f"{CAPTIONED}.png"
    masked = caption(output / FINAL, picture)
    first, last = tune(stage, output / TUNED, training.seed)
    print(f"tuning without masks, caption loss: first {first:.4f}, last {last:.4f}")
    print(f"{picture.name}, {QUESTION!r}: {caption(output / TUNED, picture)!r}")
    print(f"in the data: {_answer(stage.dataset, picture.name)!r}; before tuning: {masked!r}")
    saved = (FINAL, TUNED, "losses.png", "pictures.png")
    print("saved:", ", ".join(str(output / name) for name in saved))
    fallen = [name for name, (first, last) in losses.items() if last < first]
    if len(fallen) < len(LOSSES):
        print(f"demo: {' and '.join(LOSSES)} must fall, got {losses}")
        return 1
    return 0
