"""Hugging Face checkpoints on disk: reads only the slices a rank needs, writes sharded safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_ztrl.types import TensorSlice

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_FILE_BYTES = 4 << 30
NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
"""Suffixes of weight files: an export copies every other top-level file of its source."""


class HFCheckpointReader:
    """Random access to the tensors of a safetensors checkpoint.

    Args:
        directory: holds ``model.safetensors``, or shards and their index.

    Raises:
        ValueError: there are no safetensors in ``directory``, or they are damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        if (directory / INDEX_NAME).is_file():
            self._files: dict[str, str] = json.loads((directory / INDEX_NAME).read_text())["weight_map"]
        elif (directory / SINGLE_NAME).is_file():
            try:
                with safe_open(directory / SINGLE_NAME, framework="pt") as file:
                    self._files = dict.fromkeys(file.keys(), SINGLE_NAME)
            except SafetensorError as error:
                raise ValueError(f"model.path: {directory / SINGLE_NAME} is damaged: {error}") from error
        else:
            raise ValueError(f"model.path: {directory} has neither {SINGLE_NAME} nor {INDEX_NAME}")
        self._open: dict[str, Any] = {}

    def read(self, piece: TensorSlice) -> torch.Tensor:
        """The block of the HF tensor that ``piece`` names, on the CPU, in the checkpoint's dtype.

        Raises:
            ValueError: the checkpoint has no such tensor.
        """
        if piece.tensor not in self._files:
            raise ValueError(f"model.path: {self._directory} has no tensor {piece.tensor}")
        name = self._files[piece.tensor]
        if name not in self._open:
            self._open[name] = safe_open(self._directory / name, framework="pt")
        tensor = self._open[name].get_slice(piece.tensor)
        end = piece.tensor_start + piece.length
        return tensor[piece.tensor_start : end] if piece.dim == 0 else tensor[:, piece.tensor_start : end]


@torch.no_grad()
def load_slices(
    slices: Iterable[TensorSlice], parameters: Mapping[str, torch.Tensor], reader: HFCheckpointReader
) -> None:
    """Fills a rank's parameters from an HF checkpoint; rows that pad the vocabulary become zero.

    Raises:
        ValueError: a tensor is missing from the checkpoint, or has another shape than config.json says.
    """
    by_param: dict[str, list[TensorSlice]] = {name: [] for name in parameters}
    for piece in slices:
        by_param[piece.param].append(piece)
    for name, pieces in by_param.items():
        parameter = parameters[name]
        if sum(piece.length for piece in pieces) < parameter.shape[pieces[0].dim if pieces else 0]:
            parameter.zero_()
        for piece in pieces:
            target = parameter.narrow(piece.dim, piece.start, piece.length)
            source = reader.read(piece)
            if source.shape != target.shape:
                raise ValueError(
                    f"model.path: {piece.tensor} has shape {tuple(source.shape)} where config.json"
                    f" implies {tuple(target.shape)}"
                )
            target.copy_(source)


class HFCheckpointWriter:
    """Writes tensors one after the other into safetensors files of at most ``MAX_FILE_BYTES``."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._parts: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes a whole CPU tensor, which must not change until :meth:`close`."""
        if self._pending and self._pending_bytes + tensor.nbytes > MAX_FILE_BYTES:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self, source: Path, *, dtype: str, **config_changes: Any) -> None:
        """Writes what is left, and copies config.json, changed, and the tokenizer files from ``source``."""
        self._flush()
        if len(self._parts) == 1:
            self._parts[0][0].replace(self._directory / SINGLE_NAME)
        else:
            weight_map = {}
            for number, (path, names) in enumerate(self._parts, start=1):
                final = f"model-{number:05d}-of-{len(self._parts):05d}.safetensors"
                path.replace(self._directory / final)
                weight_map.update(dict.fromkeys(names, final))
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        for path in source.iterdir():
            if path.is_file() and path.suffix not in NOT_COPIED and path.name != INDEX_NAME:
                shutil.copyfile(path, self._directory / path.name)
        config = json.loads((source / "config.json").read_text())
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
        (self._directory / "config.json").write_text(json.dumps(config | config_changes, indent=2) + "\n")

    def _flush(self) -> None:
        path = self._directory / f"part-{len(self._parts):05d}.safetensors.tmp"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._parts.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0
