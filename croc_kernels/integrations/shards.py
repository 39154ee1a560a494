"""Sharded checkpoints tensor by tensor: no more than one shard is ever in memory."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


def shard_files(directory: Path) -> list[Path]:
    """The checkpoint's weight files, safetensors before PyTorch's ``.bin``.

    Raises:
        FileNotFoundError: the directory holds no weights, or its index names a missing file.
    """
    for index, single, pattern in (
        (INDEX, "model.safetensors", "*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
    ):
        if (directory / index).exists():
            names = set(json.loads((directory / index).read_text())["weight_map"].values())
            files = [directory / name for name in sorted(names)]
        elif (directory / single).exists():
            files = [directory / single]
        else:
            files = sorted(directory.glob(pattern))
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise FileNotFoundError(f"convert: {directory / index} names {missing}, not found")
        if files:
            return files
    raise FileNotFoundError(f"convert: no *.safetensors or pytorch_model*.bin in {directory}")


def iterate_tensors(directory: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name and loader of every tensor; call the loader before asking for the next pair."""
    for file in shard_files(directory):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as handle:
                for name in handle.keys():
                    yield name, lambda name=name, handle=handle: handle.get_tensor(name)
        else:
            # Memory-mapped: only what is touched is read, and nothing is unpickled but tensors.
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            for name, tensor in state.items():
                yield name, lambda tensor=tensor: tensor


class ShardWriter:
    """Writes tensors as they come into shards of at most ``max_bytes``.

    Everything goes to ``<directory>.partial`` first and is renamed on a clean exit, so an
    interrupted conversion leaves no directory that looks complete.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.partial = directory.with_name(directory.name + ".partial")
        self.max_bytes = max_bytes
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.total_bytes = 0
        self.shards: list[list[str]] = []

    def __enter__(self) -> "ShardWriter":
        if self.directory.exists():
            raise FileExistsError(f"convert: {self.directory} exists; choose another target")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self

    def make_room(self, size: int) -> None:
        """Write a shard if so many bytes more would overfill it."""
        if self.pending and self.pending_bytes + size > self.max_bytes:
            self._flush()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; write a shard first if this one would overfill it."""
        size = tensor.numel() * tensor.element_size()
        self.make_room(size)
        tensor = tensor.contiguous()
        # safetensors refuses tensors that share storage, as slices of a .bin file do, and a slice
        # of a mapped file would keep the file mapped.
        shared = tensor.untyped_storage().nbytes() != size
        self.pending[name] = tensor.clone() if shared else tensor
        self.pending_bytes += size
        self.total_bytes += size

    @property
    def count(self) -> int:
        """Tensors taken so far."""
        return len(self.pending) + sum(len(names) for names in self.shards)

    def _flush(self) -> None:
        file = self.partial / f"shard-{len(self.shards)}.safetensors"
        save_file(self.pending, file, metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        if self.pending or not self.shards:
            self._flush()
        count = len(self.shards)
        weight_map = {}
        for i, names in enumerate(self.shards):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            final = "model.safetensors" if count == 1 else final
            (self.partial / f"shard-{i}.safetensors").rename(self.partial / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
        os.replace(self.partial, self.directory)
