"""Kernels that note how they are launched, and a function that launches one."""

import collections

import torch

from croc_kernels.launch import launch, replayed


class Compiled:
    """What Triton gives back of a launch."""

    packed_metadata, function = (4, 1), 7

    def __init__(self, log):
        self.log = log

    def run(self, x, y, z, stream, function, metadata, known, enter, leave, *values):
        assert (stream, function, metadata) == (0, self.function, self.packed_metadata)
        assert known is enter is leave is None
        self.log.append(("again", (x, y, z), values))


class Kernel:
    """A function with parameters a, b, ONE and TWO that notes how it is launched."""

    arg_names = ("a", "b", "ONE", "TWO")

    def __init__(self, compiles=True):
        self.log, self.compiles = [], compiles

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.log.append(("first", grid, arguments, options))
            return Compiled(self.log) if self.compiles else None

        return run

    @property
    def ways(self):
        """First or again, for each launch since this was asked."""
        found = [how for how, *_ in self.log]
        self.log.clear()
        return found


CONSTANTS = {"TWO": 2, "ONE": 1}
Pair = collections.namedtuple("Pair", "first second")


def doubled(kernel, body=None):
    """A function of two tensors and a number that launches once, and what it made."""

    @replayed(kernel)
    def function(x, y, number=3):
        if body is not None:
            body(x)
        made = torch.empty_strided((2, 3), (1, 2), dtype=torch.float16)
        launch(kernel, (number, 1, 1), (x, (y, number, made)), CONSTANTS, num_warps=4)
        return made, x

    return function


def tensors(*shape, count=2, **options):
    return [torch.zeros(*shape, **options) for _ in range(count)]
