"""A run whose engines hold FP8 weights: what is refused before anything starts, and how close the canary must be."""

import json
from dataclasses import replace

import pytest
from small_qwen2 import HF_CONFIG

from megatron_ztrl.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    EngineConfig,
    ModelConfig,
    PublishConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ztrl.engines.server import EngineServer
from megatron_ztrl.weights.fp8_blocks import QUANTIZATION_CONFIG
from megatron_ztrl.weights.publish import PublishReport, WeightPublisher, check_engines
from megatron_ztrl.weights.verify import PublishError

POLICY = HF_CONFIG | {"hidden_size": 256, "intermediate_size": 768, "head_dim": 128, "vocab_size": 150}


def checkpoint(directory, **changes):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(POLICY | changes))
    return str(directory)


def fp8_checkpoint(directory, **changes):
    return checkpoint(directory, **{"quantization_config": QUANTIZATION_CONFIG} | changes)


@pytest.fixture
def config(tmp_path):
    """A run whose engines are in FP8."""
    return Config(
        run=RunConfig(directory=str(tmp_path / "run")),
        model=ModelConfig(path=checkpoint(tmp_path / "policy")),
        data=DataConfig(train=DatasetConfig(name="unused", path="unused")),
        train=TrainConfig(num_steps=1),
        engine=EngineConfig(path=fp8_checkpoint(tmp_path / "fp8")),
    )


class Peer:
    """Stands for the trainer and for an engine: what they say of the canary."""

    url = "engine"

    def __init__(self, logprob):
        self.logprob = logprob

    async def canary_logprobs(self, token_ids):
        return [self.logprob] * (len(token_ids) - 1)

    prompt_logprobs = canary_logprobs


async def gap_allowed(config, gap):
    """Whether the canary passes when one engine is so many nats off."""
    publisher, engine = WeightPublisher(config, Peer(-5.0), []), Peer(-5.0 - gap)
    report = PublishReport(
        version=1, pause_seconds=0.0, transfer_seconds=0.0, stream_seconds=0.0, updated=[engine]
    )
    try:
        assert (await publisher.verify(report)).max_logprob_gap == pytest.approx(gap)
    except PublishError:
        return False
    return True


async def test_the_canary_leaves_room_for_the_rounding_of_fp8_and_only_for_fp8_engines(config):
    assert await gap_allowed(config, 2.9)
    assert not await gap_allowed(config, 3.1)
    assert not await gap_allowed(replace(config, publish=PublishConfig(max_logprob_gap=0.5)), 0.6)
    ordinary = replace(config, engine=EngineConfig())
    assert await gap_allowed(ordinary, 0.09)
    assert not await gap_allowed(ordinary, 0.11)


def test_fp8_engines_that_fit_are_accepted(config):
    check_engines(config)


WIDE = {"head_dim": 256, "num_key_value_heads": 4}
"""Heads that four ranks can share; the 768 feed-forward rows then end in the middle of a block."""


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"publish": {"transport": "disk"}}, "publish.transport: disk brings no FP8 weights"),
        ({"publish": {"transport": "broadcast"}}, "publish.transport: broadcast brings no FP8 weights"),
        ({"model": {"dtype": "float32"}}, "model.dtype: with FP8 engines"),
        (
            {"actor": {"tensor_parallel_size": 4}},
            "actor.tensor_parallel_size: trainer rank 0 holds rows 0 to 191 of the 768 of model.layers.0.mlp.gate_proj",
        ),
        (
            {"engine": {"tensor_parallel_size": 4}},
            "engine.tensor_parallel_size: engine rank 0 holds rows 0 to 191 of the 768 of model.layers.0.mlp.gate_proj",
        ),
    ],
)
def test_settings_that_fp8_engines_do_not_take_are_one_line(config, tmp_path, sections, message):
    config = replace(
        config,
        model=replace(config.model, path=checkpoint(tmp_path / "wide", **WIDE)),
        engine=replace(config.engine, path=fp8_checkpoint(tmp_path / "wide-fp8", **WIDE)),
    )
    check_engines(config)
    changed = {name: replace(getattr(config, name), **options) for name, options in sections.items()}
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        check_engines(replace(config, **changed))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("section", "described", "message"),
    [
        ("model", {"quantization_config": QUANTIZATION_CONFIG}, "model.path: quantization_config"),
        ("engine", {"hidden_size": 512}, "engine.path: .* is of another model"),
        (
            "engine",
            {"quantization_config": {"quant_method": "awq"}},
            "engine.path: quantization_config .* 'awq'",
        ),
        (
            "engine",
            {"quantization_config": None},
            "engine.path: quantization_config in config.json is missing",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_are_one_line(config, tmp_path, section, described, message):
    make = checkpoint if section == "model" else fp8_checkpoint
    changed = replace(getattr(config, section), path=make(tmp_path / "changed", **described))
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        check_engines(replace(config, **{section: changed}))
    assert "\n" not in str(raised.value)


def test_an_fp8_engine_starts_from_its_own_checkpoint_and_only_on_a_gpu(config, tmp_path):
    server = EngineServer(config, log_path=tmp_path / "log", device="cuda")
    assert server._arguments["model_path"] == config.engine.path
    with pytest.raises(ValueError, match=r"^engine.path: FP8 engines need GPUs"):
        EngineServer(config, log_path=tmp_path / "log", device="cpu")
