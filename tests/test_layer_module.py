"""CrocLayer as a module: parameters, dtypes, tracing, sharding, the head."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_layer import C, M, features_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import croc_kernels as ck

RECIPES = ("croc", "croc-released", "victor")
LENGTHS = (12, 5)


def run_stage(layer: ck.CrocLayer, features: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Stand-in for the LLM: every hidden state depends on every embedding."""
    replacement = layer.replace(features, lengths)
    embeddings = replacement.embeddings
    return layer.loss(embeddings + embeddings.mean(0), replacement)


@pytest.mark.parametrize("recipe", RECIPES)
def test_layer_state_dict_round_trip(recipe: str) -> None:
    layer, other = ck.CrocLayer(C, M, recipe), ck.CrocLayer(C, M, recipe)
    other.load_state_dict(layer.state_dict())
    for one, two in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert layer.state_dict()["pool"].shape == (M, C)


@pytest.mark.parametrize("recipe", RECIPES)
def test_layer_deep_copy_is_independent(recipe: str) -> None:
    layer = ck.CrocLayer(C, M, recipe).eval()
    other = copy.deepcopy(layer)
    torch.manual_seed(1)
    expected = run_stage(layer, features_of(LENGTHS), LENGTHS)
    with torch.no_grad():
        layer.pool.zero_()
    torch.manual_seed(1)
    assert torch.equal(run_stage(other, features_of(LENGTHS), LENGTHS), expected)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("pool_init", ["randn", "unit"])
def test_layer_from_the_meta_device(recipe: str, pool_init: str) -> None:
    options = {"pool_init": pool_init, "dtype": torch.float64}
    torch.manual_seed(4)
    expected = ck.CrocLayer(C, M, recipe, **options)
    expected.reset_parameters()
    layer = ck.CrocLayer(C, M, recipe, device="meta", **options)
    assert layer.pool.device.type == "meta"
    layer.to_empty(device="cpu")
    torch.manual_seed(4)
    torch.randn(1)
    layer.reset_parameters()
    for name, value in layer.named_parameters():
        other = expected.get_parameter(name)
        assert value.dtype == torch.float64
        assert torch.isfinite(value).all()
        assert value.std().item() == pytest.approx(other.std().item(), rel=0.3, abs=1e-12)


def test_layer_pool_initialisation() -> None:
    published, unit = ck.CrocLayer(256, 64), ck.CrocLayer(256, 64, pool_init="unit")
    assert published.pool.norm(dim=1).mean().item() == pytest.approx(16.0, rel=0.02)
    assert torch.allclose(unit.pool.norm(dim=1), torch.ones(64), atol=1e-6)


def test_layer_says_what_it_is() -> None:
    text = repr(ck.CrocLayer(C, M, "victor"))
    assert f"{C}, pool_size={M}, recipe='victor', mask_ratio=0.75, metric='l2'" in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_layer_in_bfloat16(recipe: str) -> None:
    layer = ck.CrocLayer(C, M, recipe, dtype=torch.bfloat16)
    features = features_of(LENGTHS).bfloat16().requires_grad_()
    replacement = layer.replace(features, LENGTHS)
    assert replacement.embeddings.dtype == replacement.target.dtype == torch.bfloat16
    loss = layer.loss(replacement.embeddings, replacement)
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.pool.grad.dtype == features.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_layer_under_autocast(recipe: str, device: str) -> None:
    layer = ck.CrocLayer(C, M, recipe, device=device).eval()
    layer.head.requires_grad_(True)
    projector = nn.Linear(C, C, device=device)
    with torch.autocast(device, torch.bfloat16):
        features = projector(features_of(LENGTHS).to(device))
        assert features.dtype == torch.bfloat16
        torch.manual_seed(1)
        loss = run_stage(layer, features, LENGTHS)
        assert layer.replace(features, LENGTHS).embeddings.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.pool.grad.dtype == torch.float32
    assert projector.weight.grad.any()
    torch.manual_seed(1)
    exact = run_stage(layer, features.detach().float(), LENGTHS)
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_bert_head_refuses_an_image_beyond_its_positions() -> None:
    layer = ck.CrocLayer(C, M, "croc-released", num_positions=8)
    message = "BertHead: an image must have at most num_positions = 8 tokens, got 12"
    with pytest.raises(ValueError, match=message):
        run_stage(layer, features_of(LENGTHS), LENGTHS)


