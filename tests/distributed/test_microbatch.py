"""What a rank gets of a microbatch when context-parallel ranks share it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_ztrl.trainer.cpu_compat import cuda_calls

cuda_calls.install()

from random_policies import samples  # noqa: E402

from megatron_ztrl.data.packing import Microbatch, pack, with_per_token  # noqa: E402
from megatron_ztrl.trainer.context import ContextPart  # noqa: E402
from megatron_ztrl.trainer.step import DeviceMicrobatch  # noqa: E402

SIZE = 3


def packed() -> Microbatch:
    batch = pack(samples(), max_tokens_per_microbatch=1000, data_parallel_size=1)
    values = np.random.default_rng(0).normal(size=batch.microbatches[0][0].input_ids_T.size)
    return with_per_token(batch, "advantages", [[values]]).microbatches[0][0]


def shared(mb: Microbatch, backend: str) -> list[DeviceMicrobatch]:
    parts = [ContextPart.of(mb.cu_seqlens, size=SIZE, rank=rank, multiple=2) for rank in range(SIZE)]
    return [DeviceMicrobatch.of(mb, backend, torch.device("cpu"), part) for part in parts]


@pytest.mark.parametrize("backend", ["te", "local"])
def test_every_trained_token_is_on_one_rank_with_its_target_and_values(backend: str) -> None:
    mb = packed()
    ranks = shared(mb, backend)
    origins = torch.cat([rank.origin_N for rank in ranks])
    assert sorted(origins.tolist()) == np.flatnonzero(mb.loss_mask_T).tolist()
    for rank in ranks:
        # The token that a position predicts is often on another rank; its id came along.
        assert rank.input_ids[0, rank.selected_N].tolist() == mb.input_ids_T[rank.origin_N].tolist()
        assert rank.targets_N.tolist() == mb.input_ids_T[rank.origin_N + 1].tolist()
        assert rank.position_ids[0, rank.selected_N].tolist() == mb.position_ids_T[rank.origin_N].tolist()
        expected = mb.per_token["advantages"][rank.origin_N]
        assert rank.per_token_N["advantages"].numpy() == pytest.approx(expected)


def test_attention_is_told_of_whole_padded_sequences() -> None:
    (rank, *_) = shared(packed(), "te")
    params = rank.packed_seq_params
    lengths = params.cu_seqlens_q.diff()
    assert type(params).__name__ == "PackedSeqParams" and params.qkv_format == "thd"
    assert (lengths % (2 * SIZE) == 0).all() and params.max_seqlen_q == lengths.max()
    assert params.cu_seqlens_q[-1] == SIZE * rank.input_ids.shape[1]


def test_a_microbatch_that_is_not_shared_is_left_as_it_is() -> None:
    mb = packed()
    whole = DeviceMicrobatch.of(mb, "te", torch.device("cpu"))
    assert whole.input_ids[0].tolist() == mb.input_ids_T.tolist()
    assert torch.equal(whole.selected_N, whole.origin_N)
    spread_T = whole.spread(whole.per_token_N["advantages"])
    assert spread_T.numpy() == pytest.approx(mb.per_token["advantages"])
