"""What every rank of a Megatron world has: its place, its part of a model, and an optimizer if it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from megatron_ztrl.config.schema import Config, WorldConfig
from megatron_ztrl.data.packing import Microbatch, PackedBatch, token_multiple
from megatron_ztrl.trainer.cpu_compat import cuda_calls

cuda_calls.install()  # before the modules below bind what it replaces

from megatron_ztrl.trainer import checkpoint, fp8_weights, setup  # noqa: E402
from megatron_ztrl.trainer.backend import choose_backend, device  # noqa: E402
from megatron_ztrl.trainer.context import ContextPart  # noqa: E402
from megatron_ztrl.trainer.export import export_hf  # noqa: E402
from megatron_ztrl.trainer.integrity import FileRecord  # noqa: E402
from megatron_ztrl.trainer.model import build_chunks, wrap_chunks, wrap_precision  # noqa: E402
from megatron_ztrl.trainer.shard_writer import PendingSave  # noqa: E402
from megatron_ztrl.trainer.step import DeviceMicrobatch  # noqa: E402
from megatron_ztrl.trainer.topology import parallel_layout, read_architecture  # noqa: E402
from megatron_ztrl.types import TensorSlice  # noqa: E402
from megatron_ztrl.weights.hf_checkpoint import HFCheckpointReader, load_slices  # noqa: E402
from megatron_ztrl.weights.hf_mapping import VALUE_HEAD, Architecture, megatron_slices  # noqa: E402


class MegatronRank:
    """Model, optimizer and place in the world of one process. Every method is collective over all ranks.

    Args:
        config: The run's configuration; ``check_topology`` has accepted it.
        world: The section that lays this world out.
        source: HF checkpoint with the first weights.
        architecture: Of the model; its head may differ from the checkpoint's, and then starts at zero.
        rank: Global rank in this world.
        world_size: Tensor times pipeline times data times context parallel size.
        init_method: Where the ranks meet, ``tcp://host:port`` or ``file:///path``.
        trainable: False builds no optimizer, and no gradient buffers.

    Raises:
        ValueError: The checkpoint, the backend or the world size does not fit the configuration.
    """

    def __init__(
        self,
        config: Config,
        world: WorldConfig,
        source: Path,
        architecture: Architecture,
        *,
        rank: int,
        world_size: int,
        init_method: str,
        trainable: bool = True,
    ) -> None:
        self._config = config
        self._world = world
        self._layout = parallel_layout(world)
        if world_size != self._layout.world_size:
            raise ValueError(f"the parallel sizes need {self._layout.world_size} ranks, not {world_size}")
        self._place = self._layout.place(rank)
        self._source = source
        self._architecture = architecture
        self._token_multiple = token_multiple(world, config.megatron.transformer)
        self._pending_save: PendingSave | None = None
        self._backend = choose_backend(config.model.backend, config.model.dtype)
        setup.init_distributed(self._layout, rank, init_method, config.run.seed)
        self._slices = megatron_slices(architecture, self._layout, rank, backend=self._backend)
        transformer = setup.transformer_config(config, world, architecture, self._backend)
        self._chunks = build_chunks(transformer, architecture, self._backend, world.max_tokens_per_microbatch)
        self._parameters: dict[str, Tensor] = {
            f"{index}.{name}" if len(self._chunks) > 1 else name: parameter
            for index, chunk in enumerate(self._chunks)
            for name, parameter in chunk.named_parameters()
        }
        head_is_new = architecture.head != read_architecture(source).head
        staged = fp8_weights.staging(self._parameters)
        load_slices(
            [piece for piece in self._slices if not (head_is_new and piece.tensor.startswith(VALUE_HEAD))],
            staged,
            HFCheckpointReader(source),
        )
        fp8_weights.take_over(self._parameters, staged, trainable=trainable)
        if not trainable:
            self._models = wrap_precision(self._chunks, transformer)
            return
        ddp = setup.ddp_config(config)
        self._overlaps_param_gather = ddp.overlap_param_gather
        self._models = wrap_chunks(self._chunks, transformer, ddp)
        self._optimizer = setup.build_optimizer(config, world, self._models, ddp)
        transformer.grad_scale_func = self._optimizer.scale_loss

    @property
    def dp_rank(self) -> int:
        """Which row of ``PackedBatch.microbatches`` this rank works on."""
        return self._place.data_rank

    @property
    def is_output_rank(self) -> bool:
        """Whether this is the one rank of its data-parallel replica that returns results."""
        place = self._place
        is_last_stage = place.pipeline_rank == self._layout.pipeline_size - 1
        return is_last_stage and place.tensor_rank == 0 and place.context_rank == 0

    def parameter_slices(self) -> list[TensorSlice]:
        """What this rank holds of which HF tensor."""
        return self._slices

    def parameter(self, name: str) -> Tensor:
        """This rank's part of a parameter, by ``TensorSlice.param``; a copy only if it is kept in FP8."""
        return fp8_weights.plain(self._parameters[name])

    def save_checkpoint(self, directory: str | Path) -> None:
        """Begins to write everything needed to resume; training may go on when this returns."""
        assert self._pending_save is None, "finish_checkpoint() ends a save before the next begins"
        self._pending_save = checkpoint.save(
            Path(directory), self._chunks, self._optimizer, self._layout, self._architecture, self._source
        )

    def checkpoint_written(self) -> bool:
        """Whether ``finish_checkpoint`` would return without waiting for this rank. Not collective.

        Raises:
            OSError: The files could not be written.
        """
        assert self._pending_save is not None
        return self._pending_save.written()

    def finish_checkpoint(self) -> dict[str, FileRecord]:
        """Waits for the files of ``save_checkpoint``, and completes the checkpoint.

        Returns:
            The files that this rank wrote, by name.

        Raises:
            OSError: They could not be written.
        """
        assert self._pending_save is not None
        records = self._pending_save.finish()
        self._pending_save = None
        return records

    def load_checkpoint(self, directory: str | Path) -> None:
        """Resumes from :meth:`save_checkpoint`, under this or another layout.

        Raises:
            ValueError: There is no complete checkpoint in ``directory``, or it is of another model.
        """
        checkpoint.load(Path(directory), self._chunks, self._optimizer, self._layout, self._architecture)

    def export_hf(self, directory: str | Path) -> None:
        """Writes the current weights as a Hugging Face checkpoint, with the tokenizer of the first ones."""
        export_hf(
            Path(directory), self._source, self.parameter, self._architecture, self._layout, self._backend
        )

    def close(self) -> None:
        """Leaves the world; afterwards the process may join another."""
        setup.destroy_distributed()

    def _train(
        self,
        batch: PackedBatch,
        step: int,
        accumulate_gradients: Callable[[list[DeviceMicrobatch]], Tensor | None],
        names: Sequence[str],
    ) -> dict[str, float] | None:
        """Gradients of this replica's microbatches into cleared buffers, then one step of the optimizer.

        Args:
            batch: The global batch.
            step: Training steps of this model before this one; sets the warm-up.
            accumulate_gradients: Runs all microbatches, and returns the global means of what it counted.
            names: Of those means.

        Returns:
            The means, norm of the gradient and learning rate on the output rank of replica 0, None elsewhere.

        Raises:
            ValueError: The batch has no token to train.
        """
        if batch.trained_tokens == 0:
            raise ValueError("the training batch has no token to train: every sample is masked")
        microbatches = self._to_device(batch.microbatches[self.dp_rank])
        for model in self._models:
            model.zero_grad_buffer()
        self._optimizer.zero_grad()
        means = accumulate_gradients(microbatches)
        learning_rate = self._set_learning_rate(step)
        _, grad_norm, _ = self._optimizer.step()
        if self._overlaps_param_gather:
            # The weights are published, or saved, before the next forward pass would gather them.
            for model in self._models:
                model.start_param_sync(force_sync=True)
        if means is None or not self.is_output_rank or self.dp_rank != 0:
            return None
        update = {"grad_norm": float(grad_norm), "learning_rate": learning_rate}
        return dict(zip(names, means.tolist(), strict=True)) | update

    def _set_learning_rate(self, step: int) -> float:
        world = self._world
        rate = world.learning_rate * min(1.0, (step + 1) / max(1, world.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = world.weight_decay * group.get("wd_mult", 1.0)  # 0 for norms and biases
        return rate

    def _to_device(self, microbatches: list[Microbatch]) -> list[DeviceMicrobatch]:
        size = self._token_multiple
        assert all(mb.input_ids_T.size % size == 0 for mb in microbatches), f"T must be a multiple of {size}"
        if self._layout.virtual_size > 1:
            # The interleaved schedule wants a multiple of the pipeline stages.
            nothing = dict.fromkeys(microbatches[0].per_token, np.zeros(size, dtype=np.float32))
            idle = replace(one_sequence([0], size), per_token=nothing)
            microbatches = microbatches + [idle] * (-len(microbatches) % self._layout.pipeline_size)
        return [DeviceMicrobatch.of(mb, self._backend, device(), self._part(mb)) for mb in microbatches]

    def _part(self, microbatch: Microbatch) -> ContextPart | None:
        size = self._layout.context_size
        if size == 1:
            return None
        return ContextPart.of(
            microbatch.cu_seqlens, size=size, rank=self._place.context_rank, multiple=self._token_multiple
        )


def one_sequence(token_ids: list[int], pad_to_multiple: int) -> Microbatch:
    """A microbatch that predicts every token of one sequence but the first."""
    length = len(token_ids)
    padding = -length % pad_to_multiple
    cu_seqlens = [0, length, length + padding] if padding else [0, length]
    return Microbatch(
        sample_indices=[0],
        cu_seqlens=np.array(cu_seqlens, dtype=np.int32),
        input_ids_T=np.array(token_ids + [0] * padding, dtype=np.int64),
        position_ids_T=np.concatenate([np.arange(length), np.arange(padding)]),
        target_ids_T=np.array(token_ids[1:] + [0] * (1 + padding), dtype=np.int64),
        loss_mask_T=np.arange(length + padding) < length - 1,
    )
