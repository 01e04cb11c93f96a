"""The memory planner agrees with ranks that really ran, and with Hugging Face's parameter count."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launcher import launch
from planner_ranks import PEAKS, STATES, measure

from megatron_ztrl import cli
from megatron_ztrl.config.schema import AlgorithmConfig, Config
from megatron_ztrl.trainer.planner.activations import in_flight_microbatches, stage_activations
from megatron_ztrl.trainer.planner.hardware import Hardware
from megatron_ztrl.trainer.planner.layouts import least_gpus, suggest
from megatron_ztrl.trainer.planner.models import PRESETS
from megatron_ztrl.trainer.planner.plan import Subject, make_plan
from megatron_ztrl.trainer.planner.states import exact_states
from megatron_ztrl.trainer.planner.step_time import Workload
from megatron_ztrl.trainer.topology import parallel_layout
from megatron_ztrl.weights.hf_mapping import Architecture, hf_tensor_shapes


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return launch(measure, 3)


@pytest.mark.parametrize(("model", "config"), STATES, ids=[case.name for case, _ in STATES])
def test_states_are_those_of_real_ranks_to_the_byte(ranks: list, model: Any, config: Any) -> None:
    planned = exact_states(config, config.actor, model.architecture(), True)
    real = [rank["states"][model.name] for rank in ranks if model.name in rank["states"]]
    assert len(real) == parallel_layout(config.actor).world_size
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
    (stage,) = exact_states(config, config.actor, case.architecture(), False)
    assert (stage.gradient_bytes, stage.optimizer_bytes) == (0, 0)
    assert stage.total_bytes == stage.weight_bytes == 2 * stage.parameters


def test_an_option_with_unknown_states_is_refused() -> None:
    case, config = STATES[0]
    config = replace(
        config, megatron=replace(config.megatron, optimizer={"use_precision_aware_optimizer": True})
    )
    with pytest.raises(ValueError, match=r"megatron.optimizer.use_precision_aware_optimizer"):
        exact_states(config, config.actor, case.architecture(), True)


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


EXAMPLE = Path(__file__).parents[2] / "examples" / "planner" / "qwen2.5-7b.yaml"


def subject(name: str, config: Config) -> Subject:
    architecture = Architecture.from_hf_config(PRESETS[name])
    workload = Workload.of(config, prompt_tokens=256, response_tokens=2048)
    return Subject(
        model=name, policy=architecture, critic=architecture, hardware=Hardware(), workload=workload
    )


@pytest.fixture(scope="module")
def config() -> Config:
    from megatron_ztrl.config.load import load_config

    return load_config(EXAMPLE)


def test_32b_in_bfloat16_with_adam_needs_more_than_8_gpus(config: Config) -> None:
    # 18 bytes a parameter are 590 GB: of 8 x 80 GB that leaves 6 GB a GPU for all the rest, and none for engines.
    # 16 GPUs would hold the actor alone; with whole nodes the engines make it 24.
    planned = subject("qwen2.5-32b", config)
    assert suggest(config, planned, 8, 1) == []
    assert suggest(config, planned, 16, 1) == []
    assert least_gpus(config, planned) == 24


def test_suggestions_fit_and_the_quickest_comes_first(config: Config) -> None:
    plans = suggest(config, subject("qwen2.5-7b", config), 16, 3)
    assert [plan.problems for plan in plans] == [[], [], []]
    assert all(plan.gpus <= 16 for plan in plans)
    seconds = [plan.step_seconds for plan in plans]
    assert seconds == sorted(seconds)
    # The plan of the very configuration that is suggested says the same.
    again = make_plan(plans[0].config, plans[0].subject)
    assert again.worlds == plans[0].worlds
    assert again.publish.total_bytes == plans[0].publish.total_bytes


def test_a_critic_takes_ranks_of_its_own_and_no_vocabulary_head(config: Config) -> None:
    ppo = replace(
        config,
        algorithm=AlgorithmConfig(advantage="gae"),
        critic=replace(config.critic, data_parallel_size=2),
    )
    plan = make_plan(ppo, subject("qwen2.5-1.5b", config))
    actor, critic = plan.worlds
    assert (actor.gpus, critic.gpus, plan.gpus) == (16, 2, 26)
    # Tied: the policy's head is its embedding. The value head is one row and a bias.
    (value,) = critic.stages
    assert value.states.parameters == 1_543_714_304 + 1536 + 1


def test_the_command_prints_draws_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "plan.png", tmp_path / "plan.json"
    options = ["--gpus", "24", "--png", str(files[0]), "--json", str(files[1]), "actor.data_parallel_size=4"]
    assert cli.main(["plan", str(EXAMPLE), *options]) == 0
    printed = capsys.readouterr().out
    assert "Memory of one GPU (GB)" in printed
    assert "Quickest layouts of 24 GPUs" in printed
    assert "…" not in printed  # a narrow console would cut columns
    header = next(line for line in printed.splitlines() if "layout" in line and "┃" in line)
    assert header.replace("┃", " ").split() == (
        [
            "world",
            "layout",
            "stage",
            "weights",
            "gradients",
            "optimizer",
            "activations",
            "working",
            "reserved",
            "total",
        ]
    )
    assert files[0].read_bytes().startswith(b"\x89PNG")
    found = json.loads(files[1].read_text())
    (actor,) = found["plan"]["worlds"]
    assert (found["plan"]["gpus"], actor["gpus"], actor["layout"]) == (16, 8, "TP 2 PP 1 DP 4")
    (stage,) = actor["stages"]
    assert stage["total"] == sum(amount for name, amount in stage.items() if name != "total")
    assert len(found["suggestions"]) == 5


def test_the_overrides_of_a_suggestion_make_the_configuration_that_was_suggested(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--model", "qwen2.5-32b", "algorithm.advantage=gae"]
    recompute = ["recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1"]
    before = [f"megatron.transformer.{word}" for word in recompute]
    assert cli.main(["plan", str(EXAMPLE), *options, *before, "--gpus", "48"]) == 0
    printed = capsys.readouterr().out
    first = printed[printed.index("Quickest") :].splitlines()[4].replace("│", " ").split()
    overrides = printed.partition("The first, as overrides: ")[2].split()
    assert any(word.startswith("critic.") for word in overrides)
    assert cli.main(["plan", str(EXAMPLE), *options, *before, *overrides]) == 0
    again = capsys.readouterr().out
    assert "Fits." in again
    step = next(line for line in again.splitlines() if line.startswith("step"))
    assert float(step.split()[1].replace(",", "")) == pytest.approx(float(first[-1]), abs=0.06)


def test_the_command_says_from_how_many_gpus_on_a_model_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(EXAMPLE), "--model", "qwen2.5-32b", "--gpus", "8"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Does not fit" in printed
    assert "No layout of 8 GPUs fits; the first whole nodes that fit: 24 GPUs" in printed


def test_what_megatron_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["plan", str(EXAMPLE), "megatron.transformer.recompute_granularity=full"]) == cli.USER_ERROR
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: megatron.transformer: Megatron refuses {'recompute_granularity': 'full'}: "
    )
    assert "recompute" in line.partition("}: ")[2]


def test_the_command_refuses_a_layout_that_the_model_cannot_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(EXAMPLE), "actor.tensor_parallel_size=8"]) == cli.USER_ERROR
    assert "actor.tensor_parallel_size: 8 does not divide" in capsys.readouterr().err
