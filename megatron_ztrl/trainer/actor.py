"""One rank of the policy: the only class that the rest of the project calls in a Megatron process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from megatron_ztrl.config.schema import Config
from megatron_ztrl.data.packing import Microbatch, PackedBatch
from megatron_ztrl.trainer.cpu_compat import cuda_calls

cuda_calls.install()  # before the modules below bind what it replaces

from megatron_ztrl.trainer import checkpoint, setup  # noqa: E402
from megatron_ztrl.trainer.backend import choose_backend, device  # noqa: E402
from megatron_ztrl.trainer.export import export_hf  # noqa: E402
from megatron_ztrl.trainer.model import build_chunks, wrap_chunks  # noqa: E402
from megatron_ztrl.trainer.step import (  # noqa: E402
    STATISTICS,
    DeviceMicrobatch,
    LossSettings,
    accumulate_gradients,
    forward_logprobs,
)
from megatron_ztrl.trainer.topology import parallel_layout, read_architecture, resolve_checkpoint  # noqa: E402
from megatron_ztrl.types import TensorSlice  # noqa: E402
from megatron_ztrl.weights.hf_checkpoint import HFCheckpointReader, load_slices  # noqa: E402
from megatron_ztrl.weights.hf_mapping import megatron_slices  # noqa: E402


class ActorRank:
    """Model, optimizer and place in the world of one process. Every method is collective over all ranks.

    Args:
        config: The run's configuration; ``check_topology`` has accepted it.
        rank: Global rank in the policy's own world.
        world_size: Tensor times pipeline times data parallel size.
        init_method: Where the ranks meet, ``tcp://host:port`` or ``file:///path``.

    Raises:
        ValueError: The checkpoint, the backend or the world size does not fit the configuration.
    """

    def __init__(self, config: Config, rank: int, world_size: int, init_method: str) -> None:
        self._config = config
        self._layout = parallel_layout(config)
        if world_size != self._layout.world_size:
            raise ValueError(
                f"actor: the parallel sizes need {self._layout.world_size} ranks, not {world_size}"
            )
        self._place = self._layout.place(rank)
        self._source = resolve_checkpoint(config.model.path)
        self._architecture = read_architecture(self._source)
        self._backend = choose_backend(config.model.backend)
        setup.init_distributed(self._layout, rank, init_method, config.run.seed)
        self._slices = megatron_slices(self._architecture, self._layout, rank, backend=self._backend)
        transformer = setup.transformer_config(config, self._architecture, self._backend)
        self._chunks = build_chunks(
            transformer, self._architecture, self._backend, config.actor.max_tokens_per_microbatch
        )
        self._parameters: dict[str, Tensor] = {
            f"{index}.{name}" if len(self._chunks) > 1 else name: parameter
            for index, chunk in enumerate(self._chunks)
            for name, parameter in chunk.named_parameters()
        }
        load_slices(self._slices, self._parameters, HFCheckpointReader(self._source))
        ddp = setup.ddp_config(config)
        self._overlaps_param_gather = ddp.overlap_param_gather
        self._models = wrap_chunks(self._chunks, transformer, ddp)
        self._optimizer = setup.build_optimizer(config, self._models, ddp)
        transformer.grad_scale_func = self._optimizer.scale_loss
        self._loss_settings = LossSettings(
            vocab_size=self._architecture.vocab_size,
            temperature=config.rollout.temperature,
            clip_low=config.algorithm.clip_low,
            clip_high=config.algorithm.clip_high,
        )

    @property
    def dp_rank(self) -> int:
        """Which row of ``PackedBatch.microbatches`` this rank works on."""
        return self._place.data_rank

    @property
    def is_output_rank(self) -> bool:
        """Whether this is the one rank of its data-parallel replica that returns results."""
        return self._place.pipeline_rank == self._layout.pipeline_size - 1 and self._place.tensor_rank == 0

    def logprobs(self, batch: PackedBatch) -> list[np.ndarray] | None:
        """Log-probs of the trained tokens under the current weights.

        Returns:
            [T] float32 in nats for each microbatch of this replica, 0 at untrained positions; None on ranks
            that return nothing.
        """
        mine = batch.microbatches[self.dp_rank]
        settings = self._loss_settings
        results = forward_logprobs(
            self._models, self._to_device(mine), settings.vocab_size, settings.temperature
        )
        return [logp_T.cpu().numpy() for logp_T in results[: len(mine)]] if self.is_output_rank else None

    def train_step(self, batch: PackedBatch, step: int) -> dict[str, float] | None:
        """One optimizer step on the clipped policy loss, averaged over the global batch's trained tokens.

        Args:
            batch: Carries ``old_logprobs`` and ``advantages`` in ``per_token``.
            step: Optimizer steps done before this one; sets the warm-up.

        Returns:
            Means over the global batch on the output rank of replica 0, None elsewhere.

        Raises:
            ValueError: The batch has no token to train.
        """
        if batch.trained_tokens == 0:
            raise ValueError("the training batch has no token to train: every sample is masked")
        microbatches = self._to_device(batch.microbatches[self.dp_rank])
        for model in self._models:
            model.zero_grad_buffer()
        self._optimizer.zero_grad()
        means = accumulate_gradients(self._models, microbatches, batch.trained_tokens, self._loss_settings)
        learning_rate = self._set_learning_rate(step)
        _, grad_norm, _ = self._optimizer.step()
        if self._overlaps_param_gather:
            # The weights are published, or saved, before the next forward pass would gather them.
            for model in self._models:
                model.start_param_sync(force_sync=True)
        if means is None or not self.is_output_rank or self.dp_rank != 0:
            return None
        return dict(zip(STATISTICS, means.tolist(), strict=True)) | {
            "grad_norm": float(grad_norm),
            "learning_rate": learning_rate,
            "tokens": float(batch.trained_tokens),
        }

    def canary_logprobs(self, token_ids: list[int]) -> list[float] | None:
        """Log-prob of every token but the first, given those before it, at temperature 1.

        Returns:
            ``len(token_ids) - 1`` numbers in nats on output ranks, None elsewhere.
        """
        sequence = _one_sequence(token_ids, self._layout.tensor_size)
        microbatches = self._to_device([sequence])
        results = forward_logprobs(self._models, microbatches, self._architecture.vocab_size, temperature=1.0)
        return results[0][: len(token_ids) - 1].tolist() if self.is_output_rank else None

    def parameter_slices(self) -> list[TensorSlice]:
        """What this rank holds of which HF tensor."""
        return self._slices

    def parameter(self, name: str) -> Tensor:
        """This rank's part of a parameter, by ``TensorSlice.param``; not a copy."""
        return self._parameters[name].detach()

    def save_checkpoint(self, directory: str | Path) -> None:
        """Writes everything needed to resume; returns when all ranks have written."""
        checkpoint.save(Path(directory), self._chunks, self._optimizer, self._layout)

    def load_checkpoint(self, directory: str | Path) -> None:
        """Resumes from :meth:`save_checkpoint`, under this or another layout.

        Raises:
            ValueError: There is no complete checkpoint in ``directory``.
        """
        checkpoint.load(Path(directory), self._chunks, self._optimizer, self._layout)

    def export_hf(self, directory: str | Path) -> None:
        """Writes the current policy as a Hugging Face checkpoint, with the tokenizer of ``model.path``."""
        export_hf(
            Path(directory), self._source, self._parameters, self._architecture, self._layout, self._backend
        )

    def close(self) -> None:
        """Leaves the world; afterwards the process may join another."""
        setup.destroy_distributed()

    def _to_device(self, microbatches: list[Microbatch]) -> list[DeviceMicrobatch]:
        size = self._layout.tensor_size
        if self._config.actor.sequence_parallel:
            assert all(mb.input_ids_T.size % size == 0 for mb in microbatches), "T must divide by TP"
        if self._layout.virtual_size > 1:
            # The interleaved schedule wants a multiple of the pipeline stages.
            nothing = dict.fromkeys(microbatches[0].per_token, np.zeros(size, dtype=np.float32))
            idle = replace(_one_sequence([0], size), per_token=nothing)
            microbatches = microbatches + [idle] * (-len(microbatches) % self._layout.pipeline_size)
        return [DeviceMicrobatch.of(mb, self._backend, device()) for mb in microbatches]

    def _set_learning_rate(self, step: int) -> float:
        actor = self._config.actor
        rate = actor.learning_rate * min(1.0, (step + 1) / max(1, actor.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = actor.weight_decay * group.get("wd_mult", 1.0)  # 0 for norms and biases
        return rate


def _one_sequence(token_ids: list[int], pad_to_multiple: int) -> Microbatch:
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
