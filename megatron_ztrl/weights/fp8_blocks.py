"""Weights for engines that hold linear layers in block-wise FP8: e4m3, and a float32 scale for every 128 x 128 block.

The layout is that of DeepSeek-V3's checkpoints (arXiv:2412.19437, section 3.3): beside ``x.weight`` lies
``x.weight_scale_inv``, and a weight is its e4m3 value times its block's scale. The trainer quantises what it sends, so
that half of bfloat16's bytes travel. To the plan a scale is a tensor like any other, 128 times smaller along both
dimensions; so every slice has to end where blocks do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from megatron_ztrl.engines.weight_stream import Block, copy
from megatron_ztrl.types import TensorSlice

BLOCK = 128
FP8 = "float8_e4m3fn"
LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448."""
SCALES = "_scale_inv"
"""What follows the name of a weight in the name of its scales, at both ends and in checkpoints."""
QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
    "activation_scheme": "dynamic",
}
"""``quantization_config`` of config.json."""
_CHUNK_ELEMENTS = 4 << 20
"""Quantised at a time, in float32: the memory that this takes beside the staging buffers is 16 MiB."""


def is_quantised(tensor: str) -> bool:
    """Whether an FP8 engine holds this Hugging Face tensor in FP8: a linear layer's weight, but not the head's."""
    return tensor.endswith("_proj.weight")


def check_fp8_blocks(hf_config: Mapping[str, Any], setting: str) -> None:
    """Checks that a checkpoint holds all linear layers in block-wise FP8.

    Args:
        hf_config: the parsed config.json.
        setting: config path that names the checkpoint.

    Raises:
        ValueError: it does not.
    """
    found = dict(hf_config.get("quantization_config") or {})
    excluded = [
        *(found.pop("modules_to_not_convert", None) or []),
        *(found.pop("ignored_layers", None) or []),
    ]
    if linear := next((name for name in excluded if is_quantised(f"{name}.weight")), None):
        raise ValueError(
            f"{setting}: quantization_config in config.json leaves out {linear}; FP8 is for all linear layers, or none"
        )
    if {"fmt": QUANTIZATION_CONFIG["fmt"], **found} != QUANTIZATION_CONFIG:
        raise ValueError(
            f"{setting}: quantization_config in config.json is {found or 'missing'}, where block-wise FP8 has"
            f" {QUANTIZATION_CONFIG}; make such a checkpoint with tools/convert_checkpoint.py hf-to-fp8, or leave"
            f" {setting} out"
        )


def travelling_dtypes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, str]:
    """What the tensors of ``with_scale_shapes`` travel as, where the others are ``dtype``."""
    return {
        name: "float32" if name.endswith(SCALES) else FP8 if is_quantised(name) else dtype for name in shapes
    }


def with_scale_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of all Hugging Face tensors, with those of the scales."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        found[name] = shape
        if is_quantised(name):
            found[name + SCALES] = tuple(_blocks(size) for size in shape)
    return found


def with_scales(
    slices: Sequence[TensorSlice], shapes: Mapping[str, tuple[int, ...]], holder: str, setting: str
) -> list[TensorSlice]:
    """What a rank holds, with the scales that belong to it.

    Args:
        slices: without scales.
        shapes: of the Hugging Face tensors.
        holder: names the rank.
        setting: config path of the size that cuts the tensors.

    Raises:
        ValueError: a slice cuts a block, so that no rank could know its scale.
    """
    found: list[TensorSlice] = []
    for item in slices:
        found.append(item)
        if is_quantised(item.tensor):
            found.append(_scales_of(item, shapes[item.tensor][item.dim], holder, setting))
    return found


