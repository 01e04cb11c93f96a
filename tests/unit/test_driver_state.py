"""The driver's part of a checkpoint."""

import json

import pytest

from megatron_ztrl.rollout.scheduler import PendingGroup
from megatron_ztrl.runtime.driver_state import DriverState
from megatron_ztrl.types import Prompt


def prompt(name):
    return Prompt(
        prompt_id=name, problem="1+1", text="Q", ground_truth="2", data_source="d", metadata={"level": 3}
    )


def test_the_state_of_the_driver_comes_back_as_it_was(tmp_path):
    state = DriverState(
        version=7,
        source={"epoch": 1, "position": 5, "fingerprint": "f"},
        pending=[
            PendingGroup(group_id=12, prompt=prompt("d:4")),
            PendingGroup(group_id=15, prompt=prompt("d:2")),
        ],
        next_group_id=16,
        evaluations=[6],
    )
    (tmp_path / "state.json").write_text(json.dumps({"version": 7, **state.as_json()}))
    assert DriverState.read(tmp_path) == state
    assert state.pending_ids == {12, 15}


def test_a_checkpoint_of_an_older_program_is_one_clear_line(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"version": 7, "source": {}, "backlog": []}))
    with pytest.raises(
        ValueError, match=r"says nothing of evaluations, next_group_id, pending: an older version"
    ):
        DriverState.read(tmp_path)
