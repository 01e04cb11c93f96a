"""The reshard plan, on layouts small enough to work out by hand, and on real ones by moving numbered rows."""

import numpy as np
import pytest
from small_qwen2 import HF_CONFIG

from megatron_ztrl.engines.parameters import engine_slices
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.hf_mapping import Architecture, ParallelLayout, hf_tensor_shapes, megatron_slices
from megatron_ztrl.weights.reshard import Transfer, plan

FLOAT32 = {"w": "float32", "v": "float32"}
CONFIG = HF_CONFIG | {
    "vocab_size": 294,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
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
        length = t.shape[t.dim]
        block = source.take(range(t.source_start, t.source_start + length), axis=t.dim)
        assert block.shape == t.shape
        index = [slice(None)] * target.ndim
        index[t.dim] = slice(t.target_start, t.target_start + length)
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
    assert plan(senders, receivers, 1, {"w": (8, 3)}).transfers == [
        Transfer(source=0, source_param="a", source_start=2, target_start=6, shape=(2, 3), **common),
        Transfer(source=1, source_param="b", source_start=10, target_start=8, shape=(3, 3), **common),
    ]


def sent_elements(published):
    """Per trainer rank."""
    sent = [0] * published.num_senders
    for item in published.transfers:
        sent[item.source] += item.elements
    return sent


def test_replicas_share_the_sending_to_one_engine():
    names = [f"w{i}" for i in range(8)]
    sender = [rows(name, name, 0, 0, 6) for name in names]
    published = plan([sender] * 4, [sender], 1, dict.fromkeys(names, (6, 10)))
    assert published.chains == [[0]]
    assert sent_elements(published) == [120, 120, 120, 120]


def test_replicas_share_by_elements_and_not_by_rows():
    shapes = {"wide": (2, 100), "long": (100, 1), "other": (100, 1)}
    sender = [rows(name, name, 0, 0, shape[0]) for name, shape in shapes.items()]
    assert sent_elements(plan([sender] * 2, [sender], 1, shapes)) == [200, 200]


@pytest.mark.parametrize(
    ("replicas", "engines", "chains"),
    [
        (1, 3, [[0, 1, 2]]),
        (2, 2, [[0], [1]]),
        (2, 5, [[0, 1], [2, 3, 4]]),
        (4, 2, [[0], [1]]),
    ],
)
def test_no_rank_sends_a_row_twice_however_many_engines_there_are(replicas, engines, chains):
    shapes = {f"w{i}": (6, 10) for i in range(8)}
    halves = [[rows(name, name, 0, 3 * half, 3) for name in shapes] for half in range(2)]
    whole = [rows(name, name, 0, 0, 6) for name in shapes]
    published = plan(halves * replicas, [whole], engines, shapes)
    assert published.chains == chains
    sent = [(t.source, t.tensor) for t in published.transfers]
    assert len(sent) == len(set(sent)) == 2 * 8 * len(chains)
    # All replicas have the same part of the work.
    assert set(sent_elements(published)) == {480 * len(chains) // (2 * replicas)}


def test_engines_of_a_chain_hand_on_to_their_neighbour_what_they_receive():
    shapes = {"w": (4, 10), "v": (4, 10)}
    senders = [[rows("a", "w", 0, 0, 4)], [rows("b", "v", 0, 0, 4)]]
    engine_ranks = [
        [rows("p", "w", 0, 0, 2), rows("q", "v", 0, 0, 2)],
        [rows("p", "w", 0, 2, 2), rows("q", "v", 0, 2, 2)],
    ]
    published = plan(senders, engine_ranks, 3, shapes)
    assert published.world_size == 8  # trainer 0 and 1, then engines (2, 3), (4, 5), (6, 7)
    received = published.receiver_links(FLOAT32)
    assert [[(link.peer, link.forward_to) for link in engine[1]] for engine in received] == [
        [(1, 5), (0, 5)],
        [(3, 7), (3, 7)],
        [(5, None), (5, None)],
    ]
    for engine in received[1:]:  # the same blocks in the same order as the first
        for links, first in zip(engine, received[0], strict=True):
            assert [(link.order, link.pieces) for link in links] == [(x.order, x.pieces) for x in first]
    sent = published.sender_links(FLOAT32)
    assert [[link.peer for link in links] for links in sent] == [[2, 3], [3, 2]]
    # Every link carries 2 rows of 10, the trainer's and the engines' alike.
    pairs = {(0, 2), (0, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7)}
    elements = published.link_elements()
    assert set(elements) == pairs
    assert elements[0, 2] == 20
    assert elements[2, 4] == 40  # from both trainer ranks


def test_both_ends_of_every_stream_agree_on_its_place_among_all():
    shapes = {"w": (12, 1)}
    senders = [[rows("a", "w", 0, 3 * i, 3)] for i in range(4)]
    engine_ranks = [[rows("p", "w", 0, 4 * i, 4)] for i in range(3)]
    published = plan(senders, engine_ranks, 1, shapes)
    out = {
        (s, link.peer): link.order
        for s, links in enumerate(published.sender_links(FLOAT32))
        for link in links
    }
    into = {
        (link.peer, published.group_rank(0, rank)): link.order
        for rank, links in enumerate(published.receiver_links(FLOAT32)[0])
        for link in links
    }
    assert out == into
    assert sorted(out.values()) == list(range(6))


def test_a_row_that_nobody_holds_is_named():
    with pytest.raises(ValueError, match="w: no trainer rank holds row 3 that engine rank 1 needs"):
        plan(
            [[rows("a", "w", 0, 0, 3)]],
            [[rows("b", "w", 0, 0, 3)], [rows("b", "w", 0, 2, 3)]],
            1,
            {"w": (5, 2)},
        )


def test_a_row_that_would_be_filled_twice_is_named():
    with pytest.raises(ValueError, match="v: engine rank 0 fills row 2 of b twice"):
        plan(
            [[rows("a", "w", 0, 0, 8), rows("c", "v", 0, 0, 8)]],
            [[rows("b", "w", 0, 0, 3), rows("b", "v", 2, 0, 3)]],
            1,
            {"w": (8, 2), "v": (8, 2)},
        )


def test_ends_that_cut_along_different_dimensions_are_refused():
    with pytest.raises(ValueError, match="w: the trainer cuts it along dimension 1, the engine along 0"):
        plan([[rows("a", "w", 0, 0, 4, dim=1)]], [[rows("b", "w", 0, 0, 4)]], 1, {"w": (4, 4)})


def test_vocabulary_padding_on_the_trainers_side_stays_there():
    padded = [[rows("a", "w", 0, 0, 64)], [rows("a", "w", 0, 64, 64)]]  # 128 rows for a vocabulary of 100
    published = plan(padded, [[rows("b", "w", 0, 0, 100)]], 1, {"w": (100, 2)})
    assert [(t.source, t.shape) for t in published.transfers] == [(0, (64, 2)), (1, (36, 2))]


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
    shapes = hf_tensor_shapes(architecture)
    transfers = plan(senders, receivers, 1, shapes).transfers
    move(transfers, [local_parameters(slices, tensors) for slices in senders], targets)
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


def test_too_few_kv_heads_for_the_engines_ranks_are_refused():
    with pytest.raises(ValueError, match="4 KV heads do not divide among 8 ranks"):
        engine_slices(CONFIG, 8, 0)
