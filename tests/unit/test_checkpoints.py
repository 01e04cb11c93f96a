"""A checkpoint is complete and unharmed, or absent; the newest ones are kept."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from megatron_ztrl.runtime.checkpoints import CheckpointStore, read_state, verify
from megatron_ztrl.trainer.integrity import seal


class Weights:
    """Saves a text, as ranks do: ``save_checkpoint`` begins, the file is there some time later."""

    def __init__(self, text="w", error=None):
        self.text = text
        self.is_written = True
        self._error = error

    async def save_checkpoint(self, directory):
        self._file = directory / "actor" / "weights"
        self._file.parent.mkdir()
        self._copy = self.text

    async def checkpoint_written(self):
        if self._error:
            raise self._error
        return self.is_written

    async def finish_checkpoint(self):
        self._file.write_text(self._copy)
        return {"actor/weights": seal(self._file)}


async def save(store, version, weights=None, **state):
    await store.save(version, weights or Weights(), state)
    await store.complete()


async def test_the_newest_checkpoints_are_kept_and_read_back(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for version in (5, 10, 100):
        await save(store, version, cursor=version * 2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000010", "step_000100"]
    assert store.latest() == tmp_path / "step_000100"
    verify(store.latest())
    assert read_state(store.latest()) == {"version": 100, "cursor": 200}
    assert (store.latest() / "actor" / "weights").read_text() == "w"


async def test_a_save_becomes_the_latest_once_it_is_written(tmp_path):
    store, weights = CheckpointStore(tmp_path, keep_last=2), Weights("first")
    await store.complete_if_written()  # nothing is under way
    weights.is_written = False
    await store.save(1, weights, {})
    weights.text = "trained on"
    await store.complete_if_written()
    assert store.latest() is None
    weights.is_written = True
    await store.complete_if_written()
    assert (tmp_path / "step_000001" / "actor" / "weights").read_text() == "first"


async def test_the_next_save_completes_the_one_before(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    await store.save(1, Weights(), {})
    await store.save(2, Weights(), {})
    assert store.latest() == tmp_path / "step_000001"
    await store.save(2, Weights("again"), {})  # as at the end of a run that has just saved
    assert (tmp_path / "step_000002" / "actor" / "weights").read_text() == "w"


async def test_the_driver_is_told_of_a_checkpoint_once_it_is_the_latest(tmp_path):
    told = []

    def on_complete(state):
        told.append((state["cursor"], store.latest().name))

    store, weights = CheckpointStore(tmp_path, keep_last=1, on_complete=on_complete), Weights()
    weights.is_written = False
    await store.save(1, weights, {"cursor": "a"})
    await store.complete_if_written()
    assert told == []
    await store.save(2, Weights(), {"cursor": "b"})
    await store.complete()
    assert told == [("a", "step_000001"), ("b", "step_000002")]


async def test_a_failed_write_is_raised_at_the_next_step_and_harms_no_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    await save(store, 1)
    await store.save(2, Weights(error=OSError("disk full")), {})
    with pytest.raises(OSError, match="disk full"):
        await store.complete_if_written()
    assert store.latest() == tmp_path / "step_000001"


@pytest.mark.parametrize(
    ("moment", "resumes_from"),
    [
        ("save_checkpoint", "step_000001"),  # the weights are being copied
        ("finish_checkpoint", "step_000001"),  # they are being written
        ("replace", "step_000001"),  # everything is written, and not yet renamed
        ("rmtree", "step_000002"),  # renamed; the old one is being deleted
    ],
)
def test_a_killed_save_leaves_a_good_checkpoint(tmp_path, moment, resumes_from):
    child = f"""
        import asyncio, os, shutil, signal, sys
        from pathlib import Path
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_checkpoints import CheckpointStore, Weights, save

        def die(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)

        async def main():
            store = CheckpointStore(Path({str(tmp_path)!r}), keep_last=1)
            await save(store, 1)
            owner = next(o for o in (Weights, os, shutil) if hasattr(o, {moment!r}))
            setattr(owner, {moment!r}, die)
            await save(store, 2)

        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(child)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    store = CheckpointStore(tmp_path, keep_last=1)
    assert store.latest() == tmp_path / resumes_from
    verify(store.latest())
    asyncio.run(save(store, 3))  # the left-over of the killed save is in nobody's way
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


@pytest.mark.parametrize("file", ["actor/weights", "state.json"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: os.truncate(path, 0), "has 0 bytes where [0-9]+ were written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "has been altered"),
    ],
)
async def test_a_damaged_file_is_named_with_the_fix(tmp_path, file, harm, message):
    store = CheckpointStore(tmp_path, keep_last=1)
    await save(store, 1)
    harm(store.latest() / file)
    fix = f"remove {store.latest()} to resume from the one before"
    with pytest.raises(ValueError, match=f"{store.latest() / file} {message}.*; {fix}"):
        verify(store.latest())


def test_a_missing_manifest_and_a_broken_state_file_are_named_with_the_fix(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is unreadable .*remove"):
        verify(tmp_path)
    with pytest.raises(ValueError, match=r"state.json: unreadable .*remove"):
        read_state(tmp_path)


def test_there_is_no_latest_checkpoint_before_the_first(tmp_path):
    assert CheckpointStore(tmp_path / "none", keep_last=1).latest() is None
