"""What CrocLayer is made of: normalisation, packing, the released head."""

import pytest
import torch
import torch.nn.functional as F
from test_layer import C
from torch import Tensor, nn

from croc_kernels import ops
from croc_kernels.layer.heads import BertHead
from croc_kernels.layer.normalization import l2_normalize
from croc_kernels.layer.packing import as_kernel_arguments, device_integers, padding
from croc_kernels.testing import assert_within_budget

# --- normalisation -------------------------------------------------------------------------------


def test_normalisation_gradient() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(l2_normalize, (x,))


def test_normalisation_of_a_zero_row_is_zero() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = l2_normalize(x)
    y.sum().backward()
    assert not y.any()
    reference = torch.zeros(2, 4, requires_grad=True)
    F.normalize(reference, dim=1).sum().backward()
    assert torch.equal(x.grad, reference.grad)


def test_normalisation_of_bfloat16_has_float32_norms() -> None:
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = l2_normalize(x)
    assert y.dtype == torch.bfloat16
    exact = F.normalize(x.double(), dim=1)
    # One rounding, of the result: at most half a unit in the last of 8 digits.
    limit = 2.0**-8 + 1e-6
    assert ((y.double() - exact).abs() <= limit * exact.abs()).all()
    published = F.normalize(x, dim=1).double()
    assert ((published - exact).abs() > limit * exact.abs()).any()


def test_normalisation_gradient_in_bfloat16_beats_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(16, 512, generator=generator).bfloat16() for _ in range(2))

    def gradient(function, dtype: torch.dtype) -> Tensor:
        leaf = x.to(dtype, copy=True).requires_grad_()
        function(leaf).backward(grad.to(dtype))
        return leaf.grad

    exact = gradient(lambda y: F.normalize(y, dim=1), torch.float64)
    plain = gradient(lambda y: F.normalize(y, dim=1), torch.bfloat16)
    own = gradient(l2_normalize, torch.bfloat16)
    assert_within_budget(own, exact, plain, torch.bfloat16, "normalisation gradient")


def test_normalisation_opcheck() -> None:
    for x in (torch.randn(3, 4), torch.randn(2, 3, 5).bfloat16(), torch.randn(4, 3).T):
        torch.library.opcheck(ops.l2_normalize_fwd, (x,))
        y, norm = ops.l2_normalize_fwd(x)
        torch.library.opcheck(ops.l2_normalize_bwd, (torch.randn_like(x), y, norm))


def test_draw_opcheck() -> None:
    seeds, table = torch.tensor([5, 2**62]), torch.tensor([[0, 3], [3, 4], [0, 3], [0, 1]])
    torch.library.opcheck(ops.draw_order, (seeds[:1], None, 2, 6, 4, 12, 1))
    torch.library.opcheck(ops.draw_order, (seeds, table, 2, 4, 4, 7, 1))


# --- packed images -------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(3,), (4, 4), (2, 5, 1), (0, 3, 0)])
def test_padding_places_every_token_once(lengths: tuple[int, ...]) -> None:
    index, valid = padding(lengths, torch.device("cpu"))
    assert index.shape == (len(lengths), max(lengths))
    places = index.reshape(-1) if valid is None else index[valid]
    assert places.tolist() == list(range(sum(lengths)))
    assert 0 <= index.min()
    assert index.max() < sum(lengths)


def test_device_integers_keep_their_values() -> None:
    values = [0, 7, -3, 2**40]
    device = torch.device("cpu")
    for make in (device_integers, as_kernel_arguments):
        result = make(values, device)
        assert result.dtype == torch.int64
        assert result.tolist() == values
        assert make([], device).shape == (0,)


# --- the released head ---------------------------------------------------------------------------


def test_bert_head_is_bert() -> None:
    from transformers import BertConfig, BertLayer

    head = BertHead(128, 16).eval()
    head.reset_parameters()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.1)
    config = BertConfig(
        hidden_size=128, intermediate_size=512, num_attention_heads=2, _attn_implementation="eager"
    )
    layer = BertLayer(config).eval()
    own = head.layer.self_attn
    attention, dense = layer.attention.self, layer.attention.output
    pairs = [(m, None) for m in (attention.query, attention.key, attention.value)]
    with torch.no_grad():
        for i, (module, _) in enumerate(pairs):
            module.weight.copy_(own.in_proj_weight[128 * i : 128 * (i + 1)])
            module.bias.copy_(own.in_proj_bias[128 * i : 128 * (i + 1)])
    for target, source in (
        (dense.dense, own.out_proj),
        (dense.LayerNorm, head.layer.norm1),
        (layer.intermediate.dense, head.layer.linear1),
        (layer.output.dense, head.layer.linear2),
        (layer.output.LayerNorm, head.layer.norm2),
    ):
        target.load_state_dict(source.state_dict())
    hidden = torch.randn(12, 128)
    with torch.no_grad():
        out = layer((hidden + head.position.weight[:12])[None])
        expected = head.output((out[0] if isinstance(out, tuple) else out)[0])
    assert torch.allclose(head(hidden, (12,)), expected, atol=1e-5)


@pytest.mark.parametrize("lengths", [(6, 6), (3, 9, 1), (0, 4, 7)])
def test_bert_head_does_not_mix_images(lengths: tuple[int, ...]) -> None:
    head = BertHead(C, 16).eval()
    hidden = torch.randn(sum(lengths), C, requires_grad=True)
    together = head(hidden, lengths)
    apart = [head(x, (len(x),)) for x in hidden.split(list(lengths)) if len(x)]
    assert torch.allclose(together, torch.cat(apart), atol=1e-5)
    (grad,) = torch.autograd.grad(together[: lengths[0] + 1].square().sum(), hidden)
    assert torch.isfinite(grad).all()
    assert not grad[lengths[0] + lengths[1] :].any()


def test_bert_head_drops_out_in_training_only() -> None:
    head = BertHead(C, 16)
    hidden = torch.randn(12, C)
    assert not torch.equal(head(hidden, (12,)), head(hidden, (12,)))
    head.eval()
    assert torch.equal(head(hidden, (12,)), head(hidden, (12,)))
