"""Starts runs of the quickstart as a user would, and looks at what they left."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "examples" / "quickstart" / "config.yaml"
SMALL = (
    "data.eval.0.limit=16",
    "rollout.groups_per_step=4",
    "rollout.group_size=4",
    "eval.interval_steps=100",
    "eval.env_iterations=[2]",
    "eval.interval_env_iterations=[]",
    "logging.tensorboard=false",
)
MANY = ("rollout.groups_per_step=16", "rollout.group_size=8")
"""After ``SMALL``, where a gradient has to come of a step. The base policy solves one problem in five or six: of 16
rollouts all fail once in 25 runs, of these 128 once in 10^10."""
GREEDY = ("eval.temperature=0",)
LIMIT_SECONDS = 540
"""Tells a run that hangs from one on a machine that others keep busy: it takes less than a minute alone."""


def ztrl(*arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_ztrl.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kwargs,
    )


def rows(directory, split):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def processes_of(marker):
    """Every process of the run: Ray's, the servers' and their children."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if marker in (process.info["environ"] or {}).get("ZTRL_TEST_MARKER", "")
    ]


def shared_files(marker):
    """What the run's engines share through memory."""
    maps = []
    for process in processes_of(marker):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            maps.append(Path(f"/proc/{process.pid}/maps").read_text())
    return {Path(name) for name in re.findall("/dev/shm/sglang.*", "".join(maps))}


def assert_nothing_left(marker):
    """No process mentions the run, and none of Ray's or the servers' processes is an orphan of it."""
    deadline = time.monotonic() + 60
    while True:
        left = [process.info["cmdline"] for process in processes_of(marker)]
        if not left or time.monotonic() > deadline:
            assert left == []
            return
        time.sleep(0.2)
