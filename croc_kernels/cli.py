"""The ``croc-kernels`` command; each subcommand is a module with ``add_arguments`` and ``run``."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from . import _versions

COMMANDS = {
    "pretrain": (
        ".recipes.command",
        "run the pretraining stage; --demo needs no data and no network",
    ),
    "convert": (".integrations.checkpoints", "convert checkpoints of the original code bases"),
    "bench": (".bench", "run the benchmarks of a source checkout"),
    "info": (".info", "versions, and per operator the backend in use and why not a better one"),
    "selftest": (".selftest", "check every operator against its reference on this machine"),
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser, with arguments for the chosen subcommand only: no other module is imported."""
    parser = argparse.ArgumentParser(
        prog="croc-kernels",
        description="Pretraining multimodal LLMs by token reconstruction: kernels and recipes.",
    )
    parser.add_argument("--version", action="version", version=_versions.PACKAGE)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        if importlib.util.find_spec(module, __package__) is None:
            continue
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == chosen:
            command = importlib.import_module(module, __package__)
            command.add_arguments(subparser)
            subparser.set_defaults(_run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the arguments after the program's name; ``sys.argv`` by default.

    Returns:
        The exit status: 0, or what the subcommand returned.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    options = vars(build_parser(chosen).parse_args(arguments))
    # A subcommand gets its own options and nothing else: pretrain refuses names it does not know.
    run, _ = options.pop("_run"), options.pop("command")
    return int(run(argparse.Namespace(**options)) or 0)


if __name__ == "__main__":
    sys.exit(main())
