"""The examples of README.md and of the documentation, run as they stand there; the commands, read
by the parser.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
from llava_standins import IGNORE, IMAGE, TransformBlock, build
from transformers import AutoModelForImageTextToText
from transformers_zoo import CASES, batch

import croc_kernels as ck
from croc_kernels import cli

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]


def example(page: str, after: str) -> str:
    """The first Python block behind the line that starts with ``after``."""
    _, found, rest = (DOCS / page).read_text().partition(f"\n{after}")
    assert found, f"{page} has no line that starts with {after!r}"
    return re.search(r"```python\n(.*?)```", rest, re.DOTALL).group(1)


def commands() -> list:
    """The words behind every ``croc-kernels`` in a block of shell commands."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        for block in [text for language, text in blocks if language in ("", "bash")]:
            for line in block.replace("\\\n", " ").splitlines():
                _, called, rest = line.partition("-m croc_kernels.cli ")
                if line.startswith("croc-kernels ") or called:
                    words = shlex.split(rest or line.removeprefix("croc-kernels "), comments=True)
                    found.append(pytest.param(words, id=f"{page.stem}-{' '.join(words)}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_commands_are_understood(words: list[str]) -> None:
    options, unknown = cli.build_parser(words[0]).parse_known_args(words)
    assert options.command == words[0]
    assert unknown == []


def test_there_are_commands() -> None:
    pages = {case.id.partition("-")[0] for case in commands()}
    assert pages == {"README", "llava", "pretraining"}


def tiny_llava(folder: Path) -> dict:
    """A model to load from ``name``, and a batch for it."""
    case = CASES["llava"]
    model = case.model()
    model.save_pretrained(folder / "tiny")
    return {"name": str(folder / "tiny"), "batch": batch(case, model)}


def test_readme_plugs_into_a_model(tmp_path, capsys) -> None:
    names = tiny_llava(tmp_path)
    exec(example("../README.md", "## Plug in"), names)
    names["loss"].backward()
    assert names["layer"].pool.grad.abs().sum() > 0
    assert "forward" in capsys.readouterr().out
    assert not hasattr(names["model"], "croc")


def test_readme_operators() -> None:
    torch.manual_seed(0)
    is_visual = torch.zeros(2, 24, dtype=torch.bool)
    is_visual[:, 3:19] = True
    where = torch.zeros_like(is_visual)
    where[0, 4:16], where[1, 6:18] = True, True
    names = {
        "is_visual": is_visual, "keep": torch.ones_like(is_visual), "where": where,
        "q": torch.randn(2, 4, 24, 16), "k": torch.randn(2, 2, 24, 16),
        "v": torch.randn(2, 2, 24, 16), "tokens": torch.randn(2, 12, 32),
        "pool": torch.randn(20, 32), "embeddings": torch.zeros(2, 24, 32),
        "prediction": torch.randn(2, 24, 32), "target": torch.randn(2, 24, 32),
    }  # fmt: skip
    exec(example("../README.md", "Or the operators alone"), names)
    assert names["out"].shape == names["q"].shape
    for rows, index, here in zip(names["embeddings"], names["index"], where, strict=True):
        assert len(set(index.tolist())) == 12
        assert torch.equal(rows[here], names["pool"][index])
        assert (rows[~here] == 0).all()
    difference = (names["prediction"] - names["target"])[where]
    plain = torch.nn.functional.smooth_l1_loss(difference, 0 * difference, beta=0.01)
    torch.testing.assert_close(names["loss"], plain)


def test_transformers_page(tmp_path) -> None:
    names = {"AutoModelForImageTextToText": AutoModelForImageTextToText, **tiny_llava(tmp_path)}
    exec(example("integrations.md", "## Attention for any model"), names)
    exec(example("integrations.md", "Check your own model"), names)
    names["directory"] = tmp_path / "trained"
    stage = example("integrations.md", "## The Croc stage")
    exec(stage, names)
    out = names["out"]
    total = out["caption_loss"] + 10 * out["reconstruction_loss"]
    torch.testing.assert_close(out.loss, total)
    assert not hasattr(names["model"], "croc")
    assert (tmp_path / "trained" / "config.json").is_file()


def test_recipes_page() -> None:
    torch.manual_seed(0)
    is_visual = torch.zeros(1, 24, dtype=torch.bool)
    is_visual[0, 2:18] = True
    names = {
        "torch": torch, "features": torch.randn(16, 4096, dtype=torch.bfloat16), "lengths": [16],
        "embeddings": torch.zeros(1, 24, 4096, dtype=torch.bfloat16), "is_visual": is_visual,
        "attention_mask": torch.ones_like(is_visual), "labels": None, "caption_loss": 1.0,
        "hidden": torch.randn(16, 4096, dtype=torch.bfloat16),
    }  # fmt: skip
    exec(example("recipes.md", "## Use").replace('device="cuda"', 'device="cpu"'), names)
    assert torch.equal(names["embeddings"][is_visual], names["replacement"].embeddings)
    assert names["replacement"].masked.sum() == 12
    assert isinstance(names["mask"], ck.MixedMask)
    assert names["loss"] > 1.0


def test_transformers_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example("integrations.md", "The same on a CPU"), names)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    first, last = lines[0], lines[3]
    assert float(last[1]) < 0.1 * float(first[1])
    assert float(last[2]) < float(first[2])
    tokens = names["model"].generate(
        **names["prompt"], pixel_values=names["batch"]["pixel_values"], max_new_tokens=4
    )
    assert tokens[0, 17:].tolist() == [5, 6, 7, 8]
    assert (tmp_path / "croc-tiny" / "config.json").is_file()


@pytest.mark.parametrize(
    ("heading", "recipe"), [("LLaVA", "croc"), ("Croc", "croc-released"), ("ViCToR", "victor")]
)
def test_llava_example(heading, recipe):
    model = build(recipe)
    if heading == "Croc":
        # Its positions are the 576 of the released model, in a block of their own size.
        model.transform_block = TransformBlock(32, 576)
    ids = torch.tensor([[1, IMAGE, 5, 6, 7], [1, IMAGE, 9, 10, 0]])
    labels = ids.masked_fill(ids == IMAGE, IGNORE)
    labels[1, 4] = IGNORE
    names = {
        "torch": torch, "model": model, "ids": ids, "keep": ids != 0, "labels": labels,
        "images": torch.randn(2, 3, 8, 8), "prompt": ids[:1, :3],
    }  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exec(example("llava.md", f"### {heading}\n"), names)
    assert names["out"]["reconstruction_loss"] > 0
    after = model.state_dict()
    pools = {"LLaVA": "croc.pool", "Croc": "model.mask_token", "ViCToR": "model.token_pool"}
    pool = pools[heading]
    assert pool in after
    assert pool == "croc.pool" or not torch.equal(before[pool], after[pool])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
