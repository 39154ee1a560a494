"""Inputs and error budgets shared by tests, benchmarks and ``croc-kernels selftest``."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

EPSILON = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}


def max_error(value: Tensor, exact: Tensor) -> float:
    """Largest absolute difference to the float64 result; inf if it is not finite somewhere."""
    if value.numel() == 0:
        return 0.0
    difference = (value.double() - exact.double()).abs()
    return float("inf") if not torch.isfinite(difference).all() else difference.max().item()


def assert_within_budget(
    value: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype, what: str
) -> None:
    """Assert that ``value`` errs at most twice as much as PyTorch's own result in the same dtype.

    Args:
        value: the kernel's result.
        exact: the float64 reference of the same inputs.
        plain: PyTorch's result computed in ``dtype``.
        dtype: sets the floor, one unit in the last place of the largest exact value.
        what: named in the message.
    """
    floor = EPSILON[dtype] * (exact.abs().max().item() if exact.numel() else 0.0)
    error, budget = max_error(value, exact), 2.0 * max_error(plain, exact) + floor
    assert error <= budget, f"{what}: error {error:.3e} exceeds {budget:.3e}"


def clustered_tokens(
    batch: int,
    num_tokens: int,
    dim: int,
    *,
    clusters: int = 40,
    noise: float = 0.3,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """(B, N, C) float32 L2-normalised tokens around ``clusters`` directions per image."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, clusters, dim, generator=generator)
    pick = torch.randint(clusters, (batch, num_tokens), generator=generator)
    tokens = torch.gather(centres, 1, pick[..., None].expand(-1, -1, dim))
    tokens = tokens + noise * torch.randn(batch, num_tokens, dim, generator=generator)
    return torch.nn.functional.normalize(tokens, dim=-1).to(device)


@contextlib.contextmanager
def _attention_of(configs: list[Any], name: str) -> Iterator[list[str]]:
    """The model with another attention and exact float32 products; the list gets the class of every
    layer that hands a mask to ours.
    """
    from transformers import AttentionInterface

    from .integrations import attention_interface

    masked: list[str] = []
    attention = attention_interface.croc_attention

    # Some models name the mask, so its name has to be theirs.
    def counted(
        module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, **more: Any
    ) -> Any:
        if attention_mask is not None:
            masked.append(type(module).__name__)
        return attention(module, query, key, value, attention_mask, **more)

    before = [config._attn_implementation for config in configs]
    precision = torch.get_float32_matmul_precision()
    AttentionInterface.register(attention_interface.NAME, counted)
    torch.set_float32_matmul_precision("highest")
    try:
        for config in configs:
            config._attn_implementation = name
        yield masked
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
        torch.set_float32_matmul_precision(precision)
        attention_interface.register()


@torch.no_grad()
def assert_attention_matches_eager(model: nn.Module, batch: dict[str, Any]) -> float:
    """Assert that a transformers model gives the same logits with our attention as with eager.

    One line to find out whether a model's masks survive ``attn_implementation="croc"``. Use a batch
    that would tell: two images of two or more tokens in a sample, and padding. Calls
    ``register()``; float32 products are exact meanwhile (no tf32).

    Args:
        model: any transformers model with a head, in float32 or float64, without an attached layer;
            its attention is restored. Low precision would need a tolerance that hides a lost image.
        batch: its inputs. Rows where ``attention_mask`` is 0 are not compared.

    Returns:
        The largest difference of the logits.

    Raises:
        AssertionError: they differ by more than 64 units in the last place of the largest logit, or
            the model never asked for our attention.
        TypeError: the model computes in another dtype, or returns no logits.
        RuntimeError: a layer is attached.
        ImportError: transformers is missing or out of range.
    """
    from .integrations.attention_interface import NAME, register

    function, kind = "assert_attention_matches_eager", type(model).__name__
    if hasattr(model, "croc"):
        raise RuntimeError(
            f"{function}: model must have no CrocLayer, got one; detach(model) first"
        )
    register()
    configs = {
        id(module.config): module.config
        for module in model.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
    }
    training = model.training
    model.eval()
    logits = {}
    try:
        for name in ("eager", NAME):
            with _attention_of(list(configs.values()), name) as masked:
                output = model(**batch)
            if getattr(output, "logits", None) is None:
                raise TypeError(
                    f"{function}: model must return logits, got {type(output).__name__} of {kind}; "
                    "take the class with the head"
                )
            logits[name] = output.logits
    finally:
        model.train(training)
    if logits[NAME].dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{function}: model must be float32 or float64, got {logits[NAME].dtype}; call "
            "model.float()"
        )
    if (valid := batch.get("attention_mask")) is not None:
        logits = {name: value[valid.bool()] for name, value in logits.items()}
    exact = logits["eager"]
    error = max_error(logits[NAME], exact)
    budget = 64 * EPSILON[exact.dtype] * exact.abs().max().item()
    assert error <= budget, f"{kind}: logits differ by {error:.3e} > {budget:.3e}"
    assert masked, (
        f"{kind}: no layer handed a mask to attn_implementation={NAME!r}, so nothing was compared: "
        "its code does not use transformers' attention interface"
    )
    return error