def _scales_of(item: TensorSlice, size: int, holder: str, setting: str) -> TensorSlice:
    end = item.tensor_start + item.length
    if item.start % BLOCK or item.tensor_start % BLOCK or (end % BLOCK and end != size):
        what = ("rows", "columns")[item.dim]
        raise ValueError(
            f"{setting}: {holder} holds {what} {item.tensor_start} to {end - 1} of the {size} of {item.tensor} in one"
            f" piece, and FP8 blocks of {BLOCK} that share a scale are cut there; choose a smaller {setting}, or, where"
            " that does not help, leave out engine.path to serve the policy in bfloat16"
        )
    return TensorSlice(
        param=item.param + SCALES,
        tensor=item.tensor + SCALES,
        dim=item.dim,
        start=item.start // BLOCK,
        tensor_start=item.tensor_start // BLOCK,
        length=_blocks(item.length),
    )


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def block_scales(weight_RC: torch.Tensor) -> torch.Tensor:
    """The scale of each block, [ceil(R / 128), ceil(C / 128)] in float32: its largest magnitude over 448.

    A block of zeros has the scale 1. So has one whose scale would be below float32's normal numbers, and imprecise. A
    value that is not finite makes a scale that is not.
    """
    rows, columns = weight_RC.shape
    if rows % BLOCK or columns % BLOCK:
        weight_RC = F.pad(weight_RC, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = weight_RC.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    largest = torch.maximum(blocks.amax((1, 3)), -blocks.amin((1, 3)))  # an ``abs`` would copy the weight
    scales = largest.float() / LARGEST
    return scales.masked_fill_(scales < torch.finfo(torch.float32).tiny, 1.0)


def quantise(values_RC: torch.Tensor, row_scales: torch.Tensor, target_RC: torch.Tensor) -> None:
    """Write values, each over its block's scale, rounded to e4m3.

    Args:
        values_RC: a part of a weight; its first column begins a block.
        row_scales: [R, ceil(C / 128)], for every row those of the blocks that it goes through.
        target_RC: in float8_e4m3fn.
    """
    rows, columns = values_RC.shape
    whole = columns - columns % BLOCK
    step = max(1, _CHUNK_ELEMENTS // columns)
    for row in range(0, rows, step):
        values, scales, target = (part[row : row + step] for part in (values_RC, row_scales, target_RC))
        if whole:
            scaled = values[:, :whole].unflatten(1, (-1, BLOCK)) / scales[:, : whole // BLOCK, None]
            target[:, :whole].copy_(scaled.flatten(1))
        if whole < columns:
            target[:, whole:].copy_(values[:, whole:] / scales[:, -1:])


class QuantisingSource:
    """A rank's parameters, and their scales: of each as the weights were when they were first asked for."""

    def __init__(self, parameter: Callable[[str], torch.Tensor]) -> None:
        """Wrap ``parameter``, which returns one by name."""
        self._parameter = parameter
        self._scales: dict[str, torch.Tensor] = {}

    def parameter(self, name: str) -> torch.Tensor:
        """Return a parameter, or the scales of one, whose blocks are counted from its own first row and column."""
        if not name.endswith(SCALES):
            return self._parameter(name)
        if name not in self._scales:
            self._scales[name] = block_scales(self._parameter(name.removesuffix(SCALES)))
        return self._scales[name]

    def convert(self, block: Block, values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See ``weight_stream.Convert``."""
        piece = block.piece
        if piece.dtype != FP8:
            return copy(block, values, target)
        row, column = (piece.start + block.row, 0) if piece.dim == 0 else (block.row, piece.start)
        blocks = torch.arange(row, row + block.rows, device=values.device) // BLOCK
        scales = self.parameter(piece.param + SCALES)[:, column // BLOCK :]
        quantise(values, scales[blocks, : _blocks(values.shape[1])], target)
        return target

    def forget(self) -> None:
        """The weights may change from now on."""
        self._scales.clear()


def quantised(weight_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole weight in e4m3, and its scales."""
    scales = block_scales(weight_RC)
    target_RC = torch.empty_like(weight_RC, dtype=torch.float8_e4m3fn)
    quantise(weight_RC, scales.repeat_interleave(BLOCK, 0)[: len(weight_RC)], target_RC)
    return target_RC, scales
