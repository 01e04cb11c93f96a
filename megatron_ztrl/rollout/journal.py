"""The journal: rollouts in flight survive the driver.

One file for each group, ``<run>/journal/train/00000042``, to which every engine call, every tool reply and every reward
is appended (`journal_records`). What a checkpoint is for the trainer this is for the rollouts, and the two need no
common moment, because of three rules:

* A group's file lies there until a *complete* checkpoint stands behind the group's release. A driver that dies
  between the two only leaves files that the next start removes.
* A run resumes at the checkpoint's version v. A policy later than v does not exist any more then, so every rollout
  is cut at the first token that one of those sampled. Groups that were trained after v are in their files, are cut
  likewise, and are trained again.
* Every prefix of a file is a state that the group was in. A last record that is half written, a record that is
  damaged, or a file that is missing cost what they held, which is rolled out again, and nothing else.

Nothing waits for the disk: a thread appends what one turn of the event loop has brought. Nothing is fsynced:
killing the process loses nothing that was handed to the kernel, and what a power cut takes is rolled out again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ztrl.config.schema import Config
from megatron_ztrl.rollout import journal_records as records
from megatron_ztrl.rollout.trajectory import Sampling, cut_tokens
from megatron_ztrl.types import NOT_SAMPLED, Rollout, RolloutGroup


@dataclass(kw_only=True)
class Restored:
    """What `Journal.restore` found."""

    rollouts: int = 0
    """That have tokens to go on with, finished ones included."""
    tokens: int = 0
    """Theirs, model and tool."""
    tokens_cut: int = 0
    """Of policies later than the checkpoint, and behind those."""
    damage: list[str] = field(default_factory=list)
    """One line for each file that could not be read to its end."""


class Journal:
    """The groups in flight, on disk.

    Args:
        directory: Of the files; made when the first one is written.
        identity: Tells runs apart whose rollouts cannot be mixed; files of another one are left out.
    """

    def __init__(self, directory: Path, *, identity: str) -> None:
        self._directory = directory
        self._identity = identity
        self._restored: dict[int, dict[int, Rollout]] = {}
        self._oldest_version: dict[int, float] = {}
        """Of the sampled tokens of every group that has a file."""
        self._checkpoint_version = 0
        """Of the newest checkpoint, written or being written."""
        self._batch: dict[int, list[bytes]] = {}
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._writes: deque[Future[None]] = deque()

    def clear(self) -> None:
        """Removes every file: of a run that begins, or has ended."""
        self._submit()
        self._writer.submit(self._remove).result()
        self._restored.clear()
        self._oldest_version.clear()

    def restore(self, version: int, *, pending: Collection[int] = (), next_group_id: int = 0) -> Restored:
        """Reads what an earlier run has left, and cuts it back to a checkpoint.

        Args:
            version: Of the checkpoint; 0 where there is none.
            pending: The groups that were admitted and not released then.
            next_group_id: Groups from here on were admitted later; they will be again, with the same prompts.
        """
        found = Restored()
        self._checkpoint_version = version
        for path in sorted(self._directory.glob("*")) if self._directory.is_dir() else []:
            if not path.name.isdecimal() or (
                int(path.name) < next_group_id and int(path.name) not in pending
            ):
                path.unlink()  # released before the checkpoint, or half rewritten
                continue
            group_id = int(path.name)
            file = records.read_group(path.read_bytes(), group_id, self._identity)
            if file.damage is not None:
                found.damage.append(f"{path}: {file.damage}; what is missing is rolled out again")
            for rollout in file.rollouts.values():
                found.tokens_cut += cut_after_version(rollout, version)
            rollouts = {index: rollout for index, rollout in file.rollouts.items() if rollout.token_ids}
            found.rollouts += len(rollouts)
            found.tokens += sum(len(rollout.token_ids) for rollout in rollouts.values())
            self._rewrite(path, group_id, rollouts)
        return found

    def recorder(self, group_id: int, index: int) -> RolloutRecorder:
        """Records one rollout; knows what an earlier run has of it."""
        of_group = self._restored.get(group_id, {})
        recorder = RolloutRecorder(self, group_id, index, of_group.pop(index, None))
        if not of_group:
            self._restored.pop(group_id, None)
        return recorder

    def released(self, groups: Iterable[RolloutGroup]) -> None:
        """Forgets trained (or refused) groups of which a resumed run could use no token.

        That is so if all were sampled after the newest checkpoint. It bounds the journal where checkpoints are rare.
        """
        known = [group.group_id for group in groups if group.group_id in self._oldest_version]
        self._drop(
            group_id for group_id in known if self._oldest_version[group_id] > self._checkpoint_version
        )

    def checkpoint_begun(self, version: int) -> None:
        """A checkpoint is being written: from now on a crash may be followed by a resume at ``version``."""
        self._checkpoint_version = version

    def checkpoint_complete(self, *, pending: Collection[int], next_group_id: int) -> None:
        """Forgets the groups that were released when the checkpoint was begun."""
        known = list(self._oldest_version)
        self._drop(group_id for group_id in known if group_id < next_group_id and group_id not in pending)

    def close(self) -> None:
        """Writes what is left.

        Raises:
            OSError: Something could not be written.
        """
        self._submit()
        self._writer.shutdown(wait=True)
        self._raise_what_failed()

    def append(
        self, group_id: int, frame: bytes, rollout: Rollout, oldest_version: int | None = None
    ) -> None:
        """Appends one record.

        Args:
            group_id: Of the group.
            frame: From `journal_records`.
            rollout: That it is about.
            oldest_version: Of the sampled tokens in the record, if it has any.

        Raises:
            OSError: An earlier record could not be written.
        """
        self._raise_what_failed()
        if not self._batch:
            asyncio.get_running_loop().call_soon(self._submit)
        frames = self._batch.setdefault(group_id, [])
        if group_id not in self._oldest_version:
            frames.append(records.group_record(group_id, self._identity, rollout))
        frames.append(frame)
        versions = (self._oldest_version.get(group_id), oldest_version)
        self._oldest_version[group_id] = min((v for v in versions if v is not None), default=math.inf)

    def _submit(self) -> None:
        """Hands the records so far to the thread."""
        if self._batch:
            batch, self._batch = self._batch, {}
            self._writes.append(self._writer.submit(self._write, batch))

    def _raise_what_failed(self) -> None:
        while self._writes and self._writes[0].done():
            self._writes.popleft().result()

    def _write(self, batch: Mapping[int, list[bytes]]) -> None:
        """In the thread."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for group_id, frames in batch.items():
            with self._path(group_id).open("ab") as file:
                file.write(b"".join(frames))

    def _remove(self) -> None:
        """In the thread."""
        if self._directory.exists():
            shutil.rmtree(self._directory)

    def _drop(self, group_ids: Iterable[int]) -> None:
        self._submit()
        for group_id in group_ids:
            self._oldest_version.pop(group_id, None)
            self._writes.append(self._writer.submit(self._path(group_id).unlink, missing_ok=True))

    def _rewrite(self, path: Path, group_id: int, rollouts: dict[int, Rollout]) -> None:
        """Makes a file say what was kept of it: the versions that were cut will be used again, for other policies."""
        if not rollouts:
            path.unlink()
            return
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(records.snapshot(group_id, self._identity, rollouts))
        os.replace(temporary, path)
        self._restored[group_id] = rollouts
        self._oldest_version[group_id] = min(
            version
            for rollout in rollouts.values()
            for version in rollout.weight_versions
            if version != NOT_SAMPLED
        )

    def _path(self, group_id: int) -> Path:
        return self._directory / f"{group_id:08d}"


