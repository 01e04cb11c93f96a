"""One pass of the policy over packed microbatches: log-probs only, or gradients of its loss.

Shape suffixes: see ``megatron_ztrl.trainer``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ztrl.algorithms.losses import kl_penalty, ppo_clip_loss
from megatron_ztrl.data.packing import Microbatch
from megatron_ztrl.trainer.context import PADDING, ContextPart
from megatron_ztrl.trainer.cpu_compat.attention import BlockedSeqParams, Share, plan_blocks
from megatron_ztrl.weights.hf_mapping import Backend


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What the policy loss needs besides the batch."""

    vocab_size: int
    temperature: float
    """Logits are divided by this, as they were when the tokens were sampled."""
    clip_low: float
    clip_high: float
    kl_coefficient: float

    @property
    def statistics(self) -> tuple[str, ...]:
        """What ``accumulate_gradients`` reports."""
        names = ("loss", "entropy", "clip_fraction", "approx_kl", "mean_ratio")
        return (*names, "reference_kl") if self.kl_coefficient else names


@dataclass(frozen=True, kw_only=True)
class DeviceMicrobatch:
    """This rank's tokens of a microbatch as tensors, with the trained positions picked out.

    Without context parallelism that is the whole microbatch.
    """

    input_ids: Tensor
    """[1, T]"""
    position_ids: Tensor
    """[1, T]"""
    selected_N: Tensor
    """Trained positions among this rank's tokens."""
    origin_N: Tensor
    """The same positions in the microbatch."""
    microbatch_tokens: int
    is_shared: bool
    """Whether other ranks have tokens of the microbatch, too."""
    targets_N: Tensor
    per_token_N: dict[str, Tensor]
    packed_seq_params: PackedSeqParams

    @classmethod
    def of(
        cls, mb: Microbatch, backend: Backend, device: torch.device, part: ContextPart | None = None
    ) -> DeviceMicrobatch:
        """Moves a microbatch to the device, or the part of it that a context-parallel rank works on."""
        tokens = mb.input_ids_T.size
        source_T, cu_seqlens = np.arange(tokens), mb.cu_seqlens
        if part is not None:
            source_T, cu_seqlens = part.source_T, part.cu_seqlens
        real_T = source_T != PADDING
        selected = np.flatnonzero(real_T & mb.loss_mask_T[source_T])
        origin = source_T[selected]

        # Arrays that came through Ray's object store are read-only, which torch.from_numpy does not accept.
        def move(array: np.ndarray) -> Tensor:
            return torch.tensor(array, device=device)

        longest = int(np.diff(cu_seqlens).max())
        starts = move(cu_seqlens.astype(np.int32))
        fields: dict[str, Any] = {
            "qkv_format": "thd",
            "cu_seqlens_q": starts,
            "cu_seqlens_kv": starts,
            "max_seqlen_q": longest,
            "max_seqlen_kv": longest,
        }
        if backend == "te":
            params = PackedSeqParams(**fields)
        else:
            params = BlockedSeqParams(
                **fields,
                blocks=plan_blocks(cu_seqlens.tolist(), device),
                share=None if part is None else Share(move(part.order_P), move(part.placed_T)),
            )
        return cls(
            input_ids=move(np.where(real_T, mb.input_ids_T[source_T], 0))[None],
            position_ids=move(np.where(real_T, mb.position_ids_T[source_T], 0))[None],
            selected_N=move(selected),
            origin_N=move(origin),
            microbatch_tokens=tokens,
            is_shared=part is not None,
            targets_N=move(mb.target_ids_T[origin]),
            per_token_N={name: move(array[origin]) for name, array in mb.per_token.items()},
            packed_seq_params=params,
        )

    def spread(self, values_N: Tensor) -> Tensor:
        """Values at the trained positions of all ranks' tokens -> [T] of the microbatch, 0 elsewhere.

        Collective over the context-parallel ranks.
        """
        values_T = values_N.new_zeros(self.microbatch_tokens).index_copy_(0, self.origin_N, values_N)
        if self.is_shared:
            torch.distributed.all_reduce(values_T, group=parallel_state.get_context_parallel_group())
        return values_T

    def outputs(self, model: Any, **head_inputs: Any) -> Tensor:
        """What the model's head says of the selected positions; hidden states before the last stage."""
        return model(
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            packed_seq_params=self.packed_seq_params,
            selected_N=self.selected_N,
            **head_inputs,
        )

    def logprobs(self, model: Any, vocab_size: int, temperature: float) -> Tensor:
        """[2, N] log-probs of the targets, and entropies; hidden states before the last stage."""
        return self.outputs(model, targets_N=self.targets_N, vocab_size=vocab_size, temperature=temperature)


