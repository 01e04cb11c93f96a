"""Conversion between Hugging Face checkpoints and Megatron's distributed ones: checked, streamed, verified.

Nothing is written before both sides are known to fit, and the result appears under its name when it is whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import yaml

from megatron_ztrl.observability.names import CONFIG_FILE
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.describe import (
    Description,
    Field,
    compare,
    describe_architecture,
    describe_dist_checkpoint,
    describe_hf_tensors,
)
from megatron_ztrl.weights.dist_checkpoint import (
    Advance,
    DistCheckpoint,
    DistCheckpointReader,
    write_dist_checkpoint,
)
from megatron_ztrl.weights.hf_checkpoint import (
    HFCheckpointReader,
    HFCheckpointWriter,
    copy_all_but_weights,
    head_config,
)
from megatron_ztrl.weights.hf_mapping import (
    Architecture,
    Head,
    LayoutKeys,
    ParallelLayout,
    check_layout,
    hf_tensor_shapes,
)

BLOCK_BYTES = 8 << 20
"""Of the rows that are read, compared or written to an HF checkpoint at a time. Larger blocks are slower: malloc
gets their memory from the kernel each time, page by page."""
IGNORED_SUFFIX = "rotary_emb.inv_freq"
"""Old checkpoints carry these; they follow from the configuration."""
EMBEDDING = "embedding.word_embeddings.weight"
EMBEDDING_TENSOR = "model.embed_tokens.weight"
TIED_COPY = "lm_head.weight"
"""Some checkpoints with tied embeddings carry them twice."""


class Reader(Protocol):
    """Both kinds of checkpoint, read as the HF one."""

    def read(self, piece: TensorSlice) -> torch.Tensor:
        """A block of an HF tensor."""


ShowFields = Callable[[list[Field]], None]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion between two sides that fit."""

    architecture: Architecture
    dtype: torch.dtype
    """Of the result."""
    source: Reader
    write: Callable[[Path, Advance], None]
    open_result: Callable[[Path], Reader]

    @property
    def weight_bytes(self) -> int:
        """Size of the result's weights, without padding."""
        shapes = hf_tensor_shapes(self.architecture).values()
        return sum(math.prod(shape) for shape in shapes) * self.dtype.itemsize

    def run(self, target: Path, *, advance: Callable[[str, int], None], verify: bool = True) -> None:
        """Converts into ``target``, which must not exist.

        Args:
            target: appears when everything is written and compared.
            advance: told (``converting`` or ``verifying``, bytes that were done).
            verify: read the result again, and compare it bitwise with the source.

        Raises:
            ValueError: ``target`` exists, or the source turns out to be damaged.
            RuntimeError: the result differs from the source.
        """
        with written_whole(target) as partial:
            self.write(partial, lambda count: advance("converting", count))
            if verify:
                self._verify(self.open_result(partial), lambda count: advance("verifying", count))

    def _verify(self, result: Reader, advance: Advance) -> None:
        blocks = list(row_blocks(hf_tensor_shapes(self.architecture), self.dtype))
        with read_ahead(self.source, blocks) as source, read_ahead(result, blocks) as written:
            for block, expected, found in zip(blocks, source, written, strict=True):
                if not _bitwise_equal(found, expected.to(self.dtype)):
                    raise RuntimeError(
                        f"{block.tensor} was not written as it was read; the result is discarded"
                    )
                advance(found.nbytes)


