"""A checkpoint is complete or absent, and the newest ones are kept."""

import pytest

from megatron_ztrl.runtime.checkpoints import CheckpointStore, read_state


async def write_weights(directory):
    (directory / "weights").write_text("w")


async def test_the_newest_checkpoints_are_kept_and_read_back(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for version in (5, 10, 100):
        await store.save(version, write_weights, {"cursor": version * 2})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000010", "step_000100"]
    assert store.latest() == tmp_path / "step_000100"
    assert read_state(store.latest()) == {"version": 100, "cursor": 200}
    assert (store.latest() / "weights").read_text() == "w"


async def test_a_save_that_is_killed_leaves_the_last_good_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    await store.save(1, write_weights, {})

    async def killed(directory):
        (directory / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await store.save(2, killed, {})
    assert store.latest() == tmp_path / "step_000001"
    await store.save(2, write_weights, {})  # the left-over of the killed save is in nobody's way
    assert store.latest() == tmp_path / "step_000002"


def test_a_broken_state_file_is_named_with_the_fix(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state.json: unreadable .*remove"):
        read_state(tmp_path)


def test_there_is_no_latest_checkpoint_before_the_first(tmp_path):
    assert CheckpointStore(tmp_path / "none", keep_last=1).latest() is None
