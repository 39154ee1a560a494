"""Put image features where the placeholders of a LLaVA batch stand: one gather, no loops.

The original LLaVA code bases keep one negative id per image in ``input_ids`` and lengthen the
sequence when the features are known. Their loops wait for the device once per sample and token;
here every index is computed on the device and the only numbers needed from the host are lengths.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layer.packing import all_equal, device_integers, starts_of

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100


class SplicedBatch(NamedTuple):
    """A batch with its images in place; L is the new length, S the number of visual tokens."""

    inputs_embeds: Tensor  # (B, L, C)
    labels: Tensor  # (B, L) int64, -100 on images and padding
    attention_mask: Tensor  # (B, L) bool
    position_ids: Tensor  # (B, L) int64, counted over valid tokens, 0 on padding
    image_id: Tensor  # (B, L) int64: which image a position belongs to, -1 for text and padding
    visual_index: Tensor  # (S,) int64 into the flattened (B * L), -1 for an image nothing shows
    spans: Tensor  # (I, 3) int64: sample, first, past-the-end; first == past for such an image


def splice_images(
    input_ids: Tensor,
    text_embeds: Tensor,
    features: Tensor,
    lengths: Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    images_per_sample: Sequence[int] | None = None,
    padding_side: str = "right",
) -> SplicedBatch:
    """Lengthen a batch by its image features.

    An image-less sample owns one entry of ``lengths`` too (its dummy image), as in LLaVA's loader;
    the dummy's features are placed nowhere.

    Args:
        input_ids: (B, T) int64 with -200 where an image stands.
        text_embeds: (B, T, C) embeddings of the text ids; those at placeholders are ignored.
        features: (S, C) all images packed, in reading order, dummies included.
        lengths: visual tokens of each image, host integers that sum to S.
        attention_mask: (B, T), nonzero where a token is valid; None means all.
        labels: (B, T) int64, or None for -100 everywhere.
        images_per_sample: placeholders in each sample; may be None with one image per sample.
        padding_side: ``"right"`` or ``"left"``.

    Returns:
        The batch. Its length comes from host numbers alone, so padding can exceed what the longest
        sample needs.

    Raises:
        ValueError: ``lengths`` do not sum to S, ``images_per_sample`` is needed and missing, or (on
            a CPU; a device-side assertion elsewhere, which waits for nothing) the placeholders do
            not match the images.

    Source: the contract of ``prepare_inputs_labels_for_multimodal`` in LLaVA and its descendants.
    """
    total = sum(lengths)
    if features.shape[0] != total:
        raise ValueError(
            "splice_images: lengths must sum to the rows of features, "
            f"{features.shape[0]}, got {total}"
        )
    if padding_side not in ("right", "left"):
        raise ValueError(
            f"splice_images: padding_side must be 'right' or 'left', got {padding_side!r}"
        )
    batch, text_length = input_ids.shape
    length = _longest(batch, text_length, lengths, images_per_sample)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    source, visual_index, image, spans = _source_rows(
        input_ids, attention_mask.bool(), lengths, length, padding_side
    )
    # Rows of the table: every text token, every visual token, and one row of zeros for padding.
    empty = batch * text_length + total
    zero = text_embeds.new_zeros(1, text_embeds.shape[-1])
    table = torch.cat([text_embeds.flatten(0, 1), features.to(text_embeds.dtype), zero])
    if labels is None:
        labels = torch.full_like(input_ids, IGNORE_INDEX)
    label_table = torch.cat([labels.flatten(), labels.new_full((total + 1,), IGNORE_INDEX)])
    text = image.new_full((batch * text_length,), -1)
    image_table = torch.cat([text, image, text.new_full((1,), -1)])
    mask = (source != empty).view(batch, length)
    return SplicedBatch(
        inputs_embeds=table.index_select(0, source).view(batch, length, -1),
        labels=label_table[source].view(batch, length),
        attention_mask=mask,
        position_ids=(mask.long().cumsum(1) - 1).clamp(min=0) * mask,
        image_id=image_table[source].view(batch, length),
        visual_index=visual_index,
        spans=spans,
    )


def _longest(
    batch: int, length: int, lengths: Sequence[int], images_per_sample: Sequence[int] | None
) -> int:
    """A length that every sample fits into, from host numbers only."""
    if images_per_sample is None:
        if len(lengths) != batch:
            raise ValueError(
                "splice_images: images_per_sample must be given unless every sample has one image, "
                f"got {len(lengths)} images for {batch} samples"
            )
        # An image-less sample's dummy makes the bound generous, not wrong.
        images_per_sample = [1] * batch
    if len(images_per_sample) != batch or sum(max(n, 1) for n in images_per_sample) != len(lengths):
        raise ValueError(
            "splice_images: images_per_sample must have one count per sample and, an image-less "
            f"sample counting as 1, sum to the number of images, {len(lengths)}, "
            f"got {list(images_per_sample)}"
        )
    longest, first = length, 0
    for count in images_per_sample:
        longest = max(longest, length + sum(t - 1 for t in lengths[first : first + count]))
        first += max(count, 1)
    return longest


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """First packed row of every image, then the total: (I + 1,) int64, without a wait."""
    if lengths and all_equal(lengths):
        return torch.arange(len(lengths) + 1, device=device) * lengths[0]
    return device_integers([*starts_of(lengths), sum(lengths)], device)


def _check_images(images_needed: Tensor, images: int) -> None:
    """Every placeholder must have its image: at once on a CPU, by a device assertion elsewhere."""
    message = f"splice_images: input_ids must show {images} images (an image-less sample counts 1)"
    if images_needed.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(images_needed) != images:
            raise ValueError(f"{message}, got {int(images_needed)}")
    else:
        torch._assert_async(images_needed == images, message)


def _source_rows(
    input_ids: Tensor, valid: Tensor, lengths: Sequence[int], length: int, padding_side: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Table row at each new position (B * L,), visual_index, image of each row (S,), spans."""
    batch, text_length = input_ids.shape
    device, images, total = input_ids.device, len(lengths), sum(lengths)
    offsets = _offsets(lengths, device)
    placeholder = (input_ids == IMAGE_TOKEN_INDEX) & valid
    owned = placeholder.sum(1).clamp(min=1)
    _check_images(owned.sum(), images)

    image = (owned.cumsum(0) - owned)[:, None] + placeholder.cumsum(1) - 1
    image = torch.where(placeholder, image, images).clamp(max=images)
    span = torch.cat([offsets[1:] - offsets[:-1], offsets.new_zeros(1)])[image]
    width = torch.where(placeholder, span, valid.long())
    begin = width.cumsum(1) - width
    if padding_side == "left":
        begin = begin + length - width.sum(1, keepdim=True)
    begin = begin + torch.arange(batch, device=device)[:, None] * length

    # Slot batch * length takes everything that is placed nowhere; it is cut off at the end.
    nowhere = batch * length
    source = torch.full((nowhere + 1,), batch * text_length + total, device=device)
    text_slot = torch.where(valid & ~placeholder, begin, nowhere)
    source.scatter_(0, text_slot.flatten(), torch.arange(batch * text_length, device=device))
    image_begin = torch.full((images + 1,), -1, device=device)
    image_begin.scatter_(0, image.flatten(), begin.flatten())
    row = torch.arange(total, device=device)
    row_image = torch.searchsorted(offsets[1:], row, right=True)
    row_begin = image_begin[row_image]
    visual_index = torch.where(row_begin >= 0, row_begin + row - offsets[row_image], -1)
    visual_slot = torch.where(visual_index >= 0, visual_index, nowhere)
    source.scatter_(0, visual_slot, batch * text_length + row)
    first = image_begin[:-1]
    count = torch.where(first >= 0, offsets[1:] - offsets[:-1], 0)
    column = first.clamp(min=0) % max(length, 1)
    spans = torch.stack([first.clamp(min=0) // max(length, 1), column, column + count], dim=1)
    return source[:-1], visual_index, row_image, spans
