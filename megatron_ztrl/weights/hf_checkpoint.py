"""Hugging Face checkpoints on disk: reads only the slices a rank needs, writes sharded safetensors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.hf_mapping import Architecture
from megatron_ztrl.weights.safetensors_file import SafetensorsFile, SafetensorsWriter

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAMES = (INDEX_NAME, ".metadata", "metadata.json")
"""Files that describe weight files: of an HF checkpoint, and of a Megatron checkpoint."""
MAX_FILE_BYTES = 4 << 30
NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".distcp"}
"""Suffixes of weight files: an export copies every other top-level file of its source."""


class HFCheckpointReader:
    """Random access to the tensors of a safetensors checkpoint.

    Args:
        directory: holds ``model.safetensors``, or shards and their index.
        setting: what errors begin with: where the user wrote ``directory``.

    Raises:
        ValueError: there are no safetensors in ``directory``, or they are damaged.
    """

    def __init__(self, directory: Path, *, setting: str = "model.path") -> None:
        self._directory = directory
        self._setting = setting
        self._files: dict[str, SafetensorsFile] = {}
        """By tensor."""
        for path, names in self._paths().items():
            try:
                file = SafetensorsFile(path)
            except ValueError as error:
                raise ValueError(f"{setting}: {error}") from error
            missing = sorted(names - file.shapes.keys())
            if missing:
                raise ValueError(f"{setting}: {path} has no tensor {missing[0]}, where {INDEX_NAME} has it")
            self._files.update(dict.fromkeys(names or file.shapes, file))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor."""
        return {name: file.shapes[name] for name, file in self._files.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor.

        Raises:
            ValueError: it is not a dtype of weights.
        """
        try:
            return self._files[name].dtype(name)
        except ValueError as error:
            raise ValueError(f"{self._setting}: {error}") from error

    def read(self, piece: TensorSlice) -> torch.Tensor:
        """The block of the HF tensor that ``piece`` names, on the CPU, in the checkpoint's dtype.

        Raises:
            ValueError: the checkpoint has no such tensor, or one of another shape.
        """
        return self._file_with(piece).read(piece.tensor, piece.dim, piece.tensor_start, piece.length)

    def read_into(self, piece: TensorSlice, target: torch.Tensor) -> None:
        """Reads a block to where it belongs; without a copy if ``target`` is contiguous, of the same dtype."""
        if target.is_contiguous() and target.dtype is self.dtype(piece.tensor):
            self._file_with(piece).read_into(target, piece.tensor, piece.dim, piece.tensor_start)
        else:
            target.copy_(self.read(piece))

    def _file_with(self, piece: TensorSlice) -> SafetensorsFile:
        if piece.tensor not in self._files:
            raise ValueError(f"{self._setting}: {self._directory} has no tensor {piece.tensor}")
        file = self._files[piece.tensor]
        shape = file.shapes[piece.tensor]
        if piece.dim >= len(shape) or piece.tensor_start + piece.length > shape[piece.dim]:
            raise ValueError(
                f"{self._setting}: {piece.tensor} has shape {shape} where config.json implies at least"
                f" {piece.tensor_start + piece.length} in dimension {piece.dim}"
            )
        return file

    def _paths(self) -> dict[Path, set[str]]:
        """Every file, and the tensors that the index wants in it; no tensors where there is no index."""
        index = self._directory / INDEX_NAME
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(f"{self._setting}: {index} is damaged: {error!r}") from error
            paths: dict[Path, set[str]] = {}
            for name, file in weight_map.items():
                paths.setdefault(self._directory / file, set()).add(name)
            return paths
        if (self._directory / SINGLE_NAME).is_file():
            return {self._directory / SINGLE_NAME: set()}
        raise ValueError(f"{self._setting}: {self._directory} has neither {SINGLE_NAME} nor {INDEX_NAME}")


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
        # Only these are padded, or may be new; anything else without a slice is another model than the slices are of.
        assert pieces or "word_embeddings" in name or "output_layer" in name, f"{name} is in no slice"
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
    """Writes tensors one after the other into safetensors files of at most ``MAX_FILE_BYTES``.

    It keeps nothing in memory: which tensor goes where is settled beforehand.

    Args:
        directory: made if missing.
        shapes: of all tensors, in the order in which they will be added.
        dtype: of the tensors, which config.json will say.
        exceptions: dtypes of those tensors that have another.
    """

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        exceptions: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._dtype = dtype
        self._dtypes = dict.fromkeys(shapes, dtype) | dict(exceptions or {})
        self._sizes = {name: math.prod(shape) * self._dtypes[name].itemsize for name, shape in shapes.items()}
        self._files = _split_into_files(shapes, self._sizes)
        self._first_of_file = {next(iter(tensors)): file for file, tensors in self._files.items()}
        self._expected = iter(shapes.items())
        self._name = ""
        self._rows_left = 0
        self._file: SafetensorsWriter | None = None

    def add(self, name: str, block: torch.Tensor) -> None:
        """Takes the next rows of a CPU tensor, or the whole of it."""
        if self._rows_left == 0:
            self._name, shape = next(self._expected)
            self._rows_left = shape[0]
            if self._name in self._first_of_file:
                self._end_file()
                file = self._first_of_file[self._name]
                self._file = SafetensorsWriter(self._directory / file, self._files[file], self._dtypes)
        assert self._file is not None and name == self._name, f"{name} came where {self._name} was due"
        assert block.dtype == self._dtypes[name] and block.shape[0] <= self._rows_left, (name, block.shape)
        self._file.append(block)
        self._rows_left -= block.shape[0]

    def close(self, source: Path, **config_changes: Any) -> None:
        """Ends the last file; copies config.json, changed, and the tokenizer files from ``source``."""
        self._end_file()
        assert self._rows_left == 0 and next(self._expected, None) is None, f"{self._name} is not the last"
        if len(self._files) > 1:
            weight_map = {name: file for file, tensors in self._files.items() for name in tensors}
            index = {"metadata": {"total_size": sum(self._sizes.values())}, "weight_map": weight_map}
            (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        config = json.loads((source / "config.json").read_text())
        dtype_key = "dtype" if "dtype" in config else "torch_dtype"
        dtype_name = str(self._dtype).removeprefix("torch.")
        copy_description(source, self._directory, **({dtype_key: dtype_name} | config_changes))

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()


def head_config(architecture: Architecture) -> dict[str, Any]:
    """What config.json must say for `transformers` to build the right head."""
    if architecture.head == "language":
        return {}
    return {
        "architectures": [f"{architecture.family}ForTokenClassification"],
        "id2label": {"0": "value"},
        "label2id": {"value": 0},
    }


def copy_description(source: Path, target: Path, **config_changes: Any) -> None:
    """Copies what says which model the weights are of, and how to use it: config.json, changed, and the tokenizer."""
    copy_all_but_weights(source, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | config_changes, indent=2) + "\n")


def copy_all_but_weights(source: Path, target: Path) -> None:
    """Copies config.json, the tokenizer files, and whatever else lies beside the weights."""
    for path in source.iterdir():
        if path.is_file() and path.suffix not in NOT_COPIED and path.name not in INDEX_NAMES:
            shutil.copyfile(path, target / path.name)


def _split_into_files(
    shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors of every file, in order."""
    parts: list[dict[str, tuple[int, ...]]] = []
    part_bytes = 0
    for name, shape in shapes.items():
        if not parts or part_bytes + sizes[name] > MAX_FILE_BYTES:
            parts.append({})
            part_bytes = 0
        parts[-1][name] = shape
        part_bytes += sizes[name]
    if len(parts) == 1:
        return {SINGLE_NAME: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, start=1)}
