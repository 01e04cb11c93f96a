"""The planner's arithmetic on engines, publishes and step times, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_ztrl.config.schema import (
    ActorConfig,
    Config,
    DataConfig,
    DatasetConfig,
    EngineConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SGLangConfig,
    TrainConfig,
)
from megatron_ztrl.trainer.planner.command import find_architecture
from megatron_ztrl.trainer.planner.engine import (
    EngineMemory,
    PublishBytes,
    engine_memory,
    engine_parameters,
    publish_bytes,
)
from megatron_ztrl.trainer.planner.hardware import Hardware
from megatron_ztrl.trainer.planner.models import PRESETS
from megatron_ztrl.trainer.planner.step_time import Workload, matmul_parameters, step_seconds, step_times
from megatron_ztrl.weights.hf_mapping import Architecture

QWEN_7B = Architecture.from_hf_config(PRESETS["qwen2.5-7b"])
QWEN_1_5B = Architecture.from_hf_config(PRESETS["qwen2.5-1.5b"])
CONFIG = Config(
    run=RunConfig(directory="unused"),
    model=ModelConfig(path="unused"),
    data=DataConfig(train=DatasetConfig(name="unused", path="unused")),
    train=TrainConfig(num_steps=1),
)
WORKLOAD = Workload(
    samples=64,
    groups=8,
    prompt_tokens=100,
    response_tokens=1000,
    longest_response_tokens=1000,
    minibatches=1,
)
ROUND = Hardware(
    flops=1e15,
    memory_bandwidth=1e12,
    nic_bandwidth=1e10,
    nvlink_bandwidth=1e11,
    training_flops_share=0.5,
    forward_flops_share=1.0,
    decode_bandwidth_share=1.0,
    network_share=1.0,
    decode_overhead_seconds=0.0,
)
"""Round numbers that are easy to compute with."""


def engine(**changes: Any) -> EngineMemory:
    values = {
        "weight_bytes": 10**10,
        "kv_bytes_per_token": 10**5,
        "mem_fraction": 0.9,
        "kv_tokens": 10**6,
        "demanded_tokens": 0,
    }
    return EngineMemory(**(values | changes))


def times(config: Config, memory: EngineMemory | None = None) -> dict[str, float]:
    published = PublishBytes(total_bytes=0, largest_sent_bytes=10**10, largest_received_bytes=2 * 10**10)
    lines = step_times(config, QWEN_7B, WORKLOAD, memory or engine(), published, ROUND)
    return {line.name: line.amount for line in lines}


def test_engine_holds_the_weights_and_as_many_tokens_as_the_rest_allows() -> None:
    config = replace(CONFIG, sglang=SGLangConfig(server_args={"mem_fraction_static": 0.9}))
    memory = engine_memory(config, QWEN_7B, Hardware())
    assert memory.weight_bytes == 2 * 7_615_616_512
    assert memory.kv_bytes_per_token == 2 * 28 * 4 * 128 * 2
    assert memory.kv_tokens == int((72e9 - 2 * 7_615_616_512) / 57_344)


def test_tensor_parallel_engine_halves_matrices_and_cache_but_not_norms() -> None:
    whole, half = engine_parameters(QWEN_7B, 1), engine_parameters(QWEN_7B, 2)
    norms = (2 * 28 + 1) * 3584
    assert half == (whole - norms) / 2 + norms
    config = replace(CONFIG, engine=EngineConfig(tensor_parallel_size=2))
    assert engine_memory(config, QWEN_7B, Hardware()).kv_bytes_per_token == 57_344 / 2


def test_engine_pads_the_vocabulary_to_64_rows() -> None:
    odd = replace(QWEN_1_5B, vocab_size=151_937)
    assert engine_parameters(odd, 1) - engine_parameters(QWEN_1_5B, 1) == 64 * 1536


def test_publish_sends_every_engine_the_whole_model_once() -> None:
    config = replace(
        CONFIG,
        actor=ActorConfig(tensor_parallel_size=2, pipeline_parallel_size=2, data_parallel_size=2),
        engine=EngineConfig(count=3, tensor_parallel_size=2),
    )
    moved = publish_bytes(config, QWEN_1_5B)
    norms = (2 * 28 + 1) * 1536  # both ranks of an engine hold them
    assert moved.total_bytes == 3 * 2 * (1_543_714_304 + norms)
    assert moved.largest_received_bytes * 6 == moved.total_bytes
    # Two replicas feed two engines, and the third gets it from a neighbour.
    assert 2 / 3 * moved.total_bytes / 8 <= moved.largest_sent_bytes < 2 / 3 * moved.total_bytes / 4


def test_decoding_reads_weights_and_cache_once_per_token() -> None:
    # 64 rollouts on one engine at a time, 600 tokens of context each on average: 10 GB + 3.84 GB per step.
    seconds = times(CONFIG)["generation"]
    prefill = 2 * matmul_parameters(QWEN_7B) * 8 * 100 / 1e15
    assert seconds == pytest.approx(1000 * 13.84e9 / 1e12 + prefill)


def test_a_small_cache_takes_more_rounds() -> None:
    # Room for 16 sequences of 1,100 tokens: four rounds of 10 GB + 0.96 GB.
    seconds = times(CONFIG, engine(kv_tokens=17_600))["generation"]
    assert seconds == pytest.approx(4 * 1000 * 10.96e9 / 1e12, rel=1e-3)


def test_training_takes_three_forward_passes_of_flops() -> None:
    forward = 2 * matmul_parameters(QWEN_7B) + 2 * 28 * 3584 * 1100
    found = times(replace(CONFIG, actor=ActorConfig(data_parallel_size=1)))
    assert found["log-probs"] == pytest.approx(64 * 1100 * forward / 1e15)
    assert found["training"] == pytest.approx(3 * 64 * 1100 * forward / 0.5e15)


def test_full_recomputation_costs_a_fourth_pass() -> None:
    megatron = replace(CONFIG.megatron, transformer={"recompute_granularity": "full"})
    assert times(replace(CONFIG, megatron=megatron))["training"] == pytest.approx(
        times(CONFIG)["training"] * 4 / 3
    )


def test_a_pipeline_idles_at_both_ends() -> None:
    # 70,400 tokens in microbatches of 16,384 are 5: 4 stages add 3/5.
    staged = replace(CONFIG, actor=ActorConfig(pipeline_parallel_size=4))
    assert times(staged)["training"] == pytest.approx(times(CONFIG)["training"] / 4 * 1.6)


def test_publish_waits_for_the_fullest_rank() -> None:
    assert times(CONFIG)["publish"] == 2.0


def test_stale_rollouts_are_generated_while_training() -> None:
    published = PublishBytes(total_bytes=0, largest_sent_bytes=0, largest_received_bytes=0)
    lines = step_times(CONFIG, QWEN_7B, WORKLOAD, engine(), published, ROUND)
    generation, logprobs, training, _ = (line.amount for line in lines)
    stale = replace(CONFIG, rollout=RolloutConfig(max_staleness=1))
    assert step_seconds(CONFIG, lines) == generation + logprobs + training
    assert step_seconds(stale, lines) == max(generation, logprobs + training)


def test_a_hub_id_is_known_by_its_name() -> None:
    assert find_architecture("Qwen/Qwen2.5-7B") == ("qwen2.5-7b", QWEN_7B)


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"config.json of nobody/nothing: .*qwen2.5-32b"):
        find_architecture("nobody/nothing")
