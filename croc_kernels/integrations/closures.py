"""Repair of the mask closures that transformers builds wrongly for packed rows.

From 5.23.0 on, every index is replaced by its position inside its document before the closure is
asked. That is right for causal, window and chunk, which only compare positions, and wrong for image
blocks, which look an id up by the token's place in the row: sliding layers lose the block of every
document but the first, and with ``torch.compile`` the look-up can leave the row. The repaired
closure asks every part with the true place, and only chunks with the position.

Before 5.24.0 a block is joined to a mask that has its documents already: blocks that share an id
across documents, as all prefixes of PaliGemma do, see each other. The repaired closure asks for the
same document last.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_REMAP = "remap_positions_for_packed_sequence.<locals>.inner_mask"
_AND = "and_masks.<locals>.and_mask"
_OR = "or_masks.<locals>.or_mask"
_CHUNK = "chunked_overlay.<locals>.inner_mask"
_DOCUMENTS = "packed_sequence_mask_function.<locals>.inner_mask"

Closure = Callable[..., Tensor]


def _name(function: Closure) -> str:
    return getattr(function, "__qualname__", "")


def _variable(function: Any, name: str) -> Any:
    """The value of a closure's free variable."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _all_of(parts: list[Closure]) -> Closure:
    def every(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        result = parts[0](batch, head, query, key)
        for part in parts[1:]:
            result = result & part(batch, head, query, key)
        return result

    return every


def _any_of(parts: list[Closure]) -> Closure:
    def some(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        result = parts[0](batch, head, query, key)
        for part in parts[1:]:
            result = result | part(batch, head, query, key)
        return result

    return some


def _by_position(function: Closure, position: Tensor) -> Closure:
    def remapped(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return function(batch, head, position[batch, query], position[batch, key])

    return remapped


def _rebuild(function: Closure, position: Tensor | None) -> Closure:
    """The closure with its remapped parts asked by place, chunks excepted."""
    name = _name(function)
    if name == _REMAP:
        return _rebuild(_variable(function, "mask_function"), _variable(function, "position_ids"))
    if name in (_AND, _OR):
        parts = [_rebuild(part, position) for part in _variable(function, "mask_functions")]
        return _all_of(parts) if name == _AND else _any_of(parts)
    if name == _CHUNK and position is not None:
        return _by_position(function, position)
    return function


def _remaps(function: Closure) -> bool:
    name = _name(function)
    if name in (_AND, _OR):
        return any(_remaps(part) for part in _variable(function, "mask_functions"))
    return name == _REMAP


def _documents(function: Closure, *, below_or: bool) -> list[Closure]:
    """The parts that keep documents apart, as far as an "or" stands above them."""
    name = _name(function)
    if name in (_AND, _OR):
        below_or = below_or or name == _OR
        parts = _variable(function, "mask_functions")
        return [found for part in parts for found in _documents(part, below_or=below_or)]
    return [function] if below_or and name == _DOCUMENTS else []


def repair_packing(function: Closure) -> Closure:
    """The closure itself, or its repaired form where transformers remapped positions or let a block
    see other documents.
    """
    documents = _documents(function, below_or=False)
    repaired = _rebuild(function, None) if _remaps(function) else function
    return _all_of([repaired, *documents]) if documents else repaired
