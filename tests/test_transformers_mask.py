"""The search for intervals in mask closures, what the attention refuses, and the registration."""

import subprocess
import sys

import pytest
import torch
import transformers
import transformers_zoo as zoo
from torch.utils._python_dispatch import TorchDispatchMode

from croc_kernels.integrations import faults
from croc_kernels.integrations import transformers as croc
from croc_kernels.integrations.attention_interface import croc_attention, croc_mask, unpack_mask
from croc_kernels.integrations.mask_probe import intervals


@pytest.fixture(autouse=True)
def registered():
    croc.register()


# --- the probe ------------------------------------------------------------------------------------


def dense_of(function, batch, queries, keys, query_offset, key_offset, padding):
    b = torch.arange(batch)[:, None, None]
    q = (torch.arange(queries) + query_offset)[None, :, None]
    k = (torch.arange(keys) + key_offset)[None, None]
    dense = function(b, torch.tensor(0), q, k).expand(batch, queries, keys)
    return dense if padding is None else dense & padding[b, k]


def random_mask(seed):
    """A closure as transformers builds them, with random blocks, window, documents and padding."""
    from transformers import masking_utils as stock

    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    batch, length = 1 + int(draw(3)), 1 + int(draw(150))
    block = (draw(4, batch, length) == 0).cumsum(-1)
    is_image = (block % 3) == 1
    ids = torch.where(is_image, block, -1)
    function = stock.causal_mask_function
    if seed % 2:
        same = lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (ids[b, q] >= 0)  # noqa: E731
        function = stock.or_masks(function, same)
    if seed % 3 == 0:
        function = stock.and_masks(function, stock.sliding_window_overlay(1 + int(draw(length))))
    padding = None
    if seed % 5 == 0:
        documents = (draw(10, batch, length) == 0).cumsum(-1)
        function = stock.and_masks(function, lambda b, h, q, k: documents[b, q] == documents[b, k])
    elif seed % 5 < 3:
        cut = draw(length, batch, 1)
        place = torch.arange(length)
        padding = (place >= cut) if seed % 2 else (place < length - cut)
    return function, batch, length, padding


@pytest.mark.parametrize("seed", range(40))
def test_intervals_equal_the_dense_mask(seed):
    function, batch, length, padding = random_mask(seed)
    dense = dense_of(function, batch, length, length, 0, 0, padding)
    valid = padding if padding is not None else torch.ones(batch, length, dtype=torch.bool)
    rows = dense & valid[..., None]
    counts, shown = rows.sum(-1), rows.any(-1)
    first = rows.int().argmax(-1)
    contiguous = torch.arange(length) - first[..., None]
    single = ((contiguous >= 0) & (contiguous < counts[..., None])) == rows
    arguments = (function, batch, length, length, 0, 0, padding, torch.device("cpu"))
    if not single.all():
        with pytest.raises(RuntimeError, match="one contiguous run"):
            intervals(*arguments)
        return
    start, end = intervals(*arguments)
    assert (start[1:, 1:] >= start[1:, :-1]).all()
    assert (end[:, 1:] >= end[:, :-1]).all()
    assert torch.equal(end - start, counts.int())
    assert torch.equal(start[shown], first.int()[shown])


def test_intervals_of_long_rows_build_nothing_dense():
    length, window = 3000, 700

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    def function(b, h, q, k):
        return (k <= q) & (k > q - window)

    with Largest() as largest:
        start, end = intervals(function, 1, length, length, 0, 0, None, torch.device("cpu"))
    row = torch.arange(length, dtype=torch.int32)
    assert torch.equal(end[0], row + 1)
    assert torch.equal(start[0], (row - window + 1).clamp_min(0))
    assert largest.elements <= 2 * 2 * 32 * length < length * length / 10


def test_offsets_of_a_filled_cache():
    def function(b, h, q, k):
        return (k <= q) & (k > q - 5)

    start, end = intervals(function, 2, 3, 6, torch.tensor(10), 7, None, torch.device("cpu"))
    assert end.tolist() == [[4, 5, 6]] * 2
    assert start.tolist() == [[0, 0, 1]] * 2


def test_both_contracts_give_the_same_mask():
    def function(b, h, q, k):
        return k <= q

    common = {"kv_length": 7, "mask_function": function}
    new = croc_mask(2, q_length=3, q_offset=4, device="cpu", **common)
    old = croc_mask(batch_size=2, cache_position=torch.arange(4, 7), **common)
    assert torch.equal(new, old)
    assert unpack_mask(new, 3).to_dense()[0, 0].int().sum(-1).tolist() == [5, 6, 7]


# --- refusals -------------------------------------------------------------------------------------


def qkv(queries=4, keys=4):
    shape = (1, 2, queries, 8)
    return torch.randn(shape), torch.randn(1, 2, keys, 8), torch.randn(1, 2, keys, 8)


def test_holes_in_the_padding_are_refused():
    model = transformers.LlamaForCausalLM(zoo.llama())
    model.set_attn_implementation("croc")
    mask = torch.ones(1, 9, dtype=torch.int64)
    mask[0, 4] = 0
    with pytest.raises(RuntimeError, match="one contiguous run of keys around its own token"):
        model(input_ids=torch.randint(3, 90, (1, 9)), attention_mask=mask)


