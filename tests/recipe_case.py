"""A tiny model, its processor and a few samples on disk, for the tests of the recipes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from croc_kernels.recipes.data import LlavaDataset
from croc_kernels.recipes.demo_model import train_tokenizer
from croc_kernels.recipes.options import resolve
from croc_kernels.recipes.pretrain import Stage, set_up, train
from croc_kernels.recipes.processor import plain_template

TOKENS = 16  # per image: 4 x 4 patches
POOL_SIZE = 24


@dataclass(frozen=True)
class Case:
    """Where model, data and pictures lie."""

    model: Path
    data: Path
    images: Path

    def options(self, output: Path, **more: Any) -> dict[str, Any]:
        """Options of a run on the CPU with everything small."""
        return {
            "model": str(self.model),
            "data": str(self.data),
            "image_folder": str(self.images),
            "output": str(output),
            "pool_size": POOL_SIZE,
            "use_cpu": True,
            "disable_tqdm": True,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            **more,
        }


def turns(*texts: str) -> list[dict]:
    """A conversation of these texts, human first."""
    return [
        {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)
    ]


def records() -> list[dict]:
    """One image, two images, none; one and two answers; short and long."""
    made = [
        {
            "image": f"{number}.png",
            "conversations": turns(
                "<image>\nDescribe.", "A coloured square" + ", and so on" * (number % 4) + "."
            ),
        }
        for number in range(6)
    ]
    made.append(
        {"image": ["0.png", "1.png"], "conversations": turns("<image><image>\nAnd?", "Two.")}
    )
    made.append({"conversations": turns("What is a token?", "A part of a text or of a picture.")})
    made.append(
        {
            "image": "2.png",
            "conversations": turns("<image>\nWhat?", "A square.", "Sure?", "Yes, it is."),
        }
    )
    return made


def write_records(path: Path, made: list) -> Path:
    """Write a LLaVA-format file."""
    path.write_text(json.dumps(made))
    return path


def make_processor(texts: list[str]) -> LlavaProcessor:
    """A processor of 32-pixel images in 8-pixel patches."""
    tokenizer = train_tokenizer(texts)
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=plain_template("<image>", tokenizer.eos_token),
    )


def make_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """A LLaVA of one layer each, random weights."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=TOKENS,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def write_case(folder: Path) -> Case:
    """Write everything below ``folder``."""
    case = Case(folder / "model", folder / "data.json", folder / "images")
    case.images.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        pixels = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8)
        picture = Image.fromarray(pixels.numpy()).resize((40, 32), Image.Resampling.NEAREST)
        picture.save(case.images / f"{number}.png")
    made = records()
    write_records(case.data, made)
    processor = make_processor([t["value"] for record in made for t in record["conversations"]])
    processor.save_pretrained(case.model)
    make_model(processor).save_pretrained(case.model)
    return case


def make_stage(options: dict[str, Any]) -> Stage:
    """Set a run up from its options, as the command does."""
    return set_up(*resolve(options))


def run_case(options: dict[str, Any]) -> Stage:
    """Set a run up and train to its end."""
    stage = make_stage(options)
    train(stage)
    return stage


def losses_of(history: list[dict]) -> dict[int, tuple[float, float, float]]:
    """Step -> loss, caption loss, reconstruction loss."""
    return {
        entry["step"]: (entry["loss"], entry["caption_loss"], entry["reconstruction_loss"])
        for entry in history
        if "caption_loss" in entry
    }


def dataset_of(
    case: Case, processor: LlavaProcessor, made: list, folder: Path, **options: Any
) -> LlavaDataset:
    """A data set of these records and the case's pictures."""
    return LlavaDataset(
        write_records(folder / "data.json", made), case.images, processor, **options
    )
