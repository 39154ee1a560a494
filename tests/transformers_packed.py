"""Two samples of the zoo's batch in one row, and each by itself."""

from typing import Any

import torch
import transformers_zoo as zoo
from torch import nn

OF_TEXT = ("input_ids", "labels", "token_type_ids", "mm_token_type_ids")


def separate(case: zoo.Case, model: nn.Module) -> list[dict[str, Any]]:
    """The first two samples without padding, one with two images, one with one."""
    inputs = zoo.batch(case, model)
    pixels = {n: v for n, v in inputs.items() if n not in (*OF_TEXT, "attention_mask")}
    grids = pixels.get("image_grid_thw")
    rows = []
    for row, images in enumerate((slice(0, 2), slice(2, 3))):
        length = int(inputs["attention_mask"][row].sum())
        sample = {n: inputs[n][row : row + 1, :length] for n in OF_TEXT if n in inputs}
        sample |= {n: value[images] for n, value in pixels.items()}
        if grids is not None:  # the patches of all images come in one matrix
            parts = pixels["pixel_values"].split(grids.prod(1).tolist())
            sample["pixel_values"] = torch.cat(parts[images])
        rows.append(sample)
    return rows


def positions(case: zoo.Case, model: nn.Module, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Positions that start anew in each document; Qwen's have three more rows for its images."""
    places = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None]
    if not (case.pixels and case.name.startswith("qwen")):
        return places
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    axes = [model.model.get_rope_index(**{n: row[n] for n in names if n in row})[0] for row in rows]
    return torch.cat([places[None], torch.cat(axes, -1)])


def packed(case: zoo.Case, model: nn.Module) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Both in one row, and the rows that it was made of."""
    rows = separate(case, model)
    joined = {
        name: torch.cat([row[name] for row in rows], 1 if name in OF_TEXT else 0)
        for name in rows[0]
    }
    return joined | {"position_ids": positions(case, model, rows)}, rows
