"""What matching adds to a step: costs and assignment, then everything from features to embeddings,
against the released code's loop.
"""

import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from croc_kernels import CrocLayer, linear_assignment_ex, replace_tokens, token_cost

from . import cases, peers
from .test_linear_assignment import CHECKED_PROBLEMS, excess, scipy_totals
from .timing import Ceiling, Work, measure, milliseconds_of_parts


def _croc() -> Callable:
    return lambda tokens, pool: linear_assignment_ex(token_cost(tokens, pool)).index


CROC = peers.Peer("croc", _croc)


@pytest.mark.cases(cuda=cases.STEP_GPU, cpu=cases.STEP_CPU)
@pytest.mark.parametrize("peer", [CROC, *peers.STEP], ids=lambda peer: peer.name)
def test_matching_step(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Matching,
    peer: peers.Peer,
) -> None:
    peer.require(device, case.batch)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, pool = case.tokens(device, dtype), case.pool(device, dtype)
    call = peer.prepare()
    exact = torch.cdist(tokens[:CHECKED_PROBLEMS].double(), pool.double()[None])
    error = excess(exact, call(tokens, pool), scipy_totals(exact.cpu()))
    # Costs are rounded to float32 before they are matched: 1e-6 relative is their rounding.
    assert peer is not CROC or error <= 1e-6, f"total cost exceeds the optimum by {error:.1e}"
    measure(
        benchmark, lambda: call(tokens, pool), device, ceiling, Work(flops=case.cost_flops()),
        op="matching_step", case=case.name, provider=peer.name, direction="fwd",
        relative_excess=error,
    )  # fmt: skip


def _released_replace() -> Callable:
    """Image by image: a permutation drawn on the host, one cdist, one SciPy call, two copies."""

    def call(layer: CrocLayer, features: Tensor, lengths: tuple[int, ...]) -> Tensor:
        images = F.normalize(features, dim=-1).split(lengths)
        for image in images:
            masked = torch.randperm(len(image))[: layer.num_masked([len(image)])].to(image.device)
            cost = torch.cdist(image[masked], layer.pool).float().cpu()
            image[masked] = layer.pool[peers.scipy_rows(cost).to(image.device)]
        return torch.cat(images)

    return call


LAYER = peers.Peer("croc", lambda: CrocLayer.replace)
RELEASED = peers.Peer("released-loop", _released_replace, largest_batch=4)


# Of masks, each with its own assignment: a step draws another one every time.
DRAWS = 5


def _parts(layer: CrocLayer, features: Tensor, batch: int) -> dict[str, Callable[[], object]]:
    """The operators of one step, each by itself, on what the step gives them."""
    result = layer.replace(features, (features.shape[0] // batch,) * batch)
    tokens, pool = result.target, layer.pool.detach()
    index = result.masked.nonzero().view(batch, -1)
    cost = token_cost(tokens, pool, token_index=index)
    return {
        "normalize": lambda: layer.normalize(features),
        "token_cost": lambda: token_cost(tokens, pool, token_index=index),
        "linear_assignment": lambda: linear_assignment_ex(cost),
        "replace_tokens": lambda: replace_tokens(tokens, result.masked, pool, result.pool_index),
    }


def _parts_ms(
    layer: CrocLayer, features: Tensor, batch: int, device: torch.device
) -> dict[str, float]:
    """The median over some draws of each part's milliseconds."""
    drawn = [milliseconds_of_parts(_parts(layer, features, batch), device) for _ in range(DRAWS)]
    return {name: statistics.median(times[name] for times in drawn) for name in drawn[0]}


@pytest.mark.cases(cuda=cases.LAYER_GPU, cpu=cases.LAYER_CPU)
@pytest.mark.parametrize("peer", [LAYER, RELEASED], ids=lambda peer: peer.name)
@torch.no_grad()
def test_layer_replace(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Matching,
    peer: peers.Peer,
) -> None:
    peer.require(device, case.batch)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = CrocLayer(case.dim, case.pool_size, device=device, dtype=dtype)
    layer.pool.copy_(case.pool(device, dtype))
    features = 3.0 * case.tokens(device, dtype).flatten(0, 1)
    lengths = (case.num_tokens,) * case.batch
    replace = peer.prepare()
    info = {}
    if peer is LAYER:
        result = replace(layer, features, lengths)
        first = slice(0, case.num_tokens)
        chosen = result.masked[first]
        exact = torch.cdist(result.target[first][chosen].double(), layer.pool.double())[None]
        index = result.pool_index[first][chosen][None]
        info["relative_excess"] = excess(exact, index, scipy_totals(exact.cpu()))
        assert info["relative_excess"] <= 1e-6
        # What the step has to hold: one float32 per masked token and pool row.
        info["cost_matrix_bytes"] = 4 * result.num_masked * case.pool_size
        info["parts_ms"] = _parts_ms(layer, features, case.batch, device)
    measure(
        benchmark, lambda: replace(layer, features, lengths), device, ceiling, Work(),
        op="layer_replace", case=case.name, provider=peer.name, direction="fwd", **info,
    )  # fmt: skip
