"""The worked examples of the documentation, run as they stand there, one per code base."""

import re
from pathlib import Path

import pytest
import torch
from llava_standins import IGNORE, IMAGE, TransformBlock, build

DOCS = Path(__file__).resolve().parents[1] / "docs"


def example(page: str, after: str) -> str:
    """The first Python block behind the line that starts with ``after``."""
    _, found, rest = (DOCS / page).read_text().partition(f"\n{after}")
    assert found, f"{page} has no line that starts with {after!r}"
    return re.search(r"```python\n(.*?)```", rest, re.DOTALL).group(1)


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
