"""The slice arithmetic, without Megatron."""

from __future__ import annotations

import pytest
import torch
from small_qwen2 import HF_CONFIG

from megatron_ztrl.weights.hf_mapping import (
    Architecture,
    ParallelLayout,
    hf_tensor_shapes,
    megatron_slices,
)

LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor_size=2),
    ParallelLayout(pipeline_size=4),
    ParallelLayout(tensor_size=2, pipeline_size=2, data_size=3),
    ParallelLayout(tensor_size=2, pipeline_size=2, virtual_size=2),
]


def slices_of(param: str, layout: ParallelLayout, rank: int, **changes: object) -> list[tuple]:
    architecture = Architecture.from_hf_config({**HF_CONFIG, **changes})
    found = megatron_slices(architecture, layout, rank, backend="local")
    return [(s.tensor, s.dim, s.start, s.tensor_start, s.length) for s in found if s.param == param]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_one_replica_hold_every_element_at_least_once(layout: ParallelLayout, tied: bool) -> None:
    architecture = Architecture.from_hf_config({**HF_CONFIG, "tie_word_embeddings": tied})
    for replica in range(layout.data_size):
        counts = {name: torch.zeros(shape) for name, shape in hf_tensor_shapes(architecture).items()}
        for rank in range(layout.world_size):
            if layout.place(rank).data_rank == replica:
                for s in megatron_slices(architecture, layout, rank, backend="local"):
                    counts[s.tensor].narrow(s.dim, s.tensor_start, s.length).add_(1)
        for name, count in counts.items():
            copies = layout.tensor_size if "norm" in name else 1
            if tied and layout.pipeline_size > 1 and name == "model.embed_tokens.weight":
                copies = 2  # the first and the last stage
            assert (count == copies).all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_of_a_parameter_do_not_overlap(layout: ParallelLayout) -> None:
    architecture = Architecture.from_hf_config(HF_CONFIG)
    for rank in range(layout.world_size):
        seen: dict[str, set[int]] = {}
        for s in megatron_slices(architecture, layout, rank, backend="local"):
            rows = set(range(s.start, s.start + s.length))
            assert not rows & seen.setdefault(s.param, set())
            seen[s.param] |= rows


def test_fused_qkv_interleaves_by_query_group() -> None:
    # Head size 2, two query heads per group: a group is 4 query rows, 2 key rows, 2 value rows.
    assert slices_of("decoder.layers.0.self_attention.linear_qkv.weight", ParallelLayout(), 0) == [
        ("model.layers.0.self_attn.q_proj.weight", 0, 0, 0, 4),
        ("model.layers.0.self_attn.k_proj.weight", 0, 4, 0, 2),
        ("model.layers.0.self_attn.v_proj.weight", 0, 6, 0, 2),
        ("model.layers.0.self_attn.q_proj.weight", 0, 8, 4, 4),
        ("model.layers.0.self_attn.k_proj.weight", 0, 12, 2, 2),
        ("model.layers.0.self_attn.v_proj.weight", 0, 14, 2, 2),
    ]


def test_gated_mlp_stacks_the_gate_half_on_the_up_half_of_its_rank() -> None:
    layout = ParallelLayout(tensor_size=2)
    assert slices_of("decoder.layers.3.mlp.linear_fc1.weight", layout, 1) == [
        ("model.layers.3.mlp.gate_proj.weight", 0, 0, 6, 6),
        ("model.layers.3.mlp.up_proj.weight", 0, 6, 6, 6),
    ]
    assert slices_of("decoder.layers.3.mlp.linear_fc2.weight", layout, 1) == [
        ("model.layers.3.mlp.down_proj.weight", 1, 0, 6, 6),
    ]


def test_vocabulary_padding_is_in_no_slice() -> None:
    layout = ParallelLayout(tensor_size=2)  # 7 rows padded to 8
    name = "embedding.word_embeddings.weight"
    assert slices_of(name, layout, 0) == [("model.embed_tokens.weight", 0, 0, 0, 4)]
    assert slices_of(name, layout, 1) == [("model.embed_tokens.weight", 0, 0, 4, 3)]


def test_tied_output_layer_on_the_last_stage_is_the_embedding() -> None:
    layout = ParallelLayout(pipeline_size=2)
    tied = slices_of("output_layer.weight", layout, 1, tie_word_embeddings=True)
    assert tied == [("model.embed_tokens.weight", 0, 0, 0, 7)]
    assert slices_of("output_layer.weight", ParallelLayout(), 0, tie_word_embeddings=True) == []


def test_interleaved_chunks_take_turns_through_the_layers() -> None:
    architecture = Architecture.from_hf_config(HF_CONFIG)
    layout = ParallelLayout(pipeline_size=2, virtual_size=2)
    found = megatron_slices(architecture, layout, 1, backend="local")
    pairs = {(s.param.split(".input")[0], s.tensor.split(".input")[0]) for s in found if "input_" in s.param}
    assert pairs == {("0.decoder.layers.0", "model.layers.1"), ("1.decoder.layers.0", "model.layers.3")}


def test_transformer_engine_fuses_norms_into_the_next_linear() -> None:
    architecture = Architecture.from_hf_config(HF_CONFIG)
    by_tensor = {s.tensor: s.param for s in megatron_slices(architecture, ParallelLayout(), 0, backend="te")}
    base = "decoder.layers.0."
    assert by_tensor["model.layers.0.input_layernorm.weight"] == (
        base + "self_attention.linear_qkv.layer_norm_weight"
    )
    assert by_tensor["model.layers.0.post_attention_layernorm.weight"] == (
        base + "mlp.linear_fc1.layer_norm_weight"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling"),
    ],
)
def test_unsupported_checkpoints_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Architecture.from_hf_config({**HF_CONFIG, **changes})


def test_rotary_base_is_read_from_either_place() -> None:
    nested = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert Architecture.from_hf_config(HF_CONFIG).rope_theta == 1000.0
    assert Architecture.from_hf_config({**HF_CONFIG, **nested}).rope_theta == 5e5