def hf_to_megatron(
    source: Path, layout: ParallelLayout, dtype: torch.dtype | None, show: ShowFields
) -> Conversion:
    """Prepares the conversion of an HF checkpoint into files as the ranks of ``layout`` would save them.

    Args:
        source: directory with config.json and safetensors.
        layout: with one data-parallel rank.
        dtype: of the result; None keeps the checkpoint's.
        show: told what both sides say, before they are refused.

    Raises:
        ValueError: the checkpoint is damaged or not supported, or cannot be cut like this.
    """
    architecture = read_hf_architecture(source)
    check_layout(architecture, layout, LayoutKeys(tensor="--tp", pipeline="--pp", virtual="--vp"))
    reader = HFCheckpointReader(source, setting="HF_DIR")
    _agree(
        {
            "tensors": describe_hf_tensors(reader.shapes, architecture),
            "config.json": describe_architecture(architecture),
            "Megatron": {"padded vocabulary": architecture.padded_vocab_size(layout.tensor_size)},
        },
        show,
    )
    check_hf_tensors(reader, architecture)
    chosen = dtype or _only({reader.dtype(name) for name in hf_tensor_shapes(architecture)})

    def write(directory: Path, advance: Advance) -> None:
        write_dist_checkpoint(directory, reader, architecture, layout, chosen, advance)
        copy_all_but_weights(source, directory)

    return Conversion(
        architecture=architecture,
        dtype=chosen,
        source=reader,
        write=write,
        open_result=lambda directory: DistCheckpointReader(DistCheckpoint(directory), architecture),
    )


def megatron_to_hf(
    checkpoint: Path, like: Path | None, dtype: torch.dtype | None, show: ShowFields
) -> Conversion:
    """Prepares the conversion of a Megatron checkpoint, of a run or a converted one, into an HF checkpoint.

    Args:
        checkpoint: holds ``metadata.json``; of a run ``checkpoints/step_N/actor``, or ``critic``.
        like: HF checkpoint with the config.json and the tokenizer for the result; None is what the Megatron
            checkpoint was made from.
        dtype: of the result; None keeps the checkpoint's.
        show: told what all sides say, before they are refused.

    Raises:
        ValueError: the checkpoint is damaged, or is not of the architecture of ``like``.
    """
    stored = DistCheckpoint(checkpoint)
    recorded = _recorded_source(checkpoint)
    template = like or recorded
    if template is None:
        raise ValueError(f"{checkpoint} does not say which config.json belongs to it; give --like HF_DIR")
    tensors = describe_dist_checkpoint(stored.shapes)
    columns: dict[str, Description] = {"tensors": tensors}
    for name, directory in (("recorded", recorded), ("--like", like)):
        if directory is not None:
            side = _with_head(read_hf_architecture(directory), tensors["head"])
            padded = side.padded_vocab_size(stored.parts(EMBEDDING, 0))
            columns[name] = describe_architecture(side) | {"padded vocabulary": padded}
    _agree(columns, show)
    architecture = _with_head(read_hf_architecture(template), tensors["head"])
    _check_padding(stored, architecture)
    reader = DistCheckpointReader(stored, architecture)
    chosen = dtype or _only({stored.dtypes[key] for key in reader.keys})

    def write(directory: Path, advance: Advance) -> None:
        shapes = hf_tensor_shapes(architecture)
        writer = HFCheckpointWriter(directory, shapes, chosen)
        blocks = list(row_blocks(shapes, chosen))
        with read_ahead(reader, blocks) as tensors:
            for block, tensor in zip(blocks, tensors, strict=True):
                writer.add(block.tensor, tensor.to(chosen))
                advance(tensor.nbytes)
        writer.close(template, **head_config(architecture))

    return Conversion(
        architecture=architecture,
        dtype=chosen,
        source=reader,
        write=write,
        open_result=lambda directory: HFCheckpointReader(directory, setting="the result"),
    )


@contextmanager
def read_ahead(reader: Reader, blocks: Sequence[TensorSlice]) -> Iterator[Iterator[torch.Tensor]]:
    """The blocks one after the other; a thread reads the next one while the caller works on one."""
    with ThreadPoolExecutor(max_workers=1) as thread:

        def tensors() -> Iterator[torch.Tensor]:
            upcoming = thread.submit(reader.read, blocks[0])
            for block in blocks[1:]:
                tensor, upcoming = upcoming.result(), thread.submit(reader.read, block)
                yield tensor
            yield upcoming.result()

        yield tensors()


