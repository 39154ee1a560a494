"""Outputs of transformers' models with the two losses of the stage as declared fields.

A key that is only set is lost, or refused, wherever an output is taken apart and rebuilt from its
class: by DistributedDataParallel, by accelerate, by any pytree function.
"""

import dataclasses
import inspect
import typing
from typing import Any

from torch import Tensor, nn

_CLASSES: dict[type, type] = {}


def _extended(cls: type) -> type:
    """The dataclass ``cls`` with ``caption_loss`` and ``reconstruction_loss``."""
    if cls not in _CLASSES:
        names = ("caption_loss", "reconstruction_loss")
        fields = [(name, Tensor | None, None) for name in names]
        namespace = {"__module__": __name__, "__doc__": f"{cls.__name__} with the stage's losses."}
        made = dataclasses.make_dataclass(
            f"Croc{cls.__name__}", fields, bases=(cls,), namespace=namespace
        )
        _CLASSES[cls] = made
    return _CLASSES[cls]


def declare(model: nn.Module) -> None:
    """Make the extended class of this model's output, so that no compiler has to see it made."""
    from transformers.utils import ModelOutput

    forward = inspect.unwrap(type(model).forward)
    try:
        returned = typing.get_type_hints(forward).get("return")
    except NameError:  # an annotation that only a type checker can read: made on the first call
        return
    for cls in typing.get_args(returned) or (returned,):
        if isinstance(cls, type) and issubclass(cls, ModelOutput):
            _extended(cls)


def with_losses(output: Any, loss: Tensor, caption: Tensor, reconstruction: Tensor) -> Any:
    """The output with ``loss`` and, detached, its two parts; still an instance of its class."""
    cls = _CLASSES.get(type(output)) or _extended(type(output))
    values = dict(output.items()) | {
        "loss": loss,
        "caption_loss": caption.detach(),
        "reconstruction_loss": reconstruction.detach(),
    }
    return cls(**values)