# --- tracing and sharding ------------------------------------------------------------------------


class _NoHostTensors(TorchDispatchMode):
    """Fails on an op that reads a tensor of the host: on a GPU that is a copy to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                assert leaf.device.type == "meta", func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("lengths", [(12, 12), (12, 5, 0), (90, 7)])
def test_layer_step_needs_nothing_of_the_host(recipe: str, lengths: tuple[int, ...]) -> None:
    # Meta tensors have no values: whatever the host would have to read from the device raises.
    layer = ck.CrocLayer(C, M, recipe, allow_reuse=True, device="meta")
    features = torch.randn(sum(lengths), C, device="meta", requires_grad=True)
    with _NoHostTensors():
        loss = run_stage(layer, features, lengths) + layer.touch()
        loss.backward()
        layer.match_ahead([(features, lengths), (features, lengths)])
    assert features.grad.shape == features.shape
    assert layer.pool.grad.shape == layer.pool.shape


_COMPILED = """
import sys, torch, croc_kernels as ck
torch.set_num_threads(1)
recipe, dynamic = sys.argv[1], {"static": False, "dynamic": None}[sys.argv[2]]
backend, device = sys.argv[3:]
torch.set_default_device(device)
layer = ck.CrocLayer(16, 40, recipe).eval()

def step(features, lengths):
    replacement = layer.replace(features, lengths)
    return layer.loss(2 * replacement.embeddings, replacement), replacement.masked

compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
for seed, lengths in enumerate(((12, 12), (12, 5), (8, 20), (9, 21))):
    features = torch.randn(sum(lengths), 16)
    runs = []
    for function in (compiled, step):
        torch.manual_seed(seed)
        leaf = features.clone().requires_grad_()
        layer.zero_grad()
        loss, masked = function(leaf, lengths)
        loss.backward()
        runs.append((loss.detach(), masked, leaf.grad, layer.pool.grad))
    for one, two in zip(*runs):
        torch.testing.assert_close(one, two)
print("same")
"""


@pytest.mark.parametrize(("recipe", "mode"), [("croc", "static"), ("croc-released", "dynamic")])
@pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("aot_eager", "cpu", id="cpu"),
        pytest.param("inductor", "cuda", id="cuda", marks=pytest.mark.gpu),
    ],
)
def test_layer_compiles_in_one_graph_in_a_fresh_process(
    recipe: str, mode: str, backend: str, device: str
) -> None:
    command = [sys.executable, "-c", _COMPILED, recipe, mode, backend, device]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.stdout.strip() == "same", result.stderr[-2000:]


class _Model(nn.Module):
    """A stage whose pool, head and loss lie inside the root's forward, as sharding demands."""

    def __init__(self, recipe: str):
        super().__init__()
        self.projector = nn.Linear(C, C)
        self.croc = ck.CrocLayer(C, M, recipe)

    def forward(self, images: Tensor, lengths: tuple[int, ...]) -> Tensor:
        features = self.projector(images)
        if not lengths:
            return self.croc.touch() + features.sum()
        return run_stage(self.croc, features, lengths)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("own_unit", [False, True])
