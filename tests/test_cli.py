"""The ``croc-kernels`` command: what it lists, what it imports, what it hands on."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from croc_kernels import _versions, bench, cli

ROOT = Path(__file__).resolve().parent.parent


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == _versions.PACKAGE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "COMMAND"), (["train"], "invalid choice: 'train'"), (["info", "--yaml"], "--yaml")],
    ids=["none", "unknown", "option"],
)
def test_wrong_arguments_exit_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_command_gets_its_own_options_only(monkeypatch):
    got = {}

    def run(args: argparse.Namespace) -> int:
        got.update(vars(args))
        return 3

    monkeypatch.setattr(bench, "run", run)
    assert cli.main(["bench", "-k", "cost", "--device", "cpu"]) == 3
    assert got == {"select": "cost", "device": "cpu", "seconds": None, "output": None}


def test_a_command_whose_module_is_missing_is_not_offered(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "later", (".not_written_yet", "not there"))
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "later" not in capsys.readouterr().out


def test_bench_outside_a_checkout_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert cli.main(["bench"]) == 2
    assert "clone the repository and run: make bench" in capsys.readouterr().err


def test_bench_hands_its_options_on(monkeypatch, tmp_path):
    commands = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
        commands.append((command[1:], options["cwd"]))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert cli.main(["bench", "-k", "cost", "--output", str(tmp_path)]) == 1
    assert commands == [
        (["-m", "benchmarks.run", "-k", "cost", "--output", str(tmp_path)], bench.ROOT)
    ]


def test_listing_commands_imports_no_recipe():
    code = (
        "import sys\nfrom croc_kernels import cli\ncli.build_parser('info')\n"
        "assert not {'transformers', 'matplotlib'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
