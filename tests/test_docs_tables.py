"""The tables of docs/integrations.md: each test exists and runs for the model of its row. The files
of results that pages name exist.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
DOCS = TESTS.parent / "docs"
PAGE = (DOCS / "integrations.md").read_text()
CASES = {
    "Llava": ["llava"], "LLaVA-NeXT": ["llava_next"], "LLaVA-OneVision": ["llava_onevision"],
    "InternVL": ["internvl"], "Qwen2-VL": ["qwen2_vl"], "Qwen2.5-VL": ["qwen2_5_vl"],
    "Qwen3-VL": ["qwen3_vl"], "Qwen3-VL-MoE": ["qwen3_vl_moe"],
    "Gemma 3": ["gemma3"], "Gemma 4": ["gemma4"], "PaliGemma 1": ["paligemma"],
    "PaliGemma 2": ["paligemma2"], "Llama": ["llama"], "Qwen2": ["qwen2"],
}  # fmt: skip


def abbreviations() -> dict[str, str]:
    """What the page calls the files of its tests."""
    return dict(re.findall(r"`(\w)` = `(test_\w+)\.py`", PAGE))


def tables() -> list[tuple[list[str], list[list[str]]]]:
    """(tests named by the columns, rows of cells) of every table with a row of tests."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", PAGE, re.MULTILINE):
        rows = [[c.strip() for c in line.strip("|\n").split("|")] for line in block.splitlines()]
        if len(rows) > 2 and rows[2][0] == "test":
            found.append((rows[2][1:], rows[3:]))
    return found


def cells() -> list:
    return [
        pytest.param(row[0], test.strip("`"), cell, id=f"{row[0]}-{test.strip('`')}")
        for tests, rows in tables()
        for row in rows
        for test, cell in zip(tests, row[1:], strict=True)
    ]


def parameters(module: str, name: str) -> set[str]:
    """The ids of everything that a test is parametrised with."""
    function = getattr(importlib.import_module(module), name)
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    found = set()
    for mark in marks:
        for value in mark.args[1]:
            found.add(getattr(value, "id", None) or str(value))
    return found


@pytest.mark.parametrize(("model", "test", "cell"), cells())
def test_each_cell_has_a_test_of_its_model(model: str, test: str, cell: str) -> None:
    letter, _, name = test.partition("::")
    ids = parameters(abbreviations()[letter], name)
    assert set(CASES[model]) <= ids
    # Whatever is not "yes" says why not.
    assert cell == "yes" or len(cell) > 3


def test_all_models_and_features_are_in_the_tables() -> None:
    assert [len(rows) for _, rows in tables()] == [14, 12]
    assert {row[0] for _, rows in tables() for row in rows} == set(CASES)


@pytest.mark.parametrize("page", ["integrations.md", "llava.md", "pretraining.md"])
def test_every_test_that_is_named_exists(page: str) -> None:
    text, files = (DOCS / page).read_text(), abbreviations()
    defined = {
        path.stem: {
            node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        for path in TESTS.glob("test_*.py")
    }
    for file, name in re.findall(r"`(?:(test_\w+)\.py|\w)::(test_\w+)`", text):
        assert not file or name in defined[file], name
    for letter, name in re.findall(r"`(\w)::(test_\w+)`", text):
        assert name in defined[files[letter]], name
    for file in re.findall(r"(?:tests/)?(test_\w+)\.py", text):
        assert file in defined, file
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(name in names for names in defined.values()), name


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{path.name}" for path in DOCS.glob("*.md"))]
)
def test_every_file_of_results_that_is_named_exists(page: str) -> None:
    results = DOCS.parent / "benchmarks" / "results"
    there = {path.name for path in results.rglob("*")}
    text = (DOCS.parent / page).read_text()
    named = re.findall(r"\b(20\d\d-\d\d-\d\d[\w-]*\.(?:jsonl?|md))\b", text)
    assert [name for name in named if name not in there] == []
    assert named or page != "README.md"
