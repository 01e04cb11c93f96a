"""Exact bytes of weights, gradients and optimizer state of any rank of any world, in one process.

The real model is built, and wrapped as for training, for one rank at a time of a world whose process groups
are fakes and whose tensors have shapes but no storage. What Megatron pads is thus padded here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ztrl.config.schema import Config, WorldConfig
from megatron_ztrl.trainer.cpu_compat import cuda_calls

cuda_calls.install()  # before the modules below bind what it replaces

from megatron.core import parallel_state, tensor_parallel  # noqa: E402

from megatron_ztrl.trainer import setup  # noqa: E402
from megatron_ztrl.trainer.model import build_chunks, wrap_chunks  # noqa: E402
from megatron_ztrl.trainer.topology import parallel_layout  # noqa: E402
from megatron_ztrl.weights.hf_mapping import Architecture, ParallelLayout  # noqa: E402

MAIN_WEIGHT_BYTES = 4
"""A float32 weight beside each one of lower precision."""
MOMENT_BYTES = 2 * 4
"""Adam's two float32 moments."""
_UNKNOWN_OPTIONS = ("use_precision_aware_optimizer", "optimizer_cpu_offload")


@dataclass(frozen=True, kw_only=True)
class StageStates:
    """What every rank of one pipeline stage holds between steps."""

    parameters: int
    """Of one tensor-parallel rank, vocabulary padding included."""
    weight_bytes: int
    gradient_bytes: int
    """0 for a world that is not trained."""
    optimizer_bytes_by_data_rank: tuple[int, ...]
    """The distributed optimizer cuts buffers, not parameters: padding makes the shares unequal."""

    @property
    def optimizer_bytes(self) -> int:
        """Of the data-parallel rank with the largest share."""
        return max(self.optimizer_bytes_by_data_rank)

    @property
    def total_bytes(self) -> int:
        """On the largest rank of the stage."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def exact_states(
    config: Config, world: WorldConfig, architecture: Architecture, trainable: bool
) -> list[StageStates]:
    """One entry per pipeline stage. Stages in the middle are alike, so only one of them is built.

    Raises:
        ValueError: an optimizer option whose memory this module does not know.
    """
    for option in _UNKNOWN_OPTIONS:
        if config.megatron.optimizer.get(option):
            raise ValueError(f"megatron.optimizer.{option}: the memory planner does not know its states")
    stages = parallel_layout(world).pipeline_size
    built = {
        stage: _build_stage(config, world, architecture, stage, trainable)
        for stage in {0, min(1, stages - 1), stages - 1}
    }
    return [built.get(stage) or built[1] for stage in range(stages)]


def _build_stage(
    config: Config, world: WorldConfig, architecture: Architecture, stage: int, trainable: bool
) -> StageStates:
    layout = parallel_layout(world)
    # FP8 is a matter of how layers compute; the layers here never do, and their local form has the same weights.
    options = {k: v for k, v in config.megatron.transformer.items() if not k.startswith("fp8")}
    config = replace(config, megatron=replace(config.megatron, transformer=options))
    with _fake_world(layout, rank=stage * layout.tensor_size * layout.replicas), _OnMeta():
        transformer = setup.transformer_config(config, world, architecture, "local")
        chunks = build_chunks(transformer, architecture, "local", world.max_tokens_per_microbatch)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        if transformer.bf16:
            for chunk in chunks:
                chunk.bfloat16()
        weight_bytes = sum(p.numel() * p.element_size() for p in parameters)
        count = sum(p.numel() for p in parameters)
        if not trainable:
            return StageStates(
                parameters=count,
                weight_bytes=weight_bytes,
                gradient_bytes=0,
                optimizer_bytes_by_data_rank=(0,) * layout.replicas,
            )
        ddp = setup.ddp_config(config)
        models = wrap_chunks(chunks, transformer, ddp)
        buffers = [b for model in models for b in model.buffers + model.expert_parallel_buffers]
        per_weight = MOMENT_BYTES + (MAIN_WEIGHT_BYTES if transformer.bf16 else 0)
        if ddp.use_distributed_optimizer:
            weight_bytes = sum(b.param_data.numel() * b.param_data.element_size() for b in buffers)
            shares = [
                sum(_shard_elements(b, rank, layout.replicas) for b in buffers)
                for rank in range(layout.replicas)
            ]
        else:
            shares = [count] * layout.replicas
        return StageStates(
            parameters=count,
            weight_bytes=weight_bytes,
            gradient_bytes=sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
            optimizer_bytes_by_data_rank=tuple(per_weight * share for share in shares),
        )


def _shard_elements(buffer: Any, data_rank: int, data_size: int) -> int:
    """Elements of parameters, and not of padding, in one rank's part of each bucket."""
    total = 0
    for start, end in buffer.bucket_indices:
        size = (end - start) // data_size
        low = start + data_rank * size
        total += sum(
            max(0, min(last, low + size) - max(first, low))
            for first, last, _ in buffer.param_index_map.values()
        )
    return total


@contextmanager
def _fake_world(layout: ParallelLayout, rank: int) -> Iterator[None]:
    """Megatron's groups as one rank sees them; collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            layout.tensor_size,
            layout.pipeline_size,
            virtual_pipeline_model_parallel_size=layout.virtual_size if layout.virtual_size > 1 else None,
            context_parallel_size=layout.context_size,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        yield
    finally:
        setup.destroy_distributed()


class _OnMeta(TorchFunctionMode):
    """Like ``torch.device("meta")``, and also where the code names another device, as Megatron does."""

    def __enter__(self) -> Any:
        self._default = torch.device("meta")
        self._default.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._default.__exit__(*exception)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
