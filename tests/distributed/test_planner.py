"""The memory planner agrees with ranks that really ran, and with Hugging Face's parameter count."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launcher import launch
from planner_ranks import PEAKS, STATES, measure

from megatron_ztrl.trainer.planner.activations import in_flight_microbatches, stage_activations
from megatron_ztrl.trainer.planner.models import PRESETS
from megatron_ztrl.trainer.planner.states import world_states
from megatron_ztrl.weights.hf_mapping import Architecture, hf_tensor_shapes


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return launch(measure, 3)


@pytest.mark.parametrize(("model", "config"), STATES, ids=[case.name for case, _ in STATES])
def test_states_are_those_of_real_ranks_to_the_byte(ranks: list, model: Any, config: Any) -> None:
    planned = world_states(config, config.actor, model.architecture())
    real = [rank["states"][model.name] for rank in ranks if model.name in rank["states"]]
    assert len(real) == model.tp * model.pp * config.actor.data_parallel_size
    for found in real:
        pipeline_rank, data_rank = found.pop("place")
        stage = planned[pipeline_rank]
        assert found == {
            "parameters": stage.parameters,
            "weight_bytes": stage.weight_bytes,
            "gradient_bytes": stage.gradient_bytes,
            "optimizer_bytes": stage.optimizer_bytes_by_data_rank[data_rank],
        }


@pytest.mark.parametrize("model", PEAKS, ids=[case.name for case in PEAKS])
def test_activation_peak_is_predicted_within_a_tenth(ranks: list, model: Any) -> None:
    for stage in range(model.pp):
        predicted = stage_activations(
            model.config(),
            model.config().actor,
            model.architecture(),
            "local",
            stage=stage,
            microbatches=model.microbatches,
            trained_share=0.5,
        )
        assert predicted.peak_bytes == pytest.approx(ranks[stage]["peaks"][model.name], rel=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_as_many_parameters_as_their_checkpoints(name: str) -> None:
    architecture = Architecture.from_hf_config(PRESETS[name])
    count = sum(math.prod(shape) for shape in hf_tensor_shapes(architecture).values())
    published = {"qwen2.5-1.5b": 1_543_714_304, "qwen2.5-7b": 7_615_616_512, "qwen2.5-32b": 32_763_876_352}
    assert count == published[name]


def test_a_frozen_world_holds_only_weights() -> None:
    case, config = STATES[0]
    (stage,) = world_states(config, config.actor, case.architecture(), trainable=False)
    assert (stage.gradient_bytes, stage.optimizer_bytes) == (0, 0)
    assert stage.total_bytes == stage.weight_bytes == 2 * stage.parameters


def test_an_option_with_unknown_states_is_refused() -> None:
    from dataclasses import replace

    case, config = STATES[0]
    config = replace(
        config, megatron=replace(config.megatron, optimizer={"use_precision_aware_optimizer": True})
    )
    with pytest.raises(ValueError, match=r"megatron.optimizer.use_precision_aware_optimizer"):
        world_states(config, config.actor, case.architecture())


@pytest.mark.parametrize(
    ("pipeline", "virtual", "stage", "microbatches", "expected"),
    [
        (1, 1, 0, 8, 1),
        (4, 1, 0, 8, 4),  # a stage runs ahead by the three behind it
        (4, 1, 3, 8, 1),
        (4, 1, 0, 2, 2),  # no more than there are
        (4, 2, 0, 8, 11),  # 2 * 3 + 1 * 4, and the current one
        (4, 2, 3, 8, 5),
        (2, 2, 0, 2, 4),  # both chunks of both microbatches
    ],
)
def test_microbatches_in_flight(
    pipeline: int, virtual: int, stage: int, microbatches: int, expected: int
) -> None:
    assert in_flight_microbatches(pipeline, virtual, stage=stage, microbatches=microbatches) == expected
