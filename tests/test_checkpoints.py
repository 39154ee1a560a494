import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from croc_kernels import CrocLayer
from croc_kernels.cli import main
from croc_kernels.integrations.checkpoints import convert
from croc_kernels.integrations.shards import iterate_tensors, shard_files

HIDDEN, VOCAB, POOL, VISION = 32, 50, 12, 16
TEXT = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip


def linear(name, out, width, bias=True):
    state = {f"{name}.weight": torch.randn(out, width)}
    return state | ({f"{name}.bias": torch.randn(out)} if bias else {})


def norm(name, width, bias=True):
    return {f"{name}.weight": torch.rand(width)} | (
        {f"{name}.bias": torch.randn(width)} if bias else {}
    )


def language_model(qkv_bias):
    state = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}
    state |= linear("lm_head", VOCAB, HIDDEN, False) | norm("model.norm", HIDDEN, False)
    for i in range(2):
        at = f"model.layers.{i}."
        for name, out in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2)):
            state |= linear(f"{at}self_attn.{name}_proj", out, HIDDEN, qkv_bias)
        state |= linear(f"{at}self_attn.o_proj", HIDDEN, HIDDEN, False)
        state |= linear(f"{at}mlp.gate_proj", 48, HIDDEN, False)
        state |= linear(f"{at}mlp.up_proj", 48, HIDDEN, False)
        state |= linear(f"{at}mlp.down_proj", HIDDEN, 48, False)
        state |= norm(f"{at}input_layernorm", HIDDEN, False)
        state |= norm(f"{at}post_attention_layernorm", HIDDEN, False)
    return state


def vision_tower(clip):
    at = "model.vision_tower.vision_tower.vision_model."
    state = {f"{at}embeddings.patch_embedding.weight": torch.randn(VISION, 3, 4, 4)}
    state[f"{at}embeddings.position_embedding.weight"] = torch.randn(9 + clip, VISION)
    if clip:
        state[f"{at}embeddings.class_embedding"] = torch.randn(VISION)
        state |= norm(f"{at}pre_layrnorm", VISION)
    else:
        state[f"{at}embeddings.patch_embedding.bias"] = torch.randn(VISION)
    state |= norm(f"{at}post_layernorm", VISION)
    for i in range(2):
        layer = f"{at}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            state |= linear(f"{layer}self_attn.{name}", VISION, VISION)
        state |= linear(f"{layer}mlp.fc1", 24, VISION) | linear(f"{layer}mlp.fc2", VISION, 24)
        state |= norm(f"{layer}layer_norm1", VISION) | norm(f"{layer}layer_norm2", VISION)
    return state


