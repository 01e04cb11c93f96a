"""Megatron's GPT model with a head that looks at trained tokens only: the policy's, or the critic's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ztrl.trainer.backend import block_spec, device
from megatron_ztrl.trainer.logprobs import linear_logprobs
from megatron_ztrl.weights.hf_mapping import Architecture, Backend


class _SelectiveModel(GPTModel):
    """``GPTModel`` whose head is applied at selected positions.

    Prompt and tool tokens are not trained, and the vocabulary projection is the largest matrix product of a
    small model: leaving them out saves its time, and its activations.
    """

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        packed_seq_params: PackedSeqParams,
        selected_N: Tensor,
        **head_inputs: Any,
    ) -> Tensor:
        """One packed microbatch.

        Args:
            input_ids: [1, T]
            position_ids: [1, T]
            packed_seq_params: Where the sequences lie.
            selected_N: [N] Positions whose next token is trained.
            **head_inputs: Keyword arguments of ``head``.

        Returns:
            What ``head`` returns on the last pipeline stage, [T, 1, H] hidden states before it.
        """
        return super().forward(
            input_ids,
            position_ids,
            attention_mask=None,
            packed_seq_params=packed_seq_params,
            loss_mask=(selected_N, head_inputs),  # the argument that reaches _postprocess untouched
        )

    def _postprocess(
        self, hidden_states: Tensor, *, loss_mask: tuple[Tensor, dict[str, Any]], **_: Any
    ) -> Tensor:
        if not self.post_process:
            return hidden_states
        selected_N, head_inputs = loss_mask
        if self.config.sequence_parallel:
            # All tensor-parallel ranks get the whole gradient of these rows, so here it is only split again:
            # linear_logprobs' backward sums it, and the value head computes it alike on each.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        return self.head(hidden_states[:, 0].index_select(0, selected_N), **head_inputs)

    def head(self, hidden_NH: Tensor, **inputs: Any) -> Tensor:
        """The output at the selected positions."""
        raise NotImplementedError


class PolicyModel(_SelectiveModel):
    """Language-model head: [2, N] log-probs of given tokens, and entropies (detached)."""

    def head(  # type: ignore[override]
        self, hidden_NH: Tensor, *, targets_N: Tensor, vocab_size: int, temperature: float
    ) -> Tensor:
        """See ``linear_logprobs`` for the arguments."""
        # The output layer only holds the weight: its forward pass would make all logits at once. Its forward
        # hook, in which DDP waits for an overlapped gather, is not missed: MegatronRank gathers after each step.
        weight_VH = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return torch.stack(
            linear_logprobs(
                hidden_NH,
                weight_VH,
                targets_N,
                vocab_size=vocab_size,
                temperature=temperature,
                group=self.pg_collection.tp,
            )
        )


class ValueModel(_SelectiveModel):
    """Value head, alike on all tensor-parallel ranks: [N] values. It starts at 0 everywhere."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer = torch.nn.Linear(
                self.config.hidden_size, 1, dtype=self.config.params_dtype, device=device()
            )
            torch.nn.init.zeros_(self.output_layer.weight)
            torch.nn.init.zeros_(self.output_layer.bias)

    def head(self, hidden_NH: Tensor) -> Tensor:  # type: ignore[override]
        # In float32: near 1, bfloat16 has a number every 0.004, which is a step of the policy's advantages.
        layer = self.output_layer
        return F.linear(hidden_NH.float(), layer.weight.float(), layer.bias.float())[:, 0]


def build_chunks(
    config: TransformerConfig, architecture: Architecture, backend: Backend, max_sequence_length: int
) -> list[GPTModel]:
    """This rank's model chunks, with uninitialised weights: one, or several under an interleaved schedule."""
    virtual_size = config.virtual_pipeline_model_parallel_size
    stages: list[int | None] = list(range(virtual_size)) if virtual_size else [None]
    is_policy = architecture.head == "language"
    return [
        (PolicyModel if is_policy else ValueModel)(
            config,
            block_spec(config, backend, stage),
            vocab_size=architecture.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=architecture.tied_embeddings and is_policy,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            rope_scaling=architecture.rope_scaling_factor is not None,
            rope_scaling_factor=architecture.rope_scaling_factor or 8.0,
            vp_stage=stage,
        )
        for stage in stages
    ]


def wrap_precision(chunks: list[GPTModel], config: TransformerConfig) -> list[Any]:
    """Makes the chunks take and return float32 where they compute in bfloat16."""
    return [Float16Module(config, chunk) for chunk in chunks] if config.bf16 else list(chunks)


def wrap_chunks(
    chunks: list[GPTModel], config: TransformerConfig, ddp_config: DistributedDataParallelConfig
) -> list[DistributedDataParallel]:
    """Adds mixed precision and data parallelism, and tells the schedule how to defer gradient reduction."""
    models = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(wrap_precision(chunks, config))
    ]
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = [m.no_sync for m in models] if len(models) > 1 else models[0].no_sync
    return models
