"""What the planner predicts is what the GPU's allocator sees."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_policy import with_targets

from megatron_ztrl.config.schema import (
    ActorConfig,
    Config,
    DataConfig,
    DatasetConfig,
    MegatronConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ztrl.data.packing import PackedBatch, pack
from megatron_ztrl.trainer.planner.activations import stage_activations
from megatron_ztrl.trainer.planner.models import PRESETS
from megatron_ztrl.types import TrainingSample
from megatron_ztrl.weights.hf_mapping import Architecture

pytestmark = pytest.mark.gpu

TOKENS, SEQUENCES = 8192, 8
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
ARCHITECTURE = replace(Architecture.from_hf_config(PRESETS["qwen2.5-1.5b"]), num_layers=8)


def configuration(transformer: dict[str, Any]) -> Config:
    return Config(
        run=RunConfig(directory="unused"),
        model=ModelConfig(path="unused"),
        data=DataConfig(train=DatasetConfig(name="unused", path="unused")),
        train=TrainConfig(num_steps=1),
        actor=ActorConfig(max_tokens_per_microbatch=TOKENS),
        megatron=MegatronConfig(transformer=transformer),
    )


def full_batch() -> PackedBatch:
    """Two full microbatches with every token but the first of a sequence trained."""
    random = np.random.default_rng(0)
    length = TOKENS // SEQUENCES
    made = [
        TrainingSample(
            token_ids=random.integers(0, ARCHITECTURE.vocab_size, length).tolist(),
            loss_mask=[position > 0 for position in range(length)],
            rollout_logprobs=[0.0] * length,
            weight_versions=[0] * length,
            reward=0.0,
            group_id=0,
        )
        for _ in range(2 * SEQUENCES)
    ]
    packed = pack(made, max_tokens_per_microbatch=TOKENS, data_parallel_size=1)
    zeros = [np.zeros(TOKENS, dtype=np.float32) for _ in packed.microbatches[0]]
    return with_targets(packed, zeros)


@contextmanager
def world(config: Config) -> Iterator[tuple[Any, Any]]:
    """(models, optimizer) of one rank with random weights."""
    from megatron_ztrl.trainer import setup
    from megatron_ztrl.trainer.model import build_chunks, wrap_chunks
    from megatron_ztrl.trainer.topology import parallel_layout

    with tempfile.TemporaryDirectory() as directory:
        setup.init_distributed(parallel_layout(config.actor), 0, f"file://{directory}/meeting", 0)
        try:
            transformer = setup.transformer_config(config, config.actor, ARCHITECTURE, "te")
            chunks = [chunk.cuda() for chunk in build_chunks(transformer, ARCHITECTURE, "te", TOKENS)]
            ddp = setup.ddp_config(config)
            models = wrap_chunks(chunks, transformer, ddp)
            optimizer = setup.build_optimizer(config, config.actor, models, ddp)
            transformer.grad_scale_func = optimizer.scale_loss
            yield models, optimizer
        finally:
            setup.destroy_distributed()


@pytest.mark.parametrize("transformer", [{}, FULL], ids=["no recomputation", "full recomputation"])
def test_states_and_peak_are_predicted(transformer: dict[str, Any]) -> None:
    from megatron_ztrl.trainer.planner.states import exact_states
    from megatron_ztrl.trainer.step import DeviceMicrobatch, LossSettings, accumulate_gradients

    config = configuration(transformer)
    (states,) = exact_states(config, config.actor, ARCHITECTURE, True)
    gc.collect()
    torch.cuda.empty_cache()
    empty_bytes = torch.cuda.memory_allocated()
    with world(config) as (models, optimizer):
        packed = full_batch()
        microbatches = [DeviceMicrobatch.of(mb, "te", torch.device("cuda")) for mb in packed.microbatches[0]]
        settings = LossSettings(
            vocab_size=ARCHITECTURE.vocab_size,
            temperature=1.0,
            clip_low=0.2,
            clip_high=0.2,
            kl_coefficient=0.0,
        )

        def step() -> None:
            for model in models:
                model.zero_grad_buffer()
            accumulate_gradients(models, microbatches, packed.trained_tokens, settings)
            optimizer.step()

        step()  # the optimizer's moments exist from here on
        gc.collect()
        held_bytes = torch.cuda.memory_allocated() - empty_bytes
        torch.cuda.reset_peak_memory_stats()
        for model in models:
            model.zero_grad_buffer()
        accumulate_gradients(models, microbatches, packed.trained_tokens, settings)
        peak_bytes = torch.cuda.max_memory_allocated() - empty_bytes - held_bytes
    predicted = stage_activations(
        config, config.actor, ARCHITECTURE, "te", stage=0, microbatches=2
    ).peak_bytes
    print(f"states: predicted {states.total_bytes / 1e9:.3f} GB, held {held_bytes / 1e9:.3f} GB")
    print(f"activations: predicted {predicted / 1e9:.3f} GB, peak {peak_bytes / 1e9:.3f} GB")
    assert held_bytes == pytest.approx(states.total_bytes, rel=0.02)
    assert peak_bytes == pytest.approx(predicted, rel=0.2)
