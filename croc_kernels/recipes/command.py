"""The ``pretrain`` command: options in, exit code out."""

import argparse
import logging
import sys

from .options import OptionError, add_arguments, resolve
from .records import BadSampleError

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Run the stage with the options given on the command line.

    Args:
        args: what a parser with :func:`add_arguments` made; only options that were given count.

    Returns:
        0; 1 if a demo's losses did not fall; 2 if options or data are wrong, with a line on stderr.
    """
    from .pretrain import set_up, train

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("croc_kernels").setLevel(logging.INFO)
    try:
        stage, training = resolve(vars(args))
        if stage.demo:
            from .demo import run_demo

            return run_demo(stage, training)
        train(set_up(stage, training))
    except (OptionError, BadSampleError, FileExistsError, FileNotFoundError) as error:
        print(f"croc-kernels pretrain: error: {error}", file=sys.stderr)
        return 2
    return 0
