"""Writes the Hugging Face checkpoint that engines in block-wise FP8 start from (``engine.path``)."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.convert import (
    check_hf_tensors,
    read_hf_architecture,
    row_blocks,
    written_whole,
)
from megatron_ztrl.weights.fp8_blocks import (
    QUANTIZATION_CONFIG,
    SCALES,
    is_quantised,
    quantised,
    travelling_dtypes,
    with_scale_shapes,
)
from megatron_ztrl.weights.hf_checkpoint import HFCheckpointReader, HFCheckpointWriter
from megatron_ztrl.weights.hf_mapping import hf_tensor_shapes


@torch.no_grad()
def hf_to_fp8(source: Path, target: Path) -> None:
    """Quantises the linear layers of a policy; everything else becomes bfloat16. Memory holds one weight.

    Args:
        source: directory with config.json and safetensors.
        target: appears when all is written; it must not exist.

    Raises:
        ValueError: the checkpoint is damaged or not supported, or a weight is not finite, or ``target`` exists.
    """
    architecture = read_hf_architecture(source)
    if architecture.head != "language":
        raise ValueError(f"{source} is a critic, which no engine serves")
    reader = HFCheckpointReader(source, setting="HF_DIR")
    check_hf_tensors(reader, architecture)
    plain = hf_tensor_shapes(architecture)
    shapes = with_scale_shapes(plain)
    dtypes = {name: getattr(torch, dtype) for name, dtype in travelling_dtypes(shapes, "bfloat16").items()}
    with written_whole(target) as partial:
        writer = HFCheckpointWriter(partial, shapes, torch.bfloat16, exceptions=dtypes)
        for name, shape in plain.items():
            if not is_quantised(name):
                for block in row_blocks({name: shape}, torch.bfloat16):
                    writer.add(name, reader.read(block).to(torch.bfloat16))
                continue
            whole = TensorSlice(param="", tensor=name, dim=0, start=0, tensor_start=0, length=shape[0])
            weight, scales = quantised(reader.read(whole))
            if not bool(scales.isfinite().all()):
                raise ValueError(f"HF_DIR: {name} has values that are not finite; they cannot be quantised")
            writer.add(name, weight)
            writer.add(name + SCALES, scales)
        writer.close(
            source, quantization_config=QUANTIZATION_CONFIG | {"modules_to_not_convert": ["lm_head"]}
        )
