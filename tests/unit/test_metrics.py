"""Metrics reach every sink, survive a crash, and are cut back when a run resumes."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

from megatron_ztrl.config.load import load_config
from megatron_ztrl.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    LoggingConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ztrl.observability import names
from megatron_ztrl.observability.jsonl import JsonLines, read_rows
from megatron_ztrl.observability.metrics import MetricsLogger
from megatron_ztrl.observability.rollout_log import RolloutLog
from megatron_ztrl.observability.run_info import source_revision, write_run_info
from megatron_ztrl.types import Prompt, Rollout, StopReason

ONLY_FILE = LoggingConfig(tensorboard=False)


def rows(directory: Path) -> list[dict[str, object]]:
    return list(read_rows(directory / "metrics.jsonl"))


def test_a_row_is_on_disk_before_the_logger_is_closed(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, ONLY_FILE)
    logger.log({"train/reward": 0.25}, step=1)
    logger.log({"eval/math/accuracy": 0.5}, step=1, split="eval", env_iterations=4)
    first, second = rows(tmp_path)
    assert (first["step"], first["split"], first["train/reward"]) == (1, "train", 0.25)
    assert "env_iterations" not in first
    assert (second["split"], second["env_iterations"], second["eval/math/accuracy"]) == ("eval", 4, 0.5)
    logger.close()


def test_a_resumed_run_drops_the_rows_past_its_checkpoint_and_goes_on_counting_time(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 6):
            file.write(json.dumps({"step": step, "split": "train", "wall_seconds": 100.0 * step}) + "\n")
        file.write('{"step": 6, "spl')  # the crash
    with MetricsLogger(tmp_path, ONLY_FILE, restored_step=3) as logger:
        assert 300.0 <= logger.wall_seconds < 310.0
        logger.log({"train/reward": 1.0}, step=4)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert 300.0 <= rows(tmp_path)[-1]["wall_seconds"] < 310.0  # type: ignore[operator]


def test_a_metric_that_is_not_finite_stops_the_run_and_is_named(tmp_path: Path) -> None:
    with (
        MetricsLogger(tmp_path, ONLY_FILE) as logger,
        pytest.raises(FloatingPointError, match="step 7: loss/policy is nan"),
    ):
        logger.log({"loss/policy": math.nan}, step=7)


def test_damage_in_the_middle_of_a_file_is_an_error_and_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON row"):
        rows(tmp_path)


def test_text_with_unicode_line_separators_stays_one_row(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "rows.jsonl") as lines:
        lines.append({"step": 1, "text": "a\u2028b\x85c\r\n"})
    assert [row["text"] for row in read_rows(tmp_path / "rows.jsonl")] == ["a\u2028b\x85c\r\n"]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard missing")
def test_tensorboard_gets_one_curve_for_each_env_iterations(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLogger(tmp_path, LoggingConfig(tensorboard=True)) as logger:
        for n, accuracy in ((0, 0.0), (4, 0.75)):
            logger.log({"eval/math/accuracy": accuracy}, step=20, split="eval", env_iterations=n)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (point,) = events.Scalars("eval/math/accuracy/N=4")
    assert (point.step, point.value) == (20, 0.75)
    assert events.Scalars("eval/math/accuracy/N=0")[0].value == 0.0


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_asking_for_wandb_without_having_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="logging.wandb_project: wandb is not installed"):
        MetricsLogger(tmp_path, LoggingConfig(tensorboard=False, wandb_project="demo"))


def test_a_rollout_is_written_as_runs_of_model_and_tool_text(tmp_path: Path) -> None:
    words = ["print(2)", "```", "out:2", "so ", "2"]
    rollout = Rollout(
        rollout_id="r0",
        prompt=Prompt(prompt_id="p0", problem="1+1?", text="Q", ground_truth="2", data_source="toy"),
        prompt_ids=[9],
        token_ids=[0, 1, 2, 3, 4],
        logprobs=[0.0] * 5,
        loss_mask=[True, True, False, True, True],
        weight_versions=[3, 3, -1, 3, 3],
        stop_reason=StopReason.STOP,
        reward=1.0,
    )
    with RolloutLog(tmp_path, lambda ids: "".join(words[i] for i in ids)) as log:
        log.log([rollout], step=3, split=names.EVAL, env_iterations=2)
    (row,) = read_rows(tmp_path / "rollouts.jsonl")
    assert row["segments"] == [
        {"author": "model", "text": "print(2)```"},
        {"author": "tool", "text": "out:2"},
        {"author": "model", "text": "so 2"},
    ]
    assert (row["step"], row["env_iterations"], row["reward"], row["stop_reason"]) == (3, 2, 1.0, "stop")
    assert (row["problem"], row["response_tokens"]) == ("1+1?", 5)


def test_the_run_directory_tells_how_to_repeat_the_run(tmp_path: Path) -> None:
    config = Config(
        run=RunConfig(directory=str(tmp_path / "run")),
        model=ModelConfig(path="org/model"),
        data=DataConfig(train=DatasetConfig(name="t", path="org/data")),
        train=TrainConfig(num_steps=1),
    )
    write_run_info(config)
    assert load_config(tmp_path / "run" / "config.yaml") == config
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert found["versions"]["python"].startswith("3.")
    assert found["machine"]["cpu_count"] >= 1
    assert found["machine"]["memory_bytes"] > 1 << 28


def test_outside_a_checkout_there_is_no_source_revision(tmp_path: Path) -> None:
    assert source_revision(tmp_path) is None
