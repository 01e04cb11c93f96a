"""Weights go from the actor's GPU to the engine's over NCCL, and both then say the same of the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_policy import QUICKSTART

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module", params=[1, 2], ids=["TP 1", "TP 2"])
def run(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training steps, and so three publishes, each of which compares a canary's log-probs."""
    size = request.param
    if torch.cuda.device_count() < 2 * size:
        pytest.skip(f"needs {2 * size} GPUs: NCCL wants actor and engine on different ones")
    directory = tmp_path_factory.mktemp("run")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_ztrl.cli", "train", str(QUICKSTART / "config.yaml")),
            f"run.directory={directory}",
            f"model.path={checkpoint}",
            "model.dtype=bfloat16",
            f"actor.tensor_parallel_size={size}",
            f"actor.sequence_parallel={'true' if size > 1 else 'false'}",
            f"engine.tensor_parallel_size={size}",
            "train.num_steps=2",
            "rollout.groups_per_step=4",
            "eval.interval_steps=0",
            "logging.tensorboard=false",
        ],
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return directory


def test_every_publish_passes_the_canary_and_the_engine_follows_the_trainer(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["split"] == "train"]
    assert len(steps) == 2
    # A publish raises when the canary differs by more than 0.1 nats; these are all sampled tokens.
    assert all(row["mismatch/gap_max"] < 0.5 for row in steps)


def test_a_publish_takes_no_more_than_the_planner_allows(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "train"][-1]
    # 23 MB of weights: this bounds what pausing, joining and checking cost, not the network.
    assert last["time/publish_seconds"] < 5
