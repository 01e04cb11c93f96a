"""What the types of the schema cannot say: ranges, and keys that must agree with each other."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ztrl.config.errors import ConfigError, did_you_mean
from megatron_ztrl.config.extensions import is_reference, load_object
from megatron_ztrl.config.schema import PROMPT_TEMPLATES, Config, DatasetConfig

_POSITIVE = math.ulp(0.0)
"""Smallest number above 0: a lower bound for what must be positive."""
_BELOW_ONE = math.nextafter(1.0, 0.0)

_WORLD_RANGES: dict[str, tuple[float, float]] = {
    "tensor_parallel_size": (1, math.inf),
    "pipeline_parallel_size": (1, math.inf),
    "virtual_pipeline_size": (1, math.inf),
    "data_parallel_size": (1, math.inf),
    "context_parallel_size": (1, math.inf),
    "max_tokens_per_microbatch": (1, math.inf),
    "learning_rate": (_POSITIVE, math.inf),
    "warmup_steps": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, _BELOW_ONE),
    "adam_beta2": (0, _BELOW_ONE),
    "adam_eps": (_POSITIVE, math.inf),
    "max_grad_norm": (_POSITIVE, math.inf),
}
_RANGES: dict[str, tuple[float, float]] = {
    "run.seed": (0, 2**32 - 1),  # what numpy's generators and the engines take
    "train.num_steps": (1, math.inf),
    "data.max_prompt_tokens": (1, math.inf),
    "rollout.groups_per_step": (1, math.inf),
    "rollout.group_size": (2, math.inf),
    "rollout.env_iterations": (0, math.inf),
    "rollout.max_staleness": (0, math.inf),
    "rollout.max_response_tokens": (1, math.inf),
    "rollout.deadline_seconds": (_POSITIVE, math.inf),
    "rollout.group_deadline_seconds": (_POSITIVE, math.inf),
    "rollout.max_call_tokens": (1, math.inf),
    "rollout.temperature": (_POSITIVE, math.inf),
    "rollout.top_p": (_POSITIVE, 1),
    "tool.run_timeout_seconds": (_POSITIVE, math.inf),
    "tool.max_output_tokens": (1, math.inf),
    "tool.max_concurrent": (1, math.inf),
    "tool.retries": (0, math.inf),
    "sandbox.workers": (1, math.inf),
    "sandbox.memory_limit_bytes": (1 << 24, math.inf),
    "sandbox.max_restarts": (0, math.inf),
    "reward.verify_timeout_seconds": (_POSITIVE, math.inf),
    "reward.verifier_workers": (1, math.inf),
    "algorithm.clip_low": (_POSITIVE, _BELOW_ONE),
    "algorithm.clip_high": (_POSITIVE, math.inf),
    "algorithm.gamma": (0, 1),
    "algorithm.gae_lambda": (0, 1),
    "algorithm.critic_warmup_steps": (0, math.inf),
    "algorithm.kl_coefficient": (0, math.inf),
    "algorithm.minibatches": (1, math.inf),
    "algorithm.importance_cap": (1, math.inf),
    "algorithm.importance_floor": (0, 1),
    "algorithm.mismatch_alarm": (_POSITIVE, math.inf),
    "algorithm.min_accuracy": (0, 1),
    "algorithm.max_accuracy": (0, 1),
    **{
        f"{section}.{key}": bounds for section in ("actor", "critic") for key, bounds in _WORLD_RANGES.items()
    },
    "critic.value_clip": (_POSITIVE, math.inf),
    "engine.count": (1, math.inf),
    "engine.tensor_parallel_size": (1, math.inf),
    "engine.port": (1024, 65535),
    "engine.max_running_requests": (1, math.inf),
    "engine.startup_timeout_seconds": (_POSITIVE, math.inf),
    "engine.request_timeout_seconds": (_POSITIVE, math.inf),
    "engine.max_restarts": (0, math.inf),
    "engine.health_timeout_seconds": (_POSITIVE, math.inf),
    "publish.bucket_bytes": (1 << 16, math.inf),
    "publish.verify_interval_steps": (0, math.inf),
    "publish.max_logprob_gap": (_POSITIVE, math.inf),
    "eval.interval_steps": (0, math.inf),
    "eval.beside_steps": (0, math.inf),
    "eval.beside_share": (_POSITIVE, 1),
    "eval.samples_per_prompt": (1, math.inf),
    "eval.temperature": (0, math.inf),
    "eval.top_p": (_POSITIVE, 1),
    "checkpoint.interval_steps": (0, math.inf),
    "checkpoint.keep_last": (1, math.inf),
    "logging.sample_rollouts": (0, math.inf),
}
"""Inclusive bounds. Optional keys are checked when they are set."""


def check_config(config: Config) -> None:
    """Refuses values that are out of range or contradict each other.

    Raises:
        ConfigError: One line per problem, each starting with the config path.
    """
    problems = [
        problem
        for check in (_ranges, _paths, _extensions, _lengths, _importance, _evaluation, _engines, _executors)
        for problem in check(config)
    ]
    if config.data.prompt_template == "plain" and config.reward.require_answer_tags:
        problems.append(
            "reward.require_answer_tags: the template 'plain' asks for no answer tags, so every reward would be "
            "0; set it to false"
        )
    low, high = config.algorithm.min_accuracy, config.algorithm.max_accuracy
    if low > high:
        problems.append(f"algorithm.min_accuracy: {low} is above algorithm.max_accuracy ({high})")
    samples = config.rollout.groups_per_step * config.rollout.group_size
    if config.algorithm.minibatches > samples:
        problems.append(
            f"algorithm.minibatches: {config.algorithm.minibatches} optimizer steps need at least as many rollouts, "
            f"but rollout.groups_per_step x rollout.group_size is {samples}"
        )
    if config.algorithm.critic_warmup_steps and config.algorithm.advantage != "gae":
        problems.append("algorithm.critic_warmup_steps: there is no critic; set algorithm.advantage to gae")
    if problems:
        raise ConfigError("\n".join(problems))


def _ranges(config: Config) -> Iterator[str]:
    for path, (low, high) in _RANGES.items():
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        # Written so that NaN, which fails every comparison, is refused.
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            finite = "" if math.isfinite(value) else "a finite number, "
            yield f"{path}: must be {finite}{_bounds(low, high)}, got {value}"


def _bounds(low: float, high: float) -> str:
    lower = "above 0" if low == _POSITIVE else f"at least {low:.10g}"
    if high == math.inf:
        return lower
    return f"{lower} and {'below 1' if high == _BELOW_ONE else f'at most {high:.10g}'}"


def _paths(config: Config) -> Iterator[str]:
    if not config.run.directory:
        yield "run.directory: must not be empty"
    for path, name in [
        ("model.path", config.model.path),
        *([] if config.critic.path is None else [("critic.path", config.critic.path)]),
        *([] if config.engine.path is None else [("engine.path", config.engine.path)]),
        *((f"{p}.path", d.path) for p, d in _datasets(config)),
    ]:
        if not name:
            yield f"{path}: must be a local path or a hub id"
        elif Path(name).is_absolute() and not Path(name).exists():
            yield f"{path}: {name} does not exist"
    for path, dataset in _datasets(config):
        if dataset.limit is not None and dataset.limit < 1:
            yield f"{path}.limit: must be at least 1, or null to read all rows, got {dataset.limit}"
    yield from _duplicates("data.eval", "two data sets are named", [d.name for d in config.data.eval])


def _extensions(config: Config) -> Iterator[str]:
    template = config.data.prompt_template
    if not is_reference(template) and template not in PROMPT_TEMPLATES:
        yield (
            f"data.prompt_template: no template {template!r}{did_you_mean(template, PROMPT_TEMPLATES)} (there are: "
            f"{', '.join(PROMPT_TEMPLATES)}; an own one is named as FILE.py:NAME)"
        )
    for key, reference in (
        ("reward.function", config.reward.function),
        ("tool.environment", config.tool.environment),
    ):
        if reference is None:
            continue
        try:
            extension = load_object(reference, key=key)
        except ConfigError as error:
            yield str(error)
            continue
        if not callable(extension):
            yield f"{key}: {reference} is no function or class but {type(extension).__name__}"
        elif key == "reward.function" and not inspect.iscoroutinefunction(extension):
            yield f"{key}: {reference} must be defined with async def: many responses are scored side by side"


def _datasets(config: Config) -> list[tuple[str, DatasetConfig]]:
    return [
        ("data.train", config.data.train),
        *((f"data.eval.{i}", d) for i, d in enumerate(config.data.eval)),
    ]


def _lengths(config: Config) -> Iterator[str]:
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    worlds = {"actor": config.actor} | (
        {"critic": config.critic} if config.algorithm.advantage == "gae" else {}
    )
    for section, world in worlds.items():
        if world.max_tokens_per_microbatch < longest:
            yield (
                f"{section}.max_tokens_per_microbatch: {world.max_tokens_per_microbatch} does not hold the longest "
                f"sequence, data.max_prompt_tokens + rollout.max_response_tokens = {longest}"
            )
    if config.rollout.env_iterations and config.tool.max_output_tokens >= config.rollout.max_response_tokens:
        yield (
            f"tool.max_output_tokens: {config.tool.max_output_tokens} leaves no room for an answer in "
            f"rollout.max_response_tokens ({config.rollout.max_response_tokens})"
        )


def _importance(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    if algorithm.old_logprobs == "trainer":
        return
    if algorithm.importance_correction in ("truncate", "mask"):
        yield (
            f"algorithm.importance_correction: '{algorithm.importance_correction}' compares the trainer's log-probs "
            "with the engine's, but algorithm.old_logprobs is 'engine'; set that to trainer, or this to none"
        )
    if algorithm.mismatch_alarm is not None:
        yield (
            "algorithm.mismatch_alarm: needs the trainer's log-probs; set algorithm.old_logprobs to trainer, or this "
            "to null"
        )


def _evaluation(config: Config) -> Iterator[str]:
    settings = config.eval
    if settings.interval_steps:
        if not settings.env_iterations:
            yield "eval.env_iterations: name at least one N, or set eval.interval_steps to 0"
        if not config.data.eval:
            yield "data.eval: name at least one data set, or set eval.interval_steps to 0"
    for name in ("env_iterations", "interval_env_iterations"):
        values: list[int] = getattr(settings, name)
        if any(value < 0 for value in values):
            yield f"eval.{name}: N must be at least 0, got {values}"
        yield from _duplicates(f"eval.{name}", "lists N twice:", values)
    if extra := sorted(set(settings.interval_env_iterations) - set(settings.env_iterations)):
        yield f"eval.interval_env_iterations: {extra} must also be in eval.env_iterations"


def _engines(config: Config) -> Iterator[str]:
    engine = config.engine
    if engine.port is not None and engine.port + engine.count - 1 > 65535:
        yield f"engine.port: {engine.count} engines from port {engine.port} go past 65535"


def _executors(config: Config) -> Iterator[str]:
    sandbox = config.sandbox
    for url in sandbox.urls:
        if not url.startswith(("http://", "https://")):
            yield f"sandbox.urls: must start with http:// or https://, got {url!r}"
    yield from _duplicates("sandbox.urls", "lists an executor twice:", sandbox.urls)
    if sandbox.token_file is not None and not sandbox.urls:
        yield "sandbox.token_file: is the token of sandbox.urls, which is empty; executors of the run need none"
    elif sandbox.token_file is not None and not Path(sandbox.token_file).is_file():
        yield f"sandbox.token_file: {sandbox.token_file} does not exist"


def _duplicates(path: str, what: str, values: list[Any]) -> Iterator[str]:
    for value in dict.fromkeys(value for value in values if values.count(value) > 1):
        yield f"{path}: {what} {value!r}"