@dataclass(frozen=True)
class RolloutRecorder:
    """Writes one rollout's changes down. Implements `trajectory.Recorder`."""

    journal: Journal
    group_id: int
    index: int
    """In the group."""
    restored: Rollout | None
    """What an earlier run has of this rollout; finished if it has a stop reason."""

    def sampled(self, rollout: Rollout, start: int) -> None:
        """See `trajectory.Recorder`."""
        if start == len(rollout.token_ids) and not rollout.ended and rollout.stop_reason is None:
            return  # interrupted before its first token
        frame, oldest_version = records.sampled_record(self.index, rollout, start)
        self.journal.append(self.group_id, frame, rollout, oldest_version)

    def turn_done(self, rollout: Rollout) -> None:
        """See `trajectory.Recorder`."""
        frame = records.turn_record(self.index, rollout, rollout.turns[-1])
        self.journal.append(self.group_id, frame, rollout)

    def finished(self, rollout: Rollout) -> None:
        """The rollout has stopped, and has its reward."""
        self.journal.append(self.group_id, records.finished_record(self.index, rollout), rollout)


def identity(config: Config, sampling: Sampling, *others: Any) -> str:
    """A short name for what rollouts and their rewards depend on; ``others`` are JSON values.

    Where it has changed, rollouts of the journal are not gone on with.
    """
    settings = (
        config.model.path,
        (sampling.temperature, sampling.top_p, sampling.max_response_tokens),
        (config.tool.environment, config.tool.run_timeout_seconds, config.tool.max_output_tokens),
        (config.reward.function, config.reward.require_answer_tags),
        config.data.prompt_template,  # its stop strings; its text is in the prompts
        others,
    )
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def cut_after_version(rollout: Rollout, version: int) -> int:
    """Takes a rollout back to before the first token of a policy later than ``version``.

    A tool reply stays if the block that it answers does. Returns how many tokens were cut.
    """
    length = len(rollout.token_ids)
    later = (position for position, sampled in enumerate(rollout.weight_versions) if sampled > version)
    keep = next(later, length)
    if keep == length:
        return 0
    cut_tokens(rollout, keep)
    rollout.turns = [turn for turn in rollout.turns if turn.end <= keep]
    rollout.ended, rollout.stop_reason, rollout.reward = False, None, None
    return length - keep
