"""A layout that the model cannot be cut into is refused before any process starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from random_policies import config
from small_qwen2 import HF_CONFIG

from megatron_ztrl.config.schema import SGLangConfig
from megatron_ztrl.trainer.topology import check_topology, resolve_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_config(tmp_path, positions=1 << 14)


def save_config(directory: Path, positions: int) -> Path:
    (directory / "config.json").write_text(json.dumps(HF_CONFIG | {"max_position_embeddings": positions}))
    return directory


def test_fitting_layout_passes(checkpoint: Path) -> None:
    check_topology(config(checkpoint, tp=2, pp=4, dp=3, sp=True))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 3}, r"actor.tensor_parallel_size: 3 does not divide the model's 4 attention heads"),
        ({"tp": 4}, r"actor.tensor_parallel_size: 4 does not divide the model's 2 key-value groups"),
        ({"pp": 3}, r"actor.pipeline_parallel_size: 3 pipeline stages .* 4 layers"),
        ({"pp": 8}, r"actor.pipeline_parallel_size: 8 pipeline stages .* 4 layers"),
        ({"sp": True}, r"actor.sequence_parallel: needs actor.tensor_parallel_size > 1"),
    ],
)
def test_misfit_names_the_config_path(checkpoint: Path, layout: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_topology(config(checkpoint, **layout))


def test_a_microbatch_must_hold_the_longest_rollout_with_its_padding(checkpoint: Path) -> None:
    chosen = config(checkpoint, tp=2, sp=True)
    longest = chosen.data.max_prompt_tokens + chosen.rollout.max_response_tokens
    for short, message in ((1, f"padded to a multiple of 2: set it to {longest}"), (0, None)):
        odd = replace(chosen.rollout, max_response_tokens=chosen.rollout.max_response_tokens - 1)
        tight = replace(
            chosen, rollout=odd, actor=replace(chosen.actor, max_tokens_per_microbatch=longest - short)
        )
        if message is None:
            check_topology(tight)
        else:
            with pytest.raises(
                ValueError, match=rf"actor.max_tokens_per_microbatch: {longest - 1} .*{message}"
            ):
                check_topology(tight)


@pytest.mark.parametrize(
    ("positions", "server_args", "source"),
    [
        (9222, {}, None),
        (9221, {}, "9215: the engine's context is 9221 tokens .max_position_embeddings"),
        (9221, {"context_length": 9222}, None),
        (1 << 17, {"context_length": 4096}, "4090: .* 4096 tokens .sglang.server_args.context_length"),
    ],
)
def test_the_longest_rollout_must_fit_the_engines_context(
    tmp_path: Path, positions: int, server_args: dict, source: str | None
) -> None:
    chosen = replace(config(save_config(tmp_path, positions)), sglang=SGLangConfig(server_args=server_args))
    assert chosen.data.max_prompt_tokens + chosen.rollout.max_response_tokens == 9216
    if source is None:
        check_topology(chosen)
    else:
        with pytest.raises(
            ValueError, match=rf"^rollout.max_response_tokens: .* = 9216 must be at most {source}"
        ):
            check_topology(chosen)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path: .*nowhere is not a directory"):
        resolve_checkpoint(str(tmp_path / "nowhere"))


def test_a_missing_critic_is_not_taken_for_the_policy(checkpoint: Path, tmp_path: Path) -> None:
    chosen = config(checkpoint)
    critic = replace(chosen.critic, path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"^critic.path: .*nowhere is not a directory"):
        check_topology(replace(chosen, critic=critic, algorithm=replace(chosen.algorithm, advantage="gae")))


def test_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path: cannot read .*config.json"):
        check_topology(config(tmp_path))


def test_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no directory nobody/nothing, and no such checkpoint on the hub"):
        resolve_checkpoint("nobody/nothing")