@torch.no_grad()
def forward_logprobs(
    models: list[Any], microbatches: list[DeviceMicrobatch], vocab_size: int, temperature: float
) -> list[Tensor]:
    """Log-probs of the trained tokens.

    Returns:
        One [T] float32 tensor per microbatch, 0 at untrained positions; an empty list before the last stage.
    """

    def forward_step(
        iterator: Iterator[DeviceMicrobatch], model: Any
    ) -> tuple[Tensor, Callable[..., Tensor]]:
        mb = next(iterator)

        def scatter(logp_and_entropy_2N: Tensor, non_loss_data: bool) -> Tensor:
            logp_N, _ = logp_and_entropy_2N
            return mb.spread(logp_N)

        return mb.logprobs(model, vocab_size, temperature), scatter

    return run_schedule(forward_step, models, microbatches, forward_only=True, collect_non_loss_data=True)


def accumulate_gradients(
    models: list[Any], microbatches: list[DeviceMicrobatch], trained_tokens: int, settings: LossSettings
) -> Tensor | None:
    """Forward and backward of the clipped policy loss; leaves reduced gradients in the models' buffers.

    Args:
        trained_tokens: Trained tokens of the global batch. The loss is divided by it, so that every token
            weighs the same however the batch is cut into ranks and microbatches.

    Returns:
        Means over the global batch, in the order of ``settings.statistics``; None before the last stage.
    """

    def forward_step(iterator: Iterator[DeviceMicrobatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        mb = next(iterator)

        def loss(logp_and_entropy_2N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logp_N, entropy_N = logp_and_entropy_2N
            policy = ppo_clip_loss(
                logp_N,
                mb.per_token_N["old_logprobs"],
                mb.per_token_N["advantages"],
                torch.ones_like(mb.targets_N, dtype=torch.bool),
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
                weights_T=mb.per_token_N.get("importance_weights"),
            )
            loss_sum = policy.loss_sum
            sums = [entropy_N.detach().sum(), policy.clipped_sum, policy.kl_sum, policy.ratio_sum]
            if settings.kl_coefficient:
                kl_sum = kl_penalty(logp_N, mb.per_token_N["reference_logprobs"])
                loss_sum = loss_sum + settings.kl_coefficient * kl_sum
                sums.append(kl_sum.detach())
            return scaled_loss(loss_sum, trained_tokens, sums)

        return mb.logprobs(model, settings.vocab_size, settings.temperature), loss

    return global_means(run_schedule(forward_step, models, microbatches, forward_only=False), trained_tokens)


def scaled_loss(loss_sum: Tensor, trained_tokens: int, sums: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a loss function returns to the schedule: the loss to differentiate, and sums to report with it."""
    # With three results the schedule leaves the loss as it is; it ignores the second here.
    return (
        loss_sum / trained_tokens,
        torch.zeros((), dtype=torch.int),
        torch.stack([loss_sum.detach(), *sums]),
    )


def global_means(sums: list[Tensor], trained_tokens: int) -> Tensor | None:
    """Means over the global batch from the sums of this replica's microbatches; None before the last stage."""
    if not sums:
        return None
    means = torch.stack(sums).sum(0) / trained_tokens
    torch.distributed.all_reduce(
        means, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    return means


def run_schedule(
    forward_step: Callable[..., Any], models: list[Any], microbatches: list[DeviceMicrobatch], **options: Any
) -> list[Any]:
    """Megatron's pipeline schedule for this layout; returns what the last stage collected."""
    several = len(models) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in models] if several else iter(microbatches),
        model=models if several else models[0],
        num_microbatches=len(microbatches),
        seq_length=microbatches[0].input_ids.shape[1],  # the pipeline announces each microbatch's own length
        micro_batch_size=1,
        **options,
    )
