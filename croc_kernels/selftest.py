"""``croc-kernels selftest``: every operator against its reference, in the installed package."""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from . import (
    CrocLayer,
    MixedMask,
    linear_assignment_ex,
    mixed_attention,
    nearest_token,
    reconstruction_loss,
    replace_tokens,
    token_cost,
)
from .testing import assert_within_budget, clustered_tokens, max_error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="default: the CPU, and CUDA if it is there",
    )


def working_dtype(device: torch.device) -> torch.dtype:
    """What training uses on the device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def normal(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Standard normal values, the same on every device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device, working_dtype(device))


def gradients(
    call: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The result of ``call`` on ``inputs`` in ``dtype``, and the gradient of its weighted sum."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = call(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(dtype)
    return [out, *torch.autograd.grad(out, leaves, weight)]


def check_differentiable(
    call: Callable[..., Callable[..., Tensor]], inputs: list[Tensor], names: tuple[str, ...]
) -> None:
    """Compare with the float64 reference: at most twice the reference's error in this dtype."""
    dtype = inputs[0].dtype
    values = gradients(call("auto"), inputs, dtype)
    exact = gradients(call("reference"), inputs, torch.float64)
    plain = gradients(call("reference"), inputs, dtype)
    for name, value, e, p in zip(names, values, exact, plain, strict=True):
        assert_within_budget(value, e, p, dtype, name)


def check_mixed_attention(device: torch.device) -> None:
    """Two images, padding, grouped heads, an odd length: output and gradients."""
    spans = torch.tensor([[0, 5, 41], [1, 0, 64], [1, 64, 90]], dtype=torch.int32, device=device)
    keep = torch.ones(2, 131, dtype=torch.bool, device=device)
    keep[0, 120:] = False
    mask = MixedMask.from_spans(spans, 2, 131, attention_mask=keep)
    q = normal((2, 4, 131, 64), 0, device)
    k, v = (normal((2, 2, 131, 64), seed, device) for seed in (1, 2))
    check_differentiable(
        lambda backend: lambda q, k, v: mixed_attention(q, k, v, mask, backend=backend),
        [q, k, v],
        ("out", "dq", "dk", "dv"),
    )


def _tokens_and_pool(device: torch.device) -> tuple[Tensor, Tensor]:
    tokens = clustered_tokens(2, 37, 96, device=device).to(working_dtype(device))
    return tokens, normal((83, 96), 3, device)


def check_token_cost(device: torch.device) -> None:
    """Costs of an odd shape."""
    tokens, pool = _tokens_and_pool(device)
    exact = token_cost(tokens.double(), pool.double(), backend="reference")
    plain = torch.cdist(tokens.float(), pool.float()[None])
    assert_within_budget(token_cost(tokens, pool), exact, plain, torch.float32, "cost")


def check_nearest_token(device: torch.device) -> None:
    """The distance of the row chosen, since equal distances may go either way."""
    tokens, pool = _tokens_and_pool(device)
    exact = token_cost(tokens.double(), pool.double(), backend="reference")
    chosen = exact.gather(-1, nearest_token(tokens, pool)[..., None])[..., 0]
    best = exact.min(-1).values
    assert_within_budget(chosen, best, best, torch.float32, "distance")


def check_linear_assignment(device: torch.device) -> None:
    """A matching, as cheap as SciPy's, with its certificate."""
    cost = torch.rand(3, 37, 83, generator=torch.Generator().manual_seed(4)).to(device)
    result = linear_assignment_ex(cost)
    best = linear_assignment_ex(cost.cpu(), backend="reference")
    index = result.index.cpu()
    assert result.status.eq(0).all(), f"status {result.status.tolist()}"
    assert all(len(set(row)) == 37 for row in index.tolist()), "a column is taken twice"
    totals = [cost.cpu().double().gather(-1, i[..., None]).sum((1, 2)) for i in (index, best.index)]
    assert max_error(*totals) <= 1e-9, f"total costs {totals[0].tolist()}, not {totals[1].tolist()}"
    assert result.gap.abs().max() <= 1e-9, f"certificate gap {result.gap.tolist()}"


def check_replace_tokens(device: torch.device) -> None:
    """Values and gradients, one pool row drawn twice."""
    embeddings, pool = normal((2, 19, 40), 5, device), normal((11, 40), 6, device)
    index = (torch.arange(38, device=device) % 7).reshape(2, 19)
    where = index < 5
    check_differentiable(
        lambda backend: lambda e, p: replace_tokens(e, where, p, index, backend=backend),
        [embeddings, pool],
        ("out", "d_embeddings", "d_pool"),
    )


def check_reconstruction_loss(device: torch.device) -> None:
    """The loss over some tokens and its gradient."""
    prediction, target = normal((2, 19, 40), 7, device), normal((2, 19, 40), 8, device)
    where = (torch.arange(38, device=device) % 3 > 0).reshape(2, 19)
    check_differentiable(
        lambda backend: (
            lambda p: reconstruction_loss(p, target.to(p.dtype), where, backend=backend)
        ),
        [prediction],
        ("loss", "d_prediction"),
    )


def check_croc_layer(device: torch.device) -> None:
    """Distinct rows are matched, and the loss reaches pool, head and features."""
    torch.manual_seed(0)
    layer = CrocLayer(64, pool_size=48, recipe="croc", device=device)
    features = normal((50, 64), 9, device).float().requires_grad_()
    replaced = layer.replace(features, [20, 30])
    # The mean stands for the model: it carries the loss of masked tokens to the kept ones.
    hidden = replaced.embeddings + replaced.embeddings.mean(0)
    loss = layer.loss(hidden, replaced)
    found = torch.autograd.grad(loss, [features, *layer.parameters()])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in found), "a gradient is 0 or NaN"
    for rows in replaced.pool_index.split([20, 30]):
        used = rows[rows >= 0].tolist()
        assert len(used) == len(set(used)) == -(-3 * len(rows) // 4), "rows are not distinct"


CHECKS = {
    "mixed_attention": check_mixed_attention,
    "token_cost": check_token_cost,
    "nearest_token": check_nearest_token,
    "linear_assignment": check_linear_assignment,
    "replace_tokens": check_replace_tokens,
    "reconstruction_loss": check_reconstruction_loss,
    "CrocLayer": check_croc_layer,
}


def run_checks(devices: list[torch.device]) -> list[tuple[str, str, str]]:
    """(operator, device, message) of every check; the message is empty where it passed."""
    outcomes = []
    for device in devices:
        for name, check in CHECKS.items():
            message = ""
            try:
                check(device)
            # Whatever goes wrong in one operator, the table shows the others.
            except Exception as error:
                message = f"{type(error).__name__}: {error}".splitlines()[0]
            outcomes.append((name, str(device), message))
    return outcomes


def run(args: argparse.Namespace) -> int:
    """Print one line per operator and device; 1 if a check failed, 2 without the device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "croc-kernels selftest: --device must be a device of this machine, got cuda; "
            "torch.cuda.is_available() is False",
            file=sys.stderr,
        )
        return 2
    names = [args.device] if args.device else ["cpu", *["cuda"] * torch.cuda.is_available()]
    outcomes = run_checks([torch.device(name) for name in names])
    for name, device, message in outcomes:
        print(f"{name:20} {device:6} {'FAILED  ' + message if message else 'ok'}")
    failed = sum(bool(message) for _, _, message in outcomes)
    print(f"{len(outcomes) - failed} passed, {failed} failed")
    return 1 if failed else 0
