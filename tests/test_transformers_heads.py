"""Heads of sizes that the kernels don't have: padded, cut to the values' size, or dense."""

import pytest
import torch
import transformers
import transformers_zoo as zoo

from croc_kernels.attention.config import HEAD_DIMS
from croc_kernels.attention.mask import MixedMask
from croc_kernels.integrations import heads
from croc_kernels.integrations import transformers as croc
from croc_kernels.testing import assert_attention_matches_eager


def test_sizes():
    assert heads.padded_size(72, 72, on_kernel=True) == 80
    assert heads.padded_size(8, 8, on_kernel=True) == 16
    assert heads.padded_size(192, 128, on_kernel=True) == 192
    assert heads.padded_size(512, 512, on_kernel=True) is None
    assert heads.padded_size(192, 128, on_kernel=False) == 192
    assert heads.padded_size(512, 512, on_kernel=False) == 512
    assert all(heads.padded_size(size, size, on_kernel=True) == size for size in HEAD_DIMS)


def case(key_size, value_size, dtype=torch.float32):
    """q, k, v and a mask with a row of padding, whose rows see nothing."""
    shape = (2, 4, 9, key_size)
    q = torch.randn(shape, dtype=dtype, requires_grad=True)
    k = torch.randn(2, 2, 9, key_size, dtype=dtype, requires_grad=True)
    v = torch.randn(2, 2, 9, value_size, dtype=dtype, requires_grad=True)
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, :3] = False
    visual = torch.zeros(2, 9, dtype=torch.bool)
    visual[:, 4:7] = True
    return q, k, v, MixedMask.from_token_types(visual, padding)


def by_hand(q, k, v, mask, scale, softcap=None):
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = mask.to_dense()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights @ v


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
@pytest.mark.parametrize(
    ("key_size", "value_size", "softcap"),
    [(72, 72, None), (24, 16, None), (16, 24, 5.0), (320, 320, None)],
)
def test_values_and_gradients(monkeypatch, as_on_a_gpu, key_size, value_size, softcap):
    """As on a GPU: sizes are chosen as for the kernels; the arithmetic is that of the CPU."""
    if as_on_a_gpu:
        monkeypatch.setattr(heads, "uses_triton", lambda tensor: True)
    q, k, v, mask = case(key_size, value_size)
    out = heads.attend(q, k, v, mask, None, softcap)
    assert out.shape == (2, 4, 9, value_size)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), upstream)
    exact = by_hand(q, k, v, mask, key_size**-0.5, softcap)
    torch.testing.assert_close(out, exact, rtol=0, atol=2e-6)
    assert (out[0, :, :3] == 0).all()
    for ours, expected in zip(found, torch.autograd.grad(exact, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=5e-6)


def test_float64_where_the_kernels_have_none(monkeypatch):
    monkeypatch.setattr(heads, "uses_triton", lambda tensor: True)
    q, k, v, mask = case(32, 32, torch.float64)
    out = heads.attend(q, k, v, mask, 0.3, None)
    torch.testing.assert_close(out, by_hand(q, k, v, mask, 0.3), rtol=0, atol=1e-14)


def test_softcap_of_large_heads_is_refused(monkeypatch):
    monkeypatch.setattr(heads, "uses_triton", lambda tensor: True)
    with pytest.raises(ValueError, match=r"softcap must be None with heads of 512, .*got 5\.0"):
        heads.attend(*case(512, 512), None, 5.0)


def test_keys_and_values_of_different_sizes():
    """DeepSeek's latent attention: keys of 24 components, values of 16."""
    if not hasattr(transformers, "DeepseekV3Config"):
        pytest.skip(f"transformers {transformers.__version__} has no DeepseekV3Config")
    config = transformers.DeepseekV3Config(
        **zoo.text_options(
            num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, n_group=1, topk_group=1,
            num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
        )
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(config)
    ids = torch.randint(3, 90, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    assert assert_attention_matches_eager(model, {"input_ids": ids, "attention_mask": mask}) < 1e-5


def test_layers_with_heads_of_two_sizes():
    """Gemma 4 as it is published: larger heads in its full layers."""
    gemma4 = zoo.CASES["gemma4"]
    zoo.needs(gemma4)
    config = zoo.gemma4_config(global_head_dim=24)
    torch.manual_seed(0)
    model = transformers.Gemma4ForConditionalGeneration(config)
    sizes = {layer.self_attn.head_dim for layer in model.model.language_model.layers}
    assert sizes == {8, 24}
    inputs = zoo.batch(gemma4, model, side="left")
    assert_attention_matches_eager(model, inputs)
    croc.attach(model, pool_size=24)
    out = model.train()(**inputs)
    out.loss.backward()
    assert out["reconstruction_loss"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("size", [8, 72, 512])
def test_any_size_on_a_gpu(size):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**zoo.text_options(head_dim=size))
    model = transformers.LlamaForCausalLM(config).cuda()
    ids = torch.randint(3, 90, (2, 40), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    assert_attention_matches_eager(model, {"input_ids": ids, "attention_mask": mask})
