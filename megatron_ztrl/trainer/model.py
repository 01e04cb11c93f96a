"""The policy: Megatron's GPT model with a language-model head that looks at trained tokens only."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ztrl.trainer.backend import block_spec
from megatron_ztrl.weights.hf_mapping import Architecture, Backend


class PolicyModel(GPTModel):
    """``GPTModel`` that computes logits only at selected positions.

    Prompt and tool tokens are not trained, and the vocabulary projection is the largest matrix product of a
    small model: leaving them out saves its time, and its activations.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            # Under sequence parallelism rows are gathered before the selection, so not again by the layer.
            self.output_layer.sequence_parallel = False

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, packed_seq_params: PackedSeqParams, selected_N: Tensor
    ) -> Tensor:
        """One packed microbatch.

        Args:
            input_ids: [1, T]
            position_ids: [1, T]
            packed_seq_params: Where the sequences lie.
            selected_N: [N] Positions whose next token is trained.

        Returns:
            [N, V] logits on the last pipeline stage, [T, 1, H] hidden states before it.
        """
        return super().forward(
            input_ids,
            position_ids,
            attention_mask=None,
            packed_seq_params=packed_seq_params,
            loss_mask=selected_N,
        )

    def _postprocess(self, hidden_states: Tensor, *, loss_mask: Tensor, **_: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # The head's own backward sums over tensor-parallel ranks; here the gradient is only split again.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        logits, _bias = self.output_layer(hidden_states.index_select(0, loss_mask), weight=weight)
        return logits[:, 0]


def build_chunks(
    config: TransformerConfig, architecture: Architecture, backend: Backend, max_sequence_length: int
) -> list[PolicyModel]:
    """This rank's model chunks, with uninitialised weights: one, or several under an interleaved schedule."""
    virtual_size = config.virtual_pipeline_model_parallel_size
    stages: list[int | None] = list(range(virtual_size)) if virtual_size else [None]
    return [
        PolicyModel(
            config,
            block_spec(config, backend, stage),
            vocab_size=architecture.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            rope_scaling=architecture.rope_scaling_factor is not None,
            rope_scaling_factor=architecture.rope_scaling_factor or 8.0,
            vp_stage=stage,
        )
        for stage in stages
    ]


def wrap_chunks(
    chunks: list[PolicyModel], config: TransformerConfig, ddp_config: DistributedDataParallelConfig
) -> list[DistributedDataParallel]:
    """Adds mixed precision and data parallelism, and tells the schedule how to defer gradient reduction."""
    wrapped: list[Any] = [Float16Module(config, chunk) for chunk in chunks] if config.bf16 else list(chunks)
    models = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(wrapped)
    ]
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = [m.no_sync for m in models] if len(models) > 1 else models[0].no_sync
    return models
