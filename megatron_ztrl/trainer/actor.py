"""The policy's ranks: log-probs, and steps of the clipped policy loss."""

from __future__ import annotations

import numpy as np
import torch

from megatron_ztrl.config.schema import Config
from megatron_ztrl.data.packing import PackedBatch
from megatron_ztrl.trainer.rank import MegatronRank, one_sequence
from megatron_ztrl.trainer.step import LossSettings, accumulate_gradients, forward_logprobs
from megatron_ztrl.trainer.topology import read_architecture, resolve_checkpoint


class PolicyRank(MegatronRank):
    """One rank of a frozen policy. See ``MegatronRank`` for the arguments."""

    def __init__(
        self, config: Config, rank: int, world_size: int, init_method: str, *, trainable: bool = False
    ) -> None:
        source = resolve_checkpoint(config.model.path)
        super().__init__(
            config,
            config.actor,
            source,
            read_architecture(source),
            rank=rank,
            world_size=world_size,
            init_method=init_method,
            trainable=trainable,
        )

    def logprobs(self, batch: PackedBatch) -> list[np.ndarray] | None:
        """Log-probs of the trained tokens under the current weights.

        Returns:
            [T] float32 in nats for each microbatch of this replica, 0 at untrained positions; None on ranks
            that return nothing.
        """
        mine = batch.microbatches[self.dp_rank]
        results = forward_logprobs(
            self._models,
            self._to_device(mine),
            self._architecture.vocab_size,
            self._config.rollout.temperature,
        )
        return [logp_T.cpu().numpy() for logp_T in results[: len(mine)]] if self.is_output_rank else None

    def canary_logprobs(self, token_ids: list[int]) -> list[float] | None:
        """Log-prob of every token but the first, given those before it, at temperature 1.

        Returns:
            ``len(token_ids) - 1`` numbers in nats on output ranks, None elsewhere.
        """
        microbatches = self._to_device([one_sequence(token_ids, self._token_multiple)])
        results = forward_logprobs(self._models, microbatches, self._architecture.vocab_size, temperature=1.0)
        return results[0][: len(token_ids) - 1].tolist() if self.is_output_rank else None


class ActorRank(PolicyRank):
    """One rank of the policy that is trained. See ``MegatronRank`` for the arguments."""

    def __init__(self, config: Config, rank: int, world_size: int, init_method: str) -> None:
        swaps = config.algorithm.kl_coefficient > 0 and config.reference.placement == "actor"
        if swaps and config.megatron.transformer.get("fp8_param"):
            raise ValueError(
                "reference.placement: weights in FP8 (megatron.transformer.fp8_param) cannot be swapped; set it to"
                " world"
            )
        super().__init__(config, rank, world_size, init_method, trainable=True)
        self._loss_settings = LossSettings(
            vocab_size=self._architecture.vocab_size,
            temperature=config.rollout.temperature,
            clip_low=config.algorithm.clip_low,
            clip_high=config.algorithm.clip_high,
            kl_coefficient=config.algorithm.kl_coefficient,
        )
        self._first_weights: dict[str, torch.Tensor] = {}
        if swaps:
            self._first_weights = {
                name: self.parameter(name).to("cpu", copy=True) for name in self._parameters
            }

    def train_step(self, batch: PackedBatch, step: int) -> dict[str, float] | None:
        """One optimizer step on the clipped policy loss, averaged over the global batch's trained tokens.

        Args:
            batch: Carries ``old_logprobs`` and ``advantages`` in ``per_token``, ``reference_logprobs`` when
                the loss has a KL term, and ``importance_weights`` when it is weighted.
            step: Training steps before this one; sets the warm-up, which begins when the critic's has ended.

        Returns:
            Means over the global batch on the output rank of replica 0, None elsewhere.

        Raises:
            ValueError: The batch has no token to train.
        """
        statistics = self._train(
            batch,
            step - self._config.algorithm.critic_warmup_steps,
            lambda microbatches: accumulate_gradients(
                self._models, microbatches, batch.trained_tokens, self._loss_settings
            ),
            self._loss_settings.statistics,
        )
        return statistics and statistics | {"tokens": float(batch.trained_tokens)}

    @torch.no_grad()
    def reference_logprobs(self, batch: PackedBatch) -> list[np.ndarray] | None:
        """``logprobs`` under the weights that the run began with, which are swapped in for this pass."""
        current = {name: self.parameter(name).to("cpu", copy=True) for name in self._parameters}
        self._set_weights(self._first_weights)
        try:
            return self.logprobs(batch)
        finally:
            self._set_weights(current)

    def _set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            self.parameter(name).copy_(weight)  # in place: the parameters are views of Megatron's buffers
