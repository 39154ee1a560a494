"""Parameter names of the released Croc and ViCToR checkpoints, and of transformers' Llava."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """One released code base's names.

    Attributes:
        model_type: of its ``config.json``.
        text_type: transformers' type of the language model inside.
        recipe: what the checkpoint was trained with.
        pairs: (released prefix, Llava prefix); the first that matches counts, in both directions.
        unused: patterns of parameters that the released code owns and never uses.
    """

    model_type: str
    text_type: str
    recipe: str
    pairs: tuple[tuple[str, str], ...]
    unused: tuple[str, ...] = ()


_COMMON = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
_BERT = "transform_block.layers.0."
_HEAD = "croc.head.layer."

CROC = Names(
    model_type="croc_llama",
    text_type="llama",
    recipe="croc-released",
    pairs=(
        ("model.mask_token", "croc.pool"),
        ("transform_block.position_embeddings.", "croc.head.position."),
        # Query, key and value are three matrices there and one here: parts of the same name.
        (_BERT + "attention.self.query.", _HEAD + "self_attn.in_proj_[0/3]"),
        (_BERT + "attention.self.key.", _HEAD + "self_attn.in_proj_[1/3]"),
        (_BERT + "attention.self.value.", _HEAD + "self_attn.in_proj_[2/3]"),
        (_BERT + "attention.output.dense.", _HEAD + "self_attn.out_proj."),
        (_BERT + "attention.output.LayerNorm.", _HEAD + "norm1."),
        (_BERT + "intermediate.dense.", _HEAD + "linear1."),
        (_BERT + "output.dense.", _HEAD + "linear2."),
        (_BERT + "output.LayerNorm.", _HEAD + "norm2."),
        ("transform_block.resize.", "croc.head.output."),
        *_COMMON,
    ),
    unused=(r"model\.cross_attention\.",),
)
VICTOR = Names(
    model_type="llava_qwen",
    text_type="qwen2",
    recipe="victor",
    pairs=(("model.token_pool", "croc.pool"), ("img_head.", "croc.head."), *_COMMON),
    unused=(r"model\.pool_weight\.",),
)
LLAVA = Names(model_type="llava_llama", text_type="llama", recipe="", pairs=_COMMON)
RELEASES = {"croc": CROC, "victor": VICTOR, "llava": LLAVA}

_PART = re.compile(r"\[(\d)/(\d)\]")
# Buffers that older transformers wrote and no version needs.
_IGNORED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def is_ignored(name: str, names: Names) -> bool:
    """Whether a released parameter carries nothing that is used."""
    unused = any(re.match(pattern, name) for pattern in names.unused)
    return unused or _IGNORED.search(name) is not None


def to_llava(name: str, names: Names) -> str | None:
    """The Llava name of a released parameter, or None if it is unknown."""
    for released, llava in names.pairs:
        if name == released or (released.endswith(".") and name.startswith(released)):
            return llava + name[len(released) :]
    return None


def to_released(name: str, names: Names) -> list[str]:
    """The released names of a Llava parameter: none if unknown, three for a joined matrix."""
    found = []
    for released, llava in names.pairs:
        part = _PART.search(llava)
        prefix = _PART.sub("", llava)
        if name == prefix or (name.startswith(prefix) and (prefix.endswith(".") or part)):
            found.append(released + name[len(prefix) :])
            if part is None:
                break
            if int(part[1]) + 1 == int(part[2]):
                break
    return found


def split_part(name: str) -> tuple[str, int, int]:
    """``(joined name, part, number of parts)`` of a name that :func:`to_llava` gave."""
    part = _PART.search(name)
    if part is None:
        return name, 0, 1
    return _PART.sub("", name), int(part[1]), int(part[2])