def test_blocks_that_see_each_other_across_text_are_refused():
    """Molmo2's rule: all images share one id."""
    image = torch.tensor([[0, 1, 1, 0, 1, 1, 0]]).bool()

    def function(b, h, q, k):
        return (k <= q) | (image[b, q] & image[b, k])

    with pytest.raises(RuntimeError, match="blocks that see each other across a gap"):
        croc_mask(1, q_length=7, kv_length=7, mask_function=function, device="cpu")


def test_molmo2_is_refused_by_name():
    config = transformers.LlamaConfig()
    config.model_type = "molmo2_text"
    with pytest.raises(ValueError, match='molmo2_text must run with "sdpa" or "eager"'):
        croc_mask(1, q_length=7, kv_length=7, config=config, device="cpu")


def test_molmo2_itself_is_refused():
    if not hasattr(transformers, "Molmo2TextModel"):
        pytest.skip(f"transformers {transformers.__version__} has no Molmo2")
    options = zoo.text_options(head_dim=8, additional_vocab_size=8)
    model = transformers.Molmo2TextModel(transformers.Molmo2TextConfig(**options))
    model.set_attn_implementation("croc")
    with pytest.raises(ValueError, match='molmo2_text must run with "sdpa" or "eager"'):
        model(input_ids=torch.randint(3, 90, (1, 5)))


def test_attention_dropout_is_refused():
    model = transformers.LlamaForCausalLM(zoo.llama(attention_dropout=0.1)).train()
    model.set_attn_implementation("croc")
    with pytest.raises(ValueError, match=r"attention dropout must be 0, got 0\.1"):
        model(input_ids=torch.randint(3, 90, (1, 5)))


@pytest.mark.parametrize("name", ["position_bias", "s_aux"])
def test_additive_terms_are_refused(name):
    q, k, v = qkv()
    with pytest.raises(ValueError, match=f"{name} must be None"):
        croc_attention(torch.nn.Module(), q, k, v, None, **{name: torch.zeros(2)})


def test_a_dense_mask_is_read_or_refused():
    q, k, v = qkv()
    causal = torch.ones(4, 4).tril().bool()[None, None]
    out, _ = croc_attention(torch.nn.Module(), q, k, v, causal)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-6)
    bias = torch.zeros(1, 1, 4, 4).masked_fill(~causal, torch.finfo(torch.float32).min)
    again, _ = croc_attention(torch.nn.Module(), q, k, v, bias)
    assert torch.equal(out, again)
    with pytest.raises(RuntimeError, match="one contiguous run"):
        croc_attention(torch.nn.Module(), q, k, v, torch.where(causal, -0.5, bias))
    with pytest.raises(ValueError, match="attention_mask must be 2-D padding"):
        croc_attention(torch.nn.Module(), q, k, v, causal.int())
    gap = causal.clone()
    gap[..., 3, 1] = False
    with pytest.raises(ValueError, match="MixedMask"):
        croc_attention(torch.nn.Module(), q, k, v, gap)


def test_layers_without_a_mask():
    q, k, v = qkv(queries=2, keys=5)
    module = torch.nn.Module()
    module.is_causal = False
    full, _ = croc_attention(module, q, k, v, None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(full, expected.transpose(1, 2))
    module.is_causal = True
    causal, _ = croc_attention(module, q, k, v, None)
    seen = torch.ones(2, 5).tril(3).bool()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(causal, expected.transpose(1, 2), rtol=0, atol=1e-6)


# --- registration ---------------------------------------------------------------------------------


def test_importing_changes_nothing_and_register_adds_two_entries():
    program = (
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as M\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as A\n"
        "before = dict(M), dict(A)\n"
        "from croc_kernels.integrations import transformers as croc\n"
        "assert (dict(M), dict(A)) == before and not croc.is_registered()\n"
        "croc.register(); croc.register()\n"
        "assert croc.is_registered()\n"
        "assert set(M) - set(before[0]) == {'croc'} == set(A) - set(before[1])\n"
        "assert all(M[k] is v for k, v in before[0].items())\n"
        "assert all(A[k] is v for k, v in before[1].items())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_transformers_out_of_range_is_refused(monkeypatch):
    monkeypatch.setattr(faults, "TRANSFORMERS_RANGE", ((4, 40), (4, 41)))
    wanted = f"transformers must be >=4.40,<4.41, got {transformers.__version__}"
    with pytest.raises(ImportError, match=wanted):
        croc.register()


@pytest.mark.parametrize(
    ("version", "word", "known"),
    [
        ("5.23.0", "sliding layers", True),
        ("5.22.2", "sliding layers", False),
        ("4.57.6", "packed rows of PaliGemma", True),
        ("5.8.1", "packed rows of PaliGemma", False),
        ("5.9.0", "packed rows of PaliGemma", True),
        ("5.24.0", "packed rows of PaliGemma", False),
        ("5.17.0", "mm_encoder_outputs", True),
        ("5.18.0", "mm_encoder_outputs", False),
        ("5.17.0", "flash_attention", True),
    ],
)
def test_known_faults(version, word, known):
    assert any(word in fault for fault in croc.known_faults(version)) is known


def test_known_faults_of_the_installed_version():
    assert croc.known_faults() == croc.known_faults(transformers.__version__)
