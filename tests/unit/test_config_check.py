"""Values that are out of range or contradict each other are refused with their config path."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

from megatron_ztrl.config.check import _RANGES
from megatron_ztrl.config.load import ConfigError, check_config, load_config
from megatron_ztrl.config.schema import Config


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    (tmp_path / "p.jsonl").write_text("")
    path = tmp_path / "config.yaml"
    path.write_text(
        "run: {directory: runs/demo}\nmodel: {path: org/model}\ntrain: {num_steps: 3}\n"
        "data: {train: {name: t, path: p.jsonl}, eval: [{name: e, path: p.jsonl}]}\n"
    )
    return path


def test_the_defaults_are_accepted(yaml_file: Path) -> None:
    check_config(load_config(yaml_file))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.group_size=1"], "rollout.group_size: must be at least 2, got 1"),
        (["rollout.temperature=.nan"], "rollout.temperature: must be a finite number, above 0, got nan"),
        (["actor.learning_rate=.inf"], "actor.learning_rate: must be a finite number, above 0, got inf"),
        (["run.seed=-1"], "run.seed: must be at least 0 and at most 4294967295, got -1"),
        (["run.seed=4294967296"], "run.seed: must be at least 0 and at most 4294967295, got 4294967296"),
        (["actor.learning_rate=0"], "actor.learning_rate: must be above 0, got 0.0"),
        (["rollout.top_p=1.1"], "rollout.top_p: must be above 0 and at most 1, got 1.1"),
        (["actor.adam_beta1=1.0"], "actor.adam_beta1: must be at least 0 and below 1, got 1.0"),
        (
            ["data.prompt_template=plain"],
            "reward.require_answer_tags: the template 'plain' asks for no answer tags",
        ),
        (["engine.port=80"], "engine.port: must be at least 1024 and at most 65535, got 80"),
        (["engine.port=65535", "engine.count=2"], "engine.port: 2 engines from port 65535 go past 65535"),
        (["algorithm.min_accuracy=0.9", "algorithm.max_accuracy=0.8"], "min_accuracy: 0.9 is above"),
        (["eval.env_iterations=[]"], "eval.env_iterations: name at least one N"),
        (["eval.env_iterations=[2,2]"], "eval.env_iterations: lists N twice: 2"),
        (["eval.env_iterations=[-1]"], "eval.env_iterations: N must be at least 0"),
        (["eval.interval_env_iterations=[4]"], r"eval.interval_env_iterations: \[4\] must also be in"),
        (["data.eval=[]"], "data.eval: name at least one data set"),
        (["data.eval.0.limit=0"], "data.eval.0.limit: must be at least 1"),
        (["data.train.path=./nope.jsonl"], "data.train.path: .*nope.jsonl does not exist"),
        (["model.path=/nope"], "model.path: /nope does not exist"),
        (["run.directory="], "run.directory: "),
        (["actor.max_tokens_per_microbatch=9215"], "actor.max_tokens_per_microbatch: 9215 .* = 9216"),
        (["tool.max_output_tokens=8192"], "tool.max_output_tokens: 8192 leaves no room"),
        (
            ["algorithm.minibatches=3", "rollout.groups_per_step=1", "rollout.group_size=2"],
            "minibatches: 3 .* is 2",
        ),
        (["algorithm.critic_warmup_steps=1"], "critic_warmup_steps: there is no critic"),
        (
            ["algorithm.importance_correction=mask", "algorithm.old_logprobs=engine"],
            "importance_correction: 'mask' .*old_logprobs is 'engine'; set that to trainer, or this to none",
        ),
        (
            ["algorithm.mismatch_alarm=0.1", "algorithm.old_logprobs=engine"],
            "mismatch_alarm: needs the trainer's log-probs; set algorithm.old_logprobs to trainer",
        ),
        (["algorithm.importance_cap=0.9"], "importance_cap: must be at least 1, got 0.9"),
        (["algorithm.advantage=gae", "critic.value_clip=0"], "critic.value_clip: must be above 0"),
        (
            ["algorithm.advantage=gae", "critic.max_tokens_per_microbatch=100"],
            "critic.max_tokens_per_microbatch: 100 .* = 9216",
        ),
        (["critic.path=/nope"], "critic.path: /nope does not exist"),
        (["sandbox.urls=['localhost:8080']"], "sandbox.urls: must start with http"),
        (["sandbox.urls=['http://a:1','http://a:1']"], "sandbox.urls: lists an executor twice: 'http://a:1'"),
        (
            ["sandbox.urls=['http://a:1']", "sandbox.token_file=./no_token"],
            "sandbox.token_file: .*no_token does not exist",
        ),
        (["sandbox.token_file=p.jsonl"], "sandbox.token_file: is the token of sandbox.urls, which is empty"),
    ],
)
def test_a_bad_value_is_refused(yaml_file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_config(load_config(yaml_file, overrides))
    assert "\n" not in str(caught.value)


def test_the_longest_sequence_may_fill_a_microbatch_exactly(yaml_file: Path) -> None:
    check_config(load_config(yaml_file, ["actor.max_tokens_per_microbatch=9216"]))


def test_without_evaluation_no_data_set_is_needed(yaml_file: Path) -> None:
    check_config(load_config(yaml_file, ["eval.interval_steps=0", "data.eval=[]", "eval.env_iterations=[]"]))


def test_every_number_of_the_schema_has_a_range() -> None:
    unbounded = {"run.seed"}
    for field_of_config in dataclasses.fields(Config):
        section = field_of_config.name
        hint = typing.get_type_hints(Config)[section]
        hints = typing.get_type_hints(hint)
        for field in dataclasses.fields(hint):
            if hints[field.name] in (int, float, int | None, float | None):
                assert f"{section}.{field.name}" in _RANGES.keys() | unbounded