def released(kind):
    """State dict and config of a tiny checkpoint with the released names."""
    state = language_model(kind == "victor") | vision_tower(kind == "croc")
    state |= linear("model.mm_projector.0", HIDDEN, VISION)
    state |= linear("model.mm_projector.2", HIDDEN, HIDDEN)
    config = TEXT | {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    if kind == "victor":
        state |= linear("img_head", HIDDEN, HIDDEN) | linear("model.pool_weight", HIDDEN, HIDDEN)
        state["model.token_pool"] = torch.randn(POOL, HIDDEN)
        return state, config | {"model_type": "llava_qwen"}
    at = "transform_block.layers.0."
    state["model.mask_token"] = torch.randn(POOL, HIDDEN)
    state["transform_block.position_embeddings.weight"] = torch.randn(9, HIDDEN)
    for name in ("query", "key", "value"):
        state |= linear(f"{at}attention.self.{name}", HIDDEN, HIDDEN)
        state |= linear(f"model.cross_attention.{name}", HIDDEN, HIDDEN)
    state |= linear("model.cross_attention.out", HIDDEN, HIDDEN)
    state |= linear(f"{at}attention.output.dense", HIDDEN, HIDDEN)
    state |= linear(f"{at}intermediate.dense", 4 * HIDDEN, HIDDEN)
    state |= linear(f"{at}output.dense", HIDDEN, 4 * HIDDEN)
    state |= norm(f"{at}attention.output.LayerNorm", HIDDEN) | norm(f"{at}output.LayerNorm", HIDDEN)
    state |= linear("transform_block.resize", HIDDEN, HIDDEN)
    return state, config | {"model_type": "croc_llama", "croc_stage": True}


def write(directory, state, config, files=1):
    directory.mkdir()
    names = sorted(state)
    groups = [names[i::files] for i in range(files)]
    weight_map = {}
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file({n: state[n] for n in group}, directory / file)
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("kind", ["croc", "victor"])
def test_convert_there_loads_in_transformers_and_back_is_bit_equal(kind, tmp_path):
    from transformers import LlavaForConditionalGeneration

    state, config = released(kind)
    source = write(tmp_path / "source", state, config, files=3)
    report = convert(source, tmp_path / "llava", max_shard_bytes=20_000)
    assert len(shard_files(tmp_path / "llava")) > 1
    assert not report.unknown
    assert not report.missing
    assert {name.split(".")[1] for name in report.dropped} == (
        {"cross_attention"} if kind == "croc" else {"pool_weight"}
    )
    model, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "llava", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert all(name.startswith("croc.") for name in info["unexpected_keys"])
    text = model.model.language_model
    assert torch.equal(
        text.layers[1].mlp.up_proj.weight, state["model.layers.1.mlp.up_proj.weight"]
    )
    assert torch.equal(text.embed_tokens.weight[:VOCAB], state["model.embed_tokens.weight"])
    converted = dict((name, load()) for name, load in iterate_tensors(tmp_path / "llava"))
    pool = state["model.mask_token" if kind == "croc" else "model.token_pool"]
    assert torch.equal(converted["croc.pool"], pool)
    recipe = json.loads((tmp_path / "llava" / "config.json").read_text())["croc"]
    layer = CrocLayer(HIDDEN, **recipe)
    layer.load_state_dict({n[5:]: t for n, t in converted.items() if n.startswith("croc.")})

    convert(tmp_path / "llava", tmp_path / "back", to=kind)
    back = dict((name, load()) for name, load in iterate_tensors(tmp_path / "back"))
    kept = {name for name in state if name not in report.dropped}
    assert set(back) == kept
    assert all(torch.equal(back[name], state[name]) for name in kept)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


@pytest.mark.parametrize("kind", ["croc", "victor"])
def test_converted_checkpoint_trains_and_generates(kind, tmp_path):
    """With a tokenizer: the processor knows <image>, and our from_pretrained rebuilds the layer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    from croc_kernels.integrations.transformers import from_pretrained

    state, config = released(kind)
    source = write(tmp_path / "source", state, config)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # As the tokenizers of LLaVA's models: transformers 4.57 would add token_type_ids by default.
    names = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w1", model_input_names=names
    ).save_pretrained(source)
    convert(source, tmp_path / "llava")
    model = from_pretrained(tmp_path / "llava")
    recipe = "croc-released" if kind == "croc" else "victor"
    assert model.croc.recipe.name == recipe
    pool = state["model.mask_token" if kind == "croc" else "model.token_pool"]
    assert torch.equal(model.croc.pool, pool)
    processor = LlavaProcessor.from_pretrained(tmp_path / "llava")
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert image_token == VOCAB == model.config.image_token_id
    picture = torch.randint(0, 255, (3, 20, 30), dtype=torch.uint8)
    batch = processor(text="w5 <image> w6 w7", images=picture, return_tensors="pt")
    assert (batch["input_ids"] == image_token).sum() == 9
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    output = model.train()(**batch, labels=labels)
    assert output["reconstruction_loss"] > 0
    assert model.eval().generate(**batch, max_new_tokens=2).shape[0] == 1


def test_convert_head_gives_the_released_head(tmp_path):
    """BERT's layer by its formula, against the head that the converted weights give."""
    state, config = released("croc")
    convert(write(tmp_path / "source", state, config), tmp_path / "llava")
    converted = load_file(tmp_path / "llava" / "model.safetensors")
    layer = CrocLayer(HIDDEN, POOL, "croc-released", num_positions=9).eval()
    layer.load_state_dict({n[5:]: t for n, t in converted.items() if n.startswith("croc.")})
    hidden = torch.randn(9, HIDDEN)
    functional = torch.nn.functional

    def apply(x, name):
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def normalize(x, name):
        return functional.layer_norm(
            x, (HIDDEN,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-12
        )

    at = "transform_block.layers.0."
    x = hidden + state["transform_block.position_embeddings.weight"]
    q, k, v = (apply(x, f"{at}attention.self.{n}") for n in ("query", "key", "value"))
    attended = torch.softmax(q @ k.T / HIDDEN**0.5, dim=-1) @ v
    x = normalize(
        apply(attended, f"{at}attention.output.dense") + x, f"{at}attention.output.LayerNorm"
    )
    between = functional.gelu(apply(x, f"{at}intermediate.dense"))
    x = normalize(apply(between, f"{at}output.dense") + x, f"{at}output.LayerNorm")
    expected = apply(x, "transform_block.resize")
    assert torch.allclose(layer.head(hidden, (9,)), expected, atol=1e-4, rtol=1e-4)


def test_convert_lists_unknown_and_missing_and_writes_nothing(tmp_path):
    state, config = released("victor")
    state["model.image_newline"] = torch.randn(HIDDEN)
    del state["img_head.bias"]
    source = write(tmp_path / "source", state, config)
    with pytest.raises(ValueError, match=r"1 unknown parameters.*\n  model.image_newline"):
        convert(source, tmp_path / "target")
    with pytest.raises(ValueError, match=r"1 missing parameters.*\n  croc.head.bias"):
        convert(source, tmp_path / "target", allow_unknown=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    report = convert(source, tmp_path / "target", allow_unknown=True, allow_missing=True)
    assert report.unknown == ["model.image_newline"]
    assert report.missing == ["croc.head.bias"]


def test_convert_lists_shapes_that_do_not_fit(tmp_path):
    state, config = released("croc")
    state["model.norm.weight"] = torch.randn(HIDDEN + 1)
    state["transform_block.layers.0.attention.self.key.weight"] = torch.randn(HIDDEN, 7)
    source = write(tmp_path / "source", state, config)
    wanted = (
        r"got 2 others:\n  model.norm.weight: \(33,\), and language_model.model.norm.weight must be"
        r" \(32,\)\n  transform_block.*key.weight: \(32, 7\), and .*in_proj_weight must be \(96, 32"
    )
    with pytest.raises(ValueError, match=wanted):
        convert(source, tmp_path / "target")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_convert_names_a_config_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be JSON"):
        convert(tmp_path, tmp_path / "target")


def test_convert_reads_pytorch_files(tmp_path):
    state, config = released("victor")
    source = tmp_path / "source"
    source.mkdir()
    torch.save(state, source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps(config))
    report = convert(source, tmp_path / "target")
    assert report.written == len(state) - 2  # weight and bias of the unused pool_weight


def test_convert_interrupted_leaves_nothing(tmp_path, monkeypatch):
    state, config = released("victor")
    source = write(tmp_path / "source", state, config)
    calls = []

    def fail(tensors, file, metadata):
        calls.append(file)
        if len(calls) == 2:
            raise OSError("disk full")
        save_file(tensors, file, metadata)

    monkeypatch.setattr("croc_kernels.integrations.shards.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(source, tmp_path / "target", max_shard_bytes=20_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        pytest.param({"model_type": "mpt"}, "transformers", "model_type in", id="unknown-model"),
        pytest.param({}, "croc", "source must be a llava model, got 'llava_qwen'", id="not-llava"),
        pytest.param({}, "onnx", "to must be one of", id="target"),
    ],
)
def test_convert_refuses(change, to, message, tmp_path):
    state, config = released("victor")
    source = write(tmp_path / "source", state, config | change)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "target", to=to)
    (tmp_path / "target").mkdir()


def test_convert_refuses_an_existing_target(tmp_path):
    state, config = released("victor")
    source = write(tmp_path / "source", state, config)
    with pytest.raises(FileExistsError, match="exists; choose another target"):
        convert(source, source)


def test_convert_command(tmp_path, capsys):
    state, config = released("victor")
    source = write(tmp_path / "source", state, config)
    assert main(["convert", str(source), str(tmp_path / "target")]) == 0
    printed = capsys.readouterr().out
    assert "dropped: model.pool_weight.weight" in printed
    assert "notes: no tokenizer in the source" in printed
    assert main(["convert", str(source), str(tmp_path / "target")]) == 1


MEASURED = """
import pathlib, re, sys, threading
from transformers import LlavaForConditionalGeneration
from croc_kernels.integrations.checkpoints import convert

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

source, target, to, shard = sys.argv[1:]
peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

convert(pathlib.Path(source + "-small"), pathlib.Path(target + "-small"), to=to)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
convert(source, target, to=to, max_shard_bytes=int(shard))
done.set()
thread.join()
print((peak - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_convert_streams(tmp_path, monkeypatch):
    """Both ways in the memory of a shard, or of the largest matrix; the source is mapped."""
    small, config = released("victor")
    write(tmp_path / "source-small", small, config)
    monkeypatch.setattr(sys.modules[__name__], "HIDDEN", 1024)
    monkeypatch.setattr(sys.modules[__name__], "VOCAB", 15_000)
    state, _ = released("victor")
    state = {name: value.bfloat16() for name, value in state.items()}
    sizes = [value.numel() * 2 for value in state.values()]
    assert sum(sizes) > 80e6
    write(tmp_path / "source", state, config | {"hidden_size": 1024, "vocab_size": 15_000}, files=9)
    for source, target, to in (("source", "llava", "transformers"), ("llava", "back", "victor")):
        arguments = [str(tmp_path / source), str(tmp_path / target), to, str(16 * 10**6)]
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *arguments], check=True, capture_output=True, text=True
        )
        assert len(shard_files(tmp_path / target)) >= 4
        # A matrix may be larger than a shard; nothing is there twice.
        assert int(done.stdout.split()[-1]) < 16e6 + 1.25 * max(sizes), target
