"""The critic's ranks: values, and steps of the clipped value loss. Shape suffixes: see ``megatron_ztrl.trainer``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ztrl.algorithms.losses import value_loss
from megatron_ztrl.config.schema import Config
from megatron_ztrl.data.packing import PackedBatch
from megatron_ztrl.trainer.rank import MegatronRank
from megatron_ztrl.trainer.step import DeviceMicrobatch, global_means, run_schedule, scaled_loss
from megatron_ztrl.trainer.topology import critic_checkpoint, read_architecture

STATISTICS = ("loss", "clip_fraction", "squared_error")


class CriticRank(MegatronRank):
    """One rank of the critic. See ``MegatronRank`` for the arguments.

    Entry ``t`` of its values is of the state before token ``t + 1``: what the whole context up to and
    including position ``t`` is worth.
    """

    def __init__(self, config: Config, rank: int, world_size: int, init_method: str) -> None:
        source = critic_checkpoint(config)
        super().__init__(
            config,
            config.critic,
            source,
            replace(read_architecture(source), head="value"),
            rank=rank,
            world_size=world_size,
            init_method=init_method,
        )

    @torch.no_grad()
    def values(self, batch: PackedBatch) -> list[np.ndarray] | None:
        """Values at the predicting positions of the trained tokens.

        Returns:
            [T] float32 for each microbatch of this replica, 0 at untrained positions; None on ranks that
            return nothing.
        """

        def forward_step(
            iterator: Iterator[DeviceMicrobatch], model: Any
        ) -> tuple[Tensor, Callable[..., Tensor]]:
            mb = next(iterator)

            def scatter(value_N: Tensor, non_loss_data: bool) -> Tensor:
                return mb.spread(value_N.float())

            return mb.outputs(model), scatter

        mine = batch.microbatches[self.dp_rank]
        results = run_schedule(
            forward_step, self._models, self._to_device(mine), forward_only=True, collect_non_loss_data=True
        )
        return [value_T.cpu().numpy() for value_T in results[: len(mine)]] if self.is_output_rank else None

    def train_step(self, batch: PackedBatch, step: int) -> dict[str, float] | None:
        """One optimizer step on the value loss, averaged over the global batch's trained tokens.

        Args:
            batch: Carries ``old_values`` and ``returns`` in ``per_token``.
            step: Training steps before this one; sets the warm-up.

        Returns:
            Means over the global batch on the output rank of replica 0, None elsewhere.

        Raises:
            ValueError: The batch has no token to train.
        """
        return self._train(
            batch,
            step,
            lambda microbatches: self._accumulate_gradients(microbatches, batch.trained_tokens),
            STATISTICS,
        )

    def _accumulate_gradients(
        self, microbatches: list[DeviceMicrobatch], trained_tokens: int
    ) -> Tensor | None:
        def forward_step(
            iterator: Iterator[DeviceMicrobatch], model: Any
        ) -> tuple[Tensor, Callable[..., Any]]:
            mb = next(iterator)

            def loss(value_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                result = value_loss(
                    value_N,
                    mb.per_token_N["old_values"],
                    mb.per_token_N["returns"],
                    value_clip=self._config.critic.value_clip,
                )
                return scaled_loss(
                    result.loss_sum, trained_tokens, [result.clipped_sum, result.squared_error_sum]
                )

            return mb.outputs(model), loss

        return global_means(
            run_schedule(forward_step, self._models, microbatches, forward_only=False), trained_tokens
        )
