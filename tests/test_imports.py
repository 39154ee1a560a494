"""The direction of imports that DESIGN fixes, and the size rules, read off the syntax trees."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "croc_kernels"
OPERATORS = ("attention", "cost", "assignment", "replacement")

# A module may import modules of a lower level, and those of its own level where LEVELS_OPEN has it.
BASE = ("_versions", "aot", "backend", "checks", "launch")
LEVELS = {"base": 0, "ops": 1, "implementation": 2, "api": 3, "layer": 4, "glue": 5, "command": 6}
LEVELS_OPEN = ("base", "implementation", "layer", "glue", "command")
# Implementations of one operator: none imports another, and only api.py imports the reference.
BACKENDS = ("reference", "cpu", "kernel", "forward", "backward")
HEAVY = ("triton", "transformers", "matplotlib", "scipy", "accelerate", "PIL")


def modules() -> dict[str, Path]:
    """Every module of the package, ``attention.api`` style."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def level_of(module: str) -> str:
    """Which room of the layout a module lives in."""
    head, _, tail = module.partition(".")
    if head in OPERATORS:
        return "api" if tail == "api" else "implementation"
    if head in ("integrations", "recipes"):
        return "glue"
    if head in ("cli", "info", "selftest", "bench", "testing", ""):
        return "command"
    if head == "ops":
        return "ops"
    return "base" if head in BASE else "layer"


def imports_of(module: str, path: Path) -> set[str]:
    """Modules of this package that a module imports anywhere in its source."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] == "croc_kernels"]
            found |= {n.removeprefix("croc_kernels").lstrip(".") for n in names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = package.split(".") if package else []
                base = parts[: len(parts) - node.level + 1]
            elif (node.module or "").split(".")[0] == "croc_kernels":
                base = []
            else:
                continue
            tail = (node.module or "").removeprefix("croc_kernels").lstrip(".")
            target = ".".join([*base, *(tail.split(".") if tail else [])])
            for alias in node.names:
                name = f"{target}.{alias.name}".lstrip(".")
                found.add(name if name in known else target)
    return found


def edges() -> list[tuple[str, str]]:
    """Every (importer, imported) pair inside the package."""
    pairs = [(m, i) for m, p in modules().items() for i in imports_of(m, p)]
    return [(m, i) for m, i in pairs if m != "" and i != ""]


def test_imports_are_found():
    found = edges()
    assert ("attention.api", "ops") in found
    assert ("layer.croc_layer", "attention.mask") in found
    assert ("cost.api", "cost.reference") in found


def test_imports_point_one_way():
    wrong = []
    for importer, imported in edges():
        above, below = level_of(importer), level_of(imported)
        same = above == below and above in LEVELS_OPEN
        if not (LEVELS[below] < LEVELS[above] or same):
            wrong.append(f"{importer} ({above}) imports {imported} ({below})")
    assert wrong == []


def test_no_implementation_imports_another():
    wrong = []
    for importer, imported in edges():
        if level_of(importer) != "implementation" or level_of(imported) != "implementation":
            continue
        same_operator = importer.split(".")[0] == imported.split(".")[0]
        backends = importer.split(".")[-1] in BACKENDS and imported.split(".")[-1] in BACKENDS
        if not same_operator or backends:
            wrong.append(f"{importer} imports {imported}")
    assert wrong == []


def test_recipes_do_not_enter_integrations_backwards():
    wrong = [e for e in edges() if e[0].startswith("integrations") and e[1].startswith("recipes")]
    assert wrong == []


@pytest.mark.parametrize("pattern", ["*.cuh"])
def test_device_code_includes_no_torch(pattern):
    files = sorted((ROOT / "csrc").rglob(pattern))
    assert files
    wrong = [
        f"{f.name}: {line}"
        for f in files
        for line in f.read_text().splitlines()
        if line.startswith("#include") and ("torch" in line or "stable_utils" in line)
    ]
    assert wrong == []


def test_benchmarks_reach_for_no_implementation():
    wrong = []
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("croc_kernels"):
                names = {node.module.split(".")[-1], *(alias.name for alias in node.names)}
                wrong += [f"{path.name}: {name}" for name in names & {"ops", *BACKENDS}]
    assert wrong == []


def test_import_is_light():
    code = (
        "import json, sys, croc_kernels;"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []


def lines_of(node: ast.AST) -> int:
    """Lines of a function without its docstring."""
    length = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        length -= first.end_lineno - first.lineno + 1
    return length


def is_kernel(node: ast.AST) -> bool:
    """Whether a function is a Triton kernel or a helper of one."""
    names = [ast.unparse(d) for d in node.decorator_list]
    return any("triton.jit" in name or "gluon.jit" in name for name in names)


def test_sizes():
    wrong = []
    for folder in ("croc_kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            if text.count("\n") > 400:
                wrong.append(f"{path.name}: {text.count(chr(10))} lines, at most 400")
            for node in ast.walk(ast.parse(text)):
                if not isinstance(node, ast.FunctionDef):
                    continue
                limit = 120 if is_kernel(node) else 60
                if lines_of(node) > limit:
                    wrong.append(
                        f"{path.name}: {node.name} {lines_of(node)} lines, at most {limit}"
                    )
    sources = [p for folder in ("csrc", "tests") for p in (ROOT / folder).rglob("*")]
    for path in [p for p in sources if p.suffix in (".cpp", ".cu", ".cuh", ".h")]:
        lines = path.read_text().count("\n")
        if lines > 400:
            wrong.append(f"{path.name}: {lines} lines, at most 400")
    assert wrong == []


def test_kernels_have_few_arguments():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                if is_kernel(node) and node.name.endswith("_kernel"):
                    runtime = [
                        a.arg
                        for a in node.args.args
                        if a.annotation is None or "constexpr" not in ast.unparse(a.annotation)
                    ]
                    if len(runtime) > 12:
                        wrong.append(f"{path.name}: {node.name} has {len(runtime)}, at most 12")
    assert wrong == []
