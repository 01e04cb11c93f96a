"""What a resumed driver needs besides weights: which prompts are next, what was in flight, what was evaluated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from megatron_ztrl.rollout.scheduler import PendingGroup
from megatron_ztrl.runtime.checkpoints import read_state
from megatron_ztrl.types import Prompt


@dataclass(frozen=True, kw_only=True)
class DriverState:
    """The driver between two steps; as it is here, that of a run that begins."""

    version: int = 0
    source: dict[str, Any] | None = None
    """The cursor of the prompts; None is their beginning."""
    pending: list[PendingGroup] = field(default_factory=list)
    """Groups that were admitted and not yet trained, in order. What they have written so far is in the journal."""
    next_group_id: int = 0
    evaluations: list[int] = field(default_factory=list)
    """The policies whose evaluation was running."""

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """Reads the state that a checkpoint was saved with.

        Raises:
            ValueError: The file is missing, broken, or from another version of the program.
        """
        state = read_state(checkpoint)
        if unknown := {f.name for f in dataclasses.fields(cls)} - set(state):
            raise ValueError(
                f"{checkpoint}: says nothing of {', '.join(sorted(unknown))}: an older version of ztrl wrote it; "
                "export it with tools/convert_checkpoint.py and start a new run from that"
            )
        pending = [
            PendingGroup(group_id=group["group_id"], prompt=Prompt(**group["prompt"]))
            for group in state["pending"]
        ]
        return cls(**{**state, "pending": pending})

    def as_json(self) -> dict[str, Any]:
        """For `CheckpointStore.save`, which knows the version by itself."""
        state = dataclasses.asdict(self)
        del state["version"]
        return state

    @property
    def pending_ids(self) -> set[int]:
        """The groups' numbers."""
        return {group.group_id for group in self.pending}
