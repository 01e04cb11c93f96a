"""The driver is killed with -9, twice, in the middle of a run: nothing is lost, and nothing is trained twice."""

import collections
import json
import re

import pytest
from running import LIMIT_SECONDS, QUICKSTART, SMALL, assert_nothing_left, rows, shared_files, ztrl

pytestmark = pytest.mark.timeout(2400)  # some runs of at most ``LIMIT_SECONDS`` each
STEPS, GROUPS = 6, 4
ASYNCHRONOUS = (
    "rollout.max_staleness=1",
    "rollout.max_call_tokens=16",  # many records of each rollout
    "checkpoint.interval_steps=2",
    "checkpoint.export_hf=false",
    "logging.sample_rollouts=1000",
    f"train.num_steps={STEPS}",
    "eval.interval_steps=0",
)


def start(run, *arguments):
    return ztrl("train", str(QUICKSTART), f"run.directory={run}", *SMALL, *ASYNCHRONOUS, *arguments)


def resumed(output):
    """Rollouts and tokens that the run found in the journal."""
    found = re.search(r"resumed (\d+) rollouts with ([\d,]+) tokens from the journal", output)
    assert found, output
    return int(found[1]), int(found[2].replace(",", ""))


def kill_after(process, line_start, marker):
    """The driver alone gets the signal, just as the next step is on its way. Nothing is left of the others."""
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith(line_start):
            break
    else:
        pytest.fail(output)
    shared = shared_files(marker)
    assert shared
    process.kill()
    process.wait(timeout=LIMIT_SECONDS)
    assert_nothing_left(marker)
    assert [path for path in shared if path.exists()] == []
    return output


@pytest.mark.slow
def test_a_run_whose_driver_is_killed_twice_trains_every_group_once(tmp_path, marker):
    run = tmp_path / "run"
    kill_after(start(run), "step 3/", marker)

    output = kill_after(start(run, "--resume"), "step 5/", marker)
    rollouts, tokens = resumed(output)
    assert rollouts > 0 and tokens > rollouts  # of step 2's policy and earlier

    process = start(run, "--resume")
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output
    assert resumed(output)[0] > 0
    assert_nothing_left(marker)

    train = rows(run, "train")
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert max(row["train/staleness_max"] for row in train) == 1
    assert all(
        row.get("mismatch/gap_max", 0.0) < 1e-4 for row in train
    )  # every token is of the policy that it names
    groups_of_step, prompts_of_group = collections.defaultdict(list), collections.defaultdict(set)
    for line in (run / "rollouts.jsonl").read_text().splitlines():
        row = json.loads(line)
        group_id = int(row["rollout_id"].partition(".")[0])
        groups_of_step[row["step"]].append(group_id)
        prompts_of_group[group_id].add(row["prompt_id"])
    siblings = collections.Counter(group_id for step in groups_of_step.values() for group_id in step)
    assert {step: len(set(ids)) for step, ids in groups_of_step.items()} == dict.fromkeys(
        range(1, STEPS + 1), GROUPS
    )
    assert len(siblings) == STEPS * GROUPS  # none in two steps
    assert set(siblings.values()) == {4}  # rollout.group_size
    assert all(len(prompts) == 1 for prompts in prompts_of_group.values())
