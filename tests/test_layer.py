"""CrocLayer: masks, matching, replacement, gradients, loss, attention."""

import math

import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import croc_kernels as ck
from croc_kernels.layer import matching
from croc_kernels.layer.recipe_config import Recipe

C, M = 16, 40
LENGTHS = [
    pytest.param((12,), id="one"),
    pytest.param((12, 12, 12), id="equal"),
    pytest.param((9, 16, 1, 30), id="ragged"),
    pytest.param((0, 7, 0, 20, 0), id="empty-images"),
]


def features_of(lengths: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3.0 * torch.randn(sum(lengths), C, generator=generator)


def per_image(values: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    return list(values.split(list(lengths)))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_layer_masks_the_ceiling_of_the_ratio_in_each_image(lengths: tuple[int, ...]) -> None:
    replacement = ck.CrocLayer(C, M).replace(features_of(lengths), lengths)
    counts = [int(x.sum()) for x in per_image(replacement.masked, lengths)]
    assert counts == [math.ceil(0.75 * length) for length in lengths]
    assert replacement.num_masked == sum(counts)
    assert torch.equal(replacement.masked, replacement.pool_index >= 0)


@pytest.mark.parametrize(
    ("ratio", "length", "count"),
    [(0.1, 30, 3), (0.7, 10, 7), (0.0, 9, 0), (1.0, 9, 9), (0.01, 9, 1)],
)
def test_layer_reads_the_ratio_as_a_decimal(ratio: float, length: int, count: int) -> None:
    layer = ck.CrocLayer(C, M, mask_ratio=ratio)
    replacement = layer.replace(features_of((length,)), (length,))
    assert int(replacement.masked.sum()) == replacement.num_masked == count


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("metric", ["l2", "l2sq", "cosine"])
def test_layer_hungarian_matching_is_optimal_and_distinct(
    lengths: tuple[int, ...], metric: str
) -> None:
    layer = ck.CrocLayer(C, M, metric=metric)
    replacement = layer.replace(features_of(lengths), lengths)
    pool = layer.pool.detach().double()
    for tokens, index in zip(
        per_image(replacement.target.double(), lengths),
        per_image(replacement.pool_index, lengths),
        strict=True,
    ):
        chosen = index >= 0
        distance = torch.cdist(tokens[chosen], pool)
        if metric == "l2sq":
            distance = distance**2
        if metric == "cosine":
            distance = 1 - F.normalize(tokens[chosen], dim=1) @ F.normalize(pool, dim=1).T
        rows, columns = scipy.optimize.linear_sum_assignment(distance.numpy())
        total = distance[torch.arange(len(distance)), index[chosen]].sum().item()
        assert total == pytest.approx(distance[rows, columns].sum().item(), rel=1e-6)
        assert index[chosen].unique().numel() == int(chosen.sum())


@pytest.mark.parametrize("lengths", LENGTHS)
def test_layer_nearest_matching_takes_the_nearest_row(lengths: tuple[int, ...]) -> None:
    layer = ck.CrocLayer(C, 3, "croc-released", pool_init="unit")
    replacement = layer.replace(features_of(lengths), lengths)
    nearest = torch.cdist(replacement.target, layer.pool.detach()).argmin(1)
    expected = torch.where(replacement.masked, nearest, -1)
    assert torch.equal(replacement.pool_index, expected)


@pytest.mark.parametrize("recipe", ["croc", "croc-released", "victor"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_layer_gradients_reach_matched_rows_and_kept_tokens_only(
    recipe: str, lengths: tuple[int, ...]
) -> None:
    layer = ck.CrocLayer(C, M, recipe)
    features = features_of(lengths).requires_grad_()
    replacement = layer.replace(features, lengths)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (replacement.embeddings * weight).sum().backward()

    masked, index = replacement.masked, replacement.pool_index
    expected = F.normalize(features.detach(), dim=1)
    expected[masked] = layer.pool.detach()[index[masked]]
    assert torch.allclose(replacement.embeddings.detach(), expected, atol=1e-6)
    rows = torch.zeros(M, dtype=torch.bool)
    rows[index[masked]] = True
    assert torch.equal(layer.pool.grad.any(1), rows)
    assert torch.equal(features.grad.any(1), ~masked)
    pool_grad = torch.zeros(M, C).index_add_(0, index[masked], weight[masked])
    assert torch.allclose(layer.pool.grad, pool_grad, atol=1e-6)
    leaf = features.detach().clone().requires_grad_()
    (F.normalize(leaf, dim=1) * weight * ~masked[:, None]).sum().backward()
    assert torch.allclose(features.grad, leaf.grad, atol=1e-6)


def test_layer_target_is_detached_and_normalised() -> None:
    features = features_of((12,)).requires_grad_()
    target = ck.CrocLayer(C, M).replace(features, (12,)).target
    assert not target.requires_grad
    assert torch.allclose(target, F.normalize(features.detach(), dim=1), atol=1e-6)


def test_layer_inactive_normalises_and_draws_nothing() -> None:
    layer, features = ck.CrocLayer(C, M), features_of((12, 5))
    state = torch.get_rng_state()
    replacement = layer.replace(features, (12, 5), active=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(replacement.embeddings, layer.normalize(features))
    assert replacement.num_masked == 0
    assert not replacement.masked.any()
    assert (replacement.pool_index == -1).all()


@pytest.mark.parametrize("recipe", ["croc", "croc-released", "victor"])
def test_layer_without_images(recipe: str) -> None:
    layer = ck.CrocLayer(C, M, recipe)
    replacement = layer.replace(torch.zeros(0, C), ())
    assert replacement.embeddings.shape == (0, C)
    assert replacement.num_masked == layer.num_loss_tokens(()) == 0
    loss = layer.loss(torch.zeros(0, C), replacement)
    assert loss.item() == 0.0
    loss.backward()
    # Sharded training waits for the gradient of every parameter on every rank.
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("recipe", ["croc", "croc-released", "victor"])
def test_layer_touch_is_zero_and_depends_on_every_parameter(recipe: str) -> None:
    layer = ck.CrocLayer(C, M, recipe)
    touch = layer.touch()
    touch.backward()
    assert touch.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("recipe", ["croc", "victor"])
def test_layer_loss_runs_over_the_recipe_s_tokens(recipe: str) -> None:
    layer, lengths = ck.CrocLayer(C, M, recipe), (12, 5)
    replacement = layer.replace(features_of(lengths), lengths)
    hidden = torch.randn(17, C, requires_grad=True)
    loss = layer.loss(hidden, replacement)
    over = replacement.masked if recipe == "croc" else torch.ones(17, dtype=torch.bool)
    prediction = F.linear(hidden, layer.head.weight, layer.head.bias)
    expected = F.smooth_l1_loss(prediction[over], replacement.target[over], beta=0.01)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert layer.num_loss_tokens(lengths) == int(over.sum())
    (grad,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    assert torch.allclose(grad, expected_grad, atol=1e-7)


@pytest.mark.parametrize("recipe", ["croc", "croc-released", "victor"])
def test_layer_loss_of_micro_batches_adds_up_to_the_mean_of_the_step(recipe: str) -> None:
    layer = ck.CrocLayer(C, M, recipe)
    layer.head.eval()
    lengths = ((12, 5), (3,), (20, 20))
    features = [features_of(group, seed) for seed, group in enumerate(lengths)]
    generator = torch.Generator().manual_seed(2)
    replaced = [
        layer.replace(x, group, generator=generator)
        for x, group in zip(features, lengths, strict=True)
    ]
    hidden = [torch.randn(x.shape, generator=generator) for x in features]
    total = sum(layer.num_loss_tokens(group) for group in lengths)
    parts = [layer.loss(h, r, num_items=total) for h, r in zip(hidden, replaced, strict=True)]
    joined = type(replaced[0])(
        *(torch.cat(tensors) for tensors in zip(*(r[:4] for r in replaced), strict=True)),
        sum(r.num_masked for r in replaced),
        sum(lengths, ()),
    )
    whole = layer.loss(torch.cat(hidden), joined)
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("lengths", [(50, 3, 21), (40, 40)])
def test_layer_reuse_uses_a_row_at_most_once_per_round(lengths: tuple[int, ...]) -> None:
    layer = ck.CrocLayer(C, 8, allow_reuse=True)
    replacement = layer.replace(features_of(lengths), lengths)
    for index, length in zip(per_image(replacement.pool_index, lengths), lengths, strict=True):
        chosen = index[index >= 0]
        assert len(chosen) == math.ceil(0.75 * length)
        assert chosen.bincount().max() <= math.ceil(len(chosen) / 8)


def test_layer_reuse_is_optimal_within_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = []

    def noting(order: Tensor, counts: list[int], rows: int) -> matching.Problems:
        problems.append(make(order, counts, rows))
        return problems[-1]

    make = matching.make_problems
    monkeypatch.setattr(matching, "make_problems", noting)
    layer, lengths = ck.CrocLayer(C, 8, allow_reuse=True), (50, 3, 21)
    replacement = layer.replace(features_of(lengths), lengths)
    (found,) = problems
    for tokens, valid in zip(found.token_index, found.valid, strict=True):
        tokens = tokens[valid]
        distance = torch.cdist(replacement.target[tokens].double(), layer.pool.detach().double())
        index = replacement.pool_index[tokens]
        assert index.unique().numel() == len(tokens)
        best = distance[scipy.optimize.linear_sum_assignment(distance.numpy())].sum().item()
        total = distance.gather(1, index[:, None]).sum().item()
        assert total == pytest.approx(best, rel=1e-6)
    assert int(found.valid.sum()) == replacement.num_masked


class _Calls(TorchDispatchMode):
    """Counts the package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "croc_kernels":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["croc", "croc-released"])
def test_layer_takes_images_of_many_sizes_in_one_launch_of_each_operator(recipe: str) -> None:
    lengths = (547, 576, 1536, 0, 1)
    layer = ck.CrocLayer(C, 1200, recipe, num_positions=1536)
    with _Calls() as calls:
        replacement = layer.replace(features_of(lengths), lengths)
    matcher = ["token_cost", "linear_assignment"] if recipe == "croc" else ["nearest_token"]
    assert calls.names == ["l2_normalize_fwd", "draw_order", *matcher, "replace_tokens_fwd"]
    for tokens, index in zip(
        per_image(replacement.target.double(), lengths),
        per_image(replacement.pool_index, lengths),
        strict=True,
    ):
        chosen = index >= 0
        assert int(chosen.sum()) == math.ceil(0.75 * len(tokens))
        distance = torch.cdist(tokens[chosen], layer.pool.detach().double())
        total = distance.gather(1, index[chosen][:, None]).sum().item()
        best = distance.min(1).values.sum().item() if len(distance) else 0.0
        if recipe == "croc":
            best = distance[scipy.optimize.linear_sum_assignment(distance.numpy())].sum().item()
            assert index[chosen].unique().numel() == int(chosen.sum())
        assert total == pytest.approx(best, rel=1e-6)


def test_layer_float64_features_stay_float64() -> None:
    layer = ck.CrocLayer(C, M, dtype=torch.float64)
    features = features_of((12,)).double()
    replacement = layer.replace(features, (12,))
    assert replacement.embeddings.dtype == torch.float64
    assert layer.loss(replacement.embeddings, replacement).dtype == torch.float64


@pytest.mark.parametrize("recipe", ["croc", "croc-released", "victor"])
def test_layer_nan_features_leave_no_index_out_of_range(recipe: str) -> None:
    features = features_of((12, 12))
    features[3] = math.nan
    replacement = ck.CrocLayer(C, M, recipe).replace(features, (12, 12))
    assert replacement.pool_index.max() < M
    assert int(replacement.masked[12:].sum()) == 9
    assert torch.equal(replacement.masked, replacement.pool_index >= 0)


# --- attention -----------------------------------------------------------------------------------


def token_row() -> tuple[Tensor, Tensor, Tensor]:
    is_visual = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    labels = torch.full((2, 8), -100)
    labels[0, 6:], labels[1, 3:5] = 5, 6
    return is_visual, labels, torch.tensor([[1] * 8, [1] * 5 + [0] * 3])


def test_layer_mask_of_each_recipe() -> None:
    is_visual, labels, kept = token_row()
    masks = {
        name: ck.CrocLayer(C, M, name).mask(is_visual, attention_mask=kept, labels=labels)
        for name in ("croc", "croc-released", "victor")
    }
    expected = {
        "croc": ck.MixedMask.from_token_types(is_visual, kept),
        "croc-released": ck.MixedMask.from_labels(labels, kept),
        "victor": ck.MixedMask.causal(2, 8, attention_mask=kept),
    }
    dense = {name: mask.to_dense() for name, mask in masks.items()}
    for name, mask in expected.items():
        assert torch.equal(dense[name], mask.to_dense())
    assert dense["croc"][0, 0, 1].tolist() == [True] * 3 + [False] * 5
    assert dense["croc-released"][0, 0, 1].tolist() == [True] * 6 + [False] * 2
    assert dense["victor"][0, 0, 1].tolist() == [True] * 2 + [False] * 6


def test_layer_mask_of_packed_documents() -> None:
    is_visual, _, _ = token_row()
    documents = torch.tensor([[0] * 4 + [1] * 4] * 2)
    for name in ("croc", "victor"):
        dense = ck.CrocLayer(C, M, name).mask(is_visual, document_ids=documents).to_dense()
        assert not dense[:, 0, 4:, :4].any()


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"recipe": "krok"},
            r"CrocLayer: recipe must be one of \('croc', 'croc-released', 'victor'\), got 'krok'",
        ),
        ({"mask_ratio": 1.5}, r"CrocLayer: mask_ratio must be in \[0, 1\], got 1.5"),
        ({"mask_ratio": math.nan}, r"CrocLayer: mask_ratio must be in \[0, 1\], got nan"),
        ({"beta": -1.0}, r"CrocLayer: beta must be at least 0, got -1.0"),
        ({"pool_size": 0}, r"CrocLayer: pool_size must be at least 1, got 0"),
        (
            {"pool_init": "zeros"},
            r"CrocLayer: pool_init must be one of \('randn', 'unit'\), got 'zeros'",
        ),
        (
            {"metric": "l1"},
            r"CrocLayer: metric must be one of \('l2', 'l2sq', 'cosine'\), got 'l1'",
        ),
        (
            {"recipe": "croc-released", "num_heads": 3},
            r"BertHead: num_heads must divide hidden_size = 16, got 3",
        ),
    ],
)
def test_layer_refuses_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ck.CrocLayer(C, **options)


def test_recipe_refuses_an_unknown_part() -> None:
    message = r"Recipe: head must be one of \('linear', 'bert'\), got 'mlp'"
    with pytest.raises(ValueError, match=message):
        Recipe("mine", head="mlp")


@pytest.mark.parametrize(
    ("features", "lengths", "error", "message"),
    [
        (
            torch.zeros(4, C, dtype=torch.int64),
            (4,),
            TypeError,
            "replace: features must have dtype float16, bfloat16, float32, float64, got int64",
        ),
        (torch.zeros(4, 1, C), (4,), ValueError, r"features must be \(S, C\), got \(4, 1, 16\)"),
        (torch.zeros(4, 9), (4,), ValueError, r"\(S, C\) with C = 16, got \(4, 9\)"),
        (torch.zeros(4, C), (3,), ValueError, r"at least 0 and add up to S = 4, got \(3,\)"),
        (torch.zeros(4, C), (5, -1), ValueError, r"at least 0 and add up to S = 4, got \(5, -1\)"),
        (torch.zeros(4, C), torch.tensor([4]), TypeError, "lengths must be a sequence of host"),
        (torch.zeros(4, C), [*torch.tensor([4])], TypeError, "integers, got one with Tensor"),
        (torch.zeros(4, C), (4.0,), TypeError, "integers, got one with float"),
        (torch.zeros(4, C), 4, TypeError, "a sequence of host integers, got int"),
        ([1.0], (1,), TypeError, "features must be a torch.Tensor, got list"),
    ],
)
def test_layer_replace_refuses_bad_input(
    features: object, lengths: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ck.CrocLayer(C, M).replace(features, lengths)


def test_layer_refuses_more_masked_tokens_than_rows() -> None:
    message = (
        "CrocLayer.replace: an image must have at most pool_size = 8 masked tokens to get "
        "distinct pool rows, got 15; enlarge the pool or pass allow_reuse=True"
    )
    with pytest.raises(ValueError, match=message):
        ck.CrocLayer(C, 8).replace(features_of((4, 20)), (4, 20))


def test_layer_loss_refuses_other_tokens() -> None:
    layer = ck.CrocLayer(C, M)
    replacement = layer.replace(features_of((6,)), (6,))
    with pytest.raises(
        ValueError, match=r"loss: hidden must be \(S, C\) = \(6, 16\), got \(5, 16\)"
    ):
        layer.loss(torch.zeros(5, C), replacement)
    hidden = torch.zeros(6, C)
    with pytest.raises(TypeError, match="loss: visible must have dtype bool, got float32"):
        layer.loss(hidden, replacement, visible=torch.ones(6))
    with pytest.raises(ValueError, match=r"loss: visible must be \(S,\) = \(6,\), got \(5,\)"):
        layer.loss(hidden, replacement, visible=torch.ones(5, dtype=torch.bool))


@pytest.mark.parametrize("recipe", ["croc", "croc-released", "victor"])
def test_layer_mask_refuses_bad_input(recipe: str) -> None:
    layer, labels = ck.CrocLayer(C, M, recipe), torch.zeros(2, 7, dtype=torch.int64)
    is_visual = torch.zeros(2, 8, dtype=torch.bool)
    with pytest.raises(TypeError, match="mask: is_visual must have dtype bool, got int64"):
        layer.mask(is_visual.long(), labels=labels)
    with pytest.raises(ValueError, match=r"mask: is_visual must be \(B, L\), got \(8,\)"):
        layer.mask(is_visual[0], labels=labels)
    with pytest.raises(ValueError, match=r"labels must be \(B, L\) = \(2, 8\), got \(2, 7\)"):
        layer.mask(is_visual, labels=labels)


@pytest.mark.parametrize(
    "sizes",
    [{"hidden_size": 16.0}, {"pool_size": "8"}, {"recipe": "croc-released", "num_positions": 4.0}],
    ids=["hidden_size", "pool_size", "num_positions"],
)
def test_layer_refuses_sizes_that_are_no_integers(sizes: dict) -> None:
    name, value = list(sizes.items())[-1]
    with pytest.raises(TypeError, match=f"CrocLayer: {name} must be an integer, got {value!r}"):
        ck.CrocLayer(**{"hidden_size": C, **sizes})


def test_layer_mask_refuses_what_the_prefix_recipe_can_t_do() -> None:
    is_visual, labels, _ = token_row()
    layer = ck.CrocLayer(C, M, "croc-released")
    with pytest.raises(ValueError, match="mask: labels must be given for recipe 'croc-released'"):
        layer.mask(is_visual)
    with pytest.raises(ValueError, match="document_ids must be None for recipe 'croc-released'"):
        layer.mask(is_visual, labels=labels, document_ids=torch.zeros_like(labels))
