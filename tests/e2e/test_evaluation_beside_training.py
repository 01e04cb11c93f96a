"""Training steps go on while an evaluation runs, on the real loop."""

import json

import pytest
from running import LIMIT_SECONDS, QUICKSTART, SMALL, assert_nothing_left, rows, ztrl


@pytest.mark.slow
def test_steps_end_while_an_evaluation_runs_whose_results_are_its_own_step_s(tmp_path, marker):
    run = tmp_path / "run"
    process = ztrl(
        "train",
        str(QUICKSTART),
        f"run.directory={run}",
        *SMALL,
        "train.num_steps=4",
        "eval.interval_steps=2",
        "eval.beside_steps=2",
        "eval.beside_share=0.001",  # one rollout at a time: longer than a step
        "eval.samples_per_prompt=2",
        "checkpoint.export_hf=false",
    )
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output
    assert [row["step"] for row in rows(run, "train")] == [1, 2, 3, 4]
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    order = [(row["split"], row["step"]) for row in written]
    # Step 3 ended while the policy of step 2 was evaluated; the publish of step 4 waited for that.
    assert order.index(("train", 3)) < order.index(("eval", 2)) < order.index(("train", 4))
    evaluations = {row["step"]: row for row in rows(run, "eval")}
    assert sorted(evaluations) == [0, 2, 4]
    versions = {
        step: (row["eval/oldest_version"], row["eval/newest_version"]) for step, row in evaluations.items()
    }
    assert versions == {0: (0, 0), 2: (2, 3), 4: (4, 4)}
    waits = {row["step"]: row["time/evaluation_seconds"] for row in rows(run, "train")}
    assert waits[4] > waits[3] and waits[3] < 0.01
    assert_nothing_left(marker)
