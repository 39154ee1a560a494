"""Fast, exact kernels for pretraining multimodal LLMs by token reconstruction."""

from . import _versions as _versions
from .assignment.api import LinearAssignment, linear_assignment, linear_assignment_ex
from .attention.api import mixed_attention
from .attention.mask import MixedMask
from .cost.api import nearest_token, token_cost
from .layer import CrocLayer
from .replacement.api import reconstruction_loss, replace_tokens

__version__ = _versions.PACKAGE

__all__ = [
    "CrocLayer",
    "LinearAssignment",
    "MixedMask",
    "linear_assignment",
    "linear_assignment_ex",
    "mixed_attention",
    "nearest_token",
    "reconstruction_loss",
    "replace_tokens",
    "token_cost",
]
