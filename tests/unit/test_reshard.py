"""The reshard plan, on layouts small enough to work out by hand, and on real ones by moving numbered rows."""

import numpy as np
import pytest
import torch

from megatron_ztrl.engines.parameters import engine_slices
from megatron_ztrl.engines.weight_group import Piece, buckets
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.hf_mapping import Architecture, ParallelLayout, hf_tensor_shapes, megatron_slices
from megatron_ztrl.weights.reshard import Transfer, plan

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 294,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def rows(param, tensor, start, tensor_start, length, dim=0):
    return TensorSlice(
        param=param, tensor=tensor, dim=dim, start=start, tensor_start=tensor_start, length=length
    )


def move(transfers, sources, targets):
    """Carry out a plan on numpy arrays: what the two ends do over the network."""
    for t in transfers:
        source = sources[t.source][t.source_param]
        target = targets[t.target][t.target_param]
        block = source.take(range(t.source_start, t.source_start + t.length), axis=t.dim)
        index = [slice(None)] * target.ndim
        index[t.dim] = slice(t.target_start, t.target_start + t.length)
        assert np.isnan(target[tuple(index)]).all(), f"{t.target_param} filled twice"
        target[tuple(index)] = block


def local_parameters(slices, tensors):
    """The arrays a rank holds, cut from the full tensors as its slices say."""
    parameters = {}
    for item in slices:
        parts = [other for other in slices if other.param == item.param]
        shape = list(tensors[item.tensor].shape)
        shape[item.dim] = max(other.start + other.length for other in parts)
        parameter = parameters.setdefault(item.param, np.full(shape, np.nan))
        index = [slice(None)] * parameter.ndim
        index[item.dim] = slice(item.start, item.start + item.length)
        parameter[tuple(index)] = tensors[item.tensor].take(
            range(item.tensor_start, item.tensor_start + item.length), axis=item.dim
        )
    return parameters


def test_two_halves_fill_a_fused_parameter_in_two_transfers():
    senders = [[rows("a", "w", 0, 0, 4)], [rows("b", "w", 10, 4, 4)]]
    receivers = [[rows("fused", "w", 6, 2, 5)]]  # rows 2..6 of w
    common = {"target": 0, "tensor": "w", "dim": 0, "target_param": "fused"}
    assert plan(senders, receivers) == [
        Transfer(source=0, source_param="a", source_start=2, target_start=6, length=2, **common),
        Transfer(source=1, source_param="b", source_start=10, target_start=8, length=3, **common),
    ]


def test_replicas_share_the_sending():
    names = [f"w{i}" for i in range(8)]
    sender = [rows(name, name, 0, 0, 6) for name in names]
    transfers = plan([sender] * 4, [sender] * 2)
    assert len(transfers) == 16
    assert [sum(t.length for t in transfers if t.source == source) for source in range(4)] == [24, 24, 24, 24]


def test_a_row_that_nobody_holds_is_named():
    with pytest.raises(ValueError, match="w: no trainer rank holds row 3 that engine rank 1 needs"):
        plan([[rows("a", "w", 0, 0, 3)]], [[rows("b", "w", 0, 0, 3)], [rows("b", "w", 0, 2, 3)]])


def test_a_row_that_would_be_filled_twice_is_named():
    with pytest.raises(ValueError, match="v: engine rank 0 fills row 2 of b twice"):
        plan(
            [[rows("a", "w", 0, 0, 8), rows("c", "v", 0, 0, 8)]],
            [[rows("b", "w", 0, 0, 3), rows("b", "v", 2, 0, 3)]],
        )


def test_ends_that_cut_along_different_dimensions_are_refused():
    with pytest.raises(ValueError, match="w: the trainer cuts it along dimension 1, the engine along 0"):
        plan([[rows("a", "w", 0, 0, 4, dim=1)]], [[rows("b", "w", 0, 0, 4)]])