def check_target(target: Path) -> None:
    """Checks that a conversion can make ``target``.

    Raises:
        ValueError: it exists, or its parent does not.
    """
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists already; remove it, or choose another output")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is not a directory; the output cannot be made in it")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A directory beside ``target`` that gets its name if all goes well, and is removed otherwise."""
    check_target(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(target)
    except BaseException:  # Ctrl-C as well
        shutil.rmtree(partial)
        raise


def _agree(columns: dict[str, Description], show: ShowFields) -> None:
    fields = compare(columns)
    show(fields)
    wrong = [str(field) for field in fields if not field.agrees]
    if wrong:
        raise ValueError(f"these do not fit each other: {'; '.join(wrong)}")


def read_hf_architecture(directory: Path) -> Architecture:
    path = directory / "config.json"
    try:
        return Architecture.from_hf_config(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} has no {error}") from error
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _with_head(architecture: Architecture, head: Head) -> Architecture:
    """A critic is made from a policy's checkpoint, so a policy's config.json fits it but for the head."""
    return replace(architecture, head=head) if head == "value" else architecture


def _recorded_source(checkpoint: Path) -> Path | None:
    """The HF directory that a checkpoint came from: a converted one carries config.json, a run names its model."""
    if (checkpoint / "config.json").is_file():
        return checkpoint
    run_config = checkpoint.absolute().parent.parent.parent / CONFIG_FILE
    if not run_config.is_file():
        return None
    try:
        config = yaml.safe_load(run_config.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{run_config} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        return None
    sections = ("critic", "model") if checkpoint.name == "critic" else ("model",)
    paths = [(config.get(section) or {}).get("path") for section in sections]
    path = next((Path(path) for path in paths if path), None)
    return path if path is not None and (path / "config.json").is_file() else None


def check_hf_tensors(reader: HFCheckpointReader, architecture: Architecture) -> None:
    expected = hf_tensor_shapes(architecture)
    for name, shape in expected.items():
        if name not in reader.shapes:
            raise ValueError(f"HF_DIR has no tensor {name}, which config.json implies")
        if reader.shapes[name] != shape:
            raise ValueError(f"HF_DIR: {name} has shape {reader.shapes[name]}, config.json implies {shape}")
    for name, shape in reader.shapes.items():
        if name in expected or name.endswith(IGNORED_SUFFIX):
            continue
        if name != TIED_COPY or shape != expected[EMBEDDING_TENSOR]:
            raise ValueError(f"HF_DIR: {name} is not a tensor of this architecture, and would be lost")
        for block in row_blocks({EMBEDDING_TENSOR: shape}, reader.dtype(EMBEDDING_TENSOR)):
            if not _bitwise_equal(reader.read(block), reader.read(replace(block, tensor=name))):
                raise ValueError(f"HF_DIR: {name} differs from the embeddings, but config.json ties them")


def _check_padding(stored: DistCheckpoint, architecture: Architecture) -> None:
    """Rows that the result leaves out must hold nothing: this project keeps them at zero."""
    size = architecture.vocab_size
    keys = [EMBEDDING, "output_layer.weight"] if architecture.head == "language" else [EMBEDDING]
    for key in keys:
        if key not in stored.shapes:
            continue
        rows, width = stored.shapes[key]
        padding = torch.empty(rows - size, width, dtype=stored.dtypes[key])
        stored.read([(key, ((size, rows), (0, width)), padding)])
        if padding.any():
            raise ValueError(
                f"{key}: rows {size:,} to {rows:,} are beyond the vocabulary of config.json, but not zero: the"
                " vocabulary is larger"
            )


def _only(dtypes: set[torch.dtype]) -> torch.dtype:
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"the checkpoint mixes {names}; choose one with --dtype")
    return next(iter(dtypes))


def row_blocks(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Iterator[TensorSlice]:
    """All tensors, in rows of at most ``BLOCK_BYTES``."""
    for name, shape in shapes.items():
        rows = max(1, BLOCK_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
        for start in range(0, shape[0], rows):
            length = min(rows, shape[0] - start)
            yield TensorSlice(param="", tensor=name, dim=0, start=0, tensor_start=start, length=length)


def _bitwise_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    words = torch.int64 if a.nbytes % torch.int64.itemsize == 0 else torch.uint8  # eight times as fast
    return torch.equal(a.view(-1).view(words), b.view(-1).view(words))
