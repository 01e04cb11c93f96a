"""What can be checked before any process starts: the checkpoint is there and fits the parallel layout."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ztrl.config.schema import Config
from megatron_ztrl.weights.hf_mapping import Architecture, ParallelLayout


def resolve_checkpoint(path: str) -> Path:
    """The local directory of ``model.path``; a hub id is downloaded, or found in the hub's cache.

    Raises:
        ValueError: there is no such directory, and no such hub checkpoint can be reached.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise ValueError(f"model.path: {path} is not a directory, and not a hub id (organisation/name)")
    # Optional at run time: a local checkpoint needs no hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model.path: no directory {path}, and no such checkpoint on the hub or in its cache"
            f" ({type(error).__name__}); download it first, or give a local directory"
        ) from error


def read_architecture(checkpoint: Path) -> Architecture:
    """The architecture that ``config.json`` of a checkpoint directory describes.

    Raises:
        ValueError: the file is missing or unreadable, or the architecture is not supported.
    """
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"model.path: cannot read {path}: {error}") from error
    try:
        return Architecture.from_hf_config(config)
    except KeyError as error:
        raise ValueError(f"model.path: {path} has no {error}") from error


def parallel_layout(config: Config) -> ParallelLayout:
    """The grid of ranks that ``actor.*`` asks for."""
    virtual = config.megatron.transformer.get("virtual_pipeline_model_parallel_size")
    return ParallelLayout(
        tensor_size=config.actor.tensor_parallel_size,
        pipeline_size=config.actor.pipeline_parallel_size,
        data_size=config.actor.data_parallel_size,
        virtual_size=virtual or 1,
    )


def check_topology(config: Config) -> None:
    """Checks that the model can be cut the way ``actor.*`` says.

    Raises:
        ValueError: one line with the config path and the fix.
    """
    architecture = read_architecture(resolve_checkpoint(config.model.path))
    layout = parallel_layout(config)
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if getattr(config.actor, name) < 1:
            raise ValueError(f"actor.{name}: must be at least 1")
    for what, size in (
        ("attention heads", architecture.num_heads),
        ("key-value groups", architecture.num_kv_groups),
        ("feed-forward columns", architecture.ffn_size),
    ):
        if size % layout.tensor_size:
            raise ValueError(
                f"actor.tensor_parallel_size: {layout.tensor_size} does not divide the {size} {what}"
                f" of {config.model.path}"
            )
    stages = layout.pipeline_size * layout.virtual_size
    if architecture.num_layers % stages:
        raise ValueError(
            f"actor.pipeline_parallel_size: {stages} pipeline stages (virtual ones included) do not divide"
            f" the {architecture.num_layers} layers of {config.model.path}"
        )
    if layout.virtual_size > 1 and layout.pipeline_size == 1:
        raise ValueError(
            "megatron.transformer.virtual_pipeline_model_parallel_size:"
            " needs actor.pipeline_parallel_size > 1"
        )
    if config.actor.sequence_parallel and layout.tensor_size == 1:
        raise ValueError("actor.sequence_parallel: needs actor.tensor_parallel_size > 1")
