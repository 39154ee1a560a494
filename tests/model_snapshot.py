"""All that a model is, to be compared before and after."""

import torch
import transformers


def frozen(value):
    """What an attribute holds, to be compared later: tensors, modules and configs by identity,
    containers (hooks, sub-modules, parameters) by their content, keys of hooks by their number.
    """
    if isinstance(value, torch.Tensor | torch.nn.Module):
        return id(value), getattr(value, "requires_grad", None)
    if isinstance(value, dict):
        return [("hook" if isinstance(k, int) else k, frozen(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [frozen(part) for part in value]
    if isinstance(value, transformers.PretrainedConfig):
        return id(value), value.to_dict(), value._attn_implementation
    return repr(value)


def snapshot(model):
    """Every attribute of every module and its class, and all values: what detach has to restore."""
    modules = {
        name: {
            # Qwen's forward keeps the offset of its last positions there.
            key: frozen(value)
            for key, value in module.__dict__.items()
            if key != "rope_deltas"
        }
        for name, module in model.named_modules()
    }
    classes = {
        name: (type(module), dict(vars(type(module)))) for name, module in model.named_modules()
    }
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return modules, classes, values