def test_layer_inside_an_fsdp2_root(recipe: str, own_unit: bool, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = _Model(recipe).eval()
        plain = copy.deepcopy(model)
        mesh = init_device_mesh("cpu", (1,))
        if own_unit:
            fully_shard(model.croc, mesh=mesh, reshard_after_forward=True)
            for method in ("replace", "match_ahead", "loss", "touch"):
                register_fsdp_forward_method(model.croc, method)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        for lengths in (LENGTHS, ()):
            images = features_of(lengths)
            losses = []
            for one in (model, plain):
                torch.manual_seed(1)
                one.zero_grad()
                loss = one(images, lengths)
                loss.backward()
                losses.append(loss.item())
            assert losses[0] == losses[1]
            assert math.isfinite(losses[0])
            for name, parameter in plain.named_parameters():
                sharded = model.get_parameter(name).grad.full_tensor()
                assert torch.allclose(sharded, parameter.grad, atol=1e-6), name
    finally:
        torch.distributed.destroy_process_group()


# --- GPU -----------------------------------------------------------------------------------------


def gpu_stage(recipe: str, lengths: tuple[int, ...]) -> tuple[ck.CrocLayer, Tensor, Tensor]:
    layer = ck.CrocLayer(256, 512, recipe, num_positions=576, device="cuda", dtype=torch.bfloat16)
    layer.head.eval()
    total = sum(lengths)
    features = torch.randn(total, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    is_visual = torch.ones(1, total, dtype=torch.bool, device="cuda")
    return layer, features, is_visual


def gpu_step(layer: ck.CrocLayer, features: Tensor, is_visual: Tensor, lengths: tuple[int, ...]):
    replacement = layer.replace(features, lengths)
    labels = torch.full_like(is_visual, -100, dtype=torch.int64)
    mask = layer.mask(is_visual, labels=labels)
    heads = replacement.embeddings.view(1, len(features), 4, 64).transpose(1, 2)
    hidden = ck.mixed_attention(heads, heads, heads, mask)
    loss = layer.loss(hidden.transpose(1, 2).reshape(len(features), 256), replacement)
    loss.backward()
    return loss.detach(), replacement


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("lengths", [(576, 576), (576, 100, 300)])
def test_layer_step_never_waits_for_the_host(recipe: str, lengths: tuple[int, ...]) -> None:
    stage = gpu_stage(recipe, lengths)
    gpu_step(*stage, lengths)  # kernels are compiled and loaded here
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, replacement = gpu_step(*stage, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(loss.item())
    assert int(replacement.masked.sum()) == replacement.num_masked


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("lengths", [(576, 576), (576, 100, 300)])
def test_layer_step_in_a_cuda_graph(recipe: str, lengths: tuple[int, ...]) -> None:
    stage = gpu_stage(recipe, lengths)
    layer, features, _ = stage
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            gpu_step(*stage, lengths)
    stream.synchronize()
    layer.zero_grad(set_to_none=True)
    features.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, replacement = gpu_step(*stage, lengths)
    masks = []
    for seed in (5, 6, 5):
        torch.cuda.manual_seed(seed)
        layer.pool.grad.zero_()
        features.grad.zero_()
        graph.replay()
        masks.append(replacement.masked.clone())
        captured = (loss.clone(), layer.pool.grad.clone(), features.grad.clone())
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])
    layer.zero_grad(set_to_none=True)
    features.grad = None
    torch.cuda.manual_seed(5)
    eager, replaced = gpu_step(*stage, lengths)
    assert torch.equal(replaced.masked, masks[2])
    for one, two in zip(captured, (eager, layer.pool.grad, features.grad), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.gpu
@torch.no_grad()
def test_layer_step_holds_the_costs_and_64_mebibytes_beside_its_results() -> None:
    images, tokens, pool, width = 32, 576, 2048, 4096
    layer = ck.CrocLayer(width, pool, device="cuda", dtype=torch.bfloat16)
    features = torch.randn(images * tokens, width, device="cuda", dtype=torch.bfloat16)
    layer.replace(features, (tokens,) * images)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    replacement = layer.replace(features, (tokens,) * images)
    extra = torch.cuda.max_memory_allocated() - before
    results = 2 * features.numel() * features.element_size()
    costs = 4 * replacement.num_masked * pool
    assert extra <= results + costs + (64 << 20)


@pytest.mark.gpu
def test_layer_draws_on_the_gpu_from_an_explicit_generator() -> None:
    layer, features, _ = gpu_stage("croc", (576,))
    generator = torch.Generator("cuda").manual_seed(3)
    one = layer.replace(features, (576,), generator=generator)
    two = layer.replace(features, (576,), generator=generator.manual_seed(3))
    assert torch.equal(one.pool_index, two.pool_index)
    message = "CrocLayer: generator must be on the features' device, cuda:0, got cpu"
    with pytest.raises(ValueError, match=message):
        layer.replace(features, (576,), generator=torch.Generator())
