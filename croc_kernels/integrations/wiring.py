"""How an :class:`~.seams.Attachment` is put into a model's instances, and taken out again."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn

from . import attention_interface

ATTRIBUTE = "_croc_attachment"
MODULE = "croc"
CONFIG_ENTRY = "croc"


@dataclass
class Undo:
    """What :func:`~.attach.detach` puts back."""

    hooks: list[Any] = field(default_factory=list)
    configs: list[tuple[Any, Any]] = field(default_factory=list)
    methods: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    config_entry: Any = None
    changes: list[str] = field(default_factory=list)

    def original(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """The method as it was before :func:`wrap`."""
        for owner, method, saved in self.methods:
            if owner is module and method == name and saved is not None:
                return saved
        return functools.partial(getattr(type(module), name), module)


def connect(attachment: Any) -> None:
    """Wrap and hook everything, and note it down."""
    note = attachment.undo.changes.append
    wrapped = [
        (attachment.model, "forward", "adds the reconstruction loss to output.loss"),
        (attachment.inner, "get_image_features", "normalises, masks and replaces inside forward"),
    ]
    if attachment.family.newline:
        wrapped.append((attachment.inner, "pack_image_features", "finds newline rows"))
    for module, name, purpose in wrapped:
        wrap(attachment, module, name)
        note(f"{type(module).__name__}.{name} (this instance): {purpose}")
    text, inner = attachment.language_model, attachment.inner
    attachment.undo.hooks = [
        inner.register_forward_pre_hook(attachment.before_inner, with_kwargs=True),
        text.register_forward_pre_hook(attachment.before_language_model, with_kwargs=True),
        text.register_forward_hook(attachment.after_language_model),
    ]
    name = type(text).__name__
    note(f"{type(inner).__name__}: forward pre-hook (refuses calls past the root's forward)")
    note(f"{name}: forward pre-hook (the recipe's mask)")
    note(f"{name}: forward hook (reconstruction from the last hidden states)")


def wrap(attachment: Any, module: nn.Module, name: str) -> None:
    """Put the attachment's method of that name in the instance's place."""
    attachment.undo.methods.append((module, name, module.__dict__.get(name)))
    setattr(module, ATTRIBUTE, attachment)
    setattr(module, name, MethodType(_wrapper(type(module), name), module))


def switch_attention(attachment: Any) -> None:
    """Let the text config, wherever it is shared, ask for ``"croc"``."""
    attention_interface.register()
    seen: dict[int, Any] = {}
    for config in [attachment.model.config.get_text_config(), *(
        getattr(module, "config", None) for module in attachment.language_model.modules()
    )]:  # fmt: skip
        if config is not None and hasattr(config, "_attn_implementation"):
            seen.setdefault(id(config), config)
    for config in seen.values():
        attachment.undo.configs.append((config, config._attn_implementation))
        config._attn_implementation = attention_interface.NAME
    before = attachment.undo.configs[0][1]
    attachment.undo.changes.append(f'text config: attn_implementation "{before}" -> "croc"')
    attachment.undo.changes.append(
        'global: transformers knows attn_implementation "croc" (register())'
    )


def restore(attachment: Any) -> None:
    """Undo everything."""
    for hook in attachment.undo.hooks:
        hook.remove()
    for module, name, saved in reversed(attachment.undo.methods):
        if saved is None:
            delattr(module, name)
        else:
            setattr(module, name, saved)
    for config, implementation in attachment.undo.configs:
        config._attn_implementation = implementation
    delattr(attachment.model, MODULE)
    delattr(attachment.model.config, CONFIG_ENTRY)
    if attachment.undo.config_entry is not None:
        setattr(attachment.model.config, CONFIG_ENTRY, attachment.undo.config_entry)
    for module in (attachment.model, attachment.inner):
        delattr(module, ATTRIBUTE)


@functools.cache
def _wrapper(cls: type[nn.Module], name: str) -> Callable[..., Any]:
    """A method that goes to the attachment's of the same name. Its signature stays: Trainer, PEFT
    and generate look at it. It finds the attachment through ``self``, so a deep copy of the model
    has its own.
    """

    @functools.wraps(getattr(cls, name))
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(getattr(self, ATTRIBUTE), name)(*args, **kwargs)

    return method