def test_vocabulary_padding_on_the_trainers_side_stays_there():
    padded = [[rows("a", "w", 0, 0, 64)], [rows("a", "w", 0, 64, 64)]]  # 128 rows for a vocabulary of 100
    transfers = plan(padded, [[rows("b", "w", 0, 0, 100)]])
    assert [(t.source, t.length) for t in transfers] == [(0, 64), (1, 36)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize(("tensor", "pipeline", "data", "engine"), [(1, 1, 1, 2), (2, 2, 2, 1), (4, 1, 1, 2)])
def test_every_engine_row_gets_the_number_of_its_hugging_face_row(tensor, pipeline, data, engine, name, tied):
    config = {**CONFIG, "architectures": [name], "tie_word_embeddings": tied}
    architecture = Architecture.from_hf_config(config)
    rng = np.random.default_rng(0)
    tensors = {key: rng.random(shape) for key, shape in hf_tensor_shapes(architecture).items()}
    layout = ParallelLayout(tensor_size=tensor, pipeline_size=pipeline, data_size=data)
    senders = [megatron_slices(architecture, layout, rank, backend="te") for rank in range(layout.world_size)]
    receivers = [engine_slices(config, engine, rank) for rank in range(engine)]

    targets = [local_parameters(slices, tensors) for slices in receivers]
    expected = [{key: value.copy() for key, value in target.items()} for target in targets]
    for target in targets:
        for parameter in target.values():
            parameter[:] = np.nan
    move(plan(senders, receivers), [local_parameters(slices, tensors) for slices in senders], targets)
    for target, wanted in zip(targets, expected, strict=True):
        for key in wanted:
            np.testing.assert_array_equal(target[key], wanted[key], err_msg=key)
    served = {item.tensor for slices in receivers for item in slices}
    assert served == set(tensors)


def test_sglangs_fused_and_padded_layout_on_the_second_of_two_ranks():
    slices = engine_slices(CONFIG, 2, 1)
    qkv = [item for item in slices if item.param == "model.layers.0.self_attn.qkv_proj.weight"]
    # 8 heads and 4 KV heads of width 2: the rank holds 8 query, 4 key and 4 value rows.
    assert [(i.tensor[-13:], i.start, i.tensor_start, i.length) for i in qkv] == [
        ("q_proj.weight", 0, 8, 8),
        ("k_proj.weight", 8, 4, 4),
        ("v_proj.weight", 12, 4, 4),
    ]
    embedding = next(item for item in slices if item.param == "model.embed_tokens.weight")
    assert (embedding.start, embedding.tensor_start, embedding.length) == (0, 160, 134)  # 294 padded to 320


def test_both_ends_cut_their_pieces_into_the_same_bounded_buckets():
    ours = {"w": torch.arange(30.0).view(10, 3), "b": torch.arange(5.0)}
    theirs = {"fused": torch.zeros(20, 3), "bias": torch.zeros(9)}
    sent = [Piece(1, "w", 0, 2, 6), Piece(1, "b", 0, 0, 5)]
    received = [Piece(0, "fused", 0, 10, 6), Piece(0, "bias", 0, 4, 5)]
    # 8 elements fit: two rows of 3 at a time, then the 5 of the bias alone.
    out = list(buckets(sent, ours.__getitem__, torch.float32, bucket_bytes=32))
    into = list(buckets(received, theirs.__getitem__, torch.float32, bucket_bytes=32))
    assert [[view.numel() for view in bucket] for bucket in out] == [[6], [6], [6], [5]]
    for source, target in zip(out, into, strict=True):
        for view, copy in zip(source, target, strict=True):
            copy.copy_(view)
    assert torch.equal(theirs["fused"][10:16], ours["w"][2:8])
    assert torch.equal(theirs["bias"][4:], ours["b"])


def test_too_few_kv_heads_for_the_engines_ranks_are_refused():
    with pytest.raises(ValueError, match="4 KV heads do not divide among 8 ranks"):
        engine_slices(CONFIG, 8, 0)
